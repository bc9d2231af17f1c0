/* Constraints for random schedules: a few grammars over a made-up vocabulary, since the golden models have no
 * tokenizer. Thread: one at a time; what is made may be used by the engine. */
#pragma once
#include "router/engine/constraint.h"
#include "tests/unit/schedule_case.h"

typedef struct t_constraints t_constraints;
t_constraints *t_constraints_create(const t_case *c);
void t_constraints_destroy(t_constraints *constraints);                         /* all sequences are gone */
rt_constraint *t_constraint_make(t_constraints *constraints, const t_seq *seq); /* NULL: it has none */
