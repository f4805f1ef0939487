"""Rows of a weight, dense: for products of many tokens, where two passes over a dense tile cost little."""

from __future__ import annotations

import triton
import triton.language as tl

from trifold.kernels.weight_only.planes.unpacking import codes, first, planes, slots, values, word, words

_SLOT = tl.constexpr(32)


@triton.jit(do_not_specialize=["start", "stop", "GROUPS"])
def expand(
    w_ptr, p0_ptr, p1_ptr, p2_ptr, scale_ptr, zero_ptr, start, stop, N, K, GROUPS,
    LAYOUT: tl.constexpr, GRID: tl.constexpr, GROUP: tl.constexpr, MIDPOINT: tl.constexpr,
    ASYMMETRIC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """w (stop - start, K) = rows start..stop-1: (code - zero_point) * scale in float32, rounded once."""
    SLOTS: tl.constexpr = slots(LAYOUT)
    tile = tl.program_id(0)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = row < stop - start
    n = tl.minimum(start + row, N - 1)
    i = tl.arange(0, _SLOT)
    stride = N * _SLOT
    inner = n[:, None] * _SLOT + i[None, :]
    p0 = p0_ptr + tile.to(tl.int64) * words(LAYOUT, 0) * stride + inner
    p1 = p0
    p2 = p0
    if planes(LAYOUT) > 1:
        p1 = p1_ptr + tile.to(tl.int64) * words(LAYOUT, 1) * stride + inner
    if planes(LAYOUT) > 2:
        p2 = p2_ptr + tile.to(tl.int64) * words(LAYOUT, 2) * stride + inner
    for j in tl.static_range(SLOTS):
        if first(LAYOUT, 0, j):
            w0 = tl.load(p0 + word(LAYOUT, 0, j) * stride)
            if j == 0:
                w1 = w0
                w2 = w0
        if first(LAYOUT, 1, j):
            w1 = tl.load(p1 + word(LAYOUT, 1, j) * stride)
        if first(LAYOUT, 2, j):
            w2 = tl.load(p2 + word(LAYOUT, 2, j) * stride)
        value = values(codes(w0, w1, w2, LAYOUT, j), GRID)
        group = tl.minimum((tile * SLOTS + j) * _SLOT // GROUP, GROUPS - 1)
        if ASYMMETRIC:
            value -= tl.load(zero_ptr + group * N + n).to(tl.float32)[:, None]
        elif MIDPOINT != 0:
            value -= MIDPOINT
        value *= tl.load(scale_ptr + group * N + n).to(tl.float32)[:, None]
        k = (tile * SLOTS + j) * _SLOT + i
        place = row[:, None].to(tl.int64) * K + k[None, :]
        tl.store(w_ptr + place, value.to(w_ptr.dtype.element_ty), mask=inside[:, None] & (k < K)[None, :])
