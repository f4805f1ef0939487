/* Products of bfloat16 activations by vdpbf16ps: AVX512-BF16, and a single token where there is AMX.

   Several tiles are read side by side: one run of addresses does not fill the memory's queues. */

#include "bfloat16.h"

/* SIDES: tiles side by side for one token. DOTS_AHEAD: bytes of each that are asked for before they are needed. */
#if defined(__AMX_BF16__)
#define SIDES 4 /* Sapphire Rapids */
#define DOTS_AHEAD 1024
#else
#define SIDES 2 /* Zen 4 */
#define DOTS_AHEAD 2048
#endif

/* Prefetch what a group has beside its codes. */
INLINE void ask_for_scales(const weight *w, int64_t tile, int64_t g)
{
    const int64_t at = (tile * groups(w) + g) * ROWS;
    _mm_prefetch((const uint8_t *)w->scale + at * (w->wide ? 4 : 2), _MM_HINT_T0);
    if (w->zero) _mm_prefetch((const uint8_t *)w->zero + at * (w->kind == INTEGER ? 1 : w->wide ? 4 : 2), _MM_HINT_T0);
}

/* `sides` tiles from `tile` on, for `tokens` tokens. The order of sums does not depend on `sides`. */
INLINE void dot_tile(const product *p, const decoder *from, int64_t tile, int64_t token, int zeros, int tokens,
                     int sides)
{
    const weight *w = &p->w;
    const int terms = BITS > 4 ? 2 : 1, chains = tokens <= 2 ? 2 : 1;
    const int64_t tile_bytes = row_blocks(w) * BLOCK_BYTES, turn = tile_bytes - DOTS_AHEAD;
    const uint8_t *codes = w->codes + tile * tile_bytes;
    const uint16_t *x = (const uint16_t *)p->x + token * p->stride;
    decoder d[SIDES];
    __m512 total[SIDES][8], sum[SIDES][8][2];
    for (int n = 0; n < sides; n++) {
        if (zeros) d[n] = *from;
        for (int m = 0; m < tokens; m++) total[n][m] = _mm512_setzero_ps();
    }
    int64_t at = 0;
    for (int64_t g = 0; g < groups(w); g++) {
        for (int n = 0; n < sides; n++) {
            ask_for_scales(w, tile + n, g + 8);
            if (zeros) set_offsets(w, &d[n], tile + n, g);
            for (int m = 0; m < tokens; m++)
                for (int c = 0; c < chains; c++) sum[n][m][c] = _mm512_setzero_ps();
        }
        for (int64_t b = group_blocks(w, g); b > 0; b--, at += BLOCK_BYTES, x += BLOCK) {
            const int64_t ahead = at + DOTS_AHEAD + (at < turn ? 0 : (sides - 1) * tile_bytes); /* the next tiles */
#pragma GCC unroll 4
            for (int n = 0; n < sides; n++) {
                const decoder *own = zeros ? &d[n] : from;
                const lanes loaded = load_lanes(codes + n * tile_bytes + at, own, zeros);
                for (int line = 0; line < BLOCK_BYTES; line += 64)
                    _mm_prefetch(codes + n * tile_bytes + ahead + line, _MM_HINT_T0);
#pragma GCC unroll 8
                for (int step = 0; step < BLOCK / 2; step++) {
                    __m512i numbers[3];
                    numbers_of(&loaded, own, zeros, terms, step, numbers);
#pragma GCC unroll 8
                    for (int m = 0; m < tokens; m++) {
                        int pair;
                        memcpy(&pair, x + m * p->stride + 2 * step, 4);
                        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                        __m512 *to = &sum[n][m][step % chains];
#pragma GCC unroll 2
                        for (int t = 0; t < terms; t++) *to = _mm512_dpbf16_ps(*to, (__m512bh)numbers[t], both);
                    }
                }
            }
        }
        for (int n = 0; n < sides; n++) {
            const __m512 scale = (__m512)scale_of(w, tile + n, g);
            for (int m = 0; m < tokens; m++) {
                __m512 all = sum[n][m][0];
                for (int c = 1; c < chains; c++) all = _mm512_add_ps(all, sum[n][m][c]);
                if (w->kind == REAL)
                    all = _mm512_fnmadd_ps(zero_rest(w, tile + n, g),
                                           _mm512_set1_ps(p->sums[(token + m) * groups(w) + g]), all);
                total[n][m] = _mm512_fmadd_ps(all, scale, total[n][m]);
            }
        }
    }
    for (int n = 0; n < sides; n++)
        for (int m = 0; m < tokens; m++) store_outputs(p, tile + n, token + m, (vf)total[n][m]);
}

/* `sides` tiles for all tokens. */
INLINE void dot_tokens(const product *p, const decoder *d, int64_t tile, int zeros, int sides)
{
    int64_t token = 0;
    for (; p->tokens - token >= 8; token += 8)
        for (int n = 0; n < sides; n++) dot_tile(p, d, tile + n, token, zeros, 8, 1);
    if (p->tokens - token >= 4) {
        for (int n = 0; n < sides; n += 2) dot_tile(p, d, tile + n, token, zeros, 4, sides < 2 ? 1 : 2);
        token += 4;
    }
    if (p->tokens - token >= 2) dot_tile(p, d, tile, token, zeros, 2, sides), token += 2;
    if (p->tokens - token >= 1) dot_tile(p, d, tile, token, zeros, 1, sides);
}

/* Tiles `begin` .. `end` - 1. */
static void dot_tiles(const product *p, int64_t begin, int64_t end)
{
    decoder d;
    make_decoder(&p->w, &d);
    const int zeros = p->w.kind == INTEGER || p->w.kind == REAL;
    int64_t tile = begin;
    for (; end - tile >= SIDES; tile += SIDES)
        if (zeros) dot_tokens(p, &d, tile, 1, SIDES);
        else dot_tokens(p, &d, tile, 0, SIDES);
    for (; tile < end; tile++)
        if (zeros) dot_tokens(p, &d, tile, 1, 1);
        else dot_tokens(p, &d, tile, 0, 1);
}
