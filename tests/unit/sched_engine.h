/* A fake engine under the scheduler's tests. It keeps real pages and slots: what it samples is a hash of what
 * it finds in them, so a page owned twice, a lost position or a stale slot changes a sequence's output, which
 * is compared with the sequence computed alone. Its guesses are right as often as a test says; rows of wrong
 * ones leave garbage that nothing may read before it is computed again. A slot also knows the hash of all it
 * went through; states are copies of it, and what goes on from one must find the pages that it went through.
 * It checks every step against the
 * scheduler's contract, under the allocation guard. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "router/sched/sched_core.h"

enum { T_VOCAB = 61, T_CONTEXT_MAX = 96 };
enum { T_GARBAGE = 1u << 30 }; /* where a wrong guess was computed */

typedef struct t_rng {
    uint64_t key, n;
} t_rng;

uint32_t t_below(t_rng *rng, uint32_t n);
uint32_t t_between(t_rng *rng, uint32_t low, uint32_t high); /* both included */

/* What a sequence alone gives. */
typedef struct t_answer {
    uint32_t n, tokens[T_CONTEXT_MAX];
    rt_seq_end end;
    uint32_t stop_id;
} t_answer;

void t_alone(const uint32_t *prompt, uint32_t n_prompt, const rt_sampler *sampler, t_answer *out);

typedef struct t_engine {
    rt_sched_limits limits;
    rt_sched *sched;         /* owned */
    uint32_t *kv;            /* [page_max][page_tokens] token + 1; T_GARBAGE */
    uint32_t *slot_pos;      /* [slot_max + state_max] positions computed, wrong guesses not counted */
    uint64_t *slot_hash;     /* likewise: of their tokens */
    rt_step_result *guesses; /* [slot_max] n_draft and drafts: what was guessed last */
    uint64_t *page_step;     /* [page_max] step that used it last */
    uint64_t *page_written;  /* [page_max] step that wrote it last */
    rt_step step;            /* the one in flight */
    rt_step_result *results; /* [slot_max] what it sampled */
    uint32_t right_percent;  /* of the guesses */
    t_rng rng;
    uint64_t took_ns; /* told of every step */
    uint64_t n_fresh, n_step, n_right, n_wrong, n_load, n_save;
} t_engine;

void t_engine_init(t_engine *engine, const rt_sched_limits *limits);
void t_engine_fini(t_engine *engine);
/* Takes the next step and computes it; its tokens wait for t_complete. */
bool t_begin(t_engine *engine, uint64_t now_ms);
void t_complete(t_engine *engine, uint64_t now_ms, rt_word_fn fn, void *ctx);

void t_ledger_is_zero(const rt_sched *sched);

/* Limits and requests that a test bends to its needs: prompts are the first tokens of t_prompt. */
extern const uint32_t t_prompt[T_CONTEXT_MAX];
rt_sched_limits t_limits(void);
rt_seq_request t_request(uint64_t owner, uint64_t stream, uint32_t n_prompt, uint32_t tokens_max);
