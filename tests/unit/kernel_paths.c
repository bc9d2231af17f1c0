#include "tests/unit/kernel_paths.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "tests/unit/kernel_random.h"

void keep(rig *r, cm_bytes *out, kn_ptr at, uint64_t n)
{
    void *copy = cm_alloc(n);
    rig_down(r, copy, at, n);
    cm_bytes_append(out, copy, n);
    cm_free(copy);
}

uint32_t next_cut(uint32_t cut, uint32_t at, uint32_t n)
{
    return cut == 0 || n - at < cut ? n - at : cut;
}

const kn_limits SMALL_DIMS = {.n_row = 1024,
                              .n_in = 6144,
                              .n_inner = 320,
                              .n_head = 11,
                              .head_dim = 96,
                              .n_key = 256,
                              .n_index_row = 3001,
                              .n_expert = 40};

void compare_paths(scenario_fn scenario, const kn_limits *limits)
{
    static const struct {
        uint32_t n_threads, cut;
    } ways[] = {{1, 0}, {1, 1}, {2, 3}, {3, 8}, {3, 0}};
    cm_bytes want;
    rig r;
    cm_bytes_init(&want, 0);
    rig_open(&r, "ref", NULL, 1, limits);
    scenario(&r, 0, &want);
    rig_close(&r);
    for (uint32_t i_isa = 0; kn_cpu_isa_at(i_isa) != NULL; i_isa++) {
        for (size_t i = 0; i < sizeof(ways) / sizeof(ways[0]); i++) {
            cm_bytes got;
            cm_bytes_init(&got, 0);
            rig_open(&r, "cpu", kn_cpu_isa_at(i_isa), ways[i].n_threads, limits);
            scenario(&r, ways[i].cut, &got);
            assert_int_equal(got.len, want.len);
            for (size_t k = 0; k < want.len; k++) {
                if (got.data[k] != want.data[k]) {
                    fail_msg("%s, %u threads, cut %u, seed %llu: byte %zu of %zu differs from ref",
                             kn_device_isa(r.device), ways[i].n_threads, ways[i].cut,
                             (unsigned long long)random_seed, k, want.len);
                }
            }
            cm_bytes_fini(&got);
            rig_close(&r);
        }
    }
    cm_bytes_fini(&want);
}

void compare_ref_cuts(scenario_fn scenario, const kn_limits *limits)
{
    cm_bytes want, got;
    rig r;
    cm_bytes_init(&want, 0);
    cm_bytes_init(&got, 0);
    rig_open(&r, "ref", NULL, 1, limits);
    scenario(&r, 0, &want);
    rig_reset(&r);
    scenario(&r, 3, &got);
    rig_close(&r);
    assert_int_equal(got.len, want.len);
    assert_memory_equal(got.data, want.data, want.len);
    cm_bytes_fini(&want);
    cm_bytes_fini(&got);
}
