/* VllmEngine in front of a scripted gateway. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "gateway/grpc_private.h"
#include "tests/unit/grpc_rig.h"

#define VLLM(method_) "/vllm.grpc.engine.VllmEngine/" method_

typedef Vllm__Grpc__Engine__GenerateResponse response;

typedef struct simple_request {
    Vllm__Grpc__Engine__GenerateRequest request;
    Vllm__Grpc__Engine__SamplingParams sampling;
} simple_request;

static void simple(simple_request *r)
{
    vllm__grpc__engine__generate_request__init(&r->request);
    vllm__grpc__engine__sampling_params__init(&r->sampling);
    r->request.request_id = "r-1";
    r->request.input_case = VLLM__GRPC__ENGINE__GENERATE_REQUEST__INPUT_TEXT;
    r->request.text = "hello";
    r->request.sampling_params = &r->sampling;
    r->request.has_stream = r->request.stream = true;
}

static response *got(uint32_t i)
{
    return message(&g.c, i, &vllm__grpc__engine__generate_response__descriptor);
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

static bool nothing_lives(void)
{
    return g.gateway.n_live == 0;
}

/* ---- what is asked ---- */

static void test_body(void **state)
{
    (void)state;
    simple_request r;
    uint32_t ids[] = {5, 6}, stop_ids[] = {9};
    char *stops[] = {"S", ""};
    Vllm__Grpc__Engine__TokenizedInput input = VLLM__GRPC__ENGINE__TOKENIZED_INPUT__INIT;
    Vllm__Grpc__Engine__SamplingParams__LogitBiasEntry bias =
        VLLM__GRPC__ENGINE__SAMPLING_PARAMS__LOGIT_BIAS_ENTRY__INIT;
    Vllm__Grpc__Engine__SamplingParams__LogitBiasEntry *biases[] = {&bias};
    simple(&r);
    input.input_ids = ids;
    input.n_input_ids = 2;
    input.original_text = "not looked at";
    r.request.input_case = VLLM__GRPC__ENGINE__GENERATE_REQUEST__INPUT_TOKENIZED;
    r.request.tokenized = &input;
    r.sampling.has_temperature = r.sampling.has_max_tokens = r.sampling.has_seed = true;
    r.sampling.temperature = 0;
    r.sampling.max_tokens = 7;
    r.sampling.seed = -3;
    r.sampling.has_top_p = r.sampling.has_top_k = r.sampling.has_min_tokens = true;
    r.sampling.top_p = 0.5f;
    r.sampling.top_k = 4;
    r.sampling.min_tokens = 2;
    r.sampling.has_repetition_penalty = true;
    r.sampling.repetition_penalty = 1.5f;
    r.sampling.has_ignore_eos = r.sampling.ignore_eos = true;
    r.sampling.has_skip_special_tokens = r.sampling.skip_special_tokens = true;
    r.sampling.stop = stops;
    r.sampling.n_stop = 2;
    r.sampling.stop_token_ids = stop_ids;
    r.sampling.n_stop_token_ids = 1;
    r.sampling.has_logprobs = true;
    r.sampling.logprobs = 2;
    bias.key = 11;
    bias.value = -1.5f;
    bias.has_key = bias.has_value = true;
    r.sampling.logit_bias = biases;
    r.sampling.n_logit_bias = 1;
    g.gateway.script = script_short;
    ask_and_wait(VLLM("Generate"), &r.request);
    const gw_stream *stream = &g.gateway.streams[0];
    assert_int_equal(stream->kind, GW_ASK_COMPLETE);
    assert_string_equal(stream->id, "r-1");
    assert_true(stream->want_ids && stream->skip_special);
    assert_json(
        stream->body,
        "{\"prompt\":[5,6],\"temperature\":0.0,\"max_tokens\":7,\"seed\":-3,\"top_p\":0.5,\"top_k\":4,"
        "\"min_tokens\":2,\"repetition_penalty\":1.5,\"ignore_eos\":true,\"stop\":[\"S\",\"\"],"
        "\"stop_token_ids\":[9],\"logprobs\":2,\"logit_bias\":{\"11\":-1.5}}");
}

/* Zero is "not given" where the protocol has no presence; the request id may be made here. */
static void test_body_of_zeros(void **state)
{
    (void)state;
    simple_request r;
    simple(&r);
    r.request.request_id = "";
    r.sampling.has_top_p = r.sampling.has_repetition_penalty = r.sampling.has_top_k = r.sampling.has_n = true;
    r.sampling.has_min_p = r.sampling.has_frequency_penalty = r.sampling.has_presence_penalty = true;
    r.sampling.has_min_tokens = true;
    g.gateway.script = script_short;
    ask_and_wait(VLLM("Generate"), &r.request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_json(g.gateway.streams[0].body, "{\"prompt\":\"hello\",\"ignore_eos\":false}");
    assert_string_equal(g.gateway.streams[0].id, "made-by-gateway");
    r.request.sampling_params = NULL;
    ask_and_wait(VLLM("Generate"), &r.request);
    assert_json(g.gateway.streams[1].body, "{\"prompt\":\"hello\"}");
}

static void expect_body(simple_request *r, const char *field, const char *expected)
{
    uint32_t i = g.gateway.n_streams;
    ask_and_wait(VLLM("Generate"), &r->request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_json(json_object_get(g.gateway.streams[i].body, field), expected);
}

static void test_constraints(void **state)
{
    (void)state;
    simple_request r;
    char *choices[] = {"yes", "no"};
    Vllm__Grpc__Engine__ChoiceConstraint choice = VLLM__GRPC__ENGINE__CHOICE_CONSTRAINT__INIT;
    simple(&r);
    g.gateway.script = script_short;
    r.sampling.constraint_case = VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_REGEX;
    r.sampling.regex = "a+";
    expect_body(&r, "structured_outputs", "{\"regex\":\"a+\"}");
    r.sampling.constraint_case = VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_GRAMMAR;
    expect_body(&r, "structured_outputs", "{\"grammar\":\"a+\"}");
    r.sampling.constraint_case = VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_STRUCTURAL_TAG;
    expect_body(&r, "structured_outputs", "{\"structural_tag\":\"a+\"}");
    choice.choices = choices;
    choice.n_choices = 2;
    r.sampling.constraint_case = VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_CHOICE;
    r.sampling.choice = &choice;
    expect_body(&r, "structured_outputs", "{\"choice\":[\"yes\",\"no\"]}");
    r.sampling.constraint_case = VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_JSON_OBJECT;
    r.sampling.json_object = true;
    expect_body(&r, "response_format", "{\"type\":\"json_object\"}");
    r.sampling.constraint_case = VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_JSON_SCHEMA;
    r.sampling.json_schema = "{\"type\":\"object\"}";
    expect_body(&r, "response_format",
                "{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"response\",\"schema\":{\"type\":"
                "\"object\"}}}");
    r.sampling.json_schema = "{";
    expect_refused(VLLM("Generate"), &r.request, PC_CODE_INVALID_ARGUMENT, "sampling_params.json_schema");
}

static void test_refused(void **state)
{
    (void)state;
    simple_request r;
    Vllm__Grpc__Engine__MultimodalInputs media = VLLM__GRPC__ENGINE__MULTIMODAL_INPUTS__INIT;
    Vllm__Grpc__Engine__KvTransferParams kv = VLLM__GRPC__ENGINE__KV_TRANSFER_PARAMS__INIT;
    simple(&r);
    r.sampling.has_truncate_prompt_tokens = true;
    expect_refused(VLLM("Generate"), &r.request, PC_CODE_UNIMPLEMENTED,
                   "sampling_params.truncate_prompt_tokens");
    simple(&r);
    r.request.mm_inputs = &media;
    expect_refused(VLLM("Generate"), &r.request, PC_CODE_UNIMPLEMENTED, "mm_inputs");
    simple(&r);
    r.request.kv_transfer_params = &kv;
    expect_refused(VLLM("Generate"), &r.request, PC_CODE_UNIMPLEMENTED, "kv_transfer_params");
    simple(&r);
    r.request.has_data_parallel_rank = true;
    r.request.data_parallel_rank = 1;
    expect_refused(VLLM("Generate"), &r.request, PC_CODE_UNIMPLEMENTED, "data_parallel_rank");
    simple(&r);
    r.sampling.has_n = true;
    r.sampling.n = 5;
    expect_refused(VLLM("Generate"), &r.request, PC_CODE_INVALID_ARGUMENT, "sampling_params.n");
    simple(&r);
    r.sampling.has_temperature = true;
    r.sampling.temperature = NAN;
    expect_refused(VLLM("Generate"), &r.request, PC_CODE_INVALID_ARGUMENT, "sampling_params.temperature");
    simple(&r);
    r.request.request_id = "a b";
    expect_refused(VLLM("Generate"), &r.request, PC_CODE_INVALID_ARGUMENT, "request_id");
    simple(&r);
    r.request.input_case = VLLM__GRPC__ENGINE__GENERATE_REQUEST__INPUT__NOT_SET;
    expect_refused(VLLM("Generate"), &r.request, PC_CODE_INVALID_ARGUMENT, "input");
    simple(&r);
    g.gateway.refuses = true;
    gw_error_set(&g.gateway.refusal, GW_CAUSE_CONTEXT, "prompt", "too long");
    expect_refused(VLLM("Generate"), &r.request, PC_CODE_INVALID_ARGUMENT, "input");
    assert_int_equal(g.gateway.n_streams, 0);
}

/* ---- what comes ---- */

static void script_tokens(gw_stream *stream)
{
    fake_started(stream);
    fake_flush(stream); /* nothing new: no chunk */
    fake_logprobs(stream, 20, -1, 2);
    fake_token(stream, 0, 20);
    fake_logprobs(stream, 21, -2, 0);
    fake_token(stream, 1, 21);
    fake_text(stream, "not told");
    fake_flush(stream);
    fake_logprobs(stream, 22, -3, 1);
    fake_token(stream, 2, 22);
    fake_finish(stream, GW_REASON_STOP, "END", -1);
}

static void check_logprobs(const Vllm__Grpc__Engine__OutputLogProbs *p, const uint32_t *ids, size_t n)
{
    static const size_t n_top[] = {2, 0, 1};
    assert_non_null(p);
    assert_int_equal(p->n_token_ids, n);
    assert_int_equal(p->n_token_logprobs, n);
    assert_int_equal(p->n_top_logprobs, n);
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(p->token_ids[i], ids[i]);
        assert_true(p->token_logprobs[i] < -(float)(ids[i] - 20) - 0.9f);
        assert_int_equal(p->top_logprobs[i]->n_token_ids, n_top[ids[i] - 20]);
        assert_int_equal(p->top_logprobs[i]->n_values, n_top[ids[i] - 20]);
        for (size_t k = 0; k < p->top_logprobs[i]->n_token_ids; k++) {
            assert_int_equal(p->top_logprobs[i]->token_ids[k], ids[i] + 1 + k);
        }
    }
}

static void test_stream(void **state)
{
    (void)state;
    static const uint32_t ids[] = {20, 21, 22};
    simple_request r;
    simple(&r);
    g.gateway.script = script_tokens;
    ask_and_wait(VLLM("Generate"), &r.request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.c.n_messages, 3);
    const Vllm__Grpc__Engine__GenerateStreamChunk *first = got(0)->chunk, *second = got(1)->chunk;
    assert_int_equal(first->n_token_ids, 2);
    assert_memory_equal(first->token_ids, ids, 2 * sizeof(*ids));
    assert_int_equal(first->prompt_tokens, 11);
    assert_int_equal(first->cached_tokens, 4);
    assert_int_equal(first->completion_tokens, 2);
    check_logprobs(first->output_logprobs, ids, 2);
    assert_int_equal(second->n_token_ids, 1);
    assert_int_equal(second->token_ids[0], 22);
    assert_int_equal(second->completion_tokens, 3);
    check_logprobs(second->output_logprobs, ids + 2, 1);
    const Vllm__Grpc__Engine__GenerateComplete *complete = got(2)->complete;
    assert_int_equal(complete->n_output_ids, 3);
    assert_memory_equal(complete->output_ids, ids, sizeof(ids));
    assert_string_equal(complete->finish_reason, "stop");
    assert_int_equal(complete->completion_tokens, 6); /* the script's usage */
    assert_null(complete->output_logprobs);
    assert_int_equal(complete->matched_stop_case,
                     VLLM__GRPC__ENGINE__GENERATE_COMPLETE__MATCHED_STOP_MATCHED_STOP_STR);
    assert_string_equal(complete->matched_stop_str, "END");
}

static void test_whole(void **state)
{
    (void)state;
    static const uint32_t ids[] = {20, 21, 22};
    simple_request r;
    simple(&r);
    r.request.stream = false;
    g.gateway.script = script_tokens;
    ask_and_wait(VLLM("Generate"), &r.request);
    assert_int_equal(g.c.n_messages, 1);
    const Vllm__Grpc__Engine__GenerateComplete *complete = got(0)->complete;
    assert_int_equal(complete->n_output_ids, 3);
    check_logprobs(complete->output_logprobs, ids, 3);
}

static void script_length(gw_stream *stream)
{
    fake_started(stream);
    fake_token(stream, 0, 30 + stream->choice);
    fake_finish(stream, stream->choice == 0 ? GW_REASON_LENGTH : GW_REASON_STOP, NULL,
                stream->choice == 2 ? 77 : -1);
}

static void test_choices(void **state)
{
    (void)state;
    simple_request r;
    bool seen[3] = {false};
    simple(&r);
    r.request.has_stream = false;
    r.request.stream = false;
    r.sampling.has_n = true;
    r.sampling.n = 3;
    g.gateway.script = script_length;
    ask_and_wait(VLLM("Generate"), &r.request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.c.n_messages, 3);
    for (uint32_t i = 0; i < 3; i++) {
        const Vllm__Grpc__Engine__GenerateComplete *complete = got(i)->complete;
        assert_in_range(complete->index, 0, 2);
        assert_false(seen[complete->index]);
        seen[complete->index] = true;
        assert_int_equal(complete->output_ids[0], 30 + complete->index);
        assert_string_equal(complete->finish_reason, complete->index == 0 ? "length" : "stop");
        assert_int_equal(complete->matched_token_id, complete->index == 2 ? 77 : 0);
    }
    /* one that is refused takes the others with it */
    g.gateway.refuses_choice = 2;
    gw_error_set(&g.gateway.refusal, GW_CAUSE_CAPACITY, NULL, "full");
    g.gateway.script = NULL;
    ask_and_wait(VLLM("Generate"), &r.request);
    assert_int_equal(g.c.code, PC_CODE_RESOURCE_EXHAUSTED);
    until(nothing_lives);
    assert_int_equal(g.gateway.n_streams, 5);
    assert_true(g.gateway.streams[3].cancelled && g.gateway.streams[4].cancelled);
}

enum { LONG_TOKENS = 200000, LONG_ID = 100000 };

static void script_long(gw_stream *stream)
{
    fake_started(stream);
    for (uint32_t i = 0; i < LONG_TOKENS; i++) {
        fake_token(stream, i, LONG_ID + i % 16);
    }
    fake_finish(stream, GW_REASON_LENGTH, NULL, -1);
}

/* Whole answers that end together are more than may wait of pieces: no client reads so fast. */
static void test_long_choices(void **state)
{
    (void)state;
    simple_request r;
    simple(&r);
    r.request.stream = false;
    r.sampling.has_n = true;
    r.sampling.n = 3;
    g.gateway.script = script_long;
    ask_and_wait(VLLM("Generate"), &r.request);
    assert_string_equal(g.c.text, "");
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.c.n_messages, 3);
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(got(i)->complete->n_output_ids, LONG_TOKENS);
        assert_int_equal(got(i)->complete->output_ids[LONG_TOKENS - 1], LONG_ID + (LONG_TOKENS - 1) % 16);
    }
}

/* ---- ends ---- */

static void script_one_token(gw_stream *stream)
{
    fake_started(stream);
    fake_token(stream, 0, 40 + stream->choice);
    fake_flush(stream);
}

static bool c_has_chunks(void)
{
    return g.c.n_messages == 2;
}

static void vllm_abort(const char *id)
{
    char *ids[] = {"unknown", (char *)(uintptr_t)id};
    Vllm__Grpc__Engine__AbortRequest request = VLLM__GRPC__ENGINE__ABORT_REQUEST__INIT;
    request.request_ids = ids;
    request.n_request_ids = 2;
    client_fini(&g.other);
    client_ask(&g.other, g.channel, VLLM("Abort"), &request.base, 0);
    until(other_is_closed);
    assert_int_equal(g.other.code, PC_CODE_OK);
    assert_int_equal(g.other.n_messages, 1);
}

static void test_abort(void **state)
{
    (void)state;
    simple_request r;
    simple(&r);
    r.sampling.has_n = true;
    r.sampling.n = 2;
    g.gateway.script = script_one_token;
    ask(VLLM("Generate"), &r.request);
    until(c_has_chunks);
    vllm_abort("r-1");
    until(c_is_closed);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.c.n_messages, 4);
    for (uint32_t i = 2; i < 4; i++) {
        const Vllm__Grpc__Engine__GenerateComplete *complete = got(i)->complete;
        assert_string_equal(complete->finish_reason, "abort");
        assert_int_equal(complete->n_output_ids, 1);
        assert_int_equal(complete->output_ids[0], 40 + complete->index);
    }
    assert_true(nothing_lives());
    vllm_abort("r-1");
}

static void test_cancel(void **state)
{
    (void)state;
    simple_request r;
    simple(&r);
    g.gateway.script = script_one_token;
    ask(VLLM("Generate"), &r.request);
    until(c_has_one);
    pc_stream_cancel(g.c.stream);
    until(nothing_lives);
    assert_true(g.gateway.streams[0].cancelled);
}

static void script_fails(gw_stream *stream)
{
    script_one_token(stream);
    fake_fail(stream, GW_CAUSE_UNAVAILABLE, "", 1000);
}

static void test_fails_late(void **state)
{
    (void)state;
    simple_request r;
    simple(&r);
    g.gateway.script = script_fails;
    ask_and_wait(VLLM("Generate"), &r.request);
    assert_int_equal(g.c.code, PC_CODE_UNAVAILABLE);
    assert_int_equal(g.c.n_messages, 1);
}

/* ---- the small ones ---- */

static void *small(const char *path, const void *request, const ProtobufCMessageDescriptor *type)
{
    ask_and_wait(path, request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.c.n_messages, 1);
    return message(&g.c, 0, type);
}

static void test_infos(void **state)
{
    (void)state;
    Vllm__Grpc__Engine__GetModelInfoRequest empty = VLLM__GRPC__ENGINE__GET_MODEL_INFO_REQUEST__INIT;
    const Vllm__Grpc__Engine__GetModelInfoResponse *model =
        small(VLLM("GetModelInfo"), &empty, &vllm__grpc__engine__get_model_info_response__descriptor);
    assert_string_equal(model->served_model_name, "nano");
    assert_true(model->is_generation && !model->supports_vision);
    assert_int_equal(model->max_context_length, 4096);
    assert_int_equal(model->max_req_input_len, 4095);
    assert_int_equal(model->vocab_size, g.gateway.info.vocab);
    assert_int_equal(model->eos_token_ids[0], 1);

    const Vllm__Grpc__Engine__GetServerInfoResponse *server =
        small(VLLM("GetServerInfo"), &empty, &vllm__grpc__engine__get_server_info_response__descriptor);
    assert_int_equal(server->active_requests, 5);
    assert_true(server->last_receive_timestamp <= 0 && server->uptime_seconds > 12);

    Vllm__Grpc__Engine__GetLoadsRequest rank = VLLM__GRPC__ENGINE__GET_LOADS_REQUEST__INIT;
    const Vllm__Grpc__Engine__GetLoadsResponse *loads =
        small(VLLM("GetLoads"), &rank, &vllm__grpc__engine__get_loads_response__descriptor);
    assert_int_equal(loads->n_loads, 1);
    assert_int_equal(loads->loads[0]->num_running_reqs, 2);
    assert_int_equal(loads->loads[0]->num_waiting_reqs, 3);
    assert_int_equal(loads->loads[0]->num_total_reqs, 5);
    assert_int_equal(strlen(loads->timestamp), strlen("2026-11-22T08:16:03.123Z"));
    rank.has_dp_rank = true;
    rank.dp_rank = 1;
    loads = small(VLLM("GetLoads"), &rank, &vllm__grpc__engine__get_loads_response__descriptor);
    assert_int_equal(loads->n_loads, 0);

    simple_request r;
    simple(&r);
    g.gateway.script = script_short;
    ask_and_wait(VLLM("Generate"), &r.request);
    server = small(VLLM("GetServerInfo"), &empty, &vllm__grpc__engine__get_server_info_response__descriptor);
    assert_true(server->last_receive_timestamp > 1.7e9);
}

static bool healthy(void)
{
    Vllm__Grpc__Engine__HealthCheckRequest request = VLLM__GRPC__ENGINE__HEALTH_CHECK_REQUEST__INIT;
    const Vllm__Grpc__Engine__HealthCheckResponse *health =
        small(VLLM("HealthCheck"), &request, &vllm__grpc__engine__health_check_response__descriptor);
    assert_true(health->message[0] != 0);
    return health->healthy;
}

static void test_health(void **state)
{
    (void)state;
    assert_true(healthy());
    g.gateway.info.ready = false;
    assert_false(healthy());
    g.gateway.info.ready = g.gateway.info.draining = true;
    assert_false(healthy());

    static char *const services[] = {"vllm.grpc.engine.VllmEngine", "inference.GRPCInferenceService",
                                     "grpc.reflection.v1.ServerReflection"};
    Grpc__Health__V1__HealthCheckRequest check = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    for (size_t i = 0; i < sizeof(services) / sizeof(services[0]); i++) {
        check.service = services[i];
        ask_and_wait(CHECK, &check);
        assert_int_equal(g.c.code, PC_CODE_OK);
    }
    check.service = "vllm.grpc.engine";
    ask_and_wait(CHECK, &check);
    assert_int_equal(g.c.code, PC_CODE_NOT_FOUND);
}

static void test_unsupported(void **state)
{
    (void)state;
    Vllm__Grpc__Engine__EmbedRequest embed = VLLM__GRPC__ENGINE__EMBED_REQUEST__INIT;
    Smg__Grpc__Common__SubscribeKvEventsRequest kv = SMG__GRPC__COMMON__SUBSCRIBE_KV_EVENTS_REQUEST__INIT;
    expect_refused(VLLM("Embed"), &embed, PC_CODE_UNIMPLEMENTED, "");
    assert_non_null(strstr(g.p.text, "VllmEngine/Embed"));
    expect_refused(VLLM("SubscribeKvEvents"), &kv, PC_CODE_UNIMPLEMENTED, "");
    assert_non_null(strstr(g.p.text, "VllmEngine/SubscribeKvEvents"));
}

enum { ARCHIVE_BYTES = (5 << 20) + 17 }; /* far above what a call may have queued */

static void test_tokenizer(void **state)
{
    (void)state;
    Smg__Grpc__Common__GetTokenizerRequest request = SMG__GRPC__COMMON__GET_TOKENIZER_REQUEST__INIT;
    uint8_t *data = cm_alloc(ARCHIVE_BYTES);
    size_t n = 0;
    for (size_t i = 0; i < ARCHIVE_BYTES; i++) {
        data[i] = (uint8_t)(i * 31 >> 7);
    }
    g.gateway.archive = (gw_archive){.data = data, .n_bytes = ARCHIVE_BYTES, .sha256 = "abc"};
    ask_and_wait(VLLM("GetTokenizer"), &request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_in_range(g.c.n_messages, 2, CLIENT_MESSAGES);
    for (uint32_t i = 0; i < g.c.n_messages; i++) {
        const Smg__Grpc__Common__GetTokenizerChunk *chunk =
            message(&g.c, i, &smg__grpc__common__get_tokenizer_chunk__descriptor);
        assert_true(chunk->data.len <= ARCHIVE_BYTES - n);
        assert_memory_equal(chunk->data.data, data + n, chunk->data.len);
        n += chunk->data.len;
        if (i + 1 < g.c.n_messages) {
            assert_null(chunk->sha256);
        } else {
            assert_string_equal(chunk->sha256, "abc");
        }
    }
    assert_int_equal(n, ARCHIVE_BYTES);
    cm_free(data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        RIG_TEST(test_body),    RIG_TEST(test_body_of_zeros), RIG_TEST(test_constraints),
        RIG_TEST(test_refused), RIG_TEST(test_stream),        RIG_TEST(test_whole),
        RIG_TEST(test_choices), RIG_TEST(test_long_choices),  RIG_TEST(test_abort),
        RIG_TEST(test_cancel),  RIG_TEST(test_fails_late),    RIG_TEST(test_infos),
        RIG_TEST(test_health),  RIG_TEST(test_unsupported),   RIG_TEST(test_tokenizer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
