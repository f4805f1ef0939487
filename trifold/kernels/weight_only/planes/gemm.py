"""The product: weights, unpacked in registers, are the left operand, so that eight tokens fill an instruction."""

from __future__ import annotations

import triton
import triton.language as tl

from trifold.kernels.shares_kernel import add_up
from trifold.kernels.weight_only.planes.unpacking import (
    INTERPRETED,
    first,
    is_lookup,
    lookup,
    numbers,
    planes,
    slots,
    unit,
    word,
    words,
)

_SLOT = tl.constexpr(32)


@triton.jit
def accumulate(
    a_ptr, sum_ptr, p0_ptr, p1_ptr, p2_ptr, scale_ptr, zero_ptr, n, m, M, N, TILES, GROUPS,
    LAYOUT: tl.constexpr, GRID: tl.constexpr, GROUP: tl.constexpr, FLUSH: tl.constexpr, MIDPOINT: tl.constexpr,
    ASYMMETRIC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Outputs n (BN,) times rows m (BM,) of the M that a has, over this program's share of tiles: (BN, BM) float32."""
    SLOTS: tl.constexpr = slots(LAYOUT)
    share = tl.cdiv(TILES, tl.num_programs(1))
    start = tl.program_id(1) * share
    stop = tl.minimum(start + share, TILES)
    k = tl.arange(0, _SLOT)
    stride = N * _SLOT
    inner = n[:, None] * _SLOT + k[None, :]
    a = a_ptr + m[None, :].to(tl.int64) * (TILES * SLOTS * _SLOT) + start * (SLOTS * _SLOT) + k[:, None]
    p0 = p0_ptr + start.to(tl.int64) * words(LAYOUT, 0) * stride + inner
    p1 = p0
    p2 = p0
    if planes(LAYOUT) > 1:
        p1 = p1_ptr + start.to(tl.int64) * words(LAYOUT, 1) * stride + inner
    if planes(LAYOUT) > 2:
        p2 = p2_ptr + start.to(tl.int64) * words(LAYOUT, 2) * stride + inner
    total = tl.zeros((BN, BM), dtype=tl.float32)
    for tile in range(start, stop):
        t = total
        for j in tl.static_range(SLOTS):
            if first(LAYOUT, 0, j):
                w0 = tl.load(p0 + word(LAYOUT, 0, j) * stride, eviction_policy="evict_first")
                if j == 0:
                    w1 = w0
                    w2 = w0
                if is_lookup(GRID) and not INTERPRETED:
                    v0, v1, v2, v3 = lookup(w0, GRID)
            if first(LAYOUT, 1, j):
                w1 = tl.load(p1 + word(LAYOUT, 1, j) * stride, eviction_policy="evict_first")
            if first(LAYOUT, 2, j):
                w2 = tl.load(p2 + word(LAYOUT, 2, j) * stride, eviction_policy="evict_first")
            x = tl.load(a + j * _SLOT)
            if is_lookup(GRID) and not INTERPRETED:
                if j == 0:
                    w = v0
                elif j == 1:
                    w = v1
                elif j == 2:
                    w = v2
                else:
                    w = v3
            else:
                w = numbers(w0, w1, w2, LAYOUT, j, GRID)
            t = tl.dot(w, x) if j % FLUSH == 0 else tl.dot(w, x, t)
            if j % FLUSH == FLUSH - 1:
                group = tl.minimum((tile * SLOTS + j) * _SLOT // GROUP, GROUPS - 1)
                if ASYMMETRIC:
                    sums = tl.load(sum_ptr + (tile * SLOTS + j) // FLUSH * M + m) * (1 / unit(GRID))
                    t -= tl.load(zero_ptr + group * N + n).to(tl.float32)[:, None] * sums[None, :]
                elif MIDPOINT != 0:
                    t -= (tl.load(sum_ptr + (tile * SLOTS + j) // FLUSH * M + m) * (MIDPOINT / unit(GRID)))[None, :]
                total += t * tl.load(scale_ptr + group * N + n).to(tl.float32)[:, None]
        a += SLOTS * _SLOT
        p0 += words(LAYOUT, 0) * stride
        if planes(LAYOUT) > 1:
            p1 += words(LAYOUT, 1) * stride
        if planes(LAYOUT) > 2:
            p2 += words(LAYOUT, 2) * stride
    return total


@triton.jit(do_not_specialize=["M", "TILES", "GROUPS"])
def multiply(
    a_ptr, sum_ptr, inverse_ptr, p0_ptr, p1_ptr, p2_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, partial_ptr, count_ptr,
    M, N, TILES, GROUPS,
    LAYOUT: tl.constexpr, GRID: tl.constexpr, GROUP: tl.constexpr, FLUSH: tl.constexpr, MIDPOINT: tl.constexpr,
    ASYMMETRIC: tl.constexpr, BIAS: tl.constexpr, SHARED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y (M, N) = a, as `activations.prepare` made it, times planes (tiles, N, 32).

    scale, zero: (GROUPS, N), of GROUP inputs each; without ASYMMETRIC the zero-point is MIDPOINT. FLUSH slots, which
    share a scale, are summed by tensor cores before they are scaled. With SHARED the programs along the second axis
    share the tiles of one piece of y.
    """
    pid = tl.program_id(0)
    m_blocks = tl.cdiv(M, BM)
    n = pid // m_blocks * BN + tl.arange(0, BN)
    m = pid % m_blocks * BM + tl.arange(0, BM)
    inside = (n < N)[:, None] & (m < M)[None, :]
    n = tl.minimum(n, N - 1)
    m = tl.minimum(m, M - 1)
    total = accumulate(
        a_ptr, sum_ptr, p0_ptr, p1_ptr, p2_ptr, scale_ptr, zero_ptr, n, m, M, N, TILES, GROUPS,
        LAYOUT, GRID, GROUP, FLUSH, MIDPOINT, ASYMMETRIC, BN, BM,
    )  # fmt: skip
    place = m[None, :] * N + n[:, None]
    total, whole = add_up(total, partial_ptr, count_ptr, pid, tl.cast(M, tl.int64) * N, place, inside, SHARED)
    if whole:
        y = total * unit(GRID) * tl.load(inverse_ptr + m)[None, :]
        if BIAS:
            y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "SLOTS", "TILES", "GROUPS", "EXPERTS", "CHOICES", "M_BLOCKS"])
def multiply_experts(
    a_ptr, sum_ptr, inverse_ptr, order_ptr, bounds_ptr, weight_ptr,
    p0_ptr, p1_ptr, p2_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, partial_ptr, count_ptr,
    M, N, SLOTS, TILES, GROUPS, EXPERTS, CHOICES, M_BLOCKS,
    LAYOUT: tl.constexpr, GRID: tl.constexpr, GROUP: tl.constexpr, FLUSH: tl.constexpr, MIDPOINT: tl.constexpr,
    ASYMMETRIC: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y (SLOTS, N): row s is row s // CHOICES of a, M rows as `activations.prepare` made them, times the planes of
    the expert that has s among its slots, `order[bounds[expert] : bounds[expert + 1]]`; rows of no expert are left.

    Planes, scale, zero and bias are those of `multiply`, one expert after the other. With WEIGHTED row s is multiplied
    by weight (SLOTS,). M_BLOCKS: at least as many blocks of BM tokens as there are, each of one expert; those that
    are too many return at once. WIDTH: a power of two, EXPERTS or more.
    """
    pid = tl.program_id(0)
    block = pid % M_BLOCKS
    i = tl.arange(0, WIDTH)
    begins = tl.load(bounds_ptr + i, mask=i < EXPERTS, other=0)
    ends = tl.load(bounds_ptr + i + 1, mask=i < EXPERTS, other=0)
    blocks = tl.cdiv(ends - begins, BM)
    before = (tl.cumsum(blocks, axis=0) <= block) & (i < EXPERTS)
    expert = tl.sum(before.to(tl.int32), axis=0)
    if expert == EXPERTS:
        return
    rank = block - tl.sum(tl.where(before, blocks, 0), axis=0)
    end = tl.sum(tl.where(i == expert, ends, 0), axis=0)
    place = tl.sum(tl.where(i == expert, begins, 0), axis=0) + rank * BM + tl.arange(0, BM)
    slot = tl.load(order_ptr + tl.minimum(place, end - 1)).to(tl.int32)
    m = slot // CHOICES
    n = pid // M_BLOCKS * BN + tl.arange(0, BN)
    inside = (n < N)[:, None] & (place < end)[None, :]
    n = tl.minimum(n, N - 1)
    weight = expert.to(tl.int64) * TILES * N * 32
    groups = expert.to(tl.int64) * GROUPS * N
    total = accumulate(
        a_ptr, sum_ptr, p0_ptr + weight * words(LAYOUT, 0), p1_ptr + weight * words(LAYOUT, 1),
        p2_ptr + weight * words(LAYOUT, 2), scale_ptr + groups, zero_ptr + groups, n, m, M, N, TILES, GROUPS,
        LAYOUT, GRID, GROUP, FLUSH, MIDPOINT, ASYMMETRIC, BN, BM,
    )  # fmt: skip
    place = slot[None, :] * N + n[:, None]
    total, whole = add_up(total, partial_ptr, count_ptr, pid, tl.cast(SLOTS, tl.int64) * N, place, inside, SHARED)
    if whole:
        y = total * unit(GRID) * tl.load(inverse_ptr + m)[None, :]
        if BIAS:
            y += tl.load(bias_ptr + expert * N + n).to(tl.float32)[:, None]
        if WEIGHTED:
            y *= tl.load(weight_ptr + slot).to(tl.float32)[None, :]
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
