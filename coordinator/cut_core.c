#include "common/base/mem.h"
#include "coordinator/core_private.h"

/* A router and a worker that both live and cannot reach one another: a cable, a rule of a firewall. No lease
 * ends, so after cut_ms one of the two goes. Which one follows from who else complains, and of whom:
 *
 * - A router that misses more than half of the workers is blind: that is its own network, or a switch that it
 *   shares with others. Its word counts against no worker, however many say the same. It is drained if there
 *   is a router that sees; if there is none, nobody goes.
 * - A router that is alone with its complaint while others reach the worker is drained, unless one was
 *   drained for the same worker's sake not long ago: then the next one, or the same started again, would be
 *   drained for ever for what is the worker's.
 * - Else the worker is left out of the next epoch. It is tried again after a while that doubles each time it
 *   is left out again soon; as a new process at once. */

enum {
    CUT_HOLD_MIN_MS = 60000, /* left out, the first time */
    CUT_HOLD_MAX_MS = 3600000,
    CUT_DRAIN_MEMORY_MS = 3600000, /* of a router that was drained for a worker's sake */
};

/* ---- who sees ---- */

/* Whether so many of the cut workers are more than half of all; those that are left out are missed by all. */
static bool cut_is_most(const co_core *core, uint32_t n_cut)
{
    uint32_t n_worker = 0;
    for (uint32_t i = 0; i < core->n_members; i++) {
        const co_member *worker = &core->members[i];
        if (worker->self.role == CO_ROLE_WORKER && co_member_is_in(worker) && !worker->leaving) {
            n_worker++;
            n_cut += worker->cut_off;
        }
    }
    return 2 * n_cut > n_worker;
}

/* How many workers that serve it does not reach, for min_ms or longer. */
static uint32_t cut_count(co_core *core, const co_member *router, uint64_t min_ms)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < core->n_cuts; i++) {
        const co_cut *cut = &core->cuts[i];
        const co_member *worker = co_core_find(core, cut->worker);
        n += cut->router == router->self.id && core->now_ms - cut->since_ms >= min_ms && worker != NULL &&
             !worker->leaving;
    }
    return n;
}

/* Also by what it has lost just now: its links do not go down at the same moment. */
static bool cut_is_blind(co_core *core, const co_member *router)
{
    uint32_t n = cut_count(core, router, 0);
    return n > 0 && cut_is_most(core, n);
}

/* ---- reports ---- */

static uint32_t cut_find(const co_core *core, uint32_t router, uint32_t worker)
{
    uint32_t i = 0;
    while (i < core->n_cuts && (core->cuts[i].router != router || core->cuts[i].worker != worker)) {
        i++;
    }
    return i;
}

static void cut_drop(co_core *core, uint32_t i)
{
    core->cuts[i] = core->cuts[--core->n_cuts];
}

/* It was blind and sees: what it does not reach yet may come too. */
static void cut_begin_anew(co_core *core, const co_member *router)
{
    for (uint32_t i = 0; i < core->n_cuts; i++) {
        if (core->cuts[i].router == router->self.id) {
            core->cuts[i].since_ms = core->now_ms;
        }
    }
}

void co_core_cut_report(co_core *core, const co_member *router, const co_member *worker, cm_status status)
{
    uint32_t i = cut_find(core, router->self.id, worker->self.id);
    if (status == CM_OK && i < core->n_cuts) {
        co_core_note(core, CM_LOG_INFO, "member %u has its link to member %u again", router->self.id,
                     worker->self.id);
        bool was_blind = cut_is_blind(core, router);
        cut_drop(core, i);
        if (was_blind && !cut_is_blind(core, router)) { /* one link that comes and goes is no sight */
            cut_begin_anew(core, router);
        }
    }
    if (status == CM_OK || i < core->n_cuts || worker->cut_off) {
        return;
    }
    co_core_note(core, CM_LOG_WARN, "member %u lost its link to member %u: %s", router->self.id,
                 worker->self.id, cm_status_text(status));
    if (core->n_cuts == core->cuts_cap) {
        core->cuts_cap = core->cuts_cap != 0 ? core->cuts_cap * 2 : 4;
        core->cuts = cm_realloc(core->cuts, sizeof(co_cut) * core->cuts_cap);
    }
    core->cuts[core->n_cuts++] = (co_cut){router->self.id, worker->self.id, core->now_ms};
}

void co_core_cuts_forget(co_core *core, uint32_t id)
{
    for (uint32_t i = core->n_cuts; i-- > 0;) {
        if (core->cuts[i].router == id || core->cuts[i].worker == id) {
            cut_drop(core, i);
        }
    }
}

/* ---- what follows ---- */

/* One whose word counts: it serves and goes on doing so. */
static bool cut_may_judge(const co_core *core, const co_member *router)
{
    return co_member_is_in(router) && router->self.role == CO_ROLE_ROUTER && router->session != 0 &&
           !router->leaving && core->epoch != NULL && co_epoch_find(core->epoch, router->self.id) != NULL;
}

static void cut_leave_out(co_core *core, co_member *worker, uint32_t n_cut, uint32_t n_router)
{
    cm_error err = {0};
    if (co_core_check_room(core, worker, &err) != CM_OK) {
        if (!worker->cut_noted) {
            worker->cut_noted = true;
            co_core_note(core, CM_LOG_WARN,
                         "%u of %u routers cannot reach member %u, and it cannot be left out: %s", n_cut,
                         n_router, worker->self.id, err.text);
        }
        return;
    }
    bool soon = worker->cut_hold_ms != 0 && core->now_ms < worker->cut_until_ms + worker->cut_hold_ms;
    uint64_t hold_ms = soon ? worker->cut_hold_ms * 2 : CUT_HOLD_MIN_MS;
    worker->cut_hold_ms = hold_ms < CUT_HOLD_MAX_MS ? hold_ms : CUT_HOLD_MAX_MS;
    worker->cut_until_ms = core->now_ms + worker->cut_hold_ms;
    worker->cut_off = true;
    core->dirty = true;
    co_core_cuts_forget(core, worker->self.id);
    co_core_note(core, CM_LOG_WARN,
                 "member %u is left out: %u of %u routers have not reached it for %llu ms; it is tried again "
                 "in %llu s",
                 worker->self.id, n_cut, n_router, (unsigned long long)core->cut_ms,
                 (unsigned long long)worker->cut_hold_ms / 1000);
}

static bool cut_sees(const co_core *core, const co_member *router)
{
    return cut_may_judge(core, router) && !router->blind;
}

/* Routers whose word counts. */
static uint32_t cut_count_judges(const co_core *core)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < core->n_members; i++) {
        n += cut_sees(core, &core->members[i]);
    }
    return n;
}

/* Once a step: who is blind. How many. */
static uint32_t cut_look(co_core *core)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < core->n_members; i++) {
        co_member *router = &core->members[i];
        router->blind = core->n_cuts > 0 && cut_may_judge(core, router) && cut_is_blind(core, router);
        n += router->blind;
    }
    return n;
}

/* Nobody is judged, and for nobody the time runs: when it works again, one will see before the others do. */
static void cut_wait_for_sight(co_core *core)
{
    if (!core->blind) {
        core->blind = true;
        core->blind_noted = false;
        core->blind_ms = core->now_ms;
    }
    for (uint32_t i = 0; i < core->n_cuts; i++) {
        core->cuts[i].since_ms = core->now_ms;
    }
    if (!core->blind_noted && core->now_ms - core->blind_ms >= core->cut_ms) {
        core->blind_noted = true;
        co_core_note(
            core, CM_LOG_WARN,
            "no router reaches more than half of the workers: that is the network, nobody is left out");
    }
}

/* The blind go, once that has lasted. */
static void cut_drain_blind(co_core *core)
{
    for (uint32_t i = 0; i < core->n_members; i++) {
        co_member *router = &core->members[i];
        uint32_t n = router->blind ? cut_count(core, router, core->cut_ms) : 0;
        if (n > 0 && cut_is_most(core, n)) {
            co_core_note(
                core, CM_LOG_WARN,
                "member %u is drained: it has not reached %u workers for %llu ms, which others do reach",
                router->self.id, n, (unsigned long long)core->cut_ms);
            co_core_begin_leaving(core, router);
        }
    }
}

/* Others reach the worker. */
static void cut_drain_odd(co_core *core, co_member *router, co_member *worker, uint32_t n_router)
{
    co_core_note(
        core, CM_LOG_WARN,
        "member %u is drained: it has not reached member %u for %llu ms, which %u other routers do reach",
        router->self.id, worker->self.id, (unsigned long long)core->cut_ms, n_router - 1);
    worker->cut_drained = true;
    worker->cut_drained_ms = core->now_ms;
    co_core_begin_leaving(core, router);
}

/* A router was drained for its sake not long ago, and the others can hold its experts. */
static bool cut_is_its_turn(const co_core *core, const co_member *worker)
{
    cm_error err = {0};
    return worker->cut_drained && core->now_ms - worker->cut_drained_ms < CUT_DRAIN_MEMORY_MS &&
           co_core_check_room(core, worker, &err) == CM_OK;
}

static void cut_judge(co_core *core, co_member *worker)
{
    uint32_t n_cut = 0, n_young = 0;
    co_member *last = NULL;
    for (uint32_t i = 0; i < core->n_cuts; i++) {
        const co_cut *cut = &core->cuts[i];
        co_member *router = cut->worker == worker->self.id ? co_core_find(core, cut->router) : NULL;
        if (router == NULL || !cut_sees(core, router)) {
            continue;
        }
        if (core->now_ms - cut->since_ms >= core->cut_ms) {
            n_cut++;
            last = router;
        } else {
            n_young++;
        }
    }
    if (n_cut == 0) {
        worker->cut_noted = false;
        return;
    }
    uint32_t n_router = cut_count_judges(core);
    if (n_cut > 1 || n_router == 1) {
        cut_leave_out(core, worker, n_cut, n_router);
    } else if (n_young == 0) { /* else others lost it later, and may well be as long without it */
        if (cut_is_its_turn(core, worker)) {
            cut_leave_out(core, worker, n_cut, n_router);
        } else {
            cut_drain_odd(core, last, worker, n_router);
        }
    }
}

void co_core_end_cut(co_core *core, co_member *worker, const char *why)
{
    worker->cut_off = false;
    core->dirty = true;
    co_core_note(core, CM_LOG_INFO, "member %u is tried again: %s", worker->self.id, why);
}

void co_core_cuts(co_core *core)
{
    if (core->cut_ms == 0) {
        return;
    }
    if (cut_look(core) > 0 && cut_count_judges(core) == 0) {
        cut_wait_for_sight(core);
    } else {
        core->blind = false;
        cut_drain_blind(core);
    }
    for (uint32_t i = 0; i < core->n_members; i++) {
        co_member *worker = &core->members[i];
        if (worker->self.role != CO_ROLE_WORKER || !co_member_is_in(worker)) {
            continue;
        }
        if (!worker->cut_off && !worker->leaving) {
            cut_judge(core, worker);
        } else if (worker->cut_off && core->now_ms >= worker->cut_until_ms) {
            co_core_end_cut(core, worker, "it has been left out long enough");
        }
    }
}

uint64_t co_core_cuts_wake_ms(const co_core *core)
{
    uint64_t wake_ms = UINT64_MAX;
    for (uint32_t i = 0; core->cut_ms != 0 && i < core->n_cuts; i++) {
        uint64_t at_ms = core->cuts[i].since_ms + core->cut_ms;
        wake_ms = at_ms > core->now_ms && at_ms < wake_ms ? at_ms : wake_ms;
    }
    for (uint32_t i = 0; i < core->n_members; i++) {
        const co_member *worker = &core->members[i];
        wake_ms = worker->cut_off && worker->cut_until_ms < wake_ms ? worker->cut_until_ms : wake_ms;
    }
    return wake_ms;
}
