/* What a router holds for gateways: the log of every sequence it computes, who is to be told about it, and
 * for a while the sequences that nobody asks for at the moment. A pure machine over the scheduler: gateways'
 * words in become calls on it, its words become logs, and links read those at their own pace. No I/O, no
 * clock, no randomness: time is an argument. Thread: one at a time.
 *
 * A sequence belongs to the link it was opened on. A link that goes down leaves those that have a key behind:
 * they run on for grace_ms, for whoever names the key; the others are cancelled. One that has ended is kept
 * as long, told or not, because the gateway that was told may die before its client was. Whoever resumes a
 * sequence gets it, also from a link that seems to be up, unless a client that came later has it: a gateway
 * that does not know yet that its client went elsewhere must not take the stream back. A cancel ends it at
 * once, whatever its state. Memory: logs of running sequences grow with their tokens; ended ones and what
 * gateways leave with their sequences stay below ended_max and bytes_max, the oldest ended ones go first. */
#pragma once
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>

#include "common/base/map.h"
#include "router/sched/sched_core.h"

enum { RT_KEEP_ID_BYTES = 16 };

typedef struct rt_keep rt_keep;
typedef struct rt_kept rt_kept;
typedef TAILQ_HEAD(rt_kept_list, rt_kept) rt_kept_list;

typedef struct rt_keep_limits {
    uint32_t live_max;  /* as many sequences as the scheduler holds at most */
    uint32_t ended_max; /* ended sequences kept */
    uint64_t bytes_max; /* of all logs and resume blobs; running sequences are opened all the same */
    uint64_t grace_ms;
} rt_keep_limits;

/* One generation, wherever it is computed: proto/engine.proto's SeqKey. */
typedef struct rt_keep_key {
    uint8_t id[RT_KEEP_ID_BYTES];
    uint32_t choice;
    uint64_t birth;
} rt_keep_key;

/* A gateway's link. Embedded in its user; between rt_keep_owner_init and rt_keep_owner_lost. */
typedef struct rt_keep_owner {
    rt_kept_list kept;   /* by owner_link: its sequences, until their ends were told */
    rt_kept_list untold; /* by untold_link: those with something to tell, in the order it came */
    uint32_t n_untold;
    cm_map by_stream; /* of those that run */
} rt_keep_owner;

/* A sequence and what is told about it: the acceptance, then ids n_told and on, then the end. Fields are read
 * by who tells it and written here only. */
struct rt_kept {
    TAILQ_ENTRY(rt_kept) owner_link, untold_link;
    TAILQ_ENTRY(rt_kept) time_link; /* nobody's: by the time it is dropped */
    rt_kept *same_hash;
    uint64_t number;      /* towards the scheduler */
    rt_keep_owner *owner; /* NULL: nobody's */
    uint64_t stream;      /* what owner calls it */
    bool keyed;
    rt_keep_key key;
    uint64_t term; /* when the client came for whom it is told */
    bool live;     /* the scheduler has it */
    bool untold;   /* in its owner's list */
    uint64_t drop_ms;
    uint32_t *ids; /* [n_id] generated ones, those emitted before included */
    uint32_t n_id, cap, n_told;
    uint32_t n_cached; /* tokens of the prompt that were there already */
    bool logprobs;
    uint32_t n_first;           /* tokens without log-probabilities: emitted elsewhere */
    uint32_t n_top;             /* room for each token's likely ones */
    uint32_t n_top_told;        /* as many there are of each */
    float *token_logprob, *top; /* [cap], [cap][n_top] */
    uint32_t *top_id;           /* [cap][n_top] */
    uint8_t *resume;
    size_t n_resume;
    bool finished;  /* ended by rt_keep_finish: the router never came to an end of its own */
    rt_seq_end end; /* with everything below, as in rt_word */
    uint32_t stop_id;
    cm_status status;
    char *text;
    uint64_t bytes; /* counted of it */
};

/* sched is borrowed; its keys are this machine's from now on. */
rt_keep *rt_keep_create(const rt_keep_limits *limits, rt_sched *sched);
/* All owners were lost before. The scheduler's sequences are cancelled. */
void rt_keep_destroy(rt_keep *keep);
void rt_keep_owner_init(const rt_keep *keep, rt_keep_owner *owner);
void rt_keep_owner_lost(rt_keep *keep, uint64_t now_ms, rt_keep_owner *owner);

/* ---- what gateways say ---- */
typedef struct rt_keep_offer {
    const rt_keep_key *key; /* NULL: it ends with its link */
    uint64_t term;          /* when the gateway's client came */
    const void *resume;     /* [n_resume] copied if it fits */
    size_t n_resume;
} rt_keep_offer;
/* request->key.stream: what owner calls it. The answer, acceptance or refusal, is something to tell.
 * CM_E_EXISTS: it is here already and can be resumed. request->constraint is given, whatever the answer. */
void rt_keep_open(rt_keep *keep, uint64_t now_ms, rt_keep_owner *owner, const rt_seq_request *request,
                  const rt_keep_offer *offer);
/* The answer is status and text. */
void rt_keep_refuse(rt_keep *keep, rt_keep_owner *owner, uint64_t stream, cm_status status, const char *text);
/* Tokens from the from-th on are told to owner. CM_E_NOT_FOUND is told if it is not here, CM_E_CANCELLED if
 * it is somebody's who came later. */
void rt_keep_resume(rt_keep *keep, rt_keep_owner *owner, uint64_t stream, const rt_keep_offer *offer,
                    uint64_t from);
/* Its client has all it wanted: computes no more and keeps the log, as of one that has ended. */
void rt_keep_finish(rt_keep *keep, uint64_t now_ms, rt_keep_owner *owner, uint64_t stream);
void rt_keep_cancel(rt_keep *keep, rt_keep_owner *owner, uint64_t stream);
void rt_keep_cancel_copy(rt_keep *keep, const rt_keep_key *key); /* nobody's only */
void rt_keep_detach(rt_keep *keep, uint64_t now_ms, rt_keep_owner *owner, uint64_t stream);
/* Up to n_max sequences of an id that may be resumed; of several requests with that id, the newest. */
uint32_t rt_keep_find(const rt_keep *keep, const uint8_t id[RT_KEEP_ID_BYTES], const rt_kept **kept_out,
                      uint32_t n_max);

/* ---- what the scheduler says ---- */
void rt_keep_word(rt_keep *keep, uint64_t now_ms, const rt_word *word);

/* ---- telling ---- */
/* n ids after the told ones were told, and the acceptance, and with the last id the end. kept may be gone. */
void rt_keep_told(rt_keep *keep, uint64_t now_ms, rt_kept *kept, uint32_t n);

/* ---- time ---- */
void rt_keep_expire(rt_keep *keep, uint64_t now_ms);
uint64_t rt_keep_due(const rt_keep *keep); /* UINT64_MAX: nothing waits for its time */

typedef struct rt_keep_ledger {
    uint32_t n_live, n_orphan, n_ended; /* running; of these, nobody's; ended ones kept */
    uint64_t n_bytes;
} rt_keep_ledger;
void rt_keep_ledger_get(const rt_keep *keep, rt_keep_ledger *ledger_out);
