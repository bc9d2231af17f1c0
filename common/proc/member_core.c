#include "common/proc/member_core.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "proto/messages.h"
#include "proto/pack.h"

enum {
    MCORE_BACKOFF_MIN_MS = 100,
    MCORE_BACKOFF_MAX_MS = 2000, /* and a third of the lease: who starts again waits a lease for us */
    MCORE_HEARTBEAT_MAX_MS = 600000,
    MCORE_REPORTS_MAX = 16, /* kept while there is nobody to tell; leases find out the rest */
    MCORE_OUTS =
        16 + MCORE_REPORTS_MAX, /* one input makes a few, and what the owner does about them a few more */
};

struct pc_mcore {
    pc_mself self;
    bool open;      /* a session is there, welcomed or not */
    bool connected; /* welcomed in this session */
    bool over;      /* refused for good or let go: no further session */
    bool leaving;   /* said to every coordinator that welcomes us */
    bool refused;   /* in this session */
    uint64_t retry_at_ms, beat_at_ms, backoff_ms, backoff_max_ms, heartbeat_ms;

    pc_tour tour;

    uint32_t id;
    uint64_t cluster;
    uint64_t epoch_heard;    /* newest commit handed out */
    uint64_t epoch_in_force; /* pc_mcore_committed said so */
    uint64_t epoch_prepared; /* newest prepare handed out, neither committed nor aborted; 0: none */
    pc_mout reports[MCORE_REPORTS_MAX]; /* of peers lost now, for the next coordinator */
    uint32_t n_reports;
    pc_mout outs[MCORE_OUTS]; /* a ring */
    uint32_t first_out, n_outs;
};

typedef Baleen__Control__V1__MemberMessage member_word;

/* ---- what comes out ---- */

static pc_mout *mcore_emit(pc_mcore *core, pc_mout_kind kind)
{
    CM_ASSERT_MSG(core->n_outs < MCORE_OUTS, "%u outs were not taken", core->n_outs);
    pc_mout *out = &core->outs[(core->first_out + core->n_outs++) % MCORE_OUTS];
    memset(out, 0, sizeof(*out));
    out->kind = kind;
    return out;
}

static void mcore_note(pc_mcore *core, cm_log_level level, const char *fmt, ...) CM_PRINTF(3, 4);
static void mcore_note(pc_mcore *core, cm_log_level level, const char *fmt, ...)
{
    pc_mout *out = mcore_emit(core, PC_MOUT_NOTE);
    out->level = level;
    va_list args;
    va_start(args, fmt);
    vsnprintf(out->text, sizeof(out->text), fmt, args);
    va_end(args);
}

bool pc_mcore_next(pc_mcore *core, pc_mout *out)
{
    if (core->n_outs == 0) {
        return false;
    }
    *out = core->outs[core->first_out];
    core->first_out = (core->first_out + 1) % MCORE_OUTS;
    core->n_outs--;
    return true;
}

/* ---- time ---- */

static void mcore_connect(pc_mcore *core)
{
    core->open = true;
    core->refused = false;
    snprintf(mcore_emit(core, PC_MOUT_OPEN)->text, PC_ADDRESS_BYTES, "%s", core->tour.at);
    mcore_emit(core, PC_MOUT_HELLO);
}

static void mcore_beat(pc_mcore *core, uint64_t now_ms)
{
    mcore_emit(core, PC_MOUT_HEARTBEAT)->epoch = core->epoch_in_force;
    core->beat_at_ms = now_ms + core->heartbeat_ms;
}

void pc_mcore_tick(pc_mcore *core, uint64_t now_ms)
{
    if (!core->open && !core->over && now_ms >= core->retry_at_ms) {
        mcore_connect(core);
    } else if (core->connected && now_ms >= core->beat_at_ms) {
        mcore_beat(core, now_ms);
    }
}

uint64_t pc_mcore_wake_ms(const pc_mcore *core)
{
    if (core->connected) {
        return core->beat_at_ms;
    }
    return core->open || core->over ? UINT64_MAX : core->retry_at_ms;
}

pc_mcore *pc_mcore_create(const pc_mself *self, uint64_t now_ms)
{
    pc_mcore *core = cm_alloc(sizeof(*core));
    core->self = *self;
    core->backoff_ms = MCORE_BACKOFF_MIN_MS;
    core->backoff_max_ms = MCORE_BACKOFF_MAX_MS;
    pc_tour_init(&core->tour, self->coordinators);
    core->retry_at_ms = now_ms;
    mcore_connect(core);
    return core;
}

void pc_mcore_destroy(pc_mcore *core)
{
    pc_mout out;
    while (pc_mcore_next(core, &out)) {
        pc_epoch_release(out.value);
    }
    cm_free(core);
}

/* ---- our words ---- */

void pc_mcore_prepared(pc_mcore *core, uint64_t epoch, cm_status status, const char *text)
{
    if (!core->connected) {
        return; /* a lost session aborts its change */
    }
    pc_mout *out = mcore_emit(core, PC_MOUT_PREPARED);
    out->epoch = epoch;
    out->status = status;
    snprintf(out->text, sizeof(out->text), "%s", text != NULL ? text : "");
}

void pc_mcore_committed(pc_mcore *core, uint64_t epoch)
{
    if (epoch > core->epoch_in_force) {
        core->epoch_in_force = epoch;
    }
    if (core->connected) { /* else the next hello says it */
        mcore_emit(core, PC_MOUT_COMMITTED)->epoch = epoch;
    }
}

static void mcore_keep_report(pc_mcore *core, uint32_t member_id, cm_status status)
{
    for (uint32_t i = 0; i < core->n_reports; i++) {
        if (core->reports[i].member_id == member_id) {
            if (status == CM_OK) { /* over before it was told */
                core->reports[i] = core->reports[--core->n_reports];
            }
            return;
        }
    }
    if (status != CM_OK && core->n_reports < MCORE_REPORTS_MAX) {
        core->reports[core->n_reports++] = (pc_mout){.member_id = member_id, .status = status};
    }
}

void pc_mcore_report(pc_mcore *core, uint32_t member_id, cm_status status)
{
    if (!core->connected) { /* whoever is active next knows nothing of it */
        mcore_keep_report(core, member_id, status);
        return;
    }
    pc_mout *out = mcore_emit(core, PC_MOUT_REPORT);
    out->member_id = member_id;
    out->status = status;
}

static void mcore_say_kept_reports(pc_mcore *core)
{
    for (uint32_t i = 0; i < core->n_reports; i++) {
        pc_mcore_report(core, core->reports[i].member_id, core->reports[i].status);
    }
    core->n_reports = 0;
}

void pc_mcore_leave(pc_mcore *core)
{
    core->leaving = true;
    if (core->connected) {
        mcore_emit(core, PC_MOUT_LEAVING);
    }
}

/* ---- the coordinator's words ---- */

static void mcore_bound_backoff(pc_mcore *core, uint32_t lease_ms)
{
    uint64_t third_ms = lease_ms / 3 > MCORE_BACKOFF_MIN_MS ? lease_ms / 3 : MCORE_BACKOFF_MIN_MS;
    core->backoff_max_ms = third_ms < MCORE_BACKOFF_MAX_MS ? third_ms : MCORE_BACKOFF_MAX_MS;
}

static void mcore_take_key(pc_mcore *core, const Baleen__Control__V1__FrameKey *key)
{
    if (key == NULL) {
        return;
    }
    if (key->key.len != NET_KEY_BYTES) {
        mcore_note(core, CM_LOG_WARN, "a key of %zu bytes ignored", key->key.len);
        return;
    }
    pc_mout *out = mcore_emit(core, PC_MOUT_KEY);
    out->epoch = key->epoch;
    memcpy(out->key, key->key.data, sizeof(out->key));
}

static void mcore_hear_welcome(pc_mcore *core, uint64_t now_ms, const Baleen__Control__V1__Welcome *welcome)
{
    if (welcome->member_id == 0 || welcome->heartbeat_ms == 0 ||
        welcome->heartbeat_ms > MCORE_HEARTBEAT_MAX_MS) {
        mcore_note(core, CM_LOG_WARN, "welcome with member id %u, heartbeat %u ms", welcome->member_id,
                   welcome->heartbeat_ms);
        mcore_emit(core, PC_MOUT_CANCEL);
        return;
    }
    if (welcome->cluster != core->cluster) {
        core->epoch_heard = core->epoch_in_force = 0; /* another cluster counts from the start */
        if (core->epoch_prepared != 0) {
            mcore_emit(core, PC_MOUT_ABORT)->epoch = core->epoch_prepared; /* there is nobody to commit it */
            core->epoch_prepared = 0;
        }
        core->n_reports = 0;
    }
    core->id = welcome->member_id;
    core->cluster = welcome->cluster;
    core->heartbeat_ms = welcome->heartbeat_ms;
    core->connected = true;
    core->backoff_ms = MCORE_BACKOFF_MIN_MS;
    mcore_bound_backoff(core, welcome->lease_ms);
    mcore_beat(core, now_ms);
    mcore_say_kept_reports(core);
    if (core->leaving) {
        mcore_emit(core, PC_MOUT_LEAVING); /* a coordinator that was started again has not heard it */
    }
    mcore_emit(core, PC_MOUT_WELCOME);
    mcore_take_key(core, welcome->frame_key);
}

static void mcore_hear_refused(pc_mcore *core, const Baleen__Control__V1__Refused *refused)
{
    bool final = refused->has_final && refused->final;
    cm_status status = refused->status < 0 ? (cm_status)refused->status : CM_E_REFUSED;
    bool again = status == CM_E_UNAVAILABLE && core->backoff_ms > MCORE_BACKOFF_MIN_MS;
    mcore_note(core, again ? CM_LOG_DEBUG : CM_LOG_WARN, "refused%s: %s", final ? " for good" : "",
               refused->text);
    if (refused->active != NULL) {
        pc_tour_hint(&core->tour, refused->active);
    }
    core->over |= final;
    core->refused = true;
    mcore_emit(core, PC_MOUT_CANCEL);
    if (final) {
        pc_mout *out = mcore_emit(core, PC_MOUT_REFUSED);
        out->status = status;
        snprintf(out->text, sizeof(out->text), "%s", refused->text);
    }
}

/* NULL: not one to follow, said why in the log. */
static pc_epoch *mcore_take_epoch(pc_mcore *core, const char *word, const Baleen__Control__V1__Epoch *message,
                                  cm_error *err)
{
    pc_epoch *epoch = NULL;
    cm_status status = pc_epoch_unpack(message, &epoch, err);
    if (status == CM_OK && epoch->cluster != core->cluster) {
        status = cm_error_set(err, CM_E_PROTOCOL, "cluster", "it belongs to cluster %llx",
                              (unsigned long long)epoch->cluster);
    }
    if (status == CM_OK && epoch->number < core->epoch_heard) {
        status = cm_error_set(err, CM_E_STALE, "number", "epoch %llu was heard before",
                              (unsigned long long)core->epoch_heard);
    }
    if (status != CM_OK) {
        mcore_note(core, CM_LOG_WARN, "%s of epoch %llu ignored: %s", word,
                   (unsigned long long)message->number, err->text);
        pc_epoch_release(epoch);
        return NULL;
    }
    return epoch;
}

static void mcore_hear_prepare(pc_mcore *core, const Baleen__Control__V1__Prepare *prepare)
{
    cm_error err = {0};
    pc_epoch *epoch = mcore_take_epoch(core, "prepare", prepare->epoch, &err);
    if (epoch == NULL) {
        pc_mcore_prepared(core, prepare->epoch->number, err.status, err.text);
    } else {
        core->epoch_prepared = epoch->number;
        mcore_emit(core, PC_MOUT_PREPARE)->value = epoch;
    }
}

static void mcore_hear_commit(pc_mcore *core, const Baleen__Control__V1__Commit *commit)
{
    cm_error err = {0};
    pc_epoch *epoch = mcore_take_epoch(core, "commit", commit->epoch, &err);
    if (epoch == NULL) {
        return;
    }
    mcore_take_key(core, commit->frame_key);
    if (epoch->number > core->epoch_heard) {
        uint64_t before = core->epoch_in_force;
        core->epoch_heard = epoch->number;
        core->epoch_prepared = core->epoch_prepared > epoch->number ? core->epoch_prepared : 0;
        mcore_emit(core, PC_MOUT_COMMIT)->value = epoch;
        if (core->self.role != BALEEN__CONTROL__V1__ROLE__ROLE_WORKER && before != 0) {
            mcore_emit(core, PC_MOUT_RETIRE)->epoch = before;
        }
        return;
    }
    if (core->epoch_in_force == epoch->number) {
        pc_mcore_committed(core, epoch->number); /* said again after a new session */
    }
    pc_epoch_release(epoch);
}

void pc_mcore_hear(pc_mcore *core, uint64_t now_ms, const Baleen__Control__V1__CoordinatorMessage *message)
{
    if (!core->connected && message->word_case != BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_WELCOME &&
        message->word_case != BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_REFUSED) {
        mcore_note(core, CM_LOG_WARN, "message %d before its welcome", (int)message->word_case);
        return;
    }
    switch (message->word_case) {
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_WELCOME:
        mcore_hear_welcome(core, now_ms, message->welcome);
        break;
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_REFUSED:
        mcore_hear_refused(core, message->refused);
        break;
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_PREPARE:
        mcore_hear_prepare(core, message->prepare);
        break;
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_ABORT:
        core->epoch_prepared = core->epoch_prepared != message->abort->epoch ? core->epoch_prepared : 0;
        mcore_emit(core, PC_MOUT_ABORT)->epoch = message->abort->epoch;
        break;
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_COMMIT:
        mcore_hear_commit(core, message->commit);
        break;
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_RETIRE:
        mcore_emit(core, PC_MOUT_RETIRE)->epoch = message->retire->epoch;
        break;
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_DRAIN:
        mcore_emit(core, PC_MOUT_DRAIN);
        break;
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_CLUSTER_STATS:
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_CLUSTER_LOAD:
        break; /* for people who look */
    default:
        mcore_note(core, CM_LOG_WARN, "a message we do not know");
        break;
    }
}

bool pc_mcore_closed(pc_mcore *core, uint64_t now_ms, bool orderly, const char *why)
{
    bool was_connected = core->connected;
    core->open = core->connected = false;
    core->over |= core->leaving && orderly; /* let go */
    if (core->over) {
        return false;
    }
    /* The first of many; a refusal has said why itself. */
    bool first = was_connected || (core->backoff_ms == MCORE_BACKOFF_MIN_MS && !core->refused);
    mcore_note(core, first ? CM_LOG_WARN : CM_LOG_DEBUG, "no session: %s, trying on", why);
    core->retry_at_ms = now_ms;
    if (was_connected) {
        pc_tour_lost(&core->tour);
        core->retry_at_ms += MCORE_BACKOFF_MIN_MS;
    } else if (!pc_tour_next(&core->tour)) {
        core->retry_at_ms += core->backoff_ms;
        core->backoff_ms =
            core->backoff_ms * 2 < core->backoff_max_ms ? core->backoff_ms * 2 : core->backoff_max_ms;
    }
    return first;
}

/* ---- what can be seen ---- */

bool pc_mcore_connected(const pc_mcore *core)
{
    return core->connected;
}

bool pc_mcore_deaf(const pc_mcore *core)
{
    return core->over && !core->connected;
}

uint32_t pc_mcore_id(const pc_mcore *core)
{
    return core->id;
}

uint64_t pc_mcore_cluster(const pc_mcore *core)
{
    return core->cluster;
}

uint64_t pc_mcore_epoch(const pc_mcore *core)
{
    return core->epoch_in_force;
}

/* ---- words as messages ---- */

static char *mcore_text(const char *text)
{
    return (char *)(uintptr_t)text; /* packing only reads */
}

static void mcore_pack_hello(const pc_mcore *core, cm_bytes *packed)
{
    const pc_mself *from = &core->self;
    Baleen__Control__V1__Member self = BALEEN__CONTROL__V1__MEMBER__INIT;
    Baleen__Control__V1__Hello hello = BALEEN__CONTROL__V1__HELLO__INIT;
    member_word word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    self.id = core->id;
    self.role = (Baleen__Control__V1__Role)from->role;
    self.incarnation = from->incarnation;
    self.has_pid = true;
    self.pid = from->pid;
    self.host = mcore_text(from->host);
    self.data_address = mcore_text(from->data_address);
    self.http_address = mcore_text(from->http_address);
    self.grpc_address = mcore_text(from->grpc_address);
    self.net = from->net != NULL ? mcore_text(from->net) : NULL;
    self.has_expert_bytes_max = from->expert_bytes_max > 0;
    self.expert_bytes_max = from->expert_bytes_max;
    hello.protocol = PR_CONTROL_VERSION;
    hello.self = &self;
    hello.fingerprint = mcore_text(from->fingerprint);
    hello.version = (char[]){BALEEN_VERSION};
    hello.has_cluster = hello.has_epoch = hello.has_prepared = true;
    hello.cluster = core->cluster;
    hello.epoch = core->epoch_in_force;
    hello.prepared = core->epoch_prepared;
    hello.n_layer = from->n_layer;
    hello.n_expert = from->n_expert;
    hello.expert_bytes = from->expert_bytes;
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_HELLO;
    word.hello = &hello;
    pr_pack(&word.base, packed);
}

static void mcore_pack_heartbeat(const pc_mout *out, const cm_stat_value *stats, uint32_t n_stats,
                                 cm_bytes *packed)
{
    Baleen__Control__V1__StatValue values[CM_STAT_COUNT], *pointers[CM_STAT_COUNT];
    Baleen__Control__V1__Heartbeat heartbeat = BALEEN__CONTROL__V1__HEARTBEAT__INIT;
    member_word word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    CM_ASSERT(n_stats <= CM_STAT_COUNT);
    for (uint32_t i = 0; i < n_stats; i++) {
        baleen__control__v1__stat_value__init(&values[i]);
        values[i].stat = stats[i].stat;
        values[i].value = stats[i].value;
        pointers[i] = &values[i];
    }
    heartbeat.has_epoch = true;
    heartbeat.epoch = out->epoch;
    heartbeat.stats = pointers;
    heartbeat.n_stats = n_stats;
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_HEARTBEAT;
    word.heartbeat = &heartbeat;
    pr_pack(&word.base, packed);
}

static void mcore_pack_answer(const pc_mout *out, cm_bytes *packed)
{
    Baleen__Control__V1__Prepared prepared = BALEEN__CONTROL__V1__PREPARED__INIT;
    Baleen__Control__V1__Committed committed = BALEEN__CONTROL__V1__COMMITTED__INIT;
    Baleen__Control__V1__PeerReport report = BALEEN__CONTROL__V1__PEER_REPORT__INIT;
    Baleen__Control__V1__Leaving leaving = BALEEN__CONTROL__V1__LEAVING__INIT;
    member_word word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    if (out->kind == PC_MOUT_PREPARED) {
        prepared.epoch = out->epoch;
        prepared.status = out->status;
        prepared.text = out->text[0] != 0 ? mcore_text(out->text) : NULL;
        word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_PREPARED;
        word.prepared = &prepared;
    } else if (out->kind == PC_MOUT_COMMITTED) {
        committed.epoch = out->epoch;
        word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_COMMITTED;
        word.committed = &committed;
    } else if (out->kind == PC_MOUT_REPORT) {
        report.member_id = out->member_id;
        report.status = out->status;
        word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_PEER_REPORT;
        word.peer_report = &report;
    } else {
        CM_ASSERT(out->kind == PC_MOUT_LEAVING);
        word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_LEAVING;
        word.leaving = &leaving;
    }
    pr_pack(&word.base, packed);
}

void pc_mcore_word(const pc_mcore *core, const pc_mout *out, const cm_stat_value *stats, uint32_t n_stats,
                   cm_bytes *packed)
{
    if (out->kind == PC_MOUT_HELLO) {
        mcore_pack_hello(core, packed);
    } else if (out->kind == PC_MOUT_HEARTBEAT) {
        mcore_pack_heartbeat(out, stats, n_stats, packed);
    } else {
        mcore_pack_answer(out, packed);
    }
}
