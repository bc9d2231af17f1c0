/* E4M3 inputs and weights as 16-bit integers, one product for each weight and row, and exact.
 *
 * In units of 2^-9 an input is 2^shift X + r, 0 <= r < 2^shift, and a weight 8 W + s (vnni_fp8.h). The shift
 * is the least, from 3 to 9, for which the |X| of a block add up to FP8_INPUTS_MAX at most, so the block's
 * sum of X W is an integer of 32 bits. That there are others is rare: about one r in a block whose inputs are
 * about normal. In units of 2^-15 a block's sum is
 *
 *     2^shift sum(X W) + sum(r W) + 2^(shift - 3) sum(X s) + sum(r s) / 8
 *
 * where the second and third together are less than 2^31: |r W| <= 511 28672 and |2^(shift - 3) X s| <= 7
 * 28672 for 128 inputs each. In double all of it is exact up to the block's sum.
 *
 * Few rows decode a column and multiply it while it is in registers; more rows share one decoding of a block
 * of two tiles. A prepared matrix has its codes in columns, and behind them which columns of each block have
 * an s.
 *
 * Bound: one and two rows the memory; from four on vpdpwssd, 32 products an instruction. docs/performance.md
 * has what it reaches. */
#include <assert.h>

#include "kernels/cpu/vnni_fp8.h"

enum {
    FP8_FEW = 4,              /* rows, at most, for which columns are decoded while they are multiplied */
    FP8_SHIFT = 3,            /* least: X has 16 bits */
    FP8_UNITS = 448 << 9,     /* largest input */
    FP8_ONE_MORE = CPU_CHUNK, /* an X that is rounded down to below zero has one more */
};

/* One row of inputs and block. */
typedef struct fp8_block {
    double scale, factor; /* of units of 2^-15; 2^shift */
    uint32_t with_rest;   /* bit j: the inputs of column j have an r */
    uint32_t rest_shift;  /* shift - 3 */
} fp8_block;

/* Where the rows of one group stand in the scratch of a tile; K is k rounded up to CPU_CHUNK. Inputs of a
 * column in the order 0 2 1 3. */
typedef struct fp8_group {
    uint32_t n;        /* rows */
    int16_t *x;        /* [K / 4][n][4]: X */
    int16_t *rest;     /* [K / 128][n][FP8_COLUMNS][4]: r of the columns that have one, one after another */
    fp8_block *blocks; /* [K / 128][n] */
} fp8_group;

static fp8_group group_at(const cpu_q8_tile *t, uint32_t k, uint32_t g)
{
    uint64_t wide = cpu_round_up(k, CPU_CHUNK), row0 = (uint64_t)g * VNNI_GROUP;
    int16_t *x = (int16_t *)((uint8_t *)t->x + VNNI_HEAD_BYTES), *rest = x + wide * t->n;
    fp8_block *blocks = (fp8_block *)(void *)(rest + wide * t->n);
    static_assert(
        CPU_Q8_ROWS * (2 * sizeof(*x) + (sizeof(*blocks) + VNNI_HEAD_BYTES / CPU_Q8_ROWS) / CPU_CHUNK + 1) <=
            CPU_X_BYTES,
        "scratch");
    return (fp8_group){.n = t->n - (uint32_t)row0 < VNNI_GROUP ? t->n - (uint32_t)row0 : VNNI_GROUP,
                       .x = x + wide * row0,
                       .rest = rest + wide * row0,
                       .blocks = blocks + wide / CPU_CHUNK * row0};
}

/* Where X of column j of block b stand, of row r of n; next column: 4 n words on. */
INLINED int16_t *inputs_at(const fp8_group *g, const uint32_t n, uint32_t b, uint32_t j, uint32_t r)
{
    return g->x + (((uint64_t)b * FP8_COLUMNS + j) * n + r) * 4;
}

/* The first r of a block and row. */
INLINED int16_t *rests_at(const fp8_group *g, uint32_t b, uint32_t r)
{
    return g->rest + ((uint64_t)b * g->n + r) * FP8_COLUMNS * 4;
}

/* ---- loading ---- */

/* 16 inputs in units of 2^-9, NaN as zero. A code moved to the bits of a half float is 2^-8 of its value. */
static __m512i units_of(const uint8_t *codes)
{
    __m256i code = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(const void *)codes)),
            magnitude = _mm256_and_si256(code, _mm256_set1_epi16(0x7f)), half;
    half = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7),
                           _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(0x80)), 8));
    half = _mm256_maskz_mov_epi16(_mm256_cmpneq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f)), half);
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(0x1p17f)));
}

static uint32_t shift_of(uint32_t sum)
{
    uint32_t shift = FP8_SHIFT;
    static_assert((CPU_CHUNK * FP8_UNITS >> 9) + FP8_ONE_MORE <= FP8_INPUTS_MAX, "a shift of 9 will do");
    while ((sum >> shift) + 1 + FP8_ONE_MORE > FP8_INPUTS_MAX) {
        shift++;
    }
    return shift;
}

/* The low words of 16 inputs, four columns. */
static void column_words(__m512i words, int64_t column_out[8])
{
    __m512i paired = _mm512_or_si512(_mm512_and_si512(words, _mm512_set1_epi32(0xffff)),
                                     _mm512_slli_epi32(_mm512_shuffle_epi32(words, 0xee), 16));
    _mm512_storeu_si512(column_out, paired); /* every other one */
}

static void load_block(const fp8_group *g, uint32_t r, uint32_t b, const uint8_t *codes, double scale)
{
    fp8_block *block = &g->blocks[(uint64_t)b * g->n + r];
    int16_t *next = rests_at(g, b, r);
    __m512i units[8], sum = _mm512_setzero_si512();
    for (uint32_t i = 0; i < 8; i++) {
        units[i] = units_of(codes + 16 * i);
        sum = _mm512_add_epi32(sum, _mm512_abs_epi32(units[i]));
    }
    uint32_t shift = shift_of((uint32_t)_mm512_reduce_add_epi32(sum));
    *block = (fp8_block){.scale = 0x1p-15 * scale, .factor = 1u << shift, .rest_shift = shift - FP8_SHIFT};
    for (uint32_t i = 0; i < 8; i++) {
        __m512i rest = _mm512_and_si512(units[i], _mm512_set1_epi32((1 << shift) - 1));
        int64_t x[8], rests[8];
        column_words(_mm512_sra_epi32(units[i], _mm_cvtsi32_si128((int)shift)), x);
        column_words(rest, rests);
        for (uint32_t c = 0; c < 4; c++) {
            bool any = rests[2 * c] != 0;
            memcpy(inputs_at(g, g->n, b, 4 * i + c, r), &x[2 * c], sizeof(x[0]));
            memcpy(next, &rests[2 * c], sizeof(rests[0])); /* room for one of each column */
            next += any ? 4 : 0;
            block->with_rest |= (uint32_t)any << (4 * i + c);
        }
    }
}

typedef struct load_job {
    const cpu_q8_tile *tile;
    uint32_t k;
} load_job;

static void load_group(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const load_job *j = arg;
    (void)i_thread;
    for (uint32_t i = begin; i < end; i++) {
        fp8_group g = group_at(j->tile, j->k, i);
        for (uint32_t r = 0; r < g.n; r++) {
            uint32_t row = i * VNNI_GROUP + r;
            for (uint32_t at = 0, b = 0; at < j->k; at += CPU_CHUNK, b++) {
                uint8_t spare[CPU_CHUNK];
                uint32_t len = chunk_len(j->k, at);
                load_block(&g, r, b, chunk_bytes(j->tile->codes[row], at, len, CPU_CHUNK, spare),
                           kn_e8m0_decode(j->tile->scales[row][b]));
            }
        }
    }
}

void KN_FN(kn_vnni_fp8_load)(kn_team *team, const cpu_q8_tile *tile, uint32_t k)
{
    load_job job = {.tile = tile, .k = k};
    kn_team_run(team, kn_blocks(tile->n, VNNI_GROUP), (uint64_t)VNNI_GROUP * k, load_group, &job);
}

/* ---- products ---- */

/* What the r of row r add, in units of 2^-15, to sums of one tile of outputs or, decoded, two. */
INLINED void add_input_rests(const fp8_weights *w, const fp8_group *g, uint32_t b, uint32_t r, __m512i *sum,
                             const bool decoded)
{
    const int16_t *rest = rests_at(g, b, r);
    for (uint32_t bits = g->blocks[(uint64_t)b * g->n + r].with_rest; bits != 0;
         bits &= bits - 1, rest += 4) {
        uint32_t j = (uint32_t)__builtin_ctz(bits);
        if (decoded) {
            for (uint32_t k = 0; k < FP8_TILES; k++) {
                const fp8_pairs *column = &w[k].columns[j];
                sum[k] = dot(dot(sum[k], column->pair[0], rest), column->pair[1], rest + 2);
            }
        } else {
            fp8_tables tables = load_tables();
            fp8_pairs column = column_pairs(&tables, w->codes[j]);
            *sum = dot(dot(*sum, column.pair[0], rest), column.pair[1], rest + 2);
        }
    }
}

/* What the s of one tile add to the sums of n rows, likewise. */
INLINED void add_weight_rests(const fp8_weights *w, const fp8_group *g, uint32_t b, __m512i *sum,
                              const uint32_t n)
{
    const fp8_block *block = &g->blocks[(uint64_t)b * g->n];
    __m512i of_weights[VNNI_GROUP];
    if (w->n_rest == 0) {
        return;
    }
    for (uint32_t r = 0; r < n; r++) {
        of_weights[r] = _mm512_setzero_si512();
    }
    for (uint32_t i = 0; i < w->n_rest; i++) {
        const int16_t *x = inputs_at(g, n, b, w->rest_of[i], 0);
        for (uint32_t r = 0; r < n; r++) {
            of_weights[r] =
                dot(dot(of_weights[r], w->rests[i].pair[0], x + 4 * r), w->rests[i].pair[1], x + 4 * r + 2);
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        __m512i shift = _mm512_set1_epi32((int)block[r].rest_shift);
        sum[r] = _mm512_add_epi32(sum[r], _mm512_sllv_epi32(of_weights[r], shift));
    }
}

/* Sums of r s: hardly ever does an input of either kind meet a weight of the other. */
APART __m512i both_rests(const fp8_weights *w, const fp8_group *g, uint32_t b, uint32_t r)
{
    uint32_t with_rest = g->blocks[(uint64_t)b * g->n + r].with_rest;
    __m512i sum = _mm512_set1_epi32(INT32_MIN);
    for (uint32_t i = 0; i < w->n_rest; i++) {
        uint32_t bit = 1u << w->rest_of[i];
        const int16_t *rest = rests_at(g, b, r) + 4 * __builtin_popcount(with_rest & (bit - 1));
        if ((with_rest & bit) != 0) {
            sum = dot(dot(sum, w->rests[i].pair[0], rest), w->rests[i].pair[1], rest + 2);
        }
    }
    return sum;
}

/* A block's sum is exact; its product with the scales and the addition round once each, as the oracle's. */
INLINED void add_scaled(double *acc, __m512d sum, double scale)
{
    __m512d term = _mm512_mul_pd(sum, _mm512_set1_pd(scale));
    _mm512_storeu_pd(acc, _mm512_add_pd(_mm512_loadu_pd(acc), term));
}

/* Adds the block's sum of row r; main: of X W, rest: of r W and X s. */
INLINED void add_row(const fp8_weights *w, const fp8_group *g, uint32_t b, uint32_t r, __m512i main,
                     __m512i rest, double w_scale, double *acc)
{
    const fp8_block *block = &g->blocks[(uint64_t)b * g->n + r];
    __m512d sum[2];
    for (int half = 0; half < 2; half++) {
        sum[half] =
            _mm512_fmadd_pd(to_double(main, half), _mm512_set1_pd(block->factor), to_double(rest, half));
    }
    if (__builtin_expect((block->with_rest & w->with_rest) != 0, 0)) {
        __m512i both = both_rests(w, g, b, r);
        for (int half = 0; half < 2; half++) {
            sum[half] = _mm512_fmadd_pd(to_double(both, half), _mm512_set1_pd(0.125), sum[half]);
        }
    }
    add_scaled(acc, sum[0], block->scale * w_scale);
    add_scaled(acc + 8, sum[1], block->scale * w_scale);
}

/* n rows of a group and FP8_TILES tiles, decoded. */
INLINED void multiply(const fp8_weights *w, const fp8_group *g, uint32_t b, const double *w_scale,
                      vnni_sums *acc, const uint32_t n)
{
    const int16_t *x = inputs_at(g, n, b, 0, 0);
    __m512i sum[FP8_TILES][VNNI_GROUP], rest[FP8_TILES][VNNI_GROUP];
    for (uint32_t r = 0; r < n; r++) {
        __m512i of_row[FP8_TILES] = {_mm512_set1_epi32(INT32_MIN), _mm512_set1_epi32(INT32_MIN)};
        add_input_rests(w, g, b, r, of_row, true);
        rest[0][r] = of_row[0];
        rest[1][r] = of_row[1];
    }
    add_weight_rests(&w[0], g, b, rest[0], n);
    add_weight_rests(&w[1], g, b, rest[1], n);
    for (uint32_t r = 0; r < n; r++) {
        sum[0][r] = sum[1][r] = _mm512_set1_epi32(INT32_MIN);
    }
#pragma GCC unroll 2
    for (uint32_t j = 0; j < FP8_COLUMNS; j++, x += 4 * n) {
        for (uint32_t i = 0; i < 2; i++) {
            __m512i w0 = w[0].columns[j].pair[i], w1 = w[1].columns[j].pair[i];
            for (uint32_t r = 0; r < n; r++) {
                sum[0][r] = dot(sum[0][r], w0, x + 4 * r + 2 * i);
                sum[1][r] = dot(sum[1][r], w1, x + 4 * r + 2 * i);
            }
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        for (uint32_t k = 0; k < FP8_TILES; k++) {
            add_row(&w[k], g, b, r, sum[k][r], rest[k][r], w_scale[k], acc[k][r]);
        }
    }
}

/* One copy for each number of rows. */
typedef void (*group_fn)(const fp8_weights *w, const fp8_group *g, uint32_t b, const double *w_scale,
                         vnni_sums *acc);
#define GROUP(n_)                                                                                            \
    APART void group_rows_##n_(const fp8_weights *w, const fp8_group *g, uint32_t b, const double *w_scale,  \
                               vnni_sums *acc)                                                               \
    {                                                                                                        \
        multiply(w, g, b, w_scale, acc, n_);                                                                 \
    }
GROUP(1)
GROUP(2)
GROUP(3)
GROUP(4)
GROUP(5)
GROUP(6)
GROUP(7)
GROUP(8)
static const group_fn GROUP_ROWS[] = {NULL,         group_rows_1, group_rows_2, group_rows_3, group_rows_4,
                                      group_rows_5, group_rows_6, group_rows_7, group_rows_8};

/* All n rows of a tile that has few, and one tile of outputs. Pairs have sums of their own, so that one row
 * need not wait for its last product. */
INLINED void multiply_few(const fp8_weights *w, const fp8_group *g, uint32_t b, double w_scale, vnni_sums acc,
                          const uint32_t n)
{
    const int16_t *x = inputs_at(g, n, b, 0, 0);
    fp8_tables tables = load_tables();
    __m512i sum[2][FP8_FEW], rest[FP8_FEW];
    for (uint32_t r = 0; r < n; r++) {
        sum[0][r] = _mm512_set1_epi32(INT32_MIN);
        sum[1][r] = _mm512_setzero_si512();
    }
#pragma GCC unroll 2
    for (uint32_t j = 0; j < FP8_COLUMNS; j++, x += 4 * n) {
        fp8_pairs column = column_pairs(&tables, w->codes[j]);
        ask_ahead(&w->codes[j]);
        for (uint32_t r = 0; r < n; r++) {
            sum[0][r] = dot(sum[0][r], column.pair[0], x + 4 * r);
            sum[1][r] = dot(sum[1][r], column.pair[1], x + 4 * r + 2);
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        rest[r] = _mm512_set1_epi32(INT32_MIN);
        add_input_rests(w, g, b, r, &rest[r], false);
    }
    add_weight_rests(w, g, b, rest, n);
    for (uint32_t r = 0; r < n; r++) {
        add_row(w, g, b, r, _mm512_add_epi32(sum[0][r], sum[1][r]), rest[r], w_scale, acc[r]);
    }
}

#define FEW(n_)                                                                                              \
    case n_:                                                                                                 \
        multiply_few(w, g, b, w_scale, acc, n_);                                                             \
        break;

static void few_rows(const fp8_weights *w, const fp8_group *g, uint32_t b, double w_scale, vnni_sums acc)
{
    switch (g->n) {
        FEW(1)
        FEW(2)
        FEW(3)
        FEW(4)
    }
}

/* The first tile twice where there is no second. */
typedef struct fp8_tiles {
    fp8_weights w[FP8_TILES];
    uint32_t out[FP8_TILES], n; /* first outputs; how many tiles there are */
    uint16_t nan[FP8_TILES][VNNI_OUTS];
    vnni_sums acc[VNNI_GROUPS_MAX][FP8_TILES];
} fp8_tiles;

static double open_block(const kn_matrix *w, uint32_t b, fp8_tiles *tiles, uint32_t k)
{
    read_weights(w, tiles->out[k], b, &tiles->w[k]);
    find_rests(&tiles->w[k], tiles->nan[k]);
    return e4m3_scale(w, tiles->out[k], b);
}

/* One tile after the other: weights come in the order in which they stand. */
static void few_sums(const cpu_q8_tile *t, const kn_matrix *w, fp8_tiles *tiles)
{
    fp8_group g = group_at(t, w->n_in, 0);
    for (uint32_t k = 0; k < tiles->n; k++) {
        for (uint32_t b = 0; b < kn_blocks(w->n_in, CPU_CHUNK); b++) {
            double scale = open_block(w, b, tiles, k);
            few_rows(&tiles->w[k], &g, b, scale, tiles->acc[0][k]);
        }
    }
}

static void many_sums(const cpu_q8_tile *t, const kn_matrix *w, fp8_tiles *tiles)
{
    for (uint32_t b = 0; b < kn_blocks(w->n_in, CPU_CHUNK); b++) {
        double scale[FP8_TILES];
        for (uint32_t k = 0; k < FP8_TILES; k++) {
            scale[k] = open_block(w, b, tiles, k);
            decode_columns(&tiles->w[k]);
        }
        for (uint32_t i = 0; i < kn_blocks(t->n, VNNI_GROUP); i++) {
            fp8_group g = group_at(t, w->n_in, i);
            GROUP_ROWS[g.n](tiles->w, &g, b, scale, tiles->acc[i]);
        }
    }
}

static void put_tile(const cpu_q8_tile *t, const kn_matrix *w, const fp8_tiles *tiles, uint32_t k)
{
    vnni_sums acc[VNNI_GROUPS_MAX];
    for (uint32_t i = 0; i < kn_blocks(t->n, VNNI_GROUP); i++) {
        memcpy(acc[i], tiles->acc[i][k], sizeof(acc[i]));
    }
    KN_FN(kn_vnni_put)(t, w, tiles->out[k], acc, tiles->nan[k]);
}

void KN_FN(kn_vnni_fp8_part)(const cpu_q8_tile *t, const kn_matrix *w, uint32_t begin, uint32_t end)
{
    fp8_tiles tiles;
    for (uint32_t i = begin; i < end; i++) {
        uint32_t o = i * FP8_OUTS;
        tiles.n = w->n_out - o > VNNI_OUTS ? FP8_TILES : 1;
        tiles.out[0] = o;
        tiles.out[1] = tiles.n > 1 ? o + VNNI_OUTS : o;
        memset(tiles.nan, 0, sizeof(tiles.nan));
        memset(tiles.acc, 0, kn_blocks(t->n, VNNI_GROUP) * sizeof(tiles.acc[0]));
        if (t->n <= FP8_FEW) {
            few_sums(t, w, &tiles);
        } else {
            many_sums(t, w, &tiles);
        }
        for (uint32_t k = 0; k < tiles.n; k++) {
            put_tile(t, w, &tiles, k);
        }
    }
}

/* ---- preparing ---- */

uint64_t KN_FN(kn_vnni_fp8_bytes)(const kn_matrix *w)
{
    uint64_t n_bytes = n_prepared_blocks(w) * (FP8_COLUMNS * sizeof(__m512i) + sizeof(uint32_t));
    return (n_bytes + sizeof(__m512i) - 1) / sizeof(__m512i) * sizeof(__m512i); /* others stand behind it */
}

void KN_FN(kn_vnni_fp8_prepare)(const kn_matrix *w, void *out)
{
    __m512i *columns = out;
    uint32_t *with_rest = (uint32_t *)(columns + n_prepared_blocks(w) * FP8_COLUMNS);
    for (uint32_t o = 0; o < w->n_out; o += VNNI_OUTS) {
        vnni_rows rows = vnni_rows_at(kn_host(w->data), w->n_in, o, w->n_out);
        for (uint32_t b = 0; b < kn_blocks(w->n_in, CPU_CHUNK); b++, columns += FP8_COLUMNS) {
            read_columns(&rows, w->n_in, b, columns);
            *with_rest++ = columns_with_rest(columns);
        }
    }
}
