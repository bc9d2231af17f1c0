/* Links to the routers of the epoch in force: made when a router joins, kept up while it is a member, ended
 * when it has left. Sequences are opened and cancelled here, tokens arrive here. Thread: the loop's; events
 * come on it, never from inside a call but gw_routers_epoch (lost). */
#pragma once
#include "common/proc/loop.h"
#include "common/proc/member.h"
#include "proto/engine.pb-c.h"

typedef struct gw_routers gw_routers;
typedef struct gw_router gw_router;

typedef struct gw_routers_events {
    void (*linked)(void *ctx);
    /* Its sequences are gone; router is valid until the callback returns. status CM_OK: it left the epoch. */
    void (*lost)(void *ctx, gw_router *router, cm_status status);
    void (*tokens)(void *ctx, gw_router *router, const Baleen__Engine__V1__SeqTokens *seq);
} gw_routers_events;

typedef struct gw_routers_load {
    uint32_t n_linked;
    uint32_t running, waiting; /* sequences of all linked routers, by their last frames */
} gw_routers_load;

CM_MUST_CHECK cm_status gw_routers_create(pc_loop *loop, const char *backend, const gw_routers_events *events,
                                          void *ctx, gw_routers **routers_out, cm_error *err);
void gw_routers_destroy(gw_routers *routers); /* NULL is fine; no event comes from it */
void gw_routers_identity(gw_routers *routers, uint64_t cluster, uint32_t member_id);
/* See net_key_add and net_key_retire. */
void gw_routers_frame_key(gw_routers *routers, uint64_t cluster, uint64_t epoch, const uint8_t *key);
void gw_routers_retire_keys(gw_routers *routers, uint64_t oldest);
/* Links are made and ended to match. */
void gw_routers_epoch(gw_routers *routers, const pc_epoch *epoch);
gw_routers_load gw_routers_get_load(const gw_routers *routers);

/* The linked router with the fewest sequences, the lowest id among equals; NULL when none is linked. */
gw_router *gw_routers_pick(gw_routers *routers);
uint32_t gw_router_member(const gw_router *router);
/* Both are queued, in order, until the link takes them; what is queued when it goes down is forgotten. */
void gw_router_open(gw_router *router, const Baleen__Engine__V1__SeqOpen *open);
void gw_router_cancel(gw_router *router, uint64_t stream);
