/* The closed list of tensors against the published totals of the released models. */
#include <inttypes.h>
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
#include "common/model/checkpoint.h"

static void geometry_load(const char *name, md_geometry *geometry)
{
    char path[512];
    cm_error err = {0};
    snprintf(path, sizeof path, "%s/%s_config.json", UNIT_TEST_DATA, name);
    json_t *config = json_load_file(path, 0, NULL);
    char *text = json_dumps(config, JSON_COMPACT);
    assert_non_null(text);
    if (md_geometry_parse(text, strlen(text), geometry, &err) != CM_OK) {
        fail_msg("%s: %s", name, err.text);
    }
    cm_free(text);
    json_decref(config);
}

static void test_totals(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        uint64_t n_tensors, n_bytes, expert_bytes;
    } rows[] = {
        {"pro", 145116, 864704792696, 35094528},
        {"flash", 69187, 159609485896, 13369344},
        {"pro_0813", 149782, 892727580904, 35094528},
        {"flash_0731", 72317, 166878536440, 13369344},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        md_geometry g;
        uint64_t n_tensors, n_bytes;
        geometry_load(rows[i].name, &g);
        md_expect_totals(&g, &n_tensors, &n_bytes);
        assert_int_equal(n_tensors, rows[i].n_tensors);
        assert_int_equal(n_bytes, rows[i].n_bytes);
        assert_int_equal(md_expert_bytes(&g), rows[i].expert_bytes);
    }
}

/* Parts of the payload, by the first words that match a name; the byte table of model section 8.3. */
typedef struct part {
    const char *words;
    uint64_t pro, flash;
} part;

static const part parts[] = {
    {"mtp.", 13956587692, 3593787756},   {".ffn.experts.", 822054223872, 147169738752},
    {".indexer.", 625367040, 275353344}, {".compressor.", 1344566272, 525722624},
    {".attn.", 18294854528, 4599478144}, {".shared_experts.", 4029923520, 1082196480},
    {".tid2eid", 18616320, 18616320},    {".gate.", 335895552, 90218496},
    {"hc_", 336278412, 135537756},       {"norm.", 1763328, 712704},
    {"embed.", 1853358080, 1059061760},  {"head.", 1853358080, 1059061760},
};
enum { PARTS = sizeof parts / sizeof parts[0] };

static bool part_add(void *ctx, const md_expect *expect)
{
    uint64_t *n_bytes = ctx, n = md_dtype_bytes(expect->dtype);
    for (uint32_t i = 0; i < expect->n_dim; i++) {
        n *= expect->dim[i];
    }
    for (size_t i = 0; i < PARTS; i++) {
        if (strstr(expect->name, parts[i].words) != NULL) {
            n_bytes[i] += n;
            return true;
        }
    }
    fail_msg("%s belongs to no part", expect->name);
    return false;
}

static void test_parts(void **state)
{
    (void)state;
    md_geometry g;
    uint64_t pro[PARTS] = {0}, flash[PARTS] = {0};
    geometry_load("pro", &g);
    md_expect_each(&g, part_add, pro);
    geometry_load("flash", &g);
    md_expect_each(&g, part_add, flash);
    for (size_t i = 0; i < PARTS; i++) {
        if (pro[i] != parts[i].pro || flash[i] != parts[i].flash) {
            fail_msg("%s: pro %" PRIu64 " flash %" PRIu64 ", expected %" PRIu64 " and %" PRIu64,
                     parts[i].words, pro[i], flash[i], parts[i].pro, parts[i].flash);
        }
    }
}

/* Tensors per layer of Flash, and the order of the parts: embed, layers, head, stages. */
typedef struct order {
    uint32_t n_in_layer[64];
    int stage; /* 0 embed, 1 layers, 2 head, 3 stages */
    uint32_t layer, n;
} order;

static bool order_add(void *ctx, const md_expect *expect)
{
    order *o = ctx;
    unsigned layer = 0;
    int stage = 2;
    if (sscanf(expect->name, "layers.%u.", &layer) == 1) {
        stage = 1;
        o->n_in_layer[layer]++;
    } else if (strncmp(expect->name, "embed", 5) == 0) {
        stage = 0;
    } else if (sscanf(expect->name, "mtp.%u.", &layer) == 1) {
        stage = 3;
    }
    assert_true(stage > o->stage || (stage == o->stage && (stage == 2 || layer >= o->layer)));
    o->stage = stage;
    o->layer = layer;
    return ++o->n < 70000;
}

static void test_order(void **state)
{
    (void)state;
    md_geometry g;
    order o = {0};
    geometry_load("flash_0731", &g);
    md_expect_each(&g, order_add, &o);
    assert_int_equal(o.n, 70000); /* of 72,317: it stops when told */
    assert_int_equal(o.n_in_layer[0], 1565);
    assert_int_equal(o.n_in_layer[3], 1569);
    assert_int_equal(o.n_in_layer[4], 1576);
}

/* What stands beside the blocks in the drafter of Flash-0731, stage by stage, in list order. */
typedef struct dspark_row {
    const char *name;
    md_dtype dtype;
    uint32_t n_dim;
    uint64_t dim[MD_DIMS_MAX];
} dspark_row;

static const dspark_row dspark_rows[] = {
    {"mtp.0.main_proj.weight", MD_F8_E4M3, 2, {4096, 12288}},
    {"mtp.0.main_proj.scale", MD_F8_E8M0, 2, {32, 96}},
    {"mtp.0.main_norm.weight", MD_BF16, 1, {4096}},
    {"mtp.2.norm.weight", MD_BF16, 1, {4096}},
    {"mtp.2.hc_head_fn", MD_F32, 2, {4, 16384}},
    {"mtp.2.hc_head_base", MD_F32, 1, {4}},
    {"mtp.2.hc_head_scale", MD_F32, 1, {1}},
    {"mtp.2.markov_head.markov_w1.weight", MD_BF16, 2, {129280, 256}},
    {"mtp.2.markov_head.markov_w2.weight", MD_BF16, 2, {129280, 256}},
    {"mtp.2.confidence_head.proj.weight", MD_BF16, 2, {1, 4352}},
};
enum { DSPARK_ROWS = sizeof dspark_rows / sizeof dspark_rows[0] };

static bool dspark_add(void *ctx, const md_expect *expect)
{
    uint32_t *n = ctx;
    const char *rest = expect->name + 6;
    bool is_block = strncmp(rest, "attn", 4) == 0 || strncmp(rest, "ffn", 3) == 0 ||
                    strncmp(rest, "hc_attn", 7) == 0 || strncmp(rest, "hc_ffn", 6) == 0;
    if (strncmp(expect->name, "mtp.", 4) == 0 && !is_block) {
        assert_true(*n < DSPARK_ROWS);
        const dspark_row *wanted = &dspark_rows[(*n)++];
        assert_string_equal(expect->name, wanted->name);
        assert_int_equal(expect->dtype, wanted->dtype);
        assert_int_equal(expect->n_dim, wanted->n_dim);
        assert_memory_equal(expect->dim, wanted->dim, sizeof expect->dim);
    }
    return true;
}

static void test_dspark_rows(void **state)
{
    (void)state;
    md_geometry g;
    uint32_t n = 0;
    geometry_load("flash_0731", &g);
    md_expect_each(&g, dspark_add, &n);
    assert_int_equal(n, DSPARK_ROWS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_totals),
        cmocka_unit_test(test_parts),
        cmocka_unit_test(test_order),
        cmocka_unit_test(test_dspark_rows),
    };
    /* so that what jansson returns can be freed with cm_free */
    json_set_alloc_funcs(cm_try_alloc, cm_free);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
