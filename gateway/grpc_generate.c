/* Generate: text or ids in, ids out, with their text when asked for. */
#include "gateway/grpc_private.h"

static void generate_started(void *ctx, const gw_start *start)
{
    gw_grpc_call *call = ctx;
    Baleen__V1__GenerateStart out = BALEEN__V1__GENERATE_START__INIT;
    Baleen__V1__GenerateEvent event = BALEEN__V1__GENERATE_EVENT__INIT;
    out.request_id = (char *)start->request_id;
    out.prompt_tokens = start->prompt_tokens;
    out.has_cached_tokens = start->cached_tokens > 0;
    out.cached_tokens = start->cached_tokens;
    event.event_case = BALEEN__V1__GENERATE_EVENT__EVENT_START;
    event.start = &out;
    gw_grpc_send(call, &event.base);
}

/* The client of a resumed stream has the first skip tokens, with their text. */
static void generate_tokens(void *ctx, uint64_t offset, const uint32_t *ids, uint32_t n)
{
    gw_grpc_call *call = ctx;
    gw_grpc_generate *g = &call->generate;
    for (uint32_t i = 0; i < n; i++, offset++) {
        g->n_told = offset + 1;
        if (offset < call->skip) {
            g->offset = offset + 1;
            continue;
        }
        if (g->ids.n == 0) {
            g->offset = offset;
        }
        md_ids_push(&g->ids, ids[i]);
    }
}

/* Comes before its token. */
static void generate_logprobs(void *ctx, const gw_logprobs *logprobs)
{
    gw_grpc_call *call = ctx;
    if (call->generate.n_told >= call->skip) {
        gw_grpc_logprobs_add(&call->generate.logprobs, logprobs);
    }
}

/* Comes after its token, or at the end. */
static void generate_piece(void *ctx, const md_piece *piece)
{
    gw_grpc_call *call = ctx;
    gw_grpc_generate *g = &call->generate;
    if (g->return_text && (g->n_told > call->skip || gw_stream_is_ending(call->stream))) {
        cm_bytes_append(&g->text, piece->text, piece->n_bytes);
    }
}

/* Whatever has gathered. Text that comes after its ids have gone stands alone, at the offset of the next id.
 */
static void send_gathered(gw_grpc_call *call)
{
    gw_grpc_generate *g = &call->generate;
    Baleen__V1__GenerateTokens tokens = BALEEN__V1__GENERATE_TOKENS__INIT;
    Baleen__V1__GenerateEvent event = BALEEN__V1__GENERATE_EVENT__INIT;
    tokens.offset = g->offset;
    tokens.n_ids = g->ids.n;
    tokens.ids = g->ids.id;
    tokens.n_logprobs = g->logprobs.n;
    tokens.logprobs = g->logprobs.list;
    if (g->return_text && (g->whole || g->text.len > 0)) {
        gw_grpc_put_text(call->grpc, &tokens.base, "text", g->text.data, g->text.len);
    }
    event.event_case = BALEEN__V1__GENERATE_EVENT__EVENT_TOKENS;
    event.tokens = &tokens;
    gw_grpc_send(call, &event.base);
    g->offset += g->ids.n;
    g->ids.n = 0;
    gw_grpc_logprobs_clear(&g->logprobs);
    cm_bytes_clear(&g->text);
}

static void generate_flush(void *ctx)
{
    gw_grpc_call *call = ctx;
    gw_grpc_generate *g = &call->generate;
    if (!g->whole && (g->ids.n > 0 || g->text.len > 0)) {
        send_gathered(call);
    }
}

static void generate_finished(void *ctx, const gw_finish *finish)
{
    gw_grpc_call *call = ctx;
    Baleen__V1__Usage usage = gw_grpc_usage(&finish->usage);
    Baleen__V1__GenerateFinish out = BALEEN__V1__GENERATE_FINISH__INIT;
    Baleen__V1__GenerateEvent event = BALEEN__V1__GENERATE_EVENT__INIT;
    call->stream = NULL;
    generate_flush(call);
    if (call->generate.whole) {
        send_gathered(call);
    }
    out.reason = gw_grpc_finish_reason(finish->reason);
    out.stop_string = (char *)finish->stop_string;
    out.has_stop_token_id = finish->stop_id >= 0;
    out.stop_token_id = out.has_stop_token_id ? (uint32_t)finish->stop_id : 0;
    out.usage = &usage;
    event.event_case = BALEEN__V1__GENERATE_EVENT__EVENT_FINISH;
    event.finish = &out;
    gw_grpc_send(call, &event.base);
    gw_grpc_finish(call);
}

static const gw_stream_events GENERATE_EVENTS = {
    .started = generate_started,
    .piece = generate_piece,
    .tokens = generate_tokens,
    .logprobs = generate_logprobs,
    .flush = generate_flush,
    .finished = generate_finished,
    .failed = gw_grpc_stream_failed,
};

void gw_grpc_generate_ask(gw_grpc_call *call, const ProtobufCMessage *message)
{
    const Baleen__V1__GenerateRequest *request = (const Baleen__V1__GenerateRequest *)message;
    gw_grpc_generate *g = &call->generate;
    json_t *body;
    gw_error error;
    if (request->has_resume_offset) {
        gw_grpc_seek(call, request->routing, request->resume_offset);
        return;
    }
    bool from_ids = request->prompt_case == BALEEN__V1__GENERATE_REQUEST__PROMPT_TOKENS;
    if (gw_grpc_check_prompt(call, from_ids ? request->tokens->n_ids : 0, &error) != CM_OK ||
        gw_grpc_generate_body(request, &body, &error) != CM_OK) {
        gw_grpc_fail(call, &error);
        return;
    }
    bool from_text = request->prompt_case == BALEEN__V1__GENERATE_REQUEST__PROMPT_TEXT;
    g->whole = request->has_stream && !request->stream;
    g->return_text = request->has_return_text ? request->return_text : from_text;
    gw_ask ask = {.kind = GW_ASK_COMPLETE,
                  .body = body,
                  .want_ids = true,
                  .skip_special = !request->has_skip_special_tokens || request->skip_special_tokens};
    json_t *options = json_pack("{s:b, s:b, s:b}", "whole", g->whole, "return_text", g->return_text,
                                "skip_special", ask.skip_special);
    gw_grpc_open(call, &ask, request->routing, options, &GENERATE_EVENTS);
    json_decref(options);
    json_decref(body);
}

void gw_grpc_generate_resume(gw_grpc_call *call, const gw_found *found)
{
    gw_grpc_generate *g = &call->generate;
    g->whole = json_is_true(json_object_get(found->options, "whole"));
    g->return_text = json_is_true(json_object_get(found->options, "return_text"));
    gw_ask ask = {.kind = GW_ASK_COMPLETE,
                  .want_ids = true,
                  .skip_special = json_is_true(json_object_get(found->options, "skip_special"))};
    gw_grpc_reopen(call, &ask, found, &GENERATE_EVENTS);
}

void gw_grpc_generate_fini(gw_grpc_call *call)
{
    md_ids_fini(&call->generate.ids);
    cm_bytes_fini(&call->generate.text);
    gw_grpc_logprobs_fini(&call->generate.logprobs);
}
