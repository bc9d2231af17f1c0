/* Methods, calls from their request to their end, drain. */
#include "gateway/grpc.h"

#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/log.h"
#include "gateway/grpc_private.h"
#include "gateway/kserve.h"

enum {
    REQUEST_BYTES_MAX = 64 << 20,
    ARENA_CHUNK_BYTES = 64 << 10,
    ARENA_BYTES_MAX = 256 << 20, /* small parts grow when they are unpacked: this bounds their number */
    CALLS_MAX = 70000, /* above any number of streams that a gateway lets in: it refuses, with details */
    SCRATCH_BYTES_MAX = 1 << 20, /* kept between messages */
    DRAIN_RETRY_MS = 1000,
    QUEUE_BYTES_MAX = 1 << 20, /* unsent bytes of one call; more, and its client reads too slowly */
};

const gw_grpc_method gw_grpc_methods[GW_GRPC_N_METHODS] = {
    {.path = "/baleen.v1.Inference/Chat",
     .request = &baleen__v1__chat_request__descriptor,
     .ask = gw_grpc_chat_ask,
     .resume = gw_grpc_chat_resume,
     .surface = "grpc chat",
     .fini = gw_grpc_chat_fini,
     .name_field = gw_grpc_name_field},
    {.path = "/baleen.v1.Inference/ChatJson",
     .request = &baleen__v1__chat_json_request__descriptor,
     .ask = gw_grpc_json_ask,
     .end_streams = gw_grpc_json_end_streams,
     .resume = gw_grpc_json_resume,
     .surface = "grpc json",
     .fini = gw_grpc_json_fini},
    {.path = "/baleen.v1.Inference/Generate",
     .request = &baleen__v1__generate_request__descriptor,
     .ask = gw_grpc_generate_ask,
     .resume = gw_grpc_generate_resume,
     .surface = "grpc generate",
     .fini = gw_grpc_generate_fini,
     .name_field = gw_grpc_name_field},
    {.path = "/baleen.v1.Inference/Tokenize",
     .request = &baleen__v1__tokenize_request__descriptor,
     .ask = gw_grpc_tokenize,
     .name_field = gw_grpc_name_field},
    {.path = "/baleen.v1.Inference/Detokenize",
     .request = &baleen__v1__detokenize_request__descriptor,
     .ask = gw_grpc_detokenize,
     .name_field = gw_grpc_name_field},
    {.path = "/baleen.v1.Inference/Abort",
     .request = &baleen__v1__abort_request__descriptor,
     .ask = gw_grpc_abort},
    {.path = "/baleen.v1.Inference/Info",
     .request = &baleen__v1__info_request__descriptor,
     .ask = gw_grpc_info},
    {.path = "/grpc.health.v1.Health/Check",
     .request = &grpc__health__v1__health_check_request__descriptor,
     .ask = gw_grpc_health_check,
     .health = true},
    {.path = "/grpc.health.v1.Health/Watch",
     .request = &grpc__health__v1__health_check_request__descriptor,
     .ask = gw_grpc_health_watch,
     .health = true},
    {.path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
     .request = &grpc__reflection__v1__server_reflection_request__descriptor,
     .ask = gw_grpc_reflect,
     .client_streams = true,
     .half_closed = gw_grpc_finish,
     .drain = gw_grpc_reflect_drain},
    {.path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
     .request = &grpc__reflection__v1__server_reflection_request__descriptor,
     .ask = gw_grpc_reflect,
     .client_streams = true,
     .half_closed = gw_grpc_finish,
     .drain = gw_grpc_reflect_drain},
    {.path = "/vllm.grpc.engine.VllmEngine/Generate",
     .request = &vllm__grpc__engine__generate_request__descriptor,
     .ask = gw_vllm_generate,
     .end_streams = gw_vllm_end_streams,
     .fini = gw_vllm_generate_fini,
     .name_field = gw_vllm_name_field},
    {.path = "/vllm.grpc.engine.VllmEngine/Embed",
     .request = &vllm__grpc__engine__embed_request__descriptor,
     .ask = gw_vllm_unsupported},
    {.path = "/vllm.grpc.engine.VllmEngine/HealthCheck",
     .request = &vllm__grpc__engine__health_check_request__descriptor,
     .ask = gw_vllm_health_check,
     .health = true},
    {.path = "/vllm.grpc.engine.VllmEngine/Abort",
     .request = &vllm__grpc__engine__abort_request__descriptor,
     .ask = gw_vllm_abort},
    {.path = "/vllm.grpc.engine.VllmEngine/GetModelInfo",
     .request = &vllm__grpc__engine__get_model_info_request__descriptor,
     .ask = gw_vllm_model_info},
    {.path = "/vllm.grpc.engine.VllmEngine/GetServerInfo",
     .request = &vllm__grpc__engine__get_server_info_request__descriptor,
     .ask = gw_vllm_server_info},
    {.path = "/vllm.grpc.engine.VllmEngine/GetLoads",
     .request = &vllm__grpc__engine__get_loads_request__descriptor,
     .ask = gw_vllm_loads},
    {.path = "/vllm.grpc.engine.VllmEngine/GetTokenizer",
     .request = &smg__grpc__common__get_tokenizer_request__descriptor,
     .ask = gw_vllm_tokenizer,
     .sent = gw_vllm_tokenizer_sent},
    {.path = "/vllm.grpc.engine.VllmEngine/SubscribeKvEvents",
     .request = &smg__grpc__common__subscribe_kv_events_request__descriptor,
     .ask = gw_vllm_unsupported},
    {.path = "/inference.GRPCInferenceService/ServerLive",
     .request = &inference__server_live_request__descriptor,
     .ask = gw_kserve_live,
     .health = true},
    {.path = "/inference.GRPCInferenceService/ServerReady",
     .request = &inference__server_ready_request__descriptor,
     .ask = gw_kserve_ready,
     .health = true},
    {.path = "/inference.GRPCInferenceService/ModelReady",
     .request = &inference__model_ready_request__descriptor,
     .ask = gw_kserve_model_ready,
     .health = true},
    {.path = "/inference.GRPCInferenceService/ServerMetadata",
     .request = &inference__server_metadata_request__descriptor,
     .ask = gw_kserve_server_metadata},
    {.path = "/inference.GRPCInferenceService/ModelMetadata",
     .request = &inference__model_metadata_request__descriptor,
     .ask = gw_kserve_model_metadata},
    {.path = "/inference.GRPCInferenceService/ModelConfig",
     .request = &inference__model_config_request__descriptor,
     .ask = gw_kserve_model_config},
    {.path = "/inference.GRPCInferenceService/RepositoryIndex",
     .request = &inference__repository_index_request__descriptor,
     .ask = gw_kserve_index},
    {.path = "/inference.GRPCInferenceService/ModelInfer",
     .request = &inference__model_infer_request__descriptor,
     .ask = gw_kserve_infer,
     .name_field = gw_kserve_name_field,
     .end_streams = gw_kserve_end_streams,
     .fini = gw_kserve_fini},
    {.path = "/inference.GRPCInferenceService/ModelStreamInfer",
     .request = &inference__model_infer_request__descriptor,
     .ask = gw_kserve_infer,
     .client_streams = true,
     .half_closed = gw_kserve_half_closed,
     .drain = gw_kserve_drain,
     .end_streams = gw_kserve_end_streams,
     .fini = gw_kserve_fini},
};

/* ---- what is sent ---- */

static void end_streams(gw_grpc_call *call, void (*end)(gw_stream *stream))
{
    if (call->stream != NULL) {
        end(call->stream);
        call->stream = NULL;
    }
    if (call->method->end_streams != NULL) {
        call->method->end_streams(call, end);
    }
}

void gw_grpc_cancel(gw_grpc_call *call)
{
    end_streams(call, gw_stream_cancel);
}

static void drop_slow_reader(gw_grpc_call *call)
{
    gw_error error;
    uint64_t n = pc_call_queued_bytes(call->call);
    cm_warn("a gRPC client has not read %llu bytes of its answer: ended", (unsigned long long)n);
    gw_grpc_cancel(call);
    gw_error_set(&error, GW_CAUSE_SLOW_READER, NULL,
                 "the client reads too slowly: %llu bytes of the answer were waiting to be read",
                 (unsigned long long)n);
    gw_grpc_fail(call, &error);
}

void gw_grpc_send_new(gw_grpc_call *call, const ProtobufCMessage *message)
{
    if (++call->n_sent > call->skip) {
        gw_grpc_send(call, message);
    }
}

/* With the first message: a call that fails before it has none, so that gRPC's own retry policies may try it
 * again. */
static void add_headers(gw_grpc_call *call)
{
    if (!call->has_headers) {
        call->has_headers = true;
        pc_call_add_header(call->call, "x-request-id", call->visit->id);
        pc_call_add_header(call->call, "traceparent", call->visit->traceparent);
    }
}

void gw_grpc_send(gw_grpc_call *call, const ProtobufCMessage *message)
{
    cm_bytes *packed = &call->grpc->packed;
    add_headers(call);
    cm_bytes_clear(packed);
    pr_pack(message, packed);
    cm_status status = pc_call_send(call->call, cm_bytes_text(packed), packed->len);
    if (packed->cap > SCRATCH_BYTES_MAX) {
        cm_bytes_fini(packed);
        cm_bytes_fini(&call->grpc->text);
    }
    if (status == CM_AGAIN) {
        drop_slow_reader(call);
    }
    /* any other: the call is over, closed is on its way */
}

void gw_grpc_finish(gw_grpc_call *call)
{
    call->code = PC_CODE_OK;
    pc_call_finish(call->call, PC_CODE_OK, NULL, NULL, 0, 0);
}

void gw_grpc_answer(gw_grpc_call *call, const ProtobufCMessage *message)
{
    gw_grpc_send(call, message);
    gw_grpc_finish(call);
}

/* ---- streams of calls ---- */

static bool is_request_id(const char *id)
{
    size_t n = strspn(id, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.:-");
    return id[n] == 0 && n >= 1 && n <= 128;
}

cm_status gw_grpc_check_id(const char *field, const char *request_id, gw_error *error_out)
{
    if (is_request_id(request_id)) {
        return CM_OK;
    }
    gw_error_set(error_out, GW_CAUSE_INVALID, field,
                 "%s must have 1 to 128 characters of A-Z, a-z, 0-9, _ . : -", field);
    return CM_E_INVALID;
}

cm_status gw_grpc_identify(gw_grpc_call *call, gw_ask *ask, const Baleen__V1__Routing *routing,
                           const json_t *options, gw_error *error_out)
{
    const char *request_id = routing != NULL ? routing->request_id : NULL;
    if (request_id != NULL) {
        CM_TRY(gw_grpc_check_id("routing.request_id", request_id, error_out));
    }
    call->resumable = routing != NULL && routing->resumable;
    ask->origin = gw_origin_create(ask->kind, request_id, call->method->surface, ask->body, options);
    return CM_OK;
}

cm_status gw_grpc_open_stream(gw_grpc_call *call, gw_ask *ask, const gw_stream_events *events, void *ctx,
                              gw_stream **stream_out, gw_error *error_out)
{
    ask->deadline_ms = pc_call_deadline_ms(call->call);
    if (ask->deadline_ms == 0) {
        gw_error_set(error_out, GW_CAUSE_DEADLINE, NULL,
                     "the deadline of the request passed before it was begun");
        return CM_E_DEADLINE;
    }
    ask->visit = call->visit;
    CM_TRY(gw_stream_open(call->grpc->gateway, ask, events, ctx, stream_out, error_out));
    if (ask->choice == 0 && !call->method->client_streams) {
        snprintf(call->visit->id, sizeof(call->visit->id), "%s", gw_stream_id(*stream_out));
    }
    return CM_OK;
}

void gw_grpc_open(gw_grpc_call *call, gw_ask *ask, const Baleen__V1__Routing *routing, const json_t *options,
                  const gw_stream_events *events)
{
    gw_error error;
    cm_status status = gw_grpc_identify(call, ask, routing, options, &error);
    if (status == CM_OK) {
        status = gw_grpc_open_stream(call, ask, events, call, &call->stream, &error);
        gw_origin_release(ask->origin);
    }
    if (status != CM_OK) {
        gw_grpc_fail(call, &error);
    }
}

static void on_found(void *ctx, const gw_found *found, const gw_error *error)
{
    gw_grpc_call *call = ctx;
    gw_error wrong;
    call->seek = NULL;
    if (error == NULL && strcmp(found->surface, call->method->surface) != 0) {
        gw_error_set(&wrong, GW_CAUSE_NO_STREAM, "routing.request_id",
                     "the request '%.140s' was not begun by this method", gw_origin_id(found->origin));
        error = &wrong;
    }
    if (error != NULL) {
        gw_grpc_fail(call, error);
    } else {
        call->method->resume(call, found);
    }
}

void gw_grpc_seek(gw_grpc_call *call, const Baleen__V1__Routing *routing, uint64_t skip)
{
    gw_error error;
    const char *request_id = routing != NULL && routing->request_id != NULL ? routing->request_id : "";
    if (gw_grpc_check_id("routing.request_id", request_id, &error) != CM_OK) {
        gw_grpc_fail(call, &error);
        return;
    }
    call->skip = skip;
    call->resumable = routing->resumable;
    call->seek = gw_seek_begin(call->grpc->gateway, call->visit->tenant, request_id, on_found, call);
}

void gw_grpc_reopen(gw_grpc_call *call, gw_ask *ask, const gw_found *found, const gw_stream_events *events)
{
    gw_error error;
    ask->body = found->body;
    ask->origin = found->origin;
    ask->router = found->router[0];
    if (gw_grpc_open_stream(call, ask, events, call, &call->stream, &error) != CM_OK) {
        gw_grpc_fail(call, &error);
    }
}

void gw_grpc_stream_failed(void *ctx, const gw_error *error)
{
    gw_grpc_call *call = ctx;
    call->stream = NULL;
    gw_grpc_fail(call, error);
}

Baleen__V1__FinishReason gw_grpc_finish_reason(gw_reason reason)
{
    switch (reason) {
    case GW_REASON_STOP:
        return BALEEN__V1__FINISH_REASON__FINISH_STOP;
    case GW_REASON_LENGTH:
        return BALEEN__V1__FINISH_REASON__FINISH_LENGTH;
    case GW_REASON_TOOL_CALLS:
        return BALEEN__V1__FINISH_REASON__FINISH_TOOL_CALLS;
    }
    return BALEEN__V1__FINISH_REASON__FINISH_STOP;
}

Baleen__V1__Usage gw_grpc_usage(const gw_usage *usage)
{
    Baleen__V1__Usage out = BALEEN__V1__USAGE__INIT;
    out.has_prompt_tokens = out.has_cached_tokens = out.has_completion_tokens = out.has_reasoning_tokens =
        true;
    out.has_queue_ms = out.has_first_token_ms = out.has_total_ms = true;
    out.prompt_tokens = usage->prompt_tokens;
    out.cached_tokens = usage->cached_tokens;
    out.completion_tokens = usage->completion_tokens;
    out.reasoning_tokens = usage->reasoning_tokens;
    out.queue_ms = usage->queue_ms;
    out.first_token_ms = usage->first_token_ms;
    out.total_ms = usage->total_ms;
    return out;
}

/* ---- a call ---- */

static cm_status unpack(gw_grpc_call *call, const uint8_t *data, size_t n_bytes,
                        ProtobufCMessage **request_out, gw_error *error_out)
{
    const gw_grpc_method *method = call->method;
    cm_status status = pr_unpack(method->request, data, n_bytes, &call->grpc->arena, request_out);
    if (status == CM_E_TOO_LONG) {
        gw_error_set(error_out, GW_CAUSE_TOO_LARGE, NULL,
                     "the request has too many parts: unpacked it is above %d MiB", ARENA_BYTES_MAX >> 20);
        return status;
    }
    if (status != CM_OK) {
        gw_error_set(error_out, GW_CAUSE_INVALID, NULL,
                     "the request is no %s, or a required field is missing", method->request->short_name);
        return status;
    }
    return gw_grpc_check_strings(method->request, data, n_bytes, error_out);
}

/* first: of the call's messages; one that has begun goes on. */
static cm_status call_begin(gw_grpc_call *call, bool first, const uint8_t *data, size_t n_bytes,
                            ProtobufCMessage **request_out, gw_error *error_out)
{
    if (call->grpc->draining && first && !call->method->health) {
        gw_error_set(error_out, GW_CAUSE_UNAVAILABLE, NULL,
                     "this gateway is shutting down; please try again");
        error_out->retry_ms = DRAIN_RETRY_MS;
        return CM_E_UNAVAILABLE;
    }
    if (first && !call->method->health) {
        CM_TRY(gw_gateway_identify(call->grpc->gateway, pc_call_metadata(call->call, "authorization"),
                                   pc_call_metadata(call->call, "x-api-key"), &call->visit->tenant,
                                   error_out));
    }
    return unpack(call, data, n_bytes, request_out, error_out);
}

static gw_grpc_call *call_make(pc_call *rpc)
{
    gw_grpc *grpc = pc_call_ctx(rpc);
    gw_grpc_call *call = cm_alloc(sizeof(*call));
    call->grpc = grpc;
    call->call = rpc;
    call->method = &gw_grpc_methods[pc_call_method(rpc) - grpc->methods];
    call->code = -1;
    call->visit = gw_visit_begin(call->method->path, NULL, pc_call_metadata(rpc, "traceparent"));
    call->visit->quiet = call->method->health;
    pc_call_set_user(rpc, call);
    TAILQ_INSERT_TAIL(&grpc->calls, call, link);
    return call;
}

static void call_message(pc_call *rpc, const uint8_t *data, size_t n_bytes)
{
    gw_grpc_call *call = pc_call_user(rpc);
    ProtobufCMessage *request;
    gw_error error;
    bool first = call == NULL;
    if (first) {
        call = call_make(rpc);
    }
    if (call_begin(call, first, data, n_bytes, &request, &error) == CM_OK) {
        call->method->ask(call, request);
    } else {
        gw_grpc_fail(call, &error);
    }
    cm_arena_reset(&call->grpc->arena);
}

static void call_half_closed(pc_call *rpc)
{
    gw_grpc_call *call = pc_call_user(rpc);
    call = call != NULL ? call : call_make(rpc);
    call->method->half_closed(call);
}

static void call_sent(pc_call *rpc)
{
    gw_grpc_call *call = pc_call_user(rpc);
    call->method->sent(call);
}

static void drain_check(gw_grpc *grpc)
{
    if (grpc->draining && !grpc->closing && TAILQ_EMPTY(&grpc->calls)) {
        grpc->closing = true;
        pc_rpc_server_drain(grpc->server, grpc->drained, grpc->drained_arg);
    }
}

static void call_closed(pc_call *rpc, bool cancelled)
{
    gw_grpc_call *call = pc_call_user(rpc);
    gw_grpc *grpc = call->grpc;
    if (call->seek != NULL) {
        gw_seek_cancel(call->seek);
    }
    end_streams(call, call->resumable ? gw_stream_detach : gw_stream_cancel);
    if (call->method->fini != NULL) {
        call->method->fini(call);
    }
    gw_visit_end(call->visit, cancelled || call->code < 0 ? PC_CODE_CANCELLED : call->code);
    TAILQ_REMOVE(&grpc->calls, call, link);
    cm_free(call);
    drain_check(grpc);
}

/* ---- the surface ---- */

static void grpc_free(gw_grpc *grpc)
{
    pc_timer_destroy(grpc->poll);
    gw_reflection_destroy(grpc->reflection);
    cm_bytes_fini(&grpc->text);
    cm_bytes_fini(&grpc->packed);
    cm_arena_fini(&grpc->arena);
    cm_free(grpc);
}

cm_status gw_grpc_create(gw_gateway *gateway, pc_loop *loop, const char *address, pc_serve_tls *tls,
                         gw_grpc **grpc_out, char bound_out[128], cm_error *err)
{
    gw_grpc *grpc = cm_alloc(sizeof(*grpc));
    grpc->gateway = gateway;
    TAILQ_INIT(&grpc->calls);
    cm_arena_init(&grpc->arena, "grpc request", ARENA_CHUNK_BYTES, ARENA_BYTES_MAX);
    cm_bytes_init(&grpc->packed, 0);
    cm_bytes_init(&grpc->text, 0);
    grpc->poll = pc_timer_create(loop, gw_grpc_health_poll, grpc);
    grpc->reflection = gw_reflection_create();
    for (uint32_t i = 0; i < GW_GRPC_N_METHODS; i++) {
        const gw_grpc_method *method = &gw_grpc_methods[i];
        grpc->methods[i] = (pc_method){.path = method->path,
                                       .message = call_message,
                                       .client_streams = method->client_streams,
                                       .half_closed = method->client_streams ? call_half_closed : NULL,
                                       .sent = method->sent != NULL ? call_sent : NULL,
                                       .closed = call_closed};
    }
    pc_rpc_options options = {.address = address,
                              .serve_tls = tls,
                              .request_bytes_max = REQUEST_BYTES_MAX,
                              .calls_max = CALLS_MAX,
                              .queue_bytes_max = QUEUE_BYTES_MAX,
                              .ctx = grpc};
    cm_status status =
        pc_rpc_server_create(loop, &options, grpc->methods, GW_GRPC_N_METHODS, &grpc->server, bound_out, err);
    if (status != CM_OK) {
        grpc_free(grpc);
        return status;
    }
    *grpc_out = grpc;
    return CM_OK;
}

/* Calls that may wait for their clients' next words for ever. They close later, as events. */
static void drain_idle(gw_grpc *grpc)
{
    gw_grpc_call *call;
    TAILQ_FOREACH (call, &grpc->calls, link) {
        if (call->method->drain != NULL) {
            call->method->drain(call);
        }
    }
}

/* The server goes on taking calls until the last of ours has ended, so that health checks are answered
 * meanwhile. */
void gw_grpc_drain(gw_grpc *grpc, pc_fn done, void *arg)
{
    CM_ASSERT(!grpc->draining);
    grpc->draining = true;
    grpc->drained = done;
    grpc->drained_arg = arg;
    gw_grpc_health_poll(grpc);
    drain_idle(grpc);
    drain_check(grpc);
}

void gw_grpc_destroy(gw_grpc *grpc)
{
    grpc->closing = true;
    pc_rpc_server_destroy(grpc->server);
    CM_ASSERT(TAILQ_EMPTY(&grpc->calls));
    grpc_free(grpc);
}
