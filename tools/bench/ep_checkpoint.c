#include "tools/bench/ep_checkpoint.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/base/mem.h"
#include "common/model/checkpoint.h"

#define SHARD "model-00001-of-00001.safetensors"

static const char *const g_files[] = {"config.json", "model.safetensors.index.json", SHARD};

/* The rest of the model is as small as it may be: nobody reads it. */
static json_t *checkpoint_config(const ep_shape *s)
{
    json_t *config = json_pack(
        "{s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:s, s:s, s:b}",
        "model_type", "deepseek_v4", "torch_dtype", "bfloat16", "hidden_size", (int)s->d, "num_hidden_layers",
        (int)s->n_layer, "num_attention_heads", 1, "num_key_value_heads", 1, "head_dim", 128,
        "qk_rope_head_dim", 64, "q_lora_rank", 128, "o_groups", 1, "o_lora_rank", 128, "sliding_window", 128,
        "n_routed_experts", (int)s->n_expert, "num_experts_per_tok", (int)s->topk, "n_shared_experts", 1,
        "routed_scaling_factor", 1.0, "scoring_func", "sqrtsoftplus", "topk_method", "noaux_tc",
        "norm_topk_prob", 1);
    json_t *more = json_pack(
        "{s:i, s:i, s:f, s:i, s:i, s:f, s:f, s:i, s:i, s:i, s:s, s:b, s:b, s:i, s:i, s:s, s:i, s:i}",
        "moe_intermediate_size", (int)s->inner, "num_hash_layers", 0, "swiglu_limit", 10.0, "hc_mult", 4,
        "hc_sinkhorn_iters", 20, "hc_eps", 1e-6, "rms_norm_eps", 1e-6, "num_nextn_predict_layers", 0,
        "vocab_size", 256, "max_position_embeddings", 4096, "hidden_act", "silu", "attention_bias", 0,
        "tie_word_embeddings", 0, "bos_token_id", 0, "eos_token_id", 1, "expert_dtype", "fp4", "rope_theta",
        10000, "compress_rope_theta", 160000);
    json_t *quant =
        json_pack("{s:s, s:s, s:s, s:[ii], s:s}", "quant_method", "fp8", "fmt", "e4m3", "activation_scheme",
                  "dynamic", "weight_block_size", 128, 128, "scale_fmt", "ue8m0");
    json_t *rope = json_pack("{s:s, s:i, s:i, s:i, s:i}", "type", "yarn", "factor", 16,
                             "original_max_position_embeddings", 1024, "beta_fast", 32, "beta_slow", 1);
    json_t *ratios = json_array();
    for (uint32_t i = 0; i < s->n_layer; i++) {
        json_array_append_new(ratios, json_integer(0));
    }
    json_object_update(config, more);
    json_decref(more);
    json_object_set_new(config, "quantization_config", quant);
    json_object_set_new(config, "rope_scaling", rope);
    json_object_set_new(config, "compress_ratios", ratios);
    return config;
}

typedef struct shard_list {
    json_t *header, *weight_map;
    uint64_t n_bytes;
} shard_list;

static bool list_tensor(void *ctx, const md_expect *expect)
{
    shard_list *list = ctx;
    json_t *shape = json_array();
    uint64_t n_bytes = md_dtype_bytes(expect->dtype);
    for (uint32_t i = 0; i < expect->n_dim; i++) {
        json_array_append_new(shape, json_integer((json_int_t)expect->dim[i]));
        n_bytes *= expect->dim[i];
    }
    json_object_set_new(list->header, expect->name,
                        json_pack("{s:s, s:o, s:[II]}", "dtype", md_dtype_name(expect->dtype), "shape", shape,
                                  "data_offsets", (json_int_t)list->n_bytes,
                                  (json_int_t)(list->n_bytes + n_bytes)));
    json_object_set_new(list->weight_map, expect->name, json_string(SHARD));
    list->n_bytes += n_bytes;
    return true;
}

/* prefix: bytes of a length that goes first, 0 or 8; hole: bytes of zeros behind. */
static cm_status write_file(const char *folder, const char *name, const json_t *value, bool prefix,
                            uint64_t hole, cm_error *err)
{
    char path[512];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    size_t n = json_dumpb(value, NULL, 0, JSON_COMPACT), padded = (n + 7) / 8 * 8;
    char *text = cm_alloc(padded);
    memset(text, ' ', padded);
    json_dumpb(value, text, n, JSON_COMPACT);
    uint64_t length = padded, head = prefix ? sizeof(length) : 0;
    FILE *file = fopen(path, "we");
    bool ok = file != NULL && (!prefix || fwrite(&length, sizeof(length), 1, file) == 1) &&
              fwrite(text, padded, 1, file) == 1 && fflush(file) == 0 &&
              (hole == 0 || ftruncate(fileno(file), (off_t)(head + padded + hole)) == 0);
    int error = errno;
    if (file != NULL) {
        fclose(file);
    }
    cm_free(text);
    return ok ? CM_OK : cm_error_set(err, CM_E_IO, NULL, "%s: %s", path, strerror(error));
}

cm_status ep_checkpoint_write(const char *folder, const ep_shape *shape, cm_error *err)
{
    md_geometry geometry;
    json_t *config = checkpoint_config(shape);
    shard_list list = {.header = json_object(), .weight_map = json_object()};
    cm_status status = write_file(folder, "config.json", config, false, 0, err);
    if (status == CM_OK) {
        status = md_geometry_load(folder, &geometry, err);
    }
    if (status == CM_OK) {
        md_expect_each(&geometry, list_tensor, &list);
        status = write_file(folder, SHARD, list.header, true, list.n_bytes, err);
    }
    if (status == CM_OK) {
        json_t *index = json_pack("{s:{s:I}, s:O}", "metadata", "total_size", (json_int_t)list.n_bytes,
                                  "weight_map", list.weight_map);
        status = write_file(folder, "model.safetensors.index.json", index, false, 0, err);
        json_decref(index);
    }
    json_decref(config);
    json_decref(list.header);
    json_decref(list.weight_map);
    return status;
}

void ep_checkpoint_remove(const char *folder)
{
    for (size_t i = 0; i < sizeof(g_files) / sizeof(g_files[0]); i++) {
        char path[512];
        snprintf(path, sizeof(path), "%s/%s", folder, g_files[i]);
        unlink(path);
    }
    rmdir(folder);
}
