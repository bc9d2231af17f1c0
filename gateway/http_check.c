/* GET /health_generate: whether tokens come out now, through a router and the experts that it needs. However
 * many ask and however often, one token at a time is generated for all of them, and what came of it holds for
 * a while: the check needs no key and must cost little. A router that has no room for it while it gives
 * others their tokens is well. */
#include "common/base/clock.h"
#include "common/base/mem.h"
#include "gateway/http_private.h"

enum { CHECK_DEADLINE_MS = 20000, CHECK_HOLDS_MS = 1000 };

typedef struct check_waiter {
    TAILQ_ENTRY(check_waiter) link;
    gw_check *check;
    struct evhttp_request *req;
    gw_visit *visit;
} check_waiter;

struct gw_check {
    gw_http *http;
    gw_stream *stream; /* NULL: none runs */
    TAILQ_HEAD(, check_waiter) waiters;
    int64_t n_tokens;  /* of all answers, when it began */
    uint64_t began_ns; /* likewise */
    double took_s;     /* to the newest token */
    uint64_t until_ms; /* that holds; 0: there was none, or it failed */
};

static void waiter_free(check_waiter *waiter)
{
    TAILQ_REMOVE(&waiter->check->waiters, waiter, link);
    gw_visit_end(waiter->visit, evhttp_request_get_response_code(waiter->req));
    cm_free(waiter);
}

/* The connection goes down before the answer: the request has been taken off it by evhttp and is ours. */
static void waiter_left(struct evhttp_connection *connection, void *arg)
{
    check_waiter *waiter = arg;
    struct evhttp_request *req = waiter->req;
    (void)connection;
    waiter_free(waiter);
    if (evhttp_request_get_connection(req) == NULL) {
        evhttp_request_free(req);
    }
}

/* failure: NULL, it is well. */
static void answer(const gw_check *check, struct evhttp_request *req, const char *failure)
{
    json_t *reply = failure == NULL ? json_pack("{s:s, s:f}", "status", "ok", "seconds", check->took_s)
                                    : json_pack("{s:s, s:s}", "status", "failed", "reason", failure);
    gw_reply_json(req, failure == NULL ? 200 : 503, reply);
    json_decref(reply);
}

static void answer_all(gw_check *check, const char *failure)
{
    check_waiter *waiter;
    check->stream = NULL;
    check->took_s = (double)(cm_now_ns() - check->began_ns) * 1e-9;
    check->until_ms = failure == NULL ? cm_now_ms() + CHECK_HOLDS_MS : 0;
    while ((waiter = TAILQ_FIRST(&check->waiters)) != NULL) {
        evhttp_connection_set_closecb(evhttp_request_get_connection(waiter->req), NULL, NULL);
        answer(check, waiter->req, failure);
        waiter_free(waiter);
    }
}

static void check_finished(void *ctx, const gw_finish *finish)
{
    (void)finish;
    answer_all(ctx, NULL);
}

static void check_failed(void *ctx, const gw_error *error)
{
    gw_check *check = ctx;
    bool others_go_on = cm_stat_get(CM_STAT_generated_tokens) > check->n_tokens;
    answer_all(check, others_go_on ? NULL : error->message);
}

static cm_status check_begin(gw_check *check, gw_error *error)
{
    check->n_tokens = cm_stat_get(CM_STAT_generated_tokens);
    check->began_ns = cm_now_ns();
    return gw_probe_open(check->http->gateway, CHECK_DEADLINE_MS, check_finished, check_failed, check,
                         &check->stream, error);
}

void gw_http_health_generate(gw_http *http, struct evhttp_request *req, const char *rest)
{
    gw_check *check = http->check;
    gw_error error;
    (void)rest;
    const char *mute = gw_mute_reason(http->gateway);
    if (mute != NULL) {
        answer(check, req, mute);
        return;
    }
    if (check->stream == NULL && cm_now_ms() < check->until_ms) {
        answer(check, req, NULL);
        return;
    }
    if (check->stream == NULL && check_begin(check, &error) != CM_OK) {
        answer(check, req, error.message);
        return;
    }
    check_waiter *waiter = cm_alloc(sizeof(*waiter));
    *waiter = (check_waiter){.check = check, .req = req, .visit = http->visit};
    http->visit = NULL;
    TAILQ_INSERT_TAIL(&check->waiters, waiter, link);
    evhttp_connection_set_closecb(evhttp_request_get_connection(req), waiter_left, waiter);
}

gw_check *gw_check_create(gw_http *http)
{
    gw_check *check = cm_alloc(sizeof(*check));
    check->http = http;
    TAILQ_INIT(&check->waiters);
    return check;
}

void gw_check_destroy(gw_check *check)
{
    if (check->stream != NULL) {
        gw_stream_cancel(check->stream);
        answer_all(check, "the gateway is shutting down");
    }
    cm_free(check);
}
