#include "kernels/cpu/avx2.h"

#include "common/base/assert.h"

/* ---- columns ---- */

/* v[i] dword j to v[j] dword i. */
static inline void transpose(__m256i v[8])
{
    __m256i a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) { /* a: of two rows, dwords 0 1 and 2 3 of each half, taken in turn */
        a[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) { /* b[i + j]: of four rows, dword j of each half */
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        v[j] = _mm256_permute2x128_si256(b[j], b[4 + j], 0x20);
        v[4 + j] = _mm256_permute2x128_si256(b[j], b[4 + j], 0x31);
    }
}

void KN_FN(kn_avx2_columns)(const avx2_rows *rows, uint32_t at, uint32_t n_bytes, __m256i (*columns_out)[2])
{
    for (int h = 0; h < 2; h++) {
        __m256i v[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            v[i] = avx2_load_row(rows->row[AVX2_HALF * h + i], at, n_bytes);
        }
        transpose(v);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            columns_out[i][h] = v[i];
        }
    }
}

/* ---- NaN ---- */

static uint32_t nans_of(const uint8_t *codes, uint32_t at, uint32_t k)
{
    const __m256i magnitude = _mm256_set1_epi8(127);
    __m256i v = avx2_load_row(codes, at, k);
    return (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_and_si256(v, magnitude), magnitude));
}

static uint16_t poison_of(const uint8_t *codes, const uint8_t *scales, uint32_t k)
{
    for (uint32_t at = 0; at < k; at += 32) {
        uint32_t nan = nans_of(codes, at, k);
        if (nan != 0) {
            return (uint16_t)(AVX2_NAN_CODE | (codes[at + (uint32_t)__builtin_ctz(nan)] & 0x80) << 8);
        }
        if (scales[at / KN_ACT_BLOCK] == 255 && (at % KN_ACT_BLOCK == KN_ACT_BLOCK - 32 || k - at <= 32)) {
            return AVX2_NAN_SCALE;
        }
    }
    return 0;
}

typedef struct poison_job {
    const cpu_q8_tile *tile;
    uint32_t k;
} poison_job;

static void poison_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const poison_job *j = arg;
    (void)i_thread;
    for (uint32_t r = begin; r < end; r++) {
        avx2_poison(j->tile)[r] = poison_of(j->tile->codes[r], j->tile->scales[r], j->k);
    }
}

/* ---- the path's products ---- */

void KN_FN(kn_avx2_put)(const cpu_q8_tile *t, const kn_matrix *w, uint32_t o, uint32_t r, const double *sums,
                        const uint16_t nan[AVX2_OUTS])
{
    uint32_t n_out = w->n_out - o < AVX2_OUTS ? w->n_out - o : AVX2_OUTS;
    uint16_t poison = avx2_poison(t)[r], y[AVX2_OUTS];
    for (uint32_t i = 0; i < AVX2_OUTS; i++) {
        y[i] = kn_bf16_from_f64(sums[i]);
    }
    for (uint32_t i = 0; i < AVX2_OUTS; i++) {
        uint16_t instead = poison != 0 ? poison : nan[i];
        y[i] = instead != 0 ? instead : y[i];
    }
    memcpy(t->y[r] + o, y, n_out * sizeof(*y));
}

void KN_FN(kn_cpu_q8_load)(kn_team *team, const cpu_q8_tile *tile, uint32_t k, kn_dtype w)
{
    poison_job job = {.tile = tile, .k = k};
    kn_team_run(team, tile->n, k / 8, poison_part, &job);
    if (w == KN_E2M1) {
        KN_FN(kn_avx2_fp4_load)(team, tile, k);
    } else {
        KN_FN(kn_avx2_fp8_load)(team, tile, k);
    }
}

typedef struct product_job {
    const cpu_q8_tile *tile;
    const kn_matrix *w;
} product_job;

static void product_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const product_job *j = arg;
    (void)i_thread;
    if (j->w->dtype == KN_E2M1) {
        KN_FN(kn_avx2_fp4_part)(j->tile, j->w, begin, end);
    } else {
        KN_FN(kn_avx2_fp8_part)(j->tile, j->w, begin, end);
    }
}

void KN_FN(kn_cpu_q8_product)(kn_team *team, const cpu_q8_tile *tile, const kn_matrix *w)
{
    product_job job = {.tile = tile, .w = w};
    CM_ASSERT(w->dtype == KN_E4M3 || (w->dtype == KN_E2M1 && w->n_in % 2 == 0));
    kn_team_run(team, kn_blocks(w->n_out, AVX2_OUTS), (uint64_t)AVX2_OUTS * w->n_in * tile->n, product_part,
                &job);
}

/* ---- preparing ---- */

static uint64_t prepared_bytes(const kn_matrix *w)
{
    return w->dtype == KN_E2M1   ? KN_FN(kn_avx2_fp4_bytes)(w)
           : w->dtype == KN_E4M3 ? KN_FN(kn_avx2_fp8_bytes)(w)
                                 : 0;
}

static void prepare(const kn_matrix *w, void *out)
{
    if (w->dtype == KN_E2M1) {
        KN_FN(kn_avx2_fp4_prepare)(w, out);
    } else {
        KN_FN(kn_avx2_fp8_prepare)(w, out);
    }
}

const cpu_prepare_ops KN_FN(kn_cpu_prepare) = {.bytes = prepared_bytes, .prepare = prepare};
