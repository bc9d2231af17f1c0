/* config.json to sizes: what the released models say, and every way a field can be wrong. */
#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/model/geometry.h"

/* ---- helpers ---- */

static json_t *config_load(const char *name)
{
    char path[512];
    json_error_t cause;
    snprintf(path, sizeof path, "%s/%s_config.json", UNIT_TEST_DATA, name);
    json_t *config = json_load_file(path, 0, &cause);
    if (config == NULL) {
        fail_msg("%s: %s", path, cause.text);
    }
    return config;
}

static cm_status config_parse(const json_t *config, md_geometry *geometry_out, cm_error *err)
{
    char *text = json_dumps(config, JSON_COMPACT);
    assert_non_null(text);
    cm_status status = md_geometry_parse(text, strlen(text), geometry_out, err);
    cm_free(text);
    return status;
}

/* Sets "key", "object.key" to the JSON in value; NULL deletes. */
static void config_edit(json_t *config, const char *path, const char *value)
{
    const char *dot = strchr(path, '.');
    json_t *object = config;
    if (dot != NULL) {
        char parent[64];
        snprintf(parent, sizeof parent, "%.*s", (int)(dot - path), path);
        object = json_object_get(config, parent);
        path = dot + 1;
    }
    if (value == NULL) {
        assert_int_equal(json_object_del(object, path), 0);
        return;
    }
    json_t *parsed = json_loads(value, JSON_DECODE_ANY, NULL);
    assert_non_null(parsed);
    assert_int_equal(json_object_set_new(object, path, parsed), 0);
}

static void assert_refused(const json_t *config, const char *what, const char *field)
{
    md_geometry geometry;
    cm_error err = {0};
    memset(&geometry, 0x5A, sizeof geometry);
    md_geometry before = geometry;
    cm_status status = config_parse(config, &geometry, &err);
    if (status != CM_E_CORRUPT || strcmp(err.field, field) != 0 || strstr(err.text, field) == NULL) {
        fail_msg("%s: status %s field '%s' text '%s', expected field '%s'", what, cm_status_name(status),
                 err.field, err.text, field);
    }
    assert_memory_equal(&geometry, &before, sizeof geometry);
}

static void assert_accepted(const json_t *config, const char *what, md_geometry *geometry_out)
{
    cm_error err = {0};
    if (config_parse(config, geometry_out, &err) != CM_OK) {
        fail_msg("%s: %s", what, err.text);
    }
}

/* ---- what is right ---- */

static void test_pro(void **state)
{
    (void)state;
    md_geometry g;
    json_t *config = config_load("pro");
    assert_accepted(config, "pro", &g);
    json_decref(config);
    assert_int_equal(g.d, 7168);
    assert_int_equal(g.n_layer, 61);
    assert_int_equal(g.n_head, 128);
    assert_int_equal(g.head_dim, 512);
    assert_int_equal(g.rope_dim, 64);
    assert_int_equal(g.q_rank, 1536);
    assert_int_equal(g.o_groups, 16);
    assert_int_equal(g.o_rank, 1024);
    assert_int_equal(g.window, 128);
    assert_int_equal(g.index_head, 64);
    assert_int_equal(g.index_dim, 128);
    assert_int_equal(g.index_topk, 1024);
    assert_int_equal(g.n_expert, 384);
    assert_int_equal(g.topk, 6);
    assert_int_equal(g.n_shared, 1);
    assert_int_equal(g.inner, 3072);
    assert_int_equal(g.n_hash_layer, 3);
    assert_true(g.route_scale == 2.5f && g.swiglu_limit == 10.0f && g.norm_eps == 1e-6f && g.hc_eps == 1e-6f);
    assert_int_equal(g.hc, 4);
    assert_int_equal(g.sinkhorn_iters, 20);
    assert_int_equal(g.vocab, 129280);
    assert_int_equal(g.context, 1048576);
    assert_int_equal(g.bos_id, 0);
    assert_int_equal(g.eos_id, 1);
    assert_true(g.rope_theta == 10000 && g.compress_theta == 160000);
    assert_true(g.yarn.factor == 16 && g.yarn.beta_fast == 32 && g.yarn.beta_slow == 1);
    assert_int_equal(g.yarn.original_positions, 65536);
    assert_int_equal(g.ratio[0], 128);
    assert_int_equal(g.ratio[59], 128);
    assert_int_equal(g.ratio[60], 4);
    assert_int_equal(g.ratio[61], 0);
    assert_int_equal(g.expert_dtype, MD_EXPERT_FP4);
    assert_int_equal(g.drafter, MD_DRAFTER_MTP);
    assert_int_equal(g.n_stage, 1);
    assert_false(g.float_scales);
    assert_true(md_layer_is_hash(&g, 2) && !md_layer_is_hash(&g, 3));
}

static void test_dspark(void **state)
{
    (void)state;
    md_geometry g;
    json_t *config = config_load("flash_0731");
    assert_accepted(config, "flash_0731", &g);
    assert_int_equal(g.drafter, MD_DRAFTER_DSPARK);
    assert_int_equal(g.n_stage, 3); /* although num_nextn_predict_layers says 1 */
    assert_int_equal(g.dspark_rank, 256);
    assert_int_equal(g.n_dspark_target, 3);
    assert_int_equal(g.dspark_target[0], 40);
    assert_int_equal(g.dspark_target[2], 42);
    /* a part of the keys is still DSpark, never MTP */
    config_edit(config, "dspark_target_layer_ids", NULL);
    assert_refused(config, "dspark without targets", "dspark_target_layer_ids");
    json_decref(config);
}

/* Each row is a good Pro config with changes that are allowed. */
static void test_allowed(void **state)
{
    (void)state;
    static const struct {
        const char *path, *value;
    } rows[] = {
        {"attention_bias", NULL},
        {"tie_word_embeddings", NULL},
        {"expert_dtype", NULL},
        {"expert_dtype", "\"fp8\""},
        {"quantization_config.scale_fmt", NULL},
        {"rope_theta", "10000.0"},
        {"rope_scaling.factor", "1"},
        {"num_hash_layers", "0"},
        {"num_hash_layers", "61"},
        {"sliding_window", "256"},
        {"o_groups", "1"},
        {"rms_norm_eps", "1e-20"},
        {"some_new_key", "{\"a\": [1, null]}"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        md_geometry g;
        json_t *config = config_load("pro");
        config_edit(config, rows[i].path, rows[i].value);
        assert_accepted(config, rows[i].path, &g);
        json_decref(config);
    }
}

static void test_expert_dtype(void **state)
{
    (void)state;
    md_geometry g;
    json_t *config = config_load("pro");
    config_edit(config, "expert_dtype", NULL);
    assert_accepted(config, "absent", &g);
    assert_int_equal(g.expert_dtype, MD_EXPERT_FP4);
    config_edit(config, "expert_dtype", "\"fp8\"");
    assert_accepted(config, "fp8", &g);
    assert_int_equal(g.expert_dtype, MD_EXPERT_FP8);
    json_decref(config);
}

/* Without compressed layers neither YaRN nor the indexer need to be described; without ratio 4 no indexer. */
static void test_what_ratios_need(void **state)
{
    (void)state;
    md_geometry g;
    json_t *config = config_load("pro");
    config_edit(config, "num_hidden_layers", "3");
    config_edit(config, "compress_ratios", "[0, 128, 0, 0]");
    config_edit(config, "index_n_heads", NULL);
    config_edit(config, "index_head_dim", NULL);
    config_edit(config, "index_topk", NULL);
    assert_accepted(config, "no ratio 4", &g);
    assert_true(g.index_head == 0 && g.index_dim == 0 && g.index_topk == 0);
    assert_int_equal(g.yarn.original_positions, 65536);
    config_edit(config, "rope_scaling", NULL);
    assert_refused(config, "ratio 128 without yarn", "rope_scaling");
    config_edit(config, "compress_ratios", "[0, 0, 0, 0]");
    config_edit(config, "compress_rope_theta", NULL);
    config_edit(config, "sliding_window", "1");
    assert_accepted(config, "window only", &g);
    assert_int_equal(g.yarn.original_positions, 0);
    config_edit(config, "compress_ratios", "[0, 4, 0, 0]");
    assert_refused(config, "ratio 4 without theta", "compress_rope_theta");
    json_decref(config);
}

static void test_no_drafter(void **state)
{
    (void)state;
    md_geometry g;
    json_t *config = config_load("pro");
    config_edit(config, "num_nextn_predict_layers", "0");
    assert_refused(config, "an entry too many", "compress_ratios");
    config_edit(config, "num_hidden_layers", "2");
    config_edit(config, "num_hash_layers", "2");
    config_edit(config, "compress_ratios", "[4, 128]");
    assert_accepted(config, "no drafter", &g);
    assert_int_equal(g.drafter, MD_DRAFTER_NONE);
    assert_int_equal(g.n_stage, 0);
    json_decref(config);
}

/* ---- what is wrong ---- */

/* Every key that must be there, with a value of the right JSON kind: deleted, of every wrong kind, and
 * negative. */
static const char *const needed[] = {
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "moe_intermediate_size",
    "routed_scaling_factor",
    "scoring_func",
    "topk_method",
    "norm_topk_prob",
    "num_hash_layers",
    "swiglu_limit",
    "rms_norm_eps",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
    "num_nextn_predict_layers",
    "vocab_size",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "rope_theta",
    "compress_rope_theta",
    "compress_ratios",
    "rope_scaling",
    "rope_scaling.type",
    "rope_scaling.factor",
    "rope_scaling.original_max_position_embeddings",
    "rope_scaling.beta_fast",
    "rope_scaling.beta_slow",
    "quantization_config",
    "quantization_config.quant_method",
    "quantization_config.fmt",
    "quantization_config.activation_scheme",
    "quantization_config.weight_block_size",
};
static const char *const optional[] = {"attention_bias", "tie_word_embeddings", "expert_dtype",
                                       "quantization_config.scale_fmt"};

static void refuse_one(const char *path, const char *value)
{
    json_t *config = config_load("pro");
    char what[160];
    snprintf(what, sizeof what, "%s = %s", path, value != NULL ? value : "(deleted)");
    config_edit(config, path, value);
    assert_refused(config, what, path);
    json_decref(config);
}

static void test_missing(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof needed / sizeof needed[0]; i++) {
        refuse_one(needed[i], NULL);
    }
}

static void test_wrong_kind(void **state)
{
    (void)state;
    static const char *const values[] = {
        "null", "\"x\"", "[]", "[1]", "{}", "-1", "-0.5", "1e300", "9223372036854775807"};
    for (size_t i = 0; i < sizeof needed / sizeof needed[0]; i++) {
        for (size_t j = 0; j < sizeof values / sizeof values[0]; j++) {
            /* an empty object lacks its first key, which is then the one named */
            bool is_object =
                strcmp(needed[i], "rope_scaling") == 0 || strcmp(needed[i], "quantization_config") == 0;
            if (!(is_object && strcmp(values[j], "{}") == 0)) {
                refuse_one(needed[i], values[j]);
            }
        }
    }
    for (size_t i = 0; i < sizeof optional / sizeof optional[0]; i++) {
        for (size_t j = 0; j < sizeof values / sizeof values[0]; j++) {
            refuse_one(optional[i], values[j]);
        }
    }
}

static void test_wrong_value(void **state)
{
    (void)state;
    static const struct {
        const char *path, *value;
    } rows[] = {
        {"hidden_size", "0"},
        {"hidden_size", "7168.0"},
        {"hidden_size", "7150"}, /* FP4 scales cover 32 */
        {"hidden_size", "200000"},
        {"moe_intermediate_size", "0"},
        {"moe_intermediate_size", "3070"},
        {"num_hidden_layers", "0"},
        {"num_hidden_layers", "257"},
        {"num_hidden_layers", "256"}, /* no room for the stage */
        {"num_attention_heads", "0"},
        {"num_key_value_heads", "0"},
        {"num_key_value_heads", "8"},
        {"head_dim", "0"},
        {"head_dim", "500"},
        {"qk_rope_head_dim", "0"},
        {"qk_rope_head_dim", "63"},
        {"qk_rope_head_dim", "512"},
        {"qk_rope_head_dim", "1024"},
        {"q_lora_rank", "0"},
        {"o_groups", "0"},
        {"o_groups", "3"},
        {"o_groups", "256"},
        {"o_lora_rank", "0"},
        {"sliding_window", "0"},
        {"sliding_window", "127"}, /* below ratio 128 */
        {"index_n_heads", "0"},
        {"index_head_dim", "0"},
        {"index_head_dim", "96"},
        {"index_head_dim", "32"}, /* below rope */
        {"index_topk", "0"},
        {"n_routed_experts", "0"},
        {"n_routed_experts", "65536"},
        {"num_experts_per_tok", "0"},
        {"num_experts_per_tok", "65"},
        {"n_shared_experts", "0"},
        {"n_shared_experts", "2"},
        {"num_hash_layers", "62"},
        {"routed_scaling_factor", "0"},
        {"routed_scaling_factor", "1e-300"}, /* 0 as a float */
        {"swiglu_limit", "0"},
        {"rms_norm_eps", "0"},
        {"rms_norm_eps", "2"},
        {"hc_eps", "0"},
        {"hc_mult", "0"},
        {"hc_mult", "9"},
        {"hc_sinkhorn_iters", "0"},
        {"num_nextn_predict_layers", "9"},
        {"vocab_size", "0"},
        {"max_position_embeddings", "0"},
        {"bos_token_id", "129280"},
        {"eos_token_id", "129280"},
        {"rope_theta", "0"},
        {"rope_theta", "1"},
        {"compress_rope_theta", "0"},
        {"rope_scaling.type", "\"linear\""},
        {"rope_scaling.factor", "0"},
        {"rope_scaling.factor", "0.5"},
        {"rope_scaling.original_max_position_embeddings", "0"},
        {"rope_scaling.beta_fast", "0"},
        {"rope_scaling.beta_slow", "0"},
        {"rope_scaling.beta_slow", "32"},
        {"compress_ratios", "[128, 128]"},
        {"model_type", "\"deepseek_v41\""},
        {"scoring_func", "\"sigmoid\""},
        {"topk_method", "\"greedy\""},
        {"norm_topk_prob", "false"},
        {"hidden_act", "\"gelu\""},
        {"attention_bias", "true"},
        {"tie_word_embeddings", "true"},
        {"expert_dtype", "\"nvfp4\""},
        {"quantization_config.quant_method", "\"awq\""},
        {"quantization_config.fmt", "\"e5m2\""},
        {"quantization_config.activation_scheme", "\"static\""},
        {"quantization_config.weight_block_size", "[128]"},
        {"quantization_config.weight_block_size", "[128, 64]"},
        {"quantization_config.weight_block_size", "[64, 128]"},
        {"quantization_config.weight_block_size", "[128, 128, 128]"},
        {"quantization_config.scale_fmt", "\"float\""},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        refuse_one(rows[i].path, rows[i].value);
    }
}

static void test_topk_above_experts(void **state)
{
    (void)state;
    json_t *config = config_load("pro");
    config_edit(config, "n_routed_experts", "5");
    assert_refused(config, "6 of 5 experts", "num_experts_per_tok");
    json_decref(config);
}

static void test_wrong_ratio(void **state)
{
    (void)state;
    static const struct {
        size_t at;
        const char *value;
    } rows[] = {{0, "1"},      {0, "2"},      {5, "64"},    {5, "-4"},
                {60, "128.0"}, {60, "\"4\""}, {60, "null"}, {61, "4"}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        json_t *config = config_load("pro");
        json_array_set_new(json_object_get(config, "compress_ratios"), rows[i].at,
                           json_loads(rows[i].value, JSON_DECODE_ANY, NULL));
        assert_refused(config, rows[i].value, "compress_ratios");
        json_decref(config);
    }
    /* too short, too long, shifted by one */
    json_t *config = config_load("flash");
    json_t *ratios = json_object_get(config, "compress_ratios");
    json_array_remove(ratios, 0);
    assert_refused(config, "43 entries", "compress_ratios");
    json_array_append_new(ratios, json_integer(0));
    json_array_remove(ratios, json_array_size(ratios) - 2);
    json_array_append_new(ratios, json_integer(4));
    assert_refused(config, "shifted", "compress_ratios");
    json_decref(config);
}

static void test_wrong_dspark(void **state)
{
    (void)state;
    static const struct {
        const char *key, *value;
    } rows[] = {
        {"dspark_target_layer_ids", "[]"},
        {"dspark_target_layer_ids", "3"},
        {"dspark_target_layer_ids", "[58, 59, 61]"},
        {"dspark_target_layer_ids", "[58, 58, 60]"},
        {"dspark_target_layer_ids", "[60, 59, 58]"},
        {"dspark_target_layer_ids", "[-1, 59, 60]"},
        {"dspark_target_layer_ids", "[1.0, 59, 60]"},
        {"dspark_target_layer_ids", "[1, 2, 3, 4, 5, 6, 7, 8, 9]"},
        {"dspark_markov_rank", NULL},
        {"dspark_markov_rank", "0"},
        {"dspark_markov_rank", "\"512\""},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        json_t *config = config_load("pro_0813");
        config_edit(config, rows[i].key, rows[i].value);
        assert_refused(config, rows[i].key, rows[i].key);
        json_decref(config);
    }
    json_t *config = config_load("pro_0813");
    config_edit(config, "dspark_target_layer_ids", "[59, 60]");
    assert_refused(config, "two stages, three entries", "compress_ratios");
    json_decref(config);
}

static void test_wrong_text(void **state)
{
    (void)state;
    static const char *const texts[] = {
        "",
        " ",
        "[]",
        "7",
        "null",
        "{",
        "{}x",
        "{\"a\":1,\"a\":1}",
        "{\"a\":\"\xFF\"}",
        "{'a':1}",
        "{\"a\\u0000\":1}",
    };
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        md_geometry g;
        cm_error err = {0};
        assert_int_equal(md_geometry_parse(texts[i], strlen(texts[i]), &g, &err), CM_E_CORRUPT);
        assert_string_equal(err.field, "config.json");
        assert_int_equal(md_geometry_parse(texts[i], strlen(texts[i]), &g, NULL), CM_E_CORRUPT);
    }
}

static void test_no_file(void **state)
{
    (void)state;
    md_geometry g;
    cm_error err = {0};
    assert_int_equal(md_geometry_load("/nonexistent", &g, &err), CM_E_IO);
    assert_string_equal(err.field, "config.json");
    assert_non_null(strstr(err.text, "/nonexistent/config.json"));
    assert_int_equal(md_geometry_load(BALEEN_NANO, &g, &err), CM_OK);
    assert_int_equal(g.vocab, 4096);
}

/* ---- hostile bytes and failing memory ---- */

/* Whatever the bytes, there is an answer; what is accepted keeps the promises of the header. */
static void test_mutations(void **state)
{
    (void)state;
    enum { ROUNDS = 20000, SEED = 20260 };
    json_t *config = config_load("flash_0731");
    char *text = json_dumps(config, JSON_COMPACT);
    size_t n = strlen(text);
    char *copy = cm_alloc(n);
    printf("mutations: seed %d\n", SEED);
    for (uint64_t round = 0; round < ROUNDS; round++) {
        md_geometry g;
        memcpy(copy, text, n);
        for (uint64_t k = 0; k <= round % 3; k++) {
            static const char alphabet[] = "0123456789-.,\"{}[]:eatx\xFF";
            cm_rng_block random = cm_rng_at(SEED, round, k);
            copy[random.word[0] % n] = alphabet[random.word[1] % (sizeof alphabet - 1)];
        }
        if (md_geometry_parse(copy, n, &g, NULL) == CM_OK) {
            assert_true(g.n_layer + g.n_stage <= MD_LAYER_MAX && g.topk <= g.n_expert &&
                        g.rope_dim < g.head_dim);
            assert_true(g.n_head % g.o_groups == 0 && g.n_hash_layer <= g.n_layer && g.eos_id < g.vocab);
        }
    }
    cm_free(copy);
    cm_free(text);
    json_decref(config);
}

static long allocs_left;

static void *failing_alloc(size_t n_bytes)
{
    return allocs_left-- > 0 ? cm_try_alloc(n_bytes) : NULL;
}

/* The n-th allocation fails, for every n until it passes: an error each time and no leak (the sanitizer sees
 * it). jansson reports some of these as bad JSON, so only the failure is asked for. */
static void test_failing_memory(void **state)
{
    (void)state;
    json_t *config = config_load("flash");
    char *text = json_dumps(config, JSON_COMPACT);
    json_decref(config);
    cm_status status = CM_AGAIN;
    json_set_alloc_funcs(failing_alloc, cm_free);
    for (long n = 0; status != CM_OK && n < 100000; n++) {
        md_geometry g;
        allocs_left = n;
        status = md_geometry_parse(text, strlen(text), &g, NULL);
        assert_true(status <= CM_OK);
    }
    json_set_alloc_funcs(cm_try_alloc, cm_free);
    assert_int_equal(status, CM_OK);
    cm_free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pro),
        cmocka_unit_test(test_dspark),
        cmocka_unit_test(test_allowed),
        cmocka_unit_test(test_expert_dtype),
        cmocka_unit_test(test_what_ratios_need),
        cmocka_unit_test(test_no_drafter),
        cmocka_unit_test(test_missing),
        cmocka_unit_test(test_wrong_kind),
        cmocka_unit_test(test_wrong_value),
        cmocka_unit_test(test_topk_above_experts),
        cmocka_unit_test(test_wrong_ratio),
        cmocka_unit_test(test_wrong_dspark),
        cmocka_unit_test(test_wrong_text),
        cmocka_unit_test(test_no_file),
        cmocka_unit_test(test_mutations),
        cmocka_unit_test(test_failing_memory),
    };
    /* so that what jansson returns can be freed with cm_free */
    json_set_alloc_funcs(cm_try_alloc, cm_free);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
