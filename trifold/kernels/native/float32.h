/* Products in float32 on any processor: 16 rows at a time, codes become floats, groups are scaled when they end.
   Vectors are the compiler's own, so the instruction set is a matter of its flags. */

#include "layout.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define MOST_TOKENS 8
#else
#define MOST_TOKENS 4
#endif

INLINE vf look_up(const float *table, vu code)
{
#if defined(__AVX512F__)
    return (vf)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(table));
#elif defined(__AVX2__)
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    __m256i half[2];
    __m256 found[2];
    memcpy(half, &code, 64);
    for (int i = 0; i < 2; i++)
        found[i] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, half[i]), _mm256_permutevar8x32_ps(high, half[i]),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(half[i], 28)));
    vf value;
    memcpy(&value, found, 64);
    return value;
#else
    vf value;
    for (int i = 0; i < ROWS; i++) value[i] = table[code[i]];
    return value;
#endif
}

INLINE vf value_at(const planes *p, const float *table, vf zero, int from_table, int step, int odd)
{
    const vu code = code_at(p, step, odd);
    return from_table ? look_up(table, code) : __builtin_convertvector((vi)code, vf) - zero;
}

INLINE void float_tile(const product *p, int64_t tile, int64_t token, int from_table, int tokens)
{
    const weight *w = &p->w;
    const int chains = tokens <= 2 ? 2 : 1; /* of dependent additions */
    const uint8_t *codes = w->codes + tile * row_blocks(w) * BLOCK_BYTES;
    const float *x = (const float *)p->x + token * p->stride;
    vf total[MOST_TOKENS], sum[MOST_TOKENS][2];
    for (int m = 0; m < tokens; m++) total[m] = (vf){0};
    for (int64_t g = 0; g < groups(w); g++) {
        const vf scale = scale_of(w, tile, g), zero = from_table ? scale : zero_of(w, tile, g);
        for (int m = 0; m < tokens; m++) sum[m][0] = sum[m][1] = (vf){0};
        for (int64_t b = group_blocks(w, g); b > 0; b--, codes += BLOCK_BYTES, x += BLOCK) {
            const planes loaded = load_planes(codes);
            for (int ahead = 0; ahead < BLOCK_BYTES; ahead += 64) __builtin_prefetch(codes + AHEAD + ahead, 0, 2);
#pragma GCC unroll 8
            for (int step = 0; step < BLOCK / 2; step++)
#pragma GCC unroll 2
                for (int odd = 0; odd < 2; odd++) {
                    const vf value = value_at(&loaded, w->table, zero, from_table, step, odd);
#pragma GCC unroll 8
                    for (int m = 0; m < tokens; m++)
                        sum[m][chains == 2 ? odd : 0] += value * x[m * p->stride + 2 * step + odd];
                }
        }
        for (int m = 0; m < tokens; m++) total[m] += (chains == 2 ? sum[m][0] + sum[m][1] : sum[m][0]) * scale;
    }
    for (int m = 0; m < tokens; m++) store_outputs(p, tile, token + m, total[m]);
}

INLINE void float_tokens(const product *p, int64_t tile, int from_table)
{
    int64_t token = 0;
    for (; p->tokens - token >= MOST_TOKENS; token += MOST_TOKENS) float_tile(p, tile, token, from_table, MOST_TOKENS);
    if (MOST_TOKENS > 4 && p->tokens - token >= 4) float_tile(p, tile, token, from_table, 4), token += 4;
    if (p->tokens - token >= 2) float_tile(p, tile, token, from_table, 2), token += 2;
    if (p->tokens - token >= 1) float_tile(p, tile, token, from_table, 1);
}

static void float_product(const product *p, int64_t tile)
{
    if (BITS == 4 && p->w.kind == TABLE) float_tokens(p, tile, 1);
    else float_tokens(p, tile, 0);
}

/* A tile's weights, rounded once to `dtype`, column by column: `count` of its rows, columns `stride` numbers apart. */
INLINE void dequantize_tile(const weight *w, int64_t tile, int64_t count, uint8_t *out, int dtype, int64_t stride,
                            int from_table)
{
    const uint8_t *codes = w->codes + tile * row_blocks(w) * BLOCK_BYTES;
    const int64_t size = dtype == BFLOAT16 ? 2 : 4;
    for (int64_t g = 0; g < groups(w); g++) {
        const vf scale = scale_of(w, tile, g), zero = from_table ? scale : zero_of(w, tile, g);
        for (int64_t left = group_columns(w, g); left > 0; left -= BLOCK, codes += BLOCK_BYTES) {
            const planes loaded = load_planes(codes);
#pragma GCC unroll 8
            for (int step = 0; step < BLOCK / 2; step++)
#pragma GCC unroll 2
                for (int odd = 0; odd < 2; odd++) {
                    if (2 * step + odd >= left) break;
                    const vf value = value_at(&loaded, w->table, zero, from_table, step, odd) * scale;
                    const vh half = to_bfloat16(value);
                    const void *from = dtype == BFLOAT16 ? (const void *)&half : (const void *)&value;
                    if (count == ROWS) memcpy(out, from, (size_t)(ROWS * size));
                    else memcpy(out, from, (size_t)(count * size));
                    out += stride * size;
                }
        }
    }
}

static void dequantize_any(const weight *w, int64_t tile, int64_t count, void *out, int dtype, int64_t stride)
{
    if (BITS == 4 && w->kind == TABLE && dtype == BFLOAT16) dequantize_tile(w, tile, count, out, BFLOAT16, stride, 1);
    else if (BITS == 4 && w->kind == TABLE) dequantize_tile(w, tile, count, out, FLOAT32, stride, 1);
    else if (dtype == BFLOAT16) dequantize_tile(w, tile, count, out, BFLOAT16, stride, 0);
    else dequantize_tile(w, tile, count, out, FLOAT32, stride, 0);
}
