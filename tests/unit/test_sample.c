/* From logits to a token: greedy ties, distribution, nucleus, forbidden stop ids, and that a draw depends on seed and position
 * only. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "common/base/rng.h"
#include "router/engine/sample.h"

enum { VOCAB = 50, DRAWS = 200000 };

static void test_greedy(void **state)
{
    float logits[VOCAB] = {0};
    rt_sample_scratch *scratch = rt_sample_scratch_create(VOCAB);
    rt_sampler sampler = {.temperature = 0, .top_p = 1, .n_stop = 1, .stop = {7}};
    logits[7] = logits[9] = logits[11] = 2;
    assert_int_equal(rt_sample(scratch, logits, &sampler, true, 5), 7); /* lower id on ties */
    assert_int_equal(rt_sample(scratch, logits, &sampler, false, 5), 9);
    rt_sample_scratch_destroy(scratch);
    (void)state;
}

static void count_draws(const float *logits, const rt_sampler *base, bool stop_allowed, uint32_t counts[VOCAB])
{
    rt_sample_scratch *scratch = rt_sample_scratch_create(VOCAB);
    for (uint32_t i = 0; i < VOCAB; i++) {
        counts[i] = 0;
    }
    for (uint64_t p = 0; p < DRAWS; p++) {
        counts[rt_sample(scratch, logits, base, stop_allowed, p)]++;
    }
    rt_sample_scratch_destroy(scratch);
}

static void test_distribution(void **state)
{
    float logits[VOCAB];
    double p[VOCAB], total = 0;
    uint32_t counts[VOCAB];
    rt_sampler sampler = {.seed = 20260101, .temperature = 0.7f, .top_p = 1, .n_stop = 1, .stop = {3}};
    for (uint32_t i = 0; i < VOCAB; i++) {
        logits[i] = (float)(cm_rng_at(1, i, 0).word[0] % 1000) / 250.0f;
        p[i] = i == 3 ? 0 : exp((double)logits[i] / 0.7);
        total += p[i];
    }
    count_draws(logits, &sampler, false, counts);
    assert_int_equal(counts[3], 0);
    for (uint32_t i = 0; i < VOCAB; i++) {
        double want = p[i] / total * DRAWS, sigma = sqrt(want) + 1;
        assert_true(fabs(counts[i] - want) < 6 * sigma);
    }
    (void)state;
}

static void test_nucleus(void **state)
{
    float logits[VOCAB];
    uint32_t counts[VOCAB];
    rt_sampler sampler = {.seed = 7, .temperature = 1, .top_p = 0.75f};
    for (uint32_t i = 0; i < VOCAB; i++) {
        logits[i] = -30;
    }
    logits[10] = logf(0.4f); /* 0.4 + 0.3 < 0.75 <= 0.4 + 0.3 + 0.1 */
    logits[20] = logf(0.3f);
    logits[30] = logits[31] = logits[32] = logf(0.1f);
    count_draws(logits, &sampler, true, counts);
    assert_int_equal(counts[10] + counts[20] + counts[30], DRAWS); /* the tie went to the lower id */
    assert_true(fabs(counts[10] - DRAWS * 0.5) < 2000 && fabs(counts[20] - DRAWS * 0.375) < 2000);
    sampler.top_p = 0.0001f;
    count_draws(logits, &sampler, true, counts);
    assert_int_equal(counts[10], DRAWS);
    (void)state;
}

static void test_pure_function(void **state)
{
    float logits[VOCAB];
    rt_sampler sampler = {.seed = 99, .temperature = 1.3f, .top_p = 0.9f};
    rt_sample_scratch *a = rt_sample_scratch_create(VOCAB), *b = rt_sample_scratch_create(VOCAB);
    uint32_t n_equal = 0;
    for (uint32_t i = 0; i < VOCAB; i++) {
        logits[i] = (float)(i % 7);
    }
    for (uint64_t p = 0; p < 1000; p++) {
        uint32_t first = rt_sample(a, logits, &sampler, true, p);
        rt_sample(b, logits, &sampler, true, 1000 - p); /* another history */
        assert_int_equal(first, rt_sample(b, logits, &sampler, true, p));
        sampler.seed ^= 1;
        n_equal += first == rt_sample(b, logits, &sampler, true, p);
        sampler.seed ^= 1;
    }
    assert_true(n_equal < 500);
    rt_sample_scratch_destroy(a);
    rt_sample_scratch_destroy(b);
    (void)state;
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_greedy), cmocka_unit_test(test_distribution),
                                       cmocka_unit_test(test_nucleus), cmocka_unit_test(test_pure_function)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
