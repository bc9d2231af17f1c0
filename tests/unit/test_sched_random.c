/* The scheduler under random limits, requests, cancels, deadlines, failed steps and drains. --seed N repeats
 * a run. */
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

static uint64_t g_seed = 1;

/* ---- random runs ---- */

enum { T_CLIENTS = 400, T_OWNERS = 5 };

typedef struct t_client {
    rt_seq_key key;
    uint32_t prompt[T_CONTEXT_MAX];
    uint32_t n_prompt;
    rt_sampler sampler;
    uint64_t deadline_ms;
    t_answer answer;
    uint8_t salt;
    uint32_t n_told;
    bool open;
} t_client;

typedef struct t_world {
    t_rng rng;
    t_engine engine;
    t_client *clients;
    uint32_t n_client;
    uint64_t now_ms;
    bool step_failed;
    uint32_t n_ended[4];
} t_world;

static void t_world_word(void *ctx, const rt_word *word)
{
    t_world *world = ctx;
    assert_in_range(word->key.stream, 0, world->n_client - 1);
    t_client *client = &world->clients[word->key.stream];
    assert_true(client->open); /* nothing after an end, a cancel or a refusal */
    assert_true(client->key.owner == word->key.owner);
    assert_int_equal(word->offset, client->n_told);
    if (word->has_token) {
        assert_in_range(client->n_told, 0, client->answer.n - 1);
        assert_int_equal(word->token, client->answer.tokens[client->n_told]);
        client->n_told++;
    }
    assert_int_equal(word->logprobs != NULL, word->has_token && client->sampler.logprobs);
    assert_true(word->logprobs == NULL || word->logprobs->token == -(float)word->token);
    world->n_ended[word->end]++;
    switch (word->end) {
    case RT_GOING_ON:
        assert_true(word->has_token);
        assert_true(client->n_told < client->answer.n || client->answer.end == RT_END_STOP);
        return;
    case RT_END_STOP:
        assert_int_equal(word->stop_id, client->answer.stop_id);
        /* fall through */
    case RT_END_LENGTH:
        assert_int_equal(word->end, client->answer.end);
        assert_int_equal(client->n_told, client->answer.n);
        break;
    case RT_END_FAILED:
        if (word->status == CM_E_DEADLINE) {
            assert_true(world->now_ms >= client->deadline_ms);
        } else {
            assert_true(world->step_failed);
            assert_int_equal(word->status, CM_E_DEVICE);
        }
        break;
    }
    client->open = false;
}

/* Often it begins as an earlier one did, with what that was answered or not. */
static void t_client_draw_prompt(t_world *world, t_client *client)
{
    t_rng *rng = &world->rng;
    const t_client *like = client - t_below(rng, world->n_client < 6 ? world->n_client + 1 : 6);
    uint32_t n_like = like != client ? t_between(rng, 1, client->n_prompt) : 0;
    for (uint32_t i = 0; i < client->n_prompt; i++) {
        bool prompt = i < n_like && i < like->n_prompt,
             answer = i < n_like && !prompt && i - like->n_prompt < like->answer.n;
        client->prompt[i] = prompt   ? like->prompt[i]
                            : answer ? like->answer.tokens[i - like->n_prompt]
                                     : t_below(rng, T_VOCAB);
    }
    client->salt = t_below(rng, 8) == 0;
}

static void t_world_open(t_world *world)
{
    const rt_sched_limits *limits = &world->engine.limits;
    uint32_t n_token_max = limits->page_max * limits->page_tokens;
    n_token_max = n_token_max < limits->context ? n_token_max : limits->context;
    if (world->n_client == T_CLIENTS) {
        return;
    }
    t_client *client = &world->clients[world->n_client];
    t_rng *rng = &world->rng;
    *client = (t_client){.key = {1 + t_below(rng, T_OWNERS), world->n_client}};
    client->n_prompt = t_between(rng, 1, n_token_max - 1);
    t_client_draw_prompt(world, client);
    client->sampler = (rt_sampler){
        .seed = t_below(rng, 1000), .top_p = 1, .n_stop = t_below(rng, 3), .logprobs = t_below(rng, 2) == 0};
    client->sampler.tokens_max = t_between(rng, 1, n_token_max - client->n_prompt);
    client->sampler.tokens_min = t_between(rng, 0, client->sampler.tokens_max);
    for (uint32_t i = 0; i < client->sampler.n_stop; i++) {
        client->sampler.stop[i] = t_below(rng, T_VOCAB);
    }
    client->deadline_ms = t_below(rng, 6) == 0 ? world->now_ms + t_between(rng, 1, 150) : UINT64_MAX;
    t_alone(client->prompt, client->n_prompt, &client->sampler, &client->answer);
    client->n_told = t_below(rng, 4) == 0 && client->answer.n > 0 ? t_below(rng, client->answer.n) : 0;
    rt_seq_request request = {.key = client->key,
                              .prompt = client->prompt,
                              .n_prompt = client->n_prompt,
                              .emitted = client->answer.tokens,
                              .n_emitted = client->n_told,
                              .sampler = client->sampler,
                              .deadline_ms = client->deadline_ms,
                              .salt = {client->salt}};
    cm_error err;
    cm_status status = rt_sched_open(world->engine.sched, world->now_ms, &request, &err);
    if (status == CM_OK) {
        client->open = true;
        world->n_client++;
    } else {
        assert_int_equal(status, CM_E_CAPACITY);
    }
}

/* What clients may do at any time, step in flight or not. */
static void t_world_act(t_world *world, uint32_t open_odds)
{
    t_rng *rng = &world->rng;
    while (t_below(rng, 100) < open_odds) {
        t_world_open(world);
    }
    if (t_below(rng, 12) == 0 && world->n_client > 0) {
        t_client *client = &world->clients[t_below(rng, world->n_client)];
        rt_sched_cancel(world->engine.sched, client->key);
        client->open = false;
    }
    if (t_below(rng, 120) == 0) {
        uint64_t owner = 1 + t_below(rng, T_OWNERS);
        rt_sched_cancel_owner(world->engine.sched, owner);
        for (uint32_t i = 0; i < world->n_client; i++) {
            world->clients[i].open = world->clients[i].open && world->clients[i].key.owner != owner;
        }
    }
}

static void t_world_check(t_world *world)
{
    const rt_sched_limits *limits = &world->engine.limits;
    rt_sched_ledger ledger;
    rt_sched_ledger_get(world->engine.sched, &ledger);
    assert_int_equal(ledger.n_seq, ledger.n_running + ledger.n_waiting);
    assert_int_equal(ledger.n_slot, ledger.n_running);
    assert_in_range(ledger.n_running, 0, limits->slot_max);
    assert_in_range(ledger.n_running, 0, limits->row_max);
    assert_in_range(ledger.n_page + ledger.n_page_kept, 0, limits->page_max);
    assert_in_range(ledger.n_state + ledger.n_state_writing, 0, limits->state_max);
    assert_in_range(ledger.n_seq, 0, limits->slot_max + limits->queue_max);
}

static bool t_world_step(t_world *world, uint32_t open_odds)
{
    bool any = t_begin(&world->engine, world->now_ms);
    rt_sched_words(world->engine.sched, t_world_word, world);
    t_world_check(world);
    t_world_act(world, open_odds);
    world->now_ms += t_below(&world->rng, 4);
    if (!any) {
        return false;
    }
    world->engine.took_ns = t_below(&world->rng, 3) == 0 ? 0 : t_between(&world->rng, 1, 1u << 20);
    world->step_failed = t_below(&world->rng, 60) == 0;
    if (world->step_failed) {
        rt_sched_fail_step(world->engine.sched, world->now_ms, CM_E_DEVICE, NULL, t_world_word, world);
    } else {
        t_complete(&world->engine, world->now_ms, t_world_word, world);
    }
    world->step_failed = false;
    t_world_act(world, open_odds);
    t_world_check(world);
    return true;
}

typedef struct t_totals {
    uint64_t n_preempted, n_right, n_wrong, n_load, n_save, n_hit_token;
    uint32_t n_ended[4];
} t_totals;

static void t_world_run(uint64_t seed, t_totals *totals)
{
    t_world world = {.rng = {seed, 0}};
    t_rng *rng = &world.rng;
    rt_sched_limits limits = {
        .slot_max = t_between(rng, 1, 8),
        .queue_max = t_between(rng, 1, 8),
        .row_max = t_between(rng, 1, 24),
        .chunk_max = t_between(rng, 1, 12),
        .page_max = t_between(rng, 2, 24),
        .page_tokens = t_between(rng, 1, 8),
        .context = t_between(rng, 8, T_CONTEXT_MAX),
        .vocab = T_VOCAB,
        .draft_max = t_below(rng, RT_DRAFT_MAX + 1),
        .draft_always = t_below(rng, 2) == 0,
        .state_max = t_below(rng, 4) == 0 ? 0 : t_between(rng, 1, 12),
    };
    if (t_below(rng, 2) == 0) { /* steps by their time: more rows than the floor of the pace */
        limits.row_max = t_between(rng, 1, T_CONTEXT_MAX);
        limits.chunk_max = t_between(rng, 1, T_CONTEXT_MAX);
        limits.step_ns = t_between(rng, 1, 1u << 20);
    }
    world.clients = calloc(T_CLIENTS, sizeof(t_client));
    t_engine_init(&world.engine, &limits);
    world.engine.rng = (t_rng){seed, 1u << 30};
    world.engine.right_percent = t_between(rng, 0, 100);
    for (uint32_t i = 0; i < 600; i++) {
        t_world_step(&world, 50);
    }
    rt_sched_drain(world.engine.sched);
    for (uint32_t i = 0; t_world_step(&world, 0); i++) {
        assert_in_range(i, 0, 20000); /* it comes to an end */
    }
    for (uint32_t i = 0; i < world.n_client; i++) {
        assert_false(world.clients[i].open); /* every one had its last word */
    }
    t_ledger_is_zero(world.engine.sched);
    rt_sched_ledger ledger;
    rt_sched_ledger_get(world.engine.sched, &ledger);
    for (uint32_t i = 0; i < 4; i++) {
        totals->n_ended[i] += world.n_ended[i];
    }
    totals->n_preempted += ledger.n_preempted;
    totals->n_right += world.engine.n_right;
    totals->n_wrong += world.engine.n_wrong;
    totals->n_load += world.engine.n_load;
    totals->n_save += world.engine.n_save;
    totals->n_hit_token += ledger.n_hit_token;
    t_engine_fini(&world.engine);
    free(world.clients);
}

static void test_random_runs(void **state)
{
    (void)state;
    t_totals totals = {0};
    const uint32_t *n_ended = totals.n_ended;
    for (uint64_t i = 0; i < 150; i++) {
        t_world_run(g_seed * 1000 + i, &totals);
    }
    print_message("%llu preemptions; %u tokens, ends: %u stop, %u length, %u failed; %llu guesses right, "
                  "%llu wrong\n",
                  (unsigned long long)totals.n_preempted, n_ended[0], n_ended[1], n_ended[2], n_ended[3],
                  (unsigned long long)totals.n_right, (unsigned long long)totals.n_wrong);
    print_message("%llu states written, %llu gone on from, %llu tokens of prompts not computed\n",
                  (unsigned long long)totals.n_save, (unsigned long long)totals.n_load,
                  (unsigned long long)totals.n_hit_token);
    assert_true(totals.n_load > 1000 && totals.n_hit_token > 1000);
    assert_true(totals.n_preempted > 100);
    assert_true(n_ended[RT_END_STOP] > 100 && n_ended[RT_END_LENGTH] > 100 && n_ended[RT_END_FAILED] > 100);
    assert_true(totals.n_right > 1000 && totals.n_wrong > 1000);
}

/* ---- cancels in every state ---- */

static void t_no_word(void *ctx, const rt_word *word)
{
    (void)ctx;
    (void)word;
}

static void test_many_cancels(void **state)
{
    (void)state;
    t_engine engine;
    t_rng rng = {g_seed, 1u << 20};
    rt_sched_limits limits = t_limits();
    rt_sched_ledger before, after;
    uint64_t stream = 0, n_waiting = 0, n_running = 0, n_in_flight = 0;
    bool in_flight = false;
    limits.queue_max = 6;
    limits.row_max = 6;
    limits.page_max = 12;
    limits.context = 40;
    limits.draft_max = 2;
    t_engine_init(&engine, &limits);
    engine.right_percent = 50;
    for (;;) {
        rt_sched_ledger_get(engine.sched, &before);
        if (before.n_cancelled >= 100000) {
            break;
        }
        if (t_below(&rng, 3) > 0) {
            rt_seq_request request =
                t_request(1 + t_below(&rng, 3), stream + 1, t_between(&rng, 1, 16), t_between(&rng, 1, 24));
            cm_status status = rt_sched_open(engine.sched, 0, &request, NULL);
            assert_true(status == CM_OK || status == CM_E_CAPACITY);
            stream += status == CM_OK;
        }
        if (t_below(&rng, 2) == 0) {
            if (in_flight) {
                t_complete(&engine, 0, t_no_word, NULL);
            }
            in_flight = !in_flight && t_begin(&engine, 0);
        }
        rt_sched_ledger_get(engine.sched, &before);
        uint64_t victim = stream - t_below(&rng, 40);
        for (uint64_t owner = 1; owner <= 3;
             owner++) { /* the owner is not kept: two of the three are unknown keys */
            rt_sched_cancel(engine.sched, (rt_seq_key){owner, victim});
            rt_sched_ledger_get(engine.sched, &after);
            n_waiting += after.n_waiting < before.n_waiting;
            n_running += after.n_running < before.n_running;
            n_in_flight += after.n_seq == before.n_seq && after.n_cancelled > before.n_cancelled;
            before = after;
        }
    }
    print_message("cancelled: %llu waiting, %llu running, %llu in flight; %llu preemptions\n",
                  (unsigned long long)n_waiting, (unsigned long long)n_running,
                  (unsigned long long)n_in_flight, (unsigned long long)before.n_preempted);
    assert_true(n_waiting > 1000 && n_running > 1000 && n_in_flight > 1000 && before.n_preempted > 100);
    if (in_flight) {
        t_complete(&engine, 0, t_no_word, NULL);
    }
    for (uint64_t owner = 1; owner <= 3; owner++) {
        rt_sched_cancel_owner(engine.sched, owner);
    }
    t_ledger_is_zero(engine.sched);
    assert_false(t_begin(&engine, 0));
    t_engine_fini(&engine);
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "--seed") == 0) {
        g_seed = strtoull(argv[2], NULL, 10);
    }
    printf("seed %llu\n", (unsigned long long)g_seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_runs),
        cmocka_unit_test(test_many_cancels),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
