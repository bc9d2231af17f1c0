/* The transport between threads (local) and between processes, with what only ucx knows of addresses. */
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/base/log.h"
#include "tests/unit/net_sides.h"

/* ---- local only: two threads, one object each ---- */

enum { PING_PONGS = 10000 };

typedef struct pinger {
    net *n;
    char address[NET_ADDRESS_BYTES]; /* connects there, "" = waits */
    uint32_t n_messages, n_sent;
    bool down, failed;
} pinger;

static void pinger_send(pinger *p, net_peer *peer)
{
    uint64_t index = p->n_messages;
    net_message message = {.type = 2,
                           .header = &index,
                           .header_bytes = sizeof(index),
                           .iov = {{g_source + p->n_messages, 300}},
                           .n_iov = 1,
                           .deadline_ms = DEADLINE_MS};
    p->failed = net_send(peer, &message) != CM_OK || p->failed;
}

static void pinger_event(pinger *p, const net_event *event)
{
    if (event->kind == NET_EV_UP && p->address[0] != 0) {
        pinger_send(p, event->peer);
    } else if (event->kind == NET_EV_MESSAGE) {
        p->failed = memcmp(event->payload, g_source + p->n_messages, 300) != 0 || p->failed;
        p->n_messages++;
        net_release(p->n, event);
        if (p->address[0] == 0 || p->n_messages < PING_PONGS) {
            /* the answer repeats the index of the question */
            p->n_messages -= p->address[0] == 0;
            pinger_send(p, event->peer);
            p->n_messages += p->address[0] == 0;
        }
    } else if (event->kind == NET_EV_SENT) {
        p->n_sent++;
    } else if (event->kind == NET_EV_DOWN) {
        p->down = true;
    }
}

static void *pinger_main(void *arg)
{
    pinger *p = arg;
    uint64_t until_ms = cm_now_ms() + 3 * WAIT_MS;
    while ((p->n_messages < PING_PONGS || p->n_sent < PING_PONGS) && !p->down && cm_now_ms() < until_ms) {
        net_event events[4];
        uint32_t n = net_poll(p->n, events, 4);
        for (uint32_t i = 0; i < n; i++) {
            pinger_event(p, &events[i]);
        }
        if (n == 0 && net_arm(p->n)) {
            uint32_t timer_ms = net_next_timer_ms(p->n);
            poll(&(struct pollfd){.fd = net_fd(p->n), .events = POLLIN}, 1,
                 (int)(timer_ms < 1000 ? timer_ms : 1000));
        }
    }
    p->failed = p->failed || p->n_messages < PING_PONGS || p->n_sent < PING_PONGS;
    net_close(p->n);
    return NULL;
}

static void test_two_threads(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    side *a = side_open(&t, &options, 7, 1);
    side_listen(&t, a);
    side *b = side_open(&t, &options, 7, 2);
    side_connect(&t, b);
    pinger pingers[2] = {{.n = a->n}, {.n = b->n}};
    memcpy(pingers[1].address, t.address, sizeof(t.address));
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        assert_int_equal(pthread_create(&threads[i], NULL, pinger_main, &pingers[i]), 0);
    }
    /* keys come from a third thread, while messages fly */
    for (uint8_t number = 2; backend->keyed && number <= 3; number++) {
        side_give_key(a, number);
        side_give_key(b, number);
        net_key_retire(number == 2 ? a->n : b->n, number);
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        assert_false(pingers[i].failed);
    }
}

/* ---- another process ---- */

/* The other process: connects and idles, or sends big messages without end. Ends only by a signal. */
static int child_main(const char *address, bool sends)
{
    net_options options = small_options(strncmp(address, "shm-", 4) == 0 ? &g_shm : &g_ucx);
    net *n;
    net_peer *peer;
    cm_error err;
    if (net_open(&options, &n, &err) != CM_OK) {
        return 1;
    }
    net_set_identity(n, &(net_identity){.cluster = 7, .role = 9});
    if (net_connect(n, address, &peer, &err) != CM_OK) {
        return 1;
    }
    bool up = false;
    for (uint32_t index = 0;;) {
        net_event event;
        uint32_t n_events = net_poll(n, &event, 1);
        if (n_events == 1) {
            up = up || event.kind == NET_EV_UP;
            if (event.kind == NET_EV_MESSAGE) {
                net_release(n, &event);
            } else if (event.kind == NET_EV_DOWN) {
                return 2;
            }
        }
        side s = {.n = n, .peer = peer};
        while (up && sends && send_piece(&s, index, index % 1000, 1 << 20, 1, DEADLINE_MS) == CM_OK) {
            index++;
        }
        if (n_events == 0 && net_arm(n)) {
            poll(&(struct pollfd){.fd = net_fd(n), .events = POLLIN}, 1, (int)net_next_timer_ms(n));
        }
    }
}

static pid_t child_start(const char *address, const char *mode)
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        execl("/proc/self/exe", "t_net_apart", "--child", address, mode, (char *)NULL);
        _exit(127);
    }
    return pid;
}

static void child_end(pid_t pid)
{
    int status;
    kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status)); /* it did not end on its own */
}

static void test_killed(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    options.heartbeat_ms = 10000;
    options.silence_ms = 600000; /* so that only the transport can tell */
    options.receives_max = 4;
    net_test t = {.backend = backend};
    side *a = side_open(&t, &options, 7, 1);
    side_listen(&t, a);
    for (uint32_t i = 0; i < 8; i++) {
        bool sends = i % 2 == 1;
        a->n_messages = 0;
        pid_t pid = child_start(t.address, sends ? "send" : "idle");
        WAIT(&t, a->n_up == i + 1);
        assert_int_equal(net_peer_identity(a->peer)->role, 9);
        a->hold = sends && i % 4 == 3; /* once with fetches going on, once with messages waiting for room */
        WAIT(&t, !sends || a->n_messages >= 4);
        child_end(pid);
        WAIT(&t, a->n_down == i + 1);
        assert_int_equal(a->down_status, CM_E_RESET);
        side_release(a);
        a->hold = false;
        assert_int_equal(net_in_flight(a->n), 0);
    }
    /* nothing of the dead holds on to a receive: all of them work for the next */
    side *b = side_open(&t, &options, 7, 2);
    side_connect(&t, b);
    WAIT(&t, a->n_up == 9 && b->n_up == 1);
    a->hold = true;
    a->n_messages = 0;
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(send_piece(b, i, i, 1 << 20, 1, DEADLINE_MS), CM_OK);
    }
    WAIT(&t, a->n_held == 4);
    pair_close(&t);
}

static void test_stopped(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    options.heartbeat_ms = 100;
    options.silence_ms = 1000;
    net_test t = {.backend = backend};
    side *a = side_open(&t, &options, 7, 1);
    side_listen(&t, a);
    pid_t pid = child_start(t.address, "idle");
    WAIT(&t, a->n_up == 1);
    kill(pid, SIGSTOP);
    uint32_t n_sends = 0;
    while (send_piece(a, n_sends, 0, n_sends % 2 == 0 ? 1 << 20 : 60000, 2, DEADLINE_MS) == CM_OK) {
        n_sends++;
    }
    assert_true(n_sends > 0);
    WAIT(&t, a->n_down == 1);
    assert_int_equal(a->down_status, CM_E_SILENT);
    assert_int_equal(a->n_sent, n_sends);
    child_end(pid);
    pair_close(&t);
}

/* UCX 1.13 corrupts its memory on IPv6 links: a clear no. */
static void test_ipv6(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    side *a = side_open(&t, &options, 7, 1);
    cm_error err;
    net_peer *peer;
    assert_int_equal(net_listen(a->n, "[::1]:0", t.address, &err), CM_E_UNSUPPORTED);
    assert_int_equal(net_connect(a->n, "[::1]:7001", &peer, &err), CM_E_UNSUPPORTED);
    assert_non_null(strstr(err.text, "IPv6"));
    pair_close(&t);
}

static void test_wildcard(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    side *a = side_open(&t, &options, 7, 1);
    cm_error err;
    assert_int_equal(net_listen(a->n, "0.0.0.0:0", t.address, &err), CM_OK);
    assert_int_not_equal(strncmp(t.address, "0.0.0.0:", 8), 0);
    side *b = side_open(&t, &options, 7, 2);
    side_connect(&t, b);
    WAIT(&t, a->n_up == 1 && b->n_up == 1);
    pair_close(&t);
}

static uint32_t g_n_unused; /* log lines in which UCX says that a setting of ours reached nobody */

/* ---- shm: names that another user holds ---- */

static int g_n_foreign;

static void count_foreign(void *ctx, cm_log_level level, const char *text)
{
    (void)ctx;
    (void)level;
    g_n_foreign += strstr(text, "is held by process") != NULL;
}

/* Another user's process that listens, says so and waits for its end. */
static void foreigner_main(const char *address, int ready_fd)
{
    net_options options = small_options(&g_shm);
    char bound[NET_ADDRESS_BYTES];
    net *n;
    cm_error err;
    if (setuid(65534) == 0 && net_open(&options, &n, &err) == CM_OK &&
        net_listen(n, address, bound, &err) == CM_OK && write(ready_fd, "", 1) == 1) {
        pause();
    }
    _exit(1);
}

static void test_foreign_name(void **state)
{
    if (geteuid() != 0) {
        skip(); /* nobody else can be asked to hold a name */
    }
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    char ready;
    int fds[2];
    snprintf(t.address, sizeof(t.address), "shm-foreign-%d", (int)getpid());
    assert_int_equal(pipe(fds), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        foreigner_main(t.address, fds[1]);
    }
    assert_int_equal(read(fds[0], &ready, 1), 1);
    g_n_foreign = 0;
    cm_log_handler(count_foreign, NULL);
    side *a = side_open(&t, &options, 7, 1);
    side_connect(&t, a);
    WAIT(&t, a->n_down == 1);
    cm_log_handler(NULL, NULL);
    assert_int_equal(a->n_up, 0);
    assert_int_equal(a->down_status, CM_E_REFUSED);
    assert_true(g_n_foreign > 0);
    child_end(pid);
    close(fds[0]);
    close(fds[1]);
    pair_close(&t);
}

static void count_unused(void *ctx, cm_log_level level, const char *text)
{
    (void)ctx;
    (void)level;
    g_n_unused += strstr(text, "invalid configuration") != NULL;
}

static void test_settings_reach(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    g_n_unused = 0;
    cm_log_handler(count_unused, NULL);
    side *a = side_open(&t, &options, 7, 1);
    cm_log_handler(NULL, NULL);
    assert_non_null(a);
    assert_int_equal(g_n_unused, 0);
    pair_close(&t);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        ONE(local, test_two_threads), ONE(local_keyed, test_two_threads),
        ONE(ucx, test_killed),        ONE(ucx, test_stopped),
        ONE(shm, test_two_threads),   ONE(shm_keyed, test_two_threads),
        ONE(shm, test_killed),        ONE(shm, test_stopped),
        ONE(shm, test_foreign_name),  ONE(ucx, test_ipv6),
        ONE(ucx, test_wildcard),      ONE(ucx, test_settings_reach),
    };
    sides_init();
    if (argc == 4 && strcmp(argv[1], "--child") == 0) {
        return child_main(argv[2], strcmp(argv[3], "send") == 0);
    }
    int n_failed = cmocka_run_group_tests(tests, NULL, NULL);
    sides_fini();
    return n_failed;
}
