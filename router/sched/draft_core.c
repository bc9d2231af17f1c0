#include "router/sched/draft_core.h"

#include "common/base/assert.h"

enum {
    DRAFT_TRIAL_STEPS = 8,
    DRAFT_STAY_STEPS = 16,    /* at least, between two trials; as many as a mean remembers */
    DRAFT_TRIAL_SHARE = 32,   /* of the time, one part goes to trials */
    DRAFT_GUESSES_KEPT = 128, /* of each index, to know how many are right */
    DRAFT_OUTLIER = 4,        /* times the mean: counts as that much, a stalled step is no measure */
};
static const double g_margin = 0.95; /* of the time a token takes, to be changed for */

void rt_draft_core_init(rt_draft_core *core, uint32_t draft_max)
{
    CM_ASSERT(draft_max <= RT_DRAFT_MAX);
    *core = (rt_draft_core){.draft_max = draft_max, .want_before = draft_max};
    for (uint32_t i = 0; i < RT_DRAFT_BUCKETS; i++) {
        core->buckets[i].now = core->buckets[i].trial = draft_max;
    }
}

static uint32_t draft_bucket(uint32_t n_seq)
{
    uint32_t i = 0;
    while (n_seq > 1 && i + 1 < RT_DRAFT_BUCKETS) {
        n_seq /= 2;
        i++;
    }
    return i;
}

uint32_t rt_draft_core_want(const rt_draft_core *core, uint32_t n_seq)
{
    return core->buckets[draft_bucket(n_seq)].trial;
}

static void draft_count(rt_draft_core *core, const rt_draft_step *step)
{
    for (uint32_t i = 0; i < core->draft_max; i++) {
        core->n_guess[i] += step->n_guess[i];
        core->n_right[i] += step->n_right[i];
        if (core->n_guess[i] > DRAFT_GUESSES_KEPT) {
            core->n_right[i] *= DRAFT_GUESSES_KEPT / core->n_guess[i];
            core->n_guess[i] = DRAFT_GUESSES_KEPT;
        }
    }
}

static double draft_expected_tokens(const rt_draft_core *core, const rt_draft_step *step)
{
    double n = step->n_decode;
    for (uint32_t i = 0; i < core->draft_max && step->n_guess[i] > 0; i++) {
        n += step->n_guess[i] * core->n_right[i] / core->n_guess[i];
    }
    return n;
}

static void bucket_measure(rt_draft_bucket *bucket, double ns_per_token)
{
    double *mean = &bucket->ns_per_token[bucket->trial];
    uint32_t *n = &bucket->n_mean[bucket->trial];
    if (*n > 0 && ns_per_token > DRAFT_OUTLIER * *mean) {
        ns_per_token = DRAFT_OUTLIER * *mean;
    }
    *n += *n < DRAFT_STAY_STEPS;
    *mean += (ns_per_token - *mean) / *n;
}

/* The number to try next: never the one in force, of which there is a mean. */
static uint32_t bucket_pick(rt_draft_bucket *bucket, uint32_t draft_max)
{
    uint32_t best = bucket->now;
    for (uint32_t k = 0; k <= draft_max; k++) {
        if (bucket->n_mean[k] == 0) {
            return k;
        }
        if (k != bucket->now &&
            (best == bucket->now || bucket->ns_per_token[k] < bucket->ns_per_token[best])) {
            best = k;
        }
    }
    uint32_t turn = bucket->turn++;
    if (turn % 2 == 0) {
        return best;
    }
    return (bucket->now + 1 + turn / 2 % draft_max) % (draft_max + 1);
}

static bool bucket_all_tried(const rt_draft_bucket *bucket, uint32_t draft_max)
{
    for (uint32_t k = 0; k <= draft_max; k++) {
        if (bucket->n_mean[k] == 0) {
            return false;
        }
    }
    return true;
}

/* After a judged step: is it time to begin or to end a trial? */
static void bucket_turn(rt_draft_bucket *bucket, uint32_t draft_max)
{
    bool trying = bucket->trial != bucket->now;
    if (trying && bucket->n_step >= DRAFT_TRIAL_STEPS) {
        bucket->trial_ns = bucket->ns;
        if (bucket->ns_per_token[bucket->trial] < g_margin * bucket->ns_per_token[bucket->now]) {
            bucket->now = bucket->trial;
        }
        bucket->trial = bucket->now;
    } else if (!trying && bucket->n_step >= DRAFT_STAY_STEPS &&
               (bucket->ns / DRAFT_TRIAL_SHARE >= bucket->trial_ns || !bucket_all_tried(bucket, draft_max))) {
        bucket->trial = bucket_pick(bucket, draft_max);
        bucket->n_mean[bucket->trial] = 0; /* what it was long ago is no measure beside what is now */
        bucket->ns_per_token[bucket->trial] = 0;
    } else {
        return;
    }
    bucket->n_step = 0;
    bucket->ns = 0;
}

void rt_draft_core_observe(rt_draft_core *core, const rt_draft_step *step)
{
    bool same = step->n_want == core->want_before;
    rt_draft_bucket *bucket = &core->buckets[draft_bucket(step->n_decode)];
    core->want_before = step->n_want;
    draft_count(core, step);
    if (core->draft_max == 0 || step->prefill || step->n_decode == 0 || step->took_ns == 0 || !same ||
        step->n_want != bucket->trial) {
        return;
    }
    bucket_measure(bucket, (double)step->took_ns / draft_expected_tokens(core, step));
    bucket->n_step++;
    bucket->ns += step->took_ns;
    bucket_turn(bucket, core->draft_max);
}
