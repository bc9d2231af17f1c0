/* V4-Nano: the 30 greedy continuations that a class D implementation must give exactly, and the same bits
 * whatever the number of workers, the transport, the chunk size and the company in the batch. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/rng.h"
#include "router/engine/engine.h"
#include "tests/golden/fixture.h"
#include "tools/baleen/solo.h"

enum { IDS_MAX = 4096, GREEDY = 8, SLOTS = 4 };

static solo *open_nano(uint32_t n_worker, const char *transport, const char *isa)
{
    solo *s = NULL;
    cm_error err = {0};
    solo_options options;
    solo_options_defaults(&options);
    options.model = BALEEN_NANO;
    options.n_worker = n_worker;
    options.transport = transport;
    options.isa = isa;
    options.slot_max = SLOTS;
    if (solo_create(&options, &s, &err) != CM_OK) {
        fail_msg("%u workers over %s: %s", n_worker, transport, err.text);
    }
    return s;
}

static uint32_t read_ids(const json_t *list, uint32_t *ids)
{
    size_t i;
    json_t *id;
    json_array_foreach(list, i, id)
    {
        assert_true(i < IDS_MAX);
        ids[i] = (uint32_t)json_integer_value(id);
    }
    return (uint32_t)json_array_size(list);
}

static void test_greedy(void **state)
{
    static uint32_t prompt[IDS_MAX], want[IDS_MAX], got[IDS_MAX];
    json_t *list = fx_json(BALEEN_NANO "/eval/greedy.json"), *entry;
    solo *s = open_nano(3, "local", "auto");
    size_t i, n_tokens = 0;
    json_array_foreach(list, i, entry)
    {
        uint32_t n_prompt = read_ids(json_object_get(entry, "prompt_ids"), prompt);
        uint32_t n = read_ids(json_object_get(entry, "class_d_ids"), want);
        assert_int_equal(solo_greedy(s, 0, prompt, n_prompt, 256, n, got, NULL), CM_OK);
        for (uint32_t k = 0; k < n; k++) {
            if (got[k] != want[k]) {
                fail_msg("prompt %zu token %u: %u, class D says %u", i, k, got[k], want[k]);
            }
        }
        n_tokens += n;
    }
    assert_int_equal(i, 30);
    print_message("30 continuations, %zu tokens, all equal\n", n_tokens);
    json_decref(list);
    solo_destroy(s);
    (void)state;
}

/* ---- schedules ---- */

typedef struct outcome {
    uint32_t greedy[GREEDY];
    float logits[4096];
} outcome;

static uint32_t g_prompts[3][700], g_lengths[3];

static void make_prompts(uint64_t seed)
{
    for (uint32_t p = 0; p < 3; p++) {
        g_lengths[p] = 5 + cm_rng_at(seed, p, 1).word[0] % 600;
        for (uint32_t i = 0; i < g_lengths[p]; i++) {
            g_prompts[p][i] = cm_rng_at(seed, i, 2 + p).word[0] % 4000;
        }
    }
}

static void assert_same(const outcome *a, const outcome *b, const char *what)
{
    if (memcmp(a->greedy, b->greedy, sizeof(a->greedy)) != 0 ||
        memcmp(a->logits, b->logits, sizeof(a->logits)) != 0) {
        fail_msg("%s: other bits than the undisturbed run", what);
    }
}

static void run_alone(solo *s, uint32_t p, uint32_t chunk, outcome *out)
{
    assert_int_equal(
        solo_greedy(s, p % SLOTS, g_prompts[p], g_lengths[p], chunk, GREEDY, out->greedy, out->logits),
        CM_OK);
}

/* All three prompts at once, rows of different sequences in one step, chunk sizes drawn by the seed. */
static void run_together(solo *s, uint64_t seed, outcome *out)
{
    static const rt_sampler greedy = {.temperature = 0, .top_p = 1};
    static uint32_t log[3][700 + GREEDY], pages[3][16];
    uint32_t done[3] = {0}, made[3] = {0};
    rt_step_result results[3];
    for (uint32_t p = 0; p < 3; p++) {
        memcpy(log[p], g_prompts[p], sizeof(uint32_t) * g_lengths[p]);
        for (uint32_t i = 0; i < 16; i++) {
            pages[p][i] = 47 - (p * 16 + i); /* scattered, and not where solo_greedy would put them */
        }
    }
    for (uint64_t number = 1; made[0] + made[1] + made[2] < 3 * GREEDY; number++) {
        rt_step_seg segs[3];
        uint32_t who[3], vocab = solo_geometry(s)->vocab;
        rt_step step = {.number = 1000000 + number, .segs = segs};
        for (uint32_t p = 0; p < 3; p++) {
            uint32_t total = g_lengths[p] + made[p], left = total - done[p];
            uint32_t n =
                left > 1 ? 1 + cm_rng_at(seed, number, 100 + p).word[0] % (left < 80 ? left : 80) : left;
            if (made[p] == GREEDY || n == 0) {
                continue;
            }
            segs[step.n_seg] = (rt_step_seg){.slot = (p + 1) % SLOTS,
                                             .pos0 = done[p],
                                             .n_row = n,
                                             .tokens = log[p] + done[p],
                                             .pages = pages[p],
                                             .n_page = kn_blocks(done[p] + n, KN_PAGE_TOKENS),
                                             .sample = done[p] + n == total,
                                             .sampler = &greedy};
            who[step.n_seg] = p;
            step.n_sample += segs[step.n_seg].sample;
            step.n_row += n;
            step.n_seg++;
        }
        assert_int_equal(rt_engine_step(solo_engine(s), &step, results), CM_OK);
        for (uint32_t i = 0, k = 0; i < step.n_seg; i++) {
            uint32_t p = who[i];
            done[p] += segs[i].n_row;
            if (segs[i].sample) {
                if (made[p] == 0) {
                    memcpy(out[p].logits, rt_engine_logits(solo_engine(s)) + (size_t)k * vocab,
                           sizeof(float) * vocab);
                }
                out[p].greedy[made[p]] = results[k].tokens[0];
                log[p][g_lengths[p] + made[p]++] = results[k++].tokens[0];
            }
        }
    }
}

static void test_schedules(void **state)
{
    static outcome alone[3], other;
    static outcome together[3];
    uint64_t seed = cm_random_u64();
    print_message("seed %llu\n", (unsigned long long)seed);
    make_prompts(seed);
    solo *s = open_nano(1, "local", "portable");
    for (uint32_t p = 0; p < 3; p++) {
        run_alone(s, p, 256, &alone[p]);
    }
    solo_destroy(s);
    static const uint32_t workers[] = {1, 2, 3, 5};
    static const char *const transports[] = {"local", "ucx"};
    for (uint32_t w = 0; w < 4; w++) {
        for (uint32_t t = 0; t < 2; t++) {
            char what[96];
            s = open_nano(workers[w], transports[t], "auto");
            for (uint32_t p = 0; p < 3; p++) {
                uint32_t chunk = 1 + cm_rng_at(seed, p, 1000 + w * 2 + t).word[0] % 200;
                snprintf(what, sizeof(what), "%u workers over %s, prompt %u in chunks of %u", workers[w],
                         transports[t], p, chunk);
                run_alone(s, p, chunk, &other);
                assert_same(&alone[p], &other, what);
            }
            run_together(s, seed + w * 2 + t, together);
            for (uint32_t p = 0; p < 3; p++) {
                snprintf(what, sizeof(what), "%u workers over %s, prompt %u among others", workers[w],
                         transports[t], p);
                assert_same(&alone[p], &together[p], what);
            }
            solo_destroy(s);
        }
    }
    (void)state;
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_greedy), cmocka_unit_test(test_schedules)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
