/* E4M3 inputs and weights as 16-bit integers, one product for each weight and row, and exact.
 *
 * In units of 2^-9 an input is 2^shift X + r, 0 <= r < 2^shift, and a weight 8 W + s (vnni_fp8.h). The shift
 * is the least, from 3 to 9, for which the |X| of a block add up to FP8_INPUTS_MAX at most, so the block's
 * sum of X W is an integer of 32 bits. There are few others: about one r in a block whose inputs are about
 * normal, ten where most of them are small beside a few (a gated product). In units of 2^-15 a block's sum is
 *
 *     2^shift sum(X W) + sum(r W) + sum(f s) + sum(r' s) / 8
 *
 * with f the input in units of 2^-6, rounded down, and r' what that leaves, 0 to 7. The second and third are
 * one integer of less than 2^31: |r W| <= 511 28672 and |f s| <= 28672 7 for 128 inputs each. The last one is
 * not zero only where an input below 2^-3 meets such a weight. Both integers make one of 52 bits, which a
 * high dword of the block's exponent makes a double; all of it is exact up to the block's sum.
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
    FP8_FEW = 4,   /* rows, at most, for which columns are decoded while they are multiplied */
    FP8_ALONE = 2, /* entries a row, at most, that are added one by one */
    FP8_SHIFT = 3, /* least: X has 16 bits */
    FP8_ODD = (1 << FP8_SHIFT) - 1,
    FP8_UNITS = 448 << 9,              /* largest input */
    FP8_ONE_MORE = CPU_CHUNK,          /* an X that is rounded down to below zero has one more */
    FP8_LIST = VNNI_GROUP * FP8_PAIRS, /* most entries of a block and group */
};

/* What an int32 sum that is 2^31 too large has too much below a high dword of 2^52. */
#define FP8_TOO_MUCH (0x1p52 + 0x1p31)

/* One row of inputs and block. Its sum is made a double as an integer of 52 bits beside a high dword. */
typedef struct fp8_block {
    double off;         /* what that is too large by */
    uint64_t with_rest; /* bit p: pair p has an r */
    uint64_t odd;       /* bit p: pair p is no whole number of 2^-6 */
    uint32_t high;      /* that dword: the block's scale lies in it */
    uint32_t shift;
} fp8_block;

/* A pair of inputs that has an r. */
typedef struct fp8_entry {
    uint32_t pair; /* its r */
    uint16_t at;   /* which pair of the block, in bytes of decoded weights */
    uint16_t row;  /* of the group */
} fp8_entry;

/* Those of a group and block. Each entry alone is cheapest where there are hardly any, as of inputs that are
 * about normal. Where there are many, as beside outliers or of a gated product, rows have as many each,
 * filled up with zeros, one of each in turn, so that their sums stay in registers. */
typedef struct fp8_list {
    fp8_entry *entry;
    uint32_t n;
    bool in_step; /* the latter */
} fp8_list;

/* The rows of one group in the scratch of a tile. */
typedef struct fp8_group {
    uint32_t n;             /* rows */
    uint32_t row0, n_all;   /* first of them; rows of the tile */
    uint32_t *pairs, *fine; /* [K / 128][n_all]: of rows row0 .. of a block [FP8_PAIRS][n]: X, and inputs in
                               units of 2^-6, rounded down */
    fp8_block *blocks;      /* [K / 128][n_all] */
    fp8_list *lists;        /* [K / 128] */
    fp8_entry *entries;     /* block after block */
} fp8_group;

static fp8_group group_at(const cpu_q8_tile *t, uint32_t k, uint32_t i)
{
    uint64_t n_block = kn_blocks(k, CPU_CHUNK), n_row_block = n_block * t->n;
    fp8_group g = {.row0 = i * VNNI_GROUP, .n_all = t->n};
    static_assert(VNNI_HEAD_BYTES + CPU_Q8_ROWS * (2 * FP8_PAIRS * sizeof(*g.pairs) + sizeof(*g.blocks)) +
                          VNNI_GROUPS_MAX * (FP8_LIST * sizeof(*g.entries) + sizeof(*g.lists)) <=
                      CPU_X_BYTES * CPU_CHUNK,
                  "scratch");
    g.n = t->n - g.row0 < VNNI_GROUP ? t->n - g.row0 : VNNI_GROUP;
    g.pairs = (uint32_t *)(void *)((uint8_t *)t->x + VNNI_HEAD_BYTES);
    g.fine = g.pairs + n_row_block * FP8_PAIRS;
    g.blocks = (fp8_block *)(void *)(g.fine + n_row_block * FP8_PAIRS);
    g.entries = (fp8_entry *)(void *)(g.blocks + n_row_block);
    g.lists = (fp8_list *)(void *)(g.entries + kn_blocks(t->n, VNNI_GROUP) * n_block * FP8_LIST);
    g.entries += i * n_block * FP8_LIST;
    g.lists += i * n_block;
    return g;
}

/* Where the group's first row stands among those of block b. */
INLINED uint64_t first_at(const fp8_group *g, uint32_t b)
{
    return (uint64_t)b * g->n_all + g->row0;
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

/* The low words of 16 inputs, four columns, as pairs. */
static __m256i paired(__m512i words)
{
    __m512i pairs = _mm512_or_si512(_mm512_and_si512(words, _mm512_set1_epi32(0xffff)),
                                    _mm512_slli_epi32(_mm512_shuffle_epi32(words, 0xee), 16));
    return _mm512_castsi512_si256(_mm512_maskz_compress_epi64(0x55, pairs));
}

static uint32_t high_dword(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return (uint32_t)(bits >> 32);
}

/* Pairs of a block and row: X, fine, and r. */
typedef struct fp8_row {
    uint32_t x[FP8_PAIRS], fine[FP8_PAIRS], rest[FP8_PAIRS];
} fp8_row;

static fp8_block load_block(const uint8_t *codes, double scale, fp8_row *row_out)
{
    __m512i units[8], sum = _mm512_setzero_si512();
    uint64_t with_rest = 0, odd = 0;
    for (uint32_t i = 0; i < 8; i++) {
        units[i] = units_of(codes + 16 * i);
        sum = _mm512_add_epi32(sum, _mm512_abs_epi32(units[i]));
    }
    uint32_t shift = shift_of((uint32_t)_mm512_reduce_add_epi32(sum));
    const __m512i low_bits = _mm512_set1_epi32((1 << shift) - 1);
    for (uint32_t i = 0; i < 8; i++) {
        __m256i rest = paired(_mm512_and_si512(units[i], low_bits));
        __m256i x = paired(_mm512_sra_epi32(units[i], _mm_cvtsi32_si128((int)shift)));
        _mm256_storeu_si256((__m256i *)(void *)(row_out->x + 8 * i), x);
        _mm256_storeu_si256((__m256i *)(void *)(row_out->fine + 8 * i),
                            paired(_mm512_srai_epi32(units[i], FP8_SHIFT)));
        _mm256_storeu_si256((__m256i *)(void *)(row_out->rest + 8 * i), rest);
        with_rest |= (uint64_t)_mm256_test_epi32_mask(rest, rest) << 8 * i;
        odd |= (uint64_t)_mm256_test_epi32_mask(rest, _mm256_set1_epi16(FP8_ODD)) << 8 * i;
    }
    return (fp8_block){.off = (FP8_TOO_MUCH + 0x1p31 * (1u << shift)) * 0x1p-15 * scale,
                       .with_rest = with_rest,
                       .odd = odd,
                       .high = high_dword(0x1p52 * 0x1p-15 * scale),
                       .shift = shift};
}

/* Lists the pairs of n rows that have an r, the first one of each row before the second of any: products with
 * one row wait for each other. */
static fp8_list list_rests(const fp8_row *rows, const fp8_block *blocks, uint32_t n, fp8_entry *entries)
{
    uint64_t left[VNNI_GROUP], any = 0;
    fp8_list list = {.entry = entries};
    uint32_t n_rest = 0;
    for (uint32_t r = 0; r < n; r++) {
        left[r] = blocks[r].with_rest;
        any |= left[r];
        n_rest += (uint32_t)__builtin_popcountll(left[r]);
    }
    list.in_step = n_rest > FP8_ALONE * n;
    for (; any != 0;) {
        any = 0;
        for (uint32_t r = 0; r < n; r++) {
            bool there = left[r] != 0;
            uint32_t p = there ? (uint32_t)__builtin_ctzll(left[r]) : 0;
            entries[list.n] = (fp8_entry){.pair = there ? rows[r].rest[p] : 0,
                                          .at = (uint16_t)(p * sizeof(__m512i)),
                                          .row = (uint16_t)r};
            list.n += there || list.in_step;
            left[r] &= left[r] - 1;
            any |= left[r];
        }
    }
    return list;
}

/* The rows of a group side by side. */
static void put_rows(const fp8_group *g, uint32_t b, const fp8_row *rows)
{
    uint64_t first = first_at(g, b) * FP8_PAIRS;
    __mmask8 there = (__mmask8)((1u << g->n) - 1);
    vnni_rows from;
    for (uint32_t r = 0; r < VNNI_GROUP; r++) {
        const fp8_row *row = &rows[r < g->n ? r : 0];
        from.row[r] = (const uint8_t *)row->x;
        from.row[VNNI_GROUP + r] = (const uint8_t *)row->fine;
    }
    for (uint32_t p = 0; p < FP8_PAIRS; p += 16) {
        __m512i column[16];
        KN_FN(kn_vnni_columns)(&from, p * sizeof(uint32_t), FP8_PAIRS * sizeof(uint32_t), column);
        for (uint32_t i = 0; i < 16; i++) {
            uint64_t at = first + (p + i) * g->n;
            _mm256_mask_storeu_epi32(g->pairs + at, there, _mm512_castsi512_si256(column[i]));
            _mm256_mask_storeu_epi32(g->fine + at, there, _mm512_extracti64x4_epi64(column[i], 1));
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
        fp8_entry *entries = g.entries;
        for (uint32_t at = 0, b = 0; at < j->k; at += CPU_CHUNK, b++) {
            fp8_row rows[VNNI_GROUP];
            for (uint32_t r = 0; r < g.n; r++) {
                uint8_t spare[CPU_CHUNK];
                uint32_t row = g.row0 + r, len = chunk_len(j->k, at);
                g.blocks[first_at(&g, b) + r] =
                    load_block(chunk_bytes(j->tile->codes[row], at, len, CPU_CHUNK, spare),
                               kn_e8m0_decode(j->tile->scales[row][b]), &rows[r]);
            }
            g.lists[b] = list_rests(rows, g.blocks + first_at(&g, b), g.n, entries);
            entries += g.lists[b].n;
            put_rows(&g, b, rows);
        }
    }
}

void KN_FN(kn_vnni_fp8_load)(kn_team *team, const cpu_q8_tile *tile, uint32_t k)
{
    load_job job = {.tile = tile, .k = k};
    kn_team_run(team, kn_blocks(tile->n, VNNI_GROUP), (uint64_t)VNNI_GROUP * k, load_group, &job);
}

/* ---- products ---- */

/* A row's block in registers. */
typedef struct fp8_factors {
    __m512i shift, high;
    __m512d off;
} fp8_factors;

INLINED fp8_factors factors_of(const fp8_block *block)
{
    return (fp8_factors){_mm512_set1_epi64(block->shift), _mm512_set1_epi32((int32_t)block->high),
                         _mm512_set1_pd(block->off)};
}

/* 2^shift main + rest, both 2^31 too large, as doubles: of the low (0) or high (1) dwords of every four. */
INLINED __m512d as_doubles(__m512i main, __m512i rest, const fp8_factors *f, int half)
{
    const __m512i zero = _mm512_setzero_si512();
    __m512i wide = half ? _mm512_unpackhi_epi32(main, zero) : _mm512_unpacklo_epi32(main, zero),
            with_high = half ? _mm512_unpackhi_epi32(rest, f->high) : _mm512_unpacklo_epi32(rest, f->high);
    __m512i bits = _mm512_add_epi64(_mm512_sllv_epi64(wide, f->shift), with_high);
    return _mm512_sub_pd(_mm512_castsi512_pd(bits), f->off);
}

/* Sums of a group and block, all 2^31 too large, and where they belong. */
typedef struct fp8_sums {
    __m512i main[FP8_TILES][VNNI_GROUP]; /* of X W */
    __m512i rest[FP8_TILES][VNNI_GROUP]; /* of r W and fine s */
    const fp8_block *block;              /* of the first row */
    uint64_t with_rest[FP8_TILES];       /* bit p: weights of pair p have an s */
    double w_scale[FP8_TILES];
    vnni_sums *acc[FP8_TILES];
} fp8_sums;

/* acc + W of an entry's pair with its r; the pair is decoded first where the block is not. */
INLINED __m512i add_entry(__m512i acc, const fp8_weights *w, const fp8_entry *e, const bool decoded)
{
    if (decoded) {
        return dot(acc, *(const __m512i *)(const void *)((const uint8_t *)w->pairs + e->at), e->pair);
    }
    uint32_t p = e->at / (uint32_t)sizeof(__m512i);
    fp8_tables tables = load_tables();
    fp8_column column = decode_column(&tables, w->codes[p / 2]);
    return dot(dot(acc, column.pair[0], p % 2 == 0 ? e->pair : 0), column.pair[1], p % 2 == 1 ? e->pair : 0);
}

/* Adds those of a list of as many of each row, one row's sums in a register. The block is decoded. */
INLINED void add_in_step(const fp8_weights *w, const fp8_list *list, const uint32_t n_tile, const uint32_t n,
                         fp8_sums *sums)
{
    __m512i sum[FP8_TILES][VNNI_GROUP];
    for (uint32_t r = 0; r < n; r++) {
        for (uint32_t k = 0; k < n_tile; k++) {
            sum[k][r] = sums->rest[k][r];
        }
    }
    for (const fp8_entry *e = list->entry, *end = e + list->n; e < end; e += n) {
        for (uint32_t r = 0; r < n; r++) {
            for (uint32_t k = 0; k < n_tile; k++) {
                sum[k][r] = add_entry(sum[k][r], &w[k], &e[r], true);
            }
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        for (uint32_t k = 0; k < n_tile; k++) {
            sums->rest[k][r] = sum[k][r];
        }
    }
}

/* Sums r and s of n rows and n_tile tiles. */
INLINED void sum_rests(const fp8_weights *w, const fp8_group *g, uint32_t b, const uint32_t n_tile,
                       const uint32_t n, const bool decoded, const bool in_step, fp8_sums *sums)
{
    const uint32_t *fine = g->fine + first_at(g, b) * FP8_PAIRS;
    const fp8_list *list = &g->lists[b];
    for (uint32_t k = 0; k < n_tile; k++) {
        __m512i sum[VNNI_GROUP];
        sums->with_rest[k] = 0;
        for (uint32_t r = 0; r < n; r++) {
            sum[r] = _mm512_set1_epi32(INT32_MIN);
        }
        for (uint32_t i = 0; i < w[k].n_rest; i++) {
            const uint32_t *x = fine + w[k].rest_of[i] * n;
            sums->with_rest[k] |= 1ull << w[k].rest_of[i];
            for (uint32_t r = 0; r < n; r++) {
                sum[r] = dot(sum[r], w[k].rests[i], x[r]);
            }
        }
        for (uint32_t r = 0; r < n; r++) {
            sums->rest[k][r] = sum[r];
        }
    }
    if (in_step) {
        add_in_step(w, list, n_tile, n, sums);
        return;
    }
    for (const fp8_entry *e = list->entry, *end = e + list->n; e < end; e++) {
        for (uint32_t k = 0; k < n_tile; k++) {
            sums->rest[k][e->row] = add_entry(sums->rest[k][e->row], &w[k], e, decoded);
        }
    }
}

/* Adds a block's sum of a row. It is exact; its product with the weights' scale and the addition round once
 * each, as the oracle's. */
INLINED void add_half(__m512d sum, __m512d w_scale, double *acc)
{
    _mm512_store_pd(acc, _mm512_add_pd(_mm512_load_pd(acc), _mm512_mul_pd(sum, w_scale)));
}

INLINED void add_row(const fp8_sums *sums, uint32_t k, uint32_t r)
{
    fp8_factors f = factors_of(&sums->block[r]);
    __m512d w_scale = _mm512_set1_pd(sums->w_scale[k]);
    __m512i main = sums->main[k][r], rest = sums->rest[k][r];
    double *acc = (*sums->acc[k])[r];
    add_half(as_doubles(main, rest, &f, 0), w_scale, acc);
    add_half(as_doubles(main, rest, &f, 1), w_scale, acc + 8);
}

static void add_rows(const fp8_sums *sums, uint32_t n_tile, uint32_t n)
{
    for (uint32_t r = 0; r < n; r++) {
        for (uint32_t k = 0; k < n_tile; k++) {
            add_row(sums, k, r);
        }
    }
}

/* Whether one row may meet the weights of any tile where both have a rest. */
INLINED bool both_meet(const fp8_sums *sums, const uint32_t n_tile, const uint32_t n)
{
    uint64_t odd = 0;
    for (uint32_t r = 0; r < n; r++) {
        odd |= sums->block[r].odd;
    }
    return (odd & (n_tile > 1 ? sums->with_rest[0] | sums->with_rest[1] : sums->with_rest[0])) != 0;
}

/* The r of pair p of row r, which has one. */
static uint32_t find_rest(const fp8_group *g, uint32_t b, uint32_t r, uint32_t p)
{
    const fp8_list *list = &g->lists[b];
    const fp8_entry *e = list->entry;
    if (list->in_step) {
        uint64_t before = g->blocks[first_at(g, b) + r].with_rest & ((1ull << p) - 1);
        return e[(uint32_t)__builtin_popcountll(before) * g->n + r].pair;
    }
    while (e->row != r || e->at != p * sizeof(__m512i)) {
        e++;
    }
    return e->pair;
}

/* Sums of r' s of row r. */
static __m512i both_rests(const fp8_weights *w, const fp8_group *g, uint32_t b, uint32_t r)
{
    uint64_t odd = g->blocks[first_at(g, b) + r].odd;
    __m512i sum = _mm512_set1_epi32(INT32_MIN);
    for (uint32_t i = 0; i < w->n_rest; i++) {
        uint32_t p = w->rest_of[i];
        if ((odd >> p & 1) != 0) {
            sum = dot(sum, w->rests[i], find_rest(g, b, r, p) & (FP8_ODD | FP8_ODD << 16));
        }
    }
    return sum;
}

/* Adds the sums of rows and tiles where an input and a weight meet that both have a rest, and leaves zero of
 * them: hardly ever, so with both as doubles. */
APART void add_both(const fp8_weights *w, const fp8_group *g, uint32_t b, fp8_sums *sums, uint32_t n_tile)
{
    for (uint32_t r = 0; r < g->n; r++) {
        const fp8_block *block = &sums->block[r];
        for (uint32_t k = 0; k < n_tile; k++) {
            if ((block->odd & sums->with_rest[k]) == 0) {
                continue;
            }
            double unit = block->off / (FP8_TOO_MUCH + 0x1p31 * (double)(1u << block->shift));
            fp8_factors f = factors_of(block);
            __m512i both = both_rests(&w[k], g, b, r);
            for (int half = 0; half < 2; half++) {
                __m512d sum = as_doubles(sums->main[k][r], sums->rest[k][r], &f, half);
                sum = _mm512_fmadd_pd(to_double(both, half), _mm512_set1_pd(0.125 * unit), sum);
                add_half(sum, _mm512_set1_pd(sums->w_scale[k]), (*sums->acc[k])[r] + 8 * half);
            }
            sums->main[k][r] = sums->rest[k][r] = _mm512_set1_epi32(INT32_MIN);
        }
    }
}

/* n rows of a group and FP8_TILES tiles, decoded. A full group adds the last one's sums in passing: its
 * products leave room for that. */
INLINED void multiply(const fp8_weights *w, const uint32_t *x, const fp8_sums *last, fp8_sums *sums,
                      const uint32_t n)
{
    enum { STEPS = FP8_TILES * VNNI_GROUP, STEP = FP8_PAIRS / STEPS };
    const __m512i *w0 = w[0].pairs, *w1 = w[1].pairs;
    __m512i sum[FP8_TILES][VNNI_GROUP];
#pragma GCC unroll 8
    for (uint32_t r = 0; r < n; r++) {
        sum[0][r] = sum[1][r] = _mm512_set1_epi32(INT32_MIN);
    }
    for (uint32_t step = 0; step < STEPS; step++, w0 += STEP, w1 += STEP, x += STEP * n) {
#pragma GCC unroll 4
        for (uint32_t p = 0; p < STEP; p++) {
            __m512i of0 = w0[p], of1 = w1[p];
#pragma GCC unroll 8
            for (uint32_t r = 0; r < n; r++) {
                sum[0][r] = dot(sum[0][r], of0, x[p * n + r]);
                sum[1][r] = dot(sum[1][r], of1, x[p * n + r]);
            }
        }
        if (n == VNNI_GROUP) {
            add_row(last, step % FP8_TILES, step / FP8_TILES);
        }
    }
#pragma GCC unroll 8
    for (uint32_t r = 0; r < n; r++) {
        sums->main[0][r] = sum[0][r];
        sums->main[1][r] = sum[1][r];
    }
}

/* One copy for each number of rows. Rests are summed by another: what the compiler merges of both costs more
 * than a call. */
typedef void (*group_fn)(const fp8_weights *w, const uint32_t *x, const fp8_sums *last, fp8_sums *sums);
typedef void (*rests_fn)(const fp8_weights *w, const fp8_group *g, uint32_t b, fp8_sums *sums);
#define GROUP(n_)                                                                                            \
    APART void group_rests_##n_(const fp8_weights *w, const fp8_group *g, uint32_t b, fp8_sums *sums)        \
    {                                                                                                        \
        if (g->lists[b].in_step) {                                                                           \
            sum_rests(w, g, b, FP8_TILES, n_, true, true, sums);                                             \
        } else {                                                                                             \
            sum_rests(w, g, b, FP8_TILES, n_, true, false, sums);                                            \
        }                                                                                                    \
    }                                                                                                        \
    APART void group_rows_##n_(const fp8_weights *w, const uint32_t *x, const fp8_sums *last,                \
                               fp8_sums *sums)                                                               \
    {                                                                                                        \
        multiply(w, x, last, sums, n_);                                                                      \
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
static const rests_fn GROUP_RESTS[] = {NULL,          group_rests_1, group_rests_2,
                                       group_rests_3, group_rests_4, group_rests_5,
                                       group_rests_6, group_rests_7, group_rests_8};

/* All n rows of a tile that has few, and one tile of outputs, whose columns are decoded in passing. Pairs
 * have sums of their own, so that one row need not wait for its last product. */
INLINED void multiply_few(fp8_weights *w, const fp8_group *g, uint32_t b, fp8_sums *sums, const uint32_t n,
                          const bool in_step)
{
    const uint32_t *x = g->pairs + first_at(g, b) * FP8_PAIRS;
    fp8_tables tables = load_tables();
    __m512i sum[2][FP8_FEW];
    for (uint32_t r = 0; r < n; r++) {
        sum[0][r] = _mm512_set1_epi32(INT32_MIN);
        sum[1][r] = _mm512_setzero_si512();
    }
    for (uint32_t j0 = 0; j0 < FP8_COLUMNS; j0 += 2) {
#pragma GCC unroll 2
        for (uint32_t j = j0; j < j0 + 2; j++, x += 2 * n) {
            fp8_column column = decode_column(&tables, w->codes[j]);
            ask_ahead(&w->codes[j]);
#pragma GCC unroll 2
            for (uint32_t i = 0; i < 2; i++) {
                if (in_step) {
                    w->pairs[2 * j + i] = column.pair[i];
                }
#pragma GCC unroll 4
                for (uint32_t r = 0; r < n; r++) {
                    sum[i][r] = dot(sum[i][r], column.pair[i], x[i * n + r]);
                }
            }
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        sums->main[0][r] = _mm512_add_epi32(sum[0][r], sum[1][r]);
    }
    sum_rests(w, g, b, 1, n, in_step, in_step, sums);
    if (__builtin_expect(both_meet(sums, 1, n), 0)) {
        add_both(w, g, b, sums, 1);
    }
    add_rows(sums, 1, n);
}

/* One copy for each number of rows, and each kind of list. */
typedef void (*few_fn)(fp8_weights *w, const fp8_group *g, uint32_t b, fp8_sums *sums);
#define FEW(n_)                                                                                              \
    APART void few_rows_##n_(fp8_weights *w, const fp8_group *g, uint32_t b, fp8_sums *sums)                 \
    {                                                                                                        \
        multiply_few(w, g, b, sums, n_, false);                                                              \
    }                                                                                                        \
    APART void few_in_step_##n_(fp8_weights *w, const fp8_group *g, uint32_t b, fp8_sums *sums)              \
    {                                                                                                        \
        multiply_few(w, g, b, sums, n_, true);                                                               \
    }
FEW(1)
FEW(2)
FEW(3)
FEW(4)
static const few_fn FEW_ROWS[][2] = {{NULL, NULL},
                                     {few_rows_1, few_in_step_1},
                                     {few_rows_2, few_in_step_2},
                                     {few_rows_3, few_in_step_3},
                                     {few_rows_4, few_in_step_4}};

/* The first tile twice where there is no second. */
typedef struct fp8_tiles {
    fp8_weights w[FP8_TILES];
    uint32_t out[FP8_TILES], n; /* first outputs; how many tiles there are */
    uint16_t nan[FP8_TILES][VNNI_OUTS];
    _Alignas(64) vnni_sums acc[FP8_TILES][VNNI_GROUPS_MAX]; /* else every register of it lies in two lines */
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
    fp8_sums sums;
    for (uint32_t k = 0; k < tiles->n; k++) {
        sums.acc[0] = tiles->acc[k];
        for (uint32_t b = 0; b < kn_blocks(w->n_in, CPU_CHUNK); b++) {
            sums.block = g.blocks + first_at(&g, b);
            sums.w_scale[0] = open_block(w, b, tiles, k);
            FEW_ROWS[g.n][g.lists[b].in_step](&tiles->w[k], &g, b, &sums);
        }
    }
}

/* Inputs that meet an s stand apart, where the machine does not expect them to be read. */
static void ask_fine(const fp8_weights *w, const fp8_group *g, uint32_t b)
{
    const uint32_t *fine = g->fine + first_at(g, b) * FP8_PAIRS;
    for (uint32_t k = 0; k < FP8_TILES; k++) {
        for (uint32_t i = 0; i < w[k].n_rest; i++) {
            _mm_prefetch((const char *)(fine + w[k].rest_of[i] * g->n), _MM_HINT_T0);
        }
    }
}

/* Sums of group i, and those of the last one added. */
INLINED void group_sums(const fp8_weights *w, const fp8_group *g, uint32_t b, const fp8_sums *last,
                        fp8_sums *sums)
{
    sums->block = g->blocks + first_at(g, b);
    GROUP_RESTS[g->n](w, g, b, sums);
    GROUP_ROWS[g->n](w, g->pairs + first_at(g, b) * FP8_PAIRS, last, sums);
    if (__builtin_expect(both_meet(sums, FP8_TILES, g->n), 0)) {
        add_both(w, g, b, sums, FP8_TILES);
    }
    if (g->n < VNNI_GROUP) {
        add_rows(sums, FP8_TILES, g->n);
    }
}

static void many_sums(const cpu_q8_tile *t, const kn_matrix *w, fp8_tiles *tiles)
{
    uint32_t n_group = kn_blocks(t->n, VNNI_GROUP), now = 0;
    _Alignas(64) vnni_sums spare = {{0}};
    fp8_group group[VNNI_GROUPS_MAX];
    fp8_sums sums[2]; /* of this group; of the last full one, not added yet, or zeros to be added to spare */
    for (uint32_t i = 0; i < n_group; i++) {
        group[i] = group_at(t, w->n_in, i);
    }
    sums[1] = (fp8_sums){.block = group[0].blocks, .acc = {&spare, &spare}};
    for (uint32_t b = 0; b < kn_blocks(w->n_in, CPU_CHUNK); b++) {
        double scale[FP8_TILES];
        for (uint32_t k = 0; k < FP8_TILES; k++) {
            scale[k] = open_block(w, b, tiles, k);
            decode_columns(&tiles->w[k]);
        }
        for (uint32_t i = 0; i < n_group; i++) {
            ask_fine(tiles->w, &group[i], b);
        }
        for (uint32_t i = 0; i < n_group; i++) {
            memcpy(sums[now].w_scale, scale, sizeof(scale));
            sums[now].acc[0] = &tiles->acc[0][i];
            sums[now].acc[1] = &tiles->acc[1][i];
            group_sums(tiles->w, &group[i], b, &sums[1 - now], &sums[now]);
            now = group[i].n == VNNI_GROUP ? 1 - now : now;
        }
    }
    add_rows(&sums[1 - now], FP8_TILES, VNNI_GROUP);
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
        for (uint32_t k = 0; k < FP8_TILES; k++) {
            memset(tiles.acc[k], 0, kn_blocks(t->n, VNNI_GROUP) * sizeof(tiles.acc[k][0]));
        }
        if (t->n <= FP8_FEW) {
            few_sums(t, w, &tiles);
        } else {
            many_sums(t, w, &tiles);
        }
        for (uint32_t k = 0; k < tiles.n; k++) {
            KN_FN(kn_vnni_put)(t, w, tiles.out[k], tiles.acc[k], tiles.nan[k]);
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
