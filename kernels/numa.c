#include "kernels/numa.h"

#include <errno.h>
#include <hwloc.h>
#include <stdio.h>
#include <string.h>

#include "common/base/log.h"
#include "common/base/mem.h"

struct kn_numa {
    hwloc_topology_t topology;
    hwloc_nodeset_t nodes; /* with cores this process may use; one of them after it was bound to it */
};

/* The cores of the node that the process may use. To be freed. */
static hwloc_cpuset_t usable_cores(hwloc_topology_t topology, hwloc_obj_t node)
{
    hwloc_cpuset_t cores = hwloc_bitmap_alloc();
    if (hwloc_get_cpubind(topology, cores, HWLOC_CPUBIND_PROCESS) != 0) {
        hwloc_bitmap_copy(cores, hwloc_topology_get_allowed_cpuset(topology));
    }
    hwloc_bitmap_and(cores, cores, node->cpuset);
    return cores;
}

static void find_nodes(kn_numa *numa)
{
    hwloc_obj_t node = NULL;
    while ((node = hwloc_get_next_obj_by_type(numa->topology, HWLOC_OBJ_NUMANODE, node)) != NULL) {
        hwloc_cpuset_t cores = usable_cores(numa->topology, node);
        if (!hwloc_bitmap_iszero(cores)) {
            hwloc_bitmap_set(numa->nodes, node->os_index);
        }
        hwloc_bitmap_free(cores);
    }
}

static cm_status refuse_node(const kn_numa *numa, const char *node, cm_error *err)
{
    char names[256];
    hwloc_bitmap_list_snprintf(names, sizeof(names), numa->nodes);
    return cm_error_set(
        err, CM_E_CONFIG, "numa_node",
        "there is no NUMA node \"%s\" with cores that this process may use; there are %s, and any", node,
        names);
}

static cm_status keep_to(kn_numa *numa, const char *node, cm_error *err)
{
    unsigned index;
    char rest;
    hwloc_cpuset_t cores;
    int rc, error;
    if (sscanf(node, "%5u%c", &index, &rest) != 1 || !hwloc_bitmap_isset(numa->nodes, index)) {
        return refuse_node(numa, node, err);
    }
    cores = usable_cores(numa->topology, hwloc_get_numanode_obj_by_os_index(numa->topology, index));
    rc = hwloc_set_cpubind(numa->topology, cores, HWLOC_CPUBIND_PROCESS);
    error = errno;
    hwloc_bitmap_free(cores);
    if (rc != 0) {
        return cm_error_set(err, CM_E_DEVICE, "numa_node", "this process cannot be bound to NUMA node %u: %s",
                            index, strerror(error));
    }
    hwloc_bitmap_only(numa->nodes, index);
    cm_info("keeps to NUMA node %u", index);
    return CM_OK;
}

cm_status kn_numa_open(const char *node, kn_numa **numa_out, cm_error *err)
{
    kn_numa *numa = cm_alloc(sizeof(*numa));
    cm_status status = CM_OK;
    numa->nodes = hwloc_bitmap_alloc();
    if (hwloc_topology_init(&numa->topology) != 0 || hwloc_topology_load(numa->topology) != 0) {
        hwloc_bitmap_free(numa->nodes);
        cm_free(numa);
        return cm_error_set(err, CM_E_DEVICE, "numa_node", "the system does not tell its cores: %s",
                            strerror(errno));
    }
    find_nodes(numa);
    if (strcmp(node, "any") != 0) {
        status = keep_to(numa, node, err);
    } else if (kn_numa_count(numa) > 1) {
        cm_info("weights are spread over %u NUMA nodes; faster: a process for each, with --numa-node N",
                kn_numa_count(numa));
    }
    if (status != CM_OK) {
        kn_numa_close(numa);
        return status;
    }
    *numa_out = numa;
    return CM_OK;
}

void kn_numa_close(kn_numa *numa)
{
    if (numa != NULL) {
        hwloc_topology_destroy(numa->topology);
        hwloc_bitmap_free(numa->nodes);
        cm_free(numa);
    }
}

uint32_t kn_numa_count(const kn_numa *numa)
{
    return (uint32_t)hwloc_bitmap_weight(numa->nodes);
}

void kn_numa_spread(const kn_numa *numa, void *at, size_t n_bytes)
{
    if (kn_numa_count(numa) > 1) {
        (void)hwloc_set_area_membind(numa->topology, at, n_bytes, numa->nodes, HWLOC_MEMBIND_INTERLEAVE,
                                     HWLOC_MEMBIND_BYNODESET);
    }
}
