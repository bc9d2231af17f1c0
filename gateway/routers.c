#include "gateway/routers.h"

#include <string.h>
#include <sys/queue.h>

#include "common/base/log.h"
#include "common/base/mem.h"
#include "proto/messages.h"
#include "proto/pack.h"

enum {
    SEND_DEADLINE_MS = 10000,
    RETRY_MIN_MS = 100, /* between two tries to reach a router; doubled up to the most */
    RETRY_MAX_MS = 2000,
    RUNNABLE_GUESS = 64, /* until a router has said */
    STEP_ARENA_CHUNK = 256 * 1024,
    STEP_ARENA_MAX = 64 * 1024 * 1024,
};

/* A message: queued at its router, then on its way, when net borrows the bytes until it is sent. */
typedef struct router_send {
    TAILQ_ENTRY(router_send) link;
    uint16_t type;
    cm_bytes bytes;
} router_send;
TAILQ_HEAD(router_sends, router_send);

struct gw_router {
    TAILQ_ENTRY(gw_router) link;
    gw_routers *routers;
    uint64_t number;
    uint32_t member;
    uint64_t incarnation;
    char *address;
    net_peer *peer;             /* NULL: waiting for the next try */
    bool up;                    /* greeted */
    bool broken;                /* sent what cannot be read: the link is ended outside of its own event */
    bool stays;                 /* scratch of gw_routers_epoch */
    gw_place_standing standing; /* GW_PLACE_OUT: not tried again when its link goes down */
    pc_timer *timer;            /* next try, or the end of a broken link */
    uint32_t retry_ms;
    uint32_t running, waiting; /* by its last frame */
    uint32_t runnable;         /* as it has said, or a guess */
    struct router_sends queue; /* wait for a place on the link; at most two a stream */
};

struct gw_routers {
    pc_loop *loop;
    net *n;
    pc_netpump *pump;
    gw_routers_events events;
    void *ctx;
    cm_arena arena;               /* one StepTokens at a time */
    TAILQ_HEAD(, gw_router) list; /* ascending member id */
    uint64_t n_numbers;           /* given to routers */
    struct router_sends sends;    /* on their way */
};

/* ---- sending ---- */

static void sends_free(struct router_sends *sends)
{
    router_send *send;
    while ((send = TAILQ_FIRST(sends)) != NULL) {
        TAILQ_REMOVE(sends, send, link);
        cm_bytes_fini(&send->bytes);
        cm_free(send);
    }
}

/* As much of the queue as the link takes. */
static void router_flush(gw_router *router)
{
    gw_routers *routers = router->routers;
    router_send *send;
    while (router->up && (send = TAILQ_FIRST(&router->queue)) != NULL) {
        net_message message = {.type = send->type,
                               .iov = {{send->bytes.data, send->bytes.len}},
                               .n_iov = 1,
                               .deadline_ms = SEND_DEADLINE_MS,
                               .cookie = send};
        if (net_send(router->peer, &message) != CM_OK) {
            return; /* full: when something was sent; down: its event comes */
        }
        TAILQ_REMOVE(&router->queue, send, link);
        TAILQ_INSERT_TAIL(&routers->sends, send, link);
        pc_netpump_kick(routers->pump);
    }
}

/* A link that is down is being lost, and all that was said on it with it. */
static void router_say(gw_router *router, uint16_t type, const ProtobufCMessage *message)
{
    if (!router->up) {
        return;
    }
    router_send *send = cm_alloc(sizeof(*send));
    send->type = type;
    cm_bytes_init(&send->bytes, 0);
    pr_pack(message, &send->bytes);
    TAILQ_INSERT_TAIL(&router->queue, send, link);
    router_flush(router);
}

void gw_router_open(gw_router *router, const Baleen__Engine__V1__SeqOpen *open)
{
    router_say(router, PR_MSG_SEQ_OPEN, &open->base);
}

void gw_router_cancel(gw_router *router, uint64_t stream)
{
    Baleen__Engine__V1__SeqCancel message = BALEEN__ENGINE__V1__SEQ_CANCEL__INIT;
    message.stream = &stream;
    message.n_stream = 1;
    router_say(router, PR_MSG_SEQ_CANCEL, &message.base);
}

void gw_router_finish(gw_router *router, uint64_t stream)
{
    Baleen__Engine__V1__SeqCancel message = BALEEN__ENGINE__V1__SEQ_CANCEL__INIT;
    message.finished = &stream;
    message.n_finished = 1;
    router_say(router, PR_MSG_SEQ_CANCEL, &message.base);
}

void gw_router_cancel_copy(gw_router *router, Baleen__Engine__V1__SeqKey *key)
{
    Baleen__Engine__V1__SeqCancel message = BALEEN__ENGINE__V1__SEQ_CANCEL__INIT;
    message.copy = &key;
    message.n_copy = 1;
    router_say(router, PR_MSG_SEQ_CANCEL, &message.base);
}

void gw_router_detach(gw_router *router, uint64_t stream)
{
    Baleen__Engine__V1__SeqDetach message = BALEEN__ENGINE__V1__SEQ_DETACH__INIT;
    message.stream = &stream;
    message.n_stream = 1;
    router_say(router, PR_MSG_SEQ_DETACH, &message.base);
}

void gw_router_resume(gw_router *router, const Baleen__Engine__V1__SeqResume *resume)
{
    router_say(router, PR_MSG_SEQ_RESUME, &resume->base);
}

void gw_router_find(gw_router *router, const Baleen__Engine__V1__SeqFind *find)
{
    router_say(router, PR_MSG_SEQ_FIND, &find->base);
}

uint32_t gw_routers_forget_prefixes(gw_routers *routers)
{
    Baleen__Engine__V1__PrefixForget message = BALEEN__ENGINE__V1__PREFIX_FORGET__INIT;
    gw_router *router;
    uint32_t n = 0;
    TAILQ_FOREACH (router, &routers->list, link) {
        n += router->up;
        router_say(router, PR_MSG_PREFIX_FORGET, &message.base);
    }
    return n;
}

/* ---- links ---- */

static void router_connect(gw_router *router)
{
    cm_error err;
    cm_status status = net_connect(router->routers->n, router->address, &router->peer, &err);
    if (status != CM_OK) {
        cm_warn("router %u at %s: %s", router->member, router->address, err.text);
        router->peer = NULL;
        pc_timer_set(router->timer, RETRY_MAX_MS);
        router->routers->events.unreachable(router->routers->ctx, router);
        return;
    }
    net_peer_set_user(router->peer, router);
    pc_netpump_kick(router->routers->pump);
}

/* The link is gone; the router stays a member until an epoch says otherwise. */
static void router_unlink(gw_router *router, cm_status status)
{
    bool was_up = router->up;
    router->peer = NULL;
    router->up = false;
    router->broken = false;
    router->running = router->waiting = 0;
    sends_free(&router->queue);
    if (was_up) {
        router->routers->events.lost(router->routers->ctx, router, status);
    } else {
        router->routers->events.unreachable(router->routers->ctx, router);
    }
}

/* A link that was up is tried again at once: whether its router is still there is what its streams wait for.
 */
static void router_retry_later(gw_router *router)
{
    pc_timer_set(router->timer, router->retry_ms);
    router->retry_ms = router->retry_ms == 0                 ? RETRY_MIN_MS
                       : 2 * router->retry_ms < RETRY_MAX_MS ? 2 * router->retry_ms
                                                             : RETRY_MAX_MS;
}

static void router_free(gw_router *router)
{
    TAILQ_REMOVE(&router->routers->list, router, link);
    router->routers->events.gone(router->routers->ctx, router);
    pc_timer_destroy(router->timer);
    sends_free(&router->queue);
    cm_free(router->address);
    cm_free(router);
}

/* After its link went down. */
static void router_goes_on(gw_router *router)
{
    if (router->standing == GW_PLACE_OUT) {
        router_free(router);
    } else {
        router_retry_later(router);
    }
}

static void router_timer(void *arg)
{
    gw_router *router = arg;
    if (router->broken) {
        net_disconnect(router->peer);
        router_unlink(router, CM_E_PROTOCOL);
        router_goes_on(router);
    } else if (router->peer == NULL) {
        router_connect(router);
    }
}

static gw_router *router_add(gw_routers *routers, const struct pc_epoch_member *member)
{
    gw_router *router = cm_alloc(sizeof(*router));
    *router = (gw_router){.routers = routers,
                          .number = ++routers->n_numbers,
                          .member = member->id,
                          .incarnation = member->incarnation,
                          .address = cm_strdup(member->data_address),
                          .runnable = RUNNABLE_GUESS,
                          .retry_ms = RETRY_MIN_MS};
    TAILQ_INIT(&router->queue);
    router->timer = pc_timer_create(routers->loop, router_timer, router);
    gw_router *after;
    TAILQ_FOREACH (after, &routers->list, link) {
        if (after->member > router->member) {
            TAILQ_INSERT_BEFORE(after, router, link);
            return router;
        }
    }
    TAILQ_INSERT_TAIL(&routers->list, router, link);
    return router;
}

static gw_router *router_find(const gw_routers *routers, const struct pc_epoch_member *member)
{
    gw_router *router;
    TAILQ_FOREACH (router, &routers->list, link) {
        if (router->member == member->id && router->incarnation == member->incarnation &&
            strcmp(router->address, member->data_address) == 0) {
            return router;
        }
    }
    return NULL;
}

/* Ends its link from our side. */
static void router_drop(gw_router *router)
{
    if (router->peer != NULL) {
        net_disconnect(router->peer);
    }
    router_unlink(router, CM_OK);
    router_free(router);
}

static void router_stands(gw_router *router, gw_place_standing standing)
{
    if (router->standing != standing) {
        router->standing = standing;
        router->routers->events.stands(router->routers->ctx, router, standing);
    }
}

void gw_routers_epoch(gw_routers *routers, const pc_epoch *epoch)
{
    gw_router *router, *next;
    TAILQ_FOREACH (router, &routers->list, link) {
        router->stays = false;
    }
    for (uint32_t i = 0; i < epoch->n_member; i++) {
        const struct pc_epoch_member *member = &epoch->members[i];
        if (member->role != BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER || member->data_address[0] == 0) {
            continue;
        }
        router = router_find(routers, member);
        if (router == NULL) {
            router = router_add(routers, member);
            router_connect(router);
        }
        router->stays = true;
        router_stands(router, member->draining ? GW_PLACE_DRAINING : GW_PLACE_MEMBER);
    }
    for (router = TAILQ_FIRST(&routers->list); router != NULL; router = next) {
        next = TAILQ_NEXT(router, link);
        if (!router->stays && router->up && !router->broken) {
            router_stands(router, GW_PLACE_OUT);
        } else if (!router->stays) {
            router_drop(router);
        }
    }
}

void gw_routers_drop_leavers(gw_routers *routers, bool (*needed)(void *ctx, const gw_router *router))
{
    gw_router *router, *next;
    for (router = TAILQ_FIRST(&routers->list); router != NULL; router = next) {
        next = TAILQ_NEXT(router, link);
        if (router->standing == GW_PLACE_OUT && !needed(routers->ctx, router)) {
            router_drop(router);
        }
    }
}

/* ---- what arrives ---- */

static void router_is_broken(gw_router *router)
{
    router->broken = true;
    pc_timer_set(router->timer, 0);
}

/* NULL: it is none; the link will be ended. */
static void *unpack(gw_routers *routers, gw_router *router, const ProtobufCMessageDescriptor *descriptor,
                    const net_event *event)
{
    ProtobufCMessage *message;
    cm_status status = pr_unpack(descriptor, event->payload, event->payload_bytes, &routers->arena, &message);
    if (status != CM_OK) {
        cm_error_log("router %u sent %llu bytes that are no %s: %s", router->member,
                     (unsigned long long)event->payload_bytes, descriptor->short_name,
                     cm_status_text(status));
        router_is_broken(router);
        return NULL;
    }
    return message;
}

static void take_step(gw_routers *routers, gw_router *router, const Baleen__Engine__V1__StepTokens *step)
{
    if (step->has_running) {
        router->running = step->running;
        router->waiting = step->has_waiting ? step->waiting : 0;
        router->runnable = step->has_runnable ? step->runnable : router->runnable;
        routers->events.load(routers->ctx, router, router->running + router->waiting);
    }
    for (size_t i = 0; i < step->n_seq && router->up; i++) {
        routers->events.tokens(routers->ctx, router, step->seq[i]);
    }
}

static void take_message(gw_routers *routers, const net_event *event)
{
    gw_router *router = net_peer_user(event->peer);
    if (router == NULL || router->broken) {
        return; /* a link that is being ended */
    }
    const void *message = NULL;
    if (event->type == PR_MSG_STEP_TOKENS) {
        message = unpack(routers, router, &baleen__engine__v1__step_tokens__descriptor, event);
        if (message != NULL) {
            take_step(routers, router, message);
        }
    } else if (event->type == PR_MSG_SEQ_FOUND) {
        message = unpack(routers, router, &baleen__engine__v1__seq_found__descriptor, event);
        if (message != NULL) {
            routers->events.found(routers->ctx, router, message);
        }
    } else {
        cm_error_log("router %u sent %s, which is not for a gateway", router->member,
                     pr_message_name(event->type));
        router_is_broken(router);
    }
    cm_arena_reset(&routers->arena);
}

static void take_sent(gw_routers *routers, const net_event *event)
{
    router_send *send = event->cookie;
    TAILQ_REMOVE(&routers->sends, send, link);
    cm_bytes_fini(&send->bytes);
    cm_free(send);
    gw_router *router;
    TAILQ_FOREACH (router, &routers->list, link) {
        router_flush(router);
    }
}

static void take_event(void *ctx, const net_event *event)
{
    gw_routers *routers = ctx;
    gw_router *router;
    switch (event->kind) {
    case NET_EV_UP:
        router = net_peer_user(event->peer);
        router->up = true;
        router->retry_ms = 0;
        cm_info("router %u at %s linked", router->member, router->address);
        routers->events.linked(routers->ctx, router);
        break;
    case NET_EV_DOWN:
        router = net_peer_user(event->peer);
        cm_warn("router %u at %s: %s", router->member, router->address, cm_status_text(event->status));
        pc_timer_clear(router->timer);
        router_unlink(router, event->status);
        router_goes_on(router);
        break;
    case NET_EV_MESSAGE:
        take_message(routers, event);
        net_release(routers->n, event);
        break;
    case NET_EV_SENT:
        take_sent(routers, event);
        break;
    }
}

/* ---- the whole ---- */

cm_status gw_routers_create(pc_loop *loop, const char *backend, const gw_routers_events *events, void *ctx,
                            gw_routers **routers_out, cm_error *err)
{
    net_options options;
    net_options_defaults(&options);
    options.backend = backend;
    options.keyed = true;
    gw_routers *routers = cm_alloc(sizeof(*routers));
    cm_status status = net_open(&options, &routers->n, err);
    if (status != CM_OK) {
        cm_free(routers);
        return status;
    }
    routers->loop = loop;
    routers->events = *events;
    routers->ctx = ctx;
    TAILQ_INIT(&routers->list);
    TAILQ_INIT(&routers->sends);
    cm_arena_init(&routers->arena, "step tokens", STEP_ARENA_CHUNK, STEP_ARENA_MAX);
    routers->pump = pc_netpump_create(loop, routers->n, take_event, routers);
    *routers_out = routers;
    return CM_OK;
}

static void nobody(void *ctx, gw_router *router)
{
    (void)ctx;
    (void)router;
}

void gw_routers_destroy(gw_routers *routers)
{
    if (routers == NULL) {
        return;
    }
    pc_netpump_destroy(routers->pump);
    net_close(routers->n);
    gw_router *router;
    static const gw_routers_events deaf = {.gone = nobody};
    routers->events = deaf;
    while ((router = TAILQ_FIRST(&routers->list)) != NULL) {
        router_free(router);
    }
    sends_free(&routers->sends);
    cm_arena_fini(&routers->arena);
    cm_free(routers);
}

void gw_routers_identity(gw_routers *routers, uint64_t cluster, uint32_t member_id)
{
    net_identity identity = {
        .cluster = cluster, .role = BALEEN__CONTROL__V1__ROLE__ROLE_GATEWAY, .member = member_id};
    net_set_identity(routers->n, &identity);
}

void gw_routers_frame_key(gw_routers *routers, uint64_t cluster, uint64_t epoch, const uint8_t *key)
{
    net_key_add(routers->n, cluster, epoch, key);
    pc_netpump_kick(routers->pump);
}

void gw_routers_retire_keys(gw_routers *routers, uint64_t oldest)
{
    net_key_retire(routers->n, oldest);
    pc_netpump_kick(routers->pump);
}

gw_routers_load gw_routers_get_load(const gw_routers *routers)
{
    gw_routers_load load = {0};
    const gw_router *router;
    TAILQ_FOREACH (router, &routers->list, link) {
        if (router->up && router->standing != GW_PLACE_OUT) {
            load.n_linked += router->standing == GW_PLACE_MEMBER;
            load.runnable += router->standing == GW_PLACE_MEMBER ? router->runnable : 0;
            load.running += router->running;
            load.waiting += router->waiting;
        }
    }
    return load;
}

gw_router *gw_routers_get(const gw_routers *routers, uint64_t number)
{
    gw_router *router;
    TAILQ_FOREACH (router, &routers->list, link) {
        if (router->number == number) {
            return router;
        }
    }
    return NULL;
}

gw_router *gw_routers_next(const gw_routers *routers, const gw_router *router)
{
    return router == NULL ? TAILQ_FIRST(&routers->list) : TAILQ_NEXT(router, link);
}

uint64_t gw_router_number(const gw_router *router)
{
    return router->number;
}

bool gw_router_is_up(const gw_router *router)
{
    return router->up && !router->broken;
}

uint32_t gw_router_member(const gw_router *router)
{
    return router->member;
}
