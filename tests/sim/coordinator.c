/* A coordinator's process: its machine, sessions, and its log: a disk of its own that may be slow, fail, or
 * leave it unsure, or etcd behind the real store_etcd.c, which says whether it is the active one. */
#include <string.h>

#include "common/base/assert.h"
#include "coordinator/answers.h"
#include "coordinator/co_core.h"
#include "coordinator/store.h"
#include "proto/pack.h"
#include "tests/sim/etcd.h"

enum { COORDINATOR_WRITES_MAX = 64 };

typedef struct session {
    LIST_ENTRY(session) link;
    sim_end *end;
    bool finished; /* by us: what still arrives is not heard */
} session;

typedef struct disk_write {
    uint64_t ticket, number;
    uint32_t member_id;
    co_epoch *epoch; /* held; may be NULL */
} disk_write;

typedef struct coordinator {
    co_core *core;   /* NULL: not the active one */
    co_store *store; /* NULL: the disk is its own */
    char active_address[PC_ADDRESS_BYTES], why[480];
    LIST_HEAD(, session) sessions;
    disk_write writes[COORDINATOR_WRITES_MAX]; /* in order; the first is being done */
    uint32_t n_write;
    cm_arena arena;
    cm_bytes packed;
    uint64_t n_step, next_ticket;
    uint32_t n_wish;                          /* without an answer */
    uint64_t refused[COORDINATOR_WRITES_MAX]; /* tickets of writes that did not fit */
    uint32_t n_refused;
} coordinator;

static void coordinator_step(sim *s, sim_proc *proc, const co_in *in);

/* ---- disk ---- */

static void disk_store(sim *s, const disk_write *w)
{
    s->disk.next_member_id = w->member_id;
    s->disk.next_number = w->number;
    if (w->epoch != NULL) {
        cm_free(s->disk.epoch);
        s->disk.epoch = cm_alloc(w->epoch->packed.len);
        memcpy(s->disk.epoch, w->epoch->packed.data, w->epoch->packed.len);
        s->disk.n_bytes = w->epoch->packed.len;
        sim_check_stored(s, w->epoch->message->cluster, w->epoch->number, w->epoch->packed.data,
                         w->epoch->packed.len, w->epoch->placement);
    }
}

static void disk_done(sim *s, void *arg, uint64_t tag);

static void disk_begin(sim *s, sim_proc *proc)
{
    uint64_t us = sim_between(s, SIM_TIMES, s->shape.disk_ms * 100, s->shape.disk_ms * 1000);
    if (sim_strikes(s, SIM_FAULT_disk_slow)) {
        us += sim_between(s, SIM_TIMES, 100, 6000) * SIM_MS;
    }
    sim_at(s, s->now_us + us, disk_done, proc, 0);
}

static void disk_done(sim *s, void *arg, uint64_t tag)
{
    sim_proc *proc = arg;
    coordinator *c = proc->state;
    if (!proc->alive || sim_put_off(s, proc, disk_done, arg, tag)) {
        return;
    }
    disk_write w = c->writes[0];
    memmove(c->writes, c->writes + 1, sizeof(w) * --c->n_write);
    bool unsure = sim_strikes(s, SIM_FAULT_disk_unsure);
    bool fails = unsure || sim_strikes(s, SIM_FAULT_disk_fails);
    if (!fails || unsure) {
        disk_store(s, &w);
    }
    if (c->n_write > 0) {
        disk_begin(s, proc);
    }
    if (fails) {
        sim_trace(s, proc, "a write fails%s", unsure ? ", or so it seems" : "");
    }
    co_in in = {.kind = CO_IN_STORED,
                .ticket = w.ticket,
                .status = fails ? CM_E_IO : CM_OK,
                .text = fails ? "the disk fails" : ""};
    coordinator_step(s, proc, &in);
    co_epoch_release(w.epoch);
    sim_go(s, proc);
}

static void write_later(sim *s, sim_proc *proc, const co_out *out)
{
    coordinator *c = proc->state;
    bool fits = c->n_write < COORDINATOR_WRITES_MAX;
    if (c->store != NULL) {
        fits = co_store_etcd_ops.write(c->store, out->ticket, out->member_id, out->number, out->drains,
                                       out->epoch) == CM_OK;
    }
    if (!fits) {
        CM_ASSERT(c->n_refused < COORDINATOR_WRITES_MAX);
        c->refused[c->n_refused++] = out->ticket;
    }
    if (!fits || c->store != NULL) {
        return;
    }
    c->writes[c->n_write++] = (disk_write){out->ticket, out->number, out->member_id,
                                           out->epoch != NULL ? co_epoch_hold(out->epoch) : NULL};
    if (c->n_write == 1) {
        disk_begin(s, proc);
    }
}

/* ---- sessions ---- */

static session *session_find(coordinator *c, uint64_t number)
{
    session *at;
    LIST_FOREACH (at, &c->sessions, link) {
        if (at->end->number == number) {
            return at;
        }
    }
    return NULL;
}

static void session_forget(sim *s, sim_proc *proc, session *at)
{
    uint64_t number = at->end->number;
    LIST_REMOVE(at, link);
    cm_free(at);
    coordinator_step(s, proc, &(co_in){.kind = CO_IN_CLOSED, .session = number});
}

/* A session we ended is reported as closed a little later, as every call is. */
static void session_closed(sim *s, void *arg, uint64_t number)
{
    sim_proc *proc = arg;
    if (!proc->alive || sim_put_off(s, proc, session_closed, arg, number)) {
        return;
    }
    session *at = session_find(proc->state, number);
    if (at != NULL) {
        session_forget(s, proc, at);
        sim_go(s, proc);
    }
}

static void session_finish(sim *s, sim_proc *proc, session *at)
{
    if (!at->finished) {
        at->finished = true;
        sim_disconnect(s, at->end);
        sim_at(s, s->now_us, session_closed, proc, at->end->number);
    }
}

/* A member that came to the wrong one hears where to go. */
static void session_send_on(sim *s, sim_proc *proc, session *at)
{
    coordinator *c = proc->state;
    cm_bytes_clear(&c->packed);
    co_answer_send_on(c->active_address, c->why, &c->packed);
    cm_status status = sim_send(s, at->end, 0, NULL, 0, c->packed.data, c->packed.len, NULL);
    (void)status;
    session_finish(s, proc, at);
}

/* ---- what the machine asks for ---- */

static void deliver_word(sim *s, sim_proc *proc, const co_out *out)
{
    static const char *const names[] = {"welcome", "refused", "prepare", "abort",
                                        "commit",  "retire",  "drain",   "close"};
    coordinator *c = proc->state;
    session *at = session_find(c, out->session);
    if (at == NULL || at->finished) {
        return;
    }
    sim_trace(s, proc, "%s %llu to %s %s", names[out->kind],
              (unsigned long long)(out->epoch != NULL ? out->epoch->number
                                   : out->number != 0 ? out->number
                                                      : out->member_id),
              at->end->link != NULL ? "a member" : "", out->text);
    cm_bytes_clear(&c->packed);
    if (co_answer_word(out, co_core_cluster(c->core), (uint32_t)s->shape.heartbeat_ms,
                       (uint32_t)s->shape.lease_ms, NULL, &c->packed)) {
        cm_status status = sim_send(s, at->end, 0, NULL, 0, c->packed.data, c->packed.len, NULL);
        (void)status; /* a link that is down is told to be so */
    }
    if (out->kind == CO_OUT_CLOSE || out->kind == CO_OUT_REFUSED) {
        session_finish(s, proc, at);
    }
}

static void wish_answered(sim *s, sim_proc *proc, const co_out *out)
{
    coordinator *c = proc->state;
    sim_trace(s, proc, "answers wish %llu: %s: %s", (unsigned long long)out->ticket,
              cm_status_text(out->status), out->text);
    if (c->n_wish == 0) {
        sim_fail(s, "a wish is answered twice: %s", out->text);
    }
    c->n_wish--;
    s->counts.wishes_done += out->status == CM_OK;
}

static void coordinator_deliver(sim *s, sim_proc *proc)
{
    coordinator *c = proc->state;
    uint32_t n;
    const co_out *outs = co_core_outbox(c->core, &n);
    for (uint32_t i = 0; i < n; i++) {
        const co_out *out = &outs[i];
        if (out->kind == CO_OUT_COMMIT) {
            sim_check_commit(s, out->epoch->message->cluster, out->epoch->number, out->epoch->packed.data,
                             out->epoch->packed.len, out->epoch->placement);
        }
        s->counts.aborts += out->kind == CO_OUT_ABORT;
        if (out->kind == CO_OUT_ANSWER) {
            wish_answered(s, proc, out);
        } else if (out->kind == CO_OUT_NOTE) {
            sim_trace(s, proc, "notes: %s", out->text);
        } else if (out->kind == CO_OUT_STORE) {
            write_later(s, proc, out);
        } else {
            deliver_word(s, proc, out);
        }
    }
}

/* It may decide. */
static bool coordinator_decides(const coordinator *c)
{
    return c->core != NULL && (c->store == NULL || co_store_etcd_ops.is_active(c->store));
}

static void coordinator_step(sim *s, sim_proc *proc, const co_in *in)
{
    coordinator *c = proc->state;
    if (!coordinator_decides(c)) {
        return; /* nobody's business, or soon a newer coordinator's: the store will say so */
    }
    sim_check_active(s, proc);
    co_core_step(c->core, sim_ms(s), in, in != NULL ? 1 : 0);
    coordinator_deliver(s, proc);
    while (c->n_refused > 0) {
        co_in full = {.kind = CO_IN_STORED,
                      .ticket = c->refused[0],
                      .status = CM_E_CAPACITY,
                      .text = "too many writes wait for the log"};
        memmove(c->refused, c->refused + 1, sizeof(c->refused[0]) * --c->n_refused);
        co_core_step(c->core, sim_ms(s), &full, 1);
        coordinator_deliver(s, proc);
    }
    if (co_core_n_members(c->core) > SIM_HOSTS_MAX * 4) {
        sim_fail(s, "%u members", co_core_n_members(c->core));
    }
}

/* ---- active or not ---- */

static void coordinator_begin(sim *s, sim_proc *proc, const co_store_past *past)
{
    coordinator *c = proc->state;
    co_core_options options = {.workers_min = s->shape.workers_min,
                               .members_max = SIM_HOSTS_MAX * 4,
                               .lease_ms = s->shape.lease_ms,
                               .grace_ms = s->shape.grace_ms,
                               .recall_ms = s->shape.lease_ms / 2,
                               .rebalance_ms = s->shape.rebalance_ms,
                               .moves_max = s->shape.moves_max,
                               .fingerprint = ""};
    co_core_past core_past = {.cluster = past->cluster,
                              .next_member_id = past->next_member_id,
                              .next_number = past->next_number,
                              .drains = past->drains,
                              .epoch = past->epoch};
    CM_ASSERT(c->core == NULL);
    c->core = co_core_create(&options, &core_past, sim_ms(s));
    s->counts.takeovers++;
    sim_trace(s, proc, "is active from epoch number %llu on", (unsigned long long)past->next_number);
}

static void store_active(void *ctx, const co_store_past *past)
{
    sim_proc *proc = ctx;
    coordinator_begin(proc->world, proc, past);
}

/* What was decided and not yet written is forgotten. */
static void coordinator_step_down(sim *s, sim_proc *proc)
{
    coordinator *c = proc->state;
    session *at;
    LIST_FOREACH (at, &c->sessions, link) {
        session_finish(s, proc, at);
    }
    co_core_destroy(c->core);
    c->core = NULL;
    c->n_wish = 0; /* operators hear that it is not the active one any more */
}

static void store_standby(void *ctx, const char *address, const char *text)
{
    sim_proc *proc = ctx;
    coordinator *c = proc->state;
    sim_trace(proc->world, proc, "stands by: %s", text);
    snprintf(c->active_address, sizeof(c->active_address), "%s", address);
    snprintf(c->why, sizeof(c->why), "%s", text);
    if (c->core != NULL) {
        coordinator_step_down(proc->world, proc);
    }
}

static void store_written(void *ctx, uint64_t ticket, cm_status status, const char *text)
{
    sim_proc *proc = ctx;
    co_in in = {.kind = CO_IN_STORED, .ticket = ticket, .status = status, .text = text};
    coordinator_step(proc->world, proc, &in);
}

static void store_failed(void *ctx, const cm_error *err)
{
    sim_fail(((sim_proc *)ctx)->world, "the log in etcd cannot be used: %s", err->text);
}

/* ---- the process ---- */

static void coordinator_up(sim *s, sim_proc *proc, sim_end *end)
{
    coordinator *c = proc->state;
    session *at = cm_alloc(sizeof(*at));
    (void)s;
    at->end = end;
    LIST_INSERT_HEAD(&c->sessions, at, link);
}

static void coordinator_down(sim *s, sim_proc *proc, sim_end *end, cm_status status)
{
    session *at = session_find(proc->state, end->number);
    (void)status;
    if (at != NULL) {
        session_forget(s, proc, at);
    }
}

static void coordinator_message(sim *s, sim_proc *proc, sim_end *end, const sim_message *message)
{
    coordinator *c = proc->state;
    session *at = session_find(c, end->number);
    ProtobufCMessage *word;
    if (at == NULL || at->finished) {
        return;
    }
    if (c->core == NULL) {
        session_send_on(s, proc, at);
        return;
    }
    cm_arena_reset(&c->arena);
    if (pr_unpack(&baleen__control__v1__member_message__descriptor, message->data, message->n_bytes,
                  &c->arena, &word) != CM_OK) {
        sim_fail(s, "the coordinator cannot read a member's word");
    }
    coordinator_step(s, proc,
                     &(co_in){.kind = CO_IN_WORD,
                              .session = end->number,
                              .word = (const Baleen__Control__V1__MemberMessage *)word});
}

static void coordinator_sent(sim *s, sim_proc *proc, void *cookie)
{
    (void)s;
    (void)proc;
    (void)cookie;
}

static uint64_t coordinator_pump(sim *s, sim_proc *proc)
{
    coordinator *c = proc->state;
    if (!coordinator_decides(c)) {
        return SIM_NEVER; /* its store's timers go on */
    }
    uint64_t now_ms = sim_ms(s), wake_ms = co_core_wake_ms(c->core);
    if (wake_ms <= now_ms) {
        coordinator_step(s, proc, NULL);
        wake_ms = co_core_wake_ms(c->core);
    }
    uint64_t beat_ms = now_ms + s->shape.heartbeat_ms;
    return (wake_ms < beat_ms ? wake_ms : beat_ms) * SIM_MS;
}

static net_identity coordinator_identity(const sim_proc *proc)
{
    (void)proc;
    return (net_identity){0};
}

static void coordinator_end(sim *s, sim_proc *proc)
{
    coordinator *c = proc->state;
    session *at;
    /* the write under way may have made it; those behind it have not */
    if (c->n_write > 0 && sim_below(s, SIM_TIMES, 2) == 0) {
        disk_store(s, &c->writes[0]);
    }
    for (uint32_t i = 0; i < c->n_write; i++) {
        co_epoch_release(c->writes[i].epoch);
    }
    while ((at = LIST_FIRST(&c->sessions)) != NULL) {
        LIST_REMOVE(at, link);
        cm_free(at);
    }
    if (c->store != NULL) {
        co_store_etcd_ops.close(c->store);
    }
    if (c->core != NULL) {
        co_core_destroy(c->core);
    }
    cm_arena_fini(&c->arena);
    cm_bytes_fini(&c->packed);
    cm_free(c);
}

static const sim_ops coordinator_ops = {.up = coordinator_up,
                                        .down = coordinator_down,
                                        .message = coordinator_message,
                                        .sent = coordinator_sent,
                                        .pump = coordinator_pump,
                                        .identity = coordinator_identity,
                                        .end = coordinator_end};

static void coordinator_open_disk(sim *s, sim_proc *proc)
{
    co_epoch *epoch = NULL;
    cm_error err = {0};
    if (sim_strikes(s, SIM_FAULT_log_lost)) {
        cm_free(s->disk.epoch);
        s->disk.epoch = NULL;
        s->disk.cluster = sim_mix(s->disk.cluster, proc->id) | 1;
        s->disk.next_number = s->disk.next_member_id = 1;
        sim_trace(s, proc, "begins a new cluster");
    }
    if (s->disk.epoch != NULL && co_epoch_unpack(s->disk.epoch, s->disk.n_bytes, &epoch, &err) != CM_OK) {
        sim_fail(s, "the log cannot be read: %s", err.text);
    }
    coordinator_begin(s, proc,
                      &(co_store_past){.cluster = s->disk.cluster,
                                       .next_member_id = s->disk.next_member_id,
                                       .next_number = s->disk.next_number,
                                       .epoch = epoch});
    co_epoch_release(epoch);
}

static void coordinator_open_store(sim *s, sim_proc *proc)
{
    static const co_store_events events = {
        .active = store_active, .standby = store_standby, .written = store_written, .failed = store_failed};
    coordinator *c = proc->state;
    char address[8];
    cm_error err = {0};
    snprintf(address, sizeof(address), "c%u", proc->host);
    co_store_options options = {.url = "etcd://etcd:2379/sim",
                                .address = address,
                                .lease_ms = s->shape.claim_ms,
                                .n_queued_max = COORDINATOR_WRITES_MAX};
    snprintf(c->why, sizeof(c->why), "the store has not said yet who is active");
    if (co_store_etcd_ops.open(sim_loop(proc), &options, &events, proc, &c->store, &err) != CM_OK) {
        sim_fail(s, "the store cannot be opened: %s", err.text);
    }
}

static void coordinator_stopped(void *arg)
{
    (void)arg;
}

void sim_coordinator_start(sim *s, sim_proc *proc)
{
    coordinator *c = cm_alloc(sizeof(*c));
    proc->ops = &coordinator_ops;
    proc->state = c;
    LIST_INIT(&c->sessions);
    cm_arena_init(&c->arena, "sim word", 16 << 10, 4 << 20);
    cm_bytes_init(&c->packed, 0);
    if (s->shape.etcd) {
        coordinator_open_store(s, proc);
    } else {
        coordinator_open_disk(s, proc);
    }
}

/* As it does when it is asked to end: the claim goes with it. */
void sim_coordinator_stop(sim_proc *proc)
{
    coordinator *c = proc->state;
    if (c->store != NULL) {
        co_store_etcd_ops.stop(c->store, coordinator_stopped, proc);
    }
}

bool sim_coordinator_is_active(const sim_proc *proc)
{
    return coordinator_decides(proc->state);
}

void sim_coordinator_wish(sim *s, sim_proc *proc, bool drain)
{
    coordinator *c = proc->state;
    CM_ASSERT(coordinator_decides(c));
    co_in in = {.kind = drain ? CO_IN_DRAIN : CO_IN_REBALANCE, .ticket = ++c->next_ticket};
    uint32_t n = co_core_n_members(c->core);
    if (drain && n > 0) {
        co_member_view view;
        co_core_member(c->core, sim_below(s, SIM_FAULTS, n), &view);
        if (view.self->role == CO_ROLE_GATEWAY) {
            return;
        }
        in.member_id = view.self->id;
    }
    sim_trace(s, proc, "wish %llu: %s %u", (unsigned long long)in.ticket, drain ? "drain" : "rebalance",
              in.member_id);
    c->n_wish++;
    s->counts.wishes++;
    coordinator_step(s, proc, &in);
    sim_go(s, proc);
}

bool sim_coordinator_lets_go(const sim_proc *coordinator_proc, const sim_proc *proc)
{
    const coordinator *c = coordinator_proc->state;
    for (uint32_t i = 0; i < co_core_n_members(c->core); i++) {
        co_member_view view;
        co_core_member(c->core, i, &view);
        if (view.self->pid == proc->id && view.state == CO_MEMBER_LEAVING) {
            return true;
        }
    }
    return false;
}

bool sim_coordinator_has(const sim_proc *coordinator_proc, const sim_proc *proc)
{
    const coordinator *c = coordinator_proc->state;
    for (uint32_t i = 0; i < co_core_n_members(c->core); i++) {
        co_member_view view;
        co_core_member(c->core, i, &view);
        if (view.self->pid == proc->id) {
            return true;
        }
    }
    return false;
}

bool sim_coordinator_rests(const sim_proc *proc, char *why, size_t cap)
{
    const coordinator *c = proc->state;
    char text[256];
    if (co_core_change(c->core, text)) {
        snprintf(why, cap, "change under way: %s", text);
        return false;
    }
    const co_epoch *epoch = co_core_epoch(c->core);
    if (epoch == NULL) {
        snprintf(why, cap, "no epoch in force");
        return false;
    }
    for (uint32_t i = 0; i < co_core_n_members(c->core); i++) {
        co_member_view view;
        co_core_member(c->core, i, &view);
        if (view.state != CO_MEMBER_READY || view.epoch != epoch->number) {
            snprintf(why, cap, "member %u is %s in epoch %llu of %llu", view.self->id,
                     co_member_state_name(view.state), (unsigned long long)view.epoch,
                     (unsigned long long)epoch->number);
            return false;
        }
    }
    if (c->n_write + c->n_wish > 0) {
        snprintf(why, cap, "%u writes and %u wishes are open", c->n_write, c->n_wish);
        return false;
    }
    return true;
}

bool sim_change_is_over(const sim *s)
{
    const sim_proc *active = sim_active_coordinator(s);
    char why[256];
    return active != NULL && sim_coordinator_rests(active, why, sizeof(why));
}
