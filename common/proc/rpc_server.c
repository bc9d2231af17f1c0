#include "common/proc/rpc_server.h"

#include <errno.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <stdio.h>
#include <string.h>
#include <sys/queue.h>

#include "common/base/assert.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/proc/addresses.h"
#include "common/proc/rpc_private.h"

enum {
    CALL_HEADERS_MAX = 4,
    CALL_TRAILERS_MAX = 2,
    /* Our own clients ping every 2 s to find dead hosts; only what is clearly faster is answered with a
       goodbye. */
    SERVER_PING_INTERVAL_MIN_MS = 1000,
    SERVER_PING_MS = 30000, /* so that calls of a host that vanished end */
    SERVER_PING_ANSWER_MS = 10000,
    /* Room above calls_max so that too many calls are told so and do not wait in the client. */
    SERVER_STREAMS_SPARE = 64,
};

struct pc_call {
    pc_rpc_server *server;
    const pc_method *method; /* NULL: refused, the handlers never see it */
    void *user;
    grpc_call *call; /* NULL until accepted */
    grpc_call_details details;
    grpc_metadata_array metadata;
    char **texts;       /* [metadata.count] values handed out by pc_call_metadata */
    char *peer, *role;  /* role: NULL when plain */
    uint32_t n_batches; /* on their way; the last to complete frees the call */
    pc_op accepted, received, sent, ended;
    grpc_byte_buffer *message; /* being received */
    int cancelled;             /* written by gRPC; we go by our own finish */
    pc_outbox outbox;
    bool sending;      /* a batch of op sent is on its way */
    bool paused;       /* the next message is not received before the client has read */
    bool headers_sent; /* initial metadata */
    bool seen;         /* a handler knows it, so closed is due */
    bool unheard;      /* no handler knows it yet: in the list of those */
    TAILQ_ENTRY(pc_call) unheard_link;
    bool finishing; /* pc_call_finish was called */
    bool status_sent;
    bool over; /* closed was delivered, or would have been */
    uint32_t n_headers, n_trailers;
    grpc_metadata headers[CALL_HEADERS_MAX], trailers[CALL_TRAILERS_MAX];
    grpc_status_code code;
    grpc_slice text; /* valid when finishing */
};

struct pc_rpc_server {
    pc_loop *loop;
    pc_cq *cq;
    grpc_server *server;
    const pc_method *methods;
    uint32_t n_methods, n_open; /* calls the handlers have, or could still get a message of */
    TAILQ_HEAD(, pc_call) unheard;
    uint32_t calls_max;
    uint64_t queue_bytes_max;
    void *ctx;
    pc_tls *tls;
    pc_op stopped;
    bool draining, closing; /* closing: nothing is started any more */
    pc_task drained;
};

pc_code pc_code_of(cm_status status)
{
    switch (status) {
    case CM_OK:
        return PC_CODE_OK;
    case CM_E_INVALID:
    case CM_E_TOO_LONG:
        return PC_CODE_INVALID_ARGUMENT;
    case CM_E_NOT_FOUND:
        return PC_CODE_NOT_FOUND;
    case CM_E_EXISTS:
        return PC_CODE_ALREADY_EXISTS;
    case CM_E_DEADLINE:
        return PC_CODE_DEADLINE_EXCEEDED;
    case CM_E_CANCELLED:
        return PC_CODE_CANCELLED;
    case CM_E_CAPACITY:
        return PC_CODE_RESOURCE_EXHAUSTED;
    case CM_E_UNSUPPORTED:
        return PC_CODE_UNIMPLEMENTED;
    case CM_E_UNAVAILABLE:
    case CM_AGAIN:
        return PC_CODE_UNAVAILABLE;
    default:
        return cm_status_scope(status) == CM_SCOPE_PEER ? PC_CODE_UNAVAILABLE : PC_CODE_INTERNAL;
    }
}

/* -------------------------------------------------------------------------------------------------- life of
 * a call accept -> (received)* and (sent)* side by side -> ended. Every batch holds the call; ended is
 * started first and completes last but for batches that were overtaken by a cancel. */

static pc_call *call_create(pc_rpc_server *server)
{
    pc_call *call = cm_alloc(sizeof(*call));
    call->server = server;
    grpc_call_details_init(&call->details);
    grpc_metadata_array_init(&call->metadata);
    return call;
}

static void call_free(pc_call *call)
{
    for (size_t i = 0; call->texts != NULL && i < call->metadata.count; i++) {
        gpr_free(call->texts[i]);
    }
    cm_free(call->texts);
    gpr_free(call->peer);
    cm_free(call->role);
    for (uint32_t i = 0; i < call->n_headers; i++) {
        grpc_slice_unref(call->headers[i].key);
        grpc_slice_unref(call->headers[i].value);
    }
    for (uint32_t i = 0; i < call->n_trailers; i++) {
        grpc_slice_unref(call->trailers[i].key);
        grpc_slice_unref(call->trailers[i].value);
    }
    if (call->finishing) {
        grpc_slice_unref(call->text);
    }
    pc_outbox_clear(&call->outbox);
    grpc_metadata_array_destroy(&call->metadata);
    grpc_call_details_destroy(&call->details);
    if (call->call != NULL) {
        grpc_call_unref(call->call);
    }
    cm_free(call);
}

static void call_batch(pc_call *call, const grpc_op *ops, size_t n_ops, pc_op *op,
                       void (*done)(void *owner, bool ok))
{
    pc_cq_arm(call->server->cq, op, done, call);
    grpc_call_error rc = grpc_call_start_batch(call->call, ops, n_ops, op, NULL);
    CM_ASSERT_MSG(rc == GRPC_CALL_OK, "batch of %zu: error %d", n_ops, (int)rc);
    call->n_batches++;
}

static void call_batch_done(pc_call *call)
{
    if (--call->n_batches == 0) {
        call_free(call);
    }
}

static void call_receive(pc_call *call);
static void call_flush(pc_call *call);

static void call_leave_unheard(pc_call *call)
{
    if (call->unheard) {
        TAILQ_REMOVE(&call->server->unheard, call, unheard_link);
        call->unheard = false;
    }
}

/* A handler is about to know it. */
static void call_see(pc_call *call)
{
    call_leave_unheard(call);
    call->seen = true;
}

static void call_received(void *owner, bool ok)
{
    pc_call *call = owner;
    grpc_byte_buffer *message = call->message;
    call->message = NULL;
    if (call->over || call->finishing) {
        /* nobody listens any more */
    } else if (message != NULL) {
        grpc_slice data = pc_buffer_read(message);
        call_see(call);
        call->method->message(call, GRPC_SLICE_START_PTR(data), GRPC_SLICE_LENGTH(data));
        grpc_slice_unref(data);
        if (call->method->client_streams) {
            call_receive(call);
        }
    } else if (!ok || grpc_call_failed_before_recv_message(call->call)) {
        /* cancelled or broken: ended tells */
    } else if (!call->method->client_streams) {
        pc_call_finish(call, PC_CODE_INVALID_ARGUMENT, "the call ended without a request message", NULL, 0,
                       0);
    } else if (call->method->half_closed != NULL) {
        call_see(call);
        call->method->half_closed(call);
    }
    if (message != NULL) {
        grpc_byte_buffer_destroy(message);
    }
    call_batch_done(call);
}

static bool call_is_behind(const pc_call *call)
{
    return call->outbox.n_whole_bytes > call->server->queue_bytes_max;
}

static void call_receive(pc_call *call)
{
    call->paused = call_is_behind(call);
    if (!call->paused && !call->over && !call->finishing && !call->server->closing) {
        grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &call->message};
        call_batch(call, &op, 1, &call->received, call_received);
    }
}

static void call_tell_sent(pc_call *call)
{
    bool listens = call->seen && !call->over && !call->finishing && !call->server->closing;
    if (listens && call->outbox.n_messages == 0 && call->method->sent != NULL) {
        call->method->sent(call);
    }
}

static void call_sent(void *owner, bool ok)
{
    pc_call *call = owner;
    call->sending = false;
    pc_outbox_pop(&call->outbox);
    if (ok) { /* otherwise the call is over: ended tells */
        call_flush(call);
        call_tell_sent(call);
        if (call->paused && !call_is_behind(call)) {
            call_receive(call);
        }
    }
    call_batch_done(call);
}

/* Status and trailers alone complete here: no message went with them. */
static void call_sent_status(void *owner, bool ok)
{
    pc_call *call = owner;
    (void)ok;
    call->sending = false;
    call_batch_done(call);
}

/* Starts the next message; the status goes out together with the last one. */
static void call_flush(pc_call *call)
{
    grpc_op ops[3];
    size_t n = 0;
    bool message = call->outbox.n_messages > 0;
    bool status = call->finishing && !call->status_sent && call->outbox.n_messages <= 1;
    if (call->sending || call->over || call->server->closing || (!message && !status)) {
        return;
    }
    memset(ops, 0, sizeof(ops));
    if (!call->headers_sent) {
        ops[n].op = GRPC_OP_SEND_INITIAL_METADATA;
        ops[n].data.send_initial_metadata.count = call->n_headers;
        ops[n++].data.send_initial_metadata.metadata = call->headers;
    }
    if (message) {
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = pc_outbox_first(&call->outbox);
    }
    if (status) {
        ops[n].op = GRPC_OP_SEND_STATUS_FROM_SERVER;
        ops[n].data.send_status_from_server.status = call->code;
        ops[n].data.send_status_from_server.status_details = &call->text;
        ops[n].data.send_status_from_server.trailing_metadata_count = call->n_trailers;
        ops[n++].data.send_status_from_server.trailing_metadata = call->trailers;
    }
    call->headers_sent = true;
    call->sending = true;
    call->status_sent = status;
    call_batch(call, ops, n, &call->sent, message ? call_sent : call_sent_status);
}

static void call_ended(void *owner, bool ok)
{
    pc_call *call = owner;
    pc_rpc_server *server = call->server;
    (void)ok;
    call->over = true;
    call_leave_unheard(call);
    if (call->method != NULL) {
        if (call->seen) {
            call->method->closed(call, !call->finishing);
        }
        server->n_open--;
        if (server->draining && server->n_open == 0) {
            pc_loop_post(server->loop, &server->drained);
        }
    }
    call_batch_done(call);
}

/* -------------------------------------------------------------------------------------------------------
 * accepting */

static void server_accept(pc_rpc_server *server);

static const pc_method *server_find_method(const pc_rpc_server *server, grpc_slice path)
{
    for (uint32_t i = 0; i < server->n_methods; i++) {
        if (grpc_slice_str_cmp(path, server->methods[i].path) == 0) {
            return &server->methods[i];
        }
    }
    return NULL;
}

/* The CN of the certificate that gRPC has verified. */
static char *call_find_role(grpc_call *call)
{
    grpc_auth_context *auth = grpc_call_auth_context(call);
    grpc_auth_property_iterator it =
        grpc_auth_context_find_properties_by_name(auth, GRPC_X509_CN_PROPERTY_NAME);
    const grpc_auth_property *name = grpc_auth_property_iterator_next(&it);
    char *role = cm_strdup(name != NULL ? name->value : "nobody");
    grpc_auth_context_release(auth);
    return role;
}

static void call_refuse_role(pc_call *call, const pc_method *method)
{
    char text[256], *peer = grpc_call_get_peer(call->call);
    cm_warn("%s called %s with a certificate of role %s, it needs %s", peer, method->path, call->role,
            method->role);
    gpr_free(peer);
    snprintf(
        text, sizeof(text),
        "%.80s needs a certificate of role %s, yours is of role %.60s: give --tls-cert and --tls-key of %s",
        method->path, method->role, call->role, method->role);
    pc_call_finish(call, PC_CODE_PERMISSION_DENIED, text, NULL, 0, 0);
}

static void call_refuse_draining(pc_call *call)
{
    pc_call_finish(call, PC_CODE_UNAVAILABLE, "the server is shutting down", NULL, 0, 0);
}

static void call_dispatch(pc_call *call)
{
    pc_rpc_server *server = call->server;
    const pc_method *method = server_find_method(server, call->details.method);
    call->role = server->tls != NULL ? call_find_role(call->call) : NULL;
    if (server->draining) {
        call_refuse_draining(call);
    } else if (method == NULL) {
        char text[256];
        int n = (int)GRPC_SLICE_LENGTH(call->details.method);
        snprintf(text, sizeof(text), "unknown method %.*s", n < 200 ? n : 200,
                 (const char *)GRPC_SLICE_START_PTR(call->details.method));
        pc_call_finish(call, PC_CODE_UNIMPLEMENTED, text, NULL, 0, 0);
    } else if (call->role != NULL && method->role != NULL && strcmp(call->role, method->role) != 0) {
        call_refuse_role(call, method);
    } else if (server->n_open >= server->calls_max) {
        char text[96];
        snprintf(text, sizeof(text), "%u calls are open, the server takes no more", server->n_open);
        pc_call_finish(call, PC_CODE_RESOURCE_EXHAUSTED, text, NULL, 0, 0);
    } else {
        call->method = method;
        call->peer = grpc_call_get_peer(call->call);
        call->texts = cm_alloc(sizeof(*call->texts) * call->metadata.count);
        server->n_open++;
        call->unheard = true;
        TAILQ_INSERT_TAIL(&server->unheard, call, unheard_link);
        call_receive(call);
    }
}

static void call_accepted(void *owner, bool ok)
{
    pc_call *call = owner;
    pc_rpc_server *server = call->server;
    if (!ok || server->closing) {
        call_free(call);
        return;
    }
    server_accept(server);
    /* in a batch of its own: completes when the client goes away, whatever else is on its way */
    grpc_op op = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER,
                  .data.recv_close_on_server.cancelled = &call->cancelled};
    call_batch(call, &op, 1, &call->ended, call_ended);
    call_dispatch(call);
}

static void server_accept(pc_rpc_server *server)
{
    pc_call *call = call_create(server);
    grpc_completion_queue *queue = pc_cq_queue(server->cq);
    pc_cq_arm(server->cq, &call->accepted, call_accepted, call);
    grpc_call_error rc = grpc_server_request_call(server->server, &call->call, &call->details,
                                                  &call->metadata, queue, queue, &call->accepted);
    CM_ASSERT_MSG(rc == GRPC_CALL_OK, "request_call: error %d", (int)rc);
}

/* ------------------------------------------------------------------------------------------------------ the
 * server */

static grpc_server_credentials *server_credentials(const pc_rpc_options *options)
{
    return options->serve_tls != NULL ? pc_serve_tls_credentials(options->serve_tls)
                                      : pc_tls_server_credentials(options->tls);
}

static cm_status server_listen(pc_rpc_server *server, const pc_rpc_options *options, char bound_out[128],
                               cm_error *err)
{
    const char *address = options->address;
    char why[1024];
    char host[PC_ADDRESS_BYTES];
    uint16_t port;
    if (!pc_address_split(address, host, &port)) {
        return cm_error_set(err, CM_E_INVALID, address, "cannot listen on %s: it is not " PC_ADDRESS_FORM,
                            address);
    }
    grpc_server_credentials *credentials = server_credentials(options);
    pc_grpc_log_capture_begin(why, sizeof(why));
    int bound = grpc_server_add_http2_port(server->server, address, credentials);
    pc_grpc_log_capture_end();
    grpc_server_credentials_release(credentials);
    if (bound != 0) {
        snprintf(bound_out, 128, "%.*s%d", (int)(strrchr(address, ':') + 1 - address), address, bound);
        return CM_OK;
    }
    if (strstr(why, strerror(EADDRINUSE)) != NULL) {
        return cm_error_set(err, CM_E_EXISTS, address,
                            "cannot listen on %s: the address is in use by another process", address);
    }
    return cm_error_set(err, CM_E_INVALID, address, "cannot listen on %s: %.300s", address, why);
}

static void server_stopped(void *owner, bool ok)
{
    (void)owner;
    (void)ok;
}

static void server_free(pc_rpc_server *server)
{
    server->closing = true;
    pc_cq_arm(server->cq, &server->stopped, server_stopped, server);
    grpc_server_shutdown_and_notify(server->server, pc_cq_queue(server->cq), &server->stopped);
    grpc_server_cancel_all_calls(server->server);
    pc_cq_finish(server->cq);
    grpc_server_destroy(server->server);
    pc_cq_destroy(server->cq);
    pc_loop_unpost(server->loop, &server->drained);
    cm_free(server);
}

cm_status pc_rpc_server_create(pc_loop *loop, const pc_rpc_options *options, const pc_method *methods,
                               uint32_t n_methods, pc_rpc_server **server_out, char bound_out[128],
                               cm_error *err)
{
    pc_rpc_server *server = cm_alloc(sizeof(*server));
    CM_ASSERT(options->calls_max > 0 && options->calls_max < INT32_MAX - SERVER_STREAMS_SPARE);
    CM_ASSERT(options->request_bytes_max <= INT32_MAX);
    TAILQ_INIT(&server->unheard);
    server->loop = loop;
    server->methods = methods;
    server->n_methods = n_methods;
    server->calls_max = options->calls_max;
    server->queue_bytes_max = options->queue_bytes_max;
    server->ctx = options->ctx;
    server->tls = options->tls;
    server->cq = pc_cq_create(loop);
    grpc_arg args[] = {
        pc_arg_int(GRPC_ARG_ALLOW_REUSEPORT, 0),
        pc_arg_int(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int)options->request_bytes_max),
        pc_arg_int(GRPC_ARG_MAX_CONCURRENT_STREAMS, (int)options->calls_max + SERVER_STREAMS_SPARE),
        pc_arg_int(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, SERVER_PING_INTERVAL_MIN_MS),
        pc_arg_int(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1),
        pc_arg_int(GRPC_ARG_KEEPALIVE_TIME_MS, SERVER_PING_MS),
        pc_arg_int(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, SERVER_PING_ANSWER_MS),
    };
    grpc_channel_args channel_args = {.num_args = sizeof(args) / sizeof(args[0]), .args = args};
    server->server = grpc_server_create(&channel_args, NULL);
    grpc_server_register_completion_queue(server->server, pc_cq_queue(server->cq), NULL);
    cm_status status = server_listen(server, options, bound_out, err);
    if (status != CM_OK) {
        server_free(server);
        return status;
    }
    grpc_server_start(server->server);
    server_accept(server);
    *server_out = server;
    return CM_OK;
}

void pc_rpc_server_drain(pc_rpc_server *server, pc_fn done, void *arg)
{
    pc_call *call;
    CM_ASSERT(!server->draining);
    server->draining = true;
    server->drained = (pc_task){.fn = done, .arg = arg};
    TAILQ_FOREACH (call, &server->unheard, unheard_link) {
        call_refuse_draining(call); /* it ends later, as an event */
    }
    if (server->n_open == 0) {
        pc_loop_post(server->loop, &server->drained);
    }
}

void pc_rpc_server_destroy(pc_rpc_server *server)
{
    server_free(server);
}

/* --------------------------------------------------------------------------------------------- what handlers
 * call */

void *pc_call_ctx(const pc_call *call)
{
    return call->server->ctx;
}

void pc_call_set_user(pc_call *call, void *user)
{
    call->user = user;
}

void *pc_call_user(const pc_call *call)
{
    return call->user;
}

const char *pc_call_peer(const pc_call *call)
{
    return call->peer;
}

const char *pc_call_role(const pc_call *call)
{
    return call->role;
}

const pc_method *pc_call_method(const pc_call *call)
{
    return call->method;
}

const char *pc_call_metadata(const pc_call *call, const char *key)
{
    for (size_t i = 0; i < call->metadata.count; i++) {
        if (grpc_slice_str_cmp(call->metadata.metadata[i].key, key) != 0) {
            continue;
        }
        if (call->texts[i] == NULL) {
            call->texts[i] = grpc_slice_to_c_string(call->metadata.metadata[i].value);
        }
        return call->texts[i];
    }
    return NULL;
}

uint64_t pc_call_deadline_ms(const pc_call *call)
{
    gpr_timespec left = gpr_convert_clock_type(call->details.deadline, GPR_TIMESPAN);
    if (left.tv_sec == INT64_MAX) {
        return UINT64_MAX;
    }
    return left.tv_sec < 0 ? 0 : (uint64_t)left.tv_sec * 1000u + (uint64_t)left.tv_nsec / 1000000u;
}

void pc_call_add_header(pc_call *call, const char *key, const char *value)
{
    CM_ASSERT_MSG(call->n_headers < CALL_HEADERS_MAX && !call->headers_sent, "header %s", key);
    grpc_metadata *header = &call->headers[call->n_headers++];
    header->key = grpc_slice_from_copied_string(key);
    header->value = grpc_slice_from_copied_string(value);
    CM_ASSERT_MSG(grpc_header_key_is_legal(header->key), "header %s", key);
    /* values may come from a client: what cannot travel becomes a question mark */
    for (uint8_t *at = GRPC_SLICE_START_PTR(header->value); at < GRPC_SLICE_END_PTR(header->value); at++) {
        *at = *at < 0x20 || *at > 0x7e ? '?' : *at;
    }
}

cm_status pc_call_send(pc_call *call, const void *data, size_t n_bytes)
{
    if (call->over || call->finishing || call->server->closing) {
        return CM_E_CANCELLED;
    }
    uint64_t n_pieces = call->outbox.n_bytes - call->outbox.n_whole_bytes;
    if (n_pieces > 0 && n_pieces + n_bytes > call->server->queue_bytes_max) {
        return CM_AGAIN;
    }
    pc_outbox_push(&call->outbox, data, n_bytes, false);
    call_flush(call);
    return CM_OK;
}

void pc_call_send_whole(pc_call *call, const void *data, size_t n_bytes)
{
    if (!call->over && !call->finishing && !call->server->closing) {
        pc_outbox_push(&call->outbox, data, n_bytes, true);
        call_flush(call);
    }
}

uint64_t pc_call_queued_bytes(const pc_call *call)
{
    return call->outbox.n_bytes;
}

void pc_call_finish(pc_call *call, pc_code code, const char *message, const void *details, size_t n_details,
                    int64_t retry_ms)
{
    if (call->over || call->finishing) {
        return;
    }
    call->finishing = true;
    call->code = (grpc_status_code)code;
    call->text = grpc_slice_from_copied_string(message != NULL ? message : "");
    if (details != NULL) {
        grpc_metadata *trailer = &call->trailers[call->n_trailers++];
        trailer->key = grpc_slice_from_static_string("grpc-status-details-bin");
        trailer->value = grpc_slice_from_copied_buffer(details, n_details);
    }
    if (retry_ms != 0) {
        char text[24];
        snprintf(text, sizeof(text), "%lld", (long long)retry_ms);
        grpc_metadata *trailer = &call->trailers[call->n_trailers++];
        trailer->key = grpc_slice_from_static_string("grpc-retry-pushback-ms");
        trailer->value = grpc_slice_from_copied_string(text);
    }
    call_flush(call);
}
