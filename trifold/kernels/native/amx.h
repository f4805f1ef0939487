/* Products of bfloat16 activations for several tokens: AMX tiles of 16 tokens x 16 rows x 32 columns.

   The numbers of bfloat16.h are written to a buffer that stays in the first-level cache, a chunk of a group at a time,
   and meet all tokens before the next chunk. */

#include "bfloat16.h"

#include <sys/syscall.h>
#include <unistd.h>

#define PANEL_TOKENS 128 /* that meet a weight before it is decoded again */

#define BARRIER __asm__ volatile("" ::: "memory") /* the compiler does not know what tile instructions read */

/* Ask the kernel for tile registers. */
static int tiles_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

static void configure(int64_t tokens)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = (uint8_t)(i < 6 && tokens < 16 ? tokens : 16); /* 0..3 sums, 4..5 tokens, 6..7 rows */
    }
    BARRIER;
    _tile_loadconfig(&config);
}

/* Sums of 32 rows by up to 32 tokens over a chunk. x: two tiles of tokens, `below` apart; numbers: two of rows. */
INLINE void multiply(const uint8_t *x, int64_t below, const uint8_t *numbers, int64_t apart, int64_t steps,
                     int terms, int wide, int tall, float *sums)
{
    const int64_t size = CHUNK_BLOCKS / 2 * K_BYTES;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    BARRIER;
    for (int64_t k = 0; k < steps; k++) {
        _tile_loadd(4, x + k * K_BYTES, STEP_BYTES);
        if (tall) _tile_loadd(5, x + below + k * K_BYTES, STEP_BYTES);
        for (int t = 0; t < terms; t++) {
            const uint8_t *at = numbers + t * size + k * K_BYTES;
            _tile_loadd(6, at, STEP_BYTES);
            _tile_dpbf16ps(0, 4, 6);
            if (tall) _tile_dpbf16ps(2, 5, 6);
            if (wide) {
                _tile_loadd(7, at + apart, STEP_BYTES);
                _tile_dpbf16ps(1, 4, 7);
                if (tall) _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums, 64);
    if (wide) _tile_stored(1, sums + 256, 64);
    if (tall) _tile_stored(2, sums + 512, 64);
    if (wide && tall) _tile_stored(3, sums + 768, 64);
    BARRIER;
}

static void multiply_any(const uint8_t *x, int64_t below, const uint8_t *numbers, int64_t apart, int64_t steps,
                         int terms, int wide, int tall, float *sums)
{
    if (wide && tall) multiply(x, below, numbers, apart, steps, terms, 1, 1, sums);
    else if (wide) multiply(x, below, numbers, apart, steps, terms, 1, 0, sums);
    else if (tall) multiply(x, below, numbers, apart, steps, terms, 0, 1, sums);
    else multiply(x, below, numbers, apart, steps, terms, 0, 0, sums);
}

typedef struct {
    _Alignas(64) uint8_t numbers[2][3 * CHUNK_BLOCKS / 2 * K_BYTES];
    _Alignas(64) float sums[2][4][16][ROWS];
    _Alignas(64) float totals[PANEL_TOKENS][2][ROWS];
} workspace;

/* A chunk of group g of two tiles, and its place in a panel's tokens; first: whether it begins the totals. */
typedef struct {
    int64_t tile, g, token, count;
    int wide, first;
} chunk;

/* Scale the sums of tokens m .. m + 31 of a chunk and add them to the totals. */
INLINE void add_scaled(const product *p, const chunk *c, int64_t m, float sums[4][16][ROWS], workspace *space)
{
    const weight *w = &p->w;
    const int64_t rows = c->count - m < 32 ? c->count - m : 32;
    for (int n = 0; n <= c->wide; n++) {
        const __m512 scale = (__m512)scale_of(w, c->tile + n, c->g);
        for (int64_t i = 0; i < rows; i++) {
            float *total = space->totals[m + i][n];
            const __m512 before = c->first ? _mm512_setzero_ps() : _mm512_load_ps(total);
            _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_load_ps(sums[i / 16 * 2 + n][i % 16]), scale, before));
        }
    }
}

/* Subtract what is left of real zero-points times the sums of x. */
static void subtract_rests(const product *p, const chunk *c, workspace *space)
{
    const weight *w = &p->w;
    for (int n = 0; n <= c->wide; n++) {
        const __m512 rest = _mm512_mul_ps((__m512)scale_of(w, c->tile + n, c->g), zero_rest(w, c->tile + n, c->g));
        for (int64_t m = 0; m < c->count; m++) {
            const __m512 all = _mm512_set1_ps(p->sums[(c->token + m) * groups(w) + c->g]);
            float *total = space->totals[m][n];
            _mm512_store_ps(total, _mm512_fnmadd_ps(rest, all, _mm512_load_ps(total)));
        }
    }
}

/* Tiles `tile` and, if `wide`, the next, for tokens first .. first + count - 1, first a multiple of 32. x: tiles of
   16 tokens x 32 columns as `place_token` puts them. Sums are scaled after the next ones were started: what a tile
   instruction has just stored cannot be read at once. */
static void panel(const product *p, const decoder *from, int64_t tile, int wide, int64_t first, int64_t count,
                  int terms, workspace *space)
{
    const weight *w = &p->w;
    const int zeros = w->kind == INTEGER || w->kind == REAL;
    const int64_t tile_bytes = row_blocks(w) * BLOCK_BYTES, below = p->stride * 32; /* bytes of 16 tokens */
    const uint8_t *codes = w->codes + tile * tile_bytes, *x = (const uint8_t *)p->x + first / 16 * below;
    decoder d[2] = {*from, *from};
    for (int64_t g = 0; g < groups(w); g++) {
        for (int n = 0; n <= wide && zeros; n++) set_offsets(w, &d[n], tile + n, g);
        const int64_t blocks = group_blocks(w, g);
        for (int64_t done = 0; done < blocks; done += CHUNK_BLOCKS) {
            const int64_t part = blocks - done < CHUNK_BLOCKS ? blocks - done : CHUNK_BLOCKS;
            const chunk c = {tile, g, first, count, wide, g == 0 && done == 0};
            for (int n = 0; n <= wide; n++)
                write_any(codes + n * tile_bytes + done * BLOCK_BYTES, &d[n], part, space->numbers[n], zeros, terms);
            int side = 0;
            for (int64_t m = 0; m < count; m += 32, side = !side) {
                multiply_any(x + m / 16 * below, below, space->numbers[0], sizeof space->numbers[0], (part + 1) / 2,
                             terms, wide, count - m > 16, &space->sums[side][0][0][0]);
                if (m) add_scaled(p, &c, m - 32, space->sums[!side], space);
            }
            add_scaled(p, &c, (count - 1) / 32 * 32, space->sums[!side], space);
            if (w->kind == REAL && !done) subtract_rests(p, &c, space);
            x += (part + 1) / 2 * K_BYTES;
        }
        codes += blocks * BLOCK_BYTES;
    }
    for (int64_t m = 0; m < count; m++)
        for (int n = 0; n <= wide; n++)
            store_outputs(p, tile + n, first + m, (vf)_mm512_load_ps(space->totals[m][n]));
}

/* Tiles `begin` .. `end` - 1. */
static void amx_tiles(const product *p, int64_t begin, int64_t end)
{
    workspace space;
    decoder d;
    make_decoder(&p->w, &d);
    const int terms = p->w.kind == TABLE ? (table_is_narrow(&p->w) ? 1 : 3) : BITS > 4 ? 2 : 1;
    configure(p->tokens);
    for (int64_t first = 0; first < p->tokens; first += PANEL_TOKENS) { /* a panel stays in the second-level cache */
        const int64_t left = p->tokens - first, count = left < PANEL_TOKENS ? left : PANEL_TOKENS;
        for (int64_t tile = begin; tile < end; tile += 2)
            panel(p, &d, tile, tile + 1 < end, first, count, terms, &space);
    }
    _tile_release();
}
