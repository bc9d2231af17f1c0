/* The gateway behind its surfaces. A surface (HTTP, gRPC) turns what a client sent into a gw_ask, gets a
 * gw_stream and answers its events; everything between (validation, chat encoding, tokenizing, choice of
 * router, token log, detokenizing, parsing, stop strings, usage, counters) is written once, behind this
 * header. Thread: the loop's. */
#pragma once
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/model/parser.h"
#include "common/model/tokenizer.h"
#include "common/proc/rpc_server.h"

typedef struct gw_gateway gw_gateway;
typedef struct gw_stream gw_stream;
typedef struct gw_visit gw_visit; /* a client's request at its port: visit.h */
typedef struct gw_tenant gw_tenant;

/* What a client is told. One table (errors.def) gives each cause its HTTP status, OpenAI type and code, gRPC
 * code, and status and type on the Anthropic surface. */
typedef enum gw_cause {
#define GW_ERROR(name, http, type, code, grpc, anthropic_http, anthropic_type) GW_CAUSE_##name,
#include "gateway/errors.def"
#undef GW_ERROR
    GW_CAUSE_COUNT
} gw_cause;
typedef struct gw_error {
    gw_cause cause;
    char param[96];              /* field it is about, "" when none */
    char message[416];           /* a sentence for the client: what, where, what to do */
    uint32_t retry_ms;           /* > 0: when to try again */
    uint32_t tokens, tokens_max; /* of a prompt that is too long, and what would fit; 0: not known */
} gw_error;
int gw_error_http(const gw_error *error);
const char *gw_error_type(const gw_error *error);
const char *gw_error_code(const gw_error *error);
int gw_error_anthropic_http(const gw_error *error);
pc_code gw_error_grpc(const gw_error *error);
/* Asked again the same would come of it, or is not wanted: clients that try again by themselves are told not
 * to. */
bool gw_error_is_final(const gw_error *error);
/* A prompt that fills the context. */
void gw_error_too_long(gw_error *error, const char *param, uint64_t n_prompt, uint32_t context);
void gw_error_set(gw_error *error, gw_cause cause, const char *param, const char *fmt, ...) CM_PRINTF(4, 5);

typedef enum gw_ask_kind {
    GW_ASK_CHAT,     /* body is an OpenAI chat completion request */
    GW_ASK_COMPLETE, /* body is an OpenAI completion request: prompt text or ids, optional suffix */
} gw_ask_kind;

/* A request's identity wherever its streams are computed and whichever gateway tells them: the id that
 * clients see, what routers know it by, and what another gateway needs to tell it again from its first token
 * (origin.c). Counted: every stream of a request holds it. */
typedef struct gw_origin gw_origin;
/* id: NULL, one is made that nobody can guess. surface: who can tell it again, a literal; NULL: nobody, it
 * ends with this gateway. body, options (NULL: none): borrowed for the call. */
gw_origin *gw_origin_create(gw_ask_kind kind, const char *id, const char *surface, const json_t *body,
                            const json_t *options);
gw_origin *gw_origin_hold(gw_origin *origin);
void gw_origin_release(gw_origin *origin); /* NULL is fine */
const char *gw_origin_id(const gw_origin *origin);

/* body: borrowed for the call. Both gRPC Chat and Generate are turned into such a body first, so that every
 * field is checked in one place. */
typedef struct gw_ask {
    gw_ask_kind kind;
    const json_t *body;
    gw_visit *visit;      /* whose request it is, borrowed; NULL: nobody's, refused where keys are needed */
    gw_origin *origin;    /* borrowed; NULL: one is made, of a request that cannot be resumed */
    uint64_t router;      /* has the stream already: told there from its first token on; 0: a new one */
    uint64_t deadline_ms; /* from now; UINT64_MAX = none */
    bool want_ids;        /* tokens events, with or without text */
    bool skip_special;    /* GW_ASK_COMPLETE: leave special tokens out of the text */
    uint32_t choices_max; /* answers (n) this surface can give, each a stream; 0: one */
    uint32_t choice;      /* which of them: with a seed, each is drawn by one of its own, 0 by the client's */
} gw_ask;

/* ---- going on with a request that was told before, here or by another gateway ---- */
typedef struct gw_seek gw_seek;
typedef struct gw_found {
    gw_origin *origin; /* everything is borrowed until the callback returns */
    const char *surface;
    const json_t *body, *options; /* of gw_origin_create; options may be NULL */
    const uint64_t
        *router; /* [n_router] by choice, for gw_ask.router; 0: nobody has it, it is computed anew */
    uint32_t n_router;
} gw_found;
/* One of the two is NULL. Not from inside gw_seek_begin. */
typedef void (*gw_seek_fn)(void *ctx, const gw_found *found, const gw_error *error);
/* Asks all routers for the tenant's request with this id. */
gw_seek *gw_seek_begin(gw_gateway *gateway, const gw_tenant *tenant, const char *id, gw_seek_fn fn,
                       void *ctx);
void gw_seek_cancel(gw_seek *seek); /* fn will not be called */

typedef struct gw_usage gw_usage;
typedef struct gw_start {
    const gw_usage *usage; /* at every event what it came to, without times; NULL: nobody counts */
    const char *request_id;
    const char *model;
    int64_t created_s; /* since 1970 */
    uint32_t prompt_tokens,
        cached_tokens; /* 0: nothing is cached, or it is not known before the first token */
    bool thinking;     /* chat: the prompt ended in <think> */
} gw_start;

typedef enum gw_reason { GW_REASON_STOP, GW_REASON_LENGTH, GW_REASON_TOOL_CALLS } gw_reason;
struct gw_usage {
    uint32_t prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens;
    double queue_ms, first_token_ms, total_ms;
};
typedef struct gw_finish {
    gw_reason reason;
    const char *stop_string; /* NULL unless it matched */
    int64_t stop_id;         /* -1 unless it matched */
    const md_parser *parser; /* of the answer, for md_parser_call_args; borrowed; NULL: not there any more */
    gw_usage usage;
} gw_finish;

/* token's bytes belong to the tokenizer; NULL for an id without a token. */
typedef struct gw_logprob {
    uint32_t id;
    float logprob; /* natural logarithm; -9999 for probability zero */
    const uint8_t *bytes;
    size_t n_bytes;
} gw_logprob;
typedef struct gw_logprobs {
    gw_logprob token;      /* the generated one */
    const gw_logprob *top; /* [n_top] the likeliest, best first; borrowed */
    uint32_t n_top;
    md_piece_kind kind; /* what its text belongs to: reasoning or anything else */
    bool is_marker;     /* it ends the reasoning: it has no text */
} gw_logprobs;

typedef struct gw_stream_events {
    /* Validated, tokenized, let in: it waits for a router, maybe for long. NULL: that is no news. */
    void (*admitted)(void *ctx);
    /* Accepted by a router: nothing is refused after this. */
    void (*started)(void *ctx, const gw_start *start);
    /* A piece of text of one kind; never empty but for calls' names, never part of a character. */
    void (*piece)(void *ctx, const md_piece *piece);
    /* want_ids: new ids, EOS not included; offset of ids[0] among the generated tokens. Comes before its
     * pieces. */
    void (*tokens)(void *ctx, uint64_t offset, const uint32_t *ids, uint32_t n);
    /* The body asks for log-probabilities: of one new token. Comes before its pieces. */
    void (*logprobs)(void *ctx, const gw_logprobs *logprobs);
    /* All pieces of one step were told: a good moment to write. */
    void (*flush)(void *ctx);
    /* Last event, one of the two; the stream is invalid after it. failed may come without started. */
    void (*finished)(void *ctx, const gw_finish *finish);
    void (*failed)(void *ctx, const gw_error *error);
} gw_stream_events;

/* CM_OK: events follow, never from inside this call. Else *error_out says why (nothing is kept). */
CM_MUST_CHECK cm_status gw_stream_open(gw_gateway *gateway, const gw_ask *ask, const gw_stream_events *events,
                                       void *ctx, gw_stream **stream_out, gw_error *error_out);
/* The client went away: no event follows; the router hears of it at once. */
void gw_stream_cancel(gw_stream *stream);
/* The same, but the router goes on: the client may ask for the rest, here or at another gateway, for as long
 * as routers keep it. */
void gw_stream_detach(gw_stream *stream);
const char *gw_stream_id(const gw_stream *stream);
/* Its last token was told: pieces that come now were held back, or are of nothing. */
bool gw_stream_is_ending(const gw_stream *stream);
/* By request id, for Abort: the tenant's stream fails with GW_CAUSE_ABORTED. false: it has no such stream. */
bool gw_stream_abort(gw_gateway *gateway, const gw_tenant *tenant, const char *request_id);
/* The tenant's, or everybody's where it is an operator. How many. */
uint32_t gw_stream_abort_all(gw_gateway *gateway, const gw_tenant *tenant);

/* ---- what surfaces ask besides ---- */

/* Before anything else of a request is looked at. authorization: "Bearer KEY", api_key: KEY; NULL: not given.
 * CM_E_INVALID: error_out is GW_CAUSE_UNAUTHENTICATED. */
CM_MUST_CHECK cm_status gw_gateway_identify(const gw_gateway *gateway, const char *authorization,
                                            const char *api_key, gw_tenant **tenant_out, gw_error *error_out);

typedef struct gw_info {
    const char *model;       /* served name */
    const char *fingerprint; /* "fp_" and 16 hex digits */
    uint32_t context, vocab, bos_id, eos_id;
    char profile; /* 'G' or 'P' */
    bool ready;   /* a router is linked, experts are placed and a step has completed */
    bool draining;
    uint64_t epoch;
    uint32_t running, waiting; /* over all routers, from their last frames */
    double kv_used;            /* 0..1 */
    double uptime_s;
    int64_t created_s;    /* of the process */
    uint32_t choices_max; /* answers (n) to one request */
} gw_info;
void gw_gateway_info(const gw_gateway *gateway, gw_info *info_out);
const md_tokenizer *gw_gateway_tokenizer(const gw_gateway *gateway);
/* The tokenizer's files, for clients that make their own tokens. */
typedef struct gw_archive {
    const uint8_t *data; /* [n_bytes] zip; the gateway's */
    size_t n_bytes;
    const char *sha256; /* of data, in hex */
} gw_archive;
void gw_gateway_tokenizer_files(const gw_gateway *gateway, gw_archive *archive_out);
/* Ids of a chat body or of text, exactly as generation would use them. */
CM_MUST_CHECK cm_status gw_chat_ids(gw_gateway *gateway, const json_t *body, md_ids *ids_out,
                                    cm_bytes *text_out, gw_error *error_out);
/* GW_CAUSE_MODEL_NOT_FOUND unless name is NULL or the served model. */
CM_MUST_CHECK cm_status gw_model_check(const gw_gateway *gateway, const char *name, gw_error *error_out);
/* Prometheus text of this gateway and of the members it hears of. */
void gw_metrics_render(gw_gateway *gateway, cm_bytes *out);

/* ---- the OpenAI objects, for both HTTP and ChatJson ----
 * A writer turns a stream's events into response objects: chunks when stream is true, one object else. Each
 * object is handed to emit as JSON text without newline; last is true on the final one, which comes when all
 * of the body's n choices have finished. error objects are the caller's. */
typedef struct gw_openai gw_openai;
typedef struct gw_openai_choice gw_openai_choice; /* one of its n answers */
/* choice: whose object it is; that of all of them is the first one's. The objects of one choice are the same
 * and in the same order however its tokens came; those of several mix as they come. */
typedef void (*gw_emit_fn)(void *ctx, uint32_t choice, const char *json, size_t n_bytes, bool last);
gw_openai *gw_openai_create(gw_ask_kind kind, const json_t *body, const char *fingerprint, gw_emit_fn emit,
                            void *ctx);
void gw_openai_destroy(gw_openai *writer);
uint32_t gw_openai_choices(const gw_openai *writer); /* n of the body; 1 when it is no number in range */
gw_openai_choice *gw_openai_choice_of(gw_openai *writer, uint32_t choice);
const gw_stream_events *gw_openai_events(
    void); /* ctx is a gw_openai_choice; flush, failed are no-ops: wrap them */
/* {"error":{...}} */
void gw_openai_error(const gw_error *error, cm_bytes *out);
/* {"type":"error","error":{...},"request_id":...}; request_id may be NULL. */
void gw_anthropic_error(const gw_error *error, const char *request_id, cm_bytes *out);
