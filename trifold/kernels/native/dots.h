/* Products of bfloat16 activations by vdpbf16ps: AVX512-BF16 without AMX. */

#include "bfloat16.h"

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
        if (zeros) set_offsets(w, &d, tile, g);
        for (int m = 0; m < tokens; m++)
            for (int c = 0; c < chains; c++) sum[m][c] = _mm512_setzero_ps();
        for (int64_t b = group_blocks(w, g); b > 0; b--, codes += BLOCK_BYTES, x += BLOCK) {
            const lanes loaded = load_lanes(codes);
            for (int ahead = 0; ahead < BLOCK_BYTES; ahead += 64) _mm_prefetch(codes + AHEAD + ahead, _MM_HINT_T1);
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
                sum[m][0] = _mm512_fnmadd_ps(zero_rest(w, tile, g),
                                             _mm512_set1_ps(p->sums[(token + m) * groups(w) + g]), sum[m][0]);
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

/* Tiles `begin` .. `end` - 1. */
static void dot_tiles(const product *p, int64_t begin, int64_t end)
{
    decoder d;
    make_decoder(&p->w, &d);
    for (int64_t tile = begin; tile < end; tile++)
        if (p->w.kind == INTEGER || p->w.kind == REAL) dot_tokens(p, &d, tile, 1);
        else dot_tokens(p, &d, tile, 0);
}
