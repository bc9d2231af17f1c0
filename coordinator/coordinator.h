/* A coordinator as an engine: its machine (co_core), its log, its sessions and the admin service on a loop.
 * Used by the process' main, by tools that hold a whole cluster and by tests. Thread: the loop's. */
#pragma once
#include "common/proc/loop.h"
#include "coordinator/co_config.h"

typedef struct co_coordinator co_coordinator;

typedef enum co_role_now {
    CO_ROLE_NOW_UNKNOWN, /* the store has not answered yet */
    CO_ROLE_NOW_ACTIVE,
    CO_ROLE_NOW_STANDBY, /* members are sent on to the active one */
} co_role_now;

typedef struct co_coordinator_events {
    void (*role)(void *ctx, co_role_now now); /* it has changed */
    /* Its store is damaged: a person has to look. Stop and destroy it. */
    void (*failed)(void *ctx, const cm_error *err);
} co_coordinator_events;

/* Listens when it returns. config is borrowed for the call. CM_E_EXISTS: address or store folder is in use by
 * another coordinator; err names which, and what to do. */
CM_MUST_CHECK cm_status co_coordinator_create(pc_loop *loop, const co_config *config,
                                              co_coordinator **coordinator_out, cm_error *err);
/* events is copied. Of what has already happened role tells at once. */
void co_coordinator_watch(co_coordinator *coordinator, const co_coordinator_events *events, void *ctx);
co_role_now co_coordinator_role(const co_coordinator *coordinator);
const char *co_coordinator_address(const co_coordinator *coordinator); /* "host:port" really in use */
/* Ends all sessions and takes no more; members go on with the epoch in force. done runs when the sessions
 * have ended, at the latest after a second. Once. */
void co_coordinator_stop(co_coordinator *coordinator, pc_fn done, void *arg);
void co_coordinator_destroy(co_coordinator *coordinator); /* NULL is fine */
