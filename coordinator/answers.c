#include "coordinator/answers.h"

#include <math.h>

#include "common/base/mem.h"
#include "coordinator/balance_core.h"
#include "proto/pack.h"

typedef Baleen__Control__V1__StatValue stat_message;

enum { ANSWER_ARENA_CHUNK_BYTES = 64 << 10, ANSWER_ARENA_BYTES_MAX = 256 << 20 };

bool co_answer_word(const co_out *out, uint64_t cluster, uint32_t heartbeat_ms, uint32_t lease_ms,
                    const co_frame_key *key, cm_bytes *packed_out)
{
    Baleen__Control__V1__FrameKey frame_key = BALEEN__CONTROL__V1__FRAME_KEY__INIT;
    Baleen__Control__V1__CoordinatorMessage word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    Baleen__Control__V1__Welcome welcome = BALEEN__CONTROL__V1__WELCOME__INIT;
    Baleen__Control__V1__Refused refused = BALEEN__CONTROL__V1__REFUSED__INIT;
    Baleen__Control__V1__Prepare prepare = BALEEN__CONTROL__V1__PREPARE__INIT;
    Baleen__Control__V1__Abort abort = BALEEN__CONTROL__V1__ABORT__INIT;
    Baleen__Control__V1__Commit commit = BALEEN__CONTROL__V1__COMMIT__INIT;
    Baleen__Control__V1__Retire retire = BALEEN__CONTROL__V1__RETIRE__INIT;
    Baleen__Control__V1__Drain drain = BALEEN__CONTROL__V1__DRAIN__INIT;
    if (key != NULL) {
        frame_key.epoch = key->epoch;
        frame_key.key = (ProtobufCBinaryData){sizeof(key->bytes), (uint8_t *)(uintptr_t)key->bytes};
    }
    switch (out->kind) {
    case CO_OUT_WELCOME:
        welcome.frame_key = key != NULL ? &frame_key : NULL;
        welcome.member_id = out->member_id;
        welcome.cluster = cluster;
        welcome.heartbeat_ms = heartbeat_ms;
        welcome.lease_ms = lease_ms;
        word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_WELCOME;
        word.welcome = &welcome;
        break;
    case CO_OUT_REFUSED:
        refused.status = out->status;
        refused.text = (char *)(uintptr_t)out->text; /* packing only reads */
        refused.has_final = true;
        refused.final = out->final;
        word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_REFUSED;
        word.refused = &refused;
        break;
    case CO_OUT_PREPARE:
        prepare.epoch = out->epoch->message;
        word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_PREPARE;
        word.prepare = &prepare;
        break;
    case CO_OUT_ABORT:
        abort.epoch = out->number;
        word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_ABORT;
        word.abort = &abort;
        break;
    case CO_OUT_COMMIT:
        commit.epoch = out->epoch->message;
        commit.frame_key = key != NULL ? &frame_key : NULL;
        word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_COMMIT;
        word.commit = &commit;
        break;
    case CO_OUT_RETIRE:
        retire.epoch = out->number;
        word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_RETIRE;
        word.retire = &retire;
        break;
    case CO_OUT_DRAIN:
        word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_DRAIN;
        word.drain = &drain;
        break;
    case CO_OUT_CLOSE:
    case CO_OUT_ANSWER:
    case CO_OUT_STORE:
    case CO_OUT_NOTE:
        return false;
    }
    pr_pack(&word.base, packed_out);
    return true;
}

void co_answer_send_on(const char *active, const char *why, cm_bytes *packed_out)
{
    Baleen__Control__V1__CoordinatorMessage word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    Baleen__Control__V1__Refused refused = BALEEN__CONTROL__V1__REFUSED__INIT;
    refused.status = CM_E_UNAVAILABLE;
    refused.text = (char *)(uintptr_t)why; /* packing only reads */
    refused.active = active[0] != 0 ? (char *)(uintptr_t)active : NULL;
    word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_REFUSED;
    word.refused = &refused;
    pr_pack(&word.base, packed_out);
}

/* [n] pointers to n messages, as protobuf-c wants repeated ones. */
static stat_message **stats_messages(cm_arena *arena, const cm_stat_value *stats, uint32_t n)
{
    stat_message **pointers = cm_arena_take(arena, sizeof(*pointers) * n);
    stat_message *values = cm_arena_take(arena, sizeof(*values) * n);
    for (uint32_t i = 0; i < n; i++) {
        baleen__control__v1__stat_value__init(&values[i]);
        values[i].stat = stats[i].stat;
        values[i].value = stats[i].value;
        pointers[i] = &values[i];
    }
    return pointers;
}

void co_answer_cluster_stats(const co_core *core, cm_bytes *packed_out)
{
    cm_arena arena;
    cm_arena_init(&arena, "cluster stats", ANSWER_ARENA_CHUNK_BYTES, ANSWER_ARENA_BYTES_MAX);
    Baleen__Control__V1__ClusterStats stats = BALEEN__CONTROL__V1__CLUSTER_STATS__INIT;
    stats.n_members = co_core_n_members(core);
    stats.members = cm_arena_take(&arena, sizeof(*stats.members) * stats.n_members);
    for (uint32_t i = 0; i < stats.n_members; i++) {
        co_member_view view;
        co_core_member(core, i, &view);
        stats.members[i] = cm_arena_take(&arena, sizeof(**stats.members));
        baleen__control__v1__member_stats__init(stats.members[i]);
        stats.members[i]->member_id = view.self->id;
        stats.members[i]->role = view.self->role;
        stats.members[i]->stats = stats_messages(&arena, view.stats, view.n_stats);
        stats.members[i]->n_stats = view.n_stats;
        stats.members[i]->state = (char *)(uintptr_t)co_member_state_name(view.state);
        stats.members[i]->has_epoch = true;
        stats.members[i]->epoch = view.epoch;
    }
    char change[256];
    stats.has_changing = true;
    stats.changing = co_core_change(core, change); /* the words may name addresses: not for clients */
    Baleen__Control__V1__CoordinatorMessage word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_CLUSTER_STATS;
    word.cluster_stats = &stats;
    pr_pack(&word.base, packed_out);
    cm_arena_fini(&arena);
}

/* Eight levels for each doubling; the last one is for 3.6e9 rows and all above. */
static uint8_t load_level(uint64_t rows)
{
    double level = rows > 0 ? 1 + round(8 * log2((double)rows)) : 0;
    return level < 255 ? (uint8_t)level : 255;
}

bool co_answer_cluster_load(const co_core *core, cm_bytes *packed_out)
{
    const uint64_t *rows = co_core_load(core);
    const co_epoch *epoch = co_core_epoch(core);
    if (rows == NULL || epoch == NULL) {
        return false;
    }
    Baleen__Control__V1__ClusterLoad load = BALEEN__CONTROL__V1__CLUSTER_LOAD__INIT;
    Baleen__Control__V1__CoordinatorMessage word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    load.n_layer = epoch->placement->n_layer;
    load.n_expert = epoch->placement->n_expert;
    load.level.len = (size_t)load.n_layer * load.n_expert;
    load.level.data = cm_alloc(load.level.len);
    for (size_t i = 0; i < load.level.len; i++) {
        load.level.data[i] = load_level(rows[i]);
    }
    word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_CLUSTER_LOAD;
    word.cluster_load = &load;
    pr_pack(&word.base, packed_out);
    cm_free(load.level.data);
    return true;
}

static void status_fill_self(cm_arena *arena, const co_core *core, const co_peer *self,
                             Baleen__Control__V1__MemberStatus *row)
{
    cm_stat_value stats[CM_STAT_COUNT];
    uint32_t n_stats = cm_stats_snapshot('C', stats);
    const co_epoch *epoch = co_core_epoch(core);
    row->member = (co_peer *)(uintptr_t)self;
    row->state = (char *)(uintptr_t)co_member_state_name(CO_MEMBER_READY);
    row->has_epoch = true;
    row->epoch = epoch != NULL ? epoch->number : 0;
    row->stats = stats_messages(arena, stats, n_stats);
    row->n_stats = n_stats;
}

static void status_fill_member(cm_arena *arena, const co_core *core, uint32_t i, uint64_t now_ms,
                               Baleen__Control__V1__MemberStatus *row)
{
    co_member_view view;
    co_core_member(core, i, &view);
    row->member = (co_peer *)(uintptr_t)view.self;
    row->state = (char *)(uintptr_t)co_member_state_name(view.state);
    row->has_epoch = true;
    row->epoch = view.epoch;
    row->has_heard_ms_ago = true;
    row->heard_ms_ago = now_ms - view.heard_ms;
    row->stats = stats_messages(arena, view.stats, view.n_stats);
    row->n_stats = view.n_stats;
    const co_epoch *epoch = co_core_epoch(core);
    if (view.self->role == CO_ROLE_WORKER && epoch != NULL) {
        uint32_t rank = pr_placement_rank_of(epoch->placement, view.self->id);
        row->has_n_expert = true;
        row->n_expert = rank < epoch->placement->n_rank ? pr_placement_count(epoch->placement, rank) : 0;
    }
}

/* The placement borrows from the epoch; the load is the core's. */
static void status_fill_experts(const co_core *core, bool experts, Baleen__Control__V1__StatusReply *reply)
{
    const co_epoch *epoch = co_core_epoch(core);
    const uint64_t *load = co_core_load(core);
    if (epoch == NULL) {
        return;
    }
    uint32_t n_pair = epoch->placement->n_layer * epoch->placement->n_expert;
    if (load != NULL) {
        reply->has_imbalance_permille = true;
        reply->imbalance_permille = (uint32_t)(1000 * co_balance_imbalance(epoch->placement, load));
    }
    if (experts) {
        reply->placement = epoch->message->placement;
        reply->load = (uint64_t *)(uintptr_t)load; /* packing only reads */
        reply->n_load = load != NULL ? n_pair : 0;
    }
}

void co_answer_status(const co_core *core, const co_peer *self, uint64_t now_ms, bool experts,
                      cm_bytes *packed_out)
{
    cm_arena arena;
    cm_arena_init(&arena, "status", ANSWER_ARENA_CHUNK_BYTES, ANSWER_ARENA_BYTES_MAX);
    const co_epoch *epoch = co_core_epoch(core);
    char change[256];
    Baleen__Control__V1__StatusReply reply = BALEEN__CONTROL__V1__STATUS_REPLY__INIT;
    reply.cluster = co_core_cluster(core);
    reply.epoch = epoch != NULL ? epoch->number : 0;
    reply.change = co_core_change(core, change) ? change : NULL;
    const char *fingerprint = co_core_fingerprint(core);
    reply.fingerprint = fingerprint[0] != 0 ? (char *)(uintptr_t)fingerprint : NULL;
    status_fill_experts(core, experts, &reply);
    reply.n_members = 1 + (size_t)co_core_n_members(core);
    reply.members = cm_arena_take(&arena, sizeof(*reply.members) * reply.n_members);
    for (uint32_t i = 0; i < reply.n_members; i++) {
        reply.members[i] = cm_arena_take(&arena, sizeof(**reply.members));
        baleen__control__v1__member_status__init(reply.members[i]);
        if (i == 0) {
            status_fill_self(&arena, core, self, reply.members[0]);
        } else {
            status_fill_member(&arena, core, i - 1, now_ms, reply.members[i]);
        }
    }
    pr_pack(&reply.base, packed_out);
    cm_arena_fini(&arena);
}

void co_answer_status_standby(const co_peer *self, const char *active, const char *why, cm_bytes *packed_out)
{
    Baleen__Control__V1__StatusReply reply = BALEEN__CONTROL__V1__STATUS_REPLY__INIT;
    Baleen__Control__V1__MemberStatus row = BALEEN__CONTROL__V1__MEMBER_STATUS__INIT, *rows[] = {&row};
    row.member = (co_peer *)(uintptr_t)self;
    row.state = (char[]){"standby"};
    reply.n_members = 1;
    reply.members = rows;
    reply.change = (char *)(uintptr_t)why;
    reply.has_standby = reply.standby = true;
    reply.active = active[0] != 0 ? (char *)(uintptr_t)active : NULL;
    pr_pack(&reply.base, packed_out);
}
