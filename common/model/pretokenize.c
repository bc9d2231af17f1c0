#include "common/model/pretokenize_private.h"

#include "common/base/assert.h"
#include "common/base/bytes.h"

void md_pretok_init(md_pretok *pretok)
{
    *pretok = (md_pretok){.limits = pcre2_match_context_create(NULL)};
    CM_ASSERT(pretok->limits != NULL);
    /* a run of blanks of the size of the whole prompt backtracks once per blank: linear, but above the
     * default */
    pcre2_set_match_limit(pretok->limits, UINT32_MAX);
}

void md_pretok_fini(md_pretok *pretok)
{
    for (uint32_t i = 0; i < pretok->n_splits; i++) {
        pcre2_code_free(pretok->split[i]);
    }
    pcre2_match_context_free(pretok->limits);
}

/* In the tokenizer's own engine \s is the property White_Space; PCRE2's \s also holds U+180E. */
static void translate_spaces(const char *pattern, size_t n, cm_bytes *out)
{
    for (size_t i = 0; i < n; i++) {
        if (pattern[i] != '\\' || i + 1 == n) {
            cm_bytes_append(out, &pattern[i], 1);
            continue;
        }
        i++;
        if (pattern[i] == 's') {
            cm_bytes_append_text(out, "\\p{White_Space}");
        } else if (pattern[i] == 'S') {
            cm_bytes_append_text(out, "\\P{White_Space}");
        } else {
            cm_bytes_append(out, &pattern[i - 1], 2);
        }
    }
}

/* The classes \p{..} are those of the linked PCRE2: version 10.42 knows the characters of Unicode 14.
 * Characters that were assigned later may be cut differently than by the engine the model was trained with.
 */
cm_status md_pretok_add(md_pretok *pretok, const char *pattern, size_t n, cm_error *err)
{
    if (pretok->n_splits == MD_SPLITS_MAX) {
        return cm_error_set(err, CM_E_CORRUPT, "pre_tokenizer", "more than %d Split steps",
                            (int)MD_SPLITS_MAX);
    }
    cm_bytes translated;
    cm_bytes_init(&translated, 0);
    translate_spaces(pattern, n, &translated);
    int code;
    PCRE2_SIZE at;
    pcre2_code *split = pcre2_compile((PCRE2_SPTR)cm_bytes_text(&translated), translated.len,
                                      PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &code, &at, NULL);
    cm_bytes_fini(&translated);
    if (split == NULL) {
        char reason[128];
        pcre2_get_error_message(code, (PCRE2_UCHAR *)reason, sizeof(reason));
        return cm_error_set(err, CM_E_CORRUPT, "pre_tokenizer", "pattern of Split %u: %s at offset %zu",
                            pretok->n_splits, reason, at);
    }
    uint32_t may_be_empty = 0;
    pcre2_pattern_info(split, PCRE2_INFO_MATCHEMPTY, &may_be_empty);
    if (may_be_empty) {
        pcre2_code_free(split);
        return cm_error_set(err, CM_E_CORRUPT, "pre_tokenizer", "pattern of Split %u may match nothing",
                            pretok->n_splits);
    }
    /* without executable memory the interpreter does the same, slower */
    (void)pcre2_jit_compile(split, PCRE2_JIT_COMPLETE);
    pretok->split[pretok->n_splits++] = split;
    return CM_OK;
}

/* True and the range of the next match at or after from. */
static bool next_match(const md_pretok *pretok, uint32_t level, pcre2_match_data *match, const char *text,
                       size_t n, size_t from, size_t *begin_out, size_t *end_out)
{
    const pcre2_code *split = pretok->split[level];
    /* a pattern that cannot match nothing still can by \K, which moves the match's beginning */
    uint32_t options = PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY;
    int rc = pcre2_match(split, (PCRE2_SPTR)text, n, from, options, match, pretok->limits);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
        rc = pcre2_match(split, (PCRE2_SPTR)text, n, from, options | PCRE2_NO_JIT, match, pretok->limits);
    }
    if (rc == PCRE2_ERROR_NOMATCH) {
        return false;
    }
    CM_ASSERT_MSG(rc >= 0, "pcre2_match says %d on %zu bytes", rc, n);
    const PCRE2_SIZE *range = pcre2_get_ovector_pointer(match);
    *begin_out = range[0];
    *end_out = range[1];
    CM_ASSERT_MSG(range[0] >= from && range[1] > range[0], "%zu %zu from %zu", range[0], range[1], from);
    return true;
}

static void split_level(const md_pretok *pretok, uint32_t level, pcre2_match_data *match, const char *text,
                        size_t n, md_piece_text_fn fn, void *ctx)
{
    if (level == pretok->n_splits) {
        fn(ctx, text, n);
        return;
    }
    size_t at = 0, begin, end;
    while (at < n && next_match(pretok, level, match, text, n, at, &begin, &end)) {
        if (begin > at) {
            split_level(pretok, level + 1, match, text + at, begin - at, fn, ctx);
        }
        split_level(pretok, level + 1, match, text + begin, end - begin, fn, ctx);
        at = end;
    }
    if (at < n) {
        split_level(pretok, level + 1, match, text + at, n - at, fn, ctx);
    }
}

void md_pretok_run(const md_pretok *pretok, pcre2_match_data *match, const char *text, size_t n,
                   md_piece_text_fn fn, void *ctx)
{
    split_level(pretok, 0, match, text, n, fn, ctx);
}
