/* Scenarios of kernels run by the oracle and by every path of the cpu back-end, with one to three threads and
 * the batch cut into calls in other ways: all must give the same bytes. Thread: one. */
#pragma once
#include <stdint.h>

#include "common/base/bytes.h"
#include "tests/golden/kernel_rig.h"

/* Runs operations on operands that are a function of random_seed alone and appends all their outputs to
 * `out`. How it cuts its batch into calls (cut, see next_cut) must not matter. */
typedef void (*scenario_fn)(rig *r, uint32_t cut, cm_bytes *out);

/* Appends the n bytes at `at`, once all that was queued is done. */
void keep(rig *r, cm_bytes *out, kn_ptr at, uint64_t n);
/* Rows of the call that begins at row `at` of n. Cut 0: all rows in one call; cut k: calls of k rows, the
 * last one shorter. */
uint32_t next_cut(uint32_t cut, uint32_t at, uint32_t n);

/* No larger than what t_kernels and t_layers need, so that scratch is used to its end. */
extern const kn_limits SMALL_DIMS;

/* Fails the test, naming path, threads, cut and seed, where a path differs from the oracle. */
void compare_paths(scenario_fn scenario, const kn_limits *limits);
/* The oracle too gives the same for other cuts. */
void compare_ref_cuts(scenario_fn scenario, const kn_limits *limits);

/* The test test_NAME of the scenario do_NAME. */
#define PATH_TEST(name, limits)                                                                              \
    static void test_##name(void **state)                                                                    \
    {                                                                                                        \
        (void)state;                                                                                         \
        compare_paths(do_##name, &(limits));                                                                 \
    }
