/* Sequences of stream events to exact sequences of response objects. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "gateway/request.h"

enum { OBJECTS_MAX = 32 };

typedef struct sink {
    cm_bytes object[OBJECTS_MAX];
    uint32_t n;
    bool last; /* of the newest */
} sink;

static void sink_emit(void *ctx, uint32_t choice, const char *json, size_t n_bytes, bool last)
{
    (void)choice;
    sink *s = ctx;
    assert_true(s->n < OBJECTS_MAX);
    assert_false(s->last); /* nothing comes after the last */
    cm_bytes_init(&s->object[s->n], 0);
    cm_bytes_append(&s->object[s->n], json, n_bytes);
    s->n++;
    s->last = last;
}

static void sink_free(sink *s)
{
    for (uint32_t i = 0; i < s->n; i++) {
        cm_bytes_fini(&s->object[i]);
    }
}

static void start_of(gw_openai *writer, uint32_t choice, const char *id, bool thinking)
{
    gw_start event = {
        .request_id = id, .model = "m", .created_s = 5, .prompt_tokens = 4, .thinking = thinking};
    gw_openai_events()->started(gw_openai_choice_of(writer, choice), &event);
}

static void piece_of(gw_openai *writer, uint32_t choice, md_piece_kind kind, uint32_t call, const char *text)
{
    md_piece event = {.kind = kind, .call = call, .text = text, .n_bytes = strlen(text)};
    gw_openai_events()->piece(gw_openai_choice_of(writer, choice), &event);
}

static void finish_of(gw_openai *writer, uint32_t choice, gw_reason reason)
{
    gw_finish event = {
        .reason = reason,
        .stop_id = -1,
        .usage = {.prompt_tokens = 4, .cached_tokens = 1, .completion_tokens = 3, .reasoning_tokens = 2}};
    gw_openai_events()->finished(gw_openai_choice_of(writer, choice), &event);
}

static void start(gw_openai *writer, bool thinking)
{
    start_of(writer, 0, "r1", thinking);
}

static void piece(gw_openai *writer, md_piece_kind kind, uint32_t call, const char *text)
{
    piece_of(writer, 0, kind, call, text);
}

static void finish(gw_openai *writer, gw_reason reason)
{
    finish_of(writer, 0, reason);
}

/* A token with one alternative, the bytes E4 BD. */
static void logprobs(gw_openai *writer, md_piece_kind kind, const char *text, bool is_marker)
{
    gw_logprob top[2] = {{.id = 5, .logprob = -0.25f, .bytes = (const uint8_t *)"\xe4\xbd", .n_bytes = 2},
                         {.id = 6, .logprob = -9999}};
    gw_logprobs event = {
        .token = {.id = 9, .logprob = -1.5f, .bytes = (const uint8_t *)text, .n_bytes = strlen(text)},
        .top = top,
        .n_top = 1,
        .kind = kind,
        .is_marker = is_marker};
    gw_openai_events()->logprobs(gw_openai_choice_of(writer, 0), &event);
}

static gw_openai *make(sink *s, gw_ask_kind kind, const char *body_text)
{
    *s = (sink){0};
    json_t *body = json_loads(body_text, 0, NULL);
    assert_non_null(body);
    gw_openai *writer = gw_openai_create(kind, body, "fp_0", sink_emit, s);
    json_decref(body);
    return writer;
}

#define HEAD(object)                                                                                         \
    "{\"id\":\"r1\",\"object\":\"" object                                                                    \
    "\",\"created\":5,\"model\":\"m\",\"system_fingerprint\":\"fp_0\",\"choices\":["
#define USAGE                                                                                                \
    "{\"prompt_tokens\":4,\"completion_tokens\":3,\"total_tokens\":7,\"prompt_tokens_details\":"             \
    "{\"cached_tokens\":1},\"completion_tokens_details\":{\"reasoning_tokens\":2},"                          \
    "\"prompt_cache_hit_tokens\":1,\"prompt_cache_miss_tokens\":3}"
#define DELTA(delta, reason, usage)                                                                          \
    HEAD("chat.completion.chunk")                                                                            \
    "{\"index\":0,\"delta\":{" delta "},\"logprobs\":null,\"finish_reason\":" reason "}],\"usage\":" usage "}"

static void expect(sink *s, const char *const *objects, uint32_t n)
{
    for (uint32_t i = 0; i < n && i < s->n; i++) {
        assert_string_equal(cm_bytes_text(&s->object[i]), objects[i]);
        json_t *value = json_loads(cm_bytes_text(&s->object[i]), 0, NULL);
        assert_non_null(value);
        json_decref(value);
    }
    assert_int_equal(s->n, n);
    assert_true(s->last);
    sink_free(s);
}
#define EXPECT(s, ...)                                                                                       \
    do {                                                                                                     \
        const char *const objects_[] = {__VA_ARGS__};                                                        \
        expect(s, objects_, sizeof(objects_) / sizeof(objects_[0]));                                         \
    } while (0)

static void chat_stream_thinking(void **state)
{
    (void)state;
    sink s;
    gw_openai *writer =
        make(&s, GW_ASK_CHAT, "{\"stream\":true,\"stream_options\":{\"include_usage\":true}}");
    start(writer, true);
    piece(writer, MD_PIECE_REASONING, 0, "hm \"so\"");
    piece(writer, MD_PIECE_CONTENT, 0, "a\n\\b\x01");
    finish(writer, GW_REASON_STOP);
    EXPECT(&s, DELTA("\"role\":\"assistant\",\"content\":null,\"reasoning_content\":\"\"", "null", "null"),
           DELTA("\"reasoning_content\":\"hm \\\"so\\\"\"", "null", "null"),
           DELTA("\"content\":\"a\\n\\\\b\\u0001\"", "null", "null"), DELTA("", "\"stop\"", "null"),
           HEAD("chat.completion.chunk") "],\"usage\":" USAGE "}");
    gw_openai_destroy(writer);
}

static void chat_stream_plain(void **state)
{
    (void)state;
    sink s;
    gw_openai *writer = make(&s, GW_ASK_CHAT, "{\"stream\":true}");
    start(writer, false);
    piece(writer, MD_PIECE_CONTENT, 0, "\xe4\xbd\xa0\xf0\x9f\x91\x8d");
    finish(writer, GW_REASON_LENGTH);
    EXPECT(&s, DELTA("\"role\":\"assistant\",\"content\":\"\",\"reasoning_content\":null", "null", "null"),
           DELTA("\"content\":\"\xe4\xbd\xa0\xf0\x9f\x91\x8d\"", "null", "null"),
           DELTA("", "\"length\"", USAGE));
    gw_openai_destroy(writer);
}

/* Ids of calls are random: cut out and held against their pattern. */
static void strip_call_ids(cm_bytes *object)
{
    char *at = (char *)object->data;
    while ((at = strstr(at, "\"call_")) != NULL) {
        for (int i = 0; i < 24; i++) {
            char c = at[9 + i];
            assert_true((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'));
            at[9 + i] = '*';
        }
        assert_int_equal(at[33], '"');
        at += 33;
    }
}

static void chat_stream_calls(void **state)
{
    (void)state;
    sink s;
    gw_openai *writer = make(&s, GW_ASK_CHAT, "{\"stream\":true}");
    start(writer, false);
    piece(writer, MD_PIECE_CALL, 0, "f");
    piece(writer, MD_PIECE_ARGS, 0, "{\"a\": 1}");
    piece(writer, MD_PIECE_CALL, 1, "g");
    finish(writer, GW_REASON_TOOL_CALLS);
    for (uint32_t i = 0; i < s.n; i++) {
        strip_call_ids(&s.object[i]);
    }
    EXPECT(
        &s, DELTA("\"role\":\"assistant\",\"content\":\"\",\"reasoning_content\":null", "null", "null"),
        DELTA(
            "\"tool_calls\":[{\"index\":0,\"id\":\"call_00_************************\",\"type\":\"function\","
            "\"function\":{\"name\":\"f\",\"arguments\":\"\"}}]",
            "null", "null"),
        DELTA("\"tool_calls\":[{\"index\":0,\"function\":{\"arguments\":\"{\\\"a\\\": 1}\"}}]", "null",
              "null"),
        DELTA(
            "\"tool_calls\":[{\"index\":1,\"id\":\"call_01_************************\",\"type\":\"function\","
            "\"function\":{\"name\":\"g\",\"arguments\":\"\"}}]",
            "null", "null"),
        DELTA("", "\"tool_calls\"", USAGE));
    gw_openai_destroy(writer);
}

static void chat_whole(void **state)
{
    (void)state;
    sink s;
    gw_openai *writer = make(&s, GW_ASK_CHAT, "{}");
    start(writer, true);
    piece(writer, MD_PIECE_REASONING, 0, "r");
    piece(writer, MD_PIECE_REASONING, 0, "2");
    piece(writer, MD_PIECE_CONTENT, 0, "c");
    piece(writer, MD_PIECE_CONTENT, 0, "3");
    finish(writer, GW_REASON_STOP);
    EXPECT(
        &s,
        HEAD(
            "chat.completion") "{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"c3\","
                               "\"reasoning_content\":\"r2\"},\"logprobs\":null,\"finish_reason\":\"stop\"}],"
                               "\"usage\":" USAGE "}");
    gw_openai_destroy(writer);

    writer = make(&s, GW_ASK_CHAT, "{\"stream\":false}");
    start(writer, false);
    piece(writer, MD_PIECE_CALL, 0, "f");
    piece(writer, MD_PIECE_ARGS, 0, "{");
    piece(writer, MD_PIECE_ARGS, 0, "}");
    piece(writer, MD_PIECE_CALL, 1, "g");
    piece(writer, MD_PIECE_ARGS, 1, "{}");
    finish(writer, GW_REASON_TOOL_CALLS);
    strip_call_ids(&s.object[0]);
    EXPECT(&s, HEAD("chat.completion") "{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"\","
                                       "\"tool_calls\":["
                                       "{\"index\":0,\"id\":\"call_00_************************\",\"type\":"
                                       "\"function\","
                                       "\"function\":{\"name\":\"f\",\"arguments\":\"{}\"}},"
                                       "{\"index\":1,\"id\":\"call_01_************************\",\"type\":"
                                       "\"function\","
                                       "\"function\":{\"name\":\"g\",\"arguments\":\"{}\"}}]},"
                                       "\"logprobs\":null,\"finish_reason\":\"tool_calls\"}],\"usage\":" USAGE
                                       "}");
    gw_openai_destroy(writer);
}

#define TEXT(text, reason, usage)                                                                            \
    HEAD("text_completion")                                                                                  \
    "{\"text\":\"" text "\",\"index\":0,\"logprobs\":null,\"finish_reason\":" reason "}],\"usage\":" usage "}"

static void completions(void **state)
{
    (void)state;
    sink s;
    gw_openai *writer =
        make(&s, GW_ASK_COMPLETE, "{\"stream\":true,\"stream_options\":{\"include_usage\":true}}");
    start(writer, false);
    piece(writer, MD_PIECE_CONTENT, 0, "a");
    piece(writer, MD_PIECE_CONTENT, 0, "b");
    finish(writer, GW_REASON_LENGTH);
    EXPECT(&s, TEXT("a", "null", "null"), TEXT("b", "null", "null"), TEXT("", "\"length\"", "null"),
           HEAD("text_completion") "],\"usage\":" USAGE "}");
    gw_openai_destroy(writer);

    writer = make(&s, GW_ASK_COMPLETE, "{}");
    start(writer, false);
    piece(writer, MD_PIECE_CONTENT, 0, "a");
    piece(writer, MD_PIECE_CONTENT, 0, "b");
    finish(writer, GW_REASON_STOP);
    EXPECT(&s, TEXT("ab", "\"stop\"", USAGE));
    gw_openai_destroy(writer);
}

#define TOP                                                                                                  \
    "\"top_logprobs\":[{\"token\":\"\xef\xbf\xbd\xef\xbf\xbd\",\"logprob\":-0.25,\"bytes\":[228,189]}]"
#define ENTRY(text, bytes) "{\"token\":\"" text "\",\"logprob\":-1.5,\"bytes\":[" bytes "]," TOP "}"
#define CHUNK(delta, logprobs, reason, usage)                                                                \
    HEAD("chat.completion.chunk")                                                                            \
    "{\"index\":0,\"delta\":{" delta "},\"logprobs\":" logprobs ",\"finish_reason\":" reason                 \
    "}],\"usage\":" usage "}"

/* A chunk has those of the tokens it came from; what came to no text is on the last one. */
static void chat_logprobs_streamed(void **state)
{
    (void)state;
    sink s;
    gw_openai *writer = make(&s, GW_ASK_CHAT, "{\"stream\":true,\"logprobs\":true,\"top_logprobs\":1}");
    start(writer, true);
    logprobs(writer, MD_PIECE_REASONING, "h", false);
    logprobs(writer, MD_PIECE_REASONING, "m", false);
    piece(writer, MD_PIECE_REASONING, 0, "hm");
    logprobs(writer, MD_PIECE_REASONING, "</think>", true);
    logprobs(writer, MD_PIECE_CONTENT, "\"", false);
    piece(writer, MD_PIECE_CONTENT, 0, "\"");
    piece(writer, MD_PIECE_CONTENT, 0, "!");
    logprobs(writer, MD_PIECE_CONTENT, "x", false);
    finish(writer, GW_REASON_STOP);
    EXPECT(
        &s,
        CHUNK("\"role\":\"assistant\",\"content\":null,\"reasoning_content\":\"\"", "null", "null", "null"),
        CHUNK("\"reasoning_content\":\"hm\"",
              "{\"content\":[],\"reasoning_content\":[" ENTRY("h", "104") "," ENTRY("m", "109") "]}", "null",
              "null"),
        CHUNK("\"content\":\"\\\"\"", "{\"content\":[" ENTRY("\\\"", "34") "],\"reasoning_content\":[]}",
              "null", "null"),
        CHUNK("\"content\":\"!\"", "null", "null", "null"),
        CHUNK("", "{\"content\":[" ENTRY("x", "120") "],\"reasoning_content\":[]}", "\"stop\"", USAGE));
    gw_openai_destroy(writer);
}

static void chat_logprobs_whole(void **state)
{
    (void)state;
    sink s;
    gw_openai *writer = make(&s, GW_ASK_CHAT, "{\"logprobs\":true}");
    start(writer, false);
    logprobs(writer, MD_PIECE_CONTENT, "a", false);
    piece(writer, MD_PIECE_CONTENT, 0, "a");
    logprobs(writer, MD_PIECE_CONTENT, "b", false);
    piece(writer, MD_PIECE_CONTENT, 0, "b");
    finish(writer, GW_REASON_STOP);
    EXPECT(&s, HEAD("chat.completion") "{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"ab\"},"
                                       "\"logprobs\":{\"content\":[" ENTRY("a", "97") "," ENTRY(
                                           "b", "98") "]},"
                                                      "\"finish_reason\":\"stop\"}],\"usage\":" USAGE "}");
    gw_openai_destroy(writer);
}

/* Offsets count characters; a token that is no text is spelled by its bytes. */
static void completion_logprobs(void **state)
{
    (void)state;
    sink s;
    gw_openai *writer = make(&s, GW_ASK_COMPLETE, "{\"logprobs\":1}");
    start(writer, false);
    logprobs(writer, MD_PIECE_CONTENT, "\xc3\xa9", false);
    logprobs(writer, MD_PIECE_CONTENT, "\xf0\x9f", false);
    logprobs(writer, MD_PIECE_CONTENT, "\x91\x8d", false);
    logprobs(writer, MD_PIECE_CONTENT, "z", false);
    piece(writer, MD_PIECE_CONTENT, 0, "\xc3\xa9\xf0\x9f\x91\x8dz");
    finish(writer, GW_REASON_STOP);
#define PART(name) "{\"bytes:\\\\xe4\\\\xbd\":-0.25,\"" name "\":-1.5}"
    EXPECT(
        &s,
        HEAD(
            "text_completion") "{\"text\":\"\xc3\xa9\xf0\x9f\x91\x8dz\",\"index\":0,\"logprobs\":{\"tokens\":"
                               "["
                               "\"\xc3\xa9\",\"bytes:\\\\xf0\\\\x9f\",\"bytes:\\\\x91\\\\x8d\",\"z\"],"
                               "\"token_logprobs\":[-1.5,-1.5,-1.5,-1.5],\"top_logprobs\":[" PART("\xc3\xa9") "," PART(
                                   "bytes:\\\\xf0\\\\x9f") "," PART("bytes:\\\\x91\\\\x8d") "," PART("z") "],"
                                                                                                          "\""
                                                                                                          "te"
                                                                                                          "xt"
                                                                                                          "_o"
                                                                                                          "ff"
                                                                                                          "se"
                                                                                                          "t"
                                                                                                          "\""
                                                                                                          ":["
                                                                                                          "0,"
                                                                                                          "1,"
                                                                                                          "2,"
                                                                                                          "2]"
                                                                                                          "},"
                                                                                                          "\""
                                                                                                          "fi"
                                                                                                          "ni"
                                                                                                          "sh"
                                                                                                          "_r"
                                                                                                          "ea"
                                                                                                          "so"
                                                                                                          "n"
                                                                                                          "\""
                                                                                                          ":"
                                                                                                          "\""
                                                                                                          "st"
                                                                                                          "op"
                                                                                                          "\""
                                                                                                          "}]"
                                                                                                          ","
                                                                                                          "\""
                                                                                                          "us"
                                                                                                          "ag"
                                                                                                          "e"
                                                                                                          "\""
                                                                                                          ":" USAGE
                                                                                                          "}");
    gw_openai_destroy(writer);
}

#define USAGE_TWO                                                                                            \
    "{\"prompt_tokens\":4,\"completion_tokens\":6,\"total_tokens\":10,\"prompt_tokens_details\":"            \
    "{\"cached_tokens\":1},\"completion_tokens_details\":{\"reasoning_tokens\":4},"                          \
    "\"prompt_cache_hit_tokens\":1,\"prompt_cache_miss_tokens\":3}"
#define DELTA_OF(index, delta, reason, usage)                                                                \
    HEAD("chat.completion.chunk")                                                                            \
    "{\"index\":" index ",\"delta\":{" delta "},\"logprobs\":null,\"finish_reason\":" reason                 \
    "}],\"usage\":" usage "}"

/* Choices in any order: one id for all, one prompt and the sum of the answers. */
static void two_choices(void **state)
{
    (void)state;
    sink s;
    gw_openai *writer = make(&s, GW_ASK_CHAT, "{\"stream\":true,\"n\":2}");
    start_of(writer, 1, "r1", false);
    start_of(writer, 0, "r2", false);
    piece_of(writer, 0, MD_PIECE_CONTENT, 0, "a");
    piece_of(writer, 1, MD_PIECE_CONTENT, 0, "b");
    finish_of(writer, 1, GW_REASON_LENGTH);
    piece_of(writer, 0, MD_PIECE_CONTENT, 0, "c");
    finish_of(writer, 0, GW_REASON_STOP);
#define ROLE "\"role\":\"assistant\",\"content\":\"\",\"reasoning_content\":null"
    EXPECT(&s, DELTA_OF("1", ROLE, "null", "null"), DELTA_OF("0", ROLE, "null", "null"),
           DELTA_OF("0", "\"content\":\"a\"", "null", "null"),
           DELTA_OF("1", "\"content\":\"b\"", "null", "null"), DELTA_OF("1", "", "\"length\"", "null"),
           DELTA_OF("0", "\"content\":\"c\"", "null", "null"), DELTA_OF("0", "", "\"stop\"", USAGE_TWO));
    gw_openai_destroy(writer);

    writer = make(&s, GW_ASK_COMPLETE, "{\"n\":2}");
    start_of(writer, 0, "r1", false);
    start_of(writer, 1, "r2", false);
    piece_of(writer, 1, MD_PIECE_CONTENT, 0, "b");
    finish_of(writer, 1, GW_REASON_LENGTH);
    piece_of(writer, 0, MD_PIECE_CONTENT, 0, "a");
    finish_of(writer, 0, GW_REASON_STOP);
    EXPECT(
        &s,
        HEAD(
            "text_completion") "{\"text\":\"a\",\"index\":0,\"logprobs\":null,\"finish_reason\":\"stop\"},"
                               "{\"text\":\"b\",\"index\":1,\"logprobs\":null,\"finish_reason\":\"length\"}],"
                               "\"usage\":" USAGE_TWO "}");
    gw_openai_destroy(writer);
}

static void nothing_generated(void **state)
{
    (void)state;
    sink s;
    gw_openai *writer = make(&s, GW_ASK_CHAT, "{}");
    start(writer, true);
    finish(writer, GW_REASON_STOP);
    EXPECT(
        &s,
        HEAD("chat.completion") "{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"\","
                                "\"reasoning_content\":\"\"},\"logprobs\":null,\"finish_reason\":\"stop\"}],"
                                "\"usage\":" USAGE "}");
    gw_openai_destroy(writer);
}

static void errors(void **state)
{
    (void)state;
    gw_error error;
    cm_bytes out;
    cm_bytes_init(&out, 0);
    gw_error_set(&error, GW_CAUSE_CONTEXT, "messages", "%d \"too\" many", 3);
    gw_openai_error(&error, &out);
    assert_string_equal(cm_bytes_text(&out),
                        "{\"error\":{\"message\":\"3 \\\"too\\\" many\",\"type\":\"invalid_request_error\","
                        "\"param\":\"messages\",\"code\":\"context_length_exceeded\"}}");
    cm_bytes_clear(&out);
    gw_error_set(&error, GW_CAUSE_UNAVAILABLE, NULL, "a broken byte \xff here");
    gw_openai_error(&error, &out);
    assert_string_equal(cm_bytes_text(&out),
                        "{\"error\":{\"message\":\"a broken byte \xef\xbf\xbd here\",\"type\":"
                        "\"service_unavailable_error\",\"param\":null,\"code\":\"unavailable\"}}");
    cm_bytes_fini(&out);
    assert_int_equal(gw_error_http(&error), 503);
    assert_int_equal(gw_error_grpc(&error), PC_CODE_UNAVAILABLE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(chat_stream_thinking),
        cmocka_unit_test(chat_stream_plain),
        cmocka_unit_test(chat_stream_calls),
        cmocka_unit_test(chat_whole),
        cmocka_unit_test(completions),
        cmocka_unit_test(chat_logprobs_streamed),
        cmocka_unit_test(chat_logprobs_whole),
        cmocka_unit_test(completion_logprobs),
        cmocka_unit_test(two_choices),
        cmocka_unit_test(nothing_generated),
        cmocka_unit_test(errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
