/* Products with weights of which a bit says whether they are stored: loaded sparse, spread in registers, multiplied
   dense. Compiled for an instruction set and the width of survivors: BITS 16 is bfloat16, 4 are integers.

   Columns go by spans, a word of the mask each: 32 of bfloat16, 64 of integers, whose spans do not straddle two groups
   (the last one of a group is shorter) and begin with a byte of codes.

   BITS 16. shape: rows, columns. Tensors: where the survivors of each row begin (rows + 1), mask (rows, words), survivors.
   BITS 4. shape: rows, columns, group, kind of zero, whether scales are float32, whether rows share them. Tensors: where
   the bytes of each row begin (rows + 1), 64-bit masks (rows, spans), codes, scales and zero-points (rows, groups).

   vpexpandw and vpexpandb (AVX512-VBMI2) put survivors where they belong. Elsewhere vexpandps, or pdep makes shuffles of
   masks; without either a loop goes through the bits. */

#include "sparse.h"

int ready(void) { return 1; }

typedef struct {
    int64_t rows, columns, group, kind, wide, shared;
    int64_t spans, groups, group_spans; /* of a row, of a row, of a group */
    const void *start, *mask;
    uint8_t *values;
    const void *scale;
    const uint8_t *zero;
} sparse;

#define SPAN (BITS == 16 ? 32 : 64)

static sparse sparse_of(const int64_t *shape, void *const *tensors)
{
    sparse w = {.rows = shape[0], .columns = shape[1], .group = shape[1]};
    w.start = tensors[0], w.mask = tensors[1], w.values = tensors[2];
    if (BITS == 4) {
        w.group = shape[2], w.kind = shape[3], w.wide = shape[4], w.shared = shape[5];
        w.scale = tensors[3], w.zero = tensors[4];
    }
    w.groups = (w.columns + w.group - 1) / w.group;
    w.group_spans = (w.group + SPAN - 1) / SPAN;
    w.spans = w.groups * w.group_spans;
    return w;
}

/* Bytes of a row's survivors begin here. */
INLINE int64_t begin_of(const sparse *w, int64_t row)
{
    return BITS == 16 ? 2 * (int64_t)((const int32_t *)w->start)[row] : ((const int64_t *)w->start)[row];
}
INLINE uint64_t mask_at(const sparse *w, int64_t row, int64_t span)
{
    const int64_t at = row * w->spans + span;
    return BITS == 16 ? ((const uint32_t *)w->mask)[at] : ((const uint64_t *)w->mask)[at];
}
INLINE int64_t bytes_of(uint64_t mask)
{
    const int64_t count = __builtin_popcountll(mask);
    return BITS == 16 ? 2 * count : (count + 1) / 2;
}
INLINE int64_t scale_place(const sparse *w, int64_t row, int64_t g) { return w->shared ? g : row * w->groups + g; }
INLINE float zero_float(const sparse *w, int64_t at) { return w->kind == INTEGER ? (float)w->zero[at] : 8.0f; }

/* Between the format's stream of codes and spans, which are zero at first, or `words`. */
void convert(const int64_t *shape, void *const *tensors, uint32_t *words, int64_t back, int64_t threads)
{
    const sparse w = sparse_of(shape, tensors);
    uint8_t *to = w.values;
    int64_t i = 0;
    (void)threads;
    for (int64_t span = 0; BITS == 4 && span < w.rows * w.spans; span++) {
        const uint64_t mask = mask_at(&w, 0, span);
        for (int64_t k = 0; k < __builtin_popcountll(mask); k++, i++) {
            const int shift = (int)(i % 8 * 4), half = (int)(k % 2 * 4);
            if (back) words[i / 8] |= (uint32_t)(to[k / 2] >> half & 15) << shift;
            else to[k / 2] |= (uint8_t)((words[i / 8] >> shift & 15) << half);
        }
        to += bytes_of(mask);
    }
}

/* Half-bytes of `from`, one for each bit of the mask, to where the bits are. */
INLINE uint64_t spread(uint64_t from, uint32_t mask)
{
#if defined(__BMI2__)
    return _pdep_u64(from, _pdep_u64(mask, 0x1111111111111111ull) * 15);
#else
    uint64_t to = 0;
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) to |= (from & 15) << 4 * i, from >>= 4;
    return to;
#endif
}

INLINE vu half_bytes(uint64_t all)
{
    vu found;
    for (int i = 0; i < ROWS; i++) found[i] = (uint32_t)(i < 8 ? all : all >> 32) >> (i % 8 * 4) & 15;
    return found;
}

/* All bits of a lane whose bit is set. */
INLINE vu lanes_of(uint32_t mask)
{
    vu bit, all = (vu){0} + mask;
    for (int i = 0; i < ROWS; i++) bit[i] = 1u << i;
    return (vu)((all & bit) == bit);
}

#if BITS == 16
/* 16 columns: survivors from `at` on, as floats. */
INLINE vf values_of(const uint8_t *at, int64_t first, uint32_t mask, float zero)
{
    (void)zero;
    at += 2 * first;
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
    return (vf)_mm512_maskz_expand_epi32((__mmask16)mask, _mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
    const uint64_t ranks = spread(0xfedcba9876543210ull, mask & 255), more = spread(0xfedcba9876543210ull, mask >> 8);
    const vu rank = half_bytes(ranks | more << 32);
    const uint8_t *next = at + 2 * __builtin_popcount(mask & 255);
    __m256i half[2], index[2];
    memcpy(index, &rank, 64);
    half[0] = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)), 16);
    half[1] = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)next)), 16);
    for (int i = 0; i < 2; i++) half[i] = _mm256_permutevar8x32_epi32(half[i], index[i]);
    vu found;
    memcpy(&found, half, 64);
    return (vf)(found & lanes_of(mask));
#else
    vf found = {0};
    for (int i = 0; i < ROWS; i++)
        if (mask >> i & 1) {
            uint16_t bits;
            memcpy(&bits, at, 2);
            found[i] = widened(bits), at += 2;
        }
    return found;
#endif
}
#else
/* 16 columns: codes from half-byte `first` on, as numbers before they are scaled. */
INLINE vf values_of(const uint8_t *at, int64_t first, uint32_t mask, float zero)
{
    uint64_t some[2];
    const int64_t next = first + __builtin_popcount(mask & 255);
    memcpy(some, at + first / 2, 8), memcpy(some + 1, at + next / 2, 8);
    some[0] >>= first % 2 * 4, some[1] >>= next % 2 * 4;
    const uint64_t codes = spread((uint32_t)some[0], mask & 255) | spread((uint32_t)some[1], mask >> 8) << 32;
    const vf value = __builtin_convertvector((vi)half_bytes(codes), vf) - zero;
    return (vf)((vu)value & lanes_of(mask));
}
#endif

/* Some rows, dense and rounded once to `dtype`: those in `wanted`, or else from `first` on: (count, columns). */
void decode(const int64_t *shape, void *const *tensors, const int64_t *wanted, int64_t first, int64_t count, void *out,
            int64_t dtype, int64_t threads)
{
    const sparse w = sparse_of(shape, tensors);
    const int64_t size = dtype == BFLOAT16 ? 2 : 4;
    SHARES(threads)
    for (int64_t share = 0; share < threads; share++)
        for (int64_t k = count * share / threads; k < count * (share + 1) / threads; k++) {
            const int64_t row = wanted ? wanted[k] : first + k;
            const uint8_t *values = w.values + begin_of(&w, row);
            uint8_t *to = (uint8_t *)out + k * w.columns * size;
            for (int64_t span = 0; span < w.spans; span++) {
                const int64_t g = span / w.group_spans, in = span % w.group_spans * SPAN, at = g * w.group + in;
                const int64_t rest = w.columns - at, there = w.group - in < rest ? w.group - in : rest;
                const uint64_t mask = mask_at(&w, row, span);
                int64_t place = 0;
                float zero = 0, scale = 1;
                if (BITS == 4) {
                    zero = zero_float(&w, scale_place(&w, row, g));
                    scale = number_at(w.scale, (int)w.wide, scale_place(&w, row, g));
                }
                for (int64_t c = 0; c < SPAN && c < there; c += 16) {
                    const uint32_t some = (uint32_t)(mask >> c) & 0xffff;
                    const vf value = values_of(values, place, some, zero) * scale;
                    const vh half = to_bfloat16(value);
                    const void *from = dtype == BFLOAT16 ? (const void *)&half : (const void *)&value;
                    if (there - c >= 16) memcpy(to + (at + c) * size, from, (size_t)(16 * size));
                    else memcpy(to + (at + c) * size, from, (size_t)((there - c) * size));
                    place += __builtin_popcount(some);
                }
                values += bytes_of(mask);
            }
        }
}

#if defined(__AVX512VBMI2__) && defined(__AVX512BF16__)
#define IN_FLOATS(dtype) ((dtype) != BFLOAT16)
#define VECTORS (SPAN / 32) /* of 32 bfloat16 numbers, in a span */
#define LEVELS(floats) ((floats) ? VECTORS : VECTORS - 1)

typedef struct {
    uint16_t of[16][32]; /* by zero-point, then by code, from 16 on: what is not there has number 0 */
} tables;

static void make_tables(const sparse *w, tables *t)
{
    for (int z = 0; z < 16; z++)
        for (int i = 0; i < 32; i++) {
            const float value = i < 16 ? 0 : (float)(i - 16 - (w->kind == INTEGER ? z : 8));
            uint32_t bits;
            memcpy(&bits, &value, 4);
            t->of[z][i] = (uint16_t)(bits >> 16);
        }
}

INLINE void numbers_of(const uint8_t *values, uint64_t mask, __m512i table, __m512i *out)
{
#if BITS == 16
    (void)table;
    out[0] = _mm512_maskz_expand_epi16((__mmask32)mask, _mm512_loadu_si512(values));
#else
    const __m512i octets = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)values));
    const __m512i both = _mm512_ternarylogic_epi32(octets, _mm512_slli_epi16(octets, 4), _mm512_set1_epi16(0x0f0f), 0xa8);
    const __m512i codes = _mm512_maskz_expand_epi8(mask, _mm512_or_si512(both, _mm512_set1_epi16(0x1010)));
    out[0] = _mm512_permutexvar_epi16(codes, table);
    out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
#endif
}

INLINE __m512 dot(__m512 sum, __m512i numbers, const void *x, int floats)
{
    if (!floats) return _mm512_dpbf16_ps(sum, (__m512bh)numbers, (__m512bh)_mm512_loadu_si512(x));
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(numbers, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(numbers, _mm512_set1_epi32((int)0xffff0000)));
    sum = _mm512_fmadd_ps(even, _mm512_loadu_ps(x), sum);
    return _mm512_fmadd_ps(odd, _mm512_loadu_ps((const float *)x + 16), sum);
}

INLINE void rows_of(const sparse *w, const tables *t, const request *p, int64_t begin, int64_t end, int64_t token,
                    int floats, int tokens)
{
    const int chains = tokens > 1 ? 1 : BITS == 4 ? 2 : 4;
    const int64_t size = floats ? 4 : 2;
    const uint8_t *values = w->values + begin_of(w, begin);
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *x = (const uint8_t *)p->x + token * p->stride * size;
        __m512 total[8], sum[8][4];
        for (int m = 0; m < tokens; m++) total[m] = _mm512_setzero_ps();
        int64_t span = 0;
        for (int64_t g = 0; g < w->groups; g++) {
            const int64_t last = span + w->group_spans;
            const int64_t place = BITS == 4 ? scale_place(w, row, g) : 0;
            const __m512i table = _mm512_loadu_si512(t->of[BITS == 4 && w->kind == INTEGER ? w->zero[place] : 0]);
            for (int m = 0; m < tokens; m++)
                for (int c = 0; c < chains; c++) sum[m][c] = _mm512_setzero_ps();
#define SPAN_(chain)                                                                                                  \
    {                                                                                                                 \
        const uint64_t mask = mask_at(w, row, span);                                                                  \
        __m512i numbers[2];                                                                                           \
        numbers_of(values, mask, table, numbers);                                                                     \
        _Pragma("GCC unroll 8") for (int m = 0; m < tokens; m++)                                                      \
            _Pragma("GCC unroll 2") for (int v = 0; v < VECTORS; v++)                                                 \
                sum[m][(chain + v) % chains] =                                                                        \
                    dot(sum[m][(chain + v) % chains], numbers[v], x + (m * SPAN + 32 * v) * size, floats);            \
        values += bytes_of(mask), x += SPAN * size * tokens;                                                          \
    }
            for (; BITS == 16 && tokens == 1 && span + 4 <= last;) {
                _mm_prefetch(values + FETCHED, _MM_HINT_T0), _mm_prefetch(values + FETCHED + 64, _MM_HINT_T0);
                _mm_prefetch((const uint32_t *)w->mask + row * w->spans + span + FETCHED / 4, _MM_HINT_T0);
                SPAN_(0) span++;
                SPAN_(1) span++;
                SPAN_(2) span++;
                SPAN_(3) span++;
            }
            for (; BITS == 4 && tokens == 1 && span + 2 <= last;) {
                _mm_prefetch(values + FETCHED, _MM_HINT_T0);
                _mm_prefetch((const uint64_t *)w->mask + row * w->spans + span + FETCHED / 8, _MM_HINT_T0);
                SPAN_(0) span++;
                SPAN_(0) span++;
            }
            for (; span < last; span++) {
                _mm_prefetch(values + FETCHED, _MM_HINT_T0);
                SPAN_(0)
            }
#undef SPAN_
            const __m512 scale = _mm512_set1_ps(BITS == 4 ? number_at(w->scale, (int)w->wide, place) : 1.0f);
            for (int m = 0; m < tokens; m++) {
                for (int c = 1; c < chains; c++) sum[m][0] = _mm512_add_ps(sum[m][0], sum[m][c]);
                total[m] = BITS == 4 ? _mm512_fmadd_ps(sum[m][0], scale, total[m]) : sum[m][0];
            }
        }
        for (int m = 0; m < tokens; m++) store_output(p, token + m, row, _mm512_reduce_add_ps(total[m]));
    }
}

static void product_of(const sparse *w, const request *p, int64_t begin, int64_t end)
{
    const int floats = IN_FLOATS(p->dtype);
    tables t;
    if (BITS == 4) make_tables(w, &t);
    for (int64_t token = 0; token < p->tokens;) {
        const int tokens = together(p->tokens - token, p->most);
        if (floats && tokens == 4) rows_of(w, &t, p, begin, end, token, 1, 4);
        else if (floats) rows_of(w, &t, p, begin, end, token, 1, 1);
        else if (tokens == 8) rows_of(w, &t, p, begin, end, token, 0, 8);
        else if (tokens == 4) rows_of(w, &t, p, begin, end, token, 0, 4);
        else rows_of(w, &t, p, begin, end, token, 0, 1);
        token += tokens;
    }
}
#else
#define IN_FLOATS(dtype) 1
#define LEVELS(floats) 0

INLINE void float_row(const sparse *w, const request *p, int64_t row, int64_t token, int tokens)
{
    const uint8_t *values = w->values + begin_of(w, row);
    const float *x = (const float *)p->x + token * p->stride;
    vf total[4], sum[4][2];
    for (int m = 0; m < tokens; m++) total[m] = (vf){0};
    for (int64_t g = 0, span = 0; g < w->groups; g++) {
        const int64_t place = BITS == 4 ? scale_place(w, row, g) : 0;
        const float zero = BITS == 4 ? zero_float(w, place) : 0;
        for (int m = 0; m < tokens; m++) sum[m][0] = sum[m][1] = (vf){0};
        for (int64_t last = span + w->group_spans; span < last; span++, x += SPAN * tokens) {
            const uint64_t mask = mask_at(w, row, span);
            int64_t first = 0;
            __builtin_prefetch(values + FETCHED, 0, 2);
#pragma GCC unroll 4
            for (int c = 0; c < SPAN; c += 16) {
                const uint32_t some = (uint32_t)(mask >> c) & 0xffff;
                const vf value = values_of(values, first, some, zero);
                for (int m = 0; m < tokens; m++) {
                    vf with;
                    memcpy(&with, x + m * SPAN + c, sizeof with);
                    sum[m][c / 16 % 2] += value * with;
                }
                first += __builtin_popcount(some);
            }
            values += bytes_of(mask);
        }
        const float scale = BITS == 4 ? number_at(w->scale, (int)w->wide, place) : 1;
        for (int m = 0; m < tokens; m++) total[m] += (sum[m][0] + sum[m][1]) * scale;
    }
    for (int m = 0; m < tokens; m++) store_output(p, token + m, row, sum_of(total[m]));
}

static void product_of(const sparse *w, const request *p, int64_t begin, int64_t end)
{
    for (int64_t token = 0; token < p->tokens;) {
        const int tokens = together(p->tokens - token, p->most);
        for (int64_t row = begin; row < end; row++)
            if (tokens == 4) float_row(w, p, row, token, 4);
            else float_row(w, p, row, token, 1);
        token += tokens;
    }
}
#endif

/* y (tokens, rows) = x (tokens, columns) times the weight, plus bias, NULL or (rows,); all of `dtype`.
   Returns 0, or 1 if there is no memory. */
int linear(const int64_t *shape, void *const *tensors, const void *x, const void *bias, void *y, int64_t tokens,
           int64_t dtype, int64_t threads)
{
    const sparse w = sparse_of(shape, tensors);
    request p = {.tokens = tokens, .dtype = dtype, .rows = w.rows, .bias = bias, .y = y};
    const int floats = IN_FLOATS(dtype);
    uint8_t *room;
    p.most = floats ? 4 : 8;
    if (place(&p, x, w.columns, w.group, w.group_spans * SPAN, SPAN, floats, LEVELS(floats), &room)) return 1;
#define BEFORE(row) (begin_of(&w, row) + (row) * w.spans * (SPAN / 8)) /* bytes */
    SHARES(threads)
    for (int64_t share = 0; share < threads; share++) {
        const int64_t begin = FIRST_ROW(BEFORE, w.rows, share, threads);
        const int64_t end = FIRST_ROW(BEFORE, w.rows, share + 1, threads);
        if (begin < end) product_of(&w, &p, begin, end);
    }
    free(room);
    return 0;
}
