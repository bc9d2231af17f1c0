#include "tools/bench/bare_send.h"

#include <event2/bufferevent.h>
#include <event2/listener.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/mem.h"

enum { SEND_BYTES_MAX = 65536, SEND_OPEN_MS = 10000 };

struct bare_send {
    pc_loop *loop;
    struct evconnlistener *listener;
    struct bufferevent **readers; /* [n] */
    int *writers;                 /* [n_writer] */
    uint32_t n, n_reader, n_writer;
    pc_timer *give_up;
    bool gave_up;
};

static void send_accepted(struct evconnlistener *listener, evutil_socket_t fd, struct sockaddr *from,
                          int n_from, void *arg)
{
    bare_send *s = arg;
    (void)listener;
    (void)from;
    (void)n_from;
    if (s->n_writer == s->n) {
        close((int)fd);
        return;
    }
    s->writers[s->n_writer++] = (int)fd;
    if (s->n_writer == s->n) {
        pc_loop_stop(s->loop);
    }
}

static void send_gave_up(void *arg)
{
    ((bare_send *)arg)->gave_up = true;
    pc_loop_stop(((bare_send *)arg)->loop);
}

/* Nothing is read but by bare_send_measure. */
static cm_status send_connect(bare_send *s, const struct sockaddr *to, int n_to, cm_error *err)
{
    struct bufferevent *bev = bufferevent_socket_new(pc_loop_base(s->loop), -1, BEV_OPT_CLOSE_ON_FREE);
    if (bev == NULL) {
        return cm_error_set(err, CM_E_MEMORY, NULL, "out of memory for a connection");
    }
    s->readers[s->n_reader++] = bev;
    if (bufferevent_socket_connect(bev, to, n_to) != 0) {
        return cm_error_set(err, CM_E_IO, NULL,
                            "no loopback connection: more open files allowed (ulimit -n) may help");
    }
    bufferevent_disable(bev, EV_READ);
    return CM_OK;
}

cm_status bare_send_open(pc_loop *loop, uint32_t n, bare_send **send_out, cm_error *err)
{
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n_here = sizeof(here);
    bare_send *s = cm_alloc(sizeof(*s));
    s->loop = loop;
    s->n = n;
    s->readers = cm_alloc(sizeof(struct bufferevent *) * n);
    s->writers = cm_alloc(sizeof(int) * n);
    s->give_up = pc_timer_create(loop, send_gave_up, s);
    s->listener = evconnlistener_new_bind(pc_loop_base(loop), send_accepted, s, LEV_OPT_CLOSE_ON_FREE, (int)n,
                                          (struct sockaddr *)&here, sizeof(here));
    cm_status status = CM_OK;
    if (s->listener == NULL ||
        getsockname(evconnlistener_get_fd(s->listener), (struct sockaddr *)&here, &n_here) != 0) {
        status = cm_error_set(err, CM_E_IO, NULL, "no loopback port to listen on");
    }
    for (uint32_t i = 0; i < n && status == CM_OK; i++) {
        status = send_connect(s, (struct sockaddr *)&here, (int)n_here, err);
    }
    if (status == CM_OK) {
        pc_timer_set(s->give_up, SEND_OPEN_MS);
        pc_loop_run(loop);
        pc_timer_clear(s->give_up);
        status = s->gave_up ? cm_error_set(err, CM_E_IO, NULL,
                                           "only %u of %u loopback connections came about", s->n_writer, n)
                            : CM_OK;
    }
    if (status != CM_OK) {
        bare_send_close(s);
        return status;
    }
    *send_out = s;
    return CM_OK;
}

static void drain(bare_send *s)
{
    char bytes[4096];
    for (uint32_t i = 0; i < s->n_reader; i++) {
        while (recv(bufferevent_getfd(s->readers[i]), bytes, sizeof(bytes), MSG_DONTWAIT) > 0) {
        }
    }
}

double bare_send_measure(bare_send *s, uint32_t n_bytes, uint32_t n_times)
{
    static const char bytes[SEND_BYTES_MAX];
    uint64_t spent_ns = 0;
    CM_ASSERT_MSG(n_bytes <= SEND_BYTES_MAX, "%u bytes", n_bytes);
    for (uint32_t t = 0; t < n_times; t++) {
        uint64_t start_ns = cm_thread_cpu_ns();
        for (uint32_t i = 0; i < s->n_writer; i++) {
            ssize_t sent = send(s->writers[i], bytes, n_bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (sent != (ssize_t)n_bytes) {
                return -1;
            }
        }
        spent_ns += cm_thread_cpu_ns() - start_ns;
        drain(s);
    }
    return (double)spent_ns * 1e-9 / ((double)s->n_writer * n_times);
}

void bare_send_close(bare_send *s)
{
    for (uint32_t i = 0; i < s->n_reader; i++) {
        bufferevent_free(s->readers[i]);
    }
    for (uint32_t i = 0; i < s->n_writer; i++) {
        close(s->writers[i]);
    }
    if (s->listener != NULL) {
        evconnlistener_free(s->listener);
    }
    pc_timer_destroy(s->give_up);
    cm_free(s->readers);
    cm_free(s->writers);
    cm_free(s);
}
