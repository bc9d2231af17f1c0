/* ChatJson: the HTTP surface's body in, its objects out. */
#include "gateway/grpc_private.h"

enum { BODY_BYTES_MAX = 32 << 20 };

static void json_emit(void *ctx, uint32_t choice, const char *json, size_t n_bytes, bool last)
{
    Baleen__V1__ChatJsonChunk chunk = BALEEN__V1__CHAT_JSON_CHUNK__INIT;
    (void)choice; /* there is one */
    chunk.json = (ProtobufCBinaryData){.data = (uint8_t *)json, .len = n_bytes};
    chunk.has_last = last;
    chunk.last = last;
    gw_grpc_send_new(ctx, &chunk.base);
}

static void json_started(void *ctx, const gw_start *start)
{
    gw_grpc_call *call = ctx;
    gw_openai_events()->started(gw_openai_choice_of(call->writer, 0), start);
}

static void json_piece(void *ctx, const md_piece *piece)
{
    gw_grpc_call *call = ctx;
    gw_openai_events()->piece(gw_openai_choice_of(call->writer, 0), piece);
}

static void json_tokens(void *ctx, uint64_t offset, const uint32_t *ids, uint32_t n)
{
    gw_grpc_call *call = ctx;
    gw_openai_events()->tokens(gw_openai_choice_of(call->writer, 0), offset, ids, n);
}

static void json_logprobs(void *ctx, const gw_logprobs *logprobs)
{
    gw_grpc_call *call = ctx;
    gw_openai_events()->logprobs(gw_openai_choice_of(call->writer, 0), logprobs);
}

static void json_flush(void *ctx)
{
    (void)ctx; /* every object has been sent */
}

static void json_finished(void *ctx, const gw_finish *finish)
{
    gw_grpc_call *call = ctx;
    call->stream = NULL;
    gw_openai_events()->finished(gw_openai_choice_of(call->writer, 0), finish);
    gw_grpc_finish(call);
}

static cm_status read_body(const Baleen__V1__ChatJsonRequest *request, json_t **body_out, gw_error *error_out)
{
    json_error_t where;
    if (request->body.len > BODY_BYTES_MAX) {
        gw_error_set(error_out, GW_CAUSE_TOO_LARGE, "body", "body has %zu bytes, at most %d are accepted",
                     request->body.len, BODY_BYTES_MAX);
        return CM_E_TOO_LONG;
    }
    const char *text = request->body.len > 0 ? (const char *)request->body.data : "";
    json_t *body = json_loadb(text, request->body.len, JSON_ALLOW_NUL, &where);
    if (body == NULL) {
        gw_error_set(error_out, GW_CAUSE_BAD_JSON, "body", "body is not valid JSON: %s (line %d, column %d)",
                     where.text, where.line, where.column);
        return CM_E_INVALID;
    }
    if (!json_is_object(body)) {
        json_decref(body);
        gw_error_set(error_out, GW_CAUSE_INVALID, "body", "body must be a JSON object");
        return CM_E_INVALID;
    }
    cm_status status = gw_grpc_put_routing(body, request->routing, error_out);
    if (status != CM_OK) {
        json_decref(body);
        return status;
    }
    *body_out = body;
    return CM_OK;
}

static const gw_stream_events JSON_EVENTS = {
    .started = json_started,
    .piece = json_piece,
    .tokens = json_tokens,
    .logprobs = json_logprobs,
    .flush = json_flush,
    .finished = json_finished,
    .failed = gw_grpc_stream_failed,
};

static void make_writer(gw_grpc_call *call, const json_t *body)
{
    gw_info info;
    gw_gateway_info(call->grpc->gateway, &info);
    call->writer = gw_openai_create(GW_ASK_CHAT, body, info.fingerprint, json_emit, call);
}

void gw_grpc_json_ask(gw_grpc_call *call, const ProtobufCMessage *message)
{
    const Baleen__V1__ChatJsonRequest *request = (const Baleen__V1__ChatJsonRequest *)message;
    json_t *body;
    gw_error error;
    if (request->has_resume_offset) {
        gw_grpc_seek(call, request->routing, request->resume_offset);
        return;
    }
    if (read_body(request, &body, &error) != CM_OK) {
        gw_grpc_fail(call, &error);
        return;
    }
    make_writer(call, body);
    gw_ask ask = {.kind = GW_ASK_CHAT, .body = body};
    gw_grpc_open(call, &ask, request->routing, NULL, &JSON_EVENTS);
    json_decref(body);
}

void gw_grpc_json_resume(gw_grpc_call *call, const gw_found *found)
{
    gw_ask ask = {.kind = GW_ASK_CHAT};
    make_writer(call, found->body);
    gw_grpc_reopen(call, &ask, found, &JSON_EVENTS);
}

void gw_grpc_json_fini(gw_grpc_call *call)
{
    if (call->writer != NULL) {
        gw_openai_destroy(call->writer);
    }
}
