/* Products with quantized weights in plain C: both sides widened to double, exact sums inside a scale block.
 */
#include "common/base/assert.h"
#include "kernels/cpu/chunk.h"

/* ---- decoding CPU_CHUNK values ---- */

APART void decode_e4m3(const uint8_t *codes, double *out)
{
    for (int i = 0; i < CPU_CHUNK; i++) {
        out[i] = kn_e4m3_decode(codes[i]);
    }
}

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

/* ---- loading rows ---- */

/* Widens one row. E4M3 codes stand in the order the weights of dtype w are decoded in. */
static void widen_codes(const uint8_t *codes, uint32_t k, kn_dtype w, double *x_out)
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

typedef struct load_job {
    const cpu_q8_tile *tile;
    uint32_t k;
    kn_dtype w;
} load_job;

static void load_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const load_job *j = arg;
    (void)i_thread;
    for (uint32_t r = begin; r < end; r++) {
        widen_codes(j->tile->codes[r], j->k, j->w,
                    (double *)j->tile->x + (uint64_t)r * cpu_round_up(j->k, CPU_CHUNK));
    }
}

void KN_FN(kn_cpu_q8_load)(kn_team *team, const cpu_q8_tile *tile, uint32_t k, kn_dtype w)
{
    load_job job = {.tile = tile, .k = k, .w = w};
    kn_team_run(team, tile->n, k, load_part, &job);
}

/* ---- products ---- */

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
    const cpu_q8_tile *tile;
    const kn_matrix *w;
} product_job;

INLINED void dot_e4m3(const cpu_q8_tile *t, const kn_matrix *w, uint32_t o, uint32_t n_out,
                      double acc[][CPU_TILE])
{
    const uint8_t *rows = (const uint8_t *)kn_host(w->data) + (uint64_t)o * w->n_in;
    const double *x = t->x;
    uint64_t stride = cpu_round_up(w->n_in, CPU_CHUNK);
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
                acc[j][r] += exact_dot_chunk(x + r * stride + at, weight[j]) * (x_scale * scale[j]);
            }
        }
    }
}

INLINED void dot_e2m1(const cpu_q8_tile *t, const kn_matrix *w, uint32_t o, uint32_t n_out,
                      double acc[][CPU_TILE])
{
    uint64_t stride = cpu_round_up(w->n_in, CPU_CHUNK), row_bytes = w->n_in / 2,
             n_scale = kn_blocks(w->n_in, KN_FP4_BLOCK);
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
            const double *x = (const double *)t->x + r * stride + at;
            double x_scale = kn_e8m0_decode(t->scales[r][at / KN_ACT_BLOCK]);
            for (uint32_t j = 0; j < n_out; j++) {
                const uint8_t *scale = scales + j * n_scale + at / KN_FP4_BLOCK;
                for (uint32_t b = 0; b < CPU_CHUNK / KN_FP4_BLOCK && b < n_block; b++) {
                    /* The decoded weights are doubled: half of the sum, exact again. */
                    acc[j][r] +=
                        0.5 * exact_dot_fp4_block(x, weight[j], b) * (x_scale * kn_e8m0_decode(scale[b]));
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
        if (outs_at_once(job->tile->n, end - o) == CPU_OUTS) {
            product_q8_outs(job, o, CPU_OUTS);
            o += CPU_OUTS;
        } else {
            product_q8_outs(job, o, 1);
            o += 1;
        }
    }
}

void KN_FN(kn_cpu_q8_product)(kn_team *team, const cpu_q8_tile *tile, const kn_matrix *w)
{
    product_job job = {.tile = tile, .w = w};
    CM_ASSERT(w->dtype == KN_E4M3 || (w->dtype == KN_E2M1 && w->n_in % 2 == 0));
    kn_team_run(team, w->n_out, (uint64_t)w->n_in * tile->n, product_q8_part, &job);
}

void KN_FN(kn_cpu_scaled_product)(kn_team *team, void *scratch, const cpu_rows *rows, const kn_matrix *w)
{
    uint64_t stride = cpu_round_up(w->n_in, CPU_CHUNK);
    for (uint32_t r0 = 0; r0 < rows->n; r0 += CPU_TILE) {
        cpu_tile tile = {
            .x = scratch, .stride = stride, .n = rows->n - r0 < CPU_TILE ? rows->n - r0 : CPU_TILE};
        for (uint32_t r = 0; r < tile.n; r++) {
            KN_FN(kn_cpu_widen_bf16)
            (rows->x + (r0 + r) * rows->x_stride, w->n_in, (double *)scratch + r * stride);
            tile.y[r] = rows->y + (r0 + r) * rows->y_stride;
        }
        KN_FN(kn_cpu_product_lanes)(team, &tile, w, rows->out0, rows->n_out);
    }
}

/* ---- preparing ---- */

static uint64_t prepared_bytes(const kn_matrix *w)
{
    (void)w;
    return 0; /* read as they stand */
}

const cpu_prepare_ops KN_FN(kn_cpu_prepare) = {.bytes = prepared_bytes};
