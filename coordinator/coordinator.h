/* A coordinator as an engine: its machine (co_core), its log, its sessions and the admin service on a loop.
 * Used by the process' main, by tools that hold a whole cluster and by tests. Thread: the loop's. */
#pragma once
#include "common/proc/loop.h"
#include "coordinator/co_config.h"

typedef struct co_coordinator co_coordinator;

/* Listens when it returns. config is borrowed for the call. CM_E_EXISTS: address or store folder is in use by
 * another coordinator; err names which, and what to do. */
CM_MUST_CHECK cm_status co_coordinator_create(pc_loop *loop, const co_config *config,
                                              co_coordinator **coordinator_out, cm_error *err);
const char *co_coordinator_address(const co_coordinator *coordinator); /* "host:port" really in use */
/* Ends all sessions and takes no more; members go on with the epoch in force. done runs when the sessions
 * have ended, at the latest after a second. Once. */
void co_coordinator_stop(co_coordinator *coordinator, pc_fn done, void *arg);
void co_coordinator_destroy(co_coordinator *coordinator); /* NULL is fine */
