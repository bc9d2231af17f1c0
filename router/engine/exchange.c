#include "router/engine/exchange.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
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
    EXCHANGE_RECONNECT_MS = 200, /* between attempts to reach a worker of the epoch */
    EXCHANGE_RETRY_MS = 20,      /* longest sleep before a refused or lost part is planned again */
};

/* One worker of the epoch in force. */
typedef struct exchange_link {
    uint32_t member_id;
    char address[NET_ADDRESS_BYTES];
    net_peer *peer; /* NULL: not connected */
    bool up;
    uint64_t retry_at_ms;
} exchange_link;

typedef enum part_state { PART_OPEN, PART_DONE, PART_FAILED } part_state;

/* One frame of the round under way; same index as in the plan. */
typedef struct exchange_part {
    part_state state;
    exchange_link *link;
    uint64_t deadline_ms;
} exchange_part;

struct rt_exchange {
    rt_exchange_options options;
    net *rows;
    rt_plan *plan;
    uint8_t *wanted;  /* [row_max * topk] slots without a result */
    uint64_t *avoid;  /* bit per rank: no link up */
    uint8_t *staging; /* payloads of the round's frames; free for reuse once n_sending is 0 */
    exchange_part *parts;
    uint32_t n_part;
    uint32_t first_exchange; /* number of part 0 of the round; the others follow */
    uint32_t next_exchange;
    uint32_t n_sending; /* frames whose NET_EV_SENT is to come */

    pthread_mutex_t lock; /* protects offered, offered_self */
    pc_epoch *offered;
    uint32_t offered_self;
    int wake_fd;
    _Atomic bool stopping;
    _Atomic bool ready;

    pc_epoch *epoch; /* in force; NULL before the first */
    uint32_t self;
    exchange_link *links; /* [placement->n_rank], rank order */
    uint32_t n_link;
    const rt_exchange_layer *layer; /* of the run under way */
    bool progress;                  /* results have come since it was last asked */
};

cm_status rt_exchange_create(const rt_exchange_options *options, rt_exchange **exchange_out, cm_error *err)
{
    const rt_plan_limits *limits = &options->limits;
    rt_exchange *x = cm_alloc(sizeof(*x));
    x->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (x->wake_fd < 0) {
        cm_free(x);
        return cm_error_set(err, CM_E_IO, "", "eventfd: %s", strerror(errno));
    }
    x->options = *options;
    x->rows = options->rows;
    x->plan = rt_plan_create(limits);
    uint64_t n_slot = (uint64_t)limits->row_max * limits->topk;
    uint64_t row_bytes = (uint64_t)limits->d + kn_blocks(limits->d, KN_ACT_BLOCK) + sizeof(pr_slot);
    x->wanted = cm_alloc(n_slot);
    x->avoid = cm_alloc(PR_RANK_MAX / 8);
    x->staging = cm_alloc(n_slot * row_bytes + (uint64_t)x->plan->part_max * 3 * 64);
    x->parts = cm_alloc(sizeof(exchange_part) * x->plan->part_max);
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
    pc_epoch_release(x->epoch);
    pthread_mutex_destroy(&x->lock);
    rt_plan_destroy(x->plan);
    cm_free(x->wanted);
    cm_free(x->avoid);
    cm_free(x->staging);
    cm_free(x->parts);
    cm_free(x->links);
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

static void exchange_fail_parts(rt_exchange *x, const exchange_link *link)
{
    for (uint32_t i = 0; i < x->n_part; i++) {
        if (x->parts[i].link == link && x->parts[i].state == PART_OPEN) {
            x->parts[i].state = PART_FAILED;
        }
    }
}

static void exchange_link_lost(rt_exchange *x, exchange_link *link, cm_status status)
{
    cm_warn("link to worker %u at %s lost: %s", link->member_id, link->address, cm_status_text(status));
    link->peer = NULL;
    link->up = false;
    link->retry_at_ms = cm_now_ms() + EXCHANGE_RECONNECT_MS;
    exchange_fail_parts(x, link);
    if (x->options.peer_lost != NULL) {
        x->options.peer_lost(x->options.ctx, link->member_id, status);
    }
}

static void exchange_connect_links(rt_exchange *x)
{
    uint64_t now = cm_now_ms();
    bool all_up = x->n_link > 0;
    for (uint32_t r = 0; r < x->n_link; r++) {
        exchange_link *link = &x->links[r];
        all_up &= link->up;
        if (link->peer == NULL && now >= link->retry_at_ms) {
            cm_error err = {0};
            cm_status status = net_connect(x->rows, link->address, &link->peer, &err);
            if (status == CM_OK) {
                net_peer_set_user(link->peer, link);
            } else {
                link->peer = NULL;
                link->retry_at_ms = now + EXCHANGE_RECONNECT_MS;
                cm_warn("worker %u at %s: %s", link->member_id, link->address, err.text);
            }
        }
    }
    atomic_store(&x->ready, all_up);
}

static exchange_link *exchange_link_of(exchange_link *links, uint32_t n, uint32_t member_id)
{
    for (uint32_t i = 0; i < n; i++) {
        if (links[i].member_id == member_id) {
            return &links[i];
        }
    }
    return NULL;
}

/* Takes over the links of workers that stay, drops those that left. Runs between rounds only. */
static void exchange_adopt_epoch(rt_exchange *x, pc_epoch *epoch, uint32_t self)
{
    const pr_placement *p = epoch->placement;
    uint32_t n = p != NULL ? p->n_rank : 0;
    /* under another name every link must greet anew, and another cluster's ids mean other workers */
    bool same = x->epoch != NULL && x->epoch->cluster == epoch->cluster && x->self == self;
    exchange_link *links = cm_alloc(sizeof(*links) * n);
    for (uint32_t r = 0; r < n; r++) {
        exchange_link *old = same ? exchange_link_of(x->links, x->n_link, p->rank_member[r]) : NULL;
        if (old != NULL) {
            links[r] = *old;
            old->peer = NULL;
        } else {
            const struct pc_epoch_member *member = pc_epoch_member_find(epoch, p->rank_member[r]);
            links[r].member_id = p->rank_member[r];
            strncpy(links[r].address, member != NULL ? member->data_address : "",
                    sizeof(links[r].address) - 1);
        }
        if (links[r].peer != NULL) {
            net_peer_set_user(links[r].peer, &links[r]);
        }
    }
    for (uint32_t i = 0; i < x->n_link; i++) {
        if (x->links[i].peer != NULL) {
            net_disconnect(x->links[i].peer);
        }
    }
    cm_free(x->links);
    pc_epoch_release(x->epoch);
    x->links = links;
    x->n_link = n;
    x->epoch = epoch;
    x->self = self;
    net_set_identity(x->rows, &(net_identity){epoch->cluster, BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER, self});
}

static void exchange_follow_epoch(rt_exchange *x)
{
    pthread_mutex_lock(&x->lock);
    pc_epoch *epoch = x->offered;
    uint32_t self = x->offered_self;
    x->offered = NULL;
    pthread_mutex_unlock(&x->lock);
    int guard = cm_mem_guard_pause();
    if (epoch != NULL) {
        exchange_adopt_epoch(x, epoch, self);
    }
    exchange_connect_links(x);
    cm_mem_guard_resume(guard);
}

/* ---- events ---- */

static void exchange_take_results(rt_exchange *x, uint32_t i, const uint16_t *rows)
{
    const rt_part *part = &x->plan->parts[i];
    uint32_t d = x->options.limits.d;
    for (uint32_t s = 0; s < part->n_slot; s++) {
        uint32_t target = x->plan->targets[part->slot0 + s];
        memcpy(x->layer->results + (size_t)target * d, rows + (size_t)s * d, sizeof(uint16_t) * d);
        x->wanted[target] = 0;
    }
    x->parts[i].state = PART_DONE;
    x->progress = true;
}

/* The round's part a frame answers, n_part if none: an answer to an earlier round, or nonsense. */
static uint32_t exchange_part_of(const rt_exchange *x, const pr_frame_head *head, const net_peer *peer)
{
    uint32_t i = head->exchange - x->first_exchange;
    if (i >= x->n_part || x->parts[i].state != PART_OPEN || x->parts[i].link->peer != peer ||
        x->layer == NULL || head->step != x->layer->step || head->layer != x->layer->layer ||
        head->cluster != x->epoch->cluster) {
        return x->n_part;
    }
    return i;
}

static void exchange_on_message(rt_exchange *x, const net_event *event)
{
    cm_error err = {0};
    uint32_t i = x->n_part;
    if (event->type == PR_MSG_COMBINE &&
        pr_combine_check(event->header, event->header_bytes, event->payload_bytes, x->options.limits.d,
                         &err) == CM_OK) {
        const pr_combine *frame = event->header;
        i = exchange_part_of(x, &frame->head, event->peer);
        if (i < x->n_part && frame->n_slot == x->plan->parts[i].n_slot) {
            exchange_take_results(x, i, event->payload);
            return;
        }
    } else if (event->type == PR_MSG_REFUSE && event->header_bytes == sizeof(pr_refuse)) {
        const pr_refuse *frame = event->header;
        i = exchange_part_of(x, &frame->head, event->peer);
        if (i < x->n_part) {
            cm_debug("worker %u refused layer %u of epoch %llu: %s, it holds %llu",
                     x->parts[i].link->member_id, frame->head.layer, (unsigned long long)frame->head.epoch,
                     cm_status_text((cm_status)frame->status), (unsigned long long)frame->epoch);
            x->parts[i].state = PART_FAILED;
            return;
        }
    }
    cm_stat_add(CM_STAT_frames_refused, 1);
    cm_debug("dropped a %s frame from %s: %s", pr_message_name(event->type), net_peer_address(event->peer),
             err.text[0] != '\0' ? err.text : "it answers nothing that is open");
}

static void exchange_on_event(rt_exchange *x, const net_event *event)
{
    exchange_link *link = event->peer != NULL ? net_peer_user(event->peer) : NULL;
    switch (event->kind) {
    case NET_EV_UP:
        if (link != NULL) {
            link->up = true;
        }
        break;
    case NET_EV_DOWN:
        if (link != NULL) {
            exchange_link_lost(x, link, event->status);
        }
        break;
    case NET_EV_MESSAGE:
        exchange_on_message(x, event);
        net_release(x->rows, event);
        break;
    case NET_EV_SENT:
        CM_ASSERT(x->n_sending > 0);
        x->n_sending--;
        break;
    }
}

static bool exchange_poll(rt_exchange *x)
{
    net_event events[EXCHANGE_EVENTS];
    uint32_t n = net_poll(x->rows, events, EXCHANGE_EVENTS);
    for (uint32_t i = 0; i < n; i++) {
        exchange_on_event(x, &events[i]);
    }
    return n > 0;
}

/* Polls until something happened or sleep_ms passed. */
static void exchange_wait(rt_exchange *x, uint32_t sleep_ms)
{
    if (exchange_poll(x) || !net_arm(x->rows)) {
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

/* ---- one round: send the plan's parts, collect what comes ---- */

static void exchange_send_part(rt_exchange *x, uint32_t i, uint8_t *payload)
{
    const rt_part *part = &x->plan->parts[i];
    const rt_exchange_layer *layer = x->layer;
    uint32_t d = x->options.limits.d, n_block = kn_blocks(d, KN_ACT_BLOCK);
    pr_dispatch header = {
        .head = {.version = PR_FRAME_VERSION,
                 .dtype = PR_DTYPE_E4M3,
                 .router = x->self,
                 .cluster = x->epoch->cluster,
                 .epoch = x->epoch->number,
                 .step = layer->step,
                 .layer = layer->layer,
                 .exchange = x->first_exchange + i},
        .d = d,
        .n_row = part->n_row,
        .n_slot = part->n_slot,
        .row_blocks = n_block,
    };
    uint8_t *codes = payload + pr_dispatch_codes_at(part->n_slot);
    uint8_t *scales = payload + pr_dispatch_scales_at(part->n_slot, part->n_row, d);
    memcpy(payload, x->plan->slots + part->slot0, sizeof(pr_slot) * part->n_slot);
    for (uint32_t k = 0; k < part->n_row; k++) {
        uint32_t row = x->plan->rows[part->row0 + k];
        memcpy(codes + (size_t)k * d, layer->codes + (size_t)row * d, d);
        memcpy(scales + (size_t)k * n_block, layer->scales + (size_t)row * n_block, n_block);
    }
    net_message message = {
        .type = PR_MSG_DISPATCH,
        .header = &header,
        .header_bytes = sizeof(header),
        .iov = {{payload, pr_dispatch_bytes(part->n_slot, part->n_row, d, n_block)}},
        .n_iov = 1,
        .deadline_ms = x->options.answer_ms,
    };
    exchange_part *open = &x->parts[i];
    open->link = &x->links[part->rank];
    open->deadline_ms = cm_now_ms() + x->options.answer_ms;
    cm_status status = CM_AGAIN;
    while (open->link->peer != NULL && (status = net_send(open->link->peer, &message)) == CM_AGAIN) {
        exchange_wait(x, EXCHANGE_RETRY_MS); /* the link's send queue is full: let it drain */
    }
    open->state = status == CM_OK ? PART_OPEN : PART_FAILED;
    x->n_sending += status == CM_OK;
}

static bool exchange_settled(const rt_exchange *x)
{
    for (uint32_t i = 0; i < x->n_part; i++) {
        if (x->parts[i].state == PART_OPEN) {
            return false;
        }
    }
    return true;
}

static void exchange_expire_parts(rt_exchange *x)
{
    uint64_t now = cm_now_ms();
    for (uint32_t i = 0; i < x->n_part; i++) {
        exchange_link *link = x->parts[i].link;
        if (x->parts[i].state == PART_OPEN && now >= x->parts[i].deadline_ms) {
            net_disconnect(link->peer);
            exchange_link_lost(x, link, CM_E_DEADLINE);
        }
    }
}

static cm_status exchange_round(rt_exchange *x, bool *overlap_done)
{
    uint8_t *payload = x->staging;
    uint32_t d = x->options.limits.d;
    while (x->n_sending > 0) {
        exchange_wait(x,
                      EXCHANGE_RETRY_MS); /* frames of an earlier round still stand in the staging memory */
    }
    x->n_part = 0;
    x->first_exchange = x->next_exchange;
    x->next_exchange += x->plan->n_part;
    for (uint32_t i = 0; i < x->plan->n_part; i++) {
        const rt_part *part = &x->plan->parts[i];
        x->parts[i] = (exchange_part){.state = PART_FAILED};
        x->n_part = i + 1;
        exchange_send_part(x, i, payload);
        payload += pr_dispatch_bytes(part->n_slot, part->n_row, d, kn_blocks(d, KN_ACT_BLOCK));
    }
    exchange_poll(x);
    if (!*overlap_done) {
        *overlap_done = true;
        x->layer->overlap(x->layer->overlap_ctx);
    }
    while (!exchange_settled(x)) {
        if (atomic_load(&x->stopping)) {
            return CM_E_CANCELLED;
        }
        exchange_wait(x, EXCHANGE_RETRY_MS);
        exchange_expire_parts(x);
    }
    return CM_OK;
}

static bool exchange_any_wanted(const rt_exchange *x, uint32_t n_slot)
{
    return memchr(x->wanted, 1, n_slot) != NULL;
}

static cm_status exchange_plan(rt_exchange *x, const rt_exchange_layer *layer, uint32_t *expert_out)
{
    if (x->epoch == NULL || x->epoch->placement == NULL) {
        *expert_out = 0;
        return CM_E_NO_OWNER;
    }
    memset(x->avoid, 0, PR_RANK_MAX / 8);
    for (uint32_t r = 0; r < x->n_link; r++) {
        if (!x->links[r].up) {
            x->avoid[r / 64] |= 1ull << (r % 64);
        }
    }
    return rt_plan_build(x->plan, &x->options.limits, x->epoch->placement, layer->layer, layer->experts,
                         layer->weights, layer->n_row, x->wanted, x->avoid, expert_out);
}

cm_status rt_exchange_run(rt_exchange *x, const rt_exchange_layer *layer)
{
    uint32_t n_slot = layer->n_row * x->options.limits.topk, expert = 0;
    uint64_t give_up_ms = 0; /* 0: not blocked */
    bool overlap_done = false;
    cm_status status = CM_OK;
    memset(x->wanted, 1, n_slot);
    x->layer = layer;
    while (status == CM_OK && exchange_any_wanted(x, n_slot)) {
        exchange_follow_epoch(x);
        cm_status planned = exchange_plan(x, layer, &expert);
        if (planned == CM_OK) {
            status = exchange_round(x, &overlap_done);
        }
        if (status != CM_OK || !exchange_any_wanted(x, n_slot)) {
            break;
        }
        if (give_up_ms == 0 || x->progress) {
            x->progress = false;
            give_up_ms = cm_now_ms() + x->options.wait_ms;
            cm_stat_add(CM_STAT_exchange_retries, 1);
        }
        if (atomic_load(&x->stopping)) {
            status = CM_E_CANCELLED;
        } else if (cm_now_ms() >= give_up_ms) {
            status = CM_E_NO_OWNER;
            cm_error_log("layer %u expert %u has had no live owner for %u ms", layer->layer, expert,
                         x->options.wait_ms);
        } else {
            exchange_wait(x, EXCHANGE_RETRY_MS);
        }
    }
    x->n_part = 0;
    x->layer = NULL;
    cm_stat_set(CM_STAT_ledger_frames, (int64_t)net_in_flight(x->rows));
    return status;
}

void rt_exchange_keepalive(rt_exchange *x)
{
    exchange_poll(x);
}

void rt_exchange_announce_idle(rt_exchange *x, uint64_t step)
{
    for (uint32_t r = 0; r < x->n_link; r++) {
        if (!x->links[r].up) {
            continue;
        }
        pr_idle header = {{.version = PR_FRAME_VERSION,
                           .router = x->self,
                           .cluster = x->epoch->cluster,
                           .epoch = x->epoch->number,
                           .step = step}};
        net_message message = {.type = PR_MSG_IDLE,
                               .header = &header,
                               .header_bytes = sizeof(header),
                               .deadline_ms = x->options.answer_ms};
        x->n_sending += net_send(x->links[r].peer, &message) == CM_OK; /* a full queue means it is no news */
    }
}

void rt_exchange_idle(rt_exchange *x, uint32_t sleep_ms)
{
    exchange_follow_epoch(x);
    bool waiting = false;
    for (uint32_t r = 0; r < x->n_link; r++) {
        waiting |= x->links[r].peer == NULL;
    }
    exchange_wait(x, waiting && sleep_ms > EXCHANGE_RECONNECT_MS ? EXCHANGE_RECONNECT_MS : sleep_ms);
    cm_stat_set(CM_STAT_ledger_frames, (int64_t)net_in_flight(x->rows));
}
