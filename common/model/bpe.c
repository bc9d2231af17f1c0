#include "common/model/bpe_private.h"

#include "common/base/assert.h"
#include "common/base/mem.h"

enum { DEAD = UINT32_MAX }; /* id of a symbol that was merged into its left neighbour; also "no neighbour" */

typedef struct md_symbol {
    uint32_t id;
    uint32_t prev, next; /* positions */
} md_symbol;

static uint64_t pair_key(uint32_t left, uint32_t right)
{
    return (uint64_t)left << 32 | right;
}

void md_bpe_init(md_bpe *bpe, uint32_t n_merges_max)
{
    *bpe = (md_bpe){.n_max = n_merges_max};
    bpe->merges = cm_alloc(sizeof(md_merge) * n_merges_max);
    cm_map_init(&bpe->by_pair, n_merges_max > 0 ? n_merges_max : 1);
}

void md_bpe_fini(md_bpe *bpe)
{
    cm_free(bpe->merges);
    cm_map_fini(&bpe->by_pair);
}

cm_status md_bpe_add(md_bpe *bpe, md_merge merge)
{
    CM_ASSERT(bpe->n_merges < bpe->n_max);
    md_merge *slot = &bpe->merges[bpe->n_merges];
    CM_TRY(cm_map_put(&bpe->by_pair, pair_key(merge.left, merge.right), slot));
    *slot = merge;
    bpe->n_merges++;
    return CM_OK;
}

/* ---- heap of candidate merges, least first ----
 * An entry is (rank, position of the left symbol), so that equal ranks come leftmost first. Entries are not
 * removed when a neighbour changes: they are checked when they come out. */

static void heap_push(md_bpe_scratch *scratch, uint64_t entry)
{
    uint64_t *heap = scratch->heap;
    size_t i = scratch->n_heap++;
    for (; i > 0 && heap[(i - 1) / 2] > entry; i = (i - 1) / 2) {
        heap[i] = heap[(i - 1) / 2];
    }
    heap[i] = entry;
}

static uint64_t heap_pop(md_bpe_scratch *scratch)
{
    uint64_t *heap = scratch->heap, least = heap[0], last = heap[--scratch->n_heap];
    size_t n = scratch->n_heap, i = 0;
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && heap[child + 1] < heap[child]) {
            child++;
        }
        if (heap[child] >= last) {
            break;
        }
        heap[i] = heap[child];
    }
    heap[i] = last;
    return least;
}

/* ---- one piece ---- */

static void scratch_reserve(md_bpe_scratch *scratch, size_t n)
{
    if (n > scratch->cap) {
        size_t cap = n < 256 ? 256 : n * 2;
        scratch->symbols = cm_realloc(scratch->symbols, sizeof(md_symbol) * cap);
        /* n - 1 pairs at first, then at most two new ones for each of fewer than n merges */
        scratch->heap = cm_realloc(scratch->heap, sizeof(uint64_t) * cap * 3);
        scratch->cap = cap;
    }
    scratch->n_heap = 0;
}

void md_bpe_scratch_fini(md_bpe_scratch *scratch)
{
    cm_free(scratch->symbols);
    cm_free(scratch->heap);
    *scratch = (md_bpe_scratch){0};
}

static void offer_pair(const md_bpe *bpe, md_bpe_scratch *scratch, uint32_t at)
{
    const md_symbol *left = &scratch->symbols[at];
    if (left->next == DEAD) {
        return;
    }
    const md_merge *merge = cm_map_get(&bpe->by_pair, pair_key(left->id, scratch->symbols[left->next].id));
    if (merge != NULL) {
        heap_push(scratch, (uint64_t)(merge - bpe->merges) << 32 | at);
    }
}

static void merge_at(const md_bpe *bpe, md_bpe_scratch *scratch, uint32_t at, const md_merge *merge)
{
    md_symbol *left = &scratch->symbols[at];
    if (left->id != merge->left || left->next == DEAD || scratch->symbols[left->next].id != merge->right) {
        return; /* a neighbour has changed since this was offered */
    }
    md_symbol *right = &scratch->symbols[left->next];
    left->id = merge->id;
    left->next = right->next;
    right->id = DEAD;
    if (left->next != DEAD) {
        scratch->symbols[left->next].prev = at;
    }
    if (left->prev != DEAD) {
        offer_pair(bpe, scratch, left->prev);
    }
    offer_pair(bpe, scratch, at);
}

void md_bpe_encode(const md_bpe *bpe, md_bpe_scratch *scratch, const uint8_t *piece, size_t n, md_ids *ids)
{
    CM_ASSERT(n > 0 && n < DEAD);
    scratch_reserve(scratch, n);
    for (uint32_t i = 0; i < n; i++) {
        scratch->symbols[i] = (md_symbol){
            .id = bpe->byte_id[piece[i]], .prev = i > 0 ? i - 1 : DEAD, .next = i + 1 < n ? i + 1 : DEAD};
    }
    for (uint32_t i = 0; i + 1 < n; i++) {
        offer_pair(bpe, scratch, i);
    }
    while (scratch->n_heap > 0) {
        uint64_t entry = heap_pop(scratch);
        merge_at(bpe, scratch, (uint32_t)entry, &bpe->merges[entry >> 32]);
    }
    for (uint32_t i = 0; i != DEAD; i = scratch->symbols[i].next) {
        md_ids_push(ids, scratch->symbols[i].id);
    }
}
