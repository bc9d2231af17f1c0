/* Inside the VllmEngine surface. Thread: the loop's. */
#pragma once
#include "gateway/grpc_private.h"

/* As gw_grpc_generate_body. */
CM_MUST_CHECK cm_status gw_vllm_body(const Vllm__Grpc__Engine__GenerateRequest *request, json_t **body_out,
                                     gw_error *error_out);

/* ---- grpc_vllm_logprobs.c ----
 * Log-probabilities of tokens not yet sent, kept as flat lists: a long answer has many. A list of zeros is
 * empty. */
typedef struct gw_vllm_logprobs {
    uint32_t n, cap;
    uint32_t n_top, top_cap;
    uint32_t *id;      /* [n] */
    float *value;      /* [n] */
    uint32_t *top_end; /* [n] where the alternatives of a token end */
    uint32_t *top_id;  /* [n_top] */
    float *top_value;  /* [n_top] */
    Vllm__Grpc__Engine__OutputLogProbs message;
    Vllm__Grpc__Engine__TopLogProbs *top, **tops; /* [n] of the message */
} gw_vllm_logprobs;
void gw_vllm_logprobs_add(gw_vllm_logprobs *list, const gw_logprobs *logprobs);
/* As a message, until the list changes. */
Vllm__Grpc__Engine__OutputLogProbs *gw_vllm_logprobs_message(gw_vllm_logprobs *list);
void gw_vllm_logprobs_clear(gw_vllm_logprobs *list);
void gw_vllm_logprobs_fini(gw_vllm_logprobs *list);
