/* E4M3 inputs and weights, both in digits: x = 8 (256 d1 + d0) + r, w = 8 (255 e1 + e0) + s. Four products of
 * digits give 64 (256 (255 e1 d1 + e0 d1) + 255 e1 d0 + e0 d0); what r and s add is computed only where there
 * are any. Weight digits are biased; sums start below zero to make up for it. All is exact up to the block's
 * sum.
 *
 * Few rows decode a column and multiply it while it is in registers; more rows share one decoding of a block.
 * A prepared matrix has its codes in columns, and behind them which columns of each block have an s.
 *
 * Bound: one and two rows the memory; from four on the dot products, four for every four weights and row.
 * docs/performance.md has what it reaches. */
#include "kernels/cpu/vnni_fp8.h"

enum {
    FP8_ROWS = 4, /* whose sums fit the registers */
    FP8_SUMS = 4, /* of one row: e1 d1, e1 d0, e0 d1, e0 d0 */
};

/* One row of inputs and block. */
typedef struct fp8_block {
    double scale;              /* times 2^-12: of 64 units of 2^-18 */
    int32_t sum1, sum0, sum_r; /* of its digits */
    uint32_t with_rest;        /* bit j: the inputs of column j have an r */
} fp8_block;

/* Where the rows of one group stand in the scratch of a tile; K is k rounded up to CPU_CHUNK. */
typedef struct fp8_group {
    uint32_t n;        /* rows */
    uint8_t *digits;   /* [K / 4][n][2 dwords]: d1, d0 */
    uint8_t *rest;     /* [K / 4][n][1 dword]: r */
    fp8_block *blocks; /* [K / 128][n] */
} fp8_group;

static fp8_group group_at(const cpu_q8_tile *t, uint32_t k, uint32_t g)
{
    uint64_t wide = cpu_round_up(k, CPU_CHUNK), row0 = (uint64_t)g * VNNI_GROUP;
    uint8_t *digits = (uint8_t *)t->x + VNNI_HEAD_BYTES, *rest = digits + 2 * wide * t->n,
            *blocks = rest + wide * t->n;
    return (fp8_group){.n = t->n - (uint32_t)row0 < VNNI_GROUP ? t->n - (uint32_t)row0 : VNNI_GROUP,
                       .digits = digits + 2 * wide * row0,
                       .rest = rest + wide * row0,
                       .blocks = (fp8_block *)(void *)blocks + wide / CPU_CHUNK * row0};
}

/* ---- loading ---- */

static int32_t byte_sum(__m512i bytes)
{
    return _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes));
}

static void load_64(const fp8_group *g, uint32_t r, uint32_t at, __m512i codes)
{
    const vnni_digits *table = &KN_FN(kn_vnni_digits);
    fp8_block *block = &g->blocks[(uint64_t)(at / CPU_CHUNK) * g->n + r];
    __m512i d1 = vnni_look_up(table->d1, codes), d0 = vnni_look_up(table->d0, codes),
            rest = vnni_look_up(table->r, codes);
    uint8_t pairs[2][64], rests[64];
    _mm512_storeu_si512(pairs[0], _mm512_unpacklo_epi32(d1, d0)); /* steps 0 1, 4 5, .. */
    _mm512_storeu_si512(pairs[1], _mm512_unpackhi_epi32(d1, d0)); /* steps 2 3, 6 7, .. */
    _mm512_storeu_si512(rests, rest);
    for (uint32_t i = 0; i < 16; i++) {
        uint64_t to = (uint64_t)(at / 4 + i) * g->n + r;
        memcpy(g->digits + 8 * to, pairs[i / 2 % 2] + 16 * (i / 4) + 8 * (i % 2), 8);
        memcpy(g->rest + 4 * to, rests + 4 * i, 4);
    }
    block->sum1 += byte_sum(d1);
    block->sum0 += byte_sum(d0);
    block->sum_r += byte_sum(rest);
    block->with_rest |= kn_lanes_of(_mm512_test_epi32_mask(rest, rest)) << at % CPU_CHUNK / 4;
}

typedef struct load_job {
    const cpu_q8_tile *tile;
    uint32_t k;
} load_job;

static void load_group(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const load_job *j = arg;
    uint32_t n_block = kn_blocks(j->k, CPU_CHUNK);
    (void)i_thread;
    for (uint32_t i = begin; i < end; i++) {
        fp8_group g = group_at(j->tile, j->k, i);
        memset(g.blocks, 0, (uint64_t)n_block * g.n * sizeof(*g.blocks));
        for (uint32_t r = 0; r < g.n; r++) {
            uint32_t row = i * VNNI_GROUP + r;
            for (uint32_t at = 0; at < n_block * CPU_CHUNK; at += 64) {
                load_64(&g, r, at,
                        at < j->k ? vnni_load_row(j->tile->codes[row], at, j->k) : _mm512_setzero_si512());
            }
            for (uint32_t b = 0; b < n_block; b++) {
                g.blocks[(uint64_t)b * g.n + r].scale = 0x1p-12 * kn_e8m0_decode(j->tile->scales[row][b]);
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

/* Adds a column's e1 d1, e1 d0, e0 d1 and e0 d0 to the sums of n rows; x: their two dwords of digits. */
INLINED void add_column(__m512i acc[FP8_ROWS][FP8_SUMS], __m512i e1, __m512i e0, const uint8_t *x,
                        const uint32_t n)
{
    for (uint32_t r = 0; r < n; r++) {
        acc[r][0] = dot(acc[r][0], e1, x + 8 * r);
        acc[r][1] = dot(acc[r][1], e1, x + 8 * r + 4);
        acc[r][2] = dot(acc[r][2], e0, x + 8 * r);
        acc[r][3] = dot(acc[r][3], e0, x + 8 * r + 4);
    }
}

/* The sums of rows row0 .. row0 + n - 1 and a block, in 64 units: high_out[r] 256 times and low_out[r] once.
 * Columns are decoded here, or have been (decoded). With two `ways` every other column goes into sums of its
 * own, so that one row need not wait for its last product. */
INLINED void main_sums(const fp8_weights *w, const fp8_group *g, uint32_t b, uint32_t row0, __m512i *high_out,
                       __m512i *low_out, const uint32_t n, const uint32_t ways, const bool decoded)
{
    const fp8_block *block = g->blocks + (uint64_t)b * g->n + row0;
    const uint8_t *x = g->digits + ((uint64_t)b * FP8_COLUMNS * g->n + row0) * 8;
    const uint64_t next = 8ull * g->n;
    fp8_tables tables = load_tables();
    __m512i acc[2][FP8_ROWS][FP8_SUMS];
    for (uint32_t r = 0; r < n; r++) {
        acc[0][r][0] = acc[0][r][2] = _mm512_set1_epi32(-FP8_BIAS * block[r].sum1);
        acc[0][r][1] = acc[0][r][3] = _mm512_set1_epi32(-FP8_BIAS * block[r].sum0);
        for (uint32_t i = 0; i < FP8_SUMS; i++) {
            acc[1][r][i] = _mm512_setzero_si512();
        }
    }
    for (uint32_t j = 0; j < FP8_COLUMNS; j += 2, x += 2 * next) {
        if (decoded) {
            add_column(acc[0], w->e1[j], w->e0[j], x, n);
            add_column(acc[ways - 1], w->e1[j + 1], w->e0[j + 1], x + next, n);
        } else {
            __m512i even = w->codes[j], odd = w->codes[j + 1];
            ask_ahead(&w->codes[j]);
            ask_ahead(&w->codes[j + 1]);
            add_column(acc[0], weight_digit(&tables, even, 0), weight_digit(&tables, even, 1), x, n);
            add_column(acc[ways - 1], weight_digit(&tables, odd, 0), weight_digit(&tables, odd, 1), x + next,
                       n);
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        __m512i *a = acc[0][r];
        for (uint32_t i = 0; i < FP8_SUMS && ways == 2; i++) {
            a[i] = _mm512_add_epi32(a[i], acc[1][r][i]);
        }
        /* 255 e1 + e0 */
        high_out[r] = _mm512_add_epi32(_mm512_sub_epi32(_mm512_slli_epi32(a[0], 8), a[0]), a[2]);
        low_out[r] = _mm512_add_epi32(_mm512_sub_epi32(_mm512_slli_epi32(a[1], 8), a[1]), a[3]);
    }
}

/* An input of one row, in units of 2^-9; digits, rest: of the row's first column of a block. */
INLINED int32_t input_units(const fp8_group *g, const uint8_t *digits, const uint8_t *rest, uint32_t input)
{
    uint32_t at = input / 4 * g->n, i = input % 4;
    int32_t d1 = (int8_t)digits[8 * at + i], d0 = (int8_t)digits[8 * at + 4 + i],
            r = (int8_t)rest[4 * at + i];
    return 8 * (256 * d1 + d0) + r;
}

/* Of one row what r and s add to a block's sum: 8 eights_out + ones_out. The inputs' r go with all outputs;
 * the few s of the weights are taken one by one, with the whole input. */
static void rest_sums(const fp8_weights *w, const fp8_group *g, uint32_t b, uint32_t r, __m512i *eights_out,
                      __m512i *ones_out)
{
    const fp8_block *block = &g->blocks[(uint64_t)b * g->n + r];
    const uint8_t *digits = g->digits + ((uint64_t)b * FP8_COLUMNS * g->n + r) * 8;
    const uint8_t *rest = g->rest + ((uint64_t)b * FP8_COLUMNS * g->n + r) * 4;
    fp8_tables tables = load_tables();
    __m512i high = _mm512_set1_epi32(-FP8_BIAS * block->sum_r), low = high, ones = _mm512_setzero_si512();
    for (uint32_t bits = block->with_rest; bits != 0; bits &= bits - 1) {
        uint32_t j = (uint32_t)__builtin_ctz(bits);
        high = dot(high, weight_digit(&tables, w->codes[j], 0), rest + 4 * j * g->n);
        low = dot(low, weight_digit(&tables, w->codes[j], 1), rest + 4 * j * g->n);
    }
    for (const fp8_rest *at = w->rest; at < w->rest + w->n_rest; at++) {
        __m512i term = _mm512_set1_epi32(at->s * input_units(g, digits, rest, at->input));
        ones = _mm512_mask_add_epi32(ones, (__mmask16)(1u << at->out), ones, term);
    }
    /* 255 e1 + e0 */
    *eights_out = _mm512_add_epi32(_mm512_sub_epi32(_mm512_slli_epi32(high, 8), high), low);
    *ones_out = ones;
}

/* A block's sum is exact; its product with the scales and the addition round once each, as the oracle's. */
INLINED void add_scaled(double *acc, __m512d sum, double scale)
{
    __m512d term = _mm512_mul_pd(sum, _mm512_set1_pd(scale));
    _mm512_storeu_pd(acc, _mm512_add_pd(_mm512_loadu_pd(acc), term));
}

INLINED void scale_row(const fp8_weights *w, const fp8_group *g, uint32_t b, uint32_t r, __m512i high,
                       __m512i low, double w_scale, double *acc)
{
    const fp8_block *block = &g->blocks[(uint64_t)b * g->n + r];
    bool with_rest = (block->with_rest | w->n_rest) != 0;
    __m512i eights, ones;
    if (with_rest) {
        rest_sums(w, g, b, r, &eights, &ones);
    }
    for (int half = 0; half < 2; half++) {
        __m512d sum = joined(high, 256, low, half);
        if (with_rest) {
            sum = _mm512_fmadd_pd(joined(eights, 8, ones, half), _mm512_set1_pd(0x1p-6), sum);
        }
        add_scaled(acc + 8 * half, sum, block->scale * w_scale);
    }
}

#define ROWS(n_, ways_, decoded_)                                                                            \
    case n_:                                                                                                 \
        main_sums(w, g, b, row0, high, low, n_, ways_, decoded_);                                            \
        break;

static void group_sums(const fp8_weights *w, const fp8_group *g, uint32_t b, double w_scale, vnni_sums acc)
{
    for (uint32_t row0 = 0; row0 < g->n; row0 += FP8_ROWS) {
        uint32_t n = g->n - row0 < FP8_ROWS ? g->n - row0 : FP8_ROWS;
        __m512i high[FP8_ROWS], low[FP8_ROWS];
        switch (n) {
            ROWS(1, 2, true)
            ROWS(2, 1, true)
            ROWS(3, 1, true)
            ROWS(4, 1, true)
        }
        for (uint32_t r = 0; r < n; r++) {
            scale_row(w, g, b, row0 + r, high[r], low[r], w_scale, acc[row0 + r]);
        }
    }
}

/* All rows of a tile that has at most FP8_ROWS. */
static void few_rows_sums(const fp8_weights *w, const fp8_group *g, uint32_t b, double w_scale, vnni_sums acc)
{
    const uint32_t row0 = 0;
    __m512i high[FP8_ROWS], low[FP8_ROWS];
    switch (g->n) {
        ROWS(1, 2, false)
        ROWS(2, 1, false)
        ROWS(3, 1, false)
        ROWS(4, 1, false)
    }
    for (uint32_t r = 0; r < g->n; r++) {
        scale_row(w, g, b, r, high[r], low[r], w_scale, acc[r]);
    }
}

void KN_FN(kn_vnni_fp8_part)(const cpu_q8_tile *t, const kn_matrix *w, uint32_t begin, uint32_t end)
{
    uint32_t n_group = kn_blocks(t->n, VNNI_GROUP);
    for (uint32_t o = begin * VNNI_OUTS; o < end * VNNI_OUTS; o += VNNI_OUTS) {
        uint16_t nan[VNNI_OUTS] = {0};
        fp8_weights weights;
        vnni_sums acc[VNNI_GROUPS_MAX];
        memset(acc, 0, n_group * sizeof(acc[0]));
        for (uint32_t b = 0; b < kn_blocks(w->n_in, CPU_CHUNK); b++) {
            double scale = e4m3_scale(w, o, b);
            fp8_group group = group_at(t, w->n_in, 0);
            read_weights(w, o, b, &weights);
            find_rests(&weights, nan);
            if (t->n <= FP8_ROWS) {
                few_rows_sums(&weights, &group, b, scale, acc[0]);
                continue;
            }
            decode_columns(&weights);
            for (uint32_t g = 0; g < n_group; g++) {
                group = group_at(t, w->n_in, g);
                group_sums(&weights, &group, b, scale, acc[g]);
            }
        }
        KN_FN(kn_vnni_put)(t, w, o, acc, nan);
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
