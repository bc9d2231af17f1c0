#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "coordinator/core_private.h"
#include "proto/messages.h"

enum { CO_TEXT_MAX = 255, CO_PAIRS_MAX = 1 << 24 /* what a placement message may hold */ };

/* ---- a member's copy of its identity ---- */

static char *text_copy(const char *text)
{
    return text != NULL && text[0] != 0 ? cm_strdup(text) : NULL;
}

static void member_init(co_member *member, const co_peer *self)
{
    memset(member, 0, sizeof(*member));
    member->self = *self;
    member->self.host = text_copy(self->host);
    member->self.data_address = text_copy(self->data_address);
    member->self.http_address = text_copy(self->http_address);
    member->self.grpc_address = text_copy(self->grpc_address);
    member->self.net = text_copy(self->net);
}

void co_member_fini(co_member *member)
{
    cm_free(member->self.host);
    cm_free(member->self.data_address);
    cm_free(member->self.http_address);
    cm_free(member->self.grpc_address);
    cm_free(member->self.net);
    cm_free(member->fingerprint);
}

void co_core_recall(co_core *core, const co_peer *peer)
{
    co_member *member = &core->members[core->n_members++];
    member_init(member, peer);
    member->fingerprint = cm_strdup("");
    member->heard_ms = core->now_ms;
    member->recalled = true;
    member->drained = co_drains_has(&core->drains, member->self.id);
    if (member->drained || member->self.draining) {
        co_core_begin_leaving(core, member);
    }
    /* Longer than the grace of one lost session: all of them have to notice and come back. */
    member->dead_ms = core->now_ms + core->lease_ms + core->recall_ms;
}

/* ---- who may come in ---- */

static bool text_is_plain(const char *text)
{
    size_t n = text != NULL ? strlen(text) : 0;
    for (size_t i = 0; i < n; i++) {
        if (text[i] < 0x21 || text[i] > 0x7e) {
            return false;
        }
    }
    return n <= CO_TEXT_MAX;
}

static cm_status hello_check_form(const Baleen__Control__V1__Hello *hello, cm_error *err)
{
    const co_peer *self = hello->self;
    if (hello->protocol != PR_CONTROL_VERSION) {
        return cm_error_set(err, CM_E_UNSUPPORTED, "protocol",
                            "control protocol %u there, %u here: use programs of one release",
                            hello->protocol, (unsigned)PR_CONTROL_VERSION);
    }
    bool holds_model = self->role == CO_ROLE_WORKER || self->role == CO_ROLE_ROUTER;
    if (!holds_model && self->role != CO_ROLE_GATEWAY) {
        return cm_error_set(err, CM_E_INVALID, "role", "role %d cannot be a member", (int)self->role);
    }
    if (!text_is_plain(self->host) || !text_is_plain(self->data_address) ||
        !text_is_plain(self->http_address) || !text_is_plain(self->grpc_address) ||
        !text_is_plain(self->net) || !text_is_plain(hello->fingerprint)) {
        return cm_error_set(
            err, CM_E_INVALID, "self",
            "a host, address or fingerprint is longer than %d or holds blanks or control characters",
            CO_TEXT_MAX);
    }
    uint64_t n_pair = (uint64_t)hello->n_layer * hello->n_expert;
    /* a router that answers from a script: there is nothing to place */
    bool no_experts = self->role == CO_ROLE_ROUTER && hello->n_layer == 0 && hello->n_expert == 0 &&
                      hello->expert_bytes == 0;
    bool experts = n_pair > 0 && n_pair <= CO_PAIRS_MAX && hello->expert_bytes != 0;
    if (holds_model && (hello->fingerprint[0] == 0 || (!experts && !no_experts))) {
        return cm_error_set(
            err, CM_E_INVALID, "model", "fingerprint '%s', %u layers of %u experts of %llu bytes is no model",
            hello->fingerprint, hello->n_layer, hello->n_expert, (unsigned long long)hello->expert_bytes);
    }
    return CM_OK;
}

static cm_status hello_check_fingerprint(const co_core *core, const char *fingerprint, cm_error *err)
{
    if (fingerprint[0] == 0 || core->fingerprint[0] == 0 || strcmp(fingerprint, core->fingerprint) == 0) {
        return CM_OK;
    }
    return cm_error_set(
        err, CM_E_REFUSED, "fingerprint",
        "checkpoint fingerprint %.64s there, the cluster's is %.64s: give all processes the same checkpoint",
        fingerprint, core->fingerprint);
}

static cm_status hello_check_number(const char *name, uint64_t there, uint64_t here, cm_error *err)
{
    if (there == here) {
        return CM_OK;
    }
    return cm_error_set(err, CM_E_REFUSED, name,
                        "%s %llu there, the cluster's is %llu: give all processes the same checkpoint", name,
                        (unsigned long long)there, (unsigned long long)here);
}

static cm_status hello_check_model(const co_core *core, const Baleen__Control__V1__Hello *hello,
                                   cm_error *err)
{
    CM_TRY(hello_check_fingerprint(core, hello->fingerprint, err));
    if (hello->self->role == CO_ROLE_GATEWAY || !core->knows_model) {
        return CM_OK; /* a gateway knows nothing of experts */
    }
    CM_TRY(hello_check_number("n_layer", hello->n_layer, core->n_layer, err));
    CM_TRY(hello_check_number("n_expert", hello->n_expert, core->n_expert, err));
    return hello_check_number("expert_bytes", hello->expert_bytes, core->expert_bytes, err);
}

/* One whose address the others cannot read would only get experts that nobody can ask for. */
static cm_status hello_check_net(const co_core *core, const co_peer *self, cm_error *err)
{
    for (uint32_t i = 0; i < core->n_members && self->net != NULL; i++) {
        const co_peer *other = &core->members[i].self;
        if (other->net != NULL && other->incarnation != self->incarnation &&
            strcmp(other->net, self->net) != 0) {
            return cm_error_set(err, CM_E_REFUSED, "net",
                                "--net %s there, the cluster's is %s: give all processes the same", self->net,
                                other->net);
        }
    }
    return CM_OK;
}

static cm_status hello_check_past(const co_core *core, const Baleen__Control__V1__Hello *hello, cm_error *err)
{
    if (hello->cluster == core->cluster && hello->epoch >= core->next_number) {
        return cm_error_set(
            err, CM_E_REFUSED, "epoch",
            "epoch %llu is in force there, the coordinator's log ends before %llu: its store was replaced by "
            "an older one; start this process again",
            (unsigned long long)hello->epoch, (unsigned long long)core->next_number);
    }
    return CM_OK;
}

/* Reasons that pass: the process may come again as it is. */
static cm_status hello_check_room(const co_core *core, const Baleen__Control__V1__Hello *hello, cm_error *err)
{
    if (core->n_members == core->members_max) {
        return cm_error_set(err, CM_E_CAPACITY, "members",
                            "the cluster has %u members, as many as it may have", core->members_max);
    }
    for (uint32_t i = 0; i < CO_FAILED_MAX && i < core->n_failed; i++) {
        if (core->failed[i].incarnation == hello->self->incarnation &&
            core->now_ms < core->failed[i].until_ms) {
            return cm_error_set(err, CM_E_UNAVAILABLE, "worker",
                                "it failed to load its experts: again in %llu ms",
                                (unsigned long long)(core->failed[i].until_ms - core->now_ms));
        }
    }
    return CM_OK;
}

/* The first worker or router says what the cluster serves. */
static void core_fix_model(co_core *core, const Baleen__Control__V1__Hello *hello)
{
    if (hello->self->role == CO_ROLE_GATEWAY || core->knows_model) {
        return;
    }
    core->knows_model = true;
    core->n_layer = hello->n_layer;
    core->n_expert = hello->n_expert;
    core->expert_bytes = hello->expert_bytes;
    if (core->fingerprint[0] != 0) {
        return;
    }
    cm_free(core->fingerprint);
    core->fingerprint = cm_strdup(hello->fingerprint);
    for (uint32_t i = 0; i < core->n_members; i++) { /* gateways that came before anyone could say */
        cm_error err;
        co_member *member = &core->members[i];
        if (!member->removed && member->session != 0 &&
            hello_check_fingerprint(core, member->fingerprint, &err) != CM_OK) {
            co_core_note(core, CM_LOG_WARN, "member %u is refused: %s", member->self.id, err.text);
            co_core_refuse(core, member->session, err.status, true, err.text);
            member->session = 0;
            co_core_remove(core, member, CM_OK, "");
        }
    }
}

/* ---- joining and coming back ---- */

static void core_welcome(co_core *core, const co_member *member)
{
    co_core_emit(core, CO_OUT_WELCOME, member->session)->member_id = member->self.id;
}

/* An Abort may have been due while it was away, or from a coordinator that is no more. One that joins anew
 * needs none: it is in the next proposal. */
static void core_abort_leftover(co_core *core, uint64_t session, uint64_t prepared)
{
    uint64_t proposed = core->proposal != NULL ? core->proposal->number : 0;
    uint64_t in_force = core->epoch != NULL ? core->epoch->number : 0;
    if (prepared > in_force && prepared != proposed) {
        co_core_emit(core, CO_OUT_ABORT, session)->number = prepared;
    }
}

static uint64_t hello_prepared(const co_core *core, const Baleen__Control__V1__Hello *hello)
{
    return hello->cluster == core->cluster ? hello->prepared : 0;
}

/* The same process, known by its incarnation. With id 0 it never heard our Welcome. */
static co_member *core_find_returning(co_core *core, const Baleen__Control__V1__Hello *hello)
{
    const co_peer *self = hello->self;
    bool ours = self->id != 0 && hello->cluster == core->cluster;
    for (uint32_t i = 0; i < core->n_members; i++) {
        co_member *member = &core->members[i];
        if (!member->removed && member->self.incarnation == self->incarnation &&
            member->self.role == self->role && (self->id == 0 || (ours && self->id == member->self.id))) {
            return member;
        }
    }
    return NULL;
}

static void core_return(co_core *core, co_member *member, uint64_t session,
                        const Baleen__Control__V1__Hello *hello)
{
    if (member->session != 0) {
        co_out *out = co_core_emit(core, CO_OUT_CLOSE, member->session);
        out->status = CM_E_CANCELLED;
        snprintf(out->text, sizeof(out->text), "replaced by a newer session of the same process");
    }
    cm_free(member->fingerprint);
    member->fingerprint = cm_strdup(hello->fingerprint);
    member->session = session;
    member->recalled = false;
    member->heard_ms = core->now_ms;
    if (member->ticket != 0) {
        return; /* its Welcome follows when its id is in the log */
    }
    co_core_note(core, CM_LOG_INFO, "member %u is back", member->self.id);
    core_welcome(core, member);
    uint64_t proposed = core->proposal != NULL ? core->proposal->number : 0;
    core_abort_leftover(core, session, member->told_prepare);
    if (hello_prepared(core, hello) != member->told_prepare) {
        core_abort_leftover(core, session, hello_prepared(core, hello));
    }
    if (member->self.role == CO_ROLE_ROUTER) {
        co_core_cuts_forget(core, member->self.id); /* it says anew what it cannot reach */
    }
    member->epoch = hello->cluster == core->cluster ? hello->epoch : 0;
    member->told_drain = false;
    member->prepared = member->told_commit = member->told_retire = 0;
    if (core->phase != CO_PHASE_STORING || member->told_prepare != proposed) {
        member->told_prepare = 0; /* to be said again; if the log fails, an Abort is due all the same */
    }
    core->dirty = true;
}

static void core_join(co_core *core, uint64_t session, const Baleen__Control__V1__Hello *hello)
{
    co_member *member = &core->members[core->n_members++];
    member_init(member, hello->self);
    member->self.id = core->next_member_id++;
    member->self.draining = member->self.has_draining = false; /* ours to say */
    member->fingerprint = cm_strdup(hello->fingerprint);
    member->session = session;
    member->heard_ms = core->now_ms;
    if (hello->self->id != 0 && hello->cluster == core->cluster &&
        co_drains_has(&core->drains, hello->self->id)) {
        /* out of the last epoch and not yet told so when the coordinator before us went */
        co_drains_remove(&core->drains, hello->self->id);
        co_core_drain_member(core, member);
    }
    /* One that was given up and comes back goes on with what it had. */
    member->epoch = hello->cluster == core->cluster ? hello->epoch : 0;
    member->ticket = co_core_store(core, NULL);
}

void co_core_hello(co_core *core, uint64_t session, const Baleen__Control__V1__Hello *hello)
{
    cm_error err = {0};
    bool final = true;
    cm_status status = hello_check_form(hello, &err);
    if (status == CM_OK) {
        status = hello_check_model(core, hello, &err);
    }
    if (status == CM_OK) {
        status = hello_check_net(core, hello->self, &err);
    }
    if (status == CM_OK) {
        status = hello_check_past(core, hello, &err);
    }
    co_member *returning = status == CM_OK ? core_find_returning(core, hello) : NULL;
    if (status == CM_OK && returning == NULL) {
        final = false;
        status = hello_check_room(core, hello, &err);
    }
    if (status != CM_OK) {
        co_core_note(core, final ? CM_LOG_WARN : CM_LOG_DEBUG, "a process is refused: %s", err.text);
        co_core_refuse(core, session, status, final, err.text);
        return;
    }
    core_fix_model(core, hello);
    if (returning != NULL) {
        core_return(core, returning, session, hello);
    } else {
        core_join(core, session, hello);
    }
}

void co_core_join_stored(co_core *core, const co_in *in)
{
    for (uint32_t i = 0; i < core->n_members; i++) {
        co_member *member = &core->members[i];
        if (member->removed || member->ticket != in->ticket) {
            continue;
        }
        member->ticket = 0;
        member->heard_ms = core->now_ms; /* the log may have taken longer than a lease */
        if (in->status != CM_OK) {
            co_core_refuse(core, member->session, in->status, false, in->text);
            member->session = 0;
            co_core_remove(core, member, CM_OK, "");
            return;
        }
        static const char *const roles[] = {"", "coordinator", "gateway", "router", "worker"};
        co_core_note(core, CM_LOG_INFO, "member %u joins: %s on %s pid %u", member->self.id,
                     roles[member->self.role], member->self.host != NULL ? member->self.host : "?",
                     member->self.pid);
        core_welcome(core, member);
        core->dirty = true;
        return;
    }
}
