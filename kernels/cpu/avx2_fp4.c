/* E2M1 weights by E4M3 inputs in exact integers of 256 bits. A block's integer sum stays under 2^27, is
 * scaled exactly in double and added in block order.
 *
 * A row or two: doubled weights plus 12 are unsigned bytes, the v of an input two signed ones, v = 256 d1 +
 * d0; vpmaddubsw adds two products of at most 24 * 128 each, and four such sums still fit 16 bits. 12 times
 * the sum of the inputs starts every sum below zero. More rows: a chunk of weights is widened to 16 bits
 * once, v multiplies it whole (vpmaddwd).
 *
 * The contract adds scaled block sums in block order, each addition rounded to double. Where none of them can
 * round, order does not matter: every block's sum is a whole number of 2^-10 times its scale, so it is enough
 * that all of a row and a tile's, in units of the smallest scale that appears, stay below 2^53. Then the four
 * blocks of a chunk are added as integers, shifted by what their scales differ, if that is at most
 * FP4_SHIFTS; 128 products of 384 by 28672 stay below 2^31. Whether the scales allowed it is known when all
 * have been seen; rows that they did not are computed again in block order.
 *
 * Bound: the instructions. For a row or two those of decoding and of byte products, about half again what
 * reading takes; for more the products, a vpmaddwd and its addition for a row and 16 weights.
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
    FP4_SHIFTS = 5,
    FP4_AHEAD = 4, /* chunks that are asked for before they are needed */
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

/* Scale bytes of a row's chunks that are not zero; none: least > most. */
typedef struct fp4_range {
    uint8_t least, most;
} fp4_range;

/* Where the rows of one group stand in the scratch of a tile; K is k rounded up to CPU_CHUNK. */
typedef struct fp4_group {
    uint32_t n;        /* rows */
    uint8_t *x;        /* of few rows [K / 8][n][4 dwords]: d1 and d0 of the even inputs, d1 and d0 of the odd
                        * ones; else [K / 8][4][n]: v of the inputs i and i + 4 */
    int8_t *rest;      /* [n][K]: r */
    fp4_block *blocks; /* [K / 32][n] */
    fp4_range *ranges; /* [n] */
} fp4_group;

static fp4_group group_at(const cpu_q8_tile *t, uint32_t k, uint32_t g)
{
    uint64_t wide = cpu_round_up(k, CPU_CHUNK), row0 = (uint64_t)g * AVX2_GROUP;
    uint8_t *x = (uint8_t *)t->x + AVX2_HEAD_BYTES, *rest = x + 2 * wide * t->n, *blocks = rest + wide * t->n,
            *ranges = blocks + wide / KN_FP4_BLOCK * sizeof(fp4_block) * t->n;
    static_assert(CPU_Q8_ROWS * (3 + sizeof(fp4_block) / KN_FP4_BLOCK) + 4 <= CPU_X_BYTES, "scratch");
    return (fp4_group){.n = t->n - (uint32_t)row0 < AVX2_GROUP ? t->n - (uint32_t)row0 : AVX2_GROUP,
                       .x = x + 2 * wide * row0,
                       .rest = (int8_t *)rest + wide * row0,
                       .blocks = (fp4_block *)(void *)blocks + wide / KN_FP4_BLOCK * row0,
                       .ranges = (fp4_range *)(void *)ranges + row0};
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

static bool any_input(const int16_t *v, const int8_t *rest)
{
    int32_t any = 0;
    for (int i = 0; i < CPU_CHUNK; i++) {
        any |= v[i] | rest[i];
    }
    return any != 0;
}

static void load_row(const fp4_group *g, bool few, uint32_t r, const uint8_t *codes, const uint8_t *scales,
                     uint32_t k)
{
    fp4_range range = {255, 0};
    for (uint32_t at = 0; at < k; at += CPU_CHUNK) {
        uint8_t spare[CPU_CHUNK], scale = scales[at / KN_ACT_BLOCK];
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
        note_blocks(g, r, at, v, rest, scale);
        if (any_input(v, rest)) {
            range.least = scale < range.least ? scale : range.least;
            range.most = scale > range.most ? scale : range.most;
        }
    }
    g->ranges[r] = range;
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

/* How a chunk's blocks are added: times 2^(scale - base), and the sum times base's. */
typedef struct fp4_span {
    bool narrow; /* whether they can be so */
    uint8_t base[AVX2_OUTS];
    __m256i shift[FP4_CHUNK_BLOCKS][2];
} fp4_span;

/* Largest and smallest scales of a tile's outputs so far. */
typedef struct fp4_scales {
    __m128i least, most;
} fp4_scales;

static void find_span(const fp4_chunk *chunk, fp4_scales *seen, fp4_span *span_out)
{
    const __m128i *scales = (const __m128i *)(const void *)chunk->scales;
    __m128i least = _mm_min_epu8(_mm_min_epu8(scales[0], scales[1]), _mm_min_epu8(scales[2], scales[3])),
            most = _mm_max_epu8(_mm_max_epu8(scales[0], scales[1]), _mm_max_epu8(scales[2], scales[3]));
    __m128i over = _mm_subs_epu8(_mm_sub_epi8(most, least), _mm_set1_epi8(FP4_SHIFTS));
    span_out->narrow = _mm_testz_si128(over, over);
    _mm_storeu_si128((__m128i *)(void *)span_out->base, least);
    for (uint32_t b = 0; b < FP4_CHUNK_BLOCKS; b++) {
        __m128i shift = _mm_sub_epi8(scales[b], least);
        span_out->shift[b][0] = _mm256_cvtepu8_epi32(shift);
        span_out->shift[b][1] = _mm256_cvtepu8_epi32(_mm_srli_si128(shift, AVX2_HALF));
    }
    seen->least = _mm_min_epu8(seen->least, least);
    seen->most = _mm_max_epu8(seen->most, most);
}

/* Of each dword the weights i and i + 4 as 16-bit values, i = 0 .. 3; shifted by the span's unless NULL. */
static void widen_chunk(const fp4_chunk *chunk, const fp4_span *span, fp4_wide *wide)
{
    const __m256i table = doubled(), ones = _mm256_set1_epi16(1);
    for (uint32_t c = 0; c < FP4_COLUMNS; c++) {
        for (int h = 0; h < 2; h++) {
            __m256i even = _mm256_shuffle_epi8(table, even_nibbles(chunk->columns[c][h])),
                    odd = _mm256_shuffle_epi8(table, odd_nibbles(chunk->columns[c][h]));
            __m256i by = span == NULL ? ones : _mm256_sllv_epi32(ones, span->shift[c / FP4_BLOCK_STEPS][h]);
            __m256i pairs[4] = {_mm256_srai_epi16(_mm256_slli_epi16(even, 8), 8),
                                _mm256_srai_epi16(_mm256_slli_epi16(odd, 8), 8), _mm256_srai_epi16(even, 8),
                                _mm256_srai_epi16(odd, 8)};
            for (uint32_t i = 0; i < 4; i++) {
                wide->pairs[4 * c + i][h] = _mm256_mullo_epi16(pairs[i], by);
            }
        }
    }
}

/* ---- products ---- */

/* Integer sums of block b of a chunk for n rows, at most FP4_FEW, and n_half halves of the outputs from h0
 * on, as many as fit the registers; x: at the block. */
INLINED void few_sums(const fp4_chunk *chunk, uint32_t b, int h0, const uint8_t *x, const fp4_block *block,
                      __m256i (*sum_out)[2], const uint32_t n, const int n_half)
{
    const __m256i table = biased(), by256 = _mm256_set1_epi16(256), by1 = _mm256_set1_epi16(1);
    __m256i high[AVX2_GROUP][2], low[AVX2_GROUP][2], sum[AVX2_GROUP][2];
    __asm__("" : "+r"(x)); /* or the compiler keeps all broadcasts for the other half, in memory */
    for (uint32_t r = 0; r < n; r++) {
        sum[r][0] = sum[r][1] = _mm256_set1_epi32(block[r].bias);
    }
#pragma GCC unroll 4
    for (uint32_t s = 0; s < FP4_BLOCK_STEPS; s++) {
        __m256i even[2], odd[2];
        for (int h = 0; h < n_half; h++) {
            __m256i codes = chunk->columns[b * FP4_BLOCK_STEPS + s][h0 + h];
            even[h] = _mm256_shuffle_epi8(table, even_nibbles(codes));
            odd[h] = _mm256_shuffle_epi8(table, odd_nibbles(codes));
        }
        for (uint32_t r = 0; r < n; r++, x += 16) {
            for (int h = 0; h < n_half; h++) {
                __m256i product = _mm256_maddubs_epi16(even[h], avx2_broadcast(x));
                high[r][h] = s % 2 == 0 ? product : avx2_plus16(high[r][h], product);
                product = _mm256_maddubs_epi16(even[h], avx2_broadcast(x + 4));
                low[r][h] = s % 2 == 0 ? product : avx2_plus16(low[r][h], product);
                high[r][h] = avx2_plus16(high[r][h], _mm256_maddubs_epi16(odd[h], avx2_broadcast(x + 8)));
                low[r][h] = avx2_plus16(low[r][h], _mm256_maddubs_epi16(odd[h], avx2_broadcast(x + 12)));
                if (s % 2 == 1) {
                    sum[r][h] = avx2_plus32(sum[r][h], _mm256_madd_epi16(high[r][h], by256));
                    sum[r][h] = avx2_plus32(sum[r][h], _mm256_madd_epi16(low[r][h], by1));
                }
            }
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        for (int h = 0; h < n_half; h++) {
            sum_out[r][h0 + h] = sum[r][h];
        }
    }
}

/* Sums of n_pair pairs of inputs of a group of many rows and all outputs of the tile. */
INLINED void many_sums(const __m256i (*pairs)[2], uint32_t n_pair, const uint8_t *x, __m256i (*sum_out)[2],
                       const uint32_t n)
{
    __m256i sum[AVX2_GROUP][2];
    for (uint32_t r = 0; r < n; r++) {
        sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    }
#pragma GCC unroll 4
    for (uint32_t p = 0; p < n_pair; p++) {
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

/* Sums of block b of a chunk; x: at the block. */
INLINED void block_sums(const fp4_chunk *chunk, const fp4_wide *wide, uint32_t b, const uint8_t *x,
                        const fp4_block *block, __m256i (*sum_out)[2], const uint32_t n, const bool few)
{
    if (!few) {
        many_sums(wide->pairs + b * KN_FP4_BLOCK / 2, KN_FP4_BLOCK / 2, x, sum_out, n);
        return;
    }
    for (int h = 0; h < 2; h += n == 1 ? 2 : 1) {
        few_sums(chunk, b, h, x, block, sum_out, n, n == 1 ? 2 : 1);
    }
}

/* Adds what the r of one row give in block b of a chunk, in units of 2^-10. rest: the row's, at the block. */
static void add_rest(const fp4_chunk *chunk, uint32_t b, const fp4_block *block, const int8_t *rest,
                     __m256i sum[2])
{
    const __m256i table = doubled(), nibble = _mm256_set1_epi32(15);
    for (uint32_t bits = block->with_rest; bits != 0; bits &= bits - 1) {
        uint32_t i = (uint32_t)__builtin_ctz(bits);
        for (int h = 0; h < 2; h++) {
            __m256i codes = chunk->columns[b * FP4_BLOCK_STEPS + i / FP4_STEP][h];
            __m256i code = _mm256_and_si256(
                _mm256_srl_epi32(codes, _mm_cvtsi32_si128((int32_t)(i % FP4_STEP * 4))), nibble);
            __m256i weight = _mm256_shuffle_epi8(table, code); /* code 0 gives 0: in the bytes above too */
            weight = _mm256_srai_epi32(_mm256_slli_epi32(weight, 24), 24);
            sum[h] = _mm256_add_epi32(sum[h], _mm256_mullo_epi32(weight, _mm256_set1_epi32(rest[i])));
        }
    }
}

/* The scale bytes of four outputs where doubles have their exponents. */
INLINED __m256i scale_exponents(const uint8_t *scales)
{
    int32_t bytes;
    memcpy(&bytes, scales, sizeof(bytes));
    return _mm256_slli_epi64(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes)), 52);
}

/* Adds a tile's sums times 2^(exponent + the scales'). An integer times a power of two is exact: one
 * rounding, that of the addition. */
INLINED void add_scaled(double *acc, const __m256i sums[2], const uint8_t *scales, uint64_t exponent)
{
    const __m256i by_row = _mm256_set1_epi64x((int64_t)exponent);
    for (int q = 0; q < 4; q++) {
        __m128i four =
            q % 2 == 0 ? _mm256_castsi256_si128(sums[q / 2]) : _mm256_extracti128_si256(sums[q / 2], 1);
        __m256i by = _mm256_add_epi64(scale_exponents(scales + 4 * q), by_row);
        _mm256_storeu_pd(acc + 4 * q, _mm256_fmadd_pd(_mm256_cvtepi32_pd(four), _mm256_castsi256_pd(by),
                                                      _mm256_loadu_pd(acc + 4 * q)));
    }
}

/* A chunk for a group of rows. */
typedef struct fp4_work {
    const fp4_chunk *chunk;
    const fp4_span *span;
    const fp4_wide *wide; /* of many rows */
    const fp4_group *group;
    uint32_t k, b0, n_block; /* all inputs; first block of the chunk, and how many it has */
} fp4_work;

INLINED const int8_t *rest_at(const fp4_work *j, uint32_t r, uint32_t b)
{
    return j->group->rest + (uint64_t)r * cpu_round_up(j->k, CPU_CHUNK) +
           (uint64_t)(j->b0 + b) * KN_FP4_BLOCK;
}

/* Block after block. */
INLINED void chunk_in_order(const fp4_work *j, avx2_sums *acc, const uint32_t n, const bool few)
{
    for (uint32_t b = 0; b < j->n_block; b++) {
        const fp4_block *block = j->group->blocks + (uint64_t)(j->b0 + b) * n;
        __m256i sum[AVX2_GROUP][2];
        block_sums(j->chunk, j->wide, b, j->group->x + (uint64_t)(j->b0 + b) * KN_FP4_BLOCK * 2 * n, block,
                   sum, n, few);
        for (uint32_t r = 0; r < n; r++) {
            uint64_t exponent = block[r].exponent;
            if (block[r].with_rest != 0) {
                sum[r][0] = _mm256_slli_epi32(sum[r][0], 3);
                sum[r][1] = _mm256_slli_epi32(sum[r][1], 3);
                add_rest(j->chunk, b, &block[r], rest_at(j, r, b), sum[r]);
                exponent -= 3ull << 52;
            }
            add_scaled(acc[r], sum[r], j->chunk->scales[b], exponent);
        }
    }
}

/* Adds what the r of row r of the group give in a chunk. */
APART void add_rests(const fp4_work *j, uint32_t r, double *acc)
{
    for (uint32_t b = 0; b < FP4_CHUNK_BLOCKS; b++) {
        const fp4_block *block = j->group->blocks + (uint64_t)(j->b0 + b) * j->group->n + r;
        if (block->with_rest != 0) {
            __m256i rest[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
            add_rest(j->chunk, b, block, rest_at(j, r, b), rest);
            add_scaled(acc, rest, j->chunk->scales[b], block->exponent - (3ull << 52));
        }
    }
}

/* The whole chunk at once. Past the inputs there are zeros. */
INLINED void chunk_at_once(const fp4_work *j, avx2_sums *acc, const uint32_t n, const bool few)
{
    const fp4_block *block = j->group->blocks + (uint64_t)j->b0 * n;
    const uint8_t *x = j->group->x + (uint64_t)j->b0 * KN_FP4_BLOCK * 2 * n;
    __m256i sum[AVX2_GROUP][2];
    if (!few) {
        many_sums(j->wide->pairs, FP4_PAIRS, x, sum, n);
    }
    for (uint32_t r = 0; few && r < n; r++) {
        sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    }
    for (uint32_t b = 0; few && b < FP4_CHUNK_BLOCKS; b++) {
        __m256i part[AVX2_GROUP][2];
        block_sums(j->chunk, NULL, b, x + (uint64_t)b * KN_FP4_BLOCK * 2 * n, block + b * n, part, n, true);
        for (uint32_t r = 0; r < n; r++) {
            for (int h = 0; h < 2; h++) {
                __m256i shifted = _mm256_sllv_epi32(part[r][h], j->span->shift[b][h]);
                sum[r][h] = avx2_plus32(sum[r][h], shifted);
            }
        }
    }
    for (uint32_t r = 0; r < n; r++, block++) {
        add_scaled(acc[r], sum[r], j->span->base, block->exponent);
        if ((block[0].with_rest | block[n].with_rest | block[2 * n].with_rest | block[3 * n].with_rest) !=
            0) {
            add_rests(j, r, acc[r]);
        }
    }
}

/* ---- the tile of rows against tiles of outputs ---- */

/* A tile of outputs, which many groups of rows meet. */
typedef struct fp4_tile {
    const kn_matrix *w;
    uint32_t i_tile, n_group;
    fp4_group groups[CPU_Q8_ROWS / AVX2_GROUP];
    bool in_order;   /* block after block in any case */
    fp4_scales seen; /* otherwise */
    uint16_t nan[AVX2_OUTS];
} fp4_tile;

/* The chunk that begins with block b0, for all groups; the span is found unless in block order. */
INLINED fp4_work chunk_work(fp4_tile *j, uint32_t b0, fp4_chunk *buffer, fp4_span *span)
{
    uint32_t left = kn_blocks(j->w->n_in, KN_FP4_BLOCK) - b0;
    fp4_work work = {.chunk = chunk_at(j->w, j->i_tile, b0 / FP4_CHUNK_BLOCKS, buffer),
                     .span = span,
                     .group = j->groups,
                     .k = j->w->n_in,
                     .b0 = b0,
                     .n_block = left < FP4_CHUNK_BLOCKS ? left : FP4_CHUNK_BLOCKS};
    find_nans(work.chunk, j->nan);
    span->narrow = false;
    if (!j->in_order) {
        find_span(work.chunk, &j->seen, span);
    }
    return work;
}

INLINED void few_rows(fp4_tile *j, avx2_sums *acc, const uint32_t n)
{
    fp4_chunk buffer;
    fp4_span span;
    for (uint32_t b0 = 0; b0 * KN_FP4_BLOCK < j->w->n_in; b0 += FP4_CHUNK_BLOCKS) {
        fp4_work work = chunk_work(j, b0, &buffer, &span);
        if (span.narrow) {
            chunk_at_once(&work, acc, n, true);
        } else {
            chunk_in_order(&work, acc, n, true);
        }
    }
}

#define ROWS(form_, n_)                                                                                      \
    case n_:                                                                                                 \
        form_(j, acc, n_, false);                                                                            \
        break;

static void group_at_once(const fp4_work *j, avx2_sums *acc)
{
    switch (j->group->n) {
        ROWS(chunk_at_once, 1)
        ROWS(chunk_at_once, 2)
        ROWS(chunk_at_once, 3)
        ROWS(chunk_at_once, 4)
    }
}

static void group_in_order(const fp4_work *j, avx2_sums *acc)
{
    switch (j->group->n) {
        ROWS(chunk_in_order, 1)
        ROWS(chunk_in_order, 2)
        ROWS(chunk_in_order, 3)
        ROWS(chunk_in_order, 4)
    }
}

static void many_rows(fp4_tile *j, avx2_sums *acc)
{
    fp4_chunk buffer;
    fp4_wide wide;
    fp4_span span;
    for (uint32_t b0 = 0; b0 * KN_FP4_BLOCK < j->w->n_in; b0 += FP4_CHUNK_BLOCKS) {
        fp4_work work = chunk_work(j, b0, &buffer, &span);
        widen_chunk(work.chunk, span.narrow ? &span : NULL, &wide);
        work.wide = &wide;
        for (uint32_t i = 0; i < j->n_group; i++, work.group++) {
            if (span.narrow) {
                group_at_once(&work, acc + i * AVX2_GROUP);
            } else {
                group_in_order(&work, acc + i * AVX2_GROUP);
            }
        }
    }
}

/* Sums of all rows of the groups, of which there are n_row in the tile of rows. */
static void tile_sums(fp4_tile *j, uint32_t n_row, avx2_sums *acc)
{
    if (n_row == 1) {
        few_rows(j, acc, 1);
    } else if (n_row == FP4_FEW) {
        few_rows(j, acc, FP4_FEW);
    } else {
        many_rows(j, acc);
    }
}

/* Whether no addition of block sums of any row of the group could round. */
static bool is_certain(const fp4_group *g, uint32_t k, fp4_scales seen)
{
    uint8_t least[AVX2_OUTS], most[AVX2_OUTS], low = 255, high = 0;
    uint32_t bits = 22; /* 12 * 229376 < 2^22 units of 2^-10 a product */
    bool certain = true;
    _mm_storeu_si128((__m128i *)(void *)least, seen.least);
    _mm_storeu_si128((__m128i *)(void *)most, seen.most);
    for (uint32_t i = 0; i < AVX2_OUTS; i++) {
        low = least[i] < low ? least[i] : low;
        high = most[i] > high ? most[i] : high;
    }
    for (; 1u << (bits - 22) < k; bits++) {
    }
    for (uint32_t r = 0; r < g->n; r++) {
        uint32_t x = g->ranges[r].most > g->ranges[r].least ? g->ranges[r].most - g->ranges[r].least : 0;
        certain = certain && bits + x + (uint32_t)(high - low) <= 53;
    }
    return certain;
}

static void tile_outputs(const cpu_q8_tile *t, const kn_matrix *w, uint32_t i_tile)
{
    avx2_sums acc[CPU_Q8_ROWS];
    fp4_tile tile;
    tile.w = w;
    tile.i_tile = i_tile;
    tile.n_group = kn_blocks(t->n, AVX2_GROUP);
    tile.in_order = false;
    tile.seen = (fp4_scales){.least = _mm_set1_epi8(-1), .most = _mm_setzero_si128()};
    memset(tile.nan, 0, sizeof(tile.nan));
    for (uint32_t i = 0; i < tile.n_group; i++) {
        tile.groups[i] = group_at(t, w->n_in, i);
    }
    memset(acc, 0, t->n * sizeof(acc[0]));
    tile_sums(&tile, t->n, acc);
    tile.n_group = 1;
    tile.in_order = true;
    for (uint32_t i = 0; i < kn_blocks(t->n, AVX2_GROUP); i++) {
        tile.groups[0] = group_at(t, w->n_in, i);
        if (!is_certain(tile.groups, w->n_in, tile.seen)) {
            memset(acc + i * AVX2_GROUP, 0, tile.groups[0].n * sizeof(acc[0]));
            tile_sums(&tile, t->n, acc + i * AVX2_GROUP);
        }
    }
    for (uint32_t r = 0; r < t->n; r++) {
        KN_FN(kn_avx2_put)(t, w, i_tile * AVX2_OUTS, r, acc[r], tile.nan);
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
