/* From logits to a token: every filter against a plain one written here, their order, forbidden stop ids,
 * that a draw depends on seed and position only, and log-probabilities. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "common/base/rng.h"
#include "kernels/kn_math.h"
#include "router/engine/sample.h"

enum { VOCAB = 50, DRAWS = 200000, LOG = 12, CASES = 300 };

/* A token at a position, without a log. */
static uint32_t draw(rt_sample_scratch *scratch, const float *logits, const rt_sampler *sampler,
                     bool stop_allowed, uint32_t position)
{
    rt_step_seg seg = {.pos0 = position, .sampler = sampler, .stop_wait = !stop_allowed};
    return rt_sample(scratch, logits, &seg, 0);
}

static void test_greedy(void **state)
{
    float logits[VOCAB] = {0};
    rt_sample_scratch *scratch = rt_sample_scratch_create(VOCAB);
    rt_sampler sampler = {.temperature = 0, .top_p = 1, .n_stop = 1, .stop = {7}};
    logits[7] = logits[9] = logits[11] = 2;
    assert_int_equal(draw(scratch, logits, &sampler, true, 5), 7); /* lower id on ties */
    assert_int_equal(draw(scratch, logits, &sampler, false, 5), 9);
    rt_sample_scratch_destroy(scratch);
    (void)state;
}

static void count_draws(const float *logits, const rt_sampler *base, bool stop_allowed,
                        uint32_t counts[VOCAB])
{
    rt_sample_scratch *scratch = rt_sample_scratch_create(VOCAB);
    for (uint32_t i = 0; i < VOCAB; i++) {
        counts[i] = 0;
    }
    for (uint32_t p = 0; p < DRAWS; p++) {
        counts[draw(scratch, logits, base, stop_allowed, p)]++;
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
    for (uint32_t p = 0; p < 1000; p++) {
        uint32_t first = draw(a, logits, &sampler, true, p);
        draw(b, logits, &sampler, true, 1000 - p); /* another history */
        assert_int_equal(first, draw(b, logits, &sampler, true, p));
        sampler.seed ^= 1;
        n_equal += first == draw(b, logits, &sampler, true, p);
        sampler.seed ^= 1;
    }
    assert_true(n_equal < 500);
    rt_sample_scratch_destroy(a);
    rt_sample_scratch_destroy(b);
    (void)state;
}

/* ---- against plain code ---- */

static const uint32_t g_log[LOG] = {3, 7, 7, 12, 30, 41, /* output: */ 7, 9, 9, 9, 12, 44};
enum { PROMPT = 6 };

static uint32_t count_in(const uint32_t *ids, uint32_t n, uint32_t id)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < n; i++) {
        count += ids[i] == id;
    }
    return count;
}

/* Logits as the header says: forbidden, biased, penalized. */
static void plain_logits(const float *logits, const rt_step_seg *seg, double out[VOCAB])
{
    const rt_sampler *s = seg->sampler;
    for (uint32_t id = 0; id < VOCAB; id++) {
        double x = (double)logits[id];
        x = seg->stop_wait > 0 && count_in(s->stop, s->n_stop, id) > 0 ? -INFINITY : x;
        for (uint32_t i = 0; i < s->n_bias; i++) {
            x += s->bias[i].id == id ? (double)s->bias[i].bias : 0;
        }
        uint32_t n_all = count_in(g_log, LOG, id), n_output = count_in(g_log + PROMPT, LOG - PROMPT, id);
        if (n_all > 0 && s->repetition_penalty > 0) {
            x = x > 0 ? x / (double)s->repetition_penalty : x * (double)s->repetition_penalty;
        }
        x -= (double)s->frequency_penalty * n_output;
        x -= n_output > 0 ? (double)s->presence_penalty : 0;
        out[id] = x;
    }
}

static uint32_t plain_best(const double *x, const bool *taken)
{
    uint32_t best = VOCAB;
    for (uint32_t id = 0; id < VOCAB; id++) {
        if (!taken[id] && (best == VOCAB || x[id] > x[best])) {
            best = id;
        }
    }
    return best;
}

/* Probabilities after all filters; every step over again from a whole softmax of what is left. */
static void plain_probabilities(const double *x, const rt_sampler *s, double p[VOCAB])
{
    bool taken[VOCAB] = {false}, keep[VOCAB] = {false};
    double total = 0, kept = 0, max = -INFINITY;
    uint32_t order[VOCAB], n = 0, n_kept = 0;
    for (uint32_t id = 0; id < VOCAB; id++) {
        max = x[id] > max ? x[id] : max;
    }
    for (uint32_t id = 0; id < VOCAB; id++) {
        order[id] = plain_best(x, taken);
        taken[order[id]] = true;
        p[id] = exp((x[id] - max) / (double)s->temperature);
    }
    for (n = 0; n < VOCAB && p[order[n]] > 0 && p[order[n]] >= (double)s->min_p; n++) {
    }
    n = s->top_k > 0 && s->top_k < n ? s->top_k : n;
    for (uint32_t i = 0; i < n; i++) {
        total += p[order[i]];
    }
    for (n_kept = 0; n_kept < n && (n_kept == 0 || s->top_p >= 1 || kept < (double)s->top_p * total);
         n_kept++) {
        kept += p[order[n_kept]];
        keep[order[n_kept]] = true;
    }
    for (uint32_t id = 0; id < VOCAB; id++) {
        p[id] = keep[id] ? p[id] / kept : 0;
    }
}

static void check_against_plain(const float *logits, const rt_sampler *sampler, bool stop_allowed)
{
    enum { N = 4000 };
    uint32_t counts[VOCAB] = {0};
    double x[VOCAB], p[VOCAB];
    rt_sample_scratch *scratch = rt_sample_scratch_create(VOCAB);
    rt_sampler s = *sampler;
    rt_step_seg seg = {
        .n_row = LOG, .sampler = &s, .stop_wait = !stop_allowed, .log = g_log, .n_prompt = PROMPT};
    plain_logits(logits, &seg, x);
    bool none[VOCAB] = {false};
    s.temperature = 0;
    assert_int_equal(rt_sample(scratch, logits, &seg, 0), plain_best(x, none));
    s.temperature = sampler->temperature;
    plain_probabilities(x, &s, p);
    for (uint32_t i = 0; i < N; i++) {
        s.seed = i; /* the log fixes the position */
        counts[rt_sample(scratch, logits, &seg, 0)]++;
    }
    for (uint32_t id = 0; id < VOCAB; id++) {
        double want = p[id] * N;
        if (p[id] <= 0 ? counts[id] != 0 : fabs(counts[id] - want) > 6 * sqrt(want) + 6) {
            fail_msg("id %u: drawn %u times, expected %g", id, counts[id], want);
        }
    }
    rt_sample_scratch_destroy(scratch);
}

static void make_logits(uint64_t seed, float logits[VOCAB])
{
    for (uint32_t id = 0; id < VOCAB; id++) {
        logits[id] = (float)(cm_rng_at(seed, id, 0).word[0] % 1000) / 125.0f - 4; /* both signs */
    }
}

/* Each alone: a filter that does nothing, or one too much, is seen. */
static void test_each_filter(void **state)
{
    static const rt_bias bias[] = {{5, 4.5f}, {9, -100}, {12, 2}};
    static const rt_sampler samplers[] = {
        {.temperature = 1, .top_p = 1, .top_k = 3},
        {.temperature = 1, .top_p = 1, .top_k = 1},
        {.temperature = 1, .top_p = 1, .top_k = VOCAB + 1},
        {.temperature = 1.5f, .top_p = 1, .min_p = 0.2f},
        {.temperature = 1, .top_p = 1, .min_p = 1},
        {.temperature = 1, .top_p = 0.6f},
        {.temperature = 1, .top_p = 1, .repetition_penalty = 1.8f},
        {.temperature = 1, .top_p = 1, .repetition_penalty = 0.5f},
        {.temperature = 1, .top_p = 1, .frequency_penalty = 1.5f},
        {.temperature = 1, .top_p = 1, .frequency_penalty = -1},
        {.temperature = 1, .top_p = 1, .presence_penalty = 2},
        {.temperature = 1, .top_p = 1, .presence_penalty = -2},
        {.temperature = 1, .top_p = 1, .n_bias = 3, .bias = bias},
        {.temperature = 1, .top_p = 1, .n_stop = 2, .stop = {7, 20}},
    };
    float logits[VOCAB];
    for (size_t i = 0; i < sizeof(samplers) / sizeof(samplers[0]); i++) {
        make_logits(100 + i, logits);
        logits[7] = 3;
        logits[9] = 3.5f;
        logits[44] = -1;
        check_against_plain(logits, &samplers[i], false);
    }
    (void)state;
}

/* All together, drawn at random: also their order. */
static void test_all_filters(void **state)
{
    const uint64_t seed = 20260404;
    float logits[VOCAB];
    print_message("seed %llu\n", (unsigned long long)seed);
    for (uint64_t i = 0; i < CASES; i++) {
        uint32_t r[8];
        for (uint32_t k = 0; k < 8; k++) {
            r[k] = cm_rng_at(seed, i, k).word[0] % 1000;
        }
        rt_bias bias[] = {{r[0] % VOCAB, (float)r[1] / 100 - 5}, {(r[0] + 1) % VOCAB, 3}};
        rt_sampler sampler = {.temperature = 0.5f + (float)r[2] / 1000,
                              .top_p = r[3] % 2 != 0 ? 1 : (float)(1 + r[3]) / 1000,
                              .top_k = r[4] % 3 != 0 ? r[4] % 20 : 0,
                              .min_p = r[5] % 2 != 0 ? 0 : (float)r[5] / 4000,
                              .repetition_penalty = 0.5f + (float)r[6] / 1000,
                              .frequency_penalty = (float)r[7] / 500 - 1,
                              .presence_penalty = (float)r[1] / 500 - 1,
                              .n_bias = 2,
                              .bias = bias,
                              .n_stop = 1,
                              .stop = {r[2] % VOCAB}};
        make_logits(seed + i, logits);
        check_against_plain(logits, &sampler, i % 2 != 0);
    }
    (void)state;
}

/* top_p counts shares of what top_k has left, which is taken after the temperature. */
static void test_order(void **state)
{
    float logits[VOCAB];
    uint32_t counts[VOCAB];
    for (uint32_t id = 0; id < VOCAB; id++) {
        logits[id] = logf(0.4f / 46);
    }
    logits[10] = logf(0.3f);
    logits[20] = logf(0.2f);
    logits[30] = logf(0.1f);
    rt_sampler sampler = {.seed = 3, .temperature = 1, .top_p = 0.55f, .top_k = 2};
    count_draws(logits, &sampler, true, counts);
    assert_int_equal(counts[10], DRAWS); /* 0.3 of 0.5 reaches 0.55; of all it would not */
    sampler = (rt_sampler){.seed = 3, .temperature = 2, .top_p = 1, .min_p = 0.7f};
    count_draws(logits, &sampler, true, counts); /* sqrt(0.2 / 0.3) = 0.82, sqrt(0.1 / 0.3) = 0.58 */
    assert_int_equal(counts[10] + counts[20], DRAWS);
    assert_true(counts[20] > 0);
    (void)state;
}

static void test_bias(void **state)
{
    float logits[VOCAB];
    rt_bias bias[] = {{33, 100}, {7, -100}};
    rt_sampler sampler = {.temperature = 0, .top_p = 1, .n_bias = 2, .bias = bias, .n_stop = 1, .stop = {33}};
    rt_sample_scratch *scratch = rt_sample_scratch_create(VOCAB);
    make_logits(5, logits);
    logits[7] = 20;
    logits[8] = 10;
    assert_int_equal(draw(scratch, logits, &sampler, true, 1), 33);
    assert_int_equal(draw(scratch, logits, &sampler, false, 1), 8); /* no bias brings a forbidden id back */
    sampler.temperature = 2;
    for (uint32_t p = 0; p < 1000; p++) {
        assert_int_equal(draw(scratch, logits, &sampler, true, p), 33);
        assert_int_not_equal(draw(scratch, logits, &sampler, false, p), 7);
    }
    rt_sample_scratch_destroy(scratch);
    (void)state;
}

/* The same scratch for one sequence after another: nothing of the one before is left. */
static void test_scratch_is_clean(void **state)
{
    float logits[VOCAB];
    uint32_t other[] = {8, 9, 10, 11};
    rt_sample_scratch *used = rt_sample_scratch_create(VOCAB), *fresh = rt_sample_scratch_create(VOCAB);
    rt_sampler s = {.seed = 1, .temperature = 1, .top_p = 1, .frequency_penalty = 2, .repetition_penalty = 2};
    rt_step_seg seg = {.n_row = LOG, .sampler = &s, .stop_wait = 0, .log = g_log, .n_prompt = PROMPT};
    rt_step_seg before = {.n_row = 4, .sampler = &s, .stop_wait = 0, .log = other, .n_prompt = 1};
    make_logits(9, logits);
    for (uint32_t i = 0; i < 500; i++) {
        s.seed = i;
        rt_sample(used, logits, &before, 0);
        uint32_t token = rt_sample(used, logits, &seg, 0);
        rt_sample_scratch_destroy(fresh);
        fresh = rt_sample_scratch_create(VOCAB);
        assert_int_equal(token, rt_sample(fresh, logits, &seg, 0));
    }
    rt_sample_scratch_destroy(used);
    rt_sample_scratch_destroy(fresh);
    (void)state;
}

static void test_logprobs(void **state)
{
    float logits[VOCAB];
    double total = 0, sum = 0;
    rt_logprobs told = {0};
    rt_bias bias = {17, 100};
    rt_sampler s = {
        .temperature = 0.5f, .top_p = 0.9f, .n_bias = 1, .bias = &bias, .logprobs = true, .n_top = 20};
    rt_step_seg seg = {.n_row = LOG, .sampler = &s, .stop_wait = 0, .logprobs = &told};
    rt_sample_scratch *scratch = rt_sample_scratch_create(VOCAB);
    make_logits(31, logits);
    logits[3] = logits[4] = logits[40] = 6; /* ties: lower id first */
    logits[0] = -INFINITY;
    for (uint32_t id = 0; id < VOCAB; id++) {
        total += exp((double)logits[id]);
    }
    assert_int_equal(rt_sample(scratch, logits, &seg, 0), 17);
    assert_true(fabs((double)told.token - ((double)logits[17] - log(total))) <
                1e-6); /* no bias, no temperature */
    assert_int_equal(told.n_top, 20);
    assert_true(told.top_id[0] == 3 && told.top_id[1] == 4 && told.top_id[2] == 40);
    for (uint32_t i = 0; i < told.n_top; i++) {
        assert_true(i == 0 || told.top[i] <= told.top[i - 1]);
        assert_true(fabs((double)told.top[i] - ((double)logits[told.top_id[i]] - log(total))) < 1e-6);
        sum += exp((double)told.top[i]);
    }
    assert_true(sum < 1);
    for (uint32_t i = 0; i < VOCAB; i++) {
        sum = i == 0 ? 0 : sum;
        bias.id = i;
        logits[0] = 1;
        assert_int_equal(rt_sample(scratch, logits, &seg, 0), i);
        sum += exp((double)told.token);
    }
    assert_true(fabs(sum - 1) < 1e-5); /* over the whole vocabulary */
    s.n_top = 0;
    rt_sample(scratch, logits, &seg, 0);
    assert_int_equal(told.n_top, 0);
    bias.id = 0;
    logits[0] = -INFINITY;
    s.n_stop = 0;
    seg.stop_wait = 0;
    assert_int_not_equal(rt_sample(scratch, logits, &seg, 0), 0); /* nothing makes it possible */
    rt_sample_scratch_destroy(scratch);
    (void)state;
}

static void mask_of(uint32_t mask[2], const uint32_t *ids, uint32_t n)
{
    mask[0] = mask[1] = 0;
    for (uint32_t i = 0; i < n; i++) {
        mask[ids[i] / 32] |= 1u << ids[i] % 32;
    }
}

/* What a constraint does not allow is not drawn, whatever speaks for it. */
/* ---- vocabularies longer than a vector, nuclei longer than what is sorted first ---- */

enum { WIDE = 1003, WIDE_DRAWS = 200 };

static void wide_draw(uint32_t seed, bool odd, float logits[WIDE])
{
    for (uint32_t i = 0; i < WIDE; i++) {
        uint32_t x = cm_rng_at(seed, i, 0).word[0];
        logits[i] = (float)(x % 200) * 0.01f; /* flat, with ties */
        if (odd && x >> 8 & 1) {
            static const float values[4] = {NAN, INFINITY, -INFINITY, -0.0f};
            logits[i] = values[x >> 9 & 3];
        }
    }
}

static void test_greedy_wide(void **state)
{
    static float logits[WIDE];
    rt_sample_scratch *scratch = rt_sample_scratch_create(WIDE);
    rt_bias none = {.id = 5, .bias = 0};
    rt_sampler plain = {.top_p = 1}, changed = {.top_p = 1, .n_bias = 1, .bias = &none};
    (void)state;
    for (uint32_t seed = 0; seed < WIDE_DRAWS; seed++) {
        uint32_t best = WIDE;
        wide_draw(seed, seed % 2 == 1, logits);
        for (uint32_t i = 0; i < WIDE; i++) {
            best = isfinite(logits[i]) && (best == WIDE || logits[i] > logits[best]) ? i : best;
        }
        assert_int_equal(draw(scratch, logits, &plain, true, 1), best);
        assert_int_equal(draw(scratch, logits, &changed, true, 1), best);
    }
    for (uint32_t i = 0; i < WIDE; i++) {
        logits[i] = i % 2 == 0 ? NAN : INFINITY;
    }
    assert_int_equal(draw(scratch, logits, &plain, true, 1), 0);
    assert_int_equal(draw(scratch, logits, &changed, true, 1), 0);
    rt_sample_scratch_destroy(scratch);
}

static double g_wide_p[WIDE];

static int wide_by_weight(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return g_wide_p[x] < g_wide_p[y] ? 1 : g_wide_p[x] > g_wide_p[y] ? -1 : (x > y) - (x < y);
}

/* All sorted, then as many as top_p takes. */
static uint32_t wide_plain(const float *logits, const rt_sampler *sampler, uint32_t position)
{
    uint32_t order[WIDE], n = 0;
    double max = -INFINITY, total = 0, sum = 0, upto = 0;
    for (uint32_t i = 0; i < WIDE; i++) {
        max = (double)logits[i] > max ? (double)logits[i] : max;
    }
    for (uint32_t i = 0; i < WIDE; i++) {
        g_wide_p[i] = kn_exp(((double)logits[i] - max) / (double)sampler->temperature);
        total += g_wide_p[i];
        order[i] = i;
    }
    qsort(order, WIDE, sizeof(order[0]), wide_by_weight);
    while (n < WIDE && sum < (double)sampler->top_p * total) {
        sum += g_wide_p[order[n++]];
    }
    double at = cm_rng_uniform(sampler->seed, position, 0) * sum;
    uint32_t k = 0;
    while (k + 1 < n && (upto += g_wide_p[order[k]]) <= at) {
        k++;
    }
    return order[k];
}

static void test_nucleus_wide(void **state)
{
    static float logits[WIDE];
    static const float parts[] = {0.01f, 0.08f, 0.3f, 0.62f, 0.95f, 0.999f}; /* of some 8 to 1000 tokens */
    rt_sample_scratch *scratch = rt_sample_scratch_create(WIDE);
    (void)state;
    for (uint32_t seed = 0; seed < WIDE_DRAWS; seed++) {
        rt_sampler sampler = {.temperature = 1.5f, .top_p = parts[seed % 6], .seed = seed};
        wide_draw(seed, false, logits);
        for (uint32_t position = 0; position < 20; position++) {
            assert_int_equal(draw(scratch, logits, &sampler, true, position),
                             wide_plain(logits, &sampler, position));
        }
    }
    rt_sample_scratch_destroy(scratch);
}

static void test_mask(void **state)
{
    float logits[VOCAB];
    uint32_t masks[2][2];
    rt_bias bias = {5, 100};
    rt_logprobs told = {0};
    rt_sampler s = {.seed = 3,
                    .temperature = 1,
                    .top_p = 0.5f,
                    .top_k = 2,
                    .n_bias = 1,
                    .bias = &bias,
                    .n_stop = 2,
                    .stop = {7, 7}};
    rt_step_seg seg = {.pos0 = 0, .n_row = 9, .n_draft = 1, .sampler = &s, .masks = masks[0], .stop_wait = 5};
    rt_sample_scratch *scratch = rt_sample_scratch_create(VOCAB);
    make_logits(77, logits);
    logits[5] = 50;
    mask_of(masks[0], (const uint32_t[]){7, 33, 40}, 3);
    mask_of(masks[1], (const uint32_t[]){7}, 1);
    for (uint32_t position = 0; position < 500; position++) {
        seg.pos0 = position;
        uint32_t token = rt_sample(scratch, logits, &seg, 0);
        assert_true(token == 33 || token == 40);                  /* 7 has to wait */
        assert_int_equal(rt_sample(scratch, logits, &seg, 1), 7); /* but not when nothing else is allowed */
    }
    s.temperature = 0;
    assert_int_equal(rt_sample(scratch, logits, &seg, 0), logits[33] >= logits[40] ? 33 : 40);
    for (uint32_t id = 0; id < VOCAB; id++) {
        logits[id] = id == 5 ? 1 : NAN; /* nothing that is allowed has a number */
    }
    seg.stop_wait = 0;
    assert_int_equal(rt_sample(scratch, logits, &seg, 0), 7);
    /* log-probabilities: of what is allowed */
    make_logits(78, logits);
    seg.logprobs = &told;
    s = (rt_sampler){.logprobs = true, .n_top = 3};
    mask_of(masks[0], (const uint32_t[]){20, 30}, 2);
    uint32_t best = rt_sample(scratch, logits, &seg, 0);
    double p = exp((double)told.top[0]) + exp((double)told.top[1]);
    assert_true(told.top_id[0] == best && told.top_id[1] == 50 - best && fabs(p - 1) < 1e-6);
    assert_true(isinf(told.top[2]));
    rt_sample_scratch_destroy(scratch);
    (void)state;
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_greedy),
                                       cmocka_unit_test(test_distribution),
                                       cmocka_unit_test(test_nucleus),
                                       cmocka_unit_test(test_pure_function),
                                       cmocka_unit_test(test_each_filter),
                                       cmocka_unit_test(test_all_filters),
                                       cmocka_unit_test(test_order),
                                       cmocka_unit_test(test_bias),
                                       cmocka_unit_test(test_scratch_is_clean),
                                       cmocka_unit_test(test_logprobs),
                                       cmocka_unit_test(test_mask),
                                       cmocka_unit_test(test_greedy_wide),
                                       cmocka_unit_test(test_nucleus_wide)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
