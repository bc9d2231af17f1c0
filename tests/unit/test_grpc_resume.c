/* Clients that come back over gRPC: from the message, or the token, after the last one they have. */
#include <stdio.h>
#include <string.h>

#include "tests/unit/grpc_rig.h"

static void script_chat(gw_stream *stream)
{
    fake_started(stream);
    fake_token(stream, 0, 100);
    fake_piece(stream, MD_PIECE_REASONING, 0, "hm", 2);
    fake_flush(stream);
    fake_token(stream, 1, 101);
    fake_token(stream, 2, 102);
    fake_text(stream, "caf\xc3\xa9");
    fake_piece(stream, MD_PIECE_CALL, 0, "add_extra", 3);
    fake_piece(stream, MD_PIECE_ARGS, 0, "{\"a\":", 5);
    fake_piece(stream, MD_PIECE_ARGS, 0, "1}", 2);
    fake_flush(stream);
    fake_token(stream, 3, 103);
    fake_finish(stream, GW_REASON_TOOL_CALLS, "STOP", 42);
}

static Baleen__V1__ChatEvent *chat_event(uint32_t i)
{
    return message(&g.c, i, &baleen__v1__chat_event__descriptor);
}

static void json_request(Baleen__V1__ChatJsonRequest *request, const char *body)
{
    baleen__v1__chat_json_request__init(request);
    request->body = (ProtobufCBinaryData){.data = (uint8_t *)body, .len = strlen(body)};
}

static void check_chunk(uint32_t i, const char *json, bool last)
{
    Baleen__V1__ChatJsonChunk *chunk = message(&g.c, i, &baleen__v1__chat_json_chunk__descriptor);
    assert_int_equal(chunk->json.len, strlen(json));
    assert_memory_equal(chunk->json.data, json, strlen(json));
    assert_int_equal(chunk->has_last && chunk->last, last);
}

static void check_tokens(uint32_t i, uint64_t offset, size_t n_ids, uint32_t first, const char *text)
{
    Baleen__V1__GenerateEvent *event = message(&g.c, i, &baleen__v1__generate_event__descriptor);
    assert_int_equal(event->event_case, BALEEN__V1__GENERATE_EVENT__EVENT_TOKENS);
    assert_true(event->tokens->offset == offset);
    assert_int_equal(event->tokens->n_ids, n_ids);
    assert_true(n_ids == 0 || event->tokens->ids[0] == first);
    if (text == NULL) {
        assert_null(event->tokens->text);
    } else {
        assert_non_null(event->tokens->text);
        assert_string_equal(event->tokens->text, text);
    }
}

/* What seeks find from now on; the references live as long as the test. */
static void keep(const char *surface, const char *body, const char *options)
{
    static json_t *kept[2];
    json_decref(kept[0]);
    json_decref(kept[1]);
    kept[0] = json_loads(body, 0, NULL);
    kept[1] = json_loads(options, 0, NULL);
    g.gateway.found = (fake_found){.id = "mine", .surface = surface, .body = kept[0], .options = kept[1]};
}

/* From the third event on: the finish included, nothing before. */
static void test_resume_chat(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    chat.request.n_messages = 0; /* nothing but the id counts */
    chat.request.has_resume_offset = true;
    chat.request.resume_offset = 3;
    chat.routing.request_id = "mine";
    g.gateway.script = script_chat;
    keep("grpc chat", "{\"messages\":[]}", "{\"want_ids\":true}");
    ask_and_wait(CHAT, &chat.request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.c.n_messages, 5);
    assert_string_equal(chat_event(0)->delta->tool_call->name, "add");
    assert_string_equal(chat_event(2)->delta->tool_call->arguments, "1}");
    assert_int_equal(chat_event(3)->delta->n_token_ids, 1);
    assert_int_equal(chat_event(4)->finish->stop_token_id, 42);
    assert_int_equal(g.gateway.streams[0].router, 9);
    assert_true(g.gateway.streams[0].want_ids);
}

static void test_resume_json(void **state)
{
    (void)state;
    Baleen__V1__ChatJsonRequest request;
    Baleen__V1__Routing routing = BALEEN__V1__ROUTING__INIT;
    json_request(&request, "no JSON");
    routing.request_id = "mine";
    request.routing = &routing;
    request.has_resume_offset = true;
    request.resume_offset = 2;
    g.gateway.script = script_short;
    keep("grpc json", "{\"stream\":true}", "{}");
    ask_and_wait(CHAT_JSON, &request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.c.n_messages, 2);
    check_chunk(0, "{\"finish\":1}", false);
    check_chunk(1, "{\"usage\":1}", true);
}

/* All answers of a request are resumed, each where it is, from the beginning: how its messages mix is
 * nobody's to say. */
static void test_resume_json_choices(void **state)
{
    (void)state;
    Baleen__V1__ChatJsonRequest request;
    Baleen__V1__Routing routing = BALEEN__V1__ROUTING__INIT;
    json_request(&request, "");
    routing.request_id = "mine";
    request.routing = &routing;
    request.has_resume_offset = true;
    request.resume_offset = 1;
    g.gateway.script = script_short;
    keep("grpc json", "{\"stream\":true,\"n\":2}", "{}");
    expect_refused(CHAT_JSON, &request, PC_CODE_UNIMPLEMENTED, "resume_offset");
    assert_int_equal(g.gateway.n_streams, 0);
    request.resume_offset = 0;
    ask_and_wait(CHAT_JSON, &request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.gateway.n_streams, 2);
    for (uint32_t i = 0; i < 2; i++) {
        assert_int_equal(g.gateway.streams[i].choice, i);
        assert_int_equal(g.gateway.streams[i].router, 9 + i);
        assert_string_equal(g.gateway.streams[i].id, "mine");
    }
    assert_int_equal(g.c.n_messages, 6);
    check_chunk(5, "{\"usage\":1}", true);
}

static void script_generate_held(gw_stream *stream)
{
    fake_started(stream);
    fake_token(stream, 0, 20);
    fake_text(stream, "one");
    fake_flush(stream);
    fake_token(stream, 1, 21);
    fake_text(stream, " two");
    stream->ending = true;
    fake_text(stream, " held");
    fake_finish(stream, GW_REASON_LENGTH, NULL, -1);
}

/* By tokens: text that came with the known ones is known too, but what was held back to the end is not. */
static void test_resume_generate(void **state)
{
    (void)state;
    static const struct {
        uint64_t from;
        const char *text;
    } rows[] = {{0, "one"}, {1, " two held"}, {2, " held"}};
    Baleen__V1__GenerateRequest request = BALEEN__V1__GENERATE_REQUEST__INIT;
    Baleen__V1__Routing routing = BALEEN__V1__ROUTING__INIT;
    routing.request_id = "mine";
    request.routing = &routing;
    request.has_resume_offset = true;
    g.gateway.script = script_generate_held;
    keep("grpc generate", "{\"prompt\":\"Once\"}", "{\"return_text\":true,\"skip_special\":true}");
    for (uint32_t i = 0; i < 3; i++) {
        request.resume_offset = rows[i].from;
        ask_and_wait(GENERATE, &request);
        assert_int_equal(g.c.code, PC_CODE_OK);
        check_tokens(1, rows[i].from, rows[i].from < 2 ? 1 : 0, (uint32_t)(20 + rows[i].from), rows[i].text);
        assert_true(g.gateway.streams[i].skip_special);
        client_fini(&g.c);
    }
}

static void test_resume_refused(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    chat.request.has_resume_offset = true;
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "routing.request_id"); /* none is given */
    chat.routing.request_id = "other";
    keep("grpc chat", "{}", "{}");
    expect_refused(CHAT, &chat.request, PC_CODE_NOT_FOUND, "");
    chat.routing.request_id = "mine";
    keep("http chat", "{}", "{}");
    expect_refused(CHAT, &chat.request, PC_CODE_NOT_FOUND, "routing.request_id");
    assert_int_equal(g.gateway.n_streams, 0);
    ask(CHAT, &chat.request); /* gone before the answer */
    pc_stream_cancel(g.c.stream);
    until(c_is_closed);
}

static bool nothing_lives(void)
{
    return g.gateway.n_live == 0;
}

/* Gone on purpose or not: a stream that may be resumed goes on. */
static void test_resumable(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    chat.routing.has_resumable = chat.routing.resumable = true;
    g.gateway.script = script_start_only;
    ask(CHAT, &chat.request);
    until(c_has_one);
    pc_stream_cancel(g.c.stream);
    until(nothing_lives);
    assert_true(g.gateway.streams[0].detached);
    assert_false(g.gateway.streams[0].cancelled);
}

static void test_resumable_choices(void **state)
{
    (void)state;
    Baleen__V1__ChatJsonRequest request;
    Baleen__V1__Routing routing = BALEEN__V1__ROUTING__INIT;
    json_request(&request, "{\"stream\":true,\"n\":2}");
    routing.has_resumable = routing.resumable = true;
    request.routing = &routing;
    g.gateway.script = script_start_only;
    ask(CHAT_JSON, &request);
    until(c_has_one);
    pc_stream_cancel(g.c.stream);
    until(nothing_lives);
    for (uint32_t i = 0; i < 2; i++) {
        assert_true(g.gateway.streams[i].detached);
        assert_false(g.gateway.streams[i].cancelled);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        RIG_TEST(test_resume_chat),       RIG_TEST(test_resume_json), RIG_TEST(test_resume_generate),
        RIG_TEST(test_resume_refused),    RIG_TEST(test_resumable),   RIG_TEST(test_resume_json_choices),
        RIG_TEST(test_resumable_choices),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
