#include "common/model/checkpoint.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/model/checkpoint_private.h"
#include "common/model/geometry_private.h"
#include "common/model/input_private.h"

static const char index_name[] = "model.safetensors.index.json";
enum { INDEX_BYTES_MAX = 256 << 20 }; /* Pro's has about 14 MB */

/* ---- findings ---- */

void md_report_add(md_report *report, const char *name, const char *fmt, ...)
{
    md_finding finding;
    snprintf(finding.name, sizeof finding.name, "%s", name);
    va_list args;
    va_start(args, fmt);
    vsnprintf(finding.text, sizeof finding.text, fmt, args);
    va_end(args);
    if (report->n++ == 0) {
        cm_error_set(report->err, CM_E_CORRUPT, finding.name, "%s", finding.text);
    }
    if (report->fn != NULL) {
        report->fn(report->ctx, &finding);
    }
}

/* A failure with a sentence of its own becomes a finding; only what no file is to blame for ends the opening.
 */
static cm_status report_cause(md_report *report, const cm_error *cause)
{
    if (cause->status == CM_E_MEMORY) {
        return cm_error_set(report->err, CM_E_MEMORY, cause->field, "%s", cause->text);
    }
    md_report_add(report, cause->field, "%s", cause->text);
    return CM_OK;
}

/* ---- config and index ---- */

static cm_status checkpoint_read_config(md_checkpoint *checkpoint, cm_error *err)
{
    CM_TRY(md_config_read(checkpoint->dir, &checkpoint->config, err));
    return md_geometry_parse(cm_bytes_text(&checkpoint->config), checkpoint->config.len,
                             &checkpoint->geometry, err);
}

/* A shard's name is joined to the folder: it must be a plain file name. */
static bool shard_name_is_plain(const char *name)
{
    size_t n = strlen(name);
    return n > 0 && n < sizeof((md_finding *)0)->name && name[0] != '.' && strchr(name, '/') == NULL;
}

static cm_status index_check(json_t *root, cm_error *err)
{
    json_t *weight_map = json_object_get(root, "weight_map");
    if (!json_is_object(weight_map)) {
        return cm_error_set(err, CM_E_CORRUPT, index_name, "%s: weight_map must be an object, not %s",
                            index_name, md_json_kind(weight_map));
    }
    const char *name;
    json_t *value;
    json_object_foreach(weight_map, name, value)
    {
        if (!json_is_string(value) || !shard_name_is_plain(json_string_value(value))) {
            return cm_error_set(err, CM_E_CORRUPT, name, "%s: the shard of %.96s must be a plain file name",
                                index_name, name);
        }
    }
    return CM_OK;
}

static cm_status index_read(const char *dir, json_t **root_out, cm_error *err)
{
    cm_bytes text;
    json_t *root;
    CM_TRY(md_file_read(dir, index_name, INDEX_BYTES_MAX, &text, err));
    cm_status status = md_json_object(cm_bytes_text(&text), text.len, index_name, &root, err);
    cm_bytes_fini(&text);
    if (status != CM_OK) {
        return status;
    }
    status = index_check(root, err);
    if (status != CM_OK) {
        json_decref(root);
        return status;
    }
    *root_out = root;
    return CM_OK;
}

/* ---- shards ---- */

static int name_compare(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The distinct shard names of the index, sorted. */
static cm_status shards_name(md_checkpoint *checkpoint, json_t *weight_map, cm_error *err)
{
    size_t n = 0, n_distinct = 0;
    const char **sorted = cm_try_alloc(json_object_size(weight_map) * sizeof sorted[0]);
    if (sorted == NULL) {
        return cm_error_set(err, CM_E_MEMORY, index_name, "out of memory for %zu names",
                            json_object_size(weight_map));
    }
    const char *name;
    json_t *value;
    json_object_foreach(weight_map, name, value)
    {
        sorted[n++] = json_string_value(value);
    }
    qsort(sorted, n, sizeof sorted[0], name_compare);
    for (size_t i = 0; i < n; i++) {
        if (i == 0 || strcmp(sorted[i], sorted[i - 1]) != 0) {
            sorted[n_distinct++] = sorted[i];
        }
    }
    checkpoint->shards = cm_alloc(sizeof checkpoint->shards[0] * n_distinct);
    for (size_t i = 0; i < n_distinct; i++) {
        checkpoint->shards[i].name = cm_strdup(sorted[i]);
    }
    checkpoint->n_shards = (uint32_t)n_distinct;
    cm_free(sorted);
    return CM_OK;
}

static cm_status shards_open(md_checkpoint *checkpoint, md_report *report)
{
    for (uint32_t i = 0; i < checkpoint->n_shards; i++) {
        md_shard *shard = &checkpoint->shards[i];
        cm_error cause = {0};
        char *path = md_path_join(checkpoint->dir, shard->name);
        cm_status status = md_safetensors_open(path, &shard->file, &cause);
        cm_free(path);
        if (status != CM_OK) {
            CM_TRY(report_cause(report, &cause));
        }
    }
    return CM_OK;
}

uint32_t md_checkpoint_shard(const md_checkpoint *checkpoint, const char *name)
{
    uint32_t low = 0, high = checkpoint->n_shards;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        int order = strcmp(checkpoint->shards[middle].name, name);
        if (order == 0) {
            return middle;
        }
        if (order < 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return checkpoint->n_shards;
}

/* ---- the whole ---- */

/* Everything that needs the index, which is not kept. */
static cm_status checkpoint_load(md_checkpoint *checkpoint, json_t *weight_map, md_report *report)
{
    CM_TRY(shards_name(checkpoint, weight_map, report->err));
    CM_TRY(shards_open(checkpoint, report));
    CM_TRY(md_audit(checkpoint, weight_map, report));
    return report->n == 0 ? CM_OK : CM_E_CORRUPT;
}

cm_status md_checkpoint_open(const char *dir, md_checkpoint **checkpoint_out, md_finding_fn fn, void *ctx,
                             cm_error *err)
{
    md_report report = {.fn = fn, .ctx = ctx, .err = err};
    cm_error cause = {0};
    json_t *index = NULL;
    md_checkpoint *checkpoint = cm_alloc(sizeof *checkpoint);
    checkpoint->dir = cm_strdup(dir);
    cm_status status = checkpoint_read_config(checkpoint, &cause);
    if (status == CM_OK) {
        status = index_read(dir, &index, &cause);
    }
    if (status != CM_OK) {
        /* a finding like any other for who lists them; the status keeps what kind of failure it was */
        (void)report_cause(&report, &cause);
        cm_error_set(err, status, cause.field, "%s", cause.text);
        goto err_close;
    }
    status = checkpoint_load(checkpoint, json_object_get(index, "weight_map"), &report);
    json_decref(index);
    if (status != CM_OK) {
        goto err_close;
    }
    *checkpoint_out = checkpoint;
    return CM_OK;

err_close:
    md_checkpoint_close(checkpoint);
    return status;
}

void md_checkpoint_close(md_checkpoint *checkpoint)
{
    if (checkpoint == NULL) {
        return;
    }
    md_names_fini(&checkpoint->names);
    cm_free(checkpoint->entries);
    for (uint32_t i = 0; i < checkpoint->n_shards; i++) {
        md_safetensors_close(checkpoint->shards[i].file);
        cm_free(checkpoint->shards[i].name);
    }
    cm_free(checkpoint->shards);
    cm_bytes_fini(&checkpoint->config);
    cm_free(checkpoint->dir);
    cm_free(checkpoint);
}

const md_geometry *md_checkpoint_geometry(const md_checkpoint *checkpoint)
{
    return &checkpoint->geometry;
}

const char *md_checkpoint_dir(const md_checkpoint *checkpoint)
{
    return checkpoint->dir;
}

const md_tensor *md_checkpoint_tensor(const md_checkpoint *checkpoint, const char *fmt, ...)
{
    char name[96];
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(name, sizeof name, fmt, args);
    va_end(args);
    CM_ASSERT(n > 0 && (size_t)n < sizeof name);
    const md_entry *entry = md_names_get(&checkpoint->names, md_name_hash(name), name);
    CM_ASSERT_MSG(entry != NULL, "%s is not a tensor of the model in %s", name, checkpoint->dir);
    return entry->tensor;
}

uint64_t md_checkpoint_bytes(const md_checkpoint *checkpoint)
{
    return checkpoint->n_bytes;
}
