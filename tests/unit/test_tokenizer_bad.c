/* Malformed tokenizer.json files: each is refused with a sentence; and the nano model's own file and
 * transcripts. */
#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/model/chat.h"
#include "common/model/tokenizer.h"
#include "tests/support/temp_folder.h"

static const char NANO[] = BALEEN_NANO "/tokenizer.json";

static char g_folder[T_FOLDER_MAX], g_path[T_FOLDER_MAX + 16];

static int setup(void **state)
{
    (void)state;
    t_folder_make(g_folder, "tokenizer_bad");
    snprintf(g_path, sizeof(g_path), "%s/tokenizer.json", g_folder);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    t_folder_remove(g_folder);
    return 0;
}

/* Opens g_path; returns the error's text, or fails the test when it opens. */
static cm_error open_bad(uint32_t vocab, cm_status wanted)
{
    md_tokenizer *tokenizer = NULL;
    cm_error err = {0};
    cm_status status = md_tokenizer_open(g_path, vocab, &tokenizer, &err);
    if (status != wanted) {
        fail_msg("wanted %s, got %s: %s", cm_status_name(wanted), cm_status_name(status), err.text);
    }
    assert_null(tokenizer);
    assert_true(err.text[0] != 0 && err.field[0] != 0);
    return err;
}

static void write_file(const char *text, size_t n)
{
    FILE *file = fopen(g_path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, n, file), n);
    fclose(file);
}

/* ---- edits of a good file ---- */

static json_t *load_nano(void)
{
    json_t *root = json_load_file(NANO, 0, NULL);
    assert_non_null(root);
    return root;
}

/* Writes root (given) and expects a refusal that says words. */
static void expect_refused(json_t *root, const char *words)
{
    char *text = json_dumps(root, JSON_COMPACT);
    write_file(text, strlen(text));
    cm_free(text);
    json_decref(root);
    cm_error err = open_bad(0, CM_E_CORRUPT);
    if (strstr(err.text, words) == NULL) {
        fail_msg("\"%s\" does not say \"%s\"", err.text, words);
    }
}

static json_t *split_step(json_t *root, size_t i)
{
    return json_array_get(json_object_get(json_object_get(root, "pre_tokenizer"), "pretokenizers"), i);
}

/* Index of an added token by its content. */
static size_t added_index(const json_t *root, const char *content)
{
    size_t i;
    json_t *token;
    json_array_foreach(json_object_get(root, "added_tokens"), i, token)
    {
        if (strcmp(json_string_value(json_object_get(token, "content")), content) == 0) {
            return i;
        }
    }
    fail_msg("no %s", content);
    return 0;
}

static void test_not_json(void **state)
{
    (void)state;
    json_t *root = load_nano();
    char *text = json_dumps(root, JSON_COMPACT);
    json_decref(root);
    size_t n = strlen(text), cuts[] = {0, 1, 100, n / 2, n - 1};
    for (size_t i = 0; i < sizeof(cuts) / sizeof(cuts[0]); i++) {
        write_file(text, cuts[i]);
        open_bad(0, CM_E_CORRUPT);
    }
    cm_free(text);
    write_file("[]", 2);
    open_bad(0, CM_E_CORRUPT);
    write_file("\xff\xfe{}", 4);
    open_bad(0, CM_E_CORRUPT);
}

static void test_no_file(void **state)
{
    (void)state;
    md_tokenizer *tokenizer;
    cm_error err = {0};
    assert_int_equal(md_tokenizer_open("/nonexistent/tokenizer.json", 0, &tokenizer, &err), CM_E_NOT_FOUND);
    assert_true(strstr(err.text, "/nonexistent/tokenizer.json") != NULL);
}

/* Every key that matters, taken away and put to a wrong type. */
static void test_keys(void **state)
{
    (void)state;
    static const char *const keys[] = {"model", "pre_tokenizer", "decoder", "added_tokens"};
    static const char *const model_keys[] = {"type", "vocab", "merges"};
    json_t *root;
    for (size_t i = 0; i < 4; i++) {
        root = load_nano();
        json_object_del(root, keys[i]);
        expect_refused(root, keys[i]);
        root = load_nano();
        json_object_set_new(root, keys[i], json_integer(7));
        expect_refused(root, keys[i]);
    }
    for (size_t i = 0; i < 3; i++) {
        root = load_nano();
        json_object_del(json_object_get(root, "model"), model_keys[i]);
        expect_refused(root, "model");
        root = load_nano();
        json_object_set_new(json_object_get(root, "model"), model_keys[i], json_integer(7));
        expect_refused(root, "model");
    }
}

static void test_other_kinds(void **state)
{
    (void)state;
    json_t *root = load_nano();
    json_object_set_new(root, "normalizer", json_pack("{s:s}", "type", "NFC"));
    expect_refused(root, "normalizer");
    root = load_nano();
    json_object_set_new(split_step(root, 1), "type", json_string("Whitespace"));
    expect_refused(root, "unsupported type Whitespace");
    root = load_nano();
    json_object_set_new(split_step(root, 0), "behavior", json_string("Removed"));
    expect_refused(root, "Isolated");
    root = load_nano();
    json_object_set_new(split_step(root, 0), "invert", json_true());
    expect_refused(root, "invert");
    root = load_nano();
    json_object_set_new(split_step(root, 3), "use_regex", json_true());
    expect_refused(root, "use_regex");
    root = load_nano();
    json_object_set_new(json_object_get(root, "model"), "byte_fallback", json_true());
    expect_refused(root, "byte_fallback");
    root = load_nano();
    json_object_set_new(root, "decoder", json_pack("{s:s}", "type", "Metaspace"));
    expect_refused(root, "decoder");
    root = load_nano();
    json_object_set_new(root, "post_processor", json_pack("{s:s}", "type", "TemplateProcessing"));
    expect_refused(root, "post_processor");
}

static void set_pattern(json_t *root, const char *pattern)
{
    json_object_set_new(split_step(root, 0), "pattern", json_pack("{s:s}", "Regex", pattern));
}

static void test_patterns(void **state)
{
    (void)state;
    static const char *const bad[][2] = {{"[a-", "missing"},
                                         {"x*", "may match nothing"},
                                         {"(", "parenthesis"},
                                         {"\\p{Nope}", "property"},
                                         {"\\C", "\\C"}};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        json_t *root = load_nano();
        set_pattern(root, bad[i][0]);
        expect_refused(root, bad[i][1]);
    }
    json_t *root = load_nano();
    json_object_set_new(split_step(root, 0), "pattern", json_pack("{s:s}", "String", " "));
    expect_refused(root, "Regex");
}

static md_tokenizer *open_good(json_t *root)
{
    char *text = json_dumps(root, JSON_COMPACT);
    md_tokenizer *tokenizer;
    cm_error err = {0};
    write_file(text, strlen(text));
    cm_free(text);
    json_decref(root);
    if (md_tokenizer_open(g_path, 0, &tokenizer, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    return tokenizer;
}

/* Ids that spell text, whatever the pre-tokenizer cut. */
static void assert_spells(const md_tokenizer *tokenizer, const char *text)
{
    md_ids ids;
    size_t at = 0, n;
    md_ids_init(&ids);
    md_tokenizer_encode(tokenizer, text, strlen(text), MD_TEXT_CONTROL, &ids);
    for (size_t i = 0; i < ids.n; i++) {
        const uint8_t *bytes = md_tokenizer_bytes(tokenizer, ids.id[i], &n);
        assert_memory_equal(bytes, text + at, n);
        at += n;
    }
    assert_int_equal(at, strlen(text));
    md_ids_fini(&ids);
}

/* A pre-tokenizer without a Split is allowed: no stretch of text in front of, between or behind bytes that
 * are no UTF-8 is no piece. */
static void test_no_splits(void **state)
{
    (void)state;
    static const char *const texts[] = {"\xff",
                                        "\xff\xff",
                                        "a\xff",
                                        "\xff"
                                        "a",
                                        "<think>\xff</think>",
                                        ""};
    json_t *root = load_nano();
    json_t *steps = json_object_get(json_object_get(root, "pre_tokenizer"), "pretokenizers");
    while (json_array_size(steps) > 1) {
        json_array_remove(steps, 0);
    }
    md_tokenizer *tokenizer = open_good(root);
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
        assert_spells(tokenizer, texts[i]);
    }
    md_tokenizer_close(tokenizer);
}

/* \K moves a match's beginning to its end: still no piece is empty. */
static void test_moved_beginning(void **state)
{
    (void)state;
    json_t *root = load_nano();
    set_pattern(root, "a\\K");
    md_tokenizer *tokenizer = open_good(root);
    assert_spells(tokenizer, "banana");
    md_tokenizer_close(tokenizer);
}

static void test_tokens(void **state)
{
    (void)state;
    static const char *const protocol[] = {"<think>", "</think>", "<｜User｜>", "｜DSML｜", "<｜fim▁hole｜>"};
    json_t *root;
    for (size_t i = 0; i < sizeof(protocol) / sizeof(protocol[0]); i++) {
        root = load_nano();
        json_t *added = json_object_get(root, "added_tokens");
        json_array_remove(added, added_index(root, protocol[i]));
        expect_refused(root, protocol[i]);
    }
    root = load_nano();
    json_t *think = json_array_get(json_object_get(root, "added_tokens"), added_index(root, "<think>"));
    json_object_set_new(think, "id", json_string("x"));
    expect_refused(root, "no usable id");
    root = load_nano();
    think = json_array_get(json_object_get(root, "added_tokens"), added_index(root, "<think>"));
    json_object_set_new(think, "id", json_integer(300)); /* taken by the vocabulary */
    expect_refused(root, "two tokens");
    root = load_nano();
    think = json_array_get(json_object_get(root, "added_tokens"), added_index(root, "<think>"));
    json_object_set_new(think, "lstrip", json_true());
    expect_refused(root, "lstrip");
    root = load_nano();
    json_object_set_new(json_object_get(json_object_get(root, "model"), "vocab"), "!", json_integer(-1));
    expect_refused(root, "no usable id");
    root = load_nano();
    json_object_set_new(json_object_get(json_object_get(root, "model"), "vocab"), "!",
                        json_integer(1ll << 40));
    expect_refused(root, "no usable id");
    root = load_nano();
    json_object_del(json_object_get(json_object_get(root, "model"), "vocab"), "!");
    expect_refused(root, "byte 0x21 has no token");
    root = load_nano();
    json_object_set_new(json_object_get(json_object_get(root, "model"), "vocab"), "漢", json_integer(5000));
    expect_refused(root, "not byte-level");
}

static void test_merges(void **state)
{
    (void)state;
    static const char *const bad[] = {"ab", "zzzz qqqq", "Ġ Ġ Ġ", ""};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        json_t *root = load_nano();
        json_array_append_new(json_object_get(json_object_get(root, "model"), "merges"), json_string(bad[i]));
        expect_refused(root, "not two tokens");
    }
    json_t *root = load_nano();
    json_array_append_new(json_object_get(json_object_get(root, "model"), "merges"), json_integer(7));
    expect_refused(root, "not two tokens");
    root = load_nano();
    json_t *merges = json_object_get(json_object_get(root, "model"), "merges");
    json_array_append(merges, json_array_get(merges, 0));
    expect_refused(root, "there twice");
}

static void test_vocab_bound(void **state)
{
    (void)state;
    md_tokenizer *tokenizer;
    cm_error err = {0};
    assert_int_equal(md_tokenizer_open(NANO, 4096, &tokenizer, &err), CM_OK);
    assert_int_equal(md_tokenizer_vocab(tokenizer), 4096);
    md_tokenizer_close(tokenizer);
    assert_int_equal(md_tokenizer_open(NANO, 4095, &tokenizer, &err), CM_E_CORRUPT);
    assert_true(strstr(err.text, "4095") != NULL);
}

/* ---- the nano model's own transcripts ---- */

static void check_ids(const md_ids *ids, const json_t *wanted)
{
    assert_int_equal(ids->n, json_array_size(wanted));
    for (size_t i = 0; i < ids->n; i++) {
        assert_int_equal(ids->id[i], json_integer_value(json_array_get(wanted, i)));
    }
}

static void decode(const md_tokenizer *tokenizer, const json_t *ids, cm_bytes *text)
{
    md_detok detok;
    size_t i;
    json_t *id;
    md_detok_init(&detok, false);
    json_array_foreach(ids, i, id)
    {
        md_detok_push(&detok, tokenizer, (uint32_t)json_integer_value(id), text);
    }
    md_detok_flush(&detok, text);
}

static const char *entry_text(const json_t *entry, const char *key)
{
    return json_string_value(json_object_get(entry, key));
}

/* The prompt of an entry from its messages; a raw one from its text. */
static void encode_entry(const md_tokenizer *tokenizer, const json_t *entry, md_ids *ids, cm_bytes *text)
{
    if (strcmp(entry_text(entry, "mode"), "raw") == 0) {
        cm_bytes_append_text(text, entry_text(entry, "prompt"));
        md_raw_encode(tokenizer, cm_bytes_text(text), text->len, ids);
        return;
    }
    md_chat_options options = {.profile = MD_PROFILE_G,
                               .drop_thinking = true,
                               .thinking = strcmp(entry_text(entry, "mode"), "thinking") == 0};
    bool thinking = options.thinking;
    cm_error err = {0};
    assert_int_equal(md_effort_map(MD_PROFILE_G, entry_text(entry, "effort"), &thinking, &options.effort),
                     CM_OK);
    assert_int_equal(md_chat_encode(tokenizer, json_object_get(entry, "messages"), &options, ids, text, &err),
                     CM_OK);
}

static void check_transcript(const md_tokenizer *tokenizer, const json_t *entry)
{
    md_ids ids;
    cm_bytes text;
    md_ids_init(&ids);
    cm_bytes_init(&text, 0);
    encode_entry(tokenizer, entry, &ids, &text);
    assert_string_equal(cm_bytes_text(&text), entry_text(entry, "prompt"));
    check_ids(&ids, json_object_get(entry, "prompt_ids"));

    const char *output = entry_text(entry, "output");
    cm_bytes_clear(&text);
    decode(tokenizer, json_object_get(entry, "output_ids"), &text);
    assert_string_equal(cm_bytes_text(&text), output);
    /* the double-precision run was cut at 96 ids */
    cm_bytes_clear(&text);
    decode(tokenizer, json_object_get(entry, "class_d_ids"), &text);
    assert_true(text.len <= strlen(output) && memcmp(text.data, output, text.len) == 0);
    assert_true(text.len == strlen(output) || json_array_size(json_object_get(entry, "class_d_ids")) == 96);
    cm_bytes_fini(&text);
    md_ids_fini(&ids);
}

static void test_nano(void **state)
{
    (void)state;
    md_tokenizer *tokenizer;
    cm_error err = {0};
    json_t *entries = json_load_file(BALEEN_NANO "/eval/greedy.json", 0, NULL), *entry;
    assert_non_null(entries);
    assert_true(json_array_size(entries) > 0);
    assert_int_equal(md_tokenizer_open(NANO, 4096, &tokenizer, &err), CM_OK);
    size_t i;
    json_array_foreach(entries, i, entry)
    {
        check_transcript(tokenizer, entry);
    }
    md_tokenizer_close(tokenizer);
    json_decref(entries);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_not_json),
        cmocka_unit_test(test_no_file),
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_other_kinds),
        cmocka_unit_test(test_patterns),
        cmocka_unit_test(test_no_splits),
        cmocka_unit_test(test_moved_beginning),
        cmocka_unit_test(test_tokens),
        cmocka_unit_test(test_merges),
        cmocka_unit_test(test_vocab_bound),
        cmocka_unit_test(test_nano),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
