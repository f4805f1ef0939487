"""What the product wants of activations: fp16, whatever they were, and sums that zero-points meet."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def powers(largest):
    """Largest magnitudes -> (the powers of two that bring them to 2**14 .. 2**15, what undoes that)."""
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    shift = tl.minimum(tl.maximum(14 - exponent, -114), 126)
    return ((127 + shift) << 23).to(tl.float32, bitcast=True), ((127 - shift) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["counts", "M", "CHUNKS"])
def prepare(
    x_ptr, a_ptr, sum_ptr, inverse_ptr, count_ptr, counts, M, K, PADDED, CHUNKS,
    STEP: tl.constexpr, SLOT: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a program, BLOCK inputs at a time, of PADDED, which are whole tiles.

    The token is multiplied by the power of two that brings its largest magnitude to 2**14 .. 2**15, where fp16 keeps
    every bit of bfloat16 down to 2**-39 of it; `inverse` (M,) undoes that. a: fp16 (M, PADDED), the inputs of slot j,
    of SLOT each, divided by 2**(STEP * j mod 8). sum: (CHUNKS, M) float32, of CHUNK inputs each. With SPAN the inputs
    of each SPAN are in another order: the first slots of all chunks, then the second ones. `count` is set to 0.
    """
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    for start in range(row * BLOCK, counts, M * BLOCK):
        tl.store(count_ptr + start + i, tl.zeros((BLOCK,), dtype=tl.int32), mask=start + i < counts)
    x_ptr += row.to(tl.int64) * K
    a_ptr += row.to(tl.int64) * PADDED
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + start + i, mask=start + i < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    factor, inverse = powers(tl.max(largest, axis=0))
    tl.store(inverse_ptr + row, inverse)
    chunk = tl.arange(0, BLOCK // CHUNK)
    for start in range(0, PADDED, BLOCK):
        k = start + i
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32) * factor
        total = tl.sum(tl.reshape(x.to(tl.float16).to(tl.float32), (BLOCK // CHUNK, CHUNK)), axis=1)
        tl.store(sum_ptr + (start // CHUNK + chunk) * M + row, total, mask=start // CHUNK + chunk < CHUNKS)
        x *= ((127 - (k // SLOT * STEP) % 8) << 23).to(tl.float32, bitcast=True)
        if SPAN:
            first = k % CHUNK // SLOT * (SPAN // CHUNK * SLOT) + k % SPAN // CHUNK * SLOT
            k = k // SPAN * SPAN + first + k % SLOT
        tl.store(a_ptr + k, x.to(tl.float16), mask=k < PADDED)
