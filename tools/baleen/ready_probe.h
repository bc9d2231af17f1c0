/* Asks a gateway's GET /ready, one request at a time, without blocking. Thread: the loop's. */
#pragma once
#include <stdbool.h>

#include "common/proc/loop.h"

typedef struct ready_probe ready_probe;

/* address: "host:port", as the gateway told it. secured: it speaks TLS; whose certificate that is does not
 * matter, it is the process that we have started. */
ready_probe *ready_probe_create(pc_loop *loop, const char *address, bool secured);
void ready_probe_destroy(ready_probe *probe); /* NULL is fine */
/* Asks, unless a question is on its way. */
void ready_probe_ask(ready_probe *probe);
bool ready_probe_ok(const ready_probe *probe); /* the last answer was 200 */
/* Why not, from the last answer, for people. */
const char *ready_probe_reason(const ready_probe *probe);
