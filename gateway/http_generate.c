/* Generating requests: one exchange from the parsed body to the last byte of the answer. The status is sent
 * once a router has accepted the request, never before; a client that goes away, reads nothing or is too slow
 * ends its stream. */
#include <string.h>

#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/stats.h"
#include "gateway/http_private.h"

enum {
    INPUT_WHILE_ANSWERING = 64 * 1024
}; /* bytes of further requests on the connection; then it is not read */

/* One of the answers of an exchange. */
typedef struct exchange_choice {
    gw_exchange *x;
    gw_stream *stream; /* NULL: it has ended */
    gw_openai_choice *writer;
} exchange_choice;

struct gw_exchange {
    TAILQ_ENTRY(gw_exchange) link;
    gw_http *http;
    struct evhttp_request *req;
    exchange_choice *choices;
    uint32_t n_choice, n_started, n_finished;
    gw_openai *writer;
    bool sse;                 /* answered in events */
    bool head_sent;           /* status and headers are out: errors go into the body */
    struct evbuffer *pending; /* of this step, not yet given to the connection */
    pc_timer *keep_alive;
};

static struct timeval timeval_ms(uint64_t ms)
{
    return (struct timeval){.tv_sec = (time_t)(ms / 1000), .tv_usec = (suseconds_t)(ms % 1000 * 1000)};
}

/* ---- the connection under it ---- */

/* evhttp stops reading when a request is complete, and a connection that is not read never tells that it was
 * closed. Its own read callback would take more input for a broken state, so there is none meanwhile. */
static void watch_connection(gw_exchange *x, struct evhttp_connection *connection)
{
    struct bufferevent *bev = evhttp_connection_get_bufferevent(connection);
    struct timeval timeout = timeval_ms(x->http->gateway->config->http_timeout_ms);
    bufferevent_data_cb write_cb;
    bufferevent_event_cb event_cb;
    void *arg;
    bufferevent_getcb(bev, NULL, &write_cb, &event_cb, &arg);
    bufferevent_setcb(bev, NULL, write_cb, event_cb, arg);
    bufferevent_setwatermark(bev, EV_READ, 0, INPUT_WHILE_ANSWERING);
    bufferevent_set_timeouts(bev, NULL, &timeout);
    bufferevent_enable(bev, EV_READ);
}

static void unwatch_connection(gw_exchange *x)
{
    struct evhttp_connection *connection = evhttp_request_get_connection(x->req);
    struct bufferevent *bev = evhttp_connection_get_bufferevent(connection);
    struct timeval timeout = timeval_ms(x->http->gateway->config->http_timeout_ms);
    bufferevent_setwatermark(bev, EV_READ, 0, 0);
    bufferevent_set_timeouts(bev, &timeout, &timeout);
    evhttp_connection_set_closecb(connection, NULL, NULL);
}

static void cancel_streams(gw_exchange *x)
{
    for (uint32_t i = 0; i < x->n_choice; i++) {
        gw_stream *stream = x->choices[i].stream;
        x->choices[i].stream = NULL;
        if (stream != NULL) {
            gw_stream_cancel(stream);
        }
    }
}

static void exchange_free(gw_exchange *x)
{
    gw_http *http = x->http;
    cancel_streams(x);
    cm_free(x->choices);
    TAILQ_REMOVE(&http->exchanges, x, link);
    http->n_exchanges--;
    pc_timer_destroy(x->keep_alive);
    evbuffer_free(x->pending);
    gw_openai_destroy(x->writer);
    cm_free(x);
    gw_drain_check(http->gateway);
}

/* All of the answer was written. */
static void exchange_written(struct evhttp_request *req, void *arg)
{
    (void)req;
    unwatch_connection(arg);
    exchange_free(arg);
}

/* The connection goes down. A request that was not answered to its end has been taken off it by evhttp and is
 * ours. */
static void exchange_closed(struct evhttp_connection *connection, void *arg)
{
    gw_exchange *x = arg;
    (void)connection;
    if (evhttp_request_get_connection(x->req) == NULL) {
        evhttp_request_free(x->req);
    }
    exchange_free(x);
}

/* Ends the connection from our side, unsent bytes and all; the request goes with it. */
static void exchange_drop(gw_exchange *x)
{
    struct evhttp_connection *connection = evhttp_request_get_connection(x->req);
    evhttp_connection_set_closecb(connection, NULL, NULL);
    bufferevent_disable(evhttp_connection_get_bufferevent(connection), EV_READ | EV_WRITE);
    exchange_free(x);
    evhttp_connection_free(connection);
}

void gw_exchanges_drop_all(gw_http *http)
{
    gw_exchange *x;
    while ((x = TAILQ_FIRST(&http->exchanges)) != NULL) {
        exchange_drop(x);
    }
}

/* ---- writing ---- */

static void send_head(gw_exchange *x)
{
    struct evkeyvalq *out = evhttp_request_get_output_headers(x->req);
    evhttp_add_header(out, "Content-Type", x->sse ? "text/event-stream; charset=utf-8" : "application/json");
    if (x->sse) {
        evhttp_add_header(out, "Cache-Control", "no-cache");
        evhttp_add_header(out, "X-Accel-Buffering", "no");
    }
    evhttp_send_reply_start(x->req, 200, "OK");
    x->head_sent = true;
}

/* false: the client reads too slowly; x is gone. */
static bool write_pending(gw_exchange *x)
{
    const gw_config *config = x->http->gateway->config;
    struct bufferevent *bev = evhttp_connection_get_bufferevent(evhttp_request_get_connection(x->req));
    if (evbuffer_get_length(x->pending) > 0) {
        evhttp_send_reply_chunk(x->req, x->pending);
        pc_timer_set(x->keep_alive, config->keep_alive_ms);
    }
    size_t n = evbuffer_get_length(bufferevent_get_output(bev));
    if (n > config->slow_reader_bytes) {
        cm_warn("a client has not read %zu bytes of its answer: ended", n);
        exchange_drop(x);
        return false;
    }
    return true;
}

static void emit_object(void *ctx, const char *json, size_t n_bytes, bool last)
{
    gw_exchange *x = ctx;
    (void)last;
    evbuffer_add(x->pending, "data: ", x->sse ? 6 : 0);
    evbuffer_add(x->pending, json, n_bytes);
    evbuffer_add(x->pending, "\n\n", x->sse ? 2 : 0);
}

static void keep_alive(void *arg)
{
    gw_exchange *x = arg;
    if (!x->head_sent) {
        send_head(x); /* a whole object may begin with empty lines */
    }
    evbuffer_add_printf(x->pending, "%s", x->sse ? ": keep-alive\n\n" : "\n");
    (void)write_pending(x);
}

/* The answer is complete in pending; x may be gone afterwards. */
static void end_answer(gw_exchange *x)
{
    pc_timer_clear(x->keep_alive);
    if (!x->head_sent) {
        evhttp_add_header(evhttp_request_get_output_headers(x->req), "Content-Type", "application/json");
        evhttp_send_reply(x->req, 200, "OK", x->pending);
        return;
    }
    if (write_pending(x)) {
        pc_timer_clear(x->keep_alive);
        evhttp_send_reply_end(x->req);
    }
}

/* ---- the streams' events ----
 * Choices start, speak and finish in any order. What is said before all of them were accepted waits in
 * pending: until then the whole request may still be refused. */

static void on_started(void *ctx, const gw_start *start)
{
    exchange_choice *choice = ctx;
    gw_exchange *x = choice->x;
    gw_openai_events()->started(choice->writer, start);
    if (++x->n_started < x->n_choice) {
        return;
    }
    pc_timer_set(x->keep_alive, x->http->gateway->config->keep_alive_ms);
    if (x->sse) {
        send_head(x);
        (void)write_pending(x);
    }
}

static void on_piece(void *ctx, const md_piece *piece)
{
    exchange_choice *choice = ctx;
    gw_openai_events()->piece(choice->writer, piece);
}

static void on_logprobs(void *ctx, const gw_logprobs *logprobs)
{
    exchange_choice *choice = ctx;
    gw_openai_events()->logprobs(choice->writer, logprobs);
}

static void on_flush(void *ctx)
{
    exchange_choice *choice = ctx;
    gw_exchange *x = choice->x;
    if (x->sse && x->n_started == x->n_choice) {
        (void)write_pending(x);
    }
}

static void on_finished(void *ctx, const gw_finish *finish)
{
    exchange_choice *choice = ctx;
    gw_exchange *x = choice->x;
    choice->stream = NULL;
    gw_openai_events()->finished(choice->writer, finish);
    if (++x->n_finished < x->n_choice) {
        on_flush(choice);
        return;
    }
    if (x->sse) {
        evbuffer_add_printf(x->pending, "data: [DONE]\n\n");
    }
    end_answer(x);
}

/* One that fails takes the others with it. */
static void on_failed(void *ctx, const gw_error *error)
{
    exchange_choice *choice = ctx;
    gw_exchange *x = choice->x;
    choice->stream = NULL;
    cancel_streams(x);
    if (!x->head_sent) {
        pc_timer_clear(x->keep_alive);
        gw_reply_error(x->req, error);
        return;
    }
    cm_bytes body;
    cm_bytes_init(&body, 0);
    gw_openai_error(error, &body);
    emit_object(x, cm_bytes_text(&body), body.len, true);
    cm_bytes_fini(&body);
    end_answer(x);
}

/* ---- begin ---- */

static gw_exchange *exchange_make(gw_http *http, struct evhttp_request *req, gw_ask_kind kind,
                                  const json_t *body)
{
    gw_exchange *x = cm_alloc(sizeof(*x));
    gw_info info;
    gw_gateway_info(http->gateway, &info);
    x->http = http;
    x->req = req;
    x->sse = gw_request_streams(body);
    x->writer = gw_openai_create(kind, body, info.fingerprint, emit_object, x);
    x->n_choice = gw_request_choices(body);
    x->choices = cm_alloc(sizeof(*x->choices) * x->n_choice);
    x->pending = evbuffer_new();
    x->keep_alive = pc_timer_create(http->gateway->loop, keep_alive, x);
    TAILQ_INSERT_TAIL(&http->exchanges, x, link);
    http->n_exchanges++;
    return x;
}

static cm_status open_choices(gw_exchange *x, gw_ask *ask, gw_error *error_out)
{
    static const gw_stream_events events = {.started = on_started,
                                            .piece = on_piece,
                                            .logprobs = on_logprobs,
                                            .flush = on_flush,
                                            .finished = on_finished,
                                            .failed = on_failed};
    for (uint32_t i = 0; i < x->n_choice; i++) {
        exchange_choice *choice = &x->choices[i];
        *choice = (exchange_choice){.x = x, .writer = gw_openai_choice_of(x->writer, i)};
        ask->choice = i;
        CM_TRY(gw_stream_open(x->http->gateway, ask, &events, choice, &choice->stream, error_out));
    }
    return CM_OK;
}

void gw_http_generate(gw_http *http, struct evhttp_request *req, gw_ask_kind kind)
{
    json_t *body = gw_request_json(http, req);
    if (body == NULL) {
        cm_stat_add(CM_STAT_requests, 1);
        cm_stat_add(CM_STAT_requests_refused, 1);
        return;
    }
    gw_ask ask = {.kind = kind,
                  .body = body,
                  .deadline_ms = UINT64_MAX,
                  .skip_special = true,
                  .choices_max = (uint32_t)http->gateway->config->choices_max};
    gw_error error;
    gw_exchange *x = exchange_make(http, req, kind, body);
    cm_status status = open_choices(x, &ask, &error);
    json_decref(body);
    if (status != CM_OK) {
        exchange_free(x);
        gw_reply_error(req, &error);
        return;
    }
    struct evhttp_connection *connection = evhttp_request_get_connection(req);
    evhttp_connection_set_closecb(connection, exchange_closed, x);
    evhttp_request_set_on_complete_cb(req, exchange_written, x);
    watch_connection(x, connection);
}
