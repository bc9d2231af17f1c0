/* A member against a coordinator made of a script: both on one loop, words over real gRPC. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/stats.h"
#include "common/proc/member.h"
#include "common/proc/rpc_server.h"
#include "proto/messages.h"
#include "proto/pack.h"

typedef Baleen__Control__V1__MemberMessage member_word;
typedef Baleen__Control__V1__CoordinatorMessage coordinator_word;

enum { CLUSTER = 0xc1a5, N_LAYER = 2, N_EXPERT = 3 };

static struct {
    pc_loop *loop;
    pc_rpc_server *server;
    char address[128];
    pc_member *member;
    bool (*done)(void);

    /* the coordinator's side */
    cm_arena arena;
    pc_call *session;
    uint32_t n_hello, n_heartbeat, n_left, n_sessions_over;
    uint32_t hello_id, hello_role, hello_protocol;
    uint64_t hello_cluster, hello_epoch, hello_incarnation, hello_incarnation_before;
    char hello_data_address[64], hello_fingerprint[64];
    uint32_t answer_id; /* the welcome's; 0 = refuse */
    bool refuse_final;
    int64_t beat_epoch, beat_rows; /* of the last heartbeat; -1 = not in it */
    uint64_t prepared_epoch, committed_epoch;
    int32_t prepared_status;
    char prepared_text[256];
    uint32_t n_committed, reported_member;
    int32_t reported_status;

    /* the member's side */
    uint32_t n_welcome, n_prepare, n_commit, n_refused, n_drain, n_stats;
    uint32_t member_id;
    uint64_t cluster, aborted, retired;
    pc_epoch *kept;
    char refused_text[128];
    cm_status refused_status;
    uint32_t n_stale_warnings;
    bool leave_commit_open;
} g;

static void hook(void *arg)
{
    (void)arg;
    if (g.done != NULL && g.done()) {
        pc_loop_stop(g.loop);
    }
}

static void until(bool (*done)(void))
{
    g.done = done;
    pc_loop_run(g.loop);
    g.done = NULL;
}

/* --------------------------------------------------------------------------------------------- the
 * coordinator's side */

static void say(coordinator_word *word, int word_case)
{
    cm_bytes packed;
    cm_bytes_init(&packed, 0);
    word->word_case = (Baleen__Control__V1__CoordinatorMessage__WordCase)word_case;
    pr_pack(&word->base, &packed);
    assert_int_equal(pc_call_send(g.session, packed.data, packed.len), CM_OK);
    cm_bytes_fini(&packed);
}

static void say_welcome(void)
{
    Baleen__Control__V1__Welcome welcome = BALEEN__CONTROL__V1__WELCOME__INIT;
    coordinator_word word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    welcome.member_id = g.answer_id;
    welcome.cluster = CLUSTER;
    welcome.heartbeat_ms = 5;
    welcome.lease_ms = 5000;
    word.welcome = &welcome;
    say(&word, BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_WELCOME);
}

static void say_refused(void)
{
    Baleen__Control__V1__Refused refused = BALEEN__CONTROL__V1__REFUSED__INIT;
    coordinator_word word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    refused.status = CM_E_CORRUPT;
    refused.text = (char[]){"another checkpoint"};
    refused.has_final = true;
    refused.final = g.refuse_final;
    word.refused = &refused;
    say(&word, BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_REFUSED);
    pc_call_finish(g.session, PC_CODE_OK, NULL, NULL, 0, 0);
}

static void hear_hello(const Baleen__Control__V1__Hello *hello)
{
    g.n_hello++;
    g.hello_protocol = hello->protocol;
    g.hello_id = hello->self->id;
    g.hello_role = (uint32_t)hello->self->role;
    g.hello_incarnation_before = g.hello_incarnation;
    g.hello_incarnation = hello->self->incarnation;
    g.hello_cluster = hello->cluster;
    g.hello_epoch = hello->epoch;
    snprintf(g.hello_data_address, sizeof(g.hello_data_address), "%s", hello->self->data_address);
    snprintf(g.hello_fingerprint, sizeof(g.hello_fingerprint), "%s", hello->fingerprint);
    assert_int_equal(hello->n_layer, N_LAYER);
    assert_int_equal(hello->n_expert, N_EXPERT);
    assert_int_equal(hello->expert_bytes, 1000);
    assert_int_equal(hello->self->expert_bytes_max, 6000);
    if (g.answer_id != 0) {
        say_welcome();
    } else {
        say_refused();
    }
}

static void session_message(pc_call *call, const uint8_t *data, size_t n_bytes)
{
    ProtobufCMessage *message;
    cm_arena_reset(&g.arena);
    assert_int_equal(
        pr_unpack(&baleen__control__v1__member_message__descriptor, data, n_bytes, &g.arena, &message),
        CM_OK);
    const member_word *word = (const member_word *)message;
    g.session = call;
    switch (word->word_case) {
    case BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_HELLO:
        hear_hello(word->hello);
        break;
    case BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_HEARTBEAT:
        g.n_heartbeat++;
        g.beat_epoch = (int64_t)word->heartbeat->epoch;
        g.beat_rows = -1;
        for (size_t i = 0; i < word->heartbeat->n_stats; i++) {
            assert_true(cm_stat_has_role((cm_stat)word->heartbeat->stats[i]->stat, 'W'));
            if (word->heartbeat->stats[i]->stat == CM_STAT_worker_rows) {
                g.beat_rows = word->heartbeat->stats[i]->value;
            }
        }
        break;
    case BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_PREPARED:
        g.prepared_epoch = word->prepared->epoch;
        g.prepared_status = word->prepared->status;
        snprintf(g.prepared_text, sizeof(g.prepared_text), "%s",
                 word->prepared->text != NULL ? word->prepared->text : "");
        break;
    case BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_COMMITTED:
        g.n_committed++;
        g.committed_epoch = word->committed->epoch;
        break;
    case BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_PEER_REPORT:
        g.reported_member = word->peer_report->member_id;
        g.reported_status = word->peer_report->status;
        break;
    case BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_LEAVING:
        g.n_left++;
        break;
    default:
        fail_msg("word %d", (int)word->word_case);
    }
}

static void session_closed(pc_call *call, bool cancelled)
{
    (void)cancelled;
    g.n_sessions_over++;
    g.session = g.session == call ? NULL : g.session;
}

static const pc_method g_method = {.path = "/baleen.control.v1.Control/Session",
                                   .message = session_message,
                                   .closed = session_closed,
                                   .client_streams = true};

static void server_start(const char *address)
{
    const pc_rpc_options options = {
        .address = address, .request_bytes_max = 1 << 20, .calls_max = 4, .queue_bytes_max = 1 << 20};
    cm_status status = pc_rpc_server_create(g.loop, &options, &g_method, 1, &g.server, g.address, NULL);
    assert_int_equal(status, CM_OK);
}

/* Epoch of two workers (4 and 9) and a router (2). */
typedef struct script_epoch {
    Baleen__Control__V1__Epoch epoch;
    Baleen__Control__V1__Placement placement;
    Baleen__Control__V1__Member members[3], *pointers[3];
    uint32_t rank_member[2], first[N_LAYER * N_EXPERT + 1], owner[N_LAYER * N_EXPERT];
} script_epoch;

static void script_epoch_init(script_epoch *s, uint64_t number)
{
    static const uint32_t ids[] = {9, 4, 2};
    static char address[] = "10.0.0.9:7000";
    baleen__control__v1__epoch__init(&s->epoch);
    baleen__control__v1__placement__init(&s->placement);
    for (uint32_t i = 0; i < 3; i++) {
        baleen__control__v1__member__init(&s->members[i]);
        s->members[i].id = ids[i];
        s->members[i].role =
            i < 2 ? BALEEN__CONTROL__V1__ROLE__ROLE_WORKER : BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER;
        s->members[i].incarnation = 100 + ids[i];
        s->members[i].data_address = i == 0 ? address : NULL;
        s->pointers[i] = &s->members[i];
    }
    s->rank_member[0] = 4;
    s->rank_member[1] = 9;
    for (uint32_t i = 0; i < N_LAYER * N_EXPERT; i++) {
        s->first[i] = i;
        s->owner[i] = i % 2;
    }
    s->first[N_LAYER * N_EXPERT] = N_LAYER * N_EXPERT;
    s->placement.n_layer = N_LAYER;
    s->placement.n_expert = N_EXPERT;
    s->placement.n_rank_member = 2;
    s->placement.rank_member = s->rank_member;
    s->placement.n_first = N_LAYER * N_EXPERT + 1;
    s->placement.first = s->first;
    s->placement.n_owner = N_LAYER * N_EXPERT;
    s->placement.owner = s->owner;
    s->epoch.number = number;
    s->epoch.cluster = CLUSTER;
    s->epoch.n_members = 3;
    s->epoch.members = s->pointers;
    s->epoch.placement = &s->placement;
}

static void say_prepare(script_epoch *s)
{
    Baleen__Control__V1__Prepare prepare = BALEEN__CONTROL__V1__PREPARE__INIT;
    coordinator_word word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    prepare.epoch = &s->epoch;
    word.prepare = &prepare;
    say(&word, BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_PREPARE);
}

static void say_commit(uint64_t number)
{
    script_epoch s;
    Baleen__Control__V1__Commit commit = BALEEN__CONTROL__V1__COMMIT__INIT;
    coordinator_word word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    script_epoch_init(&s, number);
    commit.epoch = &s.epoch;
    word.commit = &commit;
    say(&word, BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_COMMIT);
}

static void say_retire(uint64_t oldest)
{
    Baleen__Control__V1__Retire retire = BALEEN__CONTROL__V1__RETIRE__INIT;
    coordinator_word word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    retire.epoch = oldest;
    word.retire = &retire;
    say(&word, BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_RETIRE);
}

/* ----------------------------------------------------------------------------------------------------
 * member's side */

static void on_welcome(void *ctx, uint32_t member_id, uint64_t cluster)
{
    assert_ptr_equal(ctx, &g);
    g.n_welcome++;
    g.member_id = member_id;
    g.cluster = cluster;
}

static void on_prepare(void *ctx, pc_epoch *epoch)
{
    (void)ctx;
    g.n_prepare++;
    pc_epoch_release(g.kept);
    g.kept = pc_epoch_hold(epoch); /* loading takes a while */
}

static void on_abort(void *ctx, uint64_t epoch)
{
    (void)ctx;
    g.aborted = epoch;
}

static void on_commit(void *ctx, pc_epoch *epoch)
{
    (void)ctx;
    g.n_commit++;
    if (!g.leave_commit_open) {
        pc_member_committed(g.member, epoch->number);
    }
}

static void on_retire(void *ctx, uint64_t oldest)
{
    (void)ctx;
    g.retired = oldest;
}

static void on_stats(void *ctx, const Baleen__Control__V1__ClusterStats *stats)
{
    (void)ctx;
    g.n_stats++;
    assert_int_equal(stats->n_members, 1);
    assert_int_equal(stats->members[0]->member_id, 42);
}

static void on_drain(void *ctx)
{
    (void)ctx;
    g.n_drain++;
}

static void on_refused(void *ctx, cm_status status, const char *text)
{
    (void)ctx;
    g.n_refused++;
    g.refused_status = status;
    snprintf(g.refused_text, sizeof(g.refused_text), "%s", text);
}

static const pc_member_events g_events = {.welcome = on_welcome,
                                          .prepare = on_prepare,
                                          .abort = on_abort,
                                          .commit = on_commit,
                                          .retire = on_retire,
                                          .cluster_stats = on_stats,
                                          .drain = on_drain,
                                          .refused = on_refused};

static void member_start(void)
{
    const pc_member_options options = {.coordinator = g.address,
                                       .role = BALEEN__CONTROL__V1__ROLE__ROLE_WORKER,
                                       .data_address = "10.0.0.1:7000",
                                       .fingerprint = "f00d",
                                       .expert_bytes_max = 6000,
                                       .n_layer = N_LAYER,
                                       .n_expert = N_EXPERT,
                                       .expert_bytes = 1000};
    g.member = pc_member_create(g.loop, &options, &g_events, &g);
}

static void note_log(void *ctx, cm_log_level level, const char *text)
{
    (void)ctx;
    if (level == CM_LOG_WARN && strstr(text, "ignored") != NULL) {
        g.n_stale_warnings++;
    }
}

static int set_up(void **state)
{
    (void)state;
    memset(&g, 0, sizeof(g));
    g.answer_id = 4;
    cm_log_handler(note_log, NULL);
    cm_arena_init(&g.arena, "script", 1 << 16, 1 << 20);
    assert_int_equal(pc_loop_create(&g.loop), CM_OK);
    pc_loop_before_sleep(g.loop, hook, NULL);
    server_start("127.0.0.1:0");
    member_start();
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    pc_epoch_release(g.kept);
    if (g.member != NULL) {
        pc_member_destroy(g.member);
    }
    if (g.server != NULL) {
        pc_rpc_server_destroy(g.server);
    }
    pc_loop_destroy(g.loop);
    cm_arena_fini(&g.arena);
    cm_log_handler(NULL, NULL);
    return 0;
}

/* ------------------------------------------------------------------------------------------------------------
 * tests */

static bool is_welcome(void)
{
    return g.n_welcome == 1;
}

static void test_welcome(void **state)
{
    (void)state;
    assert_false(pc_member_connected(g.member));
    until(is_welcome);
    assert_true(pc_member_connected(g.member));
    assert_int_equal(g.member_id, 4);
    assert_int_equal(g.cluster, CLUSTER);
    assert_int_equal(g.hello_protocol, PR_CONTROL_VERSION);
    assert_int_equal(g.hello_id, 0);
    assert_int_equal(g.hello_cluster, 0);
    assert_int_equal(g.hello_epoch, 0);
    assert_int_equal(g.hello_role, BALEEN__CONTROL__V1__ROLE__ROLE_WORKER);
    assert_string_equal(g.hello_data_address, "10.0.0.1:7000");
    assert_string_equal(g.hello_fingerprint, "f00d");
}

static bool beats_carry_rows(void)
{
    return g.n_heartbeat >= 3 && g.beat_rows == 17;
}

static void test_heartbeats_carry_stats(void **state)
{
    (void)state;
    until(is_welcome);
    cm_stat_add(CM_STAT_worker_rows, 17 - cm_stat_get(CM_STAT_worker_rows));
    until(beats_carry_rows);
    assert_int_equal(g.beat_epoch, 0);
}

static bool prepare_came(void)
{
    return g.n_prepare == 1;
}

static bool prepared_11(void)
{
    return g.prepared_epoch == 11;
}

static bool aborted_11(void)
{
    return g.aborted == 11;
}

static void test_prepare_and_abort(void **state)
{
    script_epoch s;
    Baleen__Control__V1__Abort abort_word = BALEEN__CONTROL__V1__ABORT__INIT;
    coordinator_word word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    (void)state;
    until(is_welcome);
    script_epoch_init(&s, 11);
    say_prepare(&s);
    until(prepare_came);
    assert_int_equal(g.kept->number, 11);
    assert_int_equal(g.kept->n_member, 3);
    const struct pc_epoch_member *nine = pc_epoch_member_find(g.kept, 9);
    assert_non_null(nine);
    assert_string_equal(nine->data_address, "10.0.0.9:7000");
    assert_int_equal(nine->incarnation, 109);
    assert_string_equal(pc_epoch_member_find(g.kept, 4)->data_address, "");
    assert_int_equal(pc_epoch_member_find(g.kept, 2)->role, BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER);
    assert_null(pc_epoch_member_find(g.kept, 3));
    uint32_t n_owner;
    assert_int_equal(pr_placement_owners(g.kept->placement, 1, 2, &n_owner)[0], 1);
    pc_member_prepared(g.member, 11, CM_E_IO, "disk on fire");
    until(prepared_11);
    assert_int_equal(g.prepared_status, CM_E_IO);
    assert_string_equal(g.prepared_text, "disk on fire");
    abort_word.epoch = 11;
    word.abort = &abort_word;
    say(&word, BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_ABORT);
    until(aborted_11);
}

static void test_broken_epoch_is_answered(void **state)
{
    script_epoch s;
    (void)state;
    until(is_welcome);
    script_epoch_init(&s, 11);
    s.rank_member[1] = 2; /* the router */
    say_prepare(&s);
    until(prepared_11);
    assert_int_equal(g.n_prepare, 0);
    assert_int_equal(g.prepared_status, CM_E_PROTOCOL);
    assert_non_null(strstr(g.prepared_text, "member 2"));
}

static void unpack_fails(script_epoch *s, const char *why)
{
    pc_epoch *epoch = NULL;
    cm_error err = {0};
    assert_int_equal(pc_epoch_unpack(&s->epoch, &epoch, &err), CM_E_PROTOCOL);
    assert_null(epoch);
    assert_non_null(strstr(err.text, why));
}

static void test_epoch_unpack_checks(void **state)
{
    script_epoch s;
    pc_epoch *epoch;
    (void)state;
    script_epoch_init(&s, 0);
    unpack_fails(&s, "epoch 0");
    script_epoch_init(&s, 5);
    s.members[1].id = 9;
    unpack_fails(&s, "twice");
    script_epoch_init(&s, 5);
    s.rank_member[0] = 77;
    unpack_fails(&s, "member 77");
    script_epoch_init(&s, 5);
    s.owner[0] = 2;
    unpack_fails(&s, "rank 2");
    script_epoch_init(&s, 5);
    s.epoch.placement = NULL;
    s.epoch.n_members = 0;
    assert_int_equal(pc_epoch_unpack(&s.epoch, &epoch, NULL), CM_OK);
    assert_null(epoch->placement);
    assert_null(pc_epoch_member_find(epoch, 1));
    pc_epoch_release(epoch);
    pc_epoch_release(NULL);
}

static bool committed_12(void)
{
    return g.committed_epoch == 12 && g.beat_epoch == 12;
}

static bool retired_12(void)
{
    return g.retired == 12;
}

static void test_commit_and_retire(void **state)
{
    (void)state;
    until(is_welcome);
    say_commit(12);
    until(committed_12);
    assert_int_equal(g.n_commit, 1);
    say_retire(12);
    until(retired_12);
}

static bool committed_twice(void)
{
    return g.n_committed == 2;
}

static void test_epochs_go_only_upward(void **state)
{
    (void)state;
    until(is_welcome);
    say_commit(12);
    say_commit(11); /* older: ignored */
    say_retire(12);
    until(retired_12);
    assert_int_equal(g.n_commit, 1);
    assert_int_equal(g.n_stale_warnings, 1);
    say_commit(12); /* said again: answered again, but no news */
    until(committed_twice);
    assert_int_equal(g.n_commit, 1);
    assert_int_equal(g.committed_epoch, 12);
}

static bool welcome_twice(void)
{
    return g.n_welcome == 2;
}

static bool member_is_alone(void)
{
    return !pc_member_connected(g.member);
}

static bool peer_reported(void)
{
    return g.reported_member == 9;
}

static void test_session_lost(void **state)
{
    char address[128];
    (void)state;
    until(is_welcome);
    say_commit(12);
    until(committed_12);
    snprintf(address, sizeof(address), "%s", g.address);
    pc_rpc_server_destroy(g.server);
    g.server = NULL;
    until(member_is_alone);
    pc_member_prepared(g.member, 13, CM_OK, NULL); /* nobody there: no harm */
    pc_member_report_peer(g.member, 9, CM_E_RESET);
    server_start(address);
    until(welcome_twice);
    assert_int_equal(g.n_hello, 2);
    assert_int_equal(g.hello_id, 4);
    assert_int_equal(g.hello_cluster, CLUSTER);
    assert_int_equal(g.hello_epoch, 12);
    assert_true(g.hello_incarnation == g.hello_incarnation_before && g.hello_incarnation != 0);
    until(peer_reported); /* the next coordinator hears of it */
    assert_int_equal(g.reported_status, CM_E_RESET);
    assert_int_equal(g.prepared_epoch, 0);
}

static void test_session_closed_by_coordinator(void **state)
{
    (void)state;
    until(is_welcome);
    pc_call_finish(g.session, PC_CODE_UNAVAILABLE, "restarting", NULL, 0, 0);
    until(welcome_twice);
    assert_int_equal(g.hello_id, 4);
}

static bool heard_commit(void)
{
    return g.n_commit == 1;
}

static bool hello_twice_in_force(void)
{
    return g.n_welcome == 2 && g.beat_epoch == 12;
}

/* The engine switches while the coordinator is away: the next session says so. */
static void test_committed_while_alone(void **state)
{
    char address[128];
    (void)state;
    g.leave_commit_open = true;
    until(is_welcome);
    say_commit(12);
    until(heard_commit);
    snprintf(address, sizeof(address), "%s", g.address);
    pc_rpc_server_destroy(g.server);
    g.server = NULL;
    until(member_is_alone);
    pc_member_committed(g.member, 12);
    server_start(address);
    until(hello_twice_in_force);
    assert_int_equal(g.hello_epoch, 12);
    assert_int_equal(g.n_committed, 0);
}

static bool is_refused(void)
{
    return g.n_refused == 1 && g.n_sessions_over == 1;
}

static void stop(void *arg)
{
    pc_loop_stop(arg);
}

static void test_refused_for_good(void **state)
{
    (void)state;
    pc_timer *three_tries = pc_timer_create(g.loop, stop, g.loop);
    g.answer_id = 0;
    g.refuse_final = true;
    until(is_refused);
    assert_int_equal(g.refused_status, CM_E_CORRUPT);
    assert_string_equal(g.refused_text, "another checkpoint");
    pc_timer_set(three_tries, 300); /* nothing to wait for but that nothing comes */
    pc_loop_run(g.loop);
    pc_timer_destroy(three_tries);
    assert_int_equal(g.n_hello, 1);
    assert_int_equal(g.n_welcome, 0);
    assert_false(pc_member_connected(g.member));
}

static bool two_hellos(void)
{
    if (g.n_hello == 1) {
        g.answer_id = 4; /* the second time it may come in */
    }
    return g.n_welcome == 1;
}

static void test_refused_for_now(void **state)
{
    (void)state;
    g.answer_id = 0;
    until(two_hellos);
    assert_int_equal(g.n_hello, 2);
    assert_int_equal(g.n_refused, 0);
}

static bool the_rest_came(void)
{
    return g.n_stats == 1 && g.n_drain == 1 && g.reported_member == 9 && g.n_left == 1;
}

static void test_stats_drain_report_leave(void **state)
{
    Baleen__Control__V1__MemberStats one = BALEEN__CONTROL__V1__MEMBER_STATS__INIT, *pointers[] = {&one};
    Baleen__Control__V1__ClusterStats stats = BALEEN__CONTROL__V1__CLUSTER_STATS__INIT;
    Baleen__Control__V1__Drain drain = BALEEN__CONTROL__V1__DRAIN__INIT;
    coordinator_word word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    (void)state;
    until(is_welcome);
    one.member_id = 42;
    one.role = BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER;
    stats.members = pointers;
    stats.n_members = 1;
    word.cluster_stats = &stats;
    say(&word, BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_CLUSTER_STATS);
    word.drain = &drain;
    say(&word, BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_DRAIN);
    pc_member_report_peer(g.member, 9, CM_E_RESET);
    pc_member_leave(g.member);
    until(the_rest_came);
    assert_int_equal(g.reported_status, CM_E_RESET);
    assert_true(pc_member_connected(g.member)); /* until the coordinator ends the session */
    pc_call_finish(g.session, PC_CODE_OK, NULL, NULL, 0, 0);
    until(member_is_alone);
    assert_int_equal(g.n_hello, 1);
}

static bool left_once(void)
{
    return g.n_left == 1;
}

static bool left_twice(void)
{
    return g.n_left == 2;
}

/* A coordinator that was started again does not know who wants to go. */
static void test_leave_is_said_again(void **state)
{
    char address[128];
    (void)state;
    until(is_welcome);
    pc_member_leave(g.member);
    until(left_once);
    snprintf(address, sizeof(address), "%s", g.address);
    pc_rpc_server_destroy(g.server);
    g.server = NULL;
    until(member_is_alone);
    server_start(address);
    until(left_twice);
    assert_int_equal(g.n_hello, 2);
    pc_call_finish(g.session, PC_CODE_OK, NULL, NULL, 0, 0);
    until(member_is_alone);
    assert_int_equal(g.n_hello, 2);
}

static void test_garbage_starts_afresh(void **state)
{
    (void)state;
    until(is_welcome);
    assert_int_equal(pc_call_send(g.session, "\xff\xff\xff", 3), CM_OK);
    until(welcome_twice);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_welcome),
        TEST(test_heartbeats_carry_stats),
        TEST(test_prepare_and_abort),
        TEST(test_broken_epoch_is_answered),
        cmocka_unit_test(test_epoch_unpack_checks),
        TEST(test_commit_and_retire),
        TEST(test_epochs_go_only_upward),
        TEST(test_session_lost),
        TEST(test_session_closed_by_coordinator),
        TEST(test_committed_while_alone),
        TEST(test_refused_for_good),
        TEST(test_refused_for_now),
        TEST(test_stats_drain_report_leave),
        TEST(test_leave_is_said_again),
        TEST(test_garbage_starts_afresh),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
