/* Byte-pair encoding of one piece: from single bytes, merge the pair of lowest rank, leftmost first, until
 * none is left. n log n in the bytes of the piece: pieces of many thousand letters occur. Thread: any once
 * filled. */
#pragma once
#include <stdint.h>

#include "common/base/map.h"
#include "common/base/status.h"
#include "common/model/tokenizer.h"

typedef struct md_merge {
    uint32_t left, right; /* ids */
    uint32_t id;          /* of the two joined */
} md_merge;

typedef struct md_bpe {
    uint32_t byte_id[256];
    md_merge *merges; /* [n_merges]; the index is the rank */
    uint32_t n_merges, n_max;
    cm_map by_pair; /* left << 32 | right -> md_merge */
} md_bpe;

/* Working memory of one encode call; grows to the longest piece. */
typedef struct md_bpe_scratch {
    struct md_symbol *symbols;
    uint64_t *heap; /* rank << 32 | position */
    size_t cap;     /* bytes of a piece there is room for */
    size_t n_heap;
} md_bpe_scratch;

void md_bpe_init(md_bpe *bpe, uint32_t n_merges_max);
void md_bpe_fini(md_bpe *bpe);
/* The next rank. CM_E_EXISTS when the pair has one already. */
CM_MUST_CHECK cm_status md_bpe_add(md_bpe *bpe, md_merge merge);
/* Appends the ids of one piece. */
void md_bpe_encode(const md_bpe *bpe, md_bpe_scratch *scratch, const uint8_t *piece, size_t n, md_ids *ids);
void md_bpe_scratch_fini(md_bpe_scratch *scratch);
