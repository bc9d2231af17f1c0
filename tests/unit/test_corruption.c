/* Every field of a config.json and of a safetensors header, wrong in every way that one field can be: refused
 * with the field named, or on one of the closed lists of tests/unit/field_rules.h and then without effect, or
 * with exactly the effect that was written. */
#include <dirent.h>
#include <inttypes.h>
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

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "common/model/checkpoint.h"
#include "common/model/safetensors_private.h"
#include "tests/support/temp_folder.h"
#include "tests/unit/field_rules.h"

#define TINY(name) BALEEN_TEST_DATA "/model/" name "/ckpt"

/* ---- a folder with a checkpoint's shards by link and files of our own ---- */

static char copy_dir[T_FOLDER_MAX];

static const char *copy_path(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", copy_dir, name);
    return path;
}

static void copy_make(const char *source)
{
    t_folder_make(copy_dir, "corruption");
    t_folder_link_checkpoint(copy_dir, source);
}

static int copy_remove(void **state)
{
    (void)state;
    t_folder_remove(copy_dir);
    return 0;
}

static void file_put(const char *name, const char *text)
{
    unlink(copy_path(name));
    FILE *file = fopen(copy_path(name), "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, strlen(text), file), strlen(text));
    assert_int_equal(fclose(file), 0);
}

/* ---- fields and what can be wrong with one ---- */

/* A place in a JSON document: a member of an object or an entry of a list. */
typedef struct field {
    json_t *parent;  /* borrowed */
    const char *key; /* NULL: an entry of a list */
    size_t i;
    const char *path; /* "rope_scaling.factor", "compress_ratios[2]" */
} field;

static json_t *field_get(const field *f)
{
    return f->key != NULL ? json_object_get(f->parent, f->key) : json_array_get(f->parent, f->i);
}

static void field_set(const field *f, json_t *value)
{
    int failed = f->key != NULL ? json_object_set_new(f->parent, f->key, value)
                                : json_array_set_new(f->parent, f->i, value);
    assert_int_equal(failed, 0);
}

/* Objects keep the order of their members only while none is taken out: the value is put back at the end,
 * which no reader may care about. */
static void field_remove(const field *f)
{
    int failed = f->key != NULL ? json_object_del(f->parent, f->key) : json_array_remove(f->parent, f->i);
    assert_int_equal(failed, 0);
}

static void field_restore(const field *f, json_t *value, bool removed)
{
    if (removed && f->key == NULL) {
        assert_int_equal(json_array_insert_new(f->parent, f->i, value), 0);
    } else {
        field_set(f, value);
    }
}

/* Wrong in themselves or by where they stand; "NaN" and "1e999" are not JSON and tried as text elsewhere. */
static const char *const any_values[] = {"null",
                                         "true",
                                         "false",
                                         "\"\"",
                                         "\"x\"",
                                         "\"NaN\"",
                                         "\"7\"",
                                         "[]",
                                         "[7]",
                                         "{}",
                                         "{\"x\":7}",
                                         "0",
                                         "-1",
                                         "0.5",
                                         "-0.5",
                                         "7.5",
                                         "1e-300",
                                         "1e300",
                                         "4294967296",
                                         "9007199254740993",
                                         "9223372036854775807",
                                         "-9223372036854775808"};
enum { ANY_VALUES = sizeof any_values / sizeof any_values[0], NEAR_VALUES = 6 };

/* Values next to the present one: [i] of NEAR_VALUES; NULL when there is none. */
static json_t *near_value(const json_t *value, int i)
{
    static const double steps[NEAR_VALUES] = {1, -1, 0.5, -0.5, 0, 0};
    if (json_is_integer(value)) {
        json_int_t n = json_integer_value(value);
        switch (i) {
        case 0:
        case 1:
            return json_integer(n + (json_int_t)steps[i]);
        case 2:
        case 3:
            return json_real((double)n + steps[i]);
        case 4:
            return json_integer(-n);
        default:
            return json_integer(2 * n);
        }
    }
    if (json_is_real(value) && i < 5) {
        double x = json_real_value(value);
        return json_real(i < 4 ? x + steps[i] : -x);
    }
    if (json_is_boolean(value) && i == 0) {
        return json_boolean(!json_is_true(value));
    }
    if (json_is_string(value) && i < 2) { /* a letter more, and one changed */
        char text[128];
        snprintf(text, sizeof text, "%s%s", json_string_value(value), i == 0 ? "x" : "");
        text[0] = (char)(i == 1 ? text[0] ^ 1 : text[0]);
        return json_string(text);
    }
    return NULL;
}

typedef void (*corrupt_fn)(void *ctx, const field *f, const char *what);

/* Calls fn with the document wrong in one place, in each way; the document is as before afterwards. */
static void corrupt_field(const field *f, corrupt_fn fn, void *ctx)
{
    json_t *before = json_deep_copy(field_get(f));
    char what[160];
    for (int i = 0; i < ANY_VALUES + NEAR_VALUES; i++) {
        json_t *value = i < ANY_VALUES ? json_loads(any_values[i], JSON_DECODE_ANY, NULL)
                                       : near_value(before, i - ANY_VALUES);
        if (value == NULL || json_equal(value, before)) {
            json_decref(value);
            continue;
        }
        char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
        snprintf(what, sizeof what, "%.80s = %.60s", f->path, text);
        cm_free(text);
        field_set(f, value);
        fn(ctx, f, what);
        field_set(f, json_deep_copy(before));
    }
    field_remove(f);
    snprintf(what, sizeof what, "%.80s removed", f->path);
    fn(ctx, f, what);
    field_restore(f, before, true);
}

/* Every field below value, depth first, and every field corrupted. */
static void corrupt_below(json_t *value, const char *path, corrupt_fn fn, void *ctx)
{
    char below[128];
    if (json_is_object(value)) {
        const char *keys[256], *key;
        json_t *member;
        size_t n = 0;
        json_object_foreach(value, key, member)
        {
            assert_true(n < 256);
            keys[n++] = cm_strdup(key);
        }
        for (size_t i = 0; i < n; i++) {
            snprintf(below, sizeof below, "%s%s%s", path, path[0] != '\0' ? "." : "", keys[i]);
            field f = {.parent = value, .key = keys[i], .path = below};
            corrupt_field(&f, fn, ctx);
            corrupt_below(json_object_get(value, keys[i]), below, fn, ctx);
            cm_free((void *)(uintptr_t)keys[i]);
        }
    } else if (json_is_array(value)) {
        for (size_t i = 0; i < json_array_size(value); i++) {
            snprintf(below, sizeof below, "%s[%zu]", path, i);
            field f = {.parent = value, .i = i, .path = below};
            corrupt_field(&f, fn, ctx);
        }
    }
}

/* ---- config.json ---- */

typedef struct config_case {
    json_t *config;
    md_geometry good;
    char fingerprint[33];
    bool whole; /* the checkpoint is opened; else only the config is read */
    uint32_t n, n_refused, n_unread, n_same, n_other;
} config_case;

static cm_status config_open(config_case *c, md_geometry *geometry_out, char fingerprint_out[33],
                             cm_error *err)
{
    char *text = json_dumps(c->config, 0);
    cm_status status;
    if (c->whole) {
        md_checkpoint *checkpoint;
        file_put("config.json", text);
        status = md_checkpoint_open(copy_dir, &checkpoint, NULL, NULL, err);
        if (status == CM_OK) {
            *geometry_out = *md_checkpoint_geometry(checkpoint);
            assert_int_equal(md_checkpoint_fingerprint(checkpoint, fingerprint_out, err), CM_OK);
            md_checkpoint_close(checkpoint);
        }
    } else {
        status = md_geometry_parse(text, strlen(text), geometry_out, err);
        snprintf(fingerprint_out, 33, "-");
    }
    cm_free(text);
    return status;
}

static void config_check_accepted(config_case *c, const field *f, const char *what,
                                  const md_geometry *geometry, const char *fingerprint)
{
    bool same = memcmp(geometry, &c->good, sizeof *geometry) == 0;
    if (c->whole && strcmp(fingerprint, c->fingerprint) == 0) {
        fail_msg("%s: accepted with the fingerprint of the good one", what);
    }
    if (same && field_is_unread(f->path)) {
        c->n_unread++;
    } else if (same && strstr(what, " removed") != NULL && field_may_be_absent(f->path)) {
        c->n_same++;
    } else if (!same && field_is_free(f->path) && strstr(what, " removed") == NULL) {
        c->n_other++;
    } else {
        fail_msg("%s: accepted, and the geometry is %s", what, same ? "unchanged" : "another one");
    }
}

static void config_check(void *ctx, const field *f, const char *what)
{
    config_case *c = ctx;
    md_geometry geometry;
    char fingerprint[33];
    cm_error err = {0};
    c->n++;
    if (config_open(c, &geometry, fingerprint, &err) == CM_OK) {
        config_check_accepted(c, f, what, &geometry, fingerprint);
        return;
    }
    if (err.status != CM_E_CORRUPT || !field_is_named(f->path, err.text)) {
        fail_msg("%s: %s, field '%s': %s", what, cm_status_name(err.status), err.field, err.text);
    }
    c->n_refused++;
}

static void config_walk(const char *path, bool whole)
{
    config_case c = {.config = json_load_file(path, 0, NULL), .whole = whole};
    cm_error err = {0};
    assert_non_null(c.config);
    if (config_open(&c, &c.good, c.fingerprint, &err) != CM_OK) {
        fail_msg("%s: %s", path, err.text);
    }
    corrupt_below(c.config, "", config_check, &c);
    print_message("%s: %u corruptions, %u refused, %u of unread keys, %u said the same, %u another model\n",
                  path, c.n, c.n_refused, c.n_unread, c.n_same, c.n_other);
    assert_true(c.n > 1000 && c.n_refused > c.n / 2);
    json_decref(c.config);
}

static void test_config(void **state)
{
    static const char *const dirs[] = {TINY("tiny-flash"), TINY("tiny-base"), BALEEN_NANO};
    for (size_t i = 0; i < sizeof dirs / sizeof dirs[0]; i++) {
        char path[512];
        copy_make(dirs[i]);
        snprintf(path, sizeof path, "%s/config.json", dirs[i]);
        config_walk(path, true);
        copy_remove(state);
    }
}

/* The released sizes, DSpark's keys among them, as far as the config alone can tell. Here what the tensors
 * show would not be noticed: those keys are another model as well. */
static void config_check_alone(void *ctx, const field *f, const char *what)
{
    config_case *c = ctx;
    md_geometry geometry;
    char fingerprint[33];
    cm_error err = {0};
    c->n++;
    if (config_open(c, &geometry, fingerprint, &err) != CM_OK) {
        if (!field_is_named(f->path, err.text)) {
            fail_msg("%s: field '%s': %s", what, err.field, err.text);
        }
        c->n_refused++;
    } else if (memcmp(&geometry, &c->good, sizeof geometry) == 0 && !field_is_unread(f->path) &&
               !field_may_be_absent(f->path)) {
        fail_msg("%s: accepted and ignored", what);
    }
}

static void test_config_alone(void **state)
{
    static const char *const names[] = {"pro", "flash", "pro_0813", "flash_0731"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char path[512];
        config_case c = {0};
        cm_error err = {0};
        snprintf(path, sizeof path, "%s/%s_config.json", UNIT_TEST_DATA, names[i]);
        c.config = json_load_file(path, 0, NULL);
        assert_non_null(c.config);
        assert_int_equal(config_open(&c, &c.good, c.fingerprint, &err), CM_OK);
        corrupt_below(c.config, "", config_check_alone, &c);
        assert_true(c.n > 1000 && c.n_refused > c.n / 2);
        json_decref(c.config);
    }
    (void)state;
}

/* What a parser of JSON could be lax about: the text itself is wrong at one field. */
static void test_config_text(void **state)
{
    static const struct {
        const char *from, *to, *words;
    } rows[] = {
        {"\"hidden_size\": 128", "\"hidden_size\": NaN", "line"},
        {"\"hidden_size\": 128", "\"hidden_size\": 1e999", "line"},
        {"\"hidden_size\": 128", "\"hidden_size\": 0x80", "line"},
        {"\"hidden_size\": 128", "\"hidden_size\": 0128", "line"},
        {"\"hidden_size\": 128", "\"hidden_size\": 99999999999999999999", "line"},
        {"\"hidden_size\": 128", "\"hidden_size\": ", "line"},
        {"\"hidden_size\": 128", "\"hidden_size\": 128, \"hidden_size\": 128", "hidden_size"},
        {"\"hidden_size\": 128", "\"hidden_sizes\": 128", "hidden_size"},
        {"\"hidden_size\": 128", "\"Hidden_size\": 128", "hidden_size"},
        {"\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": -Infinity", "line"},
        {"\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 1e-400", "rms_norm_eps"},
        {"\"factor\": 4", "\"factor\": 4, \"factor\": 4", "factor"},
    };
    char text[8192], edited[8400];
    FILE *file = fopen(TINY("tiny-flash") "/config.json", "rb");
    (void)state;
    assert_non_null(file);
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        md_geometry geometry;
        cm_error err = {0};
        const char *at = strstr(text, rows[i].from);
        assert_non_null(at);
        snprintf(edited, sizeof edited, "%.*s%s%s", (int)(at - text), text, rows[i].to,
                 at + strlen(rows[i].from));
        if (md_geometry_parse(edited, strlen(edited), &geometry, &err) != CM_E_CORRUPT ||
            strstr(err.text, rows[i].words) == NULL) {
            fail_msg("%s: '%s'", rows[i].to, err.text);
        }
    }
}

/* ---- a shard's header ---- */

#define SHARD "model-00004-of-00008.safetensors" /* layer 2 of tiny-flash: ratio 4, hash */

typedef struct header_case {
    json_t *header;
    uint64_t data_bytes;
    const char *tensor; /* the one that is being corrupted */
    md_header good;
    uint32_t n, n_refused, n_audited;
} header_case;

static cm_status header_parse(const header_case *c, md_header *header_out, cm_error *err)
{
    char *text = json_dumps(c->header, JSON_COMPACT);
    size_t n = strlen(text);
    cm_status status = md_safetensors_parse_header(text, n, 8 + n + c->data_bytes, SHARD, header_out, err);
    cm_free(text);
    return status;
}

static const md_header_row *header_find(const md_header *header, const char *name)
{
    for (uint32_t i = 0; i < header->n; i++) {
        if (strcmp(header->rows[i].tensor.name, name) == 0) {
            return &header->rows[i];
        }
    }
    return NULL;
}

static bool row_equal(const md_header_row *a, const md_header_row *b)
{
    return a != NULL && b != NULL && a->begin == b->begin && a->tensor.dtype == b->tensor.dtype &&
           a->tensor.n_dim == b->tensor.n_dim &&
           memcmp(a->tensor.dim, b->tensor.dim, sizeof a->tensor.dim) == 0;
}

/* A header that reads well may differ from the good one in the dtype and shape of that tensor alone, which
 * the closed list then refuses (test_checkpoint). */
static void header_check_audited(header_case *c, const char *what, const md_header *header)
{
    for (uint32_t i = 0; i < c->good.n; i++) {
        const md_header_row *was = &c->good.rows[i], *is = header_find(header, was->tensor.name);
        bool ours = strcmp(was->tensor.name, c->tensor) == 0;
        if (ours ? is == NULL || row_equal(was, is) || was->begin != is->begin : !row_equal(was, is)) {
            fail_msg("%s: accepted, with tensor %s %s", what, was->tensor.name,
                     ours ? "unchanged" : "changed");
        }
    }
    assert_int_equal(header->n, c->good.n);
    c->n_audited++;
}

static const char *header_word(const field *f, const char *what)
{
    static const char *const words[] = {"dtype", "shape", "data_offsets"};
    for (size_t i = 0; i < 3; i++) {
        if (strstr(f->path, words[i]) != NULL) {
            return words[i];
        }
    }
    /* a whole entry that is gone leaves a gap: its neighbours are named */
    return strstr(what, "removed") != NULL ? "" : "tensor";
}

static void header_check(void *ctx, const field *f, const char *what)
{
    header_case *c = ctx;
    md_header header;
    cm_error err = {0};
    c->n++;
    if (header_parse(c, &header, &err) == CM_OK) {
        header_check_audited(c, what, &header);
        md_header_fini(&header);
        return;
    }
    bool entry_lost = f->key == c->tensor && strstr(what, "removed") != NULL;
    if (err.status != CM_E_CORRUPT || (!entry_lost && strstr(err.text, c->tensor) == NULL) ||
        strstr(err.text, header_word(f, what)) == NULL || err.field[0] == '\0') {
        fail_msg("%s: '%s'", what, err.text);
    }
    c->n_refused++;
}

/* Ways that one field cannot have: other dtypes, ranges moved as a whole, shapes of other ranks, keys too
 * many. entry: the tensor's; good: a copy of it. */
static void header_corrupt_dtype(header_case *c, json_t *entry, const json_t *good)
{
    static const char *const dtypes[] = {"F64",     "F16", "F32",  "BF16",     "F8_E4M3", "F8_E5M2",
                                         "F8_E8M0", "I8",  "U8",   "I16",      "I32",     "I64",
                                         "BOOL",    "f32", " F32", "F8_E4M3FN"};
    const field f = {.parent = entry, .key = "dtype", .path = "dtype"};
    const char *dtype = json_string_value(json_object_get(good, "dtype"));
    char what[200];
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
        if (strcmp(dtypes[i], dtype) != 0) {
            snprintf(what, sizeof what, "%s: dtype %s", c->tensor, dtypes[i]);
            json_object_set_new(entry, "dtype", json_string(dtypes[i]));
            header_check(c, &f, what);
        }
    }
    json_object_set(entry, "dtype", json_object_get(good, "dtype"));
}

static void header_corrupt_range(header_case *c, json_t *entry, const json_t *good)
{
    const field f = {.parent = entry, .key = "data_offsets", .path = "data_offsets"};
    const json_t *range = json_object_get(good, "data_offsets");
    json_int_t begin = json_integer_value(json_array_get(range, 0)),
               end = json_integer_value(json_array_get(range, 1));
    json_int_t n = end - begin, all = (json_int_t)c->data_bytes;
    const json_int_t ranges[][2] = {{begin + 1, end + 1},
                                    {begin - 1, end - 1},
                                    {begin + n, end + n},
                                    {begin - n, end - n},
                                    {end, begin},
                                    {all - n, all},
                                    {all, all + n},
                                    {0, n},
                                    {all / 2, all / 2 + n},
                                    {begin, begin},
                                    {INT64_MAX - n, INT64_MAX}};
    char what[200];
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++) {
        if (ranges[i][0] != begin || ranges[i][1] != end) {
            snprintf(what, sizeof what, "%s: data_offsets [%" PRId64 ", %" PRId64 "]", c->tensor,
                     (int64_t)ranges[i][0], (int64_t)ranges[i][1]);
            json_object_set_new(entry, "data_offsets", json_pack("[I,I]", ranges[i][0], ranges[i][1]));
            header_check(c, &f, what);
        }
    }
    json_object_set(entry, "data_offsets", json_object_get(good, "data_offsets"));
}

static void header_corrupt_rank(header_case *c, json_t *entry)
{
    const field f = {.parent = entry, .key = "shape", .path = "shape"};
    json_t *shape = json_object_get(entry, "shape");
    char what[200];
    for (int i = 0; i < 4; i++) { /* longer by ones, then beyond what a tensor has */
        json_array_append_new(shape, json_integer(1));
        snprintf(what, sizeof what, "%s: %d ones more", c->tensor, i + 1);
        header_check(c, &f, what);
    }
}

static void header_corrupt_entry(header_case *c)
{
    static const char *const extra[] = {"x", "Dtype", "offset", ""};
    json_t *entry = json_object_get(c->header, c->tensor), *good = json_deep_copy(entry);
    char what[200];
    header_corrupt_dtype(c, entry, good);
    header_corrupt_range(c, entry, good);
    for (size_t i = 0; i < sizeof extra / sizeof extra[0]; i++) {
        const field f = {.parent = entry, .key = extra[i], .path = "unknown"};
        json_object_set_new(entry, extra[i], json_integer(1));
        snprintf(what, sizeof what, "%s: extra key '%s'", c->tensor, extra[i]);
        header_check(c, &f, what);
        json_object_del(entry, extra[i]);
    }
    header_corrupt_rank(c, entry);
    json_object_set_new(c->header, c->tensor, good);
}

/* One expert of the many; the ranges are packed again. */
static void header_thin(header_case *c, const md_header *whole)
{
    uint64_t at = 0;
    json_t *thin = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    for (uint32_t i = 0; i < whole->n; i++) {
        const md_tensor *t = &whole->rows[i].tensor;
        if (strstr(t->name, ".experts.") == NULL || strstr(t->name, ".experts.7.") != NULL) {
            json_t *entry = json_deep_copy(json_object_get(c->header, t->name));
            json_object_set_new(entry, "data_offsets",
                                json_pack("[I,I]", (json_int_t)at, (json_int_t)(at + t->n_bytes)));
            json_object_set_new(thin, t->name, entry);
            at += t->n_bytes;
        }
    }
    json_decref(c->header);
    c->header = thin;
    c->data_bytes = at;
}

static void header_load(header_case *c)
{
    size_t n_text;
    md_header whole;
    md_safetensors *file;
    cm_error err = {0};
    assert_int_equal(md_safetensors_open(TINY("tiny-flash") "/" SHARD, &file, &err), CM_OK);
    const char *text = md_safetensors_header(file, &n_text);
    c->header = json_loadb(text, n_text, 0, NULL);
    c->data_bytes = md_safetensors_data_bytes(file);
    md_safetensors_close(file);
    assert_non_null(c->header);
    assert_int_equal(header_parse(c, &whole, &err), CM_OK);
    header_thin(c, &whole);
    md_header_fini(&whole);
    assert_int_equal(header_parse(c, &c->good, &err), CM_OK);
}

static void test_header(void **state)
{
    header_case c = {0};
    (void)state;
    header_load(&c);
    for (uint32_t i = 0; i < c.good.n; i++) {
        field f = {.parent = c.header, .key = c.good.rows[i].tensor.name, .path = c.good.rows[i].tensor.name};
        c.tensor = f.key;
        corrupt_field(&f, header_check, &c);
        corrupt_below(json_object_get(c.header, c.tensor), "", header_check, &c);
        header_corrupt_entry(&c);
    }
    md_header again;
    cm_error err = {0};
    assert_int_equal(header_parse(&c, &again, &err), CM_OK); /* and nothing was left behind */
    print_message("%u tensors: %u corruptions, %u refused, %u left to the closed list\n", c.good.n, c.n,
                  c.n_refused, c.n_audited);
    assert_true(c.n > 5000 && c.n_refused > c.n * 9 / 10 && c.n_audited > 0);
    md_header_fini(&again);
    md_header_fini(&c.good);
    json_decref(c.header);
}

/* ---- the file around a header ---- */

static void file_check(const cm_bytes *bytes, const char *what, const char *words)
{
    md_safetensors *file;
    cm_error err = {0};
    FILE *out = fopen(copy_path("file"), "wb");
    assert_non_null(out);
    assert_int_equal(fwrite(bytes->data, 1, bytes->len, out), bytes->len);
    assert_int_equal(fclose(out), 0);
    if (md_safetensors_open(copy_path("file"), &file, &err) != CM_E_CORRUPT ||
        strstr(err.text, words) == NULL || strstr(err.text, "file") == NULL) {
        fail_msg("%s: '%s', expected '%s'", what, err.text, words);
    }
}

/* header_bytes stands in the file for the length of text; n_data bytes follow. */
static void file_check_with(uint64_t header_bytes, const char *text, size_t n_data, const char *what,
                            const char *words)
{
    static const uint8_t data[64] = {0};
    cm_bytes bytes;
    cm_bytes_init(&bytes, 0);
    cm_bytes_append(&bytes, &header_bytes, 8);
    cm_bytes_append_text(&bytes, text);
    cm_bytes_append(&bytes, data, n_data);
    file_check(&bytes, what, words);
    cm_bytes_fini(&bytes);
}

#define ENTRY "\"a\":{\"dtype\":\"U8\",\"shape\":[16],\"data_offsets\":[0,16]}"

static void test_header_length(void **state)
{
    static const char good[] = "{" ENTRY "}  ";
    const uint64_t n = sizeof good - 1;
    const uint64_t lengths[] = {0,      1,        n / 2,      n - 3,     n + 1,          n + 8,     n + 16,
                                n + 17, 1u << 20, 1ull << 32, INT64_MAX, UINT64_MAX - 8, UINT64_MAX};
    (void)state;
    copy_make(TINY("tiny-flash"));
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        char what[64];
        snprintf(what, sizeof what, "length %" PRIu64 " for %" PRIu64, lengths[i], n);
        file_check_with(lengths[i], good, 16, what, "");
    }
    /* a byte less is still JSON, but then the data begins a byte early */
    file_check_with(n - 1, good, 16, "a length of one less", "1 bytes after the last tensor, a,");
    file_check_with(n, good, 15, "truncated", "tensor a ends at byte 16");
    file_check_with(n, good, 17, "a byte more", "1 bytes after the last tensor, a,");
    file_check_with(sizeof "{" ENTRY "," ENTRY "}" - 1, "{" ENTRY "," ENTRY "}", 16, "twice the same name",
                    "\"a\"");
    copy_remove(NULL);
}

static void test_metadata(void **state)
{
    static const struct {
        const char *value, *words;
    } rows[] = {{"7", "__metadata__ must be an object"},
                {"null", "__metadata__ must be an object"},
                {"[]", "__metadata__ must be an object"},
                {"{\"format\":7}", "format must be a string"},
                {"{\"format\":null}", "format must be a string"}};
    (void)state;
    copy_make(TINY("tiny-flash"));
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        char text[256];
        snprintf(text, sizeof text, "{\"__metadata__\":%s," ENTRY "}", rows[i].value);
        file_check_with(strlen(text), text, 16, rows[i].value, rows[i].words);
    }
    copy_remove(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_config, copy_remove),
        cmocka_unit_test(test_config_alone),
        cmocka_unit_test(test_config_text),
        cmocka_unit_test(test_header),
        cmocka_unit_test_teardown(test_header_length, copy_remove),
        cmocka_unit_test_teardown(test_metadata, copy_remove),
    };
    /* so that what jansson returns can be freed with cm_free */
    json_set_alloc_funcs(cm_try_alloc, cm_free);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
