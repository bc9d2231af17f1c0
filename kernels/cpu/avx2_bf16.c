/* BF16 inputs and E4M3 weights taken as bf16(code * scale): the grouped output projection. The contract's sum
 * is one of doubles in lanes; here it is computed in integers, and the few outputs whose rounding that leaves
 * open are computed again as the contract says.
 *
 * In a block of 128 inputs whose largest magnitude is below 2^(q + 27), x = 2^q X + d with X an integer of at
 * most 2^27 in magnitude, two signed digits X = 32768 d1 + d0 of 16 bits, and |d| <= 2^(q - 1); d is zero
 * unless magnitudes in the block differ by more than 2^19. With a power of two as scale bf16(code * scale) is
 * code * scale, and the code is w = 8 (64 a + b) + s in units of 2^-9 (avx2_fp8.h). So a block's sum of X w
 * is exact: the digits are two rows of the FP8 products, and s adds a few; it stays below 2^52.
 *
 * Proof. Let T be the sum of all x w in exact arithmetic, L the contract's value, D ours, u = 2^-53, K the
 * inputs and B = ceil(K / 128) the blocks. In block b every |x w| is at most 2^(q + 27) 448 scale, so the 128
 * of them are at most a = 2^(q + 27) 448 scale 128 together; let A be the sum of all a.
 *   |L - T| <= (K / 16 + 5) u A (1 + 2^-20): a lane adds at most K / 16 + 1 exact products one by one and the
 *              fold adds 4 times; no partial sum is greater than A.
 *   |D - T| <= (B + 1) u A (1 + 2^-20) + E: B exact block sums added one by one; E = what the d take away, at
 *              most 2^(q - 1) 448 scale 128 = a 2^-28 in each block that has a d.
 * Every value between D - e and D + e, e = the sum of both bounds, rounds to bf16 between what those two ends
 * round to, because rounding is monotone; if they round to the same bf16, so does L. e is computed with
 * (K / 16 + B + 16) u instead, whose surplus covers the roundings of e itself and of D - e and D + e. Codes
 * are compared, so that 0 and -0 differ; where all a are 0, D = 0 = L.
 *
 * Rows with an infinity, a NaN or a block of magnitudes below 2^-95 or so, outputs with a NaN weight, and
 * scales that are no powers of two or near the ends of their range are computed as the contract says at once.
 *
 * Bound: the products, four vpmaddwd and their additions for a row and 16 weights; for one row the decoding
 * beside them. */
#include <assert.h>

#include "kernels/cpu/avx2_fp8.h"

enum {
    WIDE_DIGITS = 2,
    WIDE_ROWS = CPU_ROWS / 2,              /* of a tile: what the scratch holds */
    WIDE_GROUP = AVX2_GROUP / WIDE_DIGITS, /* rows multiplied together */
    WIDE_FUSED = FP8_FUSED / WIDE_DIGITS,  /* rows, at most, for which columns are decoded in passing */
    WIDE_BITS = 27,                        /* of X */
    WIDE_DIGIT_BITS = 15,
    WIDE_LEAST = 32,      /* biased exponent of a block's largest magnitude from which on 2^-q is a float32 */
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
    uint8_t *digits;    /* of each group of rows [K / 4][2][rows][WIDE_DIGITS dwords]: d1, d0 */
    wide_block *blocks; /* [K / 128][n] */
    bool odd[WIDE_ROWS];
} wide_job;

static const uint16_t *input_row(const wide_job *j, uint32_t r)
{
    return j->rows->x + (uint64_t)(j->row0 + r) * j->rows->x_stride;
}

/* Rows of the group that row r is in, and its digits of block b. */
static uint32_t group_size(const wide_job *j, uint32_t r)
{
    uint32_t row0 = r / WIDE_GROUP * WIDE_GROUP;
    return j->n - row0 < WIDE_GROUP ? j->n - row0 : WIDE_GROUP;
}

static uint8_t *group_digits(const wide_job *j, uint32_t r, uint32_t b)
{
    uint64_t wide = cpu_round_up(j->w->n_in, CPU_CHUNK), row0 = r / WIDE_GROUP * WIDE_GROUP;
    return j->digits + 2 * WIDE_DIGITS * (wide * row0 + (uint64_t)b * CPU_CHUNK * group_size(j, r));
}

/* Where digit d1 of an input of block b and row r stands; d0 four bytes on. */
static uint8_t *digit_at(const wide_job *j, uint32_t b, uint32_t r, uint32_t input)
{
    uint32_t n = group_size(j, r), dword = input / 4 * 2 + input % 2;
    return group_digits(j, r, b) + 4ull * WIDE_DIGITS * (dword * n + r % WIDE_GROUP) + input % 4 / 2 * 2;
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

/* Inputs in units of 2^q; whether all of them are whole numbers of it. */
APART bool in_units(const uint16_t *x, float unit, float per_unit, int32_t *units_out)
{
    uint32_t differ = 0;
    for (uint32_t i = 0; i < CPU_CHUNK; i += AVX2_HALF) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(x + i)));
        __m256 value = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
        __m256i units = _mm256_cvtps_epi32(_mm256_mul_ps(value, _mm256_set1_ps(per_unit)));
        __m256 back = _mm256_mul_ps(_mm256_cvtepi32_ps(units), _mm256_set1_ps(unit));
        differ |= (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(back, value, _CMP_NEQ_UQ));
        _mm256_storeu_si256((__m256i *)(void *)(units_out + i), units);
    }
    return differ == 0;
}

static void put_digits(const wide_job *j, uint32_t r, uint32_t b, const int32_t *units)
{
    for (uint32_t i = 0; i < CPU_CHUNK; i++) {
        uint8_t *to = digit_at(j, b, r, i);
        int16_t d1 = (int16_t)((units[i] + (1 << (WIDE_DIGIT_BITS - 1))) >> WIDE_DIGIT_BITS),
                d0 = (int16_t)(units[i] - d1 * (1 << WIDE_DIGIT_BITS));
        memcpy(to, &d1, sizeof(d1));
        memcpy(to + 4, &d0, sizeof(d0));
    }
}

/* Block b of row r; false if it has no such form. */
static bool load_block(const wide_job *j, uint32_t r, uint32_t b, const uint16_t *x)
{
    wide_block *block = &j->blocks[(uint64_t)b * j->n + r];
    uint32_t top = largest_exponent(x), k = j->w->n_in;
    int32_t q = (int32_t)top - 127 + 1 - WIDE_BITS, units[CPU_CHUNK] = {0};
    bool in_range = top == 0 || (top >= WIDE_LEAST && top < 255);
    double roundings = k / 16 + kn_blocks(k, CPU_CHUNK) + 16;
    *block = (wide_block){0};
    if (in_range && top != 0) {
        float unit = kn_exp2i(q);
        double most = (double)unit * (1 << WIDE_BITS) * 448.0 * CPU_CHUNK;
        bool exact = in_units(x, unit, kn_exp2i(-q), units);
        block->scale = 0x1p-9 * (double)unit;
        block->bound = most * (roundings * 0x1p-53 + (exact ? 0 : 0x1p-28));
    }
    put_digits(j, r, b, units);
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

/* What the s of a block add for row r, in units of 2^q and 2^-9; four outputs each. */
static void rest_sums(const fp8_weights *w, const wide_job *j, uint32_t b, uint32_t r, __m256d sum_out[4])
{
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    for (int q = 0; q < 4; q++) {
        sum_out[q] = _mm256_setzero_pd();
    }
    for (const fp8_rest *at = w->rest; at < w->rest + w->n_rest; at++) {
        const uint8_t *digits = digit_at(j, b, r, at->input);
        int16_t d1, d0;
        __m256d term;
        memcpy(&d1, digits, sizeof(d1));
        memcpy(&d0, digits + 4, sizeof(d0));
        term = _mm256_set1_pd((double)at->s * (d1 * (1 << WIDE_DIGIT_BITS) + d0));
        for (int q = 0; q < 4; q++) {
            __m256i is_it = _mm256_cmpeq_epi64(lane, _mm256_set1_epi64x(at->out - 4 * q));
            sum_out[q] = _mm256_add_pd(sum_out[q], _mm256_and_pd(_mm256_castsi256_pd(is_it), term));
        }
    }
}

/* Adds a block of row r, the sums of whose digits are given for both halves of the outputs. */
INLINED void add_block(const fp8_weights *w, const wide_job *j, uint32_t b, uint32_t r,
                       const __m256i high[2][WIDE_DIGITS], const __m256i low[2][WIDE_DIGITS], double w_scale,
                       avx2_sums acc)
{
    const __m256d scale = _mm256_set1_pd(j->blocks[(uint64_t)b * j->n + r].scale * w_scale),
                  base = _mm256_set1_pd(1 << WIDE_DIGIT_BITS), eight = _mm256_set1_pd(8);
    __m256d rest[4];
    rest_sums(w, j, b, r, rest);
    for (int q = 0; q < 4; q++) {
        __m256d d1 = fp8_joined(high[q / 2][0], low[q / 2][0], q % 2),
                d0 = fp8_joined(high[q / 2][1], low[q / 2][1], q % 2);
        __m256d sum = _mm256_fmadd_pd(_mm256_fmadd_pd(d1, base, d0), eight, rest[q]);
        /* The product is exact. */
        _mm256_storeu_pd(acc + 4 * q, _mm256_fmadd_pd(sum, scale, _mm256_loadu_pd(acc + 4 * q)));
    }
}

/* Block b of the n rows from row0 on. */
INLINED void group_block(const fp8_weights *w, const wide_job *j, uint32_t b, uint32_t row0, double w_scale,
                         avx2_sums *acc, const uint32_t n, const bool decoded)
{
    const uint8_t *x = group_digits(j, row0, b);
    __m256i high[2][AVX2_GROUP], low[2][AVX2_GROUP];
    for (int h = 0; h < 2; h++) {
        main_sums(w, h, x, WIDE_DIGITS * n, high[h], low[h], WIDE_DIGITS * n, decoded);
    }
    for (uint32_t r = 0; r < n; r++) {
        __m256i of_high[2][WIDE_DIGITS], of_low[2][WIDE_DIGITS];
        for (uint32_t i = 0; i < 2 * WIDE_DIGITS; i++) {
            of_high[i / 2][i % 2] = high[i / 2][WIDE_DIGITS * r + i % 2];
            of_low[i / 2][i % 2] = low[i / 2][WIDE_DIGITS * r + i % 2];
        }
        add_block(w, j, b, row0 + r, (const __m256i(*)[WIDE_DIGITS])of_high,
                  (const __m256i(*)[WIDE_DIGITS])of_low, w_scale, acc[row0 + r]);
    }
}

static void block_sums(fp8_weights *w, const wide_job *j, uint32_t b, double w_scale, avx2_sums *acc)
{
    uint32_t row0 = 0;
    if (j->n <= WIDE_FUSED) {
        group_block(w, j, b, 0, w_scale, acc, WIDE_FUSED, false);
        return;
    }
    decode_columns(w);
    for (; row0 + WIDE_GROUP <= j->n; row0 += WIDE_GROUP) {
        group_block(w, j, b, row0, w_scale, acc, WIDE_GROUP, true);
    }
    if (row0 < j->n) {
        group_block(w, j, b, row0, w_scale, acc, 1, true);
    }
}

/* ---- what the contract says ---- */

/* Codes at .. at + CPU_CHUNK - 1 of output o, zeros past n_in. */
static void read_codes(const kn_matrix *m, uint32_t o, uint32_t at, uint8_t codes_out[CPU_CHUNK])
{
    if (m->prepared) {
        const fp8_chunk *chunk = (const fp8_chunk *)kn_host(m->data) +
                                 (uint64_t)(o / AVX2_OUTS) * kn_blocks(m->n_in, CPU_CHUNK) + at / CPU_CHUNK;
        const uint8_t *columns = (const uint8_t *)chunk->codes;
        for (uint32_t i = 0; i < CPU_CHUNK; i++) {
            codes_out[i] = fp8_code(columns[(i / 4 * AVX2_OUTS + o % AVX2_OUTS) * 4 + i % 4]);
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
APART void round_ends(const double *sums, double bound, uint16_t low_out[AVX2_OUTS],
                      uint16_t high_out[AVX2_OUTS])
{
    for (int i = 0; i < AVX2_OUTS; i++) {
        low_out[i] = kn_bf16_from_f64(sums[i] - bound);
        high_out[i] = kn_bf16_from_f64(sums[i] + bound);
    }
}

/* Outputs o .. o + 15 of row r, as far as they are wanted; sums NULL: all as the contract says. */
static void put_row(const wide_job *j, uint32_t r, uint32_t o, const double *sums, double bound,
                    const uint16_t nan[AVX2_OUTS])
{
    const cpu_rows *rows = j->rows;
    uint16_t *y = rows->y + (uint64_t)(j->row0 + r) * rows->y_stride, low[AVX2_OUTS] = {0},
             high[AVX2_OUTS] = {0};
    if (sums != NULL) {
        round_ends(sums, bound, low, high);
    }
    for (uint32_t i = 0; i < AVX2_OUTS; i++) {
        uint32_t at = o + i - rows->out0; /* far beyond n_out if before out0 */
        bool certain = sums != NULL && low[i] == high[i] && nan[i] == 0;
        if (at < rows->n_out) {
            y[at] = certain ? low[i] : contract_output(j, r, o + i);
        }
    }
}

static void tile_outputs(const wide_job *j, uint32_t o)
{
    uint16_t nan[AVX2_OUTS] = {0};
    fp8_weights weights;
    avx2_sums acc[WIDE_ROWS];
    double bound[WIDE_ROWS] = {0};
    bool plain = scales_are_plain(j->w, o);
    memset(acc, 0, j->n * sizeof(acc[0]));
    for (uint32_t b = 0; b < kn_blocks(j->w->n_in, CPU_CHUNK) && plain; b++) {
        double scale = e4m3_scale(j->w, o, b);
        read_weights(j->w, o, b, &weights, nan);
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
    uint32_t first = j->rows->out0 / AVX2_OUTS;
    (void)i_thread;
    for (uint32_t i = begin; i < end; i++) {
        tile_outputs(j, (first + i) * AVX2_OUTS);
    }
}

void KN_FN(kn_cpu_scaled_product)(kn_team *team, void *scratch, const cpu_rows *rows, const kn_matrix *w)
{
    uint64_t wide = cpu_round_up(w->n_in, CPU_CHUNK);
    uint32_t n_tile = kn_blocks(rows->out0 % AVX2_OUTS + rows->n_out, AVX2_OUTS);
    static_assert(WIDE_ROWS * 2 * WIDE_DIGITS <= CPU_X_BYTES - WIDE_ROWS * sizeof(wide_block) / CPU_CHUNK,
                  "scratch");
    for (uint32_t row0 = 0; row0 < rows->n; row0 += WIDE_ROWS) {
        uint32_t n = rows->n - row0 < WIDE_ROWS ? rows->n - row0 : WIDE_ROWS;
        uint8_t *digits = scratch;
        wide_job job = {.rows = rows,
                        .w = w,
                        .row0 = row0,
                        .n = n,
                        .digits = digits,
                        .blocks = (wide_block *)(void *)(digits + 2 * WIDE_DIGITS * wide * n)};
        kn_team_run(team, n, 4ull * w->n_in, load_part, &job);
        kn_team_run(team, n_tile, (uint64_t)AVX2_OUTS * w->n_in * n, outputs_part, &job);
    }
}
