#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "coordinator/core_private.h"

/* ---- what the next epoch should be ---- */

uint32_t co_core_count(const co_core *core, Baleen__Control__V1__Role role)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < core->n_members; i++) {
        n += co_member_is_wanted(&core->members[i]) && core->members[i].self.role == role;
    }
    return n;
}

/* Both lists ascend by id. */
static bool core_differs(const co_core *core)
{
    size_t at = 0, n = core->epoch != NULL ? core->epoch->message->n_members : 0;
    for (uint32_t i = 0; i < core->n_members; i++) {
        const co_peer *self = &core->members[i].self;
        if (co_member_is_wanted(&core->members[i])) {
            if (at == n || core->epoch->message->members[at]->id != self->id ||
                core->epoch->message->members[at]->draining != self->draining) {
                return true;
            }
            at++;
        }
    }
    return at != n;
}

static bool core_has_absent(const co_core *core)
{
    for (uint32_t i = 0; i < core->n_members; i++) {
        if (co_member_is_wanted(&core->members[i]) && core->members[i].session == 0) {
            return true;
        }
    }
    return false;
}

static cm_status core_place(const co_core *core, pr_placement **placement_out, cm_error *err)
{
    if (core->knows_model && core->n_expert == 0) {
        *placement_out = pr_placement_none();
        return CM_OK;
    }
    uint32_t n_rank = co_core_count(core, CO_ROLE_WORKER);
    if (n_rank == 0 || (core->epoch == NULL && n_rank < core->workers_min)) {
        /* At the start that is how it has to be. */
        cm_status status = core->epoch == NULL ? CM_E_UNAVAILABLE : CM_E_CAPACITY;
        return cm_error_set(err, status, "workers", "waiting for workers: %u of %u are there", n_rank,
                            core->epoch == NULL ? core->workers_min : 1);
    }
    /* A log of another checkpoint's cluster says nothing about this one's experts. */
    const pr_placement *before = core->epoch != NULL ? core->epoch->placement : NULL;
    if (before != NULL && (before->n_layer != core->n_layer || before->n_expert != core->n_expert)) {
        before = NULL;
    }
    uint32_t *rank_member = cm_alloc(sizeof(uint32_t) * n_rank);
    uint64_t *capacity = cm_alloc(sizeof(uint64_t) * n_rank);
    uint32_t rank = 0;
    for (uint32_t i = 0; i < core->n_members; i++) {
        const co_member *member = &core->members[i];
        if (co_member_is_wanted(member) && member->self.role == CO_ROLE_WORKER) {
            rank_member[rank] = member->self.id;
            capacity[rank++] = member->self.expert_bytes_max / core->expert_bytes;
        }
    }
    cm_status status = CM_OK;
    if (before != NULL && before->n_rank == n_rank &&
        memcmp(before->rank_member, rank_member, sizeof(uint32_t) * n_rank) == 0) {
        *placement_out = pr_placement_clone(before);
    } else {
        status = pr_placement_plan(core->n_layer, core->n_expert, rank_member, n_rank, capacity, before,
                                   placement_out, err);
    }
    cm_free(rank_member);
    cm_free(capacity);
    return status;
}

static co_epoch *core_propose(co_core *core, const pr_placement *placement)
{
    co_peer **peers = cm_alloc(sizeof(*peers) * core->n_members);
    uint32_t n = 0;
    for (uint32_t i = 0; i < core->n_members; i++) {
        if (co_member_is_wanted(&core->members[i])) {
            peers[n++] = &core->members[i].self;
        }
    }
    co_epoch *epoch = co_epoch_create(core->next_number++, core->cluster, peers, n, placement);
    cm_free(peers);
    return epoch;
}

/* ---- a change: begin, give up, go on ---- */

static void change_propose(co_core *core, pr_placement *placement)
{
    core->blocked[0] = 0;
    core->proposal = core_propose(core, placement);
    pr_placement_free(placement);
    /* The number must be in the log before anyone hears it: one that was promised and forgotten could mean
     * two epochs. */
    core->ticket = co_core_store(core, NULL);
    core->phase = CO_PHASE_NUMBERING;
}

/* The members are those of the epoch in force; their experts may move. */
static void change_balance(co_core *core)
{
    pr_placement *placement = core->balance_moves != 0 && !core_differs(core) ? co_core_balanced(core) : NULL;
    if (placement != NULL) {
        const co_balance_report *report = &core->balance_report;
        change_propose(core, placement);
        co_core_note(
            core, CM_LOG_INFO,
            "epoch %llu moves %u experts and gives up %u copies: busiest workers %.2f -> %.2f of the mean",
            (unsigned long long)core->proposal->number, report->n_moves, report->n_dropped, report->before,
            report->after);
    }
}

static void change_begin(co_core *core)
{
    if (!core_has_absent(core)) { /* one of those may be dead, and a leaver needed */
        (void)co_core_take_back(core);
        co_core_release_leavers(core);
    }
    if (!core->dirty && !core_has_absent(core)) {
        change_balance(core);
        return;
    }
    if (!core->dirty || core->now_ms < core->retry_ms || core_has_absent(core)) {
        return; /* the absent come back or die soon; moving experts costs more than waiting */
    }
    core->dirty = false;
    if (!core_differs(core)) {
        core->blocked[0] = 0;
        change_balance(core);
        return;
    }
    cm_error err = {0};
    pr_placement *placement = NULL;
    cm_status status = core_place(core, &placement, &err);
    if (status == CM_E_CAPACITY && co_core_count(core, CO_ROLE_WORKER) > 0) {
        status = co_core_check_room(core, NULL, &err); /* the same, and who lacks what */
    }
    if (status != CM_OK) {
        if (strncmp(core->blocked, err.text, sizeof(core->blocked) - 1) != 0) {
            snprintf(core->blocked, sizeof(core->blocked), "%.255s", err.text);
            co_core_note(core, err.status == CM_E_CAPACITY ? CM_LOG_WARN : CM_LOG_INFO, "no new epoch: %s",
                         err.text);
        }
        co_core_release_blocked(core);
        return;
    }
    change_propose(core, placement);
}

static void change_abort(co_core *core, const char *why)
{
    uint64_t number = core->proposal->number;
    for (uint32_t i = 0; i < core->n_members; i++) {
        co_member *member = &core->members[i];
        if (co_member_is_in(member) && member->session != 0 && member->told_prepare == number) {
            co_core_emit(core, CO_OUT_ABORT, member->session)->number = number;
            member->told_prepare = 0;
        }
    }
    co_core_note(core, CM_LOG_WARN, "epoch %llu is given up: %s", (unsigned long long)number, why);
    if (core->balancing) {
        co_core_balance_done(core, CM_E_UNAVAILABLE, why);
    }
    co_core_drop_epoch(core, core->proposal);
    core->proposal = NULL;
    core->ticket = 0;
    core->phase = CO_PHASE_REST;
    core->dirty = true;
}

/* Everyone the proposal counts on is still there and wants to be. */
static bool change_is_whole(co_core *core)
{
    const Baleen__Control__V1__Epoch *message = core->proposal->message;
    for (size_t i = 0; i < message->n_members; i++) {
        const co_member *member = co_core_find(core, message->members[i]->id);
        if (member == NULL || !co_member_is_wanted(member)) {
            return false;
        }
    }
    return true;
}

static void change_prepare(co_core *core)
{
    uint64_t number = core->proposal->number;
    bool all = true;
    for (uint32_t i = 0; i < core->n_members; i++) {
        co_member *member = &core->members[i];
        if (!co_member_is_in(member) || member->self.role != CO_ROLE_WORKER ||
            co_epoch_find(core->proposal, member->self.id) == NULL) {
            continue;
        }
        if (member->session != 0 && member->told_prepare != number) {
            co_core_emit(core, CO_OUT_PREPARE, member->session)->epoch = core->proposal;
            member->told_prepare = number;
        }
        all &= member->prepared == number;
    }
    if (all) {
        core->ticket = co_core_store(core, core->proposal);
        core->phase = CO_PHASE_STORING;
    }
}

void co_core_prepared(co_core *core, co_member *member, const Baleen__Control__V1__Prepared *prepared)
{
    if (core->phase != CO_PHASE_PREPARING || prepared->epoch != core->proposal->number ||
        member->told_prepare != prepared->epoch) {
        return; /* of a change that was given up */
    }
    if (prepared->status == CM_OK) {
        member->prepared = prepared->epoch;
        return;
    }
    char text[256];
    snprintf(text, sizeof(text), "could not prepare epoch %llu: %.200s", (unsigned long long)prepared->epoch,
             prepared->text != NULL ? prepared->text : cm_status_text((cm_status)prepared->status));
    co_core_note(core, CM_LOG_WARN, "member %u %s", member->self.id, text);
    if (core->balancing) {
        change_abort(core, text); /* it serves what it has; nothing is lost but a better balance */
        return;
    }
    uint32_t at = core->n_failed++ % CO_FAILED_MAX;
    core->failed[at].incarnation = member->self.incarnation;
    core->failed[at].until_ms = core->now_ms + core->lease_ms;
    co_core_refuse(core, member->session, (cm_status)prepared->status, false, text);
    member->session = 0;
    co_core_remove(core, member, (cm_status)prepared->status, text);
}

/* Tells every member of the epoch in force what it may know by now: workers first, the others once all
 * workers have switched, and at the end workers may retire the epoch before. Serves those who come back as
 * well. */
/* A worker that is back with an epoch of before, or was left out: the experts it still holds are in use no
 * more, and the next ones would come on top. */
static void core_tell_outsider(co_core *core, co_member *member)
{
    uint64_t number = core->epoch->number;
    if (member->self.role == CO_ROLE_WORKER && !member->leaving && member->epoch != 0 &&
        member->epoch < number && member->told_retire != number) {
        co_core_emit(core, CO_OUT_RETIRE, member->session)->number = number;
        member->told_retire = number;
    }
}

static void core_tell(co_core *core)
{
    uint64_t number = core->epoch->number;
    bool settled = core->phase != CO_PHASE_COMMITTING && core->phase != CO_PHASE_PUBLISHING;
    for (uint32_t i = 0; i < core->n_members; i++) {
        co_member *member = &core->members[i];
        bool worker = member->self.role == CO_ROLE_WORKER;
        if (!co_member_is_in(member) || member->session == 0) {
            continue;
        }
        if (co_epoch_find(core->epoch, member->self.id) == NULL) {
            if (settled) {
                core_tell_outsider(core, member);
            }
            continue;
        }
        if (member->epoch != number && member->told_commit != number &&
            (worker || core->phase != CO_PHASE_COMMITTING)) {
            co_core_emit(core, CO_OUT_COMMIT, member->session)->epoch = core->epoch;
            member->told_commit = number;
        }
        if (worker && settled && member->epoch == number && member->told_retire != number) {
            co_core_emit(core, CO_OUT_RETIRE, member->session)->number = number;
            member->told_retire = number;
        }
    }
}

/* All members of the role that live have switched. Past the deadline those that have not count as dead. */
static bool core_switched(co_core *core, Baleen__Control__V1__Role role)
{
    bool all = true;
    for (uint32_t i = 0; i < core->n_members; i++) {
        co_member *member = &core->members[i];
        if (!co_member_is_in(member) || member->self.role != role || member->epoch == core->epoch->number ||
            co_epoch_find(core->epoch, member->self.id) == NULL) {
            continue;
        }
        if (core->now_ms >= core->deadline_ms) {
            co_core_note(core, CM_LOG_WARN, "member %u did not switch to epoch %llu in time", member->self.id,
                         (unsigned long long)core->epoch->number);
            core->n_lost++;
            co_core_remove(core, member, CM_E_DEADLINE, "did not switch to a committed epoch in time");
            continue;
        }
        all = false;
    }
    return all;
}

void co_core_change_stored(co_core *core, const co_in *in)
{
    if (in->ticket != core->ticket || core->proposal == NULL) {
        return;
    }
    core->ticket = 0;
    if (in->status != CM_OK) {
        core->retry_ms = core->now_ms + core->lease_ms;
        if (core->phase == CO_PHASE_STORING) {
            /* Whether the log has it is not known: a restart could find it and go on with it. So it is not
             * given up any more, but written again. */
            snprintf(core->blocked, sizeof(core->blocked), "%.255s", in->text);
            return;
        }
        change_abort(core, in->text);
        snprintf(core->blocked, sizeof(core->blocked), "%.255s", in->text);
        return;
    }
    if (core->phase == CO_PHASE_NUMBERING) {
        core->phase = CO_PHASE_PREPARING;
        return;
    }
    CM_ASSERT(core->phase == CO_PHASE_STORING);
    core->blocked[0] = 0;
    co_core_drop_epoch(core, core->epoch);
    core->epoch = core->proposal;
    core->proposal = NULL;
    core->phase = CO_PHASE_COMMITTING;
    core->deadline_ms = core->now_ms + core->lease_ms * CO_COMMIT_LEASES;
}

static void change_finish(co_core *core)
{
    const co_epoch *epoch = core->epoch;
    co_core_note(core, CM_LOG_INFO, "epoch %llu is in force: %u workers, %u routers, %u gateways",
                 (unsigned long long)epoch->number, co_epoch_count(epoch, CO_ROLE_WORKER),
                 co_epoch_count(epoch, CO_ROLE_ROUTER), co_epoch_count(epoch, CO_ROLE_GATEWAY));
    if (core->balancing) {
        char text[160];
        snprintf(
            text, sizeof(text),
            "epoch %llu: %u experts moved, %u copies given up; the busiest workers had %.2f of the mean and "
            "have %.2f",
            (unsigned long long)epoch->number, core->balance_report.n_moves, core->balance_report.n_dropped,
            core->balance_report.before, core->balance_report.after);
        co_core_balance_done(core, CM_OK, text);
    }
    core->phase = CO_PHASE_REST;
    core->dirty = true; /* whoever came or went meanwhile */
}

void co_core_advance(co_core *core)
{
    co_phase before;
    do {
        before = core->phase;
        if ((before == CO_PHASE_NUMBERING || before == CO_PHASE_PREPARING) && !change_is_whole(core)) {
            change_abort(core, "a member it counted on is gone");
        }
        if (core->epoch != NULL) {
            core_tell(core);
        }
        switch (core->phase) {
        case CO_PHASE_REST:
            change_begin(core);
            break;
        case CO_PHASE_PREPARING:
            change_prepare(core);
            break;
        case CO_PHASE_COMMITTING:
            core->phase = core_switched(core, CO_ROLE_WORKER) ? CO_PHASE_PUBLISHING : CO_PHASE_COMMITTING;
            break;
        case CO_PHASE_PUBLISHING:
            if (core_switched(core, CO_ROLE_ROUTER)) {
                change_finish(core);
            }
            break;
        case CO_PHASE_STORING:
            if (core->ticket == 0 && core->now_ms >= core->retry_ms) {
                core->ticket = co_core_store(core, core->proposal);
            }
            break;
        case CO_PHASE_NUMBERING: /* wait for the log */
            break;
        }
    } while (core->phase != before);
    co_core_tell_drains(core);
}

/* ---- in words ---- */

static void append_waiting(const co_core *core, const co_epoch *epoch, Baleen__Control__V1__Role role,
                           bool preparing, cm_bytes *text)
{
    const char *between = ", waiting for ";
    for (uint32_t i = 0; i < core->n_members; i++) {
        const co_member *member = &core->members[i];
        uint64_t done = preparing ? member->prepared : member->epoch;
        if (member->self.role == role && done != epoch->number &&
            co_epoch_find(epoch, member->self.id) != NULL) {
            cm_bytes_printf(text, "%s%u", between, member->self.id);
            between = " ";
        }
    }
}

bool co_core_change(const co_core *core, char text_out[256])
{
    cm_bytes text;
    cm_bytes_init(&text, 255);
    const co_epoch *epoch = core->proposal != NULL ? core->proposal : core->epoch;
    unsigned long long number = epoch != NULL ? epoch->number : 0;
    switch (core->phase) {
    case CO_PHASE_REST:
        cm_bytes_append_text(&text, core->blocked);
        break;
    case CO_PHASE_NUMBERING:
    case CO_PHASE_STORING:
        if (core->ticket != 0) {
            cm_bytes_printf(&text, "epoch %llu: writing the log", number);
        } else {
            cm_bytes_append_text(&text, core->blocked);
        }
        break;
    case CO_PHASE_PREPARING:
        cm_bytes_printf(&text, "epoch %llu: workers load", number);
        append_waiting(core, epoch, CO_ROLE_WORKER, true, &text);
        break;
    case CO_PHASE_COMMITTING:
        cm_bytes_printf(&text, "epoch %llu: workers switch", number);
        append_waiting(core, epoch, CO_ROLE_WORKER, false, &text);
        break;
    case CO_PHASE_PUBLISHING:
        cm_bytes_printf(&text, "epoch %llu: routers switch", number);
        append_waiting(core, epoch, CO_ROLE_ROUTER, false, &text);
        break;
    }
    snprintf(text_out, 256, "%s", cm_bytes_text(&text));
    cm_bytes_fini(&text);
    return text_out[0] != 0;
}
