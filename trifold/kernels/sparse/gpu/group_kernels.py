"""Products with groups of integers: survivors alone are loaded, tensor cores multiply whole tiles.

32 rows share a bitmap of each column of groups, so that where a survivor lies is a matter of counting bits; the words
of a dropped group are those of the next one, times a scale of 0.

A scale is applied to sums of a group, which would cost a tensor core's 8 columns for one token. Few tokens therefore
have PHASES columns each: a group's inputs are in one of them, and zero in the others, so that sums of PHASES groups are
kept apart in one accumulator and are scaled together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trifold.kernels.shares_kernel import add_up
from trifold.kernels.weight_only.planes.unpacking import INTERPRETED, numbers, slots, unit

ROWS = tl.constexpr(32)


@triton.jit
def _count(bits):
    """int32 -> how many of its bits are set."""
    if INTERPRETED:
        v = bits.to(tl.uint32, bitcast=True)
        v -= (v >> 1) & 0x55555555
        v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
        count = ((((v + (v >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)
    else:
        count = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], tl.int32, True, 1)
    return count


@triton.jit
def _only(x, keep):
    """fp16 where int16 has all bits set, 0 where it has none."""
    if INTERPRETED:
        x = tl.where(keep != 0, x, 0.0)
    else:
        x = tl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [x, keep], tl.float16, True, 2)
    return x


@triton.jit
def _find(map_ptr, row, c, BLOCKS):
    """(where a survivor lies, or the next one if it is none; not 0 if it is one) for rows and columns of groups."""
    entry = tl.load(map_ptr + (c * BLOCKS + row // ROWS))
    bits = (entry >> 32).to(tl.int32)
    bit = 1 << row % ROWS
    return entry.to(tl.int32) + _count(bits & (bit - 1)), bits & bit


@triton.jit(do_not_specialize=["M", "TILES"])
def multiply(
    a_ptr, sum_ptr, inverse_ptr, words_ptr, meta_ptr, map_ptr, bias_ptr, y_ptr, partial_ptr, count_ptr, M, N, TILES,
    LAYOUT: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, PHASES: tl.constexpr, WIDE: tl.constexpr,
    BIAS: tl.constexpr, SHARED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y (M, N) = a, sum and inverse, as `planes.activations.prepare` made them, times a weight as `groups.pack` did.

    T: groups of a tile, PHASES or two or four times as many. WIDE: whether scales are float32. With SHARED the
    programs along the second axis share the tiles of one piece of y.
    """
    COLS: tl.constexpr = BM * PHASES
    SLOTS: tl.constexpr = slots(LAYOUT)
    WORDS: tl.constexpr = GROUP // SLOTS
    SPAN: tl.constexpr = PHASES * GROUP
    INNER: tl.constexpr = SPAN // SLOTS
    BLOCKS = tl.cdiv(N, BN) * (BN // ROWS)
    pid = tl.program_id(0)
    m_blocks = tl.cdiv(M, BM)
    n = pid // m_blocks * BN + tl.arange(0, BN)
    m0 = pid % m_blocks * BM
    share = tl.cdiv(TILES, tl.num_programs(1))
    start = tl.program_id(1) * share
    stop = tl.minimum(start + share, TILES)
    k = tl.arange(0, INNER)
    phase = tl.arange(0, COLS) % PHASES
    own = (k // WORDS)[:, None] == phase[None, :]
    keep = tl.where(own, -1, 0).to(tl.int16)
    m = tl.minimum(m0 + tl.arange(0, COLS) // PHASES, M - 1)
    a = a_ptr + m[None, :].to(tl.int64) * (TILES * (T * GROUP)) + k[:, None]
    g = tl.arange(0, PHASES)
    i = tl.arange(0, WORDS)
    total = tl.zeros((BN, COLS), dtype=tl.float32)
    for tile in range(start, stop):
        for f in tl.static_range(T // PHASES):
            c = tile * T + f * PHASES
            index, there = _find(map_ptr, n[:, None], c + g[None, :], BLOCKS)
            words = tl.load(words_ptr + (index[:, :, None] * WORDS + i[None, None, :]), eviction_policy="evict_first")
            meta = tl.load(meta_ptr + index, mask=there != 0, other=0)
            words = tl.reshape(words, (BN, INNER))
            both = tl.reshape(tl.broadcast_to(meta[:, None, :], (BN, BM, PHASES)), (BN, COLS))
            if WIDE:
                scale = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
                both = both.to(tl.int32)
            else:
                scale = (both & -65536).to(tl.float32, bitcast=True)
            zero = (both << 16).to(tl.float32, bitcast=True)
            t = zero * (tl.load(sum_ptr + (c + phase) * M + m) * (-1 / unit("int")))[None, :]
            for j in tl.static_range(SLOTS):
                if WORDS < 8:  # less than a vector of loads is in one phase
                    x = _only(tl.load(a + c * GROUP + j * INNER), keep)
                else:
                    x = tl.load(a + c * GROUP + j * INNER, mask=own, other=0.0)
                t = tl.dot(numbers(words, words, words, LAYOUT, j, "int"), x, t)
            total += t * scale
    y = tl.sum(tl.reshape(total, (BN, BM, PHASES)), axis=2)
    m = m0 + tl.arange(0, BM)
    inside = (n < N)[:, None] & (m < M)[None, :]
    place = m[None, :] * N + n[:, None]
    y, whole = add_up(y, partial_ptr, count_ptr, pid, tl.cast(M, tl.int64) * N, place, inside, SHARED)
    if whole:
        y *= unit("int") * tl.load(inverse_ptr + tl.minimum(m, M - 1))[None, :]
        if BIAS:
            y += tl.load(bias_ptr + tl.minimum(n, N - 1)).to(tl.float32)[:, None]
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
