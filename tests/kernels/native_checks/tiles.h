/* Tile instructions in plain C, for processors without AMX. Included before a source; what it uses of them is here. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig tile_loadconfig
#define _tile_release tile_release
#define _tile_zero tile_zero
#define _tile_loadd tile_loadd
#define _tile_stored tile_stored
#define _tile_dpbf16ps tile_dpbf16ps

static _Thread_local struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tiles_now;
static _Thread_local uint8_t tile_data[8][16][64];

static void tile_loadconfig(const void *config)
{
    memcpy(&tiles_now, config, 64);
    memset(tile_data, 0, sizeof tile_data);
    for (int i = 0; i < 8; i++)
        if (tiles_now.palette != 1 || tiles_now.rows[i] > 16 || tiles_now.bytes[i] > 64) __builtin_trap();
}

static void tile_release(void) { memset(&tiles_now, 0, sizeof tiles_now); }

static void tile_used(int t)
{
    if (!tiles_now.rows[t]) __builtin_trap(); /* as the processor does */
}

static void tile_zero(int t) { tile_used(t), memset(tile_data[t], 0, sizeof tile_data[t]); }

static void tile_loadd(int t, const void *from, int64_t stride)
{
    tile_zero(t);
    for (int r = 0; r < tiles_now.rows[t]; r++)
        memcpy(tile_data[t][r], (const uint8_t *)from + r * stride, tiles_now.bytes[t]);
}

static void tile_stored(int t, void *to, int64_t stride)
{
    tile_used(t);
    for (int r = 0; r < tiles_now.rows[t]; r++)
        memcpy((uint8_t *)to + r * stride, tile_data[t][r], tiles_now.bytes[t]);
}

static float tile_number(const uint8_t *at)
{
    uint16_t half;
    uint32_t bits;
    float value;
    memcpy(&half, at, 2);
    bits = (uint32_t)half << 16;
    memcpy(&value, &bits, 4);
    return value;
}

static void tile_dpbf16ps(int to, int a, int b)
{
    tile_used(to), tile_used(a), tile_used(b);
    if (tiles_now.rows[to] != tiles_now.rows[a] || tiles_now.bytes[to] != tiles_now.bytes[b] ||
        tiles_now.bytes[a] != 4 * tiles_now.rows[b])
        __builtin_trap();
    for (int m = 0; m < tiles_now.rows[to]; m++)
        for (int n = 0; n < tiles_now.bytes[to] / 4; n++) {
            float sum;
            memcpy(&sum, tile_data[to][m] + 4 * n, 4);
            for (int k = 0; k < tiles_now.rows[b]; k++)
                for (int odd = 0; odd < 2; odd++)
                    sum += tile_number(tile_data[a][m] + 4 * k + 2 * odd) * tile_number(tile_data[b][k] + 4 * n + 2 * odd);
            memcpy(tile_data[to][m] + 4 * n, &sum, 4);
        }
}
