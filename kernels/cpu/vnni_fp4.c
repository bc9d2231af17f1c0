/* E2M1 weights. A doubled weight plus 12 is an unsigned byte; 12 times the sum of the inputs starts every sum
 * below zero. A block's integer sum stays under 2^28, is scaled exactly in double and added in block order.
 *
 * Bound: for up to two rows the read bandwidth; from four rows on the dot products, two for every four
 * weights and row, and a third for blocks that hold small values. */
#include "kernels/cpu/fp4_chunks.h"

enum {
    FP4_PIECE = 4, /* chunks multiplied with all rows before the next ones */
    FP4_BIAS = 12,
    FP4_OFFSET = 1 << 30, /* keeps sums positive; times 8 it leaves a dword */
};

/* One row of inputs and block. */
typedef struct fp4_block {
    uint64_t exponent; /* of the double that scales the sum, less the weights' */
    int32_t bias, bias_r;
} fp4_block;

/* Where the rows of one group stand in the scratch of a tile; K is k rounded up to CPU_CHUNK. */
typedef struct fp4_group {
    uint32_t n;         /* rows */
    uint8_t *digits;    /* [K / 8][n][4 dwords]: d1 and d0 of the even inputs, d1 and d0 of the odd ones */
    uint8_t *rest;      /* [K / 8][n][2 dwords]: r likewise */
    fp4_block *blocks;  /* [K / 32][n] */
    uint8_t *with_rest; /* [K / 32]: whether any row has an r there */
} fp4_group;

static fp4_group group_at(const cpu_q8_tile *t, uint32_t k, uint32_t g)
{
    uint64_t wide = cpu_round_up(k, CPU_CHUNK), row0 = (uint64_t)g * VNNI_GROUP;
    uint8_t *digits = (uint8_t *)t->x + VNNI_HEAD_BYTES, *rest = digits + 2 * wide * t->n,
            *blocks = rest + wide * t->n;
    uint8_t *with_rest = blocks + wide / KN_FP4_BLOCK * sizeof(fp4_block) * t->n;
    return (fp4_group){.n = t->n - (uint32_t)row0 < VNNI_GROUP ? t->n - (uint32_t)row0 : VNNI_GROUP,
                       .digits = digits + 2 * wide * row0,
                       .rest = rest + wide * row0,
                       .blocks = (fp4_block *)(void *)blocks + wide / KN_FP4_BLOCK * row0,
                       .with_rest = with_rest + wide / KN_FP4_BLOCK * g};
}

/* ---- loading ---- */

static void load_64(const fp4_group *g, uint32_t r, uint32_t at, __m512i codes)
{
    const vnni_digits *table = &KN_FN(kn_vnni_digits);
    const __m512i ones = _mm512_set1_epi8(1);
    /* In every eight the even ones first. */
    const __m512i order = _mm512_add_epi8(
        _mm512_set1_epi64(0x0705030106040200),
        _mm512_set_epi64(0x3838383838383838, 0x3030303030303030, 0x2828282828282828, 0x2020202020202020,
                         0x1818181818181818, 0x1010101010101010, 0x0808080808080808, 0));
    __m512i d1 = vnni_look_up(table->d1, codes), d0 = vnni_look_up(table->d0, codes),
            rest = vnni_look_up(table->r, codes);
    __m512i sum =
        _mm512_add_epi32(_mm512_slli_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, d1), 8),
                         _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, d0));
    __m512i sum_r = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, rest);
    uint64_t any = _mm512_test_epi8_mask(rest, rest);
    uint8_t pairs[2][64], rests[64];
    d1 = _mm512_permutexvar_epi8(order, d1);
    d0 = _mm512_permutexvar_epi8(order, d0);
    _mm512_storeu_si512(pairs[0], _mm512_unpacklo_epi32(d1, d0));
    _mm512_storeu_si512(pairs[1], _mm512_unpackhi_epi32(d1, d0));
    _mm512_storeu_si512(rests, _mm512_permutexvar_epi8(order, rest));
    for (uint32_t i = 0; i < 8; i++) {
        uint64_t to = (uint64_t)(at / FP4_STEP + i) * g->n + r;
        memcpy(g->digits + 16 * to, pairs[i % 2] + 16 * (i / 2), 16);
        memcpy(g->rest + 8 * to, rests + 8 * i, 8);
    }
    for (int half = 0; half < 2; half++) {
        uint32_t b = at / KN_FP4_BLOCK + (uint32_t)half;
        fp4_block *block = &g->blocks[(uint64_t)b * g->n + r];
        block->bias = FP4_OFFSET - FP4_BIAS * vnni_half_sum(sum, half);
        block->bias_r = FP4_OFFSET - FP4_BIAS * vnni_half_sum(sum_r, half);
        g->with_rest[b] |= (uint8_t)((any >> (32 * half) & 0xffffffffu) != 0);
    }
}

typedef struct load_job {
    const cpu_q8_tile *tile;
    uint32_t k;
} load_job;

static void load_group(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const load_job *j = arg;
    uint32_t n_block = cpu_round_up(j->k, CPU_CHUNK) / KN_FP4_BLOCK;
    (void)i_thread;
    for (uint32_t i = begin; i < end; i++) {
        fp4_group g = group_at(j->tile, j->k, i);
        memset(g.with_rest, 0, n_block);
        for (uint32_t r = 0; r < g.n; r++) {
            for (uint32_t at = 0; at < n_block * KN_FP4_BLOCK; at += 64) {
                load_64(&g, r, at,
                        at < j->k ? vnni_load_row(j->tile->codes[i * VNNI_GROUP + r], at, j->k)
                                  : _mm512_setzero_si512());
            }
        }
        /* Without an r sums count units of 8: three more in the exponent. Both scales have a bias of 127. */
        for (uint32_t b = 0; b < kn_blocks(j->k, KN_FP4_BLOCK); b++) {
            for (uint32_t r = 0; r < g.n; r++) {
                uint64_t scale = j->tile->scales[i * VNNI_GROUP + r][b * KN_FP4_BLOCK / KN_ACT_BLOCK];
                g.blocks[(uint64_t)b * g.n + r].exponent =
                    (scale + 1023 - 254 - FP4_UNIT_BITS + (g.with_rest[b] ? 0 : 3)) << 52;
            }
        }
    }
}

void KN_FN(kn_fp4_load)(kn_team *team, const cpu_q8_tile *tile, uint32_t k)
{
    load_job job = {.tile = tile, .k = k};
    kn_team_run(team, kn_blocks(tile->n, VNNI_GROUP), (uint64_t)VNNI_GROUP * k, load_group, &job);
}

/* ---- products ---- */

INLINED __m512i low_nibbles(__m512i columns)
{
    /* Entries repeat every 16: what the other nibble leaves in the upper bits of an index does not matter. */
    const __m512i biased =
        _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    return _mm512_permutexvar_epi8(columns, biased);
}

/* acc + dot products of the columns with the i-th dword at x. */
INLINED __m512i dot(__m512i acc, __m512i columns, const uint8_t *x, uint32_t i)
{
    int32_t dword;
    memcpy(&dword, x + 4 * i, 4);
    return _mm512_dpbusd_epi32(acc, columns, _mm512_set1_epi32(dword));
}

/* sum_out[r]: integer sums of one block, in units of 8 without rest, else of 1. */
INLINED void block_sums(const __m512i (*columns)[FP4_TILES], uint32_t k, const fp4_group *g, uint32_t b,
                        __m512i *sum_out, const uint32_t n)
{
    const fp4_block *block = g->blocks + (uint64_t)b * n;
    const uint8_t *x = g->digits + (uint64_t)b * FP4_BLOCK_STEPS * n * 16;
    __m512i high[VNNI_GROUP], low[VNNI_GROUP];
    for (uint32_t r = 0; r < n; r++) {
        high[r] = _mm512_setzero_si512();
        low[r] = _mm512_set1_epi32(block[r].bias);
    }
#pragma GCC unroll 4
    for (uint32_t s = 0; s < FP4_BLOCK_STEPS; s++) {
        __m512i even = low_nibbles(columns[s][k]), odd = low_nibbles(_mm512_srli_epi32(columns[s][k], 4));
        for (uint32_t r = 0; r < n; r++, x += 16) {
            high[r] = dot(high[r], even, x, 0);
            low[r] = dot(low[r], even, x, 1);
            high[r] = dot(high[r], odd, x, 2);
            low[r] = dot(low[r], odd, x, 3);
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        sum_out[r] = _mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]);
    }
}

INLINED void add_rest(const __m512i (*columns)[FP4_TILES], uint32_t k, const fp4_group *g, uint32_t b,
                      __m512i *sum, const uint32_t n)
{
    const fp4_block *block = g->blocks + (uint64_t)b * n;
    const uint8_t *x = g->rest + (uint64_t)b * FP4_BLOCK_STEPS * n * 8;
    for (uint32_t r = 0; r < n; r++) {
        sum[r] = _mm512_add_epi32(_mm512_slli_epi32(sum[r], 3), _mm512_set1_epi32(block[r].bias_r));
    }
#pragma GCC unroll 4
    for (uint32_t s = 0; s < FP4_BLOCK_STEPS; s++) {
        __m512i even = low_nibbles(columns[s][k]), odd = low_nibbles(_mm512_srli_epi32(columns[s][k], 4));
        for (uint32_t r = 0; r < n; r++, x += 8) {
            sum[r] = dot(sum[r], even, x, 0);
            sum[r] = dot(sum[r], odd, x, 1);
        }
    }
}

/* Adds sums, which are FP4_OFFSET too large, times 2^exponent. As the low dword of a double of exponent 2^52
 * an integer is its value. An integer times a power of two is exact: one rounding, that of the addition. */
INLINED void add_scaled(double *acc, __m512i sums, __m512i exponent)
{
    __m512d sum = _mm512_sub_pd(_mm512_castsi512_pd(sums), _mm512_set1_pd(0x1p52 + FP4_OFFSET));
    _mm512_storeu_pd(acc, _mm512_fmadd_pd(sum, _mm512_castsi512_pd(exponent), _mm512_loadu_pd(acc)));
}

/* Chunks c0 .. c0 + n_chunk - 1 of one tile of outputs; n_block: of all inputs. */
INLINED void group_chunks(const fp4_chunk *const *chunks, uint32_t k, const fp4_group *g, uint32_t c0,
                          uint32_t n_chunk, uint32_t n_block, vnni_sums acc, const uint32_t n)
{
    const __m512i two52 = _mm512_set1_epi32(0x43300000);
    uint32_t end = (c0 + n_chunk) * FP4_CHUNK_BLOCKS < n_block ? (c0 + n_chunk) * FP4_CHUNK_BLOCKS : n_block;
    for (uint32_t b = c0 * FP4_CHUNK_BLOCKS; b < end; b++) {
        const fp4_chunk *chunk = chunks[b / FP4_CHUNK_BLOCKS - c0];
        const __m512i(*columns)[FP4_TILES] = chunk->columns + b % FP4_CHUNK_BLOCKS * FP4_BLOCK_STEPS;
        const fp4_block *block = g->blocks + (uint64_t)b * n;
        __m512i sum[VNNI_GROUP], w_low = fp4_scale_exponents(chunk->scales[k], b, 0),
                                 w_high = fp4_scale_exponents(chunk->scales[k], b, 2);
        block_sums(columns, k, g, b, sum, n);
        if (g->with_rest[b]) {
            add_rest(columns, k, g, b, sum, n);
        }
        for (uint32_t r = 0; r < n; r++) {
            __m512i exponent = _mm512_set1_epi64((int64_t)block[r].exponent);
            add_scaled(acc[r], _mm512_unpacklo_epi32(sum[r], two52), _mm512_add_epi64(w_low, exponent));
            add_scaled(acc[r] + 8, _mm512_unpackhi_epi32(sum[r], two52), _mm512_add_epi64(w_high, exponent));
        }
    }
}

#define ROWS(n_)                                                                                             \
    case n_:                                                                                                 \
        group_chunks(chunks, k, g, c0, n_chunk, n_block, acc, n_);                                           \
        break;

static void group_piece(const fp4_chunk *const *chunks, uint32_t k, const fp4_group *g, uint32_t c0,
                        uint32_t n_chunk, uint32_t n_block, vnni_sums acc)
{
    switch (g->n) {
        ROWS(1)
        ROWS(2)
        ROWS(3)
        ROWS(4)
        ROWS(5)
        ROWS(6)
        ROWS(7)
        ROWS(8)
    }
}

/* ---- the tile of rows against tiles of outputs ---- */

/* n_tile tiles from i_tile on, which is even, at most VNNI_TILES, and all rows: the digits of a group and
 * piece are used for every tile, the columns of a piece for every group, while both are in the first cache.
 */
static void tiles_part(const cpu_q8_tile *t, const kn_matrix *w, uint32_t i_tile, uint32_t n_tile)
{
    uint32_t n_group = kn_blocks(t->n, VNNI_GROUP), n_chunk = kn_blocks(w->n_in, CPU_CHUNK);
    uint32_t n_block = kn_blocks(w->n_in, KN_FP4_BLOCK);
    uint16_t nan[VNNI_TILES][VNNI_OUTS] = {0};
    fp4_chunk buffer[VNNI_TILES / FP4_TILES][FP4_PIECE];
    const fp4_chunk *piece[VNNI_TILES / FP4_TILES][FP4_PIECE];
    vnni_sums acc[VNNI_TILES][VNNI_GROUPS_MAX];
    for (uint32_t i = 0; i < n_tile; i++) {
        memset(acc[i], 0, n_group * sizeof(acc[i][0]));
    }
    for (uint32_t c = 0; c < n_chunk; c += FP4_PIECE) {
        uint32_t n = n_chunk - c < FP4_PIECE ? n_chunk - c : FP4_PIECE;
        for (uint32_t i = 0; i < n_tile; i++) {
            for (uint32_t k = 0; k < n; k++) {
                const fp4_chunk **chunk = &piece[i / FP4_TILES][k];
                if (i % FP4_TILES == 0) {
                    *chunk = fp4_chunk_at(w, (i_tile + i) / FP4_TILES, c + k, &buffer[i / FP4_TILES][k]);
                }
                fp4_find_nans((*chunk)->scales[i % FP4_TILES], nan[i]);
            }
        }
        for (uint32_t g = 0; g < n_group; g++) {
            fp4_group group = group_at(t, w->n_in, g);
            for (uint32_t i = 0; i < n_tile; i++) {
                group_piece(piece[i / FP4_TILES], i % FP4_TILES, &group, c, n, n_block, acc[i][g]);
            }
        }
    }
    for (uint32_t i = 0; i < n_tile; i++) {
        KN_FN(kn_vnni_put)(t, w, (i_tile + i) * VNNI_OUTS, acc[i], nan[i]);
    }
}

void KN_FN(kn_fp4_part)(const cpu_q8_tile *t, const kn_matrix *w, uint32_t begin, uint32_t end)
{
    uint32_t at_once = t->n > VNNI_GROUP ? VNNI_TILES : FP4_TILES, n_tile = kn_blocks(w->n_out, VNNI_OUTS);
    end = end * FP4_TILES < n_tile ? end * FP4_TILES : n_tile;
    for (uint32_t i = begin * FP4_TILES; i < end; i += at_once) {
        tiles_part(t, w, i, end - i < at_once ? end - i : at_once);
    }
}
