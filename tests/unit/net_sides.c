#include "tests/unit/net_sides.h"

#include <poll.h>
#include <stdio.h>
#include <string.h>

#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/base/stats.h"
#include "common/net/net_private.h"

#define UCX_CASE                                                                                             \
    "ucx", "127.0.0.1:0", NULL,                                                                              \
    {                                                                                                        \
        "127.0.0.1", "127.0.0.1:70000", "no such host:1", ":5"                                               \
    }
#define LOCAL_CASE                                                                                           \
    "local", "t_net %u", "t_net nobody",                                                                     \
    {                                                                                                        \
        "", NULL, NULL, NULL                                                                                 \
    }
#define SHM_CASE                                                                                             \
    "shm", "127.0.0.1:0", "t_net nobody",                                                                    \
    {                                                                                                        \
        "", NULL, NULL, NULL                                                                                 \
    }
const backend_case g_mpi = {"mpi", "%u", "mpi:0:15", {"127.0.0.1:1", "mpi:7:0", "mpi:0:16", "mpi:0"},
                            false, true, false};
const backend_case g_ucx = {UCX_CASE, false, false, false};
const backend_case g_local = {LOCAL_CASE, false, false, false};
const backend_case g_ucx_keyed = {UCX_CASE, true, false, false};
const backend_case g_local_keyed = {LOCAL_CASE, true, false, false};
const backend_case g_shm = {SHM_CASE, false, false, true};
const backend_case g_shm_keyed = {SHM_CASE, true, false, true};

uint8_t *g_source;
/* links that a failed test left open are not the next one's fault */
static int64_t g_peers_before;

/* ---- log lines ---- */

static char g_log[1 << 16];
static size_t g_log_bytes;
static pthread_mutex_t g_log_lock =
    PTHREAD_MUTEX_INITIALIZER; /* protects both: ucx logs from a thread of its own */

static void log_keep(void *ctx, cm_log_level level, const char *text)
{
    (void)ctx;
    (void)level;
    pthread_mutex_lock(&g_log_lock);
    size_t n = strlen(text);
    if (g_log_bytes + n + 2 < sizeof(g_log)) {
        memcpy(g_log + g_log_bytes, text, n);
        g_log_bytes += n;
        g_log[g_log_bytes++] = '\n';
        g_log[g_log_bytes] = 0;
    }
    pthread_mutex_unlock(&g_log_lock);
}

bool log_has(const char *text)
{
    pthread_mutex_lock(&g_log_lock);
    bool has = strstr(g_log, text) != NULL;
    pthread_mutex_unlock(&g_log_lock);
    return has;
}

/* ---- sides ---- */

/* What a test message says about itself, cut off at header_bytes. */
typedef struct test_header {
    uint64_t offset, n_bytes; /* payload = g_source[offset, offset + n_bytes) */
    uint32_t index;
    uint32_t zero;
} test_header;

static uint32_t check_content(const net_event *event)
{
    test_header header;
    assert_int_equal(event->header_bytes, sizeof(header));
    memcpy(&header, event->header, sizeof(header));
    assert_int_equal(header.n_bytes, event->payload_bytes);
    assert_memory_equal(event->payload, g_source + header.offset, header.n_bytes);
    return header.index;
}

static void check_message(side *s, const net_event *event)
{
    assert_int_equal((uintptr_t)event->header % 8, 0);
    assert_int_equal((uintptr_t)event->payload % 64, 0);
    assert_non_null(event->payload);
    if (event->type == 1) { /* self-describing */
        assert_int_equal(check_content(event), s->n_messages);
        s->n_checked++;
    }
}

void side_event(side *s, const net_event *event)
{
    switch (event->kind) {
    case NET_EV_UP:
        s->n_up++;
        s->peer = event->peer;
        break;
    case NET_EV_DOWN:
        s->n_down++;
        s->down_status = event->status;
        s->peer = NULL;
        break;
    case NET_EV_SENT:
        s->n_sent++;
        s->n_after_down += event->peer != NULL && event->peer != s->peer;
        if (event->status != CM_OK) {
            s->n_failed++;
            s->failed_status = event->status;
        }
        break;
    case NET_EV_MESSAGE:
        check_message(s, event);
        s->n_messages++;
        if (s->hold) {
            assert_true(s->n_held < HELD_MAX);
            s->held[s->n_held++] = *event;
        } else {
            net_release(s->n, event);
        }
        break;
    }
}

uint32_t side_poll(side *s)
{
    net_event events[8];
    uint32_t n = net_poll(s->n, events, 8);
    for (uint32_t i = 0; i < n; i++) {
        side_event(s, &events[i]);
    }
    return n;
}

void side_release(side *s)
{
    for (uint32_t i = 0; i < s->n_held; i++) {
        net_release(s->n, &s->held[i]);
    }
    s->n_held = 0;
}

void side_release_one(side *s, uint32_t i)
{
    assert_true(i < s->n_held);
    (void)check_content(&s->held[i]);
    net_release(s->n, &s->held[i]);
    s->held[i] = s->held[--s->n_held];
}

void turn(net_test *t)
{
    uint32_t n_events = 0, wait_ms = 500;
    struct pollfd fds[SIDES_MAX];
    nfds_t n_fds = 0;
    bool armed = true;
    for (uint32_t i = 0; i < t->n_sides; i++) {
        if (t->sides[i].n != NULL && !t->sides[i].frozen) {
            n_events += side_poll(&t->sides[i]);
        }
    }
    if (n_events > 0) {
        return;
    }
    for (uint32_t i = 0; i < t->n_sides; i++) {
        side *s = &t->sides[i];
        if (s->n != NULL && !s->frozen) {
            armed = net_arm(s->n) && armed;
            uint32_t timer_ms = net_next_timer_ms(s->n);
            wait_ms = timer_ms < wait_ms ? timer_ms : wait_ms;
            fds[n_fds++] = (struct pollfd){.fd = net_fd(s->n), .events = POLLIN};
        }
    }
    if (armed) {
        poll(fds, n_fds, (int)wait_ms);
    }
}

const net_ops *table_of(const char *name)
{
    const net_ops *ops;
    cm_error err;
    if (net_ops_find(name, &ops, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    return ops;
}

net_options small_options(const backend_case *backend)
{
    net_options options;
    net_options_defaults(&options);
    options.backend = backend->name;
    options.peers_max = 4;
    options.sends_max = 8;
    options.receives_max = 16;
    options.message_bytes_max = 1 << 20;
    options.heartbeat_ms = 200;
    options.silence_ms = 10000;
    options.keyed = backend->keyed;
    return options;
}

void side_give_key(side *s, uint8_t number)
{
    uint8_t key[NET_KEY_BYTES];
    memset(key, number, sizeof(key));
    net_key_add(s->n, 7, number, key);
}

side *side_open_ops(net_test *t, const net_ops *ops, const net_options *options, uint64_t cluster,
                    uint32_t role)
{
    cm_error err;
    side *s = &t->sides[t->n_sides];
    *s = (side){0};
    cm_status status = ops != NULL ? net_open_ops(ops, options, &s->n, &err) : net_open(options, &s->n, &err);
    if (status != CM_OK) {
        fail_msg("open: %s", err.text);
    }
    net_set_identity(s->n, &(net_identity){.cluster = cluster, .role = role, .member = role + 100});
    if (options->keyed) {
        side_give_key(s, 1);
    }
    t->n_sides++;
    return s;
}

side *side_open(net_test *t, const net_options *options, uint64_t cluster, uint32_t role)
{
    return side_open_ops(t, NULL, options, cluster, role);
}

void side_listen(net_test *t, side *s)
{
    static uint32_t n_names; /* a name of its own for each: one failed test does not fail the next */
    char address[NET_ADDRESS_BYTES];
    cm_error err;
    snprintf(address, sizeof(address), t->backend->listen, ++n_names);
    if (net_listen(s->n, address, t->address, &err) != CM_OK) {
        fail_msg("listen: %s", err.text);
    }
}

net_peer *side_connect(net_test *t, side *s)
{
    cm_error err;
    net_peer *peer = NULL;
    if (net_connect(s->n, t->address, &peer, &err) != CM_OK) {
        fail_msg("connect: %s", err.text);
    }
    return peer;
}

void side_close(side *s)
{
    if (s->n != NULL) {
        side_release(s);
        net_close(s->n);
        s->n = NULL;
    }
}

net_test pair_open(const backend_case *backend, const net_options *listener, const net_options *connector)
{
    net_test t = {.backend = backend};
    side *a = side_open(&t, listener, 7, 1);
    side_listen(&t, a);
    side *b = side_open(&t, connector, 7, 2);
    side_connect(&t, b);
    WAIT(&t, a->n_up == 1 && b->n_up == 1);
    return t;
}

void pair_close(net_test *t)
{
    for (uint32_t i = 0; i < t->n_sides; i++) {
        if (t->sides[i].n != NULL) {
            side_release(&t->sides[i]);
            WAIT(t, net_in_flight(t->sides[i].n) == 0);
        }
        assert_int_equal(t->sides[i].n_after_down, 0);
    }
    for (uint32_t i = 0; i < t->n_sides; i++) {
        side_close(&t->sides[i]);
    }
    assert_int_equal(cm_stat_get(CM_STAT_net_peers), g_peers_before);
}

cm_status send_piece(side *s, uint32_t index, uint64_t offset, uint64_t n_bytes, uint32_t n_iov,
                     uint32_t deadline_ms)
{
    test_header header = {.offset = offset, .n_bytes = n_bytes, .index = index};
    net_message message = {.type = 1,
                           .header = &header,
                           .header_bytes = sizeof(header),
                           .n_iov = n_iov,
                           .deadline_ms = deadline_ms,
                           .cookie = s};
    uint64_t at = offset;
    for (uint32_t i = 0; i < n_iov; i++) {
        uint64_t piece = i + 1 < n_iov ? n_bytes / n_iov : offset + n_bytes - at;
        message.iov[i] = (net_iov){g_source + at, piece};
        at += piece;
    }
    return net_send(s->peer, &message);
}

cm_status send_built(side *s, uint32_t index, uint64_t offset, uint64_t n_bytes)
{
    test_header header = {.offset = offset, .n_bytes = n_bytes, .index = index};
    uint8_t *room = net_room(s->peer, n_bytes + 100);
    if (room == NULL) {
        return send_piece(s, index, offset, n_bytes, 1, DEADLINE_MS);
    }
    assert_int_equal((uintptr_t)room % 64, 0);
    memcpy(room, g_source + offset, n_bytes);
    net_message message = {.type = 1,
                           .header = &header,
                           .header_bytes = sizeof(header),
                           .iov = {{room, n_bytes}},
                           .n_iov = 1,
                           .deadline_ms = DEADLINE_MS,
                           .cookie = s};
    cm_status status = net_send(s->peer, &message);
    assert_int_equal(status, CM_OK);
    return status;
}

int sides_setup(void **state)
{
    (void)state;
    g_peers_before = cm_stat_get(CM_STAT_net_peers);
    return 0;
}

void sides_init(void)
{
    g_source = cm_alloc(SOURCE_BYTES);
    for (size_t i = 0; i < SOURCE_BYTES; i += sizeof(cm_rng_block)) {
        cm_rng_block block = cm_rng_at(42, i, 0);
        memcpy(g_source + i, &block, sizeof(block));
    }
    cm_log_handler(log_keep, NULL);
}

void sides_fini(void)
{
    cm_log_handler(NULL, NULL);
    cm_free(g_source);
}
