#include "tests/unit/grpc_client.h"

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/time.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "proto/pack.h"

/* ---- ours ---- */

static void client_message(void *ctx, const uint8_t *data, size_t n_bytes)
{
    client *c = ctx;
    assert_false(c->closed);
    if (c->n_messages < CLIENT_MESSAGES) {
        cm_bytes_init(&c->messages[c->n_messages], 0);
        cm_bytes_append(&c->messages[c->n_messages], data, n_bytes);
    }
    c->n_messages++;
}

static void client_closed(void *ctx, pc_code code, const char *text)
{
    client *c = ctx;
    assert_false(c->closed);
    c->closed = true;
    c->code = code;
    snprintf(c->text, sizeof(c->text), "%s", text);
    c->stream = NULL;
}

static const pc_stream_events CLIENT_EVENTS = {.message = client_message, .closed = client_closed};

void client_open(client *c, pc_channel *channel, const char *path)
{
    *c = (client){0};
    c->stream = pc_stream_open(channel, path, &CLIENT_EVENTS, c, 0);
}

void client_send(client *c, const void *request)
{
    cm_bytes packed;
    cm_bytes_init(&packed, 0);
    pr_pack(request, &packed);
    assert_int_equal(pc_stream_send(c->stream, cm_bytes_text(&packed), packed.len), CM_OK);
    cm_bytes_fini(&packed);
}

void client_ask(client *c, pc_channel *channel, const char *path, const ProtobufCMessage *request,
                uint64_t deadline_ms)
{
    *c = (client){0};
    c->stream = pc_stream_open(channel, path, &CLIENT_EVENTS, c, deadline_ms);
    client_send(c, request);
    pc_stream_half_close(c->stream);
}

void client_fini(client *c)
{
    for (uint32_t i = 0; i < c->n_messages && i < CLIENT_MESSAGES; i++) {
        cm_bytes_fini(&c->messages[i]);
    }
}

/* ---- plain ---- */

static void plain_find(const grpc_metadata_array *array, const char *key, char *text_out, size_t cap)
{
    for (size_t i = 0; i < array->count; i++) {
        if (grpc_slice_str_cmp(array->metadata[i].key, key) == 0) {
            snprintf(text_out, cap, "%.*s", (int)GRPC_SLICE_LENGTH(array->metadata[i].value),
                     (const char *)GRPC_SLICE_START_PTR(array->metadata[i].value));
        }
    }
}

static void plain_batch(grpc_call *call, grpc_completion_queue *cq, const grpc_op *ops, size_t n)
{
    assert_int_equal(grpc_call_start_batch(call, ops, n, (void *)1, NULL), GRPC_CALL_OK);
    assert_int_equal(grpc_completion_queue_next(cq, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type,
                     GRPC_OP_COMPLETE);
}

static void plain_begin(plain *p, grpc_call *call, grpc_completion_queue *cq)
{
    grpc_slice body = grpc_slice_from_copied_buffer(cm_bytes_text(&p->request), p->request.len);
    grpc_byte_buffer *request = grpc_raw_byte_buffer_create(&body, 1);
    grpc_metadata_array headers;
    grpc_op ops[4];
    grpc_metadata_array_init(&headers);
    memset(ops, 0, sizeof(ops));
    ops[0].op = GRPC_OP_SEND_INITIAL_METADATA;
    ops[1].op = GRPC_OP_SEND_MESSAGE;
    ops[1].data.send_message.send_message = request;
    ops[2].op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    ops[3].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[3].data.recv_initial_metadata.recv_initial_metadata = &headers;
    plain_batch(call, cq, ops, 4);
    plain_find(&headers, "x-request-id", p->request_id, sizeof(p->request_id));
    grpc_metadata_array_destroy(&headers);
    grpc_byte_buffer_destroy(request);
    grpc_slice_unref(body);
}

static void plain_read_all(plain *p, grpc_call *call, grpc_completion_queue *cq)
{
    for (;;) {
        grpc_byte_buffer *buffer = NULL;
        grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &buffer};
        plain_batch(call, cq, &op, 1);
        if (buffer == NULL) {
            return;
        }
        p->n_messages++;
        grpc_byte_buffer_destroy(buffer);
    }
}

static void plain_end(plain *p, grpc_call *call, grpc_completion_queue *cq)
{
    grpc_metadata_array trailers;
    grpc_slice text;
    grpc_status_code code;
    grpc_op op = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT,
                  .data.recv_status_on_client = {
                      .trailing_metadata = &trailers, .status = &code, .status_details = &text}};
    grpc_metadata_array_init(&trailers);
    plain_batch(call, cq, &op, 1);
    p->code = (int)code;
    plain_find(&trailers, "grpc-retry-pushback-ms", p->retry, sizeof(p->retry));
    for (size_t i = 0; i < trailers.count; i++) {
        if (grpc_slice_str_cmp(trailers.metadata[i].key, "grpc-status-details-bin") == 0) {
            cm_bytes_append(&p->details, GRPC_SLICE_START_PTR(trailers.metadata[i].value),
                            GRPC_SLICE_LENGTH(trailers.metadata[i].value));
        }
    }
    snprintf(p->text, sizeof(p->text), "%.*s", (int)GRPC_SLICE_LENGTH(text),
             (const char *)GRPC_SLICE_START_PTR(text));
    grpc_slice_unref(text);
    grpc_metadata_array_destroy(&trailers);
}

static void *plain_thread(void *arg)
{
    plain *p = arg;
    grpc_init();
    grpc_completion_queue *cq = grpc_completion_queue_create_for_next(NULL);
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    grpc_channel *channel = grpc_channel_create(p->address, credentials, NULL);
    grpc_channel_credentials_release(credentials);
    grpc_slice path = grpc_slice_from_copied_string(p->path);
    grpc_call *call = grpc_channel_create_call(channel, NULL, GRPC_PROPAGATE_DEFAULTS, cq, path, NULL,
                                               gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    plain_begin(p, call, cq);
    plain_read_all(p, call, cq);
    plain_end(p, call, cq);
    grpc_call_unref(call);
    grpc_slice_unref(path);
    grpc_channel_destroy(channel);
    grpc_completion_queue_shutdown(cq);
    while (grpc_completion_queue_next(cq, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type !=
           GRPC_QUEUE_SHUTDOWN) {
    }
    grpc_completion_queue_destroy(cq);
    grpc_shutdown();
    pc_loop_post(p->loop, &p->task);
    return NULL;
}

static void plain_ended(void *arg)
{
    plain *p = arg;
    p->ended = true;
    pc_loop_stop(p->loop);
}

void plain_run(plain *p, pc_loop *loop, const char *address, const char *path, const void *request,
               size_t n_bytes)
{
    pthread_t thread;
    *p = (plain){.path = path, .loop = loop, .task = {.fn = plain_ended, .arg = p}};
    snprintf(p->address, sizeof(p->address), "%s", address);
    cm_bytes_init(&p->request, 0);
    cm_bytes_init(&p->details, 0);
    cm_bytes_append(&p->request, request, n_bytes);
    assert_int_equal(pthread_create(&thread, NULL, plain_thread, p), 0);
    while (!p->ended) {
        pc_loop_run(loop);
    }
    pthread_join(thread, NULL);
}

void plain_fini(plain *p)
{
    cm_bytes_fini(&p->request);
    cm_bytes_fini(&p->details);
}

void *plain_detail(const plain *p, const ProtobufCMessageDescriptor *type, cm_arena *arena)
{
    Google__Rpc__Status *status;
    ProtobufCMessage *detail;
    char url[128];
    snprintf(url, sizeof(url), "type.googleapis.com/%s", type->name);
    assert_int_equal(pr_unpack(&google__rpc__status__descriptor, p->details.data, p->details.len, arena,
                               (ProtobufCMessage **)&status),
                     CM_OK);
    assert_int_equal(status->code, p->code);
    assert_string_equal(status->message, p->text);
    for (size_t i = 0; i < status->n_details; i++) {
        const Google__Rpc__Any *any = status->details[i];
        if (strcmp(any->type_url, url) == 0) {
            assert_int_equal(pr_unpack(type, any->value.data, any->value.len, arena, &detail), CM_OK);
            return detail;
        }
    }
    return NULL;
}
