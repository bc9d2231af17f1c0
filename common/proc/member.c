#include "common/proc/member.h"

#include <string.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "common/base/jobs.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/base/stats.h"
#include "common/net/net.h"
#include "common/proc/rpc_client.h"
#include "proto/messages.h"
#include "proto/pack.h"

#define MEMBER_SESSION "/baleen.control.v1.Control/Session"

enum {
    MEMBER_BACKOFF_MIN_MS = 100,
    MEMBER_BACKOFF_MAX_MS = 2000,
    MEMBER_HEARTBEAT_MAX_MS = 600000,
    MEMBER_ARENA_CHUNK = 64 << 10, /* one message of the coordinator, unpacked */
    MEMBER_ARENA_MAX = 64 << 20,
};

struct pc_member {
    pc_loop *loop;
    pc_member_events events;
    void *ctx;
    char *coordinator, *data_address, *http_address, *grpc_address,
        *fingerprint; /* addresses: NULL when none */
    uint32_t role, n_layer, n_expert;
    uint64_t expert_bytes, expert_bytes_max, incarnation;

    pc_tls *tls;   /* NULL: plain */
    cm_jobs *jobs; /* finds out why TLS does not come up; NULL: plain */
    pc_channel *channel;
    pc_stream *stream; /* the session; NULL between two */
    pc_timer *retry, *heartbeat;
    uint64_t backoff_ms, heartbeat_ms;
    bool connected; /* welcomed in this session */
    bool over;      /* refused for good, left or destroyed: no further session */

    uint32_t id;
    uint64_t cluster;
    uint64_t epoch_heard;    /* newest commit handed out */
    uint64_t epoch_in_force; /* pc_member_committed said so */
    cm_arena arena;
    cm_bytes packed;
};

typedef Baleen__Control__V1__MemberMessage member_word;

static char member_role_letter(uint32_t role)
{
    return "?CGRW"[role <= BALEEN__CONTROL__V1__ROLE__ROLE_WORKER ? role : 0];
}

/* ------------------------------------------------------------------------------------------------------- our
 * words */

static void member_say(pc_member *member, const member_word *word)
{
    cm_bytes_clear(&member->packed);
    pr_pack(&word->base, &member->packed);
    cm_status status = pc_stream_send(member->stream, member->packed.data, member->packed.len);
    if (status != CM_OK) {
        cm_warn("cannot tell the coordinator %s: %s, starting the session afresh", member->coordinator,
                cm_status_text(status));
        pc_stream_cancel(member->stream); /* closed follows and connects again */
    }
}

static void member_say_hello(pc_member *member)
{
    char host[256] = "";
    Baleen__Control__V1__Member self = BALEEN__CONTROL__V1__MEMBER__INIT;
    Baleen__Control__V1__Hello hello = BALEEN__CONTROL__V1__HELLO__INIT;
    member_word word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    gethostname(host, sizeof(host) - 1);
    self.id = member->id;
    self.role = (Baleen__Control__V1__Role)member->role;
    self.incarnation = member->incarnation;
    self.has_pid = true;
    self.pid = (uint32_t)getpid();
    self.host = host;
    self.data_address = member->data_address;
    self.http_address = member->http_address;
    self.grpc_address = member->grpc_address;
    self.has_expert_bytes_max = member->expert_bytes_max > 0;
    self.expert_bytes_max = member->expert_bytes_max;
    hello.protocol = PR_CONTROL_VERSION;
    hello.self = &self;
    hello.fingerprint = member->fingerprint;
    hello.version = (char[]){BALEEN_VERSION};
    hello.has_cluster = hello.has_epoch = true;
    hello.cluster = member->cluster;
    hello.epoch = member->epoch_in_force;
    hello.n_layer = member->n_layer;
    hello.n_expert = member->n_expert;
    hello.expert_bytes = member->expert_bytes;
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_HELLO;
    word.hello = &hello;
    member_say(member, &word);
}

static void member_say_heartbeat(pc_member *member)
{
    cm_stat_value stats[CM_STAT_COUNT];
    Baleen__Control__V1__StatValue values[CM_STAT_COUNT], *pointers[CM_STAT_COUNT];
    Baleen__Control__V1__Heartbeat heartbeat = BALEEN__CONTROL__V1__HEARTBEAT__INIT;
    member_word word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    uint32_t n = cm_stats_snapshot(member_role_letter(member->role), stats);
    for (uint32_t i = 0; i < n; i++) {
        baleen__control__v1__stat_value__init(&values[i]);
        values[i].stat = stats[i].stat;
        values[i].value = stats[i].value;
        pointers[i] = &values[i];
    }
    heartbeat.has_epoch = true;
    heartbeat.epoch = member->epoch_in_force;
    heartbeat.stats = pointers;
    heartbeat.n_stats = n;
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_HEARTBEAT;
    word.heartbeat = &heartbeat;
    member_say(member, &word);
}

static void member_beat(void *arg)
{
    pc_member *member = arg;
    member_say_heartbeat(member);
    pc_timer_set(member->heartbeat, member->heartbeat_ms);
}

void pc_member_prepared(pc_member *member, uint64_t epoch, cm_status status, const char *text)
{
    Baleen__Control__V1__Prepared prepared = BALEEN__CONTROL__V1__PREPARED__INIT;
    member_word word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    if (!member->connected) {
        return; /* a lost session aborts its change */
    }
    prepared.epoch = epoch;
    prepared.status = status;
    prepared.text = (char *)(uintptr_t)text; /* packing only reads */
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_PREPARED;
    word.prepared = &prepared;
    member_say(member, &word);
}

void pc_member_committed(pc_member *member, uint64_t epoch)
{
    Baleen__Control__V1__Committed committed = BALEEN__CONTROL__V1__COMMITTED__INIT;
    member_word word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    if (epoch > member->epoch_in_force) {
        member->epoch_in_force = epoch;
        cm_log_epoch(epoch);
    }
    if (!member->connected) {
        return; /* the next hello says it */
    }
    committed.epoch = epoch;
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_COMMITTED;
    word.committed = &committed;
    member_say(member, &word);
}

void pc_member_report_peer(pc_member *member, uint32_t member_id, cm_status status)
{
    Baleen__Control__V1__PeerReport report = BALEEN__CONTROL__V1__PEER_REPORT__INIT;
    member_word word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    if (!member->connected) {
        return; /* the coordinator has its own leases */
    }
    report.member_id = member_id;
    report.status = status;
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_PEER_REPORT;
    word.peer_report = &report;
    member_say(member, &word);
}

void pc_member_leave(pc_member *member)
{
    Baleen__Control__V1__Leaving leaving = BALEEN__CONTROL__V1__LEAVING__INIT;
    member_word word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    member->over = true;
    pc_timer_clear(member->retry);
    if (member->connected) {
        word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_LEAVING;
        word.leaving = &leaving;
        member_say(member, &word);
    }
}

/* ----------------------------------------------------------------------------------------------
 * coordinator's words */

static void member_take_key(pc_member *member, const Baleen__Control__V1__FrameKey *key)
{
    if (key == NULL || member->events.frame_key == NULL) {
        return;
    }
    if (key->key.len != NET_KEY_BYTES) {
        cm_warn("coordinator %s: a key of %zu bytes ignored", member->coordinator, key->key.len);
        return;
    }
    member->events.frame_key(member->ctx, member->cluster, key->epoch, key->key.data);
}

static void member_hear_welcome(pc_member *member, const Baleen__Control__V1__Welcome *welcome)
{
    if (welcome->member_id == 0 || welcome->heartbeat_ms == 0 ||
        welcome->heartbeat_ms > MEMBER_HEARTBEAT_MAX_MS) {
        cm_warn("coordinator %s: welcome with member id %u, heartbeat %u ms", member->coordinator,
                welcome->member_id, welcome->heartbeat_ms);
        pc_stream_cancel(member->stream);
        return;
    }
    if (welcome->cluster != member->cluster) {
        member->epoch_heard = member->epoch_in_force = 0; /* another cluster counts from the start */
        cm_log_epoch(0);
    }
    member->id = welcome->member_id;
    member->cluster = welcome->cluster;
    member->heartbeat_ms = welcome->heartbeat_ms;
    member->connected = true;
    member->backoff_ms = MEMBER_BACKOFF_MIN_MS;
    cm_log_identity(pr_role_name(member->role), (int)member->id);
    cm_info("member %u of cluster %llx, coordinator %s", member->id, (unsigned long long)member->cluster,
            member->coordinator);
    member_beat(member);
    if (member->events.welcome != NULL) {
        member->events.welcome(member->ctx, member->id, member->cluster);
    }
    member_take_key(member, welcome->frame_key);
}

static void member_hear_refused(pc_member *member, const Baleen__Control__V1__Refused *refused)
{
    cm_status status = refused->status < 0 ? (cm_status)refused->status : CM_E_REFUSED;
    bool final = refused->has_final && refused->final;
    cm_warn("coordinator %s refuses us%s: %s", member->coordinator, final ? " for good" : "", refused->text);
    member->over |= final;
    pc_stream_cancel(member->stream);
    if (final && member->events.refused != NULL) {
        member->events.refused(member->ctx, status, refused->text);
    }
}

/* NULL: not one to follow, said why in the log. */
static pc_epoch *member_take_epoch(pc_member *member, const char *word,
                                   const Baleen__Control__V1__Epoch *message, cm_error *err)
{
    pc_epoch *epoch = NULL;
    cm_status status = pc_epoch_unpack(message, &epoch, err);
    if (status == CM_OK && epoch->cluster != member->cluster) {
        status = cm_error_set(err, CM_E_PROTOCOL, "cluster", "it belongs to cluster %llx",
                              (unsigned long long)epoch->cluster);
    }
    if (status == CM_OK && epoch->number < member->epoch_heard) {
        status = cm_error_set(err, CM_E_STALE, "number", "epoch %llu was heard before",
                              (unsigned long long)member->epoch_heard);
    }
    if (status != CM_OK) {
        cm_warn("%s of epoch %llu ignored: %s", word, (unsigned long long)message->number, err->text);
        pc_epoch_release(epoch);
        return NULL;
    }
    return epoch;
}

static void member_hear_prepare(pc_member *member, const Baleen__Control__V1__Prepare *prepare)
{
    cm_error err = {0};
    pc_epoch *epoch = member_take_epoch(member, "prepare", prepare->epoch, &err);
    if (epoch == NULL) {
        pc_member_prepared(member, prepare->epoch->number, err.status, err.text);
    } else if (member->events.prepare != NULL) {
        member->events.prepare(member->ctx, epoch);
    } else {
        pc_member_prepared(member, epoch->number, CM_OK, NULL); /* a role with nothing to load */
    }
    pc_epoch_release(epoch);
}

static void member_hear_commit(pc_member *member, const Baleen__Control__V1__Commit *commit)
{
    cm_error err = {0};
    pc_epoch *epoch = member_take_epoch(member, "commit", commit->epoch, &err);
    if (epoch == NULL) {
        return;
    }
    member_take_key(member, commit->frame_key);
    if (epoch->number > member->epoch_heard) {
        uint64_t before = member->epoch_in_force;
        member->epoch_heard = epoch->number;
        if (member->events.commit != NULL) {
            member->events.commit(member->ctx, epoch);
        }
        if (member->role != BALEEN__CONTROL__V1__ROLE__ROLE_WORKER && before != 0 &&
            member->events.retire != NULL) {
            member->events.retire(member->ctx, before);
        }
    } else if (member->epoch_in_force == epoch->number) {
        pc_member_committed(member, epoch->number); /* said again after a new session */
    }
    pc_epoch_release(epoch);
}

static void member_hear(pc_member *member, const Baleen__Control__V1__CoordinatorMessage *message)
{
    const pc_member_events *events = &member->events;
    if (!member->connected && message->word_case != BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_WELCOME &&
        message->word_case != BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_REFUSED) {
        cm_warn("coordinator %s: message %d before its welcome", member->coordinator,
                (int)message->word_case);
        return;
    }
    switch (message->word_case) {
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_WELCOME:
        member_hear_welcome(member, message->welcome);
        break;
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_REFUSED:
        member_hear_refused(member, message->refused);
        break;
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_PREPARE:
        member_hear_prepare(member, message->prepare);
        break;
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_ABORT:
        if (events->abort != NULL) {
            events->abort(member->ctx, message->abort->epoch);
        }
        break;
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_COMMIT:
        member_hear_commit(member, message->commit);
        break;
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_RETIRE:
        if (events->retire != NULL) {
            events->retire(member->ctx, message->retire->epoch);
        }
        break;
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_CLUSTER_STATS:
        if (events->cluster_stats != NULL) {
            events->cluster_stats(member->ctx, message->cluster_stats);
        }
        break;
    case BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_DRAIN:
        if (events->drain != NULL) {
            events->drain(member->ctx);
        }
        break;
    default:
        cm_warn("coordinator %s: a message we do not know", member->coordinator);
        break;
    }
}

/* ----------------------------------------------------------------------------------------------------- the
 * session */

static void member_message(void *ctx, const uint8_t *data, size_t n_bytes)
{
    pc_member *member = ctx;
    ProtobufCMessage *message;
    if (member->over && !member->connected) {
        return; /* refused: the rest of the session is of no interest */
    }
    cm_arena_reset(&member->arena);
    cm_status status = pr_unpack(&baleen__control__v1__coordinator_message__descriptor, data, n_bytes,
                                 &member->arena, &message);
    if (status != CM_OK) {
        cm_warn("coordinator %s: message of %zu bytes: %s, starting the session afresh", member->coordinator,
                n_bytes, cm_status_text(status));
        pc_stream_cancel(member->stream);
        return;
    }
    member_hear(member, (const Baleen__Control__V1__CoordinatorMessage *)message);
}

/* Job thread: reads what stays the same for the member's life. */
static void member_explain(void *arg)
{
    pc_member *member = arg;
    char text[400];
    if (pc_tls_explain(member->tls, member->coordinator, text, sizeof(text))) {
        cm_error_log("TLS: %s", text);
    }
}

/* Once per outage; the further tries are for the log at debug. */
static void member_say_lost(pc_member *member, pc_code code, const char *text)
{
    bool may_be_tls =
        code == PC_CODE_UNAVAILABLE && member->tls == NULL && strstr(text, "Socket closed") != NULL;
    cm_warn("no session with the coordinator %s: %s (code %d), trying on%s", member->coordinator, text,
            (int)code, may_be_tls ? "; if it wants TLS, give --tls-ca, --tls-cert and --tls-key" : "");
    if (code == PC_CODE_UNAVAILABLE && member->jobs != NULL) {
        (void)!cm_jobs_submit(member->jobs, member_explain, member); /* full: one is on its way */
    }
}

static void member_closed(void *ctx, pc_code code, const char *text)
{
    pc_member *member = ctx;
    bool was_connected = member->connected;
    member->stream = NULL;
    member->connected = false;
    pc_timer_clear(member->heartbeat);
    if (member->over) {
        return;
    }
    if (was_connected || member->backoff_ms == MEMBER_BACKOFF_MIN_MS) { /* then at debug until it is back */
        member_say_lost(member, code, text);
    } else {
        cm_debug("coordinator %s: %s (code %d), next try in %llu ms", member->coordinator, text, (int)code,
                 (unsigned long long)member->backoff_ms);
    }
    pc_timer_set(member->retry, member->backoff_ms);
    member->backoff_ms =
        member->backoff_ms * 2 < MEMBER_BACKOFF_MAX_MS ? member->backoff_ms * 2 : MEMBER_BACKOFF_MAX_MS;
}

static void member_connect(void *arg)
{
    static const pc_stream_events events = {.message = member_message, .closed = member_closed};
    pc_member *member = arg;
    member->stream = pc_stream_open(member->channel, MEMBER_SESSION, &events, member, 0);
    member_say_hello(member);
}

static char *member_copy(const char *text)
{
    return text != NULL ? cm_strdup(text) : NULL;
}

pc_member *pc_member_create(pc_loop *loop, const pc_member_options *options, const pc_member_events *events,
                            void *ctx)
{
    pc_member *member = cm_alloc(sizeof(*member));
    member->loop = loop;
    member->events = *events;
    member->ctx = ctx;
    member->coordinator = cm_strdup(options->coordinator);
    member->data_address = member_copy(options->data_address);
    member->http_address = member_copy(options->http_address);
    member->grpc_address = member_copy(options->grpc_address);
    member->fingerprint = cm_strdup(options->fingerprint);
    member->role = options->role;
    member->n_layer = options->n_layer;
    member->n_expert = options->n_expert;
    member->expert_bytes = options->expert_bytes;
    member->expert_bytes_max = options->expert_bytes_max;
    member->incarnation = cm_random_u64();
    member->backoff_ms = MEMBER_BACKOFF_MIN_MS;
    cm_arena_init(&member->arena, "member message", MEMBER_ARENA_CHUNK, MEMBER_ARENA_MAX);
    cm_bytes_init(&member->packed, 0);
    member->tls = options->tls;
    member->jobs = member->tls != NULL ? cm_jobs_create("tls", 1, 1) : NULL;
    member->channel = pc_channel_create_tls(loop, options->coordinator, member->tls);
    member->retry = pc_timer_create(loop, member_connect, member);
    member->heartbeat = pc_timer_create(loop, member_beat, member);
    member_connect(member);
    return member;
}

void pc_member_destroy(pc_member *member)
{
    member->over = true;
    pc_channel_destroy(member->channel);
    if (member->jobs != NULL) {
        cm_jobs_destroy(member->jobs);
    }
    pc_timer_destroy(member->retry);
    pc_timer_destroy(member->heartbeat);
    cm_arena_fini(&member->arena);
    cm_bytes_fini(&member->packed);
    cm_free(member->coordinator);
    cm_free(member->data_address);
    cm_free(member->http_address);
    cm_free(member->grpc_address);
    cm_free(member->fingerprint);
    cm_free(member);
}

bool pc_member_connected(const pc_member *member)
{
    return member->connected;
}
