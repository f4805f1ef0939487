"""Weights that a format cannot hold, rounded a second time: to the nearest scheme that it can."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from trifold.core.canonical import Canonical, Dense, Identity, LowRank, Nested, Quantized, RoundedInput, Sparse, Split
from trifold.core.ranges import fit_ranges
from trifold.core.scheme import SCALE_DTYPES, ScaleDtype, Scheme
from trifold.ecosystem.base import inner, not_integers
from trifold.ecosystem.experts import parted
from trifold.ecosystem.regrid import misfit, regrid
from trifold.formats import describe, label
from trifold.quantizers.rtn import round_to_nearest

Refusal = Callable[[Canonical], "str | None"]
_GROUPS = (128, 64, 32, 16)
_OWN_SCALE = {"bfloat16": 2.0**100, "float16": 1 + 2.0**-10, "float32": 1 + 2.0**-23}  # exact in no other dtype


def plain(weight: Canonical) -> Canonical:
    """The same weight, as one grid of integers where it is one: without what is done to its input, and with the
    codes of zero where a mask drops weights."""
    found = inner(weight)
    if not isinstance(found, Sparse) or not_integers(found.values):
        return found
    values = found.values
    assert isinstance(values, Quantized)
    zeros = replace(values, codes=torch.zeros_like(values.codes))
    if values.zero_point is None:
        zero = torch.full_like(values.codes, int(values.scheme.midpoint))
    else:
        zero = (-replace(zeros, scale=torch.ones_like(values.scale)).dequantize()).to(torch.uint8)
    return replace(values, codes=torch.where(found.mask, values.codes, zero))


def nearest_scheme(weight: Canonical, refusal: Refusal) -> Scheme | None:
    """The scheme of integers, or of 8-bit floats, nearest to the weight's own that is not refused; None if all are.

    More bits come before fewer, its own group size before smaller ones, those before larger
    ones and one scale a row.
    """
    return next((each for each in _schemes(weight) if refusal(blank(weight.shape, each)) is None), None)


@dataclass(frozen=True)
class Way:
    """How a weight becomes one that a format holds. scheme: None if it only has to be `plain`."""

    scheme: Scheme | None = None

    def __call__(self, weight: Canonical) -> Canonical:
        return plain(weight) if self.scheme is None else rounded(weight, self.scheme)

    def header(self, weight: Canonical) -> Canonical:
        """What stands for the result as long as no code is read."""
        return plain(weight) if self.scheme is None else blank(weight.shape, self.scheme)


def find_way(weight: Canonical, refusal: Refusal) -> Way | None:
    """The nearest to what a format refuses; None if it holds nothing of this shape."""
    if refusal(plain(weight)) is None:
        return Way()
    scheme = nearest_scheme(weight, refusal)
    return None if scheme is None else Way(scheme)


def on_grids(weight: Canonical) -> bool:
    """Whether all of it was rounded, each part to one grid."""
    match weight:
        case Quantized():
            return True
        case Sparse(values, _, _) | RoundedInput(values, _, _):
            return on_grids(values)
        case Split(_, _, parts):
            return all(on_grids(part) for part in parts)
    return False


def parts_of(weight: Canonical, count: int) -> list[Canonical]:
    """A weight's rows in equal parts, also of one that is stored whole."""
    found = parted(weight, count)
    if count > 1 and found[0] is weight:
        return [Dense(part) for part in weight.dequantize().chunk(count)]
    return found


def blank(shape: tuple[int, int], scheme: Scheme) -> Quantized:
    """Some weight of a scheme: its scales are exact in no other dtype, its zero-points at both ends."""
    size = scheme.scale_shape(*shape)
    scale = torch.full(size, _OWN_SCALE[scheme.scale_dtype], dtype=SCALE_DTYPES[scheme.scale_dtype])
    ends = (torch.arange(math.prod(size)) % 2 * scheme.max_code).to(torch.uint8).reshape(size)
    codes = torch.empty(shape, dtype=torch.uint8, device="meta")
    return Quantized(codes, scale, None if scheme.symmetric else ends, scheme)


def rounded(weight: Canonical, scheme: Scheme) -> Quantized:
    """The weight in a scheme: its codes kept, only the scales cast, or all of it rounded to nearest in ranges that
    are searched, whichever has the smaller error."""
    source, values = plain(weight), weight.dequantize()
    made = round_to_nearest(values, fit_ranges(values, scheme, "mse"), scheme)
    if scheme.grid == "int" and isinstance(source, Quantized) and misfit(source, scheme) is None:
        kept = regrid(source, scheme)
        if bool(torch.isfinite(kept.scale).all()) and _error(kept, values) <= _error(made, values):
            return kept
    return made


def _error(made: Canonical, values: torch.Tensor) -> float:
    return _square(made.dequantize() - values)


def _square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _schemes(weight: Canonical) -> Iterator[Scheme]:
    bits, group, symmetric, dtype = _nature(weight)
    smaller = [size for size in _GROUPS if not isinstance(group, int) or size < group]
    groups = list(dict.fromkeys([group, *smaller, *reversed(_GROUPS), "channel"]))
    dtypes: list[ScaleDtype] = list(dict.fromkeys([dtype, "float16", "bfloat16", "float32"]))  # type: ignore[list-item]
    for wanted in (*range(bits, 9), *range(bits - 1, 1, -1)):
        for even in (symmetric, not symmetric):
            for size in groups:
                yield from (Scheme(wanted, size, even, each) for each in dtypes)  # type: ignore[arg-type]
    yield from (Scheme(8, "channel", True, each, "fp8_e4m3") for each in dtypes)


def _nature(weight: Canonical) -> tuple[int, int | str, bool, str]:
    """Bits, group size, whether symmetric, and dtype of scales: of the widest of its rounded parts; 8 bits for what
    has parts that were not rounded."""
    found = inner(weight)
    leaves = list(_leaves(found))
    own = [leaf.scheme for leaf in leaves if isinstance(leaf, Quantized)]
    widest = max(own, key=lambda scheme: scheme.bits, default=Scheme(8, 128, True))
    bits = widest.bits if len(own) == len(leaves) else 8
    group: int | str = widest.group_size
    if isinstance(found, Split) and found.axis == 1:  # columns in any order: a part for each group
        group = found.shape[1] // len(found.parts)
    return max(bits, 2), group, widest.symmetric, widest.scale_dtype


def _leaves(weight: Canonical) -> Iterator[Canonical]:
    match weight:
        case Sparse(values, _, _) | RoundedInput(values, _, _):
            yield from _leaves(values)
        case Nested():
            for part in weight.parts:
                yield from _leaves(part)
        case LowRank() | Dense() | Quantized():
            yield weight
        case Identity():
            return


@dataclass
class Losses:
    """What was lost, layer by layer, as it is written. error: sum of squares of what a layer changed by, norm: of its
    weights, over all layers so far."""

    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: float = 0.0
    norm: float = 0.0

    def add(self, name: str, before: Canonical, after: Canonical) -> None:
        """A layer, also one that stayed what it was."""
        values = before.dequantize()
        norm, error = _square(values), 0.0 if after is before else _error(after, values)
        self.norm += norm
        self.error += error
        if after is not before:
            own, other = (label(describe(weight)) for weight in (before, after))
            self.layers[name] = {"from": own, "to": other, "error": _relative(error, norm)}

    def report(self) -> dict[str, Any]:
        """`requantized`: of each layer that was rounded again what it was and is, and the norm of the change over the
        norm of its weights; `error`: the same of all rounded layers together."""
        return {"requantized": self.layers, "error": _relative(self.error, self.norm)}


def _relative(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else 0.0
