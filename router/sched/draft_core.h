/* How many tokens to guess ahead, as a pure machine: what pays is measured, on whatever hardware this is.
 *
 * Guesses make a step longer and give more tokens, so each number of guesses 0 .. draft_max is judged by its
 * nanoseconds per token: a running mean, newer steps counting more, of a step's time over the tokens to be
 * expected from it. Those are one per sequence and, per guess, the share of guesses of its index that were
 * right lately: the share hardly depends on load, and a mean of it is steadier than single steps. Means are
 * kept per number of decoding sequences, by powers of two, since what pays for 1 may not for 64. The number
 * in force is left now and then for a few steps to try another one: first those never tried, then in turn
 * the one that looks best and the next one. A trial is repeated when the steps since took 32 times as long,
 * so trials cost a few percent at most, also where guessing is ruinous. The tried number stays in force if
 * it was better by a margin, so that equals do not alternate. Steps with prefill rows, steps whose guesses
 * were made under another number, and steps of unknown time (0) say nothing about time.
 *
 * Used by the scheduler. A value; owns nothing. Thread: its owner's. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

enum { RT_DRAFT_MAX = 7 };
enum { RT_DRAFT_BUCKETS = 16 }; /* 1, 2 .. 3, 4 .. 7, and so on; the last has no end */

/* A completed step. */
typedef struct rt_draft_step {
    uint32_t n_want; /* guesses that rt_draft_core_want gave for it */
    bool prefill;    /* it had prefill rows */
    uint32_t n_decode;
    uint32_t n_guess[RT_DRAFT_MAX]; /* sequences that had a guess of this index checked */
    uint32_t n_right[RT_DRAFT_MAX]; /* of these: it and all before it were right */
    uint64_t took_ns;               /* 0: not known */
} rt_draft_step;

typedef struct rt_draft_bucket {
    uint32_t now, trial; /* the number in force, the one being tried; equal: none is */
    uint32_t turn;       /* trials so far */
    uint32_t n_step;     /* judged since the last change between the two */
    uint64_t ns;         /* that those steps took */
    uint64_t trial_ns;   /* that the last trial took */
    double ns_per_token[RT_DRAFT_MAX + 1];
    uint32_t n_mean[RT_DRAFT_MAX + 1]; /* steps in that mean; 0: never tried */
} rt_draft_bucket;

typedef struct rt_draft_core {
    uint32_t draft_max, want_before;                     /* n_want of the step before */
    double n_guess[RT_DRAFT_MAX], n_right[RT_DRAFT_MAX]; /* lately */
    rt_draft_bucket buckets[RT_DRAFT_BUCKETS];
} rt_draft_core;

void rt_draft_core_init(rt_draft_core *core, uint32_t draft_max);
/* Guesses to be made in a step for each of its n_seq sequences that will decode after it. */
uint32_t rt_draft_core_want(const rt_draft_core *core, uint32_t n_seq);
void rt_draft_core_observe(rt_draft_core *core, const rt_draft_step *step);
