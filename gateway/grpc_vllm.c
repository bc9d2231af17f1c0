/* VllmEngine.Generate: text or ids in, ids out, n answers as n streams. */
#include "gateway/grpc_vllm.h"

#include "common/base/clock.h"

struct gw_vllm_choice {
    gw_grpc_call *call;
    gw_stream *stream;     /* NULL: it has ended */
    const gw_usage *usage; /* the stream's, NULL: nobody counts */
    uint32_t index, prompt_tokens, cached_tokens;
    md_ids ids;                /* all that were generated */
    size_t n_sent;             /* of these, in chunks */
    gw_vllm_logprobs logprobs; /* not sent */
};

/* ---- the streams' events ---- */

static void vllm_started(void *ctx, const gw_start *start)
{
    gw_vllm_choice *choice = ctx;
    choice->usage = start->usage;
    choice->prompt_tokens = start->prompt_tokens;
    choice->cached_tokens = start->cached_tokens;
}

static void vllm_piece(void *ctx, const md_piece *piece)
{
    (void)ctx; /* clients make the text themselves */
    (void)piece;
}

static void vllm_tokens(void *ctx, uint64_t offset, const uint32_t *ids, uint32_t n)
{
    gw_vllm_choice *choice = ctx;
    (void)offset;
    if (choice->usage != NULL) {
        choice->cached_tokens = choice->usage->cached_tokens;
    }
    for (uint32_t i = 0; i < n; i++) {
        md_ids_push(&choice->ids, ids[i]);
    }
}

static void vllm_logprobs(void *ctx, const gw_logprobs *logprobs)
{
    gw_vllm_choice *choice = ctx;
    gw_vllm_logprobs_add(&choice->logprobs, logprobs);
}

/* What has come since the last chunk. */
static void send_chunk(gw_vllm_choice *choice)
{
    Vllm__Grpc__Engine__GenerateStreamChunk chunk = VLLM__GRPC__ENGINE__GENERATE_STREAM_CHUNK__INIT;
    Vllm__Grpc__Engine__GenerateResponse response = VLLM__GRPC__ENGINE__GENERATE_RESPONSE__INIT;
    if (!choice->call->vllm.stream || choice->n_sent == choice->ids.n) {
        return;
    }
    chunk.token_ids = choice->ids.id + choice->n_sent;
    chunk.n_token_ids = choice->ids.n - choice->n_sent;
    chunk.has_prompt_tokens = chunk.has_completion_tokens = chunk.has_cached_tokens = chunk.has_index = true;
    chunk.prompt_tokens = choice->prompt_tokens;
    chunk.completion_tokens = (uint32_t)choice->ids.n;
    chunk.cached_tokens = choice->cached_tokens;
    chunk.index = choice->index;
    if (choice->logprobs.n > 0) {
        chunk.output_logprobs = gw_vllm_logprobs_message(&choice->logprobs);
    }
    response.response_case = VLLM__GRPC__ENGINE__GENERATE_RESPONSE__RESPONSE_CHUNK;
    response.chunk = &chunk;
    choice->n_sent = choice->ids.n;
    gw_grpc_send(choice->call, &response.base);
    gw_vllm_logprobs_clear(&choice->logprobs);
}

static void vllm_flush(void *ctx)
{
    send_chunk(ctx);
}

/* finish: NULL when it was aborted. Ends the call after the last answer. */
static void send_complete(gw_vllm_choice *choice, const char *reason, const gw_finish *finish)
{
    Vllm__Grpc__Engine__GenerateComplete complete = VLLM__GRPC__ENGINE__GENERATE_COMPLETE__INIT;
    Vllm__Grpc__Engine__GenerateResponse response = VLLM__GRPC__ENGINE__GENERATE_RESPONSE__INIT;
    gw_grpc_vllm *vllm = &choice->call->vllm;
    send_chunk(choice);
    complete.output_ids = choice->ids.id;
    complete.n_output_ids = choice->ids.n;
    complete.finish_reason = (char *)(uintptr_t)reason;
    complete.has_prompt_tokens = complete.has_completion_tokens = complete.has_cached_tokens = true;
    complete.has_index = true;
    complete.prompt_tokens = choice->prompt_tokens;
    complete.completion_tokens = finish != NULL ? finish->usage.completion_tokens : (uint32_t)choice->ids.n;
    complete.cached_tokens = choice->cached_tokens;
    complete.index = choice->index;
    if (choice->logprobs.n > 0) {
        complete.output_logprobs = gw_vllm_logprobs_message(&choice->logprobs);
    }
    if (finish != NULL && finish->stop_string != NULL) {
        complete.matched_stop_case = VLLM__GRPC__ENGINE__GENERATE_COMPLETE__MATCHED_STOP_MATCHED_STOP_STR;
        complete.matched_stop_str = (char *)(uintptr_t)finish->stop_string;
    } else if (finish != NULL && finish->stop_id >= 0) {
        complete.matched_stop_case = VLLM__GRPC__ENGINE__GENERATE_COMPLETE__MATCHED_STOP_MATCHED_TOKEN_ID;
        complete.matched_token_id = (uint32_t)finish->stop_id;
    }
    response.response_case = VLLM__GRPC__ENGINE__GENERATE_RESPONSE__RESPONSE_COMPLETE;
    response.complete = &complete;
    gw_grpc_send_whole(choice->call, &response.base);
    if (++vllm->n_finished == vllm->n_choice) {
        gw_grpc_finish(choice->call);
    }
}

static void vllm_finished(void *ctx, const gw_finish *finish)
{
    gw_vllm_choice *choice = ctx;
    choice->stream = NULL;
    send_complete(choice, finish->reason == GW_REASON_LENGTH ? "length" : "stop", finish);
}

/* Every answer that has not ended is told so. */
static void abort_choices(gw_grpc_call *call, gw_vllm_choice *first)
{
    send_complete(first, "abort", NULL);
    for (uint32_t i = 0; i < call->vllm.n_choice; i++) {
        gw_vllm_choice *choice = &call->vllm.choices[i];
        gw_stream *stream = choice->stream;
        if (stream != NULL) {
            choice->stream = NULL;
            gw_stream_cancel(stream);
            send_complete(choice, "abort", NULL);
        }
    }
}

/* One that fails takes the others with it. */
static void vllm_failed(void *ctx, const gw_error *error)
{
    gw_vllm_choice *choice = ctx;
    gw_grpc_call *call = choice->call;
    choice->stream = NULL;
    if (error->cause == GW_CAUSE_ABORTED) {
        abort_choices(call, choice);
    } else {
        gw_grpc_cancel(call);
        gw_grpc_fail(call, error);
    }
}

/* ---- the request ---- */

static cm_status open_choices(gw_grpc_call *call, gw_ask *ask, gw_error *error_out)
{
    static const gw_stream_events events = {
        .started = vllm_started,
        .piece = vllm_piece,
        .tokens = vllm_tokens,
        .logprobs = vllm_logprobs,
        .flush = vllm_flush,
        .finished = vllm_finished,
        .failed = vllm_failed,
    };
    for (uint32_t i = 0; i < call->vllm.n_choice; i++) {
        gw_vllm_choice *choice = &call->vllm.choices[i];
        choice->call = call;
        choice->index = i;
        ask->choice = i;
        CM_TRY(gw_grpc_open_stream(call, ask, &events, choice, &choice->stream, error_out));
    }
    return CM_OK;
}

static cm_status begin(gw_grpc_call *call, const Vllm__Grpc__Engine__GenerateRequest *request,
                       const json_t *body, gw_error *error_out)
{
    gw_grpc_vllm *vllm = &call->vllm;
    const Vllm__Grpc__Engine__SamplingParams *s = request->sampling_params;
    const char *id = request->request_id != NULL && request->request_id[0] != 0 ? request->request_id : NULL;
    gw_info info;
    gw_gateway_info(call->grpc->gateway, &info);
    if (id != NULL) {
        CM_TRY(gw_grpc_check_id("request_id", id, error_out));
    }
    if (s != NULL && s->n > info.choices_max) {
        gw_error_set(error_out, GW_CAUSE_INVALID, "n", "n must not be above %u here: ask again for more",
                     info.choices_max);
        return CM_E_INVALID;
    }
    vllm->stream = request->stream;
    vllm->n_choice = s != NULL && s->n > 1 ? s->n : 1;
    vllm->choices = cm_alloc(sizeof(*vllm->choices) * vllm->n_choice);
    gw_ask ask = {.kind = GW_ASK_COMPLETE,
                  .body = body,
                  .origin = gw_origin_create(GW_ASK_COMPLETE, id, NULL, body, NULL),
                  .want_ids = true,
                  .skip_special = s != NULL && s->skip_special_tokens,
                  .choices_max = info.choices_max};
    cm_status status = open_choices(call, &ask, error_out);
    gw_origin_release(ask.origin);
    if (status != CM_OK) {
        gw_grpc_cancel(call);
    }
    return status;
}

void gw_vllm_generate(gw_grpc_call *call, const ProtobufCMessage *message)
{
    const Vllm__Grpc__Engine__GenerateRequest *request = (const Vllm__Grpc__Engine__GenerateRequest *)message;
    json_t *body;
    gw_error error;
    call->grpc->vllm_received_us = cm_wall_us();
    bool from_ids = request->input_case == VLLM__GRPC__ENGINE__GENERATE_REQUEST__INPUT_TOKENIZED;
    if (gw_grpc_check_prompt(call, from_ids ? request->tokenized->n_input_ids : 0, &error) != CM_OK ||
        gw_vllm_body(request, &body, &error) != CM_OK) {
        gw_grpc_fail(call, &error);
        return;
    }
    if (begin(call, request, body, &error) != CM_OK) {
        gw_grpc_fail(call, &error);
    }
    json_decref(body);
}

void gw_vllm_end_streams(gw_grpc_call *call, void (*end)(gw_stream *stream))
{
    for (uint32_t i = 0; i < call->vllm.n_choice; i++) {
        gw_stream *stream = call->vllm.choices[i].stream;
        call->vllm.choices[i].stream = NULL;
        if (stream != NULL) {
            end(stream);
        }
    }
}

void gw_vllm_generate_fini(gw_grpc_call *call)
{
    for (uint32_t i = 0; i < call->vllm.n_choice; i++) {
        md_ids_fini(&call->vllm.choices[i].ids);
        gw_vllm_logprobs_fini(&call->vllm.choices[i].logprobs);
    }
    cm_free(call->vllm.choices);
}
