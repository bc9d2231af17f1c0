/* The tokenizer against the official one's ids: tests/golden/data/tokenizer. */
#include "tests/golden/jsonl.h"

#include <pthread.h>

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

static void check_encode(const json_t *row, md_text_kind kind, const char *key)
{
    json_t *answer;
    cm_error err = {0};
    if (row_tokenize(g_tokenizer, row, kind, &answer, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    jsonl_assert_equal(jsonl_text(row, "text"), json_object_get(answer, "ids"), json_object_get(row, key));
    json_decref(answer);
}

static void encode_row(void *ctx, const json_t *row, size_t i)
{
    (void)ctx;
    (void)i;
    check_encode(row, MD_TEXT_PLAIN, "ids");
    check_encode(row, MD_TEXT_CONTROL, "ids");
}

static void test_encode(void **state)
{
    (void)state;
    jsonl_each("tokenizer/encode.jsonl", 1404, encode_row, NULL);
}

static void control_row(void *ctx, const json_t *row, size_t i)
{
    (void)ctx;
    (void)i;
    check_encode(row, MD_TEXT_PLAIN, "plain");
    check_encode(row, MD_TEXT_CONTROL, "special");
}

static void test_control(void **state)
{
    (void)state;
    jsonl_each("tokenizer/control.jsonl", 224, control_row, NULL);
}

static void bytes_row(void *ctx, const json_t *row, size_t i)
{
    (void)ctx;
    (void)i;
    check_encode(row, MD_TEXT_PLAIN, "ids");
    cm_bytes bytes;
    size_t at = 0, k;
    json_t *id;
    cm_error err = {0};
    cm_bytes_init(&bytes, 0);
    assert_int_equal(row_bytes(row, &bytes, &err), CM_OK);
    json_array_foreach(json_object_get(row, "ids"), k, id) /* decoding gives the input back */
    {
        size_t n;
        const uint8_t *token = md_tokenizer_bytes(g_tokenizer, (uint32_t)json_integer_value(id), &n);
        assert_true(at + n <= bytes.len);
        assert_memory_equal(token, bytes.data + at, n);
        at += n;
    }
    assert_int_equal(at, bytes.len);
    cm_bytes_fini(&bytes);
}

static void test_bytes(void **state)
{
    (void)state;
    jsonl_each("tokenizer/bytes.jsonl", 190, bytes_row, NULL);
}

static json_t *decode(const json_t *row, bool skip_special)
{
    json_t *answer;
    cm_error err = {0};
    if (row_detokenize(g_tokenizer, row, skip_special, &answer, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    return answer;
}

static void decode_row(void *ctx, const json_t *row, size_t i)
{
    (void)ctx;
    (void)i;
    json_t *answer = decode(row, false);
    jsonl_assert_equal("pieces", json_object_get(answer, "pieces"), json_object_get(row, "pieces"));
    jsonl_assert_equal("text", json_object_get(answer, "text"), json_object_get(row, "text"));
    json_decref(answer);
    answer = decode(row, true);
    jsonl_assert_equal("without special tokens", json_object_get(answer, "text"),
                       json_object_get(row, "text_skip_special"));
    json_decref(answer);
}

static void test_decode(void **state)
{
    (void)state;
    jsonl_each("tokenizer/decode.jsonl", 253, decode_row, NULL);
}

/* Blanks of the size of a long prompt, and one piece of many letters: neither quadratic nor refused. */
static void test_long(void **state)
{
    (void)state;
    enum { N = 1 << 18 };
    char *text = cm_alloc(N);
    for (int kind = 0; kind < 3; kind++) {
        for (size_t i = 0; i < N; i++) {
            text[i] = kind == 0 ? ' ' : kind == 1 ? (char)('a' + i * 7 % 26) : i % 2 == 0 ? '\n' : ' ';
        }
        md_ids ids;
        md_ids_init(&ids);
        size_t n_bytes = 0, n;
        md_tokenizer_encode(g_tokenizer, text, N, MD_TEXT_CONTROL, &ids);
        for (size_t i = 0; i < ids.n; i++) {
            assert_non_null(md_tokenizer_bytes(g_tokenizer, ids.id[i], &n));
            assert_memory_equal(md_tokenizer_bytes(g_tokenizer, ids.id[i], &n), text + n_bytes, n);
            n_bytes += n;
        }
        assert_int_equal(n_bytes, N);
        md_ids_fini(&ids);
    }
    cm_free(text);
}

/* U+180E is no White_Space: the blank before it stands alone, as before any other character. */
static void test_white_space(void **state)
{
    (void)state;
    md_ids ids;
    md_ids_init(&ids);
    md_tokenizer_encode(g_tokenizer, "  \xE1\xA0\x8E", 5, MD_TEXT_PLAIN, &ids);
    assert_true(ids.n > 2 && ids.id[0] == 223 && ids.id[1] == 223);
    md_ids_fini(&ids);
}

static void test_accessors(void **state)
{
    (void)state;
    size_t n;
    assert_int_equal(md_tokenizer_vocab(g_tokenizer), 129280);
    assert_int_equal(md_tokenizer_control(g_tokenizer, MD_CTL_BOS), 0);
    assert_int_equal(md_tokenizer_control(g_tokenizer, MD_CTL_EOS), 1);
    assert_int_equal(md_tokenizer_control(g_tokenizer, MD_CTL_DSML), 128825);
    assert_true(md_tokenizer_is_special(g_tokenizer, 1));
    assert_false(md_tokenizer_is_special(g_tokenizer, 128803));
    assert_true(md_tokenizer_is_added(g_tokenizer, 128803));
    assert_false(md_tokenizer_is_added(g_tokenizer, 19923));
    assert_memory_equal(md_tokenizer_bytes(g_tokenizer, 19923, &n), "Hello", 5);
    assert_int_equal(n, 5);
    assert_null(md_tokenizer_bytes(g_tokenizer, 129280, &n));
}

static void *encode_thread(void *arg)
{
    (void)arg;
    md_ids ids;
    for (int i = 0; i < 300; i++) {
        md_ids_init(&ids);
        md_tokenizer_encode(g_tokenizer, "The capital of France is", 24, MD_TEXT_PLAIN, &ids);
        bool good = ids.n == 5 && ids.id[0] == 671 && ids.id[1] == 6102 && ids.id[4] == 344;
        md_ids_fini(&ids);
        if (!good) {
            return (void *)1;
        }
    }
    return NULL;
}

static void test_threads(void **state)
{
    (void)state;
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        assert_int_equal(pthread_create(&threads[i], NULL, encode_thread, NULL), 0);
    }
    for (int i = 0; i < 4; i++) {
        void *bad;
        pthread_join(threads[i], &bad);
        assert_null(bad);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_encode),  cmocka_unit_test(test_control),     cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_decode),  cmocka_unit_test(test_long),        cmocka_unit_test(test_accessors),
        cmocka_unit_test(test_threads), cmocka_unit_test(test_white_space),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
