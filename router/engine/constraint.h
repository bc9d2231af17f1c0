/* A sequence's constraint: a grammar's machine and how far the sequence has come in it. Follows from the
 * generated ids alone, so a sequence that starts over, here or elsewhere, has the same masks again. Owned by
 * the sequence; while a step is in flight only the thread that makes its masks touches it. */
#pragma once
#include "common/grammar/machine.h"
#include "router/sched/sched_core.h"

/* machine is given (one hold). thinking: the grammar begins behind the first generated </think>. */
rt_constraint *rt_constraint_create(gm_machine *machine, bool thinking);
/* Masks of seg's last n_draft + 1 rows, bits [n_draft + 1][n_word]: the i-th takes the guesses before it as
 * right. Behind a guess that is not allowed there are none: it will not be drawn. Ids that the grammar cannot
 * have led to (a caller's, of another grammar) leave only the end of sequence. */
void rt_constraint_masks(rt_constraint *constraint, const rt_step_seg *seg, uint32_t *bits, uint32_t n_word);
