/* A gateway's process: session and links to the routers it has heard of, tried again as routers.c tries. */
#include "tests/sim/gateway.h"

#include <string.h>

#include "proto/messages.h"
#include "proto/pack.h"

enum { GATEWAY_RETRY_MIN_MS = 100, GATEWAY_RETRY_MAX_MS = 2000, GATEWAY_ROUTERS_MAX = 64 };

/* ---- links ---- */

sim_gw_router *sim_gw_router_get(const sim_gateway *g, uint64_t number)
{
    sim_gw_router *router;
    TAILQ_FOREACH (router, &g->routers, link) {
        if (router->number == number) {
            return router;
        }
    }
    return NULL;
}

uint32_t sim_gw_n_linked(const sim_gateway *g)
{
    const sim_gw_router *router;
    uint32_t n = 0;
    TAILQ_FOREACH (router, &g->routers, link) {
        n += router->up && router->standing == GW_PLACE_MEMBER;
    }
    return n;
}

void sim_gw_say(sim *s, sim_gateway *g, sim_gw_router *router, uint16_t type, const ProtobufCMessage *message)
{
    if (!router->up) {
        return;
    }
    cm_bytes_clear(&g->packed);
    pr_pack(message, &g->packed);
    cm_status status = sim_send(s, router->end, type, NULL, 0, g->packed.data, g->packed.len, NULL);
    (void)status; /* down: its event comes */
}

void sim_gateway_forget(sim *s, sim_proc *proc)
{
    Baleen__Engine__V1__PrefixForget message = BALEEN__ENGINE__V1__PREFIX_FORGET__INIT;
    sim_gateway *g = proc->state;
    sim_gw_router *router;
    TAILQ_FOREACH (router, &g->routers, link) {
        sim_gw_say(s, g, router, PR_MSG_PREFIX_FORGET, &message.base);
    }
}

static void router_connect(sim *s, sim_proc *proc, sim_gw_router *router)
{
    const sim_gateway *g = proc->state;
    net_identity self = {pc_mcore_cluster(g->member.core), BALEEN__CONTROL__V1__ROLE__ROLE_GATEWAY,
                         pc_mcore_id(g->member.core)};
    router->end = sim_connect(s, proc, SIM_TOKENS, router->address, &self);
    router->end->user = router;
}

/* The link is gone; the router stays a member until an epoch says otherwise. */
static void router_unlink(sim *s, sim_proc *proc, sim_gw_router *router, cm_status status)
{
    sim_gateway *g = proc->state;
    bool was_up = router->up;
    router->end = NULL;
    router->up = false;
    if (!was_up) {
        gw_place_unreachable(&g->place, router->number);
        return;
    }
    if (status != CM_OK) {
        pc_mcore_report(g->member.core, router->member, status);
        sim_member_act(s, proc, &g->member);
    }
    sim_streams_lost(s, g, router);
    sim_seeks_lost(g, router);
}

static void router_free(sim *s, sim_gateway *g, sim_gw_router *router)
{
    TAILQ_REMOVE(&g->routers, router, link);
    gw_place_gone(&g->place, sim_ms(s), router->number);
    cm_free(router);
}

static void router_goes_on(sim *s, sim_gateway *g, sim_gw_router *router)
{
    if (router->standing == GW_PLACE_OUT) {
        router_free(s, g, router);
        return;
    }
    router->retry_at_us = s->now_us + router->retry_ms * SIM_MS;
    router->retry_ms = router->retry_ms == 0                         ? GATEWAY_RETRY_MIN_MS
                       : 2 * router->retry_ms < GATEWAY_RETRY_MAX_MS ? 2 * router->retry_ms
                                                                     : GATEWAY_RETRY_MAX_MS;
}

static void router_drop(sim *s, sim_proc *proc, sim_gw_router *router)
{
    if (router->end != NULL) {
        sim_disconnect(s, router->end);
    }
    router_unlink(s, proc, router, CM_OK);
    router_free(s, proc->state, router);
}

bool sim_gw_drop_leavers(sim *s, sim_proc *proc)
{
    sim_gateway *g = proc->state;
    sim_gw_router *router, *after;
    bool dropped = false;
    for (router = TAILQ_FIRST(&g->routers); router != NULL; router = after) {
        after = TAILQ_NEXT(router, link);
        if (router->standing == GW_PLACE_OUT && !gw_place_hosts(&g->place, router->number)) {
            router_drop(s, proc, router);
            dropped = true;
        }
    }
    return dropped;
}

static sim_gw_router *router_find(const sim_gateway *g, const struct pc_epoch_member *member)
{
    sim_gw_router *router;
    TAILQ_FOREACH (router, &g->routers, link) {
        if (router->member == member->id && router->incarnation == member->incarnation &&
            strcmp(router->address, member->data_address) == 0) {
            return router;
        }
    }
    return NULL;
}

static sim_gw_router *router_add(sim *s, sim_proc *proc, const struct pc_epoch_member *member)
{
    sim_gateway *g = proc->state;
    sim_gw_router *router = cm_alloc(sizeof(*router));
    router->number = ++g->n_numbers;
    router->member = member->id;
    router->incarnation = member->incarnation;
    router->retry_ms = GATEWAY_RETRY_MIN_MS;
    snprintf(router->address, sizeof(router->address), "%s", member->data_address);
    TAILQ_INSERT_TAIL(&g->routers, router, link);
    router_connect(s, proc, router);
    return router;
}

static void router_stands(sim *s, sim_gateway *g, sim_gw_router *router, gw_place_standing standing)
{
    if (router->standing != standing) {
        router->standing = standing;
        gw_place_stands(&g->place, sim_ms(s), router->number, standing);
    }
}

static void gateway_epoch(sim *s, sim_proc *proc, const pc_epoch *epoch)
{
    sim_gateway *g = proc->state;
    sim_gw_router *router, *after;
    TAILQ_FOREACH (router, &g->routers, link) {
        router->stays = false;
    }
    for (uint32_t i = 0; i < epoch->n_member; i++) {
        const struct pc_epoch_member *member = &epoch->members[i];
        if (member->role != BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER) {
            continue;
        }
        router = router_find(g, member);
        router = router != NULL ? router : router_add(s, proc, member);
        router->stays = true;
        router_stands(s, g, router, member->draining ? GW_PLACE_DRAINING : GW_PLACE_MEMBER);
    }
    for (router = TAILQ_FIRST(&g->routers); router != NULL; router = after) {
        after = TAILQ_NEXT(router, link);
        if (!router->stays && router->up) {
            router_stands(s, g, router, GW_PLACE_OUT);
        } else if (!router->stays) {
            router_drop(s, proc, router);
        }
    }
    g->placed = epoch->placement != NULL;
}

/* ---- what routers say ---- */

static void *gateway_read(sim *s, sim_gateway *g, const ProtobufCMessageDescriptor *descriptor,
                          const sim_message *m)
{
    ProtobufCMessage *message;
    cm_arena_reset(&g->arena);
    if (pr_unpack(descriptor, m->data, m->n_bytes, &g->arena, &message) != CM_OK) {
        sim_fail(s, "a %s cannot be read", descriptor->short_name);
    }
    return message;
}

static void gateway_take_step(sim *s, sim_proc *proc, const sim_gw_router *router,
                              const Baleen__Engine__V1__StepTokens *step)
{
    sim_gateway *g = proc->state;
    gw_place_load(&g->place, router->number, step->running + step->waiting);
    for (size_t i = 0; i < step->n_seq; i++) {
        sim_streams_tokens(s, proc, router, step->seq[i]);
    }
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
    sim_gateway *g = proc->state;
    sim_gw_router *router = end->user;
    if (router != NULL && router->end == end) {
        router->up = true;
        router->retry_ms = 0;
        gw_place_up(&g->place, router->number);
        sim_seeks_linked(s, g, router);
    }
}

static void gateway_down(sim *s, sim_proc *proc, sim_end *end, cm_status status)
{
    sim_gateway *g = proc->state;
    if (!sim_member_down(s, proc, &g->member, end, status)) {
        sim_gw_router *router = end->user; /* a link we ended ourselves tells no end */
        router_unlink(s, proc, router, status);
        router_goes_on(s, g, router);
    }
}

static void gateway_message(sim *s, sim_proc *proc, sim_end *end, const sim_message *message)
{
    sim_gateway *g = proc->state;
    if (sim_member_message(s, proc, &g->member, end, message)) {
        return;
    }
    const sim_gw_router *router = end->user;
    if (message->type == PR_MSG_STEP_TOKENS) {
        gateway_take_step(s, proc, router,
                          gateway_read(s, g, &baleen__engine__v1__step_tokens__descriptor, message));
    } else if (message->type == PR_MSG_SEQ_FOUND) {
        sim_seeks_found(s, g, router,
                        gateway_read(s, g, &baleen__engine__v1__seq_found__descriptor, message));
    }
}

static void gateway_sent(sim *s, sim_proc *proc, void *cookie)
{
    (void)s;
    (void)proc;
    (void)cookie;
}

static uint64_t gateway_retry(sim *s, sim_proc *proc)
{
    const sim_gateway *g = proc->state;
    sim_gw_router *router;
    uint64_t wake_us = SIM_NEVER;
    TAILQ_FOREACH (router, &g->routers, link) {
        if (router->end != NULL) {
            continue;
        }
        if (s->now_us >= router->retry_at_us) {
            router_connect(s, proc, router);
        } else if (router->retry_at_us < wake_us) {
            wake_us = router->retry_at_us;
        }
    }
    return wake_us;
}

static void gateway_check(sim *s, const sim_proc *proc)
{
    const sim_gateway *g = proc->state;
    const sim_gw_router *router;
    uint32_t n = 0;
    TAILQ_FOREACH (router, &g->routers, link) {
        n++;
    }
    if (n > GATEWAY_ROUTERS_MAX) {
        sim_fail(s, "%s knows %u routers", proc->name, n);
    }
}

static uint64_t gateway_pump(sim *s, sim_proc *proc)
{
    sim_gateway *g = proc->state;
    uint64_t wake_us = sim_member_pump(s, proc, &g->member), at_us = sim_seeks_run(s, proc);
    wake_us = at_us < wake_us ? at_us : wake_us;
    at_us = sim_streams_run(s, proc);
    wake_us = at_us < wake_us ? at_us : wake_us;
    at_us = gateway_retry(s, proc);
    gateway_check(s, proc);
    return at_us < wake_us ? at_us : wake_us;
}

static net_identity gateway_identity(const sim_proc *proc)
{
    (void)proc;
    return (net_identity){0};
}

static void gateway_end(sim *s, sim_proc *proc)
{
    sim_gateway *g = proc->state;
    sim_gw_router *router;
    sim_seeks_fini(s, g);
    sim_streams_fini(s, g);
    gw_place_fini(&g->place);
    while ((router = TAILQ_FIRST(&g->routers)) != NULL) {
        TAILQ_REMOVE(&g->routers, router, link);
        cm_free(router);
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
    TAILQ_INIT(&g->routers);
    TAILQ_INIT(&g->streams);
    TAILQ_INIT(&g->seeks);
    gw_place_init(&g->place, &(gw_place_limits){.reopen_ms = s->shape.reopen_ms,
                                                .rebind_ms = s->shape.rebind_ms,
                                                .leave_ms = s->shape.leave_ms,
                                                .opens_max = s->shape.opens_max,
                                                .deaths_max = 3,
                                                .seed = sim_mix(s->seed, proc->id)});
    cm_arena_init(&g->arena, "sim tokens", 16 << 10, 4 << 20);
    cm_bytes_init(&g->packed, 0);
    sim_member_init(s, proc, &g->member, BALEEN__CONTROL__V1__ROLE__ROLE_GATEWAY, false, gateway_news);
    sim_member_act(s, proc, &g->member);
}

void sim_gateway_ledger(const sim_proc *proc, char *text, size_t cap)
{
    const sim_gateway *g = proc->state;
    const sim_gw_router *router;
    uint32_t n_hosting = 0;
    text[0] = 0;
    TAILQ_FOREACH (router, &g->routers, link) {
        n_hosting += gw_place_hosts(&g->place, router->number);
    }
    bool streams = !TAILQ_EMPTY(&g->streams), seeks = !TAILQ_EMPTY(&g->seeks);
    bool placing = !TAILQ_EMPTY(&g->place.waiting) || !TAILQ_EMPTY(&g->place.failed) ||
                   g->place.n_copied > 0 || n_hosting > 0;
    if (streams || seeks || placing) {
        snprintf(text, cap, "%s%s%s", streams ? "streams " : "", seeks ? "seeks " : "",
                 placing ? "places of streams" : "");
    }
}
