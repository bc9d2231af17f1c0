#include "proto/pack.h"

#include <stdbool.h>

typedef struct pack_allocator {
    cm_arena *arena;
    bool full;
} pack_allocator;

static void *pack_alloc(void *data, size_t n_bytes)
{
    pack_allocator *allocator = data;
    void *p = cm_arena_alloc(allocator->arena, n_bytes);
    allocator->full |= p == NULL;
    return p;
}

static void pack_free(void *data, void *p)
{
    (void)data;
    (void)p; /* the arena's reset frees */
}

typedef struct pack_sink {
    ProtobufCBuffer base; /* first: protobuf-c calls append with its address */
    cm_bytes *out;
} pack_sink;

static void pack_append(ProtobufCBuffer *buffer, size_t n, const uint8_t *data)
{
    cm_bytes_append(((pack_sink *)buffer)->out, data, n);
}

void pr_pack(const ProtobufCMessage *message, cm_bytes *out)
{
    pack_sink sink = {{pack_append}, out};
    protobuf_c_message_pack_to_buffer(message, &sink.base);
}

cm_status pr_unpack(const ProtobufCMessageDescriptor *descriptor, const void *data, size_t n_bytes,
                    cm_arena *arena, ProtobufCMessage **message_out)
{
    pack_allocator state = {.arena = arena};
    ProtobufCAllocator allocator = {pack_alloc, pack_free, &state};
    ProtobufCMessage *message = protobuf_c_message_unpack(descriptor, &allocator, n_bytes, data);
    if (message == NULL) {
        return state.full ? CM_E_TOO_LONG : CM_E_INVALID;
    }
    *message_out = message;
    return CM_OK;
}
