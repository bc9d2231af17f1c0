#include "coordinator/co_core.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "coordinator/core_private.h"

/* ---- outbox ---- */

co_out *co_core_emit(co_core *core, co_out_kind kind, uint64_t session)
{
    if (core->n_outs == core->outs_cap) {
        core->outs_cap = core->outs_cap != 0 ? core->outs_cap * 2 : 16;
        core->outs = cm_realloc(core->outs, sizeof(co_out) * core->outs_cap);
    }
    co_out *out = &core->outs[core->n_outs++];
    memset(out, 0, sizeof(*out));
    out->kind = kind;
    out->session = session;
    return out;
}

void co_core_note(co_core *core, cm_log_level level, const char *fmt, ...)
{
    co_out *out = co_core_emit(core, CO_OUT_NOTE, 0);
    out->level = level;
    va_list args;
    va_start(args, fmt);
    vsnprintf(out->text, sizeof(out->text), fmt, args);
    va_end(args);
}

void co_core_refuse(co_core *core, uint64_t session, cm_status status, bool final, const char *text)
{
    co_out *out = co_core_emit(core, CO_OUT_REFUSED, session);
    out->status = status;
    out->final = final;
    snprintf(out->text, sizeof(out->text), "%s", text);
}

void co_core_answer(co_core *core, uint64_t ticket, cm_status status, const char *fmt, ...)
{
    co_out *out = co_core_emit(core, CO_OUT_ANSWER, 0);
    out->ticket = ticket;
    out->status = status;
    va_list args;
    va_start(args, fmt);
    vsnprintf(out->text, sizeof(out->text), fmt, args);
    va_end(args);
}

static void core_close(co_core *core, uint64_t session, cm_status status, const char *text)
{
    co_out *out = co_core_emit(core, CO_OUT_CLOSE, session);
    out->status = status;
    snprintf(out->text, sizeof(out->text), "%s", text);
}

uint64_t co_core_store(co_core *core, co_epoch *epoch)
{
    co_out *out = co_core_emit(core, CO_OUT_STORE, 0);
    out->ticket = ++core->next_ticket;
    out->member_id = core->next_member_id;
    out->number = core->next_number;
    out->drains = &core->drains;
    out->epoch = epoch;
    return out->ticket;
}

void co_core_drop_epoch(co_core *core, co_epoch *epoch)
{
    if (epoch == NULL) {
        return;
    }
    if (core->n_dropped == core->dropped_cap) {
        core->dropped_cap = core->dropped_cap != 0 ? core->dropped_cap * 2 : 4;
        core->dropped = cm_realloc(core->dropped, sizeof(co_epoch *) * core->dropped_cap);
    }
    core->dropped[core->n_dropped++] = epoch;
}

static void core_clear_outbox(co_core *core)
{
    for (uint32_t i = 0; i < core->n_dropped; i++) {
        co_epoch_release(core->dropped[i]);
    }
    core->n_dropped = 0;
    core->n_outs = 0;
}

/* ---- members ---- */

co_member *co_core_find(co_core *core, uint32_t id)
{
    for (uint32_t i = 0; i < core->n_members; i++) {
        if (core->members[i].self.id == id && !core->members[i].removed) {
            return &core->members[i];
        }
    }
    return NULL;
}

static co_member *core_find_session(co_core *core, uint64_t session)
{
    for (uint32_t i = 0; i < core->n_members; i++) {
        if (core->members[i].session == session && !core->members[i].removed) {
            return &core->members[i];
        }
    }
    return NULL;
}

void co_core_remove(co_core *core, co_member *member, cm_status status, const char *text)
{
    if (member->session != 0) {
        core_close(core, member->session, status, text);
        member->session = 0;
    }
    member->removed = true;
    core->dirty = true;
    co_core_cuts_forget(core, member->self.id);
    co_drains_remove(&core->drains, member->self.id); /* in the log by the next write: no id comes twice */
    if (member->drain_ticket != 0) {
        co_core_answer(core, member->drain_ticket, status, "member %u %s%s", member->self.id,
                       status == CM_OK ? "has left" : "was lost: ", status == CM_OK ? "" : text);
    }
}

static void core_sweep(co_core *core)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < core->n_members; i++) {
        if (core->members[i].removed) {
            co_member_fini(&core->members[i]);
        } else {
            if (n != i) {
                core->members[n] = core->members[i];
            }
            n++;
        }
    }
    core->n_members = n;
}

static void core_die(co_core *core, co_member *member, const char *why)
{
    core->n_lost++;
    co_core_note(core, CM_LOG_WARN, "member %u is dead: %s", member->self.id, why);
    co_core_remove(core, member, CM_E_SILENT, why);
}

static void core_session_lost(co_core *core, co_member *member)
{
    member->session = 0;
    if (member->ticket != 0) {
        member->removed = true; /* it never learned its id: nothing to come back as */
        return;
    }
    if (member->leaving) {
        co_core_note(core, CM_LOG_INFO, "member %u has left", member->self.id);
        co_core_remove(core, member, CM_OK, "has left");
        return;
    }
    /* A peer that lost it too is a second witness: no grace. */
    bool suspect = core->now_ms < member->suspect_until_ms;
    member->dead_ms = suspect ? core->now_ms : core->now_ms + core->grace_ms;
}

static void core_expire(co_core *core)
{
    for (uint32_t i = 0; i < core->n_members; i++) {
        co_member *member = &core->members[i];
        if (member->removed) {
            continue;
        }
        if (member->session == 0 && core->now_ms >= member->dead_ms) {
            core_die(core, member, "its session was lost and it did not come back");
        } else if (member->session != 0 && member->ticket == 0 &&
                   core->now_ms - member->heard_ms > core->lease_ms) { /* before its Welcome nobody beats */
            core_die(core, member, "its lease ran out without a heartbeat");
        }
    }
}

/* Time in which this process did not run is nobody's silence. */
static void core_forgive(co_core *core, uint64_t gap_ms)
{
    co_core_note(core, CM_LOG_WARN, "this process stood still for %llu ms: leases are extended",
                 (unsigned long long)gap_ms);
    for (uint32_t i = 0; i < core->n_members; i++) {
        core->members[i].heard_ms += gap_ms;
        core->members[i].dead_ms += gap_ms;
    }
    for (uint32_t i = 0; i < core->n_cuts; i++) {
        core->cuts[i].since_ms += gap_ms;
    }
    core->deadline_ms += gap_ms;
}

/* ---- words ---- */

static void core_heartbeat(co_member *member, const Baleen__Control__V1__Heartbeat *heartbeat)
{
    member->n_stats = 0;
    for (size_t i = 0; i < heartbeat->n_stats && member->n_stats < CM_STAT_COUNT; i++) {
        if (heartbeat->stats[i]->stat < CM_STAT_COUNT) { /* a newer member may count what we do not know */
            member->stats[member->n_stats++] =
                (cm_stat_value){.stat = heartbeat->stats[i]->stat, .value = heartbeat->stats[i]->value};
        }
    }
}

static void core_peer_report(co_core *core, const co_member *from,
                             const Baleen__Control__V1__PeerReport *report)
{
    co_member *peer = co_core_find(core, report->member_id);
    if (peer == NULL || peer == from || !co_member_is_in(peer) || from->self.role == CO_ROLE_WORKER) {
        return; /* dead already, or none of its business */
    }
    bool is_row_link = from->self.role == CO_ROLE_ROUTER && peer->self.role == CO_ROLE_WORKER;
    if (is_row_link) {
        co_core_cut_report(core, from, peer, (cm_status)report->status);
    }
    if (report->status == CM_OK) {
        return;
    }
    if (!is_row_link) {
        co_core_note(core, CM_LOG_WARN, "member %u lost its link to member %u: %s", from->self.id,
                     peer->self.id, cm_status_text((cm_status)report->status));
    }
    peer->suspect_until_ms = core->now_ms + core->lease_ms;
    if (peer->session == 0) {
        /* After a start everybody is away: one that lives has come back by half a lease. */
        uint64_t dead_ms = core->now_ms + (peer->recalled ? core->lease_ms / 2 : 0);
        peer->dead_ms = dead_ms < peer->dead_ms ? dead_ms : peer->dead_ms;
    }
}

static void core_word(co_core *core, uint64_t session, const Baleen__Control__V1__MemberMessage *word)
{
    co_member *member = core_find_session(core, session);
    bool hello = word->word_case == BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_HELLO;
    if (hello && member == NULL) {
        co_core_hello(core, session, word->hello);
        return;
    }
    /* Before its Welcome a member has nothing to say. */
    if (member == NULL || hello || member->ticket != 0 ||
        word->word_case == BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD__NOT_SET) {
        core_close(core, session, CM_E_INVALID, "a session is one Hello, then after the Welcome other words");
        if (member != NULL) {
            core_session_lost(core, member);
        }
        return;
    }
    member->heard_ms = core->now_ms;
    switch (word->word_case) {
    case BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_HEARTBEAT:
        core_heartbeat(member, word->heartbeat);
        break;
    case BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_PREPARED:
        co_core_prepared(core, member, word->prepared);
        break;
    case BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_COMMITTED:
        if (core->epoch != NULL && word->committed->epoch == core->epoch->number) {
            member->epoch = word->committed->epoch;
        }
        break;
    case BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_PEER_REPORT:
        core_peer_report(core, member, word->peer_report);
        break;
    case BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_LEAVING:
        co_core_leaving(core, member);
        break;
    case BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_EXPERT_LOAD:
        co_core_take_load(core, member, word->expert_load);
        break;
    default:
        break;
    }
}

static void core_take(co_core *core, const co_in *in)
{
    switch (in->kind) {
    case CO_IN_WORD:
        core_word(core, in->session, in->word);
        break;
    case CO_IN_CLOSED: {
        co_member *member = core_find_session(core, in->session);
        if (member != NULL) {
            core_session_lost(core, member);
        }
        break;
    }
    case CO_IN_DRAIN:
        co_core_drain(core, in);
        break;
    case CO_IN_REBALANCE:
        co_core_rebalance(core, in);
        break;
    case CO_IN_STORED:
        co_core_join_stored(core, in);
        co_core_change_stored(core, in);
        break;
    }
}

/* ---- public ---- */

co_core *co_core_create(const co_core_options *options, const co_core_past *past, uint64_t now_ms)
{
    CM_ASSERT(past->cluster != 0 && past->next_member_id != 0 && past->next_number != 0);
    CM_ASSERT(options->members_max > 0 && options->members_max <= PR_RANK_MAX);
    co_core *core = cm_alloc(sizeof(*core));
    core->workers_min = options->workers_min;
    core->members_max = options->members_max;
    core->lease_ms = options->lease_ms;
    core->grace_ms = options->grace_ms;
    core->recall_ms = options->recall_ms;
    core->cut_ms = options->cut_ms;
    core->balance_every_ms = options->rebalance_ms;
    core->balance_moves_max = options->moves_max;
    core->balance_next_ms = now_ms + options->rebalance_ms;
    core->load_half_ms = now_ms + CO_LOAD_HALF_MS;
    core->fingerprint = cm_strdup(options->fingerprint);
    core->now_ms = now_ms;
    core->cluster = past->cluster;
    core->next_member_id = past->next_member_id;
    core->next_number = past->next_number;
    core->drains = past->drains;
    core->members = cm_alloc(sizeof(co_member) * core->members_max);
    if (past->epoch != NULL) {
        CM_ASSERT(past->epoch->number < past->next_number);
        core->epoch = co_epoch_hold(past->epoch);
        /* Who of them lives and how far its commit came is not known: finish it once more with those that
         * come back. */
        core->phase = CO_PHASE_COMMITTING;
        core->deadline_ms = now_ms + core->lease_ms * CO_COMMIT_LEASES;
        for (size_t i = 0; i < core->epoch->message->n_members && i < core->members_max; i++) {
            co_core_recall(core, core->epoch->message->members[i]);
        }
    }
    return core;
}

void co_core_destroy(co_core *core)
{
    if (core == NULL) {
        return;
    }
    core_clear_outbox(core);
    for (uint32_t i = 0; i < core->n_members; i++) {
        co_member_fini(&core->members[i]);
    }
    co_epoch_release(core->epoch);
    co_epoch_release(core->proposal);
    cm_free(core->members);
    cm_free(core->cuts);
    cm_free(core->fingerprint);
    cm_free(core->load);
    cm_free(core->outs);
    cm_free(core->dropped);
    cm_free(core);
}

void co_core_step(co_core *core, uint64_t now_ms, const co_in *in, uint32_t n_in)
{
    CM_ASSERT_MSG(now_ms >= core->now_ms, "time went from %llu back to %llu",
                  (unsigned long long)core->now_ms, (unsigned long long)now_ms);
    core_clear_outbox(core);
    uint64_t gap_ms = now_ms - core->now_ms;
    core->now_ms = now_ms;
    if (gap_ms > core->lease_ms / 2 && core->n_members > 0) {
        core_forgive(core, gap_ms);
    }
    for (uint32_t i = 0; i < n_in; i++) {
        core_take(core, &in[i]);
    }
    core_expire(core);
    co_core_cuts(core);
    co_core_load_time(core);
    co_core_advance(core);
    core_sweep(core);
}

const co_out *co_core_outbox(const co_core *core, uint32_t *n_out)
{
    *n_out = core->n_outs;
    return core->outs;
}

uint64_t co_core_wake_ms(const co_core *core)
{
    uint64_t wake_ms = co_core_cuts_wake_ms(core);
    for (uint32_t i = 0; i < core->n_members; i++) {
        const co_member *member = &core->members[i];
        uint64_t at_ms = member->session == 0 ? member->dead_ms : member->heard_ms + core->lease_ms + 1;
        at_ms = member->session != 0 && member->ticket != 0 ? UINT64_MAX : at_ms;
        wake_ms = at_ms < wake_ms ? at_ms : wake_ms;
    }
    if ((core->phase == CO_PHASE_COMMITTING || core->phase == CO_PHASE_PUBLISHING) &&
        core->deadline_ms < wake_ms) {
        wake_ms = core->deadline_ms;
    }
    bool retries =
        core->phase == CO_PHASE_STORING ? core->ticket == 0 : core->phase == CO_PHASE_REST && core->dirty;
    if (retries && core->retry_ms > core->now_ms && core->retry_ms < wake_ms) {
        wake_ms = core->retry_ms;
    }
    if (core->balance_every_ms != 0 && core->balance_next_ms < wake_ms) {
        wake_ms = core->balance_next_ms;
    }
    return wake_ms;
}

/* ---- views ---- */

const char *co_member_state_name(co_member_state state)
{
    static const char *const names[] = {"joining", "preparing", "ready", "suspect", "cut off", "leaving"};
    return names[state];
}

static co_member_state core_state(const co_core *core, const co_member *member)
{
    if (member->leaving) {
        return CO_MEMBER_LEAVING;
    }
    if (member->cut_off) {
        return CO_MEMBER_CUT_OFF;
    }
    if (member->session == 0 || core->now_ms < member->suspect_until_ms) {
        return CO_MEMBER_SUSPECT;
    }
    if (core->phase == CO_PHASE_PREPARING && member->self.role == CO_ROLE_WORKER &&
        member->prepared != core->proposal->number &&
        co_epoch_find(core->proposal, member->self.id) != NULL) {
        return CO_MEMBER_PREPARING;
    }
    bool in_force = core->epoch != NULL && co_epoch_find(core->epoch, member->self.id) != NULL;
    return in_force ? CO_MEMBER_READY : CO_MEMBER_JOINING;
}

uint32_t co_core_n_members(const co_core *core)
{
    return core->n_members;
}

void co_core_member(const co_core *core, uint32_t i, co_member_view *view_out)
{
    CM_ASSERT(i < core->n_members);
    const co_member *member = &core->members[i];
    *view_out = (co_member_view){.self = &member->self,
                                 .state = core_state(core, member),
                                 .session = member->session,
                                 .epoch = member->epoch,
                                 .heard_ms = member->heard_ms,
                                 .stats = member->stats,
                                 .n_stats = member->n_stats};
}

const co_epoch *co_core_epoch(const co_core *core)
{
    return core->epoch;
}

uint64_t co_core_cluster(const co_core *core)
{
    return core->cluster;
}

const char *co_core_fingerprint(const co_core *core)
{
    return core->fingerprint;
}

const uint64_t *co_core_load(const co_core *core)
{
    const pr_placement *place = core->epoch != NULL ? core->epoch->placement : NULL;
    bool same = place != NULL && place->n_layer == core->n_layer && place->n_expert == core->n_expert;
    return same ? core->load : NULL;
}

uint64_t co_core_expert_bytes(const co_core *core)
{
    return (uint64_t)core->n_layer * core->n_expert * core->expert_bytes;
}

uint64_t co_core_n_lost(const co_core *core)
{
    return core->n_lost;
}
