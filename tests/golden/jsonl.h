/* Rows of a JSON-lines file under tests/golden/data, one json_t each, for the text tests. */
#pragma once
#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/model/tokenizer.h"

typedef void (*jsonl_row_fn)(void *ctx, const json_t *row, size_t i_row);

/* Calls fn for every row and checks how many there were. path is below BALEEN_TEST_DATA. */
static inline void jsonl_each(const char *path, size_t n_rows, jsonl_row_fn fn, void *ctx)
{
    char full[512], *line = NULL;
    size_t cap = 0, n = 0;
    ssize_t length;
    snprintf(full, sizeof(full), BALEEN_TEST_DATA "/%s", path);
    FILE *file = fopen(full, "rb");
    assert_non_null(file);
    while ((length = getline(&line, &cap, file)) > 0) {
        json_error_t why;
        json_t *row = json_loadb(line, (size_t)length, JSON_ALLOW_NUL, &why);
        if (row == NULL) {
            fail_msg("%s row %zu: %s", path, n, why.text);
        }
        fn(ctx, row, n++);
        json_decref(row);
    }
    cm_free(line);
    fclose(file);
    assert_int_equal(n, n_rows);
}

static inline const char *jsonl_text(const json_t *row, const char *key)
{
    const char *text = json_string_value(json_object_get(row, key));
    return text != NULL ? text : "";
}

/* Fails with both values when they differ. */
static inline void jsonl_assert_equal(const char *what, const json_t *got, const json_t *wanted)
{
    if (wanted == NULL || !json_equal(got, wanted)) {
        char *a = json_dumps(wanted, JSON_COMPACT | JSON_ENCODE_ANY);
        char *b = json_dumps(got, JSON_COMPACT | JSON_ENCODE_ANY);
        fail_msg("%s\n  wanted %s\n  got    %s", what, a, b);
    }
}

static inline md_tokenizer *jsonl_open_tokenizer(const char *path)
{
    md_tokenizer *tokenizer;
    cm_error err = {0};
    if (md_tokenizer_open(path, 0, &tokenizer, &err) != CM_OK) {
        fail_msg("%s: %s", path, err.text);
    }
    return tokenizer;
}
