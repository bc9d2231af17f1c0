#include "tools/bench/stream_load.h"

#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/util.h>
#include <netinet/in.h>
#include <string.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"

enum { LOAD_TAIL = 24 }; /* "data: [DONE]" and the end of its chunk */

typedef struct load_stream {
    stream_load *load;
    struct bufferevent *bev;  /* NULL: closed */
    char tail[LOAD_TAIL + 1]; /* the last bytes of the answer */
    bool talks;
} load_stream;

struct stream_load {
    load_stream *streams; /* [n] */
    uint32_t n;
    stream_load_counts counts;
};

static void stream_close(load_stream *s)
{
    bufferevent_free(s->bev);
    s->bev = NULL;
    s->load->counts.n_talking -= s->talks;
    s->talks = false;
}

static void stream_keep_tail(load_stream *s, const char *bytes, size_t n)
{
    size_t have = strlen(s->tail), from = n > LOAD_TAIL ? n - LOAD_TAIL : 0;
    n -= from;
    size_t drop = have + n > LOAD_TAIL ? have + n - LOAD_TAIL : 0;
    memmove(s->tail, s->tail + drop, have - drop);
    memcpy(s->tail + have - drop, bytes + from, n);
    s->tail[have - drop + n] = '\0';
}

static void stream_read(struct bufferevent *bev, void *arg)
{
    load_stream *s = arg;
    char bytes[4096];
    size_t n;
    bool first = !s->talks;
    while ((n = bufferevent_read(bev, bytes, sizeof(bytes))) > 0) {
        if (first && (n < 12 || memcmp(bytes, "HTTP/1.1 200", 12) != 0)) {
            s->load->counts.n_failed++;
            stream_close(s);
            return;
        }
        first = false;
        s->load->counts.n_bytes += n;
        stream_keep_tail(s, bytes, n);
    }
    s->load->counts.n_talking += !s->talks;
    s->talks = true;
}

static void stream_event(struct bufferevent *bev, short what, void *arg)
{
    load_stream *s = arg;
    if ((what & BEV_EVENT_CONNECTED) != 0) {
        return;
    }
    stream_read(bev, s);
    if (s->bev == NULL) {
        return; /* failed while it was read */
    }
    bool done = strstr(s->tail, "[DONE]") != NULL;
    s->load->counts.n_done += done;
    s->load->counts.n_failed += !done;
    stream_close(s);
}

static cm_status stream_open(load_stream *s, struct event_base *base, const struct sockaddr *to, int n_to,
                             const cm_bytes *request, cm_error *err)
{
    s->bev = bufferevent_socket_new(base, -1, BEV_OPT_CLOSE_ON_FREE);
    if (s->bev == NULL) {
        return cm_error_set(err, CM_E_MEMORY, NULL, "out of memory for a connection");
    }
    bufferevent_setcb(s->bev, stream_read, NULL, stream_event, s);
    bufferevent_enable(s->bev, EV_READ | EV_WRITE);
    if (bufferevent_socket_connect(s->bev, to, n_to) != 0 ||
        bufferevent_write(s->bev, request->data, request->len) != 0) {
        return cm_error_set(err, CM_E_IO, NULL,
                            "no connection to the gateway: more open files allowed (ulimit -n) may help");
    }
    return CM_OK;
}

cm_status stream_load_begin(const stream_load_options *options, stream_load **load_out, cm_error *err)
{
    struct sockaddr_in to;
    int n_to = sizeof(to);
    if (evutil_parse_sockaddr_port(options->address, (struct sockaddr *)&to, &n_to) != 0) {
        return cm_error_set(err, CM_E_INVALID, "address", "%s is no IPv4:port", options->address);
    }
    cm_bytes body, request;
    cm_bytes_init(&body, 0);
    cm_bytes_init(&request, 0);
    stream_load *load = cm_alloc(sizeof(*load));
    load->n = options->n;
    load->streams = cm_alloc(sizeof(*load->streams) * options->n);
    cm_status status = CM_OK;
    for (uint32_t i = 0; i < options->n && status == CM_OK; i++) {
        load->streams[i].load = load;
        cm_bytes_clear(&body);
        cm_bytes_clear(&request);
        options->write_body(options->ctx, i, &body);
        cm_bytes_printf(&request,
                        "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n"
                        "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                        body.len, cm_bytes_text(&body));
        status = stream_open(&load->streams[i], pc_loop_base(options->loop), (struct sockaddr *)&to, n_to,
                             &request, err);
    }
    cm_bytes_fini(&body);
    cm_bytes_fini(&request);
    if (status != CM_OK) {
        stream_load_end(load);
        return status;
    }
    *load_out = load;
    return CM_OK;
}

stream_load_counts stream_load_get(const stream_load *load)
{
    return load->counts;
}

bool stream_load_drop(stream_load *load)
{
    for (uint32_t i = 0; i < load->n; i++) {
        if (load->streams[i].talks) {
            stream_close(&load->streams[i]);
            return true;
        }
    }
    return false;
}

void stream_load_end(stream_load *load)
{
    if (load == NULL) {
        return;
    }
    for (uint32_t i = 0; i < load->n; i++) {
        if (load->streams[i].bev != NULL) {
            stream_close(&load->streams[i]);
        }
    }
    cm_free(load->streams);
    cm_free(load);
}
