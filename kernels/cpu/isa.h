/* For the files that are compiled once per instruction set: names with its suffix, and vectors of its width.
 */
#pragma once
#include <string.h>
#if defined(__FMA__)
#include <immintrin.h>
#endif

#include "kernels/cpu/cpu_private.h"

#define KN_JOIN_(name, isa) name##_##isa
#define KN_JOIN(name, isa)  KN_JOIN_(name, isa)
#define KN_FN(name)         KN_JOIN(name, KN_ISA)

#if defined(__AVX512F__)
#define KN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define KN_VECTOR_BYTES 32
#else
#define KN_VECTOR_BYTES 16
#endif

typedef double kn_vd __attribute__((vector_size(KN_VECTOR_BYTES)));
typedef int16_t kn_vs __attribute__((vector_size(KN_VECTOR_BYTES)));
enum {
    KN_VD_WIDTH = KN_VECTOR_BYTES / 8,
    KN_VS_WIDTH = KN_VECTOR_BYTES / 2,
    KN_LANE_VECTORS = KN_LANES / KN_VD_WIDTH,
};

static inline kn_vd kn_vd_load(const double *p)
{
    kn_vd v;
    memcpy(&v, p, sizeof(v));
    return v;
}

static inline void kn_vd_store(double *p, kn_vd v)
{
    memcpy(p, &v, sizeof(v));
}

/* a * b + c where a and b came from float32 or narrower: their product is exact in double, so fusing cannot
 * change the result. Never for other products. */
static inline kn_vd kn_vd_add_exact_product(kn_vd a, kn_vd b, kn_vd c)
{
#if defined(__AVX512F__)
    return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_pd(a, b, c);
#else
    return a * b + c;
#endif
}

/* Sum of the elements in no promised order: for sums that are exact. */
static inline double kn_vd_sum(kn_vd v)
{
#if defined(__AVX512F__)
    return _mm512_reduce_add_pd(v);
#elif defined(__AVX2__)
    __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return half[0] + half[1];
#else
    return v[0] + v[1];
#endif
}

#if defined(__AVX512F__)
/* The lanes of a mask as bits. Said to the compiler in so many words: gcc 12 may spill a mask that was
 * widened to 32 bits as 16, and read 32 back (seen where a count of lanes met the thread sanitizer). */
static inline uint32_t kn_lanes_of(__mmask16 mask)
{
    uint32_t lanes;
    __asm__("kmovw %1, %0" : "=r"(lanes) : "k"(mask));
    return lanes;
}
#endif

/* The contract's fold of KN_LANES partial sums. */
static inline double kn_fold_lanes(const double *lane)
{
    double sum[KN_LANES / 2];
    for (int l = 0; l < KN_LANES / 2; l++) {
        sum[l] = lane[l] + lane[l + KN_LANES / 2];
    }
    for (int s = KN_LANES / 4; s >= 1; s /= 2) {
        for (int l = 0; l < s; l++) {
            sum[l] += sum[l + s];
        }
    }
    return sum[0];
}

/* The last steps of that fold, those inside a vector. */
static inline double kn_vd_fold(kn_vd v)
{
#if defined(__AVX512F__)
    __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1));
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
#elif defined(__AVX2__)
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
#else
    kn_vd two = v;
#endif
    return two[0] + two[1];
}

/* Adds x[i] * w[i] into the lanes, i < n, n a multiple of KN_LANES; both widened from float32 or narrower. */
static inline void kn_lanes_add(double *lane, const double *x, const double *w, uint32_t n)
{
    kn_vd acc[KN_LANE_VECTORS];
    for (int v = 0; v < KN_LANE_VECTORS; v++) {
        acc[v] = kn_vd_load(lane + v * KN_VD_WIDTH);
    }
    for (uint32_t i = 0; i < n; i += KN_LANES) {
        for (int v = 0; v < KN_LANE_VECTORS; v++) {
            acc[v] = kn_vd_add_exact_product(kn_vd_load(x + i + v * KN_VD_WIDTH),
                                             kn_vd_load(w + i + v * KN_VD_WIDTH), acc[v]);
        }
    }
    for (int v = 0; v < KN_LANE_VECTORS; v++) {
        kn_vd_store(lane + v * KN_VD_WIDTH, acc[v]);
    }
}

/* ---- quantized products (products_q8.c, avx2.c or vnni.c) ----
 * A tile: up to CPU_Q8_ROWS rows of E4M3 codes, loaded once into the form the products read, then multiplied
 * with any number of matrices of one n_in and dtype. */
#if defined(__AVX2__)
enum { CPU_Q8_ROWS = CPU_ROWS };
#else
enum { CPU_Q8_ROWS = CPU_TILE };
#endif

typedef struct cpu_q8_tile {
    void *x; /* scratch: CPU_X_BYTES for each input, rounded up to CPU_CHUNK */
    uint32_t n;
    const uint8_t *codes[CPU_Q8_ROWS], *scales[CPU_Q8_ROWS];
    uint16_t *y[CPU_Q8_ROWS]; /* bf16 output rows; the product's, so they may change in between */
} cpu_q8_tile;

/* Reads the codes of k inputs for weights of dtype w. */
void KN_FN(kn_cpu_q8_load)(kn_team *team, const cpu_q8_tile *tile, uint32_t k, kn_dtype w);
/* Outputs w->n_out of the tile, split over the team. */
void KN_FN(kn_cpu_q8_product)(kn_team *team, const cpu_q8_tile *tile, const kn_matrix *w);

/* ---- lane products (products.c) ----
 * A tile: up to CPU_TILE rows of inputs widened to double, rows `stride` apart, zero past n_in up to a
 * multiple of CPU_CHUNK. */
typedef struct cpu_tile {
    const double *x;
    uint64_t stride;
    uint32_t n;
    uint16_t *y[CPU_TILE]; /* bf16 output rows, or */
    float *y32[CPU_TILE];  /* float32 output rows (y NULL), or */
    double *y64[CPU_TILE]; /* the sums themselves (both NULL) */
} cpu_tile;

void KN_FN(kn_cpu_widen_bf16)(const uint16_t *x, uint32_t k, double *x_out);
/* Outputs out0 .. out0 + n_out - 1 by lane sums; w BF16, F32, or E4M3 taken as bf16(code * scale). Output o
 * is written at y[..][o - out0]. */
void KN_FN(kn_cpu_product_lanes)(kn_team *team, const cpu_tile *tile, const kn_matrix *w, uint32_t out0,
                                 uint32_t n_out);

/* The same for BF16 and F32 with registers of 256 bits (products_lanes256.c). */
void KN_FN(kn_cpu_product_lanes256)(kn_team *team, const cpu_tile *tile, const kn_matrix *w, uint32_t out0,
                                    uint32_t n_out);
/* With registers of 512 bits (products_lanes512.c): one tile, or several of CPU_LANE_ROWS that share one
 * reading of the weights; the last may be of fewer rows, but memory for CPU_LANE_ROWS is there. */
void KN_FN(kn_cpu_product_lanes512)(kn_team *team, const cpu_tile *tiles, uint32_t n_tile, const kn_matrix *w,
                                    uint32_t out0, uint32_t n_out);

/* Those for many tiles (products_many512.c). */
void KN_FN(kn_cpu_product_many512)(kn_team *team, const cpu_tile *tiles, uint32_t n_tile, const kn_matrix *w,
                                   uint32_t out0, uint32_t n_out);

/* How many tiles are worth filling before a product, and the rows of each where there are several: as many as
 * meet several outputs in registers. */
#if defined(__AVX512F__)
enum { CPU_LANE_ROWS = 4, CPU_LANE_TILES = CPU_ROWS / CPU_LANE_ROWS };
#else
enum { CPU_LANE_ROWS = CPU_TILE, CPU_LANE_TILES = 1 };
#endif

/* ---- products with scaled weights (products_q8.c, avx2_bf16.c or vnni_bf16.c) ----
 * Rows of BF16 inputs and where the outputs out0 .. out0 + n_out - 1 of each go. */
typedef struct cpu_rows {
    const uint16_t *x;
    uint16_t *y; /* of output out0 */
    uint64_t x_stride, y_stride;
    uint32_t n, out0, n_out;
} cpu_rows;

/* Lane sums with w E4M3 taken as bf16(code * scale). scratch: as that of cpu_q8_tile. */
void KN_FN(kn_cpu_scaled_product)(kn_team *team, void *scratch, const cpu_rows *rows, const kn_matrix *w);

/* ---- rows (rows.c) ---- */
void KN_FN(kn_cpu_quant_fp8)(const uint16_t *x, uint32_t k, uint32_t block, uint8_t *codes_out,
                             uint8_t *scales_out);
void KN_FN(kn_cpu_rmsnorm)(const uint16_t *x, const uint16_t *w, uint32_t d, float eps, uint16_t *y_out);
/* Rotates 2 * half values in place; cs [half][2]. */
void KN_FN(kn_cpu_rotate)(uint16_t *x, uint32_t half, const float *cs, bool inverse);
void KN_FN(kn_cpu_angles)(const float *inv_freq, uint32_t half, uint32_t pos, float *cs_out);
void KN_FN(kn_cpu_kv_pack)(const uint16_t *x, uint32_t dim, uint32_t rope, uint8_t *row_out);
void KN_FN(kn_cpu_kv_unpack)(const uint8_t *row, uint32_t dim, uint32_t rope, double *x_out);
void KN_FN(kn_cpu_index_pack)(const uint16_t *x, uint32_t dim, uint8_t *row_out);

/* ---- hyper-connections (mixes.c) ----
 * kn_hc_coefficients of KN_VD_WIDTH rows: mixes, pre [rows]; post [rows][hc]; comb [rows][hc][hc]. */
typedef double kn_hc_mixes[(2 + KN_HC_MAX) * KN_HC_MAX];
void KN_FN(kn_cpu_hc_coefficients)(const kn_hc *p, const kn_hc_mixes *mixes, float (*pre_out)[KN_HC_MAX],
                                   float *post_out, float *comb_out);

/* Operations that have files of their own: attend.c, compress.c, index.c. */
void KN_FN(kn_cpu_attention)(kn_stream *s, const kn_batch *b, const kn_attn *a, kn_ptr q, kn_ptr chunk_rows,
                             kn_ptr picks, kn_ptr o_out);
void KN_FN(kn_cpu_compress)(kn_stream *s, const kn_batch *b, const kn_compress *c, kn_ptr kv, kn_ptr score);
void KN_FN(kn_cpu_compress_commit)(kn_stream *s, const kn_batch *b, const kn_compress *c, kn_ptr kv,
                                   kn_ptr score);
void KN_FN(kn_cpu_index_topk)(kn_stream *s, const kn_batch *b, const kn_kv_layout *layout, uint32_t heads,
                              uint32_t dim, uint32_t topk, kn_ptr iq, kn_ptr w, kn_ptr picks_out);

extern const kn_dense_ops KN_FN(kn_cpu_dense);
extern const kn_attn_ops KN_FN(kn_cpu_attn);
extern const kn_moe_ops KN_FN(kn_cpu_moe);
extern const cpu_prepare_ops KN_FN(kn_cpu_prepare);
