/* gRPC server and client on one loop; what the client does not show (metadata, trailers, a reader that waits)
 * is tested with a plain gRPC client on a thread of its own. */
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/proc/rpc_client.h"
#include "common/proc/rpc_server.h"

enum {
    REQUEST_MAX = 64 << 10,
    CALLS_MAX = 80,
    QUEUE_MAX = 64 << 10,
    N_STREAM = 10000,
    STREAM_BYTES = 2000,
    N_WAITING = 8,
    N_WHOLE = 20
};

static struct {
    pc_loop *loop;
    pc_rpc_server *server;
    pc_channel *channel;
    char address[128];
    bool (*done)(void); /* until() ends when it says so */
    uint32_t n_messages, n_closed, n_cancelled;
    pc_call *waiting[N_WAITING]; /* calls of Wait */
    uint32_t n_waiting;
    uint64_t deadline_ms;
    bool drained;
    pc_call *streaming; /* call of Stream being filled by the hook */
    uint32_t n_streamed, n_again;
    uint64_t queued_peak;
    sem_t full; /* the server's queue was full once */
} g;

static void hook(void *arg);

static void until(bool (*done)(void))
{
    g.done = done;
    pc_loop_run(g.loop);
    g.done = NULL;
}

/* --------------------------------------------------------------------------------------------------------
 * handlers */

static void any_closed(pc_call *call, bool cancelled)
{
    assert_ptr_equal(pc_call_ctx(call), &g);
    g.n_closed++;
    g.n_cancelled += cancelled;
    /* a closed call takes nothing more */
    assert_int_equal(pc_call_send(call, "x", 1), CM_E_CANCELLED);
    pc_call_finish(call, PC_CODE_OK, NULL, NULL, 0, 0);
}

static void unary_message(pc_call *call, const uint8_t *data, size_t n_bytes)
{
    g.n_messages++;
    g.deadline_ms = pc_call_deadline_ms(call);
    assert_string_equal(pc_call_method(call)->path, "/t.Echo/Unary");
    assert_non_null(strstr(pc_call_peer(call), "127.0.0.1"));
    assert_null(pc_call_metadata(call, "x-absent"));
    const char *word = pc_call_metadata(call, "x-word");
    if (word != NULL) {
        assert_ptr_equal(pc_call_metadata(call, "x-word"), word);
        pc_call_add_header(call, "x-reply", word);
        pc_call_add_header(call, "x-odd", "caf\xc3\xa9\n");
    }
    assert_int_equal(pc_call_send(call, data, n_bytes), CM_OK);
    pc_call_finish(call, PC_CODE_OK, NULL, NULL, 0, 0);
    pc_call_finish(call, PC_CODE_INTERNAL, "ignored", NULL, 0, 0);
    assert_int_equal(pc_call_send(call, data, n_bytes), CM_E_CANCELLED);
}

static void chat_message(pc_call *call, const uint8_t *data, size_t n_bytes)
{
    g.n_messages++;
    assert_int_equal(pc_call_send(call, data, n_bytes), CM_OK);
}

static void chat_half_closed(pc_call *call)
{
    pc_call_finish(call, PC_CODE_OK, "bye", NULL, 0, 0);
}

/* Answers each with more than may wait: the next is heard when the client has read it. */
static void whole_message(pc_call *call, const uint8_t *data, size_t n_bytes)
{
    static const uint8_t block[QUEUE_MAX + 1000];
    (void)data;
    (void)n_bytes;
    g.n_messages++;
    assert_true(pc_call_queued_bytes(call) <= QUEUE_MAX);
    pc_call_send_whole(call, block, sizeof(block));
    assert_int_equal(pc_call_send(call, "piece", 5), CM_OK); /* its room is its own */
}

static void wait_message(pc_call *call, const uint8_t *data, size_t n_bytes)
{
    (void)data;
    (void)n_bytes;
    g.n_messages++;
    g.deadline_ms = pc_call_deadline_ms(call);
    assert_true(g.n_waiting < N_WAITING);
    g.waiting[g.n_waiting++] = call;
}

static void fail_message(pc_call *call, const uint8_t *data, size_t n_bytes)
{
    (void)data;
    (void)n_bytes;
    pc_call_finish(call, PC_CODE_RESOURCE_EXHAUSTED, "no room: 100% caf\xc3\xa9", "\x01\x00\x02", 3, 1500);
}

static void stream_push(void)
{
    uint8_t message[STREAM_BYTES] = {0};
    while (g.n_streamed < N_STREAM) {
        memcpy(message, &g.n_streamed, sizeof(g.n_streamed));
        uint64_t queued = pc_call_queued_bytes(g.streaming);
        cm_status status = pc_call_send(g.streaming, message, sizeof(message));
        if (status == CM_AGAIN) {
            assert_int_equal(pc_call_queued_bytes(g.streaming), queued);
            if (g.n_again++ == 0) {
                sem_post(&g.full);
            }
            return;
        }
        assert_int_equal(status, CM_OK);
        g.n_streamed++;
        queued = pc_call_queued_bytes(g.streaming);
        g.queued_peak = queued > g.queued_peak ? queued : g.queued_peak;
    }
    pc_call_finish(g.streaming, PC_CODE_OK, NULL, NULL, 0, 0);
    g.streaming = NULL;
}

static void stream_message(pc_call *call, const uint8_t *data, size_t n_bytes)
{
    (void)data;
    (void)n_bytes;
    g.streaming = call;
    pc_call_set_user(call, &g.n_streamed);
}

static void stream_closed(pc_call *call, bool cancelled)
{
    assert_ptr_equal(pc_call_user(call), &g.n_streamed);
    g.streaming = NULL;
    any_closed(call, cancelled);
}

static void hook(void *arg)
{
    (void)arg;
    if (g.streaming != NULL) {
        stream_push();
    }
    if (g.done != NULL && g.done()) {
        pc_loop_stop(g.loop);
    }
}

static const pc_method g_methods[] = {
    {.path = "/t.Echo/Unary", .message = unary_message, .closed = any_closed},
    {.path = "/t.Echo/Stream", .message = stream_message, .closed = stream_closed},
    {.path = "/t.Echo/Chat",
     .message = chat_message,
     .half_closed = chat_half_closed,
     .closed = any_closed,
     .client_streams = true},
    {.path = "/t.Echo/Whole",
     .message = whole_message,
     .half_closed = chat_half_closed,
     .closed = any_closed,
     .client_streams = true},
    {.path = "/t.Echo/Wait", .message = wait_message, .closed = any_closed},
    {.path = "/t.Echo/Fail", .message = fail_message, .closed = any_closed},
};

static const pc_rpc_options g_options = {
    .address = "127.0.0.1:0",
    .request_bytes_max = REQUEST_MAX,
    .calls_max = CALLS_MAX,
    .queue_bytes_max = QUEUE_MAX,
    .ctx = &g,
};

static cm_status server_create(const char *address, uint32_t calls_max, pc_rpc_server **server_out,
                               char bound_out[128], cm_error *err)
{
    pc_rpc_options options = g_options;
    options.address = address;
    options.calls_max = calls_max;
    return pc_rpc_server_create(g.loop, &options, g_methods, sizeof(g_methods) / sizeof(g_methods[0]),
                                server_out, bound_out, err);
}

static int set_up(void **state)
{
    (void)state;
    memset(&g, 0, sizeof(g));
    sem_init(&g.full, 0, 0);
    assert_int_equal(pc_loop_create(&g.loop), CM_OK);
    pc_loop_before_sleep(g.loop, hook, NULL);
    assert_int_equal(server_create("127.0.0.1:0", CALLS_MAX, &g.server, g.address, NULL), CM_OK);
    g.channel = pc_channel_create(g.loop, g.address);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    if (g.channel != NULL) {
        pc_channel_destroy(g.channel);
    }
    if (g.server != NULL) {
        pc_rpc_server_destroy(g.server);
    }
    pc_loop_destroy(g.loop);
    sem_destroy(&g.full);
    return 0;
}

/* ----------------------------------------------------------------------------------------------------
 * client's side */

typedef struct client {
    pc_stream *stream;
    uint32_t n_messages, n_closed;
    size_t n_bytes; /* of the last message */
    uint8_t last[256];
    pc_code code;
    char text[512];
} client;

static client g_client; /* for tests with one */

static void client_message(void *ctx, const uint8_t *data, size_t n_bytes)
{
    client *c = ctx;
    assert_int_equal(c->n_closed, 0);
    c->n_messages++;
    c->n_bytes = n_bytes;
    memcpy(c->last, data, n_bytes < sizeof(c->last) ? n_bytes : sizeof(c->last));
}

static void client_closed(void *ctx, pc_code code, const char *text)
{
    client *c = ctx;
    assert_int_equal(c->n_closed, 0);
    c->n_closed++;
    c->code = code;
    snprintf(c->text, sizeof(c->text), "%s", text);
    c->stream = NULL;
}

static void client_open(client *c, const char *path, uint64_t deadline_ms)
{
    static const pc_stream_events events = {.message = client_message, .closed = client_closed};
    memset(c, 0, sizeof(*c));
    c->stream = pc_stream_open(g.channel, path, &events, c, deadline_ms);
}

/* One message and the end of ours. */
static void client_ask(client *c, const char *path, const void *data, size_t n_bytes, uint64_t deadline_ms)
{
    client_open(c, path, deadline_ms);
    assert_int_equal(pc_stream_send(c->stream, data, n_bytes), CM_OK);
    pc_stream_half_close(c->stream);
}

static bool client_is_closed(void)
{
    return g_client.n_closed == 1;
}

static bool client_and_server_closed(void)
{
    return g_client.n_closed == 1 && g.n_closed == 1;
}

static bool one_is_waiting(void)
{
    return g.n_waiting == 1;
}

/* ------------------------------------------------------------------------------------------------------------
 * tests */

static void test_unary(void **state)
{
    (void)state;
    client_ask(&g_client, "/t.Echo/Unary", "hello", 5, 0);
    until(client_and_server_closed);
    assert_int_equal(g_client.code, PC_CODE_OK);
    assert_int_equal(g_client.n_messages, 1);
    assert_int_equal(g_client.n_bytes, 5);
    assert_memory_equal(g_client.last, "hello", 5);
    assert_int_equal(g.n_cancelled, 0);
    assert_true(g.deadline_ms == UINT64_MAX);
}

static void test_unary_wait(void **state)
{
    cm_bytes reply;
    cm_error err = {0};
    (void)state;
    cm_bytes_init(&reply, 0);
    assert_int_equal(pc_unary_wait(g.channel, "/t.Echo/Unary", "abc", 3, 30000, &reply, &err), CM_OK);
    assert_string_equal(cm_bytes_text(&reply), "abc");
    assert_true(g.deadline_ms <= 60000); /* the wire rounds up */
    assert_int_equal(pc_unary_wait(g.channel, "/t.Echo/Fail", "", 0, 30000, &reply, &err), CM_E_CAPACITY);
    assert_string_equal(err.text, "no room: 100% caf\xc3\xa9");
    cm_bytes_fini(&reply);
}

static void test_empty_message_and_missing_message(void **state)
{
    (void)state;
    client_ask(&g_client, "/t.Echo/Unary", "", 0, 0);
    until(client_and_server_closed);
    assert_int_equal(g_client.code, PC_CODE_OK);
    assert_int_equal(g_client.n_messages, 1);
    client_open(&g_client, "/t.Echo/Unary", 0);
    pc_stream_half_close(g_client.stream);
    until(client_is_closed);
    assert_int_equal(g_client.code, PC_CODE_INVALID_ARGUMENT);
    assert_int_equal(g.n_messages, 1);
    assert_int_equal(g.n_closed, 1); /* the handler never saw the second */
}

static void test_bidi(void **state)
{
    (void)state;
    client_open(&g_client, "/t.Echo/Chat", 0);
    for (uint32_t i = 0; i < 100; i++) {
        assert_int_equal(pc_stream_send(g_client.stream, &i, sizeof(i)), CM_OK);
    }
    pc_stream_half_close(g_client.stream);
    until(client_and_server_closed);
    uint32_t last = 99;
    assert_int_equal(g_client.code, PC_CODE_OK);
    assert_int_equal(g_client.n_messages, 100);
    assert_memory_equal(g_client.last, &last, sizeof(last));
}

static void test_send_queue_is_bounded(void **state)
{
    cm_status status = CM_OK;
    (void)state;
    client_open(&g_client, "/t.Echo/Chat", 0);
    for (uint32_t i = 0; i < 1024; i++) {
        assert_int_equal(pc_stream_send(g_client.stream, &i, sizeof(i)), CM_OK);
    }
    status = pc_stream_send(g_client.stream, "x", 1);
    assert_int_equal(status, CM_E_CAPACITY);
    pc_stream_half_close(g_client.stream);
    until(client_is_closed);
    assert_int_equal(g_client.n_messages, 1024);
}

enum { N_PARALLEL = 64, N_EACH = 20 };
static client g_parallel[N_PARALLEL];

static bool parallel_done(void)
{
    for (uint32_t i = 0; i < N_PARALLEL; i++) {
        if (g_parallel[i].n_closed == 0) {
            return false;
        }
    }
    return g.n_closed == N_PARALLEL;
}

static void test_64_streams(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < N_PARALLEL; i++) {
        client_open(&g_parallel[i], "/t.Echo/Chat", 0);
    }
    for (uint32_t k = 0; k < N_EACH; k++) {
        for (uint32_t i = 0; i < N_PARALLEL; i++) {
            uint32_t message[2] = {i, k};
            assert_int_equal(pc_stream_send(g_parallel[i].stream, message, sizeof(message)), CM_OK);
        }
    }
    for (uint32_t i = 0; i < N_PARALLEL; i++) {
        pc_stream_half_close(g_parallel[i].stream);
    }
    until(parallel_done);
    for (uint32_t i = 0; i < N_PARALLEL; i++) {
        uint32_t last[2] = {i, N_EACH - 1};
        assert_int_equal(g_parallel[i].code, PC_CODE_OK);
        assert_int_equal(g_parallel[i].n_messages, N_EACH);
        assert_memory_equal(g_parallel[i].last, last, sizeof(last));
    }
}

static void test_client_cancel(void **state)
{
    (void)state;
    client_ask(&g_client, "/t.Echo/Wait", "", 0, 0);
    until(one_is_waiting);
    pc_stream_cancel(g_client.stream);
    until(client_and_server_closed);
    assert_int_equal(g_client.code, PC_CODE_CANCELLED);
    assert_int_equal(g.n_cancelled, 1);
}

static void test_deadline(void **state)
{
    (void)state;
    client_ask(&g_client, "/t.Echo/Wait", "", 0, 200);
    until(client_is_closed);
    assert_int_equal(g_client.code, PC_CODE_DEADLINE_EXCEEDED);
    if (g.n_messages == 1) { /* it need not have come to the handler */
        until(client_and_server_closed);
        assert_int_equal(g.n_cancelled, 1);
        assert_true(g.deadline_ms <= 60000);
    }
}

static void test_unknown_method(void **state)
{
    (void)state;
    client_ask(&g_client, "/t.Echo/Nothing", "", 0, 0);
    until(client_is_closed);
    assert_int_equal(g_client.code, PC_CODE_UNIMPLEMENTED);
    assert_non_null(strstr(g_client.text, "/t.Echo/Nothing"));
}

static void test_taken_port(void **state)
{
    pc_rpc_server *second = NULL;
    char bound[128];
    cm_error err = {0};
    (void)state;
    assert_int_equal(server_create(g.address, CALLS_MAX, &second, bound, &err), CM_E_EXISTS);
    assert_null(second);
    assert_non_null(strstr(err.text, g.address));
    client_ask(&g_client, "/t.Echo/Unary", "still", 5, 0); /* the first one is none the worse */
    until(client_is_closed);
    assert_int_equal(g_client.code, PC_CODE_OK);
}

static void test_bad_addresses(void **state)
{
    static const char *const bad[] = {
        "", "127.0.0.1", ":1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000", "192.0.2.1:0"};
    (void)state;
    for (uint32_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        pc_rpc_server *server = NULL;
        char bound[128];
        cm_error err = {0};
        assert_int_equal(server_create(bad[i], CALLS_MAX, &server, bound, &err), CM_E_INVALID);
        assert_non_null(strstr(err.text, bad[i]));
    }
}

static void test_oversized_request(void **state)
{
    uint8_t *big = cm_alloc(REQUEST_MAX + 1);
    (void)state;
    client_ask(&g_client, "/t.Echo/Unary", big, REQUEST_MAX + 1, 0);
    until(client_is_closed);
    assert_int_equal(g_client.code, PC_CODE_RESOURCE_EXHAUSTED);
    assert_int_equal(g.n_messages, 0);
    client_ask(&g_client, "/t.Echo/Unary", big, REQUEST_MAX, 0);
    until(client_is_closed);
    assert_int_equal(g_client.code, PC_CODE_OK);
    assert_int_equal(g_client.n_bytes, REQUEST_MAX);
    cm_free(big);
}

static bool all_are_waiting(void)
{
    return g.n_waiting == 3;
}

static bool one_is_over(void)
{
    return g.n_closed == 1;
}

static void test_calls_max(void **state)
{
    client waiting[3];
    (void)state;
    pc_channel_destroy(g.channel);
    pc_rpc_server_destroy(g.server);
    assert_int_equal(server_create("127.0.0.1:0", 3, &g.server, g.address, NULL), CM_OK);
    g.channel = pc_channel_create(g.loop, g.address);
    for (uint32_t i = 0; i < 3; i++) {
        client_ask(&waiting[i], "/t.Echo/Wait", "", 0, 0);
    }
    until(all_are_waiting);
    client_ask(&g_client, "/t.Echo/Unary", "", 0, 0);
    until(client_is_closed);
    assert_int_equal(g_client.code, PC_CODE_RESOURCE_EXHAUSTED);
    pc_call_finish(g.waiting[0], PC_CODE_NOT_FOUND, "gone", NULL, 0, 0);
    until(one_is_over);
    client_ask(&g_client, "/t.Echo/Unary", "", 0, 0); /* room again */
    until(client_is_closed);
    assert_int_equal(g_client.code, PC_CODE_OK);
    pc_channel_destroy(g.channel); /* tells the streams that still run */
    g.channel = NULL;
    uint32_t n_not_found = 0; /* calls may come to the server in any order */
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(waiting[i].n_closed, 1);
        assert_true(waiting[i].code == PC_CODE_NOT_FOUND || waiting[i].code == PC_CODE_CANCELLED);
        n_not_found += waiting[i].code == PC_CODE_NOT_FOUND;
    }
    assert_int_equal(n_not_found, 1);
}

static void test_destroy_with_live_calls(void **state)
{
    client clients[3];
    (void)state;
    for (uint32_t i = 0; i < 3; i++) {
        client_ask(&clients[i], "/t.Echo/Wait", "", 0, 0);
    }
    until(all_are_waiting);
    pc_rpc_server_destroy(g.server);
    g.server = NULL;
    assert_int_equal(g.n_closed, 3);
    assert_int_equal(g.n_cancelled, 3);
    pc_channel_destroy(g.channel);
    g.channel = NULL;
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(clients[i].n_closed, 1);
        assert_int_not_equal(clients[i].code, PC_CODE_OK);
    }
}

static void test_server_gone_is_told(void **state)
{
    (void)state;
    client_ask(&g_client, "/t.Echo/Wait", "", 0, 0);
    until(one_is_waiting);
    pc_rpc_server_destroy(g.server);
    g.server = NULL;
    until(client_is_closed);
    assert_int_equal(g_client.code, PC_CODE_UNAVAILABLE);
    assert_true(g_client.text[0] != '\0');
}

static void test_dead_address(void **state)
{
    (void)state;
    pc_rpc_server_destroy(g.server);
    g.server = NULL;
    client_ask(&g_client, "/t.Echo/Unary", "", 0, 0);
    until(client_is_closed);
    assert_int_equal(g_client.code, PC_CODE_UNAVAILABLE);
    assert_true(g_client.text[0] != '\0');
}

static void test_server_back_again(void **state)
{
    char address[128];
    (void)state;
    pc_rpc_server_destroy(g.server);
    client_ask(&g_client, "/t.Echo/Unary", "", 0, 0);
    until(client_is_closed);
    assert_int_equal(g_client.code, PC_CODE_UNAVAILABLE);
    assert_int_equal(server_create(g.address, CALLS_MAX, &g.server, address, NULL), CM_OK);
    assert_string_equal(address, g.address);
    client_ask(&g_client, "/t.Echo/Unary", "", 0, 0); /* the first try finds it: no backoff of gRPC's own */
    until(client_is_closed);
    assert_int_equal(g_client.code, PC_CODE_OK);
}

static void test_whole(void **state)
{
    (void)state;
    client_open(&g_client, "/t.Echo/Whole", 0);
    for (int i = 0; i < N_WHOLE; i++) {
        assert_int_equal(pc_stream_send(g_client.stream, "x", 1), CM_OK);
    }
    pc_stream_half_close(g_client.stream);
    until(client_and_server_closed);
    assert_int_equal(g_client.code, PC_CODE_OK);
    assert_int_equal(g.n_messages, N_WHOLE);
    assert_int_equal(g_client.n_messages, 2 * N_WHOLE);
}

static void note_drained(void *arg)
{
    (void)arg;
    assert_int_equal(g.n_closed, 1);
    g.drained = true;
}

static bool is_drained(void)
{
    return g.drained;
}

static client g_silent;

static bool silent_is_closed(void)
{
    return g_silent.n_closed == 1 && g.drained;
}

/* A call that never says anything holds up nobody: its client is told. */
static void test_drain_silent(void **state)
{
    (void)state;
    client_open(&g_silent, "/t.Echo/Chat", 0);
    client_ask(&g_client, "/t.Echo/Unary", "", 0, 0); /* when it has ended, the first one is known */
    until(client_and_server_closed);
    pc_rpc_server_drain(g.server, note_drained, NULL);
    until(silent_is_closed);
    assert_int_equal(g_silent.code, PC_CODE_UNAVAILABLE);
    assert_int_equal(g.n_closed, 1); /* the handler never saw it */
}

static void test_drain(void **state)
{
    client running;
    (void)state;
    client_ask(&running, "/t.Echo/Wait", "", 0, 0);
    until(one_is_waiting);
    pc_rpc_server_drain(g.server, note_drained, NULL);
    client_ask(&g_client, "/t.Echo/Unary", "", 0, 0);
    until(client_is_closed);
    assert_int_equal(g_client.code, PC_CODE_UNAVAILABLE);
    assert_false(g.drained);
    pc_call_finish(g.waiting[0], PC_CODE_OK, NULL, NULL, 0, 0);
    until(is_drained);
    assert_int_equal(g.n_cancelled, 0);
    pc_channel_destroy(g.channel);
    g.channel = NULL;
    assert_int_equal(running.n_closed, 1);
}

/* ------------------------------------------------------------------------------------------------- a plain
 * client */

typedef struct plain {
    const char *path;
    bool wait_until_full; /* read only after the server's queue was full */
    uint32_t n_messages;  /* in order: message i starts with the number i */
    char reply_header[64], odd_header[64], retry[64], text[128]; /* text forms of what came */
    uint8_t details[16];
    size_t n_details;
    grpc_status_code code;
    bool ended;
    pc_task task;
} plain;

static plain g_plain;

static void plain_find(const grpc_metadata_array *array, const char *key, char text_out[64])
{
    for (size_t i = 0; i < array->count; i++) {
        if (grpc_slice_str_cmp(array->metadata[i].key, key) == 0) {
            snprintf(text_out, 64, "%.*s", (int)GRPC_SLICE_LENGTH(array->metadata[i].value),
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

static void plain_read_all(plain *p, grpc_call *call, grpc_completion_queue *cq)
{
    for (;;) {
        grpc_byte_buffer *buffer = NULL;
        grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &buffer};
        plain_batch(call, cq, &op, 1);
        if (buffer == NULL) {
            return;
        }
        grpc_byte_buffer_reader reader;
        uint32_t number = UINT32_MAX;
        assert_int_equal(grpc_byte_buffer_reader_init(&reader, buffer), 1);
        grpc_slice slice = grpc_byte_buffer_reader_readall(&reader);
        if (GRPC_SLICE_LENGTH(slice) >= sizeof(number)) {
            memcpy(&number, GRPC_SLICE_START_PTR(slice), sizeof(number));
            assert_int_equal(number, p->n_messages);
        }
        p->n_messages++;
        grpc_slice_unref(slice);
        grpc_byte_buffer_reader_destroy(&reader);
        grpc_byte_buffer_destroy(buffer);
    }
}

static void plain_finish(plain *p, grpc_call *call, grpc_completion_queue *cq)
{
    grpc_metadata_array trailers;
    grpc_slice text;
    grpc_op op = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT,
                  .data.recv_status_on_client = {
                      .trailing_metadata = &trailers, .status = &p->code, .status_details = &text}};
    grpc_metadata_array_init(&trailers);
    plain_batch(call, cq, &op, 1);
    plain_find(&trailers, "grpc-retry-pushback-ms", p->retry);
    for (size_t i = 0; i < trailers.count; i++) {
        if (grpc_slice_str_cmp(trailers.metadata[i].key, "grpc-status-details-bin") == 0) {
            p->n_details = GRPC_SLICE_LENGTH(trailers.metadata[i].value);
            assert_true(p->n_details <= sizeof(p->details));
            memcpy(p->details, GRPC_SLICE_START_PTR(trailers.metadata[i].value), p->n_details);
        }
    }
    snprintf(p->text, sizeof(p->text), "%.*s", (int)GRPC_SLICE_LENGTH(text),
             (const char *)GRPC_SLICE_START_PTR(text));
    grpc_slice_unref(text);
    grpc_metadata_array_destroy(&trailers);
}

static void plain_call(plain *p, grpc_channel *channel, grpc_completion_queue *cq)
{
    grpc_slice path = grpc_slice_from_copied_string(p->path), body = grpc_slice_from_static_string("");
    grpc_call *call = grpc_channel_create_call(channel, NULL, GRPC_PROPAGATE_DEFAULTS, cq, path, NULL,
                                               gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    grpc_byte_buffer *request = grpc_raw_byte_buffer_create(&body, 1);
    grpc_metadata word = {.key = grpc_slice_from_static_string("x-word"),
                          .value = grpc_slice_from_static_string("tide")};
    grpc_metadata_array headers;
    grpc_op ops[4];
    grpc_metadata_array_init(&headers);
    memset(ops, 0, sizeof(ops));
    ops[0].op = GRPC_OP_SEND_INITIAL_METADATA;
    ops[0].data.send_initial_metadata.count = 1;
    ops[0].data.send_initial_metadata.metadata = &word;
    ops[1].op = GRPC_OP_SEND_MESSAGE;
    ops[1].data.send_message.send_message = request;
    ops[2].op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    ops[3].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[3].data.recv_initial_metadata.recv_initial_metadata = &headers;
    plain_batch(call, cq, ops, 4);
    plain_find(&headers, "x-reply", p->reply_header);
    plain_find(&headers, "x-odd", p->odd_header);
    if (p->wait_until_full) {
        sem_wait(&g.full);
    }
    plain_read_all(p, call, cq);
    plain_finish(p, call, cq);
    grpc_metadata_array_destroy(&headers);
    grpc_byte_buffer_destroy(request);
    grpc_slice_unref(path);
    grpc_call_unref(call);
}

static void plain_ended(void *arg)
{
    plain *p = arg;
    p->ended = true;
}

static bool plain_and_server_ended(void)
{
    return g_plain.ended && g.n_closed == 1;
}

static void *plain_thread(void *arg)
{
    plain *p = arg;
    grpc_init();
    grpc_completion_queue *cq = grpc_completion_queue_create_for_next(NULL);
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    grpc_channel *channel = grpc_channel_create(g.address, credentials, NULL);
    grpc_channel_credentials_release(credentials);
    plain_call(p, channel, cq);
    grpc_channel_destroy(channel);
    grpc_completion_queue_shutdown(cq);
    while (grpc_completion_queue_next(cq, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type !=
           GRPC_QUEUE_SHUTDOWN) {
    }
    grpc_completion_queue_destroy(cq);
    grpc_shutdown();
    pc_loop_post(g.loop, &p->task);
    return NULL;
}

static void plain_run(const char *path, bool wait_until_full)
{
    pthread_t thread;
    memset(&g_plain, 0, sizeof(g_plain));
    g_plain.path = path;
    g_plain.wait_until_full = wait_until_full;
    g_plain.task = (pc_task){.fn = plain_ended, .arg = &g_plain};
    assert_int_equal(pthread_create(&thread, NULL, plain_thread, &g_plain), 0);
    until(plain_and_server_ended);
    pthread_join(thread, NULL);
}

static void test_slow_reader(void **state)
{
    (void)state;
    plain_run("/t.Echo/Stream", true);
    assert_int_equal(g_plain.code, GRPC_STATUS_OK);
    assert_int_equal(g_plain.n_messages, N_STREAM);
    assert_true(g.n_again > 0);
    assert_true(g.queued_peak <= QUEUE_MAX);
    assert_int_equal(g.n_cancelled, 0);
}

static void test_metadata_and_headers(void **state)
{
    (void)state;
    plain_run("/t.Echo/Unary", false);
    assert_int_equal(g_plain.code, GRPC_STATUS_OK);
    assert_string_equal(g_plain.reply_header, "tide");
    assert_string_equal(g_plain.odd_header, "caf???");
}

static void test_details_and_retry(void **state)
{
    (void)state;
    plain_run("/t.Echo/Fail", false);
    assert_int_equal(g_plain.code, GRPC_STATUS_RESOURCE_EXHAUSTED);
    assert_string_equal(g_plain.text, "no room: 100% caf\xc3\xa9");
    assert_string_equal(g_plain.retry, "1500");
    assert_int_equal(g_plain.n_details, 3);
    assert_memory_equal(g_plain.details, "\x01\x00\x02", 3);
}

static void test_code_of(void **state)
{
    (void)state;
    assert_int_equal(pc_code_of(CM_OK), PC_CODE_OK);
    assert_int_equal(pc_code_of(CM_E_TOO_LONG), PC_CODE_INVALID_ARGUMENT);
    assert_int_equal(pc_code_of(CM_E_CAPACITY), PC_CODE_RESOURCE_EXHAUSTED);
    assert_int_equal(pc_code_of(CM_E_NO_OWNER), PC_CODE_UNAVAILABLE);
    assert_int_equal(pc_code_of(CM_E_CORRUPT), PC_CODE_INTERNAL);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_unary),
        TEST(test_unary_wait),
        TEST(test_empty_message_and_missing_message),
        TEST(test_bidi),
        TEST(test_send_queue_is_bounded),
        TEST(test_64_streams),
        TEST(test_client_cancel),
        TEST(test_deadline),
        TEST(test_unknown_method),
        TEST(test_taken_port),
        TEST(test_bad_addresses),
        TEST(test_oversized_request),
        TEST(test_calls_max),
        TEST(test_destroy_with_live_calls),
        TEST(test_server_gone_is_told),
        TEST(test_dead_address),
        TEST(test_server_back_again),
        TEST(test_whole),
        TEST(test_drain),
        TEST(test_drain_silent),
        TEST(test_slow_reader),
        TEST(test_metadata_and_headers),
        TEST(test_details_and_retry),
        cmocka_unit_test(test_code_of),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
