/* Rows of sparse groups with AVX-512: included once for registers of WIDTH 512, blocks of 32 columns, and once for 256.

   Codes become bfloat16 numbers through a table in one vpermw, whose index ignores the bits above; zero-points choose
   the table, so that numbers are exact. Codes above 4 bits are two numbers, of the low nibble and of the rest. */

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#if WIDTH == 512
#define OP(name) JOIN(_mm512_, name)
#define INTEGERS __m512i
#define FLOATS_ __m512
#define PAIRS __m512bh
#else
#define OP(name) JOIN(_mm256_, name)
#define INTEGERS __m256i
#define FLOATS_ __m256
#define PAIRS __m256bh
#endif
#define UNIT (WIDTH / 16)

#ifndef GROUP_TABLES
#define GROUP_TABLES
/* Numbers by zero-point and code: low[zero & 15][code & 15], and of what is above. */
typedef struct {
    uint16_t low[16][32], high[16][32];
} tables;

static void make_tables(const sparse *w, tables *t)
{
    const int all = w->kind == INTEGER;
    for (int z = 0; z < (all ? 16 : 1); z++)
        for (int i = 0; i < 32; i++) {
            float low = (float)(i & ((1 << CODES) - 1)), high = 16.0f * (float)(i & ((1 << (BITS - CODES)) - 1));
            if (all) low -= (float)z, high -= 16.0f * (float)z;
            else if (TERMS == 2) high -= midpoint();
            else low -= midpoint();
            uint32_t bits[2];
            memcpy(bits, &low, 4), memcpy(bits + 1, &high, 4);
            t->low[z][i] = (uint16_t)(bits[0] >> 16), t->high[z][i] = (uint16_t)(bits[1] >> 16);
        }
}

/* The scales of some groups as floats, and where their activations begin, in bytes. */
INLINE void widen(const sparse *w, int64_t first, int64_t count, int32_t step, float *scales, int32_t *places)
{
    for (int64_t i = 0; i < count; i += 16) { /* tensors are longer by as many */
        __m512i bits, number;
        _mm_prefetch((const uint8_t *)w->scale + (first + i + AFTER) * (w->wide ? 4 : 2), _MM_HINT_T0);
        if (i % 32 == 0) _mm_prefetch((const uint8_t *)w->number + (first + i + AFTER) * (w->far ? 2 : 1), _MM_HINT_T0);
        if (i % 64 == 0 && w->zero) _mm_prefetch(w->zero + first + i + AFTER, _MM_HINT_T0);
        if (w->wide) bits = _mm512_loadu_si512((const float *)w->scale + first + i);
        else
            bits = _mm512_slli_epi32(
                _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)((const uint16_t *)w->scale + first + i))), 16);
        if (w->far)
            number = _mm512_cvtepu16_epi32(
                _mm256_loadu_si256((const __m256i *)((const uint16_t *)w->number + first + i)));
        else number = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)((const uint8_t *)w->number + first + i)));
        _mm512_storeu_si512(scales + i, bits);
        _mm512_storeu_si512(places + i, _mm512_mullo_epi32(number, _mm512_set1_epi32(step)));
    }
}
#endif

/* A plane of a block, spread and shifted. */
INLINE INTEGERS JOIN(plane_, WIDTH)(const uint8_t *at, int width)
{
    uint16_t shift[UNIT];
    INTEGERS spread;
    const int words = UNIT * width / 16;
    if (words == 8) {
        spread = OP(broadcast_i32x4)(_mm_loadu_si128((const __m128i *)at));
    } else if (words == 4) {
        int64_t some;
        memcpy(&some, at, 8);
#if WIDTH == 512
        spread = _mm512_set1_epi64(some);
#else
        spread = _mm256_set1_epi64x(some);
#endif
    } else if (words == 2) {
        int some;
        memcpy(&some, at, 4);
        spread = OP(set1_epi32)(some);
    } else {
        short some;
        memcpy(&some, at, 2);
        spread = OP(set1_epi16)(some);
    }
    for (int i = 0; i < UNIT; i++) shift[i] = (uint16_t)(i / words * width);
    return OP(srlv_epi16)(spread, OP(loadu_epi16)(shift));
}

/* Numbers of a block: TERMS vectors that add up to the weights before they are scaled. */
INLINE void JOIN(numbers_, WIDTH)(const uint8_t *block, const uint16_t *low, const uint16_t *high, INTEGERS *out)
{
    INTEGERS nibbles[2] = {0}, pairs = {0}, singles = {0};
    if (BITS >= 4) nibbles[0] = JOIN(plane_, WIDTH)(block, 4), block += UNIT / 2;
    if (BITS == 8) nibbles[1] = JOIN(plane_, WIDTH)(block, 4), block += UNIT / 2;
    if (BITS & 2) pairs = JOIN(plane_, WIDTH)(block, 2), block += UNIT / 4;
    if (BITS & 1) singles = JOIN(plane_, WIDTH)(block, 1);
    if ((BITS & 3) == 3)
        pairs = OP(ternarylogic_epi32)(OP(set1_epi16)(3), pairs, OP(slli_epi16)(singles, 2), 0xca);
    const INTEGERS rest = BITS == 8 ? nibbles[1] : BITS & 2 ? pairs : singles;
    out[0] = OP(permutexvar_epi16)(BITS >= 4 ? nibbles[0] : rest, OP(loadu_epi16)(low));
    if (TERMS == 2) out[1] = OP(permutexvar_epi16)(rest, OP(loadu_epi16)(high));
}

INLINE FLOATS_ JOIN(dot_, WIDTH)(FLOATS_ sum, INTEGERS numbers, const void *x, int floats)
{
#if defined(__AVX512BF16__)
    if (!floats) return OP(dpbf16_ps)(sum, (PAIRS)numbers, (PAIRS)OP(loadu_epi16)(x));
#endif
    (void)floats;
    const float *at = x;
#if WIDTH == 512
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(numbers, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(numbers, _mm512_set1_epi32((int)0xffff0000)));
    sum = _mm512_fmadd_ps(even, _mm512_loadu_ps(at), sum);
    return _mm512_fmadd_ps(odd, _mm512_loadu_ps(at + 16), sum);
#else
    const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
    const __m512 product = _mm512_mul_ps(wide, _mm512_loadu_ps(at));
    return _mm256_add_ps(sum, _mm256_add_ps(_mm512_castps512_ps256(product), _mm512_extractf32x8_ps(product, 1)));
#endif
}

INLINE float JOIN(across_, WIDTH)(FLOATS_ v)
{
#if WIDTH == 512
    return _mm512_reduce_add_ps(v);
#else
    return _mm512_reduce_add_ps(_mm512_insertf32x8(_mm512_setzero_ps(), v, 0));
#endif
}

/* Tokens token .. token + tokens - 1 of rows begin .. end - 1. A group's sum is scaled when it ends; two to four totals
   hide the time that this takes. `single`: a group is one block;
   `zeros`: there may be zero-points. */
INLINE void JOIN(dot_rows_, WIDTH)(const sparse *w, const tables *t, const request *p, int64_t begin, int64_t end,
                                   int64_t token, int floats, int tokens, int zeros, int single)
{
    const int chains = tokens == 1 ? 4 : 1;
    const int64_t size = floats ? 4 : 2, bytes = UNIT * BITS / 8, blocks = single ? 1 : w->blocks;
    const uint8_t *x = (const uint8_t *)p->x + token * p->stride * size, *block = w->codes;
    block += w->start[begin] * blocks * bytes;
    for (int64_t row = begin; row < end; row++) {
        FLOATS_ total[16][4];
        for (int m = 0; m < tokens; m++)
            for (int c = 0; c < chains; c++) total[m][c] = OP(setzero_ps)();
        const int64_t last = w->start[row + 1];
        for (int64_t first = w->start[row]; first < last; first += SOME) {
            const int64_t count = last - first < SOME ? last - first : SOME;
            float scales[SOME];
            int32_t places[SOME];
            widen(w, first, count, (int32_t)((single ? UNIT : w->padded) * size), scales, places);
#define GROUP_(i, chain)                                                                                              \
    {                                                                                                                 \
        const int zero = zeros && w->kind == INTEGER ? w->zero[first + (i)] : 0;                                                            \
        const uint16_t *low = t->low[zero & 15], *high = t->high[zero >> 4];                                          \
        const uint8_t *at = x + (int64_t)places[i] * tokens;                                                                            \
        const FLOATS_ scale = OP(set1_ps)(scales[i]);                                                                 \
        FLOATS_ sum[8];                                                                                               \
        for (int m = 0; m < tokens && !single; m++) sum[m] = OP(setzero_ps)();                                        \
        int64_t b = 0;                                                                                                \
        do {                                                                                                          \
            INTEGERS numbers[2];                                                                                      \
            JOIN(numbers_, WIDTH)(block, low, high, numbers);                                                         \
            _Pragma("GCC unroll 16") for (int m = 0; m < tokens; m++) {                                               \
                FLOATS_ all = single ? OP(setzero_ps)() : sum[m % 8];                                                 \
                _Pragma("GCC unroll 2") for (int n = 0; n < TERMS; n++)                                               \
                    all = JOIN(dot_, WIDTH)(all, numbers[n], at + m * UNIT * size, floats);                           \
                if (single) total[m][chain] = OP(fmadd_ps)(all, scale, total[m][chain]);                              \
                else sum[m % 8] = all;                                                                                \
            }                                                                                                         \
            block += bytes, at += UNIT * size * tokens;                                                               \
        } while (!single && ++b < blocks);                                                                            \
        _Pragma("GCC unroll 8") for (int m = 0; m < tokens && !single; m++)                                           \
            total[m][chain] = OP(fmadd_ps)(sum[m % 8], scale, total[m][chain]);                                       \
    }
            int64_t i = 0;
            for (; tokens == 1 && i + 4 <= count; i += 4) {
                for (int64_t ahead = 0; ahead < 4 * bytes; ahead += 64) _mm_prefetch(block + FETCHED + ahead, _MM_HINT_T0);
                GROUP_(i, 0)
                GROUP_(i + 1, 1 % chains)
                GROUP_(i + 2, 2 % chains)
                GROUP_(i + 3, 3 % chains)
            }
            for (; i < count; i++) {
                if (tokens > 1) _mm_prefetch(block + FETCHED, _MM_HINT_T0);
                GROUP_(i, 0)
            }
#undef GROUP_
        }
        for (int m = 0; m < tokens; m++) {
            for (int c = 1; c < chains; c++) total[m][0] = OP(add_ps)(total[m][0], total[m][c]);
            store_output(p, token + m, row, JOIN(across_, WIDTH)(total[m][0]));
        }
    }
}

static void JOIN(product_, WIDTH)(const sparse *w, const tables *t, const request *p, int64_t begin, int64_t end)
{
    const int zeros = w->kind == INTEGER, floats = IN_FLOATS(p->dtype), single = w->blocks == 1;
    (void)zeros, (void)single;
    for (int64_t token = 0; token < p->tokens;) {
        const int tokens = together(p->tokens - token, p->most);
#define ROWS_(call)                                                                                                   \
    for (int64_t i = 0, part = (end - begin + STREAMS - 1) / STREAMS; i < part; i++)                                  \
        for (int64_t row = begin + i; row < end; row += part) call
#define WITH_(f, n, z, s) ROWS_(JOIN(dot_rows_, WIDTH)(w, t, p, row, row + 1, token, f, n, z, s))
        if (floats && tokens == 4) WITH_(1, 4, 1, 0);
        else if (floats) WITH_(1, 1, 1, 0);
#if defined(__AVX512BF16__)
        else if (tokens == 16) WITH_(0, 16, 1, 1);
        else if (tokens == 8 && single) WITH_(0, 8, 1, 1);
        else if (tokens == 8) WITH_(0, 8, 1, 0);
        else if (tokens == 4 && single) WITH_(0, 4, 1, 1);
        else if (tokens == 4) WITH_(0, 4, 1, 0);
        else if (zeros && single) WITH_(0, 1, 1, 1);
        else if (zeros) WITH_(0, 1, 1, 0);
        else if (single) WITH_(0, 1, 0, 1);
        else WITH_(0, 1, 0, 0);
#endif
#undef WITH_
#undef ROWS_
        token += tokens;
    }
}

#undef OP
#undef INTEGERS
#undef FLOATS_
#undef PAIRS
#undef UNIT
