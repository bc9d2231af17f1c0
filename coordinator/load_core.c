#include <stdio.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "coordinator/core_private.h"

/* ---- what routers count ---- */

void co_core_take_load(co_core *core, const co_member *from, const Baleen__Control__V1__ExpertLoad *load)
{
    size_t n_pair = (size_t)core->n_layer * core->n_expert;
    if (from->self.role != CO_ROLE_ROUTER || load->n_layer != core->n_layer ||
        load->n_expert != core->n_expert || load->n_count != n_pair) {
        co_core_note(core, CM_LOG_WARN, "member %u tells the load of %u layers of %u experts in %zu numbers",
                     from->self.id, load->n_layer, load->n_expert, load->n_count);
        return;
    }
    if (core->load == NULL) {
        core->load = cm_alloc(sizeof(uint64_t) * n_pair);
    }
    for (size_t i = 0; i < n_pair; i++) {
        core->load[i] += load->count[i];
    }
}

void co_core_load_time(co_core *core)
{
    if (core->balance_every_ms != 0 && core->now_ms >= core->balance_next_ms) {
        core->balance_next_ms = core->now_ms + core->balance_every_ms;
        core->balance_moves = core->balance_moves != 0 ? core->balance_moves : core->balance_moves_max;
    }
    if (core->now_ms < core->load_half_ms) {
        return;
    }
    core->load_half_ms = core->now_ms + CO_LOAD_HALF_MS;
    for (size_t i = 0; core->load != NULL && i < (size_t)core->n_layer * core->n_expert; i++) {
        core->load[i] /= 2;
    }
}

/* ---- wishes ---- */

void co_core_balance_done(co_core *core, cm_status status, const char *text)
{
    if (core->balance_ticket != 0) {
        co_core_answer(core, core->balance_ticket, status, "%s", text);
    }
    core->balance_ticket = 0;
    core->balance_moves = 0;
    core->balancing = false;
}

void co_core_rebalance(co_core *core, const co_in *in)
{
    char change[256];
    if (core->balance_ticket != 0) {
        co_core_answer(core, in->ticket, CM_E_EXISTS, "experts are being moved already");
    } else if (core->epoch == NULL || core->phase != CO_PHASE_REST || co_core_change(core, change)) {
        co_core_answer(core, in->ticket, CM_E_UNAVAILABLE, "the cluster is not at rest, try again: %s",
                       co_core_change(core, change) ? change : "no epoch yet");
    } else {
        core->balance_ticket = in->ticket;
        core->balance_moves = in->n_moves != 0 ? in->n_moves : core->balance_moves_max;
    }
}

/* ---- the next placement ---- */

uint64_t *co_core_capacity(const co_core *core, const pr_placement *place)
{
    uint64_t *capacity = cm_alloc(sizeof(uint64_t) * place->n_rank);
    for (uint32_t i = 0; i < core->n_members; i++) {
        const co_peer *self = &core->members[i].self;
        uint32_t rank = pr_placement_rank_of(place, self->id);
        if (rank < place->n_rank) {
            capacity[rank] = self->expert_bytes_max / core->expert_bytes;
        }
    }
    return capacity;
}

pr_placement *co_core_balanced(co_core *core)
{
    char text[160];
    pr_placement *next = NULL;
    const pr_placement *now = core->epoch != NULL ? core->epoch->placement : NULL;
    if (now == NULL) {
        return NULL;
    }
    if (co_core_load(core) == NULL) {
        co_core_balance_done(core, CM_OK, "nothing moves: no load was seen yet");
        return NULL;
    }
    uint64_t *capacity = co_core_capacity(core, now);
    next = co_balance_plan(now, core->load, capacity, core->balance_moves, &core->balance_report);
    cm_free(capacity);
    if (next == NULL) {
        snprintf(text, sizeof(text),
                 "nothing moves: the busiest workers have %.2f of the mean, which no %u moves "
                 "within the memory there is make better",
                 core->balance_report.before, core->balance_moves);
        co_core_balance_done(core, CM_OK, text);
        return NULL;
    }
    core->balancing = true;
    return next;
}
