"""The product: weights, unpacked in registers, are the left operand, so that eight tokens fill an instruction."""

from __future__ import annotations

import triton
import triton.language as tl

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
    share the tiles of one piece of y; the one that is last to leave its sums in `partial` (programs, M, N) adds them
    up in their order, so that results do not depend on which it was.
    """
    SLOTS: tl.constexpr = slots(LAYOUT)
    pid = tl.program_id(0)
    part = tl.program_id(1)
    m_blocks = tl.cdiv(M, BM)
    n = pid // m_blocks * BN + tl.arange(0, BN)
    m = pid % m_blocks * BM + tl.arange(0, BM)
    inside = (n < N)[:, None] & (m < M)[None, :]
    n = tl.minimum(n, N - 1)
    m = tl.minimum(m, M - 1)
    parts = tl.num_programs(1)
    share = tl.cdiv(TILES, parts)
    start = part * share
    stop = tl.minimum(start + share, TILES)

    k = tl.arange(0, _SLOT)
    stride = N * _SLOT
    inner = n[:, None] * _SLOT + k[None, :]
    a = a_ptr + m[None, :] * (TILES * SLOTS * _SLOT) + start * (SLOTS * _SLOT) + k[:, None]
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

    place = m[None, :] * N + n[:, None]
    arrived = parts - 1
    if SHARED:
        tl.store(partial_ptr + part.to(tl.int64) * M * N + place, total, mask=inside)
        tl.debug_barrier()
        arrived = tl.atomic_add(count_ptr + pid, 1, sem="acq_rel")
    if arrived == parts - 1:
        if SHARED:
            total = tl.zeros((BN, BM), dtype=tl.float32)
            for i in range(parts):
                other = partial_ptr + tl.cast(i, tl.int64) * M * N
                total += tl.load(other + place, mask=inside, other=0.0, cache_modifier=".cg")
        y = total * unit(GRID) * tl.load(inverse_ptr + m)[None, :]
        if BIAS:
            y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
