#include "tests/unit/schedule_run.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <xxhash.h>

#include <cmocka.h>

#include "common/base/rng.h"
#include "common/base/stats.h"
#include "tests/unit/schedule_cluster.h"
#include "tests/unit/schedule_constraint.h"

enum { TURNS_MAX = 100000, OWNER = 1 };

/* Looks at the rows of every step. */
typedef struct run_watch {
    const t_case *c;
    t_cluster *cluster;
    t_constraints *constraints;
    t_trace *trace;
    t_outcome *out;
    const t_outcome *alone;           /* NULL in that run itself */
    uint32_t slot_seq[T_ALL_MAX + 1]; /* whose slot it is */
    uint32_t switch_layer;            /* where the placement changes in this step; n_layer: nowhere */
} run_watch;

static void watch_logits(run_watch *w, uint32_t seq, uint32_t pos, uint64_t hash)
{
    uint32_t i = pos + 1 - w->c->seqs[seq].n_prompt;
    assert_in_range(i, 0, T_TOKENS_MAX - 1);
    w->out->logits[seq][i] = hash;
}

/* How many of a segment's rows are real: those of wrong guesses are nobody's. */
static uint32_t watch_real(const run_watch *w, const rt_step_seg *seg, uint32_t seq)
{
    uint32_t n = seg->n_row - seg->n_draft;
    while (n < seg->n_row &&
           seg->tokens[n] == w->alone->tokens[seq][seg->pos0 + n - w->c->seqs[seq].n_prompt]) {
        n++;
    }
    return n;
}

/* data: n_row rows of those that the point is about, from row0 on. */
static void watch_rows(run_watch *w, uint32_t layer, rt_tap_point point, const rt_step *step, uint32_t row0,
                       const uint8_t *data, uint64_t row_bytes, uint32_t n_row)
{
    uint32_t row = 0;
    for (uint32_t i = 0; i < step->n_seg; i++) {
        const rt_step_seg *seg = &step->segs[i];
        uint32_t seq = w->slot_seq[seg->slot],
                 skip = point == RT_TAP_LOGITS ? seg->n_row - 1 - seg->n_draft : 0;
        if (point == RT_TAP_LOGITS && !seg->sample) {
            continue;
        }
        uint32_t n_real = seq < w->c->n_seq ? watch_real(w, seg, seq) : 0;
        for (uint32_t k = skip; k < seg->n_row; k++, row++) {
            if (k >= n_real || row < row0 || row - row0 >= n_row) {
                continue;
            }
            uint64_t hash = XXH3_64bits(data + (row - row0) * row_bytes, row_bytes);
            if (point == RT_TAP_LOGITS) {
                watch_logits(w, seq, seg->pos0 + k, hash);
            }
            if (w->trace != NULL) {
                t_trace_row(w->trace, seq, seg->pos0 + k, layer, point, step->number, hash);
            }
        }
    }
}

static void watch_tap(void *ctx, uint32_t layer, rt_tap_point point, const rt_step *step, uint32_t row0,
                      const void *data, uint64_t row_bytes, uint32_t n_row)
{
    run_watch *w = ctx;
    if (point == RT_TAP_LOGITS || (w->trace != NULL && point < RT_TAP_LOGITS)) {
        watch_rows(w, layer, point, step, row0, data, row_bytes, n_row);
    }
    bool late = w->c->epoch_late && n_row < step->n_row;
    if (point == RT_TAP_FFN_IN && layer == w->switch_layer && (row0 > 0) == late) {
        t_cluster_switch(w->cluster);
        w->switch_layer = w->c->geometry.n_layer;
    }
}

static void watch_open(run_watch *w, const t_case *c, t_trace *trace, t_outcome *out)
{
    *w = (run_watch){.c = c,
                     .cluster = t_cluster_create(c),
                     .constraints = t_constraints_create(c),
                     .trace = trace,
                     .out = out,
                     .switch_layer = c->geometry.n_layer};
    memset(out, 0, sizeof(*out));
    rt_engine_set_tap(t_cluster_engine(w->cluster), watch_tap, w);
}

/* ---- alone ---- */

static void run_one(run_watch *w, uint32_t seq, uint64_t *number)
{
    const t_seq *s = &w->c->seqs[seq];
    uint32_t log[T_PROMPT_MAX + T_TOKENS_MAX], pages[8], n_log = s->n_prompt, n_done = 0,
                                                         n_page = w->c->page_max / w->c->n_seq;
    memcpy(log, s->prompt, sizeof(uint32_t) * s->n_prompt);
    for (uint32_t i = 0; i < n_page; i++) {
        pages[i] = seq * n_page + i;
    }
    w->slot_seq[seq] = seq;
    rt_constraint *constraint = t_constraint_make(w->constraints, s);
    while (n_log < s->n_prompt + s->sampler.tokens_max) {
        uint32_t n_row = n_log - n_done;
        rt_step_seg seg = {.slot = seq,
                           .constraint = constraint,
                           .log = log,
                           .n_prompt = s->n_prompt,
                           .pos0 = n_done,
                           .n_row = n_row,
                           .tokens = log + n_done,
                           .pages = pages,
                           .n_page = t_pages(n_log),
                           .sample = true,
                           .sampler = &s->sampler};
        rt_step_result result;
        rt_step step = {.number = ++*number, .n_seg = 1, .n_row = n_row, .n_sample = 1, .segs = &seg};
        n_done = n_log;
        assert_int_equal(rt_engine_step(t_cluster_engine(w->cluster), &step, &result), CM_OK);
        log[n_log++] = w->out->tokens[seq][w->out->n[seq]++] = result.tokens[0];
    }
    rt_constraint_destroy(constraint);
}

void t_run_alone(const t_case *c, t_trace *trace, t_outcome *out)
{
    static t_case alone;
    run_watch w;
    uint64_t number = 0;
    t_case_undisturbed(c, &alone);
    watch_open(&w, &alone, trace, out);
    for (uint32_t i = 0; i < c->n_seq; i++) {
        run_one(&w, i, &number);
    }
    t_cluster_destroy(w.cluster);
    t_constraints_destroy(w.constraints);
}

/* ---- together ---- */

typedef struct together {
    run_watch watch;
    rt_sched *sched;
    t_events *events;
    uint32_t n_ended; /* judged sequences */
} together;

static void together_word(void *ctx, const rt_word *word)
{
    together *t = ctx;
    uint32_t seq = (uint32_t)word->key.stream;
    assert_int_not_equal(word->end, RT_END_FAILED);
    if (seq >= t->watch.c->n_seq) {
        return;
    }
    assert_true(word->has_token);
    assert_int_equal(word->offset, t->watch.out->n[seq]);
    t->watch.out->tokens[seq][t->watch.out->n[seq]++] = word->token;
    t->n_ended += word->end == RT_END_LENGTH;
}

static void together_arrivals(together *t, uint32_t turn)
{
    for (uint32_t i = 0; i < t->watch.c->n_all; i++) {
        const t_seq *seq = &t->watch.c->seqs[i];
        cm_error err = {0};
        if (seq->arrival != turn) {
            continue;
        }
        rt_seq_request request = {.key = {OWNER, i},
                                  .prompt = seq->prompt,
                                  .n_prompt = seq->n_prompt,
                                  .sampler = seq->sampler,
                                  .constraint = t_constraint_make(t->watch.constraints, seq),
                                  .deadline_ms = UINT64_MAX};
        if (rt_sched_open(t->sched, turn, &request, &err) != CM_OK) {
            fail_msg("sequence %u: %s", i, err.text);
        }
    }
}

static void together_cancels(together *t, uint32_t turn, bool flying)
{
    for (uint32_t i = t->watch.c->n_seq; i < t->watch.c->n_all; i++) {
        const t_seq *seq = &t->watch.c->seqs[i];
        if (seq->cancel == turn && seq->cancel_flying == flying) {
            rt_sched_cancel(t->sched, (rt_seq_key){OWNER, i});
        }
    }
}

static void together_settle_slots(together *t, const rt_step *step)
{
    for (uint32_t i = 0; i < step->n_seg; i++) {
        const rt_step_seg *seg = &step->segs[i];
        t->watch.slot_seq[seg->slot] = (uint32_t)seg->key.stream;
        t->events->n_decode += seg->n_row - seg->n_draft == 1 && seg->pos0 != 0;
        t->events->n_chunk += seg->n_row - seg->n_draft > 1 || seg->pos0 == 0;
    }
    t->events->n_load += step->n_load;
    t->events->n_save += step->n_save;
}

/* Makes some guesses right, and counts them. */
static void together_hint(together *t, const rt_step *step, rt_step_result *results)
{
    const t_case *c = t->watch.c;
    for (uint32_t i = 0, i_sample = 0; i < step->n_seg; i++) {
        const rt_step_seg *seg = &step->segs[i];
        uint32_t seq = t->watch.slot_seq[seg->slot];
        if (!seg->sample) {
            continue;
        }
        rt_step_result *result = &results[i_sample++];
        t->events->n_guess += seg->n_draft;
        t->events->n_right += result->n_token - 1;
        for (uint32_t k = 0; seq < c->n_seq && k < result->n_draft; k++) {
            uint32_t pos = seg->pos0 + seg->n_row - seg->n_draft + result->n_token + k;
            if (cm_rng_at(c->seed, step->number, pos).word[0] % 4 < c->hint) {
                result->drafts[k] = t->watch.alone->tokens[seq][pos - c->seqs[seq].n_prompt];
            }
        }
    }
}

static void together_turn(together *t, uint32_t turn)
{
    const t_case *c = t->watch.c;
    rt_step step;
    rt_step_result results[T_ALL_MAX + 1];
    together_arrivals(t, turn);
    together_cancels(t, turn, false);
    bool any = rt_sched_next(t->sched, turn, &step);
    rt_sched_words(t->sched, together_word, t);
    if (any) {
        together_settle_slots(t, &step);
        /* a turn without a step cannot carry the change: the next one does */
        if (c->epoch_turn != 0 && turn >= c->epoch_turn && !t->events->epoch_changed) {
            t_cluster_prepare(t->watch.cluster);
            t->watch.switch_layer = c->epoch_layer;
            t->events->epoch_changed = true;
        }
        cm_status status = rt_engine_step(t_cluster_engine(t->watch.cluster), &step, results);
        if (status != CM_OK) {
            fail_msg("seed %llu step %llu: %s", (unsigned long long)c->seed, (unsigned long long)step.number,
                     cm_status_text(status));
        }
        together_hint(t, &step, results);
        t->watch.switch_layer = c->geometry.n_layer;
        t->events->n_step++;
    }
    together_cancels(t, turn, true);
    if (any) {
        rt_sched_complete(t->sched, turn, 0, results, together_word, t);
    }
}

void t_run_together(const t_case *c, const t_outcome *alone, t_trace *trace, t_outcome *out,
                    t_events *events_out)
{
    together t = {.events = events_out};
    rt_sched_limits limits;
    rt_sched_ledger ledger;
    int64_t retries = cm_stat_get(CM_STAT_exchange_retries);
    *events_out = (t_events){0};
    watch_open(&t.watch, c, trace, out);
    t.watch.alone = alone;
    rt_engine_sched_limits(t_cluster_engine(t.watch.cluster), &limits);
    assert_int_equal(limits.page_max, c->page_max);
    assert_int_equal(limits.state_max, c->state_max);
    limits.chunk_max = c->chunk_max;
    limits.queue_max = T_ALL_MAX;
    limits.draft_always = true;
    t.sched = rt_sched_create(&limits);
    for (uint32_t turn = 0; t.n_ended < c->n_seq; turn++) {
        assert_in_range(turn, 0, TURNS_MAX);
        together_turn(&t, turn);
    }
    rt_sched_cancel_owner(t.sched, OWNER); /* extras that outlived the others */
    rt_sched_ledger_get(t.sched, &ledger);
    assert_int_equal(ledger.n_seq + ledger.n_page + ledger.n_slot, 0);
    events_out->n_preempted = ledger.n_preempted;
    events_out->n_cancelled = ledger.n_cancelled;
    events_out->n_hit_token = ledger.n_hit_token;
    events_out->n_retry = (uint64_t)(cm_stat_get(CM_STAT_exchange_retries) - retries);
    rt_sched_destroy(t.sched);
    t_cluster_destroy(t.watch.cluster);
    t_constraints_destroy(t.watch.constraints);
}
