/* Log-probabilities of an answer in OpenAI's two shapes: a chat's lists of objects, a completion's parallel
 * lists. Gathered token by token, written once in a while; what was written is forgotten. Thread: any, one at
 * a time. */
#pragma once
#include "common/base/bytes.h"
#include "gateway/stream.h"

typedef struct gw_openai_logprobs {
    gw_ask_kind kind;
    uint32_t n;                     /* tokens since the last write */
    cm_bytes content, reasoning;    /* chat: objects, separated by commas */
    cm_bytes tokens, logprobs, top; /* completion, likewise */
    cm_bytes offsets;
    uint64_t n_chars; /* completion: of all tokens so far */
} gw_openai_logprobs;

/* Appends a chat's object of one token, which an item of Responses has too. */
void gw_openai_logprobs_object(const gw_logprobs *logprobs, cm_bytes *out);

void gw_openai_logprobs_init(gw_openai_logprobs *list, gw_ask_kind kind);
void gw_openai_logprobs_fini(gw_openai_logprobs *list);
/* A marker without text of its own is left out, so that a list's bytes join to the text. */
void gw_openai_logprobs_add(gw_openai_logprobs *list, const gw_logprobs *logprobs);
/* Appends the value of "logprobs". thinking: a chat's reasoning has a list too. */
void gw_openai_logprobs_put(gw_openai_logprobs *list, bool thinking, cm_bytes *out);
