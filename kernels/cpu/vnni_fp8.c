/* E4M3 weights, both sides in digits: x = 8 (256 d1 + d0) + r, w = 8 (256 e1 + e0) + s. Four products of
 * digits give 64 (65536 e1 d1 + 256 (e1 d0 + e0 d1) + e0 d0); what r and s add is computed only where there
 * are any: r by rows and blocks, s by columns. Weight digits are biased by 128 into unsigned bytes; sums
 * start below zero to make up for it. All is exact up to the block's sum.
 *
 * Bound: decoding the weights for one or two rows; from four on the dot products, four for every four weights
 * and row. docs/performance.md has what it reaches. */
#include "kernels/cpu/vnni.h"

enum {
    FP8_COLUMNS = CPU_CHUNK / 4, /* of a block */
    FP8_BIAS = 128,
    FP8_ROWS = 4, /* whose sums fit the registers */
};

/* One row of inputs and block. */
typedef struct fp8_block {
    double scale;
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

/* The weights of one block and 16 outputs. */
typedef struct fp8_weights {
    const __m512i *codes; /* [FP8_COLUMNS]: in a prepared matrix, or buffer */
    __m512i buffer[FP8_COLUMNS];
    __m512i e1[FP8_COLUMNS], e0[FP8_COLUMNS]; /* biased */
    uint32_t with_rest;                       /* bit j: column j may have an s, or a NaN */
} fp8_weights;

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
    block->with_rest |= (uint32_t)_mm512_test_epi32_mask(rest, rest) << at % CPU_CHUNK / 4;
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
                g.blocks[(uint64_t)b * g.n + r].scale = kn_e8m0_decode(j->tile->scales[row][b]);
            }
        }
    }
}

void KN_FN(kn_vnni_fp8_load)(kn_team *team, const cpu_q8_tile *tile, uint32_t k)
{
    load_job job = {.tile = tile, .k = k};
    kn_team_run(team, kn_blocks(tile->n, VNNI_GROUP), (uint64_t)VNNI_GROUP * k, load_group, &job);
}

/* ---- weights ---- */

static void decode_column(fp8_weights *w, uint32_t j)
{
    const vnni_digits *table = &KN_FN(kn_vnni_digits);
    const __m512i bias = _mm512_set1_epi8((char)FP8_BIAS), big = _mm512_set1_epi8(0x60);
    __m512i codes = w->codes[j];
    /* Below 32 codes may have an s; with one added NaN looks like that too, and 31 still does. */
    __m512i next = _mm512_add_epi8(codes, _mm512_set1_epi8(1));
    uint64_t rest = _mm512_testn_epi8_mask(_mm512_and_si512(codes, next), big);
    w->e1[j] = _mm512_xor_si512(vnni_look_up(table->d1, codes), bias);
    w->e0[j] = _mm512_xor_si512(vnni_look_up(table->d0, codes), bias);
    w->with_rest |= (uint32_t)(rest != 0) << j;
}

/* Columns of block b of 16 rows in the stored form. */
static void read_columns(const vnni_rows *rows, uint32_t n_in, uint32_t b, __m512i columns_out[FP8_COLUMNS])
{
    uint32_t at = b * CPU_CHUNK;
    KN_FN(kn_vnni_columns)(rows, at, n_in, columns_out);
    if (n_in - at > 64) {
        KN_FN(kn_vnni_columns)(rows, at + 64, n_in, columns_out + 16);
    } else {
        memset(columns_out + 16, 0, 16 * sizeof(columns_out[0]));
    }
}

/* Block b of the outputs at o. Prepared weights are columns, [tile of outputs][block][FP8_COLUMNS]. */
static void read_weights(const kn_matrix *m, uint32_t o, uint32_t b, fp8_weights *w)
{
    if (m->prepared) {
        uint64_t tile = o / VNNI_OUTS;
        w->codes =
            (const __m512i *)kn_host(m->data) + (tile * kn_blocks(m->n_in, CPU_CHUNK) + b) * FP8_COLUMNS;
    } else {
        vnni_rows rows = vnni_rows_at(kn_host(m->data), m->n_in, o, m->n_out);
        read_columns(&rows, m->n_in, b, w->buffer);
        w->codes = w->buffer;
    }
    w->with_rest = 0;
    for (uint32_t j = 0; j < FP8_COLUMNS; j++) {
        decode_column(w, j);
    }
}

/* Notes the first NaN of each output. */
static void find_nans(const fp8_weights *w, uint16_t nan[VNNI_OUTS])
{
    for (uint32_t bits = w->with_rest; bits != 0; bits &= bits - 1) {
        uint8_t code[VNNI_OUTS][4];
        __m512i codes = w->codes[__builtin_ctz(bits)], magnitude = _mm512_set1_epi8(127);
        uint64_t found = _mm512_cmpeq_epi8_mask(_mm512_and_si512(codes, magnitude), magnitude);
        _mm512_storeu_si512(code, codes);
        for (; found != 0; found &= found - 1) {
            uint32_t at = (uint32_t)__builtin_ctzll(found);
            if (nan[at / 4] == 0) {
                nan[at / 4] = (uint16_t)(VNNI_NAN_CODE | (code[at / 4][at % 4] & 0x80) << 8);
            }
        }
    }
}

/* ---- products ---- */

/* acc + dot products of a column with the dword at x. */
INLINED __m512i dot(__m512i acc, __m512i column, const uint8_t *x)
{
    int32_t dword;
    memcpy(&dword, x, 4);
    return _mm512_dpbusd_epi32(acc, column, _mm512_set1_epi32(dword));
}

/* For rows row0 .. row0 + n - 1: high_out[r] = 256 e1 d1 + (e1 d0 + e0 d1), low_out[r] = e0 d0, summed over a
 * block. */
INLINED void main_sums(const fp8_weights *w, const fp8_group *g, uint32_t b, uint32_t row0, __m512i *high_out,
                       __m512i *low_out, const uint32_t n)
{
    const fp8_block *block = g->blocks + (uint64_t)b * g->n + row0;
    const uint8_t *x = g->digits + ((uint64_t)b * FP8_COLUMNS * g->n + row0) * 8;
    __m512i a2[FP8_ROWS], a1[FP8_ROWS], a0[FP8_ROWS];
    for (uint32_t r = 0; r < n; r++) {
        a2[r] = _mm512_set1_epi32(-FP8_BIAS * block[r].sum1);
        a1[r] = _mm512_set1_epi32(-FP8_BIAS * (block[r].sum1 + block[r].sum0));
        a0[r] = _mm512_set1_epi32(-FP8_BIAS * block[r].sum0);
    }
#pragma GCC unroll 4
    for (uint32_t j = 0; j < FP8_COLUMNS; j++, x += 8ull * g->n) {
        __m512i e1 = w->e1[j], e0 = w->e0[j];
        for (uint32_t r = 0; r < n; r++) {
            a2[r] = dot(a2[r], e1, x + 8 * r);
            a1[r] = dot(a1[r], e0, x + 8 * r);
            a1[r] = dot(a1[r], e1, x + 8 * r + 4);
            a0[r] = dot(a0[r], e0, x + 8 * r + 4);
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        high_out[r] = _mm512_add_epi32(_mm512_slli_epi32(a2[r], 8), a1[r]);
        low_out[r] = a0[r];
    }
}

/* Of one row: high 256 (e1 r + s d1) + ..: b1 = e1 r + s d1, b0 = e0 r + s d0, c = s r, summed over a block.
 */
static void rest_sums(const fp8_weights *w, const fp8_group *g, uint32_t b, uint32_t r, __m512i *b1,
                      __m512i *b0, __m512i *c)
{
    const fp8_block *block = &g->blocks[(uint64_t)b * g->n + r];
    const uint8_t *x = g->digits + ((uint64_t)b * FP8_COLUMNS * g->n + r) * 8;
    const uint8_t *x_rest = g->rest + ((uint64_t)b * FP8_COLUMNS * g->n + r) * 4;
    const __m512i bias = _mm512_set1_epi8((char)FP8_BIAS);
    __m512i less1 = _mm512_setzero_si512(), less0 = less1, less_r = less1;
    *b1 = *b0 = *c = _mm512_setzero_si512();
    for (uint32_t bits = block->with_rest; bits != 0; bits &= bits - 1) {
        uint32_t j = (uint32_t)__builtin_ctz(bits);
        *b1 = dot(*b1, w->e1[j], x_rest + 4 * j * g->n);
        *b0 = dot(*b0, w->e0[j], x_rest + 4 * j * g->n);
    }
    for (uint32_t bits = w->with_rest; bits != 0; bits &= bits - 1) {
        uint32_t j = (uint32_t)__builtin_ctz(bits), at = j * g->n;
        __m512i s = _mm512_xor_si512(vnni_look_up(KN_FN(kn_vnni_digits).r, w->codes[j]), bias);
        *b1 = dot(*b1, s, x + 8 * at);
        *b0 = dot(*b0, s, x + 8 * at + 4);
        *c = dot(*c, s, x_rest + 4 * at);
        less1 = dot(less1, bias, x + 8 * at);
        less0 = dot(less0, bias, x + 8 * at + 4);
        less_r = dot(less_r, bias, x_rest + 4 * at);
    }
    less1 = _mm512_add_epi32(less1, _mm512_set1_epi32(FP8_BIAS * block->sum_r));
    less0 = _mm512_add_epi32(less0, _mm512_set1_epi32(FP8_BIAS * block->sum_r));
    *b1 = _mm512_sub_epi32(*b1, less1);
    *b0 = _mm512_sub_epi32(*b0, less0);
    *c = _mm512_sub_epi32(*c, less_r);
}

/* The low (0) or high (1) dwords of every four, in the order of vnni_sums. */
INLINED __m512d to_double(__m512i v, int high)
{
    const __m512i two52 = _mm512_set1_epi32(0x43300000);
    __m512i positive = _mm512_xor_si512(v, _mm512_set1_epi32(INT32_MIN));
    __m512i bits = high ? _mm512_unpackhi_epi32(positive, two52) : _mm512_unpacklo_epi32(positive, two52);
    return _mm512_sub_pd(_mm512_castsi512_pd(bits), _mm512_set1_pd(0x1p52 + 0x1p31));
}

INLINED __m512d joined(__m512i high, __m512i low, int half)
{
    return _mm512_fmadd_pd(to_double(high, half), _mm512_set1_pd(256), to_double(low, half)); /* exact */
}

/* A block's sum is exact; its product with the scales and the addition round once each, as the oracle's. */
INLINED void add_scaled(double *acc, __m512d sum, double scale)
{
    __m512d term = _mm512_mul_pd(sum, _mm512_set1_pd(scale));
    _mm512_storeu_pd(acc, _mm512_add_pd(_mm512_loadu_pd(acc), term));
}

static void scale_row(const fp8_weights *w, const fp8_group *g, uint32_t b, uint32_t r, __m512i high,
                      __m512i low, double w_scale, double *acc)
{
    const fp8_block *block = &g->blocks[(uint64_t)b * g->n + r];
    bool with_rest = (block->with_rest | w->with_rest) != 0;
    __m512i b1, b0, c;
    if (with_rest) {
        rest_sums(w, g, b, r, &b1, &b0, &c);
    }
    for (int half = 0; half < 2; half++) {
        __m512d sum = _mm512_mul_pd(joined(high, low, half), _mm512_set1_pd(0x1p-12));
        if (with_rest) {
            __m512d cross = _mm512_fmadd_pd(joined(b1, b0, half), _mm512_set1_pd(8), to_double(c, half));
            sum = _mm512_fmadd_pd(cross, _mm512_set1_pd(0x1p-18), sum);
        }
        add_scaled(acc + 8 * half, sum, block->scale * w_scale);
    }
}

#define ROWS(n_)                                                                                             \
    case n_:                                                                                                 \
        main_sums(w, g, b, row0, high, low, n_);                                                             \
        break;

static void group_sums(const fp8_weights *w, const fp8_group *g, uint32_t b, double w_scale, vnni_sums acc)
{
    for (uint32_t row0 = 0; row0 < g->n; row0 += FP8_ROWS) {
        uint32_t n = g->n - row0 < FP8_ROWS ? g->n - row0 : FP8_ROWS;
        __m512i high[FP8_ROWS], low[FP8_ROWS];
        switch (n) {
            ROWS(1)
            ROWS(2)
            ROWS(3)
            ROWS(4)
        }
        for (uint32_t r = 0; r < n; r++) {
            scale_row(w, g, b, row0 + r, high[r], low[r], w_scale, acc[row0 + r]);
        }
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
            read_weights(w, o, b, &weights);
            find_nans(&weights, nan);
            for (uint32_t g = 0; g < n_group; g++) {
                fp8_group group = group_at(t, w->n_in, g);
                group_sums(&weights, &group, b, e4m3_scale(w, o, b), acc[g]);
            }
        }
        KN_FN(kn_vnni_put)(t, w, o, acc, nan);
    }
}

/* ---- preparing ---- */

uint64_t KN_FN(kn_vnni_fp8_bytes)(const kn_matrix *w)
{
    return (uint64_t)kn_blocks(w->n_out, VNNI_OUTS) * kn_blocks(w->n_in, CPU_CHUNK) * FP8_COLUMNS *
           sizeof(__m512i);
}

void KN_FN(kn_vnni_fp8_prepare)(const kn_matrix *w, void *out)
{
    __m512i *columns = out;
    for (uint32_t o = 0; o < w->n_out; o += VNNI_OUTS) {
        vnni_rows rows = vnni_rows_at(kn_host(w->data), w->n_in, o, w->n_out);
        for (uint32_t b = 0; b < kn_blocks(w->n_in, CPU_CHUNK); b++, columns += FP8_COLUMNS) {
            read_columns(&rows, w->n_in, b, columns);
        }
    }
}
