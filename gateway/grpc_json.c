/* ChatJson: the HTTP surface's body in, its objects out; n answers are n streams. */
#include <string.h>

#include "gateway/grpc_private.h"

enum { BODY_BYTES_MAX = 32 << 20 };

static void json_emit(void *ctx, const char *json, size_t n_bytes, bool last)
{
    Baleen__V1__ChatJsonChunk chunk = BALEEN__V1__CHAT_JSON_CHUNK__INIT;
    chunk.json = (ProtobufCBinaryData){.data = (uint8_t *)json, .len = n_bytes};
    chunk.has_last = last;
    chunk.last = last;
    gw_grpc_send(ctx, &chunk.base);
}

/* ---- the streams' events ----
 * Answers start, speak and finish in any order; the writer puts the choice's number into each object. */

static void json_started(void *ctx, const gw_start *start)
{
    const gw_grpc_json_choice *choice = ctx;
    gw_openai_events()->started(choice->writer, start);
}

static void json_piece(void *ctx, const md_piece *piece)
{
    const gw_grpc_json_choice *choice = ctx;
    gw_openai_events()->piece(choice->writer, piece);
}

static void json_tokens(void *ctx, uint64_t offset, const uint32_t *ids, uint32_t n)
{
    const gw_grpc_json_choice *choice = ctx;
    gw_openai_events()->tokens(choice->writer, offset, ids, n);
}

static void json_logprobs(void *ctx, const gw_logprobs *logprobs)
{
    const gw_grpc_json_choice *choice = ctx;
    gw_openai_events()->logprobs(choice->writer, logprobs);
}

static void json_flush(void *ctx)
{
    (void)ctx; /* every object has been sent */
}

static void json_finished(void *ctx, const gw_finish *finish)
{
    gw_grpc_json_choice *choice = ctx;
    gw_grpc_call *call = choice->call;
    choice->stream = NULL;
    gw_openai_events()->finished(choice->writer, finish);
    if (++call->json.n_finished == call->json.n_choice) {
        gw_grpc_finish(call);
    }
}

/* One that fails takes the others with it. */
static void json_failed(void *ctx, const gw_error *error)
{
    gw_grpc_json_choice *choice = ctx;
    choice->stream = NULL;
    gw_grpc_cancel(choice->call);
    gw_grpc_fail(choice->call, error);
}

/* ---- the request ---- */

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

/* The first answer has the request's id, the others have ids of their own. */
static cm_status open_choices(gw_grpc_call *call, gw_ask *ask, const Baleen__V1__Routing *routing,
                              gw_error *error_out)
{
    static const gw_stream_events events = {
        .started = json_started,
        .piece = json_piece,
        .tokens = json_tokens,
        .logprobs = json_logprobs,
        .flush = json_flush,
        .finished = json_finished,
        .failed = json_failed,
    };
    gw_grpc_json *json = &call->json;
    for (uint32_t i = 0; i < json->n_choice; i++) {
        gw_grpc_json_choice *choice = &json->choices[i];
        *choice = (gw_grpc_json_choice){.call = call, .writer = gw_openai_choice_of(json->writer, i)};
        ask->choice = i;
        CM_TRY(gw_grpc_open_stream(call, ask, i == 0 ? routing : NULL, &events, choice, &choice->stream,
                                   error_out));
    }
    return CM_OK;
}

void gw_grpc_json_ask(gw_grpc_call *call, const ProtobufCMessage *message)
{
    const Baleen__V1__ChatJsonRequest *request = (const Baleen__V1__ChatJsonRequest *)message;
    gw_grpc_json *json = &call->json;
    json_t *body;
    gw_error error;
    gw_info info;
    if (read_body(request, &body, &error) != CM_OK) {
        gw_grpc_fail(call, &error);
        return;
    }
    gw_gateway_info(call->grpc->gateway, &info);
    json->writer = gw_openai_create(GW_ASK_CHAT, body, info.fingerprint, json_emit, call);
    json->n_choice = gw_openai_choices(json->writer);
    json->choices = cm_alloc(sizeof(*json->choices) * json->n_choice);
    gw_ask ask = {.kind = GW_ASK_CHAT, .body = body, .choices_max = info.choices_max};
    if (open_choices(call, &ask, request->routing, &error) != CM_OK) {
        gw_grpc_cancel(call);
        gw_grpc_fail(call, &error);
    } else {
        json->id = cm_strdup(gw_stream_id(json->choices[0].stream));
        pc_call_add_header(call->call, "x-request-id", json->id);
    }
    json_decref(body);
}

void gw_grpc_json_cancel(gw_grpc_call *call)
{
    for (uint32_t i = 0; i < call->json.n_choice; i++) {
        gw_stream *stream = call->json.choices[i].stream;
        call->json.choices[i].stream = NULL;
        if (stream != NULL) {
            gw_stream_cancel(stream);
        }
    }
}

void gw_grpc_json_fini(gw_grpc_call *call)
{
    if (call->json.writer != NULL) {
        gw_openai_destroy(call->json.writer);
    }
    cm_free(call->json.choices);
    cm_free(call->json.id);
}

bool gw_grpc_json_abort(gw_grpc *grpc, const char *request_id)
{
    gw_grpc_call *call;
    TAILQ_FOREACH (call, &grpc->calls, link) {
        bool is_json = call->method->ask == gw_grpc_json_ask && call->json.id != NULL;
        if (is_json && strcmp(call->json.id, request_id) == 0) {
            for (uint32_t i = 0; i < call->json.n_choice; i++) {
                const gw_stream *stream = call->json.choices[i].stream;
                if (stream != NULL) {
                    return gw_stream_abort(grpc->gateway, gw_stream_id(stream));
                }
            }
        }
    }
    return false;
}
