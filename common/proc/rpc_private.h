/* What the gRPC server and client share: a completion queue with its thread, credentials, and the messages
 * that wait to be sent. Thread: the loop's, but for the queue's own thread. */
#pragma once
#include <grpc/byte_buffer.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/status.h"
#include "common/proc/loop.h"
#include "common/proc/serve_tls.h"
#include "common/proc/tls.h"

/* The tag of a batch, embedded in its owner, which lives until done ran on the loop thread. */
typedef struct pc_op pc_op;
struct pc_op {
    void (*done)(void *owner, bool ok);
    void *owner;
    pc_op *next;
    bool ok;
};

typedef struct pc_cq pc_cq;
/* Holds gRPC up until pc_cq_destroy. */
pc_cq *pc_cq_create(pc_loop *loop);
grpc_completion_queue *pc_cq_queue(pc_cq *cq);
/* Before op goes to gRPC as a tag. */
void pc_cq_arm(pc_cq *cq, pc_op *op, void (*done)(void *owner, bool ok), void *owner);
/* Nothing may be started on the queue any more. Waits for what is on its way (cancel it first), stops the
 * thread and runs the remaining done functions now. Not from inside one of them. */
void pc_cq_finish(pc_cq *cq);
/* After the objects that used the queue are destroyed. */
void pc_cq_destroy(pc_cq *cq);

/* gRPC says why it could not listen only in its log: lines of this thread between begin and end go to
 * text_out as well. */
void pc_grpc_log_capture_begin(char *text_out, size_t cap);
void pc_grpc_log_capture_end(void);

/* For one connection, and for one server; tls NULL: plain. */
grpc_channel_credentials *pc_tls_client_credentials(pc_tls *tls);
grpc_server_credentials *pc_tls_server_credentials(pc_tls *tls);
/* The texts of the files in force, to be freed; and whether they are good now: a certificate may have expired
 * since. */
typedef struct pc_tls_texts {
    char *ca, *cert, *key;
} pc_tls_texts;
CM_MUST_CHECK cm_status pc_tls_copy(pc_tls *tls, pc_tls_texts *texts_out, cm_error *err);
void pc_tls_texts_free(pc_tls_texts *texts);
/* CM_E_CONFIG; the text is the caller's to free. */
CM_MUST_CHECK cm_status pc_tls_file_read(const char *path, char **text_out, cm_error *err);
grpc_server_credentials *pc_serve_tls_credentials(pc_serve_tls *tls);
struct x509_store_st *pc_tls_authorities(const char *text); /* an X509_STORE; NULL: none in the text */
const char *pc_tls_cert_path(const pc_tls *tls);

grpc_arg pc_arg_int(const char *key, int value);
/* The whole message in one piece; the slice is the caller's to unref. */
grpc_slice pc_buffer_read(grpc_byte_buffer *buffer);

/* Messages waiting to be sent; the first one may be on its way and stays until popped. */
typedef struct pc_outbox {
    struct pc_outbox_message *first, *last;
    uint32_t n_messages;
    uint64_t n_bytes;
} pc_outbox;
void pc_outbox_push(pc_outbox *outbox, const void *data, size_t n_bytes); /* copies */
grpc_byte_buffer *pc_outbox_first(const pc_outbox *outbox);
void pc_outbox_pop(pc_outbox *outbox);
void pc_outbox_clear(pc_outbox *outbox);
