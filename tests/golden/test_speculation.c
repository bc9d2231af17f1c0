/* Speculation: the MTP block's logits and chained guesses against the golden ones, and then what it is for:
 * more than one token a step, and not one token different. `--prompts N` for more of them. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/rng.h"
#include "router/engine/engine.h"
#include "tests/golden/fixture.h"
#include "tools/baleen/solo.h"

enum { IDS_MAX = 4096, DRAFTS = 3, SLOTS = 8, TOKENS = 24, CHUNK = 28, PROMPT_MAX = 400 };

static uint32_t g_n_prompt = 24;

static solo *open_model(const char *path, uint32_t draft_max)
{
    solo *s = NULL;
    cm_error err = {0};
    solo_options options;
    solo_options_defaults(&options);
    options.model = path;
    options.n_worker = 2;
    options.slot_max = SLOTS;
    options.draft_max = draft_max;
    if (solo_create(&options, &s, &err) != CM_OK) {
        fail_msg("%s: %s", path, err.text);
    }
    return s;
}

static uint32_t read_ids(const json_t *list, uint32_t *ids, uint32_t max)
{
    size_t i;
    json_t *id;
    json_array_foreach(list, i, id)
    {
        if (i < max) {
            ids[i] = (uint32_t)json_integer_value(id);
        }
    }
    return (uint32_t)(i < max ? i : max);
}

/* ---- golden logits ---- */

typedef struct golden {
    float logits[DRAFTS][1024]; /* of the last step's guesses */
} golden;

static void golden_tap(void *ctx, uint32_t layer, rt_tap_point point, const rt_step *step, uint32_t row0,
                       const void *data, uint64_t row_bytes, uint32_t n_row)
{
    golden *g = ctx;
    (void)step;
    (void)row0;
    if (point == RT_TAP_DRAFT_LOGITS) {
        assert_int_equal(n_row, 1);
        assert_in_range(layer, 0, DRAFTS - 1);
        memcpy(g->logits[layer], data, row_bytes);
    }
}

static void golden_compare(const float *got, const fx_tensor *want, uint32_t row, double max_abs,
                           const char *what, double *worst)
{
    for (uint64_t v = 0; v < want->dim[1]; v++) {
        double d = fabs((double)got[v] - (double)((const float *)want->data)[row * want->dim[1] + v]);
        *worst = d > *worst ? d : *worst;
        if (!(d <= max_abs)) {
            fail_msg("%s row %u token %llu: off by %g", what, row, (unsigned long long)v, d);
        }
    }
}

/* One row of slot 0; with next >= 0 the token after it is made to be that one. */
static void golden_step(solo *s, const uint32_t *ids, uint32_t pos, int64_t next, uint32_t want,
                        rt_step_result *result)
{
    static uint64_t number;
    rt_bias bias = {.id = next >= 0 ? (uint32_t)next : 0, .bias = 1e6f};
    rt_sampler sampler = {.top_p = 1, .n_bias = next >= 0, .bias = &bias};
    uint32_t n_page;
    rt_step_seg seg = {.pos0 = pos,
                       .n_row = 1,
                       .tokens = ids + pos,
                       .pages = solo_pages(s, 0, &n_page),
                       .n_page = kn_blocks(pos + 1, KN_PAGE_TOKENS),
                       .sample = true,
                       .draft_want = want,
                       .sampler = &sampler,
                       .log = ids};
    rt_step step = {.number = 1u << 20 | ++number, .n_seg = 1, .n_row = 1, .n_sample = 1, .segs = &seg};
    assert_int_equal(rt_engine_step(solo_engine(s), &step, result), CM_OK);
    assert_int_equal(result->n_draft, want);
}

static void golden_prompt(solo *s, const json_t *prompt, const fx_file *file, uint32_t index, double max_abs,
                          double *worst)
{
    static uint32_t ids[IDS_MAX];
    static golden got;
    rt_step_result result;
    uint32_t token, n = read_ids(json_object_get(prompt, "prompt_ids"), ids, IDS_MAX);
    uint32_t first = (uint32_t)json_integer_value(json_object_get(prompt, "mtp_first_position"));
    const fx_tensor *logits = fx_get(file, "p%u.mtp_logits", index),
                    *chain = fx_get(file, "p%u.mtp_chain_logits", index);
    rt_engine_set_tap(solo_engine(s), golden_tap, &got);
    for (uint32_t at = 0; at < first; at += CHUNK) {
        uint32_t rows = first - at < CHUNK ? first - at : CHUNK;
        assert_int_equal(solo_step(s, 0, at, ids + at, rows, false, &token), CM_OK);
    }
    for (uint32_t p = first; p + 1 < n; p++) {
        golden_step(s, ids, p, ids[p + 1], 1, &result);
        assert_int_equal(result.tokens[0], ids[p + 1]);
        golden_compare(got.logits[0], logits, p - first, max_abs, "mtp_logits", worst);
    }
    golden_step(s, ids, n - 1, -1, DRAFTS, &result);
    assert_int_equal(result.tokens[0],
                     json_integer_value(json_array_get(json_object_get(prompt, "greedy"), 0)));
    golden_compare(got.logits[0], logits, n - 1 - first, max_abs, "mtp_logits", worst);
    for (uint32_t k = 0; k < DRAFTS; k++) {
        golden_compare(got.logits[k], chain, k, max_abs, "mtp_chain_logits", worst);
        assert_int_equal(result.drafts[k],
                         json_integer_value(json_array_get(json_object_get(prompt, "mtp_draft"), k)));
    }
    rt_engine_set_tap(solo_engine(s), NULL, NULL);
}

static void test_golden(void **state)
{
    static const char *const models[] = {"tiny-pro", "tiny-flash"};
    (void)state;
    for (uint32_t m = 0; m < 2; m++) {
        char path[512];
        double worst = 0;
        uint32_t n = 0;
        size_t i;
        snprintf(path, sizeof(path), "%s/model/%s/ckpt", BALEEN_TEST_DATA, models[m]);
        solo *s = open_model(path, DRAFTS);
        snprintf(path, sizeof(path), "%s/model/%s/logits.safetensors", BALEEN_TEST_DATA, models[m]);
        fx_file *file = fx_open(path);
        snprintf(path, sizeof(path), "%s/model/%s/prompts.json", BALEEN_TEST_DATA, models[m]);
        json_t *json = fx_json(path), *prompt;
        double max_abs =
            json_number_value(json_object_get(json_object_get(json_object_get(json, "tol"), "D"), "max_abs"));
        json_array_foreach(json_object_get(json, "prompts"), i, prompt)
        {
            if (json_object_get(prompt, "mtp_draft") != NULL) {
                golden_prompt(s, prompt, file, (uint32_t)i, max_abs, &worst);
                n++;
            }
        }
        print_message("%-10s %u prompts: worst MTP logit error %g of %g, guesses equal\n", models[m], n,
                      worst, max_abs);
        assert_true(n > 0);
        json_decref(json);
        fx_close(file);
        solo_destroy(s);
    }
}

/* ---- the same tokens, in fewer steps ---- */

typedef struct run_counts {
    uint64_t n_token, n_decode, n_decode_token; /* all; segments that decode; their tokens */
    uint64_t n_guess, n_right;
} run_counts;

typedef struct run_seq {
    uint32_t log[PROMPT_MAX + TOKENS + RT_DRAFT_MAX + 1], n_prompt, n_log, n_done, n_draft;
    uint32_t n_read; /* ids of the log given to the engine as prompt so far */
    rt_sampler sampler;
} run_seq;

/* A slice of real text, or one of the evaluated prompts. */
static void run_draw_prompt(const json_t *greedy, const json_t *text, uint32_t i, run_seq *seq)
{
    cm_rng_block draw = cm_rng_at(20261122, i, 0);
    if (i < json_array_size(greedy)) {
        seq->n_prompt =
            read_ids(json_object_get(json_array_get(greedy, i), "prompt_ids"), seq->log, PROMPT_MAX);
    } else {
        uint32_t n_text = (uint32_t)json_array_size(text), n = 2 + draw.word[0] % 200,
                 from = draw.word[1] % (n_text - n);
        seq->log[0] = 0;
        for (uint32_t k = 0; k < n; k++) {
            seq->log[k + 1] = (uint32_t)json_integer_value(json_array_get(text, from + k));
        }
        seq->n_prompt = n + 1;
    }
    seq->n_log = seq->n_prompt;
}

static rt_step_seg run_seg(solo *s, const run_seq *seq, uint32_t slot, uint32_t drafts)
{
    uint32_t n = seq->n_log - seq->n_done, n_page, left = seq->n_prompt + TOKENS - seq->n_log;
    rt_step_seg seg = {.slot = slot,
                       .pos0 = seq->n_done,
                       .n_row = n <= CHUNK ? n + seq->n_draft : CHUNK,
                       .tokens = seq->log + seq->n_done,
                       .pages = solo_pages(s, slot, &n_page),
                       .sample = n <= CHUNK};
    seg.n_page = kn_blocks(seg.pos0 + seg.n_row, KN_PAGE_TOKENS);
    if (seg.sample) {
        seg.n_draft = seq->n_draft;
        seg.draft_want = left - 1 < drafts ? left - 1 : drafts;
        seg.sampler = &seq->sampler;
        seg.log = seq->log;
        seg.n_prompt = seq->n_prompt;
    }
    return seg;
}

static void run_take(run_seq *seq, const rt_step_seg *seg, const rt_step_result *result, run_counts *counts)
{
    if (seg->pos0 >= seq->n_prompt) {
        counts->n_decode++;
        counts->n_decode_token += result->n_token;
    }
    counts->n_guess += seg->n_draft;
    counts->n_right += result->n_token - 1;
    seq->n_done = seg->pos0 + seg->n_row - seg->n_draft + result->n_token - 1;
    for (uint32_t k = 0; k < result->n_token && seq->n_log < seq->n_prompt + TOKENS; k++) {
        seq->log[seq->n_log++] = result->tokens[k];
        counts->n_token++;
    }
    seq->n_draft = result->n_draft;
    memcpy(seq->log + seq->n_log, result->drafts, sizeof(uint32_t) * result->n_draft);
}

/* All sequences, SLOTS at a time. */
static void run_all(solo *s, run_seq *seqs, uint32_t n, uint32_t drafts, run_counts *counts)
{
    static uint64_t number;
    for (uint32_t first = 0; first < n; first += SLOTS) {
        uint32_t group = n - first < SLOTS ? n - first : SLOTS;
        for (;;) {
            rt_step_seg segs[SLOTS];
            rt_step_result results[SLOTS];
            uint32_t who[SLOTS], n_sample = 0;
            rt_step step = {.number = ++number, .segs = segs};
            for (uint32_t i = 0; i < group; i++) {
                if (seqs[first + i].n_log < seqs[first + i].n_prompt + TOKENS) {
                    segs[step.n_seg] = run_seg(s, &seqs[first + i], i, drafts);
                    step.n_row += segs[step.n_seg].n_row;
                    step.n_sample += segs[step.n_seg].sample;
                    who[step.n_seg++] = first + i;
                }
            }
            if (step.n_seg == 0) {
                break;
            }
            assert_int_equal(rt_engine_step(solo_engine(s), &step, results), CM_OK);
            for (uint32_t i = 0; i < step.n_seg; i++) {
                if (segs[i].sample) {
                    run_take(&seqs[who[i]], &segs[i], &results[n_sample++], counts);
                } else {
                    seqs[who[i]].n_done += segs[i].n_row;
                }
            }
        }
    }
}

static void run_prepare(run_seq *seqs, uint32_t n, float temperature)
{
    json_t *greedy = fx_json(BALEEN_NANO "/eval/greedy.json"),
           *text = fx_json(BALEEN_NANO "/eval/text_loss.json");
    memset(seqs, 0, sizeof(*seqs) * n);
    for (uint32_t i = 0; i < n; i++) {
        run_draw_prompt(greedy, json_object_get(text, "ids"), i, &seqs[i]);
        seqs[i].sampler =
            (rt_sampler){.seed = i, .temperature = temperature, .top_p = 1, .tokens_max = TOKENS};
    }
    json_decref(greedy);
    json_decref(text);
}

static void check_equal(float temperature, uint32_t drafts)
{
    run_seq *plain = calloc(g_n_prompt, sizeof(run_seq)), *guessed = calloc(g_n_prompt, sizeof(run_seq));
    run_counts before = {0}, after = {0};
    solo *s = open_model(BALEEN_NANO, 0);
    run_prepare(plain, g_n_prompt, temperature);
    run_all(s, plain, g_n_prompt, 0, &before);
    solo_destroy(s);
    s = open_model(BALEEN_NANO, drafts);
    run_prepare(guessed, g_n_prompt, temperature);
    run_all(s, guessed, g_n_prompt, drafts, &after);
    solo_destroy(s);
    for (uint32_t i = 0; i < g_n_prompt; i++) {
        for (uint32_t k = 0; k < TOKENS; k++) {
            uint32_t at = plain[i].n_prompt + k;
            if (plain[i].log[at] != guessed[i].log[at]) {
                fail_msg("temperature %g prompt %u token %u: %u with speculation, %u without",
                         (double)temperature, i, k, guessed[i].log[at], plain[i].log[at]);
            }
        }
    }
    print_message(
        "temperature %g, up to %u guesses: %u prompts, %llu tokens equal; %.3f of %llu guesses right, "
        "%.2f tokens a decode step (1 without)\n",
        (double)temperature, drafts, g_n_prompt, (unsigned long long)after.n_token,
        (double)after.n_right / (double)after.n_guess, (unsigned long long)after.n_guess,
        (double)after.n_decode_token / (double)after.n_decode);
    assert_int_equal(before.n_token, after.n_token);
    assert_true(after.n_right > 0 && after.n_right < after.n_guess); /* both kinds were there */
    free(plain);
    free(guessed);
}

static void test_equal(void **state)
{
    (void)state;
    check_equal(0, DRAFTS);
    check_equal(1, DRAFTS);
    check_equal(1, 1);
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "--prompts") == 0) {
        g_n_prompt = (uint32_t)strtoul(argv[2], NULL, 10);
    } else if (argc != 1) {
        fprintf(stderr, "usage: %s [--prompts N]\n", argv[0]);
        return 2;
    }
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_golden), cmocka_unit_test(test_equal)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
