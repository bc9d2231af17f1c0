/* The planner's arithmetic: V4-Pro and V4-Flash against figures worked out by hand from their tensor lists.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/baleen/plan_core.h"

static plan_model model_of(const char *name, uint32_t draft_max)
{
    char path[512];
    md_geometry geometry;
    plan_model model;
    cm_error err;
    (void)snprintf(path, sizeof(path), "%s/%s_config.json", UNIT_TEST_DATA, name);
    json_t *config = json_load_file(path, 0, NULL);
    char *text = json_dumps(config, JSON_COMPACT);
    assert_non_null(text);
    assert_int_equal(md_geometry_parse(text, strlen(text), &geometry, &err), CM_OK);
    plan_model_of(&geometry, draft_max, &model);
    free(text);
    json_decref(config);
    return model;
}

static void near(double got, double want, double part)
{
    if (fabs(got - want) > part * want) {
        fail_msg("%g, but %g was worked out", got, want);
    }
}

static void test_bytes(void **state)
{
    plan_model pro = model_of("pro", 0), flash = model_of("flash", 0);
    (void)state;
    assert_int_equal(pro.tensors, 145116);
    assert_int_equal(pro.bytes, 864704792696);
    assert_int_equal(pro.expert_bytes, 35094528);
    assert_int_equal(pro.experts_bytes, 62ull * 384 * 35094528);
    /* what is no routed expert: the whole less the experts of 61 layers and of the MTP block */
    assert_int_equal(pro.router_bytes, pro.bytes - pro.experts_bytes);
    assert_int_equal(pro.step_bytes, 850748205004 - 822054223872 - 1853358080);
    assert_int_equal(flash.bytes, 159609485896);
    assert_int_equal(flash.step_bytes, 156015698140 - 147169738752 - 1059061760);
    near(pro.dense_values, 23.7e9 + 0.93e9, 0.01);
    near(flash.dense_values, 6.25e9 + 0.53e9, 0.01);
    near(pro.expert_values, 66.06e6, 0.001);
}

static void test_drafter_is_not_held(void **state)
{
    plan_model dspark = model_of("pro_0813", 2);
    (void)state;
    assert_int_equal(dspark.draft_max, 0);
    assert_int_equal(dspark.router_bytes, 850748205004 - 822054223872);
    assert_int_equal(dspark.experts_bytes, 822054223872);
}

static void test_fit(void **state)
{
    plan_model pro = model_of("pro", 0);
    (void)state;
    assert_int_equal(plan_worker_experts(&pro, 16), 62 * 24);
    assert_int_equal(plan_worker_experts(&pro, 7), (62 * 384 + 6) / 7);
    assert_int_equal(plan_workers_min(&pro, 62ull * 24 * 35094528), 16);
    assert_int_equal(plan_workers_min(&pro, 62ull * 24 * 35094528 - 1), 17);
    assert_int_equal(plan_workers_min(&pro, 35094527), 0);
    assert_int_equal(plan_sequences(&pro, 64ull * pro.kv_page_bytes + pro.kv_slot_bytes, 8192), 1);
    assert_int_equal(plan_sequences(&pro, 64ull * pro.kv_page_bytes + pro.kv_slot_bytes - 1, 8192), 0);
}

/* Sixteen cards of 4.3 TB/s that each are router and worker, 64 sequences of 8192 tokens on each: the experts
 * of every layer are hit but few, 24 of 35 MB each on 61 layers; the dense weights once. */
static void test_step(void **state)
{
    plan_model pro = model_of("pro", 0);
    plan_cluster cluster = {.n_worker = 16, .n_router = 16, .context = 8192, .read_bytes_s = 4.3e12};
    plan_step step;
    (void)state;
    plan_step_of(&pro, &cluster, 64, &step);
    near(step.hit, 24, 0.001);
    near(step.experts_s, 11.95e-3, 0.002);
    near(step.dense_s, 6.24e-3, 0.002);
    near(step.attention_s, 64 * 27.9e6 / 4.3e12, 0.01); /* 584 bytes a row, 68 an indexer key */
    assert_true(step.link_s == 0 && step.over_s == step.serial_s);
    plan_step_of(&pro, &cluster, 1, &step);
    near(step.hit, 5.3, 0.01);
    near(step.experts_s, 2.66e-3, 0.01);
    cluster.flops_s =
        790e12; /* arithmetic now is longer than reading for attention, and with many rows for the rest */
    plan_step_of(&pro, &cluster, 64, &step);
    near(step.attention_s, 64 * 11.6e9 / 790e12, 0.02);
    near(step.dense_s, 6.24e-3, 0.002);
    plan_step_of(&pro, &cluster, 256, &step);
    near(step.dense_s, 256 * 2 * 24.6e9 / 790e12, 0.01);
    near(step.experts_s, 15.7e-3, 0.02);
}

/* A row goes once to each worker that has one of its experts, and comes back once for each expert. */
static void test_links(void **state)
{
    plan_model pro = model_of("pro", 0);
    plan_cluster cluster = {
        .n_worker = 1, .n_router = 1, .context = 128, .read_bytes_s = 1e12, .link_bytes_s = 1e9};
    plan_step step;
    double there = 7168 + 56, back = 6 * 2 * 7168;
    (void)state;
    plan_step_of(&pro, &cluster, 3, &step);
    near(step.link_bytes, 61 * 3 * back, 1e-9);
    near(step.link_s, 61 * 3 * back / 1e9, 1e-9);
    near(step.serial_s - (step.dense_s + step.experts_s + step.attention_s), 61 * 3 * (there + back) / 1e9,
         1e-6);
    cluster.n_worker = 384; /* each of the six to another */
    plan_step_of(&pro, &cluster, 3, &step);
    near(step.serial_s - (step.dense_s + step.experts_s + step.attention_s),
         61 * 3 * (6 * there + back) / 1e9, 1e-6);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bytes), cmocka_unit_test(test_drafter_is_not_held),
        cmocka_unit_test(test_fit),   cmocka_unit_test(test_step),
        cmocka_unit_test(test_links),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
