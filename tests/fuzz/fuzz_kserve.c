/* Input: a packed inference.ModelInferRequest, as it comes over gRPC. */
#include "gateway/grpc_private.h"
#include "gateway/kserve.h"
#include "tests/fuzz/fuzz.h"

static void check_accepted(const gw_kserve_ask *ask)
{
    const json_t *prompt = json_object_get(ask->body, "prompt");
    CM_ASSERT(json_is_object(ask->body));
    CM_ASSERT((prompt != NULL) == (ask->kind == GW_ASK_COMPLETE));
    CM_ASSERT((json_object_get(ask->body, "messages") != NULL) == (ask->kind == GW_ASK_CHAT));
    CM_ASSERT(!ask->echo || (json_is_string(prompt) && !ask->stream));
    CM_ASSERT(json_object_get(ask->body, "stream") == NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    cm_arena arena;
    ProtobufCMessage *request;
    gw_kserve_ask ask;
    gw_error error = {0};
    cm_arena_init(&arena, "fuzz", 64 << 10, 16 << 20);
    if (pr_unpack(&inference__model_infer_request__descriptor, data, size, &arena, &request) == CM_OK &&
        gw_grpc_check_strings(&inference__model_infer_request__descriptor, data, size, &error) == CM_OK) {
        if (gw_kserve_read_grpc((const Inference__ModelInferRequest *)request, &ask, &error) == CM_OK) {
            check_accepted(&ask);
            gw_kserve_ask_fini(&ask);
        } else {
            CM_ASSERT(error.message[0] != '\0' && error.cause < GW_CAUSE_COUNT);
            gw_kserve_name_field(&error);
            CM_ASSERT(error.param[0] != '\0');
        }
    }
    cm_arena_fini(&arena);
    return 0;
}
