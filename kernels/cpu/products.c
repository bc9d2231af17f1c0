/* Matrix products: weights are decoded from their stored form a chunk at a time and used for every row of a
 * tile. */
#include "common/base/assert.h"
#include "kernels/cpu/isa.h"

/* ---- decoding CPU_CHUNK values ----
 * Never inlined: one call per chunk is nothing, and what the compiler merges across it costs more. */
#define APART static __attribute__((noinline))

/* An E4M3 code moved to the bits of a half float is 2^-8 of its value; the hardware widens those, subnormals
 * too. */
#if defined(__AVX512F__)
APART void decode_e4m3(const uint8_t *codes, double *out)
{
    const __m256i magnitude = _mm256_set1_epi16(0x7f), nan = _mm256_set1_epi16(0x7e00);
    for (int i = 0; i < CPU_CHUNK; i += 16) {
        __m256i c = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(codes + i)));
        __m256i mag = _mm256_and_si256(c, magnitude);
        __m256i sign = _mm256_slli_epi16(_mm256_srli_epi16(c, 7), 15);
        __m256i half = _mm256_or_si256(_mm256_slli_epi16(mag, 7), sign);
        __m512 value;
        half = _mm256_or_si256(half, _mm256_and_si256(_mm256_cmpeq_epi16(mag, magnitude), nan));
        value = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
        _mm512_storeu_pd(out + i, _mm512_cvtps_pd(_mm512_castps512_ps256(value)));
        _mm512_storeu_pd(out + i + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(value, 1)));
    }
}
#elif defined(__F16C__)
APART void decode_e4m3(const uint8_t *codes, double *out)
{
    const __m128i magnitude = _mm_set1_epi16(0x7f), nan = _mm_set1_epi16(0x7e00);
    for (int i = 0; i < CPU_CHUNK; i += 8) {
        __m128i c = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)(codes + i)));
        __m128i mag = _mm_and_si128(c, magnitude);
        __m128i sign = _mm_slli_epi16(_mm_srli_epi16(c, 7), 15);
        __m128i half = _mm_or_si128(_mm_slli_epi16(mag, 7), sign);
        __m256 value;
        half = _mm_or_si128(half, _mm_and_si128(_mm_cmpeq_epi16(mag, magnitude), nan));
        value = _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
        _mm256_storeu_pd(out + i, _mm256_cvtps_pd(_mm256_castps256_ps128(value)));
        _mm256_storeu_pd(out + i + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1)));
    }
}
#else
APART void decode_e4m3(const uint8_t *codes, double *out)
{
    for (int i = 0; i < CPU_CHUNK; i++) {
        out[i] = kn_e4m3_decode(codes[i]);
    }
}
#endif

/* Doubled values; all low nibbles of the chunk first, then all high ones: block sums are exact, so any order
 * will do, and this one needs no interleaving. kn_cpu_widen_codes puts the inputs in the same order. */
APART void decode_e2m1(const uint8_t *pairs, double *out)
{
    int8_t value[CPU_CHUNK];
    for (int i = 0; i < CPU_CHUNK / 2; i++) {
        value[i] = kn_e2m1_doubled(pairs[i] & 15);
    }
    for (int i = 0; i < CPU_CHUNK / 2; i++) {
        value[CPU_CHUNK / 2 + i] = kn_e2m1_doubled(pairs[i] >> 4);
    }
    for (int i = 0; i < CPU_CHUNK; i++) {
        out[i] = value[i];
    }
}

APART void decode_bf16(const void *x, double *out)
{
    for (uint32_t i = 0; i < CPU_CHUNK; i++) {
        out[i] = kn_bf16_decode(kn_u16_at(x, i));
    }
}

APART void decode_f32(const void *x, double *out)
{
    for (uint32_t i = 0; i < CPU_CHUNK; i++) {
        out[i] = kn_f32_at(x, i);
    }
}

APART void decode_scaled_e4m3(const uint8_t *codes, float scale, double *out)
{
    for (int i = 0; i < CPU_CHUNK; i++) {
        out[i] = kn_bf16_decode(kn_bf16_encode(kn_e4m3_decode(codes[i]) * scale));
    }
}

/* Bytes of a chunk, from the matrix or, for a short last chunk, from a copy filled up with zeros. */
static const void *chunk_bytes(const void *row, uint32_t at_byte, uint32_t n_valid, uint32_t n_bytes,
                               uint8_t *spare)
{
    const uint8_t *from = (const uint8_t *)row + at_byte;
    if (n_valid == n_bytes) {
        return from;
    }
    memset(spare, 0, n_bytes);
    memcpy(spare, from, n_valid);
    return spare;
}

static uint32_t chunk_len(uint32_t k, uint32_t at)
{
    return k - at < CPU_CHUNK ? k - at : CPU_CHUNK;
}

/* ---- widening inputs ---- */

void KN_FN(kn_cpu_widen_codes)(const uint8_t *codes, uint32_t k, kn_dtype w, double *x_out)
{
    uint8_t spare[CPU_CHUNK], ordered[CPU_CHUNK];
    for (uint32_t at = 0; at < k; at += CPU_CHUNK) {
        const uint8_t *from = chunk_bytes(codes, at, chunk_len(k, at), CPU_CHUNK, spare);
        if (w == KN_E2M1) {
            for (int i = 0; i < CPU_CHUNK; i++) {
                ordered[i % 2 * (CPU_CHUNK / 2) + i / 2] = from[i];
            }
            from = ordered;
        }
        decode_e4m3(from, x_out + at);
    }
}

void KN_FN(kn_cpu_widen_bf16)(const uint16_t *x, uint32_t k, double *x_out)
{
    uint8_t spare[2 * CPU_CHUNK];
    for (uint32_t at = 0; at < k; at += CPU_CHUNK) {
        decode_bf16(chunk_bytes(x, 2 * at, 2 * chunk_len(k, at), 2 * CPU_CHUNK, spare), x_out + at);
    }
}

/* ---- quantized products ---- */

/* Exact sums of products: any order gives the same value. */
static inline double exact_dot_chunk(const double *x, const double *w)
{
    enum { N_ACC = 4 };
    kn_vd acc[N_ACC] = {0};
    for (int i = 0; i < CPU_CHUNK; i += N_ACC * KN_VD_WIDTH) {
        for (int v = 0; v < N_ACC; v++) {
            int at = i + v * KN_VD_WIDTH;
            acc[v] = kn_vd_add_exact_product(kn_vd_load(x + at), kn_vd_load(w + at), acc[v]);
        }
    }
    return kn_vd_sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

/* Block b of a chunk in the order of decode_e2m1. */
static inline double exact_dot_fp4_block(const double *x, const double *w, uint32_t b)
{
    kn_vd low = {0}, high = {0};
    x += b * KN_FP4_BLOCK / 2;
    w += b * KN_FP4_BLOCK / 2;
    for (int i = 0; i < KN_FP4_BLOCK / 2; i += KN_VD_WIDTH) {
        low = kn_vd_add_exact_product(kn_vd_load(x + i), kn_vd_load(w + i), low);
        high = kn_vd_add_exact_product(kn_vd_load(x + CPU_CHUNK / 2 + i), kn_vd_load(w + CPU_CHUNK / 2 + i),
                                       high);
    }
    return kn_vd_sum(low + high);
}

typedef struct product_job {
    const cpu_tile *tile;
    const kn_matrix *w;
    uint32_t out0;
} product_job;

/* With many rows the inputs come from a farther cache than the decoded weights, so they are read once for
 * CPU_OUTS outputs; with few the weights are the traffic, and one row of them after another is read fastest.
 * The order of every sum is the same. n_out is a constant in each copy of what follows. */
#define INLINED static inline __attribute__((always_inline))

static uint32_t outs_at_once(const cpu_tile *t, uint32_t n_left)
{
    return t->n < CPU_TILE / 2 || n_left < CPU_OUTS ? 1 : CPU_OUTS;
}

static inline double e4m3_scale(const kn_matrix *w, uint32_t o, uint32_t block)
{
    uint64_t at = (uint64_t)(o / KN_ACT_BLOCK) * kn_blocks(w->n_in, KN_ACT_BLOCK) + block;
    return w->scale_dtype == KN_F32 ? kn_f32_at(kn_host(w->scale), at)
                                    : kn_e8m0_decode(((const uint8_t *)kn_host(w->scale))[at]);
}

INLINED void dot_e4m3(const cpu_tile *t, const kn_matrix *w, uint32_t o, uint32_t n_out,
                      double acc[][CPU_TILE])
{
    const uint8_t *rows = (const uint8_t *)kn_host(w->data) + (uint64_t)o * w->n_in;
    uint8_t spare[CPU_CHUNK];
    double weight[CPU_OUTS][CPU_CHUNK], scale[CPU_OUTS];
    for (uint32_t at = 0, b = 0; at < w->n_in; at += CPU_CHUNK, b++) {
        for (uint32_t j = 0; j < n_out; j++) {
            scale[j] = e4m3_scale(w, o + j, b);
            decode_e4m3(
                chunk_bytes(rows + (uint64_t)j * w->n_in, at, chunk_len(w->n_in, at), CPU_CHUNK, spare),
                weight[j]);
        }
        for (uint32_t r = 0; r < t->n; r++) {
            double x_scale = kn_e8m0_decode(t->scales[r][b]);
            for (uint32_t j = 0; j < n_out; j++) {
                acc[j][r] += exact_dot_chunk(t->x + r * t->stride + at, weight[j]) * (x_scale * scale[j]);
            }
        }
    }
}

INLINED void dot_e2m1(const cpu_tile *t, const kn_matrix *w, uint32_t o, uint32_t n_out,
                      double acc[][CPU_TILE])
{
    uint64_t row_bytes = w->n_in / 2, n_scale = kn_blocks(w->n_in, KN_FP4_BLOCK);
    const uint8_t *rows = (const uint8_t *)kn_host(w->data) + o * row_bytes;
    const uint8_t *scales = (const uint8_t *)kn_host(w->scale) + o * n_scale;
    uint8_t spare[CPU_CHUNK / 2];
    double weight[CPU_OUTS][CPU_CHUNK];
    for (uint32_t at = 0; at < w->n_in; at += CPU_CHUNK) {
        uint32_t len = chunk_len(w->n_in, at), n_block = kn_blocks(len, KN_FP4_BLOCK);
        for (uint32_t j = 0; j < n_out; j++) {
            decode_e2m1(chunk_bytes(rows + j * row_bytes, at / 2, len / 2, CPU_CHUNK / 2, spare), weight[j]);
        }
        for (uint32_t r = 0; r < t->n; r++) {
            const double *x = t->x + r * t->stride + at;
            uint8_t x_scale = t->scales[r][at / KN_ACT_BLOCK];
            for (uint32_t j = 0; j < n_out; j++) {
                const uint8_t *scale = scales + j * n_scale + at / KN_FP4_BLOCK;
                for (uint32_t b = 0; b < CPU_CHUNK / KN_FP4_BLOCK && b < n_block; b++) {
                    /* The decoded weights are doubled: half of the sum, exact again. */
                    acc[j][r] +=
                        0.5 * exact_dot_fp4_block(x, weight[j], b) * kn_e8m0_product(x_scale, scale[b]);
                }
            }
        }
    }
}

INLINED void product_q8_outs(const product_job *job, uint32_t o, uint32_t n_out)
{
    double acc[CPU_OUTS][CPU_TILE];
    memset(acc, 0, n_out * sizeof(acc[0]));
    if (job->w->dtype == KN_E2M1) {
        dot_e2m1(job->tile, job->w, o, n_out, acc);
    } else {
        dot_e4m3(job->tile, job->w, o, n_out, acc);
    }
    for (uint32_t r = 0; r < job->tile->n; r++) {
        for (uint32_t j = 0; j < n_out; j++) {
            job->tile->y[r][o + j] = kn_bf16_from_f64(acc[j][r]);
        }
    }
}

static void product_q8_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const product_job *job = arg;
    (void)i_thread;
    for (uint32_t o = begin; o < end;) {
        if (outs_at_once(job->tile, end - o) == CPU_OUTS) {
            product_q8_outs(job, o, CPU_OUTS);
            o += CPU_OUTS;
        } else {
            product_q8_outs(job, o, 1);
            o += 1;
        }
    }
}

void KN_FN(kn_cpu_product_q8)(kn_team *team, const cpu_tile *tile, const kn_matrix *w)
{
    product_job job = {.tile = tile, .w = w};
    CM_ASSERT(w->dtype == KN_E4M3 || (w->dtype == KN_E2M1 && w->n_in % 2 == 0));
    kn_team_run(team, w->n_out, (uint64_t)w->n_in * tile->n, product_q8_part, &job);
}

/* ---- lane products ---- */

static void decode_chunk(const kn_matrix *w, uint32_t o, uint32_t at, double *weight)
{
    uint32_t item = w->dtype == KN_BF16 ? 2 : w->dtype == KN_F32 ? 4 : 1, len = chunk_len(w->n_in, at);
    const uint8_t *row = (const uint8_t *)kn_host(w->data) + (uint64_t)o * w->n_in * item;
    uint8_t spare[CPU_CHUNK * sizeof(float)];
    const void *bytes = chunk_bytes(row, at * item, len * item, CPU_CHUNK * item, spare);
    if (w->dtype == KN_BF16) {
        decode_bf16(bytes, weight);
    } else if (w->dtype == KN_F32) {
        decode_f32(bytes, weight);
    } else {
        decode_scaled_e4m3(bytes, (float)e4m3_scale(w, o, at / CPU_CHUNK), weight);
    }
}

static void put_sum(const cpu_tile *t, uint32_t r, uint32_t o, double sum)
{
    if (t->y[r] != NULL) {
        t->y[r][o] = kn_bf16_from_f64(sum);
    } else if (t->y32[r] != NULL) {
        t->y32[r][o] = (float)sum;
    } else {
        t->y64[r][o] = sum;
    }
}

INLINED void product_lanes_outs(const product_job *job, uint32_t o, uint32_t n_out)
{
    const cpu_tile *t = job->tile;
    double weight[CPU_OUTS][CPU_CHUNK], lane[CPU_OUTS][CPU_TILE][KN_LANES];
    for (uint32_t j = 0; j < n_out; j++) {
        memset(lane[j], 0, t->n * sizeof(lane[j][0]));
    }
    for (uint32_t at = 0; at < job->w->n_in; at += CPU_CHUNK) {
        for (uint32_t j = 0; j < n_out; j++) {
            decode_chunk(job->w, job->out0 + o + j, at, weight[j]);
        }
        for (uint32_t r = 0; r < t->n; r++) {
            for (uint32_t j = 0; j < n_out; j++) {
                kn_lanes_add(lane[j][r], t->x + r * t->stride + at, weight[j], CPU_CHUNK);
            }
        }
    }
    for (uint32_t r = 0; r < t->n; r++) {
        for (uint32_t j = 0; j < n_out; j++) {
            put_sum(t, r, o + j, kn_fold_lanes(lane[j][r]));
        }
    }
}

static void product_lanes_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const product_job *job = arg;
    (void)i_thread;
    for (uint32_t o = begin; o < end;) {
        if (outs_at_once(job->tile, end - o) == CPU_OUTS) {
            product_lanes_outs(job, o, CPU_OUTS);
            o += CPU_OUTS;
        } else {
            product_lanes_outs(job, o, 1);
            o += 1;
        }
    }
}

void KN_FN(kn_cpu_product_lanes)(kn_team *team, const cpu_tile *tile, const kn_matrix *w, uint32_t out0,
                                 uint32_t n_out)
{
    product_job job = {.tile = tile, .w = w, .out0 = out0};
    CM_ASSERT(w->dtype == KN_BF16 || w->dtype == KN_F32 || w->dtype == KN_E4M3);
    kn_team_run(team, n_out, (uint64_t)w->n_in * tile->n, product_lanes_part, &job);
}
