/* What the parts of the HTTP surface share. Thread: the loop's. */
#pragma once
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/http.h>
#include <event2/http_struct.h>
#include <event2/keyvalq_struct.h>
#include <sys/queue.h>

#include "gateway/gateway_private.h"
#include "gateway/request.h"
#include "gateway/surface.h"
#include "gateway/visit.h"

typedef struct gw_exchange gw_exchange;
typedef struct gw_connections gw_connections;
typedef struct gw_check gw_check;

struct gw_http {
    gw_gateway *gateway;
    struct evhttp *server;
    gw_connections *connections;
    TAILQ_HEAD(, gw_exchange) exchanges;
    uint32_t n_exchanges;
    gw_check *check;
    gw_visit *visit; /* of the request being dispatched; NULL: an exchange has taken it and ends it */
};

/* ---- http_connections.c: how many there may be, and how slow ---- */
gw_connections *gw_connections_create(gw_gateway *gateway, struct evhttp *server,
                                      struct evconnlistener *listener);
/* A request of it is complete. */
void gw_connections_dispatched(gw_connections *connections, struct bufferevent *bev);
void gw_connections_destroy(gw_connections *connections); /* after evhttp_free */

/* ---- http_reply.c: answers in one piece ---- */
void gw_reply(struct evhttp_request *req, int code, const char *content_type, const void *body,
              size_t n_bytes);
void gw_reply_json(struct evhttp_request *req, int code, const json_t *value);
/* In the shape of the interface that was asked. */
void gw_reply_error(struct evhttp_request *req, const gw_error *error);
/* Of a body for a surface (NULL: not known), in its words and with the status that is wanted for wrong
 * values. */
void gw_reply_refusal(const gw_http *http, struct evhttp_request *req, const gw_surface *surface,
                      const gw_error *error);
/* Before any answer: x-request-id, traceparent, CORS. */
void gw_reply_headers(struct evhttp_request *req, const gw_visit *visit);
const char *gw_reply_request_id(struct evhttp_request *req); /* the one among them */
/* Whether and when to try again, when the error says so: retry-after, retry-after-ms, x-should-retry. */
void gw_reply_retry(struct evhttp_request *req, const gw_error *error);

/* ---- http_chunk.c: answers as they come ---- */
/* Where they go; as long as the connection. */
typedef struct gw_wire {
    struct evbuffer *output; /* libevent's */
    int fd;                  /* -1: with TLS */
    bool chunked;
} gw_wire;
/* After evhttp_send_reply_start. */
void gw_wire_open(const gw_http *http, struct evhttp_request *req, gw_wire *wire_out);
void gw_wire_write(const gw_wire *wire, const cm_bytes *data); /* not empty */
size_t gw_wire_waiting(const gw_wire *wire);                   /* bytes that the socket did not take yet */

/* ---- http_body.c: what clients send ---- */
/* The body as a JSON object; NULL: an error was answered. */
json_t *gw_request_json(gw_http *http, struct evhttp_request *req);
/* A body that is packed becomes what it holds, in place; gw_request_json does so by itself. Errors: of what
 * clients send. */
CM_MUST_CHECK cm_status gw_request_unpack(const gw_http *http, struct evhttp_request *req,
                                          gw_error *error_out);

/* ---- http_page.c: what people look at ---- */
void gw_http_root(struct evhttp_request *req);
void gw_http_cluster(gw_http *http, struct evhttp_request *req);
void gw_http_cluster_experts(gw_http *http, struct evhttp_request *req);

/* ---- http_info.c ---- */
void gw_http_model_info(gw_http *http, struct evhttp_request *req, const char *rest);
void gw_http_server_info(gw_http *http, struct evhttp_request *req, const char *rest);
void gw_http_get_load(gw_http *http, struct evhttp_request *req, const char *rest);
void gw_http_loads(gw_http *http, struct evhttp_request *req, const char *rest);

/* ---- http_check.c ---- */
gw_check *gw_check_create(gw_http *http);
void gw_check_destroy(gw_check *check); /* before evhttp_free */
void gw_http_health_generate(gw_http *http, struct evhttp_request *req, const char *rest);

/* ---- http_event_id.c ---- */
/* "ID:N", with several answers "ID:N.N.N": the stream, and how many events of each answer were sent with this
 * one. Answers mix as they come, but the events of one are always the same. */
typedef struct gw_event_id {
    char id[160];
    uint32_t n; /* 0: nothing is known */
    uint32_t count[GW_CHOICES_MAX];
} gw_event_id;
bool gw_event_id_parse(const char *text, gw_event_id *out);

/* ---- http_generate.c ---- */
/* A client comes back. id: of the stream; NULL: that of its Last-Event-ID, which must be there. */
void gw_http_resume(gw_http *http, struct evhttp_request *req, const char *id);
/* A client has enough of a stream that it, or whoever told it the id, reads from this gateway. id: also the
 * request's x-request-id, so that it can be ended before the stream's id was told. */
void gw_http_end(gw_http *http, struct evhttp_request *req, const char *id);
void gw_http_generate(gw_http *http, struct evhttp_request *req, const gw_surface *surface);
/* The same with the client's request read already, in the surface's form; borrowed for the call. */
void gw_http_generate_given(gw_http *http, struct evhttp_request *req, const gw_surface *surface,
                            const json_t *given);
/* A request that was refused before it became a stream. */
void gw_http_count_refused(void);
void gw_exchanges_drop_all(gw_http *http);

/* ---- kserve_http.c ---- */
/* rest: what follows /v2/models/, as it was sent. */
void gw_kserve_http_server(gw_http *http, struct evhttp_request *req, const char *rest);
void gw_kserve_http_live(gw_http *http, struct evhttp_request *req, const char *rest);
void gw_kserve_http_ready(gw_http *http, struct evhttp_request *req, const char *rest);
void gw_kserve_http_model(gw_http *http, struct evhttp_request *req, const char *rest);
void gw_kserve_http_ask(gw_http *http, struct evhttp_request *req, const char *rest);
/* {"error":"..."} */
void gw_kserve_http_error(const gw_error *error, const char *request_id, cm_bytes *out);

/* ---- http_routes.c ---- */
/* In place; a % that begins no %XX stays. */
void gw_http_percent_decode(char *text);
/* What follows the base of an API: "/models" of "/v1/models". */
const char *gw_http_below_base(const char *path);
void gw_http_dispatch(struct evhttp_request *req, void *http);
