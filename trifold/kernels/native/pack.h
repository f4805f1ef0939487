/* Codes between the format's bitstreams, one run of 32-bit words to a row, and the tiles of layout.h. */

#include "layout.h"

INLINE uint32_t code_in(const uint32_t *words, int64_t column)
{
    const int64_t at = column * BITS, shift = at % 32;
    uint32_t code = words[at / 32] >> shift;
    if (shift + BITS > 32) code |= words[at / 32 + 1] << (32 - shift);
    return code & ((1u << BITS) - 1);
}

INLINE void put_code(uint32_t *words, int64_t column, uint32_t code)
{
    const int64_t at = column * BITS, shift = at % 32;
    words[at / 32] |= code << shift;
    if (shift + BITS > 32) words[at / 32 + 1] |= code >> (32 - shift);
}

/* The places of row r in a block. */
typedef struct {
    uint32_t *nibbles[2], *upper[2], *pairs;
    uint16_t *singles;
} places;

INLINE places places_of(uint8_t *at, int64_t r)
{
    places q = {0};
    if (BITS >= 4) {
        q.nibbles[0] = (uint32_t *)at + r, q.nibbles[1] = q.nibbles[0] + ROWS;
        at += 128;
    }
    if (BITS == 8) {
        q.upper[0] = (uint32_t *)at + r, q.upper[1] = q.upper[0] + ROWS;
        at += 128;
    }
    if (BITS & 2) q.pairs = (uint32_t *)at + r, at += 64;
    if (BITS & 1) q.singles = (uint16_t *)at + r;
    return q;
}

INLINE void pack_row(const weight *w, const uint32_t *words, uint8_t *codes, int64_t r)
{
    int64_t column = 0;
    for (int64_t g = 0; g < groups(w); g++)
        for (int64_t left = group_columns(w, g); left > 0; left -= BLOCK, codes += BLOCK_BYTES) {
            const places q = places_of(codes, r);
            uint32_t nibbles[2] = {0}, upper[2] = {0}, pairs = 0, singles = 0;
            for (int64_t c = 0; c < BLOCK && c < left; c++, column++) {
                const uint32_t code = code_in(words, column);
                const int64_t step = c / 2, odd = c % 2, place = 4 * (step % 4) + 16 * odd;
                nibbles[step / 4] |= (code & 15) << place;
                upper[step / 4] |= (code >> 4) << place;
                pairs |= (code >> LOW & 3) << (2 * step + 16 * odd);
                singles |= (code >> (BITS - 1) & 1) << (step + 8 * odd);
            }
            for (int i = 0; i < 2; i++) {
                if (q.nibbles[i]) *q.nibbles[i] = nibbles[i];
                if (q.upper[i]) *q.upper[i] = upper[i];
            }
            if (q.pairs) *q.pairs = pairs;
            if (q.singles) *q.singles = (uint16_t)singles;
        }
}

INLINE void restore_row(const weight *w, uint32_t *words, uint8_t *codes, int64_t r)
{
    int64_t column = 0;
    for (int64_t g = 0; g < groups(w); g++)
        for (int64_t left = group_columns(w, g); left > 0; left -= BLOCK, codes += BLOCK_BYTES) {
            const places q = places_of(codes, r);
            for (int64_t c = 0; c < BLOCK && c < left; c++, column++) {
                const int64_t step = c / 2, odd = c % 2, place = 4 * (step % 4) + 16 * odd;
                uint32_t code = 0;
                if (BITS >= 4) code = *q.nibbles[step / 4] >> place & 15;
                if (BITS == 8) code |= (*q.upper[step / 4] >> place & 15) << 4;
                if (BITS & 2) code |= (*q.pairs >> (2 * step + 16 * odd) & 3) << LOW;
                if (BITS & 1) code |= (uint32_t)(*q.singles >> (step + 8 * odd) & 1) << (BITS - 1);
                put_code(words, column, code);
            }
        }
}
