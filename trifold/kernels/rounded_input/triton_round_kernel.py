"""Activations rounded to 8-bit codes: `core.inputs.quantize_input`, bit for bit, in one pass over a token."""

from __future__ import annotations

import triton
import triton.language as tl

_MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2**23: what is added to it is rounded to an integer, half to even."""
_MAGIC_BITS = tl.constexpr(0x4B400000)
_SMALLEST_NORMAL = tl.constexpr(0x3C800000)
"""2**-6, of FP8 E4M3, as float32."""


@triton.jit
def _integer(v):
    return (v + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS


@triton.jit
def _fp8_e4m3(v):
    """float32 of at most 448 -> the bits of FP8 E4M3, by integers, as any GPU can; half to even."""
    bits = v.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < _SMALLEST_NORMAL, _integer(size.to(tl.float32, bitcast=True) * 512.0), normal)
    return code | ((bits >> 24) & 0x80)


@triton.jit(do_not_specialize=["counts", "M"])
def round_tokens(
    x_ptr, given_ptr, code_ptr, scale_ptr, sum_ptr, count_ptr, counts, M, K,
    LARGEST: tl.constexpr, FLOAT: tl.constexpr, STATIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a program, BLOCK inputs at a time: x (M, K) -> code (M, K), int8 or the bits of an FP8.

    scale: (M,) float32, `given` (1,) if STATIC, else the token's largest magnitude over LARGEST; NaN for a token with a
    NaN. sum: (M,) int32, of a token's codes, if they are integers. `count` is set to 0.
    """
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    for start in range(row * BLOCK, counts, M * BLOCK):
        tl.store(count_ptr + start + i, tl.zeros((BLOCK,), dtype=tl.int32), mask=start + i < counts)
    x_ptr += row.to(tl.int64) * K
    code_ptr += row.to(tl.int64) * K
    most = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + start + i, mask=start + i < K, other=0.0).to(tl.float32)
        most = tl.maximum(most, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # above infinity lie the NaN
    largest = tl.max(most, axis=0).to(tl.float32, bitcast=True)
    if STATIC:
        scale = tl.where(largest == largest, tl.load(given_ptr), largest)
    else:
        scale = tl.div_rn(largest, tl.full((), LARGEST, tl.float32))
        scale = tl.where(scale == 0, 1.0, scale)
    tl.store(scale_ptr + row, scale)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + start + i, mask=start + i < K, other=0.0).to(tl.float32)
        exact = tl.div_rn(x, tl.zeros_like(x) + scale)
        v = tl.minimum(tl.maximum(exact, -LARGEST), LARGEST)
        if FLOAT:
            code = tl.where(exact == exact, _fp8_e4m3(v), 0x7F)
        else:
            code = tl.where(exact == exact, _integer(v), 0)
            total += code
        tl.store(code_ptr + start + i, code.to(code_ptr.dtype.element_ty), mask=start + i < K)
    if not FLOAT:
        tl.store(sum_ptr + row, tl.sum(total, axis=0))
