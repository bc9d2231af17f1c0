/* How many rows a step may have while prompts fill it, as a pure machine: as many as take about the time that
 * a running sequence may wait for its next token, on whatever hardware this is. Fewer rows than that read
 * every weight more often for nothing; more make answers halt.
 *
 * A step that took longer than it should, or that was full and took less, says how many rows would have taken
 * the time, in proportion; what a step takes whatever its rows does not drive this from the right number as
 * long as it is less than the time itself. The number goes at most by a factor of two a step, so that one odd
 * step does little, and never below a floor: below it rows share too little of what they read.
 *
 * Used by the scheduler. A value; owns nothing. Thread: its owner's. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

enum {
    RT_PACE_ROWS_MIN = 32,    /* the floor, and */
    RT_PACE_ROWS_FIRST = 128, /* the first step's, where no fewer rows are the most */
};

typedef struct rt_pace_core {
    uint64_t goal_ns; /* 0: always row_max */
    uint32_t row_max, rows;
} rt_pace_core;

void rt_pace_core_init(rt_pace_core *core, uint64_t goal_ns, uint32_t row_max);
/* A step with prompt rows is done; n_row counts all its rows. full: there were prompt rows that it had to
 * leave. took_ns 0: not known. */
void rt_pace_core_observe(rt_pace_core *core, uint32_t n_row, bool full, uint64_t took_ns);
