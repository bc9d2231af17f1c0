#include "gateway/http.h"

#include <arpa/inet.h>
#include <errno.h>
#include <event2/listener.h>
#include <stdio.h>
#include <string.h>

#include "common/base/mem.h"
#include "common/proc/addresses.h"
#include "gateway/http_private.h"

enum { HEADERS_MAX_BYTES = 64 * 1024 };

static void bound_address(struct evhttp_bound_socket *bound, char out[128])
{
    struct sockaddr_storage at;
    socklen_t n = sizeof(at);
    char host[64] = "?";
    memset(&at, 0, sizeof(at));
    getsockname(evhttp_bound_socket_get_fd(bound), (struct sockaddr *)&at, &n);
    if (at.ss_family == AF_INET6) {
        const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)&at;
        inet_ntop(AF_INET6, &v6->sin6_addr, host, sizeof(host));
        snprintf(out, 128, "[%s]:%u", host, ntohs(v6->sin6_port));
    } else {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)&at;
        inet_ntop(AF_INET, &v4->sin_addr, host, sizeof(host));
        snprintf(out, 128, "%s:%u", host, ntohs(v4->sin_port));
    }
}

/* libevent answers a body beyond its own limit with a page of its own; ours is below, so that a client that
 * is a little over gets an error object. */
static void set_limits(struct evhttp *server, const gw_config *config)
{
    struct timeval timeout = {.tv_sec = (time_t)(config->http_timeout_ms / 1000),
                              .tv_usec = (suseconds_t)(config->http_timeout_ms % 1000 * 1000)};
    evhttp_set_timeout_tv(server, &timeout);
    evhttp_set_max_headers_size(server, HEADERS_MAX_BYTES);
    evhttp_set_max_body_size(server, (ev_ssize_t)(2 * config->request_bytes_max));
    evhttp_set_default_content_type(server, NULL);
    evhttp_set_allowed_methods(server, EVHTTP_REQ_GET | EVHTTP_REQ_POST | EVHTTP_REQ_HEAD | EVHTTP_REQ_PUT |
                                           EVHTTP_REQ_DELETE | EVHTTP_REQ_OPTIONS | EVHTTP_REQ_PATCH);
}

cm_status gw_http_create(gw_gateway *gateway, const char *address, gw_http **http_out, char bound_out[128],
                         cm_error *err)
{
    char host[PC_ADDRESS_BYTES];
    uint16_t port;
    if (!pc_address_split(address, host, &port)) {
        return cm_error_set(err, CM_E_INVALID, "http", "%s is no address: " PC_ADDRESS_FORM " is needed",
                            address);
    }
    struct evhttp *server = evhttp_new(pc_loop_base(gateway->loop));
    if (server == NULL) {
        return cm_error_set(err, CM_E_MEMORY, "http", "no memory for an HTTP server");
    }
    set_limits(server, gateway->config);
    struct evhttp_bound_socket *bound = evhttp_bind_socket_with_handle(server, host, port);
    if (bound == NULL) {
        int cause = errno;
        evhttp_free(server);
        return cm_error_set(err, cause == EADDRINUSE ? CM_E_EXISTS : CM_E_IO, "http",
                            "cannot listen at %s: %s", address, strerror(cause));
    }
    gw_http *http = cm_alloc(sizeof(*http));
    http->gateway = gateway;
    http->server = server;
    TAILQ_INIT(&http->exchanges);
    http->check = gw_check_create(http);
    http->connections = gw_connections_create(gateway, server, evhttp_bound_socket_get_listener(bound));
    evhttp_set_gencb(server, gw_http_dispatch, http);
    bound_address(bound, bound_out);
    *http_out = http;
    return CM_OK;
}

void gw_http_destroy(gw_http *http)
{
    gw_exchanges_drop_all(http);
    gw_check_destroy(http->check);
    evhttp_free(http->server);
    gw_connections_destroy(http->connections);
    cm_free(http);
}

uint32_t gw_http_open(const gw_http *http)
{
    return http->n_exchanges;
}
