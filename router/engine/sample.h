/* From logits to a token. Greedy takes the largest, the lower id on ties. Else p = softmax(logits / temperature); with
 * top_p < 1 only the smallest set of most likely tokens (ties: lower id first) whose sum reaches top_p stays; the draw is
 * cm_rng_uniform(seed, position): a pure function of the request's seed and the position of the new token, so a retry, a
 * resume or another batch draws the same. All in double with kn_exp: the same on every CPU.
 * Thread: one sampler at a time. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "router/sched/sched_core.h"

typedef struct rt_sample_scratch rt_sample_scratch;
rt_sample_scratch *rt_sample_scratch_create(uint32_t vocab);
void rt_sample_scratch_destroy(rt_sample_scratch *scratch);

/* logits [vocab]. stop_allowed false: stop ids are never drawn. */
uint32_t rt_sample(rt_sample_scratch *scratch, const float *logits, const rt_sampler *sampler, bool stop_allowed,
                   uint64_t position);
