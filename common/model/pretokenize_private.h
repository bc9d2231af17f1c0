/* The pre-tokenizer: a text is cut by a few regular expressions one after the other, each on the pieces that
 * the one before left (behaviour "Isolated": matches and the gaps between them are both pieces). Thread: any
 * once filled; each call brings its own md_pretok_scratch. */
#pragma once
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/status.h"

enum { MD_SPLITS_MAX = 8 };

typedef struct md_pretok {
    pcre2_code *split[MD_SPLITS_MAX];
    uint32_t n_splits;
    pcre2_match_context *limits;
} md_pretok;

typedef void (*md_piece_text_fn)(void *ctx, const char *piece, size_t n);

void md_pretok_init(md_pretok *pretok);
void md_pretok_fini(md_pretok *pretok);
/* Compiles the next pattern. CM_E_CORRUPT when it does not compile, may match nothing, or is one too many. */
CM_MUST_CHECK cm_status md_pretok_add(md_pretok *pretok, const char *pattern, size_t n, cm_error *err);
/* Calls fn for the pieces of valid UTF-8 text, in order; together they are the text. match: room for one pair
 * of offsets, of this call. */
void md_pretok_run(const md_pretok *pretok, pcre2_match_data *match, const char *text, size_t n,
                   md_piece_text_fn fn, void *ctx);
