"""Products with bitmaps: loaded sparse, spread in registers, multiplied dense by tensor cores.

Xia et al. 2023, "Flash-LLM", arXiv 2309.10285, spread survivors into shared memory, where Triton cannot scatter to.
Here each place of a tile finds its survivor instead: the bits of the map before it say where to load from.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trifold.kernels.weight_only.planes.unpacking import INTERPRETED

SPAN = tl.constexpr(32)


@triton.jit
def _octets(word):
    """uint32 (n,) -> the number of bits set in its lowest one, two, three and four bytes, a byte each."""
    v = word - ((word >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    return ((v + (v >> 4)) & 0x0F0F0F0F) * 0x01010101


@triton.jit
def _next(values_ptr, place, octet, C: tl.constexpr):
    """What is at bit C of each byte, and where the survivors go on after it."""
    bit = (octet >> C) & 1
    value = tl.load(values_ptr + place, mask=bit != 0, other=0.0, eviction_policy="evict_first")
    return value, place + bit


@triton.jit
def _spread(values_ptr, base, word, counts, BN: tl.constexpr):
    """32 columns of BN rows, (BN, 32). base: where the survivors of each row go on. A thread has whole bytes."""
    shift = (8 * tl.arange(0, 4)).to(tl.uint32)[None, :]
    octet = (word[:, None] >> shift).to(tl.int32, bitcast=True)
    place = base[:, None] + (((counts << 8)[:, None] >> shift) & 255).to(tl.int32)
    v0, place = _next(values_ptr, place, octet, 0)
    v1, place = _next(values_ptr, place, octet, 1)
    v2, place = _next(values_ptr, place, octet, 2)
    v3, place = _next(values_ptr, place, octet, 3)
    v4, place = _next(values_ptr, place, octet, 4)
    v5, place = _next(values_ptr, place, octet, 5)
    v6, place = _next(values_ptr, place, octet, 6)
    v7, place = _next(values_ptr, place, octet, 7)
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.reshape(tl.join(even, odd), (BN, SPAN))


@triton.jit(do_not_specialize=["M", "CHUNKS", "SHARE"])
def multiply(
    x_ptr, mask_ptr, offset_ptr, values_ptr, bias_ptr, y_ptr, partial_ptr, M, N, K, CHUNKS, SHARE,
    BIAS: tl.constexpr, WHOLE: tl.constexpr, SHARED: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """y (M, N), or with SHARED parts of it (programs, M, N), of SHARE chunks each, for `total`.

    mask: int32 (words, N). offset: (CHUNKS, N), where the survivors of a row go on at each CHUNK words.
    """
    m_blocks = tl.cdiv(M, BM)
    n = tl.program_id(0) // m_blocks * BN + tl.arange(0, BN)
    m = tl.program_id(0) % m_blocks * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    inside = (n < N)[:, None] & (m < M)[None, :]
    row = tl.minimum(n, N - 1)
    token = tl.minimum(m, M - 1).to(tl.int64)
    chunk = part * SHARE
    stop = tl.minimum(tl.minimum(chunk + SHARE, CHUNKS) * CHUNK, tl.cdiv(K, SPAN))
    base = tl.load(offset_ptr + chunk * N + row)
    k = tl.arange(0, SPAN)
    total = tl.zeros((BN, BM), dtype=tl.float32)
    for i in range(chunk * CHUNK, stop):
        word = tl.load(mask_ptr + tl.cast(i, tl.int64) * N + row).to(tl.uint32, bitcast=True)
        counts = _octets(word)
        w = _spread(values_ptr, base, word, counts, BN)
        column = k + i * 32
        at = x_ptr + token[None, :] * K + column[:, None]
        x = tl.load(at) if WHOLE else tl.load(at, mask=(column < K)[:, None], other=0.0)
        if INTERPRETED:  # the interpreter's product of bfloat16 is wrong
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        total = tl.dot(w, x, total)
        base += (counts >> 24).to(tl.int32)
    place = m[None, :].to(tl.int64) * N + n[:, None]
    if SHARED:
        tl.store(partial_ptr + part.to(tl.int64) * M * N + place, total, mask=inside)
    else:
        if BIAS:
            total += tl.load(bias_ptr + row).to(tl.float32)[:, None]
        tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["COUNT", "PARTS"])
def total(partial_ptr, bias_ptr, y_ptr, N, COUNT, PARTS, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Parts of all COUNT outputs, added up in their order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < COUNT
    y = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(PARTS):
        y += tl.load(partial_ptr + tl.cast(part, tl.int64) * COUNT + i, mask=inside, other=0.0)
    if BIAS:
        y += tl.load(bias_ptr + i % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=inside)
