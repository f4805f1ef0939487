/* Products with packed weights: the functions that Python calls. Compiled for an instruction set and a width of codes. */

#include "float32.h"
#include "pack.h"

#if defined(__AVX512BF16__)
#include "dots.h"
#endif
#if defined(__AVX512VNNI__) && (BITS == 4 || BITS == 8)
#include "int8.h"
#endif
#if defined(__AMX_BF16__)
#include "amx.h"
#elif defined(__AVX512BF16__)
#include "panels.h"
#endif

/* Whether this processor and system let the library run. */
int ready(void)
{
#if defined(__AMX_BF16__)
    return tiles_allowed();
#else
    return 1;
#endif
}

typedef struct {
    int64_t begin, end;
} span;

/* Consecutive shares of `count` tiles; what is computed of a tile does not depend on who does it. */
INLINE span share_of(int64_t count, int64_t share, int64_t threads)
{
    return (span){count * share / threads, count * (share + 1) / threads};
}

#define DO(words) _Pragma(#words)
#define SHARES(n) DO(omp parallel for schedule(static, 1) num_threads((int)(n)) if ((n) > 1))

static weight weight_of(const int64_t *shape, void *codes, const void *scale, const void *zero, const float *table)
{
    return (weight){shape[0], shape[1], shape[2], shape[3], shape[4], codes, scale, zero, table};
}

/* shape: rows, columns, group, kind, wide. words: (rows, row_words). */
void pack(const int64_t *shape, const uint32_t *words, int64_t row_words, void *codes, int64_t threads)
{
    const weight w = weight_of(shape, codes, 0, 0, 0);
    const int64_t bytes = row_blocks(&w) * BLOCK_BYTES;
    SHARES(threads)
    for (int64_t share = 0; share < threads; share++) {
        const span s = share_of(tiles(&w), share, threads);
        for (int64_t tile = s.begin; tile < s.end; tile++) {
            memset(w.codes + tile * bytes, 0, (size_t)bytes);
            for (int64_t r = 0; r < ROWS && tile * ROWS + r < w.rows; r++)
                pack_row(&w, words + (tile * ROWS + r) * row_words, w.codes + tile * bytes, r);
        }
    }
}

/* The inverse; words are zero at first. */
void restore(const int64_t *shape, uint32_t *words, int64_t row_words, void *codes, int64_t threads)
{
    const weight w = weight_of(shape, codes, 0, 0, 0);
    const int64_t bytes = row_blocks(&w) * BLOCK_BYTES;
    SHARES(threads)
    for (int64_t share = 0; share < threads; share++) {
        const span s = share_of(tiles(&w), share, threads);
        for (int64_t tile = s.begin; tile < s.end; tile++)
            for (int64_t r = 0; r < ROWS && tile * ROWS + r < w.rows; r++)
                restore_row(&w, words + (tile * ROWS + r) * row_words, w.codes + tile * bytes, r);
    }
}

/* Rows start .. stop - 1, start a multiple of 16, rounded to `dtype`: (columns, stop - start). */
void dequantize(const int64_t *shape, void *codes, const void *scale, const void *zero, const float *table,
                int64_t start, int64_t stop, void *out, int64_t dtype, int64_t threads)
{
    const weight w = weight_of(shape, codes, scale, zero, table);
    const int64_t size = dtype == BFLOAT16 ? 2 : 4, first = start / ROWS, count = (stop + ROWS - 1) / ROWS - first;
    SHARES(threads)
    for (int64_t share = 0; share < threads; share++) {
        const span s = share_of(count, share, threads);
        for (int64_t i = s.begin; i < s.end; i++) {
            const int64_t row = i * ROWS, left = stop - start - row;
            dequantize_any(&w, first + i, left < ROWS ? left : ROWS, (uint8_t *)out + row * size, (int)dtype,
                           stop - start);
        }
    }
}

/* Some rows, as many as `wanted` has: (count, columns). Returns 0, or 1 if there is no memory. */
int gather(const int64_t *shape, void *codes, const void *scale, const void *zero, const float *table,
           const int64_t *wanted, int64_t count, void *out, int64_t dtype, int64_t threads)
{
    const weight w = weight_of(shape, codes, scale, zero, table);
    const int64_t size = dtype == BFLOAT16 ? 2 : 4, bytes = ROWS * w.columns * size;
    uint8_t *room = malloc((size_t)(threads * bytes));
    if (!room) return 1;
    SHARES(threads)
    for (int64_t share = 0; share < threads; share++) {
        const span s = share_of(count, share, threads);
        uint8_t *rows = room + share * bytes;
        for (int64_t i = s.begin; i < s.end; i++) {
            const uint8_t *row = rows + wanted[i] % ROWS * size;
            uint8_t *to = (uint8_t *)out + i * w.columns * size;
            dequantize_any(&w, wanted[i] / ROWS, ROWS, rows, (int)dtype, ROWS);
            for (int64_t c = 0; c < w.columns; c++) memcpy(to + c * size, row + c * ROWS * size, (size_t)size);
        }
    }
    free(room);
    return 0;
}

typedef enum { FLOATS, DOTS, TILES, PANELS } way;

/* rounded: whether weights may be rounded to the dtype of the activations. */
static way way_of(const weight *w, int64_t tokens, int64_t dtype, int64_t rounded)
{
    (void)w, (void)tokens, (void)dtype, (void)rounded;
#if defined(__AVX512BF16__)
    if (dtype != BFLOAT16) return FLOATS;
    const int wide_table = w->kind == TABLE && !table_is_narrow(w);
#if defined(__AMX_BF16__)
    if (wide_table && tokens <= 2) return FLOATS;
    return tokens == 1 ? DOTS : TILES;
#else
    if (rounded || (tokens >= PANELS_FROM && !wide_table)) return PANELS;
    return wide_table ? FLOATS : DOTS;
#endif
#else
    return FLOATS;
#endif
}

/* A token where the kernel wants it: each group filled with zeros to a multiple of `unit` columns, floats or halves;
   `run` columns lie together, the next ones `every` numbers further. */
static void place_token(const weight *w, const void *from, int64_t dtype, void *to, int floats, int64_t unit,
                        int64_t run, int64_t every)
{
    const int64_t size = floats ? 4 : 2;
    const uint16_t *halves = from;
    int64_t at = 0;
    for (int64_t g = 0; g < groups(w); g++)
        for (int64_t column = 0; column < group_columns(w, g); column += unit, at += unit) {
            const int64_t left = group_columns(w, g) - column, width = left < unit ? left : unit;
            const int64_t first = g * w->group + column;
            uint8_t *out = (uint8_t *)to + (at / run * every + at % run) * size;
            if (floats && dtype == BFLOAT16)
                for (int64_t c = 0; c < width; c++) ((float *)out)[c] = widened(halves[first + c]);
            else
                memcpy(out, (const uint8_t *)from + first * size, (size_t)(width * size));
            memset(out + width * size, 0, (size_t)((unit - width) * size));
        }
}

static void add_up(const weight *w, const uint16_t *x, float *sums)
{
    for (int64_t g = 0; g < groups(w); g++) {
        double sum = 0;
        for (int64_t c = g * w->group; c < g * w->group + group_columns(w, g); c++) sum += widened(x[c]);
        sums[g] = (float)sum;
    }
}

static int64_t padded_columns(const weight *w, int64_t unit)
{
    const int64_t last = groups(w) - 1, full = (w->group + unit - 1) / unit * unit;
    return last * full + (group_columns(w, last) + unit - 1) / unit * unit;
}

/* y (tokens, rows) = x (tokens, columns) times the weight, plus bias, NULL or (rows,); all of `dtype`.
   Returns 0, or 1 if there is no memory. */
int linear(const int64_t *shape, void *codes, const void *scale, const void *zero, const float *table, const void *x,
           const void *bias, void *y, int64_t tokens, int64_t dtype, int64_t rounded, int64_t threads)
{
    product p = {.w = weight_of(shape, codes, scale, zero, table), .tokens = tokens, .dtype = dtype};
    const way how = way_of(&p.w, tokens, dtype, rounded);
    const int floats = how == FLOATS, tiled = how == TILES || how == PANELS;
    const int64_t run = how == TILES ? 32 : BLOCK, across = how == TILES ? 16 : 8; /* columns, tokens side by side */
    const int64_t unit = tiled ? run : BLOCK, size = floats ? 4 : 2, given = dtype == BFLOAT16 ? 2 : 4;
    uint8_t *placed = 0;
    float *sums = 0;
    p.x = x, p.bias = bias, p.y = y, p.stride = padded_columns(&p.w, unit);
    if (tiled || p.stride != p.w.columns || size != given) {
        const int64_t rows = tiled ? (tokens + across - 1) / across * across : tokens, movers = tokens > 32 ? threads : 1;
        p.x = placed = aligned_alloc(64, (size_t)(rows * p.stride * size + 63) / 64 * 64);
        if (!placed) return 1;
        SHARES(movers)
        for (int64_t share = 0; share < movers; share++) {
            const span s = share_of(rows, share, movers);
            for (int64_t m = s.begin; m < s.end; m++) {
                const int64_t start = tiled ? m / across * across * p.stride + m % across * run : m * p.stride;
                if (m < tokens)
                    place_token(&p.w, (const uint8_t *)x + m * p.w.columns * given, dtype, placed + start * size,
                                floats, unit, run, tiled ? across * run : run);
                else
                    for (int64_t at = 0; at < p.stride; at += run)
                        memset(placed + (start + at * across) * size, 0, (size_t)(run * size));
            }
        }
    }
    if (!floats && p.w.kind == REAL) {
        p.sums = sums = malloc((size_t)(tokens * groups(&p.w)) * 4);
        if (!sums) {
            free(placed);
            return 1;
        }
        SHARES(threads)
        for (int64_t share = 0; share < threads; share++) {
            const span s = share_of(tokens, share, threads);
            for (int64_t m = s.begin; m < s.end; m++)
                add_up(&p.w, (const uint16_t *)x + m * p.w.columns, sums + m * groups(&p.w));
        }
    }
    SHARES(threads)
    for (int64_t share = 0; share < threads; share++) {
        const span s = share_of(tiles(&p.w), share, threads);
        if (how == FLOATS)
            for (int64_t tile = s.begin; tile < s.end; tile++) float_product(&p, tile);
#if defined(__AVX512BF16__)
        if (how == DOTS) dot_tiles(&p, s.begin, s.end);
#endif
#if defined(__AMX_BF16__)
        if (how == TILES && s.begin < s.end) amx_tiles(&p, s.begin, s.end);
#elif defined(__AVX512BF16__)
        if (how == PANELS) panel_tiles(&p, s.begin, s.end, (int)rounded);
#endif
    }
    free(placed);
    free(sums);
    return 0;
}

/* The same with activations on a grid of integers, largest code `largest`: x and y of `dtype`; given: one scale, or
   NULL to find one for each token. Integer zero-points or none; 4 or 8 bits. Returns 2 if there is no such code. */
int rounded_linear(const int64_t *shape, void *codes, const void *scale, const void *zero, const void *x,
                   const float *given, const void *bias, void *y, int64_t largest, int64_t tokens, int64_t dtype,
                   int64_t threads)
{
#if defined(__AVX512VNNI__) && (BITS == 4 || BITS == 8)
    const weight w = weight_of(shape, codes, scale, zero, 0);
    const int64_t stride = padded_columns(&w, BLOCK), size = dtype == BFLOAT16 ? 2 : 4;
    const int64_t movers = tokens < threads ? tokens : threads;
    int8_t *placed = malloc((size_t)(tokens * stride));
    int32_t *sums = malloc((size_t)(tokens * groups(&w)) * 4);
    float *scales = malloc((size_t)tokens * 4), *room = malloc((size_t)(movers * w.columns) * 5);
    const int failed = !placed || !sums || !scales || !room;
    if (!failed) {
        SHARES(movers)
        for (int64_t share = 0; share < movers; share++) {
            const span s = share_of(tokens, share, movers);
            float *numbers = room + share * w.columns;
            int8_t *rounded_codes = (int8_t *)(room + movers * w.columns) + share * w.columns;
            for (int64_t m = s.begin; m < s.end; m++) {
                round_token((const uint8_t *)x + m * w.columns * size, dtype, w.columns, (float)largest, given, numbers,
                            rounded_codes, scales + m);
                place_bytes(&w, rounded_codes, placed + m * stride, sums + m * groups(&w));
            }
        }
        const rounded r = {
            {.w = w, .tokens = tokens, .dtype = dtype, .x = placed, .bias = bias, .y = y, .stride = stride}, sums, scales};
        SHARES(threads)
        for (int64_t share = 0; share < threads; share++) {
            const span s = share_of(tiles(&w), share, threads);
            byte_tiles(&r, s.begin, s.end);
        }
    }
    free(placed), free(sums), free(scales), free(room);
    return failed;
#else
    (void)shape, (void)codes, (void)scale, (void)zero, (void)x, (void)given, (void)bias, (void)y;
    (void)largest, (void)tokens, (void)dtype, (void)threads;
    return 2;
#endif
}

/* Tiles begin .. end - 1, one stage of stages.c. x: (tokens, stride) float32, or bfloat16 if not `wide`, columns filled
   with zeros to a multiple of BLOCK; groups are multiples of it. Not for real zero-points; tables only if `wide`. */
void run_tiles(const product *p, int64_t begin, int64_t end, int wide)
{
#if defined(__AVX512BF16__)
    if (!wide) {
        dot_tiles(p, begin, end);
        return;
    }
#endif
    (void)wide;
    for (int64_t tile = begin; tile < end; tile++) float_product(p, tile);
}
