/* The constraints that requests came with, compiled: a bounded number is remembered by what they were
 * compiled from, unknown ones are compiled on a thread of their own. The vocabulary is read from the model's
 * tokenizer.json when the first one comes. Thread: the loop's. */
#pragma once
#include "common/grammar/machine.h"
#include "common/proc/loop.h"

typedef struct rt_constraints rt_constraints;
/* One of the two is NULL; machine is given (one hold), err borrowed. */
typedef void (*rt_constraints_fn)(void *ctx, gm_machine *machine, const cm_error *err);

/* dir is kept; vocab: of the model. */
rt_constraints *rt_constraints_create(pc_loop *loop, const char *dir, uint32_t vocab);
/* What is being compiled is dropped: fn is not called any more. */
void rt_constraints_destroy(rt_constraints *constraints);
/* CM_OK with *machine_out (one hold), when it is known; CM_AGAIN: fn follows, from the loop, not from inside
 * this call. CM_E_INVALID, CM_E_CAPACITY with a sentence. source is copied. */
CM_MUST_CHECK cm_status rt_constraints_get(rt_constraints *constraints, uint32_t kind, const void *source,
                                           size_t n_source, rt_constraints_fn fn, void *ctx,
                                           gm_machine **machine_out, cm_error *err);
