/* A stream's life: checked, encoded, opened at a router, ended. */
#include <stddef.h>
#include <string.h>
#include <xxhash.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "gateway/stream_private.h"
#include "proto/messages.h"

/* A deadline so far away is none. */
#define DEADLINE_MAX_MS (365ull * 24 * 3600 * 1000)

enum {
    REBIND_MS = 300, /* longer than a refused connection takes, shorter than anyone minds */
    LEAVE_MS = 5000,
    REOPENS_MAX = 32,
    DEATHS_MAX = 3, /* each of them costs every stream of a router a pause */
};

/* ---- ends ---- */

static void stream_free(gw_stream *stream)
{
    md_parser_destroy(stream->parser);
    if (stream->has_core) {
        gw_core_fini(&stream->core);
    }
    gw_request_free(&stream->request);
    gw_origin_release(stream->origin);
    if (stream->visit != NULL) {
        gw_visit_release(stream->visit);
    }
    cm_free(stream);
}

/* From here on nobody finds the stream; its memory stays until the last release. */
static void stream_detach(gw_stream *stream)
{
    gw_gateway *gateway = stream->gateway;
    CM_ASSERT(!stream->over);
    stream->over = true;
    TAILQ_REMOVE(&gateway->streams, stream, link);
    CM_ASSERT(stream->router == NULL && stream->spot.state == GW_SPOT_NONE);
    if (stream->encode != NULL) {
        gw_encode_forget(stream->encode);
    }
    pc_timer_destroy(stream->deadline);
    stream->deadline = NULL;
    gw_turns_end(&gateway->turns, cm_now_ms(), &stream->turn, stream->usage.completion_tokens);
    if (!stream->probe) {
        gateway->n_streams--;
        cm_stat_add(CM_STAT_ledger_streams, -1);
    }
}

void gw_stream_hold(gw_stream *stream)
{
    stream->n_holds++;
}

void gw_stream_release(gw_stream *stream)
{
    CM_ASSERT(stream->n_holds > 0);
    stream->n_holds--;
    if (stream->over && stream->n_holds == 0) {
        gw_gateway *gateway = stream->gateway;
        stream_free(stream);
        gw_drain_check(gateway);
    }
}

/* What it was known by there is known no more. */
static void forget_number(gw_stream *stream)
{
    if (stream->router != NULL) {
        cm_map_remove(&stream->gateway->by_number, stream->number);
        stream->router = NULL;
    }
}

static void cancel_there(gw_stream *stream)
{
    if (stream->router != NULL && stream->core.state != GW_CORE_ENDED) {
        gw_router_cancel(stream->router, stream->number);
    }
    forget_number(stream);
}

static void forget_copy(const gw_stream *stream, uint64_t router)
{
    Baleen__Engine__V1__SeqKey key;
    gw_router *at = gw_routers_get(stream->gateway->routers, router);
    gw_origin_key(stream->origin, stream->choice, &key);
    if (at != NULL) {
        gw_router_cancel_copy(at, &key);
    }
}

void gw_stream_leave_router(gw_stream *stream)
{
    uint64_t copies[GW_PLACE_COPIES];
    cancel_there(stream);
    uint32_t n = gw_place_end(&stream->gateway->place, &stream->spot, copies);
    for (uint32_t i = 0; i < n; i++) {
        forget_copy(stream, copies[i]);
    }
    gw_streams_place(stream->gateway);
}

static double seconds_since(uint64_t from_ns, uint64_t until_ns)
{
    return from_ns != 0 && until_ns > from_ns ? (double)(until_ns - from_ns) * 1e-9 : 0;
}

static gw_usage stream_usage(const gw_stream *stream, uint64_t now_ns)
{
    gw_usage usage = stream->usage;
    usage.queue_ms = 1e3 * seconds_since(stream->received_ns, stream->accepted_ns);
    usage.first_token_ms = 1e3 * seconds_since(stream->received_ns, stream->first_ns);
    usage.total_ms = 1e3 * seconds_since(stream->received_ns, now_ns);
    return usage;
}

/* To the client's visit and to the counters; not of a probe. */
static void account(gw_stream *stream, const gw_usage *usage, gw_ending ending, const char *word)
{
    gw_telemetry *telemetry = stream->gateway->telemetry;
    gw_visit_answered(stream->visit, usage, word);
    if (stream->accepted_ns == 0) {
        return; /* refused */
    }
    gw_telemetry_ended(telemetry, ending);
    gw_telemetry_observe(telemetry, GW_SERIES_REQUEST, usage->total_ms * 1e-3, 1);
    gw_telemetry_observe(telemetry, GW_SERIES_PROMPT_TOKENS, usage->prompt_tokens, 1);
    gw_telemetry_observe(telemetry, GW_SERIES_OUTPUT_TOKENS, usage->completion_tokens, 1);
}

static const char *reason_word(gw_reason reason)
{
    return reason == GW_REASON_STOP ? "stop" : reason == GW_REASON_LENGTH ? "length" : "tool_calls";
}

void gw_stream_finish(gw_stream *stream, gw_reason reason, int64_t stop_id)
{
    uint64_t now_ns = cm_now_ns();
    gw_finish finish = {.reason = reason,
                        .stop_string = md_parser_stop_match(stream->parser),
                        .stop_id = stop_id,
                        .parser = stream->parser,
                        .usage = stream_usage(stream, now_ns)};
    if (!stream->probe) {
        cm_stat_add(CM_STAT_requests_finished, 1);
        cm_stat_observe(CM_STAT_request_seconds, seconds_since(stream->received_ns, now_ns));
        account(stream, &finish.usage, reason == GW_REASON_LENGTH ? GW_ENDING_LENGTH : GW_ENDING_STOP,
                reason_word(reason));
    }
    if (stream->router != NULL && stream->core.state != GW_CORE_ENDED) {
        gw_router_finish(stream->router,
                         stream->number); /* a stop string: the router does not know of them */
        forget_number(stream);
    }
    gw_stream_leave_router(stream);
    stream_detach(stream);
    gw_stream_hold(stream);
    stream->events.finished(stream->ctx, &finish);
    gw_stream_release(stream);
}

static void count_failure(gw_stream *stream, const gw_error *error)
{
    gw_cause cause = error->cause;
    if (stream->probe) {
        return;
    }
    bool aborted = cause == GW_CAUSE_DEADLINE || cause == GW_CAUSE_ABORTED;
    gw_usage usage = stream_usage(stream, cm_now_ns());
    account(stream, &usage, aborted ? GW_ENDING_ABORT : GW_ENDING_ERROR, gw_error_code(error));
    cm_stat_add(aborted                    ? CM_STAT_requests_aborted
                : stream->accepted_ns == 0 ? CM_STAT_requests_refused
                                           : CM_STAT_requests_failed,
                1);
}

void gw_stream_fail(gw_stream *stream, const gw_error *error)
{
    gw_error copy = *error; /* it may lie in what is freed */
    count_failure(stream, &copy);
    cm_debug("stream %s: %s", gw_origin_id(stream->origin), copy.message);
    gw_stream_leave_router(stream);
    stream_detach(stream);
    gw_stream_hold(stream);
    stream->events.failed(stream->ctx, &copy);
    gw_stream_release(stream);
}

void gw_stream_cancel(gw_stream *stream)
{
    if (!stream->probe) {
        gw_usage usage = stream_usage(stream, cm_now_ns());
        cm_stat_add(CM_STAT_requests_aborted, 1);
        account(stream, &usage, GW_ENDING_ABORT, "cancelled");
    }
    gw_stream_leave_router(stream);
    gw_stream_hold(stream);
    stream_detach(stream);
    gw_stream_release(stream);
}

/* Its client may come back for it elsewhere: whatever has it keeps it. */
static void detach_there(gw_stream *stream)
{
    uint64_t copies[GW_PLACE_COPIES];
    if (stream->router != NULL && stream->core.state != GW_CORE_ENDED) {
        gw_router_detach(stream->router, stream->number);
        forget_number(stream);
    }
    (void)gw_place_end(&stream->gateway->place, &stream->spot, copies);
}

void gw_stream_detach(gw_stream *stream)
{
    detach_there(stream);
    gw_stream_cancel(stream);
}

const char *gw_stream_id(const gw_stream *stream)
{
    return gw_origin_id(stream->origin);
}

bool gw_stream_is_ending(const gw_stream *stream)
{
    return stream->ending;
}

static gw_stream *find_by_id(gw_gateway *gateway, const gw_tenant *tenant, const char *id)
{
    gw_stream *stream;
    TAILQ_FOREACH (stream, &gateway->streams, link) {
        if (!stream->probe && stream->tenant == tenant && strcmp(gw_origin_id(stream->origin), id) == 0) {
            return stream;
        }
    }
    return NULL;
}

bool gw_stream_abort(gw_gateway *gateway, const gw_tenant *tenant, const char *request_id)
{
    gw_stream *stream = find_by_id(gateway, tenant, request_id);
    if (stream != NULL) {
        gw_error error;
        gw_error_set(&error, GW_CAUSE_ABORTED, NULL, "the request was aborted");
        gw_stream_fail(stream, &error);
    }
    return stream != NULL;
}

/* tenant: whose; NULL: all. detach: their clients may come back for them elsewhere. */
static uint32_t fail_all(gw_gateway *gateway, const gw_tenant *tenant, const gw_error *error, bool detach)
{
    /* a handler may open or cancel others: start over after each; what is opened meanwhile is not ours to
     * fail */
    uint64_t before = gateway->next_serial;
    uint32_t n = 0;
    for (;;) {
        gw_stream *stream;
        TAILQ_FOREACH (stream, &gateway->streams, link) {
            bool his = tenant == NULL || stream->tenant == tenant;
            if (!stream->probe && his && stream->serial < before) {
                break;
            }
        }
        if (stream == NULL) {
            return n;
        }
        if (detach) {
            detach_there(stream);
        }
        gw_stream_fail(stream, error);
        n++;
    }
}

uint32_t gw_stream_abort_all(gw_gateway *gateway, const gw_tenant *tenant)
{
    gw_error error;
    bool all = gw_tenants_is_operator(gateway->tenants, tenant);
    gw_error_set(&error, GW_CAUSE_ABORTED, NULL, "the request was aborted");
    return fail_all(gateway, all ? NULL : tenant, &error, false);
}

void gw_streams_fail_all(gw_gateway *gateway, gw_cause cause, const char *message)
{
    gw_error error;
    gw_error_set(&error, cause, NULL, "%s", message);
    (void)fail_all(gateway, NULL, &error, true);
}

/* ---- opening at a router ---- */

static uint64_t deadline_left_ms(const gw_stream *stream)
{
    uint64_t now_ms = cm_now_ms();
    return stream->deadline_at_ms > now_ms ? stream->deadline_at_ms - now_ms : 0;
}

/* What is off is left out. */
static void put_filters(const gw_request *request, Baleen__Engine__V1__SamplerParams *sampler)
{
    sampler->has_top_k = request->top_k > 0;
    sampler->top_k = request->top_k;
    sampler->has_min_p = request->min_p > 0;
    sampler->min_p = (float)request->min_p;
    sampler->has_repetition_penalty = request->repetition_penalty < 1 || request->repetition_penalty > 1;
    sampler->repetition_penalty = (float)request->repetition_penalty;
    sampler->has_frequency_penalty = request->frequency_penalty < 0 || request->frequency_penalty > 0;
    sampler->frequency_penalty = (float)request->frequency_penalty;
    sampler->has_presence_penalty = request->presence_penalty < 0 || request->presence_penalty > 0;
    sampler->presence_penalty = (float)request->presence_penalty;
    sampler->n_bias = sampler->n_bias_id = request->n_bias;
    sampler->bias_id = request->bias_id;
    sampler->bias = request->bias;
    sampler->has_top_logprobs = request->logprobs;
    sampler->top_logprobs = request->n_top;
}

static void send_open(gw_stream *stream)
{
    const gw_request *request = &stream->request;
    uint32_t stop[GW_STOP_IDS_MAX + 1];
    size_t n_stop = request->n_stop_id;
    memcpy(stop, request->stop_id, n_stop * sizeof(*stop));
    if (!request->ignore_eos) {
        stop[n_stop++] = stream->gateway->geometry.eos_id;
    }
    Baleen__Engine__V1__SamplerParams sampler = BALEEN__ENGINE__V1__SAMPLER_PARAMS__INIT;
    sampler.seed = (uint64_t)request->seed;
    sampler.has_temperature = sampler.has_top_p = sampler.has_tokens_min = true;
    sampler.temperature = (float)request->temperature;
    sampler.top_p = (float)request->top_p;
    sampler.tokens_max = stream->core.tokens_max;
    sampler.tokens_min =
        request->tokens_min < stream->core.tokens_max ? request->tokens_min : stream->core.tokens_max;
    sampler.stop_id = stop;
    sampler.n_stop_id = n_stop;
    put_filters(request, &sampler);

    Baleen__Engine__V1__Constraint constraint = BALEEN__ENGINE__V1__CONSTRAINT__INIT;
    Baleen__Engine__V1__SeqKey key;
    Baleen__Engine__V1__SeqOpen open = BALEEN__ENGINE__V1__SEQ_OPEN__INIT;
    open.stream = stream->number;
    open.emitted = stream->core.emitted.id;
    open.n_emitted = stream->core.emitted.n;
    if (!stream->probe) {
        gw_origin_key(stream->origin, stream->choice, &key);
        open.key = &key;
        open.has_term = true;
        open.term = gw_origin_term(stream->origin);
        open.has_resume = gw_origin_resume(stream->origin, &open.resume);
        open.traceparent = stream->visit->traceparent;
    }
    open.prompt = stream->core.prompt.id;
    open.n_prompt = stream->core.prompt.n;
    open.sampler = &sampler;
    open.has_salt = true;
    open.salt = (ProtobufCBinaryData){.len = sizeof(stream->salt), .data = stream->salt};
    open.has_deadline_ms = stream->deadline != NULL;
    open.deadline_ms = open.has_deadline_ms ? deadline_left_ms(stream) : 0;
    if (request->constraint.kind != 0) {
        constraint.kind = (uint32_t)request->constraint.kind;
        constraint.source.data = (uint8_t *)request->constraint.source;
        constraint.source.len = request->constraint.n_source;
        constraint.has_after_thinking = constraint.after_thinking = stream->thinking;
        open.constraint = &constraint;
    }
    gw_router_open(stream->router, &open);
}

static md_parser *make_parser(const gw_stream *stream, bool continues)
{
    const gw_request *request = &stream->request;
    md_parser_options options = {
        .start_in_reasoning = stream->thinking,
        .continues_prefix = continues,
        .plain = request->kind == GW_ASK_COMPLETE,
        .tools = request->tools,
        .stop = (const char *const *)request->stop,
        .n_stop = request->n_stop,
        .include_stop = request->include_stop,
    };
    return md_parser_create(&options);
}

/* What it may share with others, and by that where it should be computed: routers keep the beginnings of
 * prompts page by page. */
static uint64_t share(gw_stream *stream)
{
    const md_ids *prompt = &stream->core.prompt;
    const char *salt = stream->request.salt;
    gw_origin_hash(stream->tenant, salt != NULL ? salt : "", stream->salt);
    if (prompt->n <= PR_PAGE_TOKENS) {
        return 0; /* the last token is always computed: nothing of it is kept */
    }
    XXH64_hash_t seed = XXH3_64bits(stream->salt, sizeof(stream->salt));
    return XXH3_64bits_withSeed(prompt->id, PR_PAGE_TOKENS * sizeof(uint32_t), seed) | 1;
}

static void go_to_router(gw_stream *stream)
{
    gw_gateway *gateway = stream->gateway;
    if (!stream->probe) {
        gw_telemetry_observe(gateway->telemetry, GW_SERIES_QUEUE,
                             seconds_since(stream->received_ns, cm_now_ns()), 1);
    }
    stream->spot.affinity = share(stream);
    gw_place_begin(&gateway->place, cm_now_ms(), &stream->spot, stream->at);
}

/* A probe waits for nobody, and what a router has already is not begun a second time. */
static void await_turn(gw_stream *stream)
{
    gw_gateway *gateway = stream->gateway;
    uint64_t now_ms = cm_now_ms();
    if (stream->probe) {
        go_to_router(stream);
    } else if (stream->at != 0) {
        gw_turns_go_on(&gateway->turns, &stream->turn);
        go_to_router(stream);
    } else {
        gw_turns_wait(&gateway->turns, now_ms, &stream->turn, (uint32_t)stream->core.prompt.n,
                      stream->core.tokens_max, now_ms + gateway->config->queue_ms);
    }
    gw_streams_place(gateway);
    if (stream->events.admitted != NULL) {
        stream->events.admitted(stream->ctx);
    }
}

static void stream_encoded(void *ctx, gw_encoded *encoded)
{
    gw_stream *stream = ctx;
    const md_geometry *geometry = &stream->gateway->geometry;
    gw_error error = encoded->error;
    uint32_t tokens_max;
    cm_status status = encoded->status;
    stream->encode = NULL;
    if (status == CM_OK) {
        status = gw_request_budget(&stream->request, encoded->thinking, (uint32_t)encoded->ids.n,
                                   geometry->context, &tokens_max, &error);
    }
    if (status == CM_OK) {
        gw_core_init(&stream->core, &encoded->ids, tokens_max, geometry->vocab, stream->request.logprobs);
        stream->has_core = true;
        stream->thinking = encoded->thinking;
        stream->usage.prompt_tokens = (uint32_t)stream->core.prompt.n;
        stream->parser = make_parser(stream, encoded->continues);
        await_turn(stream);
    }
    if (status != CM_OK) {
        gw_stream_fail(stream, &error);
    }
}

/* ---- where streams are: doing what the place machine says ---- */

static gw_stream *stream_of(gw_spot *spot)
{
    return (gw_stream *)((char *)spot - offsetof(gw_stream, spot));
}

/* A new number, so that no word of an earlier asking is taken for one of this. */
static void ask_at(gw_stream *stream, uint64_t router)
{
    gw_gateway *gateway = stream->gateway;
    cancel_there(stream); /* it may be there still: a router that left the epoch and gave no more tokens */
    stream->router = gw_routers_get(gateway->routers, router);
    stream->number = ++gateway->last_number;
    CM_ASSERT(stream->router != NULL);
    cm_status status = cm_map_put(&gateway->by_number, stream->number, stream);
    CM_ASSERT(status == CM_OK); /* as many entries as streams */
}

static void send_resume(gw_stream *stream)
{
    Baleen__Engine__V1__SeqKey key;
    Baleen__Engine__V1__SeqResume resume = BALEEN__ENGINE__V1__SEQ_RESUME__INIT;
    gw_origin_key(stream->origin, stream->choice, &key);
    resume.stream = stream->number;
    resume.key = &key;
    resume.from = stream->core.emitted.n;
    resume.term = gw_origin_term(stream->origin);
    gw_router_resume(stream->router, &resume);
}

static void give_up(gw_stream *stream, cm_status status)
{
    gw_error error;
    bool full = status == CM_E_CAPACITY;
    if (full && !stream->spot.accepted) {
        gw_error_set(&error, GW_CAUSE_CAPACITY, NULL,
                     "all routers are full and requests wait already; please try again in 1s");
    } else {
        gw_error_set(&error, GW_CAUSE_UNAVAILABLE, NULL,
                     "no router could go on with this request%s%s; please try again",
                     status != CM_OK ? ": " : "", status != CM_OK ? cm_status_text(status) : "");
    }
    error.retry_ms = GW_RETRY_MS;
    gw_stream_fail(stream, &error);
}

static void condemn(gw_stream *stream)
{
    gw_error error;
    cm_error_log("request %s: %d routers died one after the other while they had it; it is refused",
                 gw_stream_id(stream), DEATHS_MAX);
    cm_stat_add(CM_STAT_streams_condemned, 1);
    gw_error_set(
        &error, GW_CAUSE_ENDS_ROUTERS, NULL,
        "%d routers failed one after the other while they computed this request: it is not tried again",
        DEATHS_MAX);
    gw_stream_fail(stream, &error);
}

static void place_do(const gw_place_action *action)
{
    gw_stream *stream = stream_of(action->spot);
    switch (action->act) {
    case GW_PLACE_OPEN:
        if (stream->spot.accepted) {
            cm_stat_add(CM_STAT_streams_reopened, 1);
        }
        ask_at(stream, action->router);
        send_open(stream);
        break;
    case GW_PLACE_RESUME:
        ask_at(stream, action->router);
        send_resume(stream);
        break;
    case GW_PLACE_FORGET:
        forget_copy(stream, action->router);
        break;
    case GW_PLACE_GIVE_UP:
        give_up(stream, action->status);
        break;
    case GW_PLACE_CONDEMN:
        condemn(stream);
        break;
    }
}

static bool still_needed(void *ctx, const gw_router *router)
{
    const gw_gateway *gateway = ctx;
    return gw_place_hosts(&gateway->place, gw_router_number(router));
}

static gw_stream *stream_of_turn(gw_turn *turn)
{
    return (gw_stream *)((char *)turn - offsetof(gw_stream, turn));
}

static void turns_run(gw_gateway *gateway, uint64_t now_ms)
{
    gw_turn *turn;
    cm_status status;
    while ((turn = gw_turns_next(&gateway->turns, now_ms, &status)) != NULL) {
        gw_stream *stream = stream_of_turn(turn);
        gw_error error;
        if (status == CM_OK) {
            go_to_router(stream);
            continue;
        }
        gw_error_set(&error, GW_CAUSE_CAPACITY, NULL,
                     "the request has waited %llu s for its turn; please try again in %us",
                     (unsigned long long)(gateway->config->queue_ms / 1000), GW_RETRY_MS / 1000);
        error.retry_ms = GW_RETRY_MS;
        gw_stream_fail(stream, &error);
    }
}

/* Some more than they can run wait at the routers, so that none of them is idle until it hears of the next
 * one. While no router is linked, what comes is given to them all the same: they may come back, and how long
 * that may take is not decided here. */
void gw_streams_room(gw_gateway *gateway)
{
    enum { AHEAD_PART = 16 };
    gw_routers_load load = gw_routers_get_load(gateway->routers);
    uint32_t room = (uint32_t)gateway->config->running_max, ahead = 0;
    if (room == 0 && load.n_linked == 0) {
        return;
    }
    if (room == 0) {
        uint32_t share = load.runnable / gw_member_stats_gateways(gateway);
        ahead = share / AHEAD_PART + 1;
        room = share + ahead;
    }
    if (room != gateway->turns.room) {
        gw_turns_set_room(&gateway->turns, room, ahead);
        gw_streams_place(gateway);
    }
}

static void place_run(void *arg)
{
    gw_gateway *gateway = arg;
    gw_place_action action;
    uint64_t now_ms = cm_now_ms();
    turns_run(gateway, now_ms);
    while (gw_place_next(&gateway->place, now_ms, &action)) {
        place_do(&action);
    }
    gw_routers_drop_leavers(gateway->routers, still_needed);
    uint64_t due_ms = gw_place_due(&gateway->place, now_ms);
    uint64_t turn_ms = gw_turns_due(&gateway->turns);
    due_ms = turn_ms < due_ms ? turn_ms : due_ms;
    if (due_ms != UINT64_MAX) {
        pc_timer_set(gateway->place_timer, due_ms > now_ms ? due_ms - now_ms : 1);
    } else {
        pc_timer_clear(gateway->place_timer);
    }
}

void gw_streams_place(gw_gateway *gateway)
{
    pc_loop_post(gateway->loop, &gateway->place_task);
}

static void place_timer(void *arg)
{
    gw_streams_place(arg);
}

void gw_streams_init(gw_gateway *gateway)
{
    gw_place_limits limits = {.reopen_ms = gateway->config->reopen_ms,
                              .rebind_ms = REBIND_MS,
                              .leave_ms = LEAVE_MS,
                              .opens_max = REOPENS_MAX,
                              .deaths_max = DEATHS_MAX,
                              .seed = cm_random_u64()};
    TAILQ_INIT(&gateway->streams);
    cm_map_init(&gateway->by_number, (uint32_t)gateway->config->streams_max + GW_PROBES_MAX);
    gw_place_init(&gateway->place, &limits);
    gw_turns_init(&gateway->turns, (uint32_t)gateway->config->streams_max);
    gateway->place_timer = pc_timer_create(gateway->loop, place_timer, gateway);
    gateway->place_task = (pc_task){.fn = place_run, .arg = gateway};
}

void gw_streams_fini(gw_gateway *gateway)
{
    pc_loop_unpost(gateway->loop, &gateway->place_task);
    pc_timer_destroy(gateway->place_timer);
    gw_place_fini(&gateway->place);
    gw_turns_fini(&gateway->turns);
    cm_map_fini(&gateway->by_number);
}

bool gw_stream_try_again(gw_stream *stream, cm_status status)
{
    gw_gateway *gateway = stream->gateway;
    bool again = gw_place_refused(&gateway->place, cm_now_ms(), &stream->spot, status);
    gw_streams_place(gateway);
    if (!again) {
        return false;
    }
    cm_debug("stream %s: router %u: %s; asked for again after %zu tokens", gw_stream_id(stream),
             gw_router_member(stream->router), cm_status_text(status), stream->core.emitted.n);
    cancel_there(stream);
    gw_core_reopen(&stream->core);
    return true;
}

void gw_streams_linked(gw_gateway *gateway, gw_router *router)
{
    gw_place_name(&gateway->place, gw_router_number(router), gw_router_member(router));
    gw_place_up(&gateway->place, gw_router_number(router));
    gw_streams_place(gateway);
}

void gw_streams_lost(gw_gateway *gateway, gw_router *router)
{
    gw_stream *stream;
    uint32_t n = 0;
    gw_place_down(&gateway->place, cm_now_ms(), gw_router_number(router));
    TAILQ_FOREACH (stream, &gateway->streams, link) {
        if (stream->router == router) {
            forget_number(stream); /* there is nobody to tell */
            n++;
        }
    }
    if (n > 0) {
        cm_warn("router %u: its link is down, %u streams look for it or for another",
                gw_router_member(router), n);
    }
    gw_streams_place(gateway);
}

/* ---- what a client asks ---- */

static void deadline_passed(void *arg)
{
    gw_stream *stream = arg;
    gw_error error;
    gw_error_set(&error, GW_CAUSE_DEADLINE, NULL, "the deadline of the request passed");
    gw_stream_fail(stream, &error);
}

static cm_status unavailable(gw_error *error_out, const char *why)
{
    gw_error_set(error_out, GW_CAUSE_UNAVAILABLE, NULL, "%s; please try again", why);
    error_out->retry_ms = GW_RETRY_MS;
    return CM_E_UNAVAILABLE;
}

static cm_status take_turn(gw_gateway *gateway, const gw_ask *ask, gw_turn *turn, gw_error *error_out)
{
    static const struct {
        gw_cause cause;
        const char *text;
    } words[] = {
        [GW_TURN_FULL] = {GW_CAUSE_CAPACITY, "too many requests at once"},
        [GW_TURN_QUEUE_FULL] = {GW_CAUSE_RATE_LIMIT, "too many requests of yours wait already"},
        [GW_TURN_MANY_REQUESTS] = {GW_CAUSE_RATE_LIMIT, "too many requests in a minute"},
        [GW_TURN_MANY_TOKENS] = {GW_CAUSE_RATE_LIMIT, "too many tokens in a minute"},
    };
    gw_turn_no no;
    cm_status status =
        gw_turns_admit(&gateway->turns, cm_now_ms(), ask->visit->tenant, ask->choice == 0, turn, &no);
    if (status != CM_OK) {
        gw_error_set(error_out, words[no.why].cause, NULL, "%s (%llu); please try again in %us",
                     words[no.why].text, (unsigned long long)no.limit, (no.retry_ms + 999) / 1000);
        error_out->retry_ms = no.retry_ms;
    }
    return status;
}

/* Limits and states of the gateway, after the request itself was found good. */
static cm_status admit(gw_gateway *gateway, const gw_ask *ask, gw_turn *turn, gw_error *error_out)
{
    if (gateway->draining) {
        return unavailable(error_out, "this gateway is shutting down");
    }
    if (ask->origin != NULL && ask->router == 0 && ask->choice == 0 &&
        find_by_id(gateway, ask->visit->tenant, gw_origin_id(ask->origin)) != NULL) {
        gw_error_set(error_out, GW_CAUSE_EXISTS, "request_id", "a request with this id is running");
        return CM_E_EXISTS;
    }
    if (gateway->epoch == NULL || gateway->epoch->placement == NULL) {
        return unavailable(error_out, "the model is not loaded yet");
    }
    if (gw_routers_get_load(gateway->routers).n_linked == 0) {
        return unavailable(error_out, "no router is connected");
    }
    return take_turn(gateway, ask, turn, error_out);
}

/* The seed belongs to the stream's log: whoever goes on with it must draw the same. drawn: when the client
 * gave none. */
static void choose_seed(gw_request *request, uint64_t drawn, uint32_t choice)
{
    request->seed = request->has_seed ? request->seed : (int64_t)drawn;
    if (choice > 0) {
        cm_rng_block block =
            cm_rng_at((uint64_t)request->seed, choice, UINT64_MAX); /* no draw has that counter */
        request->seed = (int64_t)((uint64_t)block.word[1] << 32 | block.word[0]);
    }
}

static gw_stream *stream_make(gw_gateway *gateway, const gw_ask *ask, const gw_stream_events *events,
                              void *ctx, const gw_request *request, const gw_turn *turn, bool probe)
{
    gw_stream *stream = cm_alloc(sizeof(*stream));
    *stream = (gw_stream){
        .gateway = gateway,
        .serial = gateway->next_serial++,
        .origin = ask->origin != NULL ? gw_origin_hold(ask->origin)
                                      : gw_origin_create(ask->kind, NULL, NULL, ask->body, NULL),
        .visit = ask->visit != NULL ? gw_visit_hold(ask->visit) : NULL,
        .tenant = ask->visit != NULL ? ask->visit->tenant : NULL,
        .choice = ask->choice,
        .at = ask->router,
        .spot = {.once = probe},
        .turn = *turn,
        .request = *request,
        .events = *events,
        .ctx = ctx,
        .want_ids = ask->want_ids,
        .keep_special = ask->kind == GW_ASK_COMPLETE && (request->keep_special || !ask->skip_special),
        .probe = probe,
        .received_ns = cm_now_ns()};
    gw_origin_bind(stream->origin, stream->tenant);
    choose_seed(&stream->request, gw_origin_seed(stream->origin), ask->choice);
    if (ask->deadline_ms < DEADLINE_MAX_MS) {
        stream->deadline_at_ms = cm_now_ms() + ask->deadline_ms;
        stream->deadline = pc_timer_create(gateway->loop, deadline_passed, stream);
        pc_timer_set(stream->deadline, ask->deadline_ms);
    }
    return stream;
}

static cm_status check_choices(const gw_request *request, const gw_ask *ask, gw_error *error_out)
{
    uint32_t most = ask->choices_max > 0 ? ask->choices_max : 1;
    if (request->n_choice <= most) {
        return CM_OK;
    }
    gw_error_set(error_out, GW_CAUSE_INVALID, "n", "n must not be above %u here: ask again for more answers",
                 most);
    return CM_E_INVALID;
}

static cm_status stream_start(gw_gateway *gateway, const gw_ask *ask, const gw_stream_events *events,
                              void *ctx, bool probe, gw_stream **stream_out, gw_error *error_out)
{
    gw_request request;
    gw_turn turn = {.state = GW_TURN_NONE};
    CM_TRY(gw_request_parse(ask->kind, ask->body, gateway->geometry.vocab, &request, error_out));
    cm_status status = check_choices(&request, ask, error_out);
    if (status == CM_OK) {
        status = gw_model_check(gateway, json_string_value(json_object_get(ask->body, "model")), error_out);
    }
    if (status == CM_OK && !probe) {
        status = admit(gateway, ask, &turn, error_out);
    }
    if (status != CM_OK) {
        gw_request_free(&request);
        return status;
    }

    gw_stream *stream = stream_make(gateway, ask, events, ctx, &request, &turn, probe);
    status = gw_encode_begin(&gateway->encoder, &stream->request, ask->body, stream_encoded, stream,
                             &stream->encode);
    if (status != CM_OK) {
        gw_error_set(error_out, GW_CAUSE_CAPACITY, NULL, "too many requests at once; please try again in 1s");
        error_out->retry_ms = GW_RETRY_MS;
        gw_turns_end(&gateway->turns, cm_now_ms(), &stream->turn, 0);
        pc_timer_destroy(stream->deadline);
        stream_free(stream);
        return CM_E_CAPACITY;
    }
    TAILQ_INSERT_TAIL(&gateway->streams, stream, link);
    *stream_out = stream;
    return CM_OK;
}

static void count_opened(gw_gateway *gateway, const gw_ask *ask, cm_status status, const gw_error *error)
{
    static const gw_usage nothing = {0};
    const gw_tenant *tenant = ask->visit->tenant;
    bool ok = status == CM_OK;
    cm_stat_add(ok ? CM_STAT_ledger_streams : CM_STAT_requests_refused, 1);
    gw_telemetry_used(gateway->telemetry, tenant, GW_USED_REQUESTS, 1);
    gw_telemetry_used(gateway->telemetry, tenant, GW_USED_REFUSED, ok ? 0 : 1);
    gateway->n_streams += ok;
    if (!ok) {
        gw_visit_answered(ask->visit, &nothing, gw_error_code(error));
    }
}

/* For callers inside the gateway, where no keys are: without any, everybody is the one tenant. */
static cm_status find_visit(gw_gateway *gateway, const gw_ask *ask, gw_visit **visit_out, gw_error *error_out)
{
    gw_tenant *tenant;
    if (ask->visit != NULL) {
        *visit_out = gw_visit_hold(ask->visit);
        return CM_OK;
    }
    CM_TRY(gw_gateway_identify(gateway, NULL, NULL, &tenant, error_out));
    *visit_out = gw_visit_begin("-", NULL, NULL);
    (*visit_out)->tenant = tenant;
    return CM_OK;
}

cm_status gw_stream_open(gw_gateway *gateway, const gw_ask *ask, const gw_stream_events *events, void *ctx,
                         gw_stream **stream_out, gw_error *error_out)
{
    gw_ask mine = *ask;
    cm_stat_add(CM_STAT_requests, 1);
    cm_status status = find_visit(gateway, ask, &mine.visit, error_out);
    if (status != CM_OK) {
        cm_stat_add(CM_STAT_requests_refused, 1);
        return status;
    }
    status = stream_start(gateway, &mine, events, ctx, false, stream_out, error_out);
    count_opened(gateway, &mine, status, error_out);
    gw_visit_release(mine.visit);
    return status;
}

cm_status gw_stream_open_probe(gw_gateway *gateway, const gw_ask *ask, const gw_stream_events *events,
                               void *ctx, gw_stream **stream_out, gw_error *error_out)
{
    return stream_start(gateway, ask, events, ctx, true, stream_out, error_out);
}
