/* Products with bfloat16 weights, one stage of stages.c; compiled for an instruction set with -DBITS=16.

   Rows go by tiles of 16. A step is two columns of a tile: 16 lanes of 32 bits, the even column below the odd one, which
   is what vdpbf16ps and tdpbf16ps take. Columns are filled with zeros to a multiple of BLOCK. */

#include "layout.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include "halves_amx.h"
#endif

#define STEP 64          /* bytes */
#define HALVES_AHEAD 2048 /* bytes of each tile that are asked for before they are needed */

INLINE int64_t steps(const weight *w) { return (w->columns + BLOCK - 1) / BLOCK * (BLOCK / 2); }

/* numbers: (rows, columns) bfloat16, of which tiles begin .. end - 1 are written to codes, or back. */
void convert(int64_t rows, int64_t columns, uint16_t *numbers, uint16_t *codes, int64_t begin, int64_t end, int64_t back,
             int64_t threads)
{
    const weight w = {.rows = rows, .columns = columns};
    const int64_t size = steps(&w) * STEP / 2;
    _Pragma("omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)")
    for (int64_t tile = begin; tile < end; tile++) {
        uint16_t *to = codes + tile * size;
        if (!back) memset(to, 0, (size_t)size * 2);
        for (int64_t r = 0; r < ROWS && tile * ROWS + r < rows; r++) {
            uint16_t *row = numbers + ((tile - begin) * ROWS + r) * columns;
            for (int64_t c = 0; c < columns; c++)
                if (back) row[c] = to[c / 2 * 32 + 2 * r + c % 2];
                else to[c / 2 * 32 + 2 * r + c % 2] = row[c];
        }
    }
}

#if defined(__AVX512BF16__)

/* `sides` tiles from `tile` on for `tokens` tokens. The order of sums does not depend on `sides`. */
INLINE void dot_tile(const product *p, int64_t tile, int64_t token, int tokens, int sides)
{
    const int chains = tokens == 1 ? 2 : 1; /* of dependent additions */
    const int64_t count = steps(&p->w), bytes = count * STEP;
    const uint8_t *codes = p->w.codes + tile * bytes;
    const uint16_t *x = (const uint16_t *)p->x + token * p->stride;
    __m512 sum[4][8][2];
    for (int n = 0; n < sides; n++)
        for (int m = 0; m < tokens; m++)
            for (int c = 0; c < chains; c++) sum[n][m][c] = _mm512_setzero_ps();
    for (int64_t step = 0; step < count; step += 2, codes += 2 * STEP, x += 4)
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            __m512bh numbers[4];
#pragma GCC unroll 4
            for (int n = 0; n < sides; n++) {
                const uint8_t *at = codes + n * bytes + odd * STEP;
                numbers[n] = (__m512bh)_mm512_loadu_si512(at);
                _mm_prefetch(at + HALVES_AHEAD, _MM_HINT_T0);
            }
#pragma GCC unroll 8
            for (int m = 0; m < tokens; m++) {
                int pair;
                memcpy(&pair, x + m * p->stride + 2 * odd, 4);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int n = 0; n < sides; n++) {
                    __m512 *to = &sum[n][m][odd % chains];
                    *to = _mm512_dpbf16_ps(*to, numbers[n], both);
                }
            }
        }
    for (int n = 0; n < sides; n++)
        for (int m = 0; m < tokens; m++) {
            const __m512 all = chains == 2 ? _mm512_add_ps(sum[n][m][0], sum[n][m][1]) : sum[n][m][0];
            store_outputs(p, tile + n, token + m, (vf)all);
        }
}

#define MOST_SIDES 4

INLINE void dot_tokens(const product *p, int64_t tile, int sides)
{
    int64_t token = 0;
    for (; p->tokens - token >= 6 && p->tokens - token != 8; token += 6) dot_tile(p, tile, token, 6, sides);
    for (; p->tokens - token >= 4; token += 4) dot_tile(p, tile, token, 4, sides);
    if (p->tokens - token >= 2) dot_tile(p, tile, token, 2, sides), token += 2;
    if (p->tokens - token >= 1) dot_tile(p, tile, token, 1, sides);
}

static void dots(const product *p, int64_t begin, int64_t end)
{
    int64_t tile = begin;
    for (; end - tile >= MOST_SIDES; tile += MOST_SIDES) dot_tokens(p, tile, MOST_SIDES);
    for (; tile < end; tile++) dot_tokens(p, tile, 1);
}

#endif

#ifdef __AVX512F__
#define MOST_TOKENS 8
#else
#define MOST_TOKENS 4
#endif

INLINE void float_tile(const product *p, int64_t tile, int64_t token, int tokens)
{
    const int64_t count = steps(&p->w);
    const uint8_t *codes = p->w.codes + tile * count * STEP;
    const float *x = (const float *)p->x + token * p->stride;
    vf sum[MOST_TOKENS][2];
    for (int m = 0; m < tokens; m++) sum[m][0] = sum[m][1] = (vf){0};
    for (int64_t step = 0; step < count; step++, codes += STEP, x += 2) {
        vu both;
        memcpy(&both, codes, sizeof both);
        __builtin_prefetch(codes + HALVES_AHEAD, 0, 2);
        const vf even = (vf)(both << 16), odd = (vf)(both & 0xffff0000u);
#pragma GCC unroll 8
        for (int m = 0; m < tokens; m++) {
            sum[m][0] += even * x[m * p->stride];
            sum[m][1] += odd * x[m * p->stride + 1];
        }
    }
    for (int m = 0; m < tokens; m++) store_outputs(p, tile, token + m, sum[m][0] + sum[m][1]);
}

static void floats(const product *p, int64_t tile)
{
    int64_t token = 0;
    for (; p->tokens - token >= MOST_TOKENS; token += MOST_TOKENS) float_tile(p, tile, token, MOST_TOKENS);
    for (; p->tokens - token >= 2; token += 2) float_tile(p, tile, token, 2);
    if (p->tokens > token) float_tile(p, tile, token, 1);
}

/* Tiles begin .. end - 1. x: (tokens, stride) float32, or bfloat16 if not `wide`; columns beyond the weight's are zero. */
void run_tiles(const product *p, int64_t begin, int64_t end, int wide)
{
#if defined(__AMX_BF16__)
    if (!wide && p->tokens > FEW_TOKENS) {
        amx_tiles(p, begin, end);
        return;
    }
#endif
#if defined(__AVX512BF16__)
    if (!wide) {
        dots(p, begin, end);
        return;
    }
#endif
    (void)wide;
    for (int64_t tile = begin; tile < end; tile++) floats(p, tile);
}
