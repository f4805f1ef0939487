/* Products of layers that share their input, in two stages with one barrier between them.

   A layer is y = x Bᵀ, or y = (x Rᵀ) Lᵀ, or the sum of both. First all of x Rᵀ and x Bᵀ are computed, as if the weights
   of all layers were stacked into one, then all that L makes of it. x Rᵀ stays in the cache, as bfloat16 where the next
   stage multiplies that and else as float32; x Bᵀ waits in float32. Every tile of 16 outputs is computed whole by one
   thread, so results do not depend on how many there are.

   Weights know how they are multiplied: `run` is `run_tiles` of a library that was compiled for their codes. */

#define BITS 16
#include "layout.h"

#ifdef _OPENMP
#include <omp.h>
#define BARRIER _Pragma("omp barrier")
INLINE int64_t own_number(void) { return omp_get_thread_num(); }
INLINE int64_t their_number(void) { return omp_get_num_threads(); }
#else
#define BARRIER
INLINE int64_t own_number(void) { return 0; }
INLINE int64_t their_number(void) { return 1; }
#endif

typedef void run_tiles(const product *p, int64_t begin, int64_t end, int wide);

/* run: NULL if there is no such part. tile_bytes: what a tile costs. */
typedef struct {
    run_tiles *run;
    weight w;
    int64_t tile_bytes;
} part;

/* places: (left.w.rows,) of the outputs of L among y's, NULL if that is all of them in order. pivots: (right.w.rows,) of
   the outputs of R that are outputs themselves, NULL if none is. */
typedef struct {
    part base, right, left;
    const int64_t *places, *pivots;
    int64_t rows;
} layer;

/* What is put aside for a layer: of base (tokens, sixteens of rows) float32; of right (tokens, sixteens of rank), as wide
   as x; of left (tokens, sixteens of rows) float32. */
typedef struct {
    void *base, *right, *left;
} scratch;

INLINE int64_t sixteens(int64_t rows) { return (rows + ROWS - 1) / ROWS * ROWS; }

/* Which tiles of a part are a thread's: `done` bytes come before the part, of `all` in this stage. */
typedef struct {
    int64_t begin, end;
} span;

static span own_tiles(const part *q, int64_t *done, int64_t all, int64_t thread, int64_t threads)
{
    const int64_t count = tiles(&q->w), from = *done, size = q->tile_bytes;
    const int64_t low = all * thread / threads - from, high = all * (thread + 1) / threads - from;
    *done += count * size;
    const int64_t begin = low <= 0 ? 0 : (low + size - 1) / size, end = high <= 0 ? 0 : (high + size - 1) / size;
    return (span){begin < count ? begin : count, end < count ? end : count};
}

static int64_t cost(const part *q) { return q->run ? tiles(&q->w) * q->tile_bytes : 0; }

/* Outputs `from` .. `to` - 1 of L, in float32, to their places in y, with those of B and the bias. */
static void finish(const layer *l, const scratch *s, int64_t from, int64_t to, const void *bias, void *y, int64_t tokens,
                   int64_t dtype)
{
    const int64_t stride = sixteens(l->left.w.rows), below = sixteens(l->rows);
    for (int64_t m = 0; m < tokens; m++) {
        const float *left = (const float *)s->left + m * stride, *base = (const float *)s->base + m * below;
        for (int64_t j = from; j < to; j += ROWS) {
            const int64_t count = to - j < ROWS ? to - j : ROWS;
            vf value;
            memcpy(&value, left + j, sizeof value);
            if (s->base) {
                vf other;
                memcpy(&other, base + j, sizeof other);
                value += other;
            }
            if (bias)
                for (int64_t i = 0; i < count; i++) {
                    const int64_t at = l->places ? l->places[j + i] : j + i;
                    value[i] += dtype == BFLOAT16 ? widened(((const uint16_t *)bias)[at]) : ((const float *)bias)[at];
                }
            const vh half = to_bfloat16(value);
            for (int64_t i = 0; i < count; i++) {
                const int64_t at = m * l->rows + (l->places ? l->places[j + i] : j + i);
                if (dtype == BFLOAT16) ((uint16_t *)y)[at] = half[i];
                else ((float *)y)[at] = value[i];
            }
        }
    }
}

/* Outputs of R that are outputs themselves, of tokens from .. to - 1. wide: whether they are float32. */
static void copy_pivots(const layer *l, const scratch *s, int64_t from, int64_t to, const void *bias, void *y,
                        int64_t dtype, int wide)
{
    const int64_t rank = l->right.w.rows, stride = sixteens(rank);
    for (int64_t m = from; m < to; m++)
        if (!wide && dtype == BFLOAT16 && !bias) {
            const uint16_t *right = (const uint16_t *)s->right + m * stride;
            uint16_t *out = (uint16_t *)y + m * l->rows;
            for (int64_t j = 0; j < rank; j++) out[l->pivots[j]] = right[j];
        } else
            for (int64_t j = 0; j < rank; j++) {
                const int64_t at = l->pivots[j];
                float value = wide ? ((const float *)s->right)[m * stride + j]
                                   : widened(((const uint16_t *)s->right)[m * stride + j]);
                if (bias) value += dtype == BFLOAT16 ? widened(((const uint16_t *)bias)[at]) : ((const float *)bias)[at];
                if (dtype == BFLOAT16) ((uint16_t *)y)[m * l->rows + at] = to_bfloat16((vf){0} + value)[0];
                else ((float *)y)[m * l->rows + at] = value;
            }
}

/* One thread's share of a stage for tokens first .. first + tokens - 1. x: of the first of them, y: of all. */
static void stage(int second, const layer *layers, int64_t count, const scratch *room, const void *x, int64_t stride,
                  const void *const *bias, void *const *y, int64_t first, int64_t tokens, int64_t dtype, int wide,
                  int64_t thread, int64_t threads)
{
    int64_t all = 0, done = 0;
    for (int64_t i = 0; i < count; i++)
        all += second ? cost(&layers[i].left) : cost(&layers[i].right) + cost(&layers[i].base);
    for (int64_t i = 0; i < count; i++) {
        const layer *l = layers + i;
        const scratch *s = room + i;
        uint8_t *out = (uint8_t *)y[i] + first * l->rows * (dtype == BFLOAT16 ? 2 : 4);
        if (!second && l->right.run) {
            product p = {l->right.w, tokens, stride, wide ? FLOAT32 : BFLOAT16, x, 0, s->right, 0};
            const span own = own_tiles(&l->right, &done, all, thread, threads);
            p.w.rows = sixteens(p.w.rows); /* what is beyond the last row is zero, as L wants it */
            if (own.begin < own.end) l->right.run(&p, own.begin, own.end, wide);
        }
        if (!second && l->base.run) {
            product p = {l->base.w, tokens, stride, dtype, x, bias[i], out, 0};
            const span own = own_tiles(&l->base, &done, all, thread, threads);
            if (s->base) p.w.rows = sixteens(p.w.rows), p.dtype = FLOAT32, p.bias = 0, p.y = s->base;
            if (own.begin < own.end) l->base.run(&p, own.begin, own.end, wide);
        }
        if (second && l->left.run) {
            const int64_t rows = l->left.w.rows;
            product p = {l->left.w, tokens, sixteens(l->right.w.rows), dtype, s->right, bias[i], out, 0};
            const span own = own_tiles(&l->left, &done, all, thread, threads);
            if (s->left) p.w.rows = sixteens(rows), p.dtype = FLOAT32, p.bias = 0, p.y = s->left;
            if (own.begin < own.end) {
                l->left.run(&p, own.begin, own.end, wide);
                const int64_t end = own.end * ROWS;
                if (s->left) finish(l, s, own.begin * ROWS, end < rows ? end : rows, bias[i], out, tokens, dtype);
            }
        }
        if (second && l->pivots)
            copy_pivots(l, s, tokens * thread / threads, tokens * (thread + 1) / threads, bias[i], out, dtype, wide);
    }
}

/* x as the stages want it: float32 if `wide`, columns filled with zeros to a multiple of 16. */
static void place_x(const uint8_t *x, int64_t dtype, int64_t columns, int64_t from, int64_t to, void *out, int wide)
{
    const int64_t stride = sixteens(columns), given = dtype == BFLOAT16 ? 2 : 4, size = wide ? 4 : 2;
    for (int64_t m = from; m < to; m++) {
        const uint8_t *row = x + m * columns * given;
        uint8_t *at = (uint8_t *)out + m * stride * size;
        if (size == given) memcpy(at, row, (size_t)(columns * size));
        else
            for (int64_t c = 0; c < columns; c++) ((float *)at)[c] = widened(((const uint16_t *)row)[c]);
        memset(at + columns * size, 0, (size_t)((stride - columns) * size));
    }
}

static void *take(uint8_t **at, int64_t bytes)
{
    void *here = *at;
    *at += (bytes + 63) / 64 * 64;
    return here;
}

/* x: (tokens, columns), contiguous; bias: for each layer (rows,) or NULL; y: for each (tokens, rows); all of `dtype`.
   wide: multiply in float32. most: tokens that go through both stages at a time. Returns 0, or 1 without memory. */
int run_stages(const layer *layers, int64_t count, const void *x, int64_t columns, const void *const *bias,
               void *const *y, int64_t tokens, int64_t dtype, int64_t wide, int64_t most, int64_t threads)
{
    const int64_t chunk = tokens < most ? tokens : most, given = dtype == BFLOAT16 ? 2 : 4, size = wide ? 4 : 2;
    const int64_t stride = sixteens(columns);
    const int placed = stride != columns || size != given;
    scratch room[count];
    int64_t bytes = placed ? chunk * stride * size + 64 : 0;
    int two = 0;
    for (int64_t i = 0; i < count; i++) {
        const layer *l = layers + i;
        two |= l->right.run != 0;
        bytes += 192 + chunk * (sixteens(l->right.w.rows) * size + (sixteens(l->rows) + sixteens(l->left.w.rows)) * 4);
    }
    uint8_t *memory = aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64), *at = memory;
    if (!memory) return 1;
    void *copy = placed ? take(&at, chunk * stride * size) : 0;
    for (int64_t i = 0; i < count; i++) {
        const layer *l = layers + i;
        const int both = l->base.run && l->left.run;
        room[i].right = l->right.run ? take(&at, chunk * sixteens(l->right.w.rows) * size) : 0;
        room[i].base = both ? take(&at, chunk * sixteens(l->rows) * 4) : 0;
        room[i].left = both || (l->left.run && l->places) ? take(&at, chunk * sixteens(l->left.w.rows) * 4) : 0;
    }
    _Pragma("omp parallel num_threads((int)threads) if (threads > 1)")
    {
        const int64_t thread = own_number(), all = their_number();
        for (int64_t first = 0; first < tokens; first += chunk) {
            const int64_t now = tokens - first < chunk ? tokens - first : chunk;
            const uint8_t *rows = (const uint8_t *)x + first * columns * given;
            if (placed) {
                place_x(rows, dtype, columns, now * thread / all, now * (thread + 1) / all, copy, (int)wide);
                BARRIER
            }
            const void *from = placed ? copy : (const void *)rows;
            stage(0, layers, count, room, from, stride, bias, y, first, now, dtype, (int)wide, thread, all);
            if (two) {
                BARRIER
                stage(1, layers, count, room, from, stride, bias, y, first, now, dtype, (int)wide, thread, all);
            }
            BARRIER /* the next tokens take the same room */
        }
    }
    free(memory);
    return 0;
}
