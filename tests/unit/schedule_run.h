/* The two runs of a case: each sequence alone on an undisturbed cluster, and all together as drawn, through
 * the real scheduler. Thread: the caller's computes. */
#pragma once
#include "tests/unit/schedule_case.h"
#include "tests/unit/schedule_trace.h"

/* What a sequence came to: every token and the hash of the logits that gave it. */
typedef struct t_outcome {
    uint32_t n[T_SEQ_MAX];
    uint32_t tokens[T_SEQ_MAX][T_TOKENS_MAX];
    uint64_t logits[T_SEQ_MAX][T_TOKENS_MAX];
} t_outcome;

/* What happened on the way. */
typedef struct t_events {
    uint64_t n_step, n_chunk, n_decode, n_preempted, n_cancelled, n_retry, n_guess, n_right, n_save, n_load,
        n_hit_token;
    bool epoch_changed;
} t_events;

/* trace may be NULL. alone: what the first gave. */
void t_run_alone(const t_case *c, t_trace *trace, t_outcome *out);
void t_run_together(const t_case *c, const t_outcome *alone, t_trace *trace, t_outcome *out,
                    t_events *events_out);
