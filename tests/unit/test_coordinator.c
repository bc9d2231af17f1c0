/* The coordinator with real sessions, all in one process: members join, die, leave and outlive a restart; the
 * admin service answers; errors name what to do. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/proc/member.h"
#include "common/proc/rpc_client.h"
#include "coordinator/coordinator.h"
#include "coordinator/epoch.h"
#include "proto/pack.h"
#include "tests/support/temp_folder.h"
#include "tools/baleen/cert_maker.h"

enum { LAYERS = 2, EXPERTS = 6, EXPERT_BYTES = 100, PEERS = 6, GUARD_MS = 30000 };

typedef struct peer {
    pc_member *member;
    uint32_t role, id;
    uint64_t epoch, retired; /* in force; last Retire */
    uint32_t n_members, n_ranks, n_stats, n_prepares, n_drains;
    uint32_t n_loads;
    uint8_t level[LAYERS * EXPERTS]; /* of the last ClusterLoad */
    bool all_ready;                  /* by the last ClusterStats */
    bool mute;                       /* never answers a prepare */
    uint64_t key_epoch;
    uint8_t key[NET_KEY_BYTES]; /* of the data plane, the last given */
    uint32_t n_keys;
    cm_status refused;
    char text[420];
} peer;

typedef struct world world;
typedef bool (*world_fn)(const world *w);

struct world {
    pc_loop *loop;
    co_config config;
    co_coordinator *coordinator;
    pc_timer *guard;
    world_fn until;
    bool stopped, guarded;
    peer peers[PEERS];
    uint32_t n_peers;
    uint64_t wanted_epoch; /* argument of conditions */
    char folder[T_FOLDER_MAX];
};

/* ---- members ---- */

static void on_welcome(void *ctx, uint32_t member_id, uint64_t cluster)
{
    (void)cluster;
    ((peer *)ctx)->id = member_id;
}

static void on_frame_key(void *ctx, uint64_t cluster, uint64_t epoch, const uint8_t *key)
{
    peer *p = ctx;
    assert_int_not_equal(cluster, 0);
    p->key_epoch = epoch;
    memcpy(p->key, key, sizeof(p->key));
    p->n_keys++;
}

static void on_prepare(void *ctx, pc_epoch *epoch)
{
    peer *p = ctx;
    p->n_prepares++;
    if (p->mute) {
        return;
    }
    pc_member_prepared(p->member, epoch->number, CM_OK, NULL);
}

static void on_abort(void *ctx, uint64_t epoch)
{
    (void)ctx;
    (void)epoch;
}

static void on_commit(void *ctx, pc_epoch *epoch)
{
    peer *p = ctx;
    assert_int_equal(p->key_epoch, epoch->number); /* links of the commit find it */
    p->epoch = epoch->number;
    p->n_members = epoch->n_member;
    p->n_ranks = epoch->placement->n_rank;
    pc_member_committed(p->member, epoch->number);
}

static void on_retire(void *ctx, uint64_t oldest)
{
    peer *p = ctx;
    assert_true(p->role == CO_ROLE_WORKER ? oldest == p->epoch : oldest < p->epoch);
    p->retired = oldest;
}

static void on_stats(void *ctx, const Baleen__Control__V1__ClusterStats *stats)
{
    peer *p = ctx;
    p->n_stats = (uint32_t)stats->n_members;
    p->all_ready = !stats->changing;
    for (size_t i = 0; i < stats->n_members; i++) {
        p->all_ready &=
            strcmp(stats->members[i]->state, "ready") == 0 && stats->members[i]->epoch == p->epoch;
    }
}

static void on_load(void *ctx, const Baleen__Control__V1__ClusterLoad *load)
{
    peer *p = ctx;
    assert_int_equal(load->n_layer, LAYERS);
    assert_int_equal(load->n_expert, EXPERTS);
    assert_int_equal(load->level.len, sizeof(p->level));
    memcpy(p->level, load->level.data, sizeof(p->level));
    p->n_loads++;
}

static void on_drain(void *ctx)
{
    peer *p = ctx;
    p->n_drains++;
    pc_member_leave(p->member);
}

static void on_refused(void *ctx, cm_status status, const char *text)
{
    peer *p = ctx;
    p->refused = status;
    snprintf(p->text, sizeof(p->text), "%s", text);
}

static const pc_member_events events = {.welcome = on_welcome,
                                        .frame_key = on_frame_key,
                                        .prepare = on_prepare,
                                        .abort = on_abort,
                                        .commit = on_commit,
                                        .retire = on_retire,
                                        .cluster_stats = on_stats,
                                        .cluster_load = on_load,
                                        .drain = on_drain,
                                        .refused = on_refused};

static peer *join(world *w, uint32_t role, const char *fingerprint)
{
    assert_true(w->n_peers < PEERS);
    peer *p = &w->peers[w->n_peers++];
    p->role = role;
    pc_member_options options = {.coordinator = co_coordinator_address(w->coordinator),
                                 .role = role,
                                 .data_address = role == CO_ROLE_GATEWAY ? NULL : "tcp:127.0.0.1:1",
                                 .fingerprint = fingerprint,
                                 .expert_bytes_max =
                                     role == CO_ROLE_WORKER ? LAYERS * EXPERTS * EXPERT_BYTES : 0,
                                 .n_layer = LAYERS,
                                 .n_expert = EXPERTS,
                                 .expert_bytes = EXPERT_BYTES};
    p->member = pc_member_create(w->loop, &options, &events, p);
    return p;
}

/* ---- the loop until something is so ---- */

static void world_check(void *arg)
{
    world *w = arg;
    if (w->until != NULL && w->until(w)) {
        w->until = NULL;
        pc_loop_stop(w->loop);
    }
}

static void world_guard(void *arg)
{
    world *w = arg;
    w->guarded = true;
    pc_loop_stop(w->loop);
}

static void run_until(world *w, world_fn until)
{
    w->until = until;
    pc_timer_set(w->guard, GUARD_MS);
    pc_loop_run(w->loop);
    pc_timer_clear(w->guard);
    assert_false(w->guarded);
}

static bool same_epoch(const world *w)
{
    uint32_t n_in = 0;
    for (uint32_t i = 0; i < w->n_peers; i++) {
        n_in += w->peers[i].member != NULL && w->peers[i].refused == CM_OK;
    }
    for (uint32_t i = 0; i < w->n_peers; i++) {
        const peer *p = &w->peers[i];
        bool worker = p->role == CO_ROLE_WORKER;
        if (p->member != NULL && p->refused == CM_OK &&
            (p->epoch < w->wanted_epoch || p->n_members != n_in || (worker && p->retired != p->epoch))) {
            return false;
        }
    }
    return true;
}

static bool has_stats(const world *w)
{
    for (uint32_t i = 0; i < w->n_peers; i++) {
        if (w->peers[i].role == CO_ROLE_GATEWAY && w->peers[i].n_stats == w->n_peers &&
            w->peers[i].all_ready) {
            return true;
        }
    }
    return false;
}

static bool last_is_refused(const world *w)
{
    return w->peers[w->n_peers - 1].refused != CM_OK;
}

static bool last_is_gone(const world *w)
{
    return !pc_member_connected(w->peers[w->n_peers - 1].member);
}

static bool all_connected(const world *w)
{
    for (uint32_t i = 0; i < w->n_peers; i++) {
        if (!pc_member_connected(w->peers[i].member)) {
            return false;
        }
    }
    return true;
}

static bool is_stopped(const world *w)
{
    return w->stopped;
}

/* ---- set-up ---- */

static void world_start(world *w)
{
    cm_error err = {0};
    if (co_coordinator_create(w->loop, &w->config, &w->coordinator, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
}

static void set(world *w, const char *name, const char *value)
{
    cm_error err = {0};
    if (cm_cfg_set(&co_config_table, &w->config, name, value, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
}

static int setup(void **state)
{
    world *w = cm_alloc(sizeof(*w));
    *state = w;
    if (pc_loop_create(&w->loop) != CM_OK) {
        return -1;
    }
    t_folder_make(w->folder, "coordinator");
    w->guard = pc_timer_create(w->loop, world_guard, w);
    pc_loop_before_sleep(w->loop, world_check, w);
    cm_cfg_defaults(&co_config_table, &w->config);
    set(w, "heartbeat_ms", "20");
    set(w, "lease_ms",
        "10m"); /* a busy machine is no silence, and no lease ends in place of what is tested */
    set(w, "workers_min", "2");
    return 0;
}

static int teardown(void **state)
{
    world *w = *state;
    for (uint32_t i = 0; i < w->n_peers; i++) {
        if (w->peers[i].member != NULL) {
            pc_member_destroy(w->peers[i].member);
        }
    }
    co_coordinator_destroy(w->coordinator);
    pc_timer_destroy(w->guard);
    pc_loop_destroy(w->loop);
    cm_cfg_free(&co_config_table, &w->config);
    t_folder_remove(w->folder);
    cm_free(w);
    return 0;
}

/* ---- tests ---- */

static void two_workers_a_router_a_gateway(world *w)
{
    join(w, CO_ROLE_GATEWAY, "f00d");
    join(w, CO_ROLE_ROUTER, "f00d");
    join(w, CO_ROLE_WORKER, "f00d");
    join(w, CO_ROLE_WORKER, "f00d");
    run_until(w, same_epoch);
}

static void members_join(void **state)
{
    world *w = *state;
    world_start(w);
    two_workers_a_router_a_gateway(w);
    for (uint32_t i = 0; i < 4; i++) {
        assert_true(w->peers[i].id >= 1 && w->peers[i].id <= 4);
        assert_int_equal(w->peers[i].n_ranks, 2);
        assert_int_equal(w->peers[i].n_prepares > 0, w->peers[i].role == CO_ROLE_WORKER);
    }
    run_until(w, has_stats);
}

static void status_tells_all(void **state)
{
    world *w = *state;
    cm_bytes reply;
    cm_error err = {0};
    cm_arena arena;
    Baleen__Control__V1__StatusReply *status = NULL;
    world_start(w);
    two_workers_a_router_a_gateway(w);
    pc_channel *channel = pc_channel_create(w->loop, co_coordinator_address(w->coordinator));
    cm_bytes_init(&reply, 0);
    assert_int_equal(pc_unary_wait(channel, "/baleen.control.v1.Admin/Status", "", 0, 10000, &reply, &err),
                     CM_OK);
    cm_arena_init(&arena, "status", 1 << 16, 1 << 20);
    assert_int_equal(pr_unpack(&baleen__control__v1__status_reply__descriptor, reply.data, reply.len, &arena,
                               (ProtobufCMessage **)&status),
                     CM_OK);
    assert_int_equal(status->n_members, 5);
    assert_int_equal(status->members[0]->member->role, CO_ROLE_COORDINATOR);
    assert_int_equal(status->members[0]->member->id, 0);
    assert_int_equal(status->members[0]->member->pid, getpid());
    assert_string_equal(status->members[0]->member->grpc_address, co_coordinator_address(w->coordinator));
    assert_string_equal(status->fingerprint, "f00d");
    assert_int_equal(status->epoch, w->peers[0].epoch);
    uint32_t n_expert = 0;
    for (uint32_t i = 1; i < 5; i++) {
        assert_string_equal(status->members[i]->state, "ready");
        n_expert += status->members[i]->n_expert;
    }
    assert_int_equal(n_expert, LAYERS * EXPERTS);
    char bad[] = {(char)0xff, (char)0xff};
    assert_int_not_equal(
        pc_unary_wait(channel, "/baleen.control.v1.Admin/Status", bad, 2, 10000, &reply, &err), CM_OK);
    cm_arena_fini(&arena);
    cm_bytes_fini(&reply);
    pc_channel_destroy(channel);
}

static bool load_came(const world *w)
{
    const peer *gateway = &w->peers[0];
    if (gateway->n_loads == 0 || gateway->level[0] == 0) {
        pc_member_wish_load(gateway->member); /* the router's count may be on its way */
        return false;
    }
    return true;
}

/* One byte a pair: none is 0, one row is 1, each doubling eight more. */
static void gateways_see_the_load(void **state)
{
    world *w = *state;
    uint32_t count[LAYERS * EXPERTS] = {1, 2, 4, 1000, 0, 4000000000u};
    static const uint8_t want[LAYERS * EXPERTS] = {1, 9, 17, 81, 0, 255};
    world_start(w);
    two_workers_a_router_a_gateway(w);
    assert_true(pc_member_load(w->peers[1].member, count, LAYERS, EXPERTS));
    run_until(w, load_came);
    assert_memory_equal(w->peers[0].level, want, sizeof(want));
    assert_int_equal(w->peers[1].n_loads, 0);
}

/* ---- operators ---- */

static void on_stopped(void *arg)
{
    ((world *)arg)->stopped = true;
}

static cm_status ask(world *w, const char *method, const ProtobufCMessage *request, cm_error *err)
{
    cm_bytes packed, reply;
    char path[64];
    *err = (cm_error){0};
    cm_bytes_init(&packed, 0);
    cm_bytes_init(&reply, 0);
    pr_pack(request, &packed);
    snprintf(path, sizeof(path), "/baleen.control.v1.Admin/%s", method);
    pc_channel *channel = pc_channel_create(w->loop, co_coordinator_address(w->coordinator));
    cm_status status = pc_unary_wait(channel, path, packed.data, packed.len, GUARD_MS, &reply, err);
    pc_channel_destroy(channel);
    cm_bytes_fini(&packed);
    cm_bytes_fini(&reply);
    return status;
}

static cm_status ask_scale(world *w, uint32_t n_workers, cm_error *err)
{
    Baleen__Control__V1__ScaleRequest request = BALEEN__CONTROL__V1__SCALE_REQUEST__INIT;
    request.n_workers = n_workers;
    return ask(w, "Scale", &request.base, err);
}

static void operators_are_answered(void **state)
{
    world *w = *state;
    cm_error err;
    Baleen__Control__V1__DrainRequest drain = BALEEN__CONTROL__V1__DRAIN_REQUEST__INIT;
    Baleen__Control__V1__RebalanceRequest rebalance = BALEEN__CONTROL__V1__REBALANCE_REQUEST__INIT;
    world_start(w);
    two_workers_a_router_a_gateway(w);
    drain.member_id = 99;
    assert_int_equal(ask(w, "Drain", &drain.base, &err), CM_E_NOT_FOUND);
    assert_non_null(strstr(err.text, "no member 99"));
    assert_int_equal(ask(w, "Rebalance", &rebalance.base, &err), CM_OK);
    assert_int_not_equal(ask_scale(w, 3, &err), CM_OK);
    assert_non_null(strstr(err.text, "not started by baleen up"));

    drain.member_id = w->peers[3].id;
    assert_int_equal(ask(w, "Drain", &drain.base, &err), CM_OK);
    run_until(w, last_is_gone);
    assert_int_equal(w->peers[3].n_drains, 1);
    assert_int_equal(w->peers[1].n_ranks, 1);
    assert_int_not_equal(ask(w, "Drain", &drain.base, &err), CM_OK);
    assert_non_null(strstr(err.text, "no member"));
}

typedef struct order {
    uint32_t n_workers, n_orders;
    bool closed;
} order;
static order g_order;

static void on_order(void *ctx, const uint8_t *data, size_t n_bytes)
{
    (void)ctx;
    Baleen__Control__V1__LaunchOrder *message =
        baleen__control__v1__launch_order__unpack(NULL, n_bytes, data);
    assert_non_null(message);
    g_order.n_workers = message->n_workers;
    g_order.n_orders++;
    baleen__control__v1__launch_order__free_unpacked(message, NULL);
}

static void on_order_closed(void *ctx, pc_code code, const char *text)
{
    (void)ctx;
    (void)code;
    (void)text;
    g_order.closed = true;
}

static const pc_stream_events order_events = {.message = on_order, .closed = on_order_closed};

static pc_stream *launch(pc_channel *channel, const char *host, uint32_t pid)
{
    cm_bytes packed;
    char name[256];
    snprintf(name, sizeof(name), "%s", host);
    Baleen__Control__V1__LauncherState state = BALEEN__CONTROL__V1__LAUNCHER_STATE__INIT;
    state.host = name;
    state.worker_pid = &pid;
    state.n_worker_pid = 1;
    cm_bytes_init(&packed, 0);
    pr_pack(&state.base, &packed);
    pc_stream *stream = pc_stream_open(channel, "/baleen.control.v1.Admin/Launch", &order_events, NULL, 0);
    assert_int_equal(pc_stream_send(stream, packed.data, packed.len), CM_OK);
    cm_bytes_fini(&packed);
    return stream;
}

static bool is_ordered(const world *w)
{
    (void)w;
    return g_order.n_orders == 1;
}

static bool first_is_closed(const world *w)
{
    (void)w;
    return g_order.closed;
}

/* Workers that the launcher runs are told from others by host and process id. */
static void a_launcher_is_ordered(void **state)
{
    world *w = *state;
    cm_error err;
    char host[256] = "";
    gethostname(host, sizeof(host) - 1);
    world_start(w);
    two_workers_a_router_a_gateway(w);
    g_order = (order){0};
    pc_channel *channel = pc_channel_create(w->loop, co_coordinator_address(w->coordinator));
    launch(channel, "elsewhere", (uint32_t)getpid()); /* both workers are others' */
    while (ask_scale(w, 3, &err) != CM_OK) {          /* until it is there */
        assert_non_null(strstr(err.text, "not started by baleen up"));
    }
    run_until(w, is_ordered);
    assert_int_equal(g_order.n_workers, 1);
    assert_int_not_equal(ask_scale(w, 1, &err), CM_OK);
    assert_non_null(strstr(err.text, "2 workers were not started by baleen up"));
    assert_int_not_equal(ask_scale(w, 0, &err), CM_OK);
    assert_non_null(strstr(err.text, "1 to"));

    launch(channel, host, (uint32_t)getpid()); /* another launcher comes: they are its own */
    run_until(w, first_is_closed);
    g_order = (order){0};
    assert_int_equal(ask_scale(w, 5, &err), CM_OK);
    run_until(w, is_ordered);
    assert_int_equal(g_order.n_workers, 5);
    pc_channel_destroy(channel);
}

/* Who waits for something that will not come any more hears so. */
static void a_stop_answers_operators(void **state)
{
    world *w = *state;
    Baleen__Control__V1__DrainRequest drain = BALEEN__CONTROL__V1__DRAIN_REQUEST__INIT;
    cm_bytes packed;
    world_start(w);
    two_workers_a_router_a_gateway(w);
    g_order = (order){0};
    w->peers[2].mute = true;
    drain.member_id = w->peers[3].id;
    cm_bytes_init(&packed, 0);
    pr_pack(&drain.base, &packed);
    pc_channel *channel = pc_channel_create(w->loop, co_coordinator_address(w->coordinator));
    pc_stream *stream = pc_stream_open(channel, "/baleen.control.v1.Admin/Drain", &order_events, NULL, 0);
    assert_int_equal(pc_stream_send(stream, packed.data, packed.len), CM_OK);
    pc_stream_half_close(stream);
    cm_bytes_fini(&packed);
    uint32_t before = w->peers[2].n_prepares;
    while (w->peers[2].n_prepares == before) { /* it waits for the one that never answers */
        cm_error err;
        Baleen__Control__V1__StatusRequest status = BALEEN__CONTROL__V1__STATUS_REQUEST__INIT;
        assert_int_equal(ask(w, "Status", &status.base, &err), CM_OK);
    }
    assert_false(g_order.closed);
    co_coordinator_stop(w->coordinator, on_stopped, w);
    run_until(w, first_is_closed);
    pc_channel_destroy(channel);
}

static void a_dead_worker_is_replaced(void **state)
{
    world *w = *state;
    world_start(w);
    two_workers_a_router_a_gateway(w);
    w->wanted_epoch = w->peers[0].epoch + 1;
    pc_member_destroy(w->peers[3].member);
    w->peers[3].member = NULL;
    run_until(w, same_epoch);
    assert_int_equal(w->peers[1].n_ranks, 1);
    w->wanted_epoch = w->peers[0].epoch + 1;
    join(w, CO_ROLE_WORKER, "f00d");
    run_until(w, same_epoch);
    assert_int_equal(w->peers[1].n_ranks, 2);
}

static void a_leaving_member_is_let_go(void **state)
{
    world *w = *state;
    world_start(w);
    two_workers_a_router_a_gateway(w);
    uint64_t before = w->peers[1].epoch;
    pc_member_leave(w->peers[3].member);
    run_until(w, last_is_gone);
    assert_int_equal(w->peers[1].n_ranks, 1); /* the router knew before it was let go */
    assert_true(w->peers[1].epoch > before);
}

static void another_checkpoint_is_refused(void **state)
{
    world *w = *state;
    world_start(w);
    two_workers_a_router_a_gateway(w);
    peer *p = join(w, CO_ROLE_WORKER, "beef");
    run_until(w, last_is_refused);
    assert_int_equal(p->refused, CM_E_REFUSED);
    assert_non_null(strstr(p->text, "beef"));
    assert_non_null(strstr(p->text, "f00d"));
}

static void a_second_coordinator(void **state)
{
    world *w = *state;
    co_coordinator *second = NULL;
    cm_error err = {0};
    set(w, "store", w->folder);
    world_start(w);
    set(w, "address", "127.0.0.1:0");
    assert_int_equal(co_coordinator_create(w->loop, &w->config, &second, &err), CM_E_EXISTS);
    assert_non_null(strstr(err.text, w->folder));
    set(w, "store", "");
    set(w, "address", co_coordinator_address(w->coordinator));
    assert_int_equal(co_coordinator_create(w->loop, &w->config, &second, &err), CM_E_EXISTS);
    assert_non_null(strstr(err.text, "is taken: another coordinator?"));
    assert_non_null(strstr(err.text, co_coordinator_address(w->coordinator)));
    set(w, "lease_ms", "100");
    set(w, "heartbeat_ms", "50");
    assert_int_equal(co_coordinator_create(w->loop, &w->config, &second, &err), CM_E_CONFIG);
}

static void members_outlive_a_restart(void **state)
{
    world *w = *state;
    uint32_t ids[4];
    set(w, "store", w->folder);
    world_start(w);
    two_workers_a_router_a_gateway(w);
    uint64_t epoch = w->peers[0].epoch;
    for (uint32_t i = 0; i < 4; i++) {
        ids[i] = w->peers[i].id;
    }
    set(w, "address", co_coordinator_address(w->coordinator));
    co_coordinator_stop(w->coordinator, on_stopped, w);
    run_until(w, is_stopped);
    co_coordinator_destroy(w->coordinator);
    world_start(w);
    run_until(w, all_connected);
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(w->peers[i].id, ids[i]);
        assert_int_equal(w->peers[i].epoch, epoch);
    }
    w->wanted_epoch = epoch + 1; /* numbers and ids go on */
    peer *p = join(w, CO_ROLE_WORKER, "f00d");
    run_until(w, same_epoch);
    assert_int_equal(p->id, 5);
}

/* ---- keys of the data plane ---- */

static void assert_one_key(const world *w)
{
    for (uint32_t i = 1; i < w->n_peers; i++) {
        assert_memory_equal(w->peers[i].key, w->peers[0].key, NET_KEY_BYTES);
        assert_int_equal(w->peers[i].key_epoch, w->peers[0].epoch);
    }
}

static bool file_has(const char *path, const uint8_t *bytes, size_t n)
{
    FILE *file = fopen(path, "r");
    if (file == NULL) {
        return false;
    }
    uint8_t *text = cm_alloc(1 << 20);
    size_t n_text = fread(text, 1, 1 << 20, file);
    fclose(file);
    bool has = memmem(text, n_text, bytes, n) != NULL;
    cm_free(text);
    return has;
}

static void keys_follow_epochs(void **state)
{
    world *w = *state;
    uint8_t first[NET_KEY_BYTES];
    world_start(w);
    two_workers_a_router_a_gateway(w);
    assert_one_key(w);
    memcpy(first, w->peers[0].key, sizeof(first));
    uint64_t epoch = w->peers[0].epoch;
    w->wanted_epoch = epoch + 1;
    join(w, CO_ROLE_WORKER, "f00d");
    run_until(w, same_epoch);
    assert_one_key(w);
    assert_memory_not_equal(w->peers[0].key, first, sizeof(first));
    /* who is not waited for keeps the key before; a worker was told when all had switched */
    assert_true(w->peers[0].retired >= epoch && w->peers[0].retired < w->peers[0].epoch);
    assert_true(w->peers[1].retired >= epoch && w->peers[1].retired < w->peers[1].epoch);
    assert_int_equal(w->peers[2].retired, w->peers[2].epoch);
}

static bool all_have_a_key_again(const world *w)
{
    for (uint32_t i = 0; i < w->n_peers; i++) {
        if (w->peers[i].n_keys == 0) {
            return false;
        }
    }
    return true;
}

static void a_restart_keeps_the_keys(void **state)
{
    world *w = *state;
    uint8_t before[NET_KEY_BYTES];
    char path[T_FOLDER_MAX + 24];
    set(w, "store", w->folder);
    world_start(w);
    two_workers_a_router_a_gateway(w);
    memcpy(before, w->peers[0].key, sizeof(before));
    uint64_t epoch = w->peers[0].epoch;
    set(w, "address", co_coordinator_address(w->coordinator));
    co_coordinator_stop(w->coordinator, on_stopped, w);
    run_until(w, is_stopped);
    co_coordinator_destroy(w->coordinator);
    for (uint32_t i = 0; i < w->n_peers; i++) {
        w->peers[i].n_keys = 0;
    }
    world_start(w);
    run_until(w, all_have_a_key_again); /* for the epoch in force, although nobody commits anything */
    assert_one_key(w);
    assert_int_equal(w->peers[0].epoch, epoch);
    assert_memory_equal(w->peers[0].key, before, sizeof(before)); /* links go on */
    w->wanted_epoch = epoch + 1;
    join(w, CO_ROLE_WORKER, "f00d");
    run_until(w, same_epoch);
    assert_one_key(w);
    assert_memory_not_equal(w->peers[0].key, before, sizeof(before));
    static const char *const suffixes[] = {"", "-wal"};
    for (uint32_t i = 0; i < 2; i++) {
        snprintf(path, sizeof(path), "%s/coordinator.db%s", w->folder, suffixes[i]);
        assert_false(file_has(path, before, sizeof(before)));
        assert_false(file_has(path, w->peers[0].key, sizeof(before)));
    }
}

/* ---- a client that is none of ours ---- */

typedef struct stranger {
    bool closed;
    pc_code code;
} stranger;

static stranger g_stranger;

static void stranger_message(void *ctx, const uint8_t *data, size_t n_bytes)
{
    (void)ctx;
    (void)data;
    (void)n_bytes;
}

static void stranger_closed(void *ctx, pc_code code, const char *text)
{
    (void)text;
    *(stranger *)ctx = (stranger){true, code};
}

static bool stranger_is_closed(const world *w)
{
    (void)w;
    return g_stranger.closed;
}

static void strangers_are_shown_out(void **state)
{
    world *w = *state;
    static const struct {
        const char *bytes;
        size_t n;
    } words[] = {{"\xff\xff", 2}, {"\x32\x00", 2} /* Leaving */, {"", 0}};
    static const pc_stream_events stream_events = {stranger_message, stranger_closed};
    world_start(w);
    pc_channel *channel = pc_channel_create(w->loop, co_coordinator_address(w->coordinator));
    for (uint32_t i = 0; i < 4; i++) { /* the last says nothing at all */
        g_stranger = (stranger){false, PC_CODE_OK};
        pc_stream *stream =
            pc_stream_open(channel, "/baleen.control.v1.Control/Session", &stream_events, &g_stranger, 0);
        if (i < 3) {
            assert_int_equal(pc_stream_send(stream, words[i].bytes, words[i].n), CM_OK);
        }
        if (i == 3) {
            pc_stream_half_close(stream);
        }
        run_until(w, stranger_is_closed);
        assert_int_equal(g_stranger.code, PC_CODE_INVALID_ARGUMENT);
    }
    pc_channel_destroy(channel);
}

/* ---- TLS ---- */

static pc_tls *certificates_of(const world *w, const char *dir, const char *role)
{
    char ca[T_FOLDER_MAX + 24], cert[T_FOLDER_MAX + 24], key[T_FOLDER_MAX + 24];
    cm_error err = {0};
    pc_tls *tls;
    snprintf(ca, sizeof(ca), "%s/ca.crt", dir);
    snprintf(cert, sizeof(cert), "%s/%s.crt", dir, role);
    snprintf(key, sizeof(key), "%s/%s.key", dir, role);
    pc_tls_config config = {(char[]){"auto"}, ca, cert, key};
    if (pc_tls_open(&config, co_coordinator_address(w->coordinator), role, &tls, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    return tls;
}

static void set_certificates(world *w, const char *dir)
{
    static const char *const files[][2] = {
        {"tls_ca", "ca.crt"}, {"tls_cert", "coordinator.crt"}, {"tls_key", "coordinator.key"}};
    for (uint32_t i = 0; i < 3; i++) {
        char path[T_FOLDER_MAX + 24];
        snprintf(path, sizeof(path), "%s/%s", dir, files[i][1]);
        set(w, files[i][0], path);
    }
}

static void make_certificates(const char *dir)
{
    cm_error err = {0};
    cert_authority *authority;
    assert_int_equal(cert_authority_create(100000, &authority, &err), CM_OK);
    assert_int_equal(cert_authority_save(authority, dir, &err), CM_OK);
    for (uint32_t i = 0; i < CERT_ROLES; i++) {
        cert_request request = {cert_roles[i], "127.0.0.1", -CERT_CLOCK_SKEW_S, 100000};
        assert_int_equal(cert_make(authority, dir, &request, &err), CM_OK);
    }
    cert_authority_destroy(authority);
}

static pc_code hello_with(world *w, const char *dir, const char *certificate, uint32_t role)
{
    static const pc_stream_events stream_events = {stranger_message, stranger_closed};
    Baleen__Control__V1__Member self = BALEEN__CONTROL__V1__MEMBER__INIT;
    Baleen__Control__V1__Hello hello = BALEEN__CONTROL__V1__HELLO__INIT;
    Baleen__Control__V1__MemberMessage word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    cm_bytes packed;
    pc_tls *tls = certificates_of(w, dir, certificate);
    pc_channel *channel = pc_channel_create_tls(w->loop, co_coordinator_address(w->coordinator), tls);
    self.role = (Baleen__Control__V1__Role)role;
    hello.self = &self;
    hello.fingerprint = (char[]){"f00d"};
    hello.protocol = 0; /* a version nobody speaks: whoever is let in is refused for that, and hears so */
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_HELLO;
    word.hello = &hello;
    cm_bytes_init(&packed, 0);
    pr_pack(&word.base, &packed);
    g_stranger = (stranger){false, PC_CODE_UNKNOWN};
    pc_stream *stream =
        pc_stream_open(channel, "/baleen.control.v1.Control/Session", &stream_events, &g_stranger, 0);
    assert_int_equal(pc_stream_send(stream, packed.data, packed.len), CM_OK);
    run_until(w, stranger_is_closed);
    cm_bytes_fini(&packed);
    pc_channel_destroy(channel);
    pc_tls_close(tls);
    return g_stranger.code;
}

static void a_certificate_is_for_one_role(void **state)
{
    world *w = *state;
    char dir[T_FOLDER_MAX];
    t_folder_make(dir, "coordinator_tls");
    make_certificates(dir);
    set_certificates(w, dir);
    world_start(w);
    assert_int_equal(hello_with(w, dir, "router", CO_ROLE_ROUTER), PC_CODE_OK);
    assert_int_equal(hello_with(w, dir, "router", CO_ROLE_WORKER), PC_CODE_PERMISSION_DENIED);
    assert_int_equal(hello_with(w, dir, "worker", CO_ROLE_GATEWAY), PC_CODE_PERMISSION_DENIED);
    assert_int_equal(hello_with(w, dir, "admin", CO_ROLE_ROUTER), PC_CODE_PERMISSION_DENIED);
    t_folder_remove(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(members_join, setup, teardown),
        cmocka_unit_test_setup_teardown(status_tells_all, setup, teardown),
        cmocka_unit_test_setup_teardown(a_dead_worker_is_replaced, setup, teardown),
        cmocka_unit_test_setup_teardown(operators_are_answered, setup, teardown),
        cmocka_unit_test_setup_teardown(a_launcher_is_ordered, setup, teardown),
        cmocka_unit_test_setup_teardown(a_stop_answers_operators, setup, teardown),
        cmocka_unit_test_setup_teardown(a_leaving_member_is_let_go, setup, teardown),
        cmocka_unit_test_setup_teardown(another_checkpoint_is_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(a_second_coordinator, setup, teardown),
        cmocka_unit_test_setup_teardown(members_outlive_a_restart, setup, teardown),
        cmocka_unit_test_setup_teardown(gateways_see_the_load, setup, teardown),
        cmocka_unit_test_setup_teardown(keys_follow_epochs, setup, teardown),
        cmocka_unit_test_setup_teardown(a_restart_keeps_the_keys, setup, teardown),
        cmocka_unit_test_setup_teardown(strangers_are_shown_out, setup, teardown),
        cmocka_unit_test_setup_teardown(a_certificate_is_for_one_role, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
