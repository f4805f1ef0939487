/* Columns of a matrix to their places in a wider one. */

#include <stdint.h>

#define PLACE(name, type)                                                                                            \
    void name(const type *from, int64_t width, const int64_t *places, type *to, int64_t stride, int64_t rows,        \
              int64_t threads)                                                                                       \
    {                                                                                                                \
        _Pragma("omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)")                      \
        for (int64_t m = 0; m < rows; m++) {                                                                         \
            const type *row = from + m * width;                                                                      \
            type *out = to + m * stride;                                                                             \
            for (int64_t j = 0; j < width; j++) out[places[j]] = row[j];                                             \
        }                                                                                                            \
    }

PLACE(place2, uint16_t)
PLACE(place4, uint32_t)
