#include "common/proc/loop.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

enum { LOOP_HOOKS_MAX = 8, LOOP_SIGNALS_MAX = 8 };

typedef struct loop_hook {
    pc_fn fn;
    void *arg;
    struct event *event; /* signals only */
} loop_hook;

struct pc_loop {
    struct event_base *base;
    struct event *wake;
    int wake_fd;          /* eventfd: written when the list of tasks stops being empty, and by stop */
    pthread_mutex_t lock; /* protects first, last, n_posted, and next and posted of the tasks in the list */
    pc_task *first, *last;
    uint32_t n_posted;
    _Atomic bool stopping;
    uint32_t n_hooks, n_signals;
    loop_hook hooks[LOOP_HOOKS_MAX], signals[LOOP_SIGNALS_MAX];
};

struct pc_timer {
    struct event *event;
    pc_fn fn;
    void *arg;
};

static void loop_wake(pc_loop *loop)
{
    uint64_t one = 1;
    ssize_t n = write(loop->wake_fd, &one, sizeof(one));
    CM_ASSERT_MSG(n == (ssize_t)sizeof(one) || errno == EAGAIN, "eventfd: %s", strerror(errno));
}

static pc_task *loop_pop(pc_loop *loop)
{
    pthread_mutex_lock(&loop->lock);
    pc_task *task = loop->first;
    if (task != NULL) {
        loop->first = task->next;
        loop->last = loop->first == NULL ? NULL : loop->last;
        loop->n_posted--;
        task->posted = false; /* it may be posted again from here on, also by its own fn */
    }
    pthread_mutex_unlock(&loop->lock);
    return task;
}

static uint32_t loop_n_posted(pc_loop *loop)
{
    pthread_mutex_lock(&loop->lock);
    uint32_t n = loop->n_posted;
    pthread_mutex_unlock(&loop->lock);
    return n;
}

/* Runs as many tasks as were there, so that tasks that post themselves leave room for sockets and timers. */
static void loop_woken(evutil_socket_t fd, short what, void *arg)
{
    pc_loop *loop = arg;
    uint64_t count;
    (void)what;
    ssize_t got = read(fd, &count, sizeof(count));
    (void)got; /* EAGAIN: another turn was faster */
    for (uint32_t n = loop_n_posted(loop); n > 0; n--) {
        pc_task *task = loop_pop(loop);
        if (task == NULL) {
            break; /* taken back */
        }
        task->fn(task->arg);
    }
    if (loop_n_posted(loop) > 0) {
        loop_wake(loop);
    }
}

static struct event_base *loop_base_new(void)
{
    struct event_config *config = event_config_new();
    if (config == NULL) {
        return NULL;
    }
    /* other threads reach the base through the eventfd only */
    event_config_set_flag(config, EVENT_BASE_FLAG_NOLOCK);
    struct event_base *base = event_base_new_with_config(config);
    event_config_free(config);
    return base;
}

cm_status pc_loop_create(pc_loop **loop_out)
{
    pc_loop *loop = cm_alloc(sizeof(*loop));
    loop->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (loop->wake_fd < 0) {
        goto err_free;
    }
    loop->base = loop_base_new();
    if (loop->base == NULL) {
        goto err_close;
    }
    loop->wake = event_new(loop->base, loop->wake_fd, EV_READ | EV_PERSIST, loop_woken, loop);
    if (loop->wake == NULL || event_add(loop->wake, NULL) != 0) {
        goto err_base;
    }
    pthread_mutex_init(&loop->lock, NULL);
    *loop_out = loop;
    return CM_OK;

err_base:
    if (loop->wake != NULL) {
        event_free(loop->wake);
    }
    event_base_free(loop->base);
err_close:
    close(loop->wake_fd);
err_free:
    cm_free(loop);
    return CM_E_IO;
}

void pc_loop_destroy(pc_loop *loop)
{
    for (pc_task *task = loop_pop(loop); task != NULL; task = loop_pop(loop)) {
        task->fn(task->arg);
    }
    for (uint32_t i = 0; i < loop->n_signals; i++) {
        event_free(loop->signals[i].event);
    }
    event_free(loop->wake);
    event_base_free(loop->base);
    close(loop->wake_fd);
    pthread_mutex_destroy(&loop->lock);
    cm_free(loop);
}

static void loop_run_hooks(pc_loop *loop)
{
    for (uint32_t i = 0; i < loop->n_hooks; i++) {
        loop->hooks[i].fn(loop->hooks[i].arg);
    }
}

void pc_loop_run(pc_loop *loop)
{
    loop_run_hooks(loop); /* what was set up before the first turn */
    while (!atomic_load(&loop->stopping)) {
        int rc = event_base_loop(loop->base, EVLOOP_ONCE);
        CM_ASSERT_MSG(rc == 0, "event loop returned %d", rc);
        loop_run_hooks(loop);
    }
    atomic_store(&loop->stopping, false);
}

void pc_loop_stop(pc_loop *loop)
{
    atomic_store(&loop->stopping, true);
    loop_wake(loop);
}

struct event_base *pc_loop_base(pc_loop *loop)
{
    return loop->base;
}

void pc_loop_post(pc_loop *loop, pc_task *task)
{
    pthread_mutex_lock(&loop->lock);
    bool wake = loop->first == NULL;
    bool fresh = !task->posted;
    if (fresh) {
        task->posted = true;
        task->next = NULL;
        if (loop->last != NULL) {
            loop->last->next = task;
        } else {
            loop->first = task;
        }
        loop->last = task;
        loop->n_posted++;
    }
    pthread_mutex_unlock(&loop->lock);
    if (fresh && wake) {
        loop_wake(loop);
    }
}

void pc_loop_unpost(pc_loop *loop, pc_task *task)
{
    pthread_mutex_lock(&loop->lock);
    pc_task *before = NULL;
    for (pc_task *at = loop->first; at != NULL && task->posted; before = at, at = at->next) {
        if (at != task) {
            continue;
        }
        if (before != NULL) {
            before->next = task->next;
        } else {
            loop->first = task->next;
        }
        loop->last = loop->last == task ? before : loop->last;
        loop->n_posted--;
        task->posted = false;
        break;
    }
    pthread_mutex_unlock(&loop->lock);
}

typedef struct loop_one_off {
    pc_task task;
    pc_fn fn;
    void *arg;
} loop_one_off;

static void loop_run_one_off(void *arg)
{
    loop_one_off *one_off = arg;
    one_off->fn(one_off->arg);
    cm_free(one_off);
}

void pc_loop_post_new(pc_loop *loop, pc_fn fn, void *arg)
{
    loop_one_off *one_off = cm_alloc(sizeof(*one_off));
    *one_off = (loop_one_off){.task = {.fn = loop_run_one_off, .arg = one_off}, .fn = fn, .arg = arg};
    pc_loop_post(loop, &one_off->task);
}

void pc_loop_before_sleep(pc_loop *loop, pc_fn fn, void *arg)
{
    CM_ASSERT(loop->n_hooks < LOOP_HOOKS_MAX);
    loop->hooks[loop->n_hooks++] = (loop_hook){.fn = fn, .arg = arg};
}

static void loop_signalled(evutil_socket_t number, short what, void *arg)
{
    loop_hook *hook = arg;
    (void)number;
    (void)what;
    hook->fn(hook->arg);
}

void pc_loop_on_signal(pc_loop *loop, int signal_number, pc_fn fn, void *arg)
{
    CM_ASSERT(loop->n_signals < LOOP_SIGNALS_MAX);
    loop_hook *hook = &loop->signals[loop->n_signals++];
    *hook = (loop_hook){.fn = fn, .arg = arg};
    hook->event = evsignal_new(loop->base, signal_number, loop_signalled, hook);
    CM_ASSERT_MSG(hook->event != NULL && evsignal_add(hook->event, NULL) == 0, "signal %d", signal_number);
}

static void timer_fired(evutil_socket_t fd, short what, void *arg)
{
    pc_timer *timer = arg;
    (void)fd;
    (void)what;
    timer->fn(timer->arg);
}

pc_timer *pc_timer_create(pc_loop *loop, pc_fn fn, void *arg)
{
    pc_timer *timer = cm_alloc(sizeof(*timer));
    timer->fn = fn;
    timer->arg = arg;
    timer->event = evtimer_new(loop->base, timer_fired, timer);
    CM_ASSERT(timer->event != NULL);
    return timer;
}

void pc_timer_destroy(pc_timer *timer)
{
    if (timer != NULL) {
        event_free(timer->event);
        cm_free(timer);
    }
}

void pc_timer_set(pc_timer *timer, uint64_t after_ms)
{
    struct timeval after = {.tv_sec = (time_t)(after_ms / 1000u),
                            .tv_usec = (suseconds_t)(after_ms % 1000u * 1000u)};
    int rc = evtimer_add(timer->event, &after);
    CM_ASSERT_MSG(rc == 0, "timer of %llu ms", (unsigned long long)after_ms);
}

void pc_timer_clear(pc_timer *timer)
{
    evtimer_del(timer->event);
}
