/* Where experts should be, by the load that was seen: a pure function from placement and load to the next
 * placement. A step waits in each layer for the slowest rank, so what is made smaller is the sum over layers
 * of the largest load of a rank; ranks that hold copies of an expert share its load. Few experts move at a
 * time, into spare memory, because the old copies are in use until the next epoch is in force. Used by
 * change_core.c and by tests. Thread: any. */
#pragma once
#include <stdint.h>

#include "proto/placement.h"

typedef struct co_balance_report {
    uint32_t n_moves;     /* copies that ranks have to load */
    uint32_t n_dropped;   /* copies that are given up */
    double before, after; /* imbalance: 1 = every rank has the mean in every layer */
} co_balance_report;

/* Sum over layers of the largest load of a rank, in means. 1 without load.
 *   load  [n_layer * n_expert] rows per expert */
double co_balance_imbalance(const pr_placement *place, const uint64_t *load);

/*   capacity   [n_rank] (layer, expert) pairs a rank can hold, what it gives up with the next epoch included
 *   moves_max  n_moves is at most that
 * NULL when nothing is worth moving; the report is filled all the same. Equal inputs, equal result. */
pr_placement *co_balance_plan(const pr_placement *now, const uint64_t *load, const uint64_t *capacity,
                              uint32_t moves_max, co_balance_report *report_out);
