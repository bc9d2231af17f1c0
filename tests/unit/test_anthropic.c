/* The Anthropic surface: events to exact objects, bodies to chat bodies, errors in its own words. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "gateway/anthropic_body.h"
#include "tests/unit/surface_sink.h"

#define STREAM "{\"stream\":true,\"max_tokens\":3}"
#define WHOLE  "{\"max_tokens\":3}"

#define USAGE(output, thinking)                                                                              \
    "\"usage\":{\"input_tokens\":3,\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":1,"         \
    "\"output_tokens\":" output ",\"output_tokens_details\":{\"thinking_tokens\":" thinking "}}"
#define MESSAGE_START                                                                                        \
    "{\"type\":\"message_start\",\"message\":{\"type\":\"message\",\"id\":\"r1\",\"role\":\"assistant\","    \
    "\"model\":\"m\",\"content\":[],\"stop_reason\":null,\"stop_sequence\":null," USAGE("0", "0") "}}"
#define PING "{\"type\":\"ping\"}"
#define BLOCK_START(index, block)                                                                            \
    "{\"type\":\"content_block_start\",\"index\":" index ",\"content_block\":" block "}"
#define THINKING_BLOCK "{\"type\":\"thinking\",\"thinking\":\"\",\"signature\":\"\"}"
#define TEXT_BLOCK     "{\"type\":\"text\",\"text\":\"\"}"
#define TOOL_BLOCK(index, name)                                                                              \
    "{\"type\":\"tool_use\",\"id\":\"toolu_#" index "\",\"name\":\"" name "\",\"input\":{}}"
#define DELTA(index, type, key, text)                                                                        \
    "{\"type\":\"content_block_delta\",\"index\":" index ",\"delta\":{\"type\":\"" type "_delta\",\"" key    \
    "\":\"" text "\"}}"
#define BLOCK_STOP(index) "{\"type\":\"content_block_stop\",\"index\":" index "}"
#define MESSAGE_DELTA(reason, sequence)                                                                      \
    "{\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"" reason "\",\"stop_sequence\":" sequence      \
    "}," USAGE("3", "2") "}"
#define MESSAGE_STOP "{\"type\":\"message_stop\"}"
#define MESSAGE(content, reason, sequence)                                                                   \
    "{\"type\":\"message\",\"id\":\"r1\",\"role\":\"assistant\",\"model\":\"m\",\"content\":[" content       \
    "],\"stop_reason\":\"" reason "\",\"stop_sequence\":" sequence "," USAGE("3", "2") "}"

/* ---- events ---- */

static void thinking_then_text(void **state)
{
    (void)state;
    sink s;
    sink_open(&s, &gw_surface_messages, STREAM);
    sink_start(&s);
    sink_piece(&s, MD_PIECE_REASONING, 0, "hm \"so\"");
    sink_piece(&s, MD_PIECE_REASONING, 0, "\n!");
    sink_piece(&s, MD_PIECE_CONTENT, 0, "\xe4\xbd\xa0");
    sink_piece(&s, MD_PIECE_CONTENT, 0, "b");
    sink_finish(&s, GW_REASON_STOP, NULL, NULL);
    SINK_EXPECT(&s, MESSAGE_START, PING, BLOCK_START("0", THINKING_BLOCK),
                DELTA("0", "thinking", "thinking", "hm \\\"so\\\""),
                DELTA("0", "thinking", "thinking", "\\n!"), DELTA("0", "signature", "signature", "#0"),
                BLOCK_STOP("0"), BLOCK_START("1", TEXT_BLOCK), DELTA("1", "text", "text", "\xe4\xbd\xa0"),
                DELTA("1", "text", "text", "b"), BLOCK_STOP("1"), MESSAGE_DELTA("end_turn", "null"),
                MESSAGE_STOP);
    sink_close(&s);
}

static void parallel_tools(void **state)
{
    (void)state;
    sink s;
    sink_open(&s, &gw_surface_messages, STREAM);
    sink_start(&s);
    sink_piece(&s, MD_PIECE_CONTENT, 0, "Calling.");
    sink_piece(&s, MD_PIECE_CALL, 0, "f");
    sink_piece(&s, MD_PIECE_ARGS, 0, "{\"a\": ");
    sink_piece(&s, MD_PIECE_ARGS, 0, "1}");
    sink_piece(&s, MD_PIECE_CALL, 1, "g");
    sink_piece(&s, MD_PIECE_ARGS, 1, "{}");
    sink_finish(&s, GW_REASON_TOOL_CALLS, NULL, NULL);
    SINK_EXPECT(&s, MESSAGE_START, PING, BLOCK_START("0", TEXT_BLOCK), DELTA("0", "text", "text", "Calling."),
                BLOCK_STOP("0"), BLOCK_START("1", TOOL_BLOCK("1", "f")),
                DELTA("1", "input_json", "partial_json", "{\\\"a\\\": "),
                DELTA("1", "input_json", "partial_json", "1}"), BLOCK_STOP("1"),
                BLOCK_START("2", TOOL_BLOCK("2", "g")), DELTA("2", "input_json", "partial_json", "{}"),
                BLOCK_STOP("2"), MESSAGE_DELTA("tool_use", "null"), MESSAGE_STOP);
    sink_close(&s);
}

/* Thinking that begins again is a block of its own. */
static void thinking_again(void **state)
{
    (void)state;
    sink s;
    sink_open(&s, &gw_surface_messages, STREAM);
    sink_start(&s);
    sink_piece(&s, MD_PIECE_CONTENT, 0, "a");
    sink_piece(&s, MD_PIECE_REASONING, 0, "b");
    sink_finish(&s, GW_REASON_STOP, NULL, NULL);
    SINK_EXPECT(&s, MESSAGE_START, PING, BLOCK_START("0", TEXT_BLOCK), DELTA("0", "text", "text", "a"),
                BLOCK_STOP("0"), BLOCK_START("1", THINKING_BLOCK), DELTA("1", "thinking", "thinking", "b"),
                DELTA("1", "signature", "signature", "#1"), BLOCK_STOP("1"),
                MESSAGE_DELTA("end_turn", "null"), MESSAGE_STOP);
    sink_close(&s);
}

static void ends(void **state)
{
    (void)state;
    static const struct {
        const char *given;
        gw_reason reason;
        const char *stop, *wanted;
    } cases[] = {
        {STREAM, GW_REASON_STOP, NULL, MESSAGE_DELTA("end_turn", "null")},
        {STREAM, GW_REASON_STOP, "\"x", MESSAGE_DELTA("stop_sequence", "\"\\\"x\"")},
        {STREAM, GW_REASON_LENGTH, NULL, MESSAGE_DELTA("max_tokens", "null")},
        {STREAM, GW_REASON_TOOL_CALLS, NULL, MESSAGE_DELTA("tool_use", "null")},
        /* fewer than were asked for: it was the context that ended */
        {"{\"stream\":true,\"max_tokens\":4}", GW_REASON_LENGTH, NULL,
         MESSAGE_DELTA("model_context_window_exceeded", "null")},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        sink s;
        sink_open(&s, &gw_surface_messages, cases[i].given);
        sink_start(&s);
        sink_finish(&s, cases[i].reason, cases[i].stop, NULL);
        SINK_EXPECT(&s, MESSAGE_START, PING, cases[i].wanted, MESSAGE_STOP);
        sink_close(&s);
    }
}

static void whole(void **state)
{
    (void)state;
    sink s;
    sink_open(&s, &gw_surface_messages, WHOLE);
    sink_start(&s);
    sink_piece(&s, MD_PIECE_REASONING, 0, "r");
    sink_piece(&s, MD_PIECE_REASONING, 0, "2");
    sink_piece(&s, MD_PIECE_CONTENT, 0, "c");
    sink_piece(&s, MD_PIECE_CALL, 0, "f");
    sink_piece(&s, MD_PIECE_ARGS, 0, "{\"b\": [1,");
    sink_piece(&s, MD_PIECE_ARGS, 0, " 2], \"a\": 1.0}");
    sink_finish(&s, GW_REASON_TOOL_CALLS, NULL, NULL);
    SINK_EXPECT(&s, MESSAGE("{\"type\":\"thinking\",\"thinking\":\"r2\",\"signature\":\"#0\"},"
                            "{\"type\":\"text\",\"text\":\"c\"},"
                            "{\"type\":\"tool_use\",\"id\":\"toolu_#2\",\"name\":\"f\",\"input\":"
                            "{\"b\": [1, 2], \"a\": 1.0}}",
                            "tool_use", "null"));
    sink_close(&s);

    sink_open(&s, &gw_surface_messages, WHOLE);
    sink_start(&s);
    sink_finish(&s, GW_REASON_STOP, "END", NULL);
    SINK_EXPECT(&s, MESSAGE("", "stop_sequence", "\"END\""));
    sink_close(&s);
}

/* An input is an object, whatever the model wrote. */
static void broken_inputs(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"", "{}"},
        {"{\"a\": \"cut o", "{\"arguments\":\"{\\\"a\\\": \\\"cut o\"}"},
        {"[1]", "{\"arguments\":\"[1]\"}"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char wanted[900];
        sink s;
        sink_open(&s, &gw_surface_messages, WHOLE);
        sink_start(&s);
        sink_piece(&s, MD_PIECE_CALL, 0, "f");
        if (cases[i][0][0] != 0) {
            sink_piece(&s, MD_PIECE_ARGS, 0, cases[i][0]);
        }
        sink_finish(&s, GW_REASON_LENGTH, NULL, NULL);
        snprintf(wanted, sizeof(wanted), "%s%s%s",
                 "{\"type\":\"message\",\"id\":\"r1\",\"role\":\"assistant\",\"model\":\"m\",\"content\":["
                 "{\"type\":\"tool_use\",\"id\":\"toolu_#0\",\"name\":\"f\",\"input\":",
                 cases[i][1],
                 "}],\"stop_reason\":\"max_tokens\",\"stop_sequence\":null," USAGE("3", "2") "}");
        SINK_EXPECT(&s, wanted);
        sink_close(&s);
    }
}

/* ---- bodies ---- */

#define MESSAGES "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]"
#define BODY     "\"max_tokens\":9," MESSAGES

/* wanted: a part of the chat body; given with all that a body needs. */
static void bodies(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"{\"model\":\"nano\"," BODY "}", "{\"model\":\"nano\",\"max_tokens\":9," MESSAGES "}"},
        {"{\"model\":\"claude-haiku-4-5\"," BODY "}", "{\"max_tokens\":9," MESSAGES "}"},
        {"{" BODY ",\"stop_sequences\":[\"a\"],\"temperature\":0.5,\"top_p\":0.5,\"top_k\":3,\"seed\":7,"
         "\"stream\":true,\"metadata\":{\"user_id\":\"u\"}}",
         "{\"stop\":[\"a\"],\"temperature\":0.5,\"top_p\":0.5,\"top_k\":3,\"seed\":7,\"stream\":true,"
         "\"user_id\":\"u\"}"},
        {"{" BODY ",\"container\":1,\"mcp_servers\":[],\"context_management\":{},\"service_tier\":\"auto\"}",
         "{" MESSAGES "}"},
        {"{" BODY
         ",\"system\":[{\"type\":\"text\",\"text\":\"s\",\"cache_control\":{\"type\":\"ephemeral\"}},"
         "{\"type\":\"text\",\"text\":\"t\"}]}",
         "{\"messages\":[{\"role\":\"system\",\"content\":[{\"type\":\"text\",\"text\":\"s\",\"cache_"
         "control\":"
         "{\"type\":\"ephemeral\"}},{\"type\":\"text\",\"text\":\"t\"}]},{\"role\":\"user\",\"content\":"
         "\"x\"}]}"},
        {"{" BODY ",\"thinking\":{\"type\":\"enabled\",\"budget_tokens\":1024},\"output_config\":"
         "{\"effort\":\"max\"}}",
         "{\"thinking\":{\"type\":\"enabled\"},\"reasoning_effort\":\"max\"}"},
        {"{" BODY ",\"thinking\":{\"type\":\"adaptive\"}}", "{\"thinking\":{\"type\":\"enabled\"}}"},
        {"{" BODY ",\"thinking\":{\"type\":\"disabled\"}}", "{\"thinking\":{\"type\":\"disabled\"}}"},
        {"{" BODY ",\"tools\":[{\"name\":\"f\",\"description\":\"d\",\"input_schema\":{\"type\":\"object\"},"
         "\"cache_control\":{}}],\"tool_choice\":{\"type\":\"auto\",\"disable_parallel_tool_use\":true}}",
         "{\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"description\":\"d\","
         "\"parameters\":"
         "{\"type\":\"object\"}}}],\"tool_choice\":\"auto\",\"parallel_tool_calls\":false}"},
        {"{" BODY ",\"tool_choice\":{\"type\":\"any\"}}", "{\"tool_choice\":\"required\"}"},
        {"{" BODY ",\"tool_choice\":{\"type\":\"none\"}}", "{\"tool_choice\":\"none\"}"},
        {"{" BODY ",\"tool_choice\":{\"type\":\"tool\",\"name\":\"f\"}}",
         "{\"tool_choice\":{\"type\":\"function\",\"function\":{\"name\":\"f\"}}}"},
        {"{" BODY
         ",\"output_config\":{\"format\":{\"type\":\"json_schema\",\"schema\":{\"type\":\"object\"}}}}",
         "{\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"schema\":{\"type\":\"object\"}}}"
         "}"},
        {"{\"max_tokens\":9,\"messages\":[{\"role\":\"user\",\"content\":\"q\"},{\"role\":\"assistant\","
         "\"content\":[{\"type\":\"thinking\",\"thinking\":\"r\",\"signature\":\"s\"},{\"type\":\"text\","
         "\"text\":\"t\"},{\"type\":\"tool_use\",\"id\":\"a\",\"name\":\"f\",\"input\":{\"z\":1,\"b\":2}}]},"
         "{\"role\":\"user\",\"content\":[{\"type\":\"tool_result\",\"tool_use_id\":\"a\",\"is_error\":true,"
         "\"content\":[{\"type\":\"text\",\"text\":\"no\"}]},{\"type\":\"text\",\"text\":\"go\"}]}]}",
         "{\"messages\":[{\"role\":\"user\",\"content\":\"q\"},{\"role\":\"assistant\",\"reasoning_content\":"
         "\"r\",\"content\":\"t\",\"tool_calls\":[{\"type\":\"function\",\"id\":\"a\",\"function\":{\"name\":"
         "\"f\",\"arguments\":{\"z\":1,\"b\":2}}}]},{\"role\":\"tool\",\"tool_call_id\":\"a\",\"content\":"
         "[{\"type\":\"text\",\"text\":\"no\"}]},{\"role\":\"user\",\"content\":\"go\"}]}"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        json_t *given = json_loads(cases[i][0], 0, NULL), *wanted = json_loads(cases[i][1], 0, NULL);
        json_t *body, *value;
        const char *name;
        gw_error error = {0};
        assert_non_null(given);
        assert_non_null(wanted);
        if (gw_anthropic_body(given, &body, &error) != CM_OK) {
            fail_msg("%s: %s", cases[i][0], error.message);
        }
        json_object_foreach(wanted, name, value)
        {
            if (!json_equal(json_object_get(body, name), value)) {
                char *got = json_dumps(json_object_get(body, name), JSON_ENCODE_ANY);
                fail_msg("%s: %s is %s", cases[i][0], name, got);
            }
        }
        if (i == 1) {
            assert_null(json_object_get(body, "model")); /* every claude is the model that is served */
        }
        json_decref(body);
        json_decref(wanted);
        json_decref(given);
    }
}

/* Which field, where: as the client wrote it. */
static void bodies_refused(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"{" MESSAGES "}", "max_tokens"},
        {"{\"max_tokens\":9}", "messages"},
        {"{\"max_tokens\":9,\"messages\":[]}", "messages"},
        {"{\"max_tokens\":9,\"messages\":[{\"role\":\"user\"}]}", "messages[0].content"},
        {"{\"max_tokens\":9,\"system\":\"s\",\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":"
         "\"text\"}]}]}",
         "messages[0].content[0]"},
        {"{\"max_tokens\":9,\"messages\":[{\"role\":\"user\",\"content\":[\"x\"]}]}",
         "messages[0].content[0]"},
        {"{\"max_tokens\":9,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"tool_result\","
         "\"content\":"
         "5}]}]}",
         "messages[0].content[0].content"},
        {"{\"max_tokens\":9,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image\"}]}]}",
         "messages"},
        {"{\"max_tokens\":9,\"messages\":[{\"role\":\"wizard\",\"content\":\"x\"}]}", "messages"},
        {"{" BODY ",\"system\":5}", "system"},
        {"{" BODY ",\"system\":[{\"type\":\"text\"}]}", "system[0]"},
        /* where the client put it: the system's message does not count */
        {"{" BODY ",\"system\":[{\"type\":\"text\",\"text\":\"s\"},{\"type\":\"image\"}]}", "system[1]"},
        {"{\"max_tokens\":9,\"system\":\"s\",\"messages\":[{\"role\":\"system\",\"content\":[{\"type\":"
         "\"image\"}]}]}",
         "messages[0].content[0]"},
        {"{\"max_tokens\":9,\"system\":\"s\",\"messages\":[{\"role\":\"assistant\",\"content\":[{\"type\":"
         "\"tool_use\","
         "\"name\":\"f\",\"input\":5}]}]}",
         "messages[0].content[0].input"},
        {"{" BODY ",\"tools\":{}}", "tools"},
        {"{" BODY ",\"tools\":[{\"name\":\"f\"}]}", "tools"},
        {"{" BODY ",\"tool_choice\":{\"type\":\"maybe\"}}", "tool_choice"},
        {"{" BODY ",\"tool_choice\":{\"type\":\"tool\"}}", "tool_choice"},
        {"{" BODY ",\"tool_choice\":\"auto\"}", "tool_choice"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        json_t *given = json_loads(cases[i][0], 0, NULL), *body;
        gw_error error = {0};
        assert_non_null(given);
        assert_int_equal(gw_anthropic_body(given, &body, &error), CM_E_INVALID);
        if (error.cause != GW_CAUSE_INVALID || strcmp(error.param, cases[i][1]) != 0) {
            fail_msg("%s: about '%s': %s", cases[i][0], error.param, error.message);
        }
        assert_non_null(strstr(error.message, cases[i][1]));
        json_decref(given);
    }
}

/* ---- errors ---- */

static void errors(void **state)
{
    (void)state;
    static const struct {
        gw_cause cause;
        int http;
        const char *type;
    } rows[] = {
        {GW_CAUSE_INVALID, 400, "invalid_request_error"},
        {GW_CAUSE_BAD_JSON, 400, "invalid_request_error"},
        {GW_CAUSE_UNSUPPORTED, 400, "invalid_request_error"},
        {GW_CAUSE_MODEL_NOT_FOUND, 404, "not_found_error"},
        {GW_CAUSE_NO_ROUTE, 404, "not_found_error"},
        {GW_CAUSE_NO_STREAM, 404, "not_found_error"},
        {GW_CAUSE_METHOD, 405, "invalid_request_error"},
        {GW_CAUSE_TOO_LARGE, 413, "request_too_large"},
        {GW_CAUSE_SLOW_READER, 429, "rate_limit_error"},
        {GW_CAUSE_INTERNAL, 500, "api_error"},
        {GW_CAUSE_DEADLINE, 504, "timeout_error"},
        {GW_CAUSE_CAPACITY, 529, "overloaded_error"},
        {GW_CAUSE_UNAVAILABLE, 529, "overloaded_error"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        char wanted[200];
        cm_bytes out;
        gw_error error;
        cm_bytes_init(&out, 0);
        gw_error_set(&error, rows[i].cause, "field", "a \"word\"");
        gw_anthropic_error(&error, "q1", &out);
        snprintf(wanted, sizeof(wanted),
                 "{\"type\":\"error\",\"error\":{\"type\":\"%s\",\"message\":\"a "
                 "\\\"word\\\"\"},\"request_id\":\"q1\"}",
                 rows[i].type);
        sink_expect_text(&out, wanted);
        assert_int_equal(gw_error_anthropic_http(&error), rows[i].http);
    }
}

/* Clients know this one by how it begins. */
static void prompt_too_long(void **state)
{
    (void)state;
    cm_bytes out;
    gw_error error;
    cm_bytes_init(&out, 0);
    gw_error_set(&error, GW_CAUSE_CONTEXT, "messages", "too many");
    gw_anthropic_error(&error, NULL, &out);
    sink_expect_text(&out, "{\"type\":\"error\",\"error\":{\"type\":\"invalid_request_error\",\"message\":"
                           "\"prompt is too long: too many\"},\"request_id\":null}");
    cm_bytes_init(&out, 0);
    error.tokens = 12;
    error.tokens_max = 10;
    gw_anthropic_error(&error, NULL, &out);
    sink_expect_text(&out, "{\"type\":\"error\",\"error\":{\"type\":\"invalid_request_error\",\"message\":"
                           "\"prompt is too long: 12 tokens > 10 maximum\"},\"request_id\":null}");
}

static void own_words(void **state)
{
    (void)state;
    gw_error error;
    gw_error_set(&error, GW_CAUSE_INVALID, "stop", "stop must be a string");
    gw_surface_own_words(&gw_surface_messages, &error);
    assert_string_equal(error.param, "stop_sequences");
    assert_string_equal(error.message, "stop_sequences must be a string");
    gw_error_set(&error, GW_CAUSE_INVALID, "stop_token_ids", "stop_token_ids must be a list");
    gw_surface_own_words(&gw_surface_messages, &error);
    assert_string_equal(error.message, "stop_token_ids must be a list");
    gw_error_set(&error, GW_CAUSE_INVALID, "messages[1].role", "messages[1].role must be one");
    gw_surface_own_words(&gw_surface_responses, &error);
    assert_string_equal(error.param, "input[1].role");
    assert_string_equal(error.message, "input[1].role must be one");
    gw_surface_own_words(&gw_surface_chat, &error);
    assert_string_equal(error.param, "input[1].role");
}

static void keep_alive(void **state)
{
    (void)state;
    sink s;
    cm_bytes out;
    cm_bytes_init(&out, 0);
    sink_open(&s, &gw_surface_messages, STREAM);
    s.surface->writer.keep_alive(s.writer, &out);
    sink_expect_text(&out, PING);
    sink_close(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(thinking_then_text),
        cmocka_unit_test(parallel_tools),
        cmocka_unit_test(thinking_again),
        cmocka_unit_test(ends),
        cmocka_unit_test(whole),
        cmocka_unit_test(broken_inputs),
        cmocka_unit_test(bodies),
        cmocka_unit_test(bodies_refused),
        cmocka_unit_test(errors),
        cmocka_unit_test(prompt_too_long),
        cmocka_unit_test(own_words),
        cmocka_unit_test(keep_alive),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
