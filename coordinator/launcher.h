/* The one process, if any, that can start and stop workers for us (baleen up): its stream, what it runs,
 * orders to it. Thread: the loop's. */
#pragma once
#include "common/proc/rpc_server.h"
#include "coordinator/co_core.h"

typedef struct co_launcher co_launcher;

co_launcher *co_launcher_create(void);
void co_launcher_destroy(co_launcher *launcher); /* after its call was closed */

/* A word of the stream. A launcher that comes takes the place of one that was there. */
void co_launcher_take(co_launcher *launcher, pc_call *call, const Baleen__Control__V1__LauncherState *state);
void co_launcher_closed(co_launcher *launcher, const pc_call *call);
/* Orders as many workers as are missing to n_workers in all, or too many. CM_E_UNAVAILABLE: there is no
 * launcher; CM_E_CAPACITY: so few cannot hold the experts, or others than the launcher's are too many. err
 * says what to do. */
CM_MUST_CHECK cm_status co_launcher_scale(co_launcher *launcher, const co_core *core, uint32_t n_workers,
                                          cm_error *err);
void co_launcher_stop(co_launcher *launcher); /* ends its stream */
