/* Products of bfloat16 activations for many tokens by vdpbf16ps.

   A chunk of a group at a time is written as numbers to a buffer that stays in the first-level cache, and meets all
   tokens of a panel before the next chunk. Differences of codes of 8 bits are exact in bfloat16. The values of a table
   may not be, and short groups cost many sums: where the caller allows it, such weights are scaled and rounded first,
   and a chunk need not end with its group. */

#include "bfloat16.h"

#define PANELS_FROM (BITS > 4 ? 12 : 16) /* tokens: dots.h takes two products above 4 bits */
#define ACROSS 8          /* tokens whose sums are in registers at once */
#define BESIDE 3          /* tiles at once: with their numbers all registers are in use */
#define PANEL_TOKENS 256  /* that meet a weight before it is decoded again */
#define PANEL_BLOCKS 8    /* of a chunk */
#define SHORT_GROUP 64    /* columns: fewer are cheaper to round */

typedef struct {
    _Alignas(64) uint8_t numbers[BESIDE][PANEL_BLOCKS * BLOCK / 2 * STEP_BYTES];
    _Alignas(64) float totals[PANEL_TOKENS][BESIDE][ROWS];
} workspace;

/* Codes above 4 bits as numbers: the two halves of `numbers_of` would take two products. */
INLINE void write_sums(const uint8_t *codes, const decoder *d, __m512 zero, int64_t blocks, uint8_t *out)
{
    const __m512i low = _mm512_set1_epi16(15), all = _mm512_set1_epi16((1 << BITS) - 1);
    for (; blocks > 0; blocks--, codes += BLOCK_BYTES, out += BLOCK / 2 * STEP_BYTES) {
        const lanes loaded = load_lanes(codes, d, 0);
        for (int ahead = 0; ahead < BLOCK_BYTES; ahead += 64) _mm_prefetch(codes + AHEAD + ahead, _MM_HINT_T1);
#pragma GCC unroll 8
        for (int step = 0; step < BLOCK / 2; step++) {
            const __m512i high = _mm512_slli_epi16(high_index(&loaded, step), 4);
            const __m512i both =
                _mm512_and_si512(_mm512_ternarylogic_epi32(low, low_index(&loaded, step), high, 0xca), all);
            const __m512i lower = _mm512_and_si512(both, _mm512_set1_epi32(0xffff));
            const __m512 even = _mm512_sub_ps(_mm512_cvtepi32_ps(lower), zero);
            const __m512 odd = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(both, 16)), zero);
            _mm512_store_si512(out + step * STEP_BYTES,
                               _mm512_or_si512((__m512i)odd, _mm512_srli_epi32((__m512i)even, 16)));
        }
    }
}

/* `count` blocks of a tile, from `block` on, scaled and rounded. */
INLINE void write_rounded(const weight *w, int64_t tile, int64_t block, int64_t count, uint8_t *out, int from_table)
{
    const uint8_t *codes = w->codes + (tile * row_blocks(w) + block) * BLOCK_BYTES;
    const int64_t full = group_blocks(w, 0);
    uint16_t order[32];
    for (int i = 0; i < 32; i++) order[i] = (uint16_t)(i / 2 + i % 2 * 16);
    const __m512i pairs = _mm512_loadu_si512(order);
    for (int64_t end = block + count; block < end;) {
        const int64_t g = block / full, rest = (g + 1) * full, stop = rest < end ? rest : end;
        const vf scale = scale_of(w, tile, g), zero = from_table ? scale : zero_of(w, tile, g);
        for (; block < stop; block++, codes += BLOCK_BYTES, out += BLOCK / 2 * STEP_BYTES) {
            const planes loaded = load_planes(codes);
            for (int ahead = 0; ahead < BLOCK_BYTES; ahead += 64) _mm_prefetch(codes + AHEAD + ahead, _MM_HINT_T1);
#pragma GCC unroll 8
            for (int step = 0; step < BLOCK / 2; step++) {
                const vf even = value_at(&loaded, w->table, zero, from_table, step, 0) * scale;
                const vf odd = value_at(&loaded, w->table, zero, from_table, step, 1) * scale;
                const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
                _mm512_store_si512(out + step * STEP_BYTES, _mm512_permutexvar_epi16(pairs, both));
            }
        }
    }
}

static void write_any_rounded(const weight *w, int64_t tile, int64_t block, int64_t count, uint8_t *out)
{
    if (BITS == 4 && w->kind == TABLE) write_rounded(w, tile, block, count, out, 1);
    else write_rounded(w, tile, block, count, out, 0);
}

/* Add a chunk's scaled sums of `tokens` tokens and `sides` tiles to the totals. */
INLINE void multiply(const uint8_t *x, const workspace *space, int64_t blocks, const __m512 *scale, int first,
                     float totals[][BESIDE][ROWS], int tokens, int sides)
{
    __m512 sum[ACROSS][BESIDE];
    for (int m = 0; m < tokens; m++)
        for (int n = 0; n < sides; n++) sum[m][n] = _mm512_setzero_ps();
    const uint8_t *numbers = space->numbers[0];
    for (int64_t b = 0; b < blocks; b++, x += ACROSS * BLOCK * 2, numbers += BLOCK / 2 * STEP_BYTES)
#pragma GCC unroll 8
        for (int step = 0; step < BLOCK / 2; step++) {
            __m512i own[BESIDE];
#pragma GCC unroll 4
            for (int n = 0; n < sides; n++)
                own[n] = _mm512_load_si512(numbers + n * sizeof space->numbers[0] + step * STEP_BYTES);
#pragma GCC unroll 8
            for (int m = 0; m < tokens; m++) {
                int pair;
                memcpy(&pair, x + m * BLOCK * 2 + step * 4, 4);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int n = 0; n < sides; n++) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], (__m512bh)own[n], both);
            }
        }
    for (int m = 0; m < tokens; m++)
        for (int n = 0; n < sides; n++) {
            const __m512 before = first ? _mm512_setzero_ps() : _mm512_load_ps(totals[m][n]);
            _mm512_store_ps(totals[m][n], _mm512_fmadd_ps(sum[m][n], scale[n], before));
        }
}

static void multiply_any(const uint8_t *x, const workspace *space, int64_t blocks, const __m512 *scale, int first,
                         float totals[][BESIDE][ROWS], int64_t tokens, int sides)
{
#define SIDES_(n)                                                                                                     \
    if (sides == (n)) {                                                                                               \
        if (tokens == 8) multiply(x, space, blocks, scale, first, totals, 8, n);                                      \
        else if (tokens == 4) multiply(x, space, blocks, scale, first, totals, 4, n);                                 \
        else if (tokens == 2) multiply(x, space, blocks, scale, first, totals, 2, n);                                 \
        else multiply(x, space, blocks, scale, first, totals, 1, n);                                                  \
    }
    SIDES_(1) SIDES_(2) SIDES_(3)
#undef SIDES_
}

/* Subtract what is left of real zero-points times the sums of x. */
static void subtract_rests(const product *p, int64_t tile, int64_t g, int64_t token, int64_t count, int sides,
                           workspace *space)
{
    const weight *w = &p->w;
    for (int n = 0; n < sides; n++) {
        const __m512 rest = _mm512_mul_ps((__m512)scale_of(w, tile + n, g), zero_rest(w, tile + n, g));
        for (int64_t m = 0; m < count; m++) {
            const __m512 all = _mm512_set1_ps(p->sums[(token + m) * groups(w) + g]);
            float *total = space->totals[m][n];
            _mm512_store_ps(total, _mm512_fnmadd_ps(rest, all, _mm512_load_ps(total)));
        }
    }
}

static void panel(const product *p, const decoder *from, int64_t tile, int64_t token, int64_t count, int sides,
                  int rounded, workspace *space)
{
    const weight *w = &p->w;
    const int zeros = w->kind == INTEGER || w->kind == REAL;
    const int64_t all = row_blocks(w), full = group_blocks(w, 0);
    decoder d = *from;
    __m512 scale[BESIDE];
    for (int n = 0; n < sides; n++) scale[n] = _mm512_set1_ps(1);
    for (int64_t block = 0, part; block < all; block += part) {
        const int64_t g = block / full, rest = rounded || (g + 1) * full > all ? all - block : (g + 1) * full - block;
        part = rest < PANEL_BLOCKS ? rest : PANEL_BLOCKS;
        for (int n = 0; n < sides; n++) {
            if (rounded) {
                write_any_rounded(w, tile + n, block, part, space->numbers[n]);
                continue;
            }
            const uint8_t *codes = w->codes + ((tile + n) * all + block) * BLOCK_BYTES;
            scale[n] = (__m512)scale_of(w, tile + n, g);
            if (BITS > 4) {
                const __m512 zero = (__m512)zero_of(w, tile + n, g);
                const __m512 code = zeros ? _mm512_cvtepi32_ps(zero_codes(zero)) : zero;
                write_sums(codes, &d, code, part, space->numbers[n]);
            } else {
                if (zeros) set_offsets(w, &d, tile + n, g);
                write_any(codes, &d, part, space->numbers[n], zeros, 1);
            }
        }
        for (int64_t m = 0, many; m < count; m += many) {
            const uint8_t *x = (const uint8_t *)p->x;
            x += ((token + m) / ACROSS * p->stride + block * BLOCK) * ACROSS * 2 + (token + m) % ACROSS * BLOCK * 2;
            const int64_t left = count - m;
            many = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
            multiply_any(x, space, part, scale, !block, space->totals + m, many, sides);
        }
        if (!rounded && w->kind == REAL && block == g * full) subtract_rests(p, tile, g, token, count, sides, space);
    }
    for (int64_t m = 0; m < count; m++)
        for (int n = 0; n < sides; n++)
            store_outputs(p, tile + n, token + m, (vf)_mm512_load_ps(space->totals[m][n]));
}

/* Tiles `begin` .. `end` - 1. x: ACROSS tokens x BLOCK columns side by side, as `place_token` puts them; rounded: whether
   weights may be. */
static void panel_tiles(const product *p, int64_t begin, int64_t end, int rounded)
{
    workspace space;
    decoder d;
    make_decoder(&p->w, &d);
    rounded = rounded && (p->w.group < SHORT_GROUP || (p->w.kind == TABLE && !table_is_narrow(&p->w)));
    for (int64_t token = 0; token < p->tokens; token += PANEL_TOKENS) {
        const int64_t left = p->tokens - token, count = left < PANEL_TOKENS ? left : PANEL_TOKENS;
        int64_t tile = begin;
        for (int sides; tile < end; tile += sides) {
            sides = end - tile < BESIDE ? (int)(end - tile) : BESIDE;
            panel(p, &d, tile, token, count, sides, rounded, &space);
        }
    }
}
