"""The second product of a low-rank weight, added to that of a packed weight before either is written."""

from __future__ import annotations

import triton
import triton.language as tl

from trifold.kernels.shares_kernel import add_up
from trifold.kernels.weight_only.planes.activations import powers
from trifold.kernels.weight_only.planes.gemm import accumulate
from trifold.kernels.weight_only.planes.unpacking import INTERPRETED, first, numbers, planes, slots, unit, word, words

_SLOT = tl.constexpr(32)


@triton.constexpr_function
def _down(layout, slot):
    """What activations of a slot are multiplied by."""
    return 2.0 ** -layout.shifts[slot]


@triton.jit
def _packed(
    z_ptr, p0_ptr, p1_ptr, p2_ptr, scale_ptr, zero_ptr, n, m, N, RANK, TILES, GROUPS,
    LAYOUT: tl.constexpr, GRID: tl.constexpr, GROUP: tl.constexpr, FLUSH: tl.constexpr, MIDPOINT: tl.constexpr,
    ASYMMETRIC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Outputs n (BN,) of planes times rows m (BM,) of z (M, RANK): (BN, BM) float32. z is what `activations.prepare`
    would make of it, except that each program does it for itself."""
    SLOTS: tl.constexpr = slots(LAYOUT)
    k = tl.arange(0, _SLOT)
    z = z_ptr + m[None, :].to(tl.int64) * RANK + k[:, None]
    largest = tl.zeros((_SLOT, BM), dtype=tl.float32)
    for start in range(0, RANK, _SLOT):
        part = tl.load(z + start, mask=(start + k < RANK)[:, None], other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(part))
    factor, inverse = powers(tl.max(largest, axis=0))
    stride = N * _SLOT
    inner = n[:, None] * _SLOT + k[None, :]
    p0 = p0_ptr + inner
    p1 = p1_ptr + inner
    p2 = p2_ptr + inner
    total = tl.zeros((BN, BM), dtype=tl.float32)
    # of tiles of 512 inputs there are too few for a pipeline
    for tile in tl.range(TILES, num_stages=1 if SLOTS == 16 else None):
        t = total
        seen = tl.zeros((_SLOT, BM), dtype=tl.float32)
        for j in tl.static_range(SLOTS):
            if first(LAYOUT, 0, j):
                w0 = tl.load(p0 + word(LAYOUT, 0, j) * stride, eviction_policy="evict_first")
                if j == 0:
                    w1 = w0
                    w2 = w0
            if first(LAYOUT, 1, j):
                w1 = tl.load(p1 + word(LAYOUT, 1, j) * stride, eviction_policy="evict_first")
            if first(LAYOUT, 2, j):
                w2 = tl.load(p2 + word(LAYOUT, 2, j) * stride, eviction_policy="evict_first")
            r = (tile * SLOTS + j) * _SLOT
            x = tl.load(z + r, mask=(r + k < RANK)[:, None], other=0.0).to(tl.float32) * factor[None, :]
            seen += x.to(tl.float16).to(tl.float32)
            x = (x * _down(LAYOUT, j)).to(tl.float16) if GRID == "int" else x.to(tl.float16)
            w = numbers(w0, w1, w2, LAYOUT, j, GRID)
            t = tl.dot(w, x) if j % FLUSH == 0 else tl.dot(w, x, t)
            if j % FLUSH == FLUSH - 1:
                group = tl.minimum(r // GROUP, GROUPS - 1)
                if ASYMMETRIC:
                    zero = tl.load(zero_ptr + group * N + n).to(tl.float32)
                    t -= zero[:, None] * (tl.sum(seen, axis=0) * (1 / unit(GRID)))[None, :]
                elif MIDPOINT != 0:
                    t -= (tl.sum(seen, axis=0) * (MIDPOINT / unit(GRID)))[None, :]
                total += t * tl.load(scale_ptr + group * N + n).to(tl.float32)[:, None]
                seen = tl.zeros((_SLOT, BM), dtype=tl.float32)
        p0 += words(LAYOUT, 0) * stride
        if planes(LAYOUT) > 1:
            p1 += words(LAYOUT, 1) * stride
        if planes(LAYOUT) > 2:
            p2 += words(LAYOUT, 2) * stride
    return total * (unit(GRID) * inverse)[None, :]


@triton.jit
def _plain(z_ptr, w_ptr, n, m, RANK, BN: tl.constexpr, BM: tl.constexpr):
    """The same of a weight (N, RANK) of 16-bit numbers, whose dtype z takes."""
    k = tl.arange(0, _SLOT)
    z = z_ptr + m[None, :].to(tl.int64) * RANK + k[:, None]
    w_ptr += n[:, None].to(tl.int64) * RANK + k[None, :]
    total = tl.zeros((BN, BM), dtype=tl.float32)
    for start in range(0, RANK, _SLOT):
        there = start + k < RANK
        w = tl.load(w_ptr + start, mask=there[None, :], other=0.0)
        x = tl.load(z + start, mask=there[:, None], other=0.0).to(w.dtype)
        if INTERPRETED:  # the interpreter's product of bfloat16 is wrong
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        total = tl.dot(w, x, total)
    return total


@triton.jit(do_not_specialize=["M", "ROWS", "TILES", "GROUPS", "RANK", "LEFT_TILES", "LEFT_GROUPS"])
def finish(
    a_ptr, sum_ptr, inverse_ptr, p0_ptr, p1_ptr, p2_ptr, scale_ptr, zero_ptr,
    z_ptr, l0_ptr, l1_ptr, l2_ptr, left_scale_ptr, left_zero_ptr,
    places_ptr, bias_ptr, y_ptr, partial_ptr, count_ptr,
    M, N, ROWS, TILES, GROUPS, RANK, LEFT_TILES, LEFT_GROUPS,
    BASE: tl.constexpr, LAYOUT: tl.constexpr, GRID: tl.constexpr, GROUP: tl.constexpr, FLUSH: tl.constexpr,
    MIDPOINT: tl.constexpr, ASYMMETRIC: tl.constexpr,
    PACKED: tl.constexpr, LEFT_LAYOUT: tl.constexpr, LEFT_GRID: tl.constexpr, LEFT_GROUP: tl.constexpr,
    LEFT_FLUSH: tl.constexpr, LEFT_MIDPOINT: tl.constexpr, LEFT_ASYMMETRIC: tl.constexpr,
    PLACED: tl.constexpr, BIAS: tl.constexpr, SHARED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y (M, N) = z (M, RANK) times a left factor of ROWS rows, and with BASE the product of `gemm.multiply` as well.

    Without PACKED the left factor is a matrix of 16-bit numbers. With PLACED row i of it is output places[RANK + i],
    and outputs places[:RANK] are z itself. Without either of them N is ROWS. With SHARED the programs along the
    second axis share the tiles of the base; the last of them has the left factor.
    """
    pid = tl.program_id(0)
    m_blocks = tl.cdiv(M, BM)
    block = pid // m_blocks
    m = pid % m_blocks * BM + tl.arange(0, BM)
    there = m < M
    m = tl.minimum(m, M - 1)
    row_blocks = tl.cdiv(ROWS, BN)
    if block < row_blocks:
        i = block * BN + tl.arange(0, BN)
        inside = (i < ROWS)[:, None] & there[None, :]
        i = tl.minimum(i, ROWS - 1)
        n = tl.load(places_ptr + RANK + i) if PLACED else i
        place = m[None, :] * N + n[:, None]
        total = tl.zeros((BN, BM), dtype=tl.float32)
        if BASE:
            total = accumulate(
                a_ptr, sum_ptr, p0_ptr, p1_ptr, p2_ptr, scale_ptr, zero_ptr, i, m, M, N, TILES, GROUPS,
                LAYOUT, GRID, GROUP, FLUSH, MIDPOINT, ASYMMETRIC, BN, BM,
            )  # fmt: skip
        total, whole = add_up(total, partial_ptr, count_ptr, pid, tl.cast(M, tl.int64) * N, place, inside, SHARED)
        if whole:
            if PACKED:
                y = _packed(
                    z_ptr, l0_ptr, l1_ptr, l2_ptr, left_scale_ptr, left_zero_ptr, i, m, ROWS, RANK, LEFT_TILES,
                    LEFT_GROUPS, LEFT_LAYOUT, LEFT_GRID, LEFT_GROUP, LEFT_FLUSH, LEFT_MIDPOINT, LEFT_ASYMMETRIC, BN, BM,
                )  # fmt: skip
            else:
                y = _plain(z_ptr, l0_ptr, i, m, RANK, BN, BM)
            if BASE:
                y += total * unit(GRID) * tl.load(inverse_ptr + m)[None, :]
            if BIAS:
                y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
            tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        i = (block - row_blocks) * BN + tl.arange(0, BN)
        inside = (i < RANK)[:, None] & there[None, :]
        i = tl.minimum(i, RANK - 1)
        n = tl.load(places_ptr + i) if PLACED else i
        y = tl.load(z_ptr + m[None, :].to(tl.int64) * RANK + i[:, None]).to(tl.float32)
        if BIAS:
            y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
        tl.store(y_ptr + m[None, :] * N + n[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)
