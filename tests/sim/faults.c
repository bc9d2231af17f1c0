/* The shape of a run, what goes wrong in it and when, and the end of that: phase one draws faults; then a
 * core of the cluster is healed and everything that is open must finish there, whatever the rest does. */
#include <string.h>

#include "tests/sim/sim.h"

enum { FAULT_TICK_MS = 50, FAULT_RESTART_MS = 4000, CLOCKS_APART_US = 3000000 };

/* ---- shape ---- */

static uint32_t shape_need(const sim_shape *shape)
{
    uint32_t n = shape->n_layer * shape->n_expert;
    return (n + shape->experts_max - 1) / shape->experts_max;
}

static void shape_draw_sizes(sim *s)
{
    sim_shape *shape = &s->shape;
    shape->n_coordinator = sim_between(s, SIM_SHAPE, 1, 2);
    shape->etcd = shape->n_coordinator > 1 || sim_below(s, SIM_SHAPE, 4) == 0;
    shape->claim_ms = sim_between(s, SIM_SHAPE, 300, 3000);
    shape->n_gateway = sim_between(s, SIM_SHAPE, 1, 2);
    shape->n_router = sim_between(s, SIM_SHAPE, 1, 3);
    shape->n_worker = sim_between(s, SIM_SHAPE, 2, 7);
    shape->n_layer = sim_between(s, SIM_SHAPE, 1, SIM_LAYERS_MAX);
    shape->n_expert = sim_between(s, SIM_SHAPE, 3, SIM_EXPERTS_MAX);
    shape->topk = sim_between(s, SIM_SHAPE, 1, SIM_TOPK_MAX);
    shape->workers_min = sim_between(s, SIM_SHAPE, 1, shape->n_worker);
    /* one worker less, at least, can hold it all; sometimes one alone */
    uint32_t n = shape->n_layer * shape->n_expert, least = (n + shape->n_worker - 2) / (shape->n_worker - 1);
    shape->experts_max = sim_between(s, SIM_SHAPE, least, n);
    if (shape->workers_min < shape_need(shape)) {
        shape->workers_min = shape_need(shape);
    }
    shape->n_request = sim_between(s, SIM_SHAPE, 4, SIM_REQUESTS_MAX);
    shape->storm_us = sim_between(s, SIM_SHAPE, 3000, 20000) * SIM_MS;
    /* some disks are always slow, up to more than a lease */
    shape->disk_ms = sim_below(s, SIM_SHAPE, 8) == 0 ? sim_between(s, SIM_SHAPE, 10, 1200) : 8;
    if (shape->etcd) { /* that is always slower than a call may take is of no use to anybody */
        shape->disk_ms = sim_between(s, SIM_SHAPE, 1, 40);
    }
    shape->rebalance_ms = sim_below(s, SIM_SHAPE, 2) == 0 ? sim_between(s, SIM_SHAPE, 300, 4000) : 0;
    shape->moves_max = sim_between(s, SIM_SHAPE, 1, 6);
}

static void shape_draw_bounds(sim *s)
{
    sim_shape *shape = &s->shape;
    shape->heartbeat_ms = 200;
    shape->lease_ms = 800;
    shape->grace_ms = sim_between(s, SIM_SHAPE, 50, 400);
    shape->silence_ms = sim_between(s, SIM_SHAPE, 300, 1000);
    shape->answer_ms = sim_between(s, SIM_SHAPE, 300, 1500);
    shape->wait_ms = sim_between(s, SIM_SHAPE, 2000, 8000);
    shape->row_max = sim_between(s, SIM_SHAPE, 4, 24);
    shape->chunk_max = sim_between(s, SIM_SHAPE, 1, shape->row_max);
    shape->slot_max = sim_between(s, SIM_SHAPE, 1, 6);
    shape->draft_max = sim_below(s, SIM_SHAPE, 4);
    shape->queue_max = sim_between(s, SIM_SHAPE, 2, 16);
    shape->page_tokens = sim_between(s, SIM_SHAPE, 2, 8);
    uint32_t least = (SIM_CONTEXT + shape->page_tokens - 1) / shape->page_tokens;
    shape->page_max = sim_between(s, SIM_SHAPE, least, least * 4);
    shape->frame_max = sim_between(s, SIM_SHAPE, 4, 32);
    shape->window_us = sim_between(s, SIM_SHAPE, 100, 2000);
    shape->sends_max = sim_between(s, SIM_SHAPE, 2, 8);
    shape->frame_bytes = sim_between(s, SIM_SHAPE, 512, 4096);
}

static void shape_draw_streams(sim *s)
{
    sim_shape *shape = &s->shape;
    shape->reopen_ms = sim_between(s, SIM_SHAPE, 1000, 15000);
    shape->rebind_ms = sim_between(s, SIM_SHAPE, 50, 500);
    shape->leave_ms = sim_between(s, SIM_SHAPE, 300, 3000);
    shape->opens_max = sim_between(s, SIM_SHAPE, 1, 8);
    shape->keep_ms = sim_below(s, SIM_SHAPE, 8) == 0 ? 0 : sim_between(s, SIM_SHAPE, 100, 6000);
    shape->kept_max = sim_below(s, SIM_SHAPE, 24);
    /* a log has 256 bytes at most: sometimes room for a few only */
    shape->kept_bytes = sim_below(s, SIM_SHAPE, 4) == 0 ? sim_between(s, SIM_SHAPE, 0, 4000) : 1 << 20;
    shape->tell_max = sim_between(s, SIM_SHAPE, 1, 64);
    shape->state_max = sim_below(s, SIM_SHAPE, 4) == 0 ? 0 : sim_between(s, SIM_SHAPE, 1, 12);
}

/* Odds of 10000: per message for what happens to messages, per tick for what comes by time, per write, load
 * or request for the others. */
static const struct {
    uint16_t low, high;
} fault_odds[SIM_FAULT_COUNT] = {
    [SIM_FAULT_rows_drop] = {1, 40},
    [SIM_FAULT_rows_twice] = {1, 200},
    [SIM_FAULT_rows_overtaken] = {1, 200},
    [SIM_FAULT_tokens_twice] = {1, 100},
    [SIM_FAULT_wire_delay] = {1, 20},
    [SIM_FAULT_link_reset] = {10, 150},
    [SIM_FAULT_cut_one_way] = {10, 100},
    [SIM_FAULT_cut_both_ways] = {10, 100},
    [SIM_FAULT_crash] = {10, 200},
    [SIM_FAULT_power_loss] = {10, 100},
    [SIM_FAULT_pause] = {10, 150},
    [SIM_FAULT_slow_peer] = {10, 100},
    [SIM_FAULT_disk_slow] = {100, 2000},
    [SIM_FAULT_disk_fails] = {100, 1500},
    [SIM_FAULT_disk_unsure] = {100, 1000},
    [SIM_FAULT_store_cut] = {10, 150},
    [SIM_FAULT_log_lost] = {300, 3000},
    [SIM_FAULT_load_fails] = {50, 500},
    [SIM_FAULT_load_slow] = {100, 1000},
    [SIM_FAULT_worker_joins] = {10, 60},
    [SIM_FAULT_worker_leaves] = {10, 60},
    [SIM_FAULT_router_leaves] = {5, 30},
    [SIM_FAULT_operator_drains] = {10, 60},
    [SIM_FAULT_operator_rebalances] = {10, 200},
    [SIM_FAULT_operator_forgets] = {10, 200},
    [SIM_FAULT_client_cancels] = {500, 5000},
    [SIM_FAULT_client_deadline] = {200, 2000},
    [SIM_FAULT_client_drops] = {500, 5000},
    [SIM_FAULT_client_vanishes] = {500, 5000},
};

/* Even seeds: all faults at once. Odd ones: a subset, often small, so that what hides behind the loud ones is
 * seen. */
static void shape_draw_odds(sim *s)
{
    uint32_t of_100 = s->seed % 2 == 0 ? 100 : sim_between(s, SIM_SHAPE, 5, 60);
    for (uint32_t i = 0; i < SIM_FAULT_COUNT; i++) {
        uint32_t odds = sim_between(s, SIM_SHAPE, fault_odds[i].low, fault_odds[i].high);
        bool drawn = sim_below(s, SIM_SHAPE, 100) < of_100;
        s->shape.odds[i] = drawn && !sim_fault_off[i] ? odds : 0;
    }
}

static void shape_add_hosts(sim *s, sim_role role, uint32_t n, uint64_t start_us)
{
    for (uint32_t i = 0; i < n && s->n_host < SIM_HOSTS_MAX; i++) {
        s->hosts[s->n_host++] = (sim_host){
            .role = role, .start_us = start_us, .ahead_us = sim_below(s, SIM_SHAPE, CLOCKS_APART_US)};
    }
}

void sim_shape_draw(sim *s)
{
    shape_draw_sizes(s);
    shape_draw_bounds(s);
    shape_draw_streams(s);
    shape_draw_odds(s);
    shape_add_hosts(s, SIM_COORDINATOR, s->shape.n_coordinator, 0);
    shape_add_hosts(s, SIM_GATEWAY, s->shape.n_gateway, 0);
    shape_add_hosts(s, SIM_ROUTER, s->shape.n_router, 0);
    shape_add_hosts(s, SIM_WORKER, s->shape.n_worker, 0);
    shape_add_hosts(s, SIM_WORKER, 3, SIM_NEVER); /* who may join */
}

/* ---- what comes by time ---- */

static bool host_runs(const sim *s, uint32_t host)
{
    return s->hosts[host].proc != NULL && s->hosts[host].proc->alive;
}

static sim_proc *fault_victim(sim *s)
{
    uint32_t host = sim_below(s, SIM_FAULTS, s->n_host);
    return host_runs(s, host) && !s->hosts[host].leaving ? s->hosts[host].proc : NULL;
}

static void fault_restart(sim *s, void *arg, uint64_t host)
{
    (void)arg;
    if (!host_runs(s, (uint32_t)host) && !s->hosts[host].leaving) {
        sim_start(s, (uint32_t)host);
    }
}

static void fault_crash(sim *s, bool dark)
{
    sim_proc *proc = fault_victim(s);
    if (proc != NULL) {
        uint32_t host = proc->host;
        if (proc->role == SIM_COORDINATOR && !dark && sim_below(s, SIM_FAULTS, 2) == 0) {
            sim_coordinator_stop(proc); /* it ends as it should */
        }
        sim_kill(s, proc, dark);
        uint64_t down_us = sim_between(s, SIM_FAULTS, 1, FAULT_RESTART_MS) * SIM_MS;
        sim_at(s, s->now_us + down_us, fault_restart, NULL, host);
    }
}

static void fault_cut(sim *s, bool both)
{
    uint32_t a = sim_below(s, SIM_FAULTS, s->n_host), b = sim_below(s, SIM_FAULTS, s->n_host);
    uint64_t until_us = s->now_us + sim_between(s, SIM_FAULTS, 10, 4000) * SIM_MS;
    if (a == b) {
        return;
    }
    sim_trace(s, s->hosts[a].proc, "is cut off from host %u%s until %llu ms from now", b,
              both ? ", and it from us" : "", (unsigned long long)((until_us - s->now_us) / SIM_MS));
    s->hosts[a].cut_until_us[b] = until_us;
    if (both) {
        s->hosts[b].cut_until_us[a] = until_us;
    }
}

static void fault_pause(sim *s)
{
    sim_proc *proc = fault_victim(s);
    if (proc != NULL) {
        proc->paused_until_us = s->now_us + sim_between(s, SIM_FAULTS, 10, 3000) * SIM_MS;
        sim_trace(s, proc, "stands still until %llu ms from now",
                  (unsigned long long)((proc->paused_until_us - s->now_us) / SIM_MS));
    }
}

static void fault_slow(sim *s)
{
    sim_proc *proc = fault_victim(s);
    if (proc != NULL) {
        proc->slow_until_us = s->now_us + sim_between(s, SIM_FAULTS, 100, 5000) * SIM_MS;
        sim_trace(s, proc, "is slow");
    }
}

static void fault_join(sim *s)
{
    for (uint32_t host = 0; host < s->n_host; host++) {
        if (s->hosts[host].role == SIM_WORKER && s->hosts[host].proc == NULL) {
            sim_start(s, host);
            return;
        }
    }
}

/* Hosts of the role that run or will run again and are not being drained. */
static uint32_t hosts_of(const sim *s, sim_role role)
{
    uint32_t n = 0;
    for (uint32_t host = 0; host < s->n_host; host++) {
        n += s->hosts[host].role == role && s->hosts[host].proc != NULL && !s->hosts[host].leaving;
    }
    return n;
}

static void fault_leave(sim *s, sim_role role)
{
    uint32_t least = role == SIM_WORKER ? shape_need(&s->shape) + 1 : 2;
    sim_proc *proc = fault_victim(s);
    if (proc == NULL || proc->role != role || hosts_of(s, role) <= least ||
        s->now_us < proc->paused_until_us) {
        return;
    }
    s->hosts[proc->host].leaving = true;
    if (role == SIM_WORKER) {
        sim_worker_leave(s, proc);
    } else {
        sim_router_leave(s, proc);
    }
}

sim_proc *sim_active_coordinator(const sim *s)
{
    for (uint32_t host = 0; host < s->shape.n_coordinator; host++) {
        sim_proc *proc = s->hosts[host].proc;
        if (host_runs(s, host) && s->now_us >= proc->paused_until_us && sim_coordinator_is_active(proc)) {
            return proc;
        }
    }
    return NULL;
}

/* The coordinator says no to what cannot be. */
static void fault_wish(sim *s, bool drain)
{
    sim_proc *proc = sim_active_coordinator(s);
    if (proc != NULL) {
        sim_coordinator_wish(s, proc, drain);
    }
}

/* Any gateway is told, and tells the routers that it is linked to. */
static void fault_forget(sim *s)
{
    uint32_t host = sim_below(s, SIM_FAULTS, s->n_host);
    sim_proc *proc = s->hosts[host].proc;
    if (host_runs(s, host) && proc->role == SIM_GATEWAY && s->now_us >= proc->paused_until_us) {
        sim_gateway_forget(s, proc);
    }
}

static void fault_store_cut(sim *s)
{
    uint32_t host = sim_below(s, SIM_FAULTS, s->shape.n_coordinator);
    s->hosts[host].store_cut_until_us = s->now_us + sim_between(s, SIM_FAULTS, 10, 5000) * SIM_MS;
    sim_trace(s, s->hosts[host].proc, "is cut off from etcd");
}

static void fault_tick(sim *s, void *arg, uint64_t tag)
{
    if (s->healed) {
        return;
    }
    if (sim_strikes(s, SIM_FAULT_link_reset)) {
        sim_break_one(s);
    }
    if (sim_strikes(s, SIM_FAULT_cut_one_way)) {
        fault_cut(s, false);
    }
    if (sim_strikes(s, SIM_FAULT_cut_both_ways)) {
        fault_cut(s, true);
    }
    if (sim_strikes(s, SIM_FAULT_crash)) {
        fault_crash(s, false);
    }
    if (sim_strikes(s, SIM_FAULT_power_loss)) {
        fault_crash(s, true);
    }
    if (sim_strikes(s, SIM_FAULT_pause)) {
        fault_pause(s);
    }
    if (sim_strikes(s, SIM_FAULT_slow_peer)) {
        fault_slow(s);
    }
    if (s->shape.etcd && sim_strikes(s, SIM_FAULT_store_cut)) {
        fault_store_cut(s);
    }
    if (sim_strikes(s, SIM_FAULT_worker_joins)) {
        fault_join(s);
    }
    if (sim_strikes(s, SIM_FAULT_worker_leaves)) {
        fault_leave(s, SIM_WORKER);
    }
    if (sim_strikes(s, SIM_FAULT_router_leaves)) {
        fault_leave(s, SIM_ROUTER);
    }
    if (sim_strikes(s, SIM_FAULT_operator_drains)) {
        fault_wish(s, true);
    }
    if (sim_strikes(s, SIM_FAULT_operator_rebalances)) {
        fault_wish(s, false);
    }
    if (sim_strikes(s, SIM_FAULT_operator_forgets)) {
        fault_forget(s);
    }
    sim_at(s, s->now_us + FAULT_TICK_MS * SIM_MS, fault_tick, arg, tag);
}

void sim_faults_start(sim *s)
{
    sim_at(s, s->now_us + FAULT_TICK_MS * SIM_MS, fault_tick, NULL, 0);
}

/* ---- the end of it ---- */

/* Who is needed: the coordinator, one gateway, one router, workers enough; of the others some. */
static void heal_choose(sim *s, bool core[SIM_HOSTS_MAX])
{
    uint32_t n_core[4] = {0}, need[4] = {1, 1, 1, shape_need(&s->shape)};
    bool all = sim_below(s, SIM_FAULTS, 2) == 0;
    s->healed_coordinator = sim_below(s, SIM_FAULTS, s->shape.n_coordinator);
    if (need[SIM_WORKER] < s->shape.workers_min) {
        need[SIM_WORKER] = s->shape.workers_min; /* if no epoch was ever made */
    }
    for (uint32_t host = 0; host < s->n_host; host++) {
        const sim_host *h = &s->hosts[host];
        bool needed =
            h->role == SIM_COORDINATOR ? host == s->healed_coordinator : n_core[h->role] < need[h->role];
        core[host] = h->proc != NULL && !h->leaving && (all || needed || sim_below(s, SIM_FAULTS, 2) == 0);
        n_core[h->role] += core[host];
    }
    for (uint32_t host = 0; host < s->n_host; host++) { /* too many were drained: more machines */
        sim_role role = s->hosts[host].role;
        if (!core[host] && n_core[role] < need[role]) {
            if (host_runs(s, host)) {
                sim_kill(s, s->hosts[host].proc, false);
            }
            s->hosts[host].leaving = false;
            core[host] = true;
            n_core[role]++;
        }
    }
}

/* One that is counted on goes after all, because an operator's wish reached it late: another in its place. */
void sim_host_ended(sim *s, uint32_t host)
{
    if (s->hosts[host].core) {
        s->hosts[host].leaving = false;
        sim_at(s, s->now_us + sim_between(s, SIM_FAULTS, 1, 500) * SIM_MS, fault_restart, NULL, host);
    }
}

static void heal_host(sim *s, uint32_t host)
{
    sim_proc *proc = s->hosts[host].proc;
    const sim_proc *active = sim_active_coordinator(s);
    if (active != NULL && host_runs(s, host) && sim_coordinator_lets_go(active, proc)) {
        sim_kill(s, proc, false); /* on its way out */
    } else if (host_runs(s, host)) {
        proc->paused_until_us = proc->paused_until_us > s->now_us ? s->now_us : proc->paused_until_us;
        proc->slow_until_us = 0;
    } else {
        sim_host_ended(s, host);
    }
}

/* Dead, standing still or unreachable for good. */
static void heal_forsake(sim *s, uint32_t host, const bool core[SIM_HOSTS_MAX])
{
    sim_proc *proc = s->hosts[host].proc;
    uint32_t how = sim_below(s, SIM_FAULTS, 3);
    bool was_leaving = s->hosts[host].leaving;
    s->hosts[host].leaving = true; /* no restart */
    if (!host_runs(s, host) || was_leaving) {
        return;
    }
    if (how == 0 || s->hosts[host].role == SIM_GATEWAY) { /* its clients must learn of it */
        sim_kill(s, proc, sim_below(s, SIM_FAULTS, 2) == 0);
    } else if (how == 1) {
        sim_trace(s, proc, "stands still for good");
        proc->paused_until_us = SIM_NEVER;
    } else {
        sim_trace(s, proc, "is cut off for good");
        s->hosts[host].store_cut_until_us = SIM_NEVER;
        for (uint32_t other = 0; other < s->n_host; other++) {
            if (core[other]) {
                s->hosts[host].cut_until_us[other] = SIM_NEVER;
                s->hosts[other].cut_until_us[host] = SIM_NEVER;
            }
        }
    }
}

void sim_heal(sim *s)
{
    bool core[SIM_HOSTS_MAX];
    sim_trace(s, NULL, "HEALED");
    s->healed = true;
    s->healed_us = s->now_us;
    heal_choose(s, core);
    for (uint32_t a = 0; a < s->n_host; a++) {
        for (uint32_t b = 0; b < s->n_host; b++) {
            s->hosts[a].cut_until_us[b] = 0;
        }
        s->hosts[a].store_cut_until_us = 0;
    }
    for (uint32_t host = 0; host < s->n_host; host++) {
        s->hosts[host].core = core[host];
        if (core[host]) {
            heal_host(s, host);
        } else {
            heal_forsake(s, host, core);
        }
    }
}
