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

typedef struct key {
    _Alignas(64) uint8_t codes[KN_DIM_MAX]; /* unsigned, in the order of quads */
    const uint8_t *scales;                  /* stored */
    double scale;                           /* of all codes, where narrow */
    bool narrow;                            /* one scale for all; if not, codes are not shifted */
} key;

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

INLINED void load_key_of(uint32_t dim, const uint8_t *stored, key *k)
{
    uint8_t least;
    k->scales = stored + dim / 2;
    k->narrow = is_narrow(k->scales, kn_blocks(dim, KN_FP4_BLOCK), &least);
    k->scale = kn_e8m0_decode(least);
    decode(stored, dim, KEY_CODES, k->narrow, least, k->codes);
}

static void load_key(const cpu_index_scan *scan, const uint8_t *stored, key *k)
{
    if (scan->dim == PART) { /* the same with its loops unrolled */
        load_key_of(PART, stored, k);
    } else {
        load_key_of(scan->dim, stored, k);
    }
}

/* The fold of a key's lanes: lanes 0 to 7 in low, 8 to 15 in high. */
static inline double fold(__m512d low, __m512d high)
{
    return kn_vd_fold(_mm512_add_pd(low, high));
}

/* Adds max(dot, 0) * weight of 16 heads to their lanes; the products are exact. */
static inline void add_heads(__m512i dot, const double *weight, __m512d *low, __m512d *high)
{
    dot = _mm512_max_epi32(dot, _mm512_setzero_si512());
    *low = _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(dot)), _mm512_loadu_pd(weight), *low);
    *high = _mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(dot, 1)),
                            _mm512_loadu_pd(weight + 8), *high);
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
    memcpy(&quad, keys[k].codes + 4 * t, sizeof(quad));                                                      \
    x = _mm512_set1_epi32(quad);                                                                             \
    add_quads(&a##k, x, q[0]);                                                                               \
    add_quads(&b##k, x, q[1]);                                                                               \
    add_quads(&c##k, x, q[2]);                                                                               \
    add_quads(&d##k, x, q[3]);
#define STORE(k)                                                                                             \
    dot_out[k][0] = a##k;                                                                                    \
    dot_out[k][1] = b##k;                                                                                    \
    dot_out[k][2] = c##k;                                                                                    \
    dot_out[k][3] = d##k;
static_assert(KEYS == 6 && GROUPS == 4, "as the names above");

/* Dot products of KEYS keys with CPU_INDEX_PAD heads from head h on. */
APART void dot_tile(const cpu_index_query *query, uint32_t h, uint32_t width, uint32_t n_quad,
                    const key *keys, __m512i dot_out[KEYS][GROUPS])
{
    const __m512i *start = (const __m512i *)(query->start + h);
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

/* Score of a narrow key for a narrow query from its dot products. */
INLINED float score_of(const cpu_index_query *query, const __m512i *dot, uint32_t width, double scale)
{
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    for (uint32_t h = 0; h < width; h += CPU_INDEX_PAD, dot += KEYS * GROUPS) {
        for (uint32_t g = 0; g < GROUPS; g++) {
            add_heads(dot[g], query->weight + h + 16 * g, &low, &high);
        }
    }
    return (float)(fold(low, high) * scale);
}

static void score_tile(const cpu_index_scan *scan, const cpu_index_query *query, const key *keys,
                       float score_out[KEYS])
{
    __m512i dot[CPU_INDEX_HEADS / CPU_INDEX_PAD][KEYS][GROUPS];
    for (uint32_t h = 0; h < scan->width; h += CPU_INDEX_PAD) {
        dot_tile(query, h, scan->width, quads_of(scan->dim), keys, dot[h / CPU_INDEX_PAD]);
    }
    for (int k = 0; k < KEYS; k++) {
        score_out[k] = scan->width == CPU_INDEX_PAD ? score_of(query, dot[0][k], CPU_INDEX_PAD, keys[k].scale)
                                                    : score_of(query, dot[0][k], scan->width, keys[k].scale);
    }
}

/* Sum of a block's products for 16 heads: quads t0 and t0 + 16 on, the offset taken back. */
static __m512i block_sum(const int32_t *codes, uint32_t width, const key *k, uint32_t t0)
{
    const __m512i offset = _mm512_set1_epi8(OFFSET);
    __m512i sum = _mm512_setzero_si512(), over = _mm512_setzero_si512();
    for (uint32_t i = 0; i < 2 * BLOCK_QUADS; i++) {
        uint32_t t = t0 + i % BLOCK_QUADS + i / BLOCK_QUADS * (PART_QUADS / 2);
        __m512i q = _mm512_loadu_si512(codes + (uint64_t)t * width);
        int32_t quad;
        memcpy(&quad, k->codes + 4 * t, sizeof(quad));
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

/* Score of any key for any query, block by block. */
static float score_wide(const cpu_index_scan *scan, const cpu_index_query *query, const key *k)
{
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    for (uint32_t h = 0; h < scan->width; h += 16) {
        __m512d dot_low = _mm512_setzero_pd(), dot_high = _mm512_setzero_pd();
        for (uint32_t b = 0; b < kn_blocks(scan->dim, KN_FP4_BLOCK); b++) {
            uint32_t t0 = b / PART_BLOCKS * PART_QUADS + b % PART_BLOCKS * BLOCK_QUADS;
            __m512d by = _mm512_set1_pd(k->narrow ? k->scale : (double)kn_e8m0_decode(k->scales[b]));
            __m512i sum = block_sum((const int32_t *)query->codes + h, scan->width, k, t0);
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
    return (float)fold(low, high);
}

void KN_FN(kn_cpu_index_score)(const cpu_index_scan *scan, const uint8_t *const *stored, uint32_t n,
                               float *score, uint64_t stride)
{
    key keys[KEYS];
    for (uint32_t k0 = 0; k0 < n; k0 += KEYS) {
        uint32_t len = n - k0 < KEYS ? n - k0 : KEYS;
        for (uint32_t k = 0; k < KEYS; k++) { /* a short tile is filled up with its last key */
            load_key(scan, stored[k0 + (k < len ? k : len - 1)], &keys[k]);
        }
        for (uint32_t i = 0; i < scan->n_row; i++) {
            const cpu_index_query *query = &scan->query[i];
            float tile[KEYS];
            score_tile(scan, query, keys, tile);
            for (uint32_t k = 0; k < len; k++) {
                bool narrow = keys[k].narrow && query->narrow;
                score[i * stride + k0 + k] = narrow ? tile[k] : score_wide(scan, query, &keys[k]);
            }
        }
    }
}
