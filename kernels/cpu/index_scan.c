/* Scores of indexer keys in plain C, a key and a query at a time.
 * Codes are doubled into small integers and summed in 16 bits: 32 products of at most 144 fit. Heads stand
 * side by side, so that a key's value meets all of them at once and no sum across a vector is needed. */
#include "kernels/cpu/index.h"

/* Codes int16 [dim][width] and scales [blocks][width], zero past heads. */
void KN_FN(kn_cpu_index_load)(const cpu_index_scan *scan, const uint8_t *rows, const uint16_t *w,
                              cpu_index_query *query)
{
    uint32_t n_block = kn_blocks(scan->dim, KN_FP4_BLOCK), row_bytes = kn_index_row_bytes(scan->dim);
    int16_t *codes = query->codes;
    memset(codes, 0, (uint64_t)scan->dim * scan->width * sizeof(*codes));
    memset(query->scale, 0, (uint64_t)n_block * scan->width * sizeof(*query->scale));
    memset(query->weight, 0, sizeof(query->weight));
    for (uint32_t h = 0; h < scan->heads; h++) {
        const uint8_t *row = rows + (uint64_t)h * row_bytes;
        for (uint32_t i = 0; i < scan->dim; i++) {
            codes[(uint64_t)i * scan->width + h] = kn_e2m1_doubled(row[i / 2] >> (i % 2 * 4) & 15);
        }
        for (uint32_t b = 0; b < n_block; b++) {
            query->scale[(uint64_t)b * scan->width + h] = kn_e8m0_decode(row[scan->dim / 2 + b]);
        }
        query->weight[h] = kn_bf16_decode(w[h]) * scan->factor;
    }
}

/* Adds the block's dot products of KN_VS_WIDTH heads: dot[h] += (q . k) * (scale_q * scale_k). */
static void add_block(const int16_t *q, uint32_t width, const int16_t *key, uint32_t n, const double *scale,
                      double key_scale, double *dot)
{
    int16_t sums[KN_VS_WIDTH];
    kn_vs acc = {0};
    for (uint32_t i = 0; i < n; i++) {
        kn_vs v;
        memcpy(&v, q + (uint64_t)i * width, sizeof(v));
        acc += v * key[i];
    }
    memcpy(sums, &acc, sizeof(sums));
    for (uint32_t h = 0; h < KN_VS_WIDTH; h++) {
        dot[h] += 0.25 * sums[h] * (scale[h] * key_scale); /* both factors were doubled */
    }
}

static float score_key(const cpu_index_scan *scan, const cpu_index_query *query, const int16_t *key,
                       const double *key_scale)
{
    double dot[CPU_INDEX_HEADS] = {0}, lane[KN_LANES] = {0};
    const int16_t *codes = query->codes;
    for (uint32_t b = 0, at = 0; at < scan->dim; b++, at += KN_FP4_BLOCK) {
        uint32_t n = scan->dim - at < KN_FP4_BLOCK ? scan->dim - at : KN_FP4_BLOCK;
        for (uint32_t h = 0; h < scan->width; h += KN_VS_WIDTH) {
            add_block(codes + (uint64_t)at * scan->width + h, scan->width, key + at, n,
                      query->scale + (uint64_t)b * scan->width + h, key_scale[b], dot + h);
        }
    }
    for (uint32_t h = 0; h < scan->width; h += KN_LANES) {
        for (uint32_t l = 0; l < KN_LANES; l++) {
            double positive = dot[h + l] > 0 ? dot[h + l] : 0;
            lane[l] += positive * query->weight[h + l];
        }
    }
    return (float)kn_fold_lanes(lane);
}

void KN_FN(kn_cpu_index_score)(const cpu_index_scan *scan, const uint8_t *const *keys, uint32_t n,
                               float *score, uint64_t stride)
{
    int16_t key[KN_DIM_MAX];
    double key_scale[KN_DIM_MAX / KN_FP4_BLOCK];
    for (uint32_t k = 0; k < n; k++) {
        for (uint32_t i = 0; i < scan->dim / 2; i++) {
            key[2 * i] = kn_e2m1_doubled(keys[k][i] & 15);
            key[2 * i + 1] = kn_e2m1_doubled(keys[k][i] >> 4);
        }
        for (uint32_t b = 0; b < kn_blocks(scan->dim, KN_FP4_BLOCK); b++) {
            key_scale[b] = kn_e8m0_decode(keys[k][scan->dim / 2 + b]);
        }
        for (uint32_t i = 0; i < scan->n_row; i++) {
            score[i * stride + k] = score_key(scan, &scan->query[i], key, key_scale);
        }
    }
}
