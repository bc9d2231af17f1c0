#include "common/proc/rpc_client.h"

#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/proc/rpc_private.h"

enum {
    STREAM_MESSAGES_MAX = 1024, /* waiting to be sent */
    CHANNEL_PING_MS = 2000,     /* a dead host is known after this and the next */
    CHANNEL_PING_ANSWER_MS = 1000,
    CHANNEL_BACKOFF_MIN_MS = 100,
    CHANNEL_BACKOFF_MAX_MS = 2000,
    CHANNEL_CONNECT_MS = 2000, /* for one attempt */
    CHANNEL_REPLY_BYTES_MAX = 64 << 20,
};

struct pc_stream {
    pc_channel *channel;
    pc_stream *before, *after; /* in channel->streams */
    pc_stream_events events;
    void *ctx;
    grpc_call *call;
    uint32_t n_batches; /* on their way; when the last completes, closed is told */
    pc_op received, sent, ended;
    grpc_metadata_array headers, trailers;
    grpc_metadata key;         /* sent, when the channel has one */
    grpc_byte_buffer *message; /* being received */
    grpc_status_code code;     /* valid when over */
    grpc_slice text;
    pc_outbox outbox;
    bool sending, half_close, half_closed, over;
};

struct pc_channel {
    pc_loop *loop;
    pc_cq *cq;
    char *address;
    pc_tls *tls;         /* NULL: plain, or by ca */
    char *ca;            /* text; NULL: plain, or by tls */
    char *authorization; /* NULL: none is sent */
    grpc_channel *channel;
    pc_stream *streams;
    bool closing; /* nothing is started any more */
};

/* ------------------------------------------------------------------------------------------------- the
 * connection */

/* Lazy: the first call connects. */
static grpc_channel *channel_connect(const pc_channel *of)
{
    grpc_arg args[] = {
        pc_arg_int(GRPC_ARG_KEEPALIVE_TIME_MS, CHANNEL_PING_MS),
        pc_arg_int(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, CHANNEL_PING_ANSWER_MS),
        pc_arg_int(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1),
        pc_arg_int(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA,
                   0), /* no limit: silence is what the pings are for */
        pc_arg_int(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, CHANNEL_BACKOFF_MIN_MS),
        pc_arg_int(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, CHANNEL_BACKOFF_MAX_MS),
        pc_arg_int(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, CHANNEL_CONNECT_MS),
        pc_arg_int(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, CHANNEL_REPLY_BYTES_MAX),
        pc_arg_int(GRPC_ARG_ENABLE_RETRIES, 0), /* who owns a call decides what is done twice */
        pc_arg_int(GRPC_ARG_ENABLE_HTTP_PROXY,
                   0), /* a proxy of the user's shell is not for the cluster's own traffic */
        pc_arg_int(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1),
        pc_arg_int(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL,
                   1), /* a new channel starts without another one's backoff */
    };
    grpc_channel_args channel_args = {.num_args = sizeof(args) / sizeof(args[0]), .args = args};
    grpc_channel_credentials *credentials = of->ca != NULL
                                                ? grpc_ssl_credentials_create(of->ca, NULL, NULL, NULL)
                                                : pc_tls_client_credentials(of->tls);
    grpc_channel *channel = grpc_channel_create(of->address, credentials, &channel_args);
    grpc_channel_credentials_release(credentials);
    return channel;
}

/* gRPC answers calls with the last failure until its own backoff ends. Our callers have one of their own:
 * each of their tries shall be one. Calls that still end on the old channel keep it as long as they need it.
 */
static void channel_refresh(pc_channel *channel)
{
    if (grpc_channel_check_connectivity_state(channel->channel, 0) == GRPC_CHANNEL_TRANSIENT_FAILURE) {
        grpc_channel_destroy(channel->channel);
        channel->channel = channel_connect(channel);
    }
}

/* ------------------------------------------------------------------------------------------------ life of a
 * stream ended (headers out, status in), received* and sent* side by side. gRPC gives the status after the
 * last message, but the batches may complete in any order: closed comes when none is left, so no message is
 * overtaken. */

static void stream_close(pc_stream *stream)
{
    char *text = grpc_slice_to_c_string(stream->text);
    stream->events.closed(stream->ctx, (pc_code)stream->code, text);
    gpr_free(text);
    if (stream->before != NULL) {
        stream->before->after = stream->after;
    } else {
        stream->channel->streams = stream->after;
    }
    if (stream->after != NULL) {
        stream->after->before = stream->before;
    }
    grpc_slice_unref(stream->text);
    grpc_metadata_array_destroy(&stream->headers);
    grpc_metadata_array_destroy(&stream->trailers);
    pc_outbox_clear(&stream->outbox);
    grpc_call_unref(stream->call);
    cm_free(stream);
}

static void stream_batch(pc_stream *stream, const grpc_op *ops, size_t n_ops, pc_op *op,
                         void (*done)(void *owner, bool ok))
{
    pc_cq_arm(stream->channel->cq, op, done, stream);
    grpc_call_error rc = grpc_call_start_batch(stream->call, ops, n_ops, op, NULL);
    CM_ASSERT_MSG(rc == GRPC_CALL_OK, "batch of %zu: error %d", n_ops, (int)rc);
    stream->n_batches++;
}

static void stream_batch_done(pc_stream *stream)
{
    if (--stream->n_batches == 0) {
        stream_close(stream);
    }
}

static void stream_ended(void *owner, bool ok)
{
    pc_stream *stream = owner;
    (void)ok;
    stream->over = true;
    stream_batch_done(stream);
}

static void stream_received(void *owner, bool ok)
{
    pc_stream *stream = owner;
    grpc_byte_buffer *message = stream->message;
    stream->message = NULL;
    if (message != NULL && !stream->channel->closing) {
        grpc_slice data = pc_buffer_read(message);
        stream->events.message(stream->ctx, GRPC_SLICE_START_PTR(data), GRPC_SLICE_LENGTH(data));
        grpc_slice_unref(data);
        if (ok) {
            grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &stream->message};
            stream_batch(stream, &op, 1, &stream->received, stream_received);
        }
    }
    if (message != NULL) {
        grpc_byte_buffer_destroy(message);
    }
    stream_batch_done(stream);
}

static void stream_flush(pc_stream *stream);

static void stream_sent(void *owner, bool ok)
{
    pc_stream *stream = owner;
    stream->sending = false;
    if (stream->outbox.n_messages > 0) {
        pc_outbox_pop(&stream->outbox);
    }
    if (ok) { /* otherwise the call is over: ended tells */
        stream_flush(stream);
    }
    stream_batch_done(stream);
}

/* Starts the next message; our end of the stream goes out with the last one. */
static void stream_flush(pc_stream *stream)
{
    grpc_op ops[2];
    size_t n = 0;
    bool close = stream->half_close && !stream->half_closed && stream->outbox.n_messages <= 1;
    if (stream->sending || stream->over || stream->channel->closing ||
        (stream->outbox.n_messages == 0 && !close)) {
        return;
    }
    memset(ops, 0, sizeof(ops));
    if (stream->outbox.n_messages > 0) {
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = pc_outbox_first(&stream->outbox);
    }
    if (close) {
        ops[n++].op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    }
    stream->sending = true;
    stream->half_closed = close;
    stream_batch(stream, ops, n, &stream->sent, stream_sent);
}

static void stream_start(pc_stream *stream)
{
    grpc_op ops[2];
    memset(ops, 0, sizeof(ops));
    ops[0].op = GRPC_OP_SEND_INITIAL_METADATA;
    if (stream->channel->authorization != NULL) {
        stream->key = (grpc_metadata){.key = grpc_slice_from_static_string("authorization"),
                                      .value = grpc_slice_from_static_string(stream->channel->authorization)};
        ops[0].data.send_initial_metadata.count = 1;
        ops[0].data.send_initial_metadata.metadata = &stream->key;
    }
    ops[1].op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    ops[1].data.recv_status_on_client.trailing_metadata = &stream->trailers;
    ops[1].data.recv_status_on_client.status = &stream->code;
    ops[1].data.recv_status_on_client.status_details = &stream->text;
    stream_batch(stream, ops, 2, &stream->ended, stream_ended);

    memset(ops, 0, sizeof(ops));
    ops[0].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[0].data.recv_initial_metadata.recv_initial_metadata = &stream->headers;
    ops[1].op = GRPC_OP_RECV_MESSAGE;
    ops[1].data.recv_message.recv_message = &stream->message;
    stream_batch(stream, ops, 2, &stream->received, stream_received);
}

pc_stream *pc_stream_open(pc_channel *channel, const char *path, const pc_stream_events *events, void *ctx,
                          uint64_t deadline_ms)
{
    pc_stream *stream = cm_alloc(sizeof(*stream));
    CM_ASSERT_MSG(!channel->closing, "%s opened while its channel is destroyed", path);
    stream->channel = channel;
    stream->events = *events;
    stream->ctx = ctx;
    stream->text = grpc_empty_slice();
    grpc_metadata_array_init(&stream->headers);
    grpc_metadata_array_init(&stream->trailers);
    stream->after = channel->streams;
    if (channel->streams != NULL) {
        channel->streams->before = stream;
    }
    channel->streams = stream;

    gpr_timespec deadline = deadline_ms == 0 ? gpr_inf_future(GPR_CLOCK_MONOTONIC)
                                             : gpr_time_from_millis((int64_t)deadline_ms, GPR_TIMESPAN);
    channel_refresh(channel);
    grpc_slice method = grpc_slice_from_copied_string(path);
    stream->call = grpc_channel_create_call(channel->channel, NULL, GRPC_PROPAGATE_DEFAULTS,
                                            pc_cq_queue(channel->cq), method, NULL, deadline, NULL);
    grpc_slice_unref(method);
    stream_start(stream);
    return stream;
}

cm_status pc_stream_send(pc_stream *stream, const void *data, size_t n_bytes)
{
    CM_ASSERT(!stream->half_close);
    if (stream->over || stream->channel->closing) {
        return CM_E_CANCELLED;
    }
    if (stream->outbox.n_messages >= STREAM_MESSAGES_MAX) {
        return CM_E_CAPACITY;
    }
    pc_outbox_push(&stream->outbox, data, n_bytes);
    stream_flush(stream);
    return CM_OK;
}

void pc_stream_half_close(pc_stream *stream)
{
    stream->half_close = true;
    stream_flush(stream);
}

void pc_stream_cancel(pc_stream *stream)
{
    grpc_call_cancel(stream->call, NULL);
}

/* ----------------------------------------------------------------------------------------------------- the
 * channel */

static pc_channel *channel_make(pc_loop *loop, const char *address)
{
    pc_channel *channel = cm_alloc(sizeof(*channel));
    channel->loop = loop;
    channel->address = cm_strdup(address);
    channel->cq = pc_cq_create(loop);
    return channel;
}

pc_channel *pc_channel_create(pc_loop *loop, const char *address)
{
    return pc_channel_create_tls(loop, address, NULL);
}

pc_channel *pc_channel_create_tls(pc_loop *loop, const char *address, pc_tls *tls)
{
    pc_channel *channel = channel_make(loop, address);
    channel->tls = tls;
    channel->channel = channel_connect(channel);
    return channel;
}

cm_status pc_channel_create_client(pc_loop *loop, const char *address, const char *ca_file,
                                   const char *api_key, pc_channel **channel_out, cm_error *err)
{
    char *ca = NULL;
    if (ca_file[0] != 0) {
        CM_TRY(pc_tls_file_read(ca_file, &ca, err));
    }
    pc_channel *channel = channel_make(loop, address);
    channel->ca = ca;
    if (api_key[0] != 0) {
        cm_bytes text;
        cm_bytes_init(&text, 0);
        cm_bytes_printf(&text, "Bearer %s", api_key);
        channel->authorization = cm_strdup(cm_bytes_text(&text));
        cm_bytes_fini(&text);
    }
    channel->channel = channel_connect(channel);
    *channel_out = channel;
    return CM_OK;
}

void pc_channel_destroy(pc_channel *channel)
{
    channel->closing = true;
    for (pc_stream *stream = channel->streams; stream != NULL; stream = stream->after) {
        grpc_call_cancel(stream->call, NULL);
    }
    pc_cq_finish(channel->cq);
    CM_ASSERT(channel->streams == NULL);
    grpc_channel_destroy(channel->channel);
    pc_cq_destroy(channel->cq);
    cm_free(channel->address);
    cm_free(channel->ca);
    cm_free(channel->authorization);
    cm_free(channel);
}

/* --------------------------------------------------------------------------------------------------- unary,
 * waiting */

typedef struct unary_wait {
    pc_loop *loop;
    cm_bytes *reply;
    cm_error *err;
    cm_status status;
    bool done;
} unary_wait;

static cm_status unary_status(pc_code code)
{
    switch (code) {
    case PC_CODE_OK:
        return CM_OK;
    case PC_CODE_CANCELLED:
        return CM_E_CANCELLED;
    case PC_CODE_INVALID_ARGUMENT:
        return CM_E_INVALID;
    case PC_CODE_DEADLINE_EXCEEDED:
        return CM_E_DEADLINE;
    case PC_CODE_NOT_FOUND:
        return CM_E_NOT_FOUND;
    case PC_CODE_ALREADY_EXISTS:
        return CM_E_EXISTS;
    case PC_CODE_RESOURCE_EXHAUSTED:
        return CM_E_CAPACITY;
    case PC_CODE_UNIMPLEMENTED:
        return CM_E_UNSUPPORTED;
    case PC_CODE_UNAVAILABLE:
        return CM_E_UNAVAILABLE;
    default:
        return CM_E_REFUSED;
    }
}

static void unary_message(void *ctx, const uint8_t *data, size_t n_bytes)
{
    unary_wait *wait = ctx;
    cm_bytes_append(wait->reply, data, n_bytes);
}

static void unary_closed(void *ctx, pc_code code, const char *text)
{
    unary_wait *wait = ctx;
    wait->done = true;
    wait->status = unary_status(code);
    if (wait->status != CM_OK) {
        wait->status = cm_error_set(wait->err, wait->status, NULL, "%s", text);
    }
    pc_loop_stop(wait->loop);
}

cm_status pc_unary_wait(pc_channel *channel, const char *path, const void *data, size_t n_bytes,
                        uint64_t deadline_ms, cm_bytes *reply, cm_error *err)
{
    static const pc_stream_events events = {.message = unary_message, .closed = unary_closed};
    unary_wait wait = {.loop = channel->loop, .reply = reply, .err = err};
    pc_stream *stream = pc_stream_open(channel, path, &events, &wait, deadline_ms);
    CM_TRY(pc_stream_send(stream, data, n_bytes));
    pc_stream_half_close(stream);
    pc_loop_run(channel->loop);
    if (!wait.done) {
        pc_stream_cancel(stream); /* somebody else stopped the loop: a signal */
        while (!wait.done) {
            pc_loop_run(channel->loop);
        }
    }
    if (wait.status == CM_OK && reply->overflow) {
        return cm_error_set(err, CM_E_TOO_LONG, NULL, "the reply is longer than %zu bytes", reply->max);
    }
    return wait.status;
}
