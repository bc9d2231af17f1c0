/* The world of an mpirun line as one process has it: its start and end, who may enter MPI, which ports are in
 * use, and the messages that come for none. Thread: any. */
#pragma once
#include "common/net/net_mpi.h"

enum { MPI_PORTS_MAX = 16 }; /* objects of one process; each has the tags 2 * port and 2 * port + 1 */

/* MPI is entered by one at a time, between these; the functions below do so themselves. */
void mpi_world_lock(void);
void mpi_world_unlock(void);
/* Valid once a port was taken. */
int mpi_world_rank(void);
int mpi_world_size(void);
/* Another one at each call. */
uint32_t mpi_world_number(void);

/* Starts MPI if need be. CM_E_DEVICE: it does not start; CM_E_CAPACITY: all ports are in use. */
CM_MUST_CHECK cm_status mpi_world_take_port(uint32_t *port_out, cm_error *err);
void mpi_world_listen(uint32_t port); /* others may connect to it */
bool mpi_world_listens(uint32_t port);
/* What comes for it from now on is thrown away, until somebody takes it again. */
void mpi_world_free_port(uint32_t port);
/* Throws away what came for ports that are closed. Does not wait. */
void mpi_world_discard(void);

/* As net_mpi_module.share. */
cm_status mpi_world_share(const char *mine, char coordinator_out[NET_ADDRESS_BYTES], cm_error *err);
