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

cm_status co_core_check_room(const co_core *core, const co_member *leaver, cm_error *err)
{
    uint64_t need = (uint64_t)core->n_layer * core->n_expert, room = 0;
    uint32_t n = 0;
    if (need == 0) {
        return cm_error_set(err, CM_E_UNAVAILABLE, "workers", "no worker has come back yet: try again");
    }
    for (uint32_t i = 0; i < core->n_members; i++) {
        const co_member *member = &core->members[i];
        if (member != leaver && member->self.role == CO_ROLE_WORKER && co_member_is_wanted(member)) {
            uint64_t can = member->self.expert_bytes_max / core->expert_bytes;
            room += can < need ? can : need;
            n++;
        }
    }
    if (room >= need) {
        return CM_OK;
    }
    return cm_error_set(err, CM_E_CAPACITY, "workers",
                        "the other %u workers can hold %llu of the %llu experts: add workers or memory first",
                        n, (unsigned long long)room, (unsigned long long)need);
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
