"""Weights put together from parts, to any depth, with and without rounded activations."""

import torch

from trifold.core.canonical import Canonical, Chain, Dense, Identity, LowRank, Quantized, Split, Sum, with_rounded_input
from trifold.core.inputs import InputScheme
from trifold.core.ranges import fit_ranges
from trifold.core.scheme import Scheme
from trifold.quantizers.rtn import round_to_nearest


def values(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 31 * rows + columns))


def rounded(rows: int, columns: int, bits: int = 4, group=16, **more) -> Quantized:
    scheme, weight = Scheme(bits, group, **more), values(rows, columns)
    return round_to_nearest(weight, fit_ranges(weight, scheme), scheme)


def dense(rows: int, columns: int, dtype=torch.bfloat16) -> Dense:
    return Dense(values(rows, columns, 1).to(dtype))


def low_rank(rows: int, columns: int, rank: int, dtype=torch.float16) -> LowRank:
    return LowRank(values(rows, rank, 2).to(dtype), values(rank, columns, 3).to(dtype))


def index(*sizes: int) -> torch.Tensor:
    """Places in random order, so many for each part."""
    numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(len(numbers)))]


NESTED: dict[str, Canonical] = {
    "dense": dense(7, 43),
    "dense float32": dense(1, 2, torch.float32),
    "low rank": low_rank(7, 43, 5),
    "columns": Split(1, index(41, 2), (rounded(7, 41, 8, "channel", symmetric=True), dense(7, 2))),
    "rows": Split(0, index(5, 2), (rounded(5, 43), rounded(2, 43, 8))),
    "three rows": Split(0, index(1, 1, 1), (rounded(1, 43, 3), dense(1, 43), low_rank(1, 43, 1))),
    "one part": Split(1, index(43), (rounded(7, 43),)),
    "an empty part": Split(0, index(7, 0), (rounded(7, 43), dense(0, 43))),
    "sum": Sum((rounded(7, 43), low_rank(7, 43, 3))),
    "chain": Chain((rounded(7, 5, 8, "tensor"), rounded(5, 43, 3), dense(43, 43, torch.float32))),
    "rows of a factor": Chain((Split(0, index(5, 2), (Identity(5), rounded(2, 5))), rounded(5, 43))),
    "chain of one": Chain((rounded(7, 43),)),
    "two deep": Sum(
        (
            Split(
                1,
                index(32, 11),
                (
                    Chain((rounded(7, 6, 5, "channel"), dense(6, 32))),
                    Split(0, index(4, 3), (rounded(4, 11, 2), dense(4 - 1, 11, torch.float16))),
                ),
            ),
            low_rank(7, 43, 2, torch.float32),
        )
    ),
}
for _name in list(NESTED):
    for _scheme in (InputScheme(8), InputScheme(6, static=True), InputScheme(grid="fp8_e4m3")):
        NESTED[f"{_name}, {_scheme.label}"] = with_rounded_input(
            NESTED[_name], _scheme, torch.linspace(0.5, 3, NESTED[_name].shape[1])
        )
