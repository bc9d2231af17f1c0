#include "router/engine/masks.h"

#include <pthread.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/jobs.h"
#include "common/base/mem.h"
#include "common/base/stats.h"

struct rt_masks {
    uint32_t row_max, n_word;
    uint32_t *bits; /* [row_max][n_word] */
    cm_jobs *jobs;
    const rt_step *step;  /* being worked on */
    pthread_mutex_t lock; /* protects busy */
    pthread_cond_t done;
    bool busy;
};

rt_masks *rt_masks_create(uint32_t row_max, uint32_t vocab)
{
    rt_masks *masks = cm_alloc(sizeof(*masks));
    masks->row_max = row_max;
    masks->n_word = gm_vocab_words(vocab);
    masks->bits = cm_alloc(sizeof(uint32_t) * row_max * masks->n_word);
    masks->jobs = cm_jobs_create("masks", 1, 1);
    pthread_mutex_init(&masks->lock, NULL);
    pthread_cond_init(&masks->done, NULL);
    return masks;
}

void rt_masks_destroy(rt_masks *masks)
{
    cm_jobs_destroy(masks->jobs);
    pthread_mutex_destroy(&masks->lock);
    pthread_cond_destroy(&masks->done);
    cm_free(masks->bits);
    cm_free(masks);
}

static bool seg_has_masks(const rt_step_seg *seg)
{
    return seg->sample && seg->constraint != NULL;
}

/* On the masks' thread. */
static void masks_make(void *arg)
{
    rt_masks *masks = arg;
    uint32_t row = 0;
    for (uint32_t i = 0; i < masks->step->n_seg; i++) {
        const rt_step_seg *seg = &masks->step->segs[i];
        if (seg_has_masks(seg)) {
            rt_constraint_masks(seg->constraint, seg, masks->bits + (size_t)row * masks->n_word,
                                masks->n_word);
            row += seg->n_draft + 1;
        }
    }
    pthread_mutex_lock(&masks->lock);
    masks->busy = false;
    pthread_cond_signal(&masks->done);
    pthread_mutex_unlock(&masks->lock);
}

void rt_masks_begin(rt_masks *masks, const rt_step *step)
{
    uint32_t row = 0;
    for (uint32_t i = 0; i < step->n_seg; i++) {
        rt_step_seg *seg = &step->segs[i];
        if (seg_has_masks(seg)) {
            seg->masks = masks->bits + (size_t)row * masks->n_word;
            row += seg->n_draft + 1;
            CM_ASSERT_MSG(row <= masks->row_max, "%u masks, %u at most", row, masks->row_max);
        }
    }
    if (row == 0) {
        return;
    }
    masks->step = step;
    masks->busy = true; /* nobody else looks before the submit */
    cm_status status = cm_jobs_submit(masks->jobs, masks_make, masks);
    CM_ASSERT(status == CM_OK); /* one at a time */
}

void rt_masks_wait(rt_masks *masks)
{
    uint64_t start_ns = cm_now_ns();
    pthread_mutex_lock(&masks->lock);
    bool late = masks->busy;
    while (masks->busy) {
        pthread_cond_wait(&masks->done, &masks->lock);
    }
    pthread_mutex_unlock(&masks->lock);
    if (late) {
        cm_stat_add(CM_STAT_constraint_wait_us, (int64_t)((cm_now_ns() - start_ns) / 1000));
    }
}
