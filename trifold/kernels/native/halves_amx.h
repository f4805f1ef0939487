/* bfloat16 weights by AMX, for several tokens. Tiles of 16 rows lie in memory as tile registers take them, and those of
   tokens are loaded from where they are. */

#include <immintrin.h>

#define FEW_TOKENS 4    /* that vdpbf16ps is as fast for: what counts is reading the weight */
#define TILE_BYTES 1024 /* 16 steps, of a weight; 32 columns of 16 tokens */
#define HALF 512

#define FENCE __asm__ volatile("" ::: "memory") /* the compiler does not know what tile instructions read */

/* Registers 0 .. 3: sums; 4, 5: `upper` and `lower` tokens; 6, 7: 16 rows of the weight each. */
static void configure(int64_t upper, int64_t lower)
{
    const uint8_t rows[8] = {(uint8_t)upper, (uint8_t)upper, (uint8_t)lower, (uint8_t)lower,
                             (uint8_t)upper, (uint8_t)lower, 16, 16};
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = rows[i] ? 64 : 0, config.rows[i] = rows[i];
    FENCE;
    _tile_loadconfig(&config);
}

/* 32 columns of up to 32 tokens by up to 32 rows. x: `stride` bytes from token to token; below: of token 16. */
INLINE void multiply(const uint8_t *x, const uint8_t *below, int64_t stride, const uint8_t *first, const uint8_t *second)
{
    _tile_loadd(4, x, stride);
    if (below) _tile_loadd(5, below, stride);
    _tile_loadd(6, first, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (below) _tile_dpbf16ps(2, 5, 6);
    if (second) {
        _tile_loadd(7, second, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (below) _tile_dpbf16ps(3, 5, 7);
    }
}

/* Tile `tile` and, if `pair`, the next, for tokens first .. first + count - 1, of which there are at most 32. */
INLINE void amx_block(const product *p, int64_t tile, int pair, int64_t first, int64_t count)
{
    const int64_t blocks = (p->w.columns + BLOCK - 1) / BLOCK, bytes = blocks * HALF, stride = p->stride * 2;
    const uint8_t *codes = p->w.codes + tile * bytes, *x = (const uint8_t *)p->x + first * stride;
    const int tall = count > 16;
    _Alignas(64) float sums[4][16][ROWS];
    configure(tall ? 16 : count, tall ? count - 16 : 0);
    _tile_zero(0);
    if (pair) _tile_zero(1);
    if (tall) _tile_zero(2);
    if (tall && pair) _tile_zero(3);
    FENCE;
    for (int64_t k = 0; k < blocks / 2; k++)
        multiply(x + k * 64, tall ? x + k * 64 + 16 * stride : 0, stride, codes + k * TILE_BYTES,
                 pair ? codes + bytes + k * TILE_BYTES : 0);
    if (blocks % 2) { /* 16 columns and zeros */
        _Alignas(64) uint8_t tokens[2 * TILE_BYTES] = {0}, rows[2][TILE_BYTES] = {{0}};
        const int64_t at = blocks / 2;
        for (int64_t m = 0; m < count; m++) memcpy(tokens + m * 64, x + at * 64 + m * stride, 32);
        for (int n = 0; n <= pair; n++) memcpy(rows[n], codes + n * bytes + at * TILE_BYTES, HALF);
        FENCE;
        multiply(tokens, tall ? tokens + TILE_BYTES : 0, 64, rows[0], pair ? rows[1] : 0);
        FENCE;
    }
    _tile_stored(0, sums[0], 64);
    if (pair) _tile_stored(1, sums[1], 64);
    if (tall) _tile_stored(2, sums[2], 64);
    if (tall && pair) _tile_stored(3, sums[3], 64);
    FENCE;
    for (int64_t m = 0; m < count; m++)
        for (int n = 0; n <= pair; n++)
            store_outputs(p, tile + n, first + m, (vf)_mm512_load_ps(sums[m / 16 * 2 + n][m % 16]));
}

static void amx_tiles(const product *p, int64_t begin, int64_t end)
{
    for (int64_t tile = begin; tile < end; tile += 2)
        for (int64_t first = 0; first < p->tokens; first += 32) {
            const int64_t left = p->tokens - first, count = left < 32 ? left : 32;
            if (tile + 1 < end) amx_block(p, tile, 1, first, count);
            else amx_block(p, tile, 0, first, count);
        }
    if (begin < end) _tile_release();
}
