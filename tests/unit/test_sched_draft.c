/* Guesses in the scheduler, case by case on the fake engine, and the machine that decides how many. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "router/sched/draft_core.h"
#include "router/sched/sched_core.h"
#include "tests/unit/sched_engine.h"

/* ---- helpers ---- */

typedef struct t_words {
    uint32_t n;
    rt_word words[64];
    float logprob[64]; /* of the token, where asked for */
} t_words;

static void t_keep(void *ctx, const rt_word *word)
{
    t_words *words = ctx;
    assert_in_range(words->n, 0, 63);
    words->logprob[words->n] = word->logprobs != NULL ? word->logprobs->token : 1;
    words->words[words->n++] = *word;
}

static void t_engine_start(t_engine *engine, uint32_t draft_max, uint32_t right_percent)
{
    rt_sched_limits limits = t_limits();
    limits.page_tokens = 8;
    limits.draft_max = draft_max;
    limits.draft_always = true;
    t_engine_init(engine, &limits);
    engine->right_percent = right_percent;
}

static void t_open(t_engine *engine, const rt_seq_request *request)
{
    assert_int_equal(rt_sched_open(engine->sched, 0, request, NULL), CM_OK);
}

/* One step; returns how many guesses stood in its first segment. */
static uint32_t t_step(t_engine *engine, t_words *words)
{
    assert_true(t_begin(engine, 0));
    uint32_t n_draft = engine->step.segs[0].n_draft;
    t_complete(engine, 0, t_keep, words);
    return n_draft;
}

static uint32_t t_run_out(t_engine *engine, t_words *words)
{
    uint32_t n_step = 0;
    while (t_begin(engine, 0)) {
        assert_in_range(++n_step, 0, 1000);
        t_complete(engine, 0, t_keep, words);
    }
    return n_step;
}

static void t_close(t_engine *engine)
{
    t_ledger_is_zero(engine->sched);
    t_engine_fini(engine);
}

static void t_check_words(const t_words *words, const t_answer *answer)
{
    assert_int_equal(words->n, answer->n + (answer->end == RT_END_STOP));
    for (uint32_t i = 0; i < words->n; i++) {
        const rt_word *word = &words->words[i];
        bool last = i + 1 == words->n;
        assert_int_equal(word->offset, i);
        assert_int_equal(word->end, last ? answer->end : RT_GOING_ON);
        assert_int_equal(word->has_token, i < answer->n);
        assert_true(!word->has_token || word->token == answer->tokens[i]);
    }
}

/* ---- guesses in a step ---- */

/* All right: after the prompt every step gives draft_max + 1 tokens, up to the limit, where no more guesses
 * are asked for than can be of use. */
static void test_right(void **state)
{
    (void)state;
    for (uint32_t draft_max = 0; draft_max <= RT_DRAFT_MAX; draft_max++) {
        t_engine engine;
        t_words words = {0};
        t_answer answer;
        rt_sched_ledger ledger;
        rt_seq_request request = t_request(1, 1, 3, 20);
        t_engine_start(&engine, draft_max, 100);
        t_open(&engine, &request);
        t_alone(t_prompt, 3, &request.sampler, &answer);
        uint32_t n_step = t_run_out(&engine, &words);
        assert_int_equal(n_step, 1 + (19 + draft_max) / (draft_max + 1));
        t_check_words(&words, &answer);
        rt_sched_ledger_get(engine.sched, &ledger);
        assert_int_equal(ledger.n_decode_token, 19);
        assert_int_equal(ledger.n_draft_token, 19 - (n_step - 1));
        assert_int_equal(ledger.n_accepted_token, ledger.n_draft_token);
        t_close(&engine);
    }
}

/* All wrong: a token a step, and no page is held for what was wrong. */
static void test_wrong(void **state)
{
    (void)state;
    t_engine engine;
    t_words words = {0};
    t_answer answer;
    rt_sched_ledger ledger;
    rt_seq_request request = t_request(1, 1, 3, 20);
    t_engine_start(&engine, 3, 0);
    t_open(&engine, &request);
    t_alone(t_prompt, 3, &request.sampler, &answer);
    for (uint32_t n = 1; n <= 20; n++) {
        uint32_t left = 20 - n; /* tokens after this one */
        uint32_t n_draft = t_step(&engine, &words);
        assert_int_equal(n_draft, n == 1 ? 0 : left < 3 ? left : 3);
        assert_int_equal(words.n, n);
        rt_sched_ledger_get(engine.sched, &ledger);
        assert_int_equal(ledger.n_page, n == 20 ? 0 : (3 + n + 7) / 8);
    }
    t_check_words(&words, &answer);
    assert_int_equal(ledger.n_accepted_token, 0);
    assert_int_equal(ledger.n_draft, 18);
    assert_int_equal(ledger.n_draft_token, 3 * 16 + 2 + 1);
    t_close(&engine);
}

/* A stop id among right guesses ends the sequence there; what was drawn after it is not told. The wait for
 * the first allowed stop is over in the middle of a result as well. */
static void test_stop_inside(void **state)
{
    (void)state;
    uint32_t n_stopped = 0;
    for (uint32_t seed = 0; seed < 40; seed++) {
        for (uint32_t at = 0; at < 9; at++) {
            t_engine engine;
            t_words words = {0};
            t_answer answer;
            rt_seq_request request = t_request(1, seed, 3, 12);
            t_alone(t_prompt, 3, &request.sampler, &answer);
            request.sampler.n_stop = 1;
            request.sampler.stop[0] = answer.tokens[at];
            request.sampler.tokens_min = at % 3 == 0 ? 0 : at + (at % 3 == 1);
            request.sampler.logprobs = true;
            t_alone(t_prompt, 3, &request.sampler, &answer);
            n_stopped += answer.end == RT_END_STOP;
            t_engine_start(&engine, 5, 100);
            t_open(&engine, &request);
            t_run_out(&engine, &words);
            t_check_words(&words, &answer);
            for (uint32_t i = 0; i < words.n; i++) {
                assert_true(words.logprob[i] == (i < answer.n ? -(float)answer.tokens[i] : 1));
            }
            t_close(&engine);
        }
    }
    assert_in_range(n_stopped, 100, 40 * 9);
}

/* Guesses get the rows that decode rows and prefill chunks leave, the oldest first. */
static void test_rows_left(void **state)
{
    (void)state;
    t_engine engine;
    t_words words = {0};
    rt_seq_request first = t_request(1, 1, 3, 20), second = t_request(1, 2, 3, 20),
                   third = t_request(1, 3, 20, 4);
    rt_sched_limits limits = t_limits();
    limits.row_max = 10;
    limits.chunk_max = 4;
    limits.draft_max = 3;
    limits.draft_always = true;
    t_engine_init(&engine, &limits);
    engine.right_percent = 0;
    t_open(&engine, &first);
    t_open(&engine, &second);
    t_step(&engine, &words);
    t_open(&engine, &third);
    assert_true(t_begin(&engine, 0)); /* 1 + 1 + 4 rows, then 3 and 1 guesses */
    assert_int_equal(engine.step.n_seg, 3);
    assert_int_equal(engine.step.n_row, 10);
    assert_int_equal(engine.step.segs[0].n_draft, 3);
    assert_int_equal(engine.step.segs[1].n_draft, 1);
    assert_int_equal(engine.step.segs[2].n_row, 4);
    assert_int_equal(engine.step.segs[2].n_draft + engine.step.segs[2].draft_want, 0);
    assert_int_equal(engine.step.segs[1].draft_want, 3);
    t_complete(&engine, 0, t_keep, &words);
    t_run_out(&engine, &words);
    t_close(&engine);
}

/* A free page is taken for guesses, and given back. The last one, to which both would grow next, is promised
 * to the older: the younger's guesses end with the page it has. */
static void test_promised_page(void **state)
{
    (void)state;
    t_engine engine;
    t_words words = {0};
    rt_sched_ledger ledger;
    rt_seq_request older = t_request(1, 1, 6, 14), younger = t_request(1, 2, 1, 15);
    rt_sched_limits limits = t_limits();
    limits.page_max = 5;
    limits.draft_max = 3;
    limits.draft_always = true;
    t_engine_init(&engine, &limits);
    engine.right_percent = 0;
    t_open(&engine, &older);
    t_open(&engine, &younger);
    t_step(&engine, &words);
    for (uint32_t n = 7; n < 10; n++) { /* tokens of the older; the younger has 5 fewer */
        assert_true(t_begin(&engine, 0));
        assert_int_equal(engine.step.segs[0].n_page, 3);
        assert_int_equal(engine.step.segs[0].n_draft, 3);
        assert_int_equal(engine.step.segs[1].n_page, n == 9 ? 1 : 2);
        assert_int_equal(engine.step.segs[1].n_draft, n == 9 ? 0 : 3);
        t_complete(&engine, 0, t_keep, &words);
        rt_sched_ledger_get(engine.sched, &ledger);
        assert_int_equal(ledger.n_page, n == 7 ? 3 : 4);
        assert_int_equal(ledger.n_preempted, 0);
    }
    t_run_out(&engine, &words);
    t_close(&engine);
}

/* A preempted sequence has no guesses when it starts again; a step that fails or a cancel in flight takes
 * them along. */
static void test_forgotten(void **state)
{
    (void)state;
    t_engine engine;
    t_words words = {0};
    rt_sched_ledger ledger;
    rt_sched_limits limits = t_limits();
    limits.page_max = 5;
    limits.draft_max = 3;
    limits.draft_always = true;
    t_engine_init(&engine, &limits);
    engine.right_percent = 40;
    rt_seq_request older = t_request(1, 1, 6, 14), younger = t_request(1, 2, 1, 15);
    t_open(&engine, &older);
    t_open(&engine, &younger);
    do {
        t_step(&engine, &words);
        rt_sched_ledger_get(engine.sched, &ledger);
    } while (ledger.n_preempted == 0);
    t_run_out(&engine, &words); /* the engine checks that guesses at a new start are none */
    assert_int_equal(words.n, 14 + 15);
    t_open(&engine, &older);
    t_step(&engine, &words);
    assert_true(t_begin(&engine, 0));
    assert_int_equal(engine.step.segs[0].n_draft, 3);
    words.n = 0;
    rt_sched_fail_step(engine.sched, 0, CM_E_DEVICE, NULL, t_keep, &words);
    assert_int_equal(words.n, 1);
    t_ledger_is_zero(engine.sched);
    t_open(&engine, &older);
    t_step(&engine, &words);
    assert_true(t_begin(&engine, 0));
    rt_sched_cancel(engine.sched, older.key);
    words.n = 0;
    t_complete(&engine, 0, t_keep, &words);
    assert_int_equal(words.n, 0);
    t_close(&engine);
}

/* A deadline that passes in a step of several tokens ends the sequence with the last of them. */
static void test_deadline(void **state)
{
    (void)state;
    t_engine engine;
    t_words words = {0};
    rt_seq_request request = t_request(1, 1, 3, 20);
    request.deadline_ms = 5;
    t_engine_start(&engine, 3, 100);
    t_open(&engine, &request);
    t_step(&engine, &words);
    assert_true(t_begin(&engine, 0));
    t_complete(&engine, 5, t_keep, &words);
    assert_int_equal(words.n, 5);
    for (uint32_t i = 0; i < 5; i++) {
        assert_true(words.words[i].has_token);
        assert_int_equal(words.words[i].end, i == 4 ? RT_END_FAILED : RT_GOING_ON);
    }
    t_close(&engine);
}

/* ---- how many guesses pay ---- */

/* A machine to run on: a step of r rows takes fixed + r * row + guess for every guess drawn. */
typedef struct t_machine {
    uint64_t fixed_ns, row_ns, guess_ns;
    uint32_t right_percent, noise_percent;
} t_machine;

typedef struct t_pilot {
    rt_draft_core core;
    t_rng rng;
    uint32_t before; /* guesses made by the step before */
    uint64_t ns, n_token, n_change;
} t_pilot;

static void t_fly(t_pilot *pilot, const t_machine *machine, uint32_t n_seq, uint32_t n_step)
{
    for (uint32_t i = 0; i < n_step; i++) {
        rt_draft_step step = {.n_want = rt_draft_core_want(&pilot->core, n_seq), .n_decode = n_seq};
        for (uint32_t seq = 0; seq < n_seq; seq++) {
            bool right = true;
            for (uint32_t k = 0; k < pilot->before; k++) {
                right = right && t_below(&pilot->rng, 100) < machine->right_percent;
                step.n_guess[k]++;
                step.n_right[k] += right;
                pilot->n_token += right;
            }
        }
        uint64_t ns = machine->fixed_ns + n_seq * (1 + pilot->before) * machine->row_ns +
                      (uint64_t)n_seq * step.n_want * machine->guess_ns;
        step.took_ns = ns + ns * t_below(&pilot->rng, machine->noise_percent + 1) / 100;
        pilot->n_token += n_seq;
        pilot->ns += step.took_ns;
        pilot->n_change += step.n_want != pilot->before;
        pilot->before = step.n_want;
        rt_draft_core_observe(&pilot->core, &step);
    }
}

static double t_ns_per_token(const t_machine *machine, uint32_t n_seq, uint32_t k)
{
    double p = 1, n = 1;
    for (uint32_t i = 0; i < k; i++) {
        p *= machine->right_percent / 100.0;
        n += p;
    }
    return ((double)machine->fixed_ns +
            (double)n_seq * ((1.0 + k) * (double)machine->row_ns + k * (double)machine->guess_ns)) /
           (n * n_seq);
}

/* Whatever the machine, in the long run nearly the rate of the best fixed number. */
static void test_pays(void **state)
{
    (void)state;
    static const t_machine machines[] = {
        {1000000, 1000, 1000, 80, 0},     /* waits for memory: rows are free */
        {1000000, 1000, 1000, 80, 30},    /* with noise */
        {1000, 1000000, 300000, 80, 10},  /* every row costs: never guess */
        {1000, 1000000, 0, 95, 10},       /* even then */
        {1000000, 200000, 50000, 50, 10}, /* one or two at one sequence, none at many */
        {1000000, 10000, 400000, 90, 10}, /* guesses are dear */
        {1000000, 1000, 1000, 0, 10},     /* all wrong, nearly for nothing */
    };
    for (size_t m = 0; m < sizeof(machines) / sizeof(machines[0]); m++) {
        for (uint32_t n_seq = 1; n_seq <= 64; n_seq *= 4) {
            double best = 1e30, mean_noise = 1 + machines[m].noise_percent / 200.0;
            for (uint32_t k = 0; k <= RT_DRAFT_MAX; k++) {
                double x = t_ns_per_token(&machines[m], n_seq, k);
                best = x < best ? x : best;
            }
            t_pilot pilot = {.rng = {m, 0}};
            rt_draft_core_init(&pilot.core, RT_DRAFT_MAX);
            t_fly(&pilot, &machines[m], n_seq, 2000); /* finds out */
            pilot.ns = pilot.n_token = 0;
            t_fly(&pilot, &machines[m], n_seq, 20000);
            double got = (double)pilot.ns / (double)pilot.n_token / mean_noise;
            if (got > best * 1.12) {
                fail_msg("machine %zu, %u sequences: %.0f ns a token, the best number gives %.0f", m, n_seq,
                         got, best);
            }
        }
    }
}

/* Numbers of sequences do not mix: what pays for one is ruin for many. */
static void test_buckets(void **state)
{
    (void)state;
    static const t_machine machine = {1000000, 50000, 0, 60, 5};
    t_pilot pilot = {.rng = {1, 0}};
    rt_draft_core_init(&pilot.core, 3);
    for (uint32_t i = 0; i < 100; i++) {
        t_fly(&pilot, &machine, 1, 50);
        t_fly(&pilot, &machine, 64, 50);
    }
    assert_int_equal(pilot.core.buckets[0].now, 3);
    assert_int_equal(pilot.core.buckets[6].now, 0);
    assert_int_equal(pilot.core.buckets[5].n_step, 0);
}

/* The text changes from easy to hard to guess and back. */
static void test_follows(void **state)
{
    (void)state;
    t_machine machine = {1000000, 150000, 0, 95, 5};
    t_pilot pilot = {.rng = {2, 0}};
    rt_draft_core_init(&pilot.core, 2);
    for (uint32_t round = 0; round < 3; round++) {
        machine.right_percent = 95;
        t_fly(&pilot, &machine, 4, 6000);
        assert_int_equal(pilot.core.buckets[2].now, 2);
        machine.right_percent = 5;
        t_fly(&pilot, &machine, 4, 6000);
        assert_int_equal(pilot.core.buckets[2].now, 0);
    }
}

/* Two numbers that are as good as each other do not alternate; trials stay rare. */
static void test_steady(void **state)
{
    (void)state;
    static const t_machine machine = {0, 1000000, 0, 100, 4}; /* a guess costs just what it gives */
    t_pilot pilot = {.rng = {3, 0}};
    rt_draft_core_init(&pilot.core, 2);
    t_fly(&pilot, &machine, 8, 500);
    uint32_t now = pilot.core.buckets[3].now;
    pilot.n_change = 0;
    for (uint32_t i = 0; i < 200; i++) {
        t_fly(&pilot, &machine, 8, 100);
        assert_int_equal(pilot.core.buckets[3].now, now);
    }
    assert_in_range(pilot.n_change, 10, 20000 / 40);
}

/* Steps that say nothing: without time, with prefill rows, with another number's guesses; one that stalled
 * says little. */
static void test_not_judged(void **state)
{
    (void)state;
    rt_draft_core core;
    rt_draft_core_init(&core, 2);
    rt_draft_bucket *bucket = &core.buckets[0];
    rt_draft_step step = {.n_want = 2, .n_decode = 1, .n_guess = {1, 1}, .n_right = {1, 0}};
    for (uint32_t i = 0; i < 1000; i++) {
        rt_draft_core_observe(&core, &step);
        assert_int_equal(rt_draft_core_want(&core, 1), 2);
    }
    step.took_ns = 1000;
    step.prefill = true;
    rt_draft_core_observe(&core, &step);
    step.prefill = false;
    step.n_want = 1; /* as from another bucket */
    rt_draft_core_observe(&core, &step);
    step.n_want = 2; /* guesses of that one */
    rt_draft_core_observe(&core, &step);
    assert_int_equal(bucket->n_step, 0);
    rt_draft_core_observe(&core, &step);
    assert_int_equal(bucket->n_step, 1);
    assert_true(bucket->ns_per_token[2] > 499 && bucket->ns_per_token[2] < 501);
    step.took_ns = 1000000000;
    rt_draft_core_observe(&core, &step);
    assert_true(bucket->ns_per_token[2] < 2000);
    rt_draft_core_init(&core, 0);
    step = (rt_draft_step){.n_decode = 1, .took_ns = 5};
    for (uint32_t i = 0; i < 100; i++) {
        rt_draft_core_observe(&core, &step);
        assert_int_equal(rt_draft_core_want(&core, 1), 0);
    }
}

/* The scheduler tells it the truth: on a machine where every row costs, guessing ends. */
static void test_sched_gives_up(void **state)
{
    (void)state;
    t_engine engine;
    rt_sched_limits limits = t_limits();
    limits.draft_max = 3;
    t_engine_init(&engine, &limits);
    engine.right_percent = 30;
    uint32_t n_late = 0, n_late_guess = 0;
    for (uint64_t stream = 1; stream <= 300; stream++) {
        t_words words = {0};
        rt_seq_request request = t_request(1, stream, 2, 60);
        t_open(&engine, &request);
        while (t_begin(&engine, 0)) {
            engine.took_ns = 1000 * engine.step.n_row;
            n_late += stream > 50;
            n_late_guess += stream > 50 && engine.step.segs[0].n_draft > 0;
            t_complete(&engine, 0, t_keep, &words);
        }
    }
    assert_in_range(n_late_guess, 1, n_late / 10);
    t_close(&engine);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_right),          cmocka_unit_test(test_wrong),
        cmocka_unit_test(test_stop_inside),    cmocka_unit_test(test_rows_left),
        cmocka_unit_test(test_promised_page),  cmocka_unit_test(test_forgotten),
        cmocka_unit_test(test_deadline),       cmocka_unit_test(test_pays),
        cmocka_unit_test(test_buckets),        cmocka_unit_test(test_follows),
        cmocka_unit_test(test_steady),         cmocka_unit_test(test_not_judged),
        cmocka_unit_test(test_sched_gives_up),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
