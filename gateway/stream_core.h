/* The token log of one stream, as a pure machine: what was asked, what has been generated, whether it was
 * accepted and has ended. Routers speak in offsets: tokens that are known already are dropped, if they are
 * the same; a frame that changes or skips tokens, comes after the end or holds more than was asked for is
 * refused, so that nothing a router does wrong can reach a client as text. Owns its lists. No I/O, no clock.
 * Thread: one at a time. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/model/tokenizer.h"
#include "proto/engine.pb-c.h"

enum { GW_CORE_TOP_MAX = 20 }; /* likely tokens told with one */

typedef enum gw_core_state {
    GW_CORE_OPENING, /* asked for, not yet accepted */
    GW_CORE_RUNNING,
    GW_CORE_ENDED,
} gw_core_state;

typedef struct gw_core {
    gw_core_state state;
    bool started; /* some router has accepted it */
    uint32_t vocab, tokens_max;
    bool logprobs;          /* every id must come with some */
    md_ids prompt, emitted; /* owned */
} gw_core;

/* prompt is taken over: the caller's list is empty afterwards. tokens_max >= 1. */
void gw_core_init(gw_core *core, md_ids *prompt, uint32_t tokens_max, uint32_t vocab, bool logprobs);
void gw_core_fini(gw_core *core);

/* What one frame about the stream came to. */
typedef struct gw_core_news {
    bool accepted;      /* the first word of the router that is no failure */
    uint64_t offset;    /* of id[0] among the generated tokens */
    const uint32_t *id; /* in the log: valid until the next frame */
    uint32_t n_id;      /* new ones */
    uint32_t n_known;   /* of the frame, before them: dropped */
    Baleen__Engine__V1__SeqEnd end;
} gw_core_news;

/* Takes a frame into the log. CM_E_PROTOCOL: refused, nothing has changed; err says what was wrong with it.
 */
CM_MUST_CHECK cm_status gw_core_take(gw_core *core, const Baleen__Engine__V1__SeqTokens *frame,
                                     gw_core_news *news_out, cm_error *err);
/* The end was a failure that is not the stream's own: another router is asked to go on from the log. */
void gw_core_reopen(gw_core *core);
