/* A worker's process: session, epochs, gathering, loads that take time, answers that leave when they leave.
 */
#include <string.h>

#include "common/base/assert.h"
#include "proto/messages.h"
#include "tests/sim/sim.h"
#include "worker/epochs_core.h"
#include "worker/gather_core.h"

enum {
    WORKER_GROUPS = 4,     /* whose answers may be on their way at once */
    WORKER_GROUP_MAX = 64, /* frames computed together */
    WORKER_LOADS = 5,      /* one runs, four wait */
    WORKER_DRAIN_MS = 3000,
    WORKER_IDS_MAX = 64,
};

typedef struct group group;

typedef struct frame {
    sim_end *end;
    uint64_t link;
    pr_dispatch header;
    uint8_t *payload;
    size_t n_bytes;
    uint32_t slot0;
    group *group;
} frame;

struct group {
    uint16_t *results;
    uint32_t n_open;
};

typedef struct load {
    pc_epoch *epoch;
    uint32_t rank, at; /* next (layer, expert) */
} load;

typedef struct worker {
    sim_member member;
    wk_hold hold;
    wk_serve serve;
    wk_gather *gather;
    cm_pool frames, groups;
    bool held[SIM_LAYERS_MAX * SIM_EXPERTS_MAX];
    load loads[WORKER_LOADS]; /* the first runs */
    uint32_t n_load;
    net_identity identity;
    uint32_t ids[WORKER_IDS_MAX]; /* it ever had: an epoch knows it by the one it had then */
    uint32_t n_id;
    sim_followed followed, retired; /* the loop's view */
    /* on their way to the compute thread: the newest replaces what it has not taken */
    pc_epoch *offered;
    uint32_t offered_self;
    uint64_t retire_before;
    void *computing[WORKER_GROUP_MAX]; /* frames of the group being computed */
    uint32_t n_computing;
    group *group; /* of computing */
    bool draining;
    uint64_t drain_until_us;
} worker;

static uint32_t worker_index(const sim *s, uint32_t layer, uint32_t expert)
{
    return layer * s->shape.n_expert + expert;
}

/* ---- loads ---- */

static void load_step(sim *s, void *arg, uint64_t tag);

static void load_next(sim *s, sim_proc *proc)
{
    worker *w = proc->state;
    uint64_t us = sim_between(s, SIM_TIMES, 200, 4000);
    if (w->n_load == 0) {
        return;
    }
    if (sim_strikes(s, SIM_FAULT_load_slow)) {
        us += sim_between(s, SIM_TIMES, 100, 1500) * SIM_MS;
    }
    sim_at(s, s->now_us + us, load_step, proc, 0);
}

static void load_end(sim *s, sim_proc *proc, cm_status status)
{
    worker *w = proc->state;
    load done = w->loads[0];
    memmove(w->loads, w->loads + 1, sizeof(done) * --w->n_load);
    sim_trace(s, proc, "load for epoch %llu: %s", (unsigned long long)done.epoch->number,
              cm_status_text(status));
    if (w->hold.prepared == done.epoch) {
        pc_mcore_prepared(w->member.core, done.epoch->number, status,
                          status != CM_OK ? "an expert cannot be read" : NULL);
    }
    pc_epoch_release(done.epoch);
    load_next(s, proc);
    sim_member_act(s, proc, &w->member);
    sim_go(s, proc);
}

/* One expert, if it is ours and not there. */
static void load_step(sim *s, void *arg, uint64_t tag)
{
    sim_proc *proc = arg;
    worker *w = proc->state;
    if (!proc->alive || sim_put_off(s, proc, load_step, arg, tag)) {
        return;
    }
    load *l = &w->loads[0];
    const pr_placement *p = l->epoch->placement;
    uint32_t n = s->shape.n_layer * s->shape.n_expert;
    while (l->at < n &&
           (p == NULL || l->rank >= p->n_rank || w->held[l->at] ||
            !pr_placement_owns(p, l->at / s->shape.n_expert, l->at % s->shape.n_expert, l->rank))) {
        l->at++;
    }
    if (l->at == n) {
        load_end(s, proc, CM_OK);
    } else if (sim_strikes(s, SIM_FAULT_load_fails)) {
        load_end(s, proc, CM_E_IO);
    } else {
        w->held[l->at++] = true;
        load_next(s, proc);
    }
}

/* ---- epochs ---- */

static void worker_keep(sim *s, worker *w)
{
    const pr_placement *placements[WK_EPOCHS + 1];
    uint32_t ranks[WK_EPOCHS + 1];
    uint32_t n = wk_hold_list(&w->hold, pc_mcore_id(w->member.core), placements, ranks);
    for (uint32_t layer = 0; layer < s->shape.n_layer; layer++) {
        for (uint32_t e = 0; e < s->shape.n_expert; e++) {
            bool wanted = false;
            for (uint32_t i = 0; i < n && !wanted; i++) {
                wanted = pr_placement_owns(placements[i], layer, e, ranks[i]);
            }
            w->held[worker_index(s, layer, e)] &= wanted;
        }
    }
}

static void worker_prepare(sim *s, sim_proc *proc, pc_epoch *epoch)
{
    worker *w = proc->state;
    wk_hold_prepare(&w->hold, epoch);
    if (w->n_load == WORKER_LOADS) {
        pc_mcore_prepared(w->member.core, epoch->number, CM_E_CAPACITY, "earlier loads are still running");
        return;
    }
    const pr_placement *p = epoch->placement;
    w->loads[w->n_load++] =
        (load){pc_epoch_hold(epoch), p != NULL ? pr_placement_rank_of(p, pc_mcore_id(w->member.core)) : 0, 0};
    if (w->n_load == 1) {
        load_next(s, proc);
    }
}

static void worker_finish(sim *s, void *arg, uint64_t tag)
{
    sim_proc *proc = arg;
    (void)tag;
    if (proc->alive) {
        sim_kill(s, proc, false);
    }
}

/* The compute thread looks what the loop left for it. */
static void worker_follow(sim *s, void *arg, uint64_t tag)
{
    sim_proc *proc = arg;
    worker *w = proc->state;
    if (!proc->alive || sim_put_off(s, proc, worker_follow, arg, tag)) {
        return;
    }
    if (w->retire_before > 0) {
        w->retired = (sim_followed){pc_mcore_cluster(w->member.core), w->retire_before};
    }
    wk_serve_retire(&w->serve, w->retire_before);
    w->retire_before = 0;
    if (w->offered != NULL) {
        wk_serve_commit(&w->serve, w->offered, w->offered_self);
        w->identity =
            (net_identity){w->offered->cluster, BALEEN__CONTROL__V1__ROLE__ROLE_WORKER, w->offered_self};
        pc_epoch_release(w->offered);
        w->offered = NULL;
    }
    sim_go(s, proc);
}

static void worker_tell_compute(sim *s, sim_proc *proc)
{
    sim_at(s, s->now_us + sim_below(s, SIM_TIMES, 1500), worker_follow, proc, 0);
}

static void worker_commit(sim *s, sim_proc *proc, pc_epoch *epoch)
{
    worker *w = proc->state;
    uint32_t self = pc_mcore_id(w->member.core);
    sim_check_followed(s, proc, epoch, &w->followed);
    wk_hold_commit(&w->hold, epoch);
    pc_epoch_release(w->offered);
    w->offered = pc_epoch_hold(epoch);
    w->offered_self = self;
    worker_tell_compute(s, proc);
    pc_mcore_committed(w->member.core, epoch->number);
    const pr_placement *p = epoch->placement;
    if (w->draining && (p == NULL || pr_placement_rank_of(p, self) == p->n_rank)) {
        sim_at(s, s->now_us, worker_finish, proc, 0);
    }
}

static void worker_retire(sim *s, sim_proc *proc, uint64_t oldest)
{
    worker *w = proc->state;
    wk_hold_retire(&w->hold, oldest);
    w->retire_before = oldest;
    worker_tell_compute(s, proc);
    worker_keep(s, w);
}

static void worker_remember_id(sim *s, worker *w)
{
    uint32_t id = pc_mcore_id(w->member.core);
    if (w->n_id == 0 || w->ids[w->n_id - 1] != id) {
        if (w->n_id == WORKER_IDS_MAX) {
            sim_fail(s, "a worker was given %u ids", w->n_id);
        }
        w->ids[w->n_id++] = id;
    }
}

static void worker_news(sim *s, sim_proc *proc, const pc_mout *out)
{
    worker *w = proc->state;
    switch (out->kind) {
    case PC_MOUT_WELCOME:
        worker_remember_id(s, w);
        break;
    case PC_MOUT_PREPARE:
        worker_prepare(s, proc, out->value);
        break;
    case PC_MOUT_ABORT:
        if (wk_hold_abort(&w->hold, out->epoch)) {
            worker_keep(s, w);
        }
        break;
    case PC_MOUT_COMMIT:
        worker_commit(s, proc, out->value);
        break;
    case PC_MOUT_RETIRE:
        worker_retire(s, proc, out->epoch);
        break;
    case PC_MOUT_DRAIN:
        s->hosts[proc->host].leaving = true;
        pc_mcore_leave(w->member.core); /* the end of the session is for good */
        sim_at(s, s->now_us, worker_finish, proc, 0);
        break;
    case PC_MOUT_REFUSED:
        sim_at(s, s->now_us, worker_finish, proc, 0);
        break;
    default:
        break;
    }
}

/* ---- frames ---- */

static void frame_free(worker *w, frame *f)
{
    cm_free(f->payload);
    cm_pool_put(&w->frames, f);
}

static void worker_refuse(sim *s, sim_proc *proc, sim_end *end, const sim_message *message, cm_status status,
                          uint32_t expert, const char *why)
{
    const worker *w = proc->state;
    pr_refuse header = {.status = status, .expert = expert, .epoch = w->serve.newest};
    s->counts.frames_refused++;
    memcpy(&header.head, message->header, sizeof(header.head));
    sim_trace(s, proc, "refuses exchange %u of epoch %llu: %s", header.head.exchange,
              (unsigned long long)header.head.epoch, why);
    cm_status sent = sim_send(s, end, PR_MSG_REFUSE, &header, sizeof(header), NULL, 0, NULL);
    (void)sent; /* the router will ask again */
}

typedef struct holding {
    const sim *s;
    const worker *w;
} holding;

static bool worker_is_held(const void *ctx, uint32_t layer, uint32_t expert)
{
    const holding *h = ctx;
    return h->w->held[worker_index(h->s, layer, expert)];
}

static void worker_dispatch(sim *s, sim_proc *proc, sim_end *end, const sim_message *m)
{
    worker *w = proc->state;
    holding h = {s, w};
    cm_error err = {0};
    uint32_t expert = 0;
    frame *f = NULL;
    cm_status status = wk_serve_check(&w->serve, end->peer.member, m->header, m->header_bytes, m->data,
                                      m->n_bytes, worker_is_held, &h, &expert, &err);
    if (status == CM_OK && cm_pool_get(&w->frames, (void **)&f) != CM_OK) {
        status = cm_error_set(&err, CM_E_CAPACITY, NULL, "too many frames wait");
    }
    if (status != CM_OK) {
        worker_refuse(s, proc, end, m, status, expert, err.text);
        return;
    }
    const pr_dispatch *header = (const pr_dispatch *)m->header;
    const pr_slot *slots = (const pr_slot *)m->data;
    for (uint32_t i = 0; i < header->n_slot; i++) {
        sim_check_frame(s, proc, w->ids, w->n_id, &w->retired, &header->head, slots[i].expert);
    }
    *f = (frame){.end = end, .link = end->number, .header = *header, .n_bytes = m->n_bytes};
    f->payload = cm_alloc_aligned(m->n_bytes);
    memcpy(f->payload, m->data, m->n_bytes);
    status = wk_gather_arrived(w->gather, s->now_us, (uint32_t)end->number, header->flight,
                               header->head.layer, header->n_slot, f);
    if (status != CM_OK) {
        frame_free(w, f);
        worker_refuse(s, proc, end, m, status, 0, "too many frames or routers");
    }
}

static void worker_forget_link(worker *w, const sim_end *end)
{
    frame *f;
    while ((f = wk_gather_gone(w->gather, (uint32_t)end->number)) != NULL) {
        frame_free(w, f);
    }
}

static void worker_sent(sim *s, sim_proc *proc, void *cookie)
{
    worker *w = proc->state;
    frame *f = cookie;
    (void)s;
    if (--f->group->n_open == 0) {
        cm_free(f->group->results);
        cm_pool_put(&w->groups, f->group);
    }
    frame_free(w, f);
}

/* ---- compute ---- */

static void worker_compute_frame(frame *f, uint16_t *out)
{
    const pr_dispatch *header = &f->header;
    const pr_slot *slots = (const pr_slot *)f->payload;
    const uint8_t *codes = f->payload + pr_dispatch_codes_at(header->n_slot);
    const uint8_t *scales = f->payload + pr_dispatch_scales_at(header->n_slot, header->n_row, SIM_D);
    for (uint32_t i = 0; i < header->n_slot; i++) {
        sim_model_expert(header->head.layer, slots[i].expert, slots[i].weight,
                         codes + (size_t)slots[i].row * SIM_D, scales[slots[i].row], out + (size_t)i * SIM_D);
    }
}

static void worker_answer(sim *s, sim_proc *proc, frame *f)
{
    pr_combine header = {.head = f->header.head, .d = SIM_D, .n_slot = f->header.n_slot};
    header.head.dtype = PR_DTYPE_BF16;
    cm_status status = sim_send(s, f->end, PR_MSG_COMBINE, &header, sizeof(header),
                                f->group->results + f->slot0 * SIM_D, 2ull * f->header.n_slot * SIM_D, f);
    if (status != CM_OK) {
        sim_trace(s, proc, "answer to exchange %u not sent: %s", header.head.exchange,
                  cm_status_text(status));
        worker_sent(s, proc, f); /* the router will ask again */
    }
}

static void worker_computed(sim *s, void *arg, uint64_t tag)
{
    sim_proc *proc = arg;
    worker *w = proc->state;
    if (!proc->alive || sim_put_off(s, proc, worker_computed, arg, tag)) {
        return;
    }
    group *g = w->group;
    uint32_t n = w->n_computing;
    w->group = NULL;
    w->n_computing = 0;
    g->n_open = n;
    for (uint32_t i = 0; i < n; i++) {
        worker_answer(s, proc, w->computing[i]);
    }
    wk_gather_computed(w->gather, s->now_us);
    wk_gather_looked(w->gather);
    sim_go(s, proc);
}

static uint64_t worker_work(sim *s, sim_proc *proc)
{
    worker *w = proc->state;
    uint64_t wait_us = SIM_NEVER;
    group *g;
    if (w->group != NULL || wk_gather_waiting(w->gather) == 0 ||
        cm_pool_get(&w->groups, (void **)&g) != CM_OK) {
        return SIM_NEVER;
    }
    uint32_t n = wk_gather_next(w->gather, s->now_us, w->computing, WORKER_GROUP_MAX, &wait_us), slot0 = 0;
    if (n == 0) {
        cm_pool_put(&w->groups, g);
        return wait_us == UINT64_MAX ? SIM_NEVER : s->now_us + wait_us;
    }
    for (uint32_t i = 0; i < n; i++) {
        frame *f = w->computing[i];
        f->group = g;
        f->slot0 = slot0;
        slot0 += f->header.n_slot;
    }
    g->results = cm_alloc(2ull * slot0 * SIM_D);
    for (uint32_t i = 0; i < n; i++) {
        frame *f = w->computing[i];
        worker_compute_frame(f, g->results + f->slot0 * SIM_D);
    }
    w->group = g;
    w->n_computing = n;
    sim_at(s, s->now_us + sim_between(s, SIM_TIMES, 50, 1500), worker_computed, proc, 0);
    return SIM_NEVER;
}

/* ---- the process ---- */

static void worker_up(sim *s, sim_proc *proc, sim_end *end)
{
    (void)s;
    (void)proc;
    (void)end;
}

static void worker_down(sim *s, sim_proc *proc, sim_end *end, cm_status status)
{
    worker *w = proc->state;
    if (!sim_member_down(s, proc, &w->member, end, status)) {
        worker_forget_link(w, end);
    }
}

static void worker_message(sim *s, sim_proc *proc, sim_end *end, const sim_message *message)
{
    worker *w = proc->state;
    if (sim_member_message(s, proc, &w->member, end, message)) {
        return;
    }
    if (message->type == PR_MSG_DISPATCH) {
        worker_dispatch(s, proc, end, message);
    } else if (message->type == PR_MSG_IDLE && message->header_bytes == sizeof(pr_idle)) {
        wk_gather_idle(w->gather, (uint32_t)end->number);
    } else {
        sim_fail(s, "%s got a %s message", proc->name, pr_message_name(message->type));
    }
}

static uint64_t worker_pump(sim *s, sim_proc *proc)
{
    worker *w = proc->state;
    uint64_t wake_us = sim_member_pump(s, proc, &w->member), at_us = worker_work(s, proc);
    if (wk_gather_waiting(w->gather) > s->shape.frame_max || w->frames.n_used > s->shape.frame_max) {
        sim_fail(s, "%s has %u frames, at most %u", proc->name, w->frames.n_used, s->shape.frame_max);
    }
    if (w->draining) {
        bool over = !pc_mcore_connected(w->member.core) || s->now_us >= w->drain_until_us;
        if (over) {
            sim_at(s, s->now_us, worker_finish, proc, 0);
            w->drain_until_us = SIM_NEVER;
        }
        at_us = w->drain_until_us < at_us ? w->drain_until_us : at_us;
    }
    return wake_us < at_us ? wake_us : at_us;
}

static net_identity worker_identity(const sim_proc *proc)
{
    return ((const worker *)proc->state)->identity;
}

static void worker_end(sim *s, sim_proc *proc)
{
    worker *w = proc->state;
    uint64_t wait_us;
    void *frames[1];
    (void)s;
    while (wk_gather_waiting(w->gather) > 0) {
        uint32_t n = wk_gather_next(w->gather, UINT64_MAX / 2, frames, 1, &wait_us);
        CM_ASSERT(n == 1);
    }
    for (uint32_t i = 0; i < w->frames.n_max; i++) {
        frame *f = cm_pool_at(&w->frames, i);
        if (f != NULL) {
            frame_free(w, f);
        }
    }
    for (uint32_t i = 0; i < w->groups.n_max; i++) {
        group *g = cm_pool_at(&w->groups, i);
        if (g != NULL) {
            cm_free(g->results);
            cm_pool_put(&w->groups, g);
        }
    }
    while (w->n_load > 0) {
        pc_epoch_release(w->loads[--w->n_load].epoch);
    }
    wk_gather_destroy(w->gather);
    cm_pool_fini(&w->frames);
    cm_pool_fini(&w->groups);
    pc_epoch_release(w->offered);
    wk_hold_fini(&w->hold);
    wk_serve_fini(&w->serve);
    sim_member_fini(&w->member);
    cm_free(w);
}

static const sim_ops worker_ops = {.up = worker_up,
                                   .down = worker_down,
                                   .message = worker_message,
                                   .sent = worker_sent,
                                   .pump = worker_pump,
                                   .identity = worker_identity,
                                   .end = worker_end};

void sim_worker_start(sim *s, sim_proc *proc)
{
    const sim_shape *shape = &s->shape;
    worker *w = cm_alloc(sizeof(*w));
    proc->ops = &worker_ops;
    proc->state = w;
    w->serve = (wk_serve){.d = SIM_D,
                          .n_layer = shape->n_layer,
                          .n_expert = shape->n_expert,
                          .row_max = shape->row_max * shape->topk};
    w->gather = wk_gather_create(&(wk_gather_limits){.router_max = 16,
                                                     .frame_max = shape->frame_max,
                                                     .row_max = shape->row_max,
                                                     .window_max_us = shape->window_us,
                                                     .hold_max_us = 1000 * shape->answer_ms / 4});
    cm_pool_init(&w->frames, "sim frames", sizeof(frame), shape->frame_max);
    cm_pool_init(&w->groups, "sim groups", sizeof(group), WORKER_GROUPS);
    sim_member_init(s, proc, &w->member, BALEEN__CONTROL__V1__ROLE__ROLE_WORKER, true, worker_news);
    sim_member_act(s, proc, &w->member);
}

void sim_worker_leave(sim *s, sim_proc *proc)
{
    worker *w = proc->state;
    if (w->draining) {
        return;
    }
    sim_trace(s, proc, "is drained");
    w->draining = true;
    w->drain_until_us = s->now_us + WORKER_DRAIN_MS * SIM_MS;
    if (pc_mcore_connected(w->member.core) && w->hold.n_known > 0) {
        pc_mcore_leave(w->member.core);
        sim_member_act(s, proc, &w->member);
    }
    sim_go(s, proc);
}

bool sim_worker_holds(const sim_proc *proc, uint32_t layer, uint32_t expert)
{
    const worker *w = proc->state;
    return w->held[layer * w->serve.n_expert + expert];
}

bool sim_worker_is(const sim_proc *proc, uint64_t cluster, uint32_t id)
{
    const pc_mcore *core = ((const worker *)proc->state)->member.core;
    return pc_mcore_cluster(core) == cluster && pc_mcore_id(core) == id;
}

void sim_worker_ledger(const sim_proc *proc, char *text, size_t cap)
{
    const worker *w = proc->state;
    text[0] = 0;
    if (w->frames.n_used + w->groups.n_used + wk_gather_waiting(w->gather) + w->n_load > 0) {
        snprintf(text, cap, "%u frames, %u groups, %u gathered, %u loads", w->frames.n_used, w->groups.n_used,
                 wk_gather_waiting(w->gather), w->n_load);
    } else if (w->hold.prepared != NULL) {
        snprintf(text, cap, "epoch %llu is prepared, and nobody will commit it",
                 (unsigned long long)w->hold.prepared->number);
    }
}
