/* Products by lane sums: weights are decoded from their stored form a chunk at a time and used for every row
 * of a tile. */
#include "common/base/assert.h"
#include "kernels/cpu/chunk.h"

/* ---- decoding CPU_CHUNK values ---- */

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

void KN_FN(kn_cpu_widen_bf16)(const uint16_t *x, uint32_t k, double *x_out)
{
    uint8_t spare[2 * CPU_CHUNK];
    for (uint32_t at = 0; at < k; at += CPU_CHUNK) {
        decode_bf16(chunk_bytes(x, 2 * at, 2 * chunk_len(k, at), 2 * CPU_CHUNK, spare), x_out + at);
    }
}

typedef struct product_job {
    const cpu_tile *tile;
    const kn_matrix *w;
    uint32_t out0;
} product_job;

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
        if (outs_at_once(job->tile->n, end - o) == CPU_OUTS) {
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
#if defined(__AVX512F__)
    if (w->dtype != KN_E4M3) {
        KN_FN(kn_cpu_product_lanes512)(team, tile, 1, w, out0, n_out);
        return;
    }
#elif defined(__AVX2__)
    if (w->dtype != KN_E4M3) {
        KN_FN(kn_cpu_product_lanes256)(team, tile, w, out0, n_out);
        return;
    }
#endif
    CM_ASSERT(w->dtype == KN_BF16 || w->dtype == KN_F32 || (w->dtype == KN_E4M3 && !w->prepared));
    kn_team_run(team, n_out, (uint64_t)w->n_in * tile->n, product_lanes_part, &job);
}
