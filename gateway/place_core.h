/* Which router computes which stream, as a pure machine: a stream whose router is lost, full or wrong goes to
 * another, or back to the same one once it is linked again, until one of them has ended it or none could for
 * reopen_ms. Says what to do, one action at a time; sends nothing itself. No I/O, no clock, no randomness:
 * time is an argument, jitter is drawn from a counter. Thread: one at a time.
 *
 * A lost link is tried again at once. Its streams wait for the outcome, rebind_ms at most: linked again, the
 * router still has them and they go on there (resume); unreachable, they queue for another (open, with the
 * tokens they have). Nothing is refused to a stream that a client has seen accepted: it queues, first come
 * first served, for whichever router takes it; who waits for its turn at one router holds up nobody else.
 * Reopening is paced: at most opens_max unanswered ones at a router, and a router that refuses gets none for
 * a while that doubles with every refusal. A new stream passes no queue: it is told at once that all are
 * full.
 *
 * A prompt that begins as an earlier one did is best computed where that was: of the routers that have hardly
 * more to do than the one with the least, a stream goes to the one that its affinity chooses (rendezvous
 * hashing, over names that all gateways have in common, so that gateways agree and a router that comes or
 * goes moves only its own).
 *
 * A request may be what ends its routers. A router that is lost while it has a stream, and does not come back
 * with it, counts as a death under that stream until its next token, or until that router has it still after
 * all (its link was away for longer): after deaths_max the stream is refused for good. Those that merely were
 * there are cleared by their next token, and from DEATHS_SUSPECT on a stream is tried apart: one such stream
 * at a router at a time, until a token clears it, so that who is refused was with none of its like at the
 * last. Waiting for the trials of others costs it none of reopen_ms, but for what one takes beyond reopen_ms
 * itself.
 *
 *   NONE -> WAITING -> ASKED -> RUNNING ;  ASKED, RUNNING -> LOST -> WAITING ;  any -> NONE */
#pragma once
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>

#include "common/base/status.h"

typedef struct gw_place_router gw_place_router;

typedef enum gw_spot_state {
    GW_SPOT_NONE,
    GW_SPOT_WAITING, /* for a router */
    GW_SPOT_ASKED,   /* opened or resumed at one that has not answered yet */
    GW_SPOT_RUNNING,
    GW_SPOT_LOST,   /* its router's link is down: waits for that very router */
    GW_SPOT_FAILED, /* given up; GW_PLACE_GIVE_UP is on its way */
} gw_spot_state;

/* One stream's place; embedded in the stream, zeroed before gw_place_begin. */
typedef struct gw_spot {
    TAILQ_ENTRY(gw_spot) link;      /* in the list of its state */
    TAILQ_ENTRY(gw_spot) copy_link; /* in its copy's router's */
    gw_spot_state state;
    gw_place_router *router; /* ASKED, RUNNING, LOST */
    uint64_t
        left; /* a router that may still have it, or did: it goes on there if it can; its number; 0: none */
    uint64_t copy;     /* another one, whose copy nobody needs; 0: none */
    uint64_t affinity; /* given by the owner: equal for streams that are best computed at the same router; 0:
                          whichever has the least to do */
    bool once;         /* given by the owner: not tried again */
    bool accepted;     /* by any router, ever */
    bool resuming;     /* ASKED by a resume */
    bool counted;      /* ASKED and among its router's unanswered */
    bool tried;        /* at its router on trial */
    uint32_t n_deaths; /* of routers that had it, since its newest token */
    uint64_t died;     /* the last of them; its number; 0: none */
    uint64_t
        stalled_ms; /* since when it has been without a router that gives it tokens; UINT64_MAX: it has one */
    uint64_t told_ms; /* its newest token, or its place */
    cm_status status; /* of the last refusal */
} gw_spot;
typedef TAILQ_HEAD(gw_spot_list, gw_spot) gw_spot_list;

typedef struct gw_place_limits {
    uint64_t reopen_ms;  /* a stream is given up after so long without a token from any router */
    uint64_t rebind_ms;  /* a lost link's streams wait for it so long */
    uint64_t leave_ms;   /* streams of a router that left the epoch move on after so long without a token */
    uint32_t opens_max;  /* unanswered reopens at one router */
    uint32_t deaths_max; /* of routers under one stream without a token; 0: never too many */
    uint64_t seed;       /* of the jitter */
} gw_place_limits;

typedef struct gw_place {
    gw_place_limits limits;
    TAILQ_HEAD(, gw_place_router) routers; /* in the order they came */
    gw_spot_list waiting, failed;
    gw_spot *next;       /* of waiting: those before it can go nowhere for now; NULL: all were seen */
    bool full;           /* likewise: one before it waits for whichever router takes it */
    bool changed;        /* something happened since */
    uint64_t look_ms;    /* when a router that rests can be asked again: they are looked at anew */
    uint64_t n_copied;   /* spots with a copy */
    uint64_t n_looks;    /* spots looked at so far: what all of it costs */
    uint64_t give_up_ms; /* nobody waiting or lost is to be given up before */
    uint64_t tried_ms;   /* until then some stream was on trial, and others waited for it */
    uint64_t trial_ms;   /* likewise: none of those that run is waited for any longer; 0: none runs */
    uint64_t n_drawn;    /* of the jitter */
} gw_place;

void gw_place_init(gw_place *place, const gw_place_limits *limits);
void gw_place_fini(gw_place *place); /* all spots have ended */

/* ---- routers; number: given by the caller, never 0, one for each life of a router process ---- */
/* What all gateways know it by; its number until then. */
void gw_place_name(gw_place *place, uint64_t number, uint64_t name);
void gw_place_up(gw_place *place, uint64_t number);
void gw_place_down(gw_place *place, uint64_t now_ms, uint64_t number);
void gw_place_unreachable(gw_place *place, uint64_t number); /* an attempt to link it again has failed */
typedef enum gw_place_standing {
    GW_PLACE_MEMBER,
    GW_PLACE_DRAINING, /* gets no more streams, finishes those it has */
    GW_PLACE_OUT, /* likewise, but its link may be all that it has left: streams move on when no tokens come
                   */
} gw_place_standing;
void gw_place_stands(gw_place *place, uint64_t now_ms, uint64_t number, gw_place_standing standing);
void gw_place_gone(gw_place *place, uint64_t now_ms, uint64_t number); /* it will not come back; down or up */
void gw_place_load(gw_place *place, uint64_t number, uint64_t n_sequences);
bool gw_place_hosts(const gw_place *place, uint64_t number); /* some stream is there */

/* ---- streams ---- */
/* number: a router that has it already, to be resumed there; 0: a new one. */
void gw_place_begin(gw_place *place, uint64_t now_ms, gw_spot *spot, uint64_t number);
/* A word of its router that is no failure; with tokens or without. Fine also while it waits for another. */
void gw_place_word(gw_place *place, uint64_t now_ms, gw_spot *spot, bool tokens);
/* Its router failed or refused it, or said what cannot be. CM_E_REFUSED: the router is being drained and
 * takes none; it gets no more, and the stream goes to another however busy that was. true: it will be asked
 * for elsewhere; false: this failure is the stream's own, or nobody else can help: it has no place any more,
 * gw_place_end is next. */
CM_MUST_CHECK bool gw_place_refused(gw_place *place, uint64_t now_ms, gw_spot *spot, cm_status status);
/* Whatever its state. Out come routers that are linked and may have a copy of it, besides the one where it
 * was asked for last; how many. Those that are not linked let go of theirs in their own time. */
enum { GW_PLACE_COPIES = 2 };
uint32_t gw_place_end(gw_place *place, gw_spot *spot, uint64_t routers_out[GW_PLACE_COPIES]);

/* ---- what to do ---- */
typedef enum gw_place_act {
    GW_PLACE_OPEN, /* open spot at router with the tokens it has; it may be open at another that gives none */
    GW_PLACE_RESUME,  /* the router has it: take it over from there, behind the tokens it has */
    GW_PLACE_FORGET,  /* the router has a copy that nobody needs: spot runs elsewhere */
    GW_PLACE_GIVE_UP, /* spot has no place any more, gw_place_end is next; status: why it was refused last,
                         CM_OK: no router was there */
    GW_PLACE_CONDEMN, /* likewise, because deaths_max routers died under it */
} gw_place_act;
typedef struct gw_place_action {
    gw_place_act act;
    gw_spot *spot;
    uint64_t router;
    cm_status status;
} gw_place_action;
/* false: nothing more. Ask after any of the calls above, and when gw_place_due says so. */
bool gw_place_next(gw_place *place, uint64_t now_ms, gw_place_action *action_out);
/* After gw_place_next said false: when time alone makes something to do; UINT64_MAX: never. May be too early.
 */
uint64_t gw_place_due(const gw_place *place, uint64_t now_ms);
