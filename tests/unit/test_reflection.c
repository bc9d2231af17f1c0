/* Server reflection: what a client that knows nothing finds out. */
#include <stdio.h>
#include <string.h>

#include "gateway/grpc_private.h"
#include "tests/unit/grpc_rig.h"

#define V1      "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
#define V1ALPHA "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

typedef Grpc__Reflection__V1__ServerReflectionRequest reflection_request;
typedef Grpc__Reflection__V1__ServerReflectionResponse reflection_response;
#define REQUEST_CASE(name_)  GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_##name_
#define RESPONSE_CASE(name_) GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_##name_

static uint32_t g_wanted;

static bool c_has_wanted(void)
{
    return g.c.closed || g.c.n_messages == g_wanted;
}

/* One more question on the open call g.c; what is text of its case. */
static reflection_response *reflect(int request_case, const char *text)
{
    reflection_request request = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    request.host = "anywhere";
    request.message_request_case = request_case;
    request.list_services = (char *)(uintptr_t)text;
    g_wanted = g.c.n_messages + 1;
    client_send(&g.c, &request);
    until(c_has_wanted);
    assert_false(g.c.closed);
    reflection_response *response =
        message(&g.c, g_wanted - 1, &grpc__reflection__v1__server_reflection_response__descriptor);
    assert_string_equal(response->valid_host, "anywhere");
    assert_int_equal(response->original_request->message_request_case, request_case);
    assert_string_equal(response->original_request->list_services, text);
    return response;
}

static void expect_file(int request_case, const char *text, const char *name)
{
    reflection_response *response = reflect(request_case, text);
    assert_int_equal(response->message_response_case, RESPONSE_CASE(FILE_DESCRIPTOR_RESPONSE));
    assert_int_equal(response->file_descriptor_response->n_file_descriptor_proto, 1);
    const ProtobufCBinaryData *file = &response->file_descriptor_response->file_descriptor_proto[0];
    /* a FileDescriptorProto begins with its name */
    assert_true(file->len > 2 + strlen(name) && file->data[0] == 0x0a);
    assert_int_equal(file->data[1], strlen(name));
    assert_memory_equal(file->data + 2, name, strlen(name));
}

static void expect_unknown(int request_case, const char *text)
{
    reflection_response *response = reflect(request_case, text);
    assert_int_equal(response->message_response_case, RESPONSE_CASE(ERROR_RESPONSE));
    assert_int_equal(response->error_response->error_code, PC_CODE_NOT_FOUND);
    assert_true(response->error_response->error_message[0] != 0);
}

static void end_call(void)
{
    pc_stream_half_close(g.c.stream);
    until(c_is_closed);
    assert_int_equal(g.c.code, PC_CODE_OK);
}

static void list(const char *path)
{
    static const char *const services[] = {
        "baleen.v1.Inference",
        "grpc.health.v1.Health",
        "vllm.grpc.engine.VllmEngine",
        "inference.GRPCInferenceService",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    };
    enum { N = sizeof(services) / sizeof(services[0]) };
    client_fini(&g.c);
    client_open(&g.c, g.channel, path);
    reflection_response *response = reflect(REQUEST_CASE(LIST_SERVICES), "*");
    assert_int_equal(response->message_response_case, RESPONSE_CASE(LIST_SERVICES_RESPONSE));
    assert_int_equal(response->list_services_response->n_service, N);
    for (size_t i = 0; i < N; i++) {
        bool found = false;
        for (size_t k = 0; k < N; k++) {
            found |= strcmp(response->list_services_response->service[k]->name, services[i]) == 0;
        }
        assert_true(found);
    }
    end_call();
}

static void test_list(void **state)
{
    (void)state;
    list(V1);
    list(V1ALPHA);
}

/* Each service's methods stand in the table, and each method of the table in a service. */
static void test_methods(void **state)
{
    (void)state;
    static const ProtobufCServiceDescriptor *const known[] = {&baleen__v1__inference__descriptor,
                                                              &vllm__grpc__engine__vllm_engine__descriptor,
                                                              &inference__grpcinference_service__descriptor};
    char path[256];
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        for (unsigned k = 0; k < known[i]->n_methods; k++) {
            bool found = false;
            snprintf(path, sizeof(path), "/%s/%s", known[i]->name, known[i]->methods[k].name);
            for (size_t m = 0; m < GW_GRPC_N_METHODS; m++) {
                found |= strcmp(gw_grpc_methods[m].path, path) == 0;
            }
            assert_true(found);
        }
    }
    client_open(&g.c, g.channel, V1);
    for (size_t m = 0; m < GW_GRPC_N_METHODS; m++) {
        char symbol[256];
        snprintf(symbol, sizeof(symbol), "%s", gw_grpc_methods[m].path + 1);
        *strchr(symbol, '/') = '.';
        reflection_response *response = reflect(REQUEST_CASE(FILE_CONTAINING_SYMBOL), symbol);
        assert_int_equal(response->message_response_case, RESPONSE_CASE(FILE_DESCRIPTOR_RESPONSE));
    }
    end_call();
}

static void test_symbols(void **state)
{
    (void)state;
    static const char *const vllm[] = {
        "vllm.grpc.engine.VllmEngine",
        "vllm.grpc.engine.VllmEngine.Generate",
        "vllm.grpc.engine.SamplingParams",
        "vllm.grpc.engine.SamplingParams.top_p",
        "vllm.grpc.engine.SamplingParams.constraint",
        "vllm.grpc.engine.SamplingParams.LogitBiasEntry",
    };
    client_open(&g.c, g.channel, V1);
    for (size_t i = 0; i < sizeof(vllm) / sizeof(vllm[0]); i++) {
        expect_file(REQUEST_CASE(FILE_CONTAINING_SYMBOL), vllm[i], "proto/vllm_engine.proto");
    }
    expect_file(REQUEST_CASE(FILE_CONTAINING_SYMBOL), "smg.grpc.common.GetTokenizerChunk",
                "proto/vllm_common.proto");
    expect_file(REQUEST_CASE(FILE_CONTAINING_SYMBOL), "inference.ModelInferRequest.InferInputTensor.shape",
                "proto/kserve.proto");
    expect_file(REQUEST_CASE(FILE_CONTAINING_SYMBOL), "baleen.v1.Role", "proto/baleen_v1.proto");
    expect_file(REQUEST_CASE(FILE_CONTAINING_SYMBOL), "baleen.v1.ROLE_USER", "proto/baleen_v1.proto");
    expect_file(REQUEST_CASE(FILE_BY_FILENAME), "proto/health.proto", "proto/health.proto");
    end_call();
}

/* The call goes on after each. */
static void test_unknown(void **state)
{
    (void)state;
    static const char *const symbols[] = {"",
                                          "baleen",
                                          "baleen.v1",
                                          "baleen.v1.",
                                          "baleen.v1.Role.ROLE_USER",
                                          "Inference",
                                          "baleen.v1.Inference.No",
                                          "baleen.v1.Inferenc",
                                          "baleen.v1.Inference.Chat.x"};
    char name[2000];
    memset(name, 'x', sizeof(name));
    name[sizeof(name) - 1] = 0;
    client_open(&g.c, g.channel, V1ALPHA);
    for (size_t i = 0; i < sizeof(symbols) / sizeof(symbols[0]); i++) {
        expect_unknown(REQUEST_CASE(FILE_CONTAINING_SYMBOL), symbols[i]);
    }
    expect_unknown(REQUEST_CASE(FILE_BY_FILENAME), "health.proto");
    expect_unknown(REQUEST_CASE(FILE_BY_FILENAME), name);
    expect_unknown(REQUEST_CASE(ALL_EXTENSION_NUMBERS_OF_TYPE), "baleen.v1.Sampling");
    expect_file(REQUEST_CASE(FILE_BY_FILENAME), "proto/kserve.proto", "proto/kserve.proto");

    reflection_request request = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    Grpc__Reflection__V1__ExtensionRequest extension = GRPC__REFLECTION__V1__EXTENSION_REQUEST__INIT;
    request.message_request_case = REQUEST_CASE(FILE_CONTAINING_EXTENSION);
    request.file_containing_extension = &extension;
    g_wanted = g.c.n_messages + 1;
    client_send(&g.c, &request);
    until(c_has_wanted);
    reflection_response *response =
        message(&g.c, g_wanted - 1, &grpc__reflection__v1__server_reflection_response__descriptor);
    assert_int_equal(response->error_response->error_code, PC_CODE_NOT_FOUND);
    end_call();
}

static void test_empty_request(void **state)
{
    (void)state;
    reflection_request request = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    expect_refused(V1, &request, PC_CODE_INVALID_ARGUMENT, "message_request");
    client_open(&g.c, g.channel, V1); /* no message at all */
    end_call();
}

static bool g_drained;

static void drained(void *arg)
{
    (void)arg;
    g_drained = true;
}

static bool is_drained(void)
{
    return g_drained && g.c.closed;
}

/* A client that waits idly does not keep the gateway. */
static void test_drain(void **state)
{
    (void)state;
    g_drained = false;
    client_open(&g.c, g.channel, V1);
    expect_file(REQUEST_CASE(FILE_BY_FILENAME), "proto/kserve.proto", "proto/kserve.proto");
    gw_grpc_drain(g.grpc, drained, NULL);
    until(is_drained);
    assert_int_equal(g.c.code, PC_CODE_UNAVAILABLE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        RIG_TEST(test_list),    RIG_TEST(test_methods),       RIG_TEST(test_symbols),
        RIG_TEST(test_unknown), RIG_TEST(test_empty_request), RIG_TEST(test_drain),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
