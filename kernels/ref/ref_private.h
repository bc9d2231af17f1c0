/* The oracle: every operation as its definition reads, one value at a time in double. Speed does not matter
 * here; being obviously right does. */
#pragma once
#include "kernels/kn_math.h"
#include "kernels/kn_private.h"

typedef struct ref_stream {
    kn_stream base;
    double *score;      /* [n_key] */
    float *index_score; /* [n_index_row] */
    float *gate_score;  /* [n_expert] activation, then [n_expert] biased */
    uint16_t *inner;    /* [2][n_inner]: h of one expert row, then its codes and scales */
} ref_stream;

extern const kn_dense_ops kn_ref_dense;
extern const kn_attn_ops kn_ref_attn;
extern const kn_moe_ops kn_ref_moe;

/* A sum in the order the contract fixes: term i into lane i % KN_LANES, then the lanes folded by halves. */
typedef struct ref_sum {
    double lane[KN_LANES];
    uint32_t n;
} ref_sum;

static inline void ref_add(ref_sum *sum, double term)
{
    sum->lane[sum->n % KN_LANES] += term;
    sum->n++;
}

static inline double ref_total(ref_sum sum)
{
    for (uint32_t s = KN_LANES / 2; s >= 1; s /= 2) {
        for (uint32_t l = 0; l < s; l++) {
            sum.lane[l] += sum.lane[l + s];
        }
    }
    return sum.lane[0];
}

/* One row quantized in blocks: codes [k], scale bytes [ceil(k / block)]. x bf16. */
void ref_quant_fp8(const uint16_t *x, uint32_t k, uint32_t block, uint8_t *codes_out, uint8_t *scales_out);
/* y[o] as bf16 for one quantized row. */
uint16_t ref_dot_q8(const uint8_t *codes, const uint8_t *scales, const kn_matrix *w, uint32_t o);
/* Lane sum of one bf16 row with row o of a bf16 matrix. */
double ref_dot_bf16(const uint16_t *x, const kn_matrix *w, uint32_t o);
void ref_rmsnorm_row(const uint16_t *x, const uint16_t *w, uint32_t d, float eps, uint16_t *y_out);
/* Rotates 2 * half values in place; cs [half][2]. */
void ref_rope_row(uint16_t *x, uint32_t half, const float *cs, bool inverse);
void ref_rope_angles(const float *inv_freq, uint32_t half, uint32_t pos, float *cs_out);
void ref_kv_pack_row(const uint16_t *x, uint32_t dim, uint32_t rope, uint8_t *row_out);
/* Value i of a stored KV row, of a stored indexer row. */
float ref_kv_value(const uint8_t *row, uint32_t dim, uint32_t rope, uint32_t i);
void ref_index_pack_row(const uint16_t *x, uint32_t dim, uint8_t *row_out);
