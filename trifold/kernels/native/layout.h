/* The runtime layout of a packed weight, and what every kernel needs of it.

   BITS, the width of the codes, is given to the compiler: each width is a library of its own.

   Rows go by tiles of 16, one row to a 32-bit lane. Columns go by blocks of 16, which never straddle two groups: the
   last block of a group is filled with zeros. The codes of a block lie in planes, `BITS * 32` bytes in all:

     nibbles  BITS >= 4   2 x 64 bytes  lane: columns 0 2 4 6 (then 8 10 12 14) from bit 0, their successors from bit 16
     upper    BITS == 8   the same, of bits 4..7
     pairs    BITS & 2    64 bytes      lane: columns 0 2 .. 14 from bit 0, their successors from bit 16
     singles  BITS & 1    32 bytes      16 bits a row: columns 0 2 .. 14 from bit 0, their successors from bit 8

   Planes are in this order, the code's low bits first. Scales and zero-points: (tile, group, 16). */

#ifndef TRIFOLD_LAYOUT_H
#define TRIFOLD_LAYOUT_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define ROWS 16  /* of a tile */
#define BLOCK 16 /* columns */
#define BLOCK_BYTES (BITS * 32)
#define AHEAD 4096 /* bytes of codes that are asked for before they are needed */
#define LOW (BITS >= 4 ? 4 : 0) /* bits below the pairs and singles */

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef uint8_t vb __attribute__((vector_size(16)));

enum { MIDPOINT, INTEGER, REAL, TABLE }; /* where zero is; TABLE: values instead */
enum { FLOAT32, BFLOAT16 };

typedef struct {
    int64_t rows, columns, group; /* group: columns that share a scale */
    int64_t kind, wide;           /* wide: scales and real zero-points are float32, else bfloat16 */
    uint8_t *codes;
    const void *scale, *zero; /* zero: uint8 if INTEGER, NULL if there is none */
    const float *table;       /* 16 values */
} weight;

INLINE int64_t tiles(const weight *w) { return (w->rows + ROWS - 1) / ROWS; }
INLINE int64_t groups(const weight *w) { return (w->columns + w->group - 1) / w->group; }
INLINE int64_t group_columns(const weight *w, int64_t g)
{
    const int64_t rest = w->columns - g * w->group;
    return rest < w->group ? rest : w->group;
}
INLINE int64_t group_blocks(const weight *w, int64_t g) { return (group_columns(w, g) + BLOCK - 1) / BLOCK; }
INLINE int64_t row_blocks(const weight *w)
{
    const int64_t last = groups(w) - 1;
    return last * group_blocks(w, 0) + group_blocks(w, last);
}
INLINE float midpoint(void) { return BITS == 1 ? 0.5f : (float)(1 << BITS >> 1); }

typedef struct {
    vu nibbles[2], upper[2], pairs, singles;
} planes;

INLINE planes load_planes(const uint8_t *at)
{
    planes p;
    if (BITS >= 4) memcpy(p.nibbles, at, 128), at += 128;
    if (BITS == 8) memcpy(p.upper, at, 128), at += 128;
    if (BITS & 2) memcpy(&p.pairs, at, 64), at += 64;
    if (BITS & 1) {
        vh octets;
        memcpy(&octets, at, 32);
        p.singles = __builtin_convertvector(octets, vu);
    }
    return p;
}

/* The codes of column 2 * step + odd of a block, one row to a lane. */
INLINE vu code_at(const planes *p, int step, int odd)
{
    vu code = {0};
    const int place = 4 * (step % 4) + 16 * odd;
    if (BITS >= 4) code = p->nibbles[step / 4] >> place & 15;
    if (BITS == 8) code |= (p->upper[step / 4] >> place & 15) << 4;
    if (BITS & 2) code |= (p->pairs >> (2 * step + 16 * odd) & 3) << LOW;
    if (BITS & 1) code |= (p->singles >> (step + 8 * odd) & 1) << (LOW + (BITS & 2));
    return code;
}

INLINE vf from_bfloat16(const uint16_t *at)
{
    vh half;
    memcpy(&half, at, sizeof half);
    const vu wide = __builtin_convertvector(half, vu) << 16;
    return (vf)wide;
}

INLINE vh to_bfloat16(vf value)
{
    const vu bits = (vu)value;
    const vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, none = (vu)(value != value);
    return __builtin_convertvector((rounded & ~none) | (0x7fc0 & none), vh);
}

INLINE float widened(uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE vf numbers(const weight *w, const void *base, int64_t tile, int64_t g)
{
    const int64_t at = (tile * groups(w) + g) * ROWS;
    if (!w->wide) return from_bfloat16((const uint16_t *)base + at);
    vf value;
    memcpy(&value, (const float *)base + at, sizeof value);
    return value;
}

INLINE vf scale_of(const weight *w, int64_t tile, int64_t g) { return numbers(w, w->scale, tile, g); }

/* What is subtracted from the codes of a group. */
INLINE vf zero_of(const weight *w, int64_t tile, int64_t g)
{
    if (w->kind == REAL) return numbers(w, w->zero, tile, g);
    if (w->kind == INTEGER) {
        vb zero;
        memcpy(&zero, (const uint8_t *)w->zero + (tile * groups(w) + g) * ROWS, sizeof zero);
        return __builtin_convertvector(__builtin_convertvector(zero, vi), vf);
    }
    return (vf){0} + midpoint();
}

/* A product in progress. x: (tokens, stride), columns placed as the blocks want them; sums: of x, (tokens, groups),
   where the kernel needs them. y and bias: of `dtype`. */
typedef struct {
    weight w;
    int64_t tokens, stride, dtype;
    const void *x, *bias;
    void *y;
    const float *sums;
} product;

/* Add the bias, round, and store what there is of a tile's 16 outputs. */
INLINE void store_outputs(const product *p, int64_t tile, int64_t token, vf value)
{
    const int64_t first = tile * ROWS, count = p->w.rows - first < ROWS ? p->w.rows - first : ROWS;
    const int64_t at = token * p->w.rows + first;
    if (p->dtype == BFLOAT16) {
        uint16_t bias[ROWS] = {0};
        if (p->bias) {
            memcpy(bias, (const uint16_t *)p->bias + first, (size_t)count * 2);
            value += from_bfloat16(bias);
        }
        const vh half = to_bfloat16(value);
        if (count == ROWS) memcpy((uint16_t *)p->y + at, &half, sizeof half);
        else memcpy((uint16_t *)p->y + at, &half, (size_t)count * 2);
    } else {
        vf bias = {0};
        if (p->bias) {
            memcpy(&bias, (const float *)p->bias + first, (size_t)count * 4);
            value += bias;
        }
        if (count == ROWS) memcpy((float *)p->y + at, &value, sizeof value);
        else memcpy((float *)p->y + at, &value, (size_t)count * 4);
    }
}

#endif
