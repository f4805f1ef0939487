/* Products of layers that share their input, in two stages with one barrier between them.

   A layer is y = x Bᵀ, or y = (x Rᵀ) Lᵀ, or the sum of both. First all of x Rᵀ and x Bᵀ are computed, as if the weights
   of all layers were stacked into one, then all that L makes of it. x Rᵀ stays in the cache, as bfloat16 where the next
   stage multiplies that and else as float32; x Bᵀ waits in float32. Every tile of 16 outputs is computed whole by one
   thread, so results do not depend on how many there are.

   Weights know how they are multiplied: `run` is `run_tiles` of a library that was compiled for their codes. */

#define BITS 16
#include "layout.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif
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

#define SOME_TILES 16 /* whose outputs are taken from the cache to their places */

typedef void run_tiles(const product *p, int64_t begin, int64_t end, int wide);

/* run: NULL if there is no such part. tile_bytes: what a tile costs. */
typedef struct {
    run_tiles *run;
    weight w;
    int64_t tile_bytes;
} part;

/* places: (left.w.rows,) of the outputs of L among y's, ascending; pivots: a bit for each output, set where it is the
   next one of R itself, and 4 bytes more. Both NULL if outputs of R are none of y's. */
typedef struct {
    part base, right, left;
    const int64_t *places;
    const uint8_t *pivots;
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

INLINE vf load_numbers(const void *from, int64_t at, int floats)
{
    if (!floats) return from_bfloat16((const uint16_t *)from + at);
    vf value;
    memcpy(&value, (const float *)from + at, sizeof value);
    return value;
}

/* Lanes whose bits are set take the first numbers of `yes` one after the other, the rest those of `no`. */
INLINE vf merge(uint32_t bits, vf yes, vf no)
{
#ifdef __AVX512F__
    return (vf)_mm512_mask_expand_ps(_mm512_maskz_expand_ps((__mmask16)~bits, (__m512)no), (__mmask16)bits, (__m512)yes);
#else
    vf value;
    for (int i = 0, a = 0, b = 0; i < ROWS; i++) value[i] = bits >> i & 1 ? yes[a++] : no[b++];
    return value;
#endif
}

INLINE uint32_t sixteen_bits(const uint8_t *bits, int64_t at)
{
    uint32_t found;
    memcpy(&found, bits + at / 8, sizeof found);
    return found >> at % 8 & 0xffff;
}

/* y from what L made of its rows from .. to - 1, in float32, the pivots among them, what B made, and the bias.
   Places ascend, so that these rows and the pivots between them are a run of y's outputs. */
INLINE void finish_tokens(const layer *l, const scratch *s, int64_t from, int64_t to, const void *bias, void *y,
                          int64_t tokens, int floats, int wide)
{
    const int64_t rank = sixteens(l->right.w.rows), stride = sixteens(l->left.w.rows), size = floats ? 4 : 2;
    const int64_t first = l->places && from ? l->places[from] : from;
    const int64_t last = to == l->left.w.rows ? l->rows : l->places ? l->places[to] : to;
    for (int64_t m = 0; m < tokens; m++) {
        int64_t left = from, right = first - from;
        for (int64_t at = first; at < last; at += ROWS) {
            const int64_t count = last - at < ROWS ? last - at : ROWS;
            vf value = load_numbers(s->left, m * stride + left, 1);
            if (l->pivots) {
                const uint32_t bits = sixteen_bits(l->pivots, at);
                const int pivots = __builtin_popcount(bits);
                value = merge(bits, load_numbers(s->right, m * rank + right, wide), value);
                right += pivots, left += ROWS - pivots;
            } else left += ROWS;
            if (s->base) value += load_numbers(s->base, m * sixteens(l->rows) + at, 1);
            if (bias) {
                uint8_t padded[4 * ROWS] = {0};
                memcpy(padded, (const uint8_t *)bias + at * size, (size_t)(count * size));
                value += load_numbers(padded, 0, floats);
            }
            uint8_t *out = (uint8_t *)y + (m * l->rows + at) * size;
            const vh half = to_bfloat16(value);
            const void *numbers = floats ? (const void *)&value : (const void *)&half;
            if (count == ROWS) memcpy(out, numbers, (size_t)(ROWS * size));
            else memcpy(out, numbers, (size_t)(count * size));
        }
    }
}

static void finish(const layer *l, const scratch *s, int64_t from, int64_t to, const void *bias, void *y, int64_t tokens,
                   int64_t dtype, int wide)
{
    if (dtype == FLOAT32) finish_tokens(l, s, from, to, bias, y, tokens, 1, 1);
    else if (wide) finish_tokens(l, s, from, to, bias, y, tokens, 0, 1);
    else finish_tokens(l, s, from, to, bias, y, tokens, 0, 0);
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
            if (!s->left) {
                if (own.begin < own.end) l->left.run(&p, own.begin, own.end, wide);
                continue;
            }
            for (int64_t tile = own.begin; tile < own.end; tile += SOME_TILES) {
                const int64_t end = own.end - tile < SOME_TILES ? own.end : tile + SOME_TILES, stop = end * ROWS;
                l->left.run(&p, tile, end, wide);
                finish(l, s, tile * ROWS, stop < rows ? stop : rows, bias[i], out, tokens, dtype, wide);
            }
        }
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
    int64_t bytes = 64 + (placed ? chunk * stride * size + 64 : 0); /* the last rows are read beyond their ends */
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
            if (first + chunk < tokens) {
                BARRIER /* the next tokens take the same room */
            }
        }
    }
    free(memory);
    return 0;
}
