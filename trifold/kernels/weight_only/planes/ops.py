"""The kernels as operators of torch, so that `torch.compile` and CUDA graphs take them as they are."""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import Any

import torch

from trifold.core.tables import TABLES
from trifold.kernels.shares import is_hopper, processors, share, workspace
from trifold.kernels.weight_only.planes.configs import MIDDLE, choose, choose_for
from trifold.kernels.weight_only.planes.layout import SLOT, Layout, layout_of

_BLOCK = 16384  # inputs that a block prepares at once, 16 warps at most


COMPUTED = ("int", "fp4_e2m1", "fp8_e4m3")
"""Grids whose numbers are computed from codes; others are looked up, in 16 values."""


@lru_cache(maxsize=8)
def grid_of(name: str) -> Any:
    """What the kernels call a grid: its name if its numbers are computed, else its values, each with its fp16 bits."""
    if name in COMPUTED:
        return name
    values = TABLES.get(name).values
    halves = torch.tensor(values, dtype=torch.float16, device="cpu").view(torch.int16)
    return tuple(zip(values, [half & 0xFFFF for half in halves.tolist()], strict=True))


def _numbers(planes: list[torch.Tensor], scale: torch.Tensor, zero: torch.Tensor | None) -> list[torch.Tensor]:
    """Three planes, scale and zero, in the order of the kernels; what is not there is never read."""
    return [*planes, *[planes[0]] * (3 - len(planes)), scale, scale if zero is None else zero]


def _constants(bits: int, group: int, grid: str, midpoint: float, zero: torch.Tensor | None) -> dict[str, Any]:
    return {
        "LAYOUT": layout_of(bits),
        "GRID": grid_of(grid),
        "GROUP": group,
        "MIDPOINT": midpoint,
        "ASYMMETRIC": zero is not None,
    }


def prepared(
    x: torch.Tensor, count: torch.Tensor, padded: int, chunk: int, step: int, slot: int = SLOT, span: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (M, in) as `activations.prepare` describes: its numbers, sums and factors. `count` becomes zero."""
    import triton

    from trifold.kernels.weight_only.planes.activations import prepare

    rows, in_features = x.shape
    a = x.new_empty(rows, padded, dtype=torch.float16)
    sums, inverse = (x.new_empty(shape, dtype=torch.float32) for shape in ((padded // chunk, rows), (rows,)))
    block = min(triton.next_power_of_2(padded), _BLOCK)
    prepare[(rows,)](
        x.contiguous(), a, sums, inverse, count, count.numel(), rows, in_features, padded, padded // chunk,
        STEP=step, SLOT=slot, SPAN=span, CHUNK=chunk, BLOCK=block, num_warps=max(1, block // 1024),
    )  # fmt: skip
    return a, sums, inverse


def _prepared(
    x: torch.Tensor, count: torch.Tensor, layout: Layout, flush: int, grid: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    padded = layout.tiles(x.shape[1]) * layout.tile
    return prepared(x, count, padded, flush, layout.shifts[1] if grid == "int" else 0)


@torch.library.custom_op("trifold::plane_linear", mutates_args=())
def plane_linear(
    x: torch.Tensor,
    planes: list[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group: int,
    grid: str,
    midpoint: float,
) -> torch.Tensor:
    """x (M, in) float16 or bfloat16 -> (M, out), the same dtype.

    planes: as `layout.pack_planes` made them. scale, and zero or none: (groups, out), of `group` inputs each, a
    multiple of 32. bias (out,), of x's dtype. The sums of one shape on one GPU are always added in the same order.
    """
    import triton

    from trifold.kernels.weight_only.planes.gemm import multiply

    layout, (tokens, in_features), out_features = layout_of(bits), x.shape, scale.shape[1]
    tiles, flush, many = layout.tiles(in_features), gcd(group, layout.tile), processors(x.device)
    config = choose_for(bits, tokens, out_features, many, grid in COMPUTED and is_hopper(x.device))
    blocks = triton.cdiv(tokens, config.bm) * triton.cdiv(out_features, config.bn)
    parts = 1 if config in MIDDLE.values() else share(config.warps, blocks, tiles, many)
    y = x.new_empty(tokens, out_features)
    with torch.cuda.device_of(x):
        partial, count = workspace(y, parts, blocks)
        multiply[(blocks, parts)](
            *_prepared(x, count, layout, flush, grid), *_numbers(planes, scale, zero),
            scale if bias is None else bias, y, partial, count, tokens, out_features, tiles, len(scale),
            **_constants(bits, group, grid, midpoint, zero), FLUSH=flush // SLOT, BIAS=bias is not None,
            BN=config.bn, BM=config.bm, SHARED=parts > 1,
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip
    return y


@plane_linear.register_fake
def _(x, planes, scale, zero, bias, bits, group, grid, midpoint):
    return x.new_empty(x.shape[0], scale.shape[1])


@torch.library.custom_op("trifold::plane_experts", mutates_args=())
def plane_experts(
    x: torch.Tensor,
    order: torch.Tensor,
    bounds: torch.Tensor,
    weight: torch.Tensor | None,
    planes: list[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group: int,
    grid: str,
    midpoint: float,
) -> torch.Tensor:
    """x (M, in) float16 or bfloat16, rows by experts -> (slots, out), the same dtype, zero where no expert is.

    order (slots,) and bounds (experts + 1,): a `Routing`, with a multiple of M slots. weight: of each slot, or none.
    planes, scale, zero, bias: those of `plane_linear` with one more dimension in front, of experts.
    """
    import triton

    from trifold.kernels.weight_only.planes.gemm import multiply_experts

    layout, (rows, in_features), (experts, groups, out_features) = layout_of(bits), x.shape, scale.shape
    slots, tiles, flush = len(order), layout.tiles(in_features), gcd(group, layout.tile)
    config = choose(bits, -(-slots // experts))
    m_blocks = (slots + min(experts, slots) * (config.bm - 1)) // config.bm
    blocks = m_blocks * triton.cdiv(out_features, config.bn)
    parts = share(config.warps, blocks, tiles, processors(x.device))
    y = x.new_zeros(slots, out_features)
    with torch.cuda.device_of(x):
        partial, count = workspace(y, parts, blocks)
        a, sums, inverse = _prepared(x, count, layout, flush, grid)
        multiply_experts[(blocks, parts)](
            a, sums, inverse, order, bounds, inverse if weight is None else weight.reshape(-1),
            *_numbers(planes, scale, zero), scale if bias is None else bias, y, partial, count,
            rows, out_features, slots, tiles, groups, experts, slots // rows, m_blocks,
            **_constants(bits, group, grid, midpoint, zero), FLUSH=flush // SLOT, BIAS=bias is not None,
            WEIGHTED=weight is not None, WIDTH=triton.next_power_of_2(experts),
            BN=config.bn, BM=config.bm, SHARED=parts > 1,
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip
    return y


@plane_experts.register_fake
def _(x, order, bounds, weight, planes, scale, zero, bias, bits, group, grid, midpoint):
    return x.new_empty(len(order), scale.shape[2])


@torch.library.custom_op("trifold::plane_rows", mutates_args=())
def plane_rows(
    planes: list[torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    group: int,
    grid: str,
    midpoint: float,
    in_features: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows start..stop-1 of the dequantised weight, (stop - start, in), computed in float32, rounded to `dtype`."""
    import triton

    from trifold.kernels.weight_only.planes.dequantize import expand

    w = torch.empty(stop - start, in_features, dtype=dtype, device=scale.device)
    rows = 64
    with torch.cuda.device_of(w):
        expand[(layout_of(bits).tiles(in_features), triton.cdiv(stop - start, rows))](
            w, *_numbers(planes, scale, zero), start, stop, scale.shape[1], in_features, len(scale),
            **_constants(bits, group, grid, midpoint, zero), BN=rows,
        )  # fmt: skip
    return w


@plane_rows.register_fake
def _(planes, scale, zero, bits, group, grid, midpoint, in_features, start, stop, dtype):
    return scale.new_empty(stop - start, in_features, dtype=dtype)
