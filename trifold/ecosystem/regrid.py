"""The same weight in a wider scheme: its codes moved, its scales repeated, no value changed."""

from __future__ import annotations

import torch

from trifold.core.canonical import Quantized
from trifold.core.scheme import SCALE_DTYPES, Scheme
from trifold.ecosystem.base import by_row, not_integers


def misfit(weight: Quantized, scheme: Scheme) -> str | None:
    """Why a scheme of integers has no codes for the weight, or no scale where one of its groups needs it; None if
    `regrid` works. Looks at scales and zero-points, not at codes: any may occur."""
    why = not_integers(weight)
    if why is not None:
        return why
    columns, width, wanted = weight.shape[1], _width(weight.scheme, weight), _width(scheme, weight)
    if width != columns and width % wanted:
        return f"groups of {width} inputs cannot be cut into groups of {wanted}"
    least, largest = _zero_range(weight)
    if scheme.symmetric:
        lowest, highest = -int(scheme.midpoint), scheme.max_code - int(scheme.midpoint)
        if -largest < lowest or weight.scheme.max_code - least > highest:
            span = f"{-largest}..{weight.scheme.max_code - least}"
            return f"its codes less their zero-points, {span}, are not within {lowest}..{highest}"
    elif max(weight.scheme.max_code, largest) > scheme.max_code:
        return f"its codes have {weight.scheme.bits} bits, not {scheme.bits}"
    return None


def regrid(weight: Quantized, scheme: Scheme) -> Quantized:
    """The weight in another scheme, of which `misfit` says None. Scales are cast to the scheme's dtype."""
    (scale, zero), width, wanted = by_row(weight), _width(weight.scheme, weight), _width(scheme, weight)
    shape = scheme.scale_shape(*weight.shape)
    if zero is None:
        zero = torch.full(scale.shape, int(weight.scheme.midpoint), dtype=torch.uint8)
    spread = _expand(zero.short(), width, weight.shape[1])
    codes = weight.codes
    if scheme.symmetric:
        codes = (codes.short() - spread + int(scheme.midpoint)).to(torch.uint8)
    scale = scale.to(SCALE_DTYPES[scheme.scale_dtype])
    if scheme.group_size == "tensor":
        return Quantized(codes, weight.scale.to(scale.dtype), None if scheme.symmetric else zero[:1, :1], scheme)
    every = range(0, weight.shape[1], wanted)
    scale = _expand(scale, width, weight.shape[1])[:, list(every)].reshape(shape).contiguous()
    own = None if scheme.symmetric else spread[:, list(every)].to(torch.uint8).reshape(shape).contiguous()
    return Quantized(codes, scale, own, scheme)


def _width(scheme: Scheme, weight: Quantized) -> int:
    return scheme.group_width(weight.shape[1])


def _expand(per_group: torch.Tensor, width: int, columns: int) -> torch.Tensor:
    return per_group.repeat_interleave(width, dim=1)[:, :columns]


def _zero_range(weight: Quantized) -> tuple[int, int]:
    if weight.zero_point is None:
        return int(weight.scheme.midpoint), int(weight.scheme.midpoint)
    return int(weight.zero_point.min()), int(weight.zero_point.max())
