"""Products with groups of integers: equal ranges of surviving groups, whichever rows they belong to."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _numbers(words, BITS: tl.constexpr):
    """int32 words (B, W) -> their codes (B, W, 32 / BITS), float32, each plus 2**23, whose fraction it is."""
    shift = tl.arange(0, 32 // BITS) * BITS
    code = (words[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
    return (code | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _meet(x_ptr, weight, column, k, K, WHOLE: tl.constexpr):
    """Sums over columns of weights (B, W, C) times one token, (B,). k: columns in a group (W, C)."""
    at = column[:, None, None] + k[None, :, :]
    x = tl.load(x_ptr + at) if WHOLE else tl.load(x_ptr + at, mask=at < K, other=0.0)
    return tl.sum(tl.sum(weight * x.to(tl.float32), axis=2), axis=1)


@triton.jit(do_not_specialize=["M", "COUNT", "RANGE"])
def multiply(
    x_ptr, words_ptr, number_ptr, scale_ptr, zero_ptr, start_ptr, first_ptr, bias_ptr, y_ptr, head_ptr, tail_ptr,
    M, N, K, COUNT, RANGE,
    BITS: tl.constexpr, GROUP: tl.constexpr, MIDPOINT: tl.constexpr, ASYMMETRIC: tl.constexpr, BIAS: tl.constexpr,
    WHOLE: tl.constexpr, B: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """y (M, N) but for rows that lie in several ranges, whose parts go to head and tail (ranges, M) for `join`.

    words: int32 (COUNT groups, GROUP * BITS / 32), the codes of a group in their order. first: the row in which each
    range of RANGE groups begins, and at last N. A program has one range and TOKENS tokens, 1 or 4; it goes through its
    rows B groups at a time.
    """
    C: tl.constexpr = 32 // BITS
    W: tl.constexpr = GROUP // C
    pid = tl.program_id(0)
    m = tl.program_id(1) * TOKENS
    begin = pid * RANGE
    end = tl.minimum(begin + RANGE, COUNT)
    last = tl.load(first_ptr + pid + 1)
    b = tl.arange(0, B)
    w = tl.arange(0, W)
    k = w[:, None] * C + tl.arange(0, C)[None, :]
    x0 = x_ptr + m.to(tl.int64) * K
    x1 = x_ptr + tl.minimum(m + 1, M - 1).to(tl.int64) * K
    x2 = x_ptr + tl.minimum(m + 2, M - 1).to(tl.int64) * K
    x3 = x_ptr + tl.minimum(m + 3, M - 1).to(tl.int64) * K
    for row in range(tl.load(first_ptr + pid), tl.minimum(last + 1, N)):
        from_ = tl.load(start_ptr + row)
        to = tl.load(start_ptr + row + 1)
        start = tl.maximum(from_, begin)
        stop = tl.minimum(to, end)
        t0 = tl.zeros((B,), dtype=tl.float32)
        t1 = t0
        t2 = t0
        t3 = t0
        for i in range(start, stop, B):
            g = i + b
            inside = g < stop
            column = tl.load(number_ptr + g, mask=inside, other=0).to(tl.int32) * GROUP
            scale = tl.load(scale_ptr + g, mask=inside, other=0.0).to(tl.float32)
            at = g.to(tl.int64)[:, None] * W + w[None, :]
            words = tl.load(words_ptr + at, mask=inside[:, None], other=0, eviction_policy="evict_first")
            zero = tl.full((B,), MIDPOINT, dtype=tl.float32)
            if ASYMMETRIC:
                zero = tl.load(zero_ptr + g, mask=inside, other=0).to(tl.float32)
            weight = _numbers(words, BITS) - (zero + 8388608.0)[:, None, None]
            t0 += tl.where(inside, _meet(x0, weight, column, k, K, WHOLE) * scale, 0.0)
            if TOKENS == 4:
                t1 += tl.where(inside, _meet(x1, weight, column, k, K, WHOLE) * scale, 0.0)
                t2 += tl.where(inside, _meet(x2, weight, column, k, K, WHOLE) * scale, 0.0)
                t3 += tl.where(inside, _meet(x3, weight, column, k, K, WHOLE) * scale, 0.0)
        _leave(t0, from_, to, begin, end, row < last, bias_ptr, y_ptr, head_ptr, tail_ptr, row, pid, m, M, N, BIAS)
        if TOKENS == 4:
            _leave(
                t1, from_, to, begin, end, row < last, bias_ptr, y_ptr, head_ptr, tail_ptr, row, pid, m + 1, M, N, BIAS
            )
            _leave(
                t2, from_, to, begin, end, row < last, bias_ptr, y_ptr, head_ptr, tail_ptr, row, pid, m + 2, M, N, BIAS
            )
            _leave(
                t3, from_, to, begin, end, row < last, bias_ptr, y_ptr, head_ptr, tail_ptr, row, pid, m + 3, M, N, BIAS
            )


@triton.jit
def _leave(
    total, from_, to, begin, end, ends_here, bias_ptr, y_ptr, head_ptr, tail_ptr, row, pid, m, M, N, BIAS: tl.constexpr
):  # fmt: skip
    """The sum of a row, or of its part in this range, where it belongs."""
    y = tl.sum(total, axis=0)
    there = m < M
    place = pid.to(tl.int64) * M + m
    tl.store(head_ptr + place, y, mask=there & (from_ < begin) & (to > begin))
    tl.store(tail_ptr + place, y, mask=there & (from_ >= begin) & (from_ < end) & (to > end))
    if BIAS:
        y += tl.load(bias_ptr + row).to(tl.float32)
    whole = (from_ >= begin) & (to <= end) & (ends_here | (from_ < end))
    tl.store(y_ptr + m.to(tl.int64) * N + row, y.to(y_ptr.dtype.element_ty), mask=there & whole)


@triton.jit(do_not_specialize=["M", "COUNT", "RANGE"])
def join(start_ptr, first_ptr, bias_ptr, y_ptr, head_ptr, tail_ptr, M, N, COUNT, RANGE, BIAS: tl.constexpr):
    """The row that begins in a range and goes on after it, if there is one: its parts, always in their order."""
    pid = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64)
    row = tl.load(first_ptr + pid + 1)
    end = (pid + 1) * RANGE
    if (row < N) & (end < COUNT):
        from_ = tl.load(start_ptr + row)
        to = tl.load(start_ptr + row + 1)
        if (from_ >= pid * RANGE) & (from_ < end) & (to > end):
            y = tl.load(tail_ptr + pid.to(tl.int64) * M + m)
            for other in range(pid + 1, tl.cdiv(to, RANGE)):
                y += tl.load(head_ptr + tl.cast(other, tl.int64) * M + m)
            if BIAS:
                y += tl.load(bias_ptr + row).to(tl.float32)
            tl.store(y_ptr + m * N + row, y.to(y_ptr.dtype.element_ty))
