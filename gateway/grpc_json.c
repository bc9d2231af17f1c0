/* ChatJson: the HTTP surface's body in, its objects out; n answers are n streams. */
#include "gateway/grpc_private.h"

enum { BODY_BYTES_MAX = 32 << 20 };

static void json_emit(void *ctx, uint32_t choice, const char *json, size_t n_bytes, bool last)
{
    Baleen__V1__ChatJsonChunk chunk = BALEEN__V1__CHAT_JSON_CHUNK__INIT;
    (void)choice; /* the object has its number */
    chunk.json = (ProtobufCBinaryData){.data = (uint8_t *)json, .len = n_bytes};
    chunk.has_last = last;
    chunk.last = last;
    gw_grpc_send_new(ctx, &chunk.base);
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

/* router: [n] who has its choices; NULL: nobody, it is a new one. */
static cm_status open_choices(gw_grpc_call *call, gw_ask *ask, const uint64_t *router, gw_error *error_out)
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
        ask->router = router != NULL ? router[i] : 0;
        CM_TRY(gw_grpc_open_stream(call, ask, &events, choice, &choice->stream, error_out));
    }
    return CM_OK;
}

/* ask's body and origin are given. */
static cm_status begin(gw_grpc_call *call, gw_ask *ask, const uint64_t *router, gw_error *error_out)
{
    gw_grpc_json *json = &call->json;
    gw_info info;
    gw_gateway_info(call->grpc->gateway, &info);
    json->writer = gw_openai_create(GW_ASK_CHAT, ask->body, info.fingerprint, json_emit, call);
    json->n_choice = gw_openai_choices(json->writer);
    json->choices = cm_alloc(sizeof(*json->choices) * json->n_choice);
    ask->choices_max = info.choices_max;
    cm_status status = open_choices(call, ask, router, error_out);
    if (status != CM_OK) {
        gw_grpc_cancel(call);
    }
    return status;
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
    gw_ask ask = {.kind = GW_ASK_CHAT, .body = body};
    cm_status status = gw_grpc_identify(call, &ask, request->routing, NULL, &error);
    if (status == CM_OK) {
        status = begin(call, &ask, NULL, &error);
        gw_origin_release(ask.origin);
    }
    if (status != CM_OK) {
        gw_grpc_fail(call, &error);
    }
    json_decref(body);
}

/* Messages of several answers mix anew each time: a count of all says nothing of where each stood. */
void gw_grpc_json_resume(gw_grpc_call *call, const gw_found *found)
{
    gw_error error;
    gw_ask ask = {.kind = GW_ASK_CHAT, .body = found->body, .origin = found->origin};
    if (found->n_router > 1 && call->skip > 0) {
        gw_error_set(&error, GW_CAUSE_UNSUPPORTED, "resume_offset",
                     "the request '%.140s' has %u answers (n), whose messages may mix differently: it is "
                     "resumed from its beginning only, with resume_offset 0",
                     gw_origin_id(found->origin), found->n_router);
        gw_grpc_fail(call, &error);
    } else if (begin(call, &ask, found->router, &error) != CM_OK) {
        gw_grpc_fail(call, &error);
    }
}

void gw_grpc_json_end_streams(gw_grpc_call *call, void (*end)(gw_stream *stream))
{
    for (uint32_t i = 0; i < call->json.n_choice; i++) {
        gw_stream *stream = call->json.choices[i].stream;
        call->json.choices[i].stream = NULL;
        if (stream != NULL) {
            end(stream);
        }
    }
}

void gw_grpc_json_fini(gw_grpc_call *call)
{
    if (call->json.writer != NULL) {
        gw_openai_destroy(call->json.writer);
    }
    cm_free(call->json.choices);
}
