/* What must hold, seen from outside the machines, with a memory of its own. */
#include <string.h>

#include "common/base/mem.h"
#include "router/keep_core.h"
#include "tests/sim/sim.h"

/* One number of an epoch and the only value it may ever have. */
typedef struct epoch_record {
    uint8_t *packed; /* NULL: never heard of */
    size_t n_bytes;
    pr_placement *placement;
    bool in_force;
} epoch_record;

struct sim_cluster_record {
    uint64_t cluster;
    epoch_record epochs[SIM_EPOCHS_MAX]; /* by number */
};

static epoch_record *check_record(sim *s, uint64_t cluster, uint64_t number)
{
    uint32_t i = 0;
    while (i < s->n_cluster && s->clusters[i]->cluster != cluster) {
        i++;
    }
    if (number == 0 || number >= SIM_EPOCHS_MAX || i == SIM_CLUSTERS_MAX) {
        sim_fail(s, "epoch number %llu of cluster %u", (unsigned long long)number, i);
    }
    if (i == s->n_cluster) {
        s->clusters[s->n_cluster++] = cm_alloc(sizeof(sim_cluster_record));
        s->clusters[i]->cluster = cluster;
    }
    return &s->clusters[i]->epochs[number];
}

/* ---- epochs ---- */

void sim_check_stored(sim *s, uint64_t cluster, uint64_t number, const void *packed, size_t n_bytes,
                      const pr_placement *p)
{
    epoch_record *record = check_record(s, cluster, number);
    if (record->packed != NULL &&
        (record->n_bytes != n_bytes || memcmp(record->packed, packed, n_bytes) != 0)) {
        sim_fail(s, "epoch %llu has two values", (unsigned long long)number);
    }
    if (record->packed == NULL) {
        record->packed = cm_alloc(n_bytes);
        memcpy(record->packed, packed, n_bytes);
        record->n_bytes = n_bytes;
        record->placement = pr_placement_clone(p);
    }
}

void sim_check_active(sim *s, const sim_proc *coordinator)
{
    for (uint32_t host = 0; host < s->shape.n_coordinator; host++) {
        const sim_proc *other = s->hosts[host].proc;
        if (other != NULL && other != coordinator && other->alive && sim_coordinator_is_active(other)) {
            sim_fail(s, "%s and %s are both the active coordinator", coordinator->name, other->name);
        }
    }
}

static sim_proc *check_find_worker(sim *s, uint64_t cluster, uint32_t id)
{
    for (uint32_t i = 0; i < s->n_proc; i++) {
        sim_proc *proc = s->procs[i];
        if (proc->role == SIM_WORKER && proc->alive && sim_worker_is(proc, cluster, id)) {
            return proc;
        }
    }
    return NULL;
}

/* Every expert has an owner, and every owner that lives has loaded what it owns. */
static void check_owners(sim *s, uint64_t cluster, uint64_t number, const pr_placement *p)
{
    for (uint32_t layer = 0; layer < p->n_layer; layer++) {
        for (uint32_t e = 0; e < p->n_expert; e++) {
            uint32_t n;
            const uint16_t *owners = pr_placement_owners(p, layer, e, &n);
            if (n == 0) {
                sim_fail(s, "epoch %llu: nobody owns expert %u of layer %u", (unsigned long long)number, e,
                         layer);
            }
            for (uint32_t i = 0; i < n; i++) {
                const sim_proc *proc = check_find_worker(s, cluster, p->rank_member[owners[i]]);
                if (proc != NULL && !sim_worker_holds(proc, layer, e)) {
                    sim_fail(s, "epoch %llu is committed, and %s has not loaded expert %u of layer %u",
                             (unsigned long long)number, proc->name, e, layer);
                }
            }
        }
    }
}

void sim_check_commit(sim *s, uint64_t cluster, uint64_t number, const void *packed, size_t n_bytes,
                      const pr_placement *p)
{
    epoch_record *record = check_record(s, cluster, number);
    if (record->packed == NULL) {
        sim_fail(s, "epoch %llu is committed and not in the log", (unsigned long long)number);
    }
    sim_check_stored(s, cluster, number, packed, n_bytes, p);
    if (!record->in_force) {
        record->in_force = true;
        s->counts.epochs++;
        check_owners(s, cluster, number, p);
    }
}

void sim_check_followed(sim *s, const sim_proc *proc, const pc_epoch *epoch, sim_followed *last)
{
    const epoch_record *record = check_record(s, epoch->cluster, epoch->number);
    sim_trace(s, proc, "follows epoch %llu", (unsigned long long)epoch->number);
    if (!record->in_force || (epoch->cluster == last->cluster && epoch->number <= last->number)) {
        sim_fail(s, "%s follows epoch %llu after %llu", proc->name, (unsigned long long)epoch->number,
                 (unsigned long long)last->number);
    }
    *last = (sim_followed){epoch->cluster, epoch->number};
}

/* ---- frames ---- */

void sim_check_frame(sim *s, const sim_proc *worker, const uint32_t *ids, uint32_t n_id,
                     const sim_followed *retired, const pr_frame_head *head, uint32_t expert)
{
    const epoch_record *record = check_record(s, head->cluster, head->epoch);
    if (!record->in_force || (head->cluster == retired->cluster && head->epoch < retired->number)) {
        sim_fail(s, "%s takes a frame of epoch %llu, it has retired all before %llu", worker->name,
                 (unsigned long long)head->epoch, (unsigned long long)retired->number);
    }
    const pr_placement *p = record->placement;
    bool ours = false;
    for (uint32_t i = 0; i < n_id; i++) {
        ours |= pr_placement_owns(p, head->layer, expert, pr_placement_rank_of(p, ids[i]));
    }
    if (!ours || !sim_worker_holds(worker, head->layer, expert)) {
        sim_fail(s, "%s takes a frame for expert %u of layer %u, which is not its in epoch %llu",
                 worker->name, expert, head->layer, (unsigned long long)head->epoch);
    }
}

void sim_check_answer(sim *s, const sim_proc *router, sim_asked asked[SIM_ASKED_MAX], const sim_end *end,
                      const pr_frame_head *head, uint64_t step, uint32_t layer, uint64_t epoch)
{
    sim_asked *question = &asked[head->exchange % SIM_ASKED_MAX];
    const pr_frame_head *of = &question->head;
    if (question->end != end || of->exchange != head->exchange || question->answered || of->step != step ||
        of->layer != layer || of->epoch != epoch) {
        sim_fail(s,
                 "%s takes an answer to exchange %u of step %llu layer %u epoch %llu while it computes "
                 "step %llu layer %u in epoch %llu",
                 router->name, head->exchange, (unsigned long long)head->step, head->layer,
                 (unsigned long long)head->epoch, (unsigned long long)step, layer, (unsigned long long)epoch);
    }
    question->answered = true;
}

/* ---- what routers keep ---- */

void sim_check_kept_excuse(sim_watched watched[SIM_REQUESTS_MAX], uint64_t number)
{
    for (uint32_t i = 0; i < SIM_REQUESTS_MAX; i++) {
        watched[i].excused |= watched[i].number == number;
    }
}

void sim_check_kept_ended(const sim *s, sim_watched watched[SIM_REQUESTS_MAX], uint64_t number)
{
    for (uint32_t i = 0; i < SIM_REQUESTS_MAX; i++) {
        if (watched[i].number == number) {
            watched[i].live = false;
            watched[i].since_ms = sim_ms(s);
        }
    }
}

/* Ended ones make room for newer ones. */
static bool kept_is_full(const sim *s, const rt_keep *keep)
{
    rt_keep_ledger ledger;
    rt_keep_ledger_get(keep, &ledger);
    return ledger.n_ended >= s->shape.kept_max || s->shape.kept_bytes < 1 << 20;
}

static void check_kept_one(sim *s, const sim_proc *router, const rt_keep *keep, const sim_request *request,
                           sim_watched *w)
{
    const rt_kept *kept;
    if (memcmp(w->key, request->key, SIM_ID_BYTES) != 0) {
        *w = (sim_watched){0};
        memcpy(w->key, request->key, SIM_ID_BYTES);
    }
    if (rt_keep_find(keep, w->key, &kept, 1) == 1) {
        bool owned = kept->owner != NULL, anew = kept->number != w->number;
        bool left = !owned && (anew || w->owned || w->live != kept->live);
        /* an older one shows when the newest is gone: nobody looked at it before */
        w->excused = anew ? kept->number < w->newest : w->excused;
        w->newest = kept->number > w->newest ? kept->number : w->newest;
        w->number = kept->number;
        w->owned = owned;
        w->live = kept->live;
        w->since_ms = left ? sim_ms(s) : w->since_ms;
        return;
    }
    bool in_time = !w->owned && sim_ms(s) >= w->since_ms + s->shape.keep_ms;
    bool pushed = !w->live && kept_is_full(s, keep);
    if (w->number != 0 && !w->excused && !in_time && !pushed && s->shape.keep_ms > 0) {
        sim_fail(s, "%s has dropped request %u, %s, after %llu of %llu ms", router->name, request->id,
                 w->owned  ? "its gateway's"
                 : w->live ? "running and nobody's"
                           : "ended",
                 (unsigned long long)(sim_ms(s) - w->since_ms), (unsigned long long)s->shape.keep_ms);
    }
    w->number = 0;
}

void sim_check_kept(sim *s, const sim_proc *router, const rt_keep *keep,
                    sim_watched watched[SIM_REQUESTS_MAX])
{
    for (uint32_t i = 0; i < s->shape.n_request; i++) {
        check_kept_one(s, router, keep, &s->requests[i], &watched[i]);
    }
}

/* ---- rest ---- */

static void check_ledger(sim *s, const sim_proc *proc)
{
    char text[256] = "";
    switch (proc->role) {
    case SIM_COORDINATOR:
        if (sim_coordinator_is_active(proc)) {
            sim_coordinator_rests(proc, text, sizeof(text));
        }
        break;
    case SIM_GATEWAY:
        sim_gateway_ledger(proc, text, sizeof(text));
        break;
    case SIM_ROUTER:
        sim_router_ledger(proc, text, sizeof(text));
        break;
    case SIM_WORKER:
        sim_worker_ledger(proc, text, sizeof(text));
        break;
    }
    if (text[0] != 0) {
        sim_fail(s, "%s is not at rest: %s", proc->name, text);
    }
}

/* Who is stopped or cut off is not asked. */
static bool check_is_reached(const sim *s, const sim_proc *proc)
{
    return proc->alive && proc->paused_until_us <= s->now_us &&
           s->hosts[proc->host].cut_until_us[s->healed_coordinator] <= s->now_us;
}

/* One coordinator is active, and whoever is reached and not on its way out is a member. */
static void check_members(sim *s)
{
    const sim_proc *active = sim_active_coordinator(s);
    if (active == NULL) {
        sim_fail(s, "no coordinator is active");
    }
    for (uint32_t i = 0; i < s->n_proc; i++) {
        const sim_proc *proc = s->procs[i];
        if (proc->role != SIM_COORDINATOR && check_is_reached(s, proc) && !s->hosts[proc->host].leaving &&
            !sim_coordinator_has(active, proc)) {
            sim_fail(s, "%s is no member", proc->name);
        }
    }
}

/* Whoever lives and is reached has let go of everything. */
void sim_check_rest(sim *s)
{
    check_members(s);
    for (uint32_t i = 0; i < s->n_proc; i++) {
        if (check_is_reached(s, s->procs[i])) {
            check_ledger(s, s->procs[i]);
        }
    }
}

void sim_check_fini(sim *s)
{
    for (uint32_t c = 0; c < s->n_cluster; c++) {
        for (uint32_t i = 0; i < SIM_EPOCHS_MAX; i++) {
            cm_free(s->clusters[c]->epochs[i].packed);
            pr_placement_free(s->clusters[c]->epochs[i].placement);
        }
        cm_free(s->clusters[c]);
    }
}
