#include "common/model/geometry.h"

#include <stddef.h>
#include <string.h>

#include "common/model/geometry_private.h"
#include "common/model/input_private.h"

enum { CONFIG_BYTES_MAX = 1 << 20 };

/* ---- the keys ----
 * One row per key. The upper bounds are an order of magnitude and more above Pro; they exist so that no
 * product of two or three sizes can pass 64 bits, and so that expert ids fit in 16 bits and positions in a
 * float exactly. */

typedef struct geo_size {
    const char *key;
    size_t offset; /* of a uint32_t in md_geometry */
    uint32_t min, max;
} geo_size;

#define GEO_SIZE(key_, field_, min_, max_)                                                                   \
    {                                                                                                        \
        key_, offsetof(md_geometry, field_), min_, max_                                                      \
    }

static const geo_size geo_sizes[] = {
    GEO_SIZE("hidden_size", d, 1, 1u << 17),
    GEO_SIZE("num_hidden_layers", n_layer, 1, MD_LAYER_MAX),
    GEO_SIZE("num_attention_heads", n_head, 1, 4096),
    GEO_SIZE("head_dim", head_dim, 1, 8192),
    GEO_SIZE("qk_rope_head_dim", rope_dim, 2, 4096),
    GEO_SIZE("q_lora_rank", q_rank, 1, 1u << 17),
    GEO_SIZE("o_groups", o_groups, 1, 4096),
    GEO_SIZE("o_lora_rank", o_rank, 1, 1u << 17),
    GEO_SIZE("sliding_window", window, 1, 1u << 16),
    GEO_SIZE("n_routed_experts", n_expert, 1, 4096),
    GEO_SIZE("num_experts_per_tok", topk, 1, 64),
    GEO_SIZE("n_shared_experts", n_shared, 1, 1),
    GEO_SIZE("moe_intermediate_size", inner, 1, 1u << 17),
    GEO_SIZE("num_hash_layers", n_hash_layer, 0, MD_LAYER_MAX),
    GEO_SIZE("hc_mult", hc, 1, 8),
    GEO_SIZE("hc_sinkhorn_iters", sinkhorn_iters, 1, 1000),
    GEO_SIZE("vocab_size", vocab, 1, 1u << 24),
    GEO_SIZE("max_position_embeddings", context, 1, 1u << 24),
    GEO_SIZE("bos_token_id", bos_id, 0, 1u << 24),
    GEO_SIZE("eos_token_id", eos_id, 0, 1u << 24),
};

/* Read only where a ratio-4 layer exists; 0 elsewhere. */
static const geo_size geo_index_sizes[] = {
    GEO_SIZE("index_n_heads", index_head, 1, 256),
    GEO_SIZE("index_head_dim", index_dim, 32, 4096),
    GEO_SIZE("index_topk", index_topk, 1, 1u << 24),
};

/* Numbers. The lower bound is excluded, the upper one included. */
typedef struct geo_number {
    const char *key;
    size_t offset; /* of a float in md_geometry */
    double above, max;
} geo_number;

#define GEO_NUMBER(key_, field_, above_, max_)                                                               \
    {                                                                                                        \
        key_, offsetof(md_geometry, field_), above_, max_                                                    \
    }

static const geo_number geo_numbers[] = {
    GEO_NUMBER("routed_scaling_factor", route_scale, 0, 1e6),
    GEO_NUMBER("swiglu_limit", swiglu_limit, 0, 1e6),
    GEO_NUMBER("rms_norm_eps", norm_eps, 0, 1),
    GEO_NUMBER("hc_eps", hc_eps, 0, 1),
};

/* Words that stand for arithmetic: there is one implementation, so there is one value. Without these keys the
 * arithmetic would be a guess, so they may not be absent. */
static const char *const geo_words[][2] = {
    {"model_type", "deepseek_v4"}, /* V4.1 (deepseek_v41) shares key names and nothing else */
    {"scoring_func", "sqrtsoftplus"},
    {"topk_method", "noaux_tc"},
    {"hidden_act", "silu"},
    {"quantization_config.quant_method", "fp8"},
    {"quantization_config.fmt", "e4m3"},
    {"quantization_config.activation_scheme", "dynamic"},
};

/* ---- reading one value ---- */

/* path is "key" or "object.key"; the last part is looked up in object, the whole path is shown. */
static json_t *geo_get(const json_t *object, const char *path)
{
    const char *dot = strrchr(path, '.');
    return json_object_get(object, dot != NULL ? dot + 1 : path);
}

static cm_status geo_wrong_kind(cm_error *err, const char *path, const json_t *value, const char *wanted)
{
    if (value == NULL) {
        return cm_error_set(err, CM_E_CORRUPT, path, "config.json: %s is missing", path);
    }
    return cm_error_set(err, CM_E_CORRUPT, path, "config.json: %s must be %s, not %s", path, wanted,
                        md_json_kind(value));
}

static cm_status geo_read_u32(const json_t *object, const char *path, uint32_t min, uint32_t max,
                              uint32_t *out, cm_error *err)
{
    const json_t *value = geo_get(object, path);
    if (!json_is_integer(value)) {
        return geo_wrong_kind(err, path, value, "a whole number");
    }
    json_int_t number = json_integer_value(value);
    if (number < min || number > max) {
        return cm_error_set(err, CM_E_CORRUPT, path, "config.json: %s is %lld, allowed are %u to %u", path,
                            (long long)number, min, max);
    }
    *out = (uint32_t)number;
    return CM_OK;
}

static cm_status geo_read_number(const json_t *object, const char *path, double above, double max,
                                 double *out, cm_error *err)
{
    const json_t *value = geo_get(object, path);
    if (!json_is_number(value)) {
        return geo_wrong_kind(err, path, value, "a number");
    }
    double number = json_number_value(value);
    if (!(number > above && number <= max)) {
        return cm_error_set(err, CM_E_CORRUPT, path,
                            "config.json: %s is %g, it must be above %g and at most %g", path, number, above,
                            max);
    }
    *out = number;
    return CM_OK;
}

static cm_status geo_read_object(const json_t *root, const char *path, const json_t **out, cm_error *err)
{
    const json_t *value = geo_get(root, path);
    if (!json_is_object(value)) {
        return geo_wrong_kind(err, path, value, "an object");
    }
    *out = value;
    return CM_OK;
}

static cm_status geo_check_word(const json_t *object, const char *path, const char *wanted, cm_error *err)
{
    const json_t *value = geo_get(object, path);
    if (!json_is_string(value)) {
        return geo_wrong_kind(err, path, value, "a string");
    }
    if (strcmp(json_string_value(value), wanted) != 0) {
        return cm_error_set(err, CM_E_CORRUPT, path, "config.json: %s is \"%.80s\", only \"%s\" is supported",
                            path, json_string_value(value), wanted);
    }
    return CM_OK;
}

static cm_status geo_check_bool(const json_t *root, const char *key, bool wanted, bool needed, cm_error *err)
{
    const json_t *value = json_object_get(root, key);
    if (value == NULL && !needed) {
        return CM_OK;
    }
    if (!json_is_boolean(value)) {
        return geo_wrong_kind(err, key, value, "true or false");
    }
    if (json_is_true(value) != wanted) {
        return cm_error_set(err, CM_E_CORRUPT, key, "config.json: %s is %s, only %s is supported", key,
                            wanted ? "false" : "true", wanted ? "true" : "false");
    }
    return CM_OK;
}

static cm_status geo_read_sizes(const json_t *root, const geo_size *rows, size_t n, md_geometry *g,
                                cm_error *err)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t *field = (uint32_t *)(void *)((char *)g + rows[i].offset);
        CM_TRY(geo_read_u32(root, rows[i].key, rows[i].min, rows[i].max, field, err));
    }
    return CM_OK;
}

/* ---- groups of keys ---- */

static cm_status geo_read_numbers(const json_t *root, md_geometry *g, cm_error *err)
{
    for (size_t i = 0; i < sizeof geo_numbers / sizeof geo_numbers[0]; i++) {
        const geo_number *row = &geo_numbers[i];
        double number;
        CM_TRY(geo_read_number(root, row->key, row->above, row->max, &number, err));
        float *field = (float *)(void *)((char *)g + row->offset);
        *field = (float)number;
        if (!(*field > 0)) {
            return cm_error_set(err, CM_E_CORRUPT, row->key, "config.json: %s is %g, which is 0 as a float",
                                row->key, number);
        }
    }
    return geo_read_number(root, "rope_theta", 1, 1e12, &g->rope_theta, err);
}

static cm_status geo_check_words(const json_t *root, const json_t *quantization, cm_error *err)
{
    for (size_t i = 0; i < sizeof geo_words / sizeof geo_words[0]; i++) {
        const json_t *object = strchr(geo_words[i][0], '.') != NULL ? quantization : root;
        CM_TRY(geo_check_word(object, geo_words[i][0], geo_words[i][1], err));
    }
    return CM_OK;
}

static cm_status geo_check_quantization(const json_t *quantization, cm_error *err)
{
    const char *key = "quantization_config.weight_block_size";
    const json_t *block = geo_get(quantization, key);
    if (!json_is_array(block)) {
        return geo_wrong_kind(err, key, block, "a list");
    }
    if (json_array_size(block) != 2 || json_integer_value(json_array_get(block, 0)) != 128 ||
        json_integer_value(json_array_get(block, 1)) != 128) {
        return cm_error_set(err, CM_E_CORRUPT, key, "config.json: %s must be [128, 128]", key);
    }
    /* absent in -Base, whose scales are floats */
    if (json_object_get(quantization, "scale_fmt") != NULL) {
        CM_TRY(geo_check_word(quantization, "quantization_config.scale_fmt", "ue8m0", err));
    }
    return CM_OK;
}

/* Absent means fp4: the first revision of the Flash checkpoint had FP4 experts and no such key, and
 * quantization_config says fp8 for both kinds. A checkpoint with E4M3 experts and no key is refused when its
 * tensors are compared. */
static cm_status geo_read_expert_dtype(const json_t *root, md_geometry *g, cm_error *err)
{
    const json_t *value = json_object_get(root, "expert_dtype");
    g->expert_dtype = MD_EXPERT_FP4;
    if (value == NULL) {
        return CM_OK;
    }
    if (!json_is_string(value)) {
        return geo_wrong_kind(err, "expert_dtype", value, "a string");
    }
    if (strcmp(json_string_value(value), "fp8") == 0) {
        g->expert_dtype = MD_EXPERT_FP8;
    } else if (strcmp(json_string_value(value), "fp4") != 0) {
        return cm_error_set(err, CM_E_CORRUPT, "expert_dtype",
                            "config.json: expert_dtype is \"%.80s\", only \"fp4\" and \"fp8\" are supported",
                            json_string_value(value));
    }
    return CM_OK;
}

static bool geo_is_dspark(json_t *root)
{
    const char *key;
    json_t *value;
    json_object_foreach(root, key, value)
    {
        if (strncmp(key, "dspark_", 7) == 0) {
            return true;
        }
    }
    return false;
}

/* DSpark keeps num_nextn_predict_layers 1 although it has one stage per target layer; the number of stages
 * would do as well, anything else belongs to another drafter. */
static cm_status geo_check_dspark_stages(const json_t *root, uint32_t n_target, cm_error *err)
{
    const char *key = "num_nextn_predict_layers";
    uint32_t n;
    CM_TRY(geo_read_u32(root, key, 1, MD_STAGE_MAX, &n, err));
    if (n != 1 && n != n_target) {
        return cm_error_set(err, CM_E_CORRUPT, key,
                            "config.json: %s is %u, with dspark_target_layer_ids of %u layers it must be 1",
                            key, n, n_target);
    }
    return CM_OK;
}

/* The tensors' names overlap the MTP block's: any dspark_ key decides. */
static cm_status geo_read_dspark(const json_t *root, md_geometry *g, cm_error *err)
{
    const char *key = "dspark_target_layer_ids";
    const json_t *list = json_object_get(root, key);
    if (!json_is_array(list)) {
        return geo_wrong_kind(err, key, list, "a list");
    }
    size_t n = json_array_size(list);
    if (n < 1 || n > MD_STAGE_MAX) {
        return cm_error_set(err, CM_E_CORRUPT, key, "config.json: %s has %zu entries, allowed are 1 to %d",
                            key, n, MD_STAGE_MAX);
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *value = json_array_get(list, i);
        json_int_t layer = json_integer_value(value);
        if (!json_is_integer(value) || layer < 0 || layer >= g->n_layer ||
            (i > 0 && layer <= g->dspark_target[i - 1])) {
            return cm_error_set(
                err, CM_E_CORRUPT, key,
                "config.json: entry %zu of %s must be a layer below num_hidden_layers %u, in ascending "
                "order",
                i, key, g->n_layer);
        }
        g->dspark_target[i] = (uint32_t)layer;
    }
    CM_TRY(geo_check_dspark_stages(root, (uint32_t)n, err));
    g->drafter = MD_DRAFTER_DSPARK;
    g->n_stage = g->n_dspark_target = (uint32_t)n;
    return geo_read_u32(root, "dspark_markov_rank", 1, 1u << 17, &g->dspark_rank, err);
}

static cm_status geo_read_drafter(json_t *root, md_geometry *g, cm_error *err)
{
    if (geo_is_dspark(root)) {
        return geo_read_dspark(root, g, err);
    }
    CM_TRY(geo_read_u32(root, "num_nextn_predict_layers", 0, MD_STAGE_MAX, &g->n_stage, err));
    g->drafter = g->n_stage > 0 ? MD_DRAFTER_MTP : MD_DRAFTER_NONE;
    return CM_OK;
}

/* One entry per layer and one per stage. Stages are window-only blocks: a ratio there is an array shifted by
 * one. */
static cm_status geo_read_ratios(const json_t *root, md_geometry *g, cm_error *err)
{
    const char *key = "compress_ratios";
    const json_t *list = json_object_get(root, key);
    uint32_t n = g->n_layer + g->n_stage;
    if (n > MD_LAYER_MAX) {
        return cm_error_set(err, CM_E_CORRUPT, "num_hidden_layers",
                            "config.json: num_hidden_layers %u and %u drafter stages, together at most %d",
                            g->n_layer, g->n_stage, MD_LAYER_MAX);
    }
    if (!json_is_array(list)) {
        return geo_wrong_kind(err, key, list, "a list");
    }
    if (json_array_size(list) != n) {
        return cm_error_set(
            err, CM_E_CORRUPT, key,
            "config.json: %s has %zu entries, num_hidden_layers %u and %u drafter stages (%s) need "
            "%u",
            key, json_array_size(list), g->n_layer, g->n_stage,
            g->drafter == MD_DRAFTER_DSPARK ? "dspark_target_layer_ids" : "num_nextn_predict_layers", n);
    }
    for (uint32_t i = 0; i < n; i++) {
        const json_t *value = json_array_get(list, i);
        json_int_t ratio = json_integer_value(value);
        if (!json_is_integer(value) || (ratio != 0 && ratio != 4 && ratio != 128)) {
            return cm_error_set(err, CM_E_CORRUPT, key, "config.json: entry %u of %s must be 0, 4 or 128", i,
                                key);
        }
        if (i >= g->n_layer && ratio != 0) {
            return cm_error_set(
                err, CM_E_CORRUPT, key,
                "config.json: entry %u of %s is %d, but it belongs to drafter stage %u, which has "
                "only a window: it must be 0",
                i, key, (int)ratio, i - g->n_layer);
        }
        g->ratio[i] = (uint32_t)ratio;
    }
    return CM_OK;
}

static uint32_t geo_count_ratio(const md_geometry *g, uint32_t ratio)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < g->n_layer; i++) {
        n += g->ratio[i] == ratio;
    }
    return n;
}

/* The tables of compressed layers; needed only where there is one. */
static cm_status geo_read_yarn(const json_t *root, md_geometry *g, cm_error *err)
{
    const json_t *yarn = NULL;
    if (geo_count_ratio(g, 0) == g->n_layer) {
        return CM_OK;
    }
    CM_TRY(geo_read_number(root, "compress_rope_theta", 1, 1e12, &g->compress_theta, err));
    CM_TRY(geo_read_object(root, "rope_scaling", &yarn, err));
    CM_TRY(geo_check_word(yarn, "rope_scaling.type", "yarn", err));
    CM_TRY(geo_read_number(yarn, "rope_scaling.factor", 0, 1e6, &g->yarn.factor, err));
    CM_TRY(geo_read_u32(yarn, "rope_scaling.original_max_position_embeddings", 1, 1u << 24,
                        &g->yarn.original_positions, err));
    CM_TRY(geo_read_number(yarn, "rope_scaling.beta_fast", 0, 1e6, &g->yarn.beta_fast, err));
    CM_TRY(geo_read_number(yarn, "rope_scaling.beta_slow", 0, 1e6, &g->yarn.beta_slow, err));
    if (g->yarn.factor < 1) {
        return cm_error_set(err, CM_E_CORRUPT, "rope_scaling.factor",
                            "config.json: rope_scaling.factor is %g, it must be at least 1", g->yarn.factor);
    }
    if (g->yarn.beta_slow >= g->yarn.beta_fast) {
        return cm_error_set(err, CM_E_CORRUPT, "rope_scaling.beta_slow",
                            "config.json: rope_scaling.beta_slow %g must be below rope_scaling.beta_fast %g",
                            g->yarn.beta_slow, g->yarn.beta_fast);
    }
    return CM_OK;
}

/* ---- sizes against each other ---- */

static cm_status geo_check_attention(const md_geometry *g, cm_error *err)
{
    if (g->rope_dim % 2 != 0 || g->rope_dim >= g->head_dim) {
        return cm_error_set(err, CM_E_CORRUPT, "qk_rope_head_dim",
                            "config.json: qk_rope_head_dim is %u, it must be even and below head_dim %u",
                            g->rope_dim, g->head_dim);
    }
    /* KV rows carry one scale per 64 values of the part without rope */
    if ((g->head_dim - g->rope_dim) % 64 != 0) {
        return cm_error_set(err, CM_E_CORRUPT, "head_dim",
                            "config.json: head_dim %u less qk_rope_head_dim %u must be a multiple of 64",
                            g->head_dim, g->rope_dim);
    }
    if (g->n_head % g->o_groups != 0) {
        return cm_error_set(err, CM_E_CORRUPT, "o_groups",
                            "config.json: num_attention_heads %u is not divisible by o_groups %u", g->n_head,
                            g->o_groups);
    }
    /* tokens of an unfinished compression window are reachable through the raw window only */
    uint32_t ratio = geo_count_ratio(g, 128) > 0 ? 128 : geo_count_ratio(g, 4) > 0 ? 4 : 0;
    if (g->window < ratio) {
        return cm_error_set(
            err, CM_E_CORRUPT, "sliding_window",
            "config.json: sliding_window is %u, a layer with compress ratio %u needs at least that "
            "many",
            g->window, ratio);
    }
    /* the indexer's vectors pass through a Hadamard transform, after rope on their tail */
    if (g->index_dim != 0 && ((g->index_dim & (g->index_dim - 1)) != 0 || g->index_dim < g->rope_dim)) {
        return cm_error_set(err, CM_E_CORRUPT, "index_head_dim",
                            "config.json: index_head_dim is %u, it must be a power of two and at least "
                            "qk_rope_head_dim %u",
                            g->index_dim, g->rope_dim);
    }
    return CM_OK;
}

static cm_status geo_check_experts(const md_geometry *g, cm_error *err)
{
    if (g->topk > g->n_expert) {
        return cm_error_set(err, CM_E_CORRUPT, "num_experts_per_tok",
                            "config.json: num_experts_per_tok %u is more than n_routed_experts %u", g->topk,
                            g->n_expert);
    }
    if (g->n_hash_layer > g->n_layer) {
        return cm_error_set(err, CM_E_CORRUPT, "num_hash_layers",
                            "config.json: num_hash_layers %u is more than num_hidden_layers %u",
                            g->n_hash_layer, g->n_layer);
    }
    if (g->expert_dtype == MD_EXPERT_FP4 && (g->d % 32 != 0 || g->inner % 32 != 0)) {
        const char *key = g->d % 32 != 0 ? "hidden_size" : "moe_intermediate_size";
        return cm_error_set(
            err, CM_E_CORRUPT, key,
            "config.json: %s is %u, FP4 experts need a multiple of 32 (one scale per 32 values)", key,
            g->d % 32 != 0 ? g->d : g->inner);
    }
    return CM_OK;
}

static cm_status geo_check_ids(const md_geometry *g, cm_error *err)
{
    if (g->bos_id >= g->vocab || g->eos_id >= g->vocab) {
        const char *key = g->bos_id >= g->vocab ? "bos_token_id" : "eos_token_id";
        return cm_error_set(err, CM_E_CORRUPT, key, "config.json: %s is %u, vocab_size is only %u", key,
                            g->bos_id >= g->vocab ? g->bos_id : g->eos_id, g->vocab);
    }
    return CM_OK;
}

/* ---- all of it ---- */

static cm_status geo_read(json_t *root, md_geometry *g, cm_error *err)
{
    const json_t *quantization = NULL;
    uint32_t n_kv_head;
    CM_TRY(geo_read_object(root, "quantization_config", &quantization, err));
    CM_TRY(geo_check_words(root, quantization, err));
    CM_TRY(geo_check_quantization(quantization, err));
    CM_TRY(geo_check_bool(root, "norm_topk_prob", true, true, err));
    /* absent is harmless here: the closed list of tensors has no bias and a head of its own */
    CM_TRY(geo_check_bool(root, "attention_bias", false, false, err));
    CM_TRY(geo_check_bool(root, "tie_word_embeddings", false, false, err));
    CM_TRY(geo_read_u32(root, "num_key_value_heads", 1, 1, &n_kv_head, err));
    CM_TRY(geo_read_sizes(root, geo_sizes, sizeof geo_sizes / sizeof geo_sizes[0], g, err));
    CM_TRY(geo_read_numbers(root, g, err));
    CM_TRY(geo_read_expert_dtype(root, g, err));
    CM_TRY(geo_read_drafter(root, g, err));
    CM_TRY(geo_read_ratios(root, g, err));
    CM_TRY(geo_read_yarn(root, g, err));
    if (geo_count_ratio(g, 4) > 0) {
        CM_TRY(geo_read_sizes(root, geo_index_sizes, sizeof geo_index_sizes / sizeof geo_index_sizes[0], g,
                              err));
    }
    CM_TRY(geo_check_attention(g, err));
    CM_TRY(geo_check_experts(g, err));
    return geo_check_ids(g, err);
}

cm_status md_geometry_parse(const char *json, size_t n_bytes, md_geometry *geometry_out, cm_error *err)
{
    md_geometry geometry = {0};
    json_t *root;
    CM_TRY(md_json_object(json, n_bytes, "config.json", &root, err));
    cm_status status = geo_read(root, &geometry, err);
    json_decref(root);
    if (status == CM_OK) {
        *geometry_out = geometry;
    }
    return status;
}

cm_status md_config_read(const char *dir, cm_bytes *text_out, cm_error *err)
{
    return md_file_read(dir, "config.json", CONFIG_BYTES_MAX, text_out, err);
}

cm_status md_geometry_load(const char *dir, md_geometry *geometry_out, cm_error *err)
{
    cm_bytes text;
    CM_TRY(md_config_read(dir, &text, err));
    cm_status status = md_geometry_parse(cm_bytes_text(&text), text.len, geometry_out, err);
    cm_bytes_fini(&text);
    return status;
}

void md_block_name(const md_geometry *g, uint32_t block, char name_out[MD_BLOCK_NAME_MAX])
{
    if (block < g->n_layer) {
        snprintf(name_out, MD_BLOCK_NAME_MAX, "layers.%u.", block);
    } else {
        snprintf(name_out, MD_BLOCK_NAME_MAX, "mtp.%u.", block - g->n_layer);
    }
}
