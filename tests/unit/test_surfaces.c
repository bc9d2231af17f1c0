/* Anthropic Messages and OpenAI Responses over HTTP, as clients see them, from token ids to bytes; the router
 * and the coordinator are scripts (gateway_rig). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/stats.h"
#include "gateway/surface.h"
#include "tests/unit/gateway_rig.h"

#define GOING_ON  BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON
#define STOP      BALEEN__ENGINE__V1__SEQ_END__SEQ_STOP
#define LENGTH    BALEEN__ENGINE__V1__SEQ_END__SEQ_LENGTH
#define MESSAGES  "/v1/messages"
#define RESPONSES "/v1/responses"
#define CLOSE     "Connection: close\r\n"

#define D                                                                                                    \
    "\xef\xbd\x9c"                                                                                           \
    "DSML"                                                                                                   \
    "\xef\xbd\x9c"
#define CALLS(text)              "\n\n<" D "tool_calls>\n" text "\n</" D "tool_calls>"
#define INVOKE(name, parameters) "<" D "invoke name=\"" name "\">\n" parameters "\n</" D "invoke>"
#define PARAMETER(name, string, value)                                                                       \
    "<" D "parameter name=\"" name "\" string=\"" string "\">" value "</" D "parameter>"

#define TOOLS_CHAT                                                                                           \
    ",\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}},"                                     \
    "{\"type\":\"function\",\"function\":{\"name\":\"g\"}}]"
#define TOOLS_MESSAGES                                                                                       \
    ",\"tools\":[{\"name\":\"f\",\"input_schema\":{\"type\":\"object\"}},"                                   \
    "{\"name\":\"g\",\"input_schema\":{\"type\":\"object\"}}]"
#define TOOLS_RESPONSES                                                                                      \
    ",\"tools\":[{\"type\":\"function\",\"name\":\"f\"},{\"type\":\"custom\",\"name\":\"g\"}]"

#define RESUMABLE           ",\"stream_options\":{\"resumable\":true}"
#define ASK_CHAT(more)      "{" USER("x") more "}"
#define ASK_MESSAGES(more)  "{\"max_tokens\":200," USER("x") more "}"
#define ASK_RESPONSES(more) "{\"input\":\"x\"" more "}"

#define A_TURN                                                                                               \
    "hm, caf\xc3\xa9</think>Calling." CALLS(                                                                 \
        INVOKE("f", PARAMETER("s", "true", "a\"b\n<c>") "\n" PARAMETER("n", "false", "[1, 2]")) "\n" INVOKE( \
            "g", PARAMETER("input", "true", "t")))

/* ---- events ---- */

enum { EVENTS_MAX = 256 };

typedef struct events {
    uint32_t n;
    char id[EVENTS_MAX][80], name[EVENTS_MAX][64]; /* "" when it has none */
    cm_bytes data[EVENTS_MAX];
} events;

static void read_events(const rig_client *client, events *out)
{
    cm_bytes body;
    memset(out, 0, sizeof(*out));
    cm_bytes_init(&body, 0);
    rig_body(client, &body);
    cm_bytes_append(&body, "", 1);
    for (char *line = strtok((char *)body.data, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        assert_in_range(out->n, 0, EVENTS_MAX - 1);
        if (strncmp(line, "id: ", 4) == 0) {
            snprintf(out->id[out->n], sizeof(out->id[0]), "%s", line + 4);
        } else if (strncmp(line, "event: ", 7) == 0) {
            snprintf(out->name[out->n], sizeof(out->name[0]), "%s", line + 7);
        } else if (strncmp(line, "data: ", 6) == 0) {
            cm_bytes_init(&out->data[out->n], 0);
            cm_bytes_append_text(&out->data[out->n++], line + 6);
        }
    }
    cm_bytes_fini(&body);
}

static void events_free(events *e)
{
    for (uint32_t i = 0; i < e->n; i++) {
        cm_bytes_fini(&e->data[i]);
    }
}

static const char *data_of(const events *e, uint32_t i)
{
    return cm_bytes_text(&e->data[i]);
}

/* The values of one field of all events of a name, joined. */
static const char *joined(const events *e, const char *name, const char *path)
{
    static char out[4000];
    out[0] = 0;
    for (uint32_t i = 0; i < e->n; i++) {
        json_t *event = json_loads(data_of(e, i), 0, NULL);
        const json_t *value = strcmp(e->name[i], name) == 0 ? rig_at(event, path) : NULL;
        if (json_is_string(value)) {
            strncat(out, json_string_value(value), sizeof(out) - strlen(out) - 1);
        }
        json_decref(event);
    }
    return out;
}

static json_t *event_at(const events *e, uint32_t i)
{
    return json_loads(data_of(e, i), 0, NULL);
}

/* ---- statuses ---- */

/* Of the interfaces that DeepSeek's own service has, a wrong value; of nothing else. */
static void wrong_values_are_422(void **state)
{
    (void)state;
    static const struct {
        const char *path, *body;
        int status;
    } cases[] = {
        {CHAT, "{\"temperature\":\"warm\"," USER("x") "}", 422},
        {CHAT, "{\"messages\":[{\"role\":\"wizard\",\"content\":\"x\"}]}", 422},
        {"/v1/completions", "{\"prompt\":5}", 422},
        {RESPONSES, "{\"input\":5}", 422},
        {RESPONSES, "{\"input\":\"x\",\"top_p\":2}", 422},
        {MESSAGES, "{\"max_tokens\":0," USER("x") "}", 400},
        {MESSAGES "/count_tokens", "{\"messages\":5}", 400},
        {CHAT, "{", 400},
        {CHAT, "{\"n\":1,\"model\":\"other-than-this\"," USER("x") "}", 404},
        {RESPONSES, "{\"input\":\"x\",\"background\":true}", 400},
    };
    rig_set("invalid_status", "422");
    rig_ready();
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        int status;
        json_t *reply = rig_ask("POST", cases[i].path, cases[i].body, &status);
        if (status != cases[i].status) {
            fail_msg("%s %s: %d", cases[i].path, cases[i].body, status);
        }
        assert_string_equal(rig_text_at(reply, "error.type"), "invalid_request_error");
        json_decref(reply);
    }
}

/* ---- what streams are ---- */

static void messages_stream(void **state)
{
    (void)state;
    static events e;
    rig_ready();
    rig_reply_control(A_TURN);
    rig_client *client =
        rig_open("POST", "/anthropic/v1/messages/?beta=true",
                 CLOSE "anthropic-version: 2023-06-01\r\nanthropic-beta: a-1,b-2\r\n",
                 "{\"model\":\"claude-x\",\"max_tokens\":200,\"stream\":true," USER("x") TOOLS_MESSAGES "}");
    rig_wait_closed(client);
    assert_int_equal(rig_status(client), 200);
    assert_true(rig_header_is(client, "Content-Type", "text/event-stream; charset=utf-8"));
    assert_true(rig_header_is(client, "request-id", NULL));
    read_events(client, &e);
    assert_string_equal(e.name[0], "message_start");
    assert_string_equal(e.name[1], "ping");
    assert_string_equal(e.name[e.n - 1], "message_stop");
    assert_string_equal(joined(&e, "content_block_delta", "delta.thinking"), "hm, caf\xc3\xa9");
    assert_string_equal(joined(&e, "content_block_delta", "delta.text"), "Calling.");
    assert_string_equal(joined(&e, "content_block_delta", "delta.partial_json"),
                        "{\"s\": \"a\\\"b\\n<c>\", \"n\": [1, 2]}{\"input\": \"t\"}");
    assert_string_equal(joined(&e, "content_block_start", "content_block.name"), "fg");
    json_t *start = event_at(&e, 0), *delta = event_at(&e, e.n - 2);
    assert_int_equal(strncmp(rig_text_at(start, "message.id"), "msg_", 4), 0);
    assert_string_equal(rig_text_at(start, "message.model"), "nano");
    assert_int_equal(rig_int_at(start, "message.usage.input_tokens"), R.prompt.n);
    assert_string_equal(rig_text_at(delta, "delta.stop_reason"), "tool_use");
    assert_int_equal(rig_int_at(delta, "usage.output_tokens"), R.n_reply);
    json_decref(delta);
    json_decref(start);
    events_free(&e);
    rig_close(client);
}

static void responses_stream(void **state)
{
    (void)state;
    static events e;
    rig_ready();
    rig_reply_control(A_TURN);
    rig_client *client = rig_open("POST", "/responses", CLOSE,
                                  "{\"model\":\"nano\",\"input\":\"x\",\"stream\":true" TOOLS_RESPONSES "}");
    rig_wait_closed(client);
    assert_int_equal(rig_status(client), 200);
    read_events(client, &e);
    for (uint32_t i = 0; i < e.n; i++) {
        json_t *event = event_at(&e, i);
        assert_string_equal(rig_text_at(event, "type"), e.name[i]);
        assert_int_equal(rig_int_at(event, "sequence_number"), i);
        json_decref(event);
    }
    assert_string_equal(e.name[0], "response.created");
    assert_string_equal(e.name[1], "response.in_progress");
    assert_string_equal(e.name[e.n - 1], "response.completed"); /* and no [DONE] */
    assert_string_equal(joined(&e, "response.reasoning_text.delta", "delta"), "hm, caf\xc3\xa9");
    assert_string_equal(joined(&e, "response.output_text.delta", "delta"), "Calling.");
    assert_string_equal(joined(&e, "response.function_call_arguments.delta", "delta"),
                        "{\"s\": \"a\\\"b\\n<c>\", \"n\": [1, 2]}");
    assert_string_equal(joined(&e, "response.custom_tool_call_input.done", "input"), "t");
    json_t *last = event_at(&e, e.n - 1);
    assert_int_equal(strncmp(rig_text_at(last, "response.id"), "resp_", 5), 0);
    assert_string_equal(rig_text_at(last, "response.output.0.content.0.text"), "hm, caf\xc3\xa9");
    assert_string_equal(rig_text_at(last, "response.output.1.content.0.text"), "Calling.");
    assert_string_equal(rig_text_at(last, "response.output.2.name"), "f");
    assert_string_equal(rig_text_at(last, "response.output.3.type"), "custom_tool_call");
    assert_int_equal(rig_int_at(last, "response.usage.output_tokens"), R.n_reply);
    json_decref(last);
    events_free(&e);
    rig_close(client);
}

/* ---- the same events, however they come ---- */

static const struct {
    const char *path, *body;
} SURFACES[] = {
    {CHAT, ASK_CHAT(",\"stream\":true" RESUMABLE TOOLS_CHAT)},
    {MESSAGES, ASK_MESSAGES(",\"stream\":true" RESUMABLE TOOLS_MESSAGES)},
    {RESPONSES, ASK_RESPONSES(",\"stream\":true" RESUMABLE TOOLS_RESPONSES)},
};
enum { N_SURFACES = sizeof(SURFACES) / sizeof(SURFACES[0]) };

/* All of the reply for the newest sequence, step ids a frame. */
static void say_all(uint32_t step)
{
    for (uint32_t at = 0; at < R.n_reply; at += step) {
        uint32_t n = R.n_reply - at < step ? R.n_reply - at : step;
        rig_tokens(at, R.reply + at, n, at + n < R.n_reply ? GOING_ON : STOP);
    }
}

static bool has_resumed(void *arg)
{
    return R.n_resumes >= *(uint32_t *)arg;
}

/* The stream is told again from its first token on; the client has the events up to last_id. */
static void come_back(const char *id, uint32_t at, uint32_t n_resumes, uint32_t step, events *out)
{
    char path[120], headers[160];
    snprintf(path, sizeof(path), "/v1/streams/%s", id);
    snprintf(headers, sizeof(headers), CLOSE "Last-Event-ID: %s:%u\r\n", id, at);
    rig_client *client = rig_open("GET", path, at > 0 ? headers : CLOSE, NULL);
    rig_until(has_resumed, &n_resumes);
    say_all(step);
    rig_wait_closed(client);
    assert_int_equal(rig_status(client), 200);
    read_events(client, out);
    rig_close(client);
}

static void same_events(void **state)
{
    (void)state;
    static events first, whole, rest;
    uint32_t n_resumes = 0;
    rig_ready();
    rig_reply_control(A_TURN);
    for (size_t s = 0; s < N_SURFACES; s++) {
        char id[80];
        R.mode = RIG_HOLD;
        R.keeps = false;
        rig_client *client = rig_open("POST", SURFACES[s].path, CLOSE, SURFACES[s].body);
        rig_wait_text(client, "\n\n");
        say_all(1);
        rig_wait_closed(client);
        read_events(client, &first);
        rig_close(client);
        snprintf(id, sizeof(id), "%.*s", (int)strcspn(first.id[0], ":"), first.id[0]);
        R.keeps = true;
        R.n_found = 1;
        come_back(id, 0, ++n_resumes, R.n_reply, &whole); /* all in one frame */
        assert_int_equal(first.n, whole.n);
        for (uint32_t at = 0; at < whole.n; at += whole.n / 7) {
            come_back(id, at, ++n_resumes, 1 + at % 5, &rest);
            assert_int_equal(rest.n, whole.n - at);
            for (uint32_t i = 0; i < rest.n; i++) {
                assert_string_equal(data_of(&rest, i), data_of(&whole, at + i));
                assert_string_equal(data_of(&rest, i), data_of(&first, at + i));
                assert_string_equal(rest.name[i], whole.name[at + i]);
                assert_string_equal(rest.id[i], first.id[at + i]);
            }
            events_free(&rest);
        }
        events_free(&first);
        events_free(&whole);
    }
    assert_int_equal(cm_stat_get(CM_STAT_ledger_streams), 0);
}

/* ---- ends ---- */

static void ends(void **state)
{
    (void)state;
    static const struct {
        const char *path, *body, *at, *wanted, *more_at, *more;
    } rows[] = {
        {MESSAGES, ASK_MESSAGES(",\"stop_sequences\":[\" two\"]," NO_THINKING), "stop_reason",
         "stop_sequence", "stop_sequence", " two"},
        {MESSAGES, "{\"max_tokens\":2," NO_THINKING "," USER("x") "}", "stop_reason", "max_tokens",
         "content.0.text", "one t"},
        {MESSAGES, ASK_MESSAGES("," NO_THINKING), "stop_reason", "end_turn", "content.0.text",
         "one two three"},
        {RESPONSES, ASK_RESPONSES(",\"max_output_tokens\":2," NO_THINKING), "status", "incomplete",
         "incomplete_details.reason", "max_output_tokens"},
        {RESPONSES, ASK_RESPONSES("," NO_THINKING), "status", "completed", "output.0.content.0.text",
         "one two three"},
    };
    rig_ready();
    rig_reply("one two three");
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        int status;
        json_t *reply = rig_ask("POST", rows[i].path, rows[i].body, &status);
        assert_int_equal(status, 200);
        assert_string_equal(rig_text_at(reply, rows[i].at), rows[i].wanted);
        assert_string_equal(rig_text_at(reply, rows[i].more_at), rows[i].more);
        json_decref(reply);
    }
}

/* One call was asked for: the answer ends before a second one, and the router is told. */
static void one_call(void **state)
{
    (void)state;
    static const struct {
        const char *path, *body, *reason_at, *reason, *first, *second;
    } rows[] = {
        {CHAT, ASK_CHAT(",\"parallel_tool_calls\":false" TOOLS_CHAT), "choices.0.finish_reason", "tool_calls",
         "choices.0.message.tool_calls.0.function.name", "choices.0.message.tool_calls.1"},
        {MESSAGES,
         ASK_MESSAGES(
             ",\"tool_choice\":{\"type\":\"auto\",\"disable_parallel_tool_use\":true}" TOOLS_MESSAGES),
         "stop_reason", "tool_use", "content.2.name", "content.3"},
        {RESPONSES, ASK_RESPONSES(",\"parallel_tool_calls\":false" TOOLS_RESPONSES), "status", "completed",
         "output.2.name", "output.3"},
    };
    rig_ready();
    rig_reply_control(A_TURN);
    R.mode = RIG_HOLD;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        rig_client *client = rig_open("POST", rows[i].path, CLOSE, rows[i].body);
        rig_wait_opens((uint32_t)i + 1);
        rig_tokens(0, R.reply, R.n_reply, GOING_ON);
        rig_wait_closed(client);
        rig_wait_cancels((uint32_t)i + 1);
        cm_bytes body;
        cm_bytes_init(&body, 0);
        rig_body(client, &body);
        json_t *reply = json_loads(cm_bytes_text(&body), 0, NULL);
        assert_string_equal(rig_text_at(reply, rows[i].reason_at), rows[i].reason);
        assert_string_equal(rig_text_at(reply, rows[i].first), "f");
        assert_null(rig_at(reply, rows[i].second));
        json_decref(reply);
        cm_bytes_fini(&body);
        rig_close(client);
    }
}

/* ---- what a model gets wrong (encoding 8.3) ---- */

static void put_part(cm_bytes *out, const char *word, const char *text)
{
    if (text != NULL && text[0] != 0) {
        cm_bytes_printf(out, "%s(%s)", word, text);
    }
}

static void put_json(cm_bytes *out, const char *name, const json_t *value)
{
    char *text = json_is_string(value) ? strdup(json_string_value(value)) : json_dumps(value, 0);
    cm_bytes_printf(out, "%s%s", name, text);
    free(text);
}

static void spell_chat(const json_t *reply, cm_bytes *out)
{
    const json_t *message = rig_at(reply, "choices.0.message"),
                 *calls = json_object_get(message, "tool_calls");
    put_part(out, "R", json_string_value(json_object_get(message, "reasoning_content")));
    put_part(out, "T", json_string_value(json_object_get(message, "content")));
    for (size_t i = 0; i < json_array_size(calls); i++) {
        const json_t *call = json_array_get(calls, i);
        put_json(out, rig_text_at(call, "function.name"), rig_at(call, "function.arguments"));
    }
    cm_bytes_printf(out, " %s", rig_text_at(reply, "choices.0.finish_reason"));
}

static void spell_messages(const json_t *reply, cm_bytes *out)
{
    const json_t *content = json_object_get(reply, "content");
    for (size_t i = 0; i < json_array_size(content); i++) {
        const json_t *block = json_array_get(content, i);
        put_part(out, "R", json_string_value(json_object_get(block, "thinking")));
        put_part(out, "T", json_string_value(json_object_get(block, "text")));
        if (json_object_get(block, "input") != NULL) {
            put_json(out, rig_text_at(block, "name"), json_object_get(block, "input"));
        }
    }
    cm_bytes_printf(out, " %s", rig_text_at(reply, "stop_reason"));
}

static void spell_responses(const json_t *reply, cm_bytes *out)
{
    const json_t *output = json_object_get(reply, "output");
    for (size_t i = 0; i < json_array_size(output); i++) {
        const json_t *item = json_array_get(output, i);
        bool reasoning = strcmp(rig_text_at(item, "type"), "reasoning") == 0;
        put_part(out, reasoning ? "R" : "T", json_string_value(rig_at(item, "content.0.text")));
        if (json_object_get(item, "arguments") != NULL) {
            put_json(out, rig_text_at(item, "name"), json_object_get(item, "arguments"));
        }
    }
    cm_bytes_printf(out, " %s", rig_text_at(reply, "status"));
}

static void malformed(void **state)
{
    (void)state;
    typedef void (*spell_fn)(const json_t *reply, cm_bytes *out);
    static const struct {
        const char *path, *body;
        spell_fn spell;
    } surfaces[] = {
        {CHAT, ASK_CHAT(TOOLS_CHAT), spell_chat},
        {MESSAGES, ASK_MESSAGES(TOOLS_MESSAGES), spell_messages},
        {RESPONSES, ASK_RESPONSES(",\"tools\":[{\"type\":\"function\",\"name\":\"f\"}]"), spell_responses},
    };
    static const struct {
        const char *said, *chat, *messages, *responses;
    } rows[] = {
        {"only thoughts", "R(only thoughts) stop", "R(only thoughts) end_turn", "R(only thoughts) completed"},
        {"r</think>a<think>b</think>c", "R(rb)T(ac) stop", "R(r)T(a)R(b)T(c) end_turn",
         "R(r)T(a)R(b)T(c) completed"},
        {"r</think></think>x", "R(r)T(x) stop", "R(r)T(x) end_turn", "R(r)T(x) completed"},
        {"r</think>\n\n<" D "tool_calls>\nnothing", "R(r) stop", "R(r) end_turn", "R(r) completed"},
        {"r\n\n<" D "tool_calls>\n<" D "invoke name=\"f\">\n</" D "invoke>\n", "R(r)f{} tool_calls",
         "R(r)f{} tool_use", "R(r)f{} completed"},
        {"r</think>\n\n<" D "tool_calls>\n<" D "invoke name=\"f", "R(r) stop", "R(r) end_turn",
         "R(r) completed"},
        {"r</think>\n\n<" D "tool_calls>\n<" D "invoke name=\"f\">\n<" D
         "parameter name=\"a\" string=\"true\">cut o",
         "R(r)f{\"a\": \"cut o tool_calls", "R(r)f{\"arguments\": \"{\\\"a\\\": \\\"cut o\"} tool_use",
         "R(r)f{\"a\": \"cut o completed"},
        {"r</think>" CALLS(INVOKE("f", PARAMETER("a", "false", "no json"))),
         "R(r)f{\"a\": \"no json\"} tool_calls", "R(r)f{\"a\": \"no json\"} tool_use",
         "R(r)f{\"a\": \"no json\"} completed"},
        {"r</think>" CALLS(INVOKE("unknown", PARAMETER("a", "false", "1"))),
         "R(r)unknown{\"a\": 1} tool_calls", "R(r)unknown{\"a\": 1} tool_use",
         "R(r)unknown{\"a\": 1} completed"},
        {"r</think>x" CALLS(INVOKE("f", "")) "after", "R(r)T(x)f{} tool_calls", "R(r)T(x)f{} tool_use",
         "R(r)T(x)f{} completed"},
    };
    rig_ready();
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        const char *const wanted[] = {rows[i].chat, rows[i].messages, rows[i].responses};
        rig_reply_control(rows[i].said);
        for (size_t s = 0; s < 3; s++) {
            int status;
            cm_bytes spelled;
            cm_bytes_init(&spelled, 0);
            json_t *reply = rig_ask("POST", surfaces[s].path, surfaces[s].body, &status);
            assert_int_equal(status, 200);
            surfaces[s].spell(reply, &spelled);
            assert_string_equal(cm_bytes_text(&spelled), wanted[s]);
            cm_bytes_fini(&spelled);
            json_decref(reply);
        }
    }
}

/* ---- errors ---- */

static void refused(void **state)
{
    (void)state;
    static const struct {
        const char *path, *body;
        int status;
        const char *type, *word; /* the error's type, and what its sentence speaks of */
    } rows[] = {
        {MESSAGES, "{", 400, "invalid_request_error", "not valid JSON"},
        {MESSAGES, "[]", 400, "invalid_request_error", "JSON object"},
        {MESSAGES, "{" USER("x") "}", 400, "invalid_request_error", "max_tokens"},
        {MESSAGES, "{\"max_tokens\":0," USER("x") "}", 400, "invalid_request_error", "max_tokens"},
        {MESSAGES, ASK_MESSAGES(",\"stop_sequences\":5"), 400, "invalid_request_error",
         "stop_sequences must be"},
        {MESSAGES, ASK_MESSAGES(",\"temperature\":3"), 400, "invalid_request_error", "temperature"},
        {MESSAGES, ASK_MESSAGES(",\"output_config\":{\"effort\":\"hard\"}"), 400, "invalid_request_error",
         "output_config.effort must be"},
        {MESSAGES, ASK_MESSAGES(",\"model\":\"gpt-5\""), 404, "not_found_error", "gpt-5"},
        {"/anthropic/v1/messages", ASK_MESSAGES(",\"model\":\"gpt-5\""), 404, "not_found_error", "gpt-5"},
        {"/v1/messages/batches", "{}", 404, "not_found_error", "/v1/messages/batches"},
        {"/v1/messages/count_tokens", "{\"messages\":[]}", 400, "invalid_request_error", "messages"},
        {"/v1/messages/count_tokens", "{\"model\":\"gpt-5\"," USER("x") "}", 404, "not_found_error", "gpt-5"},
        {RESPONSES, "{", 400, "invalid_request_error", "not valid JSON"},
        {RESPONSES, "{}", 400, "invalid_request_error", "input"},
        {RESPONSES, ASK_RESPONSES(",\"max_output_tokens\":0"), 400, "invalid_request_error",
         "max_output_tokens"},
        {RESPONSES, ASK_RESPONSES(",\"reasoning\":{\"effort\":\"hard\"}"), 400, "invalid_request_error",
         "reasoning.effort must be"},
        {RESPONSES, ASK_RESPONSES(",\"model\":\"gpt-5\""), 404, "invalid_request_error", "gpt-5"},
        {RESPONSES, ASK_RESPONSES(",\"previous_response_id\":\"r\""), 400, "invalid_request_error",
         "previous_response_id"},
        {"/v1/responses/resp_1", "{}", 404, "invalid_request_error", "/v1/responses/resp_1"},
    };
    rig_ready();
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        int status;
        bool anthropic = strstr(rows[i].path, "messages") != NULL;
        json_t *reply = rig_ask("POST", rows[i].path, rows[i].body, &status);
        if (status != rows[i].status || strcmp(rig_text_at(reply, "error.type"), rows[i].type) != 0 ||
            strstr(rig_text_at(reply, "error.message"), rows[i].word) == NULL) {
            fail_msg("%s %s: %d %s: %s", rows[i].path, rows[i].body, status, rig_text_at(reply, "error.type"),
                     rig_text_at(reply, "error.message"));
        }
        assert_string_equal(rig_text_at(reply, "type"), anthropic ? "error" : "(none)");
        assert_true(anthropic == json_is_string(json_object_get(reply, "request_id")));
        json_decref(reply);
    }
    assert_int_equal(R.n_opens, 0);
}

/* A real status while nothing was sent, in the numbers of each surface. */
static void router_refuses(void **state)
{
    (void)state;
    static const struct {
        cm_status cause;
        int messages, responses;
        const char *type, *code;
        bool retry;
    } causes[] = {
        {CM_E_CAPACITY, 529, 429, "overloaded_error", "rate_limit_exceeded", true},
        {CM_E_DEADLINE, 504, 504, "timeout_error", "deadline_exceeded", false},
        {CM_E_UNAVAILABLE, 529, 503, "overloaded_error", "unavailable", true},
        {CM_E_DEVICE, 500, 500, "api_error", "internal_error", false},
    };
    rig_ready();
    R.mode = RIG_REFUSE;
    for (size_t i = 0; i < sizeof(causes) / sizeof(causes[0]); i++) {
        R.refuse_status = causes[i].cause;
        rig_client *client = rig_open("POST", MESSAGES, CLOSE, ASK_MESSAGES(",\"stream\":true"));
        rig_wait_closed(client);
        assert_int_equal(rig_status(client), causes[i].messages);
        assert_non_null(strstr(cm_bytes_text(&client->in), causes[i].type));
        assert_true(rig_header_is(client, "retry-after", NULL) == causes[i].retry);
        rig_close(client);
        client = rig_open("POST", RESPONSES, CLOSE, ASK_RESPONSES(",\"stream\":true"));
        rig_wait_closed(client);
        assert_int_equal(rig_status(client), causes[i].responses);
        assert_non_null(strstr(cm_bytes_text(&client->in), causes[i].code));
        assert_true(rig_header_is(client, "retry-after", NULL) == causes[i].retry);
        rig_close(client);
    }
}

/* After the status: the surface's own last event, without an id. */
static void fails_on_the_way(void **state)
{
    (void)state;
    static const struct {
        const char *path, *body, *event, *at, *wanted;
    } rows[] = {
        {MESSAGES, ASK_MESSAGES(",\"stream\":true"), "error", "error.type", "api_error"},
        {RESPONSES, ASK_RESPONSES(",\"stream\":true"), "response.failed", "response.error.code", "aborted"},
    };
    rig_ready();
    rig_reply("one two");
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        static events e;
        R.mode = RIG_HOLD;
        rig_client *client = rig_open("POST", rows[i].path, CLOSE, rows[i].body);
        rig_wait_text(client, "\n\n");
        rig_tokens(0, R.reply, 1, GOING_ON);
        rig_wait_text(client, "one");
        gw_tenant *everybody;
        gw_error none;
        assert_int_equal(gw_gateway_identify(R.gateway, NULL, NULL, &everybody, &none), CM_OK);
        assert_int_equal(gw_stream_abort_all(R.gateway, everybody), 1);
        rig_wait_closed(client);
        read_events(client, &e);
        json_t *last = event_at(&e, e.n - 1);
        assert_string_equal(e.name[e.n - 1], rows[i].event);
        assert_string_equal(e.id[e.n - 1], "");
        assert_string_equal(rig_text_at(last, rows[i].at), rows[i].wanted);
        json_decref(last);
        events_free(&e);
        rig_close(client);
    }
}

/* ---- keep-alives ---- */

static void keep_alive(void **state)
{
    (void)state;
    static const struct {
        const char *path, *body, *between, *beat;
    } rows[] = {
        {MESSAGES, ASK_MESSAGES(",\"stream\":true"), "event: ping\ndata: {\"type\":\"ping\"}\n\n\r\n",
         "ping"},
        {RESPONSES, ASK_RESPONSES(",\"stream\":true"),
         "\nevent: response.in_progress\ndata:", "response.in_progress"},
    };
    rig_set("keep_alive_ms", "10");
    rig_ready();
    rig_reply("ok");
    R.mode = RIG_HOLD;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        static events e;
        uint32_t n_beats = 0;
        rig_client *client = rig_open("POST", rows[i].path, CLOSE, rows[i].body);
        rig_wait_text(client, rows[i].between);
        rig_wait_text(client, "\r\nevent: "); /* a chunk that begins with no id */
        rig_tokens(0, R.reply, R.n_reply, STOP);
        rig_wait_closed(client);
        read_events(client, &e);
        uint32_t n = 0;
        for (uint32_t k = 0; k < e.n; k++) {
            n_beats += e.id[k][0] == 0;
            assert_true(e.id[k][0] != 0 || strcmp(e.name[k], rows[i].beat) == 0);
            if (e.id[k][0] != 0) {
                assert_int_equal(atoi(strrchr(e.id[k], ':') + 1), ++n);
            }
        }
        assert_true(n_beats > 0);
        events_free(&e);
        rig_close(client);
    }
}

/* Nothing has begun that an event could be about, and the client waits all the same. */
static void keep_alive_while_queued(void **state)
{
    (void)state;
    static const struct {
        const char *path, *body, *beat, *error;
    } rows[] = {
        {RESPONSES, ASK_RESPONSES(",\"stream\":true"),
         ":2\nevent: response.in_progress\n", /* with an id; the next one is a beat */
         "event: response.failed\ndata: {\"type\":\"response.failed\",\"sequence_number\":2,"},
        {MESSAGES, ASK_MESSAGES(",\"stream\":true"), ": keep-alive\n\n",
         "event: error\ndata: {\"type\":\"error\",\"error\":"},
    };
    rig_set("keep_alive_ms", "10");
    rig_ready();
    R.mode = RIG_MUTE;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        gw_tenant *everybody;
        gw_error none;
        rig_client *client = rig_open("POST", rows[i].path, CLOSE, rows[i].body);
        rig_wait_text(client, rows[i].beat);
        rig_wait_text(client, i == 0 ? "\r\nevent: response.in_progress" : ": keep-alive\n\n");
        assert_int_equal(gw_gateway_identify(R.gateway, NULL, NULL, &everybody, &none), CM_OK);
        assert_int_equal(gw_stream_abort_all(R.gateway, everybody), 1);
        rig_wait_closed(client);
        assert_int_equal(rig_status(client), 200);
        assert_non_null(strstr(cm_bytes_text(&client->in), rows[i].error));
        rig_close(client);
    }
}

/* ---- memory ---- */

/* A writer lives as long as its answer, and a prompt may be many megabytes: it keeps none of it. */
static void writers_keep_no_prompt(void **state)
{
    (void)state;
    static const char *const rows[][2] = {
        {"http chat", "messages"},      {"http completion", "prompt"},      {"http messages", "messages"},
        {"http responses", "input"},    {"http infer", "input_ids"},        {"http infer chat", "messages"},
        {"http generate", "input_ids"}, {"http generate chat", "messages"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        const gw_surface *surface = gw_surface_find(rows[i][0]);
        bool kserve = strncmp(rows[i][0], "http infer", 10) == 0 || strncmp(rows[i][0], "http gen", 8) == 0;
        json_t *prompt = json_pack("[s]", "[]");
        json_t *given = kserve ? json_pack("{s:b, s:{s:O}}", "stream", 1, "inputs", rows[i][1], prompt)
                               : json_pack("{s:b, s:O}", "stream", 1, rows[i][1], prompt);
        void *writer = surface->writer.create(given, "fp_0", NULL, NULL);
        json_decref(given);
        if (prompt->refcount != 1) {
            fail_msg("%s keeps %s", rows[i][0], rows[i][1]);
        }
        surface->writer.destroy(writer);
        json_decref(prompt);
    }
}

/* ---- the rest ---- */

/* The prompt that is counted is the prompt that is generated from. */
static void counted(void **state)
{
    (void)state;
    int status;
    rig_ready();
    rig_reply("ok");
#define COUNTED                                                                                              \
    "\"system\":[{\"type\":\"text\",\"text\":\"s\",\"cache_control\":{}}]," USER("x") TOOLS_MESSAGES
    json_t *count = rig_ask("POST", "/v1/messages/count_tokens?beta=true",
                            "{\"model\":\"claude-x\"," COUNTED "}", &status);
    assert_int_equal(status, 200);
    assert_int_equal(R.n_opens, 0);
    json_t *reply = rig_ask("POST", MESSAGES, "{\"max_tokens\":5," COUNTED "}", &status);
    assert_int_equal(rig_int_at(count, "input_tokens"), R.prompt.n);
    assert_int_equal(rig_int_at(reply, "usage.input_tokens"), R.prompt.n);
    json_decref(count);
    json_decref(reply);
}

/* What we say at once, however long, is not the client's slowness. */
static void long_bursts(void **state)
{
    (void)state;
    static events e;
    cm_bytes body;
    rig_set("slow_reader_bytes", "16000");
    rig_ready();
    rig_reply("one two three");
    cm_bytes_init(&body, 0);
    cm_bytes_append_text(&body, "{\"input\":\"x\",\"stream\":true,\"instructions\":\"");
    for (int i = 0; i < 1000; i++) {
        cm_bytes_append_text(&body, "0123456789");
    }
    cm_bytes_append_text(&body, "\"}");
    rig_client *client = rig_open("POST", RESPONSES, CLOSE, cm_bytes_text(&body));
    rig_wait_closed(client);
    read_events(client, &e);
    assert_string_equal(e.name[e.n - 1], "response.completed");
    events_free(&e);
    rig_close(client);
    cm_bytes_fini(&body);
}

static void models(void **state)
{
    (void)state;
    int status;
    rig_ready();
    json_t *reply = rig_ask("GET", "/anthropic/v1/models", NULL, &status);
    assert_int_equal(status, 200);
    assert_string_equal(rig_text_at(reply, "first_id"), "nano");
    assert_string_equal(rig_text_at(reply, "data.0.type"), "model");
    assert_string_equal(rig_text_at(reply, "data.0.object"), "model");
    assert_true(json_is_false(rig_at(reply, "has_more")));
    json_decref(reply);
    rig_client *client =
        rig_open("GET", "/v1/models/absent", CLOSE "anthropic-version: 2023-06-01\r\n", NULL);
    rig_wait_closed(client);
    assert_int_equal(rig_status(client), 404);
    assert_non_null(strstr(cm_bytes_text(&client->in), "\"type\":\"not_found_error\""));
    rig_close(client);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(messages_stream),
        TEST(responses_stream),
        TEST(same_events),
        TEST(ends),
        TEST(one_call),
        TEST(malformed),
        TEST(refused),
        TEST(router_refuses),
        TEST(fails_on_the_way),
        TEST(keep_alive),
        TEST(counted),
        cmocka_unit_test(writers_keep_no_prompt),
        TEST(keep_alive_while_queued),
        TEST(long_bursts),
        TEST(wrong_values_are_422),
        TEST(models),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
