/* E2M1 weights by E4M3 inputs in exact integers of 256 bits. A block's integer sum stays under 2^27, is
 * scaled exactly in double and added in block order.
 *
 * A row or two: doubled weights plus 12 are unsigned bytes, the v of an input two signed ones, v = 256 d1 +
 * d0; vpmaddubsw adds two products of at most 24 * 128 each, and four such sums still fit 16 bits. 12 times
 * the sum of the inputs starts every sum below zero. More rows: a chunk of weights is widened to 16 bits
 * once, v multiplies it whole (vpmaddwd).
 *
 * Bound: one row the memory, nearly; more the products: for a row and 16 weights a vpmaddwd and its addition.
 */
#include <assert.h>

#include "kernels/cpu/avx2.h"

enum {
    FP4_STEP = 8, /* inputs in a dword of weights: even ones low nibbles, odd ones high */
    FP4_BLOCK_STEPS = KN_FP4_BLOCK / FP4_STEP,
    FP4_CHUNK_BLOCKS = CPU_CHUNK / KN_FP4_BLOCK,
    FP4_CHUNK_BYTES = CPU_CHUNK / 2, /* of each row */
    FP4_COLUMNS = FP4_CHUNK_BYTES / 4,
    FP4_PAIRS = CPU_CHUNK / 2, /* of 16-bit values */
    FP4_BIAS = 12,
    FP4_FEW = 2,       /* rows, at most, in bytes */
    FP4_UNIT_BITS = 7, /* sums count units of 2^-7: 2^-6 by v, 2^-1 by the doubled weight */
    FP4_AHEAD = 4,     /* chunks that are asked for before they are needed */
};

/* The weights of a tile and CPU_CHUNK inputs: prepared ones [tile][chunk], stored ones one at a time. Zero
 * past the inputs; past the outputs the last one is repeated. */
typedef struct fp4_chunk {
    __m256i columns[FP4_COLUMNS][2];
    uint8_t scales[FP4_CHUNK_BLOCKS][AVX2_OUTS];
} fp4_chunk;
static_assert(sizeof(fp4_chunk) % 64 == 0, "chunks stand one behind the other");

/* The same for many rows. */
typedef struct fp4_wide {
    __m256i pairs[FP4_PAIRS][2];
} fp4_wide;

/* One row of inputs and block. */
typedef struct fp4_block {
    uint64_t exponent; /* of the double that scales the sum, less the weights' */
    int32_t bias;
    uint32_t with_rest; /* bit i: input i has an r */
} fp4_block;

/* Where the rows of one group stand in the scratch of a tile; K is k rounded up to CPU_CHUNK. */
typedef struct fp4_group {
    uint32_t n;        /* rows */
    uint8_t *x;        /* of few rows [K / 8][n][4 dwords]: d1 and d0 of the even inputs, d1 and d0 of the odd
                        * ones; else [K / 8][4][n]: v of the inputs i and i + 4 */
    int8_t *rest;      /* [n][K]: r */
    fp4_block *blocks; /* [K / 32][n] */
} fp4_group;

static fp4_group group_at(const cpu_q8_tile *t, uint32_t k, uint32_t g)
{
    uint64_t wide = cpu_round_up(k, CPU_CHUNK), row0 = (uint64_t)g * AVX2_GROUP;
    uint8_t *x = (uint8_t *)t->x + AVX2_HEAD_BYTES, *rest = x + 2 * wide * t->n, *blocks = rest + wide * t->n;
    static_assert(CPU_Q8_ROWS * (3 + sizeof(fp4_block) / KN_FP4_BLOCK) + 1 <= CPU_X_BYTES, "scratch");
    return (fp4_group){.n = t->n - (uint32_t)row0 < AVX2_GROUP ? t->n - (uint32_t)row0 : AVX2_GROUP,
                       .x = x + 2 * wide * row0,
                       .rest = (int8_t *)rest + wide * row0,
                       .blocks = (fp4_block *)(void *)blocks + wide / KN_FP4_BLOCK * row0};
}

/* ---- loading ---- */

/* v and r of a chunk's codes, in loops of their own so that they become vector code. */
APART void split_codes(const uint8_t *codes, int16_t *v_out, int8_t *r_out)
{
    for (int i = 0; i < CPU_CHUNK; i++) {
        int32_t units = avx2_units(codes[i]), rest = (units & 7) == 0 ? 0 : units;
        r_out[i] = (int8_t)rest;
        v_out[i] = (int16_t)((units - rest) / 8);
    }
}

static void put_digits(uint8_t *to, const int16_t v[FP4_STEP])
{
    for (int i = 0; i < FP4_STEP; i++) {
        int8_t low = (int8_t)v[i];
        int8_t *at = (int8_t *)to + i % 2 * 8 + i / 2;
        at[4] = low;
        at[0] = (int8_t)((v[i] - low) / 256);
    }
}

static void put_pairs(uint8_t *to, uint32_t n, const int16_t v[FP4_STEP])
{
    for (uint32_t i = 0; i < FP4_STEP / 2; i++) {
        int16_t pair[2] = {v[i], v[i + 4]};
        memcpy(to + (uint64_t)i * n * 4, pair, sizeof(pair));
    }
}

/* Sum of the inputs and which have an r, for each block of the chunk. */
static void note_blocks(const fp4_group *g, uint32_t r, uint32_t at, const int16_t *v, const int8_t *rest,
                        uint8_t scale)
{
    for (uint32_t b = 0; b < FP4_CHUNK_BLOCKS; b++, v += KN_FP4_BLOCK, rest += KN_FP4_BLOCK) {
        fp4_block *block = &g->blocks[(uint64_t)(at / KN_FP4_BLOCK + b) * g->n + r];
        __m256i is_zero = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i *)(const void *)rest),
                                            _mm256_setzero_si256());
        int32_t sum = 0;
        for (int i = 0; i < KN_FP4_BLOCK; i++) {
            sum += v[i];
        }
        block->exponent = (uint64_t)(scale + 1023 - 2 * 127 - FP4_UNIT_BITS) << 52;
        block->bias = -FP4_BIAS * sum;
        block->with_rest = ~(uint32_t)_mm256_movemask_epi8(is_zero);
    }
}

static void load_row(const fp4_group *g, bool few, uint32_t r, const uint8_t *codes, const uint8_t *scales,
                     uint32_t k)
{
    for (uint32_t at = 0; at < k; at += CPU_CHUNK) {
        uint8_t spare[CPU_CHUNK];
        int8_t *rest = g->rest + (uint64_t)r * cpu_round_up(k, CPU_CHUNK) + at;
        int16_t v[CPU_CHUNK];
        split_codes(chunk_bytes(codes, at, chunk_len(k, at), CPU_CHUNK, spare), v, rest);
        for (uint32_t i = 0; i < CPU_CHUNK; i += FP4_STEP) {
            uint64_t step = (at + i) / FP4_STEP;
            if (few) {
                put_digits(g->x + (step * g->n + r) * 16, v + i);
            } else {
                put_pairs(g->x + (step * 4 * g->n + r) * 4, g->n, v + i);
            }
        }
        note_blocks(g, r, at, v, rest, scales[at / KN_ACT_BLOCK]);
    }
}

typedef struct load_job {
    const cpu_q8_tile *tile;
    uint32_t k;
} load_job;

static void load_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const load_job *j = arg;
    (void)i_thread;
    for (uint32_t r = begin; r < end; r++) {
        fp4_group g = group_at(j->tile, j->k, r / AVX2_GROUP);
        load_row(&g, j->tile->n <= FP4_FEW, r % AVX2_GROUP, j->tile->codes[r], j->tile->scales[r], j->k);
    }
}

void KN_FN(kn_avx2_fp4_load)(kn_team *team, const cpu_q8_tile *tile, uint32_t k)
{
    load_job job = {.tile = tile, .k = k};
    kn_team_run(team, tile->n, 4ull * k, load_part, &job);
}

/* ---- weights ---- */

static void scales_at(const avx2_rows *rows, uint32_t b0, uint32_t n_block, fp4_chunk *chunk)
{
    for (uint32_t b = 0; b < FP4_CHUNK_BLOCKS; b++) {
        for (uint32_t i = 0; i < AVX2_OUTS; i++) {
            chunk->scales[b][i] = rows->row[i][b0 + b < n_block ? b0 + b : n_block - 1];
        }
    }
}

/* Chunk c of the stored outputs o .. o + 15. */
static void read_chunk(const kn_matrix *w, uint32_t o, uint32_t c, fp4_chunk *chunk_out)
{
    uint32_t row_bytes = w->n_in / 2, n_block = kn_blocks(w->n_in, KN_FP4_BLOCK);
    avx2_rows codes = avx2_rows_at(kn_host(w->data), row_bytes, o, w->n_out);
    avx2_rows scales = avx2_rows_at(kn_host(w->scale), n_block, o, w->n_out);
    for (uint32_t i = 0; i < AVX2_OUTS; i++) {
        _mm_prefetch((const char *)codes.row[i] + (c + 2 * FP4_AHEAD) * FP4_CHUNK_BYTES, _MM_HINT_T0);
    }
    for (uint32_t i = 0; i < FP4_COLUMNS; i += 8) {
        KN_FN(kn_avx2_columns)(&codes, c * FP4_CHUNK_BYTES + 4 * i, row_bytes, chunk_out->columns + i);
    }
    scales_at(&scales, c * FP4_CHUNK_BLOCKS, n_block, chunk_out);
}

static const fp4_chunk *chunk_at(const kn_matrix *w, uint32_t i_tile, uint32_t c, fp4_chunk *buffer)
{
    const fp4_chunk *chunk;
    if (!w->prepared) {
        read_chunk(w, i_tile * AVX2_OUTS, c, buffer);
        return buffer;
    }
    chunk = (const fp4_chunk *)kn_host(w->data) + (uint64_t)i_tile * kn_blocks(w->n_in, CPU_CHUNK) + c;
    for (uint32_t at = 0; at < sizeof(*chunk); at += 64) {
        _mm_prefetch((const char *)(chunk + FP4_AHEAD) + at, _MM_HINT_T0);
    }
    return chunk;
}

/* Notes outputs whose scales hold the byte of NaN. */
static void find_nans(const fp4_chunk *chunk, uint16_t nan[AVX2_OUTS])
{
    const __m128i all = _mm_set1_epi8(-1);
    __m128i found = _mm_setzero_si128();
    for (uint32_t b = 0; b < FP4_CHUNK_BLOCKS; b++) {
        __m128i scales = _mm_load_si128((const __m128i *)(const void *)chunk->scales[b]);
        found = _mm_or_si128(found, _mm_cmpeq_epi8(scales, all));
    }
    for (uint32_t bits = (uint32_t)_mm_movemask_epi8(found); bits != 0; bits &= bits - 1) {
        nan[__builtin_ctz(bits)] = AVX2_NAN_SCALE;
    }
}

/* Doubled values by code, and those plus FP4_BIAS. */
INLINED __m256i doubled(void)
{
    return _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
}

INLINED __m256i biased(void)
{
    return _mm256_add_epi8(doubled(), _mm256_set1_epi8(FP4_BIAS));
}

INLINED __m256i even_nibbles(__m256i codes)
{
    return _mm256_and_si256(codes, _mm256_set1_epi8(15));
}

INLINED __m256i odd_nibbles(__m256i codes)
{
    return _mm256_and_si256(_mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15));
}

/* Of each dword the weights i and i + 4 as 16-bit values, i = 0 .. 3. */
static void widen_chunk(const fp4_chunk *chunk, fp4_wide *wide)
{
    __m256i table = doubled();
    for (uint32_t c = 0; c < FP4_COLUMNS; c++) {
        for (int h = 0; h < 2; h++) {
            __m256i even = _mm256_shuffle_epi8(table, even_nibbles(chunk->columns[c][h])),
                    odd = _mm256_shuffle_epi8(table, odd_nibbles(chunk->columns[c][h]));
            wide->pairs[4 * c][h] = _mm256_srai_epi16(_mm256_slli_epi16(even, 8), 8);
            wide->pairs[4 * c + 1][h] = _mm256_srai_epi16(_mm256_slli_epi16(odd, 8), 8);
            wide->pairs[4 * c + 2][h] = _mm256_srai_epi16(even, 8);
            wide->pairs[4 * c + 3][h] = _mm256_srai_epi16(odd, 8);
        }
    }
}

/* ---- products ---- */

/* Integer sums of block b % 4 of a chunk and eight outputs for n rows, at most FP4_FEW; x: at the block. */
INLINED void few_sums(const fp4_chunk *chunk, uint32_t b, int h, const uint8_t *x, const fp4_block *block,
                      __m256i *sum_out, const uint32_t n)
{
    const __m256i table = biased(), by256 = _mm256_set1_epi16(256), by1 = _mm256_set1_epi16(1);
    __m256i high[FP4_FEW], low[FP4_FEW], sum[FP4_FEW];
    for (uint32_t r = 0; r < n; r++) {
        sum[r] = _mm256_set1_epi32(block[r].bias);
    }
#pragma GCC unroll 4
    for (uint32_t s = 0; s < FP4_BLOCK_STEPS; s++) {
        __m256i codes = chunk->columns[b % FP4_CHUNK_BLOCKS * FP4_BLOCK_STEPS + s][h];
        __m256i even = _mm256_shuffle_epi8(table, even_nibbles(codes)),
                odd = _mm256_shuffle_epi8(table, odd_nibbles(codes));
        for (uint32_t r = 0; r < n; r++, x += 16) {
            __m256i high_s = _mm256_add_epi16(_mm256_maddubs_epi16(even, avx2_broadcast(x)),
                                              _mm256_maddubs_epi16(odd, avx2_broadcast(x + 8)));
            __m256i low_s = _mm256_add_epi16(_mm256_maddubs_epi16(even, avx2_broadcast(x + 4)),
                                             _mm256_maddubs_epi16(odd, avx2_broadcast(x + 12)));
            if (s % 2 == 0) {
                high[r] = high_s;
                low[r] = low_s;
                continue;
            }
            high[r] = _mm256_madd_epi16(_mm256_add_epi16(high[r], high_s), by256);
            low[r] = _mm256_madd_epi16(_mm256_add_epi16(low[r], low_s), by1);
            sum[r] = _mm256_add_epi32(sum[r], _mm256_add_epi32(high[r], low[r]));
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        sum_out[r] = sum[r];
    }
}

/* The same for a group of many rows and all outputs of the tile; pairs, x: at the block. */
INLINED void many_sums(const __m256i (*pairs)[2], const uint8_t *x, __m256i (*sum_out)[2], const uint32_t n)
{
    __m256i sum[AVX2_GROUP][2];
    for (uint32_t r = 0; r < n; r++) {
        sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    }
#pragma GCC unroll 4
    for (uint32_t p = 0; p < KN_FP4_BLOCK / 2; p++) {
        for (uint32_t r = 0; r < n; r++, x += 4) {
            __m256i v = avx2_broadcast(x);
            sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(v, pairs[p][0]));
            sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(v, pairs[p][1]));
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        sum_out[r][0] = sum[r][0];
        sum_out[r][1] = sum[r][1];
    }
}

/* What the r of one row add to the sums of block b % 4 of a chunk, in units of 2^-10, and 8 times the sums.
 */
static void add_rest(const fp4_chunk *chunk, uint32_t b, const fp4_block *block, const int8_t *rest,
                     __m256i sum[2])
{
    const __m256i table = doubled(), nibble = _mm256_set1_epi32(15);
    for (int h = 0; h < 2; h++) {
        sum[h] = _mm256_slli_epi32(sum[h], 3);
        for (uint32_t bits = block->with_rest; bits != 0; bits &= bits - 1) {
            int i = __builtin_ctz(bits);
            __m256i codes =
                chunk->columns[b % FP4_CHUNK_BLOCKS * FP4_BLOCK_STEPS + (uint32_t)i / FP4_STEP][h];
            __m256i code =
                _mm256_and_si256(_mm256_srl_epi32(codes, _mm_cvtsi32_si128(i % FP4_STEP * 4)), nibble);
            __m256i weight = _mm256_shuffle_epi8(table, code); /* code 0 gives 0: in the bytes above too */
            weight = _mm256_srai_epi32(_mm256_slli_epi32(weight, 24), 24);
            sum[h] = _mm256_add_epi32(sum[h], _mm256_mullo_epi32(weight, _mm256_set1_epi32(rest[i])));
        }
    }
}

/* Adds eight sums times 2^(exponent + the scales'). An integer times a power of two is exact: one rounding,
 * that of the addition. */
INLINED void add_scaled(double *acc, __m256i sums, const __m256i scale[2], __m256i exponent)
{
    __m256d low = _mm256_cvtepi32_pd(_mm256_castsi256_si128(sums)),
            high = _mm256_cvtepi32_pd(_mm256_extracti128_si256(sums, 1));
    __m256d by_low = _mm256_castsi256_pd(_mm256_add_epi64(scale[0], exponent)),
            by_high = _mm256_castsi256_pd(_mm256_add_epi64(scale[1], exponent));
    _mm256_storeu_pd(acc, _mm256_fmadd_pd(low, by_low, _mm256_loadu_pd(acc)));
    _mm256_storeu_pd(acc + 4, _mm256_fmadd_pd(high, by_high, _mm256_loadu_pd(acc + 4)));
}

/* The scale bytes of four outputs where doubles have their exponents. */
INLINED __m256i scale_exponents(const uint8_t *scales)
{
    int32_t bytes;
    memcpy(&bytes, scales, sizeof(bytes));
    return _mm256_slli_epi64(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes)), 52);
}

/* Block b of all inputs, of which the chunk is at its place, for the n rows of a group. wide NULL: few. */
INLINED void group_block(const fp4_chunk *chunk, const fp4_wide *wide, const fp4_group *g, uint32_t k,
                         uint32_t b, avx2_sums *acc, const uint32_t n)
{
    const fp4_block *block = g->blocks + (uint64_t)b * n;
    const uint8_t *x = g->x + (uint64_t)b * KN_FP4_BLOCK * 2 * n,
                  *scales = chunk->scales[b % FP4_CHUNK_BLOCKS];
    __m256i sum[AVX2_GROUP][2], scale[2][2];
    if (wide != NULL) {
        many_sums(wide->pairs + b % FP4_CHUNK_BLOCKS * KN_FP4_BLOCK / 2, x, sum, n);
    } else {
        for (int h = 0; h < 2; h++) {
            __m256i half[FP4_FEW];
            few_sums(chunk, b, h, x, block, half, n < FP4_FEW ? n : FP4_FEW);
            for (uint32_t r = 0; r < n && r < FP4_FEW; r++) {
                sum[r][h] = half[r];
            }
        }
    }
    for (int q = 0; q < 4; q++) {
        scale[q / 2][q % 2] = scale_exponents(scales + 4 * q);
    }
    for (uint32_t r = 0; r < n; r++) {
        uint64_t exponent = block[r].exponent;
        if (block[r].with_rest != 0) {
            add_rest(chunk, b, &block[r],
                     g->rest + (uint64_t)r * cpu_round_up(k, CPU_CHUNK) + (uint64_t)b * KN_FP4_BLOCK, sum[r]);
            exponent -= 3ull << 52;
        }
        for (int h = 0; h < 2; h++) {
            add_scaled(acc[r] + AVX2_HALF * h, sum[r][h], scale[h], _mm256_set1_epi64x((int64_t)exponent));
        }
    }
}

/* A chunk's blocks b0 .. end - 1. */
#define ROWS(n_)                                                                                             \
    case n_:                                                                                                 \
        for (uint32_t b = b0; b < end; b++) {                                                                \
            group_block(chunk, wide, g, k, b, acc, n_);                                                      \
        }                                                                                                    \
        break;

static void few_chunk(const fp4_chunk *chunk, const fp4_group *g, uint32_t k, uint32_t b0, uint32_t end,
                      avx2_sums *acc)
{
    const fp4_wide *const wide = NULL;
    switch (g->n) {
        ROWS(1)
        ROWS(2)
    }
}

static void many_chunk(const fp4_chunk *chunk, const fp4_wide *wide, const fp4_group *g, uint32_t k,
                       uint32_t b0, uint32_t end, avx2_sums *acc)
{
    switch (g->n) {
        ROWS(1)
        ROWS(2)
        ROWS(3)
        ROWS(4)
    }
}

static void tile_outputs(const cpu_q8_tile *t, const kn_matrix *w, uint32_t i_tile)
{
    uint32_t n_group = kn_blocks(t->n, AVX2_GROUP), n_block = kn_blocks(w->n_in, KN_FP4_BLOCK), end;
    uint16_t nan[AVX2_OUTS] = {0};
    fp4_chunk buffer;
    fp4_wide wide;
    avx2_sums acc[CPU_Q8_ROWS];
    memset(acc, 0, t->n * sizeof(acc[0]));
    for (uint32_t b = 0; b < n_block; b = end) {
        const fp4_chunk *chunk = chunk_at(w, i_tile, b / FP4_CHUNK_BLOCKS, &buffer);
        end = n_block - b < FP4_CHUNK_BLOCKS ? n_block : b + FP4_CHUNK_BLOCKS;
        find_nans(chunk, nan);
        if (t->n <= FP4_FEW) {
            fp4_group g = group_at(t, w->n_in, 0);
            few_chunk(chunk, &g, w->n_in, b, end, acc);
            continue;
        }
        widen_chunk(chunk, &wide);
        for (uint32_t i = 0; i < n_group; i++) {
            fp4_group g = group_at(t, w->n_in, i);
            many_chunk(chunk, &wide, &g, w->n_in, b, end, acc + i * AVX2_GROUP);
        }
    }
    for (uint32_t r = 0; r < t->n; r++) {
        KN_FN(kn_avx2_put)(t, w, i_tile * AVX2_OUTS, r, acc[r], nan);
    }
}

void KN_FN(kn_avx2_fp4_part)(const cpu_q8_tile *t, const kn_matrix *w, uint32_t begin, uint32_t end)
{
    for (uint32_t i = begin; i < end; i++) {
        tile_outputs(t, w, i);
    }
}

/* ---- preparing ---- */

uint64_t KN_FN(kn_avx2_fp4_bytes)(const kn_matrix *w)
{
    return (uint64_t)kn_blocks(w->n_out, AVX2_OUTS) * kn_blocks(w->n_in, CPU_CHUNK) * sizeof(fp4_chunk);
}

void KN_FN(kn_avx2_fp4_prepare)(const kn_matrix *w, void *out)
{
    fp4_chunk *chunk = out;
    for (uint32_t o = 0; o < w->n_out; o += AVX2_OUTS) {
        for (uint32_t c = 0; c < kn_blocks(w->n_in, CPU_CHUNK); c++, chunk++) {
            read_chunk(w, o, c, chunk);
        }
    }
}
