#include <stdlib.h>
#include <string.h>

#include "common/base/mem.h"
#include "common/model/tokenizer_private.h"

static const uint8_t *token_text(const md_tokenizer *tokenizer, uint32_t id)
{
    return tokenizer->blob.data + tokenizer->tokens[id].at;
}

static int compare_texts(const void *a, const void *b, void *ctx)
{
    const md_tokenizer *tokenizer = ctx;
    uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;
    uint32_t n_left = tokenizer->tokens[left].n_bytes, n_right = tokenizer->tokens[right].n_bytes;
    int order = memcmp(token_text(tokenizer, left), token_text(tokenizer, right),
                       n_left < n_right ? n_left : n_right);
    return order != 0 ? order : (n_left > n_right) - (n_left < n_right);
}

void md_added_sort(md_tokenizer *tokenizer)
{
    md_added *added = &tokenizer->added;
    for (uint32_t id = 0; id < tokenizer->n_tokens; id++) {
        added->n += tokenizer->tokens[id].added;
    }
    added->ids = cm_alloc(sizeof(uint32_t) * added->n);
    for (uint32_t id = 0, n = 0; id < tokenizer->n_tokens; id++) {
        if (tokenizer->tokens[id].added) {
            added->ids[n++] = id;
        }
    }
    qsort_r(added->ids, added->n, sizeof(uint32_t), compare_texts, tokenizer);
    for (uint32_t i = 0; i < added->n; i++) {
        added->first[token_text(tokenizer, added->ids[i])[0] + 1]++;
    }
    for (uint32_t b = 0; b < 256; b++) {
        added->first[b + 1] += added->first[b];
    }
}

/* First i in [lo, hi) whose text has at depth a byte of at least b; all are longer than depth but perhaps the
 * first. */
static uint32_t lower_bound(const md_tokenizer *tokenizer, uint32_t lo, uint32_t hi, size_t depth, uint32_t b)
{
    while (lo < hi) {
        uint32_t middle = lo + (hi - lo) / 2, id = tokenizer->added.ids[middle];
        if (tokenizer->tokens[id].n_bytes <= depth || token_text(tokenizer, id)[depth] < b) {
            lo = middle + 1;
        } else {
            hi = middle;
        }
    }
    return lo;
}

size_t md_added_match(const md_tokenizer *tokenizer, const uint8_t *text, size_t n, uint32_t *id_out)
{
    const md_added *added = &tokenizer->added;
    uint32_t lo = added->first[text[0]], hi = added->first[text[0] + 1];
    size_t longest = 0;
    for (size_t depth = 1; lo < hi; depth++) {
        /* all in [lo, hi) begin with the first depth bytes of text; the shortest comes first */
        if (tokenizer->tokens[added->ids[lo]].n_bytes == depth) {
            longest = depth;
            *id_out = added->ids[lo];
        }
        if (depth == n) {
            break;
        }
        lo = lower_bound(tokenizer, lo, hi, depth, text[depth]);
        hi = lower_bound(tokenizer, lo, hi, depth, text[depth] + 1u);
    }
    return longest;
}
