/* Whole checkpoints: the closed list against published totals, the small checkpoints as they are, and copies
 * of them with one thing wrong each. */
#include <dirent.h>
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
#include "tests/support/temp_folder.h"

#define TINY(name) BALEEN_TEST_DATA "/model/" name "/ckpt"

/* ---- files ---- */

static void file_read(const char *path, cm_bytes *bytes)
{
    char piece[65536];
    size_t n;
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        fail_msg("cannot open %s", path);
    }
    cm_bytes_init(bytes, 0);
    while ((n = fread(piece, 1, sizeof piece, file)) > 0) {
        cm_bytes_append(bytes, piece, n);
    }
    fclose(file);
}

/* In place of what is there, which may be a link. */
static void file_write(const char *path, const void *data, size_t n_bytes)
{
    unlink(path);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, n_bytes, file), n_bytes);
    assert_int_equal(fclose(file), 0);
}

/* ---- a copy of a checkpoint: links to the original's files until one is written ---- */

static char copy_dir[T_FOLDER_MAX]; /* "" when there is none */

static const char *copy_path(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", copy_dir, name);
    return path;
}

static void copy_make(const char *source)
{
    t_folder_make(copy_dir, "checkpoint");
    t_folder_link_checkpoint(copy_dir, source);
}

static int copy_remove(void **state)
{
    (void)state;
    t_folder_remove(copy_dir);
    return 0;
}

/* ---- edits of a copy ---- */

static const char index_name[] = "model.safetensors.index.json";

static json_t *json_edit_begin(const char *name)
{
    json_t *root = json_load_file(copy_path(name), 0, NULL);
    assert_non_null(root);
    return root;
}

static void json_edit_end(const char *name, json_t *root)
{
    char *text = json_dumps(root, JSON_COMPACT);
    file_write(copy_path(name), text, strlen(text));
    cm_free(text);
    json_decref(root);
}

static void config_set(const char *key, json_t *value)
{
    json_t *root = json_edit_begin("config.json");
    if (value != NULL) {
        json_object_set_new(root, key, value);
    } else {
        json_object_del(root, key);
    }
    json_edit_end("config.json", root);
}

/* shard NULL: out of the index. */
static void index_set(const char *tensor, const char *shard)
{
    json_t *root = json_edit_begin(index_name);
    json_t *weight_map = json_object_get(root, "weight_map");
    if (shard != NULL) {
        json_object_set_new(weight_map, tensor, json_string(shard));
    } else {
        assert_int_equal(json_object_del(weight_map, tensor), 0);
    }
    json_edit_end(index_name, root);
}

typedef struct shard_edit {
    const char *name;
    cm_bytes bytes; /* as read */
    json_t *header;
    size_t data_at; /* in bytes */
} shard_edit;

static void shard_edit_begin(shard_edit *edit, const char *name)
{
    uint64_t n;
    edit->name = name;
    file_read(copy_path(name), &edit->bytes);
    memcpy(&n, edit->bytes.data, 8);
    edit->data_at = 8 + (size_t)n;
    edit->header = json_loadb((const char *)edit->bytes.data + 8, (size_t)n, 0, NULL);
    assert_non_null(edit->header);
}

static void shard_edit_end(shard_edit *edit)
{
    char *text = json_dumps(edit->header, JSON_COMPACT);
    uint64_t n = strlen(text);
    cm_bytes file;
    cm_bytes_init(&file, 0);
    cm_bytes_append(&file, &n, 8);
    cm_bytes_append_text(&file, text);
    cm_bytes_append(&file, edit->bytes.data + edit->data_at, edit->bytes.len - edit->data_at);
    file_write(copy_path(edit->name), file.data, file.len);
    cm_bytes_fini(&file);
    cm_bytes_fini(&edit->bytes);
    cm_free(text);
    json_decref(edit->header);
}

static json_t *shard_tensor(shard_edit *edit, const char *tensor)
{
    json_t *value = json_object_get(edit->header, tensor);
    assert_non_null(value);
    return value;
}

static uint8_t *shard_data(shard_edit *edit, const char *tensor)
{
    json_t *range = json_object_get(shard_tensor(edit, tensor), "data_offsets");
    return edit->bytes.data + edit->data_at + json_integer_value(json_array_get(range, 0));
}

static void tensor_rename(const char *shard, const char *from, const char *to)
{
    shard_edit edit;
    shard_edit_begin(&edit, shard);
    json_object_set(edit.header, to, shard_tensor(&edit, from));
    json_object_del(edit.header, from);
    shard_edit_end(&edit);
}

/* An empty tensor takes no bytes, so nothing has to move. */
static void tensor_add(const char *shard, const char *name)
{
    shard_edit edit;
    shard_edit_begin(&edit, shard);
    json_object_set_new(edit.header, name,
                        json_pack("{s:s,s:[i],s:[i,i]}", "dtype", "U8", "shape", 0, "data_offsets", 0, 0));
    shard_edit_end(&edit);
}

static void tensor_set_dtype(const char *shard, const char *name, const char *dtype)
{
    shard_edit edit;
    shard_edit_begin(&edit, shard);
    json_object_set_new(shard_tensor(&edit, name), "dtype", json_string(dtype));
    shard_edit_end(&edit);
}

static void tensor_set_shape(const char *shard, const char *name, json_t *shape)
{
    shard_edit edit;
    shard_edit_begin(&edit, shard);
    json_object_set_new(shard_tensor(&edit, name), "shape", shape);
    shard_edit_end(&edit);
}

static void tensor_poke(const char *shard, const char *name, size_t at, const void *bytes, size_t n)
{
    shard_edit edit;
    shard_edit_begin(&edit, shard);
    memcpy(shard_data(&edit, name) + at, bytes, n);
    shard_edit_end(&edit);
}

/* ---- opening ---- */

typedef struct seen {
    uint32_t n;
    md_finding first, last;
} seen;

static void seen_add(void *ctx, const md_finding *finding)
{
    seen *s = ctx;
    if (s->n++ == 0) {
        s->first = *finding;
    }
    s->last = *finding;
}

static md_checkpoint *checkpoint_open(const char *dir)
{
    md_checkpoint *checkpoint;
    cm_error err = {0};
    seen s = {0};
    if (md_checkpoint_open(dir, &checkpoint, seen_add, &s, &err) != CM_OK) {
        fail_msg("%s: %s", dir, err.text);
    }
    assert_int_equal(s.n, 0);
    return checkpoint;
}

/* The copy is refused, with n findings, the first of them about name and saying words. */
static void assert_refused(const char *what, uint32_t n, const char *name, const char *words)
{
    md_checkpoint *checkpoint = (void *)0x1;
    cm_error err = {0};
    seen s = {0};
    cm_status status = md_checkpoint_open(copy_dir, &checkpoint, seen_add, &s, &err);
    if (status != CM_E_CORRUPT || s.n != n || strcmp(err.field, name) != 0 ||
        strstr(err.text, words) == NULL || strcmp(s.first.name, name) != 0 ||
        strstr(s.first.text, words) == NULL) {
        fail_msg("%s: status %s, %u findings, field '%s' text '%s', last '%s'; expected %u, '%s' and '%s'",
                 what, cm_status_name(status), s.n, err.field, err.text, s.last.text, n, name, words);
    }
    assert_ptr_equal(checkpoint, (void *)0x1);
    assert_int_equal(md_checkpoint_open(copy_dir, &checkpoint, NULL, NULL, NULL), CM_E_CORRUPT);
}

/* ---- good checkpoints ---- */

static const char *const good[] = {TINY("tiny-flash"), TINY("tiny-pro"), TINY("tiny-odd"), TINY("tiny-base"),
                                   BALEEN_NANO};
enum { GOOD = sizeof good / sizeof good[0] };

static bool check_one_tensor(void *ctx, const md_expect *expect)
{
    const md_checkpoint *checkpoint = ctx;
    cm_error err = {0};
    const md_tensor *tensor = md_checkpoint_tensor(checkpoint, "%s", expect->name);
    assert_string_equal(tensor->name, expect->name);
    assert_int_equal(tensor->dtype, expect->dtype);
    if (md_tensor_check_values(tensor, md_checkpoint_geometry(checkpoint), &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    return true;
}

static void test_good(void **state)
{
    (void)state;
    for (size_t i = 0; i < GOOD; i++) {
        md_checkpoint *checkpoint = checkpoint_open(good[i]);
        const md_geometry *g = md_checkpoint_geometry(checkpoint);
        uint64_t n_tensors, n_bytes;
        assert_string_equal(md_checkpoint_dir(checkpoint), good[i]);
        assert_int_equal(g->float_scales, strstr(good[i], "tiny-base") != NULL);
        md_expect_totals(g, &n_tensors, &n_bytes);
        assert_int_equal(md_checkpoint_bytes(checkpoint), n_bytes);
        md_expect_each(g, check_one_tensor, checkpoint);
        md_checkpoint_close(checkpoint);
    }
    md_checkpoint_close(NULL);
}

/* ---- what is wrong with the set ---- */

#define S1   "model-00001-of-00004.safetensors"
#define S2   "model-00002-of-00004.safetensors"
#define S3   "model-00003-of-00004.safetensors"
#define NORM "layers.0.attn_norm.weight"
#define W1   "layers.1.ffn.experts.3.w1"

static void edit_truncate(void)
{
    cm_bytes bytes;
    file_read(copy_path(S2), &bytes);
    file_write(copy_path(S2), bytes.data, bytes.len - 1);
    cm_bytes_fini(&bytes);
}
static void edit_truncate_header(void)
{
    cm_bytes bytes;
    file_read(copy_path(S2), &bytes);
    file_write(copy_path(S2), bytes.data, 1000);
    cm_bytes_fini(&bytes);
}
static void edit_lose_shard(void)
{
    unlink(copy_path(S3));
}
static void edit_lose_tensor(void)
{
    /* renamed in the shard and not in the index: the index then names what is not there */
    tensor_rename(S2, NORM, "layers.0.other.weight");
}
static void edit_lose_everywhere(void)
{
    shard_edit edit; /* the last tensor of its shard, so that no other one has to move */
    const char *name = "layers.0.hc_ffn_scale";
    shard_edit_begin(&edit, S2);
    shard_tensor(&edit, name);
    json_object_del(edit.header, name);
    edit.bytes.len -= 3 * sizeof(float);
    shard_edit_end(&edit);
    index_set(name, NULL);
}
static void edit_add(void)
{
    tensor_add(S2, "layers.0.attn.bias");
    index_set("layers.0.attn.bias", S2);
}
static void edit_add_unindexed(void)
{
    tensor_add(S2, "layers.0.attn.bias");
}
static void edit_unindex(void)
{
    index_set(NORM, NULL);
}
static void edit_index_wrong_shard(void)
{
    index_set(NORM, S3);
}
static void edit_index_unknown(void)
{
    index_set("layers.7.attn_norm.weight", S3);
}
static void edit_index_no_file(void)
{
    index_set(NORM, "model-00009-of-00004.safetensors");
}
static void edit_index_outside(void)
{
    index_set(NORM, "../secret.safetensors");
}
static void edit_index_number(void)
{
    json_t *root = json_edit_begin(index_name);
    json_object_set_new(json_object_get(root, "weight_map"), NORM, json_integer(2));
    json_edit_end(index_name, root);
}
static void edit_index_no_map(void)
{
    file_write(copy_path(index_name), "{\"metadata\":{}}", 15);
}
static void edit_index_broken(void)
{
    file_write(copy_path(index_name), "{\"weight_map\":", 14);
}
static void edit_twice(void)
{
    tensor_add(S1, NORM);
}
static void edit_rename_model(void)
{
    tensor_rename(S2, NORM, "model." NORM);
    index_set(NORM, NULL);
    index_set("model." NORM, S2);
}
static void edit_rename_scale(void)
{
    tensor_rename(S3, W1 ".scale", W1 ".weight_scale_inv");
    index_set(W1 ".scale", NULL);
    index_set(W1 ".weight_scale_inv", S3);
}
static void edit_shape(void)
{
    tensor_set_shape(S2, "layers.0.attn.wq_a.weight", json_pack("[i,i]", 160, 96));
}
static void edit_shape_flat(void)
{
    tensor_set_shape(S2, "layers.0.attn.wq_a.weight", json_pack("[i]", 160 * 96));
}
static void edit_dtype(void)
{
    tensor_set_dtype(S2, "layers.0.attn.wq_a.weight", "I8");
}
static void edit_dtype_bytes(void)
{
    tensor_set_dtype(S2, "layers.0.attn.wq_a.weight", "BF16");
}
static void edit_dtype_u8(void)
{
    tensor_set_dtype(S3, W1 ".weight", "U8");
}
static void edit_scale_dtype(void)
{
    tensor_set_dtype(S2, "layers.0.attn.wq_a.scale", "U8");
}
static void edit_config(void)
{
    config_set("hidden_size", json_integer(0));
}

static void test_wrong_set(void **state)
{
    (void)state;
    static const struct {
        const char *what;
        void (*edit)(void);
        uint32_t n;
        const char *name, *words;
    } rows[] = {
        {"truncated shard", edit_truncate, 1, "layers.0.hc_ffn_scale", "truncated"},
        {"truncated header", edit_truncate_header, 1, S2, "truncated"},
        {"missing shard", edit_lose_shard, 1, S3, "No such file"},
        {"tensor lost from its shard", edit_lose_tensor, 2, NORM, "shard " S2 ", which lacks it"},
        {"missing tensor", edit_lose_everywhere, 1, "layers.0.hc_ffn_scale", "is missing: F32 [3] is needed"},
        {"extra tensor", edit_add, 1, "layers.0.attn.bias", "is extra"},
        {"extra tensor, not in the index", edit_add_unindexed, 1, "layers.0.attn.bias", "is extra"},
        {"not in the index", edit_unindex, 1, NORM, "the index lacks it"},
        {"index: wrong shard", edit_index_wrong_shard, 1, NORM, "but it is in " S2},
        {"index: no such tensor", edit_index_unknown, 1, "layers.7.attn_norm.weight", "which lacks it"},
        {"index: no such file", edit_index_no_file, 1, "model-00009-of-00004.safetensors", "No such file"},
        {"index: another folder", edit_index_outside, 1, NORM, "plain file name"},
        {"index: a number", edit_index_number, 1, NORM, "plain file name"},
        {"index: no weight_map", edit_index_no_map, 1, index_name, "weight_map"},
        {"index: broken", edit_index_broken, 1, index_name, "not valid JSON"},
        {"in two shards", edit_twice, 1, NORM, "two shards, " S1 " and " S2},
        {"repackaged names: model.", edit_rename_model, 2, NORM, "is missing"},
        {"repackaged names: scale_inv", edit_rename_scale, 2, W1 ".scale", "is missing"},
        {"transposed", edit_shape, 1, "layers.0.attn.wq_a.weight", "it is [160, 96] and must be [96, 160]"},
        {"flat", edit_shape_flat, 1, "layers.0.attn.wq_a.weight", "it is [15360] and must be [96, 160]"},
        {"wrong dtype", edit_dtype, 1, "layers.0.attn.wq_a.weight", "it is I8 and must be F8_E4M3"},
        {"wrong dtype, wrong size", edit_dtype_bytes, 1, "layers.0.attn.wq_a.weight",
         "dtype and shape need 30720"},
        {"wrong expert dtype", edit_dtype_u8, 1, W1 ".weight", "it is U8 and must be I8"},
        {"wrong scale dtype", edit_scale_dtype, 1, "layers.0.attn.wq_a.scale",
         "it is U8 and must be F8_E8M0"},
        {"config", edit_config, 1, "hidden_size", "hidden_size is 0"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        copy_make(TINY("tiny-odd"));
        rows[i].edit();
        assert_refused(rows[i].what, rows[i].n, rows[i].name, rows[i].words);
        copy_remove(NULL);
    }
}

/* Both halves of a misnamed tensor are found, and the second one says what the name should be. */
static void test_misnamed(void **state)
{
    (void)state;
    md_checkpoint *checkpoint;
    seen s = {0};
    copy_make(TINY("tiny-odd"));
    edit_rename_model();
    assert_int_equal(md_checkpoint_open(copy_dir, &checkpoint, seen_add, &s, NULL), CM_E_CORRUPT);
    assert_string_equal(s.last.name, "model." NORM);
    assert_non_null(strstr(s.last.text, "misnamed"));
    copy_remove(NULL);
    copy_make(TINY("tiny-odd"));
    edit_rename_scale();
    assert_int_equal(md_checkpoint_open(copy_dir, &checkpoint, seen_add, &s, NULL), CM_E_CORRUPT);
    assert_string_equal(s.last.name, W1 ".weight_scale_inv");
    assert_non_null(strstr(s.last.text, "misnamed"));
}

static void test_missing_text_files(void **state)
{
    (void)state;
    static const char *const names[] = {"config.json", "model.safetensors.index.json"};
    for (size_t i = 0; i < 2; i++) {
        md_checkpoint *checkpoint;
        cm_error err = {0};
        seen s = {0};
        copy_make(TINY("tiny-odd"));
        unlink(copy_path(names[i]));
        assert_int_equal(md_checkpoint_open(copy_dir, &checkpoint, seen_add, &s, &err), CM_E_IO);
        assert_int_equal(s.n, 1);
        assert_string_equal(err.field, names[i]);
        assert_string_equal(s.first.name, names[i]);
        copy_remove(NULL);
    }
}

/* ---- what a checkpoint is may not be mistaken ---- */

/* E4M3 experts without a word in the config are not FP4. */
static void test_base_without_expert_dtype(void **state)
{
    (void)state;
    md_checkpoint *checkpoint;
    cm_error err = {0};
    copy_make(TINY("tiny-base"));
    config_set("expert_dtype", NULL);
    assert_int_equal(md_checkpoint_open(copy_dir, &checkpoint, NULL, NULL, &err), CM_E_CORRUPT);
    assert_string_equal(err.field, "layers.0.ffn.experts.0.w1.weight");
    assert_non_null(strstr(err.text, "expert_dtype is fp4 or absent"));
}

/* One E8M0-sized scale among F32 ones is the odd one, not all the others. */
static void test_base_one_odd_scale(void **state)
{
    (void)state;
    shard_edit edit;
    const char *name = "layers.0.attn.wq_a.scale"; /* F32 [1, 2] */
    copy_make(TINY("tiny-base"));
    shard_edit_begin(&edit, S2);
    json_object_set_new(shard_tensor(&edit, name), "dtype", json_string("F8_E8M0"));
    json_object_set_new(shard_tensor(&edit, name), "shape", json_pack("[i,i]", 1, 8));
    shard_edit_end(&edit);
    assert_refused("one E8M0 scale", 1, name, "it is F8_E8M0 and must be F32");
}

/* The names of DSpark and MTP overlap; neither opens as the other. */
static void test_drafter_mixup(void **state)
{
    (void)state;
    copy_make(TINY("tiny-flash"));
    config_set("dspark_target_layer_ids", json_pack("[i]", 4));
    config_set("dspark_markov_rank", json_integer(16));
    /* main_proj and its scale, main_norm, two markov, one confidence are missing; e_proj and h_proj with
     * scales, enorm and hnorm are extra */
    assert_refused("mtp as dspark", 12, "mtp.0.main_proj.weight", "is missing");
    copy_remove(NULL);
    copy_make(TINY("tiny-flash"));
    config_set("num_nextn_predict_layers", json_integer(0));
    assert_refused("stage without entry", 1, "compress_ratios", "6 entries");
}

/* ---- values ---- */

typedef struct value_row {
    const char *what, *dir, *shard, *tensor;
    size_t at;
    uint64_t bytes;
    size_t n_bytes;
    const char *words; /* NULL: accepted */
} value_row;

static void check_value_row(const value_row *row)
{
    cm_error err = {0};
    copy_make(row->dir);
    tensor_poke(row->shard, row->tensor, row->at, &row->bytes, row->n_bytes);
    md_checkpoint *checkpoint = checkpoint_open(copy_dir);
    const md_geometry *g = md_checkpoint_geometry(checkpoint);
    const md_tensor *tensor = md_checkpoint_tensor(checkpoint, "%s", row->tensor);
    cm_status status = md_tensor_check_values(tensor, g, &err);
    if (row->words == NULL ? status != CM_OK
                           : status != CM_E_CORRUPT || strcmp(err.field, row->tensor) != 0 ||
                                 strstr(err.text, row->words) == NULL) {
        fail_msg("%s: status %s field '%s' text '%s'", row->what, cm_status_name(status), err.field,
                 err.text);
    }
    assert_int_equal(md_tensor_check_values(tensor, g, NULL), status);
    md_checkpoint_close(checkpoint);
    copy_remove(NULL);
}

static void test_values(void **state)
{
    (void)state;
    static const value_row rows[] = {
        {"nan scale, first", TINY("tiny-odd"), S3, W1 ".scale", 0, 0xFF, 1, "row 0: scale byte 255"},
        {"nan scale, last", TINY("tiny-odd"), S3, W1 ".scale", 96 * 5 - 1, 0xFF, 1, "row 95: scale byte 255"},
        {"smallest scale", TINY("tiny-odd"), S3, W1 ".scale", 0, 0x00, 1, NULL},
        {"nan code, first", TINY("tiny-odd"), S2, "layers.0.attn.wq_a.weight", 0, 0x7F, 1,
         "row 0: E4M3 code 0x7F"},
        {"nan code, middle", TINY("tiny-odd"), S2, "layers.0.attn.wq_a.weight", 161, 0xFF, 1,
         "row 1: E4M3 code 0xFF"},
        {"nan code, last", TINY("tiny-odd"), S2, "layers.0.attn.wq_a.weight", 96 * 160 - 1, 0xFF, 1,
         "row 95: E4M3"},
        {"largest codes", TINY("tiny-odd"), S2, "layers.0.attn.wq_a.weight", 0, 0xFE7EFE7EFE7EFE7E, 8, NULL},
        {"float scale nan", TINY("tiny-base"), S2, "layers.0.attn.wq_a.scale", 4, 0x7FC00000, 4,
         "row 0: scale nan"},
        {"float scale inf", TINY("tiny-base"), S2, "layers.0.attn.wq_b.scale", 28, 0x7F800000, 4,
         "row 7: scale inf"},
        {"expert too high", TINY("tiny-odd"), S2, "layers.0.ffn.gate.tid2eid", 6 * 8 * 330 + 40, 13, 8,
         "row 330: expert 13 is out of range"},
        {"expert below 0", TINY("tiny-odd"), S2, "layers.0.ffn.gate.tid2eid", 0, UINT64_MAX, 8,
         "row 0: expert -1 is out of range"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        check_value_row(&rows[i]);
    }
}

static void test_repeated_expert(void **state)
{
    (void)state;
    shard_edit edit;
    cm_error err = {0};
    const char *name = "layers.0.ffn.gate.tid2eid";
    copy_make(TINY("tiny-odd"));
    shard_edit_begin(&edit, S2);
    uint8_t *row = shard_data(&edit, name) + 7 * 6 * 8; /* row 7: its last expert becomes its first */
    memcpy(row + 5 * 8, row, 8);
    shard_edit_end(&edit);
    md_checkpoint *checkpoint = checkpoint_open(copy_dir);
    assert_int_equal(md_tensor_check_values(md_checkpoint_tensor(checkpoint, "%s", name),
                                            md_checkpoint_geometry(checkpoint), &err),
                     CM_E_CORRUPT);
    assert_string_equal(err.field, name);
    assert_non_null(strstr(err.text, "row 7: expert"));
    assert_non_null(strstr(err.text, "is repeated"));
    md_checkpoint_close(checkpoint);
}

/* ---- fingerprint ---- */

static void fingerprint_of(const char *dir, char out[33])
{
    cm_error err = {0};
    md_checkpoint *checkpoint = checkpoint_open(dir);
    assert_int_equal(md_checkpoint_fingerprint(checkpoint, out, &err), CM_OK);
    assert_int_equal(strlen(out), 32);
    assert_int_equal(strspn(out, "0123456789abcdef"), 32);
    md_checkpoint_close(checkpoint);
}

static void flip_byte(const char *name, size_t at, bool from_end)
{
    cm_bytes bytes;
    file_read(copy_path(name), &bytes);
    bytes.data[from_end ? bytes.len - 1 - at : at] ^= 1;
    file_write(copy_path(name), bytes.data, bytes.len);
    cm_bytes_fini(&bytes);
}

static void test_fingerprint(void **state)
{
    (void)state;
    static const struct {
        const char *what, *name;
        size_t at;
        bool from_end;
    } rows[] = {
        {"first byte of data", S2, 8 + 11816, false},
        {"last byte of data", S2, 0, true},
        {"a small shard's middle", S1, 2000, true},
    };
    char original[33], other[33];
    fingerprint_of(TINY("tiny-odd"), original);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        copy_make(TINY("tiny-odd"));
        fingerprint_of(copy_dir, other);
        assert_string_equal(original, other); /* a copy elsewhere */
        flip_byte(rows[i].name, rows[i].at, rows[i].from_end);
        fingerprint_of(copy_dir, other);
        if (strcmp(original, other) == 0) {
            fail_msg("%s changes nothing", rows[i].what);
        }
        copy_remove(NULL);
    }
}

static void test_fingerprint_short_read(void **state)
{
    (void)state;
    char print[33] = "untouched";
    cm_error err = {0};
    cm_bytes bytes;
    copy_make(TINY("tiny-odd"));
    file_read(copy_path(S2), &bytes);
    file_write(copy_path(S2), bytes.data, bytes.len); /* a file of its own in place of the link */
    md_checkpoint *checkpoint = checkpoint_open(copy_dir);
    assert_int_equal(truncate(copy_path(S2), (off_t)bytes.len - 1), 0);
    assert_int_equal(md_checkpoint_fingerprint(checkpoint, print, &err), CM_E_IO);
    assert_string_equal(err.field, S2);
    assert_string_equal(print, "untouched");
    md_checkpoint_close(checkpoint);
    cm_bytes_fini(&bytes);
}

/* Changes that leave the meaning as it is still change the fingerprint: it is of bytes. */
static void test_fingerprint_text(void **state)
{
    (void)state;
    char original[33], other[33];
    cm_bytes bytes;
    fingerprint_of(TINY("tiny-odd"), original);
    copy_make(TINY("tiny-odd"));
    file_read(copy_path("config.json"), &bytes);
    cm_bytes_append_text(&bytes, "\n");
    file_write(copy_path("config.json"), bytes.data, bytes.len);
    cm_bytes_fini(&bytes);
    fingerprint_of(copy_dir, other);
    assert_string_not_equal(original, other);
    copy_remove(NULL);

    copy_make(TINY("tiny-odd"));
    file_read(copy_path(S1), &bytes);
    assert_int_equal(bytes.data[8 + 111], ' '); /* the header's padding */
    bytes.data[8 + 111] = '\n';
    file_write(copy_path(S1), bytes.data, bytes.len);
    cm_bytes_fini(&bytes);
    fingerprint_of(copy_dir, other);
    assert_string_not_equal(original, other);
}

static void test_fingerprints_differ(void **state)
{
    (void)state;
    char prints[GOOD][33];
    for (size_t i = 0; i < GOOD; i++) {
        fingerprint_of(good[i], prints[i]);
        for (size_t j = 0; j < i; j++) {
            assert_string_not_equal(prints[i], prints[j]);
        }
    }
}

/* ---- failing memory ---- */

static long allocs_left;

static void *failing_alloc(size_t n_bytes)
{
    return allocs_left-- > 0 ? cm_try_alloc(n_bytes) : NULL;
}

/* Allocations of the JSON reader fail in turn, on a stride: nothing may leak and no half-open checkpoint
 * appear. */
static void test_failing_memory(void **state)
{
    (void)state;
    cm_status status = CM_AGAIN;
    for (long n = 0; status != CM_OK && n < 1000000; n += 1 + n / 20) {
        md_checkpoint *checkpoint = NULL;
        json_set_alloc_funcs(failing_alloc, cm_free);
        allocs_left = n;
        status = md_checkpoint_open(TINY("tiny-odd"), &checkpoint, NULL, NULL, NULL);
        json_set_alloc_funcs(cm_try_alloc, cm_free);
        assert_true(status == CM_OK ? checkpoint != NULL : status < CM_OK && checkpoint == NULL);
        md_checkpoint_close(checkpoint);
    }
    assert_int_equal(status, CM_OK);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_teardown(name, copy_remove)
    const struct CMUnitTest tests[] = {

        TEST(test_good),
        TEST(test_wrong_set),
        TEST(test_misnamed),
        TEST(test_missing_text_files),
        TEST(test_base_without_expert_dtype),
        TEST(test_base_one_odd_scale),
        TEST(test_drafter_mixup),
        TEST(test_values),
        TEST(test_repeated_expert),
        TEST(test_fingerprint),
        TEST(test_fingerprint_text),
        TEST(test_fingerprints_differ),
        TEST(test_fingerprint_short_read),
        TEST(test_failing_memory),
    };
#undef TEST
    /* so that what jansson returns can be freed with cm_free */
    json_set_alloc_funcs(cm_try_alloc, cm_free);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
