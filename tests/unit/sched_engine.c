#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "tests/unit/sched_engine.h"

uint32_t t_below(t_rng *rng, uint32_t n)
{
    return cm_rng_at(rng->key, rng->n++, 0).word[0] % n;
}

uint32_t t_between(t_rng *rng, uint32_t low, uint32_t high)
{
    return low + t_below(rng, high - low + 1);
}

static uint64_t t_hash_start(const rt_sampler *sampler)
{
    return sampler->seed * 0x9E3779B97F4A7C15u + 1;
}

static uint64_t t_hash_add(uint64_t hash, uint32_t token)
{
    hash = (hash ^ token) * 0xD6E8FEB86659FD93u;
    return hash ^ hash >> 32;
}

static bool t_is_stop(const rt_sampler *sampler, uint32_t token)
{
    for (uint32_t i = 0; i < sampler->n_stop; i++) {
        if (sampler->stop[i] == token) {
            return true;
        }
    }
    return false;
}

static uint32_t t_draw(const rt_sampler *sampler, uint64_t hash, bool stop_allowed)
{
    uint32_t token = (uint32_t)(hash % T_VOCAB);
    while (!stop_allowed && t_is_stop(sampler, token)) {
        hash = t_hash_add(hash, token);
        token = (uint32_t)(hash % T_VOCAB);
    }
    return token;
}

void t_alone(const uint32_t *prompt, uint32_t n_prompt, const rt_sampler *sampler, t_answer *out)
{
    uint64_t hash = t_hash_start(sampler);
    for (uint32_t i = 0; i < n_prompt; i++) {
        hash = t_hash_add(hash, prompt[i]);
    }
    *out = (t_answer){.end = RT_END_LENGTH};
    while (out->n < sampler->tokens_max) {
        uint32_t token = t_draw(sampler, hash, out->n >= sampler->tokens_min);
        if (t_is_stop(sampler, token)) {
            out->end = RT_END_STOP;
            out->stop_id = token;
            return;
        }
        out->tokens[out->n++] = token;
        hash = t_hash_add(hash, token);
    }
}

void t_engine_init(t_engine *engine, const rt_sched_limits *limits)
{
    *engine = (t_engine){.limits = *limits, .sched = rt_sched_create(limits), .right_percent = 100};
    engine->kv = calloc((size_t)limits->page_max * limits->page_tokens, sizeof(uint32_t));
    engine->slot_pos = calloc(limits->slot_max + limits->state_max, sizeof(uint32_t));
    engine->slot_hash = calloc(limits->slot_max + limits->state_max, sizeof(uint64_t));
    engine->page_written = calloc(limits->page_max, sizeof(uint64_t));
    engine->page_step = calloc(limits->page_max, sizeof(uint64_t));
    engine->guesses = calloc(limits->slot_max, sizeof(rt_step_result));
    engine->results = calloc(limits->slot_max, sizeof(rt_step_result));
}

void t_engine_fini(t_engine *engine)
{
    rt_sched_destroy(engine->sched);
    free(engine->kv);
    free(engine->slot_pos);
    free(engine->slot_hash);
    free(engine->page_written);
    free(engine->page_step);
    free(engine->guesses);
    free(engine->results);
}

static void t_seg_check_pages(t_engine *engine, const rt_step_seg *seg)
{
    const rt_sched_limits *limits = &engine->limits;
    assert_int_equal(seg->n_page, (seg->pos0 + seg->n_row + limits->page_tokens - 1) / limits->page_tokens);
    for (uint32_t i = 0; i < seg->n_page; i++) {
        uint32_t page = seg->pages[i];
        bool writes = (i + 1) * limits->page_tokens > seg->pos0;
        assert_in_range(page, 0, limits->page_max - 1);
        /* what is written is nobody else's in this step */
        assert_int_not_equal(engine->page_written[page], engine->step.number);
        assert_false(writes && engine->page_step[page] == engine->step.number);
        engine->page_step[page] = engine->step.number;
        engine->page_written[page] = writes ? engine->step.number : engine->page_written[page];
    }
}

/* What comes as guesses was guessed, for this very place, and can be of use: the last token has no row. */
static void t_seg_check_guesses(const t_engine *engine, const rt_step_seg *seg)
{
    const rt_step_result *guesses = &engine->guesses[seg->slot];
    uint32_t n_token_max = seg->n_prompt + seg->sampler->tokens_max;
    assert_in_range(seg->n_draft, 0, seg->pos0 == 0 ? 0 : guesses->n_draft);
    assert_in_range(seg->draft_want, 0, engine->limits.draft_max);
    assert_in_range(seg->pos0 + seg->n_row, 1, n_token_max - 1);
    if (seg->draft_want > 0) {
        assert_in_range(seg->pos0 + seg->n_row - seg->n_draft + 1 + seg->draft_want, 1, n_token_max - 1);
    }
    if (seg->n_draft > 0) {
        assert_int_equal(seg->n_row, seg->n_draft + 1);
        assert_memory_equal(seg->tokens + 1, guesses->drafts, seg->n_draft * sizeof(uint32_t));
    }
}

static void t_seg_check(t_engine *engine, const rt_step_seg *seg)
{
    const rt_sched_limits *limits = &engine->limits;
    assert_in_range(seg->slot, 0, limits->slot_max - 1);
    assert_in_range(seg->n_row - seg->n_draft, 1, limits->chunk_max);
    if (seg->pos0 == 0) {
        engine->slot_pos[seg->slot] = 0;
        engine->slot_hash[seg->slot] = 0;
        engine->n_fresh++;
    }
    assert_int_equal(seg->pos0, engine->slot_pos[seg->slot]);
    t_seg_check_pages(engine, seg);
    if (seg->sample) {
        assert_non_null(seg->sampler);
        assert_in_range(seg->n_prompt, 1, seg->pos0 + seg->n_row);
        assert_ptr_equal(seg->tokens, seg->log + seg->pos0);
        assert_int_equal(seg->logprobs != NULL, seg->sampler->logprobs);
        t_seg_check_guesses(engine, seg);
    } else {
        assert_null(seg->sampler);
        assert_null(seg->log);
        assert_null(seg->logprobs);
        assert_int_equal(seg->stop_wait, 0);
        assert_int_equal(seg->n_draft, 0);
        assert_int_equal(seg->draft_want, 0);
    }
}

static uint32_t *t_kv_at(t_engine *engine, const rt_step_seg *seg, uint32_t pos)
{
    uint32_t page_tokens = engine->limits.page_tokens;
    return &engine->kv[(size_t)seg->pages[pos / page_tokens] * page_tokens + pos % page_tokens];
}

/* Guesses of what follows n_token tokens whose hash is hash, right or not as the dice fall. */
static void t_seg_guess(t_engine *engine, const rt_step_seg *seg, uint64_t hash, rt_step_result *result)
{
    for (uint32_t k = 0; k < seg->draft_want; k++) {
        uint32_t token = t_draw(seg->sampler, hash, seg->stop_wait <= result->n_token + k);
        if (t_below(&engine->rng, 100) >= engine->right_percent) {
            token = (token + 1 + t_below(&engine->rng, T_VOCAB - 1)) % T_VOCAB;
        }
        result->drafts[result->n_draft++] = token;
        hash = t_hash_add(hash, token);
    }
}

/* One token after another, as long as the guess before it was right; what was computed behind is garbage. */
static void t_seg_sample(t_engine *engine, const rt_step_seg *seg, rt_step_result *result)
{
    uint32_t end = seg->pos0 + seg->n_row, pos = end - seg->n_draft;
    uint64_t hash = t_hash_start(seg->sampler);
    for (uint32_t i = 0; i < pos; i++) {
        uint32_t kv = *t_kv_at(engine, seg, i);
        assert_in_range(kv, 1, T_VOCAB);
        assert_int_equal(kv - 1, seg->log[i]);
        hash = t_hash_add(hash, kv - 1);
    }
    *result = (rt_step_result){0};
    for (bool right = true; right;) {
        uint32_t i = result->n_token++, token = t_draw(seg->sampler, hash, seg->stop_wait <= i);
        result->tokens[i] = token;
        if (seg->logprobs != NULL) {
            seg->logprobs[i] = (rt_logprobs){.token = -(float)token};
        }
        hash = t_hash_add(hash, token);
        right = pos < end && *t_kv_at(engine, seg, pos) == token + 1;
        pos += right;
    }
    engine->slot_pos[seg->slot] = pos;
    engine->n_right += result->n_token - 1;
    engine->n_wrong += end - pos;
    for (; pos < end; pos++) {
        *t_kv_at(engine, seg, pos) |= T_GARBAGE;
    }
    t_seg_guess(engine, seg, hash, result);
    engine->guesses[seg->slot] = *result;
}

/* The slot went through what stands in the pages. */
static void t_seg_check_slot(t_engine *engine, const rt_step_seg *seg)
{
    uint64_t hash = 0;
    for (uint32_t i = 0; i < seg->pos0; i++) {
        hash = t_hash_add(hash, *t_kv_at(engine, seg, i) - 1);
    }
    assert_true(hash == engine->slot_hash[seg->slot]);
}

static void t_load(t_engine *engine, const rt_step_state *load)
{
    const rt_step_seg *seg = &engine->step.segs[load->seg];
    uint32_t from = engine->limits.slot_max + load->state;
    assert_in_range(load->state, 0, engine->limits.state_max - 1);
    assert_int_equal(load->pos, seg->pos0);
    engine->slot_pos[seg->slot] = engine->slot_pos[from];
    engine->slot_hash[seg->slot] = engine->slot_hash[from];
    engine->guesses[seg->slot].n_draft = 0;
    engine->n_load++;
}

/* From the slot as it is before the segment's rows. */
static void t_save(t_engine *engine, const rt_step_state *save)
{
    const rt_step_seg *seg = &engine->step.segs[save->seg];
    uint32_t to = engine->limits.slot_max + save->state;
    assert_in_range(save->state, 0, engine->limits.state_max - 1);
    assert_int_equal(save->pos % engine->limits.page_tokens, 0);
    assert_in_range(save->pos, seg->pos0 + 1, seg->pos0 + seg->n_row);
    engine->slot_pos[to] = save->pos;
    engine->slot_hash[to] = engine->slot_hash[seg->slot];
    for (uint32_t i = 0; i < save->pos - seg->pos0; i++) {
        engine->slot_hash[to] = t_hash_add(engine->slot_hash[to], seg->tokens[i]);
    }
    engine->n_save++;
}

static void t_seg_compute(t_engine *engine, const rt_step_seg *seg, rt_step_result *result)
{
    t_seg_check_slot(engine, seg);
    for (uint32_t i = 0; i < seg->n_row; i++) {
        *t_kv_at(engine, seg, seg->pos0 + i) = seg->tokens[i] + 1;
    }
    engine->slot_pos[seg->slot] = seg->pos0 + seg->n_row;
    if (seg->sample) {
        t_seg_sample(engine, seg, result);
    }
    for (uint32_t i = seg->pos0; i < engine->slot_pos[seg->slot]; i++) {
        engine->slot_hash[seg->slot] = t_hash_add(engine->slot_hash[seg->slot], seg->tokens[i - seg->pos0]);
    }
}

/* A state is written by one of the step at most. */
static void t_check_saves(const t_engine *engine)
{
    for (uint32_t i = 0; i < engine->step.n_save; i++) {
        assert_in_range(engine->step.saves[i].seg, 0, engine->step.n_seg - 1);
        for (uint32_t k = 0; k < i; k++) {
            assert_int_not_equal(engine->step.saves[i].state, engine->step.saves[k].state);
        }
    }
}

bool t_begin(t_engine *engine, uint64_t now_ms)
{
    uint32_t n_row = 0, n_sample = 0;
    cm_mem_guard_begin("rt_sched_next");
    bool any = rt_sched_next(engine->sched, now_ms, &engine->step);
    cm_mem_guard_end();
    if (!any) {
        return false;
    }
    assert_int_equal(engine->step.number, ++engine->n_step);
    assert_in_range(engine->step.n_seg, 1, engine->limits.slot_max);
    for (uint32_t i = 0; i < engine->step.n_load; i++) {
        t_load(engine, &engine->step.loads[i]);
    }
    for (uint32_t i = 0; i < engine->step.n_seg; i++) {
        const rt_step_seg *seg = &engine->step.segs[i];
        t_seg_check(engine, seg);
        n_row += seg->n_row;
        n_sample += seg->sample;
        for (uint32_t k = 0; k < i; k++) {
            assert_int_not_equal(seg->slot, engine->step.segs[k].slot);
        }
    }
    assert_int_equal(n_row, engine->step.n_row);
    assert_int_equal(n_sample, engine->step.n_sample);
    assert_in_range(n_row, 1, engine->limits.row_max);
    t_check_saves(engine);
    for (uint32_t i = 0; i < engine->step.n_save; i++) {
        t_save(engine, &engine->step.saves[i]);
    }
    for (uint32_t i = 0, i_sample = 0; i < engine->step.n_seg; i++) {
        t_seg_compute(engine, &engine->step.segs[i], &engine->results[i_sample]);
        i_sample += engine->step.segs[i].sample;
    }
    return true;
}

void t_complete(t_engine *engine, uint64_t now_ms, rt_word_fn fn, void *ctx)
{
    cm_mem_guard_begin("rt_sched_complete");
    rt_sched_complete(engine->sched, now_ms, engine->took_ns, engine->results, fn, ctx);
    cm_mem_guard_end();
}

void t_ledger_is_zero(const rt_sched *sched)
{
    rt_sched_ledger ledger;
    rt_sched_ledger_get(sched, &ledger);
    assert_int_equal(ledger.n_seq, 0);
    assert_int_equal(ledger.n_running, 0);
    assert_int_equal(ledger.n_waiting, 0);
    assert_int_equal(ledger.n_slot, 0);
    assert_int_equal(ledger.n_page, 0);
    assert_int_equal(ledger.n_state_writing, 0);
    assert_true(rt_sched_next_deadline(sched) == UINT64_MAX);
}

const uint32_t t_prompt[T_CONTEXT_MAX] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4};

rt_seq_request t_request(uint64_t owner, uint64_t stream, uint32_t n_prompt, uint32_t tokens_max)
{
    return (rt_seq_request){
        .key = {owner, stream},
        .prompt = t_prompt,
        .n_prompt = n_prompt,
        .sampler = {.seed = stream, .temperature = 1, .top_p = 1, .tokens_max = tokens_max},
        .deadline_ms = UINT64_MAX,
    };
}

rt_sched_limits t_limits(void)
{
    return (rt_sched_limits){.slot_max = 4,
                             .queue_max = 4,
                             .row_max = 16,
                             .chunk_max = 8,
                             .page_max = 32,
                             .page_tokens = 4,
                             .context = 64,
                             .vocab = T_VOCAB};
}
