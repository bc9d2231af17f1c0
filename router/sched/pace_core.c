#include "router/sched/pace_core.h"

#include "common/base/assert.h"

/* Of the rows a prompt is given: what part of them it may have besides, rather than have it for a step. */
enum { PACE_REST = 4 };

static uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

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

rt_pace_share rt_pace_share_begin(const rt_pace_core *core, uint32_t n_decode, uint32_t n_prompt)
{
    uint32_t rows = core->rows > n_decode + RT_PACE_ROWS_MIN ? core->rows - n_decode : RT_PACE_ROWS_MIN;
    if (core->goal_ns == 0) {
        return (rt_pace_share){.each = UINT32_MAX, .left = UINT32_MAX, .most = UINT32_MAX};
    }
    return (rt_pace_share){.each = n_prompt > 1 ? (rows + 1) / 2 : rows,
                           .left = rows,
                           .most = core->row_max - min_u32(n_decode, core->row_max)};
}

uint32_t rt_pace_share_take(rt_pace_share *share, uint32_t n_want)
{
    uint32_t n = min_u32(share->each, share->left);
    bool few_more = n > 0 && n_want > n && n_want - n <= n / PACE_REST;
    n = min_u32(few_more || n_want < n ? n_want : n, share->most);
    share->full = share->full || n < n_want;
    share->left -= min_u32(n, share->left);
    share->most -= n;
    return n;
}
