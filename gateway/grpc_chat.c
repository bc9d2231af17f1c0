/* Chat: a typed request to a stream of typed events. */
#include <stdio.h>

#include "common/base/rng.h"
#include "gateway/grpc_private.h"

static void send_event(gw_grpc_call *call, Baleen__V1__ChatEvent *event)
{
    gw_grpc_send_new(call, &event->base);
}

static void chat_started(void *ctx, const gw_start *start)
{
    Baleen__V1__ChatStart out = BALEEN__V1__CHAT_START__INIT;
    Baleen__V1__ChatEvent event = BALEEN__V1__CHAT_EVENT__INIT;
    out.request_id = (char *)start->request_id;
    out.model = (char *)start->model;
    out.created_s = start->created_s;
    out.prompt_tokens = start->prompt_tokens;
    out.has_cached_tokens = start->cached_tokens > 0;
    out.cached_tokens = start->cached_tokens;
    event.event_case = BALEEN__V1__CHAT_EVENT__EVENT_START;
    event.start = &out;
    send_event(ctx, &event);
}

/* Takes along the ids and log-probabilities that came since the last delta. */
static void send_delta(gw_grpc_call *call, Baleen__V1__ChatDelta *delta)
{
    Baleen__V1__ChatEvent event = BALEEN__V1__CHAT_EVENT__INIT;
    delta->n_token_ids = call->chat.ids.n;
    delta->token_ids = call->chat.ids.id;
    delta->n_logprobs = call->chat.logprobs.n;
    delta->logprobs = call->chat.logprobs.list;
    event.event_case = BALEEN__V1__CHAT_EVENT__EVENT_DELTA;
    event.delta = delta;
    send_event(call, &event);
    call->chat.ids.n = 0;
    gw_grpc_logprobs_clear(&call->chat.logprobs);
}

static void send_text(gw_grpc_call *call, const char *field, const char *text, size_t n_bytes)
{
    Baleen__V1__ChatDelta delta = BALEEN__V1__CHAT_DELTA__INIT;
    gw_grpc_put_text(call->grpc, &delta.base, field, text, n_bytes);
    send_delta(call, &delta);
}

static void make_call_id(uint32_t index, char id_out[40])
{
    uint8_t b[12];
    cm_random_bytes(b, sizeof(b));
    int n = snprintf(id_out, 40, "call_%02u_", index % 100);
    for (size_t i = 0; i < sizeof(b); i++) {
        n += snprintf(id_out + n, (size_t)(40 - n), "%02x", b[i]);
    }
}

static void send_tool_call(gw_grpc_call *call, const md_piece *piece)
{
    char id[40];
    Baleen__V1__ChatDelta delta = BALEEN__V1__CHAT_DELTA__INIT;
    Baleen__V1__ToolCallDelta tool = BALEEN__V1__TOOL_CALL_DELTA__INIT;
    bool first = piece->kind == MD_PIECE_CALL;
    tool.index = piece->call;
    if (first) {
        make_call_id(piece->call, id);
        tool.id = id;
    }
    gw_grpc_put_text(call->grpc, &tool.base, first ? "name" : "arguments", piece->text, piece->n_bytes);
    delta.piece_case = BALEEN__V1__CHAT_DELTA__PIECE_TOOL_CALL;
    delta.tool_call = &tool;
    send_delta(call, &delta);
}

static void chat_piece(void *ctx, const md_piece *piece)
{
    switch (piece->kind) {
    case MD_PIECE_REASONING:
        send_text(ctx, "reasoning", piece->text, piece->n_bytes);
        break;
    case MD_PIECE_CONTENT:
        send_text(ctx, "content", piece->text, piece->n_bytes);
        break;
    case MD_PIECE_CALL:
    case MD_PIECE_ARGS:
        send_tool_call(ctx, piece);
        break;
    }
}

static void chat_tokens(void *ctx, uint64_t offset, const uint32_t *ids, uint32_t n)
{
    gw_grpc_call *call = ctx;
    (void)offset;
    for (uint32_t i = 0; i < n; i++) {
        md_ids_push(&call->chat.ids, ids[i]);
    }
}

static void chat_logprobs(void *ctx, const gw_logprobs *logprobs)
{
    gw_grpc_call *call = ctx;
    gw_grpc_logprobs_add(&call->chat.logprobs, logprobs);
}

static void chat_flush(void *ctx)
{
    (void)ctx; /* every piece has been sent */
}

static void chat_finished(void *ctx, const gw_finish *finish)
{
    gw_grpc_call *call = ctx;
    Baleen__V1__Usage usage = gw_grpc_usage(&finish->usage);
    Baleen__V1__ChatFinish out = BALEEN__V1__CHAT_FINISH__INIT;
    Baleen__V1__ChatEvent event = BALEEN__V1__CHAT_EVENT__INIT;
    call->stream = NULL;
    if (call->chat.ids.n > 0 || call->chat.logprobs.n > 0) {
        send_text(call, "content", "", 0); /* tokens that became no text, such as those of a stop string */
    }
    out.reason = gw_grpc_finish_reason(finish->reason);
    out.stop_string = (char *)finish->stop_string;
    out.has_stop_token_id = finish->stop_id >= 0;
    out.stop_token_id = out.has_stop_token_id ? (uint32_t)finish->stop_id : 0;
    out.usage = &usage;
    event.event_case = BALEEN__V1__CHAT_EVENT__EVENT_FINISH;
    event.finish = &out;
    send_event(call, &event);
    gw_grpc_finish(call);
}

static const gw_stream_events CHAT_EVENTS = {
    .started = chat_started,
    .piece = chat_piece,
    .tokens = chat_tokens,
    .logprobs = chat_logprobs,
    .flush = chat_flush,
    .finished = chat_finished,
    .failed = gw_grpc_stream_failed,
};

void gw_grpc_chat_ask(gw_grpc_call *call, const ProtobufCMessage *message)
{
    const Baleen__V1__ChatRequest *request = (const Baleen__V1__ChatRequest *)message;
    json_t *body;
    gw_error error;
    if (request->has_resume_offset) {
        gw_grpc_seek(call, request->routing, request->resume_offset);
        return;
    }
    if (gw_grpc_chat_body(request, &body, &error) != CM_OK) {
        gw_grpc_fail(call, &error);
        return;
    }
    gw_ask ask = {.kind = GW_ASK_CHAT,
                  .body = body,
                  .want_ids = request->has_return_token_ids && request->return_token_ids};
    json_t *options = json_pack("{s:b}", "want_ids", ask.want_ids);
    gw_grpc_open(call, &ask, request->routing, options, &CHAT_EVENTS);
    json_decref(options);
    json_decref(body);
}

void gw_grpc_chat_resume(gw_grpc_call *call, const gw_found *found)
{
    gw_ask ask = {.kind = GW_ASK_CHAT, .want_ids = json_is_true(json_object_get(found->options, "want_ids"))};
    gw_grpc_reopen(call, &ask, found, &CHAT_EVENTS);
}

void gw_grpc_chat_fini(gw_grpc_call *call)
{
    md_ids_fini(&call->chat.ids);
    gw_grpc_logprobs_fini(&call->chat.logprobs);
}
