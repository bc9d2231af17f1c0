#include "router/engine/exchange.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/stats.h"
#include "proto/messages.h"

enum {
    EXCHANGE_EVENTS = 64,
    EXCHANGE_SLEEP_MS = 20, /* longest, inside a layer */
    EXCHANGE_OWNERS = 4,    /* of an expert, named when none can be asked */
};

/* What a flight came to. */
typedef struct exchange_flight {
    rt_xcore_layer layer;
    bool over;
    cm_status status;
    uint32_t expert; /* with CM_E_NO_OWNER */
} exchange_flight;

/* The machine decides; this file owns the links and the bytes of frames on their way. */
struct rt_exchange {
    rt_exchange_options options;
    net *rows;
    rt_xcore *core;
    uint8_t *staging; /* payloads of the round's frames that their link has no room for; the machine says when
                         they may be overwritten */
    exchange_flight flights[RT_FLIGHTS];
    uint64_t n_retries; /* of the machine, already counted */
    uint64_t waited_ns;
    char why[320]; /* rt_exchange_why */

    pthread_mutex_t lock; /* protects offered, offered_self */
    pc_epoch *offered;
    uint32_t offered_self;
    int wake_fd;
    _Atomic bool stopping;
    _Atomic bool ready;
    _Atomic uint32_t *picks; /* [n_layer][n_expert]; written by the compute thread alone */
};

/* In NET_EV_SENT, for frames whose payload stands in staging: which flight's. */
static void *exchange_cookie(uint32_t flight)
{
    return (void *)(uintptr_t)(flight + 1);
}

cm_status rt_exchange_create(const rt_exchange_options *options, rt_exchange **exchange_out, cm_error *err)
{
    rt_exchange *x = cm_alloc(sizeof(*x));
    x->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (x->wake_fd < 0) {
        cm_free(x);
        return cm_error_set(err, CM_E_IO, "", "eventfd: %s", strerror(errno));
    }
    x->options = *options;
    x->rows = options->rows;
    x->core = rt_xcore_create(&(rt_xcore_options){
        .limits = options->limits, .answer_ms = options->answer_ms, .wait_ms = options->wait_ms});
    x->staging = cm_alloc(rt_xcore_staging_bytes(x->core));
    x->picks = cm_alloc(sizeof(x->picks[0]) * options->n_layer * options->n_expert);
    pthread_mutex_init(&x->lock, NULL);
    *exchange_out = x;
    return CM_OK;
}

void rt_exchange_destroy(rt_exchange *x)
{
    net_close(x->rows);
    cm_stat_set(CM_STAT_ledger_frames, 0);
    close(x->wake_fd);
    pc_epoch_release(x->offered);
    pthread_mutex_destroy(&x->lock);
    rt_xcore_destroy(x->core);
    cm_free(x->staging);
    cm_free((void *)x->picks);
    cm_free(x);
}

void rt_exchange_wake(rt_exchange *x)
{
    uint64_t one = 1;
    ssize_t written = write(x->wake_fd, &one, sizeof(one));
    (void)written; /* full means awake already */
}

void rt_exchange_stop(rt_exchange *x)
{
    atomic_store(&x->stopping, true);
    rt_exchange_wake(x);
}

bool rt_exchange_ready(const rt_exchange *x)
{
    return atomic_load(&x->ready);
}

void rt_exchange_offer_epoch(rt_exchange *x, pc_epoch *epoch, uint32_t self)
{
    pthread_mutex_lock(&x->lock);
    pc_epoch *before = x->offered;
    x->offered = pc_epoch_hold(epoch);
    x->offered_self = self;
    pthread_mutex_unlock(&x->lock);
    pc_epoch_release(before);
    rt_exchange_wake(x);
}

void rt_exchange_frame_key(rt_exchange *x, uint64_t cluster, uint64_t epoch, const uint8_t *key)
{
    net_key_add(x->rows, cluster, epoch, key);
    rt_exchange_wake(x);
}

void rt_exchange_retire_keys(rt_exchange *x, uint64_t oldest)
{
    net_key_retire(x->rows, oldest);
    rt_exchange_wake(x);
}

/* ---- links ---- */

static void exchange_connect(rt_exchange *x, uint32_t rank)
{
    rt_xlink link = rt_xcore_link(x->core, rank);
    net_peer *peer = NULL;
    cm_error err = {0};
    int guard = cm_mem_guard_pause();
    if (net_connect(x->rows, link.address, &peer, &err) != CM_OK) {
        peer = NULL;
        cm_warn("worker %u at %s: %s", link.member_id, link.address, err.text);
    }
    cm_mem_guard_resume(guard);
    rt_xcore_connecting(x->core, cm_now_ms(), rank, peer);
}

static void exchange_report(rt_exchange *x, const rt_xact *act)
{
    rt_xlink link = rt_xcore_link(x->core, act->rank);
    if (act->status == CM_OK) {
        cm_info("link to worker %u at %s is up again", link.member_id, link.address);
    } else if (!act->again) {
        cm_warn("link to worker %u at %s lost: %s", link.member_id, link.address,
                cm_status_text(act->status));
    }
    if (x->options.peer_lost != NULL) {
        x->options.peer_lost(x->options.ctx, link.member_id, act->status);
    }
}

static void exchange_do_chores(rt_exchange *x)
{
    rt_xact act;
    while (rt_xcore_chore(x->core, cm_now_ms(), &act)) {
        switch (act.kind) {
        case RT_XACT_ADOPTED:
            net_set_identity(x->rows,
                             &(net_identity){rt_xcore_epoch(x->core)->cluster,
                                             BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER, rt_xcore_self(x->core)});
            break;
        case RT_XACT_DISCONNECT:
            net_disconnect(act.handle);
            break;
        case RT_XACT_REPORT:
            exchange_report(x, &act);
            break;
        case RT_XACT_CONNECT:
            exchange_connect(x, act.rank);
            break;
        default:
            CM_ASSERT_MSG(false, "chore %d", (int)act.kind);
        }
    }
}

static void exchange_follow_epoch(rt_exchange *x)
{
    pthread_mutex_lock(&x->lock);
    pc_epoch *epoch = x->offered;
    uint32_t self = x->offered_self;
    x->offered = NULL;
    pthread_mutex_unlock(&x->lock);
    if (epoch != NULL) {
        int guard = cm_mem_guard_pause();
        rt_xcore_offer(x->core, epoch, self);
        cm_mem_guard_resume(guard);
        pc_epoch_release(epoch);
    }
    exchange_do_chores(x);
    atomic_store(&x->ready, rt_xcore_ready(x->core));
}

/* ---- events ---- */

static void exchange_on_message(rt_exchange *x, const net_event *event)
{
    cm_error err = {0};
    cm_status status = CM_E_PROTOCOL;
    if (event->type == PR_MSG_COMBINE) {
        status = rt_xcore_combine(x->core, event->peer, event->header, event->header_bytes, event->payload,
                                  event->payload_bytes, &err);
    } else if (event->type == PR_MSG_REFUSE) {
        status = rt_xcore_refuse(x->core, event->peer, event->header, event->header_bytes, &err);
        if (status == CM_OK) {
            const pr_refuse *frame = event->header;
            cm_debug("%s refused layer %u of epoch %llu: %s, it holds %llu", net_peer_address(event->peer),
                     frame->head.layer, (unsigned long long)frame->head.epoch,
                     cm_status_text((cm_status)frame->status), (unsigned long long)frame->epoch);
        }
    }
    if (status != CM_OK) {
        cm_stat_add(CM_STAT_frames_refused, 1);
        cm_debug("dropped a %s frame from %s: %s", pr_message_name(event->type),
                 net_peer_address(event->peer), err.text);
    }
}

static void exchange_on_event(rt_exchange *x, const net_event *event)
{
    switch (event->kind) {
    case NET_EV_UP:
        rt_xcore_up(x->core, event->peer);
        break;
    case NET_EV_DOWN:
        rt_xcore_down(x->core, cm_now_ms(), event->peer, event->status);
        break;
    case NET_EV_MESSAGE:
        exchange_on_message(x, event);
        net_release(x->rows, event);
        break;
    case NET_EV_SENT:
        if (event->cookie != NULL) {
            rt_xcore_left(x->core, (uint32_t)(uintptr_t)event->cookie - 1);
        }
        break;
    }
}

/* Looks for awake_us before it finds nothing. */
static bool exchange_poll_awake(rt_exchange *x, uint64_t awake_us)
{
    net_event events[EXCHANGE_EVENTS];
    uint32_t n = net_poll_awake(x->rows, events, EXCHANGE_EVENTS, awake_us);
    for (uint32_t i = 0; i < n; i++) {
        exchange_on_event(x, &events[i]);
    }
    if (n > 0) {
        exchange_do_chores(x); /* a loss is told at once; not among the events: a link made anew could take
                                  the name of one that they are about */
    }
    return n > 0;
}

static bool exchange_poll(rt_exchange *x)
{
    return exchange_poll_awake(x, 0);
}

static void exchange_read_all(rt_exchange *x)
{
    while (exchange_poll(x)) {
    }
}

/* Polls until something happened or sleep_ms passed. */
static void exchange_wait(rt_exchange *x, uint32_t sleep_ms)
{
    if (exchange_poll_awake(x, 1000 * (uint64_t)sleep_ms) || !net_arm(x->rows)) {
        return;
    }
    uint32_t timer_ms = net_next_timer_ms(x->rows);
    uint32_t ms = timer_ms < sleep_ms ? timer_ms : sleep_ms;
    struct pollfd fds[2] = {{.fd = net_fd(x->rows), .events = POLLIN}, {.fd = x->wake_fd, .events = POLLIN}};
    poll(fds, 2, ms > INT32_MAX ? -1 : (int)ms);
    if (fds[1].revents != 0) {
        uint64_t count;
        ssize_t got = read(x->wake_fd, &count, sizeof(count));
        (void)got;
    }
    exchange_poll(x);
}

/* ---- layers ---- */

static void exchange_send(rt_exchange *x, const rt_xact *act)
{
    pr_dispatch header;
    uint64_t n_bytes = rt_xcore_payload_bytes(x->core, act->flight, act->part);
    uint8_t *room = net_room(act->handle, n_bytes),
            *payload = room != NULL ? room : x->staging + act->staged_at;
    rt_xcore_pack(x->core, act->flight, act->part, &header, payload);
    net_message message = {
        .type = PR_MSG_DISPATCH,
        .header = &header,
        .header_bytes = sizeof(header),
        .iov = {{payload, n_bytes}},
        .n_iov = 1,
        .deadline_ms = x->options.answer_ms,
        .cookie = exchange_cookie(act->flight),
    };
    rt_xcore_sent(x->core, net_send(act->handle, &message));
}

/* All that can be done now; returns when to look again although nothing came in. */
static uint64_t exchange_advance(rt_exchange *x)
{
    uint64_t now_ms = cm_now_ms();
    for (;;) {
        rt_xact act = rt_xcore_next(x->core, now_ms);
        if (act.kind == RT_XACT_SEND) {
            exchange_send(x, &act);
        } else if (act.kind == RT_XACT_DONE) {
            x->flights[act.flight].over = true;
            x->flights[act.flight].status = act.status;
            x->flights[act.flight].expert = act.expert;
        } else if (act.until_ms > now_ms) {
            return act.until_ms;
        } else {
            exchange_do_chores(x); /* another epoch comes into force */
        }
    }
}

static void exchange_sleep_until(rt_exchange *x, uint64_t until_ms)
{
    uint64_t now = cm_now_ms(), ms = until_ms > now ? until_ms - now : 0;
    exchange_wait(x, ms < EXCHANGE_SLEEP_MS ? (uint32_t)ms : EXCHANGE_SLEEP_MS);
    if (atomic_load(&x->stopping)) {
        rt_xcore_stop(x->core);
    }
    exchange_follow_epoch(x);
}

static void exchange_count_retries(rt_exchange *x)
{
    uint64_t n = rt_xcore_n_retries(x->core);
    if (n != x->n_retries) {
        cm_stat_add(CM_STAT_exchange_retries, (int64_t)(n - x->n_retries));
        x->n_retries = n;
    }
}

/* Once per layer, however often it is sent. One writer: no locked instruction for each slot. */
static void exchange_count(rt_exchange *x, const rt_xcore_layer *layer)
{
    CM_ASSERT(layer->layer < x->options.n_layer); /* experts were checked by the plan */
    _Atomic uint32_t *picks = x->picks + (size_t)layer->layer * x->options.n_expert;
    for (uint32_t i = 0; i < layer->n_row * x->options.limits.topk; i++) {
        uint32_t n = atomic_load_explicit(&picks[layer->experts[i]], memory_order_relaxed);
        atomic_store_explicit(&picks[layer->experts[i]], n + 1, memory_order_relaxed);
    }
}

uint32_t rt_exchange_picks(const rt_exchange *x, uint32_t layer, uint32_t expert)
{
    return atomic_load_explicit(&x->picks[(size_t)layer * x->options.n_expert + expert],
                                memory_order_relaxed);
}

static void exchange_explain(rt_exchange *x, uint32_t layer, uint32_t expert)
{
    const pc_epoch *epoch = rt_xcore_epoch(x->core);
    uint32_t n = 0;
    if (epoch == NULL || epoch->placement == NULL) {
        snprintf(x->why, sizeof(x->why), "no worker has joined yet");
        return;
    }
    const uint16_t *owners = pr_placement_owners(epoch->placement, layer, expert, &n);
    size_t at = (size_t)snprintf(x->why, sizeof(x->why),
                                 "nobody could be asked for expert %u of layer %u for %u ms:", expert, layer,
                                 x->options.wait_ms);
    for (uint32_t i = 0; i < n && i < EXCHANGE_OWNERS; i++) {
        rt_xlink link = rt_xcore_link(x->core, owners[i]);
        at += (size_t)snprintf(x->why + at, sizeof(x->why) - at, "%s worker %u is %s", i > 0 ? "," : "",
                               link.member_id, link.up ? "linked and does not answer" : "unreachable");
    }
}

const char *rt_exchange_why(const rt_exchange *x)
{
    return x->why;
}

void rt_exchange_begin(rt_exchange *x, uint32_t flight, const rt_xcore_layer *layer)
{
    x->flights[flight] = (exchange_flight){.layer = *layer};
    exchange_follow_epoch(x);
    rt_xcore_begin(x->core, flight, layer);
    exchange_advance(x);
    exchange_poll(x); /* what was sent leaves by progress */
}

void rt_exchange_poll(rt_exchange *x)
{
    exchange_read_all(x);
    exchange_advance(x);
}

/* What has arrived is looked at before anybody is given up for not having answered: a step may have computed
 * for longer than that. */
static void exchange_await(rt_exchange *x, const exchange_flight *flight)
{
    uint64_t start_ns = cm_now_ns();
    exchange_read_all(x);
    uint64_t until_ms = exchange_advance(x);
    while (!flight->over) {
        exchange_sleep_until(x, until_ms);
        until_ms = exchange_advance(x);
    }
    x->waited_ns += cm_now_ns() - start_ns;
}

cm_status rt_exchange_finish(rt_exchange *x, uint32_t flight)
{
    const exchange_flight *f = &x->flights[flight];
    exchange_await(x, f);
    if (f->status == CM_E_NO_OWNER) {
        exchange_explain(x, f->layer.layer, f->expert);
        cm_error_log("%s", x->why);
    }
    exchange_count_retries(x);
    if (f->status == CM_OK) {
        exchange_count(x, &f->layer);
    }
    cm_stat_set(CM_STAT_ledger_frames, (int64_t)net_in_flight(x->rows));
    return f->status;
}

void rt_exchange_drop(rt_exchange *x)
{
    for (uint32_t i = 0; i < RT_FLIGHTS; i++) {
        rt_xcore_drop(x->core, i);
    }
}

uint64_t rt_exchange_waited_ns(const rt_exchange *x)
{
    return x->waited_ns;
}

void rt_exchange_announce_idle(rt_exchange *x, uint64_t step)
{
    const pc_epoch *epoch = rt_xcore_epoch(x->core);
    for (uint32_t r = 0; r < rt_xcore_n_link(x->core); r++) {
        rt_xlink link = rt_xcore_link(x->core, r);
        if (!link.up) {
            continue;
        }
        pr_idle header = {{.version = PR_FRAME_VERSION,
                           .router = rt_xcore_self(x->core),
                           .cluster = epoch->cluster,
                           .epoch = epoch->number,
                           .step = step}};
        net_message message = {.type = PR_MSG_IDLE,
                               .header = &header,
                               .header_bytes = sizeof(header),
                               .deadline_ms = x->options.answer_ms};
        cm_status status = net_send(link.handle, &message);
        (void)status; /* a full queue means it is no news */
    }
}

void rt_exchange_idle(rt_exchange *x, uint32_t sleep_ms)
{
    exchange_follow_epoch(x);
    uint64_t now = cm_now_ms(), at_ms = rt_xcore_chore_ms(x->core);
    uint64_t ms = at_ms > now ? at_ms - now : 0;
    exchange_wait(x, ms < sleep_ms ? (uint32_t)ms : sleep_ms);
    cm_stat_set(CM_STAT_ledger_frames, (int64_t)net_in_flight(x->rows));
}
