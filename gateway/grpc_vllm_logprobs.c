#include "gateway/grpc_vllm.h"

static void grow(gw_vllm_logprobs *list, uint32_t n_top)
{
    if (list->n == list->cap) {
        list->cap = list->cap > 0 ? 2 * list->cap : 16;
        list->id = cm_realloc(list->id, sizeof(*list->id) * list->cap);
        list->value = cm_realloc(list->value, sizeof(*list->value) * list->cap);
        list->top_end = cm_realloc(list->top_end, sizeof(*list->top_end) * list->cap);
    }
    while (list->n_top + n_top > list->top_cap) {
        list->top_cap = list->top_cap > 0 ? 2 * list->top_cap : 32;
        list->top_id = cm_realloc(list->top_id, sizeof(*list->top_id) * list->top_cap);
        list->top_value = cm_realloc(list->top_value, sizeof(*list->top_value) * list->top_cap);
    }
}

void gw_vllm_logprobs_add(gw_vllm_logprobs *list, const gw_logprobs *logprobs)
{
    grow(list, logprobs->n_top);
    for (uint32_t i = 0; i < logprobs->n_top; i++) {
        list->top_id[list->n_top] = logprobs->top[i].id;
        list->top_value[list->n_top++] = logprobs->top[i].logprob;
    }
    list->id[list->n] = logprobs->token.id;
    list->value[list->n] = logprobs->token.logprob;
    list->top_end[list->n++] = list->n_top;
}

Vllm__Grpc__Engine__OutputLogProbs *gw_vllm_logprobs_message(gw_vllm_logprobs *list)
{
    Vllm__Grpc__Engine__OutputLogProbs *out = &list->message;
    list->top = cm_realloc(list->top, sizeof(*list->top) * list->cap);
    list->tops = cm_realloc(list->tops, sizeof(*list->tops) * list->cap);
    for (uint32_t i = 0, from = 0; i < list->n; from = list->top_end[i++]) {
        Vllm__Grpc__Engine__TopLogProbs *top = &list->top[i];
        vllm__grpc__engine__top_log_probs__init(top);
        top->n_values = top->n_token_ids = list->top_end[i] - from;
        top->values = list->top_value + from;
        top->token_ids = list->top_id + from;
        list->tops[i] = top;
    }
    vllm__grpc__engine__output_log_probs__init(out);
    out->n_token_logprobs = out->n_token_ids = out->n_top_logprobs = list->n;
    out->token_logprobs = list->value;
    out->token_ids = list->id;
    out->top_logprobs = list->tops;
    return out;
}

void gw_vllm_logprobs_clear(gw_vllm_logprobs *list)
{
    list->n = list->n_top = 0;
}

void gw_vllm_logprobs_fini(gw_vllm_logprobs *list)
{
    cm_free(list->id);
    cm_free(list->value);
    cm_free(list->top_end);
    cm_free(list->top_id);
    cm_free(list->top_value);
    cm_free(list->top);
    cm_free(list->tops);
}
