/* Scores of indexer keys in 256-bit registers: heads in the lanes, so that a dot product stands in its lane
 * of the contract's sum over heads, and two dims of a key are broadcast to all of them.
 *
 * Doubled E2M1 codes are at most 12, those of keys unsigned by 12 more, which a block's sum starts with the
 * opposite of: 32 products of at most 24 * 12 fit 16 bits. As long as the scales of a key, or of a query
 * head, differ by 2^SHIFT_MAX at most, block sums times 2^(their distance from the smallest) make the dot
 * product one exact integer; the smallest scale of a head goes into its weight and that of a key into the
 * total: powers of two, they change no rounding. A key or a query whose scales differ by more is summed block
 * by block.
 *
 * Bound: vpmaddubsw and its addition, 32 multiplications for both. */
#include "kernels/cpu/avx2.h"
#include "kernels/cpu/index.h"

enum {
    SHIFT_MAX = 7,
    OFFSET = 12,
    GROUP = 16, /* heads of a register */
    KEYS = 4,   /* whose sums stand in registers at a time */
    BLOCK_PAIRS = KN_FP4_BLOCK / 2,
    BLOCKS_MAX = KN_DIM_MAX / KN_FP4_BLOCK,
};

/* KEYS keys as they meet the queries. */
typedef struct key_tile {
    uint8_t pairs[KEYS][KN_DIM_MAX / 2][4]; /* unsigned codes of two dims, twice */
    int16_t factor[KEYS][BLOCKS_MAX];       /* of block sums of a narrow key; zero past the last block */
    double scale[KEYS];                     /* of all of it */
    const uint8_t *scales[KEYS];            /* stored */
    bool narrow;                            /* whether all are */
} key_tile;

/* What else stands behind a query's codes, int8 [dim / 2][width][2]. */
typedef struct query_blocks {
    int16_t *start;  /* [blocks][width] */
    int16_t *factor; /* [blocks / 2][width / GROUP][2][GROUP]: of two blocks in turn, as unpacking sums brings
                      * them */
} query_blocks;

static query_blocks blocks_of(const cpu_index_scan *scan, const cpu_index_query *query)
{
    int16_t *start = (int16_t *)(void *)((uint8_t *)query->codes + (uint64_t)scan->dim * scan->width);
    uint32_t n_block = kn_blocks(scan->dim, KN_FP4_BLOCK);
    return (query_blocks){.start = start, .factor = start + (uint64_t)n_block * scan->width};
}

/* Whether the n scales differ by 2^SHIFT_MAX at most, and the smallest. */
static bool is_narrow(const uint8_t *scales, uint32_t n, uint8_t *least_out)
{
    uint8_t least = 255, most = 0;
    for (uint32_t b = 0; b < n; b++) {
        least = scales[b] < least ? scales[b] : least;
        most = scales[b] > most ? scales[b] : most;
    }
    *least_out = least;
    return most - least <= SHIFT_MAX && most != 255;
}

/* ---- queries ---- */

/* Where the factor of head h and block b stands: heads 0 .. 3 and 8 .. 11 of a group come first. */
static int16_t *factor_at(const cpu_index_scan *scan, const query_blocks *blocks, uint32_t h, uint32_t b)
{
    uint32_t in_group = h % GROUP, upper = in_group / 4 % 2, dword = in_group / 8 * 4 + in_group % 4;
    uint64_t vector = ((uint64_t)(b / 2) * (scan->width / GROUP) + h / GROUP) * 2 + upper;
    return blocks->factor + vector * GROUP + 2 * dword + b % 2;
}

static void load_head(const cpu_index_scan *scan, const uint8_t *row, uint32_t h, cpu_index_query *query)
{
    query_blocks blocks = blocks_of(scan, query);
    int8_t *codes = query->codes;
    uint8_t least;
    is_narrow(row + scan->dim / 2, kn_blocks(scan->dim, KN_FP4_BLOCK), &least);
    for (uint32_t i = 0; i < scan->dim; i++) {
        int8_t code = kn_e2m1_doubled(row[i / 2] >> (i % 2 * 4) & 15);
        codes[((uint64_t)(i / 2) * scan->width + h) * 2 + i % 2] = code;
        blocks.start[(uint64_t)(i / KN_FP4_BLOCK) * scan->width + h] -= (int16_t)(OFFSET * code);
    }
    for (uint32_t b = 0; b < kn_blocks(scan->dim, KN_FP4_BLOCK); b++) {
        uint8_t scale = row[scan->dim / 2 + b];
        query->scale[(uint64_t)b * scan->width + h] = kn_e8m0_decode(scale);
        *factor_at(scan, &blocks, h, b) = (int16_t)(query->narrow ? 1 << (scale - least) : 0);
    }
    if (query->narrow) { /* both factors of a product were doubled */
        query->weight[h] *= 0.25 * kn_e8m0_decode(least);
    }
}

void KN_FN(kn_cpu_index_load)(const cpu_index_scan *scan, const uint8_t *rows, const uint16_t *w,
                              cpu_index_query *query)
{
    uint32_t n_block = kn_blocks(scan->dim, KN_FP4_BLOCK), row_bytes = kn_index_row_bytes(scan->dim);
    query_blocks blocks = blocks_of(scan, query);
    uint8_t least;
    memset(query->codes, 0, (uint64_t)scan->dim * scan->width);
    memset(blocks.start, 0, (uint64_t)n_block * scan->width * sizeof(*blocks.start));
    memset(blocks.factor, 0, (uint64_t)kn_blocks(n_block, 2) * 2 * scan->width * sizeof(*blocks.factor));
    memset(query->scale, 0, (uint64_t)n_block * scan->width * sizeof(*query->scale));
    memset(query->weight, 0, sizeof(query->weight));
    query->narrow = true;
    for (uint32_t h = 0; h < scan->heads; h++) {
        query->narrow =
            query->narrow && is_narrow(rows + (uint64_t)h * row_bytes + scan->dim / 2, n_block, &least);
        query->weight[h] = kn_bf16_decode(w[h]) * scan->factor;
    }
    for (uint32_t h = 0; h < scan->heads; h++) {
        load_head(scan, rows + (uint64_t)h * row_bytes, h, query);
    }
}

/* ---- keys ---- */

/* 16 bytes of stored codes. */
INLINED void unpack_16(const uint8_t *stored, uint8_t (*pairs_out)[4])
{
    const __m128i codes = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0),
                  low4 = _mm_set1_epi8(15);
    __m128i v = _mm_loadu_si128((const __m128i *)(const void *)stored), *to = (__m128i *)(void *)pairs_out;
    __m128i even = _mm_shuffle_epi8(codes, _mm_and_si128(v, low4)),
            odd = _mm_shuffle_epi8(codes, _mm_and_si128(_mm_srli_epi16(v, 4), low4));
    __m128i first = _mm_unpacklo_epi8(even, odd), second = _mm_unpackhi_epi8(even, odd);
    _mm_storeu_si128(to, _mm_unpacklo_epi16(first, first));
    _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(first, first));
    _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(second, second));
    _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(second, second));
}

static void load_key(const uint8_t *stored, uint32_t dim, key_tile *tile, uint32_t k)
{
    uint32_t n_block = kn_blocks(dim, KN_FP4_BLOCK), i = 0;
    const uint8_t *scales = stored + dim / 2;
    uint8_t least;
    bool narrow = is_narrow(scales, n_block, &least);
    for (; i + 16 <= dim / 2; i += 16) {
        unpack_16(stored + i, tile->pairs[k] + i);
    }
    for (; i < dim / 2; i++) {
        uint8_t *pair = tile->pairs[k][i];
        pair[0] = pair[2] = (uint8_t)(OFFSET + kn_e2m1_doubled(stored[i] & 15));
        pair[1] = pair[3] = (uint8_t)(OFFSET + kn_e2m1_doubled(stored[i] >> 4));
    }
    for (uint32_t b = 0; b < n_block + n_block % 2; b++) {
        tile->factor[k][b] = (int16_t)(narrow && b < n_block ? 1 << (scales[b] - least) : 0);
    }
    tile->scale[k] = kn_e8m0_decode(least);
    tile->scales[k] = scales;
    tile->narrow = tile->narrow && narrow;
}

/* ---- scores ---- */

/* Sums of block b of every key and the heads h .. h + 15. */
INLINED void block_sums(const cpu_index_scan *scan, const cpu_index_query *query, const key_tile *tile,
                        uint32_t h, uint32_t b, __m256i sum_out[KEYS])
{
    uint32_t first = b * BLOCK_PAIRS, n_pair = scan->dim / 2, end = first + BLOCK_PAIRS;
    const int16_t *start = blocks_of(scan, query).start + (uint64_t)b * scan->width + h;
    const uint8_t *codes = (const uint8_t *)query->codes + 2ull * h;
    __m256i sum[KEYS];
    end = end < n_pair ? end : n_pair;
    for (int k = 0; k < KEYS; k++) {
        sum[k] = _mm256_loadu_si256((const __m256i *)(const void *)start);
    }
#pragma GCC unroll 4
    for (uint32_t i = first; i < end; i++) {
        __m256i q =
            _mm256_loadu_si256((const __m256i *)(const void *)(codes + 2 * (uint64_t)i * scan->width));
        for (int k = 0; k < KEYS; k++) {
            int32_t pair;
            memcpy(&pair, tile->pairs[k][i], sizeof(pair));
            sum[k] = _mm256_add_epi16(sum[k], _mm256_maddubs_epi16(_mm256_set1_epi32(pair), q));
        }
    }
    for (int k = 0; k < KEYS; k++) {
        sum_out[k] = sum[k];
    }
}

/* Adds what four heads give to four lanes: their dot products, unless negative, times their weights. */
INLINED void add_heads(double *lane, __m128i dot, const double *weight)
{
    __m256d positive = _mm256_max_pd(_mm256_cvtepi32_pd(dot), _mm256_setzero_pd());
    __m256d term = _mm256_mul_pd(positive, _mm256_loadu_pd(weight));
    _mm256_storeu_pd(lane, _mm256_add_pd(_mm256_loadu_pd(lane), term));
}

/* Of a narrow query and narrow keys. */
static void score_narrow(const cpu_index_scan *scan, const cpu_index_query *query, const key_tile *tile,
                         double score_out[KEYS])
{
    uint32_t n_block = kn_blocks(scan->dim, KN_FP4_BLOCK);
    const int16_t *factor = blocks_of(scan, query).factor;
    double lane[KEYS][KN_LANES] = {0};
    for (uint32_t h = 0; h < scan->width; h += GROUP) {
        __m256i dot[KEYS][2], first[KEYS], second[KEYS];
        for (int k = 0; k < KEYS; k++) {
            dot[k][0] = dot[k][1] = second[k] = _mm256_setzero_si256();
        }
        for (uint32_t b = 0; b < n_block; b += 2) {
            const __m256i *of_heads =
                (const __m256i *)(const void *)(factor + (uint64_t)b * scan->width) + h / GROUP * 2ull;
            block_sums(scan, query, tile, h, b, first);
            if (b + 1 < n_block) {
                block_sums(scan, query, tile, h, b + 1, second);
            }
            for (int k = 0; k < KEYS; k++) {
                __m256i of_key = avx2_broadcast(&tile->factor[k][b]);
                for (int u = 0; u < 2; u++) {
                    __m256i sums = u == 0 ? _mm256_unpacklo_epi16(first[k], second[k])
                                          : _mm256_unpackhi_epi16(first[k], second[k]);
                    __m256i by = _mm256_mullo_epi16(_mm256_loadu_si256(of_heads + u), of_key);
                    dot[k][u] = _mm256_add_epi32(dot[k][u], _mm256_madd_epi16(sums, by));
                }
            }
        }
        for (int k = 0; k < KEYS; k++) {
            for (int v = 0; v < 4; v++) {
                __m256i both = dot[k][v % 2];
                add_heads(lane[k] + 4 * v,
                          v < 2 ? _mm256_castsi256_si128(both) : _mm256_extracti128_si256(both, 1),
                          query->weight + h + 4 * v);
            }
        }
    }
    for (int k = 0; k < KEYS; k++) {
        score_out[k] = kn_fold_lanes(lane[k]) * tile->scale[k];
    }
}

/* What the weight of a narrow query's head holds beside: its smallest scale and 0.25, a power of two. */
static double of_least(const cpu_index_scan *scan, const cpu_index_query *query, uint32_t h)
{
    double least = query->scale[h];
    for (uint32_t b = 1; b < kn_blocks(scan->dim, KN_FP4_BLOCK); b++) {
        double scale = query->scale[(uint64_t)b * scan->width + h];
        least = scale < least ? scale : least;
    }
    return query->narrow && h < scan->heads ? 0.25 * least : 1;
}

/* Block by block, as the contract says. */
static void score_wide(const cpu_index_scan *scan, const cpu_index_query *query, const key_tile *tile,
                       double score_out[KEYS])
{
    double dot[KEYS][CPU_INDEX_HEADS] = {0}, lane[KEYS][KN_LANES] = {0};
    for (uint32_t b = 0; b < kn_blocks(scan->dim, KN_FP4_BLOCK); b++) {
        for (uint32_t h = 0; h < scan->width; h += GROUP) {
            const double *scale = query->scale + (uint64_t)b * scan->width + h;
            __m256i sums[KEYS];
            block_sums(scan, query, tile, h, b, sums);
            for (uint32_t k = 0; k < KEYS; k++) {
                double of_key = kn_e8m0_decode(tile->scales[k][b]);
                int16_t sum[GROUP];
                memcpy(sum, &sums[k], sizeof(sum));
                for (uint32_t i = 0; i < GROUP; i++) {
                    dot[k][h + i] += 0.25 * sum[i] * (scale[i] * of_key);
                }
            }
        }
    }
    for (uint32_t k = 0; k < KEYS; k++) {
        for (uint32_t h = 0; h < scan->width; h++) {
            double positive = dot[k][h] > 0 ? dot[k][h] : 0;
            lane[k][h % KN_LANES] += positive * (query->weight[h] / of_least(scan, query, h));
        }
        score_out[k] = kn_fold_lanes(lane[k]);
    }
}

void KN_FN(kn_cpu_index_score)(const cpu_index_scan *scan, const uint8_t *const *keys, uint32_t n,
                               float *score, uint64_t stride)
{
    for (uint32_t at = 0; at < n; at += KEYS) {
        uint32_t n_key = n - at < KEYS ? n - at : KEYS;
        key_tile tile;
        tile.narrow = true;
        for (uint32_t k = 0; k < KEYS; k++) { /* past the last one it stands in */
            load_key(keys[at + (k < n_key ? k : n_key - 1)], scan->dim, &tile, k);
        }
        for (uint32_t i = 0; i < scan->n_row; i++) {
            double scores[KEYS];
            if (tile.narrow && scan->query[i].narrow) {
                score_narrow(scan, &scan->query[i], &tile, scores);
            } else {
                score_wide(scan, &scan->query[i], &tile, scores);
            }
            for (uint32_t k = 0; k < n_key; k++) {
                score[i * stride + at + k] = (float)scores[k];
            }
        }
    }
}
