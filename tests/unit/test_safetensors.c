/* safetensors files: every way a header can lie, and lookup. */
#include <fcntl.h>
#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/model/names_private.h"
#include "common/model/safetensors_private.h"
#include "tests/support/temp_folder.h"

/* ---- helpers ---- */

static char folder[T_FOLDER_MAX];

static int folder_make(void **state)
{
    (void)state;
    t_folder_make(folder, "safetensors");
    return 0;
}

static int folder_remove(void **state)
{
    (void)state;
    t_folder_remove(folder);
    return 0;
}

/* Writes length, header and n_data zero bytes to DIR/file, and returns its path. */
static const char *file_write(uint64_t header_bytes, const char *header, size_t n_data)
{
    static char path[T_FOLDER_MAX + 8];
    uint8_t length[8], zero[256] = {0};
    assert_true(n_data <= sizeof zero);
    for (int i = 0; i < 8; i++) {
        length[i] = (uint8_t)(header_bytes >> (8 * i));
    }
    snprintf(path, sizeof path, "%s/file", folder);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(length, 1, 8, file), 8);
    assert_int_equal(fwrite(header, 1, strlen(header), file), strlen(header));
    assert_int_equal(fwrite(zero, 1, n_data, file), n_data);
    assert_int_equal(fclose(file), 0);
    return path;
}

static void assert_open_fails(const char *path, cm_status status, const char *field, const char *words)
{
    md_safetensors *file = (void *)0x1;
    cm_error err = {0};
    cm_status got = md_safetensors_open(path, &file, &err);
    if (got != status || strcmp(err.field, field) != 0 || strstr(err.text, words) == NULL) {
        fail_msg("%s: status %s field '%s' text '%s', expected field '%s' and '%s'", path,
                 cm_status_name(got), err.field, err.text, field, words);
    }
    assert_ptr_equal(file, (void *)0x1);
    assert_int_equal(md_safetensors_open(path, &file, NULL), status);
}

/* ---- what is right ---- */

static void test_good(void **state)
{
    (void)state;
    md_safetensors *file;
    cm_error err = {0};
    const char *header = "{\"__metadata__\":{\"format\":\"pt\"},"
                         "\"b\":{\"dtype\":\"I64\",\"shape\":[2,3],\"data_offsets\":[5,53]},"
                         "\"a\":{\"dtype\":\"F8_E4M3\",\"shape\":[5],\"data_offsets\":[0,5]},"
                         "\"scalar\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[53,57]},"
                         "\"none\":{\"dtype\":\"BF16\",\"shape\":[0,7],\"data_offsets\":[53,53]}}   ";
    const char *path = file_write(strlen(header), header, 57);
    if (md_safetensors_open(path, &file, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    assert_int_equal(md_safetensors_count(file), 4);
    assert_string_equal(md_safetensors_at(file, 0)->name, "a");
    assert_string_equal(md_safetensors_at(file, 1)->name, "b");
    assert_string_equal(md_safetensors_at(file, 2)->name, "none");
    assert_string_equal(md_safetensors_at(file, 3)->name, "scalar");
    const md_tensor *b = md_safetensors_find(file, "b");
    assert_ptr_equal(b, md_safetensors_at(file, 1));
    assert_int_equal(b->dtype, MD_I64);
    assert_int_equal(b->n_dim, 2);
    assert_int_equal(b->dim[0], 2);
    assert_int_equal(b->dim[1], 3);
    assert_int_equal(b->n_bytes, 48);
    assert_int_equal(md_safetensors_find(file, "scalar")->n_bytes, 4);
    assert_int_equal(md_safetensors_find(file, "none")->n_bytes, 0);
    assert_null(md_safetensors_find(file, "c"));
    assert_null(md_safetensors_find(file, "__metadata__"));
    assert_string_equal(md_safetensors_path(file), path);
    size_t n_header;
    assert_memory_equal(md_safetensors_header(file, &n_header), header, strlen(header));
    assert_int_equal(n_header, strlen(header));
    assert_int_equal(md_safetensors_data_bytes(file), 57);
    assert_ptr_equal(b->data, (const char *)md_safetensors_at(file, 0)->data + 5);
    md_safetensors_close(file);
    md_safetensors_close(NULL);
}

static void test_empty(void **state)
{
    (void)state;
    md_safetensors *file;
    assert_int_equal(md_safetensors_open(file_write(2, "{}", 0), &file, NULL), CM_OK);
    assert_int_equal(md_safetensors_count(file), 0);
    assert_null(md_safetensors_find(file, "a"));
    md_safetensors_close(file);
}

/* The golden data have all dtypes, and data that no alignment can be assumed of. */
static void test_golden(void **state)
{
    (void)state;
    md_safetensors *file;
    cm_error err = {0};
    if (md_safetensors_open(BALEEN_TEST_DATA "/ops/formats.safetensors", &file, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    for (uint32_t i = 0; i < md_safetensors_count(file); i++) {
        const md_tensor *tensor = md_safetensors_at(file, i);
        assert_ptr_equal(md_safetensors_find(file, tensor->name), tensor);
        uint64_t n_bytes = md_dtype_bytes(tensor->dtype);
        for (uint32_t j = 0; j < tensor->n_dim; j++) {
            n_bytes *= tensor->dim[j];
        }
        assert_int_equal(tensor->n_bytes, n_bytes);
    }
    md_safetensors_close(file);
    assert_string_equal(md_dtype_name(MD_F8_E8M0), "F8_E8M0");
    assert_int_equal(md_dtype_bytes(MD_BF16), 2);
}

/* The same bytes as through the mapping; a file that shrank under it is an error, not a signal. */
static void test_read(void **state)
{
    (void)state;
    md_safetensors *file;
    cm_error err = {0};
    uint8_t bytes[64];
    const char *header = "{\"a\":{\"dtype\":\"U8\",\"shape\":[64],\"data_offsets\":[0,64]}}";
    const char *path = file_write(strlen(header), header, 64);
    assert_int_equal(md_safetensors_open(path, &file, NULL), CM_OK);
    memset(bytes, 1, sizeof bytes);
    assert_int_equal(md_safetensors_read(file, 0, bytes, 64, &err), CM_OK);
    assert_memory_equal(bytes, md_safetensors_at(file, 0)->data, 64);
    assert_int_equal(truncate(path, (off_t)strlen(header) + 8 + 10), 0);
    assert_int_equal(md_safetensors_read(file, 2, bytes, 8, &err), CM_OK);
    assert_int_equal(md_safetensors_read(file, 2, bytes, 9, &err), CM_E_IO);
    assert_string_equal(err.field, "file");
    assert_non_null(strstr(err.text, "became shorter"));
    md_safetensors_close(file);
}

/* Two names with one hash are two entries. */
static void test_hash_collision(void **state)
{
    (void)state;
    md_names names;
    int one = 1, two = 2, three = 3;
    md_names_init(&names, 3);
    assert_true(md_names_put(&names, 42, "one", &one));
    assert_null(md_names_get(&names, 42, "two"));
    assert_true(md_names_put(&names, 42, "two", &two));
    assert_false(md_names_put(&names, 42, "one", &two));
    assert_false(md_names_put(&names, 42, "two", &one));
    assert_true(md_names_put(&names, 42, "three", &three));
    assert_ptr_equal(md_names_get(&names, 42, "one"), &one);
    assert_ptr_equal(md_names_get(&names, 42, "two"), &two);
    assert_ptr_equal(md_names_get(&names, 42, "three"), &three);
    assert_null(md_names_get(&names, 42, "four"));
    assert_null(md_names_get(&names, 43, "one"));
    md_names_fini(&names);
}

/* ---- what is wrong with the file ---- */

static void test_bad_file(void **state)
{
    (void)state;
    char path[T_FOLDER_MAX + 8];
    snprintf(path, sizeof path, "%s/file", folder);
    unlink(path);
    assert_open_fails(path, CM_E_IO, "file", "No such file");
    assert_open_fails(folder, CM_E_IO, folder + 5, "not a regular file");
    assert_open_fails(file_write(0, "", 0), CM_E_CORRUPT, "file", "not valid JSON");
    assert_open_fails(file_write(3, "{}", 0), CM_E_CORRUPT, "file", "truncated");
    assert_open_fails(file_write(UINT64_MAX, "{}", 0), CM_E_CORRUPT, "file", "truncated");
    assert_open_fails(file_write(UINT64_MAX - 7, "{}", 0), CM_E_CORRUPT, "file", "truncated");
    assert_open_fails(file_write(2, "{}", 1), CM_E_CORRUPT, "file", "belong to none");
    assert_int_equal(truncate(path, 7), 0);
    assert_open_fails(path, CM_E_CORRUPT, "file", "truncated");
    assert_int_equal(truncate(path, 0), 0);
    assert_open_fails(path, CM_E_CORRUPT, "file", "truncated");
}

static void test_truncated(void **state)
{
    (void)state;
    const char *header = "{\"a\":{\"dtype\":\"U8\",\"shape\":[40],\"data_offsets\":[0,40]}}";
    md_safetensors *file;
    assert_int_equal(md_safetensors_open(file_write(strlen(header), header, 40), &file, NULL), CM_OK);
    md_safetensors_close(file);
    for (size_t n = 0; n < 40; n++) {
        assert_open_fails(file_write(strlen(header), header, n), CM_E_CORRUPT, "a", "truncated");
    }
}

/* Headers over 16 bytes of data. */
static void test_bad_header(void **state)
{
    (void)state;
#define T(dtype, shape, range) "{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" range "}"
#define GOOD                   T("\"U8\"", "[16]", "[0,16]")
    static const struct {
        const char *header, *field, *words;
    } rows[] = {
        {"", "file", "not valid JSON"},
        {"[]", "file", "must hold a JSON object"},
        {"{\"a\":" GOOD "} x", "file", "not valid JSON"},
        {"{\"a\":" GOOD, "file", "not valid JSON"},
        {"{\"\xC3(\":" GOOD "}", "file", "not valid JSON"},
        {"{\"a\":" GOOD ",\"a\":" GOOD "}", "file", "duplicate"},
        {"{}", "file", "belong to none"},
        {"{\"a\":7}", "a", "must be an object"},
        {"{\"a\":{}}", "a", "dtype must be a string"},
        {"{\"a\":" T("7", "[16]", "[0,16]") "}", "a", "dtype must be a string"},
        {"{\"a\":" T("\"F16\"", "[8]", "[0,16]") "}", "a", "unknown dtype F16"},
        {"{\"a\":" T("\"U8\"", "16", "[0,16]") "}", "a", "shape must be a list"},
        {"{\"a\":" T("\"U8\"", "[1,1,1,1,16]", "[0,16]") "}", "a", "at most 4"},
        {"{\"a\":" T("\"U8\"", "[-16]", "[0,16]") "}", "a", "not a size"},
        {"{\"a\":" T("\"U8\"", "[16.0]", "[0,16]") "}", "a", "not a size"},
        {"{\"a\":" T("\"U8\"", "[4294967296,4294967296,1]", "[0,0]") "}", "a", "overflows"},
        {"{\"a\":" T("\"I64\"", "[2305843009213693954]", "[0,16]") "}", "a", "overflows"},
        {"{\"a\":" T("\"U8\"", "[16]", "16") "}", "a", "two ascending offsets"},
        {"{\"a\":" T("\"U8\"", "[16]", "[16]") "}", "a", "two ascending offsets"},
        {"{\"a\":" T("\"U8\"", "[16]", "[0,16,16]") "}", "a", "two ascending offsets"},
        {"{\"a\":" T("\"U8\"", "[16]", "[16,0]") "}", "a", "two ascending offsets"},
        {"{\"a\":" T("\"U8\"", "[16]", "[-1,15]") "}", "a", "two ascending offsets"},
        {"{\"a\":" T("\"U8\"", "[16]", "[0,16.0]") "}", "a", "two ascending offsets"},
        {"{\"a\":" T("\"U8\"", "[17]", "[0,17]") "}", "a", "truncated"},
        {"{\"a\":" T("\"U8\"", "[15]", "[0,16]") "}", "a", "need 15"},
        {"{\"a\":" T("\"F32\"", "[2,2]", "[0,8]") "}", "a", "need 16"},
        {"{\"a\":" T("\"U8\"", "[15]", "[0,15]") "}", "file", "1 bytes after the last tensor"},
        {"{\"a\":" T("\"U8\"", "[15]", "[1,16]") "}", "a", "gap"},
        {"{\"a\":" T("\"U8\"", "[7]", "[0,7]") ",\"b\":" T("\"U8\"", "[8]", "[8,16]") "}", "b", "gap"},
        {"{\"b\":" T("\"U8\"", "[9]", "[7,16]") ",\"a\":" T("\"U8\"", "[8]", "[0,8]") "}", "b", "overlap"},
        {"{\"a\":" GOOD ",\"b\":" GOOD "}", "b", "overlap"},
        {"{\"a\":" T("\"U8\"", "[16]", "[0,16]") ",\"b\":" T("\"U8\"", "[0]", "[9,9]") "}", "b", "overlap"},
    };
#undef GOOD
#undef T
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        assert_open_fails(file_write(strlen(rows[i].header), rows[i].header, 16), CM_E_CORRUPT, rows[i].field,
                          rows[i].words);
    }
}

/* ---- hostile bytes and failing memory ---- */

/* Reads a golden file's header text; the caller frees it. */
static char *golden_header(size_t *n_bytes_out, uint64_t *file_bytes_out)
{
    md_safetensors *file;
    assert_int_equal(md_safetensors_open(BALEEN_TEST_DATA "/ops/formats.safetensors", &file, NULL), CM_OK);
    const char *header = md_safetensors_header(file, n_bytes_out);
    char *copy = cm_alloc(*n_bytes_out);
    memcpy(copy, header, *n_bytes_out);
    *file_bytes_out = 8 + *n_bytes_out + md_safetensors_data_bytes(file);
    md_safetensors_close(file);
    return copy;
}

static void test_mutations(void **state)
{
    (void)state;
    enum { ROUNDS = 20000, SEED = 20261 };
    static const char alphabet[] = "0123456789-.,\"{}[]:eF_x\xFF";
    size_t n;
    uint64_t file_bytes;
    char *text = golden_header(&n, &file_bytes), *copy = cm_alloc(n);
    printf("mutations: seed %d\n", SEED);
    for (uint64_t round = 0; round < ROUNDS; round++) {
        md_header header;
        memcpy(copy, text, n);
        for (uint64_t k = 0; k <= round % 3; k++) {
            cm_rng_block random = cm_rng_at(SEED, round, k);
            copy[random.word[0] % n] = alphabet[random.word[1] % (sizeof alphabet - 1)];
        }
        if (md_safetensors_parse_header(copy, n, file_bytes, "file", &header, NULL) == CM_OK) {
            uint64_t at = 0;
            for (uint32_t i = 0; i < header.n; i++) {
                assert_int_equal(header.rows[i].begin, at);
                at += header.rows[i].tensor.n_bytes;
            }
            assert_int_equal(at, file_bytes - 8 - n);
            md_header_fini(&header);
        }
    }
    cm_free(copy);
    cm_free(text);
}

static long allocs_left;

static void *failing_alloc(size_t n_bytes)
{
    return allocs_left-- > 0 ? cm_try_alloc(n_bytes) : NULL;
}

/* As in test_geometry: an error for every n-th allocation that fails, and no leak. */
static void test_failing_memory(void **state)
{
    (void)state;
    const char *path = BALEEN_TEST_DATA "/ops/formats.safetensors";
    md_safetensors *file;
    cm_status status = CM_AGAIN;
    json_set_alloc_funcs(failing_alloc, cm_free);
    for (long n = 0; status != CM_OK && n < 100000; n++) {
        allocs_left = n;
        status = md_safetensors_open(path, &file, NULL);
        assert_true(status <= CM_OK);
    }
    json_set_alloc_funcs(cm_try_alloc, cm_free);
    assert_int_equal(status, CM_OK);
    md_safetensors_close(file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),           cmocka_unit_test(test_empty),
        cmocka_unit_test(test_golden),         cmocka_unit_test(test_bad_file),
        cmocka_unit_test(test_truncated),      cmocka_unit_test(test_bad_header),
        cmocka_unit_test(test_mutations),      cmocka_unit_test(test_failing_memory),
        cmocka_unit_test(test_hash_collision), cmocka_unit_test(test_read),
    };
    return cmocka_run_group_tests(tests, folder_make, folder_remove);
}
