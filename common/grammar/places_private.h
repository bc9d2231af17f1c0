/* Sets of places in a grammar: where a text may have led. A place is a state and the calls around it, as
 * words {state, n_call, {edge, times begun} per call, innermost last}; a set is its places in order, one
 * behind the other, so equal sets are equal bytes. Pure; memory is kept from call to call. Thread: one at a
 * time. */
#pragma once
#include "common/grammar/build_private.h"

typedef struct gm_places {
    const gm_grammar *grammar;
    /* places looked at since the beginning, each once: those from which a byte or control token leads on are
     * the set, the others were gone through on the way */
    uint32_t *words;
    size_t n_word, word_cap;
    uint32_t *at, *slots; /* [n_at] where each begins, and stands in the table */
    uint32_t n_at;
    uint32_t *table; /* by hash: its number + 1; 0: free */
    bool accept;     /* the text may end here */
    /* the set, made by gm_places_end */
    uint32_t *set;
    size_t n_set, set_cap;
    uint32_t n_place;
    uint32_t *kept; /* [GM_PLACES_MAX] numbers in at */
    uint32_t n_kept;
} gm_places;

void gm_places_init(gm_places *p, const gm_grammar *grammar);
void gm_places_fini(gm_places *p);
/* A new set: add what a step leads to, then end it. */
void gm_places_begin(gm_places *p);
void gm_places_add_start(gm_places *p);
/* Where a byte, or a control token, leads from set [n]. */
void gm_places_add_byte(gm_places *p, const uint32_t *set, size_t n, uint8_t byte);
void gm_places_add_control(gm_places *p, const uint32_t *set, size_t n, md_control control);
/* set with every count that cannot matter within `reach` bytes brought to one value. */
void gm_places_add_near(gm_places *p, const uint32_t *set, size_t n, uint32_t reach);
void gm_places_end(gm_places *p); /* p->set, n_set, accept; empty and not accept: dead */
/* Does a control token lead on from set? */
bool gm_places_has_control(const gm_places *p, const uint32_t *set, size_t n, md_control control);
