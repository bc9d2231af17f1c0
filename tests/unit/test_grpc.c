/* Generating calls of the gRPC surface: what a request asks the gateway for, in which order events leave,
 * what an error says. */
#include <math.h>
#include <string.h>

#include "tests/unit/grpc_rig.h"
#include "proto/pack.h"

enum { MIB = 1 << 20 };

static bool nothing_lives(void)
{
    return g.gateway.n_live == 0;
}

static void assert_json(const json_t *value, const char *expected)
{
    json_error_t where;
    json_t *want = json_loads(expected, 0, &where);
    assert_non_null(want);
    if (!json_equal(value, want)) {
        char *text = json_dumps(value, JSON_SORT_KEYS);
        fail_msg("%s is not %s", text, expected);
    }
    json_decref(want);
}

static Baleen__V1__ChatEvent *chat_event(uint32_t i)
{
    return message(&g.c, i, &baleen__v1__chat_event__descriptor);
}

/* ---- Chat ---- */

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

static void check_delta(uint32_t i, int piece_case, uint32_t n_ids)
{
    Baleen__V1__ChatEvent *event = chat_event(i);
    assert_int_equal(event->event_case, BALEEN__V1__CHAT_EVENT__EVENT_DELTA);
    assert_int_equal(event->delta->piece_case, piece_case);
    assert_int_equal(event->delta->n_token_ids, n_ids);
}

static void check_usage(const Baleen__V1__Usage *usage)
{
    assert_int_equal(usage->prompt_tokens, 11);
    assert_int_equal(usage->cached_tokens, 4);
    assert_int_equal(usage->completion_tokens, 6);
    assert_int_equal(usage->reasoning_tokens, 2);
    assert_true(usage->queue_ms > 1.4 && usage->queue_ms < 1.6);
    assert_true(usage->first_token_ms > 2.4 && usage->first_token_ms < 2.6);
    assert_true(usage->total_ms > 3.4 && usage->total_ms < 3.6);
}

static void test_chat_events(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    chat.request.has_return_token_ids = chat.request.return_token_ids = true;
    chat.routing.request_id = "a.B:9_-";
    g.gateway.script = script_chat;
    ask_and_wait(CHAT, &chat.request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.c.n_messages, 8);

    Baleen__V1__ChatStart *start = chat_event(0)->start;
    assert_int_equal(chat_event(0)->event_case, BALEEN__V1__CHAT_EVENT__EVENT_START);
    assert_string_equal(start->request_id, "a.B:9_-");
    assert_string_equal(start->model, "nano");
    assert_true(start->created_s == 1777472403);
    assert_int_equal(start->prompt_tokens, 11);
    assert_int_equal(start->cached_tokens, 4);

    check_delta(1, BALEEN__V1__CHAT_DELTA__PIECE_REASONING, 1);
    check_delta(2, BALEEN__V1__CHAT_DELTA__PIECE_CONTENT, 2);
    check_delta(3, BALEEN__V1__CHAT_DELTA__PIECE_TOOL_CALL, 0);
    check_delta(4, BALEEN__V1__CHAT_DELTA__PIECE_TOOL_CALL, 0);
    check_delta(5, BALEEN__V1__CHAT_DELTA__PIECE_TOOL_CALL, 0);
    check_delta(6, BALEEN__V1__CHAT_DELTA__PIECE_CONTENT, 1); /* ids that became no text */
    assert_string_equal(chat_event(1)->delta->reasoning, "hm");
    assert_int_equal(chat_event(2)->delta->token_ids[1], 102);
    assert_string_equal(chat_event(2)->delta->content, "caf\xc3\xa9");
    Baleen__V1__ToolCallDelta *call = chat_event(3)->delta->tool_call;
    assert_string_equal(call->name, "add");
    assert_int_equal(strncmp(call->id, "call_00_", 8), 0);
    assert_int_equal(strlen(call->id), 32);
    assert_null(call->arguments);
    assert_null(chat_event(4)->delta->tool_call->id);
    assert_string_equal(chat_event(4)->delta->tool_call->arguments, "{\"a\":");
    assert_string_equal(chat_event(5)->delta->tool_call->arguments, "1}");
    assert_string_equal(chat_event(6)->delta->content, "");

    Baleen__V1__ChatFinish *finish = chat_event(7)->finish;
    assert_int_equal(finish->reason, BALEEN__V1__FINISH_REASON__FINISH_TOOL_CALLS);
    assert_string_equal(finish->stop_string, "STOP");
    assert_int_equal(finish->stop_token_id, 42);
    check_usage(finish->usage);
}

static void check_logprob(const Baleen__V1__TokenLogprob *of, uint32_t id, float logprob, size_t n_top)
{
    assert_int_equal(of->token_id, id);
    assert_true(of->logprob > logprob - 0.01f && of->logprob < logprob + 0.01f);
    assert_int_equal(of->n_top, n_top);
}

static void script_logprobs(gw_stream *stream)
{
    fake_started(stream);
    fake_logprobs(stream, 100, -1, 2);
    fake_token(stream, 0, 100);
    fake_logprobs(stream, 200, -2, 0);
    fake_token(stream, 1, 200);
    fake_text(stream, "a");
    fake_flush(stream);
    fake_text(stream, "late");
    fake_logprobs(stream, 300, -3, 1);
    fake_token(stream, 2, 300);
    fake_finish(stream, GW_REASON_LENGTH, NULL, -1);
}

/* Each goes with the piece its token came to, or with an empty one at the end. */
static void test_chat_logprobs(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    g.gateway.script = script_logprobs;
    ask_and_wait(CHAT, &chat.request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.c.n_messages, 5);
    const Baleen__V1__ChatDelta *delta = chat_event(1)->delta;
    assert_int_equal(delta->n_logprobs, 2);
    check_logprob(delta->logprobs[0], 100, -1, 2);
    assert_int_equal(delta->logprobs[0]->token.len, 3);
    check_logprob(delta->logprobs[0]->top[0], 101, -0.5f, 0);
    assert_int_equal(delta->logprobs[0]->top[0]->token.data[0], 0xff);
    check_logprob(delta->logprobs[0]->top[1], 102, -9999, 0);
    assert_false(delta->logprobs[0]->top[1]->has_token);
    check_logprob(delta->logprobs[1], 200, -2, 0);
    assert_int_equal(chat_event(2)->delta->n_logprobs, 0);
    assert_int_equal(chat_event(3)->delta->n_logprobs, 1);
    check_logprob(chat_event(3)->delta->logprobs[0], 300, -3, 1);
}

/* Every field that a body can hold. */
static void test_chat_body(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    Baleen__V1__ToolCall call = BALEEN__V1__TOOL_CALL__INIT, *calls[] = {&call};
    call.id = "c1";
    call.name = "add";
    Baleen__V1__Message m[5], *messages[5];
    static const struct {
        Baleen__V1__Role role;
        char *content;
    } said[] = {{BALEEN__V1__ROLE__ROLE_SYSTEM, "s"},
                {BALEEN__V1__ROLE__ROLE_USER, "u"},
                {BALEEN__V1__ROLE__ROLE_ASSISTANT, NULL},
                {BALEEN__V1__ROLE__ROLE_TOOL, "3"},
                {BALEEN__V1__ROLE__ROLE_LATEST_REMINDER, "r"}};
    for (size_t i = 0; i < 5; i++) {
        baleen__v1__message__init(&m[i]);
        m[i].role = said[i].role;
        m[i].content = said[i].content;
        messages[i] = &m[i];
    }
    m[1].task = "title";
    m[2].reasoning_content = "why";
    m[2].n_tool_calls = 1;
    m[2].tool_calls = calls;
    m[2].has_prefix = true;
    m[3].tool_call_id = "c1";
    chat.request.n_messages = 5;
    chat.request.messages = messages;

    Baleen__V1__Tool tool = BALEEN__V1__TOOL__INIT, *tools[] = {&tool};
    tool.name = "add";
    tool.description = "adds";
    tool.parameters_json = "{\"type\":\"object\"}";
    tool.has_strict = true;
    chat.request.n_tools = 1;
    chat.request.tools = tools;
    chat.request.has_tool_mode = true;
    chat.request.tool_mode = BALEEN__V1__TOOL_MODE__TOOL_NAMED;
    chat.request.tool_name = "add";
    chat.request.has_parallel_tool_calls = true;
    chat.request.has_thinking = chat.request.has_effort = chat.request.has_drop_thinking = true;
    chat.request.thinking = BALEEN__V1__THINKING__THINKING_ENABLED;
    chat.request.effort = BALEEN__V1__EFFORT__EFFORT_XHIGH;
    chat.request.model = "nano";

    Baleen__V1__Sampling *s = &chat.sampling;
    Baleen__V1__LogitBias bias = BALEEN__V1__LOGIT_BIAS__INIT, *biases[] = {&bias};
    char *stop[] = {"a", "b"};
    uint32_t stop_ids[] = {5, 6};
    bias.token_id = 9;
    bias.bias = -1.5f;
    s->has_max_tokens = s->has_min_tokens = s->has_temperature = s->has_top_p = s->has_top_k = s->has_min_p =
        true;
    s->has_presence_penalty = s->has_frequency_penalty = s->has_repetition_penalty = s->has_seed = true;
    s->has_ignore_eos = s->has_include_stop = s->has_top_logprobs = true;
    s->max_tokens = 7;
    s->min_tokens = 2;
    s->temperature = 0.5f;
    s->top_p = 0.25f;
    s->top_k = 3;
    s->min_p = 0.125f;
    s->presence_penalty = 1;
    s->frequency_penalty = -1;
    s->repetition_penalty = 1.5f;
    s->seed = -77;
    s->ignore_eos = true;
    s->n_stop = 2;
    s->stop = stop;
    s->n_stop_token_ids = 2;
    s->stop_token_ids = stop_ids;
    s->n_logit_bias = 1;
    s->logit_bias = biases;
    s->top_logprobs = 4;
    s->constraint_case = BALEEN__V1__SAMPLING__CONSTRAINT_JSON_SCHEMA;
    s->json_schema = "{\"x\":1}";
    chat.routing.user_id = "me";
    chat.routing.has_priority = true;
    chat.routing.priority = -3;
    g.gateway.script = script_short;
    ask_and_wait(CHAT, &chat.request);
    assert_int_equal(g.c.code, PC_CODE_OK);

    const gw_stream *stream = &g.gateway.streams[0];
    assert_int_equal(stream->kind, GW_ASK_CHAT);
    assert_false(stream->want_ids);
    assert_true(stream->deadline_ms == UINT64_MAX);
    assert_json(
        stream->body,
        "{\"model\":\"nano\",\"messages\":["
        "{\"role\":\"system\",\"content\":\"s\"},{\"role\":\"user\",\"content\":\"u\",\"task\":\"title\"},"
        "{\"role\":\"assistant\",\"reasoning_content\":\"why\",\"prefix\":false,\"tool_calls\":[{\"id\":"
        "\"c1\","
        "\"type\":\"function\",\"function\":{\"name\":\"add\",\"arguments\":\"{}\"}}]},"
        "{\"role\":\"tool\",\"content\":\"3\",\"tool_call_id\":\"c1\"},"
        "{\"role\":\"latest_reminder\",\"content\":\"r\"}],"
        "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"add\",\"description\":\"adds\","
        "\"parameters\":{\"type\":\"object\"},\"strict\":false}}],"
        "\"tool_choice\":{\"type\":\"function\",\"function\":{\"name\":\"add\"}},\"parallel_tool_calls\":"
        "false,"
        "\"thinking\":{\"type\":\"enabled\"},\"reasoning_effort\":\"xhigh\","
        "\"chat_template_kwargs\":{\"drop_thinking\":false},"
        "\"max_tokens\":7,\"min_tokens\":2,\"temperature\":0.5,\"top_p\":0.25,\"top_k\":3,\"min_p\":0.125,"
        "\"presence_penalty\":1.0,\"frequency_penalty\":-1.0,\"repetition_penalty\":1.5,\"seed\":-77,"
        "\"ignore_eos\":true,\"include_stop_str_in_output\":false,\"stop\":[\"a\",\"b\"],\"stop_token_ids\":["
        "5,6],"
        "\"logit_bias\":{\"9\":-1.5},\"logprobs\":true,\"top_logprobs\":4,"
        "\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"response\",\"schema\":{"
        "\"x\":1}}},"
        "\"user_id\":\"me\",\"priority\":-3}");
}

static void test_chat_defaults(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    chat.request.sampling = NULL;
    chat.request.routing = NULL;
    g.gateway.script = script_short;
    ask_and_wait(CHAT, &chat.request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.c.n_messages, 3);
    assert_json(g.gateway.streams[0].body, "{\"messages\":[{\"role\":\"user\",\"content\":\"hello\"}]}");
    assert_int_equal(chat_event(1)->delta->n_token_ids, 0);
    assert_false(chat_event(2)->finish->has_stop_token_id);
    assert_null(chat_event(2)->finish->stop_string);
}

static void script_nul(gw_stream *stream)
{
    fake_started(stream);
    fake_piece(stream, MD_PIECE_CONTENT, 0, "a\0b", 3);
    fake_finish(stream, GW_REASON_LENGTH, NULL, -1);
}

/* protobuf-c would end the text at the NUL: looked for in the packed message. */
static void test_chat_text_with_nul(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    g.gateway.script = script_nul;
    ask_and_wait(CHAT, &chat.request);
    assert_int_equal(g.c.n_messages, 3);
    assert_int_equal(g.c.messages[1].len, 7);
    assert_memory_equal(g.c.messages[1].data,
                        "\x12\x05\x12\x03"
                        "a\0b",
                        7);
    assert_int_equal(chat_event(2)->finish->reason, BALEEN__V1__FINISH_REASON__FINISH_LENGTH);
}

static void test_chat_unknown_values(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    chat.message.role = BALEEN__V1__ROLE__ROLE_UNSPECIFIED;
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "messages[0].role");
    chat.message.role = (Baleen__V1__Role)99;
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "messages[0].role");
    simple_init(&chat);
    chat.request.has_tool_mode = true;
    chat.request.tool_mode = (Baleen__V1__ToolMode)9;
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "tool_mode");
    chat.request.tool_mode = BALEEN__V1__TOOL_MODE__TOOL_NAMED;
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "tool_name");
    simple_init(&chat);
    chat.request.has_thinking = true;
    chat.request.thinking = (Baleen__V1__Thinking)-1;
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "thinking");
    simple_init(&chat);
    chat.request.has_effort = true;
    chat.request.effort = (Baleen__V1__Effort)9;
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "effort");
    assert_int_equal(g.gateway.n_streams, 0);
}

static void test_chat_bad_fields(void **state)
{
    (void)state;
    char user[514];
    simple_chat chat;
    simple_init(&chat);
    chat.message.reasoning_content = "not mine";
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "messages[0].reasoning_content");
    simple_init(&chat);
    chat.message.tool_call_id = "c";
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "messages[0].tool_call_id");
    simple_init(&chat);
    chat.sampling.has_temperature = true;
    chat.sampling.temperature = NAN;
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "sampling.temperature");
    simple_init(&chat);
    chat.sampling.constraint_case = BALEEN__V1__SAMPLING__CONSTRAINT_GRAMMAR;
    chat.sampling.grammar = "root ::= x";
    expect_refused(CHAT, &chat.request, PC_CODE_UNIMPLEMENTED, "sampling.grammar");
    chat.sampling.constraint_case = BALEEN__V1__SAMPLING__CONSTRAINT_JSON_SCHEMA;
    chat.sampling.json_schema = "[1";
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "sampling.json_schema");
    simple_init(&chat);
    Baleen__V1__Tool tool = BALEEN__V1__TOOL__INIT, *tools[] = {&tool};
    tool.name = "f";
    tool.parameters_json = "[]";
    chat.request.n_tools = 1;
    chat.request.tools = tools;
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "tools[0].parameters_json");
    simple_init(&chat);
    memset(user, 'u', 513);
    user[513] = 0;
    chat.routing.user_id = user;
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "routing.user_id");
    assert_int_equal(g.gateway.n_streams, 0);
}

/* What no generated client would send: messages[1] = {role: USER, content: the last bytes}. */
static void test_requests_as_bytes(void **state)
{
    (void)state;
    static const char nul[] = "\x12\x02\x08\x03\x12\x07\x08\x03\x12\x03"
                              "a\0b";
    static const char broken[] = "\x12\x02\x08\x03\x12\x06\x08\x03\x12\x02\xc3(";
    static const char no_role[] = "\x12\x03\x12\x01x";
    expect_refused_bytes(CHAT, nul, sizeof(nul) - 1, PC_CODE_INVALID_ARGUMENT, "messages[1].content");
    expect_refused_bytes(CHAT, broken, sizeof(broken) - 1, PC_CODE_INVALID_ARGUMENT, "messages[1].content");
    expect_refused_bytes(CHAT, no_role, sizeof(no_role) - 1, PC_CODE_INVALID_ARGUMENT, "");
    expect_refused_bytes(CHAT, "garbage", 7, PC_CODE_INVALID_ARGUMENT, "");
    /* a field of tomorrow is ignored, also between others */
    static const char newer[] = "\x12\x02\x08\x03\xfa\x7f\x02\0\0";
    g.gateway.script = script_short;
    plain_fini(&g.p);
    plain_run(&g.p, g.loop, g.address, CHAT, newer, sizeof(newer) - 1);
    assert_int_equal(g.p.code, PC_CODE_OK);
}

/* ---- request ids, deadlines, ends ---- */

static void test_request_ids(void **state)
{
    (void)state;
    char id[130];
    cm_bytes packed;
    simple_chat chat;
    simple_init(&chat);
    chat.routing.request_id = "";
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "routing.request_id");
    chat.routing.request_id = "a b";
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "routing.request_id");
    memset(id, 'x', 129);
    id[129] = 0;
    chat.routing.request_id = id;
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "routing.request_id");
    id[128] = 0;
    cm_bytes_init(&packed, 0);
    pr_pack(&chat.request.base, &packed);
    g.gateway.script = script_short;
    plain_fini(&g.p);
    plain_run(&g.p, g.loop, g.address, CHAT, packed.data, packed.len);
    assert_int_equal(g.p.code, PC_CODE_OK);
    assert_string_equal(g.p.request_id, id);
    assert_int_equal(g.p.n_messages, 3);
    cm_bytes_clear(&packed);
    chat.routing.request_id = NULL;
    pr_pack(&chat.request.base, &packed);
    plain_fini(&g.p);
    plain_run(&g.p, g.loop, g.address, CHAT, packed.data, packed.len);
    assert_string_equal(g.p.request_id, "made-by-gateway");
    cm_bytes_fini(&packed);
}

static void test_duplicate_request_id(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    chat.routing.request_id = "one";
    g.gateway.script = script_start_only;
    ask(CHAT, &chat.request);
    until(c_has_one);
    expect_refused(CHAT, &chat.request, PC_CODE_ALREADY_EXISTS, "routing.request_id");
    pc_stream_cancel(g.c.stream);
    until(nothing_lives);
    assert_true(g.gateway.streams[0].cancelled);
}

static void test_deadline(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    g.gateway.script = script_start_only;
    client_ask(&g.c, g.channel, CHAT, &chat.request.base, 60000);
    until(c_has_one);
    /* on its way it is rounded up */
    assert_in_range(g.gateway.streams[0].deadline_ms, 1, 120000);
    client_ask(&g.other, g.channel, CHAT, &chat.request.base, 50);
    pc_stream_cancel(g.c.stream);
    until(both_are_closed);
    until(nothing_lives);
    assert_int_equal(g.c.code, PC_CODE_CANCELLED);
    assert_int_equal(g.other.code, PC_CODE_DEADLINE_EXCEEDED);
}

static void test_refused_with_retry(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    g.gateway.refuses = true;
    gw_error_set(&g.gateway.refusal, GW_CAUSE_CAPACITY, NULL, "too many, the client said %s",
                 "caf\xc3\xa9 \xf0\x9f\x98");
    g.gateway.refusal.retry_ms = 1250;
    expect_refused(CHAT, &chat.request, PC_CODE_RESOURCE_EXHAUSTED, "");
    assert_string_equal(g.p.text,
                        "too many, the client said caf\xc3\xa9 "); /* cut in a character: it is left out */
    assert_string_equal(g.p.retry, "1250");
    Google__Rpc__RetryInfo *retry = plain_detail(&g.p, &google__rpc__retry_info__descriptor, &g.arena);
    assert_non_null(retry);
    assert_int_equal(retry->retry_delay->seconds, 1);
    assert_int_equal(retry->retry_delay->nanos, 250000000);
    gw_error_set(&g.gateway.refusal, GW_CAUSE_INVALID, "reasoning_effort", "no");
    expect_refused(CHAT, &chat.request, PC_CODE_INVALID_ARGUMENT, "effort");
    assert_string_equal(g.p.retry, "");
    g.gateway.refuses = false;
    chat.request.model = "other";
    expect_refused(CHAT, &chat.request, PC_CODE_NOT_FOUND, "model");
}

static void script_fail_late(gw_stream *stream)
{
    fake_started(stream);
    fake_text(stream, "hi");
    fake_fail(stream, GW_CAUSE_UNAVAILABLE, "", 1000);
}

static void test_fails_after_messages(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    g.gateway.script = script_fail_late;
    ask_and_wait(CHAT, &chat.request);
    assert_int_equal(g.c.code, PC_CODE_UNAVAILABLE);
    assert_string_equal(g.c.text, "it failed on purpose");
    assert_int_equal(g.c.n_messages, 2);
}

static char g_block[64 << 10];

static void script_flood(gw_stream *stream)
{
    fake_started(stream);
    for (int i = 0; i < 32; i++) {
        fake_piece(stream, MD_PIECE_CONTENT, 0, g_block, sizeof(g_block));
    }
    assert_true(stream->cancelled);
}

static void test_slow_reader(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    memset(g_block, 'x', sizeof(g_block));
    g.gateway.script = script_flood;
    ask_and_wait(CHAT, &chat.request);
    assert_int_equal(g.c.code, PC_CODE_RESOURCE_EXHAUSTED);
    assert_non_null(strstr(g.c.text, "too slowly"));
    assert_int_equal(g.c.n_messages, 1 + 15); /* what was queued arrives */
}

enum { START_BYTES = 35, DELTA_BYTES = 8 }; /* packed; a delta's besides its text */

/* The stream has ended when its last message finds no room: nothing is left to cancel. */
static void script_flood_at_end(gw_stream *stream)
{
    fake_started(stream);
    for (int i = 0; i < 15; i++) {
        fake_piece(stream, MD_PIECE_CONTENT, 0, g_block, sizeof(g_block));
    }
    fake_piece(stream, MD_PIECE_CONTENT, 0, g_block,
               MIB - START_BYTES - 15 * (sizeof(g_block) + DELTA_BYTES) - DELTA_BYTES - 10);
    fake_finish(stream, GW_REASON_STOP, NULL, -1);
    assert_false(stream->cancelled);
}

static void test_slow_reader_at_the_end(void **state)
{
    (void)state;
    simple_chat chat;
    simple_init(&chat);
    memset(g_block, 'x', sizeof(g_block));
    g.gateway.script = script_flood_at_end;
    ask_and_wait(CHAT, &chat.request);
    assert_int_equal(g.c.code, PC_CODE_RESOURCE_EXHAUSTED);
    assert_int_equal(g.c.n_messages, 17);
}

/* ---- ChatJson ---- */

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

static void test_json_streamed(void **state)
{
    (void)state;
    Baleen__V1__ChatJsonRequest request;
    Baleen__V1__Routing routing = BALEEN__V1__ROUTING__INIT;
    json_request(&request, "{\"stream\":true,\"user_id\":\"body\",\"priority\":1}");
    routing.request_id = "json-1";
    routing.user_id = "routing";
    request.routing = &routing;
    g.gateway.script = script_short;
    ask_and_wait(CHAT_JSON, &request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.c.n_messages, 4);
    check_chunk(0, "{\"start\":1}", false);
    check_chunk(1, "hi", false);
    check_chunk(2, "{\"finish\":1}", false);
    check_chunk(3, "{\"usage\":1}", true);
    assert_string_equal(g.gateway.streams[0].id, "json-1");
    assert_json(g.gateway.streams[0].body, "{\"stream\":true,\"user_id\":\"routing\",\"priority\":1}");
}

static void script_long(gw_stream *stream)
{
    fake_started(stream);
    for (int i = 0; i < 40; i++) {
        fake_piece(stream, MD_PIECE_CONTENT, 0, g_block, sizeof(g_block));
    }
    fake_finish(stream, GW_REASON_STOP, NULL, -1);
}

static void test_json_whole(void **state)
{
    (void)state;
    Baleen__V1__ChatJsonRequest request;
    json_request(&request, "{\"messages\":[]}");
    memset(g_block, 'y', sizeof(g_block));
    g.gateway.script = script_long;
    ask_and_wait(CHAT_JSON, &request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.c.n_messages, 1); /* one message is never too long for the queue */
    Baleen__V1__ChatJsonChunk *chunk = message(&g.c, 0, &baleen__v1__chat_json_chunk__descriptor);
    assert_int_equal(chunk->json.len, 40 * sizeof(g_block));
    assert_true(chunk->last);
}

/* Three answers: each a stream of its own number, objects as they come, one end. */
static void test_json_choices(void **state)
{
    (void)state;
    Baleen__V1__ChatJsonRequest request;
    Baleen__V1__Routing routing = BALEEN__V1__ROUTING__INIT;
    json_request(&request, "{\"stream\":true,\"n\":3}");
    routing.request_id = "three";
    request.routing = &routing;
    g.gateway.script = script_short;
    ask_and_wait(CHAT_JSON, &request);
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.gateway.n_streams, 3);
    for (uint32_t i = 0; i < 3; i++) {
        char text[8];
        snprintf(text, sizeof(text), "%uhi", i);
        assert_int_equal(g.gateway.streams[i].choice, i);
        check_chunk(2 * i, "{\"start\":1}", false);
        check_chunk(2 * i + 1, text, false);
    }
    assert_string_equal(g.gateway.streams[0].id, "three");
    assert_int_equal(g.c.n_messages, 8);
    check_chunk(7, "{\"usage\":1}", true);
}

static void script_fail_second(gw_stream *stream)
{
    fake_started(stream);
    if (stream->choice == 1) {
        fake_fail(stream, GW_CAUSE_UNAVAILABLE, "", 0);
    }
}

static void test_json_choice_fails(void **state)
{
    (void)state;
    Baleen__V1__ChatJsonRequest request;
    json_request(&request, "{\"n\":3}");
    g.gateway.script = script_fail_second;
    ask_and_wait(CHAT_JSON, &request);
    assert_int_equal(g.c.code, PC_CODE_UNAVAILABLE);
    assert_true(g.gateway.streams[0].cancelled && g.gateway.streams[2].cancelled);
    g.gateway.refuses_choice = 2; /* refused when two are open */
    gw_error_set(&g.gateway.refusal, GW_CAUSE_CAPACITY, NULL, "full");
    expect_refused(CHAT_JSON, &request, PC_CODE_RESOURCE_EXHAUSTED, "");
    assert_true(g.gateway.streams[3].cancelled && g.gateway.streams[4].cancelled);
    json_request(&request, "{\"n\":5}");
    expect_refused(CHAT_JSON, &request, PC_CODE_UNIMPLEMENTED, "n");
}

static void script_finish_first(gw_stream *stream)
{
    fake_started(stream);
    if (stream->choice == 0) {
        fake_finish(stream, GW_REASON_STOP, NULL, -1);
    }
}

static bool second_started(void)
{
    return g.gateway.n_streams == 2 && g.gateway.n_live == 1;
}

/* The request's id is its first answer's; it still ends the request when that answer is complete. */
static void test_json_abort_after_first(void **state)
{
    (void)state;
    Baleen__V1__ChatJsonRequest request;
    Baleen__V1__Routing routing = BALEEN__V1__ROUTING__INIT;
    Baleen__V1__AbortRequest abort_request = BALEEN__V1__ABORT_REQUEST__INIT;
    char *ids[] = {"two"};
    json_request(&request, "{\"n\":2}");
    routing.request_id = "two";
    request.routing = &routing;
    g.gateway.script = script_finish_first;
    ask(CHAT_JSON, &request);
    until(second_started);
    abort_request.n_request_ids = 1;
    abort_request.request_ids = ids;
    client_ask(&g.other, g.channel, ABORT, &abort_request.base, 0);
    until(both_are_closed);
    assert_int_equal(g.c.code, PC_CODE_ABORTED);
    assert_int_equal(g.other.code, PC_CODE_OK);
}

static void test_json_bad(void **state)
{
    (void)state;
    Baleen__V1__ChatJsonRequest request;
    json_request(&request, "{\"stream\":");
    expect_refused(CHAT_JSON, &request, PC_CODE_INVALID_ARGUMENT, "body");
    json_request(&request, "");
    expect_refused(CHAT_JSON, &request, PC_CODE_INVALID_ARGUMENT, "body");
    json_request(&request, "[]");
    expect_refused(CHAT_JSON, &request, PC_CODE_INVALID_ARGUMENT, "body");
    json_request(&request, "{\"model\":\"other\"}");
    expect_refused(CHAT_JSON, &request, PC_CODE_NOT_FOUND, "model");
    g.gateway.refuses = true; /* names of the body stay as they are */
    gw_error_set(&g.gateway.refusal, GW_CAUSE_INVALID, "temperature", "no");
    json_request(&request, "{}");
    expect_refused(CHAT_JSON, &request, PC_CODE_INVALID_ARGUMENT, "temperature");
    uint8_t *big = cm_alloc(33 * MIB);
    request.body = (ProtobufCBinaryData){.data = big, .len = 32 * MIB + 1};
    expect_refused(CHAT_JSON, &request, PC_CODE_RESOURCE_EXHAUSTED, "body");
    cm_free(big);
}

/* ---- Generate ---- */

static void script_generate(gw_stream *stream)
{
    fake_started(stream);
    fake_token(stream, 0, 20);
    fake_flush(stream); /* text is held back */
    fake_token(stream, 1, 21);
    fake_token(stream, 2, 22);
    fake_text(stream, "one");
    fake_flush(stream);
    fake_flush(stream); /* nothing new */
    fake_text(stream, " late");
    fake_flush(stream);
    fake_token(stream, 3, 23);
    fake_text(stream, " end");
    fake_finish(stream, GW_REASON_LENGTH, NULL, -1);
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

static void check_generate_ends(uint32_t n_messages)
{
    assert_int_equal(g.c.code, PC_CODE_OK);
    assert_int_equal(g.c.n_messages, n_messages);
    Baleen__V1__GenerateEvent *first = message(&g.c, 0, &baleen__v1__generate_event__descriptor);
    Baleen__V1__GenerateEvent *last = message(&g.c, n_messages - 1, &baleen__v1__generate_event__descriptor);
    assert_int_equal(first->event_case, BALEEN__V1__GENERATE_EVENT__EVENT_START);
    assert_int_equal(first->start->prompt_tokens, 11);
    assert_int_equal(first->start->cached_tokens, 4);
    assert_int_equal(last->event_case, BALEEN__V1__GENERATE_EVENT__EVENT_FINISH);
    assert_int_equal(last->finish->reason, BALEEN__V1__FINISH_REASON__FINISH_LENGTH);
    check_usage(last->finish->usage);
}

static void test_generate_from_text(void **state)
{
    (void)state;
    Baleen__V1__GenerateRequest request = BALEEN__V1__GENERATE_REQUEST__INIT;
    request.prompt_case = BALEEN__V1__GENERATE_REQUEST__PROMPT_TEXT;
    request.text = "Once";
    g.gateway.script = script_generate;
    ask_and_wait(GENERATE, &request);
    check_generate_ends(6);
    check_tokens(1, 0, 1, 20, NULL);
    check_tokens(2, 1, 2, 21, "one");
    check_tokens(3, 3, 0, 0, " late");
    check_tokens(4, 3, 1, 23, " end");
    assert_int_equal(g.gateway.streams[0].kind, GW_ASK_COMPLETE);
    assert_true(g.gateway.streams[0].want_ids);
    assert_true(g.gateway.streams[0].skip_special);
    assert_json(g.gateway.streams[0].body, "{\"prompt\":\"Once\"}");
}

static void test_generate_from_ids(void **state)
{
    (void)state;
    Baleen__V1__GenerateRequest request = BALEEN__V1__GENERATE_REQUEST__INIT;
    Baleen__V1__TokenIds tokens = BALEEN__V1__TOKEN_IDS__INIT;
    Baleen__V1__Sampling sampling = BALEEN__V1__SAMPLING__INIT;
    uint32_t ids[] = {0, 5, 300};
    tokens.n_ids = 3;
    tokens.ids = ids;
    request.prompt_case = BALEEN__V1__GENERATE_REQUEST__PROMPT_TOKENS;
    request.tokens = &tokens;
    sampling.has_top_logprobs = true;
    request.sampling = &sampling;
    request.has_skip_special_tokens = true;
    g.gateway.script = script_generate;
    ask_and_wait(GENERATE, &request);
    check_generate_ends(5);
    check_tokens(1, 0, 1, 20, NULL);
    check_tokens(2, 1, 2, 21, NULL);
    check_tokens(3, 3, 1, 23, NULL);
    assert_false(g.gateway.streams[0].skip_special);
    assert_json(g.gateway.streams[0].body, "{\"prompt\":[0,5,300],\"logprobs\":0}");
}

static void test_generate_whole(void **state)
{
    (void)state;
    Baleen__V1__GenerateRequest request = BALEEN__V1__GENERATE_REQUEST__INIT;
    request.prompt_case = BALEEN__V1__GENERATE_REQUEST__PROMPT_TEXT;
    request.text = "Once";
    request.has_stream = true;
    g.gateway.script = script_generate;
    ask_and_wait(GENERATE, &request);
    check_generate_ends(3);
    check_tokens(1, 0, 4, 20, "one late end");
}

static void test_generate_logprobs(void **state)
{
    (void)state;
    Baleen__V1__GenerateRequest request = BALEEN__V1__GENERATE_REQUEST__INIT;
    request.prompt_case = BALEEN__V1__GENERATE_REQUEST__PROMPT_TEXT;
    request.text = "Once";
    g.gateway.script = script_logprobs;
    ask_and_wait(GENERATE, &request);
    Baleen__V1__GenerateEvent *event = message(&g.c, 1, &baleen__v1__generate_event__descriptor);
    assert_int_equal(event->tokens->n_ids, 2);
    assert_int_equal(event->tokens->n_logprobs, 2); /* one per id */
    check_logprob(event->tokens->logprobs[0], 100, -1, 2);
    check_logprob(event->tokens->logprobs[1], 200, -2, 0);
    event = message(&g.c, 2, &baleen__v1__generate_event__descriptor);
    assert_int_equal(event->tokens->n_logprobs, 1);
    check_logprob(event->tokens->logprobs[0], 300, -3, 1);
}

static void test_generate_bad(void **state)
{
    (void)state;
    Baleen__V1__GenerateRequest request = BALEEN__V1__GENERATE_REQUEST__INIT;
    expect_refused(GENERATE, &request, PC_CODE_INVALID_ARGUMENT, "prompt");
    request.prompt_case = BALEEN__V1__GENERATE_REQUEST__PROMPT_TEXT;
    request.text = "Once";
    request.has_resume_offset = true; /* of which stream? */
    expect_refused(GENERATE, &request, PC_CODE_INVALID_ARGUMENT, "routing.request_id");
    assert_int_equal(g.gateway.n_streams, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        RIG_TEST(test_chat_events),
        RIG_TEST(test_chat_logprobs),
        RIG_TEST(test_chat_body),
        RIG_TEST(test_chat_defaults),
        RIG_TEST(test_chat_text_with_nul),
        RIG_TEST(test_chat_unknown_values),
        RIG_TEST(test_chat_bad_fields),
        RIG_TEST(test_requests_as_bytes),
        RIG_TEST(test_request_ids),
        RIG_TEST(test_duplicate_request_id),
        RIG_TEST(test_deadline),
        RIG_TEST(test_refused_with_retry),
        RIG_TEST(test_fails_after_messages),
        RIG_TEST(test_slow_reader),
        RIG_TEST(test_slow_reader_at_the_end),
        RIG_TEST(test_json_streamed),
        RIG_TEST(test_json_whole),
        RIG_TEST(test_json_choices),
        RIG_TEST(test_json_choice_fails),
        RIG_TEST(test_json_abort_after_first),
        RIG_TEST(test_json_bad),
        RIG_TEST(test_generate_from_text),
        RIG_TEST(test_generate_from_ids),
        RIG_TEST(test_generate_whole),
        RIG_TEST(test_generate_logprobs),
        RIG_TEST(test_generate_bad),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
