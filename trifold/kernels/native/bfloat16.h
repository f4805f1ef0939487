/* Products of bfloat16 activations, exact integer weights and float32 sums: AVX512-BF16, and AMX for several tokens.

   A step is two columns of 16 rows: 32 bfloat16 numbers in the order that vdpbf16ps and tdpbf16ps take. Codes become
   numbers through a table of 32 in one vpermw, whose index ignores all but five bits; with integer zero-points the
   index is code - zero + 16. Codes above 4 bits are two numbers, of the low nibble and of the rest times 16; the
   values of a table that bfloat16 does not hold are three that add up to them. */

#ifndef TRIFOLD_BFLOAT16_H
#define TRIFOLD_BFLOAT16_H

#include "layout.h"

#include <immintrin.h>

#define CHUNK_BLOCKS (BITS > 4 ? 4 : 8) /* blocks that are turned into numbers at once: they stay in the first-level cache */
#define STEP_BYTES 64
#define K_BYTES 1024 /* 16 steps: what one instruction of AMX takes */

typedef struct {
    __m512i nibbles[2], upper[2], pairs, singles;
    __m512i low[2][2], high[2][2]; /* of nibbles and upper: the even and odd ones as bytes, with offsets */
} lanes;

/* How codes become numbers. */
typedef struct {
    __m512i table[3];
    __m512i offset[2]; /* of the low nibble, or all; of the rest; in every byte */
} decoder;

/* A plane of nibbles as bytes, offsets added: half the work of adding them to each number. */
INLINE void add_offset(const __m512i *plane, __m512i offset, __m512i to[2][2])
{
    const __m512i mask = _mm512_set1_epi8(15);
    for (int i = 0; i < 2; i++) {
        to[i][0] = _mm512_add_epi8(_mm512_and_si512(plane[i], mask), offset);
        to[i][1] = _mm512_add_epi8(_mm512_and_si512(_mm512_srli_epi16(plane[i], 4), mask), offset);
    }
}

INLINE lanes load_lanes(const uint8_t *at, const decoder *d, int zeros)
{
    lanes p;
    if (BITS >= 4) {
        p.nibbles[0] = _mm512_loadu_si512(at), p.nibbles[1] = _mm512_loadu_si512(at + 64);
        at += 128;
    }
    if (BITS == 8) {
        p.upper[0] = _mm512_loadu_si512(at), p.upper[1] = _mm512_loadu_si512(at + 64);
        at += 128;
    }
    if (BITS & 2) p.pairs = _mm512_loadu_si512(at), at += 64;
    if (BITS & 1) {
        const __m512i octets = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
        p.singles = _mm512_or_si512(octets, _mm512_slli_epi32(octets, 8));
        if (BITS & 2) p.singles = _mm512_slli_epi16(p.singles, 2); /* to bit 2, where it belongs */
    }
    if (zeros && BITS >= 4) add_offset(p.nibbles, d->offset[0], p.low);
    if (zeros && BITS == 8) add_offset(p.upper, d->offset[1], p.high);
    return p;
}

/* 16-bit lanes whose low bits are the code's low nibble, or the code's bits above it; what is higher is rubbish. */
INLINE __m512i low_index(const lanes *p, int step)
{
    if (BITS >= 4) return _mm512_srli_epi16(p->nibbles[step / 4], 4 * (step % 4));
    if (BITS == 1) return _mm512_srli_epi16(p->singles, step);
    const __m512i pairs = _mm512_srli_epi16(p->pairs, 2 * step);
    if (BITS == 2) return pairs;
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), pairs, _mm512_srli_epi16(p->singles, step), 0xca);
}

INLINE __m512i high_index(const lanes *p, int step)
{
    if (BITS == 8) return _mm512_srli_epi16(p->upper[step / 4], 4 * (step % 4));
    if (BITS == 5) return _mm512_srli_epi16(p->singles, step);
    const __m512i pairs = _mm512_srli_epi16(p->pairs, 2 * step);
    if (BITS == 6) return pairs;
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), pairs, _mm512_srli_epi16(p->singles, step), 0xca);
}

INLINE __m512i byte_index(const __m512i plane[2][2], int step)
{
    return _mm512_srli_epi16(plane[step / 4][step % 2], step % 4 / 2 * 8);
}

INLINE __m512i shifted(__m512i index, int bits, __m512i offset)
{
    return _mm512_add_epi16(_mm512_and_si512(index, _mm512_set1_epi16((short)((1 << bits) - 1))), offset);
}

/* Numbers of a step: `terms` vectors that add up to the weights. */
INLINE void numbers_of(const lanes *p, const decoder *d, int zeros, int terms, int step, __m512i *out)
{
    __m512i low;
    if (zeros && BITS >= 4) low = byte_index(p->low, step);
    else if (zeros) low = shifted(low_index(p, step), BITS, d->offset[0]);
    else low = low_index(p, step);
    out[0] = _mm512_permutexvar_epi16(low, d->table[0]);
    if (BITS > 4) {
        __m512i high;
        if (zeros && BITS == 8) high = byte_index(p->high, step);
        else if (zeros) high = shifted(high_index(p, step), BITS - 4, d->offset[1]);
        else high = high_index(p, step);
        out[1] = _mm512_permutexvar_epi16(high, d->table[1]);
    } else {
        for (int t = 1; t < terms; t++) out[t] = _mm512_permutexvar_epi16(low, d->table[t]);
    }
}

INLINE uint16_t nearest_bfloat16(float value)
{
    const vf v = (vf){0} + value;
    return to_bfloat16(v)[0];
}

static void make_decoder(const weight *w, decoder *d)
{
    uint16_t table[3][32];
    const int zeros = w->kind == INTEGER || w->kind == REAL, high = BITS > 4;
    for (int i = 0; i < 32; i++) {
        float value;
        if (w->kind == TABLE) value = w->table[i & 15];
        else if (zeros) value = (float)(i - 16);
        else if (high) value = (float)(i & 15);
        else value = (float)(i & ((1 << BITS) - 1)) - midpoint();
        for (int t = 0; t < 3; t++) {
            table[t][i] = nearest_bfloat16(value);
            value -= widened(table[t][i]);
        }
        if (high && zeros) table[1][i] = nearest_bfloat16(16.0f * (float)(i - 16));
        else if (high) table[1][i] = nearest_bfloat16(16.0f * (float)(i & ((1 << BITS >> 4) - 1)) - midpoint());
    }
    for (int t = 0; t < 3; t++) d->table[t] = _mm512_loadu_si512(table[t]);
}

/* Whether bfloat16 holds every value of the table. */
static int table_is_narrow(const weight *w)
{
    for (int i = 0; i < 16; i++)
        if (widened(nearest_bfloat16(w->table[i])) != w->table[i]) return 0;
    return 1;
}

/* The codes nearest to the zero-points of a group. */
INLINE __m512i zero_codes(__m512 zero)
{
    const __m512i code = _mm512_max_epi32(_mm512_cvtps_epi32(zero), _mm512_setzero_si512());
    return _mm512_min_epi32(code, _mm512_set1_epi32((1 << BITS) - 1));
}

INLINE void set_offsets(const weight *w, decoder *d, int64_t tile, int64_t g)
{
    const __m512i code = zero_codes((__m512)zero_of(w, tile, g)), sixteen = _mm512_set1_epi32(16);
    const __m512i every = _mm512_set1_epi32(0x01010101);
    d->offset[0] =
        _mm512_mullo_epi32(_mm512_sub_epi32(sixteen, _mm512_and_si512(code, _mm512_set1_epi32(15))), every);
    d->offset[1] = _mm512_mullo_epi32(_mm512_sub_epi32(sixteen, _mm512_srli_epi32(code, 4)), every);
}

/* What is left of real zero-points after codes were taken for them. */
INLINE __m512 zero_rest(const weight *w, int64_t tile, int64_t g)
{
    const __m512 zero = (__m512)zero_of(w, tile, g);
    return _mm512_sub_ps(zero, _mm512_cvtepi32_ps(zero_codes(zero)));
}

/* `blocks` blocks of a tile as numbers: term after term, K_BYTES for every two blocks, the last filled with zeros. */
INLINE void write_numbers(const uint8_t *codes, const decoder *d, int64_t blocks, uint8_t *out, int zeros, int terms)
{
    const int64_t size = CHUNK_BLOCKS / 2 * K_BYTES; /* of a term */
    for (int64_t b = 0; b < blocks; b++, codes += BLOCK_BYTES) {
        const lanes loaded = load_lanes(codes, d, zeros);
        for (int ahead = 0; ahead < BLOCK_BYTES; ahead += 64) _mm_prefetch(codes + AHEAD + ahead, _MM_HINT_T1);
#pragma GCC unroll 8
        for (int step = 0; step < BLOCK / 2; step++) {
            __m512i numbers[3];
            numbers_of(&loaded, d, zeros, terms, step, numbers);
#pragma GCC unroll 3
            for (int t = 0; t < terms; t++)
                _mm512_store_si512(out + t * size + (b * BLOCK / 2 + step) * STEP_BYTES, numbers[t]);
        }
    }
    if (blocks % 2)
        for (int t = 0; t < terms; t++) memset(out + t * size + blocks * BLOCK / 2 * STEP_BYTES, 0, K_BYTES / 2);
}

static void write_any(const uint8_t *codes, const decoder *d, int64_t blocks, uint8_t *out, int zeros, int terms)
{
    const int usual = BITS > 4 ? 2 : 1;
    if (zeros) write_numbers(codes, d, blocks, out, 1, usual);
    else if (BITS == 4 && terms == 3) write_numbers(codes, d, blocks, out, 0, 3);
    else write_numbers(codes, d, blocks, out, 0, usual);
}

#endif
