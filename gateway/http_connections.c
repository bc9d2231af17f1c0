/* Bounds on connections, which libevent 2.1 does not have: how many there may be, how many from one address,
 * how long one may take to send a request.
 *
 * We make each connection's bufferevent and keep a reference to it. When its owner has freed it (its
 * callbacks are gone, the socket is shut down) our reference is the last one; a sweep drops it. While as many
 * live as may, nothing is accepted: the kernel's backlog holds the rest. The socket must live as long as the
 * bufferevent (close on free): events on a closed descriptor would come to mean the next connection that gets
 * its number.
 *
 * libevent's own timeout begins anew with every byte; the time for a whole request is ours. It runs from the
 * first byte (of a new connection: from the start) until the request is dispatched, and not while an answer
 * is written. A connection that is to go is told that it timed out, so that evhttp takes it down by itself.
 */
#include <event2/bufferevent_ssl.h>
#include <event2/listener.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <string.h>
#include <sys/socket.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "gateway/http_private.h"

enum {
    SWEEP_MS = 1000,
    SWEEP_FULL_MS = 20,
    RATE_BYTES_MS = 32, /* who sends as fast may take as long as it takes */
};

typedef struct connection {
    struct bufferevent *bev;
    uint64_t since_ms; /* when the request that is not complete yet began; 0: there is none */
    uint64_t n_bytes;  /* of it */
    bool fresh;        /* its address was not looked at */
    uint8_t address[16];
} connection;

struct gw_connections {
    gw_gateway *gateway;
    struct evconnlistener *listener;
    pc_timer *timer;
    pc_task look;
    connection **held; /* [n_max] */
    uint32_t n, n_max;
    bool full; /* nothing is accepted */
};

static bool is_freed(struct bufferevent *bev)
{
    bufferevent_event_cb event_cb;
    bufferevent_getcb(bev, NULL, NULL, &event_cb, NULL);
    return event_cb == NULL;
}

/* An exchange watches it: there is no read callback meanwhile. */
static bool is_answering(struct bufferevent *bev)
{
    bufferevent_data_cb read_cb;
    bufferevent_getcb(bev, &read_cb, NULL, NULL, NULL);
    return read_cb == NULL;
}

static void connection_free(connection *c)
{
    bufferevent_decref(c->bev);
    cm_free(c);
}

static void connection_end(connection *c)
{
    c->since_ms = 0;
    bufferevent_trigger_event(c->bev, BEV_EVENT_READING | BEV_EVENT_TIMEOUT, 0);
}

/* ---- time for a request ---- */

static void on_input(struct evbuffer *input, const struct evbuffer_cb_info *info, void *arg)
{
    connection *c = arg;
    (void)input;
    if (info->n_added > 0 && c->since_ms == 0) {
        c->since_ms = cm_now_ms();
        c->n_bytes = 0;
    }
    c->n_bytes += info->n_added;
}

static void check_time(connection *c, uint64_t now_ms, uint64_t timeout_ms)
{
    if (is_answering(c->bev)) {
        c->since_ms = 0;
    } else if (c->since_ms != 0 && now_ms - c->since_ms > timeout_ms + c->n_bytes / RATE_BYTES_MS) {
        cm_stat_add(CM_STAT_requests_too_slow, 1);
        connection_end(c);
    }
}

void gw_connections_dispatched(gw_connections *connections, struct bufferevent *bev)
{
    for (uint32_t i = 0; i < connections->n; i++) {
        if (connections->held[i]->bev == bev) {
            connections->held[i]->since_ms = 0;
            return;
        }
    }
}

static void sweep(gw_connections *cs)
{
    uint32_t kept = 0;
    uint64_t now_ms = cm_now_ms(), timeout_ms = cs->gateway->config->http_timeout_ms;
    for (uint32_t i = 0; i < cs->n; i++) {
        connection *c = cs->held[i];
        if (!is_freed(c->bev)) {
            check_time(c, now_ms, timeout_ms);
        }
        if (is_freed(c->bev)) {
            connection_free(c);
        } else {
            cs->held[kept++] = c;
        }
    }
    cs->n = kept;
    if (cs->full && cs->n < cs->n_max) {
        cs->full = false;
        evconnlistener_enable(cs->listener);
    }
}

static void sweep_timer(void *arg)
{
    gw_connections *cs = arg;
    sweep(cs);
    if (cs->n > 0) {
        pc_timer_set(cs->timer, cs->full ? SWEEP_FULL_MS : SWEEP_MS);
    }
}

/* ---- where they come from ---- */

/* IPv4 in IPv6's form. */
static void take_address(connection *c)
{
    struct sockaddr_storage from;
    socklen_t n = sizeof(from);
    memset(&from, 0, sizeof(from));
    if (getpeername(bufferevent_getfd(c->bev), (struct sockaddr *)&from, &n) != 0) {
        return; /* it has gone already */
    }
    if (from.ss_family == AF_INET6) {
        memcpy(c->address, &((const struct sockaddr_in6 *)&from)->sin6_addr, sizeof(c->address));
    } else {
        memset(c->address + 10, 0xff, 2);
        memcpy(c->address + 12, &((const struct sockaddr_in *)&from)->sin_addr, 4);
    }
}

/* An event is small and does not wait for the client to have acknowledged the one before it. */
static void send_at_once(const connection *c)
{
    int on = 1;
    (void)setsockopt(bufferevent_getfd(c->bev), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

static uint32_t count_address(const gw_connections *cs, const connection *of)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < cs->n; i++) {
        const connection *c = cs->held[i];
        n += !c->fresh && !is_freed(c->bev) && memcmp(c->address, of->address, sizeof(c->address)) == 0;
    }
    return n;
}

/* A connection has its socket only after it was made. */
static void look(void *arg)
{
    gw_connections *cs = arg;
    uint64_t most = cs->gateway->config->connections_per_address_max;
    for (uint32_t i = 0; i < cs->n; i++) {
        connection *c = cs->held[i];
        if (!c->fresh || is_freed(c->bev)) {
            continue;
        }
        take_address(c);
        send_at_once(c);
        if (count_address(cs, c) >= most) {
            cm_stat_add(CM_STAT_connections_refused, 1);
            connection_end(c);
        }
        c->fresh = false;
    }
}

/* ---- new ones ---- */

static struct bufferevent *make_bufferevent(gw_connections *cs, struct event_base *base)
{
    pc_serve_tls *tls = cs->gateway->serve_tls;
    if (tls == NULL) {
        return bufferevent_socket_new(base, -1, BEV_OPT_CLOSE_ON_FREE);
    }
    struct bufferevent *bev = bufferevent_openssl_socket_new(
        base, -1, pc_serve_tls_accept(tls), BUFFEREVENT_SSL_ACCEPTING, BEV_OPT_CLOSE_ON_FREE);
    bufferevent_openssl_set_allow_dirty_shutdown(bev, 1); /* many clients just go */
    return bev;
}

static struct bufferevent *make_connection(struct event_base *base, void *arg)
{
    gw_connections *cs = arg;
    connection *c = cm_alloc(sizeof(*c));
    if (cs->n + 1 == cs->n_max) {
        sweep(cs);
    }
    *c = (connection){.bev = make_bufferevent(cs, base), .since_ms = cm_now_ms(), .fresh = true};
    CM_ASSERT(c->bev != NULL);
    bufferevent_incref(c->bev);
    evbuffer_add_cb(bufferevent_get_input(c->bev), on_input, c);
    cs->held[cs->n++] = c;
    if (cs->n == cs->n_max) {
        cm_warn("%u connections: no more are accepted until one ends", cs->n);
        cs->full = true;
        evconnlistener_disable(cs->listener);
    }
    if (cs->n == 1 || cs->full) {
        pc_timer_set(cs->timer, cs->full ? SWEEP_FULL_MS : SWEEP_MS);
    }
    pc_loop_post(cs->gateway->loop, &cs->look);
    return c->bev;
}

gw_connections *gw_connections_create(gw_gateway *gateway, struct evhttp *server,
                                      struct evconnlistener *listener)
{
    gw_connections *cs = cm_alloc(sizeof(*cs));
    cs->gateway = gateway;
    cs->listener = listener;
    cs->n_max = (uint32_t)gateway->config->connections_max;
    cs->held = cm_alloc(cs->n_max * sizeof(*cs->held));
    cs->timer = pc_timer_create(gateway->loop, sweep_timer, cs);
    cs->look = (pc_task){.fn = look, .arg = cs};
    evhttp_set_bevcb(server, make_connection, cs);
    return cs;
}

void gw_connections_destroy(gw_connections *connections)
{
    pc_loop_unpost(connections->gateway->loop, &connections->look);
    for (uint32_t i = 0; i < connections->n; i++) {
        connection_free(connections->held[i]);
    }
    pc_timer_destroy(connections->timer);
    cm_free(connections->held);
    cm_free(connections);
}
