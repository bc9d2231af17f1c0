/* BF16 inputs and E4M3 weights taken as bf16(code * scale): the grouped output projection. The contract's sum
 * is one of doubles in lanes; here it is computed in integers, much faster, and the few outputs whose
 * rounding that leaves open are computed again as the contract says.
 *
 * In a block of 128 inputs x = 2^q X + d with X an integer, |X| <= 2^24, X = 1024 D1 + D0, -512 <= D0 < 512,
 * and |d| <= 2^(q - 1). q is the least for which all |x| < 2^(q + 24) and the sum of them is less than 2^(q +
 * 26); d is zero unless magnitudes in the block differ by more than 2^13 or so. With a power of two as scale
 * bf16(code
 * * scale) is code * scale, and the code is 8 W + s in units of 2^-9 (vnni_fp8.h). So a block's sum of X w is
 * exact, two products of 16 bits and what the few s give:
 *   sum(D1 W): |D1| <= (|X| + 512) / 1024 < 2^15, and 128 of them add up to 2^16 + 65 < FP8_INPUTS_MAX at
 * most; sum(D0 W): 128 512 28672 < 2^31; sum(X s) < (2^16 + 65) 1024 7 + 128 512 7 < 2^30; the whole stays
 * below 2^53.
 *
 * Proof. Let T be the sum of all x w in exact arithmetic, L the contract's value, D ours, u = 2^-53, K the
 * inputs and B = ceil(K / 128) the blocks. In block b the |x w| are at most a = 448 scale sum(|x|) together;
 * let A be the sum of all a. |L - T| <= (K / 16 + 5) u A (1 + 2^-20): a lane adds at most K / 16 + 1 exact
 * products one by one and the fold adds 4 times; no partial sum is greater than A. |D - T| <= (B + 1) u A (1
 * + 2^-20) + E: B exact block sums added one by one; E = what the d take away, at most 448 scale sum(|d|) in
 * each block. Every value between D - e and D + e, e = the sum of both bounds, rounds to bf16 between what
 * those two ends round to, because rounding is monotone; if they round to the same bf16, so does L. e is
 * computed with (K / 16 + B + 16) u instead, whose surplus covers the roundings of e itself and of D - e and
 * D + e, and 2^-18 of it more, since sum(|x|) and sum(|d|) are of float32: 8 additions in each of 16 lanes
 * and 4 of those. Codes are compared, so that 0 and -0 differ; where all a are 0, D = 0 = L.
 *
 * Rows with an infinity, a NaN or a block of magnitudes below 2^-100 or so, outputs with a NaN weight, and
 * scales that are no powers of two or near the ends of their range are computed as the contract says at once.
 *
 * Bound: one row the memory; more vpdpwssd, two for every two weights and row. */
#include <assert.h>
#include <math.h>

#include "kernels/cpu/vnni_fp8.h"

enum {
    WIDE_ROWS = CPU_ROWS, /* of a tile */
    WIDE_GROUP = 4,       /* rows multiplied together */
    WIDE_FEW = 4,         /* rows, at most, for which columns are decoded while they are multiplied */
    WIDE_DIGITS = 2,
    WIDE_BITS = 24,       /* of X */
    WIDE_SUM_BITS = 26,   /* of all |X| of a block */
    WIDE_LOW_BITS = 10,   /* of D0 */
    WIDE_LEAST = -126,    /* q for which 2^q and 2^-q are float32 */
    WIDE_SCALE_LEAST = 9, /* scale bytes between which code * scale is a bf16 */
    WIDE_SCALE_MOST = 245,
};

/* One row of inputs and block. */
typedef struct wide_block {
    double scale; /* 2^(q - 9) */
    double bound; /* its part of e but for the weights' scale */
} wide_block;

/* A tile of rows and the outputs wanted of it. */
typedef struct wide_job {
    const cpu_rows *rows;
    const kn_matrix *w;
    uint32_t row0, n;
    uint32_t *digits;   /* [K / 4][n][WIDE_DIGITS][2]: D1, D0, of the pairs of a column */
    wide_block *blocks; /* [K / 128][n] */
    bool odd[WIDE_ROWS];
} wide_job;

/* Sums of digits of a row with one tile of outputs, plus 2^31. */
typedef struct wide_digits {
    __m512i of[WIDE_DIGITS];
} wide_digits;

typedef double wide_sums[VNNI_OUTS]; /* of a row, in the order of vnni_sums */

static const uint16_t *input_row(const wide_job *j, uint32_t r)
{
    return j->rows->x + (uint64_t)(j->row0 + r) * j->rows->x_stride;
}

/* Digits of column c of block b and row `row`; next column: 2 WIDE_DIGITS n pairs on. */
INLINED uint32_t *digits_at(const wide_job *j, uint32_t b, uint32_t c, uint32_t row)
{
    return j->digits + (((uint64_t)b * FP8_COLUMNS + c) * j->n + row) * (2 * WIDE_DIGITS);
}

/* ---- loading ---- */

static __m512 floats_at(const uint16_t *x)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* The least e with x < 2^e; x >= 0. */
static int32_t exponent_above(float x)
{
    return (int32_t)(kn_f32_bits(x) >> 23) - 126;
}

/* q of a block; magnitudes: what all and the largest of them are. */
static int32_t unit_exponent(const uint16_t *x, float *sum_out, float *largest_out)
{
    __m512 sum = _mm512_setzero_ps(), most = sum;
    for (uint32_t at = 0; at < CPU_CHUNK; at += 16) {
        __m512 size = _mm512_abs_ps(floats_at(x + at));
        sum = _mm512_add_ps(sum, size);
        most = _mm512_max_ps(size, most);
    }
    *sum_out = _mm512_reduce_add_ps(sum);
    *largest_out = _mm512_reduce_max_ps(most);
    int32_t by_sum = exponent_above(*sum_out) - WIDE_SUM_BITS,
            by_most = exponent_above(*largest_out) - WIDE_BITS;
    return by_sum > by_most ? by_sum : by_most;
}

/* Four columns: 16 inputs in units of 2^q. */
static void put_digits(const wide_job *j, uint32_t b, uint32_t c, uint32_t r, __m512i x)
{
    __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(x, 32 - WIDE_LOW_BITS), 32 - WIDE_LOW_BITS);
    __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(x, low), WIDE_LOW_BITS);
    __m512i digits = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(high)),
                                        _mm512_cvtepi32_epi16(low), 1);
    /* words of a column and digit in the order 0 2 1 3, then the low digit of a column beside the high one */
    digits = _mm512_shufflelo_epi16(_mm512_shufflehi_epi16(digits, 0xd8), 0xd8);
    digits = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), digits);
    int64_t columns[8];
    _mm512_storeu_si512(columns, digits);
    for (uint32_t i = 0; i < 4; i++) {
        memcpy(digits_at(j, b, c + i, r), &columns[2 * i], 2 * sizeof(columns[0]));
    }
}

/* Block b of row r; false if it has no such form. */
static bool load_block(const wide_job *j, uint32_t r, uint32_t b, const uint16_t *x)
{
    wide_block *block = &j->blocks[(uint64_t)b * j->n + r];
    uint32_t k = j->w->n_in;
    float sum, most;
    int32_t q = unit_exponent(x, &sum, &most);
    bool zero = most == 0, in_range = zero || (q >= WIDE_LEAST && sum < INFINITY);
    __m512 unit = _mm512_set1_ps(in_range && !zero ? kn_exp2i(q) : 1),
           per_unit = _mm512_set1_ps(in_range && !zero ? kn_exp2i(-q) : 1), left = _mm512_setzero_ps();
    *block = (wide_block){0};
    for (uint32_t at = 0; at < CPU_CHUNK && in_range; at += 16) {
        __m512 value = floats_at(x + at);
        __m512i units = _mm512_cvtps_epi32(_mm512_mul_ps(value, per_unit));
        __m512 back = _mm512_mul_ps(_mm512_cvtepi32_ps(units), unit);
        left = _mm512_add_ps(left, _mm512_abs_ps(_mm512_sub_ps(value, back)));
        put_digits(j, b, at / 4, r, units);
    }
    if (in_range && !zero) {
        double roundings = k / 16 + kn_blocks(k, CPU_CHUNK) + 16;
        block->scale = 0x1p-9 * (double)kn_exp2i(q);
        block->bound =
            448.0 * (1 + 0x1p-18) * (roundings * 0x1p-53 * (double)sum + (double)_mm512_reduce_add_ps(left));
    }
    return in_range;
}

static void load_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    wide_job *j = arg;
    uint32_t k = j->w->n_in;
    (void)i_thread;
    for (uint32_t r = begin; r < end; r++) {
        for (uint32_t at = 0, b = 0; at < k; at += CPU_CHUNK, b++) {
            uint8_t spare[2 * CPU_CHUNK];
            const void *x = chunk_bytes(input_row(j, r), 2 * at, 2 * chunk_len(k, at), 2 * CPU_CHUNK, spare);
            if (!load_block(j, r, b, x)) {
                j->odd[r] = true;
            }
        }
    }
}

/* ---- products ---- */

/* What the s of the weights add: 1024 sum(D1 s) + sum(D0 s), plus 2^31. */
INLINED __m512i rest_sum(const fp8_weights *w, const wide_job *j, uint32_t b, uint32_t r)
{
    __m512i sum[WIDE_DIGITS] = {_mm512_setzero_si512(), _mm512_set1_epi32(INT32_MIN)};
    for (uint32_t i = 0; i < w->n_rest; i++) {
        const uint32_t *x = digits_at(j, b, w->rest_of[i] / 2, r) + w->rest_of[i] % 2;
        for (uint32_t d = 0; d < WIDE_DIGITS; d++) {
            sum[d] = dot(sum[d], w->rests[i], x[2 * d]);
        }
    }
    return _mm512_add_epi32(_mm512_slli_epi32(sum[0], WIDE_LOW_BITS), sum[1]);
}

/* Adds a block of row r to its sums. */
INLINED void add_block(const fp8_weights *w, const wide_job *j, uint32_t b, uint32_t r,
                       const wide_digits *sums, double w_scale, wide_sums acc)
{
    const __m512d scale = _mm512_set1_pd(j->blocks[(uint64_t)b * j->n + r].scale * w_scale);
    __m512i rest = rest_sum(w, j, b, r);
    for (int half = 0; half < 2; half++) {
        __m512d sum = _mm512_fmadd_pd(to_double(sums->of[0], half), _mm512_set1_pd(1 << WIDE_LOW_BITS),
                                      to_double(sums->of[1], half));
        sum = _mm512_fmadd_pd(sum, _mm512_set1_pd(8), to_double(rest, half));
        _mm512_storeu_pd(acc + 8 * half,
                         _mm512_fmadd_pd(sum, scale, _mm512_loadu_pd(acc + 8 * half))); /* product exact */
    }
}

/* A pair of tiles; the first one twice where there is no second. */
typedef struct wide_tiles {
    fp8_weights w[FP8_TILES];
    uint32_t out[FP8_TILES]; /* first outputs */
    bool plain[FP8_TILES];   /* scales_are_plain */
    uint16_t nan[FP8_TILES][VNNI_OUTS];
    double bound[FP8_TILES][WIDE_ROWS];
    wide_sums acc[FP8_TILES][WIDE_ROWS];
} wide_tiles;

/* Rows row0 .. row0 + n - 1 with both tiles, decoded. */
INLINED void multiply(wide_tiles *t, const wide_job *j, uint32_t b, uint32_t row0, const double *w_scale,
                      const uint32_t n)
{
    const uint32_t *x = digits_at(j, b, 0, row0);
    wide_digits sum[FP8_TILES][WIDE_GROUP];
    for (uint32_t k = 0; k < FP8_TILES; k++) {
        for (uint32_t r = 0; r < n; r++) {
            sum[k][r].of[0] = sum[k][r].of[1] = _mm512_set1_epi32(INT32_MIN);
        }
    }
    for (uint32_t c = 0; c < FP8_COLUMNS; c++, x += (uint64_t)j->n * 2 * WIDE_DIGITS) {
        for (uint32_t i = 0; i < 2; i++) {
            __m512i w0 = t->w[0].pairs[2 * c + i], w1 = t->w[1].pairs[2 * c + i];
            for (uint32_t r = 0; r < n; r++) {
                for (uint32_t d = 0; d < WIDE_DIGITS; d++) {
                    uint32_t pair = x[2 * WIDE_DIGITS * r + 2 * d + i];
                    sum[0][r].of[d] = dot(sum[0][r].of[d], w0, pair);
                    sum[1][r].of[d] = dot(sum[1][r].of[d], w1, pair);
                }
            }
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        for (uint32_t k = 0; k < FP8_TILES; k++) {
            add_block(&t->w[k], j, b, row0 + r, &sum[k][r], w_scale[k], t->acc[k][row0 + r]);
        }
    }
}

/* All n rows of a tile that has few, and one tile of outputs. Pairs have sums of their own, so that one row
 * need not wait for its last product. */
INLINED void multiply_few(const fp8_weights *w, const wide_job *j, uint32_t b, double w_scale, wide_sums *acc,
                          const uint32_t n)
{
    const uint32_t *x = digits_at(j, b, 0, 0);
    fp8_tables tables = load_tables();
    __m512i sum[2][WIDE_FEW][WIDE_DIGITS];
    for (uint32_t r = 0; r < n; r++) {
        for (uint32_t d = 0; d < WIDE_DIGITS; d++) {
            sum[0][r][d] = _mm512_set1_epi32(INT32_MIN);
            sum[1][r][d] = _mm512_setzero_si512();
        }
    }
    for (uint32_t c = 0; c < FP8_COLUMNS; c++, x += n * 2 * WIDE_DIGITS) {
        fp8_column column = decode_column(&tables, w->codes[c]);
        ask_ahead(&w->codes[c]);
        for (uint32_t i = 0; i < 2; i++) {
            for (uint32_t r = 0; r < n; r++) {
                for (uint32_t d = 0; d < WIDE_DIGITS; d++) {
                    sum[i][r][d] = dot(sum[i][r][d], column.pair[i], x[2 * WIDE_DIGITS * r + 2 * d + i]);
                }
            }
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        wide_digits both = {
            {_mm512_add_epi32(sum[0][r][0], sum[1][r][0]), _mm512_add_epi32(sum[0][r][1], sum[1][r][1])}};
        add_block(w, j, b, r, &both, w_scale, acc[r]);
    }
}

#define ROWS(n_)                                                                                             \
    case n_:                                                                                                 \
        multiply(t, j, b, row0, w_scale, n_);                                                                \
        break;
#define FEW(n_)                                                                                              \
    case n_:                                                                                                 \
        multiply_few(&t->w[k], j, b, w_scale, t->acc[k], n_);                                                \
        break;

APART void many_rows(wide_tiles *t, const wide_job *j, uint32_t b, const double *w_scale)
{
    for (uint32_t row0 = 0; row0 < j->n; row0 += WIDE_GROUP) {
        switch (j->n - row0 < WIDE_GROUP ? j->n - row0 : WIDE_GROUP) {
            ROWS(1)
            ROWS(2)
            ROWS(3)
            ROWS(4)
        }
    }
}

APART void few_rows(wide_tiles *t, const wide_job *j, uint32_t b, uint32_t k, double w_scale)
{
    switch (j->n) {
        FEW(1)
        FEW(2)
        FEW(3)
        FEW(4)
    }
}

/* Reads block b of tile k; returns its scale. */
static double open_block(wide_tiles *t, const wide_job *j, uint32_t b, uint32_t k)
{
    double scale = t->plain[k] ? e4m3_scale(j->w, t->out[k], b) : 0;
    read_weights(j->w, t->out[k], b, &t->w[k]);
    find_rests(&t->w[k], t->nan[k]);
    for (uint32_t r = 0; r < j->n; r++) {
        t->bound[k][r] += j->blocks[(uint64_t)b * j->n + r].bound * scale;
    }
    return scale;
}

/* One tile after the other: weights come in the order in which they stand. */
static void few_sums(wide_tiles *t, const wide_job *j)
{
    for (uint32_t k = 0; k < FP8_TILES; k++) {
        for (uint32_t b = 0; b < kn_blocks(j->w->n_in, CPU_CHUNK) && t->plain[k]; b++) {
            few_rows(t, j, b, k, open_block(t, j, b, k));
        }
    }
}

static void many_sums(wide_tiles *t, const wide_job *j)
{
    for (uint32_t b = 0; b < kn_blocks(j->w->n_in, CPU_CHUNK) && (t->plain[0] || t->plain[1]); b++) {
        double w_scale[FP8_TILES];
        for (uint32_t k = 0; k < FP8_TILES; k++) {
            w_scale[k] = open_block(t, j, b, k);
            decode_columns(&t->w[k]);
        }
        many_rows(t, j, b, w_scale);
    }
}

/* ---- what the contract says ---- */

/* Codes at .. at + CPU_CHUNK - 1 of output o, zeros past n_in. */
static void read_codes(const kn_matrix *m, uint32_t o, uint32_t at, uint8_t codes_out[CPU_CHUNK])
{
    if (m->prepared) {
        uint64_t block = (uint64_t)(o / VNNI_OUTS) * kn_blocks(m->n_in, CPU_CHUNK) + at / CPU_CHUNK;
        const uint8_t *columns = (const uint8_t *)kn_host(m->data) + block * FP8_COLUMNS * sizeof(__m512i);
        for (uint32_t c = 0; c < FP8_COLUMNS; c++) {
            memcpy(codes_out + 4 * c, columns + c * sizeof(__m512i) + o % VNNI_OUTS * 4, 4);
        }
    } else {
        const uint8_t *row = (const uint8_t *)kn_host(m->data) + (uint64_t)o * m->n_in;
        memset(codes_out, 0, CPU_CHUNK);
        memcpy(codes_out, row + at, chunk_len(m->n_in, at));
    }
}

/* In loops of their own, so that they become vector code. */
APART void decode_weights(const uint8_t *codes, float scale, double *out)
{
    for (int i = 0; i < CPU_CHUNK; i++) {
        out[i] = kn_bf16_decode(kn_bf16_encode(kn_e4m3_decode(codes[i]) * scale));
    }
}

/* Output o of row r by its lane sum. */
static uint16_t contract_output(const wide_job *j, uint32_t r, uint32_t o)
{
    const uint16_t *row = input_row(j, r);
    double lane[KN_LANES] = {0};
    for (uint32_t at = 0; at < j->w->n_in; at += CPU_CHUNK) {
        float scale = (float)e4m3_scale(j->w, o, at / CPU_CHUNK);
        double x[CPU_CHUNK], weight[CPU_CHUNK];
        uint8_t codes[CPU_CHUNK];
        read_codes(j->w, o, at, codes);
        decode_weights(codes, scale, weight);
        KN_FN(kn_cpu_widen_bf16)(row + at, chunk_len(j->w->n_in, at), x);
        kn_lanes_add(lane, x, weight, CPU_CHUNK);
    }
    return kn_bf16_from_f64(kn_fold_lanes(lane));
}

/* ---- outputs ---- */

/* Whether bf16(code * scale) is code * scale for all codes of the outputs at o. */
static bool scales_are_plain(const kn_matrix *w, uint32_t o)
{
    uint32_t n = kn_blocks(w->n_in, KN_ACT_BLOCK);
    const uint8_t *scales = (const uint8_t *)kn_host(w->scale) + (uint64_t)(o / KN_ACT_BLOCK) * n;
    bool plain = w->scale_dtype == KN_E8M0;
    for (uint32_t b = 0; b < n && plain; b++) {
        plain = scales[b] >= WIDE_SCALE_LEAST && scales[b] <= WIDE_SCALE_MOST;
    }
    return plain;
}

/* What both ends of the interval around each sum round to. */
APART void round_ends(const double *sums, double bound, uint16_t low_out[VNNI_OUTS],
                      uint16_t high_out[VNNI_OUTS])
{
    __m512d first = _mm512_loadu_pd(sums), second = _mm512_loadu_pd(sums + 8), by = _mm512_set1_pd(bound);
    _mm256_storeu_si256((__m256i *)(void *)low_out,
                        vnni_bf16_of(_mm512_sub_pd(first, by), _mm512_sub_pd(second, by)));
    _mm256_storeu_si256((__m256i *)(void *)high_out,
                        vnni_bf16_of(_mm512_add_pd(first, by), _mm512_add_pd(second, by)));
}

/* Outputs o .. o + 15 of row r, as far as they are wanted; sums NULL: all as the contract says. */
static void put_row(const wide_job *j, uint32_t r, uint32_t o, const double *sums, double bound,
                    const uint16_t nan[VNNI_OUTS])
{
    const cpu_rows *rows = j->rows;
    uint16_t *y = rows->y + (uint64_t)(j->row0 + r) * rows->y_stride, low[VNNI_OUTS] = {0},
             high[VNNI_OUTS] = {0};
    if (sums != NULL) {
        round_ends(sums, bound, low, high);
    }
    for (uint32_t i = 0; i < VNNI_OUTS; i++) {
        uint32_t at = o + i - rows->out0; /* far beyond n_out if before out0 */
        bool certain = sums != NULL && low[i] == high[i] && nan[i] == 0;
        if (at < rows->n_out) {
            y[at] = certain ? low[i] : contract_output(j, r, o + i);
        }
    }
}

/* The pair of tiles from o on. */
static void tiles_outputs(const wide_job *j, uint32_t o)
{
    wide_tiles t;
    uint32_t end = j->rows->out0 + j->rows->n_out;
    memset(t.nan, 0, sizeof(t.nan));
    memset(t.bound, 0, sizeof(t.bound));
    for (uint32_t k = 0; k < FP8_TILES; k++) {
        t.out[k] = o + k * VNNI_OUTS < end ? o + k * VNNI_OUTS : o;
        t.plain[k] = scales_are_plain(j->w, t.out[k]);
        memset(t.acc[k], 0, j->n * sizeof(t.acc[k][0]));
    }
    if (j->n <= WIDE_FEW) {
        few_sums(&t, j);
    } else {
        many_sums(&t, j);
    }
    for (uint32_t k = 0; k < FP8_TILES && o + k * VNNI_OUTS < end; k++) {
        for (uint32_t r = 0; r < j->n; r++) {
            put_row(j, r, t.out[k], t.plain[k] && !j->odd[r] ? t.acc[k][r] : NULL, t.bound[k][r], t.nan[k]);
        }
    }
}

static void outputs_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const wide_job *j = arg;
    uint32_t first = j->rows->out0 / VNNI_OUTS * VNNI_OUTS;
    (void)i_thread;
    for (uint32_t i = begin; i < end; i++) {
        tiles_outputs(j, first + i * FP8_OUTS);
    }
}

void KN_FN(kn_cpu_scaled_product)(kn_team *team, void *scratch, const cpu_rows *rows, const kn_matrix *w)
{
    uint64_t wide = cpu_round_up(w->n_in, CPU_CHUNK);
    uint32_t n_pair = kn_blocks(rows->out0 % VNNI_OUTS + rows->n_out, FP8_OUTS);
    static_assert(WIDE_ROWS * (WIDE_DIGITS * sizeof(int16_t) + sizeof(wide_block) / CPU_CHUNK + 1) <=
                      CPU_X_BYTES,
                  "scratch");
    for (uint32_t row0 = 0; row0 < rows->n; row0 += WIDE_ROWS) {
        uint32_t n = rows->n - row0 < WIDE_ROWS ? rows->n - row0 : WIDE_ROWS;
        uint32_t *digits = scratch;
        wide_job job = {.rows = rows,
                        .w = w,
                        .row0 = row0,
                        .n = n,
                        .digits = digits,
                        .blocks = (wide_block *)(void *)(digits + wide / 2 * n * WIDE_DIGITS)};
        kn_team_run(team, n, 4ull * w->n_in, load_part, &job);
        kn_team_run(team, n_pair, (uint64_t)FP8_OUTS * w->n_in * n, outputs_part, &job);
    }
}
