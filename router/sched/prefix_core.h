/* What a router has computed already: KV pages by the tokens they stand for, and the states that sequences
 * can go on from. A pure machine over numbers: no I/O, no clock, no randomness; the memory behind pages and
 * states is the engine's.
 *
 *   tokens   0 .. 127   128 .. 255   256 .. 383
 *   pages    [ p7 ] <--- [ p3 ] <---- [ p9 ]         each names the page before it: a tree, since prompts
 *                 \          `- state 2              that begin alike share pages
 *                  `----- [ p5 ] - state 0
 *
 * A page is free, or private to a sequence that still writes it, or complete and in the tree. It never
 * changes there; any number of sequences hold it, with all pages before it. A page in the tree that nobody
 * holds is kept: as good as free, given up when a page is wanted, the one that was let go of first before
 * others and whatever comes after a page before it. A state is what a sequence has besides pages at a page's
 * end (raw windows, compressor states; kv.h's slot), copied when its rows passed there; it hangs on the last
 * page before it. States are few: of those that hang in the tree the one used longest ago makes room, spare
 * ones first: what a long prompt or a running answer leaves in passing drives out no prompt's end. Tokens are
 * compared one by one, hashes only find them. Sequences of different salts share nothing.
 *
 * Used by the scheduler. Memory: taken at create. Thread: the owner's. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

typedef struct rt_prefix rt_prefix;

enum { RT_SALT_BYTES = 16 };
#define RT_PREFIX_NONE UINT32_MAX /* no page, no state: the beginning of every sequence */

typedef struct rt_prefix_limits {
    uint32_t page_max, page_tokens;
    uint32_t state_max;
} rt_prefix_limits;

rt_prefix *rt_prefix_create(const rt_prefix_limits *limits);
/* No sequence has anything any more. */
void rt_prefix_destroy(rt_prefix *prefix);

/* ---- pages ---- */

/* A private page: a free one, else the oldest kept one. false: sequences have all. */
bool rt_prefix_page_take(rt_prefix *prefix, uint32_t *page_out);
void rt_prefix_page_put(rt_prefix *prefix, uint32_t page); /* a private one */
uint32_t rt_prefix_page_room(const rt_prefix *prefix);     /* so many can be taken */

/* ---- the tree ---- */

typedef struct rt_prefix_hit {
    uint32_t page;    /* the last of them; RT_PREFIX_NONE: nothing to go on from */
    uint32_t n_page;  /* pages that need not be computed */
    uint32_t n_kept;  /* of them: to hold them takes so much of rt_prefix_page_room */
    uint32_t n_known; /* pages of these tokens in the tree; those beyond n_page lack a state */
    uint32_t state;   /* to go on from */
} rt_prefix_hit;

/* Hashes of the pages of a list of tokens, each behind those before: a search fills in what it needs, and who
 * searches for the same tokens again, or for more behind them, need not hash any twice. */
typedef struct rt_prefix_chain {
    uint64_t *hash; /* room for as many as the tokens have pages; the caller's */
    uint32_t n;     /* known; 0 for other tokens or another salt */
} rt_prefix_chain;

/* The longest beginning of tokens [n_token] with a state, short of the last token: that one's row is always
 * computed. Valid until the next call that changes something. */
void rt_prefix_find(const rt_prefix *prefix, const uint8_t salt[RT_SALT_BYTES], const uint32_t *tokens,
                    uint32_t n_token, rt_prefix_chain *chain, rt_prefix_hit *hit_out);
/* A sequence holds what was found: pages_out [n_page], in order. */
void rt_prefix_hold(rt_prefix *prefix, const rt_prefix_hit *hit, uint32_t *pages_out);
/* A private page is complete with tokens [page_tokens], behind `before`, which its sequence holds or is
 * RT_PREFIX_NONE. The sequence holds what is returned: page, or the one that has these tokens already, and
 * page is free. */
uint32_t rt_prefix_add(rt_prefix *prefix, const uint8_t salt[RT_SALT_BYTES], uint32_t before, uint32_t page,
                       const uint32_t *tokens);
/* A sequence lets go of a page and all before it. */
void rt_prefix_release(rt_prefix *prefix, uint32_t page);

/* Nothing of what is there now is found any more: kept pages are free, and what sequences hold has no state.
 * A state that is being written is its sequence's, and is found when it is. */
void rt_prefix_forget(rt_prefix *prefix);

/* ---- states ---- */

/* Room for a state that is to be written. false: all are being written or, for a spare one, worth more. */
bool rt_prefix_state_take(rt_prefix *prefix, bool spare, uint32_t *state_out);
void rt_prefix_state_put(rt_prefix *prefix, uint32_t state); /* it was not written, or is of no use */
/* It is written and hangs on page, which a sequence holds; free again if there is one. spare: it goes before
 * others, until a sequence goes on from it. */
void rt_prefix_state_set(rt_prefix *prefix, uint32_t page, uint32_t state, bool spare);
/* A spare state is of no more use; its sequence has the next one. Fine also when there is none. */
void rt_prefix_state_pass(rt_prefix *prefix, uint32_t page);
/* A spare state is worth as much as others from now on. Fine also when there is none. */
void rt_prefix_state_stay(rt_prefix *prefix, uint32_t page);

typedef struct rt_prefix_ledger {
    uint32_t n_held;             /* pages that sequences have: private ones and held ones; zero at rest */
    uint32_t n_kept;             /* pages kept beside them */
    uint32_t n_state, n_writing; /* states that hang in the tree; that are taken: zero at rest */
} rt_prefix_ledger;
void rt_prefix_ledger_get(const rt_prefix *prefix, rt_prefix_ledger *ledger_out);
