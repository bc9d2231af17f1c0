/* What the parts of the gRPC surface share: a table of methods, and a call from its request to its end.
 * Thread: the loop's. */
#pragma once
#include <sys/queue.h>

#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "gateway/grpc.h"
#include "gateway/request.h"
#include "gateway/visit.h"
#include "proto/baleen_v1.pb-c.h"
#include "proto/health.pb-c.h"
#include "proto/kserve.pb-c.h"
#include "proto/pack.h"
#include "proto/reflection_v1.pb-c.h"
#include "proto/vllm_engine.pb-c.h"

enum { GW_GRPC_N_METHODS = 29, GW_GRPC_TOP_MAX = 20 };

typedef struct gw_grpc_call gw_grpc_call;
typedef struct gw_reflection gw_reflection;

typedef struct gw_grpc_method {
    const char *path;
    const ProtobufCMessageDescriptor *request;
    /* request is borrowed for the call. Ends the call, or opens a stream that will. client_streams: comes for
     * each message. */
    void (*ask)(gw_grpc_call *call, const ProtobufCMessage *request);
    bool client_streams;
    void (*half_closed)(gw_grpc_call *call); /* client_streams: there will be no more messages */
    void (*drain)(gw_grpc_call *call); /* client_streams: the gateway shuts down, what waits idly must end */
    void (*sent)(gw_grpc_call *call);  /* as pc_method's; NULL: it does not care */
    /* Ends each of its streams but call->stream; NULL: it has no more. */
    void (*end_streams)(gw_grpc_call *call, void (*end)(gw_stream *stream));
    void (*fini)(gw_grpc_call *call); /* frees its part of the call; NULL: nothing to free */
    void (*resume)(gw_grpc_call *call, const gw_found *found); /* as ask, for a client that comes back */
    const char *surface; /* what its requests are known by at routers; NULL: they are no streams */
    void (*name_field)(gw_error *error); /* its body was built from fields: errors name those, not the body's;
                                            NULL: it is the client's own */
    bool health;                         /* answered also while draining */
} gw_grpc_method;
extern const gw_grpc_method gw_grpc_methods[GW_GRPC_N_METHODS];

/* Of tokens that were generated and not yet sent. */
typedef struct gw_grpc_logprobs {
    Baleen__V1__TokenLogprob **list; /* [n] owned; as a message wants it */
    uint32_t n, cap;
} gw_grpc_logprobs;

typedef struct gw_grpc_chat {
    md_ids ids; /* generated, not yet sent with a delta */
    gw_grpc_logprobs logprobs;
} gw_grpc_chat;

typedef struct gw_grpc_generate {
    bool whole; /* one tokens event at the end */
    bool return_text;
    uint64_t n_told; /* generated tokens */
    uint64_t offset; /* of ids.id[0] */
    md_ids ids;      /* not yet sent, as are text and logprobs */
    cm_bytes text;
    gw_grpc_logprobs logprobs;
} gw_grpc_generate;

typedef struct gw_grpc_json_choice {
    gw_grpc_call *call;
    gw_stream *stream; /* NULL: it has ended */
    gw_openai_choice *writer;
} gw_grpc_json_choice;

typedef struct gw_grpc_json {
    gw_openai *writer; /* NULL: the body was refused */
    gw_grpc_json_choice *choices;
    uint32_t n_choice, n_finished;
} gw_grpc_json;

typedef struct gw_grpc_watch {
    bool on;    /* the call is a watcher, and was told something */
    bool known; /* a service of ours, or all of them */
    Grpc__Health__V1__HealthCheckResponse__ServingStatus told;
} gw_grpc_watch;

typedef struct gw_vllm_choice gw_vllm_choice;
typedef struct gw_grpc_vllm {
    gw_vllm_choice *choices; /* [n_choice] owned */
    uint32_t n_choice, n_finished;
    bool stream; /* chunks */
} gw_grpc_vllm;

typedef struct gw_grpc_files {
    size_t sent; /* bytes */
} gw_grpc_files;

typedef struct gw_grpc_infer gw_grpc_infer;
typedef struct gw_grpc_kserve {
    LIST_HEAD(, gw_grpc_infer) infers; /* requests that have not ended */
    bool half_closed;
} gw_grpc_kserve;

struct gw_grpc_call {
    TAILQ_ENTRY(gw_grpc_call) link;
    gw_grpc *grpc;
    pc_call *call;
    const gw_grpc_method *method;
    gw_visit *visit;
    bool has_headers;
    int code;          /* it was ended with; -1: not by us */
    gw_stream *stream; /* NULL: none, or it has ended */
    gw_seek *seek;     /* what the client comes back for is looked for */
    uint64_t skip;     /* messages, for Generate tokens, that the client has from before */
    uint64_t n_sent;   /* messages made, those included */
    bool resumable;    /* its streams go on for a while if the client goes away */
    union {            /* by method */
        gw_grpc_chat chat;
        gw_grpc_generate generate;
        gw_grpc_json json;
        gw_grpc_watch watch;
        gw_grpc_vllm vllm;
        gw_grpc_files files;
        gw_grpc_kserve kserve;
    };
};

struct gw_grpc {
    gw_gateway *gateway;
    pc_rpc_server *server;
    pc_method methods[GW_GRPC_N_METHODS];
    TAILQ_HEAD(, gw_grpc_call) calls;
    pc_timer *poll; /* set while somebody watches */
    bool draining;
    bool closing; /* the server itself takes no more calls */
    gw_reflection *reflection;
    uint64_t vllm_received_us; /* since 1970; 0: no Generate yet */
    pc_fn drained;
    void *drained_arg;
    /* scratch of one call at a time */
    cm_arena arena; /* the request being answered */
    cm_bytes packed, text;
    ProtobufCMessageUnknownField text_field;
};

/* ---- grpc.c ---- */
/* A client that reads too slowly loses its stream and is told so. */
void gw_grpc_send(gw_grpc_call *call, const ProtobufCMessage *message);
/* An answer in one message, kept until now: several may end together, and that is no slow reader. */
void gw_grpc_send_whole(gw_grpc_call *call, const ProtobufCMessage *message);
/* gw_grpc_send, unless the client has it from before. */
void gw_grpc_send_new(gw_grpc_call *call, const ProtobufCMessage *message);
void gw_grpc_finish(gw_grpc_call *call); /* OK */
/* Ends whatever streams the call still has; their events stop. */
void gw_grpc_cancel(gw_grpc_call *call);
/* CM_E_INVALID unless it can be a request's id; field: what it is called. */
CM_MUST_CHECK cm_status gw_grpc_check_id(const char *field, const char *request_id, gw_error *error_out);
/* Who the request is: ask's origin is filled in, the caller's to release. routing may be NULL. options: what
 * another gateway must know besides the body; NULL: nothing. */
CM_MUST_CHECK cm_status gw_grpc_identify(gw_grpc_call *call, gw_ask *ask, const Baleen__V1__Routing *routing,
                                         const json_t *options, gw_error *error_out);
/* Opens one stream of a request, its events with ctx. ask's deadline is filled in here. A call of one request
 * tells its id in x-request-id. */
CM_MUST_CHECK cm_status gw_grpc_open_stream(gw_grpc_call *call, gw_ask *ask, const gw_stream_events *events,
                                            void *ctx, gw_stream **stream_out, gw_error *error_out);
/* Both for the only stream of a call: with the call as ctx, and failing the call. */
void gw_grpc_open(gw_grpc_call *call, gw_ask *ask, const Baleen__V1__Routing *routing, const json_t *options,
                  const gw_stream_events *events);
/* The client comes back and has so many messages (Generate: tokens): the method's resume follows, or the call
 * fails. */
void gw_grpc_seek(gw_grpc_call *call, const Baleen__V1__Routing *routing, uint64_t skip);
/* What resume does in the end; ask's kind and what depends on options are given. */
void gw_grpc_reopen(gw_grpc_call *call, gw_ask *ask, const gw_found *found, const gw_stream_events *events);
/* The failed event of every surface's stream. */
void gw_grpc_stream_failed(void *call, const gw_error *error);

/* ---- grpc_error.c ---- */
/* Ends the call with the error's code and sentence; details name the field and the time to retry. */
void gw_grpc_fail(gw_grpc_call *call, const gw_error *error);
/* A sentence may hold a client's words, cut anywhere: makes it UTF-8 again. */
void gw_grpc_clean(char *text, size_t cap);
/* Names a field anew when it stands in a table of [n] pairs of old and new names. */
void gw_grpc_rename_field(gw_error *error, const char *const names[][2], size_t n);
/* A field of a JSON body to the field of Chat, Generate and Tokenize that it came from. */
void gw_grpc_name_field(gw_error *error);

/* ---- grpc_text.c ---- */
/* Sets a string field from text of any bytes; at most one per message sent. */
void gw_grpc_put_text(gw_grpc *grpc, ProtobufCMessage *message, const char *field, const void *text,
                      size_t n_bytes);
/* Every string of a packed message is UTF-8 without U+0000. CM_E_INVALID names the field. */
CM_MUST_CHECK cm_status gw_grpc_check_strings(const ProtobufCMessageDescriptor *descriptor,
                                              const uint8_t *data, size_t n_bytes, gw_error *error_out);

/* ---- grpc_logprobs.c ---- */
/* A list of zeros is empty. The bytes of tokens stay the tokenizer's. */
void gw_grpc_logprobs_add(gw_grpc_logprobs *list, const gw_logprobs *logprobs);
void gw_grpc_logprobs_clear(gw_grpc_logprobs *list);
void gw_grpc_logprobs_fini(gw_grpc_logprobs *list);

/* ---- grpc_body.c ---- */
/* A list of ids is counted before it becomes JSON, which takes ten times its memory, and a second for the
 * longest that a message can hold. */
CM_MUST_CHECK cm_status gw_grpc_check_prompt(const gw_grpc_call *call, size_t n_ids, gw_error *error_out);
void gw_grpc_put_ids(json_t *body, const char *field, const uint32_t *ids, size_t n_ids);
/* Fields stop and stop_token_ids of a body; not those of which there are none, and no more than it takes for
 * too many to be refused. */
void gw_grpc_put_stops(json_t *body, char *const *stop, size_t n_stop, const uint32_t *ids, size_t n_ids);
/* JSON bodies for gw_stream_open; *body_out is a new reference. CM_E_INVALID, CM_E_UNSUPPORTED: error names
 * the proto's field. */
CM_MUST_CHECK cm_status gw_grpc_chat_body(const Baleen__V1__ChatRequest *request, json_t **body_out,
                                          gw_error *error_out);
CM_MUST_CHECK cm_status gw_grpc_generate_body(const Baleen__V1__GenerateRequest *request, json_t **body_out,
                                              gw_error *error_out);
/* A constraint from the text of a JSON schema; field: what it is called. */
CM_MUST_CHECK cm_status gw_grpc_put_schema(json_t *body, const char *field, const char *text,
                                           gw_error *error_out);
/* What of a Routing belongs into a body; replaces what is there. routing may be NULL. */
CM_MUST_CHECK cm_status gw_grpc_put_routing(json_t *body, const Baleen__V1__Routing *routing,
                                            gw_error *error_out);

/* ---- grpc_reflection.c ---- */
gw_reflection *gw_reflection_create(void);
void gw_reflection_destroy(gw_reflection *reflection);
void gw_grpc_reflect(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_grpc_reflect_drain(gw_grpc_call *call);

/* ---- the methods ---- */
void gw_grpc_chat_ask(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_grpc_chat_resume(gw_grpc_call *call, const gw_found *found);
void gw_grpc_chat_fini(gw_grpc_call *call);
void gw_grpc_json_ask(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_grpc_json_end_streams(gw_grpc_call *call, void (*end)(gw_stream *stream));
void gw_grpc_json_resume(gw_grpc_call *call, const gw_found *found);
void gw_grpc_json_fini(gw_grpc_call *call);
void gw_grpc_generate_ask(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_grpc_generate_resume(gw_grpc_call *call, const gw_found *found);
void gw_grpc_generate_fini(gw_grpc_call *call);
void gw_grpc_tokenize(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_grpc_detokenize(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_grpc_abort(gw_grpc_call *call, const ProtobufCMessage *request);
/* Ends the requests with these ids. CM_E_INVALID: there are too many of them. */
CM_MUST_CHECK cm_status gw_grpc_abort_ids(gw_grpc_call *call, char *const *ids, size_t n,
                                          uint32_t *aborted_out, gw_error *error_out);
/* A message, and the end. */
void gw_grpc_answer(gw_grpc_call *call, const ProtobufCMessage *message);
void gw_grpc_info(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_vllm_generate(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_vllm_end_streams(gw_grpc_call *call, void (*end)(gw_stream *stream));
void gw_vllm_generate_fini(gw_grpc_call *call);
void gw_vllm_name_field(gw_error *error);
void gw_vllm_unsupported(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_vllm_health_check(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_vllm_abort(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_vllm_model_info(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_vllm_server_info(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_vllm_loads(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_vllm_tokenizer(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_vllm_tokenizer_sent(gw_grpc_call *call);
void gw_kserve_live(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_kserve_ready(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_kserve_model_ready(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_kserve_server_metadata(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_kserve_model_metadata(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_kserve_model_config(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_kserve_index(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_kserve_infer(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_kserve_half_closed(gw_grpc_call *call);
void gw_kserve_drain(gw_grpc_call *call);
void gw_kserve_end_streams(gw_grpc_call *call, void (*end)(gw_stream *stream));
void gw_kserve_fini(gw_grpc_call *call);
void gw_grpc_health_check(gw_grpc_call *call, const ProtobufCMessage *request);
void gw_grpc_health_watch(gw_grpc_call *call, const ProtobufCMessage *request);
/* Tells watchers what has changed; ends them when draining. */
void gw_grpc_health_poll(void *grpc);

/* How events of a stream map to the proto. */
Baleen__V1__FinishReason gw_grpc_finish_reason(gw_reason reason);
Baleen__V1__Usage gw_grpc_usage(const gw_usage *usage);
