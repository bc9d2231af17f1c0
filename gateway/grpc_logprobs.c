/* Log-probabilities on their way into a message. */
#include "gateway/grpc_private.h"

typedef struct logprob_entry {
    Baleen__V1__TokenLogprob token;
    Baleen__V1__TokenLogprob top[GW_GRPC_TOP_MAX], *list[GW_GRPC_TOP_MAX];
} logprob_entry;

static void fill(Baleen__V1__TokenLogprob *out, const gw_logprob *of)
{
    baleen__v1__token_logprob__init(out);
    out->token_id = of->id;
    out->logprob = of->logprob;
    out->has_token = of->bytes != NULL;
    out->token = (ProtobufCBinaryData){.data = (uint8_t *)(uintptr_t)of->bytes, .len = of->n_bytes};
}

void gw_grpc_logprobs_add(gw_grpc_logprobs *list, const gw_logprobs *logprobs)
{
    CM_ASSERT(logprobs->n_top <= GW_GRPC_TOP_MAX);
    if (list->n == list->cap) {
        list->cap = list->cap > 0 ? list->cap * 2 : 16;
        list->list = cm_realloc(list->list, sizeof(*list->list) * list->cap);
    }
    logprob_entry *entry = cm_alloc(sizeof(*entry));
    fill(&entry->token, &logprobs->token);
    for (uint32_t i = 0; i < logprobs->n_top; i++) {
        fill(&entry->top[i], &logprobs->top[i]);
        entry->list[i] = &entry->top[i];
    }
    entry->token.n_top = logprobs->n_top;
    entry->token.top = entry->list;
    list->list[list->n++] = &entry->token;
}

void gw_grpc_logprobs_clear(gw_grpc_logprobs *list)
{
    for (uint32_t i = 0; i < list->n; i++) {
        cm_free(list->list[i]); /* the token is the entry's first member */
    }
    list->n = 0;
}

void gw_grpc_logprobs_fini(gw_grpc_logprobs *list)
{
    gw_grpc_logprobs_clear(list);
    cm_free(list->list);
}
