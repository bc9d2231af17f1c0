#include <stdio.h>

#include "common/base/assert.h"
#include "coordinator/core_private.h"

/* ---- wishes ---- */

void co_core_begin_leaving(co_core *core, co_member *member)
{
    member->leaving = true;
    if (member->self.role == CO_ROLE_ROUTER) {
        member->self.has_draining = member->self.draining = true; /* gateways see it in the next epoch */
    }
    core->dirty = true;
}

void co_core_leaving(co_core *core, co_member *member)
{
    if (!member->leaving) {
        co_core_begin_leaving(core, member);
        co_core_note(core, CM_LOG_INFO, "member %u wants to leave", member->self.id);
    }
}

/* ---- room for the experts ---- */

static uint64_t leave_need(const co_core *core)
{
    return (uint64_t)core->n_layer * core->n_expert;
}

static uint64_t leave_room_of(const co_core *core, const co_member *worker)
{
    uint64_t can = worker->self.expert_bytes_max / core->expert_bytes;
    return can < leave_need(core) ? can : leave_need(core);
}

static bool leave_stays(const co_member *member, const co_member *leaver)
{
    return member != leaver && member->self.role == CO_ROLE_WORKER && co_member_is_wanted(member);
}

/* How much is missing, and who has how much: what an operator has to know to mend it. */
static cm_status leave_no_room(const co_core *core, const co_member *leaver, uint64_t room, uint32_t n,
                               cm_error *err)
{
    enum { NAMED = 4 };
    char who[NAMED * 48 + 32] = "";
    size_t at = 0;
    uint32_t n_named = 0;
    for (uint32_t i = 0; i < core->n_members && n_named < NAMED; i++) {
        const co_member *member = &core->members[i];
        if (leave_stays(member, leaver)) {
            at += (size_t)snprintf(who + at, sizeof(who) - at, "%smember %u holds %llu",
                                   n_named++ > 0 ? ", " : "", member->self.id,
                                   (unsigned long long)leave_room_of(core, member));
        }
    }
    snprintf(who + at, sizeof(who) - at, "%s", n > NAMED ? ", ..." : "");
    return cm_error_set(
        err, CM_E_CAPACITY, "workers",
        "%s%u workers can hold %llu of the %llu experts, %llu bytes are missing (%s): add workers, "
        "or memory for experts (--expert-bytes-max)",
        leaver != NULL ? "the other " : "", n, (unsigned long long)room, (unsigned long long)leave_need(core),
        (unsigned long long)((leave_need(core) - room) * core->expert_bytes), who);
}

cm_status co_core_check_room(const co_core *core, const co_member *leaver, cm_error *err)
{
    uint64_t room = 0;
    uint32_t n = 0;
    if (leave_need(core) == 0) {
        return cm_error_set(err, CM_E_UNAVAILABLE, "workers", "no worker has come back yet: try again");
    }
    for (uint32_t i = 0; i < core->n_members; i++) {
        if (leave_stays(&core->members[i], leaver)) {
            room += leave_room_of(core, &core->members[i]);
            n++;
        }
    }
    return room >= leave_need(core) ? CM_OK : leave_no_room(core, leaver, room, n, err);
}

/* One that serves on if it is asked to: routers may have reached it again, an operator can wait. Who leaves
 * by its own wish goes whatever is said. */
static bool leave_can_stay(const co_member *member)
{
    return co_member_is_in(member) && member->self.role == CO_ROLE_WORKER && member->session != 0 &&
           (member->cut_off || member->drained) && (!member->leaving || member->drained);
}

static void leave_take_back(co_core *core, co_member *worker, const char *why)
{
    if (worker->cut_off) {
        co_core_end_cut(core, worker, why);
    }
    if (!worker->drained) {
        return;
    }
    worker->leaving = worker->drained = false;
    core->dirty = true;
    /* An epoch without it ended those links: nobody tells of them as up. */
    co_core_cuts_forget(core, worker->self.id);
    co_drains_remove(&core->drains, worker->self.id);
    co_core_store(core, NULL);
    co_core_note(core, CM_LOG_WARN, "member %u is not drained any more: without it %s", worker->self.id, why);
    if (worker->drain_ticket != 0) {
        co_core_answer(core, worker->drain_ticket, CM_E_CAPACITY, "member %u is taken back: without it %s",
                       worker->self.id, why);
        worker->drain_ticket = 0;
    }
}

bool co_core_take_back(co_core *core)
{
    cm_error err = {0};
    uint64_t room = 0;
    if (co_core_check_room(core, NULL, &err) != CM_E_CAPACITY) {
        return false;
    }
    for (uint32_t i = 0; i < core->n_members; i++) {
        const co_member *member = &core->members[i];
        room += leave_stays(member, NULL) || leave_can_stay(member) ? leave_room_of(core, member) : 0;
    }
    if (room < leave_need(core)) {
        return false; /* nobody is helped */
    }
    for (uint32_t drained = 0; drained < 2; drained++) { /* an operator's wish is the last to be overruled */
        for (uint32_t i = 0; i < core->n_members; i++) {
            co_member *member = &core->members[i];
            if (leave_can_stay(member) && member->drained == (drained != 0) &&
                co_core_check_room(core, NULL, &err) != CM_OK) {
                leave_take_back(core, member, err.text);
            }
        }
    }
    return true;
}

/* Others of its role that stay. */
static uint32_t leave_count_others(const co_core *core, const co_member *leaver)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < core->n_members; i++) {
        const co_member *member = &core->members[i];
        n += member != leaver && co_member_is_in(member) && !member->leaving &&
             member->self.role == leaver->self.role;
    }
    return n;
}

static cm_status leave_check(const co_core *core, const co_member *member, uint32_t id, cm_error *err)
{
    if (member == NULL || !co_member_is_in(member)) {
        return cm_error_set(err, CM_E_NOT_FOUND, "id", "no member %u: baleen status lists them", id);
    }
    if (member->leaving) {
        return cm_error_set(err, CM_E_EXISTS, "id", "member %u is leaving already", id);
    }
    if (leave_count_others(core, member) == 0) {
        return cm_error_set(err, CM_E_CAPACITY, "id",
                            "member %u is the only one of its role: start another first, or stop its process",
                            id);
    }
    if (core->drains.n == CO_DRAINS_MAX) {
        return cm_error_set(err, CM_E_CAPACITY, "id", "%d members are being drained: let some leave first",
                            (int)CO_DRAINS_MAX);
    }
    return member->self.role == CO_ROLE_WORKER ? co_core_check_room(core, member, err) : CM_OK;
}

/* Ids of members that a coordinator before us has let go and that never came back. */
static void leave_forget_gone(co_core *core)
{
    for (uint32_t i = core->drains.n; i-- > 0;) {
        if (co_core_find(core, core->drains.id[i]) == NULL) {
            co_drains_remove(&core->drains, core->drains.id[i]);
        }
    }
}

void co_core_drain_member(co_core *core, co_member *member)
{
    co_core_begin_leaving(core, member);
    member->drained = true;
    core->drains.id[core->drains.n++] = member->self.id;
}

void co_core_drain(co_core *core, const co_in *in)
{
    CM_ASSERT(in->ticket != 0);
    cm_error err = {0};
    co_member *member = co_core_find(core, in->member_id);
    if (core->drains.n == CO_DRAINS_MAX) {
        leave_forget_gone(core);
    }
    cm_status status = leave_check(core, member, in->member_id, &err);
    if (status != CM_OK) {
        co_core_answer(core, in->ticket, status, "%s", err.text);
        return;
    }
    co_core_drain_member(core, member);
    member->drain_ticket = in->ticket;
    co_core_store(core, NULL); /* the drain goes on whether that succeeds: what is written next has it too */
    co_core_note(core, CM_LOG_INFO, "member %u is drained", member->self.id);
}

/* ---- workers ---- */

static void leave_let_go(co_core *core, co_member *member)
{
    co_core_note(core, CM_LOG_INFO, "member %u has left", member->self.id);
    if (member->session != 0) {
        co_core_emit(core, CO_OUT_DRAIN, member->session);
    }
    co_core_remove(core, member, CM_OK, "left");
}

void co_core_release_leavers(co_core *core)
{
    for (uint32_t i = 0; i < core->n_members; i++) {
        co_member *member = &core->members[i];
        if (co_member_is_in(member) && member->leaving && member->self.role == CO_ROLE_WORKER &&
            (core->epoch == NULL || co_epoch_find(core->epoch, member->self.id) == NULL)) {
            leave_let_go(core, member);
        }
    }
}

void co_core_release_blocked(co_core *core)
{
    if (co_core_count(core, CO_ROLE_ROUTER) > 0) {
        return;
    }
    for (uint32_t i = 0; i < core->n_members; i++) {
        co_member *member = &core->members[i];
        if (co_member_is_in(member) && member->leaving && member->self.role == CO_ROLE_WORKER) {
            leave_let_go(core, member);
        }
    }
}

/* ---- routers and gateways ---- */

/* A gateway that has not heard of an epoch in which the router is marked may still choose it. */
static bool leave_may_be_chosen(const co_core *core, const co_member *router)
{
    const co_peer *peer = core->epoch != NULL ? co_epoch_find(core->epoch, router->self.id) : NULL;
    if (peer == NULL || core->blocked[0] != 0) {
        return false; /* never published, or it cannot be told */
    }
    for (uint32_t i = 0; i < core->n_members; i++) {
        const co_member *member = &core->members[i];
        if (!co_member_is_in(member) || member->self.role != CO_ROLE_GATEWAY) {
            continue;
        }
        bool heard = member->epoch == 0 || (peer->draining && member->epoch == core->epoch->number);
        if (member->session == 0 || !heard) {
            return true;
        }
    }
    return false;
}

void co_core_tell_drains(co_core *core)
{
    for (uint32_t i = 0; i < core->n_members; i++) {
        co_member *member = &core->members[i];
        if (!co_member_is_in(member) || !member->leaving || member->told_drain || member->session == 0 ||
            member->self.role == CO_ROLE_WORKER) {
            continue;
        }
        if (member->self.role == CO_ROLE_GATEWAY || !leave_may_be_chosen(core, member)) {
            co_core_emit(core, CO_OUT_DRAIN, member->session);
            member->told_drain = true;
        }
    }
}
