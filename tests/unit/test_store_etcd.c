/* The log in a real etcd: one coordinator at a time may write, whoever is next finds what was written, and
 * one that cannot renew its claim has stopped before another one starts. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/log.h"
#include "common/base/mem.h"
#include "coordinator/etcd_log.h"
#include "coordinator/store.h"
#include "proto/log.pb-c.h"
#include "proto/pack.h"
#include "tests/unit/etcd_rig.h"

enum { NODES = 2, WRITES = 8, GUARD_MS = 60000, CLAIM_MS = 1000, LONG_MS = 60000 };

/* ---- two coordinators' stores and a client of our own, on one loop ---- */

typedef struct node {
    co_store *store;
    uint32_t n_active, n_standby, n_failed, n_written;
    uint32_t active_at, standby_at; /* on the count of all events */
    bool active;
    co_store_past past; /* its epoch is ours */
    co_drains drains;   /* of the next writes */
    char address[PC_ADDRESS_BYTES], text[480], failed[480];
    struct {
        uint64_t ticket;
        cm_status status;
        char text[400];
    } written[WRITES];
} node;

static struct {
    etcd_server server;
    pc_loop *loop;
    pc_timer *guard;
    bool guarded;
    relay *relay;
    node nodes[NODES];
    uint32_t n_events, n_tests, n_unanswered, n_wanted; /* wanted: writes */
    co_etcd *client;
    co_etcd_keys keys;
    bool (*until)(void);

    /* the client's last answer */
    bool answered;
    cm_status status;
    int64_t revision, create_revision;
    bool succeeded, ours;
    size_t n_kvs;
    co_etcd_past past;
    void (*then)(void);
} g;

static void on_active(void *ctx, const co_store_past *past)
{
    node *n = ctx;
    assert_false(n->active);
    n->active = true;
    n->n_active++;
    n->active_at = ++g.n_events;
    co_epoch_release(n->past.epoch);
    n->past = *past;
    n->past.epoch = past->epoch != NULL ? co_epoch_hold(past->epoch) : NULL;
}

static void on_standby(void *ctx, const char *address, const char *text)
{
    node *n = ctx;
    n->active = false;
    n->n_standby++;
    n->standby_at = ++g.n_events;
    snprintf(n->address, sizeof(n->address), "%s", address);
    snprintf(n->text, sizeof(n->text), "%s", text);
}

static void on_written(void *ctx, uint64_t ticket, cm_status status, const char *text)
{
    node *n = ctx;
    assert_true(n->active);
    assert_true(n->n_written < WRITES);
    n->written[n->n_written].ticket = ticket;
    n->written[n->n_written].status = status;
    snprintf(n->written[n->n_written++].text, sizeof(n->written[0].text), "%s", text);
}

static void on_failed(void *ctx, const cm_error *err)
{
    node *n = ctx;
    n->n_failed++;
    snprintf(n->failed, sizeof(n->failed), "%s", err->text);
}

static const co_store_events g_store_events = {on_active, on_standby, on_written, on_failed};

static node *open_at(uint32_t i, const char *endpoint, uint64_t lease_ms)
{
    char url[256], address[32];
    cm_error err = {0};
    node *n = &g.nodes[i];
    snprintf(url, sizeof(url), "etcd://%s%s", endpoint, g.keys.prefix);
    snprintf(address, sizeof(address), "10.0.0.%u:7000", i + 1);
    co_store_options options = {.url = url, .address = address, .lease_ms = lease_ms, .n_queued_max = 4};
    if (co_store_open(g.loop, &options, &g_store_events, n, &n->store, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    return n;
}

static node *open_node(uint32_t i, uint64_t lease_ms)
{
    return open_at(i, g.server.client, lease_ms);
}

/* Its process ends without a word: the lease is all that is left of it. */
static void kill_node(node *n)
{
    co_store_close(n->store);
    co_epoch_release(n->past.epoch);
    *n = (node){0};
}

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
    return g.nodes[0].active;
}

static bool second_active(void)
{
    return g.nodes[1].active;
}

static bool second_standby(void)
{
    return g.nodes[1].n_standby > 0;
}

static bool first_standby(void)
{
    return g.nodes[0].n_standby > 0;
}

static bool first_failed(void)
{
    return g.nodes[0].n_failed > 0;
}

static bool first_wrote(void)
{
    return g.nodes[0].n_written >= g.n_wanted;
}

static bool either_active(void)
{
    return g.nodes[0].active || g.nodes[1].active;
}

static bool is_answered(void)
{
    return g.answered;
}

static co_epoch *epoch_of(uint64_t number, uint32_t n_expert)
{
    co_peer worker = BALEEN__CONTROL__V1__MEMBER__INIT, *members[] = {&worker};
    uint32_t rank_member[] = {3};
    uint32_t *first = cm_alloc(sizeof(uint32_t) * (n_expert + 1));
    uint16_t *owner = cm_alloc(sizeof(uint16_t) * n_expert);
    for (uint32_t i = 0; i <= n_expert; i++) {
        first[i] = i;
    }
    pr_placement placement = {.n_layer = 1,
                              .n_expert = n_expert,
                              .n_rank = 1,
                              .rank_member = rank_member,
                              .first = first,
                              .owner = owner};
    worker.id = 3;
    worker.role = CO_ROLE_WORKER;
    worker.incarnation = 99;
    co_epoch *epoch = co_epoch_create(number, 5, members, 1, &placement);
    cm_free(first);
    cm_free(owner);
    return epoch;
}

static void write_log(node *n, uint64_t ticket, uint32_t id, uint64_t number, co_epoch *epoch)
{
    assert_int_equal(co_store_write(n->store, ticket, id, number, &n->drains, epoch), CM_OK);
    co_epoch_release(epoch);
}

/* ---- the client ---- */

static void on_answer(void *ctx, cm_status status, const void *reply, const char *text)
{
    (void)ctx;
    (void)text;
    g.answered = true;
    g.status = status;
    const ProtobufCMessage *message = reply;
    if (status == CM_OK && message->descriptor == &etcdserverpb__txn_response__descriptor) {
        const Etcdserverpb__TxnResponse *txn = reply;
        g.succeeded = txn->succeeded;
        g.revision = txn->header->revision;
        g.ours = !txn->succeeded && co_etcd_log_is_ours(txn, g.create_revision, &g.past);
    }
    if (status == CM_OK && message->descriptor == &etcdserverpb__range_response__descriptor) {
        const Etcdserverpb__RangeResponse *range = reply;
        g.n_kvs = range->n_kvs;
        g.create_revision = range->n_kvs > 0 ? range->kvs[0]->create_revision : 0;
    }
    if (g.then != NULL) {
        g.then();
    }
}

static ProtobufCBinaryData bytes(const char *text)
{
    return (ProtobufCBinaryData){strlen(text), (uint8_t *)(uintptr_t)text};
}

static void ask(Etcdserverpb__RequestOp **ops, size_t n, void (*then)(void))
{
    Etcdserverpb__TxnRequest txn = ETCDSERVERPB__TXN_REQUEST__INIT;
    txn.n_success = n;
    txn.success = ops;
    g.answered = false;
    g.then = then;
    co_etcd_call(g.client, "/etcdserverpb.KV/Txn", &txn.base, &etcdserverpb__txn_response__descriptor, 30000,
                 on_answer, NULL);
    run_until(is_answered);
    assert_int_equal(g.status, CM_OK);
    g.then = NULL;
}

static void put(const char *name, const void *value, size_t n_bytes, void (*then)(void))
{
    char key[256];
    Etcdserverpb__PutRequest request = ETCDSERVERPB__PUT_REQUEST__INIT;
    Etcdserverpb__RequestOp op = ETCDSERVERPB__REQUEST_OP__INIT;
    snprintf(key, sizeof(key), "%s/%s", g.keys.prefix, name);
    request.has_key = request.has_value = true;
    request.key = bytes(key);
    request.value = (ProtobufCBinaryData){n_bytes, (uint8_t *)(uintptr_t)value};
    op.request_case = ETCDSERVERPB__REQUEST_OP__REQUEST_REQUEST_PUT;
    op.request_put = &request;
    ask((Etcdserverpb__RequestOp *[]){&op}, 1, then);
}

static void delete (const char *name, void (*then)(void))
{
    char key[256];
    Etcdserverpb__DeleteRangeRequest request = ETCDSERVERPB__DELETE_RANGE_REQUEST__INIT;
    Etcdserverpb__RequestOp op = ETCDSERVERPB__REQUEST_OP__INIT;
    snprintf(key, sizeof(key), "%s/%s", g.keys.prefix, name);
    request.has_key = true;
    request.key = bytes(key);
    op.request_case = ETCDSERVERPB__REQUEST_OP__REQUEST_REQUEST_DELETE_RANGE;
    op.request_delete_range = &request;
    ask((Etcdserverpb__RequestOp *[]){&op}, 1, then);
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

static void note_log(void *ctx, cm_log_level level, const char *text)
{
    (void)ctx;
    (void)level;
    g.n_unanswered += strstr(text, "a write of the log has no answer") != NULL;
}

static int setup(void **state)
{
    (void)state;
    pc_addresses endpoints;
    assert_int_equal(pc_loop_create(&g.loop), CM_OK);
    g.guard = pc_timer_create(g.loop, guard, NULL);
    g.n_events = g.n_unanswered = 0;
    g.n_wanted = 1;
    pc_loop_before_sleep(g.loop, check, NULL);
    assert_int_equal(pc_addresses_parse("etcd", g.server.client, &endpoints, NULL), CM_OK);
    g.client = co_etcd_create(g.loop, &endpoints);
    snprintf(g.keys.prefix, sizeof(g.keys.prefix), "/test/%u", ++g.n_tests);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < NODES; i++) {
        if (g.nodes[i].store != NULL) {
            kill_node(&g.nodes[i]);
        }
    }
    if (g.relay != NULL) {
        relay_destroy(g.relay);
        g.relay = NULL;
    }
    co_etcd_destroy(g.client);
    pc_timer_destroy(g.guard);
    pc_loop_destroy(g.loop);
    cm_log_handler(NULL, NULL);
    return 0;
}

/* ---- tests ---- */

static void urls(void **state)
{
    (void)state;
    static const struct {
        const char *url, *needle; /* NULL: good */
    } cases[] = {
        {"etcd://127.0.0.1:1/a", NULL},
        {"etcd://a.b:1,127.0.0.1:2/a/b/", NULL},
        {"etcd://127.0.0.1:1", "prefix"},
        {"etcd://127.0.0.1:1/", "prefix"},
        {"etcd:///a", "HOST:PORT"},
        {"etcd://127.0.0.1/a", "'127.0.0.1'"},
        {"etcd://127.0.0.1:1,,/a", "''"},
        {"etcd://a:1,a:2,a:3,a:4,a:5,a:6,a:7,a:8,a:9/a", "more than 8"},
        {"redis://127.0.0.1:1/a", "no store"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        co_store *store = NULL;
        cm_error err = {0};
        co_store_options options = {.url = cases[i].url, .address = "", .lease_ms = 1000, .n_queued_max = 1};
        cm_status status = co_store_open(g.loop, &options, &g_store_events, &g.nodes[0], &store, &err);
        assert_int_equal(status, cases[i].needle == NULL ? CM_OK : CM_E_CONFIG);
        if (cases[i].needle != NULL && strstr(err.text, cases[i].needle) == NULL) {
            fail_msg("'%s' does not say '%s'", err.text, cases[i].needle);
        }
        co_store_close(store);
    }
}

static void stopped(void *arg)
{
    *(bool *)arg = true;
}

static bool g_stopped;
static bool is_stopped(void)
{
    return g_stopped;
}

static void the_next_one_continues(void **state)
{
    (void)state;
    node *a = open_node(0, LONG_MS);
    run_until(first_active);
    uint64_t cluster = a->past.cluster;
    uint8_t secret[CO_SECRET_BYTES];
    memcpy(secret, a->past.secret, sizeof(secret));
    assert_true(cluster != 0);
    assert_int_equal(a->past.next_member_id, 1);
    assert_int_equal(a->past.next_number, 1);
    assert_null(a->past.epoch);
    node *b = open_node(1, LONG_MS);
    run_until(second_standby);
    assert_string_equal(b->address, "10.0.0.1:7000");
    assert_non_null(strstr(b->text, "10.0.0.1:7000"));
    assert_int_equal(co_store_write(b->store, 1, 9, 9, &b->drains, NULL), CM_E_UNAVAILABLE);

    write_log(a, 1, 4, 1, NULL);
    write_log(a, 2, 4, 7, epoch_of(6, 2));
    a->drains = (co_drains){.n = 2, .id = {7, 300}};
    write_log(a, 3, 4, 120, epoch_of(119, 2)); /* trims */
    co_drains_remove(&a->drains, 7);
    write_log(a, 4, 5, 121, NULL);
    assert_int_equal(co_store_write(a->store, 5, 6, 122, &a->drains, NULL), CM_E_CAPACITY);
    g.n_wanted = 4;
    run_until(first_wrote);
    g_stopped = false;
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(a->written[i].ticket, i + 1);
        assert_int_equal(a->written[i].status, CM_OK);
    }
    co_store_stop(a->store, stopped, &g_stopped); /* its lease is a minute long: nobody waits for that */
    run_until(is_stopped);
    run_until(second_active);
    assert_int_equal(b->past.cluster, cluster);
    assert_memory_equal(b->past.secret, secret, sizeof(secret));
    assert_int_equal(b->past.next_member_id, 5);
    assert_int_equal(b->past.next_number, 121);
    assert_int_equal(b->past.drains.n, 1);
    assert_int_equal(b->past.drains.id[0], 300);
    assert_int_equal(b->past.epoch->number, 119);
    assert_int_equal(co_epoch_find(b->past.epoch, 3)->incarnation, 99);
}

static void a_dead_one_is_followed(void **state)
{
    (void)state;
    node *a = open_node(0, CLAIM_MS);
    run_until(first_active);
    node *b = open_node(1, CLAIM_MS);
    run_until(second_standby);
    write_log(a, 1, 4, 7, epoch_of(6, 2));
    run_until(first_wrote);
    uint64_t cluster = a->past.cluster;
    kill_node(a);
    run_until(second_active);
    assert_int_equal(b->past.cluster, cluster);
    assert_int_equal(b->past.epoch->number, 6);
}

/* Longer than a claim lasts. */
static void waited(void *arg)
{
    *(bool *)arg = true;
}

static void a_claim_is_renewed(void **state)
{
    (void)state;
    node *a = open_node(0, 3000);
    run_until(first_active);
    g_stopped = false;
    pc_timer *timer = pc_timer_create(g.loop, waited, &g_stopped);
    pc_timer_set(timer, 4000);
    run_until(is_stopped);
    pc_timer_destroy(timer);
    assert_int_equal(a->n_standby, 0);
    assert_true(co_store_is_active(a->store));
}

/* ---- whoever lost the claim cannot write, even before it knows ---- */

static bool g_believed;
static void write_stale(void)
{
    node *a = &g.nodes[0];
    g_believed = co_store_is_active(a->store);
    assert_int_equal(g_believed ? co_store_write(a->store, 77, 1000, 1000, &a->drains, NULL)
                                : CM_E_UNAVAILABLE,
                     g_believed ? CM_OK : CM_E_UNAVAILABLE);
}

static void usurp(void)
{
    Baleen__Log__V1__Leader leader = BALEEN__LOG__V1__LEADER__INIT;
    cm_bytes value;
    leader.address = (char[]){"10.9.9.9:1"};
    leader.host = (char[]){"elsewhere"};
    cm_bytes_init(&value, 0);
    pr_pack(&leader.base, &value);
    delete ("leader", NULL);
    put("leader", value.data, value.len, write_stale);
    cm_bytes_fini(&value);
}

static void fenced(bool usurped)
{
    node *a =
        open_node(0, LONG_MS); /* keeps its lease alive every second: it does not notice by itself soon */
    run_until(first_active);
    if (usurped) {
        usurp();
    } else {
        delete ("leader", write_stale);
    }
    assert_true(g_believed);
    run_until(first_standby);
    assert_int_equal(a->n_written, 0);
    assert_false(co_store_is_active(a->store));
    assert_string_equal(a->address, usurped ? "10.9.9.9:1" : "");
    assert_non_null(strstr(a->text, "not active any more"));
    delete ("leader", NULL);
    node *b = open_node(1, LONG_MS);
    run_until(either_active);
    assert_int_equal((a->active ? a : b)->past.next_member_id, 1);
}

static void a_lost_claim_cannot_write(void **state)
{
    (void)state;
    fenced(false);
}

static void a_usurped_claim_cannot_write(void **state)
{
    (void)state;
    fenced(true);
}

/* ---- answers that do not come ---- */

/* An attempt that arrives after it was made again and after a later write must change nothing. */
static void attempts_count_once(void **state)
{
    (void)state;
    node *a = open_node(0, LONG_MS);
    run_until(first_active);
    char leader[160];
    Etcdserverpb__RangeRequest range = ETCDSERVERPB__RANGE_REQUEST__INIT;
    snprintf(leader, sizeof(leader), "%s/leader", g.keys.prefix);
    range.has_key = true;
    range.key = bytes(leader);
    g.answered = false;
    co_etcd_call(g.client, "/etcdserverpb.KV/Range", &range.base, &etcdserverpb__range_response__descriptor,
                 30000, on_answer, NULL);
    run_until(is_answered);
    assert_int_equal(g.n_kvs, 1);
    int64_t term = g.create_revision;

    /* As the store would: the same write twice, then the next, then the first once more. */
    const struct {
        uint64_t serial;
        bool succeeded, ours;
    } attempts[] = {{1, true, false}, {1, false, true}, {2, true, false}, {1, false, false}};
    int64_t before = 0, after_first = 0;
    g.past = (co_etcd_past){.cluster = a->past.cluster, .next_member_id = 5, .next_number = 5};
    for (size_t i = 0; i < 4; i++) {
        if (i == 0) { /* the head's own revision: of the transaction that made the log */
            delete ("head", NULL);
            before = 0;
        }
        g.past.serial = attempts[i].serial;
        g.past.next_number = 5 + attempts[i].serial;
        g.past.head_revision = attempts[i].serial == 1 ? before : after_first;
        g.answered = false;
        co_etcd_log_write(g.client, &g.keys, term, &g.past, NULL, 30000, on_answer, NULL);
        run_until(is_answered);
        assert_int_equal(g.status, CM_OK);
        assert_int_equal(g.succeeded, attempts[i].succeeded);
        assert_int_equal(g.ours, attempts[i].ours);
        if (i == 0) {
            after_first = g.revision;
        } else if (i == 1) {
            assert_int_equal(g.past.head_revision, after_first); /* found out */
        }
    }
}

/* Answers are held until attempts have run out of time. What etcd did meanwhile counts, and counts once. */
static bool first_unanswered(void)
{
    return g.n_unanswered >= 1;
}

static void lost_answers_are_found_out(void **state)
{
    (void)state;
    cm_log_options verbose = {.fd = -1, .level = CM_LOG_DEBUG};
    cm_log_setup(&verbose);
    cm_log_handler(note_log, NULL);
    g.relay = relay_create(pc_loop_base(g.loop), g.server.client);
    node *a = open_at(0, relay_address(g.relay), 20000);
    run_until(first_active);
    relay_hold(g.relay, false, true);
    write_log(a, 1, 4, 7, epoch_of(6, 2));
    write_log(a, 2, 5, 7, NULL);
    run_until(first_unanswered);
    assert_int_equal(a->n_written, 0);
    relay_hold(g.relay, false, false);
    g.n_wanted = 2;
    run_until(first_wrote);
    assert_int_equal(a->written[0].status, CM_OK);
    assert_int_equal(a->written[1].status, CM_OK);
    kill_node(a);
    delete ("leader", NULL);
    node *b = open_node(1, LONG_MS);
    run_until(second_active);
    assert_int_equal(b->past.next_member_id, 5);
    assert_int_equal(b->past.epoch->number, 6);
}

/* One endpoint falls silent: the next one is asked, claim and writes go on. */
static void the_next_endpoint_is_asked(void **state)
{
    (void)state;
    char endpoints[160];
    g.relay = relay_create(pc_loop_base(g.loop), g.server.client);
    snprintf(endpoints, sizeof(endpoints), "%s,%s", relay_address(g.relay), g.server.client);
    node *a = open_at(0, endpoints, 6000);
    run_until(first_active);
    relay_hold(g.relay, true, true);
    write_log(a, 1, 4, 7, NULL);
    run_until(first_wrote);
    assert_int_equal(a->written[0].status, CM_OK);
    assert_int_equal(a->n_standby, 0);
}

/* The claim cannot be renewed: we stop by our own clock, and only then somebody else starts. */
static void one_cut_off_stops_first(void **state)
{
    (void)state;
    for (int round = 0; round < 3; round++) {
        g.relay = relay_create(pc_loop_base(g.loop), g.server.client);
        node *a = open_at(0, relay_address(g.relay), CLAIM_MS);
        run_until(first_active);
        node *b = open_node(1, CLAIM_MS);
        run_until(second_standby);
        relay_hold(g.relay, round == 0, true); /* heard by etcd, not heard by etcd */
        write_log(a, 1, 4, 7, NULL);
        run_until(second_active);
        assert_int_equal(a->n_standby, 1);
        assert_int_equal(a->n_written, 0);
        assert_true(a->standby_at < b->active_at);
        assert_false(co_store_is_active(a->store));
        assert_non_null(strstr(a->text, relay_address(g.relay)));
        relay_hold(g.relay, false, false); /* what it had said then is answered now */
        kill_node(b);
        a->n_standby = 0;
        run_until(first_active);
        kill_node(a);
        relay_destroy(g.relay);
        g.relay = NULL;
        delete ("leader", NULL);
    }
}

static void etcd_goes_away_and_comes_back(void **state)
{
    (void)state;
    node *a = open_node(0, CLAIM_MS);
    run_until(first_active);
    write_log(a, 1, 4, 7, epoch_of(6, 2));
    run_until(first_wrote);
    etcd_server_pause(&g.server);
    run_until(first_standby);
    assert_non_null(strstr(a->text, "could not be renewed"));
    assert_non_null(strstr(a->text, g.server.client));
    etcd_server_go_on(&g.server);
    run_until(first_active);
    assert_int_equal(a->past.next_member_id, 4);
    assert_int_equal(a->past.epoch->number, 6);
    assert_int_equal(a->n_standby, 1); /* one sentence for many attempts */
}

static void refusals_are_final(void **state)
{
    (void)state;
    node *a = open_node(0, LONG_MS);
    run_until(first_active);
    write_log(a, 1, 4, 7, epoch_of(6, 700000)); /* more than etcd takes */
    write_log(a, 2, 4, 7, epoch_of(6, 2));
    g.n_wanted = 2;
    run_until(first_wrote);
    assert_int_equal(a->written[0].status, CM_E_IO);
    assert_non_null(strstr(a->written[0].text, "large"));
    assert_int_equal(a->written[1].status, CM_OK);
    assert_true(co_store_is_active(a->store));
}

/* As releases before had it. What was drawn is there for the next one, beside what the log had. */
static void an_old_log_gets_a_secret(void **state)
{
    (void)state;
    static const uint8_t zeros[CO_SECRET_BYTES];
    uint8_t secret[CO_SECRET_BYTES];
    Baleen__Log__V1__Head head = BALEEN__LOG__V1__HEAD__INIT;
    cm_bytes packed;
    co_epoch *epoch = epoch_of(3, 2);
    head.version = 1;
    head.cluster = 5;
    head.next_member_id = 3;
    head.next_number = 7;
    cm_bytes_init(&packed, 0);
    pr_pack(&head.base, &packed);
    put("head", packed.data, packed.len, NULL);
    put("epochs/00000000000000000003", epoch->packed.data, epoch->packed.len, NULL);
    cm_bytes_fini(&packed);
    co_epoch_release(epoch);
    node *a = open_node(0, LONG_MS);
    run_until(first_active);
    memcpy(secret, a->past.secret, sizeof(secret));
    assert_memory_not_equal(secret, zeros, sizeof(secret));
    write_log(a, 1, 4, 8, NULL);
    run_until(first_wrote);
    kill_node(a);
    delete ("leader", NULL);
    node *b = open_node(1, LONG_MS);
    run_until(second_active);
    assert_memory_equal(b->past.secret, secret, sizeof(secret));
    assert_int_equal(b->past.cluster, 5);
    assert_int_equal(b->past.next_member_id, 4);
    assert_int_equal(b->past.epoch->number, 3);
}

static void damage_is_named(void **state)
{
    (void)state;
    Baleen__Log__V1__Head head = BALEEN__LOG__V1__HEAD__INIT;
    head.version = 1;
    head.cluster = 5;
    head.next_member_id = 3;
    head.next_number = 3;
    for (int i = 0; i < 5; i++) {
        static const char *const needles[] = {"not a head", "version 2", "without a head", "still to come",
                                              "no coordinator's log"};
        cm_bytes packed;
        co_epoch *epoch = epoch_of(3, 2);
        head.version = i == 1 ? 2 : 1;
        cm_bytes_init(&packed, 0);
        pr_pack(&head.base, &packed);
        if (i == 0) {
            put("head", "\xff\xff", 2, NULL);
        } else if (i != 2) {
            put("head", packed.data, packed.len, NULL);
        }
        if (i >= 2) {
            put("epochs/00000000000000000003", i == 4 ? (void *)"\xff\xff" : epoch->packed.data,
                i == 4 ? 2 : epoch->packed.len, NULL);
        }
        co_epoch_release(epoch);
        cm_bytes_fini(&packed);
        node *a = open_node(0, LONG_MS);
        run_until(first_failed);
        assert_int_equal(a->n_active, 0);
        if (strstr(a->failed, needles[i]) == NULL || strstr(a->failed, g.keys.prefix) == NULL) {
            fail_msg("'%s' does not say '%s' and %s", a->failed, needles[i], g.keys.prefix);
        }
        kill_node(a);
        snprintf(g.keys.prefix, sizeof(g.keys.prefix), "/test/damage/%d", i);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(urls, setup, teardown),
        cmocka_unit_test_setup_teardown(the_next_one_continues, setup, teardown),
        cmocka_unit_test_setup_teardown(a_dead_one_is_followed, setup, teardown),
        cmocka_unit_test_setup_teardown(a_claim_is_renewed, setup, teardown),
        cmocka_unit_test_setup_teardown(a_lost_claim_cannot_write, setup, teardown),
        cmocka_unit_test_setup_teardown(a_usurped_claim_cannot_write, setup, teardown),
        cmocka_unit_test_setup_teardown(attempts_count_once, setup, teardown),
        cmocka_unit_test_setup_teardown(lost_answers_are_found_out, setup, teardown),
        cmocka_unit_test_setup_teardown(the_next_endpoint_is_asked, setup, teardown),
        cmocka_unit_test_setup_teardown(one_cut_off_stops_first, setup, teardown),
        cmocka_unit_test_setup_teardown(etcd_goes_away_and_comes_back, setup, teardown),
        cmocka_unit_test_setup_teardown(refusals_are_final, setup, teardown),
        cmocka_unit_test_setup_teardown(an_old_log_gets_a_secret, setup, teardown),
        cmocka_unit_test_setup_teardown(damage_is_named, setup, teardown),
    };
    return cmocka_run_group_tests(tests, group_setup, group_teardown);
}
