/* The column loops of the quadratic solvers, on transposed matrices: one column of the weight is one
   contiguous run of `rows` floats. Same arithmetic as the loops in core/obs.py and core/refine.py. */

#include <math.h>
#include <stddef.h>

#define CHUNK 256 /* rows at a time, so that what is read again and again stays in the first-level cache */

static float to_code(float value, float max_code)
{
    float code = rintf(value);
    code = code < 0.0f ? 0.0f : code;
    return code > max_code ? max_code : code;
}

/* live = column i with the errors of the columns before it folded in; factors[j * stride + i]. */
static void fold(float *restrict live, const float *restrict column, const float *restrict done, const float *factors,
                 size_t stride, size_t i, size_t rows, size_t count)
{
    for (size_t r = 0; r < count; r++) live[r] = column[r];
    for (size_t j = 0; j < i; j++) {
        const float factor = factors[j * stride + i];
        const float *error = done + j * rows;
        for (size_t r = 0; r < count; r++) live[r] -= error[r] * factor;
    }
}

/* Fix `columns` columns one after the other on an integer grid.
   current, errors, codes: (columns, rows). factors: upper triangle, row stride `stride`. group[i]: the row of
   scales and zeros, (groups, rows), that column i uses. keep: (columns, rows), 0 where a weight becomes zero, else
   1; NULL if all stay. */
void sweep_columns(size_t columns, size_t rows, float max_code, float *current, float *errors, float *codes,
                   const float *factors, size_t stride, const long long *group, const float *scales,
                   const float *zeros, const float *keep)
{
    float live[CHUNK];
    for (size_t first = 0; first < rows; first += CHUNK) {
        const size_t count = rows - first < CHUNK ? rows - first : CHUNK;
        for (size_t i = 0; i < columns; i++) {
            float *column = current + i * rows + first, *error = errors + i * rows + first;
            float *code = codes + i * rows + first;
            const float *scale = scales + (size_t)group[i] * rows + first;
            const float *zero = zeros + (size_t)group[i] * rows + first;
            const float pivot = factors[i * stride + i];
            fold(live, column, errors + first, factors, stride, i, rows, count);
            for (size_t r = 0; r < count; r++) {
                const float chosen = to_code(live[r] / scale[r] + zero[r], max_code);
                const float kept = keep ? keep[i * rows + first + r] : 1.0f;
                const float decided = (chosen - zero[r]) * scale[r] * kept;
                code[r] = chosen;
                column[r] = decided;
                error[r] = (live[r] - decided) / pivot;
            }
        }
    }
}

/* The same where weights keep their values or become zero. keep: (columns, rows), 1 or 0. */
void mask_columns(size_t columns, size_t rows, float *current, float *errors, const float *keep, const float *factors,
                  size_t stride)
{
    float live[CHUNK];
    for (size_t first = 0; first < rows; first += CHUNK) {
        const size_t count = rows - first < CHUNK ? rows - first : CHUNK;
        for (size_t i = 0; i < columns; i++) {
            const size_t at = i * rows + first;
            const float pivot = factors[i * stride + i];
            fold(live, current + at, errors + first, factors, stride, i, rows, count);
            for (size_t r = 0; r < count; r++) {
                current[at + r] = live[r] * keep[at + r];
                errors[at + r] = (live[r] - current[at + r]) / pivot;
            }
        }
    }
}

/* One pass of coordinate descent over `columns` columns.
   codes, slopes, steps, scales, moved: (columns, rows). hessian: row stride `stride`. */
void descend_columns(size_t columns, size_t rows, float max_code, float *codes, const float *slopes,
                     const float *steps, const float *scales, float *moved, const float *hessian, size_t stride)
{
    float pull[CHUNK];
    for (size_t first = 0; first < rows; first += CHUNK) {
        const size_t count = rows - first < CHUNK ? rows - first : CHUNK;
        for (size_t i = 0; i < columns; i++) {
            const size_t at = i * rows + first;
            fold(pull, slopes + at, moved + first, hessian, stride, i, rows, count);
            for (size_t r = 0; r < count; r++) {
                const float code = codes[at + r];
                const float chosen = to_code(code + pull[r] * steps[at + r], max_code);
                moved[at + r] = (chosen - code) * scales[at + r];
                codes[at + r] = chosen;
            }
        }
    }
}
