"""The Triton kernel of `triton_product.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from trifold.kernels.shares_kernel import add_up


@triton.jit(do_not_specialize=["M"])
def multiply(
    x_ptr, sum_ptr, token_ptr, codes_ptr, row_ptr, offset_ptr, bias_ptr, y_ptr, partial_ptr, count_ptr,
    M, N, K, PADDED, GROUPS,
    FLOAT: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr, WHOLE: tl.constexpr,
    SHARED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y (M, N) = (x (M, K) times (codes (N, PADDED) + offset)ᵀ) * token * row + bias.

    Codes are FP8 E4M3 with FLOAT, else int8, summed exactly. row: (N,), or (N, GROUPS), of GROUP inputs each, a
    multiple of BK; sum: (M,) int32, of each row of x. WHOLE: BK divides K. Neighbouring programs have the same
    weights and other tokens; with SHARED those along the second axis share the inputs.
    """
    pid = tl.program_id(0)
    m_blocks = tl.cdiv(M, BM)
    begin = pid % m_blocks * BM
    m = tl.arange(0, BM)
    n = pid // m_blocks * BN + tl.arange(0, BN)
    inside = (m < M - begin)[:, None] & (n < N)[None, :]
    m = tl.minimum(m, M - 1 - begin)
    n = tl.minimum(n, N - 1)
    k = tl.arange(0, BK)
    steps = tl.cdiv(K, BK)
    each = tl.cdiv(steps, tl.num_programs(1))
    first = tl.program_id(1) * each
    x_ptrs = x_ptr + begin.to(tl.int64) * K + m[:, None] * K + first * BK + k[None, :]
    w_ptrs = codes_ptr + n[None, :].to(tl.int64) * PADDED + first * BK + k[:, None]
    total = tl.zeros((BM, BN), dtype=tl.float32 if FLOAT else tl.int32)
    for step in range(first, tl.minimum(first + each, steps)):
        if WHOLE:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(step * BK + k < K)[None, :], other=0.0 if FLOAT else 0)
            w = tl.load(w_ptrs, mask=(step * BK + k < K)[:, None], other=0.0 if FLOAT else 0)
        if GROUP > 0:
            scale = tl.load(row_ptr + n * GROUPS + step * BK // GROUP)
            total += tl.dot(x, w) * scale[None, :]
        elif FLOAT:
            total = tl.dot(x, w, total, max_num_imprecise_acc=BK)
        else:
            total = tl.dot(x, w, total, out_dtype=tl.int32)
        x_ptrs += BK
        w_ptrs += BK
    place = m[:, None] * N + n[None, :]
    ahead = begin.to(tl.int64) * N
    total, whole = add_up(total, partial_ptr + ahead, count_ptr, pid, tl.cast(M, tl.int64) * N, place, inside, SHARED)
    if whole:
        if OFFSET:
            total += tl.load(sum_ptr + begin + m)[:, None] * tl.load(offset_ptr + n)[None, :]
        y = total.to(tl.float32) * tl.load(token_ptr + begin + m)[:, None]
        if GROUP == 0:
            y *= tl.load(row_ptr + n)[None, :]
        if BIAS:
            y += tl.load(bias_ptr + n).to(tl.float32)[None, :]
        tl.store(y_ptr + ahead + place, y.to(y_ptr.dtype.element_ty), mask=inside)
