/* Clock, events, chance, trace; a run from its seed to its verdict. */
#include <stdarg.h>
#include <string.h>

#include "common/base/assert.h"
#include "tests/sim/etcd.h"

/* Processes start far from zero, so that nothing hides behind an early clock. */
#define WORLD_BEGIN_US (1000 * 1000 * SIM_MS)
enum {
    WORLD_BUDGET_MS = 40000, /* after the healing, for every open request to finish */
    WORLD_REST_MS = 15000,   /* then for everything to come to rest */
};

const char *const sim_fault_names[SIM_FAULT_COUNT] = {
#define SIM_FAULT(name, text) #name,
#include "tests/sim/faults.def"
#undef SIM_FAULT
};

bool sim_fault_off[SIM_FAULT_COUNT];

/* ---- chance ---- */

uint64_t sim_draw(sim *s, sim_stream stream)
{
    s->random[stream] += 0x9E3779B97F4A7C15u;
    return sim_mix(s->random[stream], 7);
}

uint32_t sim_below(sim *s, sim_stream stream, uint32_t n)
{
    return (uint32_t)(sim_draw(s, stream) % n);
}

uint32_t sim_between(sim *s, sim_stream stream, uint32_t low, uint32_t high)
{
    return low + sim_below(s, stream, high - low + 1);
}

bool sim_strikes(sim *s, sim_fault fault)
{
    bool strikes =
        s->shape.odds[fault] > 0 && !s->healed && sim_below(s, SIM_FAULTS, 10000) < s->shape.odds[fault];
    s->counts.faults[fault] += strikes;
    return strikes;
}

/* ---- events: a heap by (time, number) ---- */

static bool event_before(const sim_event *a, const sim_event *b)
{
    return a->at_us != b->at_us ? a->at_us < b->at_us : a->number < b->number;
}

static void event_swap(sim *s, uint32_t i, uint32_t k)
{
    sim_event event = s->heap[i];
    s->heap[i] = s->heap[k];
    s->heap[k] = event;
}

void sim_at(sim *s, uint64_t at_us, sim_fn fn, void *arg, uint64_t tag)
{
    CM_ASSERT(at_us >= s->now_us && at_us != SIM_NEVER);
    if (s->n_event == s->cap_event) {
        s->cap_event = s->cap_event != 0 ? s->cap_event * 2 : 256;
        s->heap = cm_realloc(s->heap, sizeof(sim_event) * s->cap_event);
    }
    uint32_t i = s->n_event++;
    s->heap[i] = (sim_event){at_us, s->next_event++, fn, arg, tag};
    while (i > 0 && event_before(&s->heap[i], &s->heap[(i - 1) / 2])) {
        event_swap(s, i, (i - 1) / 2);
        i = (i - 1) / 2;
    }
}

static sim_event event_take(sim *s)
{
    sim_event first = s->heap[0];
    s->heap[0] = s->heap[--s->n_event];
    uint32_t i = 0;
    for (;;) {
        uint32_t least = i;
        for (uint32_t k = 2 * i + 1; k <= 2 * i + 2 && k < s->n_event; k++) {
            least = event_before(&s->heap[k], &s->heap[least]) ? k : least;
        }
        if (least == i) {
            return first;
        }
        event_swap(s, i, least);
        i = least;
    }
}

/* ---- trace and verdict ---- */

void sim_trace(sim *s, const sim_proc *proc, const char *fmt, ...)
{
    char text[512];
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    s->digest = sim_mix(s->digest, s->now_us);
    for (int i = 0; i < n && i < (int)sizeof(text); i++) {
        s->digest = s->digest * 0x100000001B3u ^ (uint8_t)text[i];
    }
    if (s->trace) {
        uint64_t us = s->now_us - WORLD_BEGIN_US;
        printf("%6llu.%06llu %-6s %s\n", (unsigned long long)(us / 1000000),
               (unsigned long long)(us % 1000000), proc != NULL ? proc->name : "-", text);
    }
}

void sim_fail(sim *s, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    vsnprintf(s->verdict, sizeof(s->verdict), fmt, args);
    va_end(args);
    sim_trace(s, NULL, "FAILED: %s", s->verdict);
    longjmp(s->stop, 1);
}

/* ---- processes ---- */

static void proc_woken(sim *s, void *arg, uint64_t at_us)
{
    sim_proc *proc = arg;
    if (!proc->alive || proc->wake_us != at_us) {
        return; /* an alarm that was set anew since */
    }
    if (s->now_us < proc->paused_until_us) {
        proc->wake_us = proc->paused_until_us;
        if (proc->wake_us != SIM_NEVER) {
            sim_at(s, proc->wake_us, proc_woken, proc, proc->wake_us);
        }
        return;
    }
    proc->wake_us = SIM_NEVER;
    sim_go(s, proc);
}

void sim_go(sim *s, sim_proc *proc)
{
    uint64_t next_us = proc->ops->pump(s, proc);
    if (!proc->alive || next_us == SIM_NEVER) {
        return;
    }
    next_us = next_us > s->now_us ? next_us : s->now_us + 1;
    if (next_us < proc->wake_us) {
        proc->wake_us = next_us;
        sim_at(s, next_us, proc_woken, proc, next_us);
    }
}

bool sim_put_off(sim *s, const sim_proc *proc, sim_fn fn, void *arg, uint64_t tag)
{
    if (s->now_us >= proc->paused_until_us) {
        return false;
    }
    if (proc->paused_until_us != SIM_NEVER) {
        sim_at(s, proc->paused_until_us, fn, arg, tag);
    }
    return true;
}

sim_proc *sim_start(sim *s, uint32_t host)
{
    static void (*const starts[])(sim *, sim_proc *) = {sim_coordinator_start, sim_gateway_start,
                                                        sim_router_start, sim_worker_start};
    static const char letters[] = "cgrw";
    if (s->n_proc == s->cap_proc) {
        s->cap_proc = s->cap_proc != 0 ? s->cap_proc * 2 : 32;
        s->procs = cm_realloc(s->procs, sizeof(sim_proc *) * s->cap_proc);
    }
    sim_proc *proc = cm_alloc(sizeof(*proc));
    s->procs[s->n_proc++] = proc;
    proc->id = s->n_proc;
    proc->host = host;
    proc->role = s->hosts[host].role;
    proc->world = s;
    proc->alive = true;
    proc->wake_us = SIM_NEVER;
    s->hosts[host].proc = proc;
    s->hosts[host].start_us = SIM_NEVER;
    snprintf(proc->name, sizeof(proc->name), "%c%u.%u", letters[proc->role], host, proc->id);
    sim_trace(s, proc, "starts");
    starts[proc->role](s, proc);
    sim_go(s, proc);
    return proc;
}

void sim_kill(sim *s, sim_proc *proc, bool dark)
{
    sim_trace(s, proc, dark ? "loses power" : "dies");
    proc->alive = false;
    proc->dark = dark;
    sim_break_links(s, proc, dark);
    proc->ops->end(s, proc);
    proc->state = NULL;
    sim_host_ended(s, proc->host);
}

sim_proc *sim_proc_named(sim *s, const char *name)
{
    for (uint32_t i = 0; i < s->n_proc; i++) {
        if (strcmp(s->procs[i]->name, name) == 0) {
            return s->procs[i];
        }
    }
    return NULL;
}

/* ---- a run ---- */

static void world_begin(sim *s, uint64_t seed, bool trace)
{
    memset(s, 0, sizeof(*s));
    s->seed = seed;
    s->trace = trace;
    s->now_us = WORLD_BEGIN_US;
    s->next_event = 1; /* also names ends of links: 0 is none */
    for (uint32_t i = 0; i < SIM_STREAM_COUNT; i++) {
        s->random[i] = sim_mix(seed, i);
    }
    TAILQ_INIT(&s->links);
    sim_shape_draw(s);
    sim_etcd_start(s);
    s->disk.cluster = sim_draw(s, SIM_SHAPE) | 1;
    s->disk.next_number = s->disk.next_member_id = 1;
}

/* Until the clock says so, or done does. */
static bool world_until(sim *s, uint64_t end_us, bool (*done)(const sim *s))
{
    while (s->n_event > 0 && s->heap[0].at_us <= end_us) {
        if (done != NULL && done(s)) {
            return true;
        }
        sim_event event = event_take(s);
        s->now_us = event.at_us;
        s->counts.events++;
        event.fn(s, event.arg, event.tag);
    }
    if (done != NULL && done(s)) {
        return true;
    }
    s->now_us = end_us;
    return done == NULL;
}

static void world_name_open(sim *s)
{
    for (uint32_t i = 0; i < s->shape.n_request; i++) {
        const sim_request *r = &s->requests[i];
        if (r->state == SIM_ASKING || r->state == SIM_OPEN) {
            sim_fail(s, "request %u has %u of %u tokens %u ms after the healing (%s, %u tries)", r->id,
                     r->n_got, r->n_want, WORLD_BUDGET_MS, r->state == SIM_OPEN ? "open" : "asking",
                     r->n_try);
        }
    }
}

void sim_run(sim *s, uint64_t seed, bool trace)
{
    world_begin(s, seed, trace);
    if (setjmp(s->stop) != 0) {
        return; /* a failed run is left as it is */
    }
    sim_clients_start(s);
    for (uint32_t host = 0; host < s->n_host; host++) {
        if (s->hosts[host].start_us == 0) {
            sim_start(s, host);
        }
    }
    sim_faults_start(s);
    world_until(s, WORLD_BEGIN_US + s->shape.storm_us, NULL);
    sim_heal(s);
    if (!world_until(s, s->now_us + WORLD_BUDGET_MS * SIM_MS, sim_clients_finished)) {
        world_name_open(s);
    }
    s->counts.healing_ms = (s->now_us - s->healed_us) / 1000;
    world_until(s, s->now_us + WORLD_REST_MS * SIM_MS, NULL);
    /* a round of rebalancing may have begun just now: it comes to its end */
    world_until(s, s->now_us + WORLD_REST_MS * SIM_MS, sim_change_is_over);
    sim_check_rest(s);
    s->counts.virtual_ms = (s->now_us - WORLD_BEGIN_US) / 1000;
}

void sim_fini(sim *s)
{
    for (uint32_t i = 0; i < s->n_proc; i++) {
        if (s->procs[i]->alive) {
            s->procs[i]->alive = false;
            s->procs[i]->ops->end(s, s->procs[i]);
        }
        cm_free(s->procs[i]);
    }
    sim_wire_fini(s);
    sim_etcd_fini(s);
    sim_check_fini(s);
    cm_free(s->disk.epoch);
    cm_free(s->requests);
    cm_free(s->procs);
    cm_free(s->heap);
}
