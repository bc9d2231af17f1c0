#include "tools/baleen/ready_probe.h"

#include <event2/buffer.h>
#include <event2/bufferevent_ssl.h>
#include <event2/http.h>
#include <jansson.h>
#include <openssl/ssl.h>
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/proc/addresses.h"

enum { PROBE_TIMEOUT_S = 10 };

struct ready_probe {
    SSL_CTX *ctx; /* NULL: plain */
    struct event_base *base;
    char *host;
    uint16_t port;
    struct evhttp_connection *connection; /* of the question that is on its way, or was */
    bool asking, ok;
    char reason[160];
};

/* A connection makes its own bufferevent when it is plain; an SSL object is for one connection only. */
static struct evhttp_connection *probe_connect(ready_probe *probe, const char *host, uint16_t port)
{
    struct bufferevent *bev = NULL;
    if (probe->ctx != NULL) {
        bev = bufferevent_openssl_socket_new(probe->base, -1, SSL_new(probe->ctx), BUFFEREVENT_SSL_CONNECTING,
                                             BEV_OPT_CLOSE_ON_FREE);
        bufferevent_openssl_set_allow_dirty_shutdown(bev, 1);
    }
    struct evhttp_connection *connection =
        evhttp_connection_base_bufferevent_new(probe->base, NULL, bev, host, port);
    CM_ASSERT(connection != NULL);
    evhttp_connection_set_timeout(connection, PROBE_TIMEOUT_S);
    return connection;
}

ready_probe *ready_probe_create(pc_loop *loop, const char *address, bool secured)
{
    ready_probe *probe = cm_alloc(sizeof(*probe));
    char host[PC_ADDRESS_BYTES];
    bool is_address = pc_address_split(address, host, &probe->port);
    CM_ASSERT_MSG(is_address, "address %s", address); /* the gateway's own word */
    probe->base = pc_loop_base(loop);
    probe->host = cm_strdup(host);
    probe->ctx = secured ? SSL_CTX_new(TLS_client_method()) : NULL;
    snprintf(probe->reason, sizeof(probe->reason), "the gateway was not asked yet");
    return probe;
}

static void probe_disconnect(ready_probe *probe)
{
    if (probe->connection != NULL) {
        evhttp_connection_free(probe->connection);
        probe->connection = NULL;
    }
}

void ready_probe_destroy(ready_probe *probe)
{
    if (probe != NULL) {
        probe_disconnect(probe);
        SSL_CTX_free(probe->ctx);
        cm_free(probe->host);
        cm_free(probe);
    }
}

static void probe_answered(struct evhttp_request *request, void *arg)
{
    ready_probe *probe = arg;
    probe->asking = false;
    int code = request != NULL ? evhttp_request_get_response_code(request) : 0;
    probe->ok = code == HTTP_OK;
    if (code == 0) {
        snprintf(probe->reason, sizeof(probe->reason), "the gateway does not answer");
        return;
    }
    struct evbuffer *body = evhttp_request_get_input_buffer(request);
    size_t n = evbuffer_get_length(body);
    json_t *answer = json_loadb((const char *)evbuffer_pullup(body, -1), n, 0, NULL);
    const char *reason = json_string_value(json_object_get(answer, "reason"));
    snprintf(probe->reason, sizeof(probe->reason), "%.150s",
             reason != NULL ? reason : "the gateway is not ready");
    json_decref(answer);
}

void ready_probe_ask(ready_probe *probe)
{
    if (probe->asking) {
        return;
    }
    probe_disconnect(probe);
    probe->connection = probe_connect(probe, probe->host, probe->port);
    struct evhttp_request *request = evhttp_request_new(probe_answered, probe);
    CM_ASSERT(request != NULL);
    /* an idle connection would be one more thing to end when the gateway drains */
    evhttp_add_header(evhttp_request_get_output_headers(request), "Connection", "close");
    evhttp_add_header(evhttp_request_get_output_headers(request), "Host", "localhost");
    probe->asking = true;
    if (evhttp_make_request(probe->connection, request, EVHTTP_REQ_GET, "/ready") != 0) {
        probe->asking = false; /* no descriptor or no memory: the next turn tries again */
    }
}

bool ready_probe_ok(const ready_probe *probe)
{
    return probe->ok;
}

const char *ready_probe_reason(const ready_probe *probe)
{
    return probe->reason;
}
