#include "router/engine/constraint.h"

#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/stats.h"

struct rt_constraint {
    gm_machine *machine; /* held */
    gm_state at;         /* held: behind the first n_seen generated ids */
    uint32_t n_seen;
};

rt_constraint *rt_constraint_create(gm_machine *machine, bool thinking)
{
    rt_constraint *constraint = cm_alloc(sizeof(*constraint));
    constraint->machine = machine;
    constraint->at = gm_begin(machine, thinking);
    return constraint;
}

void rt_constraint_destroy(rt_constraint *constraint)
{
    if (constraint != NULL) {
        gm_state_release(constraint->machine, constraint->at);
        gm_machine_release(constraint->machine);
        cm_free(constraint);
    }
}

/* To the place behind the n-th generated id. */
static void constraint_follow(rt_constraint *c, const uint32_t *generated, uint32_t n)
{
    for (; c->n_seen < n; c->n_seen++) {
        gm_state next = gm_advance(c->machine, c->at, generated[c->n_seen]);
        if (next == GM_DEAD) {
            cm_warn("generated token %u of a sequence is not allowed by its constraint: ended there",
                    c->n_seen);
            next = GM_DONE;
        }
        gm_state_release(c->machine, c->at);
        c->at = next;
    }
}

void rt_constraint_masks(rt_constraint *c, const rt_step_seg *seg, uint32_t *bits, uint32_t n_word)
{
    uint32_t position = seg->pos0 + seg->n_row - seg->n_draft; /* of the first token to be drawn */
    constraint_follow(c, seg->log + seg->n_prompt, position - seg->n_prompt);
    gm_state at = gm_state_hold(c->machine, c->at);
    for (uint32_t i = 0; at != GM_DEAD; i++) {
        gm_mask(c->machine, at, bits + (size_t)i * n_word);
        cm_stat_add(CM_STAT_constraint_masks, 1);
        gm_state next =
            i < seg->n_draft ? gm_advance(c->machine, at, seg->log[position + i]) : (gm_state)GM_DEAD;
        gm_state_release(c->machine, at);
        at = next;
    }
}
