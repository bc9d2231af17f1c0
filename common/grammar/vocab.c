#include <stdlib.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/grammar/vocab_private.h"

typedef struct entry {
    const uint8_t *bytes;
    uint32_t n, id;
} entry;

static int entry_compare(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    int order = memcmp(x->bytes, y->bytes, x->n < y->n ? x->n : y->n);
    if (order != 0 || x->n != y->n) {
        return order != 0 ? order : (x->n > y->n) - (x->n < y->n);
    }
    return (x->id > y->id) - (x->id < y->id);
}

/* All tokens that stand for text, in the order of their bytes. */
static entry *entries_read(const gm_vocab_source *source, uint32_t *n_out)
{
    entry *list = cm_alloc(sizeof(*list) * (source->n_id + 1ull));
    uint32_t n = 0;
    for (uint32_t id = 0; id < source->n_id; id++) {
        size_t n_bytes = 0;
        const uint8_t *bytes = source->bytes(source->ctx, id, &n_bytes);
        if (bytes != NULL && n_bytes > 0 && n_bytes <= GM_TOKEN_BYTES_MAX) {
            list[n++] = (entry){bytes, (uint32_t)n_bytes, id};
        }
    }
    qsort(list, n, sizeof(*list), entry_compare);
    *n_out = n;
    return list;
}

static uint32_t common_bytes(const entry *a, const entry *b)
{
    uint32_t n = 0;
    while (n < a->n && n < b->n && a->bytes[n] == b->bytes[n]) {
        n++;
    }
    return n;
}

/* Nodes in the order of a walk from the root: a node's successors stand right behind it, up to its end. */
static void nodes_make(gm_vocab *v, const entry *list, uint32_t n)
{
    uint32_t path[GM_TOKEN_BYTES_MAX + 1], depth = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t shared = i > 0 ? common_bytes(&list[i - 1], &list[i]) : 0;
        for (; depth > shared; depth--) {
            v->nodes[path[depth]].end = v->n_node;
        }
        for (; depth < list[i].n; depth++) {
            path[depth + 1] = v->n_node;
            v->nodes[v->n_node++] =
                (gm_node){.byte = list[i].bytes[depth], .depth = (uint8_t)(depth + 1), .id = GM_NO_ID};
        }
        gm_node *node = &v->nodes[path[list[i].n]];
        v->same[list[i].id] = node->id;
        node->id = list[i].id;
        v->longest = list[i].n > v->longest ? list[i].n : v->longest;
        v->text[list[i].id / 32] |= 1u << list[i].id % 32;
    }
    for (; depth > 0; depth--) {
        v->nodes[path[depth]].end = v->n_node;
    }
}

static cm_status check_bytes(const gm_vocab *v, cm_error *err)
{
    bool seen[256] = {false};
    for (uint32_t i = 0; i < v->n_node; i = v->nodes[i].end) {
        seen[v->nodes[i].byte] = v->nodes[i].id != GM_NO_ID;
    }
    for (uint32_t byte = 0; byte < 256; byte++) {
        if (!seen[byte]) {
            return cm_error_set(
                err, CM_E_UNSUPPORTED, NULL,
                "the tokenizer has no token for byte 0x%02x alone: constraints need one for each", byte);
        }
    }
    return CM_OK;
}

cm_status gm_vocab_create(const gm_vocab_source *source, gm_vocab **vocab_out, cm_error *err)
{
    uint32_t n, n_node = 0;
    entry *list = entries_read(source, &n);
    for (uint32_t i = 0; i < n; i++) {
        n_node += list[i].n - (i > 0 ? common_bytes(&list[i - 1], &list[i]) : 0);
    }
    gm_vocab *v = cm_alloc(sizeof(*v));
    *v = (gm_vocab){.source = *source,
                    .nodes = cm_alloc(sizeof(gm_node) * (n_node + 1ull)),
                    .same = cm_alloc(sizeof(uint32_t) * (source->n_id + 1ull)),
                    .text = cm_alloc(sizeof(uint32_t) * (gm_vocab_words(source->n_id) + 1ull))};
    nodes_make(v, list, n);
    CM_ASSERT(v->n_node == n_node);
    cm_free(list);
    cm_status status = check_bytes(v, err);
    if (status != CM_OK) {
        gm_vocab_destroy(v);
        return status;
    }
    *vocab_out = v;
    return CM_OK;
}

static const uint8_t *tokenizer_bytes(void *ctx, uint32_t id, size_t *n_out)
{
    const md_tokenizer *tokenizer = ctx;
    if (id >= md_tokenizer_vocab(tokenizer) || md_tokenizer_is_added(tokenizer, id)) {
        return NULL;
    }
    return md_tokenizer_bytes(tokenizer, id, n_out);
}

cm_status gm_vocab_of_tokenizer(const md_tokenizer *tokenizer, uint32_t n_id, gm_vocab **vocab_out,
                                cm_error *err)
{
    gm_vocab_source source = {.n_id = n_id,
                              .bytes = tokenizer_bytes,
                              .ctx = (void *)(uintptr_t)tokenizer,
                              .eos = md_tokenizer_control(tokenizer, MD_CTL_EOS),
                              .think_end = md_tokenizer_control(tokenizer, MD_CTL_THINK_END),
                              .dsml = md_tokenizer_control(tokenizer, MD_CTL_DSML)};
    return gm_vocab_create(&source, vocab_out, err);
}

void gm_vocab_destroy(gm_vocab *v)
{
    if (v != NULL) {
        cm_free(v->nodes);
        cm_free(v->same);
        cm_free(v->text);
        cm_free(v);
    }
}

uint32_t gm_vocab_words(uint32_t n_id)
{
    return (n_id + 31) / 32;
}
