/* A bound on connections, which libevent 2.1 does not have: we make each connection's bufferevent and keep a
 * reference to it. When its owner has freed it (its callbacks are gone, the socket is shut down) our
 * reference is the last one; a sweep drops it. While as many live as may, nothing is accepted: the kernel's
 * backlog holds the rest. The socket must live as long as the bufferevent (close on free): events on a closed
 * descriptor would come to mean the next connection that gets its number. */
#include <event2/listener.h>

#include "common/base/log.h"
#include "common/base/mem.h"
#include "gateway/http_private.h"

enum { SWEEP_MS = 1000, SWEEP_FULL_MS = 20 };

struct gw_connections {
    struct evconnlistener *listener;
    pc_timer *timer;
    struct bufferevent **held;
    uint32_t n, n_max;
    bool full; /* nothing is accepted */
};

static bool is_freed(struct bufferevent *bev)
{
    bufferevent_event_cb event_cb;
    bufferevent_getcb(bev, NULL, NULL, &event_cb, NULL);
    return event_cb == NULL;
}

static void sweep(gw_connections *c)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < c->n; i++) {
        if (is_freed(c->held[i])) {
            bufferevent_decref(c->held[i]);
        } else {
            c->held[kept++] = c->held[i];
        }
    }
    c->n = kept;
    if (c->full && c->n < c->n_max) {
        c->full = false;
        evconnlistener_enable(c->listener);
    }
}

static void sweep_timer(void *arg)
{
    gw_connections *c = arg;
    sweep(c);
    if (c->n > 0) {
        pc_timer_set(c->timer, c->full ? SWEEP_FULL_MS : SWEEP_MS);
    }
}

static struct bufferevent *make_connection(struct event_base *base, void *arg)
{
    gw_connections *c = arg;
    struct bufferevent *bev = bufferevent_socket_new(base, -1, BEV_OPT_CLOSE_ON_FREE);
    if (c->n + 1 == c->n_max) {
        sweep(c);
    }
    bufferevent_incref(bev);
    c->held[c->n++] = bev;
    if (c->n == c->n_max) {
        cm_warn("%u connections: no more are accepted until one ends", c->n);
        c->full = true;
        evconnlistener_disable(c->listener);
    }
    if (c->n == 1 || c->full) {
        pc_timer_set(c->timer, c->full ? SWEEP_FULL_MS : SWEEP_MS);
    }
    return bev;
}

gw_connections *gw_connections_create(gw_gateway *gateway, struct evhttp *server,
                                      struct evconnlistener *listener)
{
    gw_connections *c = cm_alloc(sizeof(*c));
    c->listener = listener;
    c->n_max = (uint32_t)gateway->config->connections_max;
    c->held = cm_alloc(c->n_max * sizeof(struct bufferevent *));
    c->timer = pc_timer_create(gateway->loop, sweep_timer, c);
    evhttp_set_bevcb(server, make_connection, c);
    return c;
}

void gw_connections_destroy(gw_connections *connections)
{
    for (uint32_t i = 0; i < connections->n; i++) {
        bufferevent_decref(connections->held[i]);
    }
    pc_timer_destroy(connections->timer);
    cm_free(connections->held);
    cm_free(connections);
}
