/* The loop: posts from other threads, timers, hooks, signals, and a net object pumped by it. */
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/proc/loop.h"

static void stop(void *arg)
{
    pc_loop_stop(arg);
}

static int set_up(void **state)
{
    return pc_loop_create((pc_loop **)state) == CM_OK ? 0 : -1;
}

static int tear_down(void **state)
{
    pc_loop_destroy(*state);
    return 0;
}

/* ---- posts ---- */

enum { N_POSTERS = 4, N_TASKS = 100000 };

typedef struct counted {
    pc_task task;
    uint32_t poster, number;
} counted;

static struct {
    pc_loop *loop;
    counted *tasks[N_POSTERS];
    uint32_t next[N_POSTERS]; /* tasks of one thread run in the order it posted them */
    uint32_t n_run;           /* plain: only the loop thread writes it */
} g_posts;

static void run_counted(void *arg)
{
    counted *task = arg;
    assert_int_equal(task->number, g_posts.next[task->poster]);
    g_posts.next[task->poster]++;
    if (++g_posts.n_run == N_POSTERS * N_TASKS) {
        pc_loop_stop(g_posts.loop);
    }
}

static void *poster(void *arg)
{
    counted *tasks = arg;
    for (uint32_t i = 0; i < N_TASKS; i++) {
        pc_loop_post(g_posts.loop, &tasks[i].task);
    }
    return NULL;
}

static void test_post_from_threads(void **state)
{
    pthread_t threads[N_POSTERS];
    g_posts.loop = *state;
    for (uint32_t t = 0; t < N_POSTERS; t++) {
        g_posts.tasks[t] = cm_alloc(sizeof(counted) * N_TASKS);
        for (uint32_t i = 0; i < N_TASKS; i++) {
            counted *task = &g_posts.tasks[t][i];
            *task = (counted){.task = {.fn = run_counted, .arg = task}, .poster = t, .number = i};
        }
        assert_int_equal(pthread_create(&threads[t], NULL, poster, g_posts.tasks[t]), 0);
    }
    pc_loop_run(*state);
    for (uint32_t t = 0; t < N_POSTERS; t++) {
        pthread_join(threads[t], NULL);
        assert_int_equal(g_posts.next[t], N_TASKS);
        cm_free(g_posts.tasks[t]);
    }
}

static uint32_t g_count;

static void count(void *arg)
{
    (void)arg;
    g_count++;
}

static void test_posted_twice_runs_once(void **state)
{
    pc_task task = {.fn = count}, other = {.fn = count}, end = {.fn = stop, .arg = *state};
    g_count = 0;
    pc_loop_post(*state, &task);
    pc_loop_post(*state, &other);
    pc_loop_post(*state, &task);
    pc_loop_post(*state, &end);
    pc_loop_run(*state);
    assert_int_equal(g_count, 2);
    pc_loop_post(*state, &task); /* but it can be posted again */
    pc_loop_post(*state, &end);
    pc_loop_run(*state);
    assert_int_equal(g_count, 3);
}

static void test_unpost(void **state)
{
    pc_task a = {.fn = count}, b = {.fn = count}, c = {.fn = count}, end = {.fn = stop, .arg = *state};
    g_count = 0;
    pc_loop_post(*state, &a);
    pc_loop_post(*state, &b);
    pc_loop_post(*state, &c);
    pc_loop_unpost(*state, &a);
    pc_loop_unpost(*state, &c);
    pc_loop_unpost(*state, &c); /* not there: nothing */
    pc_loop_post(*state, &end);
    pc_loop_run(*state);
    assert_int_equal(g_count, 1);
}

static void test_destroy_runs_what_is_posted(void **state)
{
    pc_loop *loop;
    (void)state;
    g_count = 0;
    assert_int_equal(pc_loop_create(&loop), CM_OK);
    pc_loop_post_new(loop, count, NULL);
    pc_loop_post_new(loop, count, NULL);
    pc_loop_destroy(loop);
    assert_int_equal(g_count, 2);
}

static void test_stop_before_run(void **state)
{
    pc_loop_stop(*state);
    pc_loop_run(*state);
}

/* ---- timers ---- */

enum { N_TIMERS = 5 };

static struct {
    pc_loop *loop;
    pc_timer *timers[N_TIMERS];
    uint32_t order[N_TIMERS], n_fired;
} g_timers;

static void timer_fired(void *arg)
{
    uint32_t i = (uint32_t)(uintptr_t)arg;
    assert_true(g_timers.n_fired < N_TIMERS);
    g_timers.order[g_timers.n_fired++] = i;
    if (i == 4) {
        pc_loop_stop(g_timers.loop);
    }
}

/* In one task, so that all five count from the same moment. */
static void set_timers(void *arg)
{
    (void)arg;
    pc_timer_set(g_timers.timers[4], 40);
    pc_timer_set(g_timers.timers[2], 1);
    pc_timer_set(g_timers.timers[1], 20);
    pc_timer_set(g_timers.timers[3], 10);
    pc_timer_set(g_timers.timers[2], 30); /* replaces */
    pc_timer_set(g_timers.timers[0], 5);
    pc_timer_clear(g_timers.timers[0]);
}

static void test_timers_in_order(void **state)
{
    g_timers.loop = *state;
    g_timers.n_fired = 0;
    for (uint32_t i = 0; i < N_TIMERS; i++) {
        g_timers.timers[i] = pc_timer_create(*state, timer_fired, (void *)(uintptr_t)i);
    }
    pc_loop_post_new(*state, set_timers, NULL);
    pc_loop_run(*state);
    assert_int_equal(g_timers.n_fired, 4);
    assert_int_equal(g_timers.order[0], 3);
    assert_int_equal(g_timers.order[1], 1);
    assert_int_equal(g_timers.order[2], 2);
    assert_int_equal(g_timers.order[3], 4);
    for (uint32_t i = 0; i < N_TIMERS; i++) {
        pc_timer_destroy(g_timers.timers[i]);
    }
    pc_timer_destroy(NULL);
}

/* ---- hooks ---- */

static struct {
    pc_loop *loop;
    uint32_t n_hook, n_events, n_turns;
    pc_task again;
} g_hooks;

static void hook_event(void *arg)
{
    (void)arg;
    g_hooks.n_events++;
}

static void hook_next_turn(void *arg)
{
    pc_loop *loop = arg;
    if (++g_hooks.n_turns == 3) {
        pc_loop_stop(loop);
        return;
    }
    for (uint32_t i = 0; i < 10; i++) {
        pc_loop_post_new(loop, hook_event, NULL);
    }
    pc_loop_post(loop, &g_hooks.again);
}

static void hook(void *arg)
{
    (void)arg;
    g_hooks.n_hook++;
}

static void test_hooks_once_a_turn(void **state)
{
    g_hooks.loop = *state;
    g_hooks.again = (pc_task){.fn = hook_next_turn, .arg = *state};
    pc_loop_before_sleep(*state, hook, NULL);
    pc_loop_post(*state, &g_hooks.again);
    pc_loop_run(*state);
    assert_int_equal(g_hooks.n_events, 20);
    assert_int_equal(g_hooks.n_hook, 1 + 3); /* before the first turn, then one per turn */
}

static void test_signal(void **state)
{
    pc_loop_on_signal(*state, SIGUSR1, stop, *state);
    assert_int_equal(raise(SIGUSR1), 0);
    pc_loop_run(*state);
}

/* ---- the pump ---- */

static struct {
    pc_loop *loop;
    net *nets[2];
    pc_netpump *pumps[2];
    net_peer *peer;
    uint32_t n_sent, n_received;
} g_net;

enum { N_MESSAGES = 1000 };

static void net_send_more(void)
{
    while (g_net.n_sent < N_MESSAGES) {
        uint32_t number = g_net.n_sent;
        net_message message = {
            .type = 1, .header = &number, .header_bytes = sizeof(number), .deadline_ms = 60000};
        cm_status status = net_send(g_net.peer, &message);
        if (status == CM_AGAIN) {
            return;
        }
        assert_int_equal(status, CM_OK);
        g_net.n_sent++;
    }
}

static void net_heard(void *ctx, const net_event *event)
{
    net *n = ctx;
    assert_int_not_equal(event->kind, NET_EV_DOWN);
    if (n == g_net.nets[0] && event->kind == NET_EV_UP) {
        g_net.peer = event->peer;
    }
    if (n == g_net.nets[0] && g_net.peer != NULL) {
        net_send_more();
    }
    if (n == g_net.nets[1] && event->kind == NET_EV_MESSAGE) {
        assert_int_equal(*(const uint32_t *)event->header, g_net.n_received);
        g_net.n_received++;
    }
    if (event->kind == NET_EV_MESSAGE) {
        net_release(n, event);
    }
    if (g_net.n_received == N_MESSAGES) {
        pc_loop_stop(g_net.loop);
    }
}

static void net_link(pc_loop *loop, const net_options *options)
{
    char bound[NET_ADDRESS_BYTES];
    net_peer *peer;
    memset(&g_net, 0, sizeof(g_net));
    g_net.loop = loop;
    for (uint32_t i = 0; i < 2; i++) {
        net_identity identity = {.cluster = 7, .role = 3 + i, .member = 1 + i};
        assert_int_equal(net_open(options, &g_net.nets[i], NULL), CM_OK);
        net_set_identity(g_net.nets[i], &identity);
    }
    assert_int_equal(net_listen(g_net.nets[1], "t_loop", bound, NULL), CM_OK);
    assert_int_equal(net_connect(g_net.nets[0], bound, &peer, NULL), CM_OK);
}

static void test_netpump(void **state)
{
    net_options options;
    net_options_defaults(&options);
    options.backend = "local";
    net_link(*state, &options);
    for (uint32_t i = 0; i < 2; i++) {
        g_net.pumps[i] = pc_netpump_create(*state, g_net.nets[i], net_heard, g_net.nets[i]);
    }
    pc_netpump_kick(g_net.pumps[0]);
    pc_loop_run(*state);
    assert_int_equal(g_net.n_received, N_MESSAGES);
    for (uint32_t i = 0; i < 2; i++) {
        pc_netpump_destroy(g_net.pumps[i]);
        net_close(g_net.nets[i]);
    }
}

static void net_lost(void *ctx, const net_event *event)
{
    (void)ctx;
    if (event->kind == NET_EV_DOWN) {
        g_net.n_received = 1;
        pc_loop_stop(g_net.loop);
    }
}

/* The other side is never pumped: only the pump's timer can find that out. */
static void test_netpump_keeps_time(void **state)
{
    net_options options;
    net_options_defaults(&options);
    options.backend = "local";
    options.heartbeat_ms = 10;
    options.silence_ms = 100;
    net_link(*state, &options);
    g_net.pumps[0] = pc_netpump_create(*state, g_net.nets[0], net_lost, NULL);
    pc_loop_run(*state);
    assert_int_equal(g_net.n_received, 1);
    pc_netpump_destroy(g_net.pumps[0]);
    net_close(g_net.nets[0]);
    net_close(g_net.nets[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_post_from_threads, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_posted_twice_runs_once, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_unpost, set_up, tear_down),
        cmocka_unit_test(test_destroy_runs_what_is_posted),
        cmocka_unit_test_setup_teardown(test_stop_before_run, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_timers_in_order, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_hooks_once_a_turn, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_signal, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_netpump, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_netpump_keeps_time, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
