#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <ucs/debug/debug.h>
#include <ucs/debug/log_def.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/config.h"
#include "common/base/log.h"
#include "common/net/net_ucx_private.h"

/* How long close waits for endpoints to let go: a turn without anything to do waits a millisecond. In turns,
 * so that a process which gets no processor for a while does not give up without having looked. */
enum { UCX_CLOSE_IDLE_TURNS = 400, UCX_CLOSE_TURNS = 100000 };

cm_status ucx_status(ucs_status_t status)
{
    switch (status) {
    case UCS_OK:
        return CM_OK;
    case UCS_ERR_REJECTED:
        return CM_E_REFUSED;
    case UCS_ERR_UNREACHABLE:
    case UCS_ERR_INVALID_ADDR:
        return CM_E_UNREACHABLE;
    default:
        return CM_E_RESET; /* a dead peer shows as ENDPOINT_TIMEOUT, CONNECTION_RESET or NOT_CONNECTED alike
                            */
    }
}

/* ---- the library's process-wide manners ---- */

/* UCX would print to stdout; its lines are for people who debug UCX, what matters to us comes back as a
 * status. */
static ucs_log_func_rc_t ucx_on_log(const char *file, unsigned line, const char *function,
                                    ucs_log_level_t level, const ucs_log_component_config_t *comp_conf,
                                    const char *message, va_list ap)
{
    (void)function;
    if (level <= comp_conf->log_level) {
        char text[512];
        vsnprintf(text, sizeof(text), message, ap);
        const char *base = strrchr(file, '/');
        cm_log_line(level <= UCS_LOG_LEVEL_FATAL ? CM_LOG_ERROR : CM_LOG_DEBUG, "ucx %s:%u %s",
                    base != NULL ? base + 1 : file, line, text);
    }
    return UCS_LOG_FUNC_RC_STOP;
}

/* Its constructor has put handlers on ILL, SEGV, BUS and FPE before main: our crashes are ours (and the
 * sanitizers'). */
static void ucx_tame(void)
{
    static const int signals[] = {SIGILL, SIGSEGV, SIGBUS, SIGFPE};
    for (size_t i = 0; i < sizeof(signals) / sizeof(signals[0]); i++) {
        ucs_debug_disable_signal(signals[i]);
    }
    ucs_log_push_handler(ucx_on_log);
}

/* ---- open ---- */

static cm_status ucx_fail(cm_error *err, const char *what, ucs_status_t status)
{
    return cm_error_set(err, CM_E_DEVICE, "backend", "ucx: %s: %s", what, ucs_status_string(status));
}

/* Settings in code: they are part of how this back-end works, not a choice of whoever sets the environment.
 */
static cm_status ucx_configure(ucp_config_t *config, cm_error *err)
{
    static const struct {
        const char *name, *value;
    } settings[] = {
        {"TLS", "tcp,self"},    /* shared memory reports no dead peers in 1.13 */
        {"RNDV_THRESH", "64k"}, /* a row of 14 KB goes at once: 4.5 times as fast as announced */
    };
    for (size_t i = 0; i < sizeof(settings) / sizeof(settings[0]); i++) {
        ucs_status_t status = ucp_config_modify(config, settings[i].name, settings[i].value);
        if (status != UCS_OK) {
            return ucx_fail(err, settings[i].name, status);
        }
    }
    return CM_OK;
}

/* A transport's own settings: ucp_config_modify of 1.13 takes them and never applies them (its worker then
 * warns of "invalid configurations"); the environment reaches them. What the user set stays. */
static void ucx_configure_tcp(void)
{
    cm_env_default("UCX_TCP_TX_SEG_SIZE", "64k");
    cm_env_default("UCX_TCP_RX_SEG_SIZE", "64k");
    cm_env_default("UCX_TCP_AF_PRIO", "inet"); /* see net_address_parse */
    cm_env_default("UCX_TCP_KEEPIDLE", "1s");  /* a dead host under an idle link, beside our own heartbeats */
    cm_env_default("UCX_TCP_KEEPINTVL", "1s");
    cm_env_default("UCX_TCP_KEEPCNT", "3");
    cm_env_default("UCX_TCP_CM_REUSEADDR", "y"); /* a restarted process takes its port again at once */
}

static cm_status ucx_open_context(ucx_net *u, cm_error *err)
{
    ucp_config_t *config;
    if (access("/sys/class/net", R_OK) != 0) {
        /* without it UCX finds no interface, opens all the same, and no link ever comes up */
        return cm_error_set(err, CM_E_DEVICE, "backend",
                            "ucx: cannot read /sys/class/net (%s): is /sys mounted?", strerror(errno));
    }
    ucx_configure_tcp();
    ucs_status_t rc = ucp_config_read(NULL, NULL, &config);
    if (rc != UCS_OK) {
        return ucx_fail(err, "configuration", rc);
    }
    cm_status status = ucx_configure(config, err);
    if (status == CM_OK) {
        ucp_params_t params = {
            .field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_ESTIMATED_NUM_EPS,
            .features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP,
            .estimated_num_eps = u->options->peers_max,
        };
        rc = ucp_init(&params, config, &u->context);
        status = rc == UCS_OK ? CM_OK : ucx_fail(err, "context", rc);
    }
    ucp_config_release(config);
    return status;
}

static cm_status ucx_open_worker(ucx_net *u, cm_error *err)
{
    ucp_worker_params_t params = {
        .field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE | UCP_WORKER_PARAM_FIELD_AM_ALIGNMENT,
        .thread_mode = UCS_THREAD_MODE_SINGLE,
        .am_alignment = 64,
    };
    ucs_status_t rc = ucp_worker_create(u->context, &params, &u->worker);
    if (rc != UCS_OK) {
        return ucx_fail(err, "worker", rc);
    }
    ucp_worker_attr_t attr = {.field_mask = UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER};
    rc = ucp_worker_query(u->worker, &attr);
    if (rc != UCS_OK || attr.max_am_header < UCX_HEADER_MAX) {
        rc = rc != UCS_OK ? rc : UCS_ERR_UNSUPPORTED;
        goto err_worker;
    }
    ucp_am_handler_param_t handler = {
        .field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                      UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG,
        .id = 0,
        .flags = UCP_AM_FLAG_WHOLE_MSG | UCP_AM_FLAG_PERSISTENT_DATA,
        .cb = ucx_on_message,
        .arg = u,
    };
    rc = ucp_worker_set_am_recv_handler(u->worker, &handler);
    if (rc != UCS_OK) {
        goto err_worker;
    }
    rc = ucp_worker_get_efd(u->worker, &u->fd);
    if (rc != UCS_OK) {
        goto err_worker;
    }
    return CM_OK;

err_worker:
    ucp_worker_destroy(u->worker);
    return ucx_fail(err, "worker set-up", rc);
}

static cm_status ucx_open(const net_options *options, const net_upcalls *upcalls, void *ctx,
                          void **backend_out, cm_error *err)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT; /* several objects may open on several threads */
    pthread_once(&once, ucx_tame);
    ucx_net *u = cm_alloc(sizeof(*u));
    *u = (ucx_net){.options = options, .upcalls = upcalls, .ctx = ctx};
    TAILQ_INIT(&u->all);
    TAILQ_INIT(&u->waiting);
    STAILQ_INIT(&u->done);
    cm_status status = ucx_open_context(u, err);
    if (status != CM_OK) {
        goto err_free;
    }
    status = ucx_open_worker(u, err);
    if (status != CM_OK) {
        goto err_context;
    }
    status = net_buffers_init(&u->buffers, options->receives_max, options->message_bytes_max, err);
    if (status != CM_OK) {
        goto err_worker;
    }
    uint32_t n_links = 2 * options->peers_max; /* closing ones linger a little */
    cm_map_init(&u->eps, n_links);
    cm_pool_init(&u->links, "ucx links", sizeof(net_backend_link), n_links);
    cm_pool_init(&u->sends, "ucx sends", sizeof(ucx_send), n_links * (options->sends_max + UCX_NOTES_MAX));
    cm_pool_init(&u->arrivals, "ucx receives", sizeof(ucx_arrival),
                 options->receives_max + n_links * (2 * options->sends_max + UCX_NOTES_MAX));
    u->requests = cm_alloc(sizeof(u->requests[0]) * options->peers_max);
    *backend_out = u;
    return CM_OK;

err_worker:
    ucp_worker_destroy(u->worker);
err_context:
    ucp_cleanup(u->context);
err_free:
    cm_free(u);
    return status;
}

/* ---- listen, connect, accept ---- */

static void ucx_on_request(ucp_conn_request_h request, void *arg)
{
    ucx_net *u = arg;
    if (u->n_requests == u->options->peers_max) {
        (void)ucp_listener_reject(u->listener, request);
        return;
    }
    u->requests[u->n_requests++] = request;
}

static cm_status ucx_listen(void *backend, const char *address, char bound_out[NET_ADDRESS_BYTES],
                            cm_error *err)
{
    ucx_net *u = backend;
    struct sockaddr_in at;
    CM_ASSERT(u->listener == NULL);
    CM_TRY(net_address_parse(address, true, &at, err));
    ucp_listener_params_t params = {
        .field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR | UCP_LISTENER_PARAM_FIELD_CONN_HANDLER,
        .sockaddr = {.addr = (const struct sockaddr *)&at, .addrlen = sizeof(at)},
        .conn_handler = {.cb = ucx_on_request, .arg = u},
    };
    ucs_status_t rc = ucp_listener_create(u->worker, &params, &u->listener);
    if (rc != UCS_OK) {
        u->listener = NULL;
        return cm_error_set(err, rc == UCS_ERR_BUSY ? CM_E_EXISTS : CM_E_DEVICE, "address",
                            "cannot listen at %s: %s", address,
                            rc == UCS_ERR_BUSY ? "the port is taken" : ucs_status_string(rc));
    }
    ucp_listener_attr_t attr = {.field_mask = UCP_LISTENER_ATTR_FIELD_SOCKADDR};
    rc = ucp_listener_query(u->listener, &attr);
    if (rc != UCS_OK) {
        ucp_listener_destroy(u->listener);
        u->listener = NULL;
        return ucx_fail(err, "listener", rc);
    }
    memcpy(&at, &attr.sockaddr, sizeof(at));
    net_address_reachable(&at);
    net_address_format(&at, bound_out);
    return CM_OK;
}

static cm_status ucx_connect(void *backend, const char *address, void *peer, net_backend_link **link_out,
                             cm_error *err)
{
    ucx_net *u = backend;
    struct sockaddr_in to;
    CM_TRY(net_address_parse(address, false, &to, err));
    net_backend_link *link = ucx_link_create(u, peer);
    if (link == NULL) {
        return cm_error_set(err, CM_E_CAPACITY, "address", "no link to '%s': all %u are in use or closing",
                            address, u->links.n_max);
    }
    ucx_link_start(link, &to, NULL);
    *link_out = link;
    return CM_OK;
}

static void ucx_accept(ucx_net *u, ucp_conn_request_h request)
{
    char address[NET_ADDRESS_BYTES] = "unknown";
    ucp_conn_request_attr_t attr = {.field_mask = UCP_CONN_REQUEST_ATTR_FIELD_CLIENT_ADDR};
    if (ucp_conn_request_query(request, &attr) == UCS_OK) {
        struct sockaddr_in from;
        memcpy(&from, &attr.client_address, sizeof(from));
        net_address_format(&from, address);
    }
    net_backend_link *link = ucx_link_create(u, NULL);
    if (link != NULL) {
        link->peer = u->upcalls->accepted(u->ctx, link, address);
        if (link->peer != NULL) {
            ucx_link_start(link, NULL, request);
            return;
        }
        ucx_link_free(link);
    }
    (void)ucp_listener_reject(u->listener, request);
}

static bool ucx_accept_all(ucx_net *u)
{
    uint32_t n = u->n_requests;
    for (uint32_t i = 0; i < n; i++) {
        ucx_accept(u, u->requests[i]);
    }
    u->n_requests = 0;
    return n > 0;
}

/* ---- progress and sleep ---- */

static bool ucx_close_links(ucx_net *u)
{
    bool did = false;
    net_backend_link *link = u->n_closing > 0 ? TAILQ_FIRST(&u->all) : NULL;
    while (link != NULL) {
        net_backend_link *next = TAILQ_NEXT(link, entry);
        did = (link->closing && ucx_link_close_step(link)) || did;
        link = next;
    }
    return did;
}

static bool ucx_progress(void *backend)
{
    ucx_net *u = backend;
    u->dirty = false;
    bool did = ucp_worker_progress(u->worker) != 0;
    did = ucx_accept_all(u) || did;
    did = ucx_report_sent(u) || did;
    did = ucx_take_all(u) || did;
    did = ucx_close_links(u) || did;
    return did;
}

static int ucx_fd(const void *backend)
{
    return ((const ucx_net *)backend)->fd;
}

static bool ucx_arm(void *backend)
{
    ucx_net *u = backend;
    if (u->dirty || !STAILQ_EMPTY(&u->done) || (u->look && !TAILQ_EMPTY(&u->waiting))) {
        return false;
    }
    return ucp_worker_arm(u->worker) == UCS_OK;
}

/* ---- close ---- */

/* Peers that were told goodbye get their moment to leave first; all others are cut off at once. */
static void ucx_close_all_links(ucx_net *u)
{
    uint32_t n_idle = 0;
    for (uint32_t i = 0; !TAILQ_EMPTY(&u->all) && i < UCX_CLOSE_TURNS && n_idle < UCX_CLOSE_IDLE_TURNS; i++) {
        bool did = ucp_worker_progress(u->worker) != 0;
        did = ucx_report_sent(u) || did;
        did = ucx_close_links(u) || did;
        if (!did && ucp_worker_arm(u->worker) == UCS_OK) {
            struct pollfd fd = {.fd = u->fd, .events = POLLIN};
            poll(&fd, 1, 1);
        }
        n_idle += !did;
    }
    if (!TAILQ_EMPTY(&u->all)) {
        cm_warn("%u links did not close: UCX ends them with its worker", u->links.n_used);
    }
}

/* Those links, and what UCX still had to send on them, when the worker is gone. */
static void ucx_forget_links(ucx_net *u)
{
    if (TAILQ_EMPTY(&u->all)) {
        return;
    }
    while (!TAILQ_EMPTY(&u->all)) {
        ucx_link_free(TAILQ_FIRST(&u->all));
    }
    for (uint32_t i = 0; i < u->sends.n_max; i++) {
        void *send = cm_pool_at(&u->sends, i);
        if (send != NULL) {
            cm_pool_put(&u->sends, send);
        }
    }
}

static void ucx_close(void *backend)
{
    ucx_net *u = backend;
    ucx_close_all_links(u);
    for (uint32_t i = 0; i < u->n_requests; i++) {
        (void)ucp_listener_reject(u->listener, u->requests[i]);
    }
    if (u->listener != NULL) {
        ucp_listener_destroy(u->listener);
    }
    /* what the user did not release: UCX gets its part, the pool lists the rest */
    for (uint32_t i = 0; i < u->arrivals.n_max; i++) {
        ucx_arrival *arrival = cm_pool_at(&u->arrivals, i);
        if (arrival != NULL && arrival->desc != NULL) {
            ucp_am_data_release(u->worker, arrival->desc);
        }
    }
    ucp_worker_destroy(u->worker);
    ucp_cleanup(u->context);
    ucx_forget_links(u);
    cm_free(u->requests);
    cm_pool_fini(&u->arrivals);
    cm_pool_fini(&u->sends);
    cm_pool_fini(&u->links);
    cm_map_fini(&u->eps);
    net_buffers_fini(&u->buffers);
    cm_free(u);
}

const net_ops net_ucx_ops = {
    .version = NET_PROTOCOL,
    .name = "ucx",
    .open = ucx_open,
    .close = ucx_close,
    .listen = ucx_listen,
    .connect = ucx_connect,
    .disconnect = ucx_disconnect,
    .send = ucx_send_message,
    .progress = ucx_progress,
    .release = ucx_release,
    .fd = ucx_fd,
    .arm = ucx_arm,
};
