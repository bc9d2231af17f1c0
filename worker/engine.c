#include "worker/engine.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/failpoint.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/stats.h"
#include "proto/frames.h"
#include "proto/messages.h"
#include "worker/epochs_core.h"
#include "worker/gather_core.h"

enum {
    ENGINE_EVENTS = 64,
    ENGINE_RESULTS = 4,             /* times row_max: rows of answers that may be on their way at once */
    ENGINE_SLICE_BYTES = 512 << 10, /* of an answer, in one message: what a core's own cache holds */
    ENGINE_LINGER_MS = 500,         /* at the end: for answers to leave */
    ENGINE_HOLD_US = 1000000, /* longest that a frame waits for routers that are behind, and of the time an
                                 answer may take */
    ENGINE_HOLD_PART = 4,
};

/* A dispatch frame on its way through: received, gathered, computed, answered. */
typedef struct engine_frame {
    net_event event;  /* the received message; its memory is released once computed. peer NULL: its link ended
                         meanwhile */
    uint32_t link;    /* number of the link it came by, as the gathering knows it */
    uint32_t slot0;   /* first row of its answer in the group's results */
    uint32_t n_ready; /* rows of its answer that are computed */
    uint32_t n_said;  /* and sent, in n_out messages that have not left */
    uint32_t n_out;
    bool over; /* nothing more is to be sent */
    struct engine_group *group;
} engine_frame;

/* Results of one group of frames, kept until all its answers have left. */
typedef struct engine_group {
    uint32_t row0, n_row; /* in the engine's results */
    uint32_t n_open;
} engine_group;

/* A reply for which its link has no room yet; a lost one would cost the router its answer time. It keeps its
 * frame's receive: what is owed can never be more than what net takes in, and a router that sends faster than
 * it reads is held back. */
typedef struct engine_debt {
    net_event event;
    engine_frame *answer; /* computed, its rows stand in its group; NULL: a refusal */
    pr_refuse refuse;
} engine_debt;

struct wk_engine {
    wk_engine_options options;
    const md_geometry *geometry;
    kn_device *device;
    kn_stream *stream;
    net *rows;
    wk_shard *shard;
    wk_gather *gather;
    cm_pool frames; /* engine_frame */
    cm_pool groups; /* engine_group */
    kn_ptr results; /* BF16 [ENGINE_RESULTS * row_max][d] */
    kn_q8 q8;       /* gathered rows: codes [row_max][d], scales */
    kn_q8 rows_in;  /* of the group under way: q8, or where its only frame has them */
    kn_expert_item *items;
    kn_expert_group *expert_groups;
    uint32_t *group_expert; /* of each group */
    uint32_t *counts;       /* [n_expert + 1] */
    void **computing;       /* engine_frame [frame_max], n_computing: of the group under way */
    uint32_t n_computing;

    pthread_mutex_t lock; /* protects offered, offered_self, retire_before */
    pc_epoch *offered;
    uint32_t offered_self;
    uint64_t retire_before;
    int wake_fd;
    _Atomic bool stopping;

    engine_debt *debts; /* [receives_max], oldest first */
    uint32_t n_debt;

    wk_serve serve;
    uint32_t n_links; /* ever; numbers them */
};

/* ---- create ---- */

static cm_status engine_alloc(wk_engine *e, cm_error *err)
{
    const md_geometry *g = e->geometry;
    uint64_t n = e->options.row_max;
    kn_limits limits = {.n_row = e->options.row_max,
                        .n_in = g->d > g->inner ? g->d : g->inner,
                        .n_inner = g->inner,
                        .n_head = 1,
                        .head_dim = g->head_dim,
                        .n_key = 1,
                        .n_expert = g->n_expert};
    cm_status status = kn_stream_open(e->device, &limits, &e->stream);
    if (status == CM_OK) {
        status = kn_mem_alloc(e->device, n * g->d, &e->q8.codes);
    }
    if (status == CM_OK) {
        status = kn_mem_alloc(e->device, n * kn_blocks(g->d, KN_ACT_BLOCK), &e->q8.scales);
    }
    if (status == CM_OK) {
        status = kn_mem_alloc(e->device, 2 * ENGINE_RESULTS * n * g->d, &e->results);
    }
    if (status != CM_OK) {
        return cm_error_set(err, status, "rows_max",
                            "no device memory for %u times %u rows: lower rows_max or frame_bytes",
                            ENGINE_RESULTS, e->options.row_max);
    }
    e->items = cm_alloc(sizeof(kn_expert_item) * n);
    e->expert_groups = cm_alloc(sizeof(kn_expert_group) * g->n_expert);
    e->group_expert = cm_alloc(sizeof(uint32_t) * g->n_expert);
    e->counts = cm_alloc(sizeof(uint32_t) * (g->n_expert + 1));
    e->computing = cm_alloc(sizeof(void *) * e->options.frame_max);
    e->debts = cm_alloc(sizeof(engine_debt) * e->options.rows.receives_max);
    cm_pool_init(&e->frames, "dispatch frames", sizeof(engine_frame), e->options.frame_max);
    cm_pool_init(&e->groups, "result groups", sizeof(engine_group), e->options.frame_max);
    return CM_OK;
}

/* A router gives an answer up after as long as we give one that cannot leave. */
static uint64_t engine_hold_us(const wk_engine_options *options)
{
    uint64_t most_us = 1000ull * options->answer_ms / ENGINE_HOLD_PART;
    return most_us < ENGINE_HOLD_US ? most_us : ENGINE_HOLD_US;
}

cm_status wk_engine_create(const wk_engine_options *options, wk_engine **engine_out,
                           char bound_out[NET_ADDRESS_BYTES], cm_error *err)
{
    wk_engine *e = cm_alloc(sizeof(*e));
    e->options = *options;
    e->geometry = md_checkpoint_geometry(options->checkpoint);
    /* whatever fits a frame can be computed: its answer has two bytes a value */
    uint32_t frame_rows = (uint32_t)(options->rows.message_bytes_max / (2ull * e->geometry->d));
    e->options.row_max = options->row_max > frame_rows ? options->row_max : frame_rows;
    e->device = options->opened;
    cm_status status = e->device == NULL ? kn_device_open(&options->device, &e->device, err) : CM_OK;
    if (status != CM_OK) {
        goto err_free;
    }
    status = net_open(&options->rows, &e->rows, err);
    if (status != CM_OK) {
        goto err_device;
    }
    status = net_listen(e->rows, options->address, bound_out, err);
    if (status != CM_OK) {
        goto err_net;
    }
    e->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (e->wake_fd < 0) {
        status = cm_error_set(err, CM_E_IO, "", "eventfd: %s", strerror(errno));
        goto err_net;
    }
    status = engine_alloc(e, err);
    if (status != CM_OK) {
        goto err_fd; /* device memory goes with the device */
    }
    status = wk_shard_create(options->checkpoint, e->device, options->device.n_threads, &e->shard);
    CM_ASSERT(status == CM_OK);
    e->gather = wk_gather_create(&(wk_gather_limits){.router_max = options->router_max,
                                                     .frame_max = options->frame_max,
                                                     .row_max = options->row_max,
                                                     .window_max_us = options->window_max_us,
                                                     .hold_max_us = engine_hold_us(options)});
    e->serve = (wk_serve){.d = e->geometry->d,
                          .n_layer = md_block_count(e->geometry),
                          .n_expert = e->geometry->n_expert,
                          .row_max = e->options.row_max};
    pthread_mutex_init(&e->lock, NULL);
    cm_info("device %s path %s, listening for rows on %s", kn_device_name(e->device),
            kn_device_isa(e->device), bound_out);
    *engine_out = e;
    return CM_OK;

err_fd:
    close(e->wake_fd);
err_net:
    net_close(e->rows);
err_device:
    kn_device_close(e->device);
err_free:
    cm_free(e);
    return status;
}

void wk_engine_destroy(wk_engine *e)
{
    wk_serve_fini(&e->serve);
    pc_epoch_release(e->offered);
    close(e->wake_fd);
    wk_gather_destroy(e->gather);
    cm_pool_fini(&e->frames);
    cm_pool_fini(&e->groups);
    kn_mem_free(e->device, e->results);
    kn_mem_free(e->device, e->q8.codes);
    kn_mem_free(e->device, e->q8.scales);
    cm_free(e->items);
    cm_free(e->expert_groups);
    cm_free(e->group_expert);
    cm_free(e->counts);
    cm_free(e->computing);
    cm_free(e->debts);
    wk_shard_destroy(e->shard);
    kn_stream_close(e->stream);
    kn_device_close(e->device);
    pthread_mutex_destroy(&e->lock);
    cm_free(e);
}

wk_shard *wk_engine_shard(wk_engine *e)
{
    return e->shard;
}

/* ---- from other threads ---- */

void wk_engine_wake(wk_engine *e)
{
    uint64_t one = 1;
    ssize_t written = write(e->wake_fd, &one, sizeof(one));
    (void)written; /* full means awake already */
}

void wk_engine_stop(wk_engine *e)
{
    atomic_store(&e->stopping, true);
    wk_engine_wake(e);
}

void wk_engine_commit(wk_engine *e, pc_epoch *epoch, uint32_t self)
{
    pthread_mutex_lock(&e->lock);
    pc_epoch *before = e->offered;
    e->offered = pc_epoch_hold(epoch);
    e->offered_self = self;
    pthread_mutex_unlock(&e->lock);
    pc_epoch_release(before);
    wk_engine_wake(e);
}

void wk_engine_retire(wk_engine *e, uint64_t oldest)
{
    pthread_mutex_lock(&e->lock);
    e->retire_before = oldest;
    pthread_mutex_unlock(&e->lock);
    net_key_retire(e->rows, oldest);
    wk_engine_wake(e);
}

void wk_engine_frame_key(wk_engine *e, uint64_t cluster, uint64_t epoch, const uint8_t *key)
{
    net_key_add(e->rows, cluster, epoch, key);
    wk_engine_wake(e);
}

/* ---- epochs, on the compute thread ---- */

static void engine_follow_epochs(wk_engine *e)
{
    pthread_mutex_lock(&e->lock);
    pc_epoch *epoch = e->offered;
    uint32_t self = e->offered_self;
    uint64_t before = e->retire_before;
    e->offered = NULL;
    e->retire_before = 0; /* once: another cluster's epochs may count from the start */
    pthread_mutex_unlock(&e->lock);
    wk_serve_retire(&e->serve, before);
    if (epoch != NULL) {
        wk_serve_commit(&e->serve, epoch, self);
        net_set_identity(e->rows,
                         &(net_identity){epoch->cluster, BALEEN__CONTROL__V1__ROLE__ROLE_WORKER, self});
        pc_epoch_release(epoch);
    }
    if (wk_gather_waiting(e->gather) == 0) {
        wk_shard_release(e->shard);
    }
}

/* ---- replies ---- */

/* Rows of its group are needed no more when all has left. */
static void engine_end_frame(wk_engine *e, engine_frame *entry)
{
    if (!entry->over || entry->n_out > 0) {
        return;
    }
    if (--entry->group->n_open == 0) {
        cm_pool_put(&e->groups, entry->group);
    }
    cm_pool_put(&e->frames, entry);
}

static void engine_on_sent(wk_engine *e, engine_frame *entry)
{
    if (entry != NULL) { /* not a refusal */
        entry->n_out--;
        engine_end_frame(e, entry);
    }
}

/* As many as a message may have, too: a router with longer frames than ours can ask for more. */
static uint32_t engine_slice_rows(const wk_engine *e)
{
    uint64_t most = e->options.rows.message_bytes_max, row_bytes = 2ull * e->geometry->d;
    uint64_t n = (most < ENGINE_SLICE_BYTES ? most : ENGINE_SLICE_BYTES) / row_bytes;
    return n > 0 ? (uint32_t)n : 1;
}

/* The next n rows of an answer. */
static cm_status engine_send_rows(const wk_engine *e, engine_frame *entry, uint32_t n, const void *rows)
{
    const pr_dispatch *frame = entry->event.header;
    uint32_t d = e->geometry->d;
    pr_combine header = {.head = frame->head, .d = d, .slot0 = entry->n_said, .n_slot = n};
    header.head.dtype = PR_DTYPE_BF16;
    net_message message = {
        .type = PR_MSG_COMBINE,
        .header = &header,
        .header_bytes = sizeof(header),
        .iov = {{rows, 2ull * n * d}},
        .n_iov = 1,
        .deadline_ms = e->options.answer_ms,
        .cookie = entry,
    };
    cm_status status = net_send(entry->event.peer, &message);
    if (status == CM_OK) {
        entry->n_said += n;
        entry->n_out++;
    }
    return status;
}

static const uint8_t *engine_results(const wk_engine *e, const engine_frame *entry)
{
    uint64_t row = (uint64_t)entry->group->row0 + entry->slot0 + entry->n_said;
    return (const uint8_t *)kn_mem_host(e->device, e->results) + 2 * row * e->geometry->d;
}

/* What is computed of an answer and not sent, in slices of one size but for the last. */
static cm_status engine_send_answer(const wk_engine *e, engine_frame *entry)
{
    const pr_dispatch *frame = entry->event.header;
    uint32_t n_slice = engine_slice_rows(e);
    cm_status status = CM_OK;
    while (status == CM_OK && entry->n_said < entry->n_ready) {
        uint32_t n = entry->n_ready - entry->n_said;
        if (n < n_slice && entry->n_ready < frame->n_slot) {
            break; /* more will come */
        }
        status = engine_send_rows(e, entry, n < n_slice ? n : n_slice, engine_results(e, entry));
    }
    return status;
}

static cm_status engine_send_refusal(const wk_engine *e, const engine_debt *debt)
{
    net_message message = {.type = PR_MSG_REFUSE,
                           .header = &debt->refuse,
                           .header_bytes = sizeof(debt->refuse),
                           .deadline_ms = e->options.answer_ms};
    return net_send(debt->event.peer, &message);
}

/* The reply has been sent, or need not or can not be sent any more. */
static void engine_end_debt(wk_engine *e, const engine_debt *debt)
{
    net_event event = debt->event; /* of the frame, which may end here */
    if (debt->answer != NULL) {
        debt->answer->over = true;
        engine_end_frame(e, debt->answer);
    }
    net_release(e->rows, &event);
}

/* false: the link has no room. */
static bool engine_pay(wk_engine *e, const engine_debt *debt)
{
    cm_status status =
        debt->answer != NULL ? engine_send_answer(e, debt->answer) : engine_send_refusal(e, debt);
    if (status == CM_AGAIN) {
        return false;
    }
    if (status != CM_OK) { /* the link is going */
        cm_debug("a reply to %s was not sent: %s", net_peer_address(debt->event.peer),
                 cm_status_text(status));
    }
    engine_end_debt(e, debt);
    return true;
}

/* Now, or when the link has room: a NET_EV_SENT comes before. */
static void engine_reply(wk_engine *e, const engine_debt *debt)
{
    if (!engine_pay(e, debt)) {
        CM_ASSERT(e->n_debt < e->options.rows.receives_max); /* each holds a receive */
        e->debts[e->n_debt++] = *debt;
    }
}

/* Sends what there is room for; gone: a link that has ended, NULL: none. */
static void engine_settle(wk_engine *e, const net_peer *gone)
{
    uint32_t n_kept = 0;
    for (uint32_t i = 0; i < e->n_debt; i++) {
        engine_debt debt = e->debts[i];
        if (debt.event.peer == gone) {
            engine_end_debt(e, &debt);
        } else if (!engine_pay(e, &debt)) {
            e->debts[n_kept++] = debt;
        }
    }
    e->n_debt = n_kept;
}

/* ---- frames in ---- */

static void engine_refuse(wk_engine *e, const net_event *event, cm_status status, uint32_t expert,
                          const char *why)
{
    const pr_frame_head *head = event->header;
    cm_stat_add(CM_STAT_frames_refused, 1);
    cm_debug("refused a %s frame from %s: %s: %s", pr_message_name(event->type),
             net_peer_address(event->peer), cm_status_text(status), why);
    if (event->header_bytes < sizeof(*head)) {
        net_release(e->rows, event); /* nobody to tell */
        return;
    }
    pr_refuse refuse = {.head = *head, .status = status, .expert = expert, .epoch = e->serve.newest};
    engine_reply(e, &(engine_debt){.event = *event, .refuse = refuse});
}

static bool engine_holds(const void *ctx, uint32_t layer, uint32_t expert)
{
    return wk_shard_expert(ctx, layer, expert) != NULL;
}

static uint32_t engine_link(const net_peer *peer)
{
    return (uint32_t)(uintptr_t)net_peer_user(peer);
}

static void engine_on_dispatch(wk_engine *e, const net_event *event)
{
    if (atomic_load(&e->stopping)) {
        net_release(e->rows, event); /* nobody would compute it; its router sees the link end */
        return;
    }
    const pr_dispatch *frame = event->header;
    cm_error err = {0};
    uint32_t expert = 0;
    cm_status status =
        wk_serve_check(&e->serve, net_peer_identity(event->peer)->member, event->header, event->header_bytes,
                       event->payload, event->payload_bytes, engine_holds, e->shard, &expert, &err);
    if (status != CM_OK) {
        engine_refuse(e, event, status, expert, err.text);
        return;
    }
    engine_frame *entry;
    if (cm_pool_get(&e->frames, (void **)&entry) != CM_OK) {
        engine_refuse(e, event, CM_E_CAPACITY, 0, "as many frames as may wait are here");
        return;
    }
    entry->event = *event;
    entry->link = engine_link(event->peer);
    status = wk_gather_arrived(e->gather, cm_now_ns() / 1000, entry->link, frame->flight, frame->head.layer,
                               frame->n_slot, entry);
    if (status != CM_OK) {
        cm_pool_put(&e->frames, entry);
        engine_refuse(e, event, status, 0, "too many frames or routers");
    }
}

static void engine_forget_link(wk_engine *e, uint32_t link)
{
    engine_frame *entry;
    while ((entry = wk_gather_gone(e->gather, link)) != NULL) {
        net_release(e->rows, &entry->event);
        cm_pool_put(&e->frames, entry);
    }
    for (uint32_t f = 0; f < e->n_computing; f++) {
        entry = e->computing[f];
        if (entry->link == link) {
            entry->event.peer = NULL; /* its memory may soon be another link's */
        }
    }
}

static void engine_on_event(wk_engine *e, const net_event *event)
{
    switch (event->kind) {
    case NET_EV_UP:
        net_peer_set_user(event->peer, (void *)(uintptr_t)++e->n_links);
        cm_info("router %u linked from %s", net_peer_identity(event->peer)->member,
                net_peer_address(event->peer));
        break;
    case NET_EV_DOWN:
        cm_info("router link %s down: %s", net_peer_address(event->peer), cm_status_text(event->status));
        engine_forget_link(e, engine_link(event->peer));
        engine_settle(e, event->peer);
        break;
    case NET_EV_SENT:
        engine_on_sent(e, event->cookie);
        break;
    case NET_EV_MESSAGE:
        if (event->type == PR_MSG_DISPATCH) {
            engine_on_dispatch(e, event);
        } else if (event->type == PR_MSG_IDLE && event->header_bytes == sizeof(pr_idle)) {
            wk_gather_idle(e->gather, engine_link(event->peer));
            net_release(e->rows, event);
        } else {
            engine_refuse(e, event, CM_E_PROTOCOL, 0, "not a message for a worker");
        }
        break;
    }
}

static uint32_t engine_poll_awake(wk_engine *e, uint64_t awake_us)
{
    net_event events[ENGINE_EVENTS];
    uint32_t n = net_poll_awake(e->rows, events, ENGINE_EVENTS, awake_us);
    for (uint32_t i = 0; i < n; i++) {
        engine_on_event(e, &events[i]);
    }
    return n;
}

static uint32_t engine_poll(wk_engine *e)
{
    return engine_poll_awake(e, 0);
}

/* ---- in place ----
 * A group of one frame, on a device whose memory is the host's: its rows are read where they came, and
 * results are written where its router will read them, if its link has room. Items, slots and results then
 * have one order. */

static kn_ptr engine_view(const wk_engine *e, const void *host)
{
    kn_ptr ptr = {(uintptr_t)host};
    return host != NULL && kn_mem_host(e->device, ptr) == host ? ptr : (kn_ptr){0};
}

static bool engine_rows_in_place(wk_engine *e, void *const *frames, uint32_t n_frame)
{
    const engine_frame *entry = frames[0];
    const pr_dispatch *frame = entry->event.header;
    const uint8_t *payload = entry->event.payload;
    kn_q8 rows = {engine_view(e, payload + pr_dispatch_codes_at(frame->n_slot)),
                  engine_view(e, payload + pr_dispatch_scales_at(frame->n_slot, frame->n_row, frame->d))};
    bool in_place = n_frame == 1 && rows.codes.addr != 0 && rows.scales.addr != 0;
    e->rows_in = in_place ? rows : e->q8;
    return in_place;
}

/* Where the results of n items from item0 on go; 0: nowhere, they are to be kept here. As many as make a
 * message, or all that are left, and only if all before them are sent: they would go in their place. */
static kn_ptr engine_room(const wk_engine *e, uint32_t item0, uint32_t n)
{
    const engine_frame *entry = e->computing[0];
    const pr_dispatch *frame = entry->event.header;
    uint64_t n_bytes = 2ull * n * e->geometry->d;
    if (e->n_computing > 1 || entry->event.peer == NULL || entry->n_said != item0 ||
        n_bytes > e->options.rows.message_bytes_max ||
        (n < engine_slice_rows(e) && item0 + n < frame->n_slot)) {
        return (kn_ptr){0};
    }
    return engine_view(e, net_room(entry->event.peer, n_bytes));
}

static void engine_send_room(const wk_engine *e, uint32_t n, kn_ptr room)
{
    engine_frame *entry = e->computing[0];
    entry->n_ready += n;
    cm_status status = engine_send_rows(e, entry, n, kn_mem_host(e->device, room));
    CM_ASSERT_MSG(status != CM_AGAIN, "a room was given and is no more");
    entry->n_said = entry->n_ready; /* or the link is going, and its router asks somebody else */
}

/* ---- compute ---- */

static void engine_copy_rows(wk_engine *e, const engine_frame *entry, uint32_t row0)
{
    const pr_dispatch *frame = entry->event.header;
    const uint8_t *payload = entry->event.payload;
    uint32_t d = frame->d, n_block = frame->row_blocks;
    kn_copy_to_device(e->stream, kn_at(e->q8.codes, (uint64_t)row0 * d),
                      payload + pr_dispatch_codes_at(frame->n_slot), (uint64_t)frame->n_row * d);
    kn_copy_to_device(e->stream, kn_at(e->q8.scales, (uint64_t)row0 * n_block),
                      payload + pr_dispatch_scales_at(frame->n_slot, frame->n_row, d),
                      (uint64_t)frame->n_row * n_block);
}

/* Sorts the group's slots by expert (counting sort: order inside an expert is frame order) and copies rows
 * together. */
static uint32_t engine_pack(wk_engine *e, void *const *frames, uint32_t n_frame, uint32_t layer)
{
    const md_geometry *g = e->geometry;
    uint32_t n_group = 0, row0 = 0, slot0 = 0;
    bool in_place = engine_rows_in_place(e, frames, n_frame);
    memset(e->counts, 0, sizeof(uint32_t) * (g->n_expert + 1));
    for (uint32_t f = 0; f < n_frame; f++) {
        const engine_frame *entry = frames[f];
        const pr_dispatch *frame = entry->event.header;
        const pr_slot *slots = entry->event.payload;
        for (uint32_t i = 0; i < frame->n_slot; i++) {
            e->counts[slots[i].expert + 1]++;
        }
    }
    for (uint32_t x = 0; x < g->n_expert; x++) {
        if (e->counts[x + 1] > 0) {
            e->group_expert[n_group] = x;
            e->expert_groups[n_group++] =
                (kn_expert_group){wk_shard_weights(e->shard, layer, x), e->counts[x], e->counts[x + 1]};
        }
        e->counts[x + 1] += e->counts[x];
    }
    for (uint32_t f = 0; f < n_frame; f++) {
        engine_frame *entry = frames[f];
        const pr_dispatch *frame = entry->event.header;
        const pr_slot *slots = entry->event.payload;
        if (!in_place) {
            engine_copy_rows(e, entry, row0);
        }
        for (uint32_t i = 0; i < frame->n_slot; i++) {
            e->items[e->counts[slots[i].expert]++] =
                (kn_expert_item){row0 + slots[i].row, slot0 + i, slots[i].weight};
        }
        entry->slot0 = slot0;
        row0 += frame->n_row;
        slot0 += frame->n_slot;
    }
    return n_group;
}

/* Routers would take a worker for dead that says nothing while it computes a large group. */
static void engine_breathe(wk_engine *e)
{
    int guard = cm_mem_guard_pause();
    do {
        engine_poll(e);
        engine_settle(e, NULL);
    } while (cm_failpoint_fires(CM_FAILPOINT_worker_compute_stalls) && !atomic_load(&e->stopping));
    cm_mem_guard_resume(guard);
}

/* Slots of experts below this one are computed: what makes a slice of an answer leaves, if its link has room.
 * The others learn of the rest later. */
static void engine_send_ready(const wk_engine *e, uint32_t expert)
{
    for (uint32_t f = 0; f < e->n_computing; f++) {
        engine_frame *entry = e->computing[f];
        const pr_dispatch *frame = entry->event.header;
        const pr_slot *slots = entry->event.payload;
        while (entry->n_ready < frame->n_slot && slots[entry->n_ready].expert < expert) {
            entry->n_ready++;
        }
        if (entry->event.peer != NULL) {
            cm_status status = engine_send_answer(e, entry);
            (void)status; /* what did not leave is owed once all is computed */
        }
    }
}

static void engine_compute_slice(wk_engine *e, const kn_expert_group *groups, uint32_t n_group,
                                 uint32_t layer, kn_ptr results)
{
    kn_moe(e->device)->experts(e->stream, groups, n_group, e->items, e->rows_in, e->geometry->swiglu_limit,
                               results);
    cm_status status = kn_stream_sync(e->stream);
    CM_ASSERT_MSG(status == CM_OK, "device %s failed while computing layer %u", kn_device_name(e->device),
                  layer);
    cm_stat_add(CM_STAT_worker_expert_bytes, (int64_t)(n_group * md_expert_bytes(e->geometry)));
}

/* In slices of whole groups, or of the rows of a large one. */
static void engine_compute_groups(wk_engine *e, uint32_t n_group, uint32_t layer, kn_ptr results)
{
    kn_expert_group *groups = e->expert_groups;
    uint32_t device_rows = kn_moe(e->device)->slice_rows;
    uint32_t slice = device_rows != 0 ? device_rows : UINT32_MAX;
    while (n_group > 0) {
        uint32_t n = 0, n_row = 0;
        while (n < n_group && n_row + groups[n].n_item <= slice) {
            n_row += groups[n++].n_item;
        }
        kn_expert_group cut = {groups[0].expert, groups[0].item0, slice};
        n_row = n > 0 ? n_row : slice;
        kn_ptr room = engine_room(e, groups[0].item0, n_row);
        kn_ptr first = room.addr != 0 ? kn_at(room, -2ull * groups[0].item0 * e->geometry->d) : results;
        engine_compute_slice(e, n > 0 ? groups : &cut, n > 0 ? n : 1, layer, first);
        if (n == 0) {
            groups[0].item0 += slice;
            groups[0].n_item -= slice;
        }
        groups += n;
        n_group -= n;
        if (room.addr != 0) {
            engine_send_room(e, n_row, room);
        } else if (n_group > 0) {
            engine_send_ready(e, e->group_expert[groups - e->expert_groups]);
        }
        if (n_group > 0) {
            engine_breathe(e);
        }
    }
}

/* From here on its answers may be on their way. */
static void engine_begin_group(wk_engine *e, uint32_t n_frame, engine_group *group)
{
    e->n_computing = n_frame;
    group->n_open = 1 + n_frame; /* ours, until all answers are on their way */
    group->n_row = 0;
    for (uint32_t f = 0; f < n_frame; f++) {
        engine_frame *entry = e->computing[f];
        entry->group = group;
        group->n_row += ((const pr_dispatch *)entry->event.header)->n_slot;
    }
}

static void engine_compute(wk_engine *e, uint32_t n_frame, engine_group *group)
{
    void *const *frames = e->computing;
    const engine_frame *first = frames[0];
    uint32_t layer = ((const pr_dispatch *)first->event.header)->head.layer;
    engine_begin_group(e, n_frame, group);
    cm_stat_add(CM_STAT_worker_rows, group->n_row);
    engine_compute_groups(e, engine_pack(e, frames, n_frame, layer), layer,
                          kn_at(e->results, 2ull * group->row0 * e->geometry->d));
    e->n_computing = 0;
    for (uint32_t f = 0; f < n_frame; f++) {
        engine_frame *entry = frames[f];
        entry->n_ready = ((const pr_dispatch *)entry->event.header)->n_slot;
        engine_debt debt = {.event = entry->event, .answer = entry};
        if (debt.event.peer != NULL) {
            engine_reply(e, &debt);
        } else {
            engine_end_debt(e, &debt);
        }
    }
    if (--group->n_open == 0) {
        cm_pool_put(&e->groups, group);
    }
    cm_stat_add(CM_STAT_worker_batches, 1);
}

/* Room for the results of a group of row_max rows, as low as possible: where the caches still are. What
 * others have not taken yet is in the way with its own rows only, so that a router that takes nothing holds
 * up nobody for long. false: there is none. */
static bool engine_place(const wk_engine *e, engine_group *group)
{
    uint32_t n = e->options.row_max, at = 0;
    for (uint32_t i = 0; i < e->groups.n_max; i++) {
        const engine_group *other = cm_pool_at(&e->groups, i);
        if (other != NULL && other != group && at < other->row0 + other->n_row && other->row0 < at + n) {
            at = other->row0 + other->n_row;
            i = UINT32_MAX; /* from the start: those before may be in the way now */
        }
    }
    group->row0 = at;
    group->n_row = n;
    return at <= (ENGINE_RESULTS - 1) * n;
}

/* Computes what is due; says how long nothing will be. */
static uint64_t engine_work(wk_engine *e)
{
    engine_group *group;
    uint64_t wait_us = UINT64_MAX;
    if (wk_gather_waiting(e->gather) == 0) {
        return wait_us;
    }
    if (cm_pool_get(&e->groups, (void **)&group) != CM_OK) {
        return wait_us; /* as below */
    }
    if (!engine_place(e, group)) {
        cm_pool_put(&e->groups, group);
        return wait_us; /* the results are on their way out: an event will come */
    }
    uint32_t n = 0;
    if (!cm_failpoint_fires(CM_FAILPOINT_worker_combine_late)) {
        n = wk_gather_next(e->gather, cm_now_ns() / 1000, e->computing, e->options.frame_max, &wait_us);
    } else {
        wait_us = 1000;
    }
    if (n == 0) {
        cm_pool_put(&e->groups, group);
        return wait_us;
    }
    cm_mem_guard_begin("expert compute");
    engine_compute(e, n, group);
    cm_mem_guard_end();
    wk_gather_computed(e->gather, cm_now_ns() / 1000);
    return 0;
}

static void engine_sleep(wk_engine *e, uint64_t wait_us)
{
    if (engine_poll_awake(e, wait_us) > 0 || !net_arm(e->rows)) {
        return;
    }
    uint64_t timer_us = (uint64_t)net_next_timer_ms(e->rows) * 1000;
    wait_us = timer_us < wait_us ? timer_us : wait_us;
    struct timespec at_most = {.tv_sec = (time_t)(wait_us / 1000000),
                               .tv_nsec = (long)(wait_us % 1000000) * 1000};
    struct pollfd fds[2] = {{.fd = net_fd(e->rows), .events = POLLIN}, {.fd = e->wake_fd, .events = POLLIN}};
    ppoll(fds, 2, &at_most, NULL);
    if (fds[1].revents != 0) {
        uint64_t count;
        ssize_t got = read(e->wake_fd, &count, sizeof(count));
        (void)got;
    }
}

/* Waiting frames are dropped (their routers see the link end and ask another owner); answers on their way may
 * leave. */
static void engine_wind_up(wk_engine *e)
{
    uint64_t give_up_ms = cm_now_ms() + ENGINE_LINGER_MS;
    for (uint32_t i = 0; i < e->frames.n_max; i++) {
        engine_frame *entry = cm_pool_at(&e->frames, i);
        if (entry != NULL && entry->group == NULL) {
            engine_forget_link(e, entry->link);
        }
    }
    while (e->frames.n_used > 0 && cm_now_ms() < give_up_ms) {
        if (engine_poll(e) == 0) {
            engine_sleep(e, 1000 * ENGINE_LINGER_MS);
        }
        engine_settle(e, NULL);
    }
    for (uint32_t i = 0; i < e->n_debt; i++) {
        engine_end_debt(e, &e->debts[i]);
    }
    e->n_debt = 0;
    net_close(e->rows);
    cm_stat_set(CM_STAT_ledger_frames, 0);
}

void wk_engine_run(wk_engine *e)
{
    while (!atomic_load(&e->stopping)) {
        engine_follow_epochs(e);
        uint32_t n = engine_poll(e);
        if (n == 0) {
            wk_gather_looked(e->gather);
        }
        engine_settle(e, NULL);
        uint64_t wait_us = engine_work(e);
        cm_stat_set(CM_STAT_ledger_frames, (int64_t)net_in_flight(e->rows));
        if (n == 0 && wait_us > 0) {
            engine_sleep(e, wait_us);
        }
    }
    engine_wind_up(e);
}
