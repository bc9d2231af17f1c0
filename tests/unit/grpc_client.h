/* Two clients for tests of a gRPC surface: ours on the loop, which can wait, cancel and talk to several
 * servers at once, and a plain one on a thread of its own, which also sees metadata and trailers. */
#pragma once
#include <protobuf-c/protobuf-c.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "common/proc/rpc_client.h"
#include "proto/rpc_status.pb-c.h"

enum { CLIENT_MESSAGES = 64 };

typedef struct client {
    pc_stream *stream;
    cm_bytes messages[CLIENT_MESSAGES]; /* the first ones */
    uint32_t n_messages;
    bool closed;
    pc_code code;
    char text[512];
} client;

/* Sends one request, waits for nothing. */
void client_ask(client *c, pc_channel *channel, const char *path, const ProtobufCMessage *request,
                uint64_t deadline_ms);
/* The same in steps, for calls of many requests: pc_stream_half_close ends them. */
void client_open(client *c, pc_channel *channel, const char *path);
void client_send(client *c, const void *request);
void client_fini(client *c);

typedef struct plain {
    cm_bytes request;
    char address[128];
    const char *path;
    uint32_t n_messages;
    int code;
    char text[512], request_id[192], retry[32]; /* x-request-id, grpc-retry-pushback-ms; "" when absent */
    cm_bytes details;                           /* packed google.rpc.Status */
    bool ended;
    pc_loop *loop;
    pc_task task;
} plain;

/* Runs the loop until the call and its thread have ended. */
void plain_run(plain *p, pc_loop *loop, const char *address, const char *path, const void *request,
               size_t n_bytes);
void plain_fini(plain *p);
/* The first detail of that type ("google.rpc.BadRequest") unpacked into the arena; NULL when there is none.
 */
void *plain_detail(const plain *p, const ProtobufCMessageDescriptor *type, cm_arena *arena);
