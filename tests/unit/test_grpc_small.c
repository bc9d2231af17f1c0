/* The other calls of the gRPC surface: tokenizer, abort, info, health, and how the surface ends. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "tests/unit/grpc_rig.h"

static bool c_has_two(void)
{
    return g.c.n_messages == 2;
}

/* ---- the small ones ---- */

static Baleen__V1__TokenizeResponse *tokenized(const Baleen__V1__TokenizeRequest *request)
{
    ask_and_wait(TOKENIZE, request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.c.n_messages, 1);
    Baleen__V1__TokenizeResponse *response = message(&g.c, 0, &baleen__v1__tokenize_response__descriptor);
    assert_int_equal(response->max_model_len, 4096);
    return response;
}

static void test_tokenize_text(void **state)
{
    (void)state;
    Baleen__V1__TokenizeRequest request = BALEEN__V1__TOKENIZE_REQUEST__INIT;
    char text[64];
    const char *user = md_control_text(MD_CTL_USER);
    snprintf(text, sizeof(text), "%s", user);
    request.input_case = BALEEN__V1__TOKENIZE_REQUEST__INPUT_TEXT;
    request.text = text;
    Baleen__V1__TokenizeResponse *plain_text = tokenized(&request);
    assert_true(plain_text->n_ids > 1);
    assert_null(plain_text->rendered);
    request.has_allow_control = request.allow_control = true;
    request.has_add_bos = request.add_bos = true;
    request.has_return_text = request.return_text = true;
    Baleen__V1__TokenizeResponse *control = tokenized(&request);
    assert_int_equal(control->n_ids, 2);
    assert_int_equal(control->ids[0], md_tokenizer_control(g.gateway.tokenizer, MD_CTL_BOS));
    assert_int_equal(control->ids[1], md_tokenizer_control(g.gateway.tokenizer, MD_CTL_USER));
    snprintf(text, sizeof(text), "%s%s", md_control_text(MD_CTL_BOS), user);
    assert_string_equal(control->rendered, text);
}

static void test_tokenize_chat(void **state)
{
    (void)state;
    Baleen__V1__TokenizeRequest request = BALEEN__V1__TOKENIZE_REQUEST__INIT;
    simple_chat chat;
    simple_init(&chat);
    chat.sampling.has_temperature = true; /* ignored, however wrong */
    chat.sampling.temperature = NAN;
    chat.routing.request_id = "not an id";
    request.input_case = BALEEN__V1__TOKENIZE_REQUEST__INPUT_CHAT;
    request.chat = &chat.request;
    request.has_return_text = request.return_text = true;
    Baleen__V1__TokenizeResponse *response = tokenized(&request);
    assert_true(response->n_ids > 0);
    assert_string_equal(response->rendered, "hello");
    chat.message.role = BALEEN__V1__ROLE__ROLE_TOOL;
    expect_refused(TOKENIZE, &request, PC_CODE_INVALID_ARGUMENT, "chat.messages[0].role");
    chat.message.role = (Baleen__V1__Role)77;
    expect_refused(TOKENIZE, &request, PC_CODE_INVALID_ARGUMENT, "chat.messages[0].role");
    chat.request.model = "other";
    chat.message.role = BALEEN__V1__ROLE__ROLE_USER;
    expect_refused(TOKENIZE, &request, PC_CODE_NOT_FOUND, "chat.model");
    request.model = "other";
    expect_refused(TOKENIZE, &request, PC_CODE_NOT_FOUND, "model");
    baleen__v1__tokenize_request__init(&request);
    expect_refused(TOKENIZE, &request, PC_CODE_INVALID_ARGUMENT, "input");
}

/* A cut character and a NUL: text is made whole, raw is as it was. */
static void test_detokenize(void **state)
{
    (void)state;
    static const char text[] = "a\xef\xbf\xbd", nul[] = "\0";
    md_ids ids;
    Baleen__V1__DetokenizeRequest request = BALEEN__V1__DETOKENIZE_REQUEST__INIT;
    md_ids_init(&ids);
    md_tokenizer_encode(g.gateway.tokenizer, "a\xc3", 2, MD_TEXT_PLAIN, &ids);
    md_ids_push(&ids, md_tokenizer_control(g.gateway.tokenizer, MD_CTL_EOS));
    request.ids = ids.id;
    request.n_ids = ids.n;
    request.has_skip_special_tokens = request.skip_special_tokens = true;
    ask_and_wait(DETOKENIZE, &request);
    Baleen__V1__DetokenizeResponse *response = message(&g.c, 0, &baleen__v1__detokenize_response__descriptor);
    assert_string_equal(response->text, text);
    assert_int_equal(response->raw.len, 2);
    assert_memory_equal(response->raw.data, "a\xc3", 2);
    request.has_skip_special_tokens = false;
    ask_and_wait(DETOKENIZE, &request);
    response = message(&g.c, 0, &baleen__v1__detokenize_response__descriptor);
    assert_non_null(strstr(response->text, md_control_text(MD_CTL_EOS)));

    ids.n = 0;
    md_tokenizer_encode(g.gateway.tokenizer, nul, 1, MD_TEXT_PLAIN, &ids);
    request.ids = ids.id;
    request.n_ids = ids.n;
    ask_and_wait(DETOKENIZE, &request);
    assert_int_equal(g.c.messages[0].len, 8); /* the empty text first, the last one counts */
    assert_memory_equal(g.c.messages[0].data, "\x0a\x00\x12\x01\x00\x0a\x01\x00", 8);
    md_ids_fini(&ids);

    uint32_t past[] = {5, g.gateway.info.vocab};
    request.ids = past;
    request.n_ids = 2;
    expect_refused(DETOKENIZE, &request, PC_CODE_INVALID_ARGUMENT, "ids");
    assert_non_null(strstr(g.p.text, "ids[1]"));
    request.model = "other";
    expect_refused(DETOKENIZE, &request, PC_CODE_NOT_FOUND, "model");
}

static uint32_t aborted(const Baleen__V1__AbortRequest *request)
{
    client_fini(&g.other);
    client_ask(&g.other, g.channel, ABORT, &request->base, 0);
    until(both_are_closed);
    assert_int_equal(g.other.code, PC_CODE_OK);
    Baleen__V1__AbortResponse *response = message(&g.other, 0, &baleen__v1__abort_response__descriptor);
    assert_true(response->has_aborted);
    return response->aborted;
}

static void test_abort(void **state)
{
    (void)state;
    char *ids[] = {"unknown", "live"}, *many[1025];
    Baleen__V1__AbortRequest request = BALEEN__V1__ABORT_REQUEST__INIT;
    simple_chat chat;
    simple_init(&chat);
    chat.routing.request_id = "live";
    g.gateway.script = script_start_only;
    ask(CHAT, &chat.request);
    until(c_has_one);
    request.n_request_ids = 2;
    request.request_ids = ids;
    assert_int_equal(aborted(&request), 1);
    assert_int_equal(g.c.code, PC_CODE_ABORTED);
    assert_int_equal(aborted(&request), 0);
    ask(CHAT, &chat.request);
    until(c_has_one);
    request.n_request_ids = 0;
    request.has_all = request.all = true;
    assert_int_equal(aborted(&request), 1);
    for (size_t i = 0; i < 1025; i++) {
        many[i] = "x";
    }
    request.n_request_ids = 1025;
    request.request_ids = many;
    expect_refused(ABORT, &request, PC_CODE_INVALID_ARGUMENT, "request_ids");
}

static void test_info(void **state)
{
    (void)state;
    Baleen__V1__InfoRequest request = BALEEN__V1__INFO_REQUEST__INIT;
    ask_and_wait(INFO, &request);
    Baleen__V1__InfoResponse *info = message(&g.c, 0, &baleen__v1__info_response__descriptor);
    assert_string_equal(info->version, BALEEN_VERSION);
    assert_int_equal(info->n_models, 1);
    assert_string_equal(info->models[0]->name, "nano");
    assert_int_equal(info->models[0]->max_model_len, 4096);
    assert_int_equal(info->models[0]->vocab_size, g.gateway.info.vocab);
    assert_true(info->models[0]->has_bos_id);
    assert_int_equal(info->models[0]->eos_ids[0], 1);
    assert_string_equal(info->models[0]->effort_profile, "P");
    assert_string_equal(info->models[0]->fingerprint, "fp_0123456789abcdef");
    assert_true(info->ready && info->has_draining && !info->draining);
    assert_int_equal(info->epoch, 7);
    assert_int_equal(info->running, 2);
    assert_int_equal(info->waiting, 3);
    assert_true(info->kv_used > 0.24 && info->uptime_s > 12);
}

/* ---- health, drain, end ---- */

#define STATUS(name_) GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__##name_

static int status_in(const client *c, uint32_t i)
{
    Grpc__Health__V1__HealthCheckResponse *response =
        message(c, i, &grpc__health__v1__health_check_response__descriptor);
    assert_true(response->has_status);
    return (int)response->status;
}

static int checked(char *service)
{
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    request.service = service;
    client_fini(&g.other);
    client_ask(&g.other, g.channel, CHECK, &request.base, 0);
    until(other_is_closed);
    assert_int_equal(g.other.code, PC_CODE_OK);
    return status_in(&g.other, 0);
}

static void test_health_check(void **state)
{
    (void)state;
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    assert_int_equal(checked(NULL), STATUS(SERVING));
    assert_int_equal(checked(""), STATUS(SERVING));
    assert_int_equal(checked("baleen.v1.Inference"), STATUS(SERVING));
    g.gateway.info.ready = false;
    assert_int_equal(checked(NULL), STATUS(NOT_SERVING));
    g.gateway.info.ready = g.gateway.info.draining = true;
    assert_int_equal(checked(NULL), STATUS(NOT_SERVING));
    request.service = "baleen.v1.Other";
    expect_refused(CHECK, &request, PC_CODE_NOT_FOUND, "service");
}

static bool other_has_one(void)
{
    return g.other.n_messages == 1;
}

static void test_health_watch(void **state)
{
    (void)state;
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    ask(WATCH, &request);
    until(c_has_one);
    assert_int_equal(status_in(&g.c, 0), STATUS(SERVING));
    request.service = "nobody";
    client_ask(&g.other, g.channel, WATCH, &request.base, 0);
    until(other_has_one);
    assert_int_equal(status_in(&g.other, 0), STATUS(SERVICE_UNKNOWN));
    g.gateway.info.ready = false;
    until(c_has_two);
    assert_int_equal(status_in(&g.c, 1), STATUS(NOT_SERVING));
    pc_stream_cancel(g.c.stream);
    until(c_is_closed);
    assert_int_equal(g.other.n_messages, 1);
    assert_false(g.other.closed);
}

static bool g_drained;

static void note_drained(void *arg)
{
    assert_ptr_equal(arg, &g);
    assert_int_equal(g.gateway.n_live, 0);
    g_drained = true;
}

static bool is_drained(void)
{
    return g_drained;
}

static client g_chat;

static bool chat_has_one(void)
{
    return g_chat.n_messages == 1;
}

static void test_drain(void **state)
{
    (void)state;
    Grpc__Health__V1__HealthCheckRequest watch = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    simple_chat chat;
    simple_init(&chat);
    ask(WATCH, &watch);
    until(c_has_one);
    g.gateway.script = script_start_only;
    client_ask(&g_chat, g.channel, CHAT, &chat.request.base, 0);
    until(chat_has_one);
    gw_grpc_drain(g.grpc, note_drained, &g);
    until(c_is_closed);
    assert_int_equal(g.c.n_messages, 2);
    assert_int_equal(status_in(&g.c, 1), STATUS(NOT_SERVING));
    assert_int_equal(g.c.code, PC_CODE_UNAVAILABLE);
    assert_int_equal(checked(NULL), STATUS(NOT_SERVING));
    expect_refused(CHAT, &chat.request, PC_CODE_UNAVAILABLE, "");
    assert_false(g_drained);
    fake_finish(&g.gateway.streams[0], GW_REASON_STOP, NULL, -1);
    until(is_drained);
    pc_channel_destroy(g.channel);
    g.channel = pc_channel_create(g.loop, g.address);
    assert_true(g_chat.closed);
    client_fini(&g_chat);
}

static void test_destroy_with_a_stream(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    g.gateway.script = script_start_only;
    ask(CHAT, &chat.request);
    until(c_has_one);
    gw_grpc_destroy(g.grpc);
    g.grpc = NULL;
    assert_true(g.gateway.streams[0].cancelled);
    until(c_is_closed);
    assert_int_not_equal(g.c.code, PC_CODE_OK);
}

static void test_taken_address(void **state)
{
    (void)state;
    gw_grpc *second;
    char bound[128];
    cm_error err;
    assert_int_equal(gw_grpc_create(&g.gateway, g.loop, g.address, NULL, &second, bound, &err), CM_E_EXISTS);
    assert_non_null(strstr(err.text, g.address));
}

/* Every method but health's, before its request is looked at. */
static void test_key_is_asked_for(void **state)
{
    (void)state;
    Baleen__V1__InfoRequest info = BALEEN__V1__INFO_REQUEST__INIT;
    Baleen__V1__AbortRequest abort_all = BALEEN__V1__ABORT_REQUEST__INIT;
    Grpc__Health__V1__HealthCheckRequest check = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    g.gateway.key = "mine";
    expect_refused(INFO, &info, PC_CODE_UNAUTHENTICATED, "");
    expect_refused(ABORT, &abort_all, PC_CODE_UNAUTHENTICATED, "");
    expect_refused_bytes(CHAT, "\xff", 1, PC_CODE_UNAUTHENTICATED, "");
    expect_refused_bytes(TOKENIZE, "\xff", 1, PC_CODE_UNAUTHENTICATED, "");
    assert_int_equal(g.gateway.n_streams, 0);
    ask_and_wait(CHECK, &check);
    assert_int_equal(g.c.code, PC_CODE_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        RIG_TEST(test_key_is_asked_for),
        RIG_TEST(test_tokenize_text),
        RIG_TEST(test_tokenize_chat),
        RIG_TEST(test_detokenize),
        RIG_TEST(test_abort),
        RIG_TEST(test_info),
        RIG_TEST(test_health_check),
        RIG_TEST(test_health_watch),
        RIG_TEST(test_drain),
        RIG_TEST(test_destroy_with_a_stream),
        RIG_TEST(test_taken_address),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
