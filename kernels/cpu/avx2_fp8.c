/* E4M3 inputs and weights: x = 8 v + r, w = 8 (64 a + b) + s (avx2_fp8.h). Two products of 16 bits give 64 v
 * (64 a + b); what r and s add, r w + 8 v s, is computed one by one where there are any. All is exact up to
 * the block's sum.
 *
 * Bound: the products, two vpmaddwd and their additions for a row and 16 weights; for one row the decoding,
 * 13 instructions for 32 weights, beside them. */
#include <assert.h>

#include "kernels/cpu/avx2_fp8.h"

/* One row of inputs and block. */
typedef struct fp8_block {
    double scale;          /* times 2^-18: of units of 2^-18 */
    uint32_t with_rest[4]; /* bit i of word j: input 32 j + i has an r */
    uint32_t any_rest;
} fp8_block;

/* Where the rows of one group stand in the scratch of a tile; K is k rounded up to CPU_CHUNK. */
typedef struct fp8_group {
    uint32_t n;        /* rows */
    uint8_t *x;        /* [K / 4][2][n]: v of the inputs 0 and 2, then of 1 and 3 */
    int8_t *rest;      /* [n][K]: r */
    fp8_block *blocks; /* [K / 128][n] */
} fp8_group;

static fp8_group group_at(const cpu_q8_tile *t, uint32_t k, uint32_t g)
{
    uint64_t wide = cpu_round_up(k, CPU_CHUNK), row0 = (uint64_t)g * AVX2_GROUP;
    uint8_t *x = (uint8_t *)t->x + AVX2_HEAD_BYTES, *rest = x + 2 * wide * t->n, *blocks = rest + wide * t->n;
    static_assert(CPU_Q8_ROWS * (3 + 1) <= CPU_X_BYTES && sizeof(fp8_block) < CPU_CHUNK - 2, "scratch");
    return (fp8_group){.n = t->n - (uint32_t)row0 < AVX2_GROUP ? t->n - (uint32_t)row0 : AVX2_GROUP,
                       .x = x + 2 * wide * row0,
                       .rest = (int8_t *)rest + wide * row0,
                       .blocks = (fp8_block *)(void *)blocks + wide / CPU_CHUNK * row0};
}

/* ---- loading ---- */

/* v and r of a block's codes, in a loop of its own so that it becomes vector code. */
APART void split_codes(const uint8_t *codes, int16_t *v_out, int8_t *r_out)
{
    for (int i = 0; i < CPU_CHUNK; i++) {
        int32_t units = avx2_units(codes[i]), rest = (units & 7) == 0 ? 0 : units;
        r_out[i] = (int8_t)rest;
        v_out[i] = (int16_t)((units - rest) / 8);
    }
}

static void load_block(const fp8_group *g, uint32_t r, uint32_t b, const uint8_t *codes, int8_t *rest,
                       uint8_t scale)
{
    fp8_block *block = &g->blocks[(uint64_t)b * g->n + r];
    int16_t v[CPU_CHUNK];
    split_codes(codes, v, rest);
    for (uint32_t c = 0; c < FP8_COLUMNS; c++) {
        for (uint32_t i = 0; i < 2; i++) {
            int16_t pair[2] = {v[4 * c + i], v[4 * c + i + 2]};
            memcpy(g->x + ((((uint64_t)b * FP8_COLUMNS + c) * 2 + i) * g->n + r) * 4, pair, sizeof(pair));
        }
    }
    block->any_rest = 0;
    for (int j = 0; j < CPU_CHUNK / 32; j++) {
        __m256i is_zero = _mm256_cmpeq_epi8(
            _mm256_loadu_si256((const __m256i *)(const void *)(rest + 32 * j)), _mm256_setzero_si256());
        block->with_rest[j] = ~(uint32_t)_mm256_movemask_epi8(is_zero);
        block->any_rest |= block->with_rest[j];
    }
    block->scale = 0x1p-18 * kn_e8m0_decode(scale);
}

typedef struct load_job {
    const cpu_q8_tile *tile;
    uint32_t k;
} load_job;

static void load_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const load_job *j = arg;
    (void)i_thread;
    for (uint32_t row = begin; row < end; row++) {
        fp8_group g = group_at(j->tile, j->k, row / AVX2_GROUP);
        uint32_t r = row % AVX2_GROUP;
        int8_t *rest = g.rest + (uint64_t)r * cpu_round_up(j->k, CPU_CHUNK);
        for (uint32_t at = 0; at < j->k; at += CPU_CHUNK) {
            uint8_t spare[CPU_CHUNK];
            load_block(&g, r, at / CPU_CHUNK,
                       chunk_bytes(j->tile->codes[row], at, chunk_len(j->k, at), CPU_CHUNK, spare), rest + at,
                       j->tile->scales[row][at / KN_ACT_BLOCK]);
        }
    }
}

void KN_FN(kn_avx2_fp8_load)(kn_team *team, const cpu_q8_tile *tile, uint32_t k)
{
    load_job job = {.tile = tile, .k = k};
    kn_team_run(team, tile->n, 4ull * k, load_part, &job);
}

/* ---- products ---- */

/* Byte i of every dword of recoded codes in units of 2^-9. */
INLINED __m256i units_of(__m256i codes, uint32_t i)
{
    __m256i code = _mm256_srl_epi32(codes, _mm_cvtsi32_si128((int32_t)(8 * i)));
    __m256i exponent = _mm256_and_si256(_mm256_srli_epi32(code, 4), _mm256_set1_epi32(15)),
            m = _mm256_and_si256(code, _mm256_set1_epi32(7)),
            is_normal = _mm256_cmpgt_epi32(exponent, _mm256_setzero_si256()),
            minus = _mm256_srai_epi32(_mm256_slli_epi32(code, 28), 31);
    m = _mm256_or_si256(m, _mm256_and_si256(is_normal, _mm256_set1_epi32(8)));
    m = _mm256_sllv_epi32(m, _mm256_add_epi32(exponent, is_normal));
    return _mm256_sub_epi32(_mm256_xor_si256(m, minus), minus);
}

/* Adds x to the sum of one output. */
INLINED void add_to_output(__m256i sum[2], uint32_t out, int32_t x)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), wanted = _mm256_set1_epi32((int32_t)out),
                  by = _mm256_set1_epi32(x);
    __m256i lower = _mm256_cmpeq_epi32(lane, wanted),
            upper = _mm256_cmpeq_epi32(lane, _mm256_sub_epi32(wanted, _mm256_set1_epi32(AVX2_HALF)));
    sum[0] = _mm256_add_epi32(sum[0], _mm256_and_si256(lower, by));
    sum[1] = _mm256_add_epi32(sum[1], _mm256_and_si256(upper, by));
}

/* Of one row and block what r and s add, in units of 2^-18: r w and 8 v s. Fits 32 bits, as an input with an
 * r has no v. */
static void rest_sums(const fp8_weights *w, const fp8_group *g, uint32_t k, uint32_t b, uint32_t r,
                      __m256i sum_out[2])
{
    const fp8_block *block = &g->blocks[(uint64_t)b * g->n + r];
    const uint8_t *x = g->x + ((uint64_t)b * FP8_COLUMNS * 2 * g->n + r) * 4;
    const int8_t *rest = g->rest + (uint64_t)r * cpu_round_up(k, CPU_CHUNK) + (uint64_t)b * CPU_CHUNK;
    __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (const fp8_rest *at = w->rest; at < w->rest + w->n_rest; at++) {
        int16_t v;
        memcpy(&v, x + (at->input / 4u * 2 + at->input % 2u) * g->n * 4 + at->input % 4u / 2 * 2, sizeof(v));
        add_to_output(sum, at->out, 8 * v * at->s);
    }
    for (uint32_t j = 0; j < CPU_CHUNK / 32 && block->any_rest != 0; j++) {
        for (uint32_t bits = block->with_rest[j]; bits != 0; bits &= bits - 1) {
            uint32_t input = 32 * j + (uint32_t)__builtin_ctz(bits);
            __m256i by = _mm256_set1_epi32(rest[input]);
            for (int h = 0; h < 2; h++) {
                __m256i units = units_of(w->codes[input / 4][h], input % 4);
                sum[h] = _mm256_add_epi32(sum[h], _mm256_mullo_epi32(units, by));
            }
        }
    }
    sum_out[0] = sum[0];
    sum_out[1] = sum[1];
}

/* A block's sum is exact; its product with the scales and the addition round once each, as the oracle's. */
INLINED void add_scaled(double *acc, __m256i a, __m256i b, const __m256i *rest, __m256d scale)
{
    for (int upper = 0; upper < 2; upper++) {
        __m256d sum = _mm256_mul_pd(fp8_joined(a, b, upper), _mm256_set1_pd(64));
        if (rest != NULL) {
            __m128i half = upper ? _mm256_extracti128_si256(*rest, 1) : _mm256_castsi256_si128(*rest);
            sum = _mm256_add_pd(sum, _mm256_cvtepi32_pd(half));
        }
        _mm256_storeu_pd(acc + 4 * upper,
                         _mm256_add_pd(_mm256_loadu_pd(acc + 4 * upper), _mm256_mul_pd(sum, scale)));
    }
}

/* Block b of n rows. */
INLINED void group_block(const fp8_weights *w, const fp8_group *g, uint32_t k, uint32_t b, double w_scale,
                         avx2_sums *acc, const uint32_t n, const bool decoded)
{
    const fp8_block *block = &g->blocks[(uint64_t)b * n];
    __m256i high[2][AVX2_GROUP], low[2][AVX2_GROUP], rest[2];
    for (int h = 0; h < 2; h++) {
        main_sums(w, h, g->x + (uint64_t)b * FP8_COLUMNS * 8 * n, n, high[h], low[h], n, decoded);
    }
    for (uint32_t r = 0; r < n; r++) {
        const __m256d scale = _mm256_set1_pd(block[r].scale * w_scale);
        bool with_rest = (block[r].any_rest | w->n_rest) != 0;
        if (with_rest) {
            rest_sums(w, g, k, b, r, rest);
        }
        for (int h = 0; h < 2; h++) {
            add_scaled(acc[r] + AVX2_HALF * h, high[h][r], low[h][r], with_rest ? &rest[h] : NULL, scale);
        }
    }
}

#define ROWS(n_, decoded_)                                                                                   \
    case n_:                                                                                                 \
        group_block(w, g, k, b, w_scale, acc, n_, decoded_);                                                 \
        break;

static void few_rows(const fp8_weights *w, const fp8_group *g, uint32_t k, uint32_t b, double w_scale,
                     avx2_sums *acc)
{
    switch (g->n) {
        ROWS(1, false)
        ROWS(2, false)
    }
}

static void many_rows(const fp8_weights *w, const fp8_group *g, uint32_t k, uint32_t b, double w_scale,
                      avx2_sums *acc)
{
    switch (g->n) {
        ROWS(1, true)
        ROWS(2, true)
        ROWS(3, true)
        ROWS(4, true)
    }
}

static void tile_outputs(const cpu_q8_tile *t, const kn_matrix *w, uint32_t o)
{
    uint32_t n_group = kn_blocks(t->n, AVX2_GROUP);
    uint16_t nan[AVX2_OUTS] = {0};
    fp8_weights weights;
    avx2_sums acc[CPU_Q8_ROWS];
    memset(acc, 0, t->n * sizeof(acc[0]));
    for (uint32_t b = 0; b < kn_blocks(w->n_in, CPU_CHUNK); b++) {
        double w_scale = e4m3_scale(w, o, b);
        fp8_group g = group_at(t, w->n_in, 0);
        read_weights(w, o, b, &weights, nan);
        if (t->n <= FP8_FUSED) {
            few_rows(&weights, &g, w->n_in, b, w_scale, acc);
            continue;
        }
        decode_columns(&weights);
        for (uint32_t i = 0; i < n_group; i++) {
            g = group_at(t, w->n_in, i);
            many_rows(&weights, &g, w->n_in, b, w_scale, acc + i * AVX2_GROUP);
        }
    }
    for (uint32_t r = 0; r < t->n; r++) {
        KN_FN(kn_avx2_put)(t, w, o, r, acc[r], nan);
    }
}

void KN_FN(kn_avx2_fp8_part)(const cpu_q8_tile *t, const kn_matrix *w, uint32_t begin, uint32_t end)
{
    for (uint32_t i = begin; i < end; i++) {
        tile_outputs(t, w, i * AVX2_OUTS);
    }
}

/* ---- preparing ---- */

uint64_t KN_FN(kn_avx2_fp8_bytes)(const kn_matrix *w)
{
    return n_prepared_chunks(w) * sizeof(fp8_chunk);
}

void KN_FN(kn_avx2_fp8_prepare)(const kn_matrix *w, void *out)
{
    fp8_chunk *chunk = out;
    for (uint32_t o = 0; o < w->n_out; o += AVX2_OUTS) {
        avx2_rows rows = avx2_rows_at(kn_host(w->data), w->n_in, o, w->n_out);
        for (uint32_t b = 0; b < kn_blocks(w->n_in, CPU_CHUNK); b++, chunk++) {
            read_chunk(&rows, w->n_in, b, chunk);
        }
    }
}
