/* NUMA nodes: memory beside some of a machine's cores. A process either keeps to one node, so that what it
 * allocates is beside the cores that read it (one worker per node: the fastest), or runs on several and has
 * its large blocks spread over them, page by page, so that no node's memory is the one all cores wait for.
 * Thread: start-up; kn_numa_spread any. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common/base/status.h"

typedef struct kn_numa kn_numa;

/* node: "any", or the number of a node as the system counts them: binds this process, with the threads it has
 * and will have, to those cores of the node that it may use. CM_E_CONFIG: no such node, or no core of it may
 * be used (err lists those that may); CM_E_DEVICE: the system refused. */
CM_MUST_CHECK cm_status kn_numa_open(const char *node, kn_numa **numa_out, cm_error *err);
void kn_numa_close(kn_numa *numa); /* the binding stays */
/* Nodes the process runs on. */
uint32_t kn_numa_count(const kn_numa *numa);
/* Spreads memory that nobody has touched yet over the nodes, where there are several. A wish: where the
 * system does not allow it, pages stay where they are touched first. */
void kn_numa_spread(const kn_numa *numa, void *at, size_t n_bytes);
