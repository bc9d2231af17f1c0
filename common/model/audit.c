/* A checkpoint against its index and the closed list. Each wrong thing is found once: a name that the index
 * puts in a shard without it is not also missing, and a shard that cannot be opened stands for all its
 * tensors. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "common/model/checkpoint_private.h"

typedef struct audit {
    md_checkpoint *checkpoint;
    json_t *weight_map; /* borrowed */
    md_report *report;
    uint32_t n_scales, n_float_scales; /* of E4M3 weights, as found */
} audit;

static md_entry *audit_find(const audit *a, const char *name)
{
    return md_names_get(&a->checkpoint->names, md_name_hash(name), name);
}

static const char *audit_shard_name(const audit *a, const md_entry *entry)
{
    return a->checkpoint->shards[entry->i_shard].name;
}

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), n_end = strlen(end);
    return n >= n_end && strcmp(text + n - n_end, end) == 0;
}

/* ---- what the shards hold ---- */

static void audit_collect_shard(audit *a, uint32_t i_shard)
{
    md_checkpoint *checkpoint = a->checkpoint;
    const md_safetensors *file = checkpoint->shards[i_shard].file;
    for (uint32_t i = 0; i < md_safetensors_count(file); i++) {
        const md_tensor *tensor = md_safetensors_at(file, i);
        md_entry *entry = &checkpoint->entries[checkpoint->n_entries];
        *entry = (md_entry){.tensor = tensor, .i_shard = i_shard};
        uint64_t hash = md_name_hash(tensor->name);
        if (!md_names_put(&checkpoint->names, hash, tensor->name, entry)) {
            md_entry *first = md_names_get(&checkpoint->names, hash, tensor->name);
            first->twice = true;
            md_report_add(a->report, tensor->name, "tensor %.96s is in two shards, %.90s and %.90s",
                          tensor->name, audit_shard_name(a, first), checkpoint->shards[i_shard].name);
            continue;
        }
        checkpoint->n_entries++;
        checkpoint->n_bytes += tensor->n_bytes;
    }
}

static cm_status audit_collect(audit *a)
{
    md_checkpoint *checkpoint = a->checkpoint;
    uint32_t n = 0;
    for (uint32_t i = 0; i < checkpoint->n_shards; i++) {
        n += checkpoint->shards[i].file != NULL ? md_safetensors_count(checkpoint->shards[i].file) : 0;
    }
    checkpoint->entries = cm_try_alloc(n * sizeof checkpoint->entries[0]);
    if (checkpoint->entries == NULL) {
        return cm_error_set(a->report->err, CM_E_MEMORY, NULL, "out of memory for %u tensors", n);
    }
    md_names_init(&checkpoint->names, n);
    for (uint32_t i = 0; i < checkpoint->n_shards; i++) {
        if (checkpoint->shards[i].file != NULL) {
            audit_collect_shard(a, i);
        }
    }
    return CM_OK;
}

/* ---- the index against the shards ---- */

static void audit_index_row(audit *a, const char *name, const char *shard_name)
{
    uint32_t i_shard = md_checkpoint_shard(a->checkpoint, shard_name);
    md_entry *entry = audit_find(a, name);
    if (entry != NULL) {
        entry->indexed = true;
    }
    if (a->checkpoint->shards[i_shard].file == NULL) {
        return; /* has been reported */
    }
    if (entry != NULL && (entry->i_shard == i_shard || entry->twice)) {
        return;
    }
    if (entry != NULL) {
        md_report_add(a->report, name, "tensor %.96s: the index says shard %.90s, but it is in %.90s", name,
                      shard_name, audit_shard_name(a, entry));
    } else {
        md_report_add(a->report, name, "tensor %.96s: the index says shard %.90s, which lacks it", name,
                      shard_name);
    }
}

static void audit_index(audit *a)
{
    const char *name;
    json_t *shard_name;
    json_object_foreach(a->weight_map, name, shard_name)
    {
        audit_index_row(a, name, json_string_value(shard_name));
    }
}

/* ---- the closed list against the shards ---- */

/* Called while float_scales is true: then the F32 rows named .scale are the E4M3 scales, and no others. */
static bool audit_count_scale(void *ctx, const md_expect *expect)
{
    audit *a = ctx;
    if (expect->dtype == MD_F32 && ends_with(expect->name, ".scale")) {
        const md_entry *entry = audit_find(a, expect->name);
        if (entry != NULL) {
            a->n_scales++;
            a->n_float_scales += entry->tensor->dtype == MD_F32;
        }
    }
    return true;
}

/* No key says whether block scales are F32 (-Base) or E8M0: the majority decides, so that one odd tensor is
 * the one to be reported. */
static void audit_find_float_scales(audit *a)
{
    md_geometry *geometry = &a->checkpoint->geometry;
    geometry->float_scales = true;
    md_expect_each(geometry, audit_count_scale, a);
    geometry->float_scales = a->n_float_scales * 2 > a->n_scales;
}

static void audit_shape_text(uint32_t n_dim, const uint64_t *dim, char text[96])
{
    size_t at = 0;
    text[at++] = '[';
    for (uint32_t i = 0; i < n_dim; i++) {
        at += (size_t)snprintf(text + at, 96 - at, "%s%" PRIu64, i > 0 ? ", " : "", dim[i]);
    }
    snprintf(text + at, 96 - at, "]");
}

static const char *audit_dtype_hint(const audit *a, const md_expect *expect)
{
    if (strstr(expect->name, ".experts.") != NULL) {
        return a->checkpoint->geometry.expert_dtype == MD_EXPERT_FP4 ? " (expert_dtype is fp4 or absent)"
                                                                     : " (expert_dtype is fp8)";
    }
    return ends_with(expect->name, ".scale") ? " like most scales of this checkpoint" : "";
}

/* The keys of config.json behind the sizes that differ: one of them may be what is wrong. */
static void audit_shape_keys(const md_tensor *tensor, const md_expect *expect, char text[192])
{
    size_t at = 0;
    text[0] = '\0';
    for (uint32_t i = 0; i < expect->n_dim; i++) {
        bool differs = tensor->n_dim != expect->n_dim || tensor->dim[i] != expect->dim[i];
        if (differs && expect->key[i] != NULL) {
            at += (size_t)snprintf(text + at, 192 - at, "%s%s", at == 0 ? " (by " : ", ", expect->key[i]);
        }
    }
    if (at > 0) {
        snprintf(text + at, 192 - at, ")");
    }
}

/* The key that makes the closed list have a tensor of that name, or not have it. */
static const char *audit_key_of(const audit *a, const char *name)
{
    const md_geometry *g = &a->checkpoint->geometry;
    const char *number = name, *expert = strstr(name, ".experts.");
    if (strncmp(name, "mtp.", 4) == 0) {
        number = name + 4;
    } else if (strncmp(name, "layers.", 7) == 0) {
        number = name + 7;
    }
    bool in_stage = number == name + 4, in_layer = number == name + 7;
    if (in_stage && strtoul(number, NULL, 10) >= g->n_stage) {
        return g->drafter == MD_DRAFTER_DSPARK ? "dspark_target_layer_ids" : "num_nextn_predict_layers";
    }
    if (in_layer && strtoul(number, NULL, 10) >= g->n_layer) {
        return "num_hidden_layers";
    }
    if (strstr(name, ".compressor.") != NULL || strstr(name, ".indexer.") != NULL) {
        return "compress_ratios";
    }
    if (strstr(name, ".gate.tid2eid") != NULL || strstr(name, ".gate.bias") != NULL) {
        return "num_hash_layers";
    }
    if (expert != NULL && strtoul(expert + 9, NULL, 10) >= g->n_expert) {
        return "n_routed_experts";
    }
    return in_stage ? "num_nextn_predict_layers and dspark_ keys" : NULL;
}

/* Whose drafter the shards hold: each has a tensor in its first stage that the other lacks. */
static md_drafter audit_drafter_held(const audit *a)
{
    return audit_find(a, "mtp.0.main_proj.weight") != NULL ? MD_DRAFTER_DSPARK
           : audit_find(a, "mtp.0.e_proj.weight") != NULL  ? MD_DRAFTER_MTP
                                                           : MD_DRAFTER_NONE;
}

/* What config.json has to do with a tensor that is missing or extra; "" when nothing. MTP and DSpark share
 * names: one taken for the other is said outright. */
static void audit_key_hint(const audit *a, const char *name, char text[192])
{
    static const char *const drafters[] = {
        [MD_DRAFTER_NONE] = "no", [MD_DRAFTER_MTP] = "an MTP", [MD_DRAFTER_DSPARK] = "a DSpark"};
    const char *key = audit_key_of(a, name);
    md_drafter wanted = a->checkpoint->geometry.drafter, held = audit_drafter_held(a);
    text[0] = '\0';
    if (strncmp(name, "mtp.", 4) == 0 && wanted != held) {
        snprintf(text, 192, " (config.json describes %s drafter by %s, the tensors are of %s drafter)",
                 drafters[wanted],
                 wanted == MD_DRAFTER_DSPARK ? "its dspark_ keys" : "num_nextn_predict_layers",
                 drafters[held]);
    } else if (key != NULL) {
        snprintf(text, 192, " (by %s in config.json)", key);
    }
}

static bool audit_expected_row(void *ctx, const md_expect *expect)
{
    audit *a = ctx;
    char wanted[96], found[96], why[192];
    md_entry *entry = audit_find(a, expect->name);
    audit_shape_text(expect->n_dim, expect->dim, wanted);
    if (entry == NULL) {
        if (json_object_get(a->weight_map, expect->name) == NULL) {
            audit_key_hint(a, expect->name, why);
            md_report_add(a->report, expect->name, "tensor %s is missing: %s %s is needed%s", expect->name,
                          md_dtype_name(expect->dtype), wanted, why);
        }
        return true;
    }
    const md_tensor *tensor = entry->tensor;
    entry->expected = true;
    if (entry->twice) {
        return true;
    }
    if (tensor->dtype != expect->dtype) {
        md_report_add(a->report, expect->name, "tensor %s has the wrong dtype: it is %s and must be %s%s",
                      expect->name, md_dtype_name(tensor->dtype), md_dtype_name(expect->dtype),
                      audit_dtype_hint(a, expect));
    } else if (tensor->n_dim != expect->n_dim ||
               memcmp(tensor->dim, expect->dim, expect->n_dim * sizeof expect->dim[0]) != 0) {
        audit_shape_text(tensor->n_dim, tensor->dim, found);
        audit_shape_keys(tensor, expect, why);
        md_report_add(a->report, expect->name, "tensor %s has the wrong shape: it is %s and must be %s%s",
                      expect->name, found, wanted, why);
    }
    return true;
}

/* ---- what is too much ---- */

static void audit_extra_hint(const audit *a, const char *name, char text[192])
{
    if (strncmp(name, "model.", 6) == 0) {
        snprintf(text, 192, ": it is misnamed, released checkpoints have no \"model.\" in front");
    } else if (ends_with(name, "_scale_inv")) {
        snprintf(text, 192, ": it is misnamed, released checkpoints call it .scale");
    } else {
        audit_key_hint(a, name, text);
    }
}

static void audit_extras(audit *a)
{
    for (uint32_t i = 0; i < a->checkpoint->n_entries; i++) {
        const md_entry *entry = &a->checkpoint->entries[i];
        const char *name = entry->tensor->name;
        char why[192];
        if (!entry->expected) {
            audit_extra_hint(a, name, why);
            md_report_add(a->report, name,
                          "tensor %.96s in %.90s is extra, this model has none of that name%s", name,
                          audit_shard_name(a, entry), why);
        } else if (!entry->indexed) {
            md_report_add(a->report, name, "tensor %.96s is in shard %.90s, but the index lacks it", name,
                          audit_shard_name(a, entry));
        }
    }
}

cm_status md_audit(md_checkpoint *checkpoint, json_t *weight_map, md_report *report)
{
    audit a = {.checkpoint = checkpoint, .weight_map = weight_map, .report = report};
    CM_TRY(audit_collect(&a));
    audit_index(&a);
    audit_find_float_scales(&a);
    md_expect_each(&checkpoint->geometry, audit_expected_row, &a);
    audit_extras(&a);
    return CM_OK;
}
