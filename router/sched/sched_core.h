/* The scheduler of a router as a pure machine: which sequences run, which rows make the next step, who owns
 * which KV page and state slot, what is told to whom. No I/O, no clock, no randomness: time is an argument,
 * the same object runs in production and in the simulator.
 *
 * A step: decode rows first (one per running sequence whose prompt is done), oldest first, then prefill
 * chunks up to the row budget, oldest first; every prefill chunk is at most chunk_max rows, so prefills
 * cannot starve decodes. With step_ns the budget is what takes about that long (pace_core.h), and while
 * several prompts want rows none gets more than half of it; a prompt that would leave a few rows for a step
 * of their own takes them along. One step is in flight at a time. The oldest running sequence has a row in
 * every step. Pages (KN_PAGE_TOKENS tokens each) are taken when a sequence grows into them; when none is left
 * the youngest running sequence is preempted: it gives back pages and slot, waits again at the head of the
 * queue, and starts over from prompt + emitted tokens, with the same output by the determinism contract. The
 * youngest itself waits for a page with what it has. Admission refuses a sequence that could not finish
 * alone. Cancel and deadline: a sequence in the step in flight is freed when that step completes, any other
 * at once.
 *
 * Guesses (speculation): with the tokens of a step come guesses of those that follow. In the next step they
 * stand behind their sequence's decode row, in rows that everything above left over, oldest first; a token is
 * drawn after each as long as it was right. Rows of right guesses count as computed, those of wrong ones are
 * computed again with what was drawn instead. A guess takes nothing from anybody: of pages it gets at most
 * the next one its sequence would grow into, never one promised to another, and that goes back with the step
 * if the guess was wrong. Guesses are forgotten by preemption. How many are made is decided by draft_core.h.
 *
 * Reuse (prefix_core.h): complete pages outlive their sequences, with copies of the slot where a page ended.
 * A sequence begins behind the longest beginning of its tokens that somebody had before it, with the same
 * bits by the determinism contract; the last token is always computed. Pages that are kept count as free:
 * admission is what it would be without them, and nobody is preempted for one.
 *
 * Memory: everything is taken at create; token logs are allocated per sequence at open, never during a step.
 * Thread: the loop's. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/status.h"
#include "router/sched/draft_core.h"
#include "router/sched/pace_core.h"
#include "router/sched/prefix_core.h"

typedef struct rt_sched rt_sched;

typedef struct rt_sched_limits {
    uint32_t slot_max;    /* sequences running at once: fixed state slots */
    uint32_t queue_max;   /* sequences waiting; more are refused with CM_E_CAPACITY */
    uint32_t row_max;     /* rows of one step */
    uint32_t chunk_max;   /* prefill rows of one sequence in one step */
    uint64_t step_ns;     /* that a step with prefill rows should take, about; 0: no matter */
    uint32_t page_max;    /* KV pages there are */
    uint32_t page_tokens; /* tokens of one page */
    uint32_t context;     /* longest prompt + generated */
    uint32_t vocab;
    uint32_t
        draft_max; /* tokens guessed ahead per sequence and step; 0: no speculation; at most RT_DRAFT_MAX */
    bool draft_always;  /* guess whether it pays or not; for tests */
    uint32_t state_max; /* states kept to go on from; 0: nothing is reused */
} rt_sched_limits;

/* Who asked: the pair names a sequence. owner is any number its user gives (a gateway link); 0 is not used.
 */
typedef struct rt_seq_key {
    uint64_t owner, stream;
} rt_seq_key;

/* As many as a gateway lets through; its end of sequence is one more stop id. */
enum { RT_STOP_MAX = 65, RT_BIAS_MAX = 1024, RT_LOGPROBS_TOP_MAX = 20 };

typedef struct rt_bias {
    uint32_t id;
    float bias;
} rt_bias;

/* What the fields do, and in which order: router/engine/sample.h. */
typedef struct rt_sampler {
    uint64_t seed;
    float temperature;        /* 0: greedy */
    float top_p, min_p;       /* min_p 0: off */
    uint32_t top_k;           /* 0: off */
    float repetition_penalty; /* 0 and 1: off */
    float frequency_penalty, presence_penalty;
    bool logprobs; /* of the chosen token and of the n_top likeliest */
    uint32_t n_top;
    uint32_t tokens_max, tokens_min;
    uint32_t n_stop, n_bias;
    uint32_t stop[RT_STOP_MAX];
    const rt_bias *bias; /* each id once; borrowed; copied by rt_sched_open */
} rt_sampler;

/* Natural logarithms of softmax(logits), before anything was done to the logits; -INFINITY for nothing at
 * all. */
typedef struct rt_logprobs {
    float token; /* the chosen one */
    uint32_t n_top;
    uint32_t top_id[RT_LOGPROBS_TOP_MAX]; /* likeliest first; ties: lower id first */
    float top[RT_LOGPROBS_TOP_MAX];
} rt_logprobs;

/* What the output must keep to: router/engine/constraint.h. The scheduler keeps it with its sequence. */
typedef struct rt_constraint rt_constraint;
void rt_constraint_destroy(rt_constraint *constraint); /* NULL is fine */

typedef struct rt_seq_request {
    rt_seq_key key;
    const uint32_t *prompt; /* borrowed; copied */
    uint32_t n_prompt;
    const uint32_t *emitted; /* generated before, elsewhere; borrowed; copied */
    uint32_t n_emitted;
    rt_sampler sampler;
    rt_constraint *constraint;   /* NULL: none; given when the sequence is opened, else still the caller's */
    uint64_t deadline_ms;        /* on the clock of now_ms; UINT64_MAX = none */
    uint8_t salt[RT_SALT_BYTES]; /* sequences of different salts reuse nothing of one another */
} rt_seq_request;

rt_sched *rt_sched_create(const rt_sched_limits *limits);
void rt_sched_destroy(rt_sched *sched);

/* CM_E_INVALID (ids, sampler; err names the field), CM_E_TOO_LONG (prompt + tokens_max over the context, or
 * over all pages), CM_E_CAPACITY (queue full), CM_E_EXISTS, CM_E_REFUSED (draining), CM_E_DEADLINE
 * (passed before it was opened). */
CM_MUST_CHECK cm_status rt_sched_open(rt_sched *sched, uint64_t now_ms, const rt_seq_request *request,
                                      cm_error *err);
/* No word about the sequence follows, not even its end. Unknown keys are fine. */
void rt_sched_cancel(rt_sched *sched, rt_seq_key key);
void rt_sched_cancel_owner(rt_sched *sched, uint64_t owner); /* its link is gone */
/* What ended sequences left is reused no more (rt_prefix_forget); running ones go on. */
void rt_sched_forget(rt_sched *sched);
/* Refuse new ones from now on; running ones finish. */
void rt_sched_drain(rt_sched *sched);

/* ---- the step ---- */

typedef struct rt_step_seg {
    rt_seq_key key;       /* whose rows these are */
    uint32_t slot;        /* state slot 0 .. slot_max - 1 */
    uint32_t pos0, n_row; /* positions pos0 .. pos0 + n_row - 1 */
    const uint32_t
        *tokens; /* [n_row], and without sample the one that follows; borrowed until rt_sched_complete */
    const uint32_t *pages; /* page numbers covering positions 0 .. pos0 + n_row - 1; borrowed likewise */
    uint32_t n_page;
    /* With sample a token is drawn after each of the last n_draft + 1 rows, as long as it is the one guessed
     * for the row after; the rest of this block says how. */
    bool sample;
    uint32_t n_draft;          /* the last n_draft of tokens are guesses */
    uint32_t draft_want;       /* guesses wanted for the step after this one */
    const rt_sampler *sampler; /* borrowed likewise */
    uint32_t stop_wait;        /* tokens to be drawn before a stop id may be */
    const uint32_t *log;       /* prompt, generated ids, guesses [pos0 + n_row]; borrowed likewise */
    uint32_t n_prompt;         /* of log */
    rt_constraint *constraint; /* NULL: none; whoever makes the masks follows the log with it */
    const uint32_t *masks; /* [n_draft + 1][(vocab + 31) / 32] the ids allowed after each of those rows, set
                              by who samples when there is a constraint; NULL: all */
    rt_logprobs *logprobs; /* [n_draft + 1], to be written by who samples; NULL: not asked for */
} rt_step_seg;

/* A state and a segment. Load: before anything else of the step the state is copied into the slot; pos is the
 * segment's first row. Save: what the slot would be with the rows below pos and no other is written into the
 * state; pos is a page's end among the segment's rows or behind the last of them. */
typedef struct rt_step_state {
    uint32_t seg, pos, state;
} rt_step_state;

typedef struct rt_step {
    uint64_t number; /* counts up from 1 */
    uint32_t n_seg, n_row, n_sample, n_load, n_save;
    rt_step_seg *segs;            /* [n_seg]; owned by the scheduler, valid until rt_sched_complete */
    rt_step_state *loads, *saves; /* [n_load], [n_save] likewise, by ascending seg */
} rt_step;

/* What a seg with sample gave. */
typedef struct rt_step_result {
    uint32_t n_token; /* 1 .. n_draft + 1: the guesses that were right, then one that was drawn after them */
    uint32_t n_draft; /* guesses for what follows; at most draft_want */
    uint32_t tokens[RT_DRAFT_MAX + 1], drafts[RT_DRAFT_MAX];
} rt_step_result;

/* The next step's rows; false: nothing to do. Never while a step is in flight. Ends sequences whose deadline
 * has passed. */
bool rt_sched_next(rt_sched *sched, uint64_t now_ms, rt_step *step_out);

typedef enum rt_seq_end { RT_GOING_ON, RT_END_STOP, RT_END_LENGTH, RT_END_FAILED } rt_seq_end;
/* One word to an owner about one sequence. */
typedef struct rt_word {
    rt_seq_key key;
    uint64_t offset;   /* index of the token among the generated ones */
    uint32_t n_cached; /* tokens of the prompt that were there already; 0 before it began to run */
    bool has_token;
    uint32_t token;
    const rt_logprobs *logprobs; /* of token, when asked for, else NULL; valid until rt_word_fn returns */
    rt_seq_end end;
    uint32_t stop_id; /* with RT_END_STOP */
    cm_status status; /* with RT_END_FAILED */
    const char *text; /* with RT_END_FAILED: NULL, or valid for the call */
} rt_word;
typedef void (*rt_word_fn)(void *ctx, const rt_word *word);

/* The step in flight is done after took_ns of computing: results[i] for the i-th seg with sample, in order.
 * Words, one per token, go to fn, which may open and cancel. A deadline that passed during the step ends the
 * sequence in the same word as its last token. */
void rt_sched_complete(rt_sched *sched, uint64_t now_ms, uint64_t took_ns, const rt_step_result *results,
                       rt_word_fn fn, void *ctx);
/* The step in flight could not be computed: its sequences end with RT_END_FAILED. */
void rt_sched_fail_step(rt_sched *sched, uint64_t now_ms, cm_status status, const char *text, rt_word_fn fn,
                        void *ctx);
/* Words that came up outside a step: deadlines passed while waiting. Call after rt_sched_next. */
void rt_sched_words(rt_sched *sched, rt_word_fn fn, void *ctx);
/* When rt_sched_next should be asked again for a deadline's sake; UINT64_MAX = no need, as while a step is in
 * flight. May be too early after a cancel, never too late. */
uint64_t rt_sched_next_deadline(const rt_sched *sched);

/* ---- the ledger: all zero at rest, but what is kept and what is counted ever ---- */
typedef struct rt_sched_ledger {
    uint32_t n_seq, n_running, n_waiting, n_slot, n_page, page_max;
    uint32_t n_page_kept, n_state; /* kept for others, also at rest: pages that no sequence has, states */
    uint32_t n_state_writing;
    uint64_t n_query_token, n_hit_token; /* ever: tokens of prompts, those of them that were there already */
    uint64_t n_preempted;                /* ever */
    uint64_t n_cancelled;                /* ever, deadlines included */
    /* Ever: decode rows with guesses behind them, those guesses, the right ones among them, tokens drawn
     * after decode rows and right guesses. */
    uint64_t n_draft, n_draft_token, n_accepted_token, n_decode_token;
} rt_sched_ledger;
void rt_sched_ledger_get(const rt_sched *sched, rt_sched_ledger *ledger_out);
