/* Two coordinators on a real etcd, with members, all in one process: whoever is active may die at any point
 * of a change, be cut off or lose etcd. Members keep their ids and the epoch in force; no number means two
 * epochs; the change is completed or made anew. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/proc/member.h"
#include "common/proc/rpc_client.h"
#include "coordinator/coordinator.h"
#include "coordinator/epoch.h"
#include "coordinator/etcd_log.h"
#include "proto/pack.h"
#include "tests/unit/etcd_rig.h"

enum { LAYERS = 2, EXPERTS = 6, EXPERT_BYTES = 100, PEERS = 6, EPOCHS = 64, GUARD_MS = 60000 };

typedef struct peer {
    pc_member *member;
    uint32_t role, id;
    uint64_t epoch, prepare; /* in force; last asked to prepare */
    uint32_t n_members, n_commits;
    bool holds; /* does not answer Prepare */
    uint64_t key_epoch;
    uint8_t key[NET_KEY_BYTES]; /* the last given */
    uint32_t n_same_keys;       /* given again */
} peer;

typedef struct side {
    relay *relay; /* to etcd */
    co_config config;
    co_coordinator *coordinator;
    co_role_now role;
    uint32_t role_at; /* on the count of all changes of roles */
} side;

static struct {
    etcd_server server;
    pc_loop *loop;
    pc_timer *guard;
    bool guarded;
    bool (*until)(void);
    side sides[2];
    uint32_t n_roles, n_tests;
    char prefix[64], members_list[128];
    peer peers[PEERS];
    uint32_t n_peers;
    uint64_t wanted_epoch, wanted_prepare; /* of conditions */
    uint32_t epoch_members[EPOCHS];        /* number -> members in it, as first heard */

    co_etcd *client;
    bool answered, found;
} g;

/* ---- members ---- */

static void on_welcome(void *ctx, uint32_t member_id, uint64_t cluster)
{
    (void)cluster;
    ((peer *)ctx)->id = member_id;
}

static void on_prepare(void *ctx, pc_epoch *epoch)
{
    peer *p = ctx;
    p->prepare = epoch->number;
    if (!p->holds) {
        pc_member_prepared(p->member, epoch->number, CM_OK, NULL);
    }
}

static void on_commit(void *ctx, pc_epoch *epoch)
{
    peer *p = ctx;
    uint32_t digest = 0; /* of who is in it */
    assert_true(epoch->number > p->epoch && epoch->number < EPOCHS);
    for (uint32_t i = 0; i < epoch->n_member; i++) {
        digest = digest * 31 + epoch->members[i].id;
    }
    if (g.epoch_members[epoch->number] == 0) {
        g.epoch_members[epoch->number] = digest;
    }
    assert_int_equal(g.epoch_members[epoch->number], digest); /* no number means two epochs */
    p->epoch = epoch->number;
    p->n_members = epoch->n_member;
    p->n_commits++;
    pc_member_committed(p->member, epoch->number);
}

static void on_frame_key(void *ctx, uint64_t cluster, uint64_t epoch, const uint8_t *key)
{
    peer *p = ctx;
    (void)cluster;
    if (epoch == p->key_epoch) {
        assert_memory_equal(key, p->key, sizeof(p->key)); /* whoever is active: an epoch has one */
        p->n_same_keys++;
    }
    p->key_epoch = epoch;
    memcpy(p->key, key, sizeof(p->key));
}

static const pc_member_events g_member_events = {
    .welcome = on_welcome, .frame_key = on_frame_key, .prepare = on_prepare, .commit = on_commit};

static peer *join_at(uint32_t role, const char *coordinators, bool holds)
{
    assert_true(g.n_peers < PEERS);
    peer *p = &g.peers[g.n_peers++];
    p->role = role;
    p->holds = holds;
    pc_member_options options = {.coordinator = coordinators,
                                 .role = role,
                                 .data_address = role == CO_ROLE_GATEWAY ? NULL : "tcp:127.0.0.1:1",
                                 .fingerprint = "f00d",
                                 .expert_bytes_max =
                                     role == CO_ROLE_WORKER ? LAYERS * EXPERTS * EXPERT_BYTES : 0,
                                 .n_layer = LAYERS,
                                 .n_expert = EXPERTS,
                                 .expert_bytes = EXPERT_BYTES};
    p->member = pc_member_create(g.loop, &options, &g_member_events, p);
    return p;
}

static peer *join(uint32_t role)
{
    return join_at(role, g.members_list, false);
}

static void release(peer *p)
{
    p->holds = false;
    pc_member_prepared(p->member, p->prepare, CM_OK, NULL);
}

/* ---- coordinators ---- */

static void on_role(void *ctx, co_role_now now)
{
    side *s = ctx;
    s->role = now;
    s->role_at = ++g.n_roles;
}

static void start(uint32_t i)
{
    static const co_coordinator_events events = {.role = on_role};
    side *s = &g.sides[i];
    cm_error err = {0};
    if (co_coordinator_create(g.loop, &s->config, &s->coordinator, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    co_coordinator_watch(s->coordinator, &events, s);
}

/* As kill -9 looks from outside: connections end, the lease stays. */
static void kill_side(uint32_t i)
{
    co_coordinator_destroy(g.sides[i].coordinator);
    g.sides[i].coordinator = NULL;
    g.sides[i].role = CO_ROLE_NOW_UNKNOWN;
}

/* ---- the loop until something is so ---- */

static void check(void *arg)
{
    (void)arg;
    if (g.until != NULL && g.until()) {
        g.until = NULL;
        pc_loop_stop(g.loop);
    }
}

static void guard(void *arg)
{
    (void)arg;
    g.guarded = true;
    pc_loop_stop(g.loop);
}

static void run_until(bool (*until)(void))
{
    g.until = until;
    pc_timer_set(g.guard, GUARD_MS);
    pc_loop_run(g.loop);
    pc_timer_clear(g.guard);
    assert_false(g.guarded);
}

static bool first_active(void)
{
    return g.sides[0].role == CO_ROLE_NOW_ACTIVE;
}

static bool first_standby(void)
{
    return g.sides[0].role == CO_ROLE_NOW_STANDBY;
}

static bool second_active(void)
{
    return g.sides[1].role == CO_ROLE_NOW_ACTIVE;
}

static bool second_standby(void)
{
    return g.sides[1].role == CO_ROLE_NOW_STANDBY;
}

static bool all_connected(void)
{
    for (uint32_t i = 0; i < g.n_peers; i++) {
        if (!pc_member_connected(g.peers[i].member)) {
            return false;
        }
    }
    return true;
}

static bool same_epoch(void)
{
    for (uint32_t i = 0; i < g.n_peers; i++) {
        if (g.peers[i].epoch < g.wanted_epoch || g.peers[i].n_members != g.n_peers) {
            return false;
        }
    }
    return all_connected();
}

static bool last_prepares(void)
{
    return g.peers[g.n_peers - 1].prepare > g.wanted_prepare;
}

static bool is_answered(void)
{
    return g.answered;
}

/* ---- a client of etcd ---- */

static void on_answer(void *ctx, cm_status status, const void *reply, const char *text)
{
    (void)ctx;
    (void)text;
    const Etcdserverpb__RangeResponse *range = reply;
    g.answered = true;
    g.found = status == CM_OK && range->n_kvs > 0;
}

static bool epoch_is_stored(uint64_t number)
{
    char key[160];
    Etcdserverpb__RangeRequest range = ETCDSERVERPB__RANGE_REQUEST__INIT;
    snprintf(key, sizeof(key), "%s/epochs/%020llu", g.prefix, (unsigned long long)number);
    range.has_key = true;
    range.key = (ProtobufCBinaryData){strlen(key), (uint8_t *)key};
    g.answered = false;
    co_etcd_call(g.client, "/etcdserverpb.KV/Range", &range.base, &etcdserverpb__range_response__descriptor,
                 30000, on_answer, NULL);
    run_until(is_answered);
    return g.found;
}

/* ---- status ---- */

static void ask_status(uint32_t i, bool *standby_out, char active_out[128], char why_out[480])
{
    cm_bytes reply;
    cm_error err = {0};
    cm_arena arena;
    Baleen__Control__V1__StatusReply *status = NULL;
    pc_channel *channel = pc_channel_create(g.loop, co_coordinator_address(g.sides[i].coordinator));
    cm_bytes_init(&reply, 0);
    cm_arena_init(&arena, "status", 1 << 16, 1 << 20);
    assert_int_equal(pc_unary_wait(channel, "/baleen.control.v1.Admin/Status", "", 0, 30000, &reply, &err),
                     CM_OK);
    assert_int_equal(pr_unpack(&baleen__control__v1__status_reply__descriptor, reply.data, reply.len, &arena,
                               (ProtobufCMessage **)&status),
                     CM_OK);
    *standby_out = status->standby;
    snprintf(active_out, 128, "%s", status->active != NULL ? status->active : "");
    snprintf(why_out, 480, "%s", status->change != NULL ? status->change : "");
    if (status->standby) {
        assert_int_equal(status->n_members, 1);
        assert_string_equal(status->members[0]->state, "standby");
    }
    cm_arena_fini(&arena);
    cm_bytes_fini(&reply);
    pc_channel_destroy(channel);
}

/* ---- set-up ---- */

static int group_setup(void **state)
{
    (void)state;
    etcd_server_start(&g.server);
    return 0;
}

static int group_teardown(void **state)
{
    (void)state;
    etcd_server_stop(&g.server);
    return 0;
}

static void set(uint32_t i, const char *name, const char *value)
{
    cm_error err = {0};
    if (cm_cfg_set(&co_config_table, &g.sides[i].config, name, value, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
}

static void configure(uint32_t i)
{
    char url[256];
    g.sides[i].relay = relay_create(pc_loop_base(g.loop), g.server.client);
    snprintf(url, sizeof(url), "etcd://%s%s", relay_address(g.sides[i].relay), g.prefix);
    cm_cfg_defaults(&co_config_table, &g.sides[i].config);
    set(i, "store", url);
    set(i, "heartbeat_ms", "20");
    set(i, "lease_ms", "10m"); /* a busy machine is no silence */
    set(i, "claim_ms", "2s");
    set(i, "workers_min", "2");
}

/* The first is active, the second stands by; two workers, a router and a gateway are members. */
static int setup(void **state)
{
    (void)state;
    pc_addresses endpoints;
    etcd_server server = g.server;
    uint32_t n_tests = g.n_tests + 1;
    memset(&g, 0, sizeof(g));
    g.server = server;
    g.n_tests = n_tests;
    assert_int_equal(pc_loop_create(&g.loop), CM_OK);
    g.guard = pc_timer_create(g.loop, guard, NULL);
    pc_loop_before_sleep(g.loop, check, NULL);
    assert_int_equal(pc_addresses_parse("etcd", g.server.client, &endpoints, NULL), CM_OK);
    g.client = co_etcd_create(g.loop, &endpoints);
    snprintf(g.prefix, sizeof(g.prefix), "/takeover/%u", n_tests);
    configure(0);
    configure(1);
    start(0);
    run_until(first_active);
    start(1);
    run_until(second_standby);
    snprintf(g.members_list, sizeof(g.members_list), "%s,%s", co_coordinator_address(g.sides[0].coordinator),
             co_coordinator_address(g.sides[1].coordinator));
    static const uint32_t roles[] = {CO_ROLE_GATEWAY, CO_ROLE_ROUTER, CO_ROLE_WORKER, CO_ROLE_WORKER};
    for (uint32_t i = 0; i < 4; i++) {
        join(roles[i]);
    }
    run_until(same_epoch);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < g.n_peers; i++) {
        pc_member_destroy(g.peers[i].member);
    }
    for (uint32_t i = 0; i < 2; i++) {
        co_coordinator_destroy(g.sides[i].coordinator);
        relay_destroy(g.sides[i].relay);
        cm_cfg_free(&co_config_table, &g.sides[i].config);
    }
    co_etcd_destroy(g.client);
    pc_timer_destroy(g.guard);
    pc_loop_destroy(g.loop);
    return 0;
}

/* What serving needs is as it was: the first four have their ids and the epoch, and heard of no other. */
static void assert_undisturbed(const peer before[4])
{
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(g.peers[i].id, before[i].id);
        assert_int_equal(g.peers[i].epoch, before[i].epoch);
        assert_int_equal(g.peers[i].n_commits, before[i].n_commits);
    }
}

/* ---- tests ---- */

static void a_standby_sends_members_on(void **state)
{
    (void)state;
    bool standby;
    char active[128], why[480];
    g.wanted_epoch = g.peers[0].epoch + 1;
    join_at(CO_ROLE_WORKER, co_coordinator_address(g.sides[1].coordinator), false);
    run_until(same_epoch);
    ask_status(1, &standby, active, why);
    assert_true(standby);
    assert_string_equal(active, co_coordinator_address(g.sides[0].coordinator));
    ask_status(0, &standby, active, why);
    assert_false(standby);
}

static void killed_at_rest(void **state)
{
    (void)state;
    peer before[4];
    memcpy(before, g.peers, sizeof(before));
    kill_side(0);
    run_until(second_active);
    run_until(all_connected);
    assert_undisturbed(before);
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(g.peers[i].n_same_keys, before[i].n_same_keys + 1);
    }
    g.wanted_epoch = before[0].epoch + 1;
    peer *p = join(CO_ROLE_WORKER);
    run_until(same_epoch);
    assert_int_equal(p->id, 5); /* ids go on */
    for (uint32_t i = 0; i < g.n_peers; i++) {
        assert_memory_equal(g.peers[i].key, p->key, sizeof(p->key));
    }
}

static void killed_while_a_prepare_is_outstanding(void **state)
{
    (void)state;
    peer before[4];
    memcpy(before, g.peers, sizeof(before));
    peer *p = join_at(CO_ROLE_WORKER, g.members_list, true);
    run_until(last_prepares);
    uint64_t promised = p->prepare;
    kill_side(0);
    assert_undisturbed(before);
    g.wanted_prepare = promised;
    run_until(last_prepares); /* by the other, with a number of its own */
    assert_undisturbed(before);
    release(p);
    g.wanted_epoch = promised + 1;
    run_until(same_epoch);
}

/* The epoch is in the log, nobody has heard of it: it is the one that comes into force. */
static void killed_before_a_stored_commit_is_sent(void **state)
{
    (void)state;
    peer before[4];
    memcpy(before, g.peers, sizeof(before));
    peer *p = join_at(CO_ROLE_WORKER, g.members_list, true);
    run_until(last_prepares);
    uint64_t number = p->prepare;
    relay_hold(g.sides[0].relay, false, true);
    release(p);
    while (!epoch_is_stored(number)) {
    }
    assert_undisturbed(before);
    kill_side(0);
    g.wanted_epoch = number;
    run_until(same_epoch);
    for (uint32_t i = 0; i < g.n_peers; i++) {
        assert_int_equal(g.peers[i].epoch, number);
    }
    assert_int_equal(p->id, 5);
}

/* It lives, members still talk to it, but it cannot renew its claim. */
static void cut_off_from_etcd(void **state)
{
    (void)state;
    bool standby;
    char active[128], why[480];
    peer before[4];
    memcpy(before, g.peers, sizeof(before));
    peer *p = join_at(CO_ROLE_WORKER, g.members_list, true);
    run_until(last_prepares);
    relay_hold(g.sides[0].relay, true, true);
    release(p); /* a decision it can make and not write */
    run_until(second_active);
    assert_int_equal(g.sides[0].role, CO_ROLE_NOW_STANDBY);
    assert_true(g.sides[0].role_at < g.sides[1].role_at);
    g.wanted_epoch = before[0].epoch + 1;
    run_until(same_epoch);
    relay_hold(g.sides[0].relay, false, false);
    do {
        ask_status(0, &standby, active, why);
        assert_true(standby);
    } while (active[0] == 0);
    assert_string_equal(active, co_coordinator_address(g.sides[1].coordinator));
}

static void etcd_is_away(void **state)
{
    (void)state;
    bool standby;
    char active[128], why[480];
    peer before[4];
    memcpy(before, g.peers, sizeof(before));
    etcd_server_pause(&g.server);
    peer *p = join(CO_ROLE_WORKER);
    run_until(first_standby);
    ask_status(0, &standby, active, why);
    assert_true(standby);
    assert_string_equal(active, "");
    assert_non_null(strstr(why, "etcd"));
    assert_non_null(strstr(why, relay_address(g.sides[0].relay)));
    assert_undisturbed(before);
    assert_int_equal(p->epoch, 0); /* the change waits */
    etcd_server_go_on(&g.server);
    g.wanted_epoch = before[0].epoch + 1;
    run_until(same_epoch);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_standby_sends_members_on, setup, teardown),
        cmocka_unit_test_setup_teardown(killed_at_rest, setup, teardown),
        cmocka_unit_test_setup_teardown(killed_while_a_prepare_is_outstanding, setup, teardown),
        cmocka_unit_test_setup_teardown(killed_before_a_stored_commit_is_sent, setup, teardown),
        cmocka_unit_test_setup_teardown(cut_off_from_etcd, setup, teardown),
        cmocka_unit_test_setup_teardown(etcd_is_away, setup, teardown),
    };
    return cmocka_run_group_tests(tests, group_setup, group_teardown);
}
