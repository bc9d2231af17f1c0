#include "coordinator/etcd.h"

#include <stdio.h>
#include <sys/queue.h>

#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "common/proc/rpc_client.h"
#include "proto/pack.h"

enum { ETCD_REPLY_BYTES_MAX = 8 << 20, ETCD_ARENA_CHUNK_BYTES = 16 << 10, ETCD_ARENA_BYTES_MAX = 32 << 20 };

typedef struct etcd_call {
    LIST_ENTRY(etcd_call) link;
    co_etcd *etcd;
    uint32_t endpoint;
    const ProtobufCMessageDescriptor *descriptor;
    co_etcd_fn fn; /* NULL: forgotten */
    void *ctx;
    bool answered;
    cm_bytes reply;
} etcd_call;

struct co_etcd {
    pc_addresses endpoints;
    pc_channel *channels[PC_ADDRESSES_MAX];
    uint32_t endpoint; /* the next call's */
    LIST_HEAD(, etcd_call) calls;
};

static void call_message(void *ctx, const uint8_t *data, size_t n_bytes)
{
    etcd_call *call = ctx;
    cm_bytes_clear(&call->reply);
    cm_bytes_append(&call->reply, data, n_bytes);
    call->answered = true;
}

/* Codes by which etcd itself says that it did nothing. Whatever else a broken connection or a changing leader
 * can leave behind counts as no answer. */
static bool code_is_refusal(pc_code code)
{
    switch (code) {
    case PC_CODE_INVALID_ARGUMENT:
    case PC_CODE_NOT_FOUND:
    case PC_CODE_ALREADY_EXISTS:
    case PC_CODE_PERMISSION_DENIED:
    case PC_CODE_RESOURCE_EXHAUSTED:
    case PC_CODE_FAILED_PRECONDITION:
    case PC_CODE_UNIMPLEMENTED:
    case PC_CODE_UNAUTHENTICATED:
        return true;
    default:
        return false;
    }
}

static void call_answer(etcd_call *call, const char *endpoint, pc_code code, const char *text)
{
    char why[416] = "";
    cm_arena arena;
    ProtobufCMessage *reply = NULL;
    cm_status status = CM_E_UNAVAILABLE;
    cm_arena_init(&arena, "etcd reply", ETCD_ARENA_CHUNK_BYTES, ETCD_ARENA_BYTES_MAX);
    if (code == PC_CODE_OK && call->answered && !call->reply.overflow) {
        status = pr_unpack(call->descriptor, call->reply.data, call->reply.len, &arena, &reply);
        if (status != CM_OK) {
            status = CM_E_UNAVAILABLE;
            text = "the answer is not etcd's";
        }
    } else if (code_is_refusal(code)) {
        status = CM_E_REFUSED;
    } else if (code == PC_CODE_OK) {
        text = "no answer, or too long a one";
    }
    if (status != CM_OK) {
        snprintf(why, sizeof(why), "etcd at %s: %.250s (code %d)", endpoint, text, (int)code);
    }
    call->fn(call->ctx, status, reply, why);
    cm_arena_fini(&arena);
}

static void call_closed(void *ctx, pc_code code, const char *text)
{
    etcd_call *call = ctx;
    co_etcd *etcd = call->etcd;
    if (code != PC_CODE_OK && !code_is_refusal(code) && etcd->endpoint == call->endpoint) {
        etcd->endpoint = (etcd->endpoint + 1) % etcd->endpoints.n;
    }
    LIST_REMOVE(call, link);
    if (call->fn != NULL) {
        call_answer(call, etcd->endpoints.text[call->endpoint], code, text);
    }
    cm_bytes_fini(&call->reply);
    cm_free(call);
}

co_etcd *co_etcd_create(pc_loop *loop, const pc_addresses *endpoints)
{
    co_etcd *etcd = cm_alloc(sizeof(*etcd));
    etcd->endpoints = *endpoints;
    LIST_INIT(&etcd->calls);
    for (uint32_t i = 0; i < endpoints->n; i++) {
        etcd->channels[i] = pc_channel_create(loop, endpoints->text[i]); /* connects with its first call */
    }
    return etcd;
}

void co_etcd_destroy(co_etcd *etcd)
{
    co_etcd_forget(etcd);
    for (uint32_t i = 0; i < etcd->endpoints.n; i++) {
        pc_channel_destroy(etcd->channels[i]);
    }
    CM_ASSERT(LIST_EMPTY(&etcd->calls));
    cm_free(etcd);
}

void co_etcd_call(co_etcd *etcd, const char *path, const ProtobufCMessage *request,
                  const ProtobufCMessageDescriptor *reply, uint64_t deadline_ms, co_etcd_fn fn, void *ctx)
{
    static const pc_stream_events events = {.message = call_message, .closed = call_closed};
    cm_bytes packed;
    etcd_call *call = cm_alloc(sizeof(*call));
    *call = (etcd_call){.etcd = etcd, .endpoint = etcd->endpoint, .descriptor = reply, .fn = fn, .ctx = ctx};
    cm_bytes_init(&call->reply, ETCD_REPLY_BYTES_MAX);
    LIST_INSERT_HEAD(&etcd->calls, call, link);
    cm_bytes_init(&packed, 0);
    pr_pack(request, &packed);
    pc_stream *stream = pc_stream_open(etcd->channels[etcd->endpoint], path, &events, call, deadline_ms);
    cm_status status = pc_stream_send(stream, packed.data, packed.len);
    CM_ASSERT_MSG(status == CM_OK, "%s: first message of a call: %s", path, cm_status_text(status));
    pc_stream_half_close(stream);
    cm_bytes_fini(&packed);
}

const char *co_etcd_endpoint(const co_etcd *etcd)
{
    return etcd->endpoints.text[etcd->endpoint];
}

void co_etcd_forget(co_etcd *etcd)
{
    etcd_call *call;
    LIST_FOREACH (call, &etcd->calls, link) {
        call->fn = NULL;
    }
}
