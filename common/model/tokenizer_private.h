/* The opened tokenizer and how it is filled from the file. */
#pragma once
#include <jansson.h>

#include "common/model/bpe_private.h"
#include "common/model/pretokenize_private.h"
#include "common/model/tokenizer.h"

typedef struct md_token {
    uint32_t at, n_bytes; /* in blob */
    bool present, added, special;
} md_token;

/* Added tokens in byte order of their text, for the longest match at a position. */
typedef struct md_added {
    uint32_t *ids; /* [n] */
    uint32_t n;
    uint32_t first[257]; /* ids[first[b]] .. ids[first[b + 1]] begin with byte b */
} md_added;

struct md_tokenizer {
    md_token *tokens; /* [n_tokens] by id */
    uint32_t n_tokens;
    cm_bytes blob; /* their texts */
    uint32_t control[MD_CTL_COUNT];
    md_added added;
    md_bpe bpe;
    md_pretok pretok;
};

/* Fills a zeroed tokenizer whose pretok is initialised. What was filled is freed by md_tokenizer_close even
 * after a failure. CM_E_CORRUPT. */
CM_MUST_CHECK cm_status md_tokenizer_load(md_tokenizer *tokenizer, const json_t *root, uint32_t vocab,
                                          cm_error *err);

/* What md_tokenizer_open does with the file it read. root: borrowed. CM_E_CORRUPT. */
CM_MUST_CHECK cm_status md_tokenizer_from_json(const json_t *root, uint32_t vocab,
                                               md_tokenizer **tokenizer_out, cm_error *err);

/* Length of the longest added token at the front of text, 0 if none; its id in *id_out. */
size_t md_added_match(const md_tokenizer *tokenizer, const uint8_t *text, size_t n, uint32_t *id_out);
void md_added_sort(md_tokenizer *tokenizer);
