/* Long lists of token ids over gRPC: refused by their count, before they become JSON. What jansson allocates
 * is counted. */
#include <string.h>

#include "gateway/grpc_private.h"
#include "tests/unit/grpc_rig.h"

#define VLLM_GENERATE "/vllm.grpc.engine.VllmEngine/Generate"
#define MODEL_INFER   "/inference.GRPCInferenceService/ModelInfer"

enum { CONTEXT = 4096 /* of grpc_fake.c */, MANY = 4 << 20, SMALL_BYTES = 64 << 10 };

static size_t g_json_bytes;

static void *count_and_alloc(size_t n_bytes)
{
    g_json_bytes += n_bytes;
    return cm_alloc(n_bytes);
}

static uint32_t g_ids[MANY];
static int32_t g_tensor[MANY];

static bool nothing_lives(void)
{
    return g.gateway.n_live == 0;
}

/* n ids are too many and nobody makes a list of them; as many as just fit begin a stream. */
static void check_call(const char *path, const void *request, size_t n, const char *field)
{
    g_json_bytes = 0;
    if (n < CONTEXT) {
        g.gateway.script = script_short;
        uint32_t n_before = g.gateway.n_streams;
        ask_and_wait(path, request);
        assert_int_equal(g.gateway.n_streams, n_before + 1);
        until(nothing_lives);
        assert_true(g_json_bytes > SMALL_BYTES); /* here it is one: the counter works */
        return;
    }
    uint32_t n_before = g.gateway.n_streams;
    expect_refused(path, request, PC_CODE_INVALID_ARGUMENT, field);
    assert_non_null(strstr(g.p.text, "maximum context length is 4096 tokens"));
    assert_int_equal(g.gateway.n_streams, n_before);
    assert_true(g_json_bytes < SMALL_BYTES);
}

static void generate(size_t n)
{
    Baleen__V1__GenerateRequest request = BALEEN__V1__GENERATE_REQUEST__INIT;
    Baleen__V1__TokenIds tokens = BALEEN__V1__TOKEN_IDS__INIT;
    tokens.n_ids = n;
    tokens.ids = g_ids;
    request.prompt_case = BALEEN__V1__GENERATE_REQUEST__PROMPT_TOKENS;
    request.tokens = &tokens;
    check_call(GENERATE, &request, n, "prompt");
}

static void vllm(size_t n)
{
    Vllm__Grpc__Engine__GenerateRequest request = VLLM__GRPC__ENGINE__GENERATE_REQUEST__INIT;
    Vllm__Grpc__Engine__TokenizedInput input = VLLM__GRPC__ENGINE__TOKENIZED_INPUT__INIT;
    input.n_input_ids = n;
    input.input_ids = g_ids;
    request.input_case = VLLM__GRPC__ENGINE__GENERATE_REQUEST__INPUT_TOKENIZED;
    request.tokenized = &input;
    check_call(VLLM_GENERATE, &request, n, "input");
}

static void infer(size_t n, bool raw)
{
    int64_t shape[] = {(int64_t)n};
    Inference__ModelInferRequest request = INFERENCE__MODEL_INFER_REQUEST__INIT;
    Inference__ModelInferRequest__InferInputTensor input =
        INFERENCE__MODEL_INFER_REQUEST__INFER_INPUT_TENSOR__INIT;
    Inference__InferTensorContents contents = INFERENCE__INFER_TENSOR_CONTENTS__INIT;
    Inference__ModelInferRequest__InferInputTensor *inputs[] = {&input};
    ProtobufCBinaryData bytes = {.len = n * sizeof(*g_tensor), .data = (uint8_t *)g_tensor};
    contents.n_int_contents = n;
    contents.int_contents = g_tensor;
    input.name = "input_ids";
    input.datatype = "INT32";
    input.n_shape = 1;
    input.shape = shape;
    input.contents = raw ? NULL : &contents;
    request.model_name = "nano";
    request.n_inputs = 1;
    request.inputs = inputs;
    request.n_raw_input_contents = raw;
    request.raw_input_contents = &bytes;
    check_call(MODEL_INFER, &request, n, "text_input");
}

static void prompts_of_ids(void **state)
{
    (void)state;
    static const size_t counts[] = {CONTEXT - 1, CONTEXT, MANY};
    for (size_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
        generate(counts[i]);
        vllm(counts[i]);
        infer(counts[i], false);
        infer(counts[i], true);
    }
}

/* What has one element is not given many. */
static void other_tensors(void **state)
{
    (void)state;
    enum { FLAGS = 1 << 20 };
    static protobuf_c_boolean flags[FLAGS];
    int64_t shape[] = {1};
    Inference__ModelInferRequest request = INFERENCE__MODEL_INFER_REQUEST__INIT;
    Inference__ModelInferRequest__InferInputTensor input =
        INFERENCE__MODEL_INFER_REQUEST__INFER_INPUT_TENSOR__INIT;
    Inference__InferTensorContents contents = INFERENCE__INFER_TENSOR_CONTENTS__INIT;
    Inference__ModelInferRequest__InferInputTensor *inputs[] = {&input};
    contents.n_bool_contents = FLAGS;
    contents.bool_contents = flags;
    input.name = "stream";
    input.datatype = "BOOL";
    input.n_shape = 1;
    input.shape = shape;
    input.contents = &contents;
    request.model_name = "nano";
    request.n_inputs = 1;
    request.inputs = inputs;
    g_json_bytes = 0;
    expect_refused(MODEL_INFER, &request, PC_CODE_INVALID_ARGUMENT, "stream");
    assert_true(g_json_bytes < SMALL_BYTES);
}

/* No more of them reach the request's parser than it takes to see that they are too many. */
static void stop_ids(void **state)
{
    (void)state;
    Baleen__V1__GenerateRequest request = BALEEN__V1__GENERATE_REQUEST__INIT;
    Baleen__V1__Sampling sampling = BALEEN__V1__SAMPLING__INIT;
    static const size_t counts[] = {GW_STOP_IDS_MAX, GW_STOP_IDS_MAX + 1, 100000};
    request.prompt_case = BALEEN__V1__GENERATE_REQUEST__PROMPT_TEXT;
    request.text = "x";
    request.sampling = &sampling;
    g.gateway.script = script_short;
    for (size_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
        sampling.n_stop_token_ids = counts[i];
        sampling.stop_token_ids = g_ids;
        ask_and_wait(GENERATE, &request);
        const json_t *list = json_object_get(g.gateway.streams[i].body, "stop_token_ids");
        size_t n = counts[i] > GW_STOP_IDS_MAX ? GW_STOP_IDS_MAX + 1 : counts[i];
        assert_int_equal(json_array_size(list), n);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {RIG_TEST(prompts_of_ids), RIG_TEST(other_tensors), RIG_TEST(stop_ids)};
    json_set_alloc_funcs(count_and_alloc, cm_free);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
