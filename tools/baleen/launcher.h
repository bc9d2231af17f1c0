/* The stream on which a coordinator orders workers from `baleen up`. Comes again by itself when the
 * coordinator was away. Thread: the loop's. */
#pragma once
#include <stdint.h>

#include "common/proc/loop.h"
#include "common/proc/tls.h"

typedef struct launcher launcher;

typedef struct launcher_events {
    /* The worker processes that we run; called when the coordinator wants to know. Returns how many. */
    uint32_t (*pids)(void *ctx, uint32_t *pids_out, uint32_t n_max);
    void (*order)(void *ctx, uint32_t n_workers); /* that shall run */
    void *ctx;
} launcher_events;

/* address: borrowed for the call. tls: the admin's, kept; NULL: plain. */
launcher *launcher_create(pc_loop *loop, const char *address, pc_tls *tls, const launcher_events *events);
void launcher_changed(launcher *self); /* other workers run now; NULL is fine */
void launcher_destroy(launcher *self); /* NULL is fine; not from inside order */
