"""The Triton kernel of `triton_int8.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def multiply(
    x_ptr, sum_ptr, token_ptr, codes_ptr, row_ptr, offset_ptr, bias_ptr, y_ptr, M, N, K, PADDED,
    OFFSET: tl.constexpr, BIAS: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y (M, N) = (x (M, K) times (codes (N, PADDED) + offset)ᵀ) * token * row + bias.

    sum: (M,) int32, of each row of x. WHOLE: BK divides K. Neighbouring programs have the same
    weights and other tokens.
    """
    pid = tl.program_id(0)
    m_blocks = tl.cdiv(M, BM)
    m = pid % m_blocks * BM + tl.arange(0, BM)
    n = pid // m_blocks * BN + tl.arange(0, BN)
    inside = (m < M)[:, None] & (n < N)[None, :]
    m = tl.minimum(m, M - 1)
    n = tl.minimum(n, N - 1)
    k = tl.arange(0, BK)
    x_ptrs = x_ptr + m[:, None].to(tl.int64) * K + k[None, :]
    w_ptrs = codes_ptr + n[None, :].to(tl.int64) * PADDED + k[:, None]
    total = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, K, BK):
        if WHOLE:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(start + k < K)[None, :], other=0)
            w = tl.load(w_ptrs, mask=(start + k < K)[:, None], other=0)
        total = tl.dot(x, w, total, out_dtype=tl.int32)
        x_ptrs += BK
        w_ptrs += BK
    if OFFSET:
        total += tl.load(sum_ptr + m)[:, None] * tl.load(offset_ptr + n)[None, :]
    y = total.to(tl.float32) * tl.load(token_ptr + m)[:, None] * tl.load(row_ptr + n)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + n).to(tl.float32)[None, :]
    tl.store(y_ptr + m[:, None].to(tl.int64) * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
