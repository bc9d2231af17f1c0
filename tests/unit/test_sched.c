/* The scheduler case by case, on the fake engine; its pages alone are t_pages'. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "router/sched/sched_core.h"
#include "tests/unit/sched_engine.h"

/* ---- helpers ---- */

typedef struct t_words {
    uint32_t n;
    rt_word words[64];
} t_words;

static void t_keep(void *ctx, const rt_word *word)
{
    t_words *words = ctx;
    assert_in_range(words->n, 0, 63);
    words->words[words->n++] = *word;
}

static void t_open(t_engine *engine, uint64_t owner, uint64_t stream, uint32_t n_prompt, uint32_t tokens_max)
{
    rt_seq_request request = t_request(owner, stream, n_prompt, tokens_max);
    cm_error err;
    cm_status status = rt_sched_open(engine->sched, 0, &request, &err);
    if (status != CM_OK) {
        fail_msg("open: %s", err.text);
    }
}

static void t_run_out(t_engine *engine, t_words *words)
{
    for (int i = 0; t_begin(engine, 0); i++) {
        assert_in_range(i, 0, 1000);
        t_complete(engine, 0, t_keep, words);
    }
}

/* ---- table cases ---- */

typedef struct t_refusal {
    const char *what, *field;
    cm_status status;
    uint64_t owner, deadline_ms;
    uint32_t n_prompt, bad_prompt, n_emitted, bad_emitted, tokens_max, tokens_min, n_stop, bad_stop;
    float temperature, top_p, min_p, repetition, frequency, presence;
    uint32_t n_top, n_bias, bad_bias;
    float bias;
} t_refusal;

#define T_GOOD                                                                                               \
    .owner = 1, .deadline_ms = UINT64_MAX, .n_prompt = 4, .tokens_max = 8, .temperature = 1, .top_p = 1

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Woverride-init"
static const t_refusal t_refusals[] = {
    {"nothing wrong", "", CM_OK, T_GOOD},
    {"all of the context", "", CM_OK, T_GOOD, .n_prompt = 24, .tokens_max = 16},
    {"owner", "owner", CM_E_INVALID, T_GOOD, .owner = 0},
    {"no prompt", "prompt", CM_E_INVALID, T_GOOD, .n_prompt = 0},
    {"prompt id", "prompt", CM_E_INVALID, T_GOOD, .bad_prompt = 1},
    {"emitted id", "emitted", CM_E_INVALID, T_GOOD, .n_emitted = 2, .bad_emitted = 1},
    {"all emitted", "emitted", CM_E_INVALID, T_GOOD, .n_emitted = 8},
    {"cold", "temperature", CM_E_INVALID, T_GOOD, .temperature = -0.5f},
    {"no temperature", "temperature", CM_E_INVALID, T_GOOD, .temperature = __builtin_nanf("")},
    {"hot", "temperature", CM_E_INVALID, T_GOOD, .temperature = __builtin_inff()},
    {"top_p 0", "top_p", CM_E_INVALID, T_GOOD, .top_p = 0},
    {"top_p over 1", "top_p", CM_E_INVALID, T_GOOD, .top_p = 1.5f},
    {"top_p no number", "top_p", CM_E_INVALID, T_GOOD, .top_p = __builtin_nanf("")},
    {"all filters", "", CM_OK, T_GOOD, .min_p = 1, .repetition = 2, .frequency = -2, .presence = 2,
     .n_top = 20, .n_bias = 2},
    {"min_p under 0", "min_p", CM_E_INVALID, T_GOOD, .min_p = -0.1f},
    {"min_p no number", "min_p", CM_E_INVALID, T_GOOD, .min_p = __builtin_nanf("")},
    {"repetition", "repetition_penalty", CM_E_INVALID, T_GOOD, .repetition = -1},
    {"frequency", "frequency_penalty", CM_E_INVALID, T_GOOD, .frequency = __builtin_nanf("")},
    {"presence", "presence_penalty", CM_E_INVALID, T_GOOD, .presence = __builtin_inff()},
    {"21 logprobs", "top_logprobs", CM_E_INVALID, T_GOOD, .n_top = 21},
    {"too many biases", "bias", CM_E_INVALID, T_GOOD, .n_bias = RT_BIAS_MAX + 1},
    {"bias id", "bias", CM_E_INVALID, T_GOOD, .n_bias = 2, .bad_bias = 1},
    {"bias", "bias", CM_E_INVALID, T_GOOD, .n_bias = 2, .bias = __builtin_nanf("")},
    {"nothing to do", "tokens_max", CM_E_INVALID, T_GOOD, .tokens_max = 0},
    {"min over max", "tokens_min", CM_E_INVALID, T_GOOD, .tokens_min = 9},
    {"too many stops", "stop", CM_E_INVALID, T_GOOD, .n_stop = RT_STOP_MAX + 1},
    {"stop id", "stop", CM_E_INVALID, T_GOOD, .n_stop = 2, .bad_stop = 1},
    {"context", "tokens_max", CM_E_TOO_LONG, T_GOOD, .n_prompt = 40, .tokens_max = 25},
    {"context, wrapping", "tokens_max", CM_E_TOO_LONG, T_GOOD, .tokens_max = UINT32_MAX},
    {"pages", "tokens_max", CM_E_TOO_LONG, T_GOOD, .n_prompt = 24, .tokens_max = 17},
    {"late", "deadline_ms", CM_E_DEADLINE, T_GOOD, .deadline_ms = 5},
};
#pragma GCC diagnostic pop

static void test_open_refuses(void **state)
{
    (void)state;
    rt_sched_limits limits = t_limits();
    limits.page_max = 10; /* 40 tokens */
    for (size_t i = 0; i < sizeof(t_refusals) / sizeof(t_refusals[0]); i++) {
        const t_refusal *row = &t_refusals[i];
        uint32_t prompt[T_CONTEXT_MAX] = {0}, emitted[T_CONTEXT_MAX] = {0};
        rt_bias bias[RT_BIAS_MAX + 1] = {{.id = 1}, {.id = row->bad_bias ? T_VOCAB : 0, .bias = row->bias}};
        rt_sched *sched = rt_sched_create(&limits);
        cm_error err = {.field = ""};
        rt_seq_request request = {
            .key = {row->owner, 1},
            .prompt = prompt,
            .n_prompt = row->n_prompt,
            .emitted = emitted,
            .n_emitted = row->n_emitted,
            .sampler = {.temperature = row->temperature,
                        .top_p = row->top_p,
                        .min_p = row->min_p,
                        .repetition_penalty = row->repetition,
                        .frequency_penalty = row->frequency,
                        .presence_penalty = row->presence,
                        .n_top = row->n_top,
                        .n_bias = row->n_bias,
                        .bias = bias,
                        .tokens_max = row->tokens_max,
                        .tokens_min = row->tokens_min,
                        .n_stop = row->n_stop},
            .deadline_ms = row->deadline_ms,
        };
        prompt[3] = row->bad_prompt ? T_VOCAB : T_VOCAB - 1;
        emitted[1] = row->bad_emitted ? T_VOCAB : T_VOCAB - 1;
        request.sampler.stop[1] = row->bad_stop ? T_VOCAB : T_VOCAB - 1;
        cm_status status = rt_sched_open(sched, 5, &request, &err);
        if (status != row->status || strcmp(err.field, row->field) != 0) {
            fail_msg("%s: %s about '%s': %s", row->what, cm_status_name(status), err.field, err.text);
        }
        rt_sched_cancel(sched, request.key);
        t_ledger_is_zero(sched);
        rt_sched_destroy(sched);
    }
}

static void test_texts_have_numbers(void **state)
{
    (void)state;
    rt_sched_limits limits = t_limits();
    limits.page_max = 10;
    rt_sched *sched = rt_sched_create(&limits);
    cm_error err;
    rt_seq_request request = t_request(1, 1, 40, 25);
    assert_int_equal(rt_sched_open(sched, 0, &request, &err), CM_E_TOO_LONG);
    assert_non_null(strstr(err.text, "40"));
    assert_non_null(strstr(err.text, "25"));
    assert_non_null(strstr(err.text, "context of 64"));
    request = t_request(1, 1, 24, 17);
    assert_int_equal(rt_sched_open(sched, 0, &request, &err), CM_E_TOO_LONG);
    assert_non_null(strstr(err.text, "11 KV pages"));
    assert_non_null(strstr(err.text, "10"));
    rt_sched_destroy(sched);
}

static void test_queue_and_names(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    t_engine_init(&engine, &limits);
    for (uint64_t i = 0; i < limits.queue_max; i++) {
        t_open(&engine, 1, i, 4, 4);
    }
    rt_seq_request request = t_request(1, 2, 4, 4);
    cm_error err;
    assert_int_equal(rt_sched_open(engine.sched, 0, &request, &err), CM_E_EXISTS);
    request.key = (rt_seq_key){2, 2};
    assert_int_equal(rt_sched_open(engine.sched, 0, &request, &err), CM_E_CAPACITY);
    assert_int_equal(rt_sched_open(engine.sched, 0, &request, NULL), CM_E_CAPACITY);
    rt_sched_cancel(engine.sched, (rt_seq_key){1, 99}); /* unknown is fine */
    rt_sched_cancel_owner(engine.sched, 99);
    rt_sched_cancel(engine.sched, (rt_seq_key){1, 0});
    assert_int_equal(rt_sched_open(engine.sched, 0, &request, &err), CM_OK);
    rt_sched_drain(engine.sched);
    request.key.stream = 7;
    assert_int_equal(rt_sched_open(engine.sched, 0, &request, &err), CM_E_REFUSED);
    t_words words = {0};
    t_run_out(&engine, &words); /* those that were in finish */
    assert_int_equal(words.n, 4 * 4);
    t_ledger_is_zero(engine.sched);
    t_engine_fini(&engine);
}

/* Prompt 5 in chunks of 2, then decode to tokens_max. */
static void test_one_alone(void **state)
{
    (void)state;
    static const struct {
        uint32_t pos0, n_row;
        bool sample;
    } want[] = {{0, 2, false}, {2, 2, false}, {4, 1, true}, {5, 1, true}, {6, 1, true}};
    t_engine engine;
    rt_sched_limits limits = t_limits();
    limits.chunk_max = 2;
    t_engine_init(&engine, &limits);
    t_open(&engine, 7, 9, 5, 3);
    t_answer answer;
    rt_seq_request request = t_request(7, 9, 5, 3);
    t_alone(t_prompt, 5, &request.sampler, &answer);
    t_words words = {0};
    for (uint32_t i = 0; i < 5; i++) {
        assert_true(t_begin(&engine, 0));
        assert_int_equal(engine.step.n_seg, 1);
        assert_int_equal(engine.step.segs[0].pos0, want[i].pos0);
        assert_int_equal(engine.step.segs[0].n_row, want[i].n_row);
        assert_int_equal(engine.step.segs[0].sample, want[i].sample);
        t_complete(&engine, 0, t_keep, &words);
        assert_int_equal(words.n, i < 2 ? 0 : i - 1);
    }
    for (uint32_t i = 0; i < 3; i++) {
        assert_true(words.words[i].key.owner == 7 && words.words[i].key.stream == 9);
        assert_int_equal(words.words[i].offset, i);
        assert_true(words.words[i].has_token);
        assert_int_equal(words.words[i].token, answer.tokens[i]);
        assert_int_equal(words.words[i].end, i == 2 ? RT_END_LENGTH : RT_GOING_ON);
    }
    assert_false(t_begin(&engine, 0));
    t_ledger_is_zero(engine.sched);
    t_engine_fini(&engine);
}

static void test_stop(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    rt_seq_request request = t_request(1, 1, 3, 10);
    t_answer answer;
    t_words words = {0};
    t_engine_init(&engine, &limits);
    t_alone(t_prompt, 3, &request.sampler, &answer);
    request.sampler.n_stop = 1;
    request.sampler.stop[0] = answer.tokens[2];
    uint32_t n_before = answer.tokens[0] == answer.tokens[2]   ? 0
                        : answer.tokens[1] == answer.tokens[2] ? 1
                                                               : 2;
    assert_int_equal(rt_sched_open(engine.sched, 0, &request, NULL), CM_OK);
    t_run_out(&engine, &words);
    assert_int_equal(words.n, n_before + 1);
    assert_false(words.words[n_before].has_token);
    assert_int_equal(words.words[n_before].end, RT_END_STOP);
    assert_int_equal(words.words[n_before].stop_id, answer.tokens[2]);
    assert_int_equal(words.words[n_before].offset, n_before);

    request.sampler.tokens_min = n_before + 2; /* now it may not be drawn there */
    words.n = 0;
    assert_int_equal(rt_sched_open(engine.sched, 0, &request, NULL), CM_OK);
    for (uint32_t i = 0; t_begin(&engine, 0); i++) {
        assert_int_equal(engine.step.segs[0].stop_wait == 0, i >= n_before + 2);
        t_complete(&engine, 0, t_keep, &words);
    }
    assert_in_range(words.n, n_before + 2, 10);
    t_ledger_is_zero(engine.sched);
    t_engine_fini(&engine);
}

static void t_check_logprobs(void *ctx, const rt_word *word)
{
    uint32_t *n = ctx;
    if (word->key.stream == 1) {
        assert_int_equal(word->logprobs != NULL, word->has_token);
        assert_true(!word->has_token || (uint32_t)-word->logprobs->token == word->token);
        *n += word->has_token;
    } else {
        assert_null(word->logprobs);
    }
}

/* What the sampler needs comes with the step: the whole log also after a resume, the caller's biases as a
 * copy; what it says about a token goes with the token's word, to those who asked. */
static void test_sampler_sees(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    rt_bias bias[] = {{3, 0.5f}, {4, -1}};
    uint32_t emitted[] = {6, 2}, n = 0;
    rt_seq_request request = t_request(1, 1, 5, 9);
    t_engine_init(&engine, &limits);
    request.emitted = emitted;
    request.n_emitted = 2;
    request.sampler.logprobs = true;
    request.sampler.n_bias = 2;
    request.sampler.bias = bias;
    assert_int_equal(rt_sched_open(engine.sched, 0, &request, NULL), CM_OK);
    memset(bias, 0xff, sizeof(bias));
    memset(emitted, 0xff, sizeof(emitted));
    t_open(&engine, 1, 2, 3, 9);
    assert_true(t_begin(&engine, 0));
    const rt_step_seg *seg = &engine.step.segs[0];
    assert_true(seg->sample && seg->n_prompt == 5 && seg->pos0 + seg->n_row == 7);
    assert_memory_equal(seg->log, t_prompt, 5 * sizeof(uint32_t));
    assert_true(seg->log[5] == 6 && seg->log[6] == 2);
    assert_true(seg->sampler->n_bias == 2 && seg->sampler->bias[0].id == 3 && seg->sampler->bias[1].id == 4);
    assert_true(seg->sampler->bias[0].bias > 0.4f && seg->sampler->bias[1].bias < -0.9f);
    do {
        t_complete(&engine, 0, t_check_logprobs, &n);
    } while (t_begin(&engine, 0));
    assert_in_range(n, 1, 7);
    t_ledger_is_zero(engine.sched);
    t_engine_fini(&engine);
}

/* A sequence that goes on elsewhere gives the rest of the same answer, offsets and limits included. */
static void test_emitted(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    t_engine_init(&engine, &limits);
    for (uint32_t n_emitted = 0; n_emitted < 6; n_emitted++) {
        rt_seq_request request = t_request(1, 1, 7, 6);
        t_answer answer;
        t_words words = {0};
        t_alone(t_prompt, 7, &request.sampler, &answer);
        request.emitted = answer.tokens;
        request.n_emitted = n_emitted;
        assert_int_equal(rt_sched_open(engine.sched, 0, &request, NULL), CM_OK);
        t_run_out(&engine, &words);
        assert_int_equal(words.n, 6 - n_emitted);
        for (uint32_t i = 0; i < words.n; i++) {
            assert_int_equal(words.words[i].offset, n_emitted + i);
            assert_int_equal(words.words[i].token, answer.tokens[n_emitted + i]);
            assert_int_equal(words.words[i].end, i + 1 == words.n ? RT_END_LENGTH : RT_GOING_ON);
        }
    }
    t_ledger_is_zero(engine.sched);
    t_engine_fini(&engine);
}

/* Decode rows first, then prefill chunks, both oldest first, within the row budget. */
static void test_order_of_a_step(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    t_words words = {0};
    limits.row_max = 10;
    t_engine_init(&engine, &limits);
    t_open(&engine, 1, 1, 20, 4);
    t_open(&engine, 1, 2, 2, 9);
    t_open(&engine, 1, 3, 20, 4);
    assert_true(t_begin(&engine, 0)); /* 1 takes a chunk, 2 the rest */
    assert_int_equal(engine.step.n_seg, 2);
    assert_int_equal(engine.step.segs[0].n_row, 8);
    assert_int_equal(engine.step.segs[1].n_row, 2);
    t_complete(&engine, 0, t_keep, &words);
    assert_true(
        t_begin(&engine, 0)); /* 2 decodes and goes first, 1 takes a chunk, 3 starts with what is left */
    assert_int_equal(engine.step.n_seg, 3);
    assert_int_equal(engine.step.segs[0].pos0, 2);
    assert_int_equal(engine.step.segs[0].n_row, 1);
    assert_int_equal(engine.step.segs[1].pos0, 8);
    assert_int_equal(engine.step.segs[1].n_row, 8);
    assert_int_equal(engine.step.segs[2].pos0, 0);
    assert_int_equal(engine.step.segs[2].n_row, 1);
    t_complete(&engine, 0, t_keep, &words);
    t_run_out(&engine, &words);
    t_ledger_is_zero(engine.sched);
    t_engine_fini(&engine);
}

/* One slot: answers come whole and in order of arrival. */
static void test_first_come_first_served(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    t_words words = {0};
    limits.slot_max = 1;
    t_engine_init(&engine, &limits);
    for (uint64_t i = 0; i < 4; i++) {
        t_open(&engine, 1, 40 - i, 3, 2);
    }
    t_run_out(&engine, &words);
    assert_int_equal(words.n, 8);
    for (uint32_t i = 0; i < 8; i++) {
        assert_int_equal(words.words[i].key.stream, 40 - i / 2);
    }
    t_engine_fini(&engine);
}

/* 8 pages of 2 tokens. The older one grows to 7 of them and drives the younger one out; both answers stay
 * whole. */
static void test_preemption(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    t_words words = {0};
    limits.page_max = 8;
    limits.page_tokens = 2;
    t_engine_init(&engine, &limits);
    t_open(&engine, 1, 1, 4, 10);
    t_open(&engine, 1, 2, 3, 11);
    t_run_out(&engine, &words);
    rt_sched_ledger ledger;
    rt_sched_ledger_get(engine.sched, &ledger);
    assert_true(ledger.n_preempted > 0);
    assert_int_equal(ledger.page_max, 8);
    assert_int_equal(engine.n_fresh, 2 + ledger.n_preempted);
    assert_int_equal(words.n, 21);
    for (uint64_t stream = 1; stream <= 2; stream++) {
        rt_seq_request request = t_request(1, stream, stream == 1 ? 4 : 3, stream == 1 ? 10 : 11);
        t_answer answer;
        uint32_t n = 0;
        t_alone(t_prompt, request.n_prompt, &request.sampler, &answer);
        for (uint32_t i = 0; i < words.n; i++) {
            if (words.words[i].key.stream == stream) {
                assert_int_equal(words.words[i].offset, n);
                assert_int_equal(words.words[i].token, answer.tokens[n++]);
            }
        }
        assert_int_equal(n, answer.n);
    }
    /* the older one was never the one to go: it ends first though both decode side by side */
    assert_int_equal(words.words[words.n - 1].key.stream, 2);
    t_ledger_is_zero(engine.sched);
    t_engine_fini(&engine);
}

/* One row a step, and the older sequence still in its prompt: decode rows of the younger must not hold it up
 * for good, not even when the younger waits for a page that only the older could give. */
static void test_oldest_goes_on(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    t_words words = {0};
    limits.row_max = 2;
    limits.chunk_max = 1;
    limits.page_max = 6;
    limits.page_tokens = 2;
    t_engine_init(&engine, &limits);
    t_open(&engine, 1, 1, 6, 6);
    t_open(&engine, 1, 2, 1, 9);
    t_open(&engine, 1, 3, 1, 9);
    uint32_t n_step = 0, pos = 0;
    while (t_begin(&engine, 0)) {
        n_step++;
        if (pos < 11) { /* the oldest is in every step until its last row */
            bool found = false;
            for (uint32_t i = 0; i < engine.step.n_seg; i++) {
                found = found || (engine.step.segs[i].slot == 0 && engine.step.segs[i].pos0 == pos);
            }
            assert_true(found);
            pos++;
        }
        t_complete(&engine, 0, t_keep, &words);
        assert_in_range(n_step, 1, 200);
    }
    assert_int_equal(words.n, 6 + 9 + 9);
    t_ledger_is_zero(engine.sched);
    t_engine_fini(&engine);
}

static void test_cancel_in_flight(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    t_words words = {0};
    rt_sched_ledger ledger;
    t_engine_init(&engine, &limits);
    t_open(&engine, 1, 1, 3, 5);
    t_open(&engine, 2, 1, 3, 5);
    assert_true(t_begin(&engine, 0));
    rt_sched_cancel(engine.sched, (rt_seq_key){1, 1});
    rt_sched_cancel(engine.sched, (rt_seq_key){1, 1}); /* again: unknown by now */
    rt_sched_cancel_owner(engine.sched, 1);
    rt_sched_ledger_get(engine.sched, &ledger);
    assert_int_equal(ledger.n_slot, 2); /* the engine may still write there */
    assert_int_equal(ledger.n_page, 2);
    assert_int_equal(ledger.n_cancelled, 1);
    t_open(&engine, 1, 1, 4, 2); /* the name is free again */
    t_complete(&engine, 0, t_keep, &words);
    assert_int_equal(words.n, 1);
    assert_true(words.words[0].key.owner == 2);
    rt_sched_ledger_get(engine.sched, &ledger);
    assert_int_equal(ledger.n_slot, 1);
    assert_int_equal(ledger.n_page, 1);
    rt_sched_cancel_owner(engine.sched, 2);
    words.n = 0;
    t_run_out(&engine, &words);
    assert_int_equal(words.n, 2);
    assert_true(words.words[1].key.owner == 1);
    t_ledger_is_zero(engine.sched);
    t_engine_fini(&engine);
}

typedef struct t_canceller {
    rt_sched *sched;
    uint32_t n;
} t_canceller;

static void t_cancel_other(void *ctx, const rt_word *word)
{
    t_canceller *canceller = ctx;
    canceller->n++;
    rt_sched_cancel(canceller->sched, (rt_seq_key){word->key.owner, 3 - word->key.stream});
}

/* Told about the first, its owner cancels the second, whose word is then not told. */
static void test_cancel_while_told(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    rt_sched_ledger ledger;
    t_engine_init(&engine, &limits);
    t_open(&engine, 1, 1, 3, 5);
    t_open(&engine, 1, 2, 3, 5);
    t_canceller canceller = {.sched = engine.sched};
    assert_true(t_begin(&engine, 0));
    t_complete(&engine, 0, t_cancel_other, &canceller);
    assert_int_equal(canceller.n, 1);
    rt_sched_ledger_get(engine.sched, &ledger);
    assert_int_equal(ledger.n_seq, 1);
    assert_int_equal(ledger.n_slot, 1);
    t_engine_fini(&engine); /* with a sequence still there */
}

static void test_deadlines(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    t_words words = {0};
    rt_sched_ledger ledger;
    static const uint64_t deadlines[] = {300, 100, 200};
    limits.slot_max = 2;
    t_engine_init(&engine, &limits);
    for (uint32_t i = 0; i < 3; i++) {
        rt_seq_request request = t_request(1, i + 1, 3, 20);
        request.deadline_ms = deadlines[i];
        assert_int_equal(rt_sched_open(engine.sched, 0, &request, NULL), CM_OK);
    }
    assert_true(rt_sched_next_deadline(engine.sched) == 100);
    assert_true(t_begin(&engine, 99));
    assert_true(rt_sched_next_deadline(engine.sched) == UINT64_MAX); /* the end of the step comes first */
    t_complete(&engine, 100, t_keep, &words); /* 2 is late in flight: its token and its end at once */
    assert_int_equal(words.n, 2);
    assert_int_equal(words.words[0].end, RT_GOING_ON);
    assert_int_equal(words.words[1].key.stream, 2);
    assert_true(words.words[1].has_token);
    assert_int_equal(words.words[1].end, RT_END_FAILED);
    assert_int_equal(words.words[1].status, CM_E_DEADLINE);
    assert_non_null(words.words[1].text);
    assert_true(t_begin(&engine, 150));
    assert_int_equal(engine.step.n_seg, 2); /* 3 has the slot of 2 */
    t_complete(&engine, 199, t_keep, &words);
    assert_int_equal(words.n, 4);
    assert_true(rt_sched_next_deadline(engine.sched) <= 200);
    assert_true(t_begin(&engine, 200)); /* 3 is late between steps */
    assert_int_equal(engine.step.n_seg, 1);
    rt_sched_words(engine.sched, t_keep, &words);
    assert_int_equal(words.n, 5);
    assert_int_equal(words.words[4].key.stream, 3);
    assert_false(words.words[4].has_token);
    assert_int_equal(words.words[4].status, CM_E_DEADLINE);
    assert_int_equal(words.words[4].offset, 1);
    t_complete(&engine, 201, t_keep, &words);
    assert_false(t_begin(&engine, 5000));
    rt_sched_cancel(engine.sched, (rt_seq_key){1, 1}); /* its word waits, but now nobody wants it */
    words.n = 0;
    rt_sched_words(engine.sched, t_keep, &words);
    assert_int_equal(words.n, 0);
    rt_sched_ledger_get(engine.sched, &ledger);
    assert_int_equal(ledger.n_cancelled, 3);
    t_ledger_is_zero(engine.sched);
    t_engine_fini(&engine);
}

static void test_failed_step(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    t_words words = {0};
    limits.slot_max = 3;
    t_engine_init(&engine, &limits);
    for (uint64_t i = 1; i <= 4; i++) {
        t_open(&engine, 1, i, 3, 5);
    }
    assert_true(t_begin(&engine, 0));
    rt_sched_cancel(engine.sched, (rt_seq_key){1, 2});
    rt_sched_fail_step(engine.sched, 0, CM_E_NO_OWNER, "no worker", t_keep, &words);
    assert_int_equal(words.n, 2);
    for (uint32_t i = 0; i < 2; i++) {
        assert_int_equal(words.words[i].key.stream, i == 0 ? 1 : 3);
        assert_int_equal(words.words[i].end, RT_END_FAILED);
        assert_int_equal(words.words[i].status, CM_E_NO_OWNER);
        assert_string_equal(words.words[i].text, "no worker");
        assert_false(words.words[i].has_token);
    }
    words.n = 0;
    t_run_out(&engine, &words); /* the one that waited is not hurt */
    assert_int_equal(words.n, 5);
    t_ledger_is_zero(engine.sched);
    t_engine_fini(&engine);
}

/* The one that had to go starts again before anyone who came later, however well the later one would fit. */
static void test_preempted_is_next(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    t_words words = {0};
    limits.page_max = 8;
    limits.page_tokens = 2;
    limits.chunk_max = 14; /* so that it has its first word in the step in which it starts again */
    limits.row_max = 20;
    limits.slot_max = 2;
    t_engine_init(&engine, &limits);
    t_open(&engine, 1, 1, 4, 10);
    t_open(&engine, 1, 2, 3, 11);
    t_open(&engine, 1, 3, 2, 1);
    rt_sched_ledger ledger;
    uint32_t n_of_2 = 0, n_of_2_before = UINT32_MAX;
    while (t_begin(&engine, 0)) {
        rt_sched_ledger_get(engine.sched, &ledger);
        if (ledger.n_preempted > 0 && n_of_2_before == UINT32_MAX) {
            n_of_2_before = n_of_2;
        }
        words.n = 0;
        t_complete(&engine, 0, t_keep, &words);
        for (uint32_t i = 0; i < words.n; i++) {
            n_of_2 += words.words[i].key.stream == 2;
            if (words.words[i].key.stream == 3) {
                assert_true(n_of_2 > n_of_2_before);
            }
        }
    }
    assert_int_equal(n_of_2, 11);
    assert_true(n_of_2_before < 11);
    t_engine_fini(&engine);
}

/* Nobody starts on pages that an older one will need for its prompt. */
static void test_no_vain_start(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    t_words words = {0};
    rt_sched_ledger ledger;
    limits.page_max = 8;
    limits.page_tokens = 2;
    limits.chunk_max = 2;
    t_engine_init(&engine, &limits);
    t_open(&engine, 1, 1, 12, 2);
    t_open(&engine, 1, 2, 4, 2);
    for (uint32_t i = 0; i < 6; i++) {
        assert_true(t_begin(&engine, 0));
        assert_int_equal(engine.step.n_seg, 1);
        t_complete(&engine, 0, t_keep, &words);
    }
    t_run_out(&engine, &words);
    assert_int_equal(words.n, 4);
    rt_sched_ledger_get(engine.sched, &ledger);
    assert_int_equal(ledger.n_preempted, 0);
    t_engine_fini(&engine);
}

/* Words that wait are forgotten by their whole key. */
static void test_words_go_by_key(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    t_words words = {0};
    t_engine_init(&engine, &limits);
    for (uint64_t i = 0; i < 4; i++) { /* keys 1 1, 2 1, 3 1, 1 2 */
        rt_seq_request request = t_request(1 + i % 3, 1 + i / 3, 3, 5);
        request.deadline_ms = 10;
        assert_int_equal(rt_sched_open(engine.sched, 0, &request, NULL), CM_OK);
    }
    assert_false(t_begin(&engine, 10));
    t_ledger_is_zero(engine.sched);
    rt_sched_cancel(engine.sched, (rt_seq_key){2, 1});
    rt_sched_cancel_owner(engine.sched, 3);
    rt_sched_words(engine.sched, t_keep, &words);
    assert_int_equal(words.n, 2);
    assert_true(words.words[0].key.owner == 1 && words.words[0].key.stream == 1);
    assert_true(words.words[1].key.owner == 1 && words.words[1].key.stream == 2);
    t_engine_fini(&engine);
}

/* However long nobody asks for the words, none is lost: sequences without room for theirs stay until there is
 * some. */
static void test_words_wait(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    t_words words = {0};
    uint32_t n_open = 0;
    t_engine_init(&engine, &limits);
    for (uint64_t now = 0; now < 8; now++) {
        for (uint32_t i = 0; i < limits.queue_max; i++) {
            rt_seq_request request = t_request(1, n_open, 3, 5);
            request.deadline_ms = now + 1;
            n_open += rt_sched_open(engine.sched, now, &request, NULL) == CM_OK;
        }
        if (t_begin(&engine, now + 1)) { /* all are late: fail the step so that nothing else is told */
            rt_sched_fail_step(engine.sched, now + 1, CM_E_DEVICE, NULL, t_keep, &words);
        }
    }
    rt_sched_words(engine.sched, t_keep, &words);
    assert_false(t_begin(&engine, 100));
    rt_sched_words(engine.sched, t_keep, &words);
    assert_int_equal(words.n, n_open);
    for (uint32_t i = 0; i < words.n; i++) {
        assert_int_equal(words.words[i].status, CM_E_DEADLINE);
    }
    t_ledger_is_zero(engine.sched);
    t_engine_fini(&engine);
}

/* Keys made to fall on one hash (owner times a constant, plus stream) are still different sequences. */
static void test_equal_hashes(void **state)
{
    (void)state;
    enum { N = 4 };
    t_engine engine;
    rt_sched_limits limits = t_limits();
    rt_seq_key keys[N];
    for (uint64_t i = 0; i < N; i++) {
        keys[i] = (rt_seq_key){i + 1, 5 - i * 0x9E3779B97F4A7C15u};
    }
    for (uint32_t order = 0; order < N * N; order++) {
        t_engine_init(&engine, &limits);
        for (uint32_t i = 0; i < N; i++) {
            t_open(&engine, keys[i].owner, keys[i].stream, 2, 3);
        }
        uint32_t first = order % N, second = order / N;
        rt_seq_request request = t_request(keys[first].owner, keys[first].stream, 2, 3);
        assert_int_equal(rt_sched_open(engine.sched, 0, &request, NULL), CM_E_EXISTS);
        rt_sched_cancel(engine.sched, keys[first]);
        rt_sched_cancel(engine.sched, keys[second]);
        t_words words = {0};
        t_run_out(&engine, &words);
        assert_int_equal(words.n, 3 * (first == second ? N - 1 : N - 2));
        for (uint32_t i = 0; i < words.n; i++) {
            assert_true(words.words[i].key.owner != keys[first].owner);
            assert_true(words.words[i].key.owner != keys[second].owner);
        }
        t_ledger_is_zero(engine.sched);
        t_engine_fini(&engine);
    }
}

/* A step that takes as long as said is what steps are made for: its decode row, the rows of prompts that the
 * time leaves, half of them each for two; a rest that is not worth a step goes along. */
static void test_steps_by_time(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    t_words words = {0};
    limits.row_max = limits.chunk_max = limits.context = T_CONTEXT_MAX;
    limits.page_max = 128;
    limits.step_ns = 1000000;
    t_engine_init(&engine, &limits);
    engine.took_ns = 2 * limits.step_ns; /* the first step: 96 rows become 48 */
    t_open(&engine, 1, 1, 3, 20);
    assert_true(t_begin(&engine, 0));
    t_complete(&engine, 0, t_keep, &words);
    engine.took_ns = limits.step_ns;
    t_open(&engine, 1, 2, 90, 2);
    static const uint32_t alone[] = {47, 43};
    for (uint32_t i = 0; i < 2; i++) {
        assert_true(t_begin(&engine, 0));
        assert_int_equal(engine.step.segs[0].n_row, 1);
        assert_int_equal(engine.step.segs[1].n_row, alone[i]);
        t_complete(&engine, 0, t_keep, &words);
    }
    t_open(&engine, 1, 3, 58, 1);
    t_open(&engine, 1, 4, 60, 1);
    assert_true(t_begin(&engine, 0));
    assert_int_equal(engine.step.n_seg, 4); /* two that decode, two prompts: 46 rows, 23 each */
    assert_int_equal(engine.step.segs[2].n_row, 23);
    assert_int_equal(engine.step.segs[3].n_row, 23);
    t_complete(&engine, 0, t_keep, &words);
    t_run_out(&engine, &words);
    t_open(&engine, 1, 5, 60, 1);
    assert_true(t_begin(&engine, 0)); /* 48, and 12 more */
    assert_int_equal(engine.step.n_row, 60);
    t_complete(&engine, 0, t_keep, &words);
    t_open(&engine, 1, 6, 61, 1);
    assert_true(t_begin(&engine, 0)); /* 13 are worth a step */
    assert_int_equal(engine.step.n_row, 48);
    t_complete(&engine, 0, t_keep, &words);
    t_run_out(&engine, &words);
    t_ledger_is_zero(engine.sched);
    t_engine_fini(&engine);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_open_refuses),
        cmocka_unit_test(test_texts_have_numbers),
        cmocka_unit_test(test_queue_and_names),
        cmocka_unit_test(test_one_alone),
        cmocka_unit_test(test_stop),
        cmocka_unit_test(test_sampler_sees),
        cmocka_unit_test(test_emitted),
        cmocka_unit_test(test_order_of_a_step),
        cmocka_unit_test(test_steps_by_time),
        cmocka_unit_test(test_first_come_first_served),
        cmocka_unit_test(test_preemption),
        cmocka_unit_test(test_oldest_goes_on),
        cmocka_unit_test(test_cancel_in_flight),
        cmocka_unit_test(test_cancel_while_told),
        cmocka_unit_test(test_deadlines),
        cmocka_unit_test(test_failed_step),
        cmocka_unit_test(test_preempted_is_next),
        cmocka_unit_test(test_no_vain_start),
        cmocka_unit_test(test_words_go_by_key),
        cmocka_unit_test(test_words_wait),
        cmocka_unit_test(test_equal_hashes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
