#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/proc/loop.h"

enum {
    PUMP_EVENTS = 32, /* handed out per poll */
    PUMP_ROUNDS = 16, /* polls per turn, so that a flood of rows leaves room for other work */
};

struct pc_netpump {
    net *n;
    pc_net_fn fn;
    void *ctx;
    struct event *readable;
    pc_timer *timer; /* heartbeats and deadlines of the net; 0 ms = kicked */
    bool running;    /* events are being handed out: sends of theirs are progressed before we sleep */
};

static void pump_progress(pc_netpump *pump)
{
    net_event events[PUMP_EVENTS];
    pump->running = true;
    bool asleep = false;
    for (uint32_t round = 0; round < PUMP_ROUNDS && !asleep; round++) {
        uint32_t n = net_poll(pump->n, events, PUMP_EVENTS);
        for (uint32_t i = 0; i < n; i++) {
            pump->fn(pump->ctx, &events[i]);
        }
        asleep = n == 0 && net_arm(pump->n);
    }
    pump->running = false;
    uint32_t after_ms = asleep ? net_next_timer_ms(pump->n) : 0;
    if (after_ms != UINT32_MAX) {
        pc_timer_set(pump->timer, after_ms);
    } else {
        pc_timer_clear(pump->timer);
    }
}

static void pump_readable(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    pump_progress(arg);
}

static void pump_timer(void *arg)
{
    pump_progress(arg);
}

pc_netpump *pc_netpump_create(pc_loop *loop, net *n, pc_net_fn fn, void *ctx)
{
    pc_netpump *pump = cm_alloc(sizeof(*pump));
    pump->n = n;
    pump->fn = fn;
    pump->ctx = ctx;
    pump->readable = event_new(pc_loop_base(loop), net_fd(n), EV_READ | EV_PERSIST, pump_readable, pump);
    CM_ASSERT_MSG(pump->readable != NULL && event_add(pump->readable, NULL) == 0, "fd %d", net_fd(n));
    pump->timer = pc_timer_create(loop, pump_timer, pump);
    pc_timer_set(pump->timer, 0); /* the net may hold events and is not armed yet */
    return pump;
}

void pc_netpump_destroy(pc_netpump *pump)
{
    CM_ASSERT_MSG(!pump->running, "destroyed from its own event");
    event_free(pump->readable);
    pc_timer_destroy(pump->timer);
    cm_free(pump);
}

void pc_netpump_kick(pc_netpump *pump)
{
    if (!pump->running) {
        pc_timer_set(pump->timer, 0);
    }
}
