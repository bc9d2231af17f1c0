/* Sequences that begin as earlier ones did, one case at a time: where each begins, and what is kept. The rest
 * is t_sched_random's and t_prefix's. Pages have 4 tokens here. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "router/sched/sched_core.h"
#include "tests/unit/sched_engine.h"

enum { PAGE = 4 };

typedef struct told {
    uint32_t n, tokens[T_CONTEXT_MAX], n_cached, n_failed;
} told;

static void keep_word(void *ctx, const rt_word *word)
{
    told *t = ctx;
    t->n_cached = word->n_cached;
    t->n_failed += word->end == RT_END_FAILED;
    if (word->has_token) {
        t->tokens[t->n++] = word->token;
    }
}

static t_engine g_engine;

static void start(rt_sched_limits limits, uint32_t state_max)
{
    limits.state_max = state_max;
    t_engine_init(&g_engine, &limits);
}

static rt_sched_ledger ledger(void)
{
    rt_sched_ledger out;
    rt_sched_ledger_get(g_engine.sched, &out);
    return out;
}

static void open_request(const rt_seq_request *request)
{
    cm_error err;
    assert_int_equal(rt_sched_open(g_engine.sched, 0, request, &err), CM_OK);
}

/* Runs alone to its end; where it began. */
static uint32_t run(const rt_seq_request *request, told *out)
{
    uint32_t pos0 = UINT32_MAX;
    *out = (told){0};
    open_request(request);
    while (t_begin(&g_engine, 0)) {
        pos0 = pos0 == UINT32_MAX ? g_engine.step.segs[0].pos0 : pos0;
        t_complete(&g_engine, 0, keep_word, out);
    }
    assert_int_equal(out->n_failed, 0);
    t_ledger_is_zero(g_engine.sched);
    return pos0;
}

static void the_same_prompt_again(void **state)
{
    told first, second;
    rt_seq_request request = t_request(1, 1, 18, 3);
    (void)state;
    start(t_limits(), 8);
    assert_int_equal(run(&request, &first), 0);
    assert_int_equal(first.n_cached, 0);
    request.sampler.seed = 99; /* is drawn from what was computed */
    assert_int_equal(run(&request, &second), 16);
    assert_int_equal(second.n_cached, 16);
    request.sampler.seed = 1;
    assert_int_equal(run(&request, &second), 16);
    assert_memory_equal(first.tokens, second.tokens, sizeof(first.tokens));
    request.salt[3] = 1;
    assert_int_equal(run(&request, &second), 0);
    assert_int_equal(second.n_cached, 0);
    request.n_prompt = 17; /* the last token is computed, whatever is there */
    assert_int_equal(run(&request, &second), 16);
    request.n_prompt = 16;
    assert_int_equal(run(&request, &second), 0);
    assert_int_equal(run(&request, &second), 12);
    rt_sched_ledger now = ledger();
    assert_int_equal(now.n_query_token, 18 * 4 + 17 + 16 * 2);
    assert_int_equal(now.n_hit_token, 16 * 3 + 12);
    t_engine_fini(&g_engine);
}

/* A conversation: the next prompt begins with this one and its answer. */
static void behind_an_answer(void **state)
{
    told first, second;
    uint32_t prompt[T_CONTEXT_MAX];
    rt_seq_request request = t_request(1, 1, 6, 12);
    (void)state;
    start(t_limits(), 8);
    run(&request, &first);
    memcpy(prompt, t_prompt, sizeof(uint32_t) * 6);
    memcpy(prompt + 6, first.tokens, sizeof(uint32_t) * 12);
    prompt[18] = 1;
    request.prompt = prompt;
    request.n_prompt = 19;
    assert_int_equal(run(&request, &second), 16); /* the 18th token's row was never computed */
    assert_int_equal(second.n_cached, 16);
    t_engine_fini(&g_engine);
}

/* Of a running sequence's places only the prompt's end and the newest are kept. */
static void few_states_a_sequence(void **state)
{
    told out;
    rt_seq_request request = t_request(1, 1, 18, 40);
    (void)state;
    start(t_limits(), 8);
    run(&request, &out);
    assert_int_equal(ledger().n_state, 2);
    assert_int_equal(ledger().n_page_kept, (18 + 40 - 1) / PAGE);
    t_engine_fini(&g_engine);
}

/* Where two part there is no state until the second passes there; the third begins with it. */
static void what_two_have_in_common(void **state)
{
    told out;
    uint32_t prompt[T_CONTEXT_MAX];
    rt_seq_request request = t_request(1, 1, 40, 1);
    (void)state;
    start(t_limits(), 8);
    memcpy(prompt, t_prompt, sizeof(prompt));
    request.prompt = prompt;
    assert_int_equal(run(&request, &out), 0);
    prompt[14] = 60;
    assert_int_equal(run(&request, &out), 0);
    prompt[14] = 59;
    assert_int_equal(run(&request, &out), 12);
    assert_int_equal(out.n_cached, 12);
    t_engine_fini(&g_engine);
}

/* Kept pages are free pages: a sequence that needs all of them gets them, and nobody is preempted. */
static void kept_pages_make_room(void **state)
{
    told out;
    rt_sched_limits limits = t_limits();
    rt_seq_request request = t_request(1, 1, 20, 4);
    uint32_t prompt[T_CONTEXT_MAX] = {7};
    (void)state;
    limits.page_max = 8;
    start(limits, 8);
    run(&request, &out);
    assert_int_equal(ledger().n_page_kept, 5);
    request.prompt = prompt;
    request.sampler.tokens_max = 12;
    run(&request, &out);
    assert_int_equal(ledger().n_preempted, 0);
    assert_int_equal(ledger().n_page_kept, 7);
    request.prompt = t_prompt;
    assert_int_equal(run(&request, &out), 0);
    t_engine_fini(&g_engine);
}

/* Two at once with the same prompt: each computes it, one keeps its pages for both. */
static void at_once(void **state)
{
    told out = {0};
    rt_seq_request one = t_request(1, 1, 12, 8), two = t_request(1, 2, 12, 8);
    rt_sched_limits limits = t_limits();
    (void)state;
    limits.row_max = 24;
    limits.chunk_max = 12;
    start(limits, 8);
    open_request(&one);
    open_request(&two);
    assert_true(t_begin(&g_engine, 0));
    assert_int_equal(g_engine.step.n_seg, 2);
    assert_int_equal(ledger().n_page, 6);
    t_complete(&g_engine, 0, keep_word, &out);
    assert_int_equal(ledger().n_page, 3);
    while (t_begin(&g_engine, 0)) {
        t_complete(&g_engine, 0, keep_word, &out);
    }
    assert_int_equal(out.n, 16);
    t_ledger_is_zero(g_engine.sched);
    t_engine_fini(&g_engine);
}

/* What a failed step computed counts for nobody; what was complete before it does. */
static void a_failed_step_leaves_nothing(void **state)
{
    told out = {0};
    rt_seq_request request = t_request(1, 1, 15, 4);
    (void)state;
    start(t_limits(), 8);
    open_request(&request);
    assert_true(t_begin(&g_engine, 0));
    t_complete(&g_engine, 0, keep_word, &out);
    assert_true(t_begin(&g_engine, 0));
    assert_int_equal(ledger().n_state_writing, 1);
    rt_sched_fail_step(g_engine.sched, 0, CM_E_DEVICE, NULL, keep_word, &out);
    t_ledger_is_zero(g_engine.sched);
    assert_int_equal(ledger().n_page_kept, 2);
    assert_int_equal(ledger().n_state, 0);
    assert_int_equal(run(&request, &out), 0);
    assert_int_equal(run(&request, &out), 12);
    t_engine_fini(&g_engine);
}

/* The same for one that is cancelled in flight. */
static void a_cancelled_one_leaves_what_was_complete(void **state)
{
    told out = {0};
    rt_seq_request request = t_request(1, 1, 15, 4);
    (void)state;
    start(t_limits(), 8);
    open_request(&request);
    assert_true(t_begin(&g_engine, 0));
    t_complete(&g_engine, 0, keep_word, &out);
    assert_true(t_begin(&g_engine, 0));
    rt_sched_cancel(g_engine.sched, request.key);
    t_complete(&g_engine, 0, keep_word, &out);
    assert_int_equal(out.n, 0);
    t_ledger_is_zero(g_engine.sched);
    assert_int_equal(ledger().n_page_kept, 2);
    assert_int_equal(ledger().n_state, 0);
    t_engine_fini(&g_engine);
}

static void switched_off(void **state)
{
    told out;
    rt_seq_request request = t_request(1, 1, 18, 3);
    (void)state;
    start(t_limits(), 0);
    assert_int_equal(run(&request, &out), 0);
    assert_int_equal(run(&request, &out), 0);
    assert_int_equal(ledger().n_page_kept + ledger().n_query_token + ledger().n_hit_token, 0);
    t_engine_fini(&g_engine);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_same_prompt_again),
        cmocka_unit_test(behind_an_answer),
        cmocka_unit_test(few_states_a_sequence),
        cmocka_unit_test(what_two_have_in_common),
        cmocka_unit_test(kept_pages_make_room),
        cmocka_unit_test(at_once),
        cmocka_unit_test(a_failed_step_leaves_nothing),
        cmocka_unit_test(a_cancelled_one_leaves_what_was_complete),
        cmocka_unit_test(switched_off),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
