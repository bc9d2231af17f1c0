/* Frames of routers to events of streams. */
#include "common/base/clock.h"
#include "common/base/log.h"
#include "gateway/stream_private.h"

/* What clients are told of a probability of zero: a number that JSON has. */
static const float LOGPROB_LEAST = -9999.0f;

static void tell_piece(void *ctx, const md_piece *piece)
{
    gw_stream *stream = ctx;
    bool is_call = piece->kind == MD_PIECE_CALL || piece->kind == MD_PIECE_ARGS;
    if (is_call && piece->call > 0 && stream->request.one_call) {
        stream->has_enough = true;
    }
    if (!stream->over && !stream->has_enough) {
        stream->events.piece(stream->ctx, piece);
    }
}

static void tell_started(gw_stream *stream)
{
    gw_start start = {.usage = &stream->usage,
                      .request_id = gw_stream_id(stream),
                      .model = stream->gateway->model,
                      .created_s = gw_origin_created_s(stream->origin),
                      .prompt_tokens = (uint32_t)stream->core.prompt.n,
                      .thinking = stream->thinking};
    stream->accepted_ns = cm_now_ns();
    if (!stream->probe) {
        cm_stat_add(CM_STAT_prompt_tokens, (int64_t)start.prompt_tokens);
        gw_telemetry_used(stream->gateway->telemetry, stream->tenant, GW_USED_PROMPT_TOKENS,
                          start.prompt_tokens);
    }
    stream->events.started(stream->ctx, &start);
}

/* Of the router that gave the first token: one that goes on elsewhere was told what it cost. */
static void count_cached(gw_stream *stream, const Baleen__Engine__V1__SeqTokens *frame)
{
    uint32_t n_prompt = stream->usage.prompt_tokens;
    if (stream->usage.completion_tokens == 0) {
        stream->usage.cached_tokens = frame->cached < n_prompt ? frame->cached : n_prompt;
    }
}

static void count_id(gw_stream *stream, uint32_t id, bool was_reasoning)
{
    stream->usage.completion_tokens++;
    if (was_reasoning && id != md_tokenizer_control(stream->gateway->tokenizer, MD_CTL_THINK_END)) {
        stream->usage.reasoning_tokens++;
    }
    if (stream->probe) {
        return;
    }
    cm_stat_add(CM_STAT_generated_tokens, 1);
    if (stream->first_ns == 0) {
        stream->first_ns = cm_now_ns();
        double seconds = (double)(stream->first_ns - stream->received_ns) * 1e-9;
        cm_stat_observe(CM_STAT_first_token_seconds, seconds);
        gw_telemetry_observe(stream->gateway->telemetry, GW_SERIES_FIRST_TOKEN, seconds, 1);
    }
}

/* Tokens that came together share the time since those before them. */
static void count_step(gw_stream *stream, uint32_t n_id)
{
    gw_telemetry *telemetry = stream->gateway->telemetry;
    uint64_t now_ns = cm_now_ns();
    if (stream->probe) {
        return;
    }
    gw_telemetry_used(telemetry, stream->tenant, GW_USED_OUTPUT_TOKENS, n_id);
    if (stream->last_ns != 0) {
        gw_telemetry_observe(telemetry, GW_SERIES_INTER_TOKEN,
                             (double)(now_ns - stream->last_ns) * 1e-9 / n_id, n_id);
    }
    stream->last_ns = now_ns;
}

static gw_logprob make_logprob(const md_tokenizer *tokenizer, uint32_t id, float logprob)
{
    gw_logprob out = {.id = id, .logprob = logprob > LOGPROB_LEAST ? logprob : LOGPROB_LEAST};
    out.bytes = md_tokenizer_bytes(tokenizer, id, &out.n_bytes);
    return out;
}

static void tell_logprobs(gw_stream *stream, uint32_t id, const Baleen__Engine__V1__TokenLogprobs *in)
{
    const md_tokenizer *tokenizer = stream->gateway->tokenizer;
    bool reasoning = md_parser_in_reasoning(stream->parser);
    gw_logprob top[GW_CORE_TOP_MAX];
    for (size_t i = 0; i < in->n_top; i++) {
        top[i] = make_logprob(tokenizer, in->top_id[i], in->top[i]);
    }
    gw_logprobs out = {.token = make_logprob(tokenizer, id, in->token),
                       .top = top,
                       .n_top = (uint32_t)in->n_top,
                       .kind = reasoning ? MD_PIECE_REASONING : MD_PIECE_CONTENT,
                       .is_marker = reasoning && id == md_tokenizer_control(tokenizer, MD_CTL_THINK_END)};
    stream->events.logprobs(stream->ctx, &out);
}

/* logprobs: NULL when nobody asked. true: a stop string has matched. */
static bool tell_id(gw_stream *stream, uint64_t offset, uint32_t id,
                    const Baleen__Engine__V1__TokenLogprobs *logprobs)
{
    const md_tokenizer *tokenizer = stream->gateway->tokenizer;
    count_id(stream, id, md_parser_in_reasoning(stream->parser));
    if (logprobs != NULL) {
        tell_logprobs(stream, id, logprobs);
    }
    if (stream->over) {
        return false;
    }
    if (stream->want_ids) {
        stream->events.tokens(stream->ctx, offset, &id, 1);
    }
    if (stream->over) {
        return false;
    }
    if (stream->keep_special && md_tokenizer_is_special(tokenizer, id)) {
        size_t n;
        const char *text = (const char *)md_tokenizer_bytes(tokenizer, id, &n);
        return md_parser_push_text(stream->parser, text, n, tell_piece, stream);
    }
    return md_parser_push_id(stream->parser, tokenizer, id, tell_piece, stream);
}

static void fail_by_router(gw_stream *stream, const Baleen__Engine__V1__SeqTokens *frame)
{
    static const struct {
        cm_status status;
        gw_cause cause;
        uint32_t retry_ms;
    } known[] = {
        {CM_E_CAPACITY, GW_CAUSE_CAPACITY, GW_RETRY_MS},
        {CM_E_DEADLINE, GW_CAUSE_DEADLINE, 0},
        {CM_E_UNAVAILABLE, GW_CAUSE_UNAVAILABLE, GW_RETRY_MS},
        {CM_E_CANCELLED, GW_CAUSE_ABORTED, 0},
        {CM_E_TOO_LONG, GW_CAUSE_CONTEXT, 0},
        {CM_E_INVALID, GW_CAUSE_INVALID, 0},
        {CM_E_UNSUPPORTED, GW_CAUSE_UNSUPPORTED, 0},
    };
    cm_status status = frame->has_status ? (cm_status)frame->status : CM_E_IO;
    if (gw_stream_try_again(stream, status)) {
        return;
    }
    gw_cause cause = cm_status_scope(status) == CM_SCOPE_PEER ? GW_CAUSE_UNAVAILABLE : GW_CAUSE_INTERNAL;
    uint32_t retry_ms = cause == GW_CAUSE_UNAVAILABLE ? GW_RETRY_MS : 0;
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        if (known[i].status == status) {
            cause = known[i].cause;
            retry_ms = known[i].retry_ms;
        }
    }
    gw_error error;
    bool has_text = frame->text != NULL && frame->text[0] != 0;
    gw_error_set(&error, cause, NULL, "%s%s", has_text ? "" : "the router could not go on with it: ",
                 has_text ? frame->text : cm_status_text(status));
    error.retry_ms = retry_ms;
    gw_stream_fail(stream, &error);
}

static void fail_by_misfit(gw_stream *stream)
{
    gw_error error;
    gw_error_set(&error, GW_CAUSE_INTERNAL, NULL, "the router sent an answer that does not fit the request");
    gw_stream_fail(stream, &error);
}

static void end_by_router(gw_stream *stream, const Baleen__Engine__V1__SeqTokens *frame)
{
    stream->ending = true;
    md_parser_finish(stream->parser, tell_piece, stream);
    if (stream->over) {
        return;
    }
    bool stopped = frame->end == BALEEN__ENGINE__V1__SEQ_END__SEQ_STOP;
    bool by_caller = stopped && frame->has_stop_id && frame->stop_id != stream->gateway->geometry.eos_id;
    gw_reason reason = !stopped                              ? GW_REASON_LENGTH
                       : md_parser_calls(stream->parser) > 0 ? GW_REASON_TOOL_CALLS
                                                             : GW_REASON_STOP;
    gw_stream_finish(stream, reason, by_caller ? (int64_t)frame->stop_id : -1);
}

/* Every step may find the stream over: its handlers are the client's side. */
static void tell_news(gw_stream *stream, const gw_core_news *news, const Baleen__Engine__V1__SeqTokens *frame)
{
    bool matched = false;
    if (news->end != BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED) {
        gw_place_word(&stream->gateway->place, cm_now_ms(), &stream->spot, news->n_id > 0);
    }
    if (news->accepted) {
        tell_started(stream);
    }
    if (news->n_id > 0) {
        count_cached(stream, frame);
        count_step(stream, news->n_id);
    }
    for (uint32_t i = 0; i < news->n_id && !stream->over && !matched && !stream->has_enough; i++) {
        matched = tell_id(stream, news->offset + i, news->id[i],
                          frame->n_logprobs > 0 ? frame->logprobs[news->n_known + i] : NULL);
    }
    if (stream->over) {
        return;
    }
    if (matched || stream->has_enough) {
        gw_stream_finish(stream, matched ? GW_REASON_STOP : GW_REASON_TOOL_CALLS, -1);
    } else if (news->end == BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED) {
        fail_by_router(stream, frame);
    } else if (news->end == BALEEN__ENGINE__V1__SEQ_END__SEQ_FINISHED) {
        fail_by_misfit(stream); /* it was finished where a stop string matched, and here none does */
    } else if (news->end != BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON) {
        end_by_router(stream, frame);
    } else if (news->n_id > 0) {
        stream->events.flush(stream->ctx);
    }
}

static void take_frame(gw_stream *stream, const Baleen__Engine__V1__SeqTokens *frame)
{
    gw_core_news news;
    cm_error err;
    if (gw_core_take(&stream->core, frame, &news, &err) != CM_OK) {
        cm_error_log("router %u, stream %llu: %s", gw_router_member(stream->router),
                     (unsigned long long)stream->number, err.text);
        if (gw_stream_try_again(stream, CM_E_PROTOCOL)) {
            return;
        }
        fail_by_misfit(stream);
        return;
    }
    tell_news(stream, &news, frame);
}

void gw_streams_tokens(void *ctx, gw_router *router, const Baleen__Engine__V1__SeqTokens *seq)
{
    gw_gateway *gateway = ctx;
    gw_stream *stream = cm_map_get(&gateway->by_number, seq->stream);
    if (stream == NULL || stream->router != router) {
        return; /* cancelled: tokens were on their way */
    }
    gw_stream_hold(stream);
    take_frame(stream, seq);
    gw_stream_release(stream);
}
