#include "router/engine/micro_core.h"

#include "common/base/assert.h"

enum {
    MICRO_SETTLE = 8,      /* steps before the first trial */
    MICRO_TRIAL = 4,       /* steps of a trial */
    MICRO_TRIAL_COST = 32, /* other steps take at least so many times as long as the trial before */
    MICRO_MEAN = 8,        /* steps that a running mean remembers, about */
};
static const double MICRO_WAIT_MIN = 0.125; /* of a step's time, for two to be tried */
static const double MICRO_MARGIN = 0.97;

void rt_micro_core_init(rt_micro_core *core, uint32_t fixed)
{
    CM_ASSERT(fixed <= RT_MICRO_MAX);
    *core = (rt_micro_core){.fixed = fixed};
}

static uint32_t micro_bucket_of(uint32_t n_row)
{
    uint32_t i = 31 - (uint32_t)__builtin_clz(n_row | 1);
    return i < RT_MICRO_BUCKETS ? i : RT_MICRO_BUCKETS - 1;
}

uint32_t rt_micro_core_count(const rt_micro_core *core, uint32_t n_row)
{
    if (core->fixed != 0) {
        return core->fixed <= n_row ? core->fixed : 1;
    }
    const rt_micro_bucket *bucket = &core->buckets[micro_bucket_of(n_row)];
    return n_row >= RT_MICRO_ROWS_MIN && bucket->two != bucket->trial ? 2 : 1;
}

static double micro_mean(double mean, uint32_t n_before, double value)
{
    uint32_t n = n_before < MICRO_MEAN ? n_before + 1 : MICRO_MEAN;
    return mean + (value - mean) / n;
}

static void micro_change(rt_micro_bucket *bucket, bool trial)
{
    bucket->trial = trial;
    bucket->n_step = 0;
    bucket->ns = 0;
}

static void micro_end_trial(rt_micro_bucket *bucket)
{
    bucket->trial_ns = bucket->ns;
    if (bucket->ns_per_row[!bucket->two] < MICRO_MARGIN * bucket->ns_per_row[bucket->two]) {
        bucket->two = !bucket->two;
    }
    micro_change(bucket, false);
}

void rt_micro_core_observe(rt_micro_core *core, uint32_t n_row, uint32_t n, uint64_t took_ns,
                           uint64_t waited_ns)
{
    rt_micro_bucket *bucket = &core->buckets[micro_bucket_of(n_row)];
    if (n_row < RT_MICRO_ROWS_MIN || took_ns == 0 || (n == 2) != (bucket->two != bucket->trial)) {
        return;
    }
    if (n == 1) {
        bucket->wait = micro_mean(bucket->wait, bucket->n_mean[0], (double)waited_ns / (double)took_ns);
    }
    bucket->ns_per_row[n - 1] =
        micro_mean(bucket->ns_per_row[n - 1], bucket->n_mean[n - 1], (double)took_ns / n_row);
    bucket->n_mean[n - 1] += bucket->n_mean[n - 1] < MICRO_MEAN;
    bucket->n_step++;
    bucket->ns += took_ns;
    if (bucket->trial) {
        if (bucket->n_step == MICRO_TRIAL) {
            micro_end_trial(bucket);
        }
    } else if (bucket->n_step >= MICRO_SETTLE && bucket->ns >= MICRO_TRIAL_COST * bucket->trial_ns &&
               (bucket->two || bucket->wait >= MICRO_WAIT_MIN)) {
        bucket->n_mean[!bucket->two] = 0; /* what it was then says little about now */
        micro_change(bucket, true);
    }
}

uint32_t rt_micro_cut(const kn_seg *segs, uint32_t n_seg, uint32_t n_row)
{
    CM_ASSERT(n_row >= 2);
    uint32_t middle = n_row / 2, best = middle, off_best = n_row / 4 + 1;
    for (uint32_t i = 1; i < n_seg; i++) {
        uint32_t row = segs[i].row0, off = row < middle ? middle - row : row - middle;
        if (off < off_best) {
            best = row;
            off_best = off;
        }
    }
    CM_ASSERT(best > 0 && best < n_row);
    return best;
}
