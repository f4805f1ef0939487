/* Products with groups of integers of which only survivors are stored. Compiled for an instruction set and a width.

   A group of columns that share a scale is cut into blocks of `unit` columns: 32, or 16 where that is shorter; the last
   block of a group is filled with zero codes, and activations with zeros. The codes of a block lie in planes of 4, 2
   and 1 bits, as in layout.h the lowest bits first (8 bits are two planes of 4). A plane of b bits has W = unit * b / 16
   words of 16 bits: column c is in word c % W, from bit c / W * b. Spread over a register of `unit` words and each word
   shifted by its own count, a plane so becomes codes in the order of the columns.

   Tensors: where the groups of each row begin (rows + 1), which group of its row each is, codes, scales, zero-points. */

#include "pack.h"
#include "sparse.h"

#define CODES (BITS > 4 ? 4 : BITS) /* bits of the low nibble */
#define TERMS (BITS > 4 ? 2 : 1)    /* numbers that add up to a code */
#define STREAMS 2 /* runs of rows that take turns: one run of addresses does not fill the memory's queues */
#define AFTER 256 /* groups whose scales and numbers are asked for before they are needed */
#define SOME 64                     /* groups whose scales are widened at once, a multiple of 16 */

int ready(void) { return 1; }

typedef struct {
    int64_t rows, columns, group, kind, wide, far; /* far: group numbers have 16 bits */
    int64_t unit, blocks, padded;                  /* blocks of a group, and their columns */
    const int32_t *start;
    const void *number;
    uint8_t *codes;
    const void *scale;
    const uint8_t *zero;
} sparse;

static sparse sparse_of(const int64_t *shape, void *const *tensors)
{
    sparse w = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], 0, 0, 0, tensors[0], tensors[1], tensors[2],
                tensors[3], tensors[4]};
    w.unit = (w.group + 15) / 16 % 2 ? 16 : 32;
    w.blocks = (w.group + w.unit - 1) / w.unit;
    w.padded = w.blocks * w.unit;
    return w;
}

INLINE int64_t block_bytes(int64_t unit) { return unit * BITS / 8; }
INLINE int64_t number_of(const sparse *w, int64_t i)
{
    return w->far ? ((const uint16_t *)w->number)[i] : ((const uint8_t *)w->number)[i];
}
INLINE int zero_at(const sparse *w, int64_t i) { return w->kind == INTEGER ? w->zero[i] : 1 << BITS >> 1; }

/* Where the bits of column c of a block lie that belong to the plane that starts at byte `*at` of it; goes on to the
   next plane. */
INLINE int64_t word_of(int64_t unit, int64_t width, int64_t c, int64_t *at, int64_t *shift)
{
    const int64_t words = unit * width / 16, found = *at + c % words * 2;
    *shift = c / words * width, *at += words * 2;
    return found;
}

static const int WIDTHS[4] = {BITS >= 4 ? 4 : 0, BITS == 8 ? 4 : 0, BITS & 2, BITS & 1};

INLINE void put_in_block(uint8_t *block, int64_t unit, int64_t c, uint32_t code)
{
    int64_t at = 0, shift;
    for (int p = 0; p < 4; p++) {
        if (!WIDTHS[p]) continue;
        uint8_t *word = block + word_of(unit, WIDTHS[p], c, &at, &shift);
        uint16_t bits;
        memcpy(&bits, word, 2);
        bits |= (uint16_t)((code & ((1u << WIDTHS[p]) - 1)) << shift);
        memcpy(word, &bits, 2);
        code >>= WIDTHS[p];
    }
}

INLINE uint32_t code_in_block(const uint8_t *block, int64_t unit, int64_t c)
{
    int64_t at = 0, shift;
    uint32_t code = 0;
    for (int p = 0, low = 0; p < 4; low += WIDTHS[p++]) {
        if (!WIDTHS[p]) continue;
        uint16_t bits;
        memcpy(&bits, block + word_of(unit, WIDTHS[p], c, &at, &shift), 2);
        code |= (uint32_t)(bits >> shift & ((1u << WIDTHS[p]) - 1)) << low;
    }
    return code;
}

/* Between the format's stream of codes and blocks, which are zero at first, or `words`. */
void convert(const int64_t *shape, void *const *tensors, uint32_t *words, int64_t back, int64_t threads)
{
    const sparse w = sparse_of(shape, tensors);
    const int64_t some = (w.start[w.rows] + 31) / 32; /* of 32 groups: they end with a word */
    SHARES(threads)
    for (int64_t share = 0; share < threads; share++)
        for (int64_t i = some * share / threads * 32; i < some * (share + 1) / threads * 32; i++) {
            if (i >= w.start[w.rows]) break;
            uint8_t *blocks = w.codes + i * w.blocks * block_bytes(w.unit);
            for (int64_t c = 0; c < w.group; c++) {
                uint8_t *block = blocks + c / w.unit * block_bytes(w.unit);
                if (back) put_code(words, i * w.group + c, code_in_block(block, w.unit, c % w.unit));
                else put_in_block(block, w.unit, c % w.unit, code_in(words, i * w.group + c));
            }
        }
}

/* The bits of a plane of columns 16 * half .. of a block, one to a lane; what is above them is rubbish. */
INLINE vu plane_of(const uint8_t *at, int unit, int width, int half)
{
    const int words = unit * width / 16;
    uint16_t some[ROWS];
    vh spread;
    vu shift;
    for (int i = 0; i < ROWS; i += words) memcpy(some + i, at, (size_t)words * 2);
    memcpy(&spread, some, sizeof spread);
    for (int i = 0; i < ROWS; i++) shift[i] = (uint32_t)((16 * half + i) / words * width);
    return __builtin_convertvector(spread, vu) >> shift;
}

INLINE vf floats_of(const uint8_t *block, int unit, int half, float zero)
{
    vu code = {0};
    for (int p = 0, low = 0; p < 4; low += WIDTHS[p++]) {
        if (!WIDTHS[p]) continue;
        code |= (plane_of(block, unit, WIDTHS[p], half) & ((1u << WIDTHS[p]) - 1)) << low;
        block += unit * WIDTHS[p] / 8;
    }
    return __builtin_convertvector((vi)code, vf) - zero;
}

INLINE float zero_float(const sparse *w, int64_t i) { return w->kind == INTEGER ? (float)w->zero[i] : midpoint(); }

#if defined(__AVX512BF16__)
#define IN_FLOATS(dtype) ((dtype) != BFLOAT16)
#else
#define IN_FLOATS(dtype) 1
#endif

#if defined(__AVX512BW__)
#define WIDTH 512
#include "group_dots.h"
#undef WIDTH
#define WIDTH 256
#include "group_dots.h"
#undef WIDTH
#define LEVELS(unit) ((unit) == 32 ? 1 : 0)
#else
#define LEVELS(unit) 0

/* Tokens token .. token + tokens - 1 of a row. */
INLINE void float_row(const sparse *w, const request *p, int64_t row, int64_t token, int unit, int tokens)
{
    vf total[4];
    for (int m = 0; m < tokens; m++) total[m] = (vf){0};
    const float *x = (const float *)p->x + token * p->stride;
    for (int64_t i = w->start[row]; i < w->start[row + 1]; i++) {
        const uint8_t *block = w->codes + i * w->blocks * block_bytes(unit);
        const float zero = zero_float(w, i), scale = number_at(w->scale, (int)w->wide, i);
        const float *at = x + number_of(w, i) * w->padded * tokens;
        vf sum[4];
        for (int m = 0; m < tokens; m++) sum[m] = (vf){0};
        __builtin_prefetch(block + FETCHED, 0, 2);
        for (int64_t b = 0; b < w->blocks; b++, block += block_bytes(unit), at += unit * tokens)
            for (int half = 0; half < unit / 16; half++) {
                const vf value = floats_of(block, unit, half, zero);
                for (int m = 0; m < tokens; m++) {
                    vf with;
                    memcpy(&with, at + m * unit + 16 * half, sizeof with);
                    sum[m] += value * with;
                }
            }
        for (int m = 0; m < tokens; m++) total[m] += sum[m] * scale;
    }
    for (int m = 0; m < tokens; m++) store_output(p, token + m, row, sum_of(total[m]));
}

static void float_product(const sparse *w, const request *p, int64_t begin, int64_t end)
{
    for (int64_t token = 0; token < p->tokens;) {
        const int tokens = together(p->tokens - token, p->most);
        for (int64_t row = begin; row < end; row++)
            if (w->unit == 32 && tokens == 4) float_row(w, p, row, token, 32, 4);
            else if (w->unit == 32) float_row(w, p, row, token, 32, 1);
            else if (tokens == 4) float_row(w, p, row, token, 16, 4);
            else float_row(w, p, row, token, 16, 1);
        token += tokens;
    }
}
#endif

#if defined(__AVX512BW__)
/* 16 columns of a block, from its column 16 * half on, before they are scaled. */
INLINE vf wide_numbers(const sparse *w, const tables *t, const uint8_t *block, int64_t half, int64_t i)
{
    const int zero = w->kind == INTEGER ? w->zero[i] : 0;
    const uint16_t *low = t->low[zero & 15], *high = t->high[zero >> 4];
    __m256i numbers[2];
    if (w->unit == 32) {
        __m512i both[2];
        numbers_512(block, low, high, both);
        for (int n = 0; n < TERMS; n++)
            numbers[n] = half ? _mm512_extracti64x4_epi64(both[n], 1) : _mm512_castsi512_si256(both[n]);
    } else {
        numbers_256(block, low, high, numbers);
    }
    vf value = {0};
    for (int n = 0; n < TERMS; n++) {
        const vf term = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers[n]), 16);
        value = n ? value + term : term;
    }
    return value;
}
#endif

/* Some rows, dense and rounded once to `dtype`: those in `wanted`, or else from `first` on: (count, columns). */
void decode(const int64_t *shape, void *const *tensors, const int64_t *wanted, int64_t first, int64_t count, void *out,
            int64_t dtype, int64_t threads)
{
    const sparse w = sparse_of(shape, tensors);
    const int64_t size = dtype == BFLOAT16 ? 2 : 4;
#if defined(__AVX512BW__)
    tables t[1];
    make_tables(&w, t);
#endif
    SHARES(threads)
    for (int64_t share = 0; share < threads; share++)
        for (int64_t k = count * share / threads; k < count * (share + 1) / threads; k++) {
            const int64_t row = wanted ? wanted[k] : first + k;
            uint8_t *to = (uint8_t *)out + k * w.columns * size;
            memset(to, 0, (size_t)(w.columns * size));
            for (int64_t i = w.start[row]; i < w.start[row + 1]; i++) {
                const vf scale = (vf){0} + number_at(w.scale, (int)w.wide, i);
#if !defined(__AVX512BW__)
                const vf zero = (vf){0} + zero_float(&w, i);
#endif
                const int64_t at = number_of(&w, i) * w.group;
                const int64_t there = w.columns - at < w.group ? w.columns - at : w.group;
                for (int64_t c = 0; c < there; c += 16) {
                    const uint8_t *block = w.codes + (i * w.blocks + c / w.unit) * block_bytes(w.unit);
#if defined(__AVX512BW__)
                    const vf value = wide_numbers(&w, t, block, c % 32 / 16, i) * scale;
#else
                    vf value;
                    if (w.unit == 16) value = floats_of(block, 16, 0, 0);
                    else if (c % 32) value = floats_of(block, 32, 1, 0);
                    else value = floats_of(block, 32, 0, 0);
                    value = (value - zero) * scale;
#endif
                    const vh half = to_bfloat16(value);
                    const void *from = dtype == BFLOAT16 ? (const void *)&half : (const void *)&value;
                    if (there - c >= 16) memcpy(to + (at + c) * size, from, (size_t)(16 * size));
                    else memcpy(to + (at + c) * size, from, (size_t)((there - c) * size));
                }
            }
        }
}

/* y (tokens, rows) = x (tokens, columns) times the weight, plus bias, NULL or (rows,); all of `dtype`.
   Returns 0, or 1 if there is no memory. */
int linear(const int64_t *shape, void *const *tensors, const void *x, const void *bias, void *y, int64_t tokens,
           int64_t dtype, int64_t threads)
{
    const sparse w = sparse_of(shape, tensors);
    request p = {.tokens = tokens, .dtype = dtype, .rows = w.rows, .bias = bias, .y = y};
    const int floats = IN_FLOATS(dtype);
    uint8_t *room;
    p.most = floats ? 4 : w.blocks == 1 ? 16 : 8; /* registers */
    if (place(&p, x, w.columns, w.group, w.padded, w.unit, floats, floats ? LEVELS(w.unit) : 0, &room)) return 1;
#if defined(__AVX512BW__)
    tables t[1];
    make_tables(&w, t);
#endif
#define BEFORE(row) ((int64_t)w.start[row] * 8 + (row))
    SHARES(threads)
    for (int64_t share = 0; share < threads; share++) {
        const int64_t begin = FIRST_ROW(BEFORE, w.rows, share, threads);
        const int64_t end = FIRST_ROW(BEFORE, w.rows, share + 1, threads);
        if (begin == end) continue;
#if defined(__AVX512BW__)
        if (w.unit == 32) product_512(&w, t, &p, begin, end);
        else product_256(&w, t, &p, begin, end);
#else
        float_product(&w, &p, begin, end);
#endif
    }
    free(room);
    return 0;
}
