#include "common/proc/member.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "common/base/clock.h"
#include "common/base/jobs.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/base/stats.h"
#include "common/proc/member_core.h"
#include "common/proc/rpc_client.h"
#include "proto/messages.h"
#include "proto/pack.h"

#define MEMBER_SESSION "/baleen.control.v1.Control/Session"

enum {
    MEMBER_ARENA_CHUNK = 64 << 10, /* one message of the coordinator, unpacked */
    MEMBER_ARENA_MAX = 64 << 20,
};

struct pc_member {
    pc_loop *loop;
    pc_member_events events;
    void *ctx;
    char *data_address, *http_address, *grpc_address, *net, *fingerprint; /* addresses: NULL when none */
    char coordinator[PC_ADDRESS_BYTES]; /* the one that we talk to, or try */
    char host[256];
    uint32_t role;

    pc_tls *tls;         /* NULL: plain */
    cm_jobs *jobs;       /* finds out why TLS does not come up; NULL: plain */
    pc_channel *channel; /* to coordinator */
    pc_stream *stream;   /* the session; NULL between two */
    pc_timer *tick;
    pc_mcore *core;
    bool acting; /* member_act is under way: it takes what comes out */
    cm_arena arena;
    cm_bytes packed;
};

static char member_role_letter(uint32_t role)
{
    return "?CGRW"[role <= BALEEN__CONTROL__V1__ROLE__ROLE_WORKER ? role : 0];
}

/* ---- what the machine asks for ---- */

static void member_send_packed(pc_member *member)
{
    cm_status status = pc_stream_send(member->stream, member->packed.data, member->packed.len);
    if (status != CM_OK) {
        cm_warn("cannot tell the coordinator %s: %s, starting the session afresh", member->coordinator,
                cm_status_text(status));
        pc_stream_cancel(member->stream); /* closed follows and connects again */
    }
}

static void member_say(pc_member *member, const pc_mout *out)
{
    cm_stat_value stats[CM_STAT_COUNT];
    uint32_t n_stats = 0;
    if (out->kind == PC_MOUT_HEARTBEAT) {
        n_stats = cm_stats_snapshot(member_role_letter(member->role), stats);
    }
    cm_bytes_clear(&member->packed);
    pc_mcore_word(member->core, out, stats, n_stats, &member->packed);
    member_send_packed(member);
}

static void member_welcome(pc_member *member)
{
    uint32_t id = pc_mcore_id(member->core);
    uint64_t cluster = pc_mcore_cluster(member->core);
    cm_log_identity(pr_role_name(member->role), (int)id);
    cm_log_epoch(pc_mcore_epoch(member->core));
    cm_info("member %u of cluster %llx, coordinator %s", id, (unsigned long long)cluster,
            member->coordinator);
    if (member->events.welcome != NULL) {
        member->events.welcome(member->ctx, id, cluster);
    }
}

static void member_prepare(pc_member *member, const pc_mout *out)
{
    if (member->events.prepare != NULL) {
        member->events.prepare(member->ctx, out->value);
    } else {
        pc_mcore_prepared(member->core, out->value->number, CM_OK, NULL); /* a role with nothing to load */
    }
}

static void member_tell(pc_member *member, const pc_mout *out)
{
    const pc_member_events *events = &member->events;
    switch (out->kind) {
    case PC_MOUT_WELCOME:
        member_welcome(member);
        break;
    case PC_MOUT_KEY:
        if (events->frame_key != NULL) {
            events->frame_key(member->ctx, pc_mcore_cluster(member->core), out->epoch, out->key);
        }
        break;
    case PC_MOUT_PREPARE:
        member_prepare(member, out);
        break;
    case PC_MOUT_ABORT:
        if (events->abort != NULL) {
            events->abort(member->ctx, out->epoch);
        }
        break;
    case PC_MOUT_COMMIT:
        if (events->commit != NULL) {
            events->commit(member->ctx, out->value);
        }
        break;
    case PC_MOUT_RETIRE:
        if (events->retire != NULL) {
            events->retire(member->ctx, out->epoch);
        }
        break;
    case PC_MOUT_DRAIN:
        if (events->drain != NULL) {
            events->drain(member->ctx);
        }
        break;
    case PC_MOUT_REFUSED:
        if (events->refused != NULL) {
            events->refused(member->ctx, out->status, out->text);
        }
        break;
    default:
        CM_ASSERT_MSG(false, "%d is no news", (int)out->kind);
    }
}

static void member_message(void *ctx, const uint8_t *data, size_t n_bytes);
static void member_closed(void *ctx, pc_code code, const char *text);

static void member_go_to(pc_member *member, const char *address)
{
    if (member->channel != NULL && strcmp(member->coordinator, address) == 0) {
        return;
    }
    if (member->channel != NULL) {
        pc_channel_destroy(member->channel);
    }
    snprintf(member->coordinator, sizeof(member->coordinator), "%.*s", PC_ADDRESS_BYTES - 1, address);
    member->channel = pc_channel_create_tls(member->loop, address, member->tls);
}

static void member_do(pc_member *member, const pc_mout *out)
{
    static const pc_stream_events events = {.message = member_message, .closed = member_closed};
    switch (out->kind) {
    case PC_MOUT_OPEN:
        member_go_to(member, out->text);
        member->stream = pc_stream_open(member->channel, MEMBER_SESSION, &events, member, 0);
        break;
    case PC_MOUT_HELLO:
    case PC_MOUT_HEARTBEAT:
    case PC_MOUT_PREPARED:
    case PC_MOUT_COMMITTED:
    case PC_MOUT_REPORT:
    case PC_MOUT_LEAVING:
        member_say(member, out);
        break;
    case PC_MOUT_CANCEL:
        pc_stream_cancel(member->stream);
        break;
    case PC_MOUT_NOTE:
        cm_log_line(out->level, "coordinator %s: %s", member->coordinator, out->text);
        break;
    default:
        member_tell(member, out);
    }
}

/* What an input made, and what its consequences make. */
static void member_act(pc_member *member)
{
    pc_mout out;
    if (member->acting) {
        return;
    }
    member->acting = true;
    while (pc_mcore_next(member->core, &out)) {
        member_do(member, &out);
        pc_epoch_release(out.value);
    }
    member->acting = false;
    uint64_t now_ms = cm_now_ms(), wake_ms = pc_mcore_wake_ms(member->core);
    if (wake_ms == UINT64_MAX) {
        pc_timer_clear(member->tick);
    } else {
        pc_timer_set(member->tick, wake_ms > now_ms ? wake_ms - now_ms : 0);
    }
}

/* ---- from the process ---- */

void pc_member_prepared(pc_member *member, uint64_t epoch, cm_status status, const char *text)
{
    pc_mcore_prepared(member->core, epoch, status, text);
    member_act(member);
}

void pc_member_committed(pc_member *member, uint64_t epoch)
{
    pc_mcore_committed(member->core, epoch);
    cm_log_epoch(pc_mcore_epoch(member->core));
    member_act(member);
}

void pc_member_report_peer(pc_member *member, uint32_t member_id, cm_status status)
{
    pc_mcore_report(member->core, member_id, status);
    member_act(member);
}

bool pc_member_load(pc_member *member, uint32_t *count, uint32_t n_layer, uint32_t n_expert)
{
    Baleen__Control__V1__ExpertLoad load = BALEEN__CONTROL__V1__EXPERT_LOAD__INIT;
    Baleen__Control__V1__MemberMessage word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    if (!pc_mcore_connected(member->core)) {
        return false;
    }
    load.n_layer = n_layer;
    load.n_expert = n_expert;
    load.count = count;
    load.n_count = (size_t)n_layer * n_expert;
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_EXPERT_LOAD;
    word.expert_load = &load;
    cm_bytes_clear(&member->packed);
    pr_pack(&word.base, &member->packed);
    member_send_packed(member);
    return true;
}

void pc_member_wish_load(pc_member *member)
{
    Baleen__Control__V1__LoadWish wish = BALEEN__CONTROL__V1__LOAD_WISH__INIT;
    Baleen__Control__V1__MemberMessage word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    if (!pc_mcore_connected(member->core)) {
        return;
    }
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_LOAD_WISH;
    word.load_wish = &wish;
    cm_bytes_clear(&member->packed);
    pr_pack(&word.base, &member->packed);
    member_send_packed(member);
}

void pc_member_leave(pc_member *member)
{
    pc_mcore_leave(member->core);
    member_act(member);
}

bool pc_member_connected(const pc_member *member)
{
    return pc_mcore_connected(member->core);
}

/* ---- the session ---- */

/* Words that decide nothing: they are for people who look. */
static void member_show(pc_member *member, const Baleen__Control__V1__CoordinatorMessage *word)
{
    const pc_member_events *events = &member->events;
    if (word->word_case == BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_CLUSTER_STATS &&
        events->cluster_stats != NULL) {
        events->cluster_stats(member->ctx, word->cluster_stats);
    } else if (word->word_case == BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_CLUSTER_LOAD &&
               events->cluster_load != NULL) {
        events->cluster_load(member->ctx, word->cluster_load);
    }
}

static void member_message(void *ctx, const uint8_t *data, size_t n_bytes)
{
    pc_member *member = ctx;
    ProtobufCMessage *message;
    if (pc_mcore_deaf(member->core)) {
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
    const Baleen__Control__V1__CoordinatorMessage *word =
        (const Baleen__Control__V1__CoordinatorMessage *)message;
    pc_mcore_hear(member->core, cm_now_ms(), word);
    if (pc_mcore_connected(member->core)) {
        member_show(member, word);
    }
    member_act(member);
}

typedef struct member_doubt {
    pc_tls *tls;
    char coordinator[PC_ADDRESS_BYTES];
} member_doubt;

/* Job thread. */
static void member_explain(void *arg)
{
    member_doubt *doubt = arg;
    char text[400];
    if (pc_tls_explain(doubt->tls, doubt->coordinator, text, sizeof(text))) {
        cm_error_log("TLS: %s", text);
    }
    cm_free(doubt);
}

static void member_find_out(pc_member *member)
{
    member_doubt *doubt = cm_alloc(sizeof(*doubt));
    doubt->tls = member->tls;
    snprintf(doubt->coordinator, sizeof(doubt->coordinator), "%s", member->coordinator);
    if (cm_jobs_submit(member->jobs, member_explain, doubt) != CM_OK) {
        cm_free(doubt); /* others are on their way */
    }
}

static void member_closed(void *ctx, pc_code code, const char *text)
{
    pc_member *member = ctx;
    char why[400];
    bool may_be_tls = member->tls == NULL && !pc_mcore_connected(member->core) &&
                      code == PC_CODE_UNAVAILABLE && strstr(text, "Socket closed") != NULL;
    member->stream = NULL;
    snprintf(why, sizeof(why), "%.255s (code %d%s)", text, (int)code,
             may_be_tls ? "; if it wants TLS, give --tls-ca, --tls-cert and --tls-key" : "");
    if (pc_mcore_closed(member->core, cm_now_ms(), code == PC_CODE_OK, why) && code == PC_CODE_UNAVAILABLE &&
        member->jobs != NULL) {
        member_find_out(member);
    }
    member_act(member);
}

static void member_tick(void *arg)
{
    pc_member *member = arg;
    pc_mcore_tick(member->core, cm_now_ms());
    member_act(member);
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
    pc_addresses coordinators;
    cm_status status = pc_addresses_parse("coordinator", options->coordinator, &coordinators, NULL);
    CM_ASSERT_MSG(status == CM_OK, "coordinator '%s' was not checked", options->coordinator);
    member->data_address = member_copy(options->data_address);
    member->http_address = member_copy(options->http_address);
    member->grpc_address = member_copy(options->grpc_address);
    member->net = member_copy(options->net);
    member->fingerprint = cm_strdup(options->fingerprint);
    member->role = options->role;
    gethostname(member->host, sizeof(member->host) - 1);
    member->tls = options->tls;
    member->jobs = member->tls != NULL ? cm_jobs_create("tls", 1, PC_ADDRESSES_MAX) : NULL;
    cm_arena_init(&member->arena, "member message", MEMBER_ARENA_CHUNK, MEMBER_ARENA_MAX);
    cm_bytes_init(&member->packed, 0);
    member->tick = pc_timer_create(loop, member_tick, member);
    pc_mself self = {.coordinators = &coordinators,
                     .role = options->role,
                     .incarnation = cm_random_u64(),
                     .pid = (uint32_t)getpid(),
                     .host = member->host,
                     .data_address = member->data_address,
                     .http_address = member->http_address,
                     .grpc_address = member->grpc_address,
                     .net = member->net,
                     .fingerprint = member->fingerprint,
                     .expert_bytes_max = options->expert_bytes_max,
                     .n_layer = options->n_layer,
                     .n_expert = options->n_expert,
                     .expert_bytes = options->expert_bytes};
    member->core = pc_mcore_create(&self, cm_now_ms());
    member_act(member);
    return member;
}

void pc_member_destroy(pc_member *member)
{
    pc_mcore_leave(member->core); /* no session is begun by what the end of this one brings */
    member->acting = true;        /* and nothing is said any more */
    pc_channel_destroy(member->channel);
    if (member->jobs != NULL) {
        cm_jobs_destroy(member->jobs);
    }
    pc_timer_destroy(member->tick);
    pc_mcore_destroy(member->core);
    cm_arena_fini(&member->arena);
    cm_bytes_fini(&member->packed);
    cm_free(member->data_address);
    cm_free(member->http_address);
    cm_free(member->grpc_address);
    cm_free(member->net);
    cm_free(member->fingerprint);
    cm_free(member);
}
