#include <stdio.h>
#include <string.h>

#include "common/base/mem.h"
#include "gateway/http_private.h"

static const char *reason_phrase(int code)
{
    static const struct {
        int code;
        const char *phrase;
    } known[] = {
        {200, "OK"},
        {204, "No Content"},
        {400, "Bad Request"},
        {401, "Unauthorized"},
        {403, "Forbidden"},
        {404, "Not Found"},
        {405, "Method Not Allowed"},
        {409, "Conflict"},
        {413, "Payload Too Large"},
        {415, "Unsupported Media Type"},
        {422, "Unprocessable Content"},
        {429, "Too Many Requests"},
        {503, "Service Unavailable"},
        {504, "Gateway Timeout"},
        {529, "Overloaded"},
    };
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        if (known[i].code == code) {
            return known[i].phrase;
        }
    }
    return "Internal Server Error";
}

void gw_reply_headers(struct evhttp_request *req, const gw_visit *visit)
{
    struct evkeyvalq *out = evhttp_request_get_output_headers(req);
    evhttp_add_header(out, "x-request-id", visit->id);
    evhttp_add_header(out, "request-id", visit->id); /* the Anthropic clients' name of it */
    evhttp_add_header(out, "traceparent", visit->traceparent);
    evhttp_add_header(out, "Access-Control-Allow-Origin", "*");
    evhttp_add_header(out, "Access-Control-Expose-Headers",
                      "x-request-id, request-id, traceparent, retry-after, retry-after-ms, x-should-retry");
}

const char *gw_reply_request_id(struct evhttp_request *req)
{
    return evhttp_find_header(evhttp_request_get_output_headers(req), "x-request-id");
}

void gw_reply(struct evhttp_request *req, int code, const char *content_type, const void *body,
              size_t n_bytes)
{
    struct evkeyvalq *out = evhttp_request_get_output_headers(req);
    char length[24];
    if (content_type != NULL) {
        evhttp_add_header(out, "Content-Type", content_type);
    }
    if (evhttp_request_get_command(req) == EVHTTP_REQ_HEAD) {
        snprintf(length, sizeof(length), "%zu", n_bytes);
        evhttp_add_header(out, "Content-Length", length);
        n_bytes = 0;
    }
    struct evbuffer *buffer = evbuffer_new();
    evbuffer_add(buffer, body, n_bytes);
    evhttp_send_reply(req, code, reason_phrase(code), buffer);
    evbuffer_free(buffer);
}

static int append_json(const char *text, size_t n, void *out)
{
    cm_bytes_append(out, text, n);
    return 0;
}

void gw_reply_json(struct evhttp_request *req, int code, const json_t *value)
{
    cm_bytes out;
    cm_bytes_init(&out, 0);
    json_dump_callback(value, append_json, &out, JSON_COMPACT);
    gw_reply(req, code, "application/json", out.data, out.len);
    cm_bytes_fini(&out);
}

void gw_reply_retry(struct evhttp_request *req, const gw_error *error)
{
    struct evkeyvalq *out = evhttp_request_get_output_headers(req);
    char text[24];
    if (error->retry_ms > 0) {
        snprintf(text, sizeof(text), "%u", (error->retry_ms + 999) / 1000);
        evhttp_add_header(out, "retry-after", text);
        snprintf(text, sizeof(text), "%u", error->retry_ms);
        evhttp_add_header(out, "retry-after-ms", text);
        evhttp_add_header(out, "x-should-retry", "true");
    } else if (gw_error_is_final(error)) {
        evhttp_add_header(out, "x-should-retry", "false");
    }
}

static const char *path_of(struct evhttp_request *req)
{
    const struct evhttp_uri *uri = evhttp_request_get_evhttp_uri(req);
    const char *path = uri != NULL ? evhttp_uri_get_path(uri) : NULL;
    return path != NULL ? path : "";
}

/* Clients of the Anthropic interface say so wherever they ask. */
static bool is_anthropic(struct evhttp_request *req)
{
    const char *below = gw_http_below_base(path_of(req));
    return evhttp_find_header(evhttp_request_get_input_headers(req), "anthropic-version") != NULL ||
           strncmp(below, "/messages", 9) == 0;
}

void gw_reply_refusal(const gw_http *http, struct evhttp_request *req, const gw_surface *surface,
                      const gw_error *error)
{
    gw_error own = *error;
    bool as_422 = strcmp(http->gateway->config->invalid_status, "422") == 0;
    if (own.cause == GW_CAUSE_INVALID && as_422) {
        own.cause = GW_CAUSE_UNPROCESSABLE;
    }
    if (surface != NULL) {
        gw_surface_own_words(surface, &own);
    }
    gw_reply_error(req, &own);
}

void gw_reply_error(struct evhttp_request *req, const gw_error *error)
{
    cm_bytes body;
    bool anthropic = is_anthropic(req);
    cm_bytes_init(&body, 0);
    if (anthropic) {
        gw_anthropic_error(error, gw_reply_request_id(req), &body);
    } else if (strncmp(path_of(req), "/v2/", 4) == 0) {
        gw_kserve_http_error(error, NULL, &body);
    } else {
        gw_openai_error(error, &body);
    }
    gw_reply_retry(req, error);
    if (error->cause == GW_CAUSE_UNAUTHENTICATED) {
        evhttp_add_header(evhttp_request_get_output_headers(req), "WWW-Authenticate", "Bearer");
    }
    gw_reply(req, anthropic ? gw_error_anthropic_http(error) : gw_error_http(error), "application/json",
             body.data, body.len);
    cm_bytes_fini(&body);
}
