/* What coordinator/store_etcd.c stands on, simulated: timers of a process, calls that may be lost on their
 * way there or back, and the part of etcd's API that the log uses, with leases on the virtual clock. The
 * store and its transactions are the real ones. Thread: one. */
#pragma once
#include <sys/types.h>

#include "common/proc/loop.h"
#include "tests/sim/sim.h"

/* The keys and leases; made with the world. */
void sim_etcd_start(sim *s);
void sim_etcd_fini(sim *s);
/* What the store is compiled to call instead of the system's. */
uint64_t sim_store_ms(void);
uint64_t sim_store_u64(void);
void sim_store_random(void *out, unsigned long n_bytes);
pid_t sim_store_pid(void);
int sim_store_host(char *name, size_t n);
/* A process as the loop that its store runs on. */
static inline pc_loop *sim_loop(sim_proc *proc)
{
    return (pc_loop *)proc;
}
