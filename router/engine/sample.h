/* From logits to a token, in the order of vLLM's sampler (V1):
 *   0. ids that the sequence's constraint does not allow get probability zero, whatever comes after;
 *   1. stop ids get probability zero while they are not allowed, unless the constraint allows nothing else: a
 * complete answer ends before tokens_min;
 *   2. logit_bias is added;
 *   3. repetition_penalty r, for every id of prompt and output: a logit above 0 is divided by r, any other
 * multiplied;
 *   4. frequency_penalty * (times the id is in the output) and presence_penalty * (is it there) are
 * subtracted;
 *   5. temperature 0: the largest logit is the token. Else p = softmax(logits / temperature);
 *   6. min_p: tokens with p < min_p * (the largest p) are dropped;
 *   7. top_k: only the k most likely stay;
 *   8. top_p < 1: of what is left, only the smallest set of most likely tokens whose share reaches top_p
 * stays;
 *   9. the draw is cm_rng_uniform(seed, position): a pure function of the request's seed and the position of
 * the new token, so a retry, a resume or another batch draws the same. Wherever likely tokens are equal the
 * lower id comes first. All in double with kn_exp and kn_log: the same on every CPU. Log-probabilities are
 * those of the logits behind 0, as the model gave them but for what the constraint does not allow. Thread:
 * one sampler at a time. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "router/sched/sched_core.h"

typedef struct rt_sample_scratch rt_sample_scratch;
rt_sample_scratch *rt_sample_scratch_create(uint32_t vocab);
void rt_sample_scratch_destroy(rt_sample_scratch *scratch);

/* The token behind one of seg's last n_draft + 1 rows, i of them counted from 0: the guesses before it are
 * taken as right. logits [vocab]; one that is not finite is -INFINITY. Of seg are read: sampler, masks,
 * stop_wait, the new token's position pos0 + n_row - n_draft + i, as much of log and n_prompt when there is a
 * penalty; logprobs[i] is written unless NULL. Allocates nothing. */
uint32_t rt_sample(rt_sample_scratch *scratch, const float *logits, const rt_step_seg *seg, uint32_t i);
