/* Products of bfloat16 activations, exact integer weights and float32 sums: AVX512-BF16, and AMX for several tokens.

   A step is two columns of 16 rows: 32 bfloat16 numbers in the order that vdpbf16ps and tdpbf16ps take. Codes become
   numbers through a table of 32 in one vpermw, whose index ignores all but five bits; with integer zero-points the
   index is code - zero + 16. Codes above 4 bits are two numbers, of the low nibble and of the rest times 16; the
   values of a table that bfloat16 does not hold are three that add up to them. */

#include "layout.h"

#include <immintrin.h>

#define CHUNK_BLOCKS 16 /* blocks that are turned into numbers at once: they stay in the first-level cache */

typedef struct {
    __m512i nibbles[2], upper[2], pairs, singles;
} lanes;

/* How codes become numbers. mask: of codes that an offset is added to. */
typedef struct {
    __m512i table[3];
    __m512i offset[2]; /* of the low nibble, or all; of the rest */
} decoder;

INLINE lanes load_lanes(const uint8_t *at)
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

INLINE __m512i shifted(__m512i index, int bits, __m512i offset)
{
    return _mm512_add_epi16(_mm512_and_si512(index, _mm512_set1_epi16((short)((1 << bits) - 1))), offset);
}

/* Numbers of a step: `terms` vectors that add up to the weights. */
INLINE void numbers_of(const lanes *p, const decoder *d, int zeros, int terms, int step, __m512i *out)
{
    __m512i low = low_index(p, step);
    if (zeros) low = shifted(low, BITS < 4 ? BITS : 4, d->offset[0]);
    out[0] = _mm512_permutexvar_epi16(low, d->table[0]);
    if (BITS > 4) {
        __m512i high = high_index(p, step);
        if (zeros) high = shifted(high, BITS - 4, d->offset[1]);
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

/* Offsets of a group; returns what is left of real zero-points after the nearest codes were taken for them. */
INLINE __m512 begin_group(const weight *w, decoder *d, int64_t tile, int64_t g)
{
    const __m512 zero = (__m512)zero_of(w, tile, g);
    __m512i code = _mm512_cvtps_epi32(zero);
    code = _mm512_min_epi32(_mm512_max_epi32(code, _mm512_setzero_si512()), _mm512_set1_epi32((1 << BITS) - 1));
    const __m512 rest = _mm512_sub_ps(zero, _mm512_cvtepi32_ps(code));
    const __m512i sixteen = _mm512_set1_epi16(16);
    const __m512i both = _mm512_or_si512(code, _mm512_slli_epi32(code, 16));
    d->offset[0] = _mm512_sub_epi16(sixteen, _mm512_and_si512(both, _mm512_set1_epi16(15)));
    d->offset[1] = _mm512_sub_epi16(sixteen, _mm512_srli_epi16(both, 4));
    return rest;
}

INLINE void dot_tile(const product *p, const decoder *from, int64_t tile, int64_t token, int zeros, int tokens)
{
    const weight *w = &p->w;
    const int terms = BITS > 4 ? 2 : 1, chains = tokens == 1 ? 4 : tokens == 2 ? 2 : 1;
    const uint8_t *codes = w->codes + tile * row_blocks(w) * BLOCK_BYTES;
    const uint16_t *x = (const uint16_t *)p->x + token * p->stride;
    decoder d = *from;
    __m512 total[8], sum[8][4];
    for (int m = 0; m < tokens; m++) total[m] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups(w); g++) {
        const __m512 scale = (__m512)scale_of(w, tile, g);
        const __m512 rest = zeros ? begin_group(w, &d, tile, g) : _mm512_setzero_ps();
        for (int m = 0; m < tokens; m++)
            for (int c = 0; c < chains; c++) sum[m][c] = _mm512_setzero_ps();
        for (int64_t b = group_blocks(w, g); b > 0; b--, codes += BLOCK_BYTES, x += BLOCK) {
            const lanes loaded = load_lanes(codes);
            for (int ahead = 0; ahead < BLOCK_BYTES; ahead += 64) _mm_prefetch(codes + 2048 + ahead, _MM_HINT_T0);
#pragma GCC unroll 8
            for (int step = 0; step < BLOCK / 2; step++) {
                __m512i numbers[3];
                numbers_of(&loaded, &d, zeros, terms, step, numbers);
#pragma GCC unroll 8
                for (int m = 0; m < tokens; m++) {
                    int pair;
                    memcpy(&pair, x + m * p->stride + 2 * step, 4);
                    const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
                    for (int t = 0; t < terms; t++)
                        sum[m][step % chains] = _mm512_dpbf16_ps(sum[m][step % chains], (__m512bh)numbers[t], both);
                }
            }
        }
        for (int m = 0; m < tokens; m++) {
            for (int c = 1; c < chains; c++) sum[m][0] = _mm512_add_ps(sum[m][0], sum[m][c]);
            if (w->kind == REAL)
                sum[m][0] = _mm512_fnmadd_ps(rest, _mm512_set1_ps(p->sums[(token + m) * groups(w) + g]), sum[m][0]);
            total[m] = _mm512_fmadd_ps(sum[m][0], scale, total[m]);
        }
    }
    for (int m = 0; m < tokens; m++) store_outputs(p, tile, token + m, (vf)total[m]);
}

INLINE void dot_tokens(const product *p, const decoder *d, int64_t tile, int zeros)
{
    int64_t token = 0;
    for (; p->tokens - token >= 8; token += 8) dot_tile(p, d, tile, token, zeros, 8);
    if (p->tokens - token >= 4) dot_tile(p, d, tile, token, zeros, 4), token += 4;
    if (p->tokens - token >= 2) dot_tile(p, d, tile, token, zeros, 2), token += 2;
    if (p->tokens - token >= 1) dot_tile(p, d, tile, token, zeros, 1);
}

static void dot_product(const product *p, const decoder *d, int64_t tile)
{
    if (p->w.kind == INTEGER || p->w.kind == REAL) dot_tokens(p, d, tile, 1);
    else dot_tokens(p, d, tile, 0);
}
