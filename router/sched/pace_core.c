#include "router/sched/pace_core.h"

#include "common/base/assert.h"

static uint64_t u64_between(uint64_t low, uint64_t x, uint64_t high)
{
    return x < low ? low : x > high ? high : x;
}

void rt_pace_core_init(rt_pace_core *core, uint64_t goal_ns, uint32_t row_max)
{
    CM_ASSERT(row_max > 0);
    uint32_t first = row_max < RT_PACE_ROWS_FIRST ? row_max : RT_PACE_ROWS_FIRST;
    *core = (rt_pace_core){.goal_ns = goal_ns, .row_max = row_max, .rows = goal_ns == 0 ? row_max : first};
}

void rt_pace_core_observe(rt_pace_core *core, uint32_t n_row, bool full, uint64_t took_ns)
{
    if (core->goal_ns == 0 || took_ns == 0 || (took_ns <= core->goal_ns && !full)) {
        return;
    }
    double fit = (double)n_row * ((double)core->goal_ns / (double)took_ns);
    uint32_t least = core->row_max < RT_PACE_ROWS_MIN ? core->row_max : RT_PACE_ROWS_MIN;
    uint64_t rows = fit < (double)core->row_max ? (uint64_t)fit : core->row_max;
    rows = u64_between(core->rows / 2, rows, 2ull * core->rows);
    core->rows = (uint32_t)u64_between(least, rows, core->row_max);
}
