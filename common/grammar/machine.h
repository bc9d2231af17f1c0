/* A grammar at work over a vocabulary: what may come next, token by token. A state is the set of places in
 * the grammar where the text so far may have led, with the calls around each; states are numbered when they
 * are first reached, their successors by byte and their masks are remembered, and forgotten when there are
 * many. All that is asked here depends on the grammar, the vocabulary and the tokens so far, never on what
 * was asked before.
 *
 * No dead ends: a state other than GM_DEAD allows at least one token, because every byte is a token of its
 * own and every place kept can reach the end. Where the grammar is so ambiguous that a state would have more
 * than GM_PLACES_MAX places, or its mask would need too many states, some texts of the grammar are not
 * allowed; what is allowed is always of the grammar.
 *
 * Thread: any; calls on one machine take turns. */
#pragma once
#include "common/grammar/grammar.h"
#include "common/model/tokenizer.h"

enum {
    GM_PLACES_MAX = 1024,
    GM_TOKEN_BYTES_MAX = 255, /* longer tokens are never allowed */
};

/* ---- vocabulary: the tokens' bytes as a tree, made once ---- */
typedef struct gm_vocab gm_vocab;
typedef struct gm_vocab_source {
    uint32_t n_id; /* of the model: masks have so many bits */
    /* The bytes of an id that stands for text; NULL: it does not. */
    const uint8_t *(*bytes)(void *ctx, uint32_t id, size_t *n_out);
    void *ctx;
    uint32_t eos, think_end, dsml; /* ids of control tokens; UINT32_MAX: there is none */
} gm_vocab_source;
/* CM_E_UNSUPPORTED: a byte is no token of its own. */
CM_MUST_CHECK cm_status gm_vocab_create(const gm_vocab_source *source, gm_vocab **vocab_out, cm_error *err);
CM_MUST_CHECK cm_status gm_vocab_of_tokenizer(const md_tokenizer *tokenizer, uint32_t n_id,
                                              gm_vocab **vocab_out, cm_error *err);
void gm_vocab_destroy(gm_vocab *vocab);
uint32_t gm_vocab_words(uint32_t n_id); /* 32-bit words of a mask */

/* ---- machine ---- */
typedef struct gm_machine gm_machine;
/* grammar is given; vocab is kept. Held once. */
gm_machine *gm_machine_create(gm_grammar *grammar, const gm_vocab *vocab);
gm_machine *gm_machine_hold(gm_machine *machine);
void gm_machine_release(gm_machine *machine); /* no state is held any more at the last */

/* A state; counted: whoever has one lets it go. Copying one is gm_state_hold. */
typedef uint32_t gm_state;
enum {
    GM_DEAD = 1,  /* not allowed; not counted, as the two others */
    GM_DONE = 2,  /* behind the end of sequence: nothing but that again */
    GM_THINK = 3, /* before </think>: any text, then </think> */
};
/* The beginning: of the text, or of thinking before it. */
gm_state gm_begin(gm_machine *machine, bool thinking);
gm_state gm_state_hold(gm_machine *machine, gm_state state);
void gm_state_release(gm_machine *machine, gm_state state);
/* The state behind id, held; GM_DEAD when the grammar does not allow it. state stays held. */
gm_state gm_advance(gm_machine *machine, gm_state state, uint32_t id);
/* Bit id % 32 of word id / 32 says whether id may come next: text and the control tokens that the grammar
 * names there, the end of sequence exactly when the text is complete. bits [gm_vocab_words]. Not of GM_DEAD.
 */
void gm_mask(gm_machine *machine, gm_state state, uint32_t *bits);
bool gm_is_complete(gm_machine *machine, gm_state state);

typedef struct gm_machine_stats {
    uint64_t n_mask, n_mask_kept; /* asked for ever; of these, found remembered */
    uint32_t n_state, n_kept;     /* states and masks now */
} gm_machine_stats;
void gm_machine_stats_get(gm_machine *machine, gm_machine_stats *stats_out);
