#include "router/sched/sched_core.h"

#include <string.h>
#include <sys/queue.h>

#include "common/base/assert.h"
#include "common/base/map.h"
#include "common/base/mem.h"
#include "router/sched/pages.h"
#include "router/sched/request.h"
#include "router/sched/saves.h"
#include "router/sched/words.h"

typedef struct rt_seq rt_seq;
struct rt_seq {
    TAILQ_ENTRY(rt_seq) link; /* in running or waiting */
    rt_seq *same_hash;        /* next one whose key has the same hash */
    rt_seq_key key;
    uint64_t age; /* arrival number: smaller is older */
    uint64_t deadline_ms;
    rt_sampler sampler;
    rt_constraint *constraint; /* owned; NULL: none */
    uint32_t *log; /* [n_prompt + tokens_max] prompt, then all generated ids, then guesses; owned, with pages
                      and biases behind it */
    uint32_t n_prompt, n_log;
    uint32_t n_draft; /* guesses in log from n_log on; never reach the place of the last token */
    uint32_t n_done;  /* positions whose rows were computed into this slot and these pages */
    uint8_t salt[RT_SALT_BYTES];
    uint32_t *pages; /* [page_cap] the first n_tree are complete and in the tree, the others private */
    uint32_t n_page, n_tree, page_cap;
    uint32_t begin;    /* state that its first rows go on from; RT_PREFIX_NONE: none, or done */
    uint32_t n_cached; /* tokens of the prompt that were not computed when it first began */
    bool began;
    rt_saves saves;  /* what it leaves for others to go on from */
    uint32_t slot;   /* while running */
    uint32_t n_step; /* rows in the step being made or in flight, guesses not counted */
    uint32_t n_try;  /* guesses among its rows in that step */
    bool running;
    bool cancelled; /* only while in flight: freed when the step completes */
};
typedef TAILQ_HEAD(rt_seq_list, rt_seq) rt_seq_list;

/* Every running sequence is older than every waiting one: admission takes the head of waiting, preemption the
 * tail of running. Both lists are therefore ordered by age without ever being sorted. */
struct rt_sched {
    rt_sched_limits limits;
    bool draining;
    cm_pool seqs;
    cm_map keys; /* hash of a key -> first of the sequences with that hash */
    rt_prefix *prefix;
    rt_pages slots;
    rt_seq_list running, waiting;
    uint32_t n_running, n_waiting;
    rt_prefix_chain
        head_chain; /* of what was searched for last: a head that waits is asked for in every step */
    uint64_t head_age;
    uint64_t n_opened, n_preempted, n_cancelled, n_query_token, n_hit_token;
    uint64_t deadline_next; /* no sequence has an earlier one; may be too early after one is gone */

    uint64_t step_number;
    bool in_flight;
    uint32_t n_seg, n_row;
    rt_pace_share prompts;        /* rows of the step being made */
    uint32_t draft_want;          /* guesses asked for in the step in flight */
    rt_step_seg *segs;            /* [slot_max] */
    rt_seq **seg_seqs;            /* [slot_max] whose seg it is */
    rt_step_state *loads, *saves; /* [slot_max], [slot_max][RT_SAVE_MAX] */
    rt_logprobs *logprobs;        /* [slot_max][draft_max + 1] of segs */

    rt_words words;
    uint32_t step_word_max;

    rt_draft_core draft;
    rt_pace_core pace;
    uint64_t n_draft, n_draft_token, n_accepted_token, n_decode_token;
};

rt_sched *rt_sched_create(const rt_sched_limits *limits)
{
    CM_ASSERT(limits->slot_max > 0 && limits->queue_max > 0 && limits->queue_max < 1u << 24 &&
              limits->slot_max < 1u << 24);
    CM_ASSERT(limits->row_max > 0 && limits->chunk_max > 0 && limits->vocab > 0);
    CM_ASSERT(limits->page_max > 0 && limits->page_tokens > 0 && limits->context > 0);
    CM_ASSERT(limits->draft_max <= RT_DRAFT_MAX);
    rt_sched *sched = cm_alloc(sizeof(*sched));
    uint32_t n_seq_max = limits->slot_max + limits->queue_max, seg_token_max = limits->draft_max + 1;
    sched->limits = *limits;
    cm_pool_init(&sched->seqs, "sequences", sizeof(rt_seq), n_seq_max);
    cm_map_init(&sched->keys, n_seq_max);
    sched->prefix = rt_prefix_create(&(rt_prefix_limits){
        .page_max = limits->page_max, .page_tokens = limits->page_tokens, .state_max = limits->state_max});
    rt_pages_init(&sched->slots, "state slots", limits->slot_max);
    TAILQ_INIT(&sched->running);
    TAILQ_INIT(&sched->waiting);
    sched->deadline_next = UINT64_MAX;
    sched->segs = cm_alloc(sizeof(rt_step_seg) * limits->slot_max);
    sched->seg_seqs = cm_alloc(sizeof(rt_seq *) * limits->slot_max);
    sched->loads = cm_alloc(sizeof(rt_step_state) * limits->slot_max);
    sched->saves = cm_alloc(sizeof(rt_step_state) * limits->slot_max * RT_SAVE_MAX);
    sched->logprobs = cm_alloc(sizeof(rt_logprobs) * limits->slot_max * seg_token_max);
    sched->step_word_max = limits->slot_max * seg_token_max;
    rt_words_init(&sched->words, n_seq_max + sched->step_word_max); /* every deadline, then a step's words */
    sched->head_chain.hash = cm_alloc(sizeof(uint64_t) * (limits->context / limits->page_tokens + 1));
    sched->head_age = UINT64_MAX; /* nobody's */
    rt_draft_core_init(&sched->draft, limits->draft_max);
    rt_pace_core_init(&sched->pace, limits->step_ns, limits->row_max);
    return sched;
}

/* ---- keys ----
 * The map knows 64-bit hashes only; keys of equal hash hang in a chain and are told apart by comparing. */

static uint64_t key_hash(rt_seq_key key)
{
    return key.owner * 0x9E3779B97F4A7C15u + key.stream;
}

static bool key_equal(rt_seq_key a, rt_seq_key b)
{
    return a.owner == b.owner && a.stream == b.stream;
}

static rt_seq *keys_find(const rt_sched *sched, rt_seq_key key)
{
    rt_seq *seq = cm_map_get(&sched->keys, key_hash(key));
    while (seq != NULL && !key_equal(seq->key, key)) {
        seq = seq->same_hash;
    }
    return seq;
}

static void keys_put_first(rt_sched *sched, rt_seq *seq)
{
    cm_status status = cm_map_put(&sched->keys, key_hash(seq->key), seq);
    CM_ASSERT_MSG(status == CM_OK, "%s", cm_status_name(status)); /* as many entries as sequences */
}

static void keys_add(rt_sched *sched, rt_seq *seq)
{
    rt_seq *first = cm_map_get(&sched->keys, key_hash(seq->key));
    if (first == NULL) {
        keys_put_first(sched, seq);
    } else {
        seq->same_hash = first->same_hash;
        first->same_hash = seq;
    }
}

static void keys_remove(rt_sched *sched, rt_seq *seq)
{
    rt_seq *at = cm_map_get(&sched->keys, key_hash(seq->key));
    if (at == seq) {
        cm_map_remove(&sched->keys, key_hash(seq->key));
        if (seq->same_hash != NULL) {
            keys_put_first(sched, seq->same_hash);
        }
    } else {
        while (at->same_hash != seq) {
            at = at->same_hash;
        }
        at->same_hash = seq->same_hash;
    }
    seq->same_hash = NULL;
}

/* ---- what a sequence holds ---- */

static uint32_t pages_for(const rt_sched *sched, uint64_t n_token)
{
    return (uint32_t)((n_token + sched->limits.page_tokens - 1) / sched->limits.page_tokens);
}

static uint32_t seq_n_generated(const rt_seq *seq)
{
    return seq->n_log - seq->n_prompt;
}

/* Nothing but the row of its newest token is left to compute. */
static bool seq_decodes(const rt_seq *seq)
{
    return seq->n_log - seq->n_done == 1;
}

/* Pages it holds or will hold soon: those of its log and one more to grow into. */
static uint32_t seq_page_goal(const rt_sched *sched, const rt_seq *seq)
{
    uint32_t n = pages_for(sched, seq->n_log) + 1;
    return n < seq->page_cap ? n : seq->page_cap;
}

static void seq_put_pages(rt_sched *sched, rt_seq *seq, uint32_t n_kept)
{
    CM_ASSERT(n_kept >= seq->n_tree);
    while (seq->n_page > n_kept) {
        rt_prefix_page_put(sched->prefix, seq->pages[--seq->n_page]);
    }
}

/* The last of its pages in the tree. */
static uint32_t seq_tree_page(const rt_seq *seq)
{
    return seq->n_tree > 0 ? seq->pages[seq->n_tree - 1] : RT_PREFIX_NONE;
}

/* From running to nowhere: pages and slot go back, what was computed or guessed is forgotten, but by the
 * tree. */
static void seq_stop_running(rt_sched *sched, rt_seq *seq)
{
    rt_saves_stop(&seq->saves, sched->prefix);
    seq_put_pages(sched, seq, seq->n_tree);
    rt_prefix_release(sched->prefix, seq_tree_page(seq));
    seq->n_page = seq->n_tree = 0;
    rt_pages_put(&sched->slots, seq->slot);
    seq->n_done = 0;
    seq->n_draft = 0;
    seq->n_step = 0;
    seq->running = false;
    TAILQ_REMOVE(&sched->running, seq, link);
    sched->n_running--;
}

static void seq_free(rt_sched *sched, rt_seq *seq)
{
    if (seq->running) {
        seq_stop_running(sched, seq);
    } else {
        TAILQ_REMOVE(&sched->waiting, seq, link);
        sched->n_waiting--;
    }
    if (!seq->cancelled) {
        keys_remove(sched, seq);
    }
    rt_constraint_destroy(seq->constraint);
    cm_free(seq->log);
    cm_pool_put(&sched->seqs, seq);
    if (sched->seqs.n_used == 0) {
        sched->deadline_next = UINT64_MAX;
    }
}

void rt_sched_destroy(rt_sched *sched)
{
    while (!TAILQ_EMPTY(&sched->running)) {
        seq_free(sched, TAILQ_FIRST(&sched->running));
    }
    while (!TAILQ_EMPTY(&sched->waiting)) {
        seq_free(sched, TAILQ_FIRST(&sched->waiting));
    }
    cm_pool_fini(&sched->seqs);
    cm_map_fini(&sched->keys);
    rt_prefix_destroy(sched->prefix);
    rt_pages_fini(&sched->slots);
    cm_free(sched->segs);
    cm_free(sched->loads);
    cm_free(sched->saves);
    cm_free(sched->seg_seqs);
    cm_free(sched->logprobs);
    rt_words_fini(&sched->words);
    cm_free(sched->head_chain.hash);
    cm_free(sched);
}

/* ---- words ---- */

static rt_word *seq_add_word(rt_sched *sched, const rt_seq *seq)
{
    return rt_words_add(
        &sched->words, (rt_word){.key = seq->key, .offset = seq_n_generated(seq), .n_cached = seq->n_cached});
}

static void word_fail(rt_word *word, cm_status status, const char *text)
{
    word->end = RT_END_FAILED;
    word->status = status;
    word->text = text;
}

static void word_fail_deadline(rt_sched *sched, rt_word *word)
{
    sched->n_cancelled++;
    word_fail(word, CM_E_DEADLINE, "the deadline passed before the answer was complete");
}

void rt_sched_words(rt_sched *sched, rt_word_fn fn, void *ctx)
{
    rt_words_tell(&sched->words, fn, ctx);
}

/* ---- open, cancel, drain ---- */

static cm_status seq_create(rt_sched *sched, const rt_seq_request *request, rt_seq **seq_out, cm_error *err)
{
    uint32_t n_token = request->n_prompt + request->sampler.tokens_max, page_cap = pages_for(sched, n_token);
    void *object;
    if (sched->n_waiting >= sched->limits.queue_max || cm_pool_get(&sched->seqs, &object) != CM_OK) {
        return cm_error_set(err, CM_E_CAPACITY, NULL,
                            "%u sequences run and %u wait, no more may wait: try again later",
                            sched->n_running, sched->n_waiting);
    }
    rt_seq *seq = object;
    seq->log = cm_try_alloc(sizeof(uint32_t) * ((size_t)n_token + page_cap) +
                            sizeof(rt_bias) * request->sampler.n_bias);
    if (seq->log == NULL) {
        cm_pool_put(&sched->seqs, seq);
        return cm_error_set(err, CM_E_CAPACITY, NULL, "no memory for a log of %u tokens: try again later",
                            n_token);
    }
    seq->pages = seq->log + n_token;
    seq->page_cap = page_cap;
    seq->key = request->key;
    seq->deadline_ms = request->deadline_ms;
    seq->sampler = request->sampler;
    rt_bias *bias = (rt_bias *)(seq->pages + page_cap);
    if (seq->sampler.n_bias > 0) {
        memcpy(bias, request->sampler.bias, sizeof(rt_bias) * seq->sampler.n_bias);
    }
    seq->sampler.bias = bias;
    memcpy(seq->salt, request->salt, RT_SALT_BYTES);
    seq->n_prompt = request->n_prompt;
    seq->n_log = request->n_prompt + request->n_emitted;
    memcpy(seq->log, request->prompt, sizeof(uint32_t) * request->n_prompt);
    if (request->n_emitted > 0) {
        memcpy(seq->log + request->n_prompt, request->emitted, sizeof(uint32_t) * request->n_emitted);
    }
    *seq_out = seq;
    return CM_OK;
}

cm_status rt_sched_open(rt_sched *sched, uint64_t now_ms, const rt_seq_request *request, cm_error *err)
{
    rt_seq *seq = NULL;
    if (sched->draining) {
        return cm_error_set(err, CM_E_REFUSED, NULL, "this router is being drained: ask another one");
    }
    CM_TRY(rt_request_check(&sched->limits, request, err));
    if (keys_find(sched, request->key) != NULL) {
        return cm_error_set(err, CM_E_EXISTS, "stream", "stream %llu of this gateway is open already",
                            (unsigned long long)request->key.stream);
    }
    if (now_ms >= request->deadline_ms) {
        return cm_error_set(err, CM_E_DEADLINE, "deadline_ms",
                            "the deadline passed before the sequence was opened");
    }
    CM_TRY(seq_create(sched, request, &seq, err));
    seq->constraint = request->constraint;
    seq->age = sched->n_opened++;
    keys_add(sched, seq);
    TAILQ_INSERT_TAIL(&sched->waiting, seq, link);
    sched->n_waiting++;
    if (seq->deadline_ms < sched->deadline_next) {
        sched->deadline_next = seq->deadline_ms;
    }
    return CM_OK;
}

static void seq_cancel(rt_sched *sched, rt_seq *seq)
{
    sched->n_cancelled++;
    if (sched->in_flight && seq->n_step > 0) {
        keys_remove(sched, seq); /* unknown from now on, though the engine still writes its slot and pages */
        seq->cancelled = true;
    } else {
        seq_free(sched, seq);
    }
}

void rt_sched_cancel(rt_sched *sched, rt_seq_key key)
{
    rt_seq *seq = keys_find(sched, key);
    rt_words_forget(&sched->words, key);
    if (seq != NULL) {
        seq_cancel(sched, seq);
    }
}

static void list_cancel_owner(rt_sched *sched, rt_seq_list *list, uint64_t owner)
{
    for (rt_seq *seq = TAILQ_FIRST(list), *next; seq != NULL; seq = next) {
        next = TAILQ_NEXT(seq, link);
        if (seq->key.owner == owner && !seq->cancelled) {
            seq_cancel(sched, seq);
        }
    }
}

void rt_sched_cancel_owner(rt_sched *sched, uint64_t owner)
{
    rt_words_forget_owner(&sched->words, owner);
    list_cancel_owner(sched, &sched->running, owner);
    list_cancel_owner(sched, &sched->waiting, owner);
}

void rt_sched_forget(rt_sched *sched)
{
    rt_prefix_forget(sched->prefix);
}

void rt_sched_drain(rt_sched *sched)
{
    sched->draining = true;
}

/* ---- deadlines ---- */

static void list_expire(rt_sched *sched, rt_seq_list *list, uint64_t now_ms)
{
    for (rt_seq *seq = TAILQ_FIRST(list), *next; seq != NULL; seq = next) {
        next = TAILQ_NEXT(seq, link);
        /* without room for its word it stays until the words are fetched */
        if (now_ms >= seq->deadline_ms && sched->words.n < sched->words.n_max - sched->step_word_max) {
            word_fail_deadline(sched, seq_add_word(sched, seq));
            seq_free(sched, seq);
        } else if (seq->deadline_ms < sched->deadline_next) {
            sched->deadline_next = seq->deadline_ms;
        }
    }
}

static void sched_expire(rt_sched *sched, uint64_t now_ms)
{
    if (now_ms >= sched->deadline_next) {
        sched->deadline_next = UINT64_MAX;
        list_expire(sched, &sched->running, now_ms);
        list_expire(sched, &sched->waiting, now_ms);
    }
}

uint64_t rt_sched_next_deadline(const rt_sched *sched)
{
    return sched->in_flight ? UINT64_MAX : sched->deadline_next;
}

/* ---- making a step ----
 * Running sequences get pages and rows oldest first, so a younger one can lose its pages before it is reached
 * but never after; then the head of the queue is admitted while rows, slots and pages last. The oldest always
 * gets a row: it may take the pages of all others, and alone it fits. Decode rows are never crowded out by
 * prefill chunks: a sequence is admitted only into rows that all older ones left over, and nobody's need of
 * rows grows, so only the youngest is ever short. Guesses come last and take from nobody: rows that are left,
 * and of pages only the one that their sequence will grow into, if it is not promised to another. */

static void seq_preempt(rt_sched *sched, rt_seq *seq)
{
    CM_ASSERT_MSG(seq->n_step == 0, "sequence of age %llu is in the step already",
                  (unsigned long long)seq->age);
    seq_stop_running(sched, seq);
    CM_ASSERT(TAILQ_EMPTY(&sched->waiting) || TAILQ_FIRST(&sched->waiting)->age > seq->age);
    TAILQ_INSERT_HEAD(&sched->waiting, seq, link);
    sched->n_waiting++;
    sched->n_preempted++;
}

/* Pages for the first n_token positions, from younger sequences if need be; as many as there are. */
static void seq_take_pages(rt_sched *sched, rt_seq *seq, uint32_t n_token)
{
    uint32_t n_page = pages_for(sched, n_token);
    CM_ASSERT_MSG(n_page <= seq->page_cap, "%u pages of %u", n_page, seq->page_cap);
    while (seq->n_page < n_page) {
        if (rt_prefix_page_take(sched->prefix, &seq->pages[seq->n_page])) {
            seq->n_page++;
            continue;
        }
        rt_seq *youngest = TAILQ_LAST(&sched->running, rt_seq_list);
        if (youngest == seq) {
            return; /* older ones hold the rest: wait for them with what was computed */
        }
        seq_preempt(sched, youngest);
    }
}

static uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static void sched_share_rows(rt_sched *sched)
{
    uint32_t n_decode = 0, n_prompt = min_u32(sched->n_waiting, sched->slots.n_free);
    rt_seq *seq;
    TAILQ_FOREACH (seq, &sched->running, link) {
        n_decode += seq_decodes(seq);
        n_prompt += !seq_decodes(seq);
    }
    sched->prompts = rt_pace_share_begin(&sched->pace, n_decode, n_prompt);
}

/* Gives seq the rows it needs, as far as the step has rows left and pages cover them. */
static void seq_take_rows(rt_sched *sched, rt_seq *seq)
{
    uint32_t n_row = min_u32(min_u32(seq->n_log - seq->n_done, sched->limits.chunk_max),
                             sched->limits.row_max - sched->n_row);
    if (!seq_decodes(seq) && sched->limits.step_ns != 0) {
        n_row = rt_pace_share_take(&sched->prompts, n_row);
    }
    if (n_row > 0) {
        seq_take_pages(sched, seq, seq->n_done + n_row);
        uint64_t n_covered = (uint64_t)seq->n_page * sched->limits.page_tokens;
        n_row = n_covered - seq->n_done < n_row ? (uint32_t)(n_covered - seq->n_done) : n_row;
    }
    seq->n_step = n_row;
    seq->n_try = 0;
    sched->n_row += n_row;
}

static void sched_serve_running(rt_sched *sched)
{
    rt_seq *seq;
    TAILQ_FOREACH (seq, &sched->running, link) {
        seq_take_rows(sched, seq);
    }
}

/* Pages that running sequences will want soon. */
static uint64_t sched_promised(const rt_sched *sched)
{
    uint64_t n = 0;
    const rt_seq *seq;
    TAILQ_FOREACH (seq, &sched->running, link) {
        n += seq_page_goal(sched, seq) - seq->n_page;
    }
    return n;
}

/* What others computed of its tokens, as far as it can go on from there. */
static void seq_find(rt_sched *sched, const rt_seq *seq, rt_prefix_hit *hit_out)
{
    *hit_out = (rt_prefix_hit){.page = RT_PREFIX_NONE, .state = RT_PREFIX_NONE};
    if (sched->limits.state_max > 0) {
        if (sched->head_age != seq->age) {
            sched->head_age = seq->age;
            sched->head_chain.n = 0;
        }
        CM_ASSERT_MSG(seq->n_log <= sched->limits.context, "%u tokens", seq->n_log);
        rt_prefix_find(sched->prefix, seq->salt, seq->log, seq->n_log, &sched->head_chain, hit_out);
    }
}

/* It runs from here on, behind what was found. */
static void seq_begin(rt_sched *sched, rt_seq *seq, const rt_prefix_hit *hit)
{
    rt_prefix_hold(sched->prefix, hit, seq->pages);
    seq->n_page = seq->n_tree = hit->n_page;
    seq->n_done = hit->n_page * sched->limits.page_tokens;
    rt_saves_begin(&seq->saves, seq->n_log, hit->n_known * sched->limits.page_tokens);
    seq->begin = hit->state;
    if (!seq->began) {
        seq->began = true;
        seq->n_cached = seq->n_done < seq->n_prompt ? seq->n_done : seq->n_prompt;
        sched->n_query_token += sched->limits.state_max > 0 ? seq->n_prompt : 0;
        sched->n_hit_token += seq->n_cached;
    }
}

static void sched_admit(rt_sched *sched)
{
    /* Promised pages are not given away: a sequence that is preempted right after its prefill has worked for
     * nothing. */
    uint64_t n_promised = sched_promised(sched);
    rt_seq *seq;
    while (sched->n_row < sched->limits.row_max && sched->prompts.left > 0 && sched->prompts.most > 0 &&
           (seq = TAILQ_FIRST(&sched->waiting)) != NULL) {
        uint32_t goal = seq_page_goal(sched, seq);
        rt_prefix_hit hit;
        if (sched->slots.n_free == 0) {
            break;
        }
        seq_find(sched, seq, &hit);
        if (rt_prefix_page_room(sched->prefix) - hit.n_kept < n_promised + goal - hit.n_page ||
            !rt_pages_take(&sched->slots, &seq->slot)) {
            break;
        }
        TAILQ_REMOVE(&sched->waiting, seq, link);
        sched->n_waiting--;
        TAILQ_INSERT_TAIL(&sched->running, seq, link);
        sched->n_running++;
        seq->running = true;
        seq_begin(sched, seq, &hit);
        seq_take_rows(sched, seq);
        CM_ASSERT_MSG(seq->n_step > 0, "%u pages of room and none for it",
                      rt_prefix_page_room(sched->prefix)); /* what it goes on from is not kept for it */
        n_promised += goal - seq->n_page;
    }
}

static void sched_take_guesses(rt_sched *sched)
{
    uint64_t n_promised = sched->limits.draft_max > 0 ? sched_promised(sched) : 0;
    rt_seq *seq;
    TAILQ_FOREACH (seq, &sched->running, link) {
        uint32_t n = min_u32(seq->n_draft, sched->limits.row_max - sched->n_row);
        if (seq->n_step == 0 || n == 0) {
            continue;
        }
        uint32_t goal = seq_page_goal(sched, seq);
        if (pages_for(sched, (uint64_t)seq->n_log + n) > seq->n_page && seq->n_page < goal &&
            rt_prefix_page_room(sched->prefix) > n_promised - (goal - seq->n_page)) {
            bool taken = rt_prefix_page_take(sched->prefix, &seq->pages[seq->n_page++]);
            CM_ASSERT(taken);
            n_promised--;
        }
        uint64_t n_covered = (uint64_t)seq->n_page * sched->limits.page_tokens - seq->n_log;
        seq->n_try = n_covered < n ? (uint32_t)n_covered : n;
        sched->n_row += seq->n_try;
    }
}

/* At most n guesses, as many as could be of use after this step, which gives seq at least one token and with
 * all its guesses right n_try + 1. */
static uint32_t seq_draft_want(const rt_sched *sched, const rt_seq *seq, uint32_t n)
{
    uint32_t n_token = seq_n_generated(seq) + 1, n_log = seq->n_log + seq->n_try + 1;
    n = min_u32(n, n_token < seq->sampler.tokens_max ? seq->sampler.tokens_max - n_token - 1 : 0);
    return min_u32(n, sched->limits.context - min_u32(n_log, sched->limits.context));
}

static void sched_add_segs(rt_sched *sched, bool decode, rt_step *step)
{
    rt_seq *seq;
    TAILQ_FOREACH (seq, &sched->running, link) {
        if (seq->n_step == 0 || seq_decodes(seq) != decode) {
            continue;
        }
        bool sample = seq->n_done + seq->n_step == seq->n_log;
        uint32_t i = step->n_seg++;
        sched->seg_seqs[i] = seq;
        step->segs[i] = (rt_step_seg){
            .key = seq->key,
            .slot = seq->slot,
            .pos0 = seq->n_done,
            .n_row = seq->n_step + seq->n_try,
            .tokens = seq->log + seq->n_done,
            .pages = seq->pages,
            .n_page = pages_for(sched, (uint64_t)seq->n_done + seq->n_step + seq->n_try),
            .sample = sample,
            .n_draft = seq->n_try,
            .sampler = sample ? &seq->sampler : NULL,
            .stop_wait = sample && seq->sampler.tokens_min > seq_n_generated(seq)
                             ? seq->sampler.tokens_min - seq_n_generated(seq)
                             : 0,
            .log = sample ? seq->log : NULL,
            .n_prompt = sample ? seq->n_prompt : 0,
            .constraint = sample ? seq->constraint : NULL,
            .logprobs = sample && seq->sampler.logprobs
                            ? &sched->logprobs[(size_t)i * (sched->limits.draft_max + 1)]
                            : NULL,
        };
        step->n_row += seq->n_step + seq->n_try;
        step->n_sample += sample;
    }
}

static void sched_add_states(rt_sched *sched, rt_step *step)
{
    for (uint32_t i = 0; i < step->n_seg && sched->limits.state_max > 0; i++) {
        rt_seq *seq = sched->seg_seqs[i];
        if (seq->begin != RT_PREFIX_NONE) {
            step->loads[step->n_load++] =
                (rt_step_state){.seg = i, .pos = step->segs[i].pos0, .state = seq->begin};
            seq->begin = RT_PREFIX_NONE;
        }
        const rt_step_seg *seg = &step->segs[i];
        uint32_t end = seg->pos0 + seg->n_row;
        rt_saves_choose(&seq->saves, sched->prefix, sched->limits.page_tokens, seg->pos0, end - seg->n_draft,
                        end);
        for (uint32_t k = 0; k < seq->saves.n; k++) {
            step->saves[step->n_save++] =
                (rt_step_state){.seg = i, .pos = seq->saves.at[k].pos, .state = seq->saves.at[k].state};
        }
    }
}

static void sched_want_guesses(rt_sched *sched, const rt_step *step)
{
    sched->draft_want = sched->limits.draft_always ? sched->limits.draft_max
                                                   : rt_draft_core_want(&sched->draft, step->n_sample);
    for (uint32_t i = 0; i < step->n_seg; i++) {
        if (step->segs[i].sample) {
            step->segs[i].draft_want = seq_draft_want(sched, sched->seg_seqs[i], sched->draft_want);
        }
    }
}

bool rt_sched_next(rt_sched *sched, uint64_t now_ms, rt_step *step_out)
{
    CM_ASSERT(!sched->in_flight);
    sched_expire(sched, now_ms);
    sched->n_row = 0;
    sched_share_rows(sched);
    sched_serve_running(sched);
    sched_admit(sched);
    if (sched->n_row == 0) {
        CM_ASSERT_MSG(sched->seqs.n_used == 0, "%u running and %u waiting stand still", sched->n_running,
                      sched->n_waiting);
        return false;
    }
    rt_step step = {
        .number = ++sched->step_number, .segs = sched->segs, .loads = sched->loads, .saves = sched->saves};
    sched_take_guesses(sched);
    sched_add_segs(sched, true, &step);
    sched_add_segs(sched, false, &step);
    sched_add_states(sched, &step);
    sched_want_guesses(sched, &step);
    CM_ASSERT_MSG(step.n_row == sched->n_row && step.n_row <= sched->limits.row_max, "%u rows of %u",
                  step.n_row, sched->limits.row_max);
    sched->n_seg = step.n_seg;
    sched->in_flight = true;
    *step_out = step;
    return true;
}

/* ---- the end of a step ---- */

static bool seq_stops_at(const rt_seq *seq, uint32_t token)
{
    for (uint32_t i = 0; i < seq->sampler.n_stop; i++) {
        if (seq->sampler.stop[i] == token) {
            return true;
        }
    }
    return false;
}

/* Token i of seg's result. */
static rt_word *seq_take_token(rt_sched *sched, rt_seq *seq, const rt_step_seg *seg, uint32_t i,
                               uint32_t token)
{
    rt_word *word = seq_add_word(sched, seq);
    CM_ASSERT_MSG(token < sched->limits.vocab, "token %u of %u", token, sched->limits.vocab);
    if (seq_stops_at(seq, token)) {
        CM_ASSERT_MSG(seg->stop_wait <= i || seq->constraint != NULL,
                      "stop id %u after %u tokens of at least %u", token, seq_n_generated(seq),
                      seq->sampler.tokens_min);
        word->end = RT_END_STOP;
        word->stop_id = token;
        return word;
    }
    seq->log[seq->n_log++] = token;
    word->has_token = true;
    word->token = token;
    word->logprobs = seg->logprobs != NULL ? &seg->logprobs[i] : NULL;
    word->end = seq_n_generated(seq) == seq->sampler.tokens_max ? RT_END_LENGTH : RT_GOING_ON;
    return word;
}

/* What the step gave seq: tokens up to its end, if that is among them, else guesses for its next step.
 * Returns the last word. Pages that only wrong guesses needed go back, so that guessing costs nobody a page.
 */
static rt_word *seq_take_result(rt_sched *sched, rt_seq *seq, const rt_step_seg *seg,
                                const rt_step_result *result)
{
    CM_ASSERT_MSG(result->n_token >= 1 && result->n_token <= seg->n_draft + 1, "%u tokens from %u guesses",
                  result->n_token, seg->n_draft);
    CM_ASSERT_MSG(result->n_draft <= seg->draft_want, "%u guesses, %u wanted", result->n_draft,
                  seg->draft_want);
    rt_word *word;
    uint32_t i = 0;
    do {
        CM_ASSERT(i + 1 == result->n_token || result->tokens[i] == seg->log[seq->n_log]);
        word = seq_take_token(sched, seq, seg, i, result->tokens[i]);
        i++;
    } while (word->end == RT_GOING_ON && i < result->n_token);
    seq->n_done += i - 1;
    if (word->end == RT_GOING_ON) {
        CM_ASSERT(seq_decodes(seq));
        seq->n_draft = min_u32(result->n_draft, seq->sampler.tokens_max - seq_n_generated(seq) - 1);
        for (i = 0; i < seq->n_draft; i++) {
            CM_ASSERT(result->drafts[i] < sched->limits.vocab);
            seq->log[seq->n_log + i] = result->drafts[i];
        }
        seq_put_pages(sched, seq, min_u32(seq->n_page, pages_for(sched, seq->n_log)));
    }
    return word;
}

/* Pages that are complete now go to the tree, with the states that were written; of the page itself perhaps
 * another one, with the same bytes, since two may compute the same at once. */
static void seq_share(rt_sched *sched, rt_seq *seq)
{
    uint32_t page_tokens = sched->limits.page_tokens;
    while (sched->limits.state_max > 0 && (seq->n_tree + 1) * page_tokens <= seq->n_done) {
        seq->pages[seq->n_tree] =
            rt_prefix_add(sched->prefix, seq->salt, seq_tree_page(seq), seq->pages[seq->n_tree],
                          seq->log + (size_t)seq->n_tree * page_tokens);
        seq->n_tree++;
    }
    rt_saves_hang(&seq->saves, sched->prefix, page_tokens, seq->pages, seq->n_done);
}

/* The step is over for seq, whose newest word, if it has one, is given: ends it or lets it run on. */
static void seq_settle(rt_sched *sched, rt_seq *seq, uint64_t now_ms, rt_word *word)
{
    seq->n_step = 0;
    if ((word == NULL || word->end == RT_GOING_ON) && now_ms >= seq->deadline_ms) {
        word = word != NULL ? word : seq_add_word(sched, seq);
        word_fail_deadline(sched, word);
    }
    if (word != NULL && word->end != RT_GOING_ON) {
        seq_free(sched, seq);
    }
}

/* For the counters and for who decides whether guessing pays. */
static void sched_judge(rt_sched *sched, uint64_t took_ns, const rt_step_result *results)
{
    rt_draft_step step = {.n_want = sched->draft_want, .took_ns = took_ns};
    for (uint32_t i = 0, i_sample = 0; i < sched->n_seg; i++) {
        const rt_step_seg *seg = &sched->segs[i];
        const rt_step_result *result = seg->sample ? &results[i_sample++] : NULL;
        if (!seq_decodes(sched->seg_seqs[i])) {
            step.prefill = true;
            continue;
        }
        step.n_decode++;
        sched->n_decode_token += result->n_token;
        sched->n_draft += seg->n_draft > 0;
        sched->n_draft_token += seg->n_draft;
        sched->n_accepted_token += result->n_token - 1;
        for (uint32_t k = 0; k < seg->n_draft; k++) {
            step.n_guess[k]++;
            step.n_right[k] += k + 1 < result->n_token;
        }
    }
    rt_draft_core_observe(&sched->draft, &step);
    if (step.prefill) {
        rt_pace_core_observe(&sched->pace, sched->n_row, sched->prompts.full, took_ns);
    }
}

void rt_sched_complete(rt_sched *sched, uint64_t now_ms, uint64_t took_ns, const rt_step_result *results,
                       rt_word_fn fn, void *ctx)
{
    CM_ASSERT(sched->in_flight);
    sched_judge(sched, took_ns, results);
    for (uint32_t i = 0, i_sample = 0; i < sched->n_seg; i++) {
        const rt_step_seg *seg = &sched->segs[i];
        rt_seq *seq = sched->seg_seqs[i];
        rt_word *word = NULL;
        const rt_step_result *result = seg->sample ? &results[i_sample++] : NULL;
        if (seq->cancelled) {
            seq_free(sched, seq);
            continue;
        }
        seq->n_done += seg->n_row - seg->n_draft;
        if (result != NULL) {
            word = seq_take_result(sched, seq, seg, result);
        }
        seq_share(sched, seq);
        seq_settle(sched, seq, now_ms, word);
    }
    sched->in_flight = false;
    rt_sched_words(sched, fn, ctx);
}

void rt_sched_fail_step(rt_sched *sched, uint64_t now_ms, cm_status status, const char *text, rt_word_fn fn,
                        void *ctx)
{
    CM_ASSERT(sched->in_flight);
    for (uint32_t i = 0; i < sched->n_seg; i++) {
        rt_seq *seq = sched->seg_seqs[i];
        if (!seq->cancelled) {
            rt_word *word = seq_add_word(sched, seq);
            if (now_ms >= seq->deadline_ms) {
                word_fail_deadline(sched, word);
            } else {
                word_fail(word, status, text);
            }
        }
        seq_free(sched, seq);
    }
    sched->in_flight = false;
    rt_sched_words(sched, fn, ctx);
}

void rt_sched_ledger_get(const rt_sched *sched, rt_sched_ledger *ledger_out)
{
    rt_prefix_ledger prefix;
    rt_prefix_ledger_get(sched->prefix, &prefix);
    *ledger_out = (rt_sched_ledger){
        .n_seq = sched->seqs.n_used,
        .n_running = sched->n_running,
        .n_waiting = sched->n_waiting,
        .n_slot = sched->slots.n_max - sched->slots.n_free,
        .n_page = prefix.n_held,
        .page_max = sched->limits.page_max,
        .n_page_kept = prefix.n_kept,
        .n_state = prefix.n_state,
        .n_state_writing = prefix.n_writing,
        .n_query_token = sched->n_query_token,
        .n_hit_token = sched->n_hit_token,
        .n_preempted = sched->n_preempted,
        .n_cancelled = sched->n_cancelled,
        .n_draft = sched->n_draft,
        .n_draft_token = sched->n_draft_token,
        .n_accepted_token = sched->n_accepted_token,
        .n_decode_token = sched->n_decode_token,
    };
}
