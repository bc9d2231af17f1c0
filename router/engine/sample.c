#include "router/engine/sample.h"

#include <math.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "kernels/kn_math.h"

enum { SAMPLE_SORTED = 64 }; /* likeliest tokens that are sorted at first */

typedef struct sample_candidate {
    double p; /* not normalized, or a logit: larger is more likely */
    uint32_t id;
} sample_candidate;

/* weights_out[i] = kn_exp((logits[i] - max) / temperature). */
typedef void (*sample_weigh_fn)(const double *logits, uint32_t n, double max, double temperature,
                                double *weights_out);

struct rt_sample_scratch {
    uint32_t vocab;
    sample_weigh_fn weigh; /* the widest this CPU has */
    double *logits;        /* [vocab] as changed by bias and penalties */
    double *weights;       /* [vocab] not normalized probabilities */
    uint32_t *marks;       /* [vocab] 0: not in the log; else 1 + times in the output. All 0 between calls */
    sample_candidate *candidates; /* [vocab + 1] */
};

static inline void sample_weigh_all(const double *logits, uint32_t n, double max, double temperature,
                                    double *weights_out)
{
    for (uint32_t i = 0; i < n; i++) {
        weights_out[i] = kn_exp((logits[i] - max) / temperature);
    }
}

static void sample_weigh(const double *logits, uint32_t n, double max, double temperature,
                         double *weights_out)
{
    sample_weigh_all(logits, n, max, temperature, weights_out);
}

#if defined(__x86_64__)
/* The same arithmetic, eight at a time: kn_exp has the same bits in any width. */
__attribute__((target("avx512f,avx512dq"))) static void sample_weigh_512(const double *logits, uint32_t n,
                                                                         double max, double temperature,
                                                                         double *weights_out)
{
    sample_weigh_all(logits, n, max, temperature, weights_out);
}

static sample_weigh_fn sample_weigh_choose(void)
{
    return __builtin_cpu_supports("avx512dq") ? sample_weigh_512 : sample_weigh;
}
#else
static sample_weigh_fn sample_weigh_choose(void)
{
    return sample_weigh;
}
#endif

rt_sample_scratch *rt_sample_scratch_create(uint32_t vocab)
{
    rt_sample_scratch *scratch = cm_alloc(sizeof(*scratch));
    scratch->vocab = vocab;
    scratch->weigh = sample_weigh_choose();
    scratch->logits = cm_alloc(sizeof(double) * vocab);
    scratch->weights = cm_alloc(sizeof(double) * vocab);
    scratch->marks = cm_alloc(sizeof(uint32_t) * vocab);
    scratch->candidates = cm_alloc(sizeof(sample_candidate) * (vocab + 1));
    return scratch;
}

void rt_sample_scratch_destroy(rt_sample_scratch *scratch)
{
    cm_free(scratch->logits);
    cm_free(scratch->weights);
    cm_free(scratch->marks);
    cm_free(scratch->candidates);
    cm_free(scratch);
}

/* ---- logits ---- */

/* position: of the new token; the log before it counts. */
static void sample_penalize(rt_sample_scratch *scratch, const rt_step_seg *seg, uint32_t position)
{
    const rt_sampler *sampler = seg->sampler;
    double repetition = sampler->repetition_penalty > 0 ? (double)sampler->repetition_penalty : 1;
    double frequency = (double)sampler->frequency_penalty, presence = (double)sampler->presence_penalty;
    uint32_t n = position;
    /* Marks are set and cleared along the log, so that nothing as long as the vocabulary has to be cleared.
     */
    for (uint32_t i = 0; i < n; i++) {
        scratch->marks[seg->log[i]] = 1;
    }
    for (uint32_t i = seg->n_prompt; i < n; i++) {
        scratch->marks[seg->log[i]]++;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t *mark = &scratch->marks[seg->log[i]];
        if (*mark == 0) {
            continue; /* done at its first place */
        }
        double *logit = &scratch->logits[seg->log[i]];
        *logit = *logit > 0 ? *logit / repetition : *logit * repetition;
        *logit -= frequency * (*mark - 1) + (*mark > 1 ? presence : 0);
        *mark = 0;
    }
}

static bool sample_is_set(float penalty, float neutral)
{
    return penalty < neutral || penalty > neutral;
}

static bool sample_allows(const uint32_t *mask, uint32_t id)
{
    return mask == NULL || (mask[id / 32] >> id % 32 & 1) != 0;
}

/* The constraint allows something besides the stop ids. */
static bool sample_may_go_on(const rt_sample_scratch *scratch, const uint32_t *mask,
                             const rt_sampler *sampler)
{
    uint32_t n_allowed = 0;
    if (mask == NULL) {
        return true;
    }
    for (uint32_t i = 0; i < (scratch->vocab + 31) / 32; i++) {
        n_allowed += (uint32_t)__builtin_popcount(mask[i]);
    }
    for (uint32_t i = 0; i < sampler->n_stop; i++) {
        bool again = false; /* the list may name an id twice */
        for (uint32_t k = 0; k < i; k++) {
            again |= sampler->stop[k] == sampler->stop[i];
        }
        n_allowed -= !again && sample_allows(mask, sampler->stop[i]);
    }
    return n_allowed > 0;
}

/* Loops over the vocabulary are written for vector code: without a mask nothing is looked up or skipped. */
static void sample_copy(rt_sample_scratch *scratch, const float *logits, const uint32_t *mask)
{
    double *to = scratch->logits;
    for (uint32_t id = 0; id < scratch->vocab; id++) {
        to[id] = isfinite(logits[id]) ? (double)logits[id] : -INFINITY;
    }
    for (uint32_t id = 0; id < scratch->vocab && mask != NULL; id++) {
        to[id] = sample_allows(mask, id) ? to[id] : -INFINITY;
    }
}

static bool sample_penalizes(const rt_sampler *sampler)
{
    bool repeats = sampler->repetition_penalty > 0 && sample_is_set(sampler->repetition_penalty, 1);
    return repeats || sample_is_set(sampler->frequency_penalty, 0) ||
           sample_is_set(sampler->presence_penalty, 0);
}

static void sample_change_logits(rt_sample_scratch *scratch, const float *logits, const rt_step_seg *seg,
                                 const uint32_t *mask, uint32_t i_row, uint32_t position)
{
    const rt_sampler *sampler = seg->sampler;
    bool stops_wait = i_row < seg->stop_wait && sample_may_go_on(scratch, mask, sampler);
    sample_copy(scratch, logits, mask);
    for (uint32_t i = 0; i < sampler->n_stop && stops_wait; i++) {
        scratch->logits[sampler->stop[i]] = -INFINITY;
    }
    for (uint32_t i = 0; i < sampler->n_bias; i++) {
        scratch->logits[sampler->bias[i].id] += (double)sampler->bias[i].bias;
    }
    if (sample_penalizes(sampler)) {
        sample_penalize(scratch, seg, position);
    }
}

static double sample_max(const double *x, uint32_t n)
{
    enum { LANES = 16 };
    double lane[LANES], max = -INFINITY;
    uint32_t i = 0;
    for (uint32_t l = 0; l < LANES; l++) {
        lane[l] = -INFINITY;
    }
    for (; i + LANES <= n; i += LANES) {
        for (uint32_t l = 0; l < LANES; l++) {
            lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
        }
    }
    for (; i < n; i++) {
        max = x[i] > max ? x[i] : max;
    }
    for (uint32_t l = 0; l < LANES; l++) {
        max = lane[l] > max ? lane[l] : max;
    }
    return max;
}

static uint32_t sample_greedy(const rt_sample_scratch *scratch)
{
    double max = sample_max(scratch->logits, scratch->vocab);
    uint32_t best = 0;
    while (scratch->logits[best] < max) {
        best++;
    }
    return best;
}

/* The largest of the logits is the token, just as they came. */
static bool sample_is_plain(const rt_step_seg *seg, const uint32_t *mask, uint32_t i_row)
{
    const rt_sampler *sampler = seg->sampler;
    bool stops_wait = i_row < seg->stop_wait && sampler->n_stop > 0;
    return !(sampler->temperature > 0) && mask == NULL && !stops_wait && sampler->n_bias == 0 &&
           !sample_penalizes(sampler);
}

/* Likewise, without a copy of them. */
static uint32_t sample_greedy_plain(const float *logits, uint32_t n)
{
    enum { LANES = 32 };
    float lane[LANES], max = -INFINITY;
    uint32_t i = 0, best = 0;
    for (uint32_t l = 0; l < LANES; l++) {
        lane[l] = -INFINITY;
    }
    for (; i + LANES <= n; i += LANES) {
        for (uint32_t l = 0; l < LANES; l++) {
            float x = logits[i + l] < INFINITY ? logits[i + l] : -INFINITY; /* no NaN is below */
            lane[l] = x > lane[l] ? x : lane[l];
        }
    }
    for (; i < n; i++) {
        max = logits[i] > max && logits[i] < INFINITY ? logits[i] : max;
    }
    for (uint32_t l = 0; l < LANES; l++) {
        max = lane[l] > max ? lane[l] : max;
    }
    while (max > -INFINITY && !(logits[best] >= max && logits[best] <= max)) {
        best++;
    }
    return best;
}

/* ---- the most likely ones ---- */

static bool sample_before(const sample_candidate *a, const sample_candidate *b)
{
    return a->p > b->p || (a->p >= b->p && a->id < b->id);
}

static void sample_swap(sample_candidate *a, sample_candidate *b)
{
    sample_candidate kept = *a;
    *a = *b;
    *b = kept;
}

/* A heap whose root is the least likely; heap[at] may be more likely than its children. */
static void sample_sift(sample_candidate *heap, uint32_t n, uint32_t at)
{
    for (;;) {
        uint32_t least = at;
        for (uint32_t child = 2 * at + 1; child <= 2 * at + 2 && child < n; child++) {
            if (sample_before(&heap[least], &heap[child])) {
                least = child;
            }
        }
        if (least == at) {
            return;
        }
        sample_swap(&heap[at], &heap[least]);
        at = least;
    }
}

/* Brings the k most likely of n to the front, in order; k from 1 to n. */
static void sample_front(sample_candidate *candidates, uint32_t n, uint32_t k)
{
    for (uint32_t i = k / 2; i-- > 0;) {
        sample_sift(candidates, k, i);
    }
    for (uint32_t i = k; i < n; i++) {
        if (sample_before(&candidates[i], &candidates[0])) {
            sample_swap(&candidates[i], &candidates[0]);
            sample_sift(candidates, k, 0);
        }
    }
    for (uint32_t end = k; --end > 0;) {
        sample_swap(&candidates[0], &candidates[end]);
        sample_sift(candidates, end, 0);
    }
}

/* ---- filters: each keeps some at the front and returns how many ---- */

static uint32_t sample_keep_from(sample_candidate *candidates, uint32_t n, double least)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (candidates[i].p >= least) {
            candidates[kept++] = candidates[i];
        }
    }
    return kept;
}

static double sample_sum(const sample_candidate *candidates, uint32_t n)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += candidates[i].p;
    }
    return sum;
}

/* A token below (1 - top_p) * total / n cannot be in the nucleus (all such tokens together weigh less than
 * what it leaves out), so only the others are looked at, and of these only as many
 * sorted as it turns out to have. */
static uint32_t sample_nucleus(sample_candidate *candidates, uint32_t n, double top_p, double total)
{
    uint32_t kept = sample_keep_from(candidates, n, (1 - top_p) * total / n), size, sorted = SAMPLE_SORTED;
    for (;; sorted *= 8) {
        double sum = 0;
        sorted = sorted < kept ? sorted : kept;
        sample_front(candidates, kept, sorted);
        for (size = 0; size < sorted && sum < top_p * total; size++) {
            sum += candidates[size].p;
        }
        if (sorted == kept || sum >= top_p * total) {
            return size;
        }
    }
}

static uint32_t sample_draw(rt_sample_scratch *scratch, const rt_sampler *sampler, uint32_t position,
                            double max)
{
    sample_candidate *candidates = scratch->candidates;
    uint32_t n = 0;
    scratch->weigh(scratch->logits, scratch->vocab, max, (double)sampler->temperature, scratch->weights);
    for (uint32_t id = 0; id < scratch->vocab; id++) {
        candidates[n] = (sample_candidate){scratch->weights[id], id};
        n += scratch->logits[id] > -INFINITY;
    }
    if (sampler->min_p > 0) {
        n = sample_keep_from(candidates, n, (double)sampler->min_p); /* the largest is kn_exp(0) = 1 */
    }
    if (sampler->top_k > 0 && sampler->top_k < n) {
        sample_front(candidates, n, sampler->top_k);
        n = sampler->top_k;
    }
    if (sampler->top_p < 1) {
        n = sample_nucleus(candidates, n, (double)sampler->top_p, sample_sum(candidates, n));
    }
    double draw = cm_rng_uniform(sampler->seed, position, 0) * sample_sum(candidates, n), sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += candidates[i].p;
        if (draw < sum) {
            return candidates[i].id;
        }
    }
    return candidates[n - 1].id; /* rounding left the draw at the very end */
}

/* ---- log-probabilities ---- */

static void sample_logprobs(rt_sample_scratch *scratch, const float *logits, const uint32_t *mask,
                            uint32_t token, uint32_t n_top, rt_logprobs *out)
{
    double max = -INFINITY, sum = 0;
    for (uint32_t id = 0; id < scratch->vocab; id++) {
        double logit = isfinite(logits[id]) && sample_allows(mask, id) ? (double)logits[id] : -INFINITY;
        scratch->candidates[id] = (sample_candidate){logit, id};
        max = logit > max ? logit : max;
    }
    for (uint32_t id = 0; id < scratch->vocab; id++) {
        sum += scratch->candidates[id].p > -INFINITY ? kn_exp(scratch->candidates[id].p - max) : 0;
    }
    double zero = sum > 0 ? max + kn_log(sum) : 0;
    out->token = (float)(scratch->candidates[token].p - zero);
    out->n_top = n_top < scratch->vocab ? n_top : scratch->vocab;
    if (out->n_top > 0) {
        sample_front(scratch->candidates, scratch->vocab, out->n_top);
    }
    for (uint32_t i = 0; i < out->n_top; i++) {
        out->top_id[i] = scratch->candidates[i].id;
        out->top[i] = (float)(scratch->candidates[i].p - zero);
    }
}

/* No logit is a number: the first id that may be. */
static uint32_t sample_first(const rt_sample_scratch *scratch, const uint32_t *mask)
{
    for (uint32_t id = 0; id < scratch->vocab; id++) {
        if (sample_allows(mask, id)) {
            return id;
        }
    }
    return 0;
}

static uint32_t sample_changed(rt_sample_scratch *scratch, const float *logits, const rt_step_seg *seg,
                               const uint32_t *mask, uint32_t i_row, uint32_t position)
{
    sample_change_logits(scratch, logits, seg, mask, i_row, position);
    uint32_t token = sample_greedy(scratch);
    if (!(scratch->logits[token] > -INFINITY)) {
        return sample_first(scratch, mask);
    }
    return seg->sampler->temperature > 0
               ? sample_draw(scratch, seg->sampler, position, scratch->logits[token])
               : token;
}

uint32_t rt_sample(rt_sample_scratch *scratch, const float *logits, const rt_step_seg *seg, uint32_t i)
{
    uint32_t position = seg->pos0 + seg->n_row - seg->n_draft + i, n_word = (scratch->vocab + 31) / 32;
    const uint32_t *mask = seg->masks != NULL ? seg->masks + (size_t)i * n_word : NULL;
    uint32_t token = sample_is_plain(seg, mask, i) ? sample_greedy_plain(logits, scratch->vocab)
                                                   : sample_changed(scratch, logits, seg, mask, i, position);
    if (seg->logprobs != NULL) {
        sample_logprobs(scratch, logits, mask, token, seg->sampler->n_top, &seg->logprobs[i]);
    }
    return token;
}
