/* Links to the routers of the epoch in force: made when a router joins, kept up while it is a member, ended
 * when it has left and nothing of ours is there any more. Words to routers go out here, theirs arrive here.
 * Thread: the loop's; events come on it, never from inside a call but gw_routers_epoch (stands, gone) and
 * gw_routers_drop_leavers (gone). */
#pragma once
#include "common/proc/loop.h"
#include "common/proc/member.h"
#include "gateway/place_core.h"
#include "proto/engine.pb-c.h"

typedef struct gw_routers gw_routers;
typedef struct gw_router gw_router;

typedef struct gw_routers_events {
    void (*linked)(void *ctx, gw_router *router);
    /* Nothing more comes from it on this link. It is tried again, at once and then ever more slowly. */
    void (*lost)(void *ctx, gw_router *router, cm_status status);
    void (*unreachable)(void *ctx, gw_router *router); /* a try has failed */
    /* The epoch in force says otherwise of it than before: GW_PLACE_MEMBER at first. Once it is GW_PLACE_OUT
     * its link stays until it goes down by itself or gw_routers_drop_leavers ends it. */
    void (*stands)(void *ctx, gw_router *router, gw_place_standing standing);
    void (*gone)(void *ctx, gw_router *router); /* forgotten; valid until the callback returns */
    void (*load)(void *ctx, gw_router *router, uint32_t n_sequences);
    void (*tokens)(void *ctx, gw_router *router, const Baleen__Engine__V1__SeqTokens *seq);
    void (*found)(void *ctx, gw_router *router, const Baleen__Engine__V1__SeqFound *found);
} gw_routers_events;

typedef struct gw_routers_load {
    uint32_t n_linked;         /* that take new streams */
    uint32_t runnable;         /* sequences that those can run at once */
    uint32_t running, waiting; /* sequences of all linked routers of the epoch, by their last frames */
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

/* Given once to every router that is heard of, from 1 up; a process that was started again has another. */
uint64_t gw_router_number(const gw_router *router);
gw_router *gw_routers_get(const gw_routers *routers, uint64_t number); /* NULL: gone */
/* Every router of the epoch, linked or not: NULL begins, NULL ends. Those that leave come too. */
gw_router *gw_routers_next(const gw_routers *routers, const gw_router *router);
bool gw_router_is_up(const gw_router *router);
uint32_t gw_router_member(const gw_router *router);
/* Ends the links of those that have left and are not needed. */
void gw_routers_drop_leavers(gw_routers *routers, bool (*needed)(void *ctx, const gw_router *router));
/* To a linked router: queued, in order, until the link takes it; what is queued when the link goes down is
 * forgotten. To one that is not linked: nothing happens. */
void gw_router_open(gw_router *router, const Baleen__Engine__V1__SeqOpen *open);
void gw_router_cancel(gw_router *router, uint64_t stream);
void gw_router_finish(gw_router *router, uint64_t stream); /* as cancel, but its log is kept for a while */
void gw_router_cancel_copy(gw_router *router, Baleen__Engine__V1__SeqKey *key);
void gw_router_detach(gw_router *router, uint64_t stream);
void gw_router_resume(gw_router *router, const Baleen__Engine__V1__SeqResume *resume);
/* To all that are linked; how many. */
uint32_t gw_routers_forget_prefixes(gw_routers *routers);
void gw_router_find(gw_router *router, const Baleen__Engine__V1__SeqFind *find);
