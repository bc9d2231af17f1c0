/* Words that owners have not been told yet, one per token or end of a sequence, in order. A value, part of
 * the scheduler; owns its array. Thread: the owner's. */
#pragma once
#include "router/sched/sched_core.h"

typedef struct rt_words {
    rt_word *at; /* [n_max] */
    uint32_t n, n_max;
} rt_words;

void rt_words_init(rt_words *words, uint32_t n_max);
void rt_words_fini(rt_words *words);
/* A word about a sequence; there is room for it. */
rt_word *rt_words_add(rt_words *words, rt_word word);
/* All of them to fn, which may open and cancel sequences, that is call rt_words_forget; then there are none.
 */
void rt_words_tell(rt_words *words, rt_word_fn fn, void *ctx);
/* What is not told yet about this sequence, and about all of this owner, never is. */
void rt_words_forget(rt_words *words, rt_seq_key key);
void rt_words_forget_owner(rt_words *words, uint64_t owner);
