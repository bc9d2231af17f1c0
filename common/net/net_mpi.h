/* Open MPI behind the transport table and at a cluster's start, in a module of its own (baleen-mpi.so beside
 * the programs): who has no Open MPI misses the module and nothing else. The world of an mpirun line is
 * fixed: nobody joins it, whoever leaves waits for the others at its end, and when one process dies mpirun
 * ends all. Thread: any; MPI is entered by one at a time. */
#pragma once
#include "common/net/net.h"

typedef struct net_mpi_module {
    uint32_t version; /* NET_PROTOCOL */
    const net_ops *ops;
    /* Collective: each process of the line calls it once, the coordinator with its address, the others with
     * "". Blocks until all have; coordinator_out: the address of the only one that had one. CM_E_INVALID:
     * none or several had, or nobody else is in this world. CM_E_DEVICE: MPI does not start here. */
    cm_status (*share)(const char *mine, char coordinator_out[NET_ADDRESS_BYTES], cm_error *err);
} net_mpi_module;

/* The module, loaded at the first call. NULL: there is none (err says where it was looked for and why not).
 */
const net_mpi_module *net_mpi_load(cm_error *err);
