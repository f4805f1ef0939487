/* What products with sparse weights share: threads' portions, activations where a kernel wants them, results.

   Rows of a sparse weight lie one after the other, each with its survivors alone; a row is summed by one thread, in one
   order. Vectors lie along the columns. */

#ifndef TRIFOLD_SPARSE_H
#define TRIFOLD_SPARSE_H

#include "layout.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define DO(words) _Pragma(#words)
#define SHARES(n) DO(omp parallel for schedule(static, 1) num_threads((int)(n)) if ((n) > 1))
#define FETCHED 2048 /* bytes of a stream that are asked for before they are needed */

/* A product in progress. x: as `place` left it, token by token `stride` numbers; y and bias: of `dtype`. */
typedef struct {
    int64_t tokens, stride, dtype, rows;
    int most; /* tokens that are multiplied at once */
    const void *x, *bias;
    void *y;
} request;

/* Tokens that are multiplied at once, of those left. */
INLINE int together(int64_t left, int most)
{
    for (int tokens = most; tokens >= 4; tokens /= 2)
        if (left >= tokens) return tokens;
    return 1;
}

INLINE uint16_t narrowed(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value == value ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}

INLINE void store_output(const request *p, int64_t token, int64_t row, float value)
{
    const int64_t at = token * p->rows + row;
    if (p->dtype == BFLOAT16) {
        if (p->bias) value += widened(((const uint16_t *)p->bias)[row]);
        ((uint16_t *)p->y)[at] = narrowed(value);
    } else {
        ((float *)p->y)[at] = p->bias ? value + ((const float *)p->bias)[row] : value;
    }
}

INLINE float sum_of(vf v)
{
    float sum = 0;
    for (int half = ROWS / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    sum += v[0];
    return sum;
}

/* A number of a scale tensor: float32 if `wide`, else bfloat16. */
INLINE float number_at(const void *base, int wide, int64_t at)
{
    return wide ? ((const float *)base)[at] : widened(((const uint16_t *)base)[at]);
}

/* Where vectors want a column of a span: `levels` times, even ones before odd ones. */
INLINE int64_t place_of(int64_t column, int64_t span, int levels)
{
    int64_t place = column;
    for (; levels > 0; levels--, span /= 2) {
        const int64_t in = place % span;
        place += in / 2 + in % 2 * (span / 2) - in;
    }
    return place;
}

/* One token of `count`: its columns in groups of `group`, each filled with zeros to `padded`, which are whole spans of
   `span` columns; the spans of tokens that are multiplied at once lie side by side. */
INLINE void place_token(const void *from, int64_t columns, int64_t group, int64_t padded, int64_t span, int64_t dtype,
                        void *to, int floats, int levels, int64_t count)
{
    const uint16_t *halves = from;
    const float *wide = from;
    for (int64_t g = 0, at = 0; g < columns; g += group, at += padded)
        for (int64_t c = 0; c < padded; c++) {
            const int64_t place = (at + c) / span * span * count + place_of(c % span, span, levels);
            const int there = c < group && g + c < columns;
            if (!floats) ((uint16_t *)to)[place] = there ? halves[g + c] : 0;
            else if (dtype == BFLOAT16) ((float *)to)[place] = there ? widened(halves[g + c]) : 0;
            else ((float *)to)[place] = there ? wide[g + c] : 0;
        }
}

/* The request's activations in place, or 1 without memory; free `*room` afterwards. */
static int place(request *p, const void *x, int64_t columns, int64_t group, int64_t padded, int64_t span, int floats,
                 int levels, uint8_t **room)
{
    const int64_t groups = (columns + group - 1) / group, size = floats ? 4 : 2, given = p->dtype == BFLOAT16 ? 2 : 4;
    p->stride = groups * padded;
    p->x = x, *room = 0;
    if (!levels && size == given && p->stride == columns && together(p->tokens, p->most) == 1) return 0;
    *room = aligned_alloc(64, (size_t)(p->tokens * p->stride * size + 63) / 64 * 64);
    if (!*room) return 1;
    p->x = *room;
    for (int64_t first = 0, count; first < p->tokens; first += count) {
        count = together(p->tokens - first, p->most);
        for (int64_t m = 0; m < count; m++)
            place_token((const uint8_t *)x + (first + m) * columns * given, columns, group, padded, span, p->dtype,
                        *room + (first * p->stride + m * span) * size, floats, levels, count);
    }
    return 0;
}

/* The first row at which the work done so far, work_before(row), reaches a share of all. */
#define FIRST_ROW(work_before, rows, share, threads) \
    ({ \
        int64_t low_ = 0, high_ = (rows), wanted_ = (share); \
        if (wanted_ >= (threads)) low_ = high_; \
        while (low_ < high_) { \
            const int64_t middle_ = (low_ + high_) / 2; \
            if ((__int128)work_before(middle_) * (threads) >= (__int128)work_before(rows) * wanted_) high_ = middle_; \
            else low_ = middle_ + 1; \
        } \
        low_; \
    })

#endif
