/* Into how many micro-batches a step is cut, and where, as a pure machine. With two, the rows of one fly to
 * the experts while the other is computed; but every weight is read once for each, by the router and by the
 * workers. So what pays is measured, on whatever hardware this is: per number of rows, by powers of two, a
 * running mean of a step's time over its rows, for one and for two. One is in force at first. Two are tried
 * for a few steps when a good part of the steps went by in waiting for experts, and stay if they were better
 * by a margin; the one not in force is tried again when the steps since took 32 times as long as the trial,
 * so that trials cost a few percent at most. How a step is cut never changes a bit.
 *
 * Used by the engine. A value; owns nothing. Thread: its owner's. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "kernels/kn.h"

enum {
    RT_MICRO_MAX = 2,
    RT_MICRO_ROWS_MIN = 16, /* fewer rows are not worth cutting */
    RT_MICRO_BUCKETS = 17,  /* 1, 2 .. 3, 4 .. 7 rows and so on; the last has no end */
};

typedef struct rt_micro_bucket {
    bool two;             /* in force */
    bool trial;           /* the other is being tried */
    uint32_t n_step;      /* since the last change between the two */
    uint64_t ns;          /* that those steps took */
    uint64_t trial_ns;    /* that the last trial took; 0: there was none */
    double wait;          /* part of the time spent waiting, a running mean of the steps with one */
    double ns_per_row[2]; /* with one, with two */
    uint32_t n_mean[2];   /* steps in that mean; 0: never tried */
} rt_micro_bucket;

typedef struct rt_micro_core {
    uint32_t fixed; /* 1, 2: always, where there are as many rows; 0: what pays */
    rt_micro_bucket buckets[RT_MICRO_BUCKETS];
} rt_micro_core;

void rt_micro_core_init(rt_micro_core *core, uint32_t fixed);
/* Micro-batches of a step of n_row rows: 1 or 2. */
uint32_t rt_micro_core_count(const rt_micro_core *core, uint32_t n_row);
/* A step is done that was cut into n of them. waited_ns of took_ns nothing could be computed. */
void rt_micro_core_observe(rt_micro_core *core, uint32_t n_row, uint32_t n, uint64_t took_ns,
                           uint64_t waited_ns);

/* The first row of the second micro-batch, from 1 to n_row - 1: where a segment begins if one does in the
 * middle half of the rows, else the middle. n_row: at least 2. */
uint32_t rt_micro_cut(const kn_seg *segs, uint32_t n_seg, uint32_t n_row);
