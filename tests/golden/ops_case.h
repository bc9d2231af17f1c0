/* Shared by the files of t_ops: one case of data/ops on one device. Thread: one. */
#pragma once
#include "kernels/kn.h"
#include "tests/golden/fixture.h"
#include "tests/golden/kernel_rig.h"

#define OP_EPS 1e-6f

typedef struct op_case {
    const char *group, *name;
    const json_t *json;
    fx_file *file;
    rig *rig;
    uint32_t n_checked; /* outputs compared so far; all of them must be */
} op_case;

const fx_tensor *op_in(const op_case *c, const char *name);
kn_ptr op_up(op_case *c, const char *name); /* an input in device memory */
double op_attr(const op_case *c, const char *name);
kn_dtype op_dtype(const fx_tensor *t); /* of a weight or scale */
/* Compares an output with what the case says about it; got has the golden tensor's dtype. */
void op_check(op_case *c, const char *name, const void *got);
void op_check_at(op_case *c, const char *name, kn_ptr at); /* the same from device memory */
kn_matrix op_matrix(op_case *c, const char *name);         /* from NAME.weight and NAME.scale */
kn_q8 op_quantized(op_case *c, kn_ptr x, uint32_t n, uint32_t k);
const kn_dense_ops *op_dense(const op_case *c);
/* Stored rows as bf16 values. */
void op_unpack_kv(const uint8_t *row, uint32_t dim, uint32_t rope, uint16_t *x_out);
void op_unpack_index(const uint8_t *row, uint32_t dim, uint16_t *x_out);
void op_quant_fp4(const uint16_t *x, uint32_t k, uint8_t *codes_out, int64_t *exponents_out);
/* Frequencies [32] of the case's theta and yarn. */
void op_inv_freq(const op_case *c, float *inv_freq_out);

/* One function per kind of case. */
void op_case_decode(op_case *c);
void op_case_encode(op_case *c);
void op_case_bf16_round(op_case *c);
void op_case_dequant(op_case *c);
void op_case_scale_exponent(op_case *c);
void op_case_quant_act(op_case *c);
void op_case_quant_kv(op_case *c);
void op_case_fp4sim(op_case *c);
void op_case_kv_row(op_case *c);
void op_case_hadamard(op_case *c);
void op_case_norm(op_case *c);
void op_case_head_q(op_case *c);
void op_case_rope(op_case *c);
void op_case_coefficients(op_case *c);
void op_case_mhc_site(op_case *c);
void op_case_linear_q8(op_case *c);
void op_case_linear_bf16(op_case *c);
void op_case_head(op_case *c);
void op_case_o_proj(op_case *c);
void op_case_attention(op_case *c);
void op_case_compressor(op_case *c);
void op_case_index_scores(op_case *c);
void op_case_topk(op_case *c);
