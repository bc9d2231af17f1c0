/* BF16 inputs and E4M3 weights taken as bf16(code * scale): the grouped output projection. The contract's sum
 * is one of doubles in lanes; here it is computed in integers, much faster, and the few outputs whose
 * rounding that leaves open are computed again as the contract says.
 *
 * In a block of 128 inputs whose largest magnitude is below 2^(q + 22), x = 2^q X + d with X an integer of at
 * most 2^22 in magnitude, three signed digits X = 65536 d2 + 256 d1 + d0, and |d| <= 2^(q - 1); d is zero
 * unless magnitudes in the block differ by more than 2^14. With a power of two as scale bf16(code * scale) is
 * code * scale, and the code is w = 8 (255 e1 + e0) + s in units of 2^-9 (vnni_fp8.h). So a block's sum of X
 * w is exact, six products of digits and what the few s give; it stays below 2^53.
 *
 * Proof. Let T be the sum of all x w in exact arithmetic, L the contract's value, D ours, u = 2^-53, K the
 * inputs and B = ceil(K / 128) the blocks. In block b every |x w| is at most 2^(q + 22) 448 scale, so the 128
 * of them are at most a = 2^(q + 22) 448 scale 128 together; let A be the sum of all a.
 *   |L - T| <= (K / 16 + 5) u A (1 + 2^-20): a lane adds at most K / 16 + 1 exact products one by one and the
 *              fold adds 4 times; no partial sum is greater than A.
 *   |D - T| <= (B + 1) u A (1 + 2^-20) + E: B exact block sums added one by one; E = what the d take away, at
 *              most 2^(q - 1) 448 scale 128 = a 2^-23 in each block that has a d.
 * Every value between D - e and D + e, e = the sum of both bounds, rounds to bf16 between what those two ends
 * round to, because rounding is monotone; if they round to the same bf16, so does L. e is computed with
 * (K / 16 + B + 16) u instead, whose surplus covers the roundings of e itself and of D - e and D + e. Codes
 * are compared, so that 0 and -0 differ; where all a are 0, D = 0 = L.
 *
 * Rows with an infinity, a NaN or a block of magnitudes below 2^-100 or so, outputs with a NaN weight, and
 * scales that are no powers of two or near the ends of their range are computed as the contract says at once.
 *
 * Bound: one row the memory; more the dot products, six for every four weights and row. */
#include <assert.h>

#include "kernels/cpu/vnni_fp8.h"

enum {
    WIDE_ROWS = CPU_ROWS, /* of a tile */
    WIDE_GROUP = 4,       /* rows multiplied together */
    WIDE_FUSED = 3,       /* rows, at most, for which columns are decoded while they are multiplied */
    WIDE_DIGITS = 3,
    WIDE_SUMS = 2 * WIDE_DIGITS,
    WIDE_BITS = 22,       /* of X */
    WIDE_LEAST = 27,      /* biased exponent of a block's largest magnitude from which on 2^-q is a float32 */
    WIDE_SCALE_LEAST = 9, /* scale bytes between which code * scale is a bf16 */
    WIDE_SCALE_MOST = 245,
};

/* One row of inputs and block. */
typedef struct wide_block {
    double scale;             /* 2^(q - 9) */
    double bound;             /* its part of e but for the weights' scale */
    int32_t sum[WIDE_DIGITS]; /* of d2, d1, d0 */
} wide_block;

/* A tile of rows and the outputs wanted of it. */
typedef struct wide_job {
    const cpu_rows *rows;
    const kn_matrix *w;
    uint32_t row0, n;
    uint8_t *digits;    /* [K / 4][n][WIDE_DIGITS dwords]: d2, d1, d0 */
    wide_block *blocks; /* [K / 128][n] */
    bool odd[WIDE_ROWS];
} wide_job;

typedef double wide_sums[VNNI_OUTS]; /* of a row, in the order of vnni_sums */

static const uint16_t *input_row(const wide_job *j, uint32_t r)
{
    return j->rows->x + (uint64_t)(j->row0 + r) * j->rows->x_stride;
}

/* ---- loading ---- */

static uint32_t largest_exponent(const uint16_t *x)
{
    uint16_t top = 0;
    for (uint32_t i = 0; i < CPU_CHUNK; i++) {
        uint16_t a = x[i] & 0x7fffu;
        top = a > top ? a : top;
    }
    return top == 0 ? 0 : top < 0x80 ? 1 : top >> 7;
}

/* Four columns: 16 inputs in units of 2^q. */
static void put_digits(const wide_job *j, wide_block *block, uint32_t column, uint32_t r, __m512i x)
{
    int8_t bytes[WIDE_DIGITS][16];
    for (int i = WIDE_DIGITS - 1; i >= 0; i--) {
        __m512i digit = i == 0 ? x : _mm512_srai_epi32(_mm512_slli_epi32(x, 24), 24);
        x = _mm512_srai_epi32(_mm512_sub_epi32(x, digit), 8);
        _mm_storeu_si128((__m128i *)(void *)bytes[i], _mm512_cvtepi32_epi8(digit));
        block->sum[i] += _mm512_reduce_add_epi32(digit);
    }
    for (uint32_t c = 0; c < 4; c++) {
        uint8_t *to = j->digits + ((uint64_t)(column + c) * j->n + r) * 4 * WIDE_DIGITS;
        for (int i = 0; i < WIDE_DIGITS; i++) {
            memcpy(to + 4 * i, bytes[i] + 4 * c, 4);
        }
    }
}

/* Block b of row r; false if it has no such form. */
static bool load_block(const wide_job *j, uint32_t r, uint32_t b, const uint16_t *x)
{
    wide_block *block = &j->blocks[(uint64_t)b * j->n + r];
    uint32_t top = largest_exponent(x), k = j->w->n_in;
    int32_t q = (int32_t)top - 127 + 1 - WIDE_BITS;
    bool in_range = top == 0 || (top >= WIDE_LEAST && top < 255), exact = true;
    float unit = in_range && top != 0 ? kn_exp2i(q) : 1, per_unit = in_range && top != 0 ? kn_exp2i(-q) : 1;
    double roundings = k / 16 + kn_blocks(k, CPU_CHUNK) + 16;
    *block = (wide_block){0};
    for (uint32_t at = 0; at < CPU_CHUNK && in_range; at += 16) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)(x + at)));
        __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
        __m512i units = _mm512_cvtps_epi32(_mm512_mul_ps(value, _mm512_set1_ps(per_unit)));
        __m512 back = _mm512_mul_ps(_mm512_cvtepi32_ps(units), _mm512_set1_ps(unit));
        exact = exact && _mm512_cmp_ps_mask(back, value, _CMP_NEQ_UQ) == 0;
        put_digits(j, block, b * FP8_COLUMNS + at / 4, r, units);
    }
    if (in_range && top != 0) {
        double most = (double)unit * (1 << WIDE_BITS) * 448.0 * CPU_CHUNK;
        block->scale = 0x1p-9 * (double)unit;
        block->bound = most * (roundings * 0x1p-53 + (exact ? 0 : 0x1p-23));
    }
    return in_range;
}

static void load_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    wide_job *j = arg;
    uint32_t k = j->w->n_in;
    (void)i_thread;
    for (uint32_t r = begin; r < end; r++) {
        j->odd[r] = false;
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

/* Adds a column's e1 d2, e1 d1, e1 d0, e0 d2, e0 d1, e0 d0 to the sums of n rows. */
INLINED void add_column(__m512i acc[WIDE_GROUP][WIDE_SUMS], __m512i e1, __m512i e0, const uint8_t *x,
                        const uint32_t n)
{
    for (uint32_t r = 0; r < n; r++, x += 4 * WIDE_DIGITS) {
        for (int i = 0; i < WIDE_DIGITS; i++) {
            acc[r][i] = dot(acc[r][i], e1, x + 4 * i);
            acc[r][WIDE_DIGITS + i] = dot(acc[r][WIDE_DIGITS + i], e0, x + 4 * i);
        }
    }
}

/* For rows row0 .. row0 + n - 1 and a block: sums_out[r][i] = the sum of (255 e1 + e0) d, d2 first. */
INLINED void main_sums(const fp8_weights *w, const wide_job *j, uint32_t b, uint32_t row0,
                       __m512i sums_out[WIDE_GROUP][WIDE_DIGITS], const uint32_t n, const bool decoded)
{
    const wide_block *block = j->blocks + (uint64_t)b * j->n + row0;
    const uint8_t *x = j->digits + ((uint64_t)b * FP8_COLUMNS * j->n + row0) * 4 * WIDE_DIGITS;
    fp8_tables tables = load_tables();
    __m512i acc[WIDE_GROUP][WIDE_SUMS];
    for (uint32_t r = 0; r < n; r++) {
        for (int i = 0; i < WIDE_DIGITS; i++) {
            acc[r][i] = acc[r][WIDE_DIGITS + i] = _mm512_set1_epi32(-FP8_BIAS * block[r].sum[i]);
        }
    }
    for (uint32_t c = 0; c < FP8_COLUMNS; c++, x += (uint64_t)j->n * 4 * WIDE_DIGITS) {
        if (decoded) {
            add_column(acc, w->e1[c], w->e0[c], x, n);
        } else {
            ask_ahead(&w->codes[c]);
            add_column(acc, weight_digit(&tables, w->codes[c], 0), weight_digit(&tables, w->codes[c], 1), x,
                       n);
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        for (int i = 0; i < WIDE_DIGITS; i++) {
            __m512i high = acc[r][i];
            sums_out[r][i] =
                _mm512_add_epi32(_mm512_sub_epi32(_mm512_slli_epi32(high, 8), high), acc[r][WIDE_DIGITS + i]);
        }
    }
}

/* Input `input` of block b and row r, in units of 2^q. */
static int32_t input_units(const wide_job *j, uint32_t b, uint32_t r, uint32_t input)
{
    const int8_t *d = (const int8_t *)j->digits +
                      ((uint64_t)(b * FP8_COLUMNS + input / 4) * j->n + r) * 4 * WIDE_DIGITS + input % 4;
    return 65536 * d[0] + 256 * d[4] + d[8];
}

/* Adds a block of row r to its sums. */
static void add_block(const fp8_weights *w, const wide_job *j, uint32_t b, uint32_t r,
                      const __m512i sums[WIDE_DIGITS], double w_scale, wide_sums acc)
{
    const __m512d scale = _mm512_set1_pd(j->blocks[(uint64_t)b * j->n + r].scale * w_scale);
    __m512d rest[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    for (const fp8_rest *at = w->rest; at < w->rest + w->n_rest; at++) {
        int half = at->out % 4 / 2;
        __m512d term = _mm512_set1_pd((double)at->s * input_units(j, b, r, at->input));
        rest[half] = _mm512_mask_add_pd(rest[half], (__mmask8)(1u << (at->out / 4 * 2 + at->out % 2)),
                                        rest[half], term);
    }
    for (int half = 0; half < 2; half++) {
        __m512d sum = joined(sums[0], 256, sums[1], half);
        sum = _mm512_fmadd_pd(sum, _mm512_set1_pd(256), to_double(sums[2], half));
        sum = _mm512_fmadd_pd(sum, _mm512_set1_pd(8), rest[half]);
        _mm512_storeu_pd(acc + 8 * half,
                         _mm512_fmadd_pd(sum, scale, _mm512_loadu_pd(acc + 8 * half))); /* product exact */
    }
}

#define ROWS(n_, decoded_)                                                                                   \
    case n_:                                                                                                 \
        main_sums(w, j, b, row0, sums, n_, decoded_);                                                        \
        break;

static void block_sums(fp8_weights *w, const wide_job *j, uint32_t b, double w_scale, wide_sums *acc)
{
    __m512i sums[WIDE_GROUP][WIDE_DIGITS];
    uint32_t row0 = 0;
    if (j->n <= WIDE_FUSED) {
        switch (j->n) {
            ROWS(1, false)
            ROWS(2, false)
            ROWS(3, false)
        }
        for (uint32_t r = 0; r < j->n; r++) {
            add_block(w, j, b, r, sums[r], w_scale, acc[r]);
        }
        return;
    }
    decode_columns(w);
    for (; row0 < j->n; row0 += WIDE_GROUP) {
        uint32_t n = j->n - row0 < WIDE_GROUP ? j->n - row0 : WIDE_GROUP;
        switch (n) {
            ROWS(1, true)
            ROWS(2, true)
            ROWS(3, true)
            ROWS(4, true)
        }
        for (uint32_t r = 0; r < n; r++) {
            add_block(w, j, b, row0 + r, sums[r], w_scale, acc[row0 + r]);
        }
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

static void tile_outputs(const wide_job *j, uint32_t o)
{
    uint16_t nan[VNNI_OUTS] = {0};
    fp8_weights weights;
    wide_sums acc[WIDE_ROWS];
    double bound[WIDE_ROWS] = {0};
    bool plain = scales_are_plain(j->w, o);
    memset(acc, 0, j->n * sizeof(acc[0]));
    for (uint32_t b = 0; b < kn_blocks(j->w->n_in, CPU_CHUNK) && plain; b++) {
        double scale = e4m3_scale(j->w, o, b);
        read_weights(j->w, o, b, &weights);
        find_rests(&weights, nan);
        block_sums(&weights, j, b, scale, acc);
        for (uint32_t r = 0; r < j->n; r++) {
            bound[r] += j->blocks[(uint64_t)b * j->n + r].bound * scale;
        }
    }
    for (uint32_t r = 0; r < j->n; r++) {
        put_row(j, r, o, plain && !j->odd[r] ? acc[r] : NULL, bound[r], nan);
    }
}

static void outputs_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const wide_job *j = arg;
    uint32_t first = j->rows->out0 / VNNI_OUTS;
    (void)i_thread;
    for (uint32_t i = begin; i < end; i++) {
        tile_outputs(j, (first + i) * VNNI_OUTS);
    }
}

void KN_FN(kn_cpu_scaled_product)(kn_team *team, void *scratch, const cpu_rows *rows, const kn_matrix *w)
{
    uint64_t wide = cpu_round_up(w->n_in, CPU_CHUNK);
    uint32_t n_tile = kn_blocks(rows->out0 % VNNI_OUTS + rows->n_out, VNNI_OUTS);
    static_assert(WIDE_ROWS * (WIDE_DIGITS + sizeof(wide_block) / CPU_CHUNK + 1) <= CPU_X_BYTES, "scratch");
    for (uint32_t row0 = 0; row0 < rows->n; row0 += WIDE_ROWS) {
        uint32_t n = rows->n - row0 < WIDE_ROWS ? rows->n - row0 : WIDE_ROWS;
        uint8_t *digits = scratch;
        wide_job job = {.rows = rows,
                        .w = w,
                        .row0 = row0,
                        .n = n,
                        .digits = digits,
                        .blocks = (wide_block *)(void *)(digits + wide * n * WIDE_DIGITS)};
        kn_team_run(team, n, 4ull * w->n_in, load_part, &job);
        kn_team_run(team, n_tile, (uint64_t)VNNI_OUTS * w->n_in * n, outputs_part, &job);
    }
}
