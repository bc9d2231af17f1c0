/* A gateway's process: session, links to the routers of the epoch, token logs (the real stream core) and the
 * clients' calls. */
#include "tests/sim/gateway.h"

#include <string.h>

#include "proto/messages.h"
#include "proto/pack.h"

enum { GATEWAY_RETRY_MS = 300, GATEWAY_STREAMS_MAX = SIM_REQUESTS_MAX };

/* ---- streams ---- */

static sim_gw_stream *gateway_find(sim_gateway *g, uint64_t number)
{
    sim_gw_stream *stream;
    TAILQ_FOREACH (stream, &g->streams, link) {
        if (stream->router != NULL && stream->number == number) {
            return stream;
        }
    }
    return NULL;
}

static void stream_free(sim_gateway *g, sim_gw_stream *stream)
{
    TAILQ_REMOVE(&g->streams, stream, link);
    gw_core_fini(&stream->core);
    cm_free(stream);
}

static void gateway_say(sim *s, sim_gateway *g, sim_gw_router *router, uint16_t type,
                        const ProtobufCMessage *message)
{
    cm_bytes_clear(&g->packed);
    pr_pack(message, &g->packed);
    cm_status status = sim_send(s, router->end, type, NULL, 0, g->packed.data, g->packed.len, NULL);
    (void)status; /* down: its event comes */
}

void sim_gateway_send_open(sim *s, sim_gateway *g, sim_gw_stream *stream)
{
    const rt_sampler *from = &stream->request->sampler;
    Baleen__Engine__V1__SamplerParams sampler = BALEEN__ENGINE__V1__SAMPLER_PARAMS__INIT;
    Baleen__Engine__V1__SeqOpen open = BALEEN__ENGINE__V1__SEQ_OPEN__INIT;
    uint32_t stop[SIM_STOPS_MAX];
    memcpy(stop, from->stop, sizeof(stop));
    sampler.seed = from->seed;
    sampler.tokens_max = from->tokens_max;
    sampler.has_tokens_min = true;
    sampler.tokens_min = from->tokens_min;
    sampler.n_stop_id = from->n_stop;
    sampler.stop_id = stop;
    open.stream = stream->number;
    open.prompt = stream->core.prompt.id;
    open.n_prompt = stream->core.prompt.n;
    open.emitted = stream->core.emitted.id;
    open.n_emitted = stream->core.emitted.n;
    open.sampler = &sampler;
    open.has_deadline_ms = stream->deadline_us != SIM_NEVER;
    open.deadline_ms = stream->deadline_us > s->now_us ? (stream->deadline_us - s->now_us) / SIM_MS : 0;
    gateway_say(s, g, stream->router, PR_MSG_SEQ_OPEN, &open.base);
}

void sim_gateway_leave_router(sim *s, sim_gateway *g, sim_gw_stream *stream, bool tell)
{
    sim_gw_router *router = stream->router;
    if (router == NULL) {
        return;
    }
    router->n_open--;
    stream->router = NULL;
    if (tell && router->up) {
        Baleen__Engine__V1__SeqCancel cancel = BALEEN__ENGINE__V1__SEQ_CANCEL__INIT;
        cancel.stream = &stream->number;
        cancel.n_stream = 1;
        gateway_say(s, g, router, PR_MSG_SEQ_CANCEL, &cancel.base);
    }
}

void sim_gateway_fail(sim *s, sim_gateway *g, sim_gw_stream *stream, cm_status status, const char *text)
{
    sim_request *request = stream->request;
    sim_gateway_leave_router(s, g, stream, stream->core.state != GW_CORE_ENDED);
    stream_free(g, stream);
    sim_client_failed(s, request, status, text);
}

sim_gw_router *sim_gateway_pick(sim_gateway *g)
{
    sim_gw_router *best = NULL;
    for (uint32_t i = 0; i < SIM_GATEWAY_ROUTERS; i++) {
        sim_gw_router *router = &g->routers[i];
        if (router->member != 0 && router->up && (best == NULL || router->n_open < best->n_open)) {
            best = router;
        }
    }
    return best;
}

bool sim_gateway_open(sim *s, sim_proc *proc, sim_request *request)
{
    sim_gateway *g = proc->state;
    if (!g->placed || sim_gateway_pick(g) == NULL) {
        return false;
    }
    sim_gw_stream *stream = cm_alloc(sizeof(*stream));
    md_ids prompt;
    md_ids_init(&prompt);
    for (uint32_t i = 0; i < request->n_prompt; i++) {
        md_ids_push(&prompt, request->prompt[i]);
    }
    stream->request = request;
    stream->deadline_us = request->deadline_us;
    gw_core_init(&stream->core, &prompt, request->sampler.tokens_max, SIM_VOCAB, false);
    for (uint32_t i = 0; i < request->n_got; i++) { /* what the client has of it already */
        md_ids_push(&stream->core.emitted, request->got[i]);
    }
    TAILQ_INSERT_TAIL(&g->streams, stream, link);
    request->stream = stream;
    sim_reopen_place(s, g, stream);
    sim_go(s, proc);
    return true;
}

void sim_gateway_cancel(sim *s, sim_proc *proc, sim_request *request)
{
    sim_gateway *g = proc->state;
    sim_gw_stream *stream = request->stream;
    sim_gateway_leave_router(s, g, stream, true);
    stream_free(g, stream);
    sim_go(s, proc);
}

/* ---- what routers say ---- */

static void gateway_take(sim *s, sim_gateway *g, sim_gw_router *router,
                         const Baleen__Engine__V1__SeqTokens *frame)
{
    sim_gw_stream *stream = gateway_find(g, frame->stream);
    gw_core_news news;
    cm_error err = {0};
    if (stream == NULL || stream->router != router) {
        return; /* ended or moved meanwhile */
    }
    if (gw_core_take(&stream->core, frame, &news, &err) != CM_OK) {
        sim_trace(s, NULL, "request %u: %s", stream->request->id, err.text);
        sim_reopen_refused(s, g, stream);
        return;
    }
    sim_request *request = stream->request;
    if (news.n_id > 0) {
        sim_client_tokens(s, request, news.offset, news.id, news.n_id);
    }
    if (news.end == BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED) {
        sim_gateway_fail(s, g, stream, (cm_status)frame->status, frame->text);
    } else if (news.end != BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON) {
        sim_gateway_leave_router(s, g, stream, false);
        stream_free(g, stream);
        sim_client_end(s, request, (rt_seq_end)news.end);
    }
}

static void gateway_step_tokens(sim *s, sim_gateway *g, sim_gw_router *router, const sim_message *m)
{
    ProtobufCMessage *message;
    cm_arena_reset(&g->arena);
    if (pr_unpack(&baleen__engine__v1__step_tokens__descriptor, m->data, m->n_bytes, &g->arena, &message) !=
        CM_OK) {
        sim_fail(s, "a StepTokens cannot be read");
    }
    const Baleen__Engine__V1__StepTokens *step = (const Baleen__Engine__V1__StepTokens *)message;
    for (size_t i = 0; i < step->n_seq; i++) {
        gateway_take(s, g, router, step->seq[i]);
    }
}

/* ---- links ---- */

static void gateway_connect(sim *s, sim_proc *proc, sim_gw_router *router)
{
    sim_gateway *g = proc->state;
    net_identity self = {pc_mcore_cluster(g->member.core), BALEEN__CONTROL__V1__ROLE__ROLE_GATEWAY,
                         pc_mcore_id(g->member.core)};
    router->end = sim_connect(s, proc, SIM_TOKENS, router->address, &self);
    router->end->user = router;
}

static void gateway_lose(sim *s, sim_gateway *g, sim_gw_router *router)
{
    sim_gw_stream *stream, *after;
    router->end = NULL;
    router->up = false;
    router->retry_at_us = s->now_us + GATEWAY_RETRY_MS * SIM_MS;
    for (stream = TAILQ_FIRST(&g->streams); stream != NULL; stream = after) {
        after = TAILQ_NEXT(stream, link);
        if (stream->router == router) {
            sim_reopen_lost(s, g, stream);
        }
    }
}

static sim_gw_router *gateway_free_place(sim_gateway *g)
{
    for (uint32_t i = 0; i < SIM_GATEWAY_ROUTERS; i++) {
        if (g->routers[i].member == 0) {
            return &g->routers[i];
        }
    }
    return NULL;
}

/* Another cluster gives the same ids to others. */
static bool gateway_is(const sim_gw_router *router, const struct pc_epoch_member *member)
{
    return member != NULL && router->member == member->id &&
           strcmp(router->address, member->data_address) == 0;
}

static bool gateway_knows(const sim_gateway *g, const struct pc_epoch_member *member)
{
    for (uint32_t i = 0; i < SIM_GATEWAY_ROUTERS; i++) {
        if (gateway_is(&g->routers[i], member)) {
            return true;
        }
    }
    return false;
}

static void gateway_epoch(sim *s, sim_proc *proc, const pc_epoch *epoch)
{
    sim_gateway *g = proc->state;
    for (uint32_t i = 0; i < SIM_GATEWAY_ROUTERS; i++) {
        sim_gw_router *router = &g->routers[i];
        if (router->member != 0 && !gateway_is(router, pc_epoch_member_find(epoch, router->member))) {
            if (router->end != NULL) {
                sim_disconnect(s, router->end);
            }
            gateway_lose(s, g, router);
            router->member = 0;
        }
    }
    for (uint32_t i = 0; i < epoch->n_member; i++) {
        const struct pc_epoch_member *member = &epoch->members[i];
        if (member->role == BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER && !gateway_knows(g, member)) {
            sim_gw_router *router = gateway_free_place(g);
            if (router == NULL) {
                sim_fail(s, "%s knows too many routers", proc->name);
            }
            *router = (sim_gw_router){.member = member->id};
            snprintf(router->address, sizeof(router->address), "%s", member->data_address);
            gateway_connect(s, proc, router);
        }
    }
    g->placed = epoch->placement != NULL;
}

/* ---- the process ---- */

static void gateway_news(sim *s, sim_proc *proc, const pc_mout *out)
{
    sim_gateway *g = proc->state;
    if (out->kind == PC_MOUT_COMMIT) {
        sim_check_followed(s, proc, out->value, &g->followed);
        gateway_epoch(s, proc, out->value);
        pc_mcore_committed(g->member.core, out->value->number);
    } else if (out->kind == PC_MOUT_PREPARE) {
        pc_mcore_prepared(g->member.core, out->value->number, CM_OK, NULL);
    } else if (out->kind == PC_MOUT_REFUSED) {
        sim_fail(s, "%s is refused: %s", proc->name, out->text);
    }
}

static void gateway_up(sim *s, sim_proc *proc, sim_end *end)
{
    sim_gw_router *router = end->user;
    (void)s;
    (void)proc;
    if (router != NULL && router->end == end) {
        router->up = true;
    }
}

static void gateway_down(sim *s, sim_proc *proc, sim_end *end, cm_status status)
{
    sim_gateway *g = proc->state;
    if (!sim_member_down(s, proc, &g->member, end, status)) {
        sim_gw_router *router = end->user;
        if (router != NULL && router->end == end) {
            gateway_lose(s, g, router);
        }
    }
}

static void gateway_message(sim *s, sim_proc *proc, sim_end *end, const sim_message *message)
{
    sim_gateway *g = proc->state;
    if (!sim_member_message(s, proc, &g->member, end, message)) {
        sim_gw_router *router = end->user;
        if (router != NULL && router->end == end && message->type == PR_MSG_STEP_TOKENS) {
            gateway_step_tokens(s, g, router, message);
        }
    }
}

static void gateway_sent(sim *s, sim_proc *proc, void *cookie)
{
    (void)s;
    (void)proc;
    (void)cookie;
}

static void gateway_expire(sim *s, sim_gateway *g)
{
    sim_gw_stream *stream, *after;
    for (stream = TAILQ_FIRST(&g->streams); stream != NULL; stream = after) {
        after = TAILQ_NEXT(stream, link);
        if (s->now_us >= stream->deadline_us) {
            sim_gateway_fail(s, g, stream, CM_E_DEADLINE, "the deadline passed");
        }
    }
}

static uint64_t gateway_pump(sim *s, sim_proc *proc)
{
    sim_gateway *g = proc->state;
    uint64_t wake_us = sim_member_pump(s, proc, &g->member), at_us;
    gateway_expire(s, g);
    for (uint32_t i = 0; i < SIM_GATEWAY_ROUTERS; i++) {
        sim_gw_router *router = &g->routers[i];
        if (router->member != 0 && router->end == NULL) {
            if (s->now_us >= router->retry_at_us) {
                gateway_connect(s, proc, router);
            } else if (router->retry_at_us < wake_us) {
                wake_us = router->retry_at_us;
            }
        }
    }
    at_us = sim_reopen_tick(s, g);
    wake_us = at_us < wake_us ? at_us : wake_us;
    const sim_gw_stream *stream;
    TAILQ_FOREACH (stream, &g->streams, link) {
        wake_us = stream->deadline_us < wake_us ? stream->deadline_us : wake_us;
    }
    return wake_us;
}

static net_identity gateway_identity(const sim_proc *proc)
{
    (void)proc;
    return (net_identity){0};
}

static void gateway_end(sim *s, sim_proc *proc)
{
    sim_gateway *g = proc->state;
    sim_gw_stream *stream;
    while ((stream = TAILQ_FIRST(&g->streams)) != NULL) {
        sim_request *request = stream->request;
        stream_free(g, stream);
        sim_client_lost(s, request);
    }
    sim_member_fini(&g->member);
    cm_arena_fini(&g->arena);
    cm_bytes_fini(&g->packed);
    cm_free(g);
}

static const sim_ops gateway_ops = {.up = gateway_up,
                                    .down = gateway_down,
                                    .message = gateway_message,
                                    .sent = gateway_sent,
                                    .pump = gateway_pump,
                                    .identity = gateway_identity,
                                    .end = gateway_end};

void sim_gateway_start(sim *s, sim_proc *proc)
{
    sim_gateway *g = cm_alloc(sizeof(*g));
    proc->ops = &gateway_ops;
    proc->state = g;
    TAILQ_INIT(&g->streams);
    cm_arena_init(&g->arena, "sim tokens", 16 << 10, 4 << 20);
    cm_bytes_init(&g->packed, 0);
    sim_member_init(s, proc, &g->member, BALEEN__CONTROL__V1__ROLE__ROLE_GATEWAY, false, gateway_news);
    sim_member_act(s, proc, &g->member);
}

void sim_gateway_ledger(const sim_proc *proc, char *text, size_t cap)
{
    const sim_gateway *g = proc->state;
    const sim_gw_stream *stream;
    uint32_t n = 0;
    text[0] = 0;
    TAILQ_FOREACH (stream, &g->streams, link) {
        n++;
    }
    for (uint32_t i = 0; i < SIM_GATEWAY_ROUTERS; i++) {
        n += g->routers[i].n_open;
    }
    if (n > 0) {
        snprintf(text, cap, "%u streams and openings", n);
    }
}
