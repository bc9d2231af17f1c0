#include "router/engine/sample.h"

#include <stdlib.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "kernels/kn_math.h"

typedef struct sample_candidate {
    double p; /* not normalized */
    uint32_t id;
} sample_candidate;

struct rt_sample_scratch {
    uint32_t vocab;
    sample_candidate *candidates; /* [vocab] */
};

rt_sample_scratch *rt_sample_scratch_create(uint32_t vocab)
{
    rt_sample_scratch *scratch = cm_alloc(sizeof(*scratch));
    scratch->vocab = vocab;
    scratch->candidates = cm_alloc(sizeof(sample_candidate) * vocab);
    return scratch;
}

void rt_sample_scratch_destroy(rt_sample_scratch *scratch)
{
    cm_free(scratch->candidates);
    cm_free(scratch);
}

static bool sample_is_stop(const rt_sampler *sampler, uint32_t id)
{
    for (uint32_t i = 0; i < sampler->n_stop; i++) {
        if (sampler->stop[i] == id) {
            return true;
        }
    }
    return false;
}

static uint32_t sample_greedy(const float *logits, uint32_t vocab, const rt_sampler *sampler, bool stop_allowed)
{
    uint32_t best = vocab;
    for (uint32_t id = 0; id < vocab; id++) {
        if ((best == vocab || logits[id] > logits[best]) && (stop_allowed || !sample_is_stop(sampler, id))) {
            best = id;
        }
    }
    CM_ASSERT(best < vocab);
    return best;
}

static int sample_by_probability(const void *a, const void *b)
{
    const sample_candidate *x = a, *y = b;
    return x->p != y->p ? (x->p < y->p ? 1 : -1) : (x->id > y->id) - (x->id < y->id);
}

/* Keeps the nucleus in front of the list; returns its size and sum. A token below (1 - top_p) * total / n cannot be in it
 * (all such tokens together weigh less than what the nucleus leaves out), so only the others are sorted. */
static uint32_t sample_nucleus(sample_candidate *candidates, uint32_t n, double top_p, double total, double *sum_out)
{
    double floor_p = (1 - top_p) * total / n, sum = 0;
    uint32_t kept = 0, size = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (candidates[i].p >= floor_p) {
            candidates[kept++] = candidates[i];
        }
    }
    qsort(candidates, kept, sizeof(*candidates), sample_by_probability);
    while (size < kept && sum < top_p * total) {
        sum += candidates[size++].p;
    }
    *sum_out = sum;
    return size;
}

uint32_t rt_sample(rt_sample_scratch *scratch, const float *logits, const rt_sampler *sampler, bool stop_allowed,
                   uint64_t position)
{
    uint32_t best = sample_greedy(logits, scratch->vocab, sampler, stop_allowed), n = 0;
    if (sampler->temperature <= 0) {
        return best;
    }
    double total = 0, max = logits[best];
    for (uint32_t id = 0; id < scratch->vocab; id++) {
        if (!stop_allowed && sample_is_stop(sampler, id)) {
            continue;
        }
        double p = kn_exp(((double)logits[id] - max) / (double)sampler->temperature);
        scratch->candidates[n++] = (sample_candidate){p, id};
        total += p;
    }
    if (sampler->top_p < 1) {
        n = sample_nucleus(scratch->candidates, n, (double)sampler->top_p, total, &total);
    }
    double draw = cm_rng_uniform(sampler->seed, position, 0) * total, sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += scratch->candidates[i].p;
        if (draw < sum) {
            return scratch->candidates[i].id;
        }
    }
    return scratch->candidates[n - 1].id; /* rounding left the draw at the very end */
}
