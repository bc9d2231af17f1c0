/* Input: which message (1 byte), then that message packed, as it comes over gRPC. Its body is checked as any
 * client's. */
#include "gateway/grpc_private.h"
#include "gateway/grpc_vllm.h"
#include "gateway/request.h"
#include "tests/fuzz/fuzz.h"

enum { VOCAB = 1000 };

static cm_status body_of(const ProtobufCMessage *message, json_t **body_out, gw_error *error)
{
    if (message->descriptor == &baleen__v1__chat_request__descriptor) {
        return gw_grpc_chat_body((const Baleen__V1__ChatRequest *)message, body_out, error);
    }
    if (message->descriptor == &baleen__v1__generate_request__descriptor) {
        return gw_grpc_generate_body((const Baleen__V1__GenerateRequest *)message, body_out, error);
    }
    return gw_vllm_body((const Vllm__Grpc__Engine__GenerateRequest *)message, body_out, error);
}

static void check(const ProtobufCMessage *message, gw_ask_kind kind)
{
    json_t *body = NULL;
    gw_request request;
    gw_error error = {0};
    cm_status status = body_of(message, &body, &error);
    if (status == CM_OK) {
        CM_ASSERT(json_is_object(body));
        status = gw_request_parse(kind, body, VOCAB, &request, &error);
        if (status == CM_OK) {
            gw_request_free(&request);
        }
        json_decref(body);
    }
    CM_ASSERT(status == CM_OK || (error.message[0] != '\0' && error.cause < GW_CAUSE_COUNT));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct {
        const ProtobufCMessageDescriptor *descriptor;
        gw_ask_kind kind;
    } messages[] = {
        {&baleen__v1__chat_request__descriptor, GW_ASK_CHAT},
        {&baleen__v1__generate_request__descriptor, GW_ASK_COMPLETE},
        {&vllm__grpc__engine__generate_request__descriptor, GW_ASK_COMPLETE},
    };
    cm_arena arena;
    ProtobufCMessage *message;
    gw_error error = {0};
    if (size == 0) {
        return 0;
    }
    size_t i = data[0] % (sizeof(messages) / sizeof(messages[0]));
    cm_arena_init(&arena, "fuzz", 64 << 10, 16 << 20);
    if (pr_unpack(messages[i].descriptor, data + 1, size - 1, &arena, &message) == CM_OK &&
        gw_grpc_check_strings(messages[i].descriptor, data + 1, size - 1, &error) == CM_OK) {
        check(message, messages[i].kind);
    }
    cm_arena_fini(&arena);
    return 0;
}
