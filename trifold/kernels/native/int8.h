/* Products of activations rounded to 8 bits or fewer: vpdpbusd, exact in integers within a group.

   Weights of 4 and 8 bits as nibbles: the even and the odd ones of a plane are four bytes to a row, in an order that
   `place_bytes` gives to the activations too. A group's zero-point meets the sum of its activations. */

#include "bfloat16.h"

typedef struct {
    product p;           /* x: int8 (tokens, stride) */
    const int32_t *sums; /* of x: (tokens, groups) */
    const float *scales; /* of x: (tokens,) */
} rounded;

/* One token on its grid, as torch rounds it: scale is `given`, or the largest magnitude over `largest`. */
static void round_token(const void *from, int64_t dtype, int64_t columns, float largest, const float *given,
                        float *room, int8_t *codes, float *scale)
{
    float most = 0, nothing = 0;
    for (int64_t c = 0; c < columns; c++)
        room[c] = dtype == BFLOAT16 ? widened(((const uint16_t *)from)[c]) : ((const float *)from)[c];
    for (int64_t c = 0; c < columns; c++) {
        const float size = room[c] < 0 ? -room[c] : room[c];
        most = size > most ? size : most;
        nothing += room[c] != room[c];
    }
    float step = given ? *given : most / largest;
    if (!given && step == 0) step = 1;
    *scale = nothing > 0 ? __builtin_nanf("") : step;
    for (int64_t c = 0; c < columns; c++) {
        float code = room[c] / step;
        code = code > largest ? largest : code;
        code = code < -largest ? -largest : code;
        codes[c] = code == code ? (int8_t)__builtin_rintf(code) : 0;
    }
}

/* Codes of a token by blocks, a group's last one filled with zeros; and their sums by group. */
static void place_bytes(const weight *w, const int8_t *codes, int8_t *to, int32_t *sums)
{
    static const int8_t order[BLOCK] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
    for (int64_t g = 0; g < groups(w); g++) {
        int32_t sum = 0;
        for (int64_t left = group_columns(w, g); left > 0; left -= BLOCK, codes += BLOCK, to += BLOCK)
            for (int i = 0; i < BLOCK; i++) {
                to[i] = order[i] < left ? codes[order[i]] : 0;
                sum += to[i];
            }
        codes -= (BLOCK - group_columns(w, g) % BLOCK) % BLOCK;
        sums[g] = sum;
    }
}

INLINE __m512i bytes_of(const uint8_t *plane, int odd)
{
    const __m512i codes = _mm512_loadu_si512(plane);
    return _mm512_and_si512(odd ? _mm512_srli_epi16(codes, 4) : codes, _mm512_set1_epi8(15));
}

INLINE void byte_tile(const rounded *r, int64_t tile, int64_t token, int tokens, int sides)
{
    const product *p = &r->p;
    const weight *w = &p->w;
    const int64_t tile_bytes = row_blocks(w) * BLOCK_BYTES, turn = tile_bytes - DOTS_AHEAD;
    const uint8_t *codes = w->codes + tile * tile_bytes;
    const int8_t *x = (const int8_t *)p->x + token * p->stride;
    __m512 total[SIDES][8];
    for (int n = 0; n < sides; n++)
        for (int m = 0; m < tokens; m++) total[n][m] = _mm512_setzero_ps();
    int64_t at = 0;
    for (int64_t g = 0; g < groups(w); g++) {
        __m512i low[SIDES][8], high[SIDES][8];
        for (int n = 0; n < sides; n++) {
            ask_for_scales(w, tile + n, g + 8);
            for (int m = 0; m < tokens; m++) low[n][m] = high[n][m] = _mm512_setzero_si512();
        }
        for (int64_t b = group_blocks(w, g); b > 0; b--, at += BLOCK_BYTES, x += BLOCK) {
            const int64_t ahead = at + DOTS_AHEAD + (at < turn ? 0 : (sides - 1) * tile_bytes);
#pragma GCC unroll 4
            for (int n = 0; n < sides; n++) {
                const uint8_t *block = codes + n * tile_bytes + at;
                for (int line = 0; line < BLOCK_BYTES; line += 64)
                    _mm_prefetch(codes + n * tile_bytes + ahead + line, _MM_HINT_T0);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    const __m512i below = bytes_of(block + i / 2 * 64, i % 2);
                    const __m512i above = BITS == 8 ? bytes_of(block + 128 + i / 2 * 64, i % 2) : below;
#pragma GCC unroll 8
                    for (int m = 0; m < tokens; m++) {
                        int four;
                        memcpy(&four, x + m * p->stride + 4 * i, 4);
                        const __m512i all = _mm512_set1_epi32(four);
                        low[n][m] = _mm512_dpbusd_epi32(low[n][m], below, all);
                        if (BITS == 8) high[n][m] = _mm512_dpbusd_epi32(high[n][m], above, all);
                    }
                }
            }
        }
        for (int n = 0; n < sides; n++) {
            const __m512 scale = (__m512)scale_of(w, tile + n, g);
            const __m512i zero = _mm512_cvtps_epi32((__m512)zero_of(w, tile + n, g));
            for (int m = 0; m < tokens; m++) {
                __m512i sum = low[n][m];
                if (BITS == 8) sum = _mm512_add_epi32(sum, _mm512_slli_epi32(high[n][m], 4));
                const __m512i all = _mm512_set1_epi32(r->sums[(token + m) * groups(w) + g]);
                sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero, all));
                total[n][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total[n][m]);
            }
        }
    }
    for (int n = 0; n < sides; n++)
        for (int m = 0; m < tokens; m++)
            store_outputs(p, tile + n, token + m,
                          (vf)_mm512_mul_ps(total[n][m], _mm512_set1_ps(r->scales[token + m])));
}

/* Tiles `begin` .. `end` - 1. */
static void byte_tiles(const rounded *r, int64_t begin, int64_t end)
{
    const int64_t tokens = r->p.tokens;
    for (int64_t tile = begin, sides; tile < end; tile += sides) {
        sides = end - tile < SIDES ? 1 : SIDES;
        int64_t token = 0;
        for (; tokens - token >= 8; token += 8)
            for (int64_t n = 0; n < sides; n++) byte_tile(r, tile + n, token, 8, 1);
        for (; tokens - token >= 4; token += 4)
            for (int64_t n = 0; n < sides; n++) byte_tile(r, tile + n, token, 4, 1);
        for (; token < tokens; token++)
            if (sides == 1) byte_tile(r, tile, token, 1, 1);
            else byte_tile(r, tile, token, 1, SIDES);
    }
}
