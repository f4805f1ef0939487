/* The search for the range of each group of weights: same arithmetic as `_search` in core/ranges.py, where the
   sums over a group alone are made in another order. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 16

static float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t as_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* To nearest, ties to even, of a positive finite number; kind: 0 float32, 1 bfloat16, 2 float16. */
static float stored(float value, int kind)
{
    const uint32_t bits = as_bits(value);
    if (kind == 1) return as_float((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
    if (kind == 2) return as_float((bits + 0xfffu + (bits >> 13 & 1u)) & 0xffffe000u); /* never subnormal here */
    return value;
}

/* value to the power of `norm`, for value >= 0, to about 2e-7. */
static inline float power(float value, float norm)
{
    const uint32_t bits = as_bits(value);
    const uint32_t shifted = bits - 0x3f3504f3u; /* so that the mantissa lies in sqrt(1/2)..sqrt(2) */
    const float exponent = (float)((int32_t)shifted >> 23);
    const float m = as_float((shifted & 0x007fffffu) + 0x3f3504f3u);
    const float t = (m - 1.0f) / (m + 1.0f), u = t * t;
    const float series = 2.8853901f + u * (0.96179669f + u * (0.57707802f + u * (0.41219859f + u * 0.32059890f)));
    float y = norm * (exponent + t * series);
    y = y < -126.0f ? -126.0f : y > 127.0f ? 127.0f : y;
    const float whole = rintf(y), f = y - whole;
    const float two = 1.0f + f * (0.69314718f + f * (0.24022651f + f * (0.055504109f + f * (0.0096181291f +
                      f * (0.0013333558f + f * 0.00015403530f)))));
    const float result = two * as_float((uint32_t)((int32_t)whole + 127) << 23);
    return value < 1e-30f ? 0.0f : result;
}

#define SUM(NAME, POWER)                                                                                              \
    static float NAME(const float *w, const float *cost, size_t width, float scale, float zero, float max_code,       \
                      float norm, float limit)                                                                        \
    {                                                                                                                 \
        float lanes[LANES] = {0}, total = 0.0f;                                                                       \
        size_t k = 0;                                                                                                 \
        (void)norm;                                                                                                   \
        for (; k + LANES <= width; k += LANES) {                                                                      \
            for (size_t i = 0; i < LANES; i++) {                                                                      \
                float code = rintf(w[k + i] / scale + zero);                                                          \
                code = code < 0.0f ? 0.0f : code;                                                                     \
                code = code > max_code ? max_code : code;                                                             \
                const float d = fabsf((code - zero) * scale - w[k + i]);                                              \
                lanes[i] += cost[k + i] * (POWER);                                                                    \
            }                                                                                                         \
            if (k % (4 * LANES) == 3 * LANES) { /* hopeless already? */                                               \
                float so_far = 0.0f;                                                                                  \
                for (size_t i = 0; i < LANES; i++) so_far += lanes[i];                                                \
                if (so_far > 1.001f * limit) return so_far;                                                           \
            }                                                                                                         \
        }                                                                                                             \
        for (size_t i = 0; i < LANES; i++) total += lanes[i];                                                         \
        for (; k < width; k++) {                                                                                      \
            float code = rintf(w[k] / scale + zero);                                                                  \
            code = code < 0.0f ? 0.0f : code;                                                                         \
            code = code > max_code ? max_code : code;                                                                 \
            const float d = fabsf((code - zero) * scale - w[k]);                                                      \
            total += cost[k] * (POWER);                                                                               \
        }                                                                                                             \
        return total;                                                                                                 \
    }

SUM(sum_square, d * d)
SUM(sum_fourth, (d * d) * (d * d))
SUM(sum_power, power(d, norm))

/* The best of `steps` ranges of every group. weight: (rows, columns). cost: (columns). factors: (steps), how much of
   the extremes each candidate covers, the first being 1. midpoint: the zero-point of a symmetric grid, whose
   `levels` are the steps from zero to the largest value; `levels` < 0: with zero-points. scale, zero: (rows, groups),
   filled in; zero only with zero-points. tiny, huge: limits of a stored scale. */
void search_ranges(size_t rows, size_t columns, size_t width, const float *weight, const float *cost, float norm,
                   size_t steps, const float *factors, float max_code, float midpoint, float levels, int kind,
                   float tiny, float huge, float *scale, float *zero)
{
    const size_t groups = (columns + width - 1) / width;
    for (size_t r = 0; r < rows; r++) {
        for (size_t g = 0; g < groups; g++) {
            const float *w = weight + r * columns + g * width, *c = cost + g * width;
            const size_t count = g + 1 < groups ? width : columns - g * width;
            float low = w[0], high = w[0], best = INFINITY, best_scale = 1.0f, best_zero = midpoint;
            for (size_t k = 1; k < count; k++) {
                low = w[k] < low ? w[k] : low;
                high = w[k] > high ? w[k] : high;
            }
            for (size_t step = 0; step < steps; step++) {
                float bottom = low * factors[step], top = high * factors[step], s, z = midpoint, loss;
                bottom = bottom > 0.0f ? 0.0f : bottom;
                top = top < 0.0f ? 0.0f : top;
                if (levels >= 0.0f) s = (-bottom > top ? -bottom : top) / levels;
                else s = (top - bottom) / max_code;
                if (!(s > 0.0f)) s = 1.0f;
                s = s < tiny ? tiny : s > huge ? huge : s;
                s = stored(s, kind);
                if (levels < 0.0f) {
                    z = rintf(-bottom / s);
                    z = z < 0.0f ? 0.0f : z > max_code ? max_code : z;
                }
                if (norm == 2.0f) loss = sum_square(w, c, count, s, z, max_code, norm, best);
                else if (norm == 4.0f) loss = sum_fourth(w, c, count, s, z, max_code, norm, best);
                else loss = sum_power(w, c, count, s, z, max_code, norm, best);
                if (step == 0 || loss < best) {
                    best = loss;
                    best_scale = s;
                    best_zero = z;
                }
            }
            scale[r * groups + g] = best_scale;
            if (levels < 0.0f) zero[r * groups + g] = best_zero;
        }
    }
}
