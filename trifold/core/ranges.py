"""From weights to scales, zero-points and codes: the ranges that every quantiser shares.

Ranges always include zero, so that an integer zero-point is a code, which stands for zero exactly. Scales (and
real zero-points) are rounded to the dtype they are stored in *before* codes are chosen, so a stored checkpoint
dequantises to exactly the weights that calibration saw.

Of a table of values, solvers work on the values themselves, as if they were codes with the zero-point 0;
`to_stored` turns them into the table's codes at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from trifold.core.range_search import search_ranges
from trifold.core.scheme import SCALE_DTYPES, Scheme

Ranges = Literal["minmax", "mse"]

SHRINK_STEPS = 80
SHRINK_FLOOR = 0.2
_ELEMENTS_AT_ONCE = 2**20  # elements of a slab, so that work on a large matrix stays in cache and memory


def group_view(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """(rows, in) -> (rows, groups, width); a shorter last group is filled with copies of its last element."""
    rows, columns = matrix.shape
    short = -columns % width
    if short:
        matrix = torch.cat([matrix, matrix[:, -1:].expand(rows, short)], dim=1)
    return matrix.reshape(rows, -1, width)


def expand_groups(per_group: torch.Tensor, shape: Sequence[int], width: int) -> torch.Tensor:
    """Scales or zero-points (out, groups), or (1, 1), -> one value per weight, of `shape` (out, in)."""
    if per_group.shape == (1, 1):
        return per_group.expand(shape[0], shape[1])
    return per_group.repeat_interleave(width, dim=1)[:, : shape[1]]


def round_scale(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Scales as stored, in float32: rounded to `scheme.scale_dtype`, positive and finite; zero becomes 1."""
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    info = torch.finfo(dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale.clamp(info.tiny, info.max).to(dtype).float()


def from_bounds(low: torch.Tensor, high: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale (as stored, float32) and zero-point (as stored, float32, None if symmetric) covering [low, high]."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme.table is not None:
        return round_scale(torch.maximum(-low, high) / scheme.table.largest, scheme), None
    if scheme.symmetric:
        steps = max(2 ** (scheme.bits - 1) - 1, 0.5)
        return round_scale(torch.maximum(-low, high) / steps, scheme), None
    scale = round_scale((high - low) / scheme.max_code, scheme)
    return scale, round_zero(-low / scale, scheme)


def round_zero(zero: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Zero-points as stored, in float32: a code, or a real number rounded to `scheme.scale_dtype`."""
    if scheme.zero_point == "real":
        dtype = SCALE_DTYPES[scheme.scale_dtype]
        return zero.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype).float()
    return zero.round().clamp(0, scheme.max_code)


def to_codes(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | float, scheme: Scheme
) -> torch.Tensor:
    """Nearest codes, as floats in 0..max_code, or nearest values of a table; `scale` and `zero_point` broadcast
    against `weight`."""
    if scheme.grid != "int":
        return scheme.table.snap(weight / scale)  # type: ignore[union-attr]
    return (weight / scale + zero_point).round_().clamp_(0, scheme.max_code)


def to_stored(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What `to_codes` gave, as it is stored: uint8."""
    return codes.to(torch.uint8) if scheme.table is None else scheme.table.encode(codes)


def fit_ranges(
    weight: torch.Tensor,
    scheme: Scheme,
    ranges: Ranges = "minmax",
    importance: torch.Tensor | None = None,
    norm: float = 2.4,
    steps: int = SHRINK_STEPS,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero-points of a weight.

    weight: (out, in) float32. importance: (in,) non-negative weight of each input feature in the search, such
    as the mean of its squared activations; None counts all alike.
    Returns scale float32 and zero_point float32 (None if symmetric), both `scheme.scale_shape`.

    `minmax` covers the extremes. `mse` shrinks them by the factor, of `steps` in 1..0.2, that has the least
    `sum importance * |error|**norm` per group (the search of the GPTQ authors' code, whose norm is 2.4); it is
    never worse than `minmax` in that norm.
    """
    rows, columns = weight.shape
    if scheme.group_size == "tensor":
        weight, importance = weight.reshape(1, -1), None if importance is None else importance.repeat(rows)
    width = weight.shape[1] if scheme.group_size == "tensor" else scheme.group_width(columns)
    factors = [1 - step * (1 - SHRINK_FLOOR) / steps for step in range(steps)]
    if ranges == "mse":
        each = weight.new_ones(weight.shape[1]) if importance is None else importance
        found = search_ranges(weight, width, each, factors, norm, scheme)
        if found is not None:
            return found
    cost = _importance_view(weight.shape[1], width, importance, weight)
    scales, zeros = [], []
    for slab in slabs(weight, width):
        groups = group_view(slab, width)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale, zero = from_bounds(low, high, scheme)
        if ranges == "mse":
            scale, zero = _search(groups, low, high, scale, zero, scheme, cost, norm, factors)
        scales.append(scale.squeeze(-1))
        zeros.append(None if zero is None else zero.squeeze(-1))
    return torch.cat(scales), None if scheme.symmetric else torch.cat([z for z in zeros if z is not None])


def rows_at_once(columns: int) -> int:
    """Rows of a matrix of so many columns that are worked on together."""
    return max(1, _ELEMENTS_AT_ONCE // columns)


def slabs(weight: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """(rows, in) in parts of some rows."""
    return iter(weight.split(rows_at_once(max(weight.shape[1], width)), dim=0))


def _importance_view(columns: int, width: int, importance: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """(1, groups, width); the filling of a short last group counts nothing."""
    cost = torch.ones(columns, device=like.device) if importance is None else importance.to(like)
    padded = torch.nn.functional.pad(cost.reshape(1, -1), (0, -columns % width))
    return padded.reshape(1, -1, width)


def _search(
    groups: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: Scheme,
    cost: torch.Tensor,
    norm: float,
    factors: list[float],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    def error(scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        z = scheme.midpoint if zero is None else zero
        difference = to_codes(groups, scale, z, scheme).sub_(z).mul_(scale).sub_(groups)
        if norm in (2, 4):  # much faster than pow
            power = difference.square_() if norm == 2 else difference.square_().square_()
        else:
            power = difference.abs_().pow_(norm)
        return power.mul_(cost).sum(-1, keepdim=True)

    best = error(scale, zero)
    for factor in factors[1:]:
        new_scale, new_zero = from_bounds(low * factor, high * factor, scheme)
        loss = error(new_scale, new_zero)
        better = loss < best
        best = torch.where(better, loss, best)
        scale = torch.where(better, new_scale, scale)
        if zero is not None and new_zero is not None:
            zero = torch.where(better, new_zero, zero)
    return scale, zero
