/* The model's tokenizer.json: byte-level BPE after an added-token split and three regular expressions
 * (encoding section 2). Nothing about ids is compiled in: everything comes from the file, and a file in which
 * a protocol token is not one id, or whose pre-tokenizer, normalizer, decoder or model differs in kind, is
 * refused. Thread: after open, encode may run on several threads at once (each call has its own scratch). */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/bytes.h"
#include "common/base/status.h"

typedef struct md_tokenizer md_tokenizer;

/* A growing list of token ids. */
typedef struct md_ids {
    uint32_t *id; /* owned */
    size_t n, cap;
} md_ids;
void md_ids_init(md_ids *ids);
void md_ids_fini(md_ids *ids);
void md_ids_push(md_ids *ids, uint32_t id);

/* path: a tokenizer.json. vocab: ids must be below it (geometry.vocab); 0 = do not check. CM_E_CORRUPT names
 * what is wrong. */
CM_MUST_CHECK cm_status md_tokenizer_open(const char *path, uint32_t vocab, md_tokenizer **tokenizer_out,
                                          cm_error *err);
void md_tokenizer_close(md_tokenizer *tokenizer);

typedef enum md_text_kind {
    MD_TEXT_PLAIN,   /* caller text: control spellings are ordinary characters */
    MD_TEXT_CONTROL, /* template text and raw prompts: added tokens are recognised */
} md_text_kind;

/* Appends the ids of text to ids. Invalid UTF-8 is encoded byte by byte (golden/tokenizer/README,
 * bytes.jsonl). Time is linear in n_bytes but for the merges inside one piece. */
void md_tokenizer_encode(const md_tokenizer *tokenizer, const char *text, size_t n_bytes, md_text_kind kind,
                         md_ids *ids);
/* Bytes of one id; borrowed; NULL for an id without a token. */
const uint8_t *md_tokenizer_bytes(const md_tokenizer *tokenizer, uint32_t id, size_t *n_bytes_out);
bool md_tokenizer_is_special(const md_tokenizer *tokenizer, uint32_t id); /* "special": true in the file */
bool md_tokenizer_is_added(const md_tokenizer *tokenizer, uint32_t id);   /* any added token: a control id */
uint32_t md_tokenizer_vocab(const md_tokenizer *tokenizer);               /* highest id + 1 */

/* Ids of the protocol's tokens (encoding section 3), looked up once at open. */
typedef enum md_control {
    MD_CTL_BOS,
    MD_CTL_EOS,
    MD_CTL_USER,
    MD_CTL_ASSISTANT,
    MD_CTL_REMINDER,
    MD_CTL_THINK,
    MD_CTL_THINK_END,
    MD_CTL_DSML,
    MD_CTL_ACTION,
    MD_CTL_QUERY,
    MD_CTL_AUTHORITY,
    MD_CTL_DOMAIN,
    MD_CTL_TITLE,
    MD_CTL_READ_URL,
    MD_CTL_FIM_BEGIN,
    MD_CTL_FIM_HOLE,
    MD_CTL_FIM_END,
    MD_CTL_COUNT
} md_control;
uint32_t md_tokenizer_control(const md_tokenizer *tokenizer, md_control control);
const char *md_control_text(md_control control); /* its spelling */

/* ---- incremental detokenizer ----
 * Only complete UTF-8 leaves; what can no longer become valid leaves at once as U+FFFD (one per maximal
 * invalid part); an incomplete tail leaves as U+FFFD at the flush. A value type of a few bytes: one per
 * stream. */
typedef struct md_detok {
    uint8_t held[4]; /* an incomplete UTF-8 sequence */
    uint8_t n_held;
    bool skip_special;
} md_detok;
void md_detok_init(md_detok *detok, bool skip_special);
void md_detok_push(md_detok *detok, const md_tokenizer *tokenizer, uint32_t id,
                   cm_bytes *text_out); /* appends */
void md_detok_flush(md_detok *detok, cm_bytes *text_out);
/* The same rule for bytes that are no whole token. */
void md_detok_push_bytes(md_detok *detok, const uint8_t *bytes, size_t n, cm_bytes *text_out);
