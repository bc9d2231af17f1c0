/* Generating requests: one exchange from the parsed body to the last byte of the answer. The status is sent
 * once a router has accepted the request, never before; a client that goes away, reads nothing or is too slow
 * ends its stream. */
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/base/stats.h"
#include "gateway/http_private.h"
#include "gateway/surface.h"

enum {
    INPUT_WHILE_ANSWERING = 64 * 1024, /* bytes of further requests on the connection; then it is not read */
    GONE_STATUS = 499,                 /* in the log: the client went away before it was told anything */
};

/* One of the answers of an exchange. */
typedef struct exchange_choice {
    gw_exchange *x;
    gw_stream *stream; /* NULL: it has ended */
    void *writer;      /* ctx of its events */
    uint32_t n_events; /* made */
    uint32_t n_skip;   /* of these, the client has from before */
    bool finished;
    bool held; /* finish waits to be told */
    gw_finish finish;
} exchange_choice;

struct gw_exchange {
    TAILQ_ENTRY(gw_exchange) link;
    gw_http *http;
    gw_visit *visit;
    struct evhttp_request *req;
    const gw_surface *surface; /* NULL while it is looked for */
    exchange_choice *choices;
    uint32_t n_choice, n_admitted, n_started, n_finished, n_held;
    void *writer;
    gw_origin *origin;
    gw_seek *seek;        /* what the client comes back for is looked for; there are no choices yet */
    gw_event_id from;     /* the last event that it has, when it comes back */
    bool resumable;       /* its streams go on for a while if it goes away */
    bool sse;             /* answered in events */
    bool begun;           /* the writer told its first events before all was accepted */
    bool told_id;         /* some event was told with one */
    bool returns;         /* its client came back: it has the id */
    int status;           /* that was told; 0: none yet */
    bool head_sent;       /* status and headers are out: errors go into the body */
    gw_wire wire;         /* since then */
    cm_bytes pending;     /* of this step, not yet given to the connection */
    size_t burst_bytes;   /* the most that pending ever was */
    uint64_t told_ms;     /* when the client last heard something, or began to wait */
    pc_timer *keep_alive; /* looks when that was; it is not put off at each word */
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

/* Whoever may come back finds them at their routers. */
static void detach_streams(gw_exchange *x)
{
    for (uint32_t i = 0; i < x->n_choice; i++) {
        gw_stream *stream = x->choices[i].stream;
        x->choices[i].stream = NULL;
        if (stream != NULL) {
            gw_stream_detach(stream);
        }
    }
}

static void exchange_free(gw_exchange *x)
{
    gw_http *http = x->http;
    if (x->seek != NULL) {
        gw_seek_cancel(x->seek);
    }
    if (x->resumable && (x->told_id || x->returns)) {
        detach_streams(x); /* who was told no id cannot come back */
    }
    cancel_streams(x);
    gw_visit_end(x->visit, x->status != 0 ? x->status : GONE_STATUS);
    gw_origin_release(x->origin);
    cm_free(x->choices);
    TAILQ_REMOVE(&http->exchanges, x, link);
    http->n_exchanges--;
    pc_timer_destroy(x->keep_alive);
    cm_bytes_fini(&x->pending);
    if (x->writer != NULL) {
        x->surface->writer.destroy(x->writer);
    }
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
    struct evhttp_request *req = x->req;
    (void)connection;
    exchange_free(x);
    if (evhttp_request_get_connection(req) == NULL) {
        evhttp_request_free(req);
    }
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

/* Instead of an answer. */
static void refuse(gw_exchange *x, const gw_error *error)
{
    gw_reply_refusal(x->http, x->req, x->surface, error);
    x->status = evhttp_request_get_response_code(x->req);
}

static void send_head(gw_exchange *x)
{
    struct evkeyvalq *out = evhttp_request_get_output_headers(x->req);
    if (x->head_sent) {
        return; /* with a keep-alive */
    }
    evhttp_add_header(out, "Content-Type", x->sse ? "text/event-stream; charset=utf-8" : "application/json");
    if (x->sse) {
        evhttp_add_header(out, "Cache-Control", "no-cache");
        evhttp_add_header(out, "X-Accel-Buffering", "no");
    }
    evhttp_send_reply_start(x->req, 200, "OK");
    gw_wire_open(x->http, x->req, &x->wire);
    x->status = 200;
    x->head_sent = true;
}

/* false: the client reads too slowly; x is gone. What we say all at once may be long (an answer is told again
 * as a whole when it ends): that is not the client's slowness. */
static bool write_pending(gw_exchange *x)
{
    const gw_config *config = x->http->gateway->config;
    size_t burst = x->pending.len;
    x->burst_bytes = burst > x->burst_bytes ? burst : x->burst_bytes;
    if (burst > 0) {
        gw_wire_write(&x->wire, &x->pending);
        cm_bytes_clear(&x->pending);
        x->told_ms = cm_now_ms();
    }
    size_t n = gw_wire_waiting(&x->wire);
    if (n > config->slow_reader_bytes + x->burst_bytes) {
        cm_warn("a client has not read %zu bytes of its answer: ended", n);
        exchange_drop(x);
        return false;
    }
    return true;
}

/* How far the client is once it has what is in pending: for each choice the events it has. */
static void put_event_id(gw_exchange *x)
{
    cm_bytes_append_text(&x->pending, "id: ");
    cm_bytes_append_text(&x->pending, gw_origin_id(x->origin));
    for (uint32_t i = 0; i < x->n_choice; i++) {
        const exchange_choice *choice = &x->choices[i];
        uint32_t n = choice->n_events > choice->n_skip ? choice->n_events : choice->n_skip;
        cm_bytes_printf(&x->pending, "%c%u", i == 0 ? ':' : '.', n);
    }
    cm_bytes_append(&x->pending, "\n", 1);
}

static void put_event(gw_exchange *x, const char *data, size_t n_bytes)
{
    static const char before[] = "{\"type\":\"";
    if (x->surface->named_events) {
        CM_ASSERT(strncmp(data, before, strlen(before)) == 0);
        const char *type = data + strlen(before);
        cm_bytes_printf(&x->pending, "event: %.*s\n", (int)strcspn(type, "\""), type);
    }
    cm_bytes_append(&x->pending, "data: ", 6);
    cm_bytes_append(&x->pending, data, n_bytes);
    cm_bytes_append(&x->pending, "\n\n", 2);
}

static void emit_event(gw_exchange *x, uint32_t i_choice, const char *data, size_t n_bytes)
{
    exchange_choice *choice = &x->choices[i_choice];
    if (++choice->n_events > choice->n_skip) {
        put_event_id(x);
        x->told_id = true;
        put_event(x, data, n_bytes);
    }
}

static void emit_object(void *ctx, uint32_t choice, const char *json, size_t n_bytes, bool last)
{
    gw_exchange *x = ctx;
    (void)last;
    if (x->sse) {
        emit_event(x, choice, json, n_bytes);
    } else {
        cm_bytes_append(&x->pending, json, n_bytes);
    }
}

/* Some clients count events alone: they must hear one before a router has accepted the request, too. */
static void begin_early(gw_exchange *x)
{
    const gw_writer_ops *writer = &x->surface->writer;
    if (writer->begin != NULL && !x->begun && x->n_started < x->n_choice) {
        x->begun = true;
        writer->begin(x->writer, gw_origin_id(x->origin), x->http->gateway->model,
                      gw_origin_created_s(x->origin));
    }
}

/* An empty line ends an event: openai-python keeps the id of the last one and would make an event without
 * data of the comment. Before any id it makes none, and proxies may wait for the line. */
static void put_keep_alive(gw_exchange *x)
{
    send_head(x); /* a whole object may begin with empty lines */
    if (x->sse) {
        begin_early(x);
    }
    if (x->sse && x->surface->writer.keep_alive != NULL && (x->begun || x->n_started == x->n_choice)) {
        cm_bytes event;
        cm_bytes_init(&event, 0);
        x->surface->writer.keep_alive(x->writer, &event);
        put_event(x, cm_bytes_text(&event), event.len); /* without an id: it is none of the answer's */
        cm_bytes_fini(&event);
    } else {
        cm_bytes_append_text(&x->pending, !x->sse      ? "\n"
                                          : x->told_id ? ": keep-alive\n"
                                                       : ": keep-alive\n\n");
    }
}

static void keep_alive(void *arg)
{
    gw_exchange *x = arg;
    uint64_t every_ms = x->http->gateway->config->keep_alive_ms, quiet_ms = cm_now_ms() - x->told_ms;
    if (quiet_ms < every_ms) {
        pc_timer_set(x->keep_alive, every_ms - quiet_ms);
        return;
    }
    put_keep_alive(x);
    if (write_pending(x)) {
        pc_timer_set(x->keep_alive, every_ms);
    }
}

static void expect_keep_alive(gw_exchange *x)
{
    x->told_ms = cm_now_ms();
    pc_timer_set(x->keep_alive, x->http->gateway->config->keep_alive_ms);
}

/* The answer is complete in pending; x may be gone afterwards. */
static void end_answer(gw_exchange *x)
{
    pc_timer_clear(x->keep_alive);
    if (!x->head_sent) {
        gw_reply(x->req, 200, "application/json", x->pending.data, x->pending.len);
        x->status = 200;
        return;
    }
    if (write_pending(x)) {
        evhttp_send_reply_end(x->req);
    }
}

/* ---- the streams' events ----
 * Choices start, speak and finish in any order. What is said before all of them were accepted waits in
 * pending: until then the whole request may still be refused. */

/* Nothing of what they asked is wrong: from now on the client may have to wait. */
static void on_admitted(void *ctx)
{
    gw_exchange *x = ((exchange_choice *)ctx)->x;
    if (++x->n_admitted == x->n_choice) {
        expect_keep_alive(x);
    }
}

static const gw_stream_events *events_of(const gw_exchange *x)
{
    return x->surface->writer.events();
}

static void on_started(void *ctx, const gw_start *start)
{
    exchange_choice *choice = ctx;
    gw_exchange *x = choice->x;
    events_of(x)->started(choice->writer, start);
    if (++x->n_started < x->n_choice) {
        return;
    }
    expect_keep_alive(x);
    if (x->sse) {
        send_head(x);
        (void)write_pending(x);
    }
}

static void on_piece(void *ctx, const md_piece *piece)
{
    exchange_choice *choice = ctx;
    events_of(choice->x)->piece(choice->writer, piece);
}

static void on_logprobs(void *ctx, const gw_logprobs *logprobs)
{
    exchange_choice *choice = ctx;
    events_of(choice->x)->logprobs(choice->writer, logprobs);
}

static void write_now(gw_exchange *x)
{
    if (x->sse && x->n_started == x->n_choice) {
        (void)write_pending(x);
    }
}

static void finish_choice(exchange_choice *choice)
{
    gw_exchange *x = choice->x;
    events_of(x)->finished(choice->writer, &choice->finish);
    choice->held = false;
    x->n_held--;
    x->n_finished++;
}

static bool caught_up(const gw_exchange *x)
{
    for (uint32_t i = 0; i < x->n_choice; i++) {
        const exchange_choice *choice = &x->choices[i];
        if (!choice->finished && choice->n_events < choice->n_skip) {
            return false;
        }
    }
    return true;
}

static void finish_held(gw_exchange *x, bool client_has_it)
{
    for (uint32_t i = 0; i < x->n_choice; i++) {
        exchange_choice *choice = &x->choices[i];
        if (choice->held && (choice->n_events < choice->n_skip) == client_has_it) {
            finish_choice(choice);
        }
    }
}

/* The last choice that finishes carries the usage: a client that has the finishes of some must see the
 * others' after them, so these wait until everything it has was made again. x may be gone afterwards. */
static void tell_finishes(gw_exchange *x)
{
    finish_held(x, true);
    if (caught_up(x)) {
        finish_held(x, false);
    }
    if (x->n_finished < x->n_choice) {
        write_now(x);
        return;
    }
    if (x->sse && !x->surface->named_events && !x->surface->no_done) {
        emit_event(x, 0, "[DONE]", 6);
    }
    end_answer(x);
}

static void on_flush(void *ctx)
{
    exchange_choice *choice = ctx;
    if (choice->x->n_held > 0) {
        tell_finishes(choice->x);
    } else {
        write_now(choice->x);
    }
}

static void on_finished(void *ctx, const gw_finish *finish)
{
    exchange_choice *choice = ctx;
    gw_exchange *x = choice->x;
    choice->stream = NULL;
    choice->finished = choice->held = true;
    x->n_held++;
    choice->finish = *finish;
    if (x->sse && x->n_choice > 1) { /* it may wait for the others: what is only lent does not */
        choice->finish.stop_string = NULL;
        choice->finish.parser = NULL;
    }
    tell_finishes(x);
}

static void put_failure(gw_exchange *x, const gw_error *error)
{
    cm_bytes body;
    cm_bytes_init(&body, 0);
    if (x->surface->writer.failure != NULL) {
        x->surface->writer.failure(x->writer, error, &body);
    } else {
        x->surface->error(error, gw_reply_request_id(x->req), &body);
    }
    if (x->sse) {
        put_event(x, cm_bytes_text(&body), body.len); /* without an id: it is none of the answer's */
    } else {
        cm_bytes_append(&x->pending, body.data, body.len);
    }
    cm_bytes_fini(&body);
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
        refuse(x, error);
        return;
    }
    put_failure(x, error);
    end_answer(x);
}

/* ---- begin ---- */

static gw_exchange *exchange_make(gw_http *http, struct evhttp_request *req)
{
    gw_exchange *x = cm_alloc(sizeof(*x));
    struct evhttp_connection *connection = evhttp_request_get_connection(req);
    x->http = http;
    x->visit = http->visit;
    http->visit = NULL;
    x->req = req;
    cm_bytes_init(&x->pending, 0);
    x->keep_alive = pc_timer_create(http->gateway->loop, keep_alive, x);
    TAILQ_INSERT_TAIL(&http->exchanges, x, link);
    http->n_exchanges++;
    evhttp_connection_set_closecb(connection, exchange_closed, x);
    evhttp_request_set_on_complete_cb(req, exchange_written, x);
    watch_connection(x, connection);
    return x;
}

static cm_status open_choices(gw_exchange *x, gw_ask *ask, const uint64_t *router, gw_error *error_out)
{
    static const gw_stream_events events = {.admitted = on_admitted,
                                            .started = on_started,
                                            .piece = on_piece,
                                            .logprobs = on_logprobs,
                                            .flush = on_flush,
                                            .finished = on_finished,
                                            .failed = on_failed};
    for (uint32_t i = 0; i < x->n_choice; i++) {
        exchange_choice *choice = &x->choices[i];
        *choice = (exchange_choice){.x = x, .writer = x->surface->writer.choice(x->writer, i)};
        choice->n_skip = i < x->from.n ? x->from.count[i] : 0;
        ask->choice = i;
        ask->router = router != NULL ? router[i] : 0;
        CM_TRY(gw_stream_open(x->http->gateway, ask, &events, choice, &choice->stream, error_out));
    }
    return CM_OK;
}

/* given: the client's body. origin is given. router: [n] who has its choices; NULL: nobody, it is a new one.
 */
static void exchange_begin(gw_exchange *x, const gw_surface *surface, const json_t *given, const json_t *body,
                           gw_origin *origin, const uint64_t *router)
{
    gw_gateway *gateway = x->http->gateway;
    gw_info info;
    gw_error error;
    gw_gateway_info(gateway, &info);
    x->surface = surface;
    x->origin = origin;
    x->sse = gw_request_streams(body);
    x->resumable = x->sse && gw_request_is_resumable(body);
    x->writer = surface->writer.create(given, info.fingerprint, emit_object, x);
    x->n_choice = gw_request_choices(body);
    x->choices = cm_alloc(sizeof(*x->choices) * x->n_choice);
    gw_ask ask = {.kind = surface->kind,
                  .body = body,
                  .visit = x->visit,
                  .origin = origin,
                  .deadline_ms = UINT64_MAX,
                  .skip_special = true,
                  .choices_max = (uint32_t)gateway->config->choices_max};
    if (open_choices(x, &ask, router, &error) != CM_OK) {
        cancel_streams(x);
        refuse(x, &error);
    }
}

/* A new reference. */
static cm_status chat_body(const gw_surface *surface, const json_t *given, json_t **body_out,
                           gw_error *error_out)
{
    if (surface->body != NULL) {
        return surface->body(given, body_out, error_out);
    }
    *body_out = json_incref((json_t *)(uintptr_t)given);
    return CM_OK;
}

static gw_origin *make_origin(const gw_surface *surface, const json_t *given)
{
    char id[64];
    if (surface->id_prefix != NULL) {
        snprintf(id, sizeof(id), "%s%016llx%016llx", surface->id_prefix, (unsigned long long)cm_random_u64(),
                 (unsigned long long)cm_random_u64());
    }
    return gw_origin_create(surface->kind, surface->id_prefix != NULL ? id : NULL,
                            gw_request_streams(given) ? surface->name : NULL, given, NULL);
}

void gw_http_count_refused(void)
{
    cm_stat_add(CM_STAT_requests, 1);
    cm_stat_add(CM_STAT_requests_refused, 1);
}

void gw_http_generate_given(gw_http *http, struct evhttp_request *req, const gw_surface *surface,
                            const json_t *given)
{
    json_t *body;
    gw_error error;
    if (chat_body(surface, given, &body, &error) == CM_OK) {
        exchange_begin(exchange_make(http, req), surface, given, body, make_origin(surface, given), NULL);
        json_decref(body);
    } else {
        gw_http_count_refused();
        gw_reply_refusal(http, req, surface, &error);
    }
}

void gw_http_generate(gw_http *http, struct evhttp_request *req, const gw_surface *surface)
{
    if (evhttp_find_header(evhttp_request_get_input_headers(req), "Last-Event-ID") != NULL) {
        gw_http_resume(http, req, NULL);
        return;
    }
    json_t *given = gw_request_json(http, req);
    if (given == NULL) {
        gw_http_count_refused();
        return;
    }
    gw_http_generate_given(http, req, surface, given);
    json_decref(given);
}

/* ---- coming back ---- */

static void on_found(void *ctx, const gw_found *found, const gw_error *error)
{
    gw_exchange *x = ctx;
    gw_error wrong;
    json_t *body;
    x->seek = NULL;
    if (error != NULL) {
        refuse(x, error);
        return;
    }
    const gw_surface *surface = gw_surface_find(found->surface);
    if (surface == NULL) {
        gw_error_set(&wrong, GW_CAUSE_NO_STREAM, NULL, "the stream '%.140s' was not begun over HTTP",
                     gw_origin_id(found->origin));
    } else if (x->from.n != 0 && x->from.n != found->n_router) {
        gw_error_set(&wrong, GW_CAUSE_INVALID, "Last-Event-ID",
                     "the stream '%.140s' has %u answers, Last-Event-ID counts the events of %u",
                     gw_origin_id(found->origin), found->n_router, x->from.n);
    } else if (chat_body(surface, found->body, &body, &wrong) == CM_OK) {
        exchange_begin(x, surface, found->body, body, gw_origin_hold(found->origin), found->router);
        json_decref(body);
        return;
    }
    refuse(x, &wrong);
}

/* id: the stream's, or that of the request as its client chose it, which it has before it is told any. */
static bool is_running(const gw_exchange *x, const char *id)
{
    bool any = false;
    for (uint32_t i = 0; i < x->n_choice; i++) {
        any |= x->choices[i].stream != NULL;
    }
    return any && (strcmp(gw_origin_id(x->origin), id) == 0 || strcmp(x->visit->id, id) == 0);
}

void gw_http_end(gw_http *http, struct evhttp_request *req, const char *id)
{
    gw_exchange *x;
    gw_error error;
    TAILQ_FOREACH (x, &http->exchanges, link) {
        if (x->visit->tenant == http->visit->tenant && is_running(x, id)) {
            break;
        }
    }
    if (x == NULL) {
        gw_error_set(&error, GW_CAUSE_NO_STREAM, NULL,
                     "no client reads the stream '%.140s' from this gateway", id);
        gw_reply_error(req, &error);
        return;
    }
    cancel_streams(x);
    if (x->sse && x->head_sent) {
        end_answer(x); /* its reader sees no [DONE] */
    } else {
        exchange_drop(x);
    }
    json_t *reply = json_pack("{s:s, s:b}", "id", id, "deleted", 1);
    gw_reply_json(req, 200, reply);
    json_decref(reply);
}

void gw_http_resume(gw_http *http, struct evhttp_request *req, const char *id)
{
    const char *last = evhttp_find_header(evhttp_request_get_input_headers(req), "Last-Event-ID");
    gw_event_id from = {.n = 0};
    gw_error error;
    if (last != NULL && (!gw_event_id_parse(last, &from) || (id != NULL && strcmp(from.id, id) != 0))) {
        gw_error_set(&error, GW_CAUSE_INVALID, "Last-Event-ID",
                     "Last-Event-ID '%.100s' is not the id of an event of this server%s", last,
                     id != NULL ? " and of the stream in the path" : "");
        gw_reply_error(req, &error);
        return;
    }
    gw_exchange *x = exchange_make(http, req);
    x->from = from;
    x->returns = true;
    x->seek = gw_seek_begin(http->gateway, x->visit->tenant, id != NULL ? id : from.id, on_found, x);
}
