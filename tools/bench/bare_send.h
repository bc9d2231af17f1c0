/* A bare send() loop over loopback TCP: the floor under what a server pays for each event it streams. */
#pragma once
#include "common/base/status.h"
#include "common/proc/loop.h"

typedef struct bare_send bare_send;

/* n connections of the process to itself. Runs the loop until they stand. */
CM_MUST_CHECK cm_status bare_send_open(pc_loop *loop, uint32_t n, bare_send **send_out, cm_error *err);
/* Sends n_bytes on each connection, n_times; seconds of this thread's processor time for one send(). What
 * arrives is read in between, outside the measurement. -1: the machine did not take them. */
double bare_send_measure(bare_send *send, uint32_t n_bytes, uint32_t n_times);
void bare_send_close(bare_send *send);
