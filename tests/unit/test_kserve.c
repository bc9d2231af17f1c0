/* KServe's tensors, and GRPCInferenceService in front of a scripted gateway. */
#include <stdio.h>
#include <string.h>

#include "gateway/grpc_private.h"
#include "gateway/kserve.h"
#include "tests/unit/grpc_rig.h"

#define KSERVE(method_) "/inference.GRPCInferenceService/" method_

typedef Inference__ModelInferRequest__InferInputTensor infer_input;

enum { INPUTS_MAX = 8 };

/* A request put together input by input, in raw form or not. */
typedef struct simple_request {
    Inference__ModelInferRequest request;
    infer_input inputs[INPUTS_MAX], *input_list[INPUTS_MAX];
    Inference__InferTensorContents contents[INPUTS_MAX];
    ProtobufCBinaryData bytes[INPUTS_MAX], raw[INPUTS_MAX];
    protobuf_c_boolean flags[INPUTS_MAX];
    int64_t shapes[INPUTS_MAX][2];
    uint8_t room[INPUTS_MAX][256];
    Inference__ModelInferRequest__ParametersEntry entry, *entries[1];
    Inference__InferParameter value;
} simple_request;

static void simple(simple_request *r)
{
    memset(r, 0, sizeof(*r));
    inference__model_infer_request__init(&r->request);
    r->request.model_name = "nano";
    r->request.id = "7";
    r->request.inputs = r->input_list;
    r->request.raw_input_contents = r->raw;
}

static infer_input *add(simple_request *r, const char *name, const char *datatype, int64_t n)
{
    size_t i = r->request.n_inputs++;
    inference__model_infer_request__infer_input_tensor__init(&r->inputs[i]);
    inference__infer_tensor_contents__init(&r->contents[i]);
    r->inputs[i].name = (char *)(uintptr_t)name;
    r->inputs[i].datatype = (char *)(uintptr_t)datatype;
    r->shapes[i][0] = n;
    r->inputs[i].n_shape = 1;
    r->inputs[i].shape = r->shapes[i];
    r->inputs[i].contents = &r->contents[i];
    r->input_list[i] = &r->inputs[i];
    return &r->inputs[i];
}

static infer_input *add_text(simple_request *r, const char *name, const char *text)
{
    size_t i = r->request.n_inputs;
    infer_input *input = add(r, name, "BYTES", 1);
    r->bytes[i] = (ProtobufCBinaryData){.data = (uint8_t *)(uintptr_t)text, .len = strlen(text)};
    r->contents[i].n_bytes_contents = 1;
    r->contents[i].bytes_contents = &r->bytes[i];
    return input;
}

static infer_input *add_bool(simple_request *r, const char *name, bool value)
{
    size_t i = r->request.n_inputs;
    infer_input *input = add(r, name, "BOOL", 1);
    r->flags[i] = value;
    r->contents[i].n_bool_contents = 1;
    r->contents[i].bool_contents = &r->flags[i];
    return input;
}

static void add_raw(simple_request *r, const char *name, const char *datatype, int64_t n, const void *data,
                    size_t n_bytes)
{
    size_t i = r->request.n_inputs;
    add(r, name, datatype, n)->contents = NULL;
    memcpy(r->room[i], data, n_bytes);
    r->raw[i] = (ProtobufCBinaryData){.data = r->room[i], .len = n_bytes};
    r->request.n_raw_input_contents = r->request.n_inputs;
}

static void want_empty_final(simple_request *r)
{
    inference__model_infer_request__parameters_entry__init(&r->entry);
    inference__infer_parameter__init(&r->value);
    r->value.parameter_choice_case = INFERENCE__INFER_PARAMETER__PARAMETER_CHOICE_BOOL_PARAM;
    r->value.bool_param = true;
    r->entry.key = "triton_enable_empty_final_response";
    r->entry.value = &r->value;
    r->entries[0] = &r->entry;
    r->request.n_parameters = 1;
    r->request.parameters = r->entries;
}

static void assert_json(const json_t *value, const char *expected)
{
    json_t *want = json_loads(expected, 0, NULL);
    assert_non_null(want);
    if (!json_equal(value, want)) {
        char *text = json_dumps(value, JSON_SORT_KEYS);
        fail_msg("%s is not %s", text, expected);
    }
    json_decref(want);
}

/* ---- what is asked ---- */

static gw_kserve_ask read_ok(const simple_request *r)
{
    gw_kserve_ask ask;
    gw_error error;
    if (gw_kserve_read_grpc(&r->request, &ask, &error) != CM_OK) {
        fail_msg("%s: %s", error.param, error.message);
    }
    return ask;
}

static void expect_wrong(const simple_request *r, const char *field)
{
    gw_kserve_ask ask;
    gw_error error;
    assert_int_equal(gw_kserve_read_grpc(&r->request, &ask, &error), CM_E_INVALID);
    assert_string_equal(error.param, field);
    assert_true(error.message[0] != 0);
}

static void test_text(void **state)
{
    (void)state;
    simple_request r;
    simple(&r);
    add_text(&r, "text_input", "Hi");
    add_text(&r, "sampling_parameters", "{\"max_tokens\":4,\"stop\":[\"x\"]}");
    gw_kserve_ask ask = read_ok(&r);
    assert_int_equal(ask.kind, GW_ASK_COMPLETE);
    assert_true(ask.echo && !ask.stream);
    assert_json(ask.body, "{\"model\":\"nano\",\"prompt\":\"Hi\",\"max_tokens\":4,\"stop\":[\"x\"]}");
    gw_kserve_ask_fini(&ask);
    add_bool(&r, "exclude_input_in_output", true);
    ask = read_ok(&r);
    assert_false(ask.echo);
    gw_kserve_ask_fini(&ask);
    r.request.n_inputs--;
    add_bool(&r, "stream", true);
    ask = read_ok(&r);
    assert_true(ask.stream && !ask.echo);
    gw_kserve_ask_fini(&ask);
    add_bool(&r, "exclude_input_in_output", false);
    expect_wrong(&r, "exclude_input_in_output");
}

static void test_raw(void **state)
{
    (void)state;
    static const uint8_t ids[] = {5, 0, 0, 0, 0, 1, 0, 0, 0xff, 0xff, 0xff, 0xff};
    simple_request r;
    simple(&r);
    r.request.model_name = NULL;
    add_raw(&r, "input_ids", "INT32", 3, ids, sizeof(ids));
    add_raw(&r, "stream", "BOOL", 1, "\1", 1);
    add_raw(&r, "sampling_parameters", "BYTES", 1, "\13\0\0\0{\"seed\": 1}", 15);
    r.inputs[0].n_shape = 2; /* [1][3] */
    r.shapes[0][0] = 1;
    r.shapes[0][1] = 3;
    gw_kserve_ask ask = read_ok(&r);
    assert_true(ask.stream && !ask.echo);
    assert_json(ask.body, "{\"prompt\":[5,256,-1],\"seed\":1}"); /* -1 is the request parser's to refuse */
    gw_kserve_ask_fini(&ask);
    r.request.n_raw_input_contents = 2;
    expect_wrong(&r, "raw_input_contents");
    r.request.n_raw_input_contents = 3;
    r.raw[2].len = 14;
    expect_wrong(&r, "sampling_parameters");
    r.raw[2].len = 3;
    expect_wrong(&r, "sampling_parameters");
    r.raw[2].len = 15;
    r.raw[0].len = 11;
    expect_wrong(&r, "input_ids");
    r.raw[0].len = 8;
    expect_wrong(&r, "input_ids"); /* does not fit the shape */
}

/* Each cut of a text. */
static void test_raw_cuts(void **state)
{
    (void)state;
    static const uint8_t raw[] = "\6\0\0\0ab\0\0bc";
    for (size_t n = 0; n < sizeof(raw); n++) {
        uint8_t *exact = cm_alloc(n);
        json_t *list = NULL;
        gw_error error;
        memcpy(exact, raw, n);
        bool whole = n == 0 || n == 10;
        cm_status status = gw_kserve_from_raw(GW_KSERVE_TEXT, exact, n, &list, &error);
        assert_int_equal(status, whole ? CM_OK : CM_E_INVALID);
        json_decref(list);
        cm_free(exact);
    }
}

/* Elements that nobody wants are not made first: a request of 64 MiB of them would hold up everybody. */
static void test_raw_too_many(void **state)
{
    (void)state;
    static const uint8_t flags[2] = {1, 1};
    json_t *list = NULL;
    gw_error error;
    assert_int_equal(gw_kserve_from_raw(GW_KSERVE_STREAM, flags, 2, &list, &error), CM_E_INVALID);
    assert_string_equal(error.message, "stream must have one element");
    assert_int_equal(gw_kserve_from_raw(GW_KSERVE_STREAM, flags, 1, &list, &error), CM_OK);
    json_decref(list);
}

static void test_chat(void **state)
{
    (void)state;
    simple_request r;
    simple(&r);
    add_text(&r, "messages", "[{\"role\":\"user\",\"content\":\"Hi\"}]");
    gw_kserve_ask ask = read_ok(&r);
    assert_int_equal(ask.kind, GW_ASK_CHAT);
    assert_false(ask.echo);
    assert_json(ask.body, "{\"model\":\"nano\",\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}]}");
    gw_kserve_ask_fini(&ask);
    simple(&r);
    add_text(&r, "messages", "[");
    expect_wrong(&r, "messages");
}

static void test_wrong_inputs(void **state)
{
    (void)state;
    simple_request r;
    simple(&r);
    expect_wrong(&r, "text_input");
    add_text(&r, "text_input", "Hi");
    add_text(&r, "messages", "[]");
    expect_wrong(&r, "text_input");
    simple(&r);
    add_text(&r, "text_input", "Hi");
    add_text(&r, "text_input", "Hi");
    expect_wrong(&r, "text_input");
    simple(&r);
    add_text(&r, "text", "Hi");
    expect_wrong(&r, "inputs");
    simple(&r);
    add_text(&r, "text_input", "Hi")->datatype = "FP32";
    expect_wrong(&r, "text_input");
    simple(&r);
    add_text(&r, "text_input", "\xff");
    expect_wrong(&r, "text_input");
    simple(&r);
    add_text(&r, "text_input", "Hi")->shape[0] = 2;
    expect_wrong(&r, "text_input");
    r.shapes[0][0] = -1;
    expect_wrong(&r, "text_input");
    r.shapes[0][0] = 7; /* its inverse: the product of 64 bits is 1 */
    r.shapes[0][1] = INT64_C(0x6db6db6db6db6db7);
    r.inputs[0].n_shape = 2;
    expect_wrong(&r, "text_input");
    simple(&r);
    add_text(&r, "text_input", "Hi")->contents = NULL;
    expect_wrong(&r, "text_input");
    simple(&r);
    add(&r, "text_input", "BYTES", 0);
    expect_wrong(&r, "text_input");
}

static void test_wrong_parameters(void **state)
{
    (void)state;
    static const char *const wrong[] = {
        "", "{", "[]", "{\"prompt\":\"x\"}", "{\"stream\":true}", "{\"logprobs\":1}"};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        simple_request r;
        simple(&r);
        add_text(&r, "text_input", "Hi");
        add_text(&r, "sampling_parameters", wrong[i]);
        expect_wrong(&r, "sampling_parameters");
    }
    Inference__ModelInferRequest__InferRequestedOutputTensor output =
        INFERENCE__MODEL_INFER_REQUEST__INFER_REQUESTED_OUTPUT_TENSOR__INIT;
    Inference__ModelInferRequest__InferRequestedOutputTensor *outputs[] = {&output};
    simple_request r;
    simple(&r);
    add_text(&r, "text_input", "Hi");
    r.request.n_outputs = 1;
    r.request.outputs = outputs;
    expect_wrong(&r, "outputs");
    output.name = "text_output";
    gw_kserve_ask ask = read_ok(&r);
    gw_kserve_ask_fini(&ask);
}

/* ---- ModelInfer ---- */

static const Inference__ModelInferResponse *inferred(const simple_request *r)
{
    ask_and_wait(KSERVE("ModelInfer"), &r->request);
    if (g.c.code != PC_CODE_OK) {
        fail_msg("%s", g.c.text);
    }
    assert_int_equal(g.c.n_messages, 1);
    return message(&g.c, 0, &inference__model_infer_response__descriptor);
}

static void check_text(const Inference__ModelInferResponse *response, const char *text, bool last)
{
    assert_string_equal(response->model_name, "nano");
    assert_string_equal(response->model_version, "1");
    assert_int_equal(response->n_parameters, 1);
    assert_string_equal(response->parameters[0]->key, "triton_final_response");
    assert_int_equal(response->parameters[0]->value->bool_param, last);
    if (text == NULL) {
        assert_int_equal(response->n_outputs, 0);
        return;
    }
    assert_int_equal(response->n_outputs, 1);
    assert_string_equal(response->outputs[0]->name, "text_output");
    assert_string_equal(response->outputs[0]->datatype, "BYTES");
    assert_int_equal(response->outputs[0]->shape[0], 1);
    if (response->n_raw_output_contents > 0) {
        const ProtobufCBinaryData *raw = &response->raw_output_contents[0];
        assert_null(response->outputs[0]->contents);
        assert_int_equal(raw->len, strlen(text) + 4);
        assert_int_equal(raw->data[0], strlen(text));
        assert_memory_equal(raw->data + 4, text, strlen(text));
    } else {
        const ProtobufCBinaryData *bytes = &response->outputs[0]->contents->bytes_contents[0];
        assert_int_equal(bytes->len, strlen(text));
        assert_memory_equal(bytes->data, text, strlen(text));
    }
}

static void script_pieces(gw_stream *stream)
{
    fake_started(stream);
    fake_piece(stream, MD_PIECE_REASONING, 0, "hm", 2);
    fake_flush(stream);
    fake_text(stream, " you");
    fake_flush(stream);
    fake_text(stream, ".");
    fake_finish(stream, GW_REASON_STOP, NULL, -1);
}

static void test_infer(void **state)
{
    (void)state;
    simple_request r;
    simple(&r);
    g.gateway.script = script_pieces;
    add_text(&r, "text_input", "Hi");
    const Inference__ModelInferResponse *response = inferred(&r);
    check_text(response, "Hi you.", true);
    assert_string_equal(response->id, "7");
    assert_int_equal(response->n_raw_output_contents, 0);
    simple(&r);
    add_raw(&r, "text_input", "BYTES", 1, "\2\0\0\0Hi", 6);
    add_raw(&r, "exclude_input_in_output", "BOOL", 1, "\1", 1);
    response = inferred(&r);
    check_text(response, " you.", true);
    assert_int_equal(response->n_raw_output_contents, 1);
}

static void test_infer_refused(void **state)
{
    (void)state;
    simple_request r;
    simple(&r);
    add_text(&r, "text_input", "Hi");
    r.request.model_name = "other";
    expect_refused(KSERVE("ModelInfer"), &r.request, PC_CODE_NOT_FOUND, "model_name");
    r.request.model_name = "nano";
    r.request.model_version = "2";
    expect_refused(KSERVE("ModelInfer"), &r.request, PC_CODE_NOT_FOUND, "model_version");
    r.request.model_version = "1";
    add_bool(&r, "stream", true);
    expect_refused(KSERVE("ModelInfer"), &r.request, PC_CODE_INVALID_ARGUMENT, "stream");
    simple(&r);
    add_text(&r, "text_input", "Hi");
    g.gateway.refuses = true;
    gw_error_set(&g.gateway.refusal, GW_CAUSE_INVALID, "temperature", "too hot");
    expect_refused(KSERVE("ModelInfer"), &r.request, PC_CODE_INVALID_ARGUMENT,
                   "sampling_parameters.temperature");
    gw_error_set(&g.gateway.refusal, GW_CAUSE_CONTEXT, "prompt", "too long");
    expect_refused(KSERVE("ModelInfer"), &r.request, PC_CODE_INVALID_ARGUMENT, "text_input");
}

/* ---- ModelStreamInfer ---- */

static uint32_t g_wanted;

static bool c_has_wanted(void)
{
    return g.c.closed || g.c.n_messages >= g_wanted;
}

static void wait_messages(uint32_t n)
{
    g_wanted = n;
    until(c_has_wanted);
    assert_false(g.c.closed);
    assert_int_equal(g.c.n_messages, n);
}

static const Inference__ModelStreamInferResponse *streamed(uint32_t i)
{
    return message(&g.c, i, &inference__model_stream_infer_response__descriptor);
}

static void end_call(pc_code code)
{
    pc_stream_half_close(g.c.stream);
    until(c_is_closed);
    assert_int_equal(g.c.code, code);
}

static void test_stream(void **state)
{
    (void)state;
    simple_request r;
    simple(&r);
    g.gateway.script = script_pieces;
    add_text(&r, "text_input", "Hi");
    add_bool(&r, "stream", true);
    client_open(&g.c, g.channel, KSERVE("ModelStreamInfer"));
    client_send(&g.c, &r.request);
    wait_messages(2);
    check_text(streamed(0)->infer_response, " you", false);
    check_text(streamed(1)->infer_response, ".", true);
    assert_null(streamed(1)->error_message);
    r.request.n_inputs = 1; /* not streamed: all at once */
    r.request.id = "8";
    client_send(&g.c, &r.request);
    wait_messages(3);
    check_text(streamed(2)->infer_response, "Hi you.", true);
    assert_string_equal(streamed(2)->infer_response->id, "8");
    end_call(PC_CODE_OK);
}

static void script_no_rest(gw_stream *stream)
{
    fake_started(stream);
    fake_text(stream, "x");
    fake_flush(stream);
    fake_finish(stream, GW_REASON_STOP, NULL, -1);
}

static void test_final(void **state)
{
    (void)state;
    simple_request r;
    simple(&r);
    g.gateway.script = script_no_rest;
    add_text(&r, "text_input", "Hi");
    add_bool(&r, "stream", true);
    client_open(&g.c, g.channel, KSERVE("ModelStreamInfer"));
    client_send(&g.c, &r.request);
    wait_messages(2);
    check_text(streamed(0)->infer_response, "x", false);
    check_text(streamed(1)->infer_response, "", true);
    want_empty_final(&r);
    client_send(&g.c, &r.request);
    wait_messages(4);
    check_text(streamed(3)->infer_response, NULL, true);
    end_call(PC_CODE_OK);
}

static bool one_lives(void)
{
    return g.gateway.n_live == 1;
}

/* What is wrong with one request does not end the others. */
static void test_stream_errors(void **state)
{
    (void)state;
    simple_request good, bad;
    simple(&good);
    simple(&bad);
    add_text(&good, "text_input", "Hi");
    add_text(&bad, "nothing", "Hi");
    bad.request.id = "bad";
    g.gateway.script = NULL;
    client_open(&g.c, g.channel, KSERVE("ModelStreamInfer"));
    client_send(&g.c, &good.request);
    client_send(&g.c, &bad.request);
    wait_messages(1);
    assert_non_null(strstr(streamed(0)->error_message, "nothing"));
    assert_string_equal(streamed(0)->infer_response->id, "bad");
    check_text(streamed(0)->infer_response, NULL, true);
    bad.request.model_name = "other";
    client_send(&g.c, &bad.request);
    wait_messages(2);
    assert_non_null(strstr(streamed(1)->error_message, "other"));
    script_pieces(&g.gateway.streams[0]);
    wait_messages(3);
    check_text(streamed(2)->infer_response, "Hi you.", true);
    good.request.id = "late";
    client_send(&g.c, &good.request);
    pc_stream_half_close(g.c.stream); /* what was asked is answered */
    until(one_lives);
    fake_started(&g.gateway.streams[1]);
    fake_fail(&g.gateway.streams[1], GW_CAUSE_UNAVAILABLE, "", 100);
    until(c_is_closed);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_string_equal(streamed(3)->infer_response->id, "late");
    assert_string_equal(streamed(3)->error_message, "it failed on purpose");
}

static bool two_live(void)
{
    return g.gateway.n_live == 2;
}

static bool none_live(void)
{
    return g.gateway.n_live == 0;
}

static void test_stream_cancel(void **state)
{
    (void)state;
    simple_request r;
    simple(&r);
    add_text(&r, "text_input", "Hi");
    client_open(&g.c, g.channel, KSERVE("ModelStreamInfer"));
    client_send(&g.c, &r.request);
    client_send(&g.c, &r.request); /* the same id twice is fine */
    until(two_live);
    pc_stream_cancel(g.c.stream);
    until(none_live);
    assert_true(g.gateway.streams[0].cancelled && g.gateway.streams[1].cancelled);
}

static char g_long[300 << 10];

static void script_long(gw_stream *stream)
{
    fake_started(stream);
    fake_piece(stream, MD_PIECE_CONTENT, 0, g_long, sizeof(g_long));
    fake_finish(stream, GW_REASON_STOP, NULL, -1);
}

static bool all_live(void)
{
    return g.gateway.n_live == FAKE_STREAMS;
}

/* Whole answers that end together are more than may wait of pieces: no client reads so fast. */
static void test_many_long(void **state)
{
    (void)state;
    simple_request r;
    simple(&r);
    add_text(&r, "text_input", "Hi");
    add_bool(&r, "exclude_input_in_output", true);
    memset(g_long, 'x', sizeof(g_long));
    client_open(&g.c, g.channel, KSERVE("ModelStreamInfer"));
    for (int i = 0; i < FAKE_STREAMS; i++) {
        client_send(&g.c, &r.request);
    }
    until(all_live);
    for (int i = 0; i < FAKE_STREAMS; i++) {
        script_long(&g.gateway.streams[i]);
    }
    wait_messages(FAKE_STREAMS);
    for (uint32_t i = 0; i < FAKE_STREAMS; i++) {
        assert_int_equal(streamed(i)->infer_response->outputs[0]->contents->bytes_contents[0].len,
                         sizeof(g_long));
    }
    end_call(PC_CODE_OK);
}

static bool g_drained;

static void drained(void *arg)
{
    (void)arg;
    g_drained = true;
}

static bool is_drained(void)
{
    return g_drained && g.c.closed && g.other.closed;
}

static bool other_has_one(void)
{
    return g.other.n_messages == 1 || g.other.closed;
}

/* An idle stream ends at once, one at work when its last request has ended. */
static void test_drain(void **state)
{
    (void)state;
    simple_request r;
    simple(&r);
    add_text(&r, "text_input", "Hi");
    g_drained = false;
    g.gateway.script = script_pieces;
    client_open(&g.c, g.channel, KSERVE("ModelStreamInfer"));
    client_send(&g.c, &r.request);
    wait_messages(1);
    g.gateway.script = NULL;
    client_open(&g.other, g.channel, KSERVE("ModelStreamInfer"));
    client_send(&g.other, &r.request);
    until(one_lives);
    gw_grpc_drain(g.grpc, drained, NULL);
    until(c_is_closed);
    assert_int_equal(g.c.code, PC_CODE_UNAVAILABLE);
    assert_false(g_drained || g.other.closed);
    g.gateway.refuses = true; /* as a gateway that drains does */
    gw_error_set(&g.gateway.refusal, GW_CAUSE_UNAVAILABLE, NULL, "shutting down");
    client_send(&g.other, &r.request);
    until(other_has_one);
    script_pieces(&g.gateway.streams[1]);
    until(is_drained);
    assert_int_equal(g.other.code, PC_CODE_UNAVAILABLE);
    assert_int_equal(g.other.n_messages, 2);
    const Inference__ModelStreamInferResponse *refused =
        message(&g.other, 0, &inference__model_stream_infer_response__descriptor);
    assert_string_equal(refused->error_message, "shutting down");
}

/* ---- what there is ---- */

static void *small(const char *path, const void *request, const ProtobufCMessageDescriptor *type)
{
    ask_and_wait(path, request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.c.n_messages, 1);
    return message(&g.c, 0, type);
}

static bool model_ready(const char *name)
{
    Inference__ModelReadyRequest request = INFERENCE__MODEL_READY_REQUEST__INIT;
    request.name = (char *)(uintptr_t)name;
    const Inference__ModelReadyResponse *ready =
        small(KSERVE("ModelReady"), &request, &inference__model_ready_response__descriptor);
    return ready->ready;
}

static void test_ready(void **state)
{
    (void)state;
    Inference__ServerLiveRequest empty = INFERENCE__SERVER_LIVE_REQUEST__INIT;
    const Inference__ServerLiveResponse *live =
        small(KSERVE("ServerLive"), &empty, &inference__server_live_response__descriptor);
    assert_true(live->live);
    const Inference__ServerReadyResponse *ready =
        small(KSERVE("ServerReady"), &empty, &inference__server_ready_response__descriptor);
    assert_true(ready->ready && model_ready("nano") && !model_ready("other"));
    g.gateway.info.ready = false;
    ready = small(KSERVE("ServerReady"), &empty, &inference__server_ready_response__descriptor);
    assert_false(ready->ready || model_ready("nano"));
}

static void test_metadata(void **state)
{
    (void)state;
    Inference__ModelMetadataRequest request = INFERENCE__MODEL_METADATA_REQUEST__INIT;
    const Inference__ServerMetadataResponse *server =
        small(KSERVE("ServerMetadata"), &request, &inference__server_metadata_response__descriptor);
    assert_string_equal(server->name, "baleen");
    request.name = "nano";
    const Inference__ModelMetadataResponse *model =
        small(KSERVE("ModelMetadata"), &request, &inference__model_metadata_response__descriptor);
    assert_int_equal(model->n_inputs, GW_KSERVE_INPUTS);
    assert_string_equal(model->inputs[GW_KSERVE_IDS]->name, "input_ids");
    assert_string_equal(model->inputs[GW_KSERVE_IDS]->datatype, "INT32");
    assert_int_equal(model->inputs[GW_KSERVE_IDS]->shape[0], -1);
    assert_string_equal(model->outputs[0]->name, "text_output");
    const Inference__ModelConfigResponse *config =
        small(KSERVE("ModelConfig"), &request, &inference__model_config_response__descriptor);
    assert_true(config->config->model_transaction_policy->decoupled);
    assert_int_equal(config->config->n_input, GW_KSERVE_INPUTS);
    assert_int_equal(config->config->input[GW_KSERVE_STREAM]->data_type, INFERENCE__DATA_TYPE__TYPE_BOOL);
    request.name = "other";
    expect_refused(KSERVE("ModelMetadata"), &request, PC_CODE_NOT_FOUND, "name");
    request.name = NULL;
    request.version = "2";
    expect_refused(KSERVE("ModelConfig"), &request, PC_CODE_NOT_FOUND, "version");

    Inference__RepositoryIndexRequest index = INFERENCE__REPOSITORY_INDEX_REQUEST__INIT;
    const Inference__RepositoryIndexResponse *models =
        small(KSERVE("RepositoryIndex"), &index, &inference__repository_index_response__descriptor);
    assert_int_equal(models->n_models, 1);
    assert_string_equal(models->models[0]->state, "READY");
    g.gateway.info.ready = false;
    index.has_ready = index.ready = true;
    models = small(KSERVE("RepositoryIndex"), &index, &inference__repository_index_response__descriptor);
    assert_int_equal(models->n_models, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_text),
        cmocka_unit_test(test_raw),
        cmocka_unit_test(test_raw_cuts),
        cmocka_unit_test(test_raw_too_many),
        cmocka_unit_test(test_chat),
        cmocka_unit_test(test_wrong_inputs),
        cmocka_unit_test(test_wrong_parameters),
        RIG_TEST(test_infer),
        RIG_TEST(test_infer_refused),
        RIG_TEST(test_stream),
        RIG_TEST(test_final),
        RIG_TEST(test_stream_errors),
        RIG_TEST(test_stream_cancel),
        RIG_TEST(test_many_long),
        RIG_TEST(test_drain),
        RIG_TEST(test_ready),
        RIG_TEST(test_metadata),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
