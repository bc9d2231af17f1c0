/* gRPC server for C: methods in a table, calls as objects on the loop thread. Completion queues are served by
 * a thread of their own that posts to the loop; one message is in flight per call and direction, the rest
 * waits in a bounded queue. Thread: the loop's. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/status.h"
#include "common/proc/loop.h"
#include "common/proc/serve_tls.h"
#include "common/proc/tls.h"

typedef struct pc_rpc_server pc_rpc_server;
typedef struct pc_call pc_call;

/* gRPC status numbers we use (grpc_status_code). */
typedef enum pc_code {
    PC_CODE_OK = 0,
    PC_CODE_CANCELLED = 1,
    PC_CODE_UNKNOWN = 2,
    PC_CODE_INVALID_ARGUMENT = 3,
    PC_CODE_DEADLINE_EXCEEDED = 4,
    PC_CODE_NOT_FOUND = 5,
    PC_CODE_ALREADY_EXISTS = 6,
    PC_CODE_PERMISSION_DENIED = 7,
    PC_CODE_RESOURCE_EXHAUSTED = 8,
    PC_CODE_FAILED_PRECONDITION = 9,
    PC_CODE_ABORTED = 10,
    PC_CODE_UNIMPLEMENTED = 12,
    PC_CODE_INTERNAL = 13,
    PC_CODE_UNAVAILABLE = 14,
    PC_CODE_UNAUTHENTICATED = 16,
} pc_code;
pc_code pc_code_of(cm_status status); /* the code a client sees for a status */

typedef struct pc_method {
    const char *path; /* "/baleen.v1.Inference/Chat" */
    /* A request message arrived (borrowed for the call). Unary and server-streaming methods get exactly one.
     */
    void (*message)(pc_call *call, const uint8_t *data, size_t n_bytes);
    /* The client sent its last message (bidirectional methods; may be NULL). */
    void (*half_closed)(pc_call *call);
    /* Whatever was queued has been given to the connection, and the call goes on: for answers that are longer
     * than the queue. May be NULL. */
    void (*sent)(pc_call *call);
    /* The call is over, by our finish or by the client (cancelled true: cancel, disconnect or deadline before
     * our finish). Last callback, and only after another one: free what pc_call_user points to; the call is
     * invalid after it. */
    void (*closed)(pc_call *call, bool cancelled);
    bool client_streams; /* more than one request message */
    const char *role;    /* whose certificate a caller needs, on a server with TLS; others are answered
                            PERMISSION_DENIED. NULL: any of the cluster */
} pc_method;

typedef struct pc_rpc_options {
    const char *address; /* "127.0.0.1:0"; several processes never share a port */
    uint32_t request_bytes_max;
    uint32_t calls_max;       /* open calls; more are answered RESOURCE_EXHAUSTED */
    uint64_t queue_bytes_max; /* unsent bytes of one call; then pc_call_send says CM_AGAIN (an empty queue
                                 takes any one) */
    void *ctx;                /* pc_call_ctx */
    pc_tls *tls;              /* kept; NULL: plain. Then clients need a certificate of the same authority */
    pc_serve_tls *serve_tls;  /* kept; in its place: TLS with the server's certificate alone. NULL: without */
} pc_rpc_options;

/* methods are kept. bound_out: "host:port" really in use. CM_E_EXISTS: the address is taken; CM_E_INVALID: no
 * "host:port", or nothing this machine can listen on. */
CM_MUST_CHECK cm_status pc_rpc_server_create(pc_loop *loop, const pc_rpc_options *options,
                                             const pc_method *methods, uint32_t n_methods,
                                             pc_rpc_server **server_out, char bound_out[128], cm_error *err);
/* Refuses new calls and those that have said nothing yet (UNAVAILABLE); running ones go on. done runs when
 * none is left. */
void pc_rpc_server_drain(pc_rpc_server *server, pc_fn done, void *arg);
/* Cancels what still runs (closed callbacks come first), then frees. Not from inside a callback of a call. */
void pc_rpc_server_destroy(pc_rpc_server *server);

void *pc_call_ctx(const pc_call *call); /* options.ctx */
void pc_call_set_user(pc_call *call, void *user);
void *pc_call_user(const pc_call *call);
const char *pc_call_peer(const pc_call *call);
/* The role in the caller's certificate; NULL: plain. */
const char *pc_call_role(const pc_call *call);
const pc_method *pc_call_method(const pc_call *call);
/* First value of a request metadata key (lower case), NULL when absent. */
const char *pc_call_metadata(const pc_call *call, const char *key);
/* Milliseconds the client gives from now; UINT64_MAX = no deadline. */
uint64_t pc_call_deadline_ms(const pc_call *call);
/* Before the first send: goes out with the initial metadata. Copied; at most 4. */
void pc_call_add_header(pc_call *call, const char *key, const char *value);
/* Copied and queued. CM_AGAIN: queue_bytes_max would be passed (nothing was queued). CM_E_CANCELLED: the call
 * is over. */
CM_MUST_CHECK cm_status pc_call_send(pc_call *call, const void *data, size_t n_bytes);
/* An answer in one message: queued whatever waits, and no room of other messages. While more than
 * queue_bytes_max of such bytes wait, the client is not asked for its next message: what can wait is bounded
 * by what the owner has begun. Dropped when the call is over. */
void pc_call_send_whole(pc_call *call, const void *data, size_t n_bytes);
uint64_t pc_call_queued_bytes(const pc_call *call);
/* After what is queued. details (may be NULL): packed google.rpc.Status for grpc-status-details-bin. retry_ms
 * not 0: trailer grpc-retry-pushback-ms; PC_RETRY_NEVER: clients must not try again by themselves. closed
 * follows. A second finish is ignored. */
enum { PC_RETRY_NEVER = -1 };
void pc_call_finish(pc_call *call, pc_code code, const char *message, const void *details, size_t n_details,
                    int64_t retry_ms);
