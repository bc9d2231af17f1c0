/* One gRPC surface in front of a scripted gateway, and clients to ask it. Thread: the loop's. */
#pragma once
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "gateway/grpc.h"
#include "tests/unit/grpc_client.h"
#include "tests/unit/grpc_fake.h"
#include "proto/baleen_v1.pb-c.h"
#include "proto/health.pb-c.h"

#define CHAT       "/baleen.v1.Inference/Chat"
#define CHAT_JSON  "/baleen.v1.Inference/ChatJson"
#define GENERATE   "/baleen.v1.Inference/Generate"
#define TOKENIZE   "/baleen.v1.Inference/Tokenize"
#define DETOKENIZE "/baleen.v1.Inference/Detokenize"
#define ABORT      "/baleen.v1.Inference/Abort"
#define INFO       "/baleen.v1.Inference/Info"
#define CHECK      "/grpc.health.v1.Health/Check"
#define WATCH      "/grpc.health.v1.Health/Watch"

typedef struct rig {
    pc_loop *loop;
    gw_gateway gateway;
    gw_grpc *grpc; /* NULL: the test destroyed it */
    pc_channel *channel;
    char address[128];
    cm_arena arena;  /* unpacked messages of one test */
    client c, other; /* on the loop */
    plain p;
    bool (*done)(void);
} rig;
extern rig g;

int rig_set_up(void **state);
int rig_tear_down(void **state);
#define RIG_TEST(name) cmocka_unit_test_setup_teardown(name, rig_set_up, rig_tear_down)

/* Runs the loop until done, asked after each of its turns, says so. */
void until(bool (*done)(void));
bool c_is_closed(void);
bool c_has_one(void); /* message */
bool other_is_closed(void);
bool both_are_closed(void);

void ask(const char *path, const void *request); /* by g.c */
void ask_and_wait(const char *path, const void *request);
/* A message that came, unpacked into the arena; asserts that every field is known. */
void *message(const client *c, uint32_t i, const ProtobufCMessageDescriptor *type);
/* Refused with this code, this field named in the details ("" = none). */
void expect_refused(const char *path, const void *request, pc_code code, const char *field);
void expect_refused_bytes(const char *path, const void *data, size_t n_bytes, pc_code code,
                          const char *field);

/* A chat of one user's message, with room to spoil it. */
typedef struct simple_chat {
    Baleen__V1__ChatRequest request;
    Baleen__V1__Message message, *messages[1];
    Baleen__V1__Sampling sampling;
    Baleen__V1__Routing routing;
} simple_chat;
void simple_init(simple_chat *chat);

void script_short(gw_stream *stream); /* start, "hi", finish */
void script_start_only(gw_stream *stream);
