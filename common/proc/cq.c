#include <grpc/byte_buffer_reader.h>
#include <grpc/support/log.h>
#include <grpc/support/time.h>
#include <pthread.h>
#include <stdatomic.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/proc/rpc_private.h"

struct pc_cq {
    pc_loop *loop;
    grpc_completion_queue *queue;
    pthread_t thread;
    pc_task task;         /* delivers on the loop thread */
    pthread_mutex_t lock; /* protects first and last, and the ops while they are gRPC's or in the list */
    pc_op *first, *last;
    bool delivering, finished;
};

/* -------------------------------------------------------------------------------------------------- gRPC's
 * log Its lines become debug lines of ours: what matters of them reaches us as statuses. */

static _Thread_local struct {
    char *text;
    size_t cap;
} t_capture;

/* The one thing no status tells: whom the server did not let in, and gRPC does not say who it was. One line a
 * second: strangers choose how often they come. */
static void grpc_log_handshake(const char *message)
{
    static _Atomic uint64_t g_next_ms;
    uint64_t now_ms = cm_now_ms(), next_ms = atomic_load(&g_next_ms);
    if (now_ms >= next_ms && atomic_compare_exchange_strong(&g_next_ms, &next_ms, now_ms + 1000)) {
        cm_warn("a TLS handshake failed: %s", message);
    }
}

static void grpc_log_line(gpr_log_func_args *args)
{
    static const char handshake[] = "Handshake failed with fatal error ";
    if (strncmp(args->message, handshake, sizeof(handshake) - 1) == 0) {
        grpc_log_handshake(args->message + sizeof(handshake) - 1);
    }
    cm_debug("grpc: %s", args->message);
    if (t_capture.text != NULL) {
        snprintf(t_capture.text, t_capture.cap, "%s", args->message);
    }
}

void pc_grpc_log_capture_begin(char *text_out, size_t cap)
{
    text_out[0] = '\0';
    t_capture.text = text_out;
    t_capture.cap = cap;
}

void pc_grpc_log_capture_end(void)
{
    t_capture.text = NULL;
}

/* -------------------------------------------------------------------------------------------------- the
 * queue */

static void *cq_thread(void *arg)
{
    pc_cq *cq = arg;
    for (;;) {
        grpc_event event = grpc_completion_queue_next(cq->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN) {
            return NULL;
        }
        pc_op *op = event.tag;
        pthread_mutex_lock(&cq->lock);
        op->ok = event.success != 0;
        op->next = NULL;
        if (cq->last != NULL) {
            cq->last->next = op;
        } else {
            cq->first = op;
        }
        cq->last = op;
        pthread_mutex_unlock(&cq->lock);
        pc_loop_post(cq->loop, &cq->task);
    }
}

/* One round: what done functions start completes into the next one, so a round ends. */
static bool cq_deliver_round(pc_cq *cq)
{
    pthread_mutex_lock(&cq->lock);
    pc_op *op = cq->first;
    cq->first = cq->last = NULL;
    pthread_mutex_unlock(&cq->lock);
    bool any = op != NULL;
    cq->delivering = true;
    while (op != NULL) {
        pc_op *next = op->next; /* done may free op or start it again */
        op->done(op->owner, op->ok);
        op = next;
    }
    cq->delivering = false;
    return any;
}

static void cq_deliver(void *arg)
{
    cq_deliver_round(arg);
}

pc_cq *pc_cq_create(pc_loop *loop)
{
    pc_cq *cq = cm_alloc(sizeof(*cq));
    gpr_set_log_function(grpc_log_line);
    grpc_init();
    cq->loop = loop;
    cq->queue = grpc_completion_queue_create_for_next(NULL);
    cq->task = (pc_task){.fn = cq_deliver, .arg = cq};
    pthread_mutex_init(&cq->lock, NULL);
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* signals belong to the loop thread */
    int rc = pthread_create(&cq->thread, NULL, cq_thread, cq);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    CM_ASSERT_MSG(rc == 0, "completion thread: error %d", rc);
    return cq;
}

grpc_completion_queue *pc_cq_queue(pc_cq *cq)
{
    return cq->queue;
}

void pc_cq_arm(pc_cq *cq, pc_op *op, void (*done)(void *owner, bool ok), void *owner)
{
    pthread_mutex_lock(&cq->lock);
    *op = (pc_op){.done = done, .owner = owner};
    pthread_mutex_unlock(&cq->lock);
}

void pc_cq_finish(pc_cq *cq)
{
    CM_ASSERT_MSG(!cq->delivering, "destroyed from inside one of its own callbacks");
    grpc_completion_queue_shutdown(cq->queue);
    pthread_join(cq->thread, NULL);
    while (cq_deliver_round(cq)) {
    }
    pc_loop_unpost(cq->loop, &cq->task);
    cq->finished = true;
}

void pc_cq_destroy(pc_cq *cq)
{
    CM_ASSERT(cq->finished);
    grpc_completion_queue_destroy(cq->queue);
    grpc_shutdown();
    pthread_mutex_destroy(&cq->lock);
    cm_free(cq);
}

/* ------------------------------------------------------------------------------------------- arguments,
 * messages */

grpc_arg pc_arg_int(const char *key, int value)
{
    return (grpc_arg){.type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)key, .value.integer = value};
}

grpc_slice pc_buffer_read(grpc_byte_buffer *buffer)
{
    grpc_byte_buffer_reader reader;
    int rc = grpc_byte_buffer_reader_init(&reader, buffer);
    CM_ASSERT_MSG(rc == 1, "byte buffer of %zu bytes", grpc_byte_buffer_length(buffer));
    grpc_slice slice = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    return slice;
}

struct pc_outbox_message {
    struct pc_outbox_message *next;
    grpc_byte_buffer *buffer;
    size_t n_bytes;
    bool whole;
};

void pc_outbox_push(pc_outbox *outbox, const void *data, size_t n_bytes, bool whole)
{
    struct pc_outbox_message *message = cm_alloc(sizeof(*message));
    grpc_slice slice = grpc_slice_from_copied_buffer(data, n_bytes);
    message->buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    message->n_bytes = n_bytes;
    message->whole = whole;
    if (outbox->last != NULL) {
        outbox->last->next = message;
    } else {
        outbox->first = message;
    }
    outbox->last = message;
    outbox->n_messages++;
    outbox->n_bytes += n_bytes;
    outbox->n_whole_bytes += whole ? n_bytes : 0;
}

grpc_byte_buffer *pc_outbox_first(const pc_outbox *outbox)
{
    return outbox->first->buffer;
}

void pc_outbox_pop(pc_outbox *outbox)
{
    struct pc_outbox_message *message = outbox->first;
    outbox->first = message->next;
    outbox->last = outbox->first == NULL ? NULL : outbox->last;
    outbox->n_messages--;
    outbox->n_bytes -= message->n_bytes;
    outbox->n_whole_bytes -= message->whole ? message->n_bytes : 0;
    grpc_byte_buffer_destroy(message->buffer);
    cm_free(message);
}

void pc_outbox_clear(pc_outbox *outbox)
{
    while (outbox->first != NULL) {
        pc_outbox_pop(outbox);
    }
}
