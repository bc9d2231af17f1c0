/* Requests and messages to prompts: tests/golden/data/encoding/prompts.jsonl; and JSON as Python writes it.
 */
#include "tests/golden/jsonl.h"

#include <sys/stat.h>
#include <unistd.h>

#include "common/model/chat.h"
#include "tests/support/temp_folder.h"
#include "tools/baleen/rows.h"

static md_tokenizer *g_tokenizer;

static int setup(void **state)
{
    (void)state;
    g_tokenizer = jsonl_open_tokenizer(BALEEN_TEST_DATA "/tokenizer/tokenizer.json");
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    md_tokenizer_close(g_tokenizer);
    return 0;
}

static void check_prompt(const json_t *row, bool reference, const json_t *ids)
{
    const char *name = jsonl_text(row, "name");
    json_t *answer;
    cm_error err = {0};
    if (row_encode(g_tokenizer, row, MD_PROFILE_G, reference, &answer, &err) != CM_OK) {
        fail_msg("%s: %s", name, err.text);
    }
    jsonl_assert_equal(name, json_object_get(answer, "prompt"), json_object_get(row, "prompt"));
    jsonl_assert_equal(name, json_object_get(answer, "ids"), ids);
    json_decref(answer);
}

static void check_refused(const json_t *row)
{
    json_t *answer;
    cm_error err = {0};
    assert_int_equal(row_encode(g_tokenizer, row, MD_PROFILE_G, false, &answer, &err), CM_E_INVALID);
    assert_true(err.text[0] != 0 && err.field[0] != 0);
}

/* Encoding leaves the messages as they were. */
static void check_unchanged(const json_t *row)
{
    json_t *messages;
    md_chat_options options;
    md_ids ids;
    cm_error err = {0};
    md_ids_init(&ids);
    assert_int_equal(row_messages(row, MD_PROFILE_G, &messages, &options, &err), CM_OK);
    char *before = json_dumps(messages, 0);
    assert_int_equal(md_chat_encode(g_tokenizer, messages, &options, &ids, NULL, &err), CM_OK);
    char *after = json_dumps(messages, 0);
    assert_string_equal(before, after);
    cm_free(before);
    cm_free(after);
    json_decref(messages);
    md_ids_fini(&ids);
}

static void prompt_row(void *ctx, const json_t *row, size_t i)
{
    (void)i;
    size_t *n_references = ctx;
    const json_t *ids = json_object_get(row, "ids"), *reference = json_object_get(row, "ids_reference");
    if (json_object_get(row, "error") != NULL) {
        check_refused(row);
        return;
    }
    *n_references += reference != NULL;
    check_prompt(row, false, ids);
    check_prompt(row, true, reference != NULL ? reference : ids);
    if (strcmp(jsonl_text(row, "endpoint"), "completions") != 0) {
        check_unchanged(row);
    }
}

static void test_prompts(void **state)
{
    (void)state;
    size_t n_references = 0;
    jsonl_each("encoding/prompts.jsonl", 80, prompt_row, &n_references);
    assert_true(n_references >= 3);
}

/* ---- JSON ---- */

static void assert_dumps(const char *in, const char *wanted)
{
    json_t *value = json_loads(in, JSON_DECODE_ANY, NULL);
    assert_non_null(value);
    cm_bytes out;
    cm_bytes_init(&out, 0);
    md_json_dumps(value, &out);
    assert_string_equal(cm_bytes_text(&out), wanted);
    cm_bytes_fini(&out);
    json_decref(value);
}

static void test_json_dumps(void **state)
{
    (void)state;
    static const char *const rows[][2] = {
        {"[]", "[]"},
        {"{}", "{}"},
        {"{\"b\":1,\"a\":[true,false,null]}", "{\"b\": 1, \"a\": [true, false, null]}"},
        {"{\"a\":1,\"b\":2,\"a\":3}", "{\"a\": 3, \"b\": 2}"},
        {"\"a/\\u007f\\u00e9\\u0001\\b\\f\\n\\r\\t\\\"\\\\\"",
         "\"a/\x7f\xc3\xa9\\u0001\\b\\f\\n\\r\\t\\\"\\\\\""},
        {"9223372036854775807", "9223372036854775807"},
        {"-0", "0"},
        {"-0.0", "-0.0"},
        {"1e3", "1000.0"},
        {"2.50", "2.5"},
        {"0.1", "0.1"},
        {"1E-7", "1e-07"},
        {"0.0001", "0.0001"},
        {"0.00001234", "1.234e-05"},
        {"1e15", "1000000000000000.0"},
        {"1e16", "1e+16"},
        {"123456789012345680.0", "1.2345678901234568e+17"},
        {"1234567890123456.7", "1234567890123456.8"},
        {"5e-324", "5e-324"},
        {"1.7976931348623157e308", "1.7976931348623157e+308"},
        {"5.684341886080801486968994140625e-14", "5.684341886080802e-14"}, /* 2 to the -44 */
        {"9007199254740993.0", "9007199254740992.0"},
        {"0.30000000000000004", "0.30000000000000004"},
        {"-12.75", "-12.75"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        assert_dumps(rows[i][0], rows[i][1]);
    }
}

/* One assistant message with the given arguments; the text between invoke tags. */
static void assert_arguments(const char *arguments, size_t n, const char *wanted)
{
    json_t *messages = json_pack("[{s:s, s:[{s:{s:s, s:o}}]}]", "role", "assistant", "tool_calls", "function",
                                 "name", "f", "arguments", json_stringn(arguments, n));
    md_chat_options options = {0};
    md_ids ids;
    cm_bytes text;
    cm_error err = {0};
    md_ids_init(&ids);
    cm_bytes_init(&text, 0);
    assert_int_equal(md_chat_encode(g_tokenizer, messages, &options, &ids, &text, &err), CM_OK);
    if (strstr(cm_bytes_text(&text), wanted) == NULL) {
        fail_msg("%s\n  wanted %s\n  got    %s", arguments, wanted, cm_bytes_text(&text));
    }
    cm_bytes_fini(&text);
    md_ids_fini(&ids);
    json_decref(messages);
}

static void test_arguments(void **state)
{
    (void)state;
    static const char *const rows[][2] = {
        {"{\"a\":[-123456789012345678901234567890, 9223372036854775808]}",
         "string=\"false\">[-123456789012345678901234567890, 9223372036854775808]</"},
        {"{\"a\":\"123456789012345678901234567890\"}", "string=\"true\">123456789012345678901234567890</"},
        {"{\"a\":[\"\\\\\\\"12345678901234567890\"]}",
         "string=\"false\">[\"\\\\\\\"12345678901234567890\"]</"},
        {"{\"a\":[\"\\u0000123\", \"\\u0000\"]}", "string=\"false\">[\"\\u0000123\", \"\\u0000\"]</"},
        {"{\"a\":0123456789012345678901}",
         "name=\"arguments\" string=\"true\">{\"a\":0123456789012345678901}</"},
        {"{\"a\":12345678901234567890x}",
         "name=\"arguments\" string=\"true\">{\"a\":12345678901234567890x}</"},
        {"[1]", "name=\"arguments\" string=\"true\">[1]</"},
        {"\"x\"", "name=\"arguments\" string=\"true\">\"x\"</"},
        {"\"{\\\"k\\\": 12345678901234567890}\"", "name=\"k\" string=\"false\">12345678901234567890</"},
        {"{\"a\":\"\\", "string=\"true\">{\"a\":\"\\</"},
        {"-", "string=\"true\">-</"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        assert_arguments(rows[i][0], strlen(rows[i][0]), rows[i][1]);
    }
}

/* ---- refusals ---- */

static void assert_refused(const char *body_text, const char *field)
{
    json_error_t why;
    json_t *body = json_loads(body_text, 0, &why), *messages;
    if (body == NULL) {
        fail_msg("%s: %s", body_text, why.text);
    }
    md_chat_options options;
    cm_error err = {0};
    assert_int_equal(md_chat_from_request(body, MD_PROFILE_G, &messages, &options, &err), CM_E_INVALID);
    assert_string_equal(err.field, field);
    assert_true(err.text[0] != 0);
    json_decref(body);
}

#define USER "{\"role\":\"user\",\"content\":\"a\"}"

/* A developer in a request is the system: it may be empty. */
static void test_empty_developer(void **state)
{
    (void)state;
    json_t *body = json_loads("{\"messages\":[{\"role\":\"developer\",\"content\":\"\"}," USER "]}", 0, NULL),
           *messages;
    md_chat_options options;
    cm_error err = {0};
    assert_int_equal(md_chat_from_request(body, MD_PROFILE_G, &messages, &options, &err), CM_OK);
    assert_string_equal(jsonl_text(json_array_get(messages, 0), "role"), "system");
    assert_true(options.thinking && options.drop_thinking && options.effort == MD_EFFORT_HIGH);
    json_decref(messages);
    json_decref(body);
}

static void test_refused(void **state)
{
    (void)state;
    static const char *const rows[][2] = {
        {"{}", "messages"},
        {"{\"messages\":\"x\"}", "messages"},
        {"{\"messages\":[7]}", "messages[0]"},
        {"{\"messages\":[{\"role\":\"robot\",\"content\":\"a\"}]}", "messages[0].role"},
        {"{\"messages\":[" USER ",{\"content\":\"a\"}]}", "messages[1].role"},
        {"{\"messages\":[" USER ",{\"role\":\"user\"}]}", "messages[1].content"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":7}]}", "messages[0].content"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":[{\"text\":\"a\"}]}]}", "messages[0].content"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]}", "messages[0].content"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"a\",\"task\":\"sing\"}]}", "messages[0].task"},
        {"{\"messages\":[{\"role\":\"assistant\",\"tool_calls\":7}]}", "messages[0].tool_calls"},
        {"{\"messages\":[{\"role\":\"assistant\",\"tool_calls\":[{}]}]}", "messages[0].tool_calls"},
        {"{\"messages\":[{\"role\":\"assistant\",\"reasoning_content\":7}]}",
         "messages[0].reasoning_content"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"a\",\"prefix\":true}]}", "messages"},
        {"{\"messages\":[{\"role\":\"assistant\",\"prefix\":true}," USER "]}", "messages"},
        {"{\"messages\":[" USER "],\"thinking\":{\"type\":\"maybe\"}}", "thinking.type"},
        {"{\"messages\":[" USER "],\"reasoning_effort\":7}", "reasoning_effort"},
        {"{\"messages\":[" USER "],\"chat_template_kwargs\":7}", "chat_template_kwargs"},
        {"{\"messages\":[" USER "],\"chat_template_kwargs\":{\"thinking\":1}}", "chat_template_kwargs"},
        {"{\"messages\":[" USER "],\"tools\":7}", "tools"},
        {"{\"messages\":[" USER "],\"tools\":[{\"type\":\"function\"}]}", "tools"},
        {"{\"messages\":[" USER "],\"response_format\":{\"type\":\"yaml\"}}", "response_format.type"},
        {"{\"messages\":[" USER "],\"response_format\":{\"type\":\"json_schema\"}}",
         "response_format.json_schema"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        assert_refused(rows[i][0], rows[i][1]);
    }
}

static void test_surfaces_refused(void **state)
{
    (void)state;
    static const struct {
        md_surface surface;
        const char *body, *field;
    } rows[] = {
        {MD_SURFACE_ANTHROPIC, "{\"messages\":[{\"role\":\"user\"}]}", "messages"},
        {MD_SURFACE_ANTHROPIC, "{\"messages\":[{\"role\":\"robot\",\"content\":\"a\"}]}", "messages"},
        {MD_SURFACE_ANTHROPIC, "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image\"}]}]}",
         "messages"},
        {MD_SURFACE_ANTHROPIC, "{\"messages\":[{\"role\":\"assistant\",\"content\":[{\"type\":\"text\"}]}]}",
         "messages"},
        {MD_SURFACE_ANTHROPIC, "{\"messages\":[" USER "],\"tools\":[{\"type\":\"web_search\"}]}", "tools"},
        {MD_SURFACE_RESPONSES, "{\"input\":[{\"type\":\"custom_tool_call\"}]}", "input"},
        {MD_SURFACE_RESPONSES, "{\"input\":[{\"type\":\"function_call\"}]}", "input"},
        {MD_SURFACE_RESPONSES, "{\"input\":\"a\",\"tools\":[{\"type\":\"web_search\"}]}", "tools"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        json_t *body = json_loads(rows[i].body, 0, NULL), *out;
        cm_error err = {0};
        assert_non_null(body);
        assert_int_equal(md_chat_body_convert(rows[i].surface, body, &out, &err), CM_E_INVALID);
        assert_string_equal(err.field, rows[i].field);
        json_decref(body);
    }
}

static void test_profile(void **state)
{
    (void)state;
    char dir[T_FOLDER_MAX], path[256];
    t_folder_make(dir, "encoding");
    assert_int_equal(md_profile_detect(dir), MD_PROFILE_G);
    snprintf(path, sizeof(path), "%s/encoding", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    snprintf(path, sizeof(path), "%s/encoding/encoding_dsv4.py", dir);
    static const struct {
        const char *text;
        md_profile profile;
    } rows[] = {
        {"REASONING_EFFORT_MAX = (\n    'x'\n)\n", MD_PROFILE_P},
        {"REASONING_EFFORT_PROMPTS = {}\n", MD_PROFILE_G},
        {"x = '''Reasoning Effort: Beyond maximum'''\nREASONING_EFFORT_MAX = x\n", MD_PROFILE_G},
        {"nothing\n", MD_PROFILE_G},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        FILE *file = fopen(path, "wb");
        assert_non_null(file);
        fputs(rows[i].text, file);
        fclose(file);
        assert_int_equal(md_profile_detect(dir), rows[i].profile);
    }
    t_folder_remove(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_prompts),          cmocka_unit_test(test_json_dumps),
        cmocka_unit_test(test_arguments),        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_surfaces_refused), cmocka_unit_test(test_profile),
        cmocka_unit_test(test_empty_developer),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
