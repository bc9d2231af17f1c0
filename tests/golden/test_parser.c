/* Completions to reasoning, content and tool calls: tests/golden/data/encoding/parse*.jsonl. */
#include "tests/golden/jsonl.h"

#include "common/model/parser.h"
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

static md_parser *open_parser(const json_t *row)
{
    md_parser *parser;
    cm_error err = {0};
    if (row_parser(row, &parser, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    return parser;
}

/* ---- whole results: parse.jsonl ---- */

/* A copy; values: with the arguments of all calls as values in place of their text. */
static json_t *answer_copy(const json_t *answer, bool values)
{
    json_t *copy = json_deep_copy(answer), *call;
    size_t i;
    json_array_foreach(json_object_get(copy, "tool_calls"), i, call)
    {
        if (values) {
            json_t *value = json_loads(jsonl_text(call, "arguments"), 0, NULL);
            assert_non_null(value);
            json_object_set_new(call, "arguments", value);
        }
    }
    return copy;
}

static void parse_cut(const json_t *row, size_t first, size_t step)
{
    const json_t *wanted = json_object_get(row, "expect");
    bool values = strcmp(jsonl_text(row, "compare_arguments"), "json") == 0;
    json_t *answer;
    cm_error err = {0};
    if (row_parse(row, first, step, &answer, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    json_t *a = answer_copy(answer, values), *b = answer_copy(wanted, values);
    jsonl_assert_equal(jsonl_text(row, "name"), a, b);
    json_decref(a);
    json_decref(b);
    json_decref(answer);
}

enum { PARSE_PAIRS = 180 }; /* bytes of a text up to which every pair of cuts is tried */

/* Whole, at every byte, and in two; shorter texts in three as well, and in pieces of every length behind
 * every first one. */
static void parse_row(void *ctx, const json_t *row, size_t i)
{
    uint32_t *n_ways = ctx;
    (void)i;
    size_t n = strlen(jsonl_text(row, "text"));
    parse_cut(row, n, n);
    parse_cut(row, 1, 1);
    *n_ways += 2;
    for (size_t cut = 1; cut < n; cut++) {
        for (size_t step = n <= PARSE_PAIRS ? 1 : n; step <= n; step++) {
            parse_cut(row, cut, step);
            ++*n_ways;
        }
    }
}

static void test_parse(void **state)
{
    (void)state;
    uint32_t n_ways = 0;
    jsonl_each("encoding/parse.jsonl", 51, parse_row, &n_ways);
    printf("  51 completions, cut in %u ways\n", n_ways);
    assert_true(n_ways > 100000);
}

/* ---- exact events ---- */

static void record(void *ctx, const md_piece *piece)
{
    json_t *event = NULL, *text = json_stringn(piece->text, piece->n_bytes);
    assert_non_null(text); /* NULL for a split character */
    switch (piece->kind) {
    case MD_PIECE_REASONING:
        event = json_pack("{s:o}", "reasoning", text);
        break;
    case MD_PIECE_CONTENT:
        event = json_pack("{s:o}", "content", text);
        break;
    case MD_PIECE_CALL:
        event = json_pack("{s:i, s:o}", "call", (int)piece->call, "name", text);
        break;
    case MD_PIECE_ARGS:
        event = json_pack("{s:i, s:o}", "args", (int)piece->call, "text", text);
        break;
    }
    json_array_append_new(ctx, event);
}

static void check_events(const json_t *row, size_t k, json_t *events)
{
    const json_t *wanted = json_array_get(json_object_get(row, "events"), k);
    if (!json_equal(events, wanted)) {
        char *a = json_dumps(wanted, 0), *b = json_dumps(events, 0);
        fail_msg("%s step %zu\n  wanted %s\n  got    %s", jsonl_text(row, "name"), k, a, b);
    }
    json_array_clear(events);
}

static void chunks_row(void *ctx, const json_t *row, size_t i)
{
    (void)ctx;
    (void)i;
    const json_t *chunks = json_object_get(row, "chunks");
    json_t *events = json_array();
    md_parser *parser = open_parser(row);
    size_t n = json_array_size(chunks);
    assert_int_equal(json_array_size(json_object_get(row, "events")), n + 1);
    for (size_t k = 0; k < n; k++) {
        const json_t *chunk = json_array_get(chunks, k);
        md_parser_push_text(parser, json_string_value(chunk), json_string_length(chunk), record, events);
        check_events(row, k, events);
    }
    md_parser_finish(parser, record, events);
    check_events(row, n, events);
    assert_string_equal(row_finish_reason(row, parser), jsonl_text(row, "finish_reason"));
    md_parser_destroy(parser);
    json_decref(events);
}

static void test_chunks(void **state)
{
    (void)state;
    jsonl_each("encoding/parse_chunks.jsonl", 100, chunks_row, NULL);
}

static void tokens_row(void *ctx, const json_t *row, size_t i)
{
    (void)ctx;
    (void)i;
    const json_t *ids = json_object_get(row, "ids");
    json_t *events = json_array();
    md_parser *parser = open_parser(row);
    size_t n = json_array_size(ids), k = 0;
    for (; k < n && json_integer_value(json_array_get(ids, k)) != 1; k++) {
        md_parser_push_id(parser, g_tokenizer, (uint32_t)json_integer_value(json_array_get(ids, k)), record,
                          events);
        check_events(row, k, events);
    }
    md_parser_finish(parser, record, events);
    check_events(row, k, events);
    assert_int_equal(json_array_size(json_object_get(row, "events")), k + 1);
    assert_string_equal(row_finish_reason(row, parser), jsonl_text(row, "finish_reason"));
    md_parser_destroy(parser);
    json_decref(events);
}

static void test_tokens(void **state)
{
    (void)state;
    jsonl_each("encoding/parse_tokens.jsonl", 41, tokens_row, NULL);
}

/* ---- rules without a vector ---- */

static void run_ids(const md_parser_options *options, const uint32_t *ids, size_t n, row_result *got)
{
    md_parser *parser = md_parser_create(options);
    for (size_t i = 0; i < n; i++) {
        md_parser_push_id(parser, g_tokenizer, ids[i], row_collect, got);
    }
    md_parser_finish(parser, row_collect, got);
    md_parser_destroy(parser);
}

/* Given ids, only the control ids are markers; the same characters from ordinary tokens are text. */
static void test_spelled_markers(void **state)
{
    (void)state;
    static const char spelled[] = "a</think>b<｜DSML｜tool_calls>";
    md_ids ids;
    md_ids_init(&ids);
    md_tokenizer_encode(g_tokenizer, spelled, strlen(spelled), MD_TEXT_PLAIN, &ids);
    md_ids_push(&ids, md_tokenizer_control(g_tokenizer, MD_CTL_THINK_END));
    md_ids_push(&ids, 19923);
    row_result got = {0};
    run_ids(&(md_parser_options){.start_in_reasoning = true, .tools = true}, ids.id, ids.n, &got);
    assert_string_equal(cm_bytes_text(&got.reasoning), spelled);
    assert_string_equal(cm_bytes_text(&got.content), "Hello");
    row_result_fini(&got);
    md_ids_fini(&ids);
}

/* Special tokens are no text, and bytes that a control id cuts off become U+FFFD in front of it. */
static void test_odd_ids(void **state)
{
    (void)state;
    uint32_t bytes[2] = {UINT32_MAX, UINT32_MAX}; /* the first two of U+20AC's three */
    for (uint32_t id = 0; id < 1000; id++) {
        size_t n;
        const uint8_t *text = md_tokenizer_bytes(g_tokenizer, id, &n);
        if (n == 1 && text[0] == 0xE2) {
            bytes[0] = id;
        } else if (n == 1 && text[0] == 0x82) {
            bytes[1] = id;
        }
    }
    const uint32_t ids[] = {bytes[0], bytes[1], md_tokenizer_control(g_tokenizer, MD_CTL_THINK_END), 19923, 1,
                            2,        500000};
    row_result got = {0};
    run_ids(&(md_parser_options){.start_in_reasoning = true}, ids, sizeof(ids) / sizeof(ids[0]), &got);
    assert_string_equal(cm_bytes_text(&got.reasoning), "\xEF\xBF\xBD");
    assert_string_equal(cm_bytes_text(&got.content), "Hello");
    row_result_fini(&got);
}

static void run_text(const md_parser_options *options, const char *text, size_t step, row_result *got,
                     const char *stop)
{
    md_parser *parser = md_parser_create(options);
    size_t n = strlen(text);
    for (size_t at = 0; at < n; at += step) {
        bool stopped =
            md_parser_push_text(parser, text + at, step < n - at ? step : n - at, row_collect, got);
        assert_int_equal(stopped, md_parser_stop_match(parser) != NULL);
    }
    md_parser_finish(parser, row_collect, got);
    const char *match = md_parser_stop_match(parser);
    assert_string_equal(match != NULL ? match : "", stop);
    md_parser_destroy(parser);
}

static void test_options(void **state)
{
    (void)state;
    static const char *const stops[] = {"\n\nQ:", "ZZ"};
    const md_parser_options plain = {.plain = true, .stop = stops, .n_stop = 2},
                            keep = {.stop = stops, .n_stop = 2, .include_stop = true, .tools = true};
    for (size_t step = 1; step < 40; step++) {
        row_result got = {0};
        run_text(&plain, "\n</think><think>x\n\n\nQ: y", step, &got, "\n\nQ:");
        assert_string_equal(cm_bytes_text(&got.content), "\n</think><think>x\n");
        assert_string_equal(cm_bytes_text(&got.reasoning), "");
        row_result_fini(&got);
        run_text(&keep, "one\n\n ZZ two", step, &got, "ZZ");
        assert_string_equal(cm_bytes_text(&got.content), "one\n\n ZZ");
        row_result_fini(&got);
        /* the end decides what a stop string's beginning was, and what stands behind it still counts */
        run_text(&keep, "x\n\nQ", step, &got, "");
        assert_string_equal(cm_bytes_text(&got.content), "x\n\nQ");
        row_result_fini(&got);
    }
}

/* Stop strings that begin alike, or like a marker: the one that is complete first counts, at every split. */
static void test_stops_that_begin_alike(void **state)
{
    (void)state;
    static const struct {
        const char *stop[2], *text, *match, *content, *reasoning;
    } rows[] = {
        {{"abc", "ab"}, "xabcd", "ab", "xab", ""},
        {{"ab", "abc"}, "xabcd", "ab", "xab", ""},
        {{"abd", "bc"}, "xabcd", "bc", "xabc", ""},
        {{"<think>y", "z"}, "x<think>y</think>", "", "x", "y"},
        {{"</think>y", "z"}, "x</think>yz", "z", "xyz", ""},
        {{"\n<｜DSML｜tool", "z"}, "x\n<｜DSML｜tool_calls>z", "", "x", ""},
        {{"<think>", "z"}, "x<think>y</think>", "<think>", "x<think>", ""},
        {{"<thi", "z"}, "x<think>y</think>", "<thi", "x<thi", ""},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        const md_parser_options options = {
            .stop = rows[i].stop, .n_stop = 2, .include_stop = true, .tools = true};
        for (size_t step = 1; step <= strlen(rows[i].text); step++) {
            row_result got = {0};
            run_text(&options, rows[i].text, step, &got, rows[i].match);
            assert_string_equal(cm_bytes_text(&got.content), rows[i].content);
            assert_string_equal(cm_bytes_text(&got.reasoning), rows[i].reasoning);
            row_result_fini(&got);
        }
    }
}

/* A long run of newlines that might precede a marker costs no more per byte than any text. */
static void test_long_run(void **state)
{
    (void)state;
    enum { N = 200000 };
    row_result got = {0};
    md_parser_options options = {.start_in_reasoning = true, .tools = true};
    md_parser *parser = md_parser_create(&options);
    md_parser_push_text(parser, "x", 1, row_collect, &got);
    for (size_t i = 0; i < N; i++) {
        md_parser_push_text(parser, "\n", 1, row_collect, &got);
    }
    assert_int_equal(got.reasoning.len, 1);
    assert_true(md_parser_in_reasoning(parser));
    md_parser_push_text(parser, "y", 1, row_collect, &got);
    assert_int_equal(got.reasoning.len, N + 2);
    md_parser_destroy(parser);
    row_result_fini(&got);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_parse),    cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_tokens),   cmocka_unit_test(test_spelled_markers),
        cmocka_unit_test(test_odd_ids),  cmocka_unit_test(test_options),
        cmocka_unit_test(test_long_run), cmocka_unit_test(test_stops_that_begin_alike),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
