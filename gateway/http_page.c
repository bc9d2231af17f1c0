/* What people look at: the page of GET / and the numbers it shows. */
#include <event2/http.h>
#include <stdlib.h>
#include <string.h>

#include "gateway/http_private.h"
#include "gateway/page.h"

/* Nothing but what is in the page runs in it, and it talks to nobody but us. */
#define PAGE_POLICY                                                                                          \
    "default-src 'none'; script-src " PAGE_SCRIPT_HASH "; style-src " PAGE_STYLE_HASH                        \
    "; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "     \
    "require-trusted-types-for 'script'"

static void reply_page(struct evhttp_request *req)
{
    struct evkeyvalq *out = evhttp_request_get_output_headers(req);
    evhttp_add_header(out, "Content-Security-Policy", PAGE_POLICY);
    evhttp_add_header(out, "X-Content-Type-Options", "nosniff");
    evhttp_add_header(out, "Referrer-Policy", "no-referrer");
    evhttp_add_header(out, "Cache-Control", "no-cache");
    gw_reply(req, 200, "text/html; charset=utf-8", PAGE, sizeof(PAGE));
}

/* Browsers say that they take HTML; curl and probes take anything and get a line. */
void gw_http_root(struct evhttp_request *req)
{
    static const char text[] = "Baleen " BALEEN_VERSION ": OpenAI- and Anthropic-compatible API at /v1\n";
    const char *accept = evhttp_find_header(evhttp_request_get_input_headers(req), "Accept");
    evhttp_add_header(evhttp_request_get_output_headers(req), "Vary", "Accept");
    if (accept != NULL && strstr(accept, "text/html") != NULL) {
        reply_page(req);
    } else {
        gw_reply(req, 200, "text/plain; charset=utf-8", text, sizeof(text) - 1);
    }
}

static void reply_fresh(struct evhttp_request *req, json_t *value)
{
    evhttp_add_header(evhttp_request_get_output_headers(req), "Cache-Control", "no-store");
    gw_reply_json(req, 200, value);
    json_decref(value);
}

void gw_http_cluster(gw_http *http, struct evhttp_request *req)
{
    reply_fresh(req, gw_cluster_json(http->gateway));
}

/* ?epoch=N: the epoch whose placement the page has. What is no number is none. */
void gw_http_cluster_experts(gw_http *http, struct evhttp_request *req)
{
    const struct evhttp_uri *uri = evhttp_request_get_evhttp_uri(req);
    const char *query = uri != NULL ? evhttp_uri_get_query(uri) : NULL;
    const char *known = query != NULL ? strstr(query, "epoch=") : NULL;
    reply_fresh(req,
                gw_cluster_experts_json(http->gateway, known != NULL ? strtoull(known + 6, NULL, 10) : 0));
}
