/* Where two runs of one case part: the first takes down a hash of every row at every point of every layer,
 * the second is held against it while it runs. For the seed that failed; costs a few hashes a row. Thread:
 * one at a time. */
#pragma once
#include "router/engine/engine.h"
#include "tests/unit/schedule_case.h"

typedef struct t_trace t_trace;

t_trace *t_trace_create(const t_case *c);
void t_trace_destroy(t_trace *trace);
/* From now on rows are compared, not taken down. */
void t_trace_compare(t_trace *trace);
/* One row of a judged sequence. */
void t_trace_row(t_trace *trace, uint32_t seq, uint32_t pos, uint32_t layer, rt_tap_point point,
                 uint64_t step, uint64_t hash);
/* Prints the first row that differed, or that none did. */
void t_trace_print(const t_trace *trace);
