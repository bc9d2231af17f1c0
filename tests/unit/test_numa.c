/* Which nodes there are, on machines that hwloc makes up and on this one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <hwloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kn.h"
#include "kernels/numa.h"

static uint32_t count_on(const char *machine, const char *node)
{
    kn_numa *numa;
    cm_error err = {0};
    uint32_t count;
    assert_int_equal(setenv("HWLOC_SYNTHETIC", machine, 1), 0);
    if (kn_numa_open(node, &numa, &err) != CM_OK) {
        fail_msg("%s on %s: %s", node, machine, err.text);
    }
    count = kn_numa_count(numa);
    kn_numa_close(numa);
    assert_int_equal(unsetenv("HWLOC_SYNTHETIC"), 0);
    return count;
}

static void test_nodes(void **state)
{
    (void)state;
    assert_int_equal(count_on("node:1 core:4 pu:1", "any"), 1);
    assert_int_equal(count_on("package:2 node:2 core:4 pu:2", "any"), 4);
    assert_int_equal(count_on("package:2 node:2 core:4 pu:2", "3"), 1);
}

static void test_refused(void **state)
{
    static const char *const wrong[] = {"2", "", "one", "0 1", "-1", "99999", "100000"};
    (void)state;
    assert_int_equal(setenv("HWLOC_SYNTHETIC", "node:2 core:2 pu:1", 1), 0);
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        kn_numa *numa = NULL;
        cm_error err = {0};
        assert_int_equal(kn_numa_open(wrong[i], &numa, &err), CM_E_CONFIG);
        assert_non_null(strstr(err.text, "there are 0-1, and any"));
    }
    assert_int_equal(unsetenv("HWLOC_SYNTHETIC"), 0);
}

/* A device that spreads its memory works as any other, also where the system has one node only. */
static void test_device(void **state)
{
    kn_device *device;
    kn_ptr at;
    cm_error err = {0};
    enum { N_BYTES = 9 << 20 };
    (void)state;
    assert_int_equal(setenv("HWLOC_SYNTHETIC", "node:2 core:2 pu:1", 1), 0);
    assert_int_equal(
        kn_device_open(&(kn_device_options){.isa = "portable", .n_threads = 2, .numa_node = "any"}, &device,
                       &err),
        CM_OK);
    assert_int_equal(unsetenv("HWLOC_SYNTHETIC"), 0);
    assert_int_equal(kn_mem_alloc(device, N_BYTES, &at), CM_OK);
    memset(kn_mem_host(device, at), 1, N_BYTES);
    kn_mem_free(device, at);
    kn_device_close(device);
}

/* This machine, whatever it has: its first node can be kept to. */
static void test_here(void **state)
{
    hwloc_topology_t topology;
    char node[16];
    kn_numa *numa;
    cm_error err = {0};
    (void)state;
    assert_int_equal(hwloc_topology_init(&topology), 0);
    assert_int_equal(hwloc_topology_load(topology), 0);
    (void)snprintf(node, sizeof(node), "%u",
                   hwloc_get_obj_by_type(topology, HWLOC_OBJ_NUMANODE, 0)->os_index);
    if (kn_numa_open(node, &numa, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    assert_int_equal(kn_numa_count(numa), 1);
    kn_numa_close(numa);
    hwloc_topology_destroy(topology);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nodes),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_device),
        cmocka_unit_test(test_here),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
