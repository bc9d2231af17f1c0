/* E2M1 weights by vdpbf16ps, one product for each weight and row, and exact.
 *
 * Both operands are whole numbers of few digits: an input is n 2^s in units of 2^-9, where s is the most that
 * all of its chunk allow, and a doubled weight one of 0 1 2 3 4 6 8 12. bfloat16 holds either, and float32 a
 * sum of such products, in any order, while their magnitudes add up to at most 2^24. So
 *
 *   - a block (32 inputs) of a row is summed in float32 if 12 sum |n| <= 2^24. Hardly any is not: it takes
 *     magnitudes of up to 448 beside an odd multiple of 2^-9. Its small inputs are then multiplied apart.
 *   - The blocks of a chunk (128 inputs, one scale of the row) are added as 32-bit integers, each shifted to
 * the least of the output's four scales.
 *   - Chunks are added in double. The contract adds blocks; both are exact, and so the same, while all sums
 * of a row and output are multiples of one power of two and less than 2^53 times that.
 *
 * Whether the last two hold is known when a row has been loaded and a tile of weights read. Where they do
 * not, the outputs of a group of rows and a tile are computed again, with care (fp4_careful.c).
 *
 * Bound: for one or two rows the read bandwidth, from four on the rate of vdpbf16ps. It is AMD's path: two of
 * them a cycle there, while Intel's has but half the rate of float32. */
#include "kernels/cpu/fp4_chunks.h"

enum {
    BF16_BLOCK_PAIRS = KN_FP4_BLOCK / 2,
    BF16_CHUNK_PAIRS = CPU_CHUNK / 2,
    BF16_STEP_PAIRS = FP4_STEP / 2,
    BF16_GROUP = 8,      /* rows multiplied together, about: their sums stay in registers */
    BF16_GROUP_MAX = 10, /* at most */
    BF16_GROUPS_MAX = CPU_Q8_ROWS / BF16_GROUP,
    BF16_AHEAD = 4 * (int)sizeof(fp4_chunk), /* weights are asked for before they are needed; half is late */
    BF16_WEIGHT_MAX = 12,                    /* doubled */
    BF16_SUM_MAX = 1 << 24,                  /* of a block in float32 */
    BF16_SUM_BITS = 31,                      /* of a chunk in an integer */
    BF16_TOTAL_BITS = 53,                    /* of a row in double */
    BF16_SMALL = (127 + 9) << 7, /* the bfloat16 2^9: what is less is multiplied apart where it must be */
};

/* Where the rows of one group stand in the scratch of a tile; K is k rounded up to CPU_CHUNK. */
typedef struct bf16_group {
    uint32_t row0, n;    /* rows */
    uint32_t *pairs;     /* [K / 2][n]: inputs i and i + 4 of every eight */
    uint32_t *exponents; /* [K / 128][n]: of 2^52 times what scales a chunk's sums, less the weights' share,
                            where the high dword of a double has its own */
    uint64_t *small;     /* [K / 128]: bit 4 r + b: row r's small inputs of block b are not in pairs */
    uint8_t *bits; /* [K / 128]: sums of any row are less than 2^bits if the weights' scales are equal */
    uint8_t *total_bits; /* likewise of the sum of all chunks, in units of the row's finest */
} bf16_group;

/* All of about one size and at most BF16_GROUP_MAX rows: what is done once for a group weighs on few rows. */
static uint32_t n_groups(const cpu_q8_tile *t)
{
    uint32_t n = (t->n + 5) / BF16_GROUP;
    return n > 0 ? n : 1;
}

static bf16_group group_at(const cpu_q8_tile *t, uint32_t k, uint32_t i)
{
    uint32_t n_group = n_groups(t);
    uint64_t n_chunk = kn_blocks(k, CPU_CHUNK), row0 = (uint64_t)i * t->n / n_group;
    uint8_t *pairs = (uint8_t *)t->x + VNNI_HEAD_BYTES;
    uint8_t *small = pairs + n_chunk * BF16_CHUNK_PAIRS * sizeof(uint32_t) * t->n;
    uint8_t *exponents = small + n_chunk * sizeof(uint64_t) * n_group;
    uint8_t *bits = exponents + n_chunk * sizeof(uint32_t) * t->n;
    bf16_group g = {.row0 = (uint32_t)row0,
                    .n = (i + 1) * t->n / n_group - (uint32_t)row0,
                    .pairs = (uint32_t *)(void *)pairs + n_chunk * BF16_CHUNK_PAIRS * row0,
                    .exponents = (uint32_t *)(void *)exponents + n_chunk * row0,
                    .small = (uint64_t *)(void *)small + n_chunk * i,
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

static __mmask32 small_ones(__m512i words)
{
    return _mm512_cmplt_epu16_mask(magnitudes(words), _mm512_set1_epi16(BF16_SMALL));
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
        __mmask32 taken = wide ? ~small_ones(chunk->words[b]) : ~(__mmask32)0;
        _mm512_storeu_si512(pairs, paired(_mm512_maskz_mov_epi16(taken, chunk->words[b])));
        for (uint32_t p = 0; p < BF16_BLOCK_PAIRS; p++) {
            g->pairs[((uint64_t)c * BF16_CHUNK_PAIRS + b * BF16_BLOCK_PAIRS + p) * g->n + r] = pairs[p];
        }
        g->small[c] |= (uint64_t)wide << (r * FP4_CHUNK_BLOCKS + b);
    }
    /* Both scales have a bias of 127. */
    g->exponents[(uint64_t)c * g->n + r] = (exponent + 1023 + 52 - 254 - FP4_UNIT_BITS) << 20;
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
    kn_team_run(team, n_groups(tile), (uint64_t)BF16_GROUP * k, load_group, &job);
}

/* ---- weights ---- */

/* What the scales of a tile's chunk say. */
typedef struct bf16_scales {
    __m512i above[FP4_CHUNK_BLOCKS]; /* by how much that of a block exceeds the least of its output */
    __m512i high;                    /* that least one where the high dword of a double has its exponent */
} bf16_scales;

/* The least and the largest scale of a tile's outputs so far. */
typedef struct bf16_range {
    __m512i low, high;
} bf16_range;

static bf16_range range_open(void)
{
    return (bf16_range){.low = _mm512_set1_epi8(-1), .high = _mm512_setzero_si512()};
}

/* above_out: byte by byte. */
INLINED bf16_scales scales_of(__m512i scales, bf16_range *range, __m512i *above_out)
{
    __m512i least = _mm512_min_epu8(scales, _mm512_rol_epi32(scales, 16)), above;
    bf16_scales s;
    least = _mm512_min_epu8(least, _mm512_rol_epi32(least, 8));
    range->low = _mm512_min_epu8(range->low, least);
    range->high = _mm512_max_epu8(range->high, scales);
    *above_out = above = _mm512_sub_epi8(scales, least);
    s.above[0] = _mm512_and_si512(above, _mm512_set1_epi32(UINT8_MAX));
    s.above[1] = _mm512_and_si512(_mm512_srli_epi32(above, 8), _mm512_set1_epi32(UINT8_MAX));
    s.above[2] = _mm512_and_si512(_mm512_srli_epi32(above, 16), _mm512_set1_epi32(UINT8_MAX));
    s.above[3] = _mm512_srli_epi32(above, 24);
    s.high = _mm512_srli_epi32(_mm512_slli_epi32(least, 24), 4);
    return s;
}

/* The most by which two scales of one output differ; more than any double has bits if one is NaN. All bytes
 * of a dword are equal. */
static uint32_t range_width(const bf16_range *range)
{
    __m512i high = _mm512_max_epu8(range->high, _mm512_rol_epi32(range->high, 16)), width;
    high = _mm512_max_epu8(high, _mm512_rol_epi32(high, 8));
    width = _mm512_sub_epi8(high, range->low);
    width = _mm512_mask_mov_epi8(width, _mm512_cmpeq_epi8_mask(high, _mm512_set1_epi8(-1)), high);
    return _mm512_reduce_max_epu32(width) & UINT8_MAX;
}

/* A column; asks for one further on. The compiler would read it again for each of its pairs, beside all the
 * loads of inputs. */
INLINED __m512i read_column(const __m512i *at)
{
    __m512i column = *at;
    _mm_prefetch((const char *)at + BF16_AHEAD, _MM_HINT_T0);
    __asm__("" : "+v"(column));
    return column;
}

/* Pair i of a column, doubled weights. Entries repeat every 16: what other nibbles leave in the upper bits of
 * an index does not matter. */
INLINED __m512i pair_of(__m512i column, uint32_t i)
{
    const __m512i values = _mm512_broadcast_i64x4(_mm256_set_epi16(
        (int16_t)0xc140, (int16_t)0xc100, (int16_t)0xc0c0, (int16_t)0xc080, (int16_t)0xc040, (int16_t)0xc000,
        (int16_t)0xbf80, (int16_t)0x8000, 0x4140, 0x4100, 0x40c0, 0x4080, 0x4040, 0x4000, 0x3f80, 0));
    return _mm512_permutexvar_epi16(_mm512_srli_epi32(column, 4 * i), values);
}

/* ---- sums of a chunk ---- */

INLINED __m512 dot(__m512 acc, uint32_t pair, __m512i weights)
{
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32((int32_t)pair), (__m512bh)weights);
}

/* One chunk of FP4_TILES tiles, and what is still to be added of one: its sums are added to those of the row
 * while the products of the next one are on their way. */
typedef struct bf16_turn {
    const fp4_chunk *chunk;
    bf16_scales scales[FP4_TILES];
    const uint32_t *exponents; /* of the group's rows */
    __m512 sum[FP4_TILES][BF16_GROUP_MAX][FP4_CHUNK_BLOCKS];
} bf16_turn;

/* Adds what is in the low dword of sum, less that of zero. */
INLINED void add_scaled(double *acc, __m512i sum, __m512i zero)
{
    __m512d term = _mm512_sub_pd(_mm512_castsi512_pd(sum), _mm512_castsi512_pd(zero));
    _mm512_storeu_pd(acc, _mm512_add_pd(_mm512_loadu_pd(acc), term));
}

/* Adds a chunk's sum of tile k and row r, times its scales. Below a high dword that says 2^52 2^e an
 * integer is its value times 2^e: taking away what it is too large, 2^31, is exact, and the addition the one
 * rounding. Unlike a multiplication this leaves the units of the products alone. */
INLINED void add_chunk(const bf16_turn *turn, uint32_t k, uint32_t r, __m512i sum, double *acc)
{
    const __m512i zero = _mm512_set1_epi32(INT32_MIN);
    __m512i high = _mm512_add_epi32(turn->scales[k].high, _mm512_set1_epi32((int32_t)turn->exponents[r]));
    sum = _mm512_xor_si512(sum, zero);
    add_scaled(acc, _mm512_unpacklo_epi32(sum, high), _mm512_unpacklo_epi32(zero, high));
    add_scaled(acc + 8, _mm512_unpackhi_epi32(sum, high), _mm512_unpackhi_epi32(zero, high));
}

/* A block's sum in units of the chunk's least scale. */
INLINED __m512i block_sum(const bf16_turn *turn, uint32_t k, uint32_t b, __m512 sum)
{
    return _mm512_sllv_epi32(_mm512_cvtps_epi32(sum), turn->scales[k].above[b]);
}

/* Adds a turn's sums of tile k and row r. */
INLINED void settle(const bf16_turn *turn, uint32_t k, uint32_t r, double *acc)
{
    __m512i sum[FP4_CHUNK_BLOCKS];
#pragma GCC unroll 4
    for (uint32_t b = 0; b < FP4_CHUNK_BLOCKS; b++) {
        sum[b] = block_sum(turn, k, b, turn->sum[k][r][b]);
    }
    add_chunk(turn, k, r,
              _mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]), _mm512_add_epi32(sum[2], sum[3])), acc);
}

/* Multiplies n rows with a chunk, now->sum, and settles the one before unless there is none. A sum of few
 * rows is taken in n_part parts, so that there are enough of them to overlap: blocks at once instead would
 * spare their addition, but read the weights out of turn, which costs more. */
INLINED void multiply(bf16_turn *now, const uint32_t *pairs, const bf16_turn *before,
                      double (*const acc[FP4_TILES])[VNNI_OUTS], const uint32_t n, const uint32_t n_part)
{
    const uint32_t every = n > 2 * FP4_CHUNK_BLOCKS ? 2 : 4; /* pairs there is a sum to be settled */
#pragma GCC unroll 1
    for (uint32_t b = 0; b < FP4_CHUNK_BLOCKS; b++) {
        __m512 sum[FP4_TILES][BF16_STEP_PAIRS][BF16_GROUP_MAX];
        __m512i column[FP4_TILES];
#pragma GCC unroll 16
        for (uint32_t p = 0; p < BF16_BLOCK_PAIRS; p++, pairs += n) {
            const uint32_t i = p % BF16_STEP_PAIRS, s = p / BF16_STEP_PAIRS, part = i % n_part;
            const uint32_t settled = b + p / (2 * every) * FP4_CHUNK_BLOCKS, of = p / every % FP4_TILES;
            __m512i w[FP4_TILES];
#pragma GCC unroll 2
            for (uint32_t k = 0; k < FP4_TILES; k++) {
                if (i == 0) {
                    column[k] = read_column(&now->chunk->columns[b * FP4_BLOCK_STEPS + s][k]);
                }
                w[k] = pair_of(column[k], i);
            }
#pragma GCC unroll 10
            for (uint32_t r = 0; r < n; r++) {
#pragma GCC unroll 2
                for (uint32_t k = 0; k < FP4_TILES;
                     k++) { /* without a loop of zeros sums stay in registers */
                    __m512 from = p < n_part ? _mm512_setzero_ps() : sum[k][part][r];
                    sum[k][part][r] = dot(from, pairs[r], w[k]);
                }
            }
            if (p % every == every - 1 && settled < n && before != NULL) {
                settle(before, of, settled, acc[of][settled]);
            }
        }
#pragma GCC unroll 10
        for (uint32_t r = 0; r < n; r++) {
#pragma GCC unroll 2
            for (uint32_t k = 0; k < FP4_TILES; k++) {
#pragma GCC unroll 3
                for (uint32_t i = 1; i < n_part; i++) {
                    sum[k][0][r] = _mm512_add_ps(sum[k][0][r], sum[k][i][r]);
                }
                now->sum[k][r][b] = sum[k][0][r];
            }
        }
    }
}

/* The small inputs of row r and block b of chunk c, which are not in pairs. */
static __m512i small_pairs(const cpu_q8_tile *t, uint32_t k, const bf16_group *g, uint32_t c, uint32_t r,
                           uint32_t b)
{
    uint32_t shift = (g->exponents[(uint64_t)c * g->n + r] >> 20) -
                     (t->scales[g->row0 + r][c] + 1023u + 52 - 254 - FP4_UNIT_BITS);
    __m256i codes = load_block(t->codes[g->row0 + r], c * CPU_CHUNK + b * KN_FP4_BLOCK, k);
    __m512i words = shifted(units_of(codes), shift);
    return paired(_mm512_maskz_mov_epi16(small_ones(words), words));
}

/* Adds their products. */
APART void add_smalls(const cpu_q8_tile *t, uint32_t k, const bf16_group *g, uint32_t c,
                      const bf16_turn *turn, double (*const acc[FP4_TILES])[VNNI_OUTS])
{
    for (uint64_t left = g->small[c]; left != 0; left &= left - 1) {
        uint32_t bit = (uint32_t)__builtin_ctzll(left), r = bit / FP4_CHUNK_BLOCKS,
                 b = bit % FP4_CHUNK_BLOCKS;
        __m512i pairs = small_pairs(t, k, g, c, r, b);
        __m512 sum[FP4_TILES] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        uint32_t pair[BF16_BLOCK_PAIRS];
        _mm512_storeu_si512(pair, pairs);
        for (uint32_t of = kn_lanes_of(_mm512_test_epi32_mask(pairs, pairs)); of != 0; of &= of - 1) {
            uint32_t p = (uint32_t)__builtin_ctz(of);
            const __m512i *column = turn->chunk->columns[b * FP4_BLOCK_STEPS + p / BF16_STEP_PAIRS];
            for (uint32_t i = 0; i < FP4_TILES; i++) {
                sum[i] = dot(sum[i], pair[p], pair_of(column[i], p % BF16_STEP_PAIRS));
            }
        }
        for (uint32_t i = 0; i < FP4_TILES; i++) {
            add_chunk(turn, i, r, block_sum(turn, i, b, sum[i]), acc[i][r]);
        }
    }
}

/* Outputs whose sums of the chunk may not fit. */
INLINED __mmask64 too_wide(const bf16_group *g, uint32_t c, __m512i above)
{
    int room = BF16_SUM_BITS - g->bits[c];
    return _mm512_cmpgt_epu8_mask(above, _mm512_set1_epi8((int8_t)room));
}

/* ---- rows and tiles ---- */

/* FP4_TILES tiles and all n rows. wide[g][tile]: outputs of group g that may not be exact. acc[tile n + row]:
 * outputs in the order of vnni_sums. */
typedef struct bf16_tiles {
    bf16_range range[FP4_TILES];
    __mmask64 wide[BF16_GROUPS_MAX][FP4_TILES];
    double acc[FP4_TILES * CPU_Q8_ROWS][VNNI_OUTS];
} bf16_tiles;

typedef struct bf16_job {
    const cpu_q8_tile *t;
    const kn_matrix *w;
    uint32_t i_pair;
    bf16_tiles *tiles;
} bf16_job;

INLINED void take_turn(const bf16_job *j, const bf16_group *g, uint32_t i_group, uint32_t c,
                       fp4_chunk *buffer, bf16_turn *turn)
{
    turn->chunk = fp4_chunk_at(j->w, j->i_pair, c, buffer);
    for (uint32_t k = 0; k < FP4_TILES; k++) {
        __m512i above;
        _mm_prefetch((const char *)&turn->chunk->scales[k] + BF16_AHEAD, _MM_HINT_T0);
        turn->scales[k] = scales_of(turn->chunk->scales[k], &j->tiles->range[k], &above);
        j->tiles->wide[i_group][k] |= too_wide(g, c, above);
    }
    turn->exponents = g->exponents + (uint64_t)c * g->n;
}

INLINED void group_rows(const bf16_job *j, const bf16_group *g, uint32_t i_group, const uint32_t n,
                        const uint32_t n_part)
{
    double(*const acc[FP4_TILES])[VNNI_OUTS] = {j->tiles->acc + g->row0, j->tiles->acc + j->t->n + g->row0};
    uint32_t n_chunk = kn_blocks(j->w->n_in, CPU_CHUNK);
    const uint32_t *pairs = g->pairs;
    fp4_chunk buffer;
    bf16_turn turns[2];
    const bf16_turn *before = NULL;
    for (uint32_t c = 0; c < n_chunk; c++, pairs += BF16_CHUNK_PAIRS * n) {
        bf16_turn *now = &turns[c % 2];
        take_turn(j, g, i_group, c, &buffer, now);
        multiply(now, pairs, before, acc, n, n_part);
        if (g->small[c] != 0) {
            add_smalls(j->t, j->w->n_in, g, c, now, acc);
        }
        before = now;
    }
    for (uint32_t k = 0; k < FP4_TILES; k++) {
        for (uint32_t r = 0; r < n; r++) {
            settle(before, k, r, acc[k][r]);
        }
    }
}

/* One copy for each number of rows. */
typedef void (*group_fn)(const bf16_job *j, const bf16_group *g, uint32_t i_group);
#define GROUP(n_, n_part_)                                                                                   \
    APART void group_rows_##n_(const bf16_job *j, const bf16_group *g, uint32_t i_group)                     \
    {                                                                                                        \
        group_rows(j, g, i_group, n_, n_part_);                                                              \
    }
GROUP(1, 4)
GROUP(2, 4)
GROUP(3, 2)
GROUP(4, 2)
GROUP(5, 2)
GROUP(6, 1)
GROUP(7, 1)
GROUP(8, 1)
GROUP(9, 1)
GROUP(10, 1)
static const group_fn GROUP_ROWS[BF16_GROUP_MAX + 1] = {
    NULL,         group_rows_1, group_rows_2, group_rows_3, group_rows_4, group_rows_5,
    group_rows_6, group_rows_7, group_rows_8, group_rows_9, group_rows_10};

static void put_tile(bf16_job *j, uint32_t k)
{
    bf16_tiles *tiles = j->tiles;
    double(*acc)[VNNI_OUTS] = tiles->acc + k * j->t->n;
    uint32_t width = range_width(&tiles->range[k]);
    uint16_t nan[VNNI_OUTS] = {0};
    for (uint32_t i = 0; i < n_groups(j->t); i++) {
        bf16_group g = group_at(j->t, j->w->n_in, i);
        if (tiles->wide[i][k] != 0 || *g.total_bits + width > BF16_TOTAL_BITS) {
            KN_FN(kn_fp4_careful)(j->t, j->w, j->i_pair, k, g.row0, g.n, acc + g.row0, nan);
        }
    }
    KN_FN(kn_vnni_put)(j->t, j->w, j->i_pair * FP4_OUTS + k * VNNI_OUTS, (vnni_sums *)(void *)acc, nan);
}

/* A group reads the weights where the first one has left them, in the second cache. To go back and forth
 * between groups while they are in the first one costs more, for a group's last sums are settled with nothing
 * else under way. */
static void pair_part(const cpu_q8_tile *t, const kn_matrix *w, uint32_t i_pair)
{
    bf16_tiles tiles;
    bf16_job job = {.t = t, .w = w, .i_pair = i_pair, .tiles = &tiles};
    tiles.range[0] = tiles.range[1] = range_open();
    memset(tiles.wide, 0, sizeof(tiles.wide));
    memset(tiles.acc, 0, FP4_TILES * t->n * sizeof(tiles.acc[0]));
    for (uint32_t i = 0; i < n_groups(t); i++) {
        bf16_group g = group_at(t, w->n_in, i);
        GROUP_ROWS[g.n](&job, &g, i);
    }
    for (uint32_t k = 0; k < FP4_TILES && i_pair * FP4_OUTS + k * VNNI_OUTS < w->n_out; k++) {
        put_tile(&job, k);
    }
}

void KN_FN(kn_fp4_part)(const cpu_q8_tile *t, const kn_matrix *w, uint32_t begin, uint32_t end)
{
    for (uint32_t i = begin; i < end; i++) {
        pair_part(t, w, i);
    }
}
