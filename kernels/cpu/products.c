/* Matrix products: weights are decoded from their stored form a chunk at a time and used for every row of a tile. */
#include "common/base/assert.h"
#include "kernels/cpu/isa.h"

/* ---- decoding CPU_CHUNK values ---- */

static void decode_e4m3(const uint8_t *codes, double *out)
{
    for (int i = 0; i < CPU_CHUNK; i++) {
        out[i] = kn_e4m3_decode(codes[i]);
    }
}

/* Low nibbles of a block first, then its high nibbles: block sums are exact, so any order will do, and this one
 * needs no interleaving. kn_cpu_widen_codes puts the inputs in the same order. */
static void decode_e2m1(const uint8_t *pairs, double *out)
{
    for (int b = 0; b < CPU_CHUNK / KN_FP4_BLOCK; b++) {
        for (int i = 0; i < KN_FP4_BLOCK / 2; i++) {
            uint32_t pair = pairs[b * KN_FP4_BLOCK / 2 + i];
            out[b * KN_FP4_BLOCK + i] = kn_e2m1_doubled(pair & 15u);
            out[b * KN_FP4_BLOCK + KN_FP4_BLOCK / 2 + i] = kn_e2m1_doubled(pair >> 4);
        }
    }
}

static void decode_bf16(const uint16_t *x, double *out)
{
    for (int i = 0; i < CPU_CHUNK; i++) {
        out[i] = kn_bf16_decode(x[i]);
    }
}

static void decode_f32(const float *x, double *out)
{
    for (int i = 0; i < CPU_CHUNK; i++) {
        out[i] = x[i];
    }
}

static void decode_scaled_e4m3(const uint8_t *codes, float scale, double *out)
{
    for (int i = 0; i < CPU_CHUNK; i++) {
        out[i] = kn_bf16_decode(kn_bf16_encode(kn_e4m3_decode(codes[i]) * scale));
    }
}

/* Bytes of a chunk, from the matrix or, for a short last chunk, from a copy filled up with zeros. */
static const void *chunk_bytes(const void *row, uint32_t at_byte, uint32_t n_valid, uint32_t n_bytes, uint8_t *spare)
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
                int block = i / KN_FP4_BLOCK * KN_FP4_BLOCK, in = i % KN_FP4_BLOCK;
                ordered[block + in % 2 * (KN_FP4_BLOCK / 2) + in / 2] = from[i];
            }
            from = ordered;
        }
        decode_e4m3(from, x_out + at);
    }
}

void KN_FN(kn_cpu_widen_bf16)(const uint16_t *x, uint32_t k, double *x_out)
{
    uint16_t spare[CPU_CHUNK];
    for (uint32_t at = 0; at < k; at += CPU_CHUNK) {
        decode_bf16(chunk_bytes(x, 2 * at, 2 * chunk_len(k, at), 2 * CPU_CHUNK, (uint8_t *)spare), x_out + at);
    }
}

/* ---- quantized products ---- */

/* Exact sum of n products, n a multiple of 2 * KN_LANES: any order gives the same value. */
static inline double exact_dot(const double *x, const double *w, int n)
{
    enum { N_ACC = 4 };
    kn_vd acc[N_ACC] = {0};
    double sum = 0;
    for (int i = 0; i < n; i += N_ACC * KN_VD_WIDTH) {
        for (int v = 0; v < N_ACC; v++) {
            int at = i + v * KN_VD_WIDTH;
            acc[v] = kn_vd_add_exact_product(kn_vd_load(x + at), kn_vd_load(w + at), acc[v]);
        }
    }
    acc[0] = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    for (int l = 0; l < KN_VD_WIDTH; l++) {
        sum += acc[0][l];
    }
    return sum;
}

typedef struct product_job {
    const cpu_tile *tile;
    const kn_matrix *w;
    uint32_t out0;
} product_job;

static inline double e4m3_scale(const kn_matrix *w, uint32_t o, uint32_t block)
{
    uint64_t at = (uint64_t)(o / KN_ACT_BLOCK) * kn_blocks(w->n_in, KN_ACT_BLOCK) + block;
    return w->scale_dtype == KN_F32 ? ((const float *)kn_host(w->scale))[at]
                                    : kn_e8m0_decode(((const uint8_t *)kn_host(w->scale))[at]);
}

static void dot_e4m3(const cpu_tile *t, const kn_matrix *w, uint32_t o, double *acc)
{
    const uint8_t *row = (const uint8_t *)kn_host(w->data) + (uint64_t)o * w->n_in;
    uint8_t spare[CPU_CHUNK];
    double weight[CPU_CHUNK];
    for (uint32_t at = 0, b = 0; at < w->n_in; at += CPU_CHUNK, b++) {
        double scale = e4m3_scale(w, o, b);
        decode_e4m3(chunk_bytes(row, at, chunk_len(w->n_in, at), CPU_CHUNK, spare), weight);
        for (uint32_t r = 0; r < t->n; r++) {
            double sum = exact_dot(t->x + r * t->stride + at, weight, CPU_CHUNK);
            acc[r] += sum * (kn_e8m0_decode(t->scales[r][b]) * scale);
        }
    }
}

static void dot_e2m1(const cpu_tile *t, const kn_matrix *w, uint32_t o, double *acc)
{
    const uint8_t *row = (const uint8_t *)kn_host(w->data) + (uint64_t)o * (w->n_in / 2);
    const uint8_t *scales = (const uint8_t *)kn_host(w->scale) + (uint64_t)o * kn_blocks(w->n_in, KN_FP4_BLOCK);
    uint8_t spare[CPU_CHUNK / 2];
    double weight[CPU_CHUNK];
    for (uint32_t at = 0; at < w->n_in; at += CPU_CHUNK) {
        uint32_t len = chunk_len(w->n_in, at), n_block = kn_blocks(len, KN_FP4_BLOCK);
        decode_e2m1(chunk_bytes(row, at / 2, len / 2, CPU_CHUNK / 2, spare), weight);
        for (uint32_t r = 0; r < t->n; r++) {
            const double *x = t->x + r * t->stride + at;
            uint8_t x_scale = t->scales[r][at / KN_ACT_BLOCK];
            for (uint32_t b = 0; b < n_block; b++) {
                /* The decoded weights are doubled: half of the sum, exact again. */
                double sum = 0.5 * exact_dot(x + b * KN_FP4_BLOCK, weight + b * KN_FP4_BLOCK, KN_FP4_BLOCK);
                acc[r] += sum * kn_e8m0_product(x_scale, scales[at / KN_FP4_BLOCK + b]);
            }
        }
    }
}

static void product_q8_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const product_job *job = arg;
    (void)i_thread;
    for (uint32_t o = begin; o < end; o++) {
        double acc[CPU_TILE] = {0};
        if (job->w->dtype == KN_E2M1) {
            dot_e2m1(job->tile, job->w, o, acc);
        } else {
            dot_e4m3(job->tile, job->w, o, acc);
        }
        for (uint32_t r = 0; r < job->tile->n; r++) {
            job->tile->y[r][o] = kn_bf16_from_f64(acc[r]);
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
    uint64_t row = (uint64_t)o * w->n_in;
    uint32_t len = chunk_len(w->n_in, at);
    uint8_t spare[CPU_CHUNK * sizeof(float)] __attribute__((aligned(8)));
    if (w->dtype == KN_BF16) {
        const uint16_t *data = (const uint16_t *)kn_host(w->data) + row;
        decode_bf16(chunk_bytes(data, at * 2, len * 2, CPU_CHUNK * 2, spare), weight);
    } else if (w->dtype == KN_F32) {
        const float *data = (const float *)kn_host(w->data) + row;
        decode_f32(chunk_bytes(data, at * 4, len * 4, CPU_CHUNK * 4, spare), weight);
    } else {
        const uint8_t *data = (const uint8_t *)kn_host(w->data) + row;
        decode_scaled_e4m3(chunk_bytes(data, at, len, CPU_CHUNK, spare), (float)e4m3_scale(w, o, at / CPU_CHUNK),
                           weight);
    }
}

static void product_lanes_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const product_job *job = arg;
    const cpu_tile *t = job->tile;
    double weight[CPU_CHUNK];
    (void)i_thread;
    for (uint32_t o = begin; o < end; o++) {
        double lane[CPU_TILE][KN_LANES] = {{0}};
        for (uint32_t at = 0; at < job->w->n_in; at += CPU_CHUNK) {
            decode_chunk(job->w, job->out0 + o, at, weight);
            for (uint32_t r = 0; r < t->n; r++) {
                kn_lanes_add(lane[r], t->x + r * t->stride + at, weight, CPU_CHUNK);
            }
        }
        for (uint32_t r = 0; r < t->n; r++) {
            double sum = kn_fold_lanes(lane[r]);
            if (t->y[r] != NULL) {
                t->y[r][o] = kn_bf16_from_f64(sum);
            } else if (t->y32[r] != NULL) {
                t->y32[r][o] = (float)sum;
            } else {
                t->y64[r][o] = sum;
            }
        }
    }
}

void KN_FN(kn_cpu_product_lanes)(kn_team *team, const cpu_tile *tile, const kn_matrix *w, uint32_t out0, uint32_t n_out)
{
    product_job job = {.tile = tile, .w = w, .out0 = out0};
    CM_ASSERT(w->dtype == KN_BF16 || w->dtype == KN_F32 || w->dtype == KN_E4M3);
    kn_team_run(team, n_out, (uint64_t)w->n_in * tile->n, product_lanes_part, &job);
}
