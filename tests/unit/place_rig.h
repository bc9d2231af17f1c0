/* A machine that places streams, and what a test expects of it. Failures are cmocka's. */
#pragma once
#include "gateway/place_core.h"

typedef struct place_rig {
    gw_place place;
    uint64_t now_ms;
} place_rig;
extern place_rig P;

enum { P_REOPEN_MS = 60000 };
void p_begin(uint32_t opens_max, uint32_t deaths_max);
void p_end(void);                        /* all spots have ended */
void p_ask(gw_spot *spot);               /* a new stream, without a router yet */
void p_word(gw_spot *spot, bool tokens); /* its router's */
void p_expect(gw_place_act act, const gw_spot *spot, uint64_t router);
void p_expect_rest(void); /* nothing is to be done */
/* spot ends; its copy at router is forgotten, 0: there is none that can be. */
void p_expect_end(gw_spot *spot, uint64_t router);
