/* E2M1 weights by vdpbf16ps, one product for each weight and row, and exact.
 *
 * Both operands are whole numbers with few digits: an input x is n 2^s in units of 2^-9 where s is the most
 * that all of its chunk allow, a doubled weight one of 0 1 2 3 4 6 8 12. bfloat16 holds either. A sum of
 * products of whole numbers is exact in float32, in any order, while the sum of their magnitudes stays up to
 * 2^24. So
 *   - a block (32 inputs) of a row is summed in float32 if 12 sum |n| <= 2^24. Hardly any is not: it takes
 *     magnitudes of up to 448 beside an odd multiple of 2^-9. Its small inputs are then multiplied apart;
 *   - the blocks of a chunk (128 inputs, one scale of the row) are added as 32-bit integers, each output's
 * weights being brought to the least of its four scales by adding to their exponents;
 *   - chunks are added in double. The contract adds blocks; both are exact, and so the same, while all sums
 * of a row and output are multiples of one power of two and less than 2^53 times that. What the last two need
 * is known of a row when it is loaded and of the weights when they have been read. Where it does not hold,
 * the outputs of eight rows and a tile are computed again with care (fp4_careful.c).
 *
 * Bound: for up to four rows the read bandwidth, beyond that the rate of vdpbf16ps. It is AMD's path: two of
 * them a cycle there, while Intel's has but half the rate of float32. */
#include "kernels/cpu/fp4_chunks.h"

enum {
    BF16_BLOCK_PAIRS = KN_FP4_BLOCK / 2,
    BF16_CHUNK_PAIRS = CPU_CHUNK / 2,
    BF16_STEP_PAIRS = FP4_STEP / 2,
    BF16_TILES = 2,              /* tiles that share one reading of many rows of input */
    BF16_WEIGHT_MAX = 12,        /* doubled */
    BF16_SUM_MAX = 1 << 24,      /* of a block in float32 */
    BF16_SUM_BITS = 31,          /* of a chunk in an integer */
    BF16_TOTAL_BITS = 53,        /* of a row in double */
    BF16_SMALL = (127 + 9) << 7, /* the bfloat16 2^9: what is less is multiplied apart where it must be */
};

/* Where the rows of one group stand in the scratch of a tile; K is k rounded up to CPU_CHUNK. */
typedef struct bf16_group {
    uint32_t row0, n;    /* rows */
    uint32_t *pairs;     /* [K / 2][n]: inputs i and i + 4 of every eight */
    uint64_t *exponents; /* [K / 128][n]: of the double that scales a chunk's sums, less the weights' */
    uint32_t *small;     /* [K / 128]: bit 4 r + b: row r's small inputs of block b are not in pairs */
    uint8_t *bits; /* [K / 128]: sums of any row are less than 2^bits if the weights' scales are equal */
    uint8_t *total_bits; /* likewise of the sum of all chunks, in units of the row's finest */
} bf16_group;

static bf16_group group_at(const cpu_q8_tile *t, uint32_t k, uint32_t i)
{
    uint64_t n_chunk = kn_blocks(k, CPU_CHUNK), row0 = (uint64_t)i * VNNI_GROUP;
    uint8_t *pairs = (uint8_t *)t->x + VNNI_HEAD_BYTES;
    uint8_t *exponents = pairs + n_chunk * BF16_CHUNK_PAIRS * sizeof(uint32_t) * t->n;
    uint8_t *small = exponents + n_chunk * sizeof(uint64_t) * t->n;
    uint8_t *bits = small + n_chunk * sizeof(uint32_t) * VNNI_GROUPS_MAX;
    bf16_group g = {.row0 = (uint32_t)row0,
                    .n = t->n - (uint32_t)row0 < VNNI_GROUP ? t->n - (uint32_t)row0 : VNNI_GROUP,
                    .pairs = (uint32_t *)(void *)pairs + n_chunk * BF16_CHUNK_PAIRS * row0,
                    .exponents = (uint64_t *)(void *)exponents + n_chunk * row0,
                    .small = (uint32_t *)(void *)small + n_chunk * i,
                    .bits = bits + (n_chunk + 1) * i};
    g.total_bits = g.bits + n_chunk;
    return g;
}

/* ---- loading ---- */

/* 32 codes in units of 2^-9; NaN as zero. */
static __m512i units_of(__m256i codes)
{
    const __m512i whole = _mm512_set_epi16(0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, 0x40e0,
                                           0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, 0x40e0, 0x40c0,
                                           0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, 0x40e0, 0x40c0, 0x40a0,
                                           0x4080, 0x4040, 0x4000, 0x3f80, 0); /* 7 .. 0, four times */
    const __m512i rebias = _mm512_set1_epi16((127 - 7 + 9) << 7);
    __m512i code = _mm512_cvtepu8_epi16(codes), magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
    __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8);
    __mmask32 tiny = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
    __m512i value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), rebias);
    value = _mm512_mask_permutexvar_epi16(value, tiny, magnitude, whole);
    value = _mm512_or_si512(value, sign);
    return _mm512_maskz_mov_epi16(_mm512_cmpneq_epu16_mask(magnitude, _mm512_set1_epi16(0x7f)), value);
}

static __m512i magnitudes(__m512i words)
{
    return _mm512_and_si512(words, _mm512_set1_epi16(0x7fff));
}

/* Divides by 2^shift. */
static __m512i shifted(__m512i words, uint32_t shift)
{
    __mmask32 not_zero = _mm512_test_epi16_mask(words, _mm512_set1_epi16(0x7fff));
    return _mm512_mask_sub_epi16(words, not_zero, words, _mm512_set1_epi16((int16_t)(shift << 7)));
}

/* In every eight, inputs 0 4, 1 5, 2 6, 3 7. */
static __m512i paired(__m512i words)
{
    const __m512i order = _mm512_set_epi16(31, 27, 30, 26, 29, 25, 28, 24, 23, 19, 22, 18, 21, 17, 20, 16, 15,
                                           11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
    return _mm512_permutexvar_epi16(order, words);
}

static __m256i load_block(const uint8_t *codes, uint32_t at, uint32_t k)
{
    uint32_t left = at < k ? k - at : 0;
    return _mm256_maskz_loadu_epi8(left >= 32 ? ~0u : (1u << left) - 1, codes + at);
}

/* What is known of one row's chunk. */
typedef struct bf16_chunk {
    __m512i words[FP4_CHUNK_BLOCKS]; /* units of 2^(shift - 9) */
    uint32_t sum[FP4_CHUNK_BLOCKS];  /* most that products with doubled weights can add up to */
    uint32_t shift;
} bf16_chunk;

static bf16_chunk read_chunk(const uint8_t *codes, uint32_t at, uint32_t k)
{
    bf16_chunk chunk = {.shift = 0};
    __m512i any = _mm512_setzero_si512();
    for (uint32_t b = 0; b < FP4_CHUNK_BLOCKS; b++) {
        __m512i words = units_of(load_block(codes, at + b * KN_FP4_BLOCK, k)), size = magnitudes(words);
        __m512i even = _mm512_cvttps_epi32(_mm512_castsi512_ps(_mm512_slli_epi32(size, 16))),
                odd = _mm512_cvttps_epi32(
                    _mm512_castsi512_ps(_mm512_and_si512(size, _mm512_set1_epi32((int32_t)0xffff0000))));
        any = _mm512_or_si512(any, _mm512_or_si512(even, odd));
        chunk.words[b] = words;
        chunk.sum[b] = BF16_WEIGHT_MAX * (uint32_t)_mm512_reduce_add_epi32(_mm512_add_epi32(even, odd));
    }
    if (_mm512_test_epi32_mask(any, any) != 0) {
        chunk.shift = (uint32_t)__builtin_ctz((uint32_t)_mm512_reduce_or_epi32(any));
    }
    for (uint32_t b = 0; b < FP4_CHUNK_BLOCKS; b++) {
        chunk.words[b] = shifted(chunk.words[b], chunk.shift);
        chunk.sum[b] >>= chunk.shift;
    }
    return chunk;
}

/* Bits of a number: the least b with n < 2^b. */
static uint32_t bits_of(uint32_t n)
{
    return n == 0 ? 0 : 32 - (uint32_t)__builtin_clz(n);
}

/* A row's sums over all chunks: at most `most`, in units of 2^finest. */
typedef struct bf16_total {
    double most;
    uint32_t finest;
} bf16_total;

static void load_chunk(const bf16_group *g, uint32_t r, uint32_t c, const bf16_chunk *chunk, uint8_t scale,
                       bf16_total *total)
{
    uint32_t sum = chunk->sum[0] + chunk->sum[1] + chunk->sum[2] + chunk->sum[3], bits = bits_of(sum);
    uint32_t exponent = scale + chunk->shift;
    for (uint32_t b = 0; b < FP4_CHUNK_BLOCKS; b++) {
        bool wide = chunk->sum[b] > BF16_SUM_MAX;
        uint32_t pairs[BF16_BLOCK_PAIRS];
        __mmask32 small = _mm512_cmplt_epu16_mask(magnitudes(chunk->words[b]), _mm512_set1_epi16(BF16_SMALL));
        _mm512_storeu_si512(pairs,
                            paired(_mm512_maskz_mov_epi16(wide ? ~small : ~(__mmask32)0, chunk->words[b])));
        for (uint32_t p = 0; p < BF16_BLOCK_PAIRS; p++) {
            g->pairs[((uint64_t)c * BF16_CHUNK_PAIRS + b * BF16_BLOCK_PAIRS + p) * g->n + r] = pairs[p];
        }
        g->small[c] |= (uint32_t)wide << (r * FP4_CHUNK_BLOCKS + b);
    }
    /* Both scales have a bias of 127. */
    g->exponents[(uint64_t)c * g->n + r] = (uint64_t)(exponent + 1023 - 254 - FP4_UNIT_BITS) << 52;
    g->bits[c] = (uint8_t)(bits > g->bits[c] ? bits : g->bits[c]);
    if (sum != 0) {
        total->most += (double)sum * kn_f64_from_bits((uint64_t)(exponent + 1023) << 52);
        total->finest = exponent < total->finest ? exponent : total->finest;
    }
}

/* The sum of the chunks was rounded: one bit more. */
static uint8_t total_bits(const bf16_total *total)
{
    uint64_t bits;
    uint32_t n;
    if (total->most == 0) {
        return 0;
    }
    memcpy(&bits, &total->most, sizeof(bits));
    n = (uint32_t)(bits >> 52) - 1023 + 2 - total->finest;
    return (uint8_t)(n < UINT8_MAX ? n : UINT8_MAX);
}

typedef struct load_job {
    const cpu_q8_tile *tile;
    uint32_t k;
} load_job;

static void load_group(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const load_job *j = arg;
    uint32_t n_chunk = kn_blocks(j->k, CPU_CHUNK);
    (void)i_thread;
    for (uint32_t i = begin; i < end; i++) {
        bf16_group g = group_at(j->tile, j->k, i);
        memset(g.small, 0, n_chunk * sizeof(g.small[0]));
        memset(g.bits, 0, n_chunk + 1);
        for (uint32_t r = 0; r < g.n; r++) {
            bf16_total total = {.finest = UINT32_MAX};
            uint8_t bits;
            for (uint32_t c = 0; c < n_chunk; c++) {
                bf16_chunk chunk = read_chunk(j->tile->codes[g.row0 + r], c * CPU_CHUNK, j->k);
                load_chunk(&g, r, c, &chunk, j->tile->scales[g.row0 + r][c], &total);
            }
            bits = total_bits(&total);
            *g.total_bits = bits > *g.total_bits ? bits : *g.total_bits;
        }
    }
}

void KN_FN(kn_fp4_load)(kn_team *team, const cpu_q8_tile *tile, uint32_t k)
{
    load_job job = {.tile = tile, .k = k};
    kn_team_run(team, kn_blocks(tile->n, VNNI_GROUP), (uint64_t)VNNI_GROUP * k, load_group, &job);
}

/* ---- weights ---- */

/* What a tile's scales say, chunk after chunk. */
typedef struct bf16_scales {
    __m512i above;  /* of this chunk: by how much each exceeds the least of its output */
    __m512i exp[2]; /* that least one where doubles have their exponents, for both halves of the sums */
    __m512i low, high;
} bf16_scales;

static bf16_scales scales_open(void)
{
    return (bf16_scales){.low = _mm512_set1_epi8(-1), .high = _mm512_setzero_si512()};
}

INLINED void scales_next(bf16_scales *s, __m512i scales)
{
    __m512i least = _mm512_min_epu8(scales, _mm512_rol_epi32(scales, 16));
    least = _mm512_min_epu8(least, _mm512_rol_epi32(least, 8));
    s->above = _mm512_sub_epi8(scales, least);
    s->exp[0] = fp4_scale_exponents(least, 0, 0);
    s->exp[1] = fp4_scale_exponents(least, 0, 2);
    s->low = _mm512_min_epu8(s->low, least);
    s->high = _mm512_max_epu8(s->high, scales);
}

/* The most by which two scales of one output differ; more than any double has bits if one is NaN. */
static uint32_t scales_range(const bf16_scales *s)
{
    __m512i high = _mm512_max_epu8(s->high, _mm512_rol_epi32(s->high, 16)), range;
    uint8_t bytes[64], most = 0;
    high = _mm512_max_epu8(high, _mm512_rol_epi32(high, 8));
    range = _mm512_sub_epi8(high, s->low);
    range = _mm512_mask_mov_epi8(range, _mm512_cmpeq_epi8_mask(high, _mm512_set1_epi8(-1)), high);
    _mm512_storeu_si512(bytes, range);
    for (uint32_t i = 0; i < sizeof(bytes); i++) {
        most = bytes[i] > most ? bytes[i] : most;
    }
    return most;
}

/* What is to be added to the weights of block b: `above` where bfloat16 has its exponent. */
INLINED __m512i above_exponents(__m512i above, uint32_t b)
{
    const __m512i high_bytes = _mm512_set4_epi32(0x0c800c80, 0x08800880, 0x04800480, 0x00800080);
    __m512i from = _mm512_or_si512(high_bytes, _mm512_set1_epi16((int16_t)(b << 8)));
    return _mm512_srli_epi16(_mm512_shuffle_epi8(above, from), 1);
}

/* Pair i of a column, doubled weights times 2^above. Entries repeat every 16: what other nibbles leave in the
 * upper bits of an index does not matter. A zero becomes 2^(above - 127) and then far less than what a sum of
 * whole numbers is rounded to. */
INLINED __m512bh pair_of(__m512i column, uint32_t i, __m512i above)
{
    const __m512i values = _mm512_broadcast_i64x4(_mm256_set_epi16(
        (int16_t)0xc140, (int16_t)0xc100, (int16_t)0xc0c0, (int16_t)0xc080, (int16_t)0xc040, (int16_t)0xc000,
        (int16_t)0xbf80, (int16_t)0x8000, 0x4140, 0x4100, 0x40c0, 0x4080, 0x4040, 0x4000, 0x3f80, 0));
    __m512i code = _mm512_srli_epi32(column, 4 * i);
    return (__m512bh)_mm512_add_epi16(_mm512_permutexvar_epi16(code, values), above);
}

/* ---- sums of a chunk ---- */

INLINED __m512 dot(__m512 acc, uint32_t pair, __m512bh weights)
{
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32((int32_t)pair), weights);
}

/* sum_out[r], plus 2^31: n rows with one tile, at_once blocks at a time so that there are sums enough to
 * overlap. */
INLINED void few_sums(const fp4_chunk *chunk, __m512i above, const uint32_t *pairs, __m512i *sum_out,
                      const uint32_t n, const uint32_t at_once)
{
    for (uint32_t r = 0; r < n; r++) {
        sum_out[r] = _mm512_set1_epi32(INT32_MIN);
    }
    for (uint32_t b0 = 0; b0 < FP4_CHUNK_BLOCKS; b0 += at_once) {
        __m512 sum[FP4_CHUNK_BLOCKS][VNNI_GROUP];
        __m512i up[FP4_CHUNK_BLOCKS];
        for (uint32_t b = 0; b < at_once; b++) {
            up[b] = above_exponents(above, b0 + b);
            for (uint32_t r = 0; r < n; r++) {
                sum[b][r] = _mm512_setzero_ps();
            }
        }
#pragma GCC unroll 16
        for (uint32_t p = 0; p < BF16_BLOCK_PAIRS; p++) {
#pragma GCC unroll 4
            for (uint32_t b = 0; b < at_once; b++) {
                const __m512i *column = chunk->columns + (b0 + b) * FP4_BLOCK_STEPS + p / BF16_STEP_PAIRS;
                __m512bh weights = pair_of(*column, p % BF16_STEP_PAIRS, up[b]);
                for (uint32_t r = 0; r < n; r++) {
                    sum[b][r] = dot(sum[b][r], pairs[((b0 + b) * BF16_BLOCK_PAIRS + p) * n + r], weights);
                }
            }
        }
        for (uint32_t b = 0; b < at_once; b++) {
            for (uint32_t r = 0; r < n; r++) {
                sum_out[r] = _mm512_add_epi32(sum_out[r], _mm512_cvtps_epi32(sum[b][r]));
            }
        }
    }
}

/* The chunk of BF16_TILES tiles as bfloat16. */
typedef __m512i bf16_pairs[BF16_CHUNK_PAIRS][BF16_TILES];

static void unpack(const fp4_chunk *chunk, __m512i above, bf16_pairs out, uint32_t i_tile)
{
    for (uint32_t b = 0; b < FP4_CHUNK_BLOCKS; b++) {
        __m512i up = above_exponents(above, b);
        for (uint32_t s = 0; s < FP4_BLOCK_STEPS; s++) {
#pragma GCC unroll 4
            for (uint32_t i = 0; i < BF16_STEP_PAIRS; i++) {
                out[b * BF16_BLOCK_PAIRS + s * BF16_STEP_PAIRS + i][i_tile] =
                    (__m512i)pair_of(chunk->columns[b * FP4_BLOCK_STEPS + s], i, up);
            }
        }
    }
}

/* sum_out[tile][r], plus 2^31: n rows with BF16_TILES tiles. */
INLINED void many_sums(bf16_pairs weights, const uint32_t *pairs, __m512i (*sum_out)[VNNI_GROUP],
                       const uint32_t n)
{
    for (uint32_t b = 0; b < FP4_CHUNK_BLOCKS; b++) {
        __m512 sum[BF16_TILES][VNNI_GROUP];
        for (uint32_t r = 0; r < n; r++) {
            sum[0][r] = sum[1][r] = _mm512_setzero_ps();
        }
#pragma GCC unroll 16
        for (uint32_t p = 0; p < BF16_BLOCK_PAIRS; p++) {
            __m512bh w0 = (__m512bh)weights[b * BF16_BLOCK_PAIRS + p][0],
                     w1 = (__m512bh)weights[b * BF16_BLOCK_PAIRS + p][1];
            for (uint32_t r = 0; r < n; r++) {
                uint32_t pair = pairs[(b * BF16_BLOCK_PAIRS + p) * n + r];
                sum[0][r] = dot(sum[0][r], pair, w0);
                sum[1][r] = dot(sum[1][r], pair, w1);
            }
        }
        for (uint32_t i = 0; i < BF16_TILES; i++) {
            for (uint32_t r = 0; r < n; r++) {
                __m512i before = b == 0 ? _mm512_set1_epi32(INT32_MIN) : sum_out[i][r];
                sum_out[i][r] = _mm512_add_epi32(before, _mm512_cvtps_epi32(sum[i][r]));
            }
        }
    }
}

/* Adds the products of the small inputs that are not in pairs, of row r and block b. */
static __m512i add_small(const cpu_q8_tile *t, uint32_t k, const bf16_group *g, uint32_t c, uint32_t r,
                         uint32_t b, const fp4_chunk *chunk, __m512i above, __m512i sum)
{
    const uint8_t *codes = t->codes[g->row0 + r];
    uint32_t shift = (uint32_t)(g->exponents[(uint64_t)c * g->n + r] >> 52) -
                     (t->scales[g->row0 + r][c] + 1023u - 254 - FP4_UNIT_BITS);
    __m512i words = shifted(units_of(load_block(codes, c * CPU_CHUNK + b * KN_FP4_BLOCK, k)), shift);
    __mmask32 small = _mm512_cmplt_epu16_mask(magnitudes(words), _mm512_set1_epi16(BF16_SMALL));
    __m512i pairs = paired(_mm512_maskz_mov_epi16(small, words)), up = above_exponents(above, b);
    __mmask16 left = _mm512_test_epi32_mask(pairs, _mm512_set1_epi32(0x7fff7fff));
    __m512 rest = _mm512_setzero_ps();
    uint32_t pair[BF16_BLOCK_PAIRS];
    _mm512_storeu_si512(pair, pairs);
    for (; left != 0; left &= (__mmask16)(left - 1)) {
        uint32_t p = (uint32_t)__builtin_ctz(left);
        __m512i column = chunk->columns[b * FP4_BLOCK_STEPS + p / BF16_STEP_PAIRS];
        rest = dot(rest, pair[p], pair_of(column, p % BF16_STEP_PAIRS, up));
    }
    return _mm512_add_epi32(sum, _mm512_cvtps_epi32(rest));
}

APART void add_smalls(const cpu_q8_tile *t, uint32_t k, const bf16_group *g, uint32_t c,
                      const fp4_chunk *chunk, __m512i above, __m512i *sum)
{
    for (uint32_t left = g->small[c]; left != 0; left &= left - 1) {
        uint32_t bit = (uint32_t)__builtin_ctz(left), r = bit / FP4_CHUNK_BLOCKS;
        sum[r] = add_small(t, k, g, c, r, bit % FP4_CHUNK_BLOCKS, chunk, above, sum[r]);
    }
}

/* ---- sums of a row ---- */

/* Adds sums, which are 2^31 too large, times 2^exponent. As the low dword of a double of exponent 2^52 an
 * integer is its value. An integer times a power of two is exact: one rounding, that of the addition. */
INLINED void add_scaled(double *acc, __m512i sums, __m512i exponent)
{
    __m512d sum = _mm512_sub_pd(_mm512_castsi512_pd(sums), _mm512_set1_pd(0x1p52 + 0x1p31));
    _mm512_storeu_pd(acc, _mm512_fmadd_pd(sum, _mm512_castsi512_pd(exponent), _mm512_loadu_pd(acc)));
}

INLINED void add_chunk(const bf16_group *g, uint32_t c, const __m512i *sum, const bf16_scales *s,
                       vnni_sums acc, const uint32_t n)
{
    const __m512i two52 = _mm512_set1_epi32(0x43300000);
    for (uint32_t r = 0; r < n; r++) {
        __m512i exponent = _mm512_set1_epi64((int64_t)g->exponents[(uint64_t)c * n + r]);
        add_scaled(acc[r], _mm512_unpacklo_epi32(sum[r], two52), _mm512_add_epi64(s->exp[0], exponent));
        add_scaled(acc[r] + 8, _mm512_unpackhi_epi32(sum[r], two52), _mm512_add_epi64(s->exp[1], exponent));
    }
}

/* Outputs whose sums of the chunk may not fit. */
INLINED __mmask64 too_wide(const bf16_group *g, uint32_t c, const bf16_scales *s)
{
    int room = BF16_SUM_BITS - g->bits[c];
    return _mm512_cmpgt_epu8_mask(s->above, _mm512_set1_epi8((int8_t)room));
}

/* ---- one group and one tile ---- */

typedef struct few_job {
    const cpu_q8_tile *t;
    const kn_matrix *w;
    uint32_t i_tile;
    bf16_group g;
} few_job;

/* Returns whether the sums are exact. */
INLINED bool few_rows(const few_job *j, vnni_sums acc, const uint32_t n, const uint32_t at_once)
{
    uint32_t n_chunk = kn_blocks(j->w->n_in, CPU_CHUNK);
    bf16_scales scales = scales_open();
    __mmask64 wide = 0;
    memset(acc, 0, n * sizeof(acc[0]));
    for (uint32_t c = 0; c < n_chunk; c++) {
        fp4_chunk buffer;
        const fp4_chunk *chunk = KN_FN(kn_fp4_chunks_at)(j->w, j->i_tile, c, 1, &buffer);
        __m512i sum[VNNI_GROUP];
        scales_next(&scales, chunk->scales);
        wide |= too_wide(&j->g, c, &scales);
        few_sums(chunk, scales.above, j->g.pairs + (uint64_t)c * BF16_CHUNK_PAIRS * n, sum, n, at_once);
        if (j->g.small[c] != 0) {
            add_smalls(j->t, j->w->n_in, &j->g, c, chunk, scales.above, sum);
        }
        add_chunk(&j->g, c, sum, &scales, acc, n);
    }
    return wide == 0 && *j->g.total_bits + scales_range(&scales) <= BF16_TOTAL_BITS;
}

#define FEW(n_, at_once_)                                                                                    \
    case n_:                                                                                                 \
        return few_rows(j, acc, n_, at_once_);

static bool few(const few_job *j, vnni_sums acc)
{
    switch (j->g.n) {
        FEW(1, 4)
        FEW(2, 4)
        FEW(3, 4)
        FEW(4, 4)
        FEW(5, 2)
        FEW(6, 2)
        FEW(7, 2)
        FEW(8, 2)
    }
    return false;
}

static void few_part(const cpu_q8_tile *t, const kn_matrix *w, uint32_t begin, uint32_t end)
{
    few_job job = {.t = t, .w = w, .g = group_at(t, w->n_in, 0)};
    for (job.i_tile = begin; job.i_tile < end; job.i_tile++) {
        uint16_t nan[VNNI_OUTS] = {0};
        vnni_sums acc;
        if (!few(&job, acc)) {
            KN_FN(kn_fp4_careful)(t, w, job.i_tile, 0, t->n, acc, nan);
        }
        KN_FN(kn_vnni_put)(t, w, job.i_tile * VNNI_OUTS, &acc, nan);
    }
}

/* ---- many rows and BF16_TILES tiles ---- */

/* Sums of one tile; wide[g]: outputs of group g that may not be exact. */
typedef struct many_tile {
    bf16_scales scales;
    const fp4_chunk *chunk;
    fp4_chunk buffer;
    vnni_sums acc[VNNI_GROUPS_MAX];
    __mmask64 wide[VNNI_GROUPS_MAX];
} many_tile;

INLINED void many_rows(const cpu_q8_tile *t, uint32_t k, const bf16_group *g, uint32_t i_group, uint32_t c,
                       many_tile *tiles, bf16_pairs weights, const uint32_t n)
{
    __m512i sum[BF16_TILES][VNNI_GROUP];
    many_sums(weights, g->pairs + (uint64_t)c * BF16_CHUNK_PAIRS * n, sum, n);
    for (uint32_t i = 0; i < BF16_TILES; i++) {
        tiles[i].wide[i_group] |= too_wide(g, c, &tiles[i].scales);
        if (g->small[c] != 0) {
            add_smalls(t, k, g, c, tiles[i].chunk, tiles[i].scales.above, sum[i]);
        }
        add_chunk(g, c, sum[i], &tiles[i].scales, tiles[i].acc[i_group], n);
    }
}

#define MANY(n_)                                                                                             \
    case n_:                                                                                                 \
        many_rows(t, k, &g, i, c, tiles, weights, n_);                                                       \
        break;

static void many_chunk(const cpu_q8_tile *t, uint32_t k, uint32_t c, many_tile *tiles, bf16_pairs weights)
{
    for (uint32_t i = 0; i < kn_blocks(t->n, VNNI_GROUP); i++) {
        bf16_group g = group_at(t, k, i);
        switch (g.n) {
            MANY(1)
            MANY(2)
            MANY(3)
            MANY(4)
            MANY(5)
            MANY(6)
            MANY(7)
            MANY(8)
        }
    }
}

static void many_finish(const cpu_q8_tile *t, const kn_matrix *w, uint32_t i_tile, many_tile *tile)
{
    uint32_t range = scales_range(&tile->scales);
    uint16_t nan[VNNI_OUTS] = {0};
    for (uint32_t i = 0; i < kn_blocks(t->n, VNNI_GROUP); i++) {
        bf16_group g = group_at(t, w->n_in, i);
        if (tile->wide[i] != 0 || *g.total_bits + range > BF16_TOTAL_BITS) {
            KN_FN(kn_fp4_careful)(t, w, i_tile, g.row0, g.n, tile->acc[i], nan);
        }
    }
    KN_FN(kn_vnni_put)(t, w, i_tile * VNNI_OUTS, tile->acc, nan);
}

/* Tiles i_tile .. i_tile + n_tile - 1; where the second is missing the first stands in. */
static void many_tiles(const cpu_q8_tile *t, const kn_matrix *w, uint32_t i_tile, uint32_t n_tile)
{
    uint32_t n_group = kn_blocks(t->n, VNNI_GROUP);
    many_tile tiles[BF16_TILES];
    bf16_pairs weights;
    for (uint32_t i = 0; i < BF16_TILES; i++) {
        tiles[i].scales = scales_open();
        memset(tiles[i].acc, 0, n_group * sizeof(tiles[i].acc[0]));
        memset(tiles[i].wide, 0, sizeof(tiles[i].wide));
    }
    for (uint32_t c = 0; c < kn_blocks(w->n_in, CPU_CHUNK); c++) {
        for (uint32_t i = 0; i < BF16_TILES; i++) {
            many_tile *tile = &tiles[i];
            tile->chunk = KN_FN(kn_fp4_chunks_at)(w, i_tile + i % n_tile, c, 1, &tile->buffer);
            scales_next(&tile->scales, tile->chunk->scales);
            unpack(tile->chunk, tile->scales.above, weights, i);
        }
        many_chunk(t, w->n_in, c, tiles, weights);
    }
    for (uint32_t i = 0; i < n_tile; i++) {
        many_finish(t, w, i_tile + i, &tiles[i]);
    }
}

void KN_FN(kn_fp4_part)(const cpu_q8_tile *t, const kn_matrix *w, uint32_t begin, uint32_t end)
{
    if (t->n <= VNNI_GROUP) {
        few_part(t, w, begin, end);
        return;
    }
    for (uint32_t i = begin; i < end; i += BF16_TILES) {
        many_tiles(t, w, i, end - i < BF16_TILES ? end - i : BF16_TILES);
    }
}
