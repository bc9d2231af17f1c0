/* gRPC client for C, callbacks on the loop thread. Keepalive pings find a dead host within seconds; every
 * call has a deadline or is a session that its owner watches. Thread: the loop's. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common/base/bytes.h"
#include "common/base/status.h"
#include "common/proc/loop.h"
#include "common/proc/rpc_server.h"

typedef struct pc_channel pc_channel;
typedef struct pc_stream pc_stream;

pc_channel *pc_channel_create(pc_loop *loop, const char *address); /* plain */
/* tls: kept; NULL: plain. The server's certificate must be a coordinator's of the same authority, and name
 * the host in address. */
pc_channel *pc_channel_create_tls(pc_loop *loop, const char *address, pc_tls *tls);
/* To a gateway. ca_file: PEM of whoever signed its certificate, which must name the host in address; "":
 * plain. api_key: sent with every call; "": none. CM_E_CONFIG: err names the file. */
CM_MUST_CHECK cm_status pc_channel_create_client(pc_loop *loop, const char *address, const char *ca_file,
                                                 const char *api_key, pc_channel **channel_out,
                                                 cm_error *err);
/* Cancels its streams; their closed callbacks come first. Not from inside a callback of a stream. */
void pc_channel_destroy(pc_channel *channel);

typedef struct pc_stream_events {
    void (*message)(void *ctx, const uint8_t *data, size_t n_bytes); /* borrowed */
    /* Last callback. code and text from the server, or UNAVAILABLE and why there was none. */
    void (*closed)(void *ctx, pc_code code, const char *text);
} pc_stream_events;

/* Any kind of call: unary = send once, half-close, one message, closed. deadline_ms 0 = none. When nobody
 * answers at the address, closed follows with UNAVAILABLE as soon as that is known; every open tries the
 * address afresh. events are copied. */
pc_stream *pc_stream_open(pc_channel *channel, const char *path, const pc_stream_events *events, void *ctx,
                          uint64_t deadline_ms);
/* Copied and queued; CM_E_CAPACITY when 1024 messages wait, CM_E_CANCELLED when the call is over (closed is
 * on its way). */
CM_MUST_CHECK cm_status pc_stream_send(pc_stream *stream, const void *data, size_t n_bytes);
void pc_stream_half_close(pc_stream *stream);
void pc_stream_cancel(pc_stream *stream); /* closed follows */

/* A whole unary call for tools without a loop of their own: runs the loop until it is over. reply is
 * appended. err has the server's text. CM_E_CANCELLED also when somebody stopped the loop meanwhile. */
CM_MUST_CHECK cm_status pc_unary_wait(pc_channel *channel, const char *path, const void *data, size_t n_bytes,
                                      uint64_t deadline_ms, cm_bytes *reply, cm_error *err);
