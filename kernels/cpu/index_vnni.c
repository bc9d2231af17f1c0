/* Scores of indexer keys by VNNI: heads in the lanes of a register, so that a dot product stands in its lane
 * of the contract's sum over heads, and four dims of a key are broadcast to all of them.
 *
 * A doubled E2M1 code is at most 12 and scales are powers of two. As long as the scales of a key, or of a
 * query head, differ by 2^SHIFT_MAX at most, each code is shifted by its scale's distance from the smallest
 * and still fits a byte: the whole dot product is one exact integer below 2^25, its product with a weight of
 * 24 bits exact in double. The smallest scale of a head goes into its weight and that of a key into the
 * total: powers of two, they change no rounding. Keys are unsigned by an OFFSET that the sums start with the
 * opposite of. A key or a query whose scales differ by more is summed block by block.
 *
 * Bound: 64 multiplications an instruction, 128 instructions for a key and 64 heads of 128 dims. */
#include <assert.h>

#include "kernels/cpu/chunk.h"
#include "kernels/cpu/index.h"

enum {
    SHIFT_MAX = 3,
    OFFSET = 12 << SHIFT_MAX,
    PART = 128, /* dims of a register of stored codes: 16 quads of even dims, then 16 of odd ones */
    PART_QUADS = PART / 4,
    PART_BLOCKS = PART / KN_FP4_BLOCK,
    BLOCK_QUADS = 4,             /* of either kind in a block */
    GROUPS = CPU_INDEX_PAD / 16, /* registers of heads */
    KEYS = 6,                    /* whose sums stand in registers at a time */
};

/* 2 * value of a code, shifted, plus an offset. */
#define LUT(s, o)                                                                                            \
    {                                                                                                        \
        (o), (1 << (s)) + (o), (2 << (s)) + (o), (3 << (s)) + (o), (4 << (s)) + (o), (6 << (s)) + (o),       \
            (8 << (s)) + (o), (12 << (s)) + (o), (o), (o) - (1 << (s)), (o) - (2 << (s)), (o) - (3 << (s)),  \
            (o) - (4 << (s)), (o) - (6 << (s)), (o) - (8 << (s)), (o) - (12 << (s))                          \
    }
static const int8_t QUERY_CODES[SHIFT_MAX + 1][16] = {LUT(0, 0), LUT(1, 0), LUT(2, 0), LUT(3, 0)};
static const uint8_t KEY_CODES[SHIFT_MAX + 1][16] = {LUT(0, OFFSET), LUT(1, OFFSET), LUT(2, OFFSET),
                                                     LUT(3, OFFSET)};

/* KEYS keys as they meet the queries. Those whose scales differ too much are wide: not shifted. */
typedef struct key_tile {
    _Alignas(64) uint8_t codes[KEYS][KN_DIM_MAX]; /* unsigned, in the order of quads */
    double scale[8];                              /* of all codes of a narrow key */
    const uint8_t *scales[KEYS];                  /* stored */
    uint32_t wide;                                /* bit k: key k is */
} key_tile;

/* ---- stored rows ---- */

/* Whether the n scales differ by 2^SHIFT_MAX at most, and the smallest. */
INLINED bool is_narrow(const uint8_t *scales, uint32_t n, uint8_t *least_out)
{
    uint8_t least = 255, most = 0;
    for (uint32_t b = 0; b < n; b++) {
        least = scales[b] < least ? scales[b] : least;
        most = scales[b] > most ? scales[b] : most;
    }
    *least_out = least;
    return most - least <= SHIFT_MAX && most != 255;
}

/* Bytes by `lut` of all codes, each block's shifted by its scale over `least`, or none where !narrow. Dims
 * beyond the last have the byte of code 0. */
INLINED void decode(const uint8_t *stored, uint32_t dim, const void *lut, bool narrow, uint8_t least,
                    void *out)
{
    const uint8_t *scales = stored + dim / 2;
    const __m512i low4 = _mm512_set1_epi8(15);
    for (uint32_t at = 0; at < dim; at += PART) {
        uint32_t len = dim - at < PART ? dim - at : PART;
        __m512i x = _mm512_maskz_loadu_epi8(~0ull >> (64 - len / 2), stored + at / 2), codes;
        uint32_t shift[PART_BLOCKS] = {0};
        for (uint32_t b = 0; narrow && b < kn_blocks(len, KN_FP4_BLOCK); b++) {
            shift[b] = scales[at / KN_FP4_BLOCK + b] - least;
        }
        codes = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)lut + shift[0]));
        codes = _mm512_inserti64x2(codes, _mm_loadu_si128((const __m128i *)lut + shift[1]), 1);
        codes = _mm512_inserti64x2(codes, _mm_loadu_si128((const __m128i *)lut + shift[2]), 2);
        codes = _mm512_inserti64x2(codes, _mm_loadu_si128((const __m128i *)lut + shift[3]), 3);
        _mm512_storeu_si512((uint8_t *)out + at, _mm512_shuffle_epi8(codes, _mm512_and_si512(x, low4)));
        x = _mm512_and_si512(_mm512_srli_epi16(x, 4), low4);
        _mm512_storeu_si512((uint8_t *)out + at + PART / 2, _mm512_shuffle_epi8(codes, x));
    }
}

static uint32_t quads_of(uint32_t dim)
{
    return kn_blocks(dim, PART) * PART_QUADS;
}

/* ---- queries ---- */

/* Codes, start and scales of head h. In a narrow query all scales are 1: the head's is in its weight. */
static void load_head(const cpu_index_scan *scan, const uint8_t *row, uint32_t h, cpu_index_query *query)
{
    int32_t quads[KN_DIM_MAX / 4], *codes = query->codes, sum = 0;
    uint32_t n_block = kn_blocks(scan->dim, KN_FP4_BLOCK), n_quad = quads_of(scan->dim);
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sums = _mm512_setzero_si512();
    uint8_t least;
    is_narrow(row + scan->dim / 2, n_block, &least);
    decode(row, scan->dim, QUERY_CODES, query->narrow, least, quads);
    for (uint32_t t = 0; t < n_quad; t += 16) {
        sums = _mm512_dpbusd_epi32(sums, ones, _mm512_loadu_si512(quads + t));
    }
    sum = _mm512_reduce_add_epi32(sums);
    for (uint32_t t = 0; t < n_quad; t++) {
        codes[(uint64_t)t * scan->width + h] = quads[t];
    }
    query->start[h] = -OFFSET * sum;
    for (uint32_t b = 0; b < n_block; b++) {
        query->scale[(uint64_t)b * scan->width + h] =
            query->narrow ? 1 : kn_e8m0_decode(row[scan->dim / 2 + b]);
    }
    query->weight[h] *= query->narrow ? kn_e8m0_decode(least) : 1.0f;
}

void KN_FN(kn_cpu_index_load)(const cpu_index_scan *scan, const uint8_t *rows, const uint16_t *w,
                              cpu_index_query *query)
{
    uint32_t n_block = kn_blocks(scan->dim, KN_FP4_BLOCK), row_bytes = kn_index_row_bytes(scan->dim);
    uint8_t least;
    query->narrow = true;
    for (uint32_t h = 0; h < scan->heads; h++) {
        query->narrow &= is_narrow(rows + (uint64_t)h * row_bytes + scan->dim / 2, n_block, &least);
    }
    if (scan->heads < scan->width) {
        memset(query->codes, 0, (uint64_t)quads_of(scan->dim) * scan->width * 4);
        memset(query->scale, 0, (uint64_t)n_block * scan->width * sizeof(double));
        memset(query->weight, 0, sizeof(query->weight));
        memset(query->start, 0, sizeof(query->start));
    }
    for (uint32_t h = 0; h < scan->heads; h++) {
        /* Codes of both sides are doubled. */
        query->weight[h] = 0.25 * (double)(kn_bf16_decode(w[h]) * scan->factor);
        load_head(scan, rows + (uint64_t)h * row_bytes, h, query);
    }
}

/* ---- keys ---- */

INLINED void load_keys_of(uint32_t dim, const uint8_t *const *stored, uint32_t n, key_tile *tile)
{
    tile->wide = 0;
    for (uint32_t k = 0; k < KEYS; k++) {
        const uint8_t *row = stored[k < n ? k : n - 1], *scales = row + dim / 2; /* fills a short tile up */
        uint8_t least;
        bool narrow = is_narrow(scales, kn_blocks(dim, KN_FP4_BLOCK), &least);
        tile->wide |= (uint32_t)!narrow << k;
        tile->scale[k] = kn_e8m0_decode(least);
        tile->scales[k] = scales;
        decode(row, dim, KEY_CODES, narrow, least, tile->codes[k]);
    }
}

static void load_keys(const cpu_index_scan *scan, const uint8_t *const *stored, uint32_t n, key_tile *tile)
{
    if (scan->dim == PART) { /* the same with its loops unrolled */
        load_keys_of(PART, stored, n, tile);
    } else {
        load_keys_of(scan->dim, stored, n, tile);
    }
}

/* Adds dot * weight of 16 heads to their lanes; the products are exact. */
static inline void add_heads(const __m512i *dot, const double *weight, __m512d *low, __m512d *high)
{
    const __m256i *half = (const __m256i *)dot;
    *low = _mm512_fmadd_pd(_mm512_cvtepi32_pd(half[0]), _mm512_loadu_pd(weight), *low);
    *high = _mm512_fmadd_pd(_mm512_cvtepi32_pd(half[1]), _mm512_loadu_pd(weight + 8), *high);
}

/* sum += x . y, four products a lane. As an instruction, because GCC 12 copies and stores the sums around
 * its own name for it. */
INLINED void add_quads(__m512i *sum, __m512i x_unsigned, __m512i y)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(x_unsigned), "v"(y));
}

/* A name for each sum: as an array they would not stay in registers. */
#define SIX(op)  op(0) op(1) op(2) op(3) op(4) op(5)
#define START(k) __m512i a##k = start[0], b##k = start[1], c##k = start[2], d##k = start[3];
#define ADD(k)                                                                                               \
    memcpy(&quad, tile->codes[k] + 4 * t, sizeof(quad));                                                     \
    x = _mm512_set1_epi32(quad);                                                                             \
    add_quads(&a##k, x, q[0]);                                                                               \
    add_quads(&b##k, x, q[1]);                                                                               \
    add_quads(&c##k, x, q[2]);                                                                               \
    add_quads(&d##k, x, q[3]);
#define STORE(k)                                                                                             \
    dot_out[k][0] = _mm512_max_epi32(a##k, zero);                                                            \
    dot_out[k][1] = _mm512_max_epi32(b##k, zero);                                                            \
    dot_out[k][2] = _mm512_max_epi32(c##k, zero);                                                            \
    dot_out[k][3] = _mm512_max_epi32(d##k, zero);
static_assert(KEYS == 6 && GROUPS == 4, "as the names above");

/* max(dot product, 0) of KEYS keys with CPU_INDEX_PAD heads from head h on. */
APART void dot_tile(const cpu_index_query *query, uint32_t h, uint32_t width, uint32_t n_quad,
                    const key_tile *tile, __m512i dot_out[KEYS][GROUPS])
{
    const __m512i zero = _mm512_setzero_si512(), *start = (const __m512i *)(query->start + h);
    const int32_t *codes = (const int32_t *)query->codes + h;
    SIX(START)
    for (uint32_t t = 0; t < n_quad; t++, codes += width) {
        const __m512i *q = (const __m512i *)codes;
        __m512i x;
        int32_t quad;
        SIX(ADD)
    }
    SIX(STORE)
}

/* The contract's fold of the lanes of KEYS keys, lanes l and l + 8 added already: total k in element k. */
static inline __m512d fold_keys(const __m512d s[KEYS])
{
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 0, 0);
    __m512d four[3], two[2];
    for (int i = 0; i < 3; i++) {
        __m512d x = s[2 * i], y = s[2 * i + 1];
        four[i] = _mm512_add_pd(_mm512_shuffle_f64x2(x, y, 0x44), _mm512_shuffle_f64x2(x, y, 0xee));
    }
    for (int i = 0; i < 2; i++) {
        __m512d x = four[2 * i], y = four[1 + i];
        two[i] = _mm512_add_pd(_mm512_shuffle_f64x2(x, y, 0x88), _mm512_shuffle_f64x2(x, y, 0xdd));
    }
    /* two[0] has keys 0 to 3, two[1] has key 4, 5, 4, 5 */
    return _mm512_permutexvar_pd(
        order, _mm512_add_pd(_mm512_unpacklo_pd(two[0], two[1]), _mm512_unpackhi_pd(two[0], two[1])));
}

/* Lanes of the sums over `width` heads: lanes l and l + 8 together. */
INLINED void sum_heads(const cpu_index_query *query, const __m512i (*dot)[KEYS][GROUPS], uint32_t width,
                       __m512d sum_out[KEYS])
{
#define SUM(k)                                                                                               \
    low = high = _mm512_setzero_pd();                                                                        \
    for (uint32_t h = 0; h < width; h += CPU_INDEX_PAD) {                                                    \
        for (uint32_t g = 0; g < GROUPS; g++) {                                                              \
            add_heads(&dot[h / CPU_INDEX_PAD][k][g], query->weight + h + 16 * g, &low, &high);               \
        }                                                                                                    \
    }                                                                                                        \
    sum_out[k] = _mm512_add_pd(low, high);
    __m512d low, high;
    SIX(SUM)
}

/* Scores of narrow keys for a narrow query, the first n of them. */
static void score_tile(const cpu_index_scan *scan, const cpu_index_query *query, const key_tile *tile,
                       uint32_t n, float *score_out)
{
    __m512i dot[CPU_INDEX_HEADS / CPU_INDEX_PAD][KEYS][GROUPS];
    __m512d sum[KEYS];
    for (uint32_t h = 0; h < scan->width; h += CPU_INDEX_PAD) {
        dot_tile(query, h, scan->width, quads_of(scan->dim), tile, dot[h / CPU_INDEX_PAD]);
    }
    if (scan->width == CPU_INDEX_PAD) { /* the same with its loops unrolled */
        sum_heads(query, dot, CPU_INDEX_PAD, sum);
    } else {
        sum_heads(query, dot, scan->width, sum);
    }
    _mm256_mask_storeu_ps(score_out, (__mmask8)((1u << n) - 1),
                          _mm512_cvtpd_ps(_mm512_mul_pd(fold_keys(sum), _mm512_load_pd(tile->scale))));
}

/* Sum of a block's products for 16 heads: quads t0 and t0 + 16 on, the offset taken back. */
static __m512i block_sum(const int32_t *codes, uint32_t width, const uint8_t *key, uint32_t t0)
{
    const __m512i offset = _mm512_set1_epi8(OFFSET);
    __m512i sum = _mm512_setzero_si512(), over = _mm512_setzero_si512();
    for (uint32_t i = 0; i < 2 * BLOCK_QUADS; i++) {
        uint32_t t = t0 + i % BLOCK_QUADS + i / BLOCK_QUADS * (PART_QUADS / 2);
        __m512i q = _mm512_loadu_si512(codes + (uint64_t)t * width);
        int32_t quad;
        memcpy(&quad, key + 4 * t, sizeof(quad));
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(quad), q);
        over = _mm512_dpbusd_epi32(over, offset, q);
    }
    return _mm512_sub_epi32(sum, over);
}

/* Adds the dot products of eight heads, rounded, to their lanes. */
static inline __m512d add_wide(__m512d dot, const double *weight, __m512d lane)
{
    dot = _mm512_max_pd(dot, _mm512_setzero_pd()); /* the second where dot is NaN */
    return _mm512_add_pd(lane, _mm512_mul_pd(dot, _mm512_loadu_pd(weight)));
}

/* Score of key k for any query, block by block. */
static float score_wide(const cpu_index_scan *scan, const cpu_index_query *query, const key_tile *tile,
                        uint32_t k)
{
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    bool narrow = (tile->wide >> k & 1) == 0;
    for (uint32_t h = 0; h < scan->width; h += 16) {
        __m512d dot_low = _mm512_setzero_pd(), dot_high = _mm512_setzero_pd();
        for (uint32_t b = 0; b < kn_blocks(scan->dim, KN_FP4_BLOCK); b++) {
            uint32_t t0 = b / PART_BLOCKS * PART_QUADS + b % PART_BLOCKS * BLOCK_QUADS;
            __m512d by = _mm512_set1_pd(narrow ? tile->scale[k] : (double)kn_e8m0_decode(tile->scales[k][b]));
            __m512i sum = block_sum((const int32_t *)query->codes + h, scan->width, tile->codes[k], t0);
            const double *scale = query->scale + (uint64_t)b * scan->width + h;
            __m512d x = _mm512_cvtepi32_pd(_mm512_castsi512_si256(sum));
            __m512d y = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(sum, 1));
            x = _mm512_mul_pd(x, _mm512_mul_pd(_mm512_loadu_pd(scale), by));
            y = _mm512_mul_pd(y, _mm512_mul_pd(_mm512_loadu_pd(scale + 8), by));
            dot_low = _mm512_add_pd(dot_low, x);
            dot_high = _mm512_add_pd(dot_high, y);
        }
        low = add_wide(dot_low, query->weight + h, low);
        high = add_wide(dot_high, query->weight + h + 8, high);
    }
    return (float)kn_vd_fold(_mm512_add_pd(low, high));
}

void KN_FN(kn_cpu_index_score)(const cpu_index_scan *scan, const uint8_t *const *stored, uint32_t n,
                               float *score, uint64_t stride)
{
    key_tile tile;
    for (uint32_t k0 = 0; k0 < n; k0 += KEYS) {
        uint32_t len = n - k0 < KEYS ? n - k0 : KEYS;
        load_keys(scan, stored + k0, len, &tile);
        for (uint32_t i = 0; i < scan->n_row; i++) {
            const cpu_index_query *query = &scan->query[i];
            uint32_t wide = query->narrow ? tile.wide : ~0u;
            score_tile(scan, query, &tile, len, score + i * stride + k0);
            for (uint32_t k = 0; wide != 0 && k < len; k++) {
                if (wide >> k & 1) {
                    score[i * stride + k0 + k] = score_wide(scan, query, &tile, k);
                }
            }
        }
    }
}
