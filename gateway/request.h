/* What a client asked for, checked: every field of an OpenAI chat or completion body that we know is held
 * against one table (name, type, range, where it goes). A field we do not know is ignored; one that we know
 * and cannot honour is refused unless its value changes nothing. What a body does to the prompt (messages,
 * tools, thinking) is the chat encoder's to check. A value type that owns its lists. Thread: any. */
#pragma once
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "gateway/constraint.h"
#include "gateway/stream.h"

enum {
    GW_STOP_MAX = 16,
    GW_STOP_IDS_MAX = 64,
    GW_BIAS_MAX = 1024,
    GW_TOP_LOGPROBS_MAX = 20,
    GW_CHOICES_MAX = 128
};

typedef struct gw_request {
    gw_ask_kind kind;
    bool stream, include_usage;
    double temperature, top_p, min_p;
    uint32_t top_k; /* 0: all */
    double presence_penalty, frequency_penalty, repetition_penalty;
    uint32_t n_bias;
    uint32_t *bias_id; /* [n_bias] owned, each id once */
    float *bias;       /* [n_bias] owned */
    bool logprobs;     /* of each token and of the n_top likeliest */
    uint32_t n_top;
    uint32_t n_choice; /* answers wanted */
    bool has_seed;
    int64_t seed;
    uint32_t tokens_max; /* 0: the default of the mode */
    uint32_t tokens_min;
    bool ignore_eos;
    bool include_stop; /* keep the matched stop string in the text */
    bool keep_special; /* skip_special_tokens: false */
    bool tools;        /* calls may come */
    bool one_call;     /* one at most */
    uint32_t n_stop, n_stop_id;
    char *stop[GW_STOP_MAX]; /* owned */
    uint32_t stop_id[GW_STOP_IDS_MAX];
    md_ids prompt_ids; /* GW_ASK_COMPLETE with a prompt of ids */
    char *prompt;      /* GW_ASK_COMPLETE with a prompt of text: owned, prompt_bytes long, may hold NULs */
    size_t prompt_bytes;
    char *suffix; /* not NULL: fill in the middle */
    size_t suffix_bytes;
    char *
        salt; /* who and what it shares its prompt's computed beginning with; owned, NULL: its whole tenant */
    gw_constraint constraint; /* what the answer must be; read, not yet compiled */
} gw_request;

/* vocab: ids must be below it. CM_E_INVALID or CM_E_UNSUPPORTED with error_out filled; nothing is kept then.
 * The model's name is not looked at. */
CM_MUST_CHECK cm_status gw_request_parse(gw_ask_kind kind, const json_t *body, uint32_t vocab,
                                         gw_request *request_out, gw_error *error_out);
void gw_request_free(gw_request *request);

/* Single fields, for a surface that must know them before and after the stream's life. */
bool gw_request_streams(const json_t *body);
bool gw_request_is_resumable(const json_t *body); /* the client may go away and come back */
bool gw_request_wants_usage(const json_t *body);
bool gw_request_wants_usage_always(const json_t *body); /* in every object of a stream */
bool gw_request_wants_logprobs(gw_ask_kind kind, const json_t *body);
uint32_t gw_request_choices(const json_t *body); /* 1 to GW_CHOICES_MAX */

/* Tokens that may be generated: what was asked for or the mode's default, cut to the context.
 * GW_CAUSE_CONTEXT when not even one fits behind the prompt. */
CM_MUST_CHECK cm_status gw_request_budget(const gw_request *request, bool thinking, uint32_t n_prompt,
                                          uint32_t context, uint32_t *tokens_max_out, gw_error *error_out);
