#include "tests/unit/etcd_rig.h"

#include <arpa/inet.h>
#include <event2/bufferevent.h>
#include <event2/buffer.h>
#include <event2/listener.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/queue.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/base/mem.h"

enum { ETCD_STARTS_MAX = 5, ETCD_LOG_BYTES = 1 << 20 };

/* ---- etcd ---- */

static uint16_t port_of(struct evconnlistener *listener)
{
    struct sockaddr_in address;
    socklen_t n = sizeof(address);
    assert_int_equal(getsockname(evconnlistener_get_fd(listener), (struct sockaddr *)&address, &n), 0);
    return ntohs(address.sin_port);
}

static struct evconnlistener *listen_any(struct event_base *base, evconnlistener_cb fn, void *arg)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct evconnlistener *listener =
        evconnlistener_new_bind(base, fn, arg, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC, -1,
                                (struct sockaddr *)&address, sizeof(address));
    assert_non_null(listener);
    return listener;
}

/* etcd cannot choose a port itself. Somebody may take them before it does: then it is started again. */
static void choose_ports(etcd_server *server)
{
    struct event_base *base = event_base_new();
    struct evconnlistener *client = listen_any(base, NULL, NULL), *peer = listen_any(base, NULL, NULL);
    snprintf(server->client, sizeof(server->client), "127.0.0.1:%u", port_of(client));
    snprintf(server->peer, sizeof(server->peer), "127.0.0.1:%u", port_of(peer));
    evconnlistener_free(client);
    evconnlistener_free(peer);
    event_base_free(base);
}

static void run_etcd(const etcd_server *server, int log)
{
    char data[T_FOLDER_MAX + 16], client[80], peer[80], cluster[80];
    snprintf(data, sizeof(data), "%s/data", server->folder);
    snprintf(client, sizeof(client), "http://%s", server->client);
    snprintf(peer, sizeof(peer), "http://%s", server->peer);
    snprintf(cluster, sizeof(cluster), "t=http://%s", server->peer);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(log, STDOUT_FILENO);
    dup2(log, STDERR_FILENO);
    unsetenv("ETCDCTL_API"); /* it warns of what it does not know */
    /* Short elections: then leases of one second are allowed. */
    execlp("etcd", "etcd", "--name", "t", "--data-dir", data, "--listen-client-urls", client,
           "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls",
           peer, "--initial-cluster", cluster, "--heartbeat-interval", "10", "--election-timeout", "100",
           (char *)NULL);
    fprintf(stderr, "cannot start etcd: is the package etcd-server installed?\n");
    _exit(127);
}

/* Its words until it is ready; false when it ended. */
static bool hear_ready(etcd_server *server)
{
    char text[16384];
    size_t n = 0;
    for (;;) {
        ssize_t got = read(server->log, text + n, sizeof(text) - 1 - n);
        if (got <= 0) {
            break;
        }
        n += (size_t)got;
        text[n] = 0;
        if (strstr(text, "ready to serve client requests") != NULL) {
            return true;
        }
        if (n > sizeof(text) / 2) { /* keep the end */
            memmove(text, text + n - 256, 257);
            n = 256;
        }
    }
    print_message("etcd ended: %s\n", text);
    return false;
}

static void end(etcd_server *server)
{
    kill(server->pid, SIGKILL);
    waitpid(server->pid, NULL, 0);
    close(server->log);
    server->pid = 0;
}

void etcd_server_start(etcd_server *server)
{
    *server = (etcd_server){0};
    t_folder_make(server->folder, "etcd");
    for (int i = 0; i < ETCD_STARTS_MAX; i++) {
        int ends[2];
        choose_ports(server);
        assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
        fcntl(ends[1], F_SETPIPE_SZ, ETCD_LOG_BYTES); /* nobody reads on: it must find room */
        server->pid = fork();
        assert_true(server->pid >= 0);
        if (server->pid == 0) {
            run_etcd(server, ends[1]);
        }
        close(ends[1]);
        server->log = ends[0];
        if (hear_ready(server)) {
            return;
        }
        end(server);
    }
    fail_msg("etcd does not start");
}

void etcd_server_stop(etcd_server *server)
{
    if (server->pid != 0) {
        end(server);
    }
    t_folder_remove(server->folder);
}

void etcd_server_pause(etcd_server *server)
{
    assert_int_equal(kill(server->pid, SIGSTOP), 0);
}

void etcd_server_go_on(etcd_server *server)
{
    assert_int_equal(kill(server->pid, SIGCONT), 0);
}

/* ---- relay ---- */

typedef struct relayed {
    LIST_ENTRY(relayed) link;
    relay *r;
    struct bufferevent *near, *far; /* who came to us; etcd */
} relayed;

struct relay {
    struct event_base *base;
    struct evconnlistener *listener;
    char address[64];
    struct sockaddr_in to;
    bool hold_requests, hold_answers;
    LIST_HEAD(, relayed) all;
};

static void relayed_end(relayed *c)
{
    LIST_REMOVE(c, link);
    bufferevent_free(c->near);
    bufferevent_free(c->far);
    cm_free(c);
}

static void on_event(struct bufferevent *b, short what, void *arg)
{
    (void)b;
    if ((what & (BEV_EVENT_EOF | BEV_EVENT_ERROR)) != 0) {
        relayed_end(arg);
    }
}

static void pass_on(struct bufferevent *from, void *arg)
{
    relayed *c = arg;
    bufferevent_write_buffer(from == c->near ? c->far : c->near, bufferevent_get_input(from));
}

static void relayed_apply(relayed *c)
{
    (c->r->hold_requests ? bufferevent_disable : bufferevent_enable)(c->near, EV_READ);
    (c->r->hold_answers ? bufferevent_disable : bufferevent_enable)(c->far, EV_READ);
}

static void on_accept(struct evconnlistener *listener, evutil_socket_t fd, struct sockaddr *from, int n,
                      void *arg)
{
    relay *r = arg;
    relayed *c = cm_alloc(sizeof(*c));
    (void)listener;
    (void)from;
    (void)n;
    c->r = r;
    c->near = bufferevent_socket_new(r->base, fd, BEV_OPT_CLOSE_ON_FREE);
    c->far = bufferevent_socket_new(r->base, -1, BEV_OPT_CLOSE_ON_FREE);
    bufferevent_setcb(c->near, pass_on, NULL, on_event, c);
    bufferevent_setcb(c->far, pass_on, NULL, on_event, c);
    assert_int_equal(bufferevent_socket_connect(c->far, (struct sockaddr *)&r->to, sizeof(r->to)), 0);
    LIST_INSERT_HEAD(&r->all, c, link);
    relayed_apply(c);
}

relay *relay_create(struct event_base *base, const char *to)
{
    int n = sizeof(((relay *)0)->to);
    relay *r = cm_alloc(sizeof(*r));
    r->base = base;
    LIST_INIT(&r->all);
    assert_int_equal(evutil_parse_sockaddr_port(to, (struct sockaddr *)&r->to, &n), 0);
    r->listener = listen_any(base, on_accept, r);
    snprintf(r->address, sizeof(r->address), "127.0.0.1:%u", port_of(r->listener));
    return r;
}

void relay_destroy(relay *r)
{
    while (!LIST_EMPTY(&r->all)) {
        relayed_end(LIST_FIRST(&r->all));
    }
    evconnlistener_free(r->listener);
    cm_free(r);
}

const char *relay_address(const relay *r)
{
    return r->address;
}

void relay_hold(relay *r, bool requests, bool answers)
{
    relayed *c;
    r->hold_requests = requests;
    r->hold_answers = answers;
    LIST_FOREACH (c, &r->all, link) {
        relayed_apply(c);
    }
}
