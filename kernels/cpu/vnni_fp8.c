/* E4M3 weights, both sides in digits: x = 8 (256 d1 + d0) + r, w = 8 (255 e1 + e0) + s. Four products of
 * digits give 64 (256 (255 e1 d1 + e0 d1) + 255 e1 d0 + e0 d0); what r and s add is computed only where there
 * are any. Base 255 because its digits reach from -127 to 127: the digits
 * of -w are those of w negated, so a table has magnitudes only (128 bytes, one permutation of two registers)
 * and the sign is one masked subtraction. Weight digits are biased by 128 into unsigned bytes; sums start
 * below zero to make up for it. All is exact up to the block's sum.
 *
 * Few rows decode a column and multiply it while it is in registers; more rows share one decoding of a block.
 * A prepared matrix has its codes in columns, and behind them which columns of each block have an s.
 *
 * Bound: one and two rows the memory; from four on the dot products, four for every four weights and row.
 * docs/performance.md has what it reaches. */
#include "kernels/cpu/vnni.h"

enum {
    FP8_COLUMNS = CPU_CHUNK / 4, /* of a block */
    FP8_BIAS = 128,
    FP8_BASE = 255,   /* of the weights' digits */
    FP8_ROWS = 4,     /* whose sums fit the registers */
    FP8_SUMS = 4,     /* of one row: e1 d1, e1 d0, e0 d1, e0 d0 */
    FP8_AHEAD = 8192, /* bytes of weights that are asked for before they are needed */
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

/* An s that is not zero. */
typedef struct fp8_rest {
    uint8_t out, input; /* of the 16 outputs, of the block's inputs */
    int8_t s;
} fp8_rest;

/* The weights of one block and 16 outputs. */
typedef struct fp8_weights {
    const __m512i *codes; /* [FP8_COLUMNS]: in a prepared matrix, or buffer */
    __m512i buffer[FP8_COLUMNS];
    __m512i e1[FP8_COLUMNS], e0[FP8_COLUMNS]; /* biased; filled where several groups of rows read them */
    uint32_t with_rest;                       /* bit j: column j has an s, or a NaN */
    uint32_t n_rest;
    fp8_rest rest[VNNI_OUTS * CPU_CHUNK]; /* all s of the block */
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

/* ---- weights ---- */

/* Of a magnitude, in units of 2^-9: without NaN, and in eighths what has no rest. */
#define UNITS(c)   ((c) < 8 || (c) == 127 ? 0 : (8 + ((c)&7)) << (((c) >> 3) - 1))
#define EIGHTHS(c) (UNITS(c) % 8 != 0 ? 0 : UNITS(c) / 8)
#define DIGIT1(c)  ((EIGHTHS(c) + 127) / FP8_BASE)
#define BIASED1(c) (FP8_BIAS + DIGIT1(c))
#define BIASED0(c) (FP8_BIAS + EIGHTHS(c) - FP8_BASE * DIGIT1(c))
#define X4(f, c)   f(c), f((c) + 1), f((c) + 2), f((c) + 3)
#define X16(f, c)  X4(f, c), X4(f, (c) + 4), X4(f, (c) + 8), X4(f, (c) + 12)
#define X64(f, c)  X16(f, c), X16(f, (c) + 16), X16(f, (c) + 32), X16(f, (c) + 48)

/* Biased digits of the magnitudes 0 .. 63 and 64 .. 127. */
static const uint8_t FP8_DIGITS[2][2][64] = {{{X64(BIASED1, 0)}, {X64(BIASED1, 64)}},
                                             {{X64(BIASED0, 0)}, {X64(BIASED0, 64)}}};

/* The same in registers. */
typedef struct fp8_tables {
    __m512i digit[2][2];
} fp8_tables;

INLINED fp8_tables load_tables(void)
{
    fp8_tables t;
    for (int which = 0; which < 2; which++) {
        for (int half = 0; half < 2; half++) {
            t.digit[which][half] = _mm512_loadu_si512(FP8_DIGITS[which][half]);
            /* Otherwise the compiler reads them from memory at each use, beside all other loads. */
            __asm__("" : "+v"(t.digit[which][half]));
        }
    }
    return t;
}

/* Digit 1 (which 0) or 0 (which 1) of 64 codes. Of a negative one 128 - d = 0 - (128 + d) in a byte. */
INLINED __m512i weight_digit(const fp8_tables *t, __m512i codes, int which)
{
    __m512i digit = _mm512_permutex2var_epi8(t->digit[which][0], codes, t->digit[which][1]);
    return _mm512_mask_sub_epi8(digit, _mm512_movepi8_mask(codes), _mm512_setzero_si512(), digit);
}

/* Whether a column has an s, or a NaN. */
static inline bool column_with_rest(__m512i codes)
{
    const __m512i magnitude = _mm512_set1_epi8(127);
    __m512i rest = vnni_look_up(KN_FN(kn_vnni_digits).r, codes);
    return _mm512_test_epi8_mask(rest, rest) != 0 ||
           _mm512_cmpeq_epi8_mask(_mm512_and_si512(codes, magnitude), magnitude) != 0;
}

static uint32_t columns_with_rest(const __m512i columns[FP8_COLUMNS])
{
    uint32_t bits = 0;
    for (uint32_t j = 0; j < FP8_COLUMNS; j++) {
        bits |= (uint32_t)column_with_rest(columns[j]) << j;
    }
    return bits;
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

/* A prepared matrix: columns [tile of outputs][block][FP8_COLUMNS], then which have a rest
 * [tile of outputs][block]. */
static uint64_t n_prepared_blocks(const kn_matrix *m)
{
    return (uint64_t)kn_blocks(m->n_out, VNNI_OUTS) * kn_blocks(m->n_in, CPU_CHUNK);
}

/* Block b of the outputs at o. */
static void read_weights(const kn_matrix *m, uint32_t o, uint32_t b, fp8_weights *w)
{
    if (m->prepared) {
        uint64_t at = (uint64_t)(o / VNNI_OUTS) * kn_blocks(m->n_in, CPU_CHUNK) + b;
        const __m512i *columns = kn_host(m->data);
        w->codes = columns + at * FP8_COLUMNS;
        w->with_rest = ((const uint32_t *)(columns + n_prepared_blocks(m) * FP8_COLUMNS))[at];
    } else {
        vnni_rows rows = vnni_rows_at(kn_host(m->data), m->n_in, o, m->n_out);
        read_columns(&rows, m->n_in, b, w->buffer);
        w->codes = w->buffer;
        w->with_rest = columns_with_rest(w->buffer);
    }
}

/* Left to itself the machine reads too little ahead of so much arithmetic. */
INLINED void ask_ahead(const __m512i *codes)
{
    _mm_prefetch((const char *)codes + FP8_AHEAD, _MM_HINT_T0);
}

static void decode_columns(fp8_weights *w)
{
    fp8_tables tables = load_tables();
    for (uint32_t j = 0; j < FP8_COLUMNS; j++) {
        ask_ahead(&w->codes[j]);
        w->e1[j] = weight_digit(&tables, w->codes[j], 0);
        w->e0[j] = weight_digit(&tables, w->codes[j], 1);
    }
}

/* Notes what has a rest, and the first NaN of each output. */
static void find_rests(fp8_weights *w, uint16_t nan[VNNI_OUTS])
{
    const __m512i magnitude = _mm512_set1_epi8(127);
    w->n_rest = 0;
    for (uint32_t bits = w->with_rest; bits != 0; bits &= bits - 1) {
        uint32_t j = (uint32_t)__builtin_ctz(bits);
        uint8_t code[4 * VNNI_OUTS];
        int8_t s[4 * VNNI_OUTS];
        __m512i codes = w->codes[j], rests = vnni_look_up(KN_FN(kn_vnni_digits).r, codes);
        uint64_t with_s = _mm512_test_epi8_mask(rests, rests),
                 found = _mm512_cmpeq_epi8_mask(_mm512_and_si512(codes, magnitude), magnitude);
        _mm512_storeu_si512(s, rests);
        for (; with_s != 0; with_s &= with_s - 1) {
            uint32_t at = (uint32_t)__builtin_ctzll(with_s);
            w->rest[w->n_rest++] = (fp8_rest){(uint8_t)(at / 4), (uint8_t)(4 * j + at % 4), s[at]};
        }
        _mm512_storeu_si512(code, codes);
        for (; found != 0; found &= found - 1) {
            uint32_t at = (uint32_t)__builtin_ctzll(found);
            if (nan[at / 4] == 0) {
                nan[at / 4] = (uint16_t)(VNNI_NAN_CODE | (code[at] & 0x80) << 8);
            }
        }
    }
}

/* ---- products ---- */

/* acc + dot products of a column with the dword at x. The dword is broadcast by the load of the product
 * itself, twice a cycle; the compiler would share registers of broadcast dwords, which takes longer and
 * drives sums out of registers. */
INLINED __m512i dot(__m512i acc, __m512i column, const uint8_t *x)
{
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(column), "m"(*(const uint8_t(*)[4])x));
    return acc;
}

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

/* The low (0) or high (1) dwords of every four, in the order of vnni_sums. */
INLINED __m512d to_double(__m512i v, int high)
{
    const __m512i two52 = _mm512_set1_epi32(0x43300000);
    __m512i positive = _mm512_xor_si512(v, _mm512_set1_epi32(INT32_MIN));
    __m512i bits = high ? _mm512_unpackhi_epi32(positive, two52) : _mm512_unpacklo_epi32(positive, two52);
    return _mm512_sub_pd(_mm512_castsi512_pd(bits), _mm512_set1_pd(0x1p52 + 0x1p31));
}

/* high * factor + low, exact: two int32 and a factor of at most 2^8. */
INLINED __m512d joined(__m512i high, double factor, __m512i low, int half)
{
    return _mm512_fmadd_pd(to_double(high, half), _mm512_set1_pd(factor), to_double(low, half));
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
    return n_prepared_blocks(w) * (FP8_COLUMNS * sizeof(__m512i) + sizeof(uint32_t));
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
