#include "router/sched/prefix_core.h"

#include <string.h>
#include <sys/queue.h>
#include <xxhash.h>

#include "common/base/assert.h"
#include "common/base/map.h"
#include "common/base/mem.h"
#include "router/sched/pages.h"

/* A page in the tree. Kept ones are in the order in which they were let go of, pages of one sequence from its
 * end: no page comes after the one before it, since whoever holds a page holds those before it. So the first
 * is always one that nothing hangs on. */
typedef struct prefix_node {
    TAILQ_ENTRY(prefix_node) kept_link, state_link;
    struct prefix_node *before;    /* NULL: a sequence begins here */
    struct prefix_node *same_hash; /* next one whose key has the same hash */
    uint64_t hash;
    uint8_t salt[RT_SALT_BYTES];
    uint32_t n_held, n_child;
    uint32_t state; /* RT_PREFIX_NONE: none */
    bool spare;     /* the state goes before others */
} prefix_node;
typedef TAILQ_HEAD(prefix_list, prefix_node) prefix_list;

struct rt_prefix {
    rt_prefix_limits limits;
    rt_pages pages, states;
    prefix_node *nodes; /* [page_max] of the page of that number, while it is in the tree */
    uint32_t *tokens;   /* [page_max][page_tokens] */
    cm_map keys;        /* hash of salt, page before and tokens -> first of the nodes with that hash */
    prefix_list kept;
    prefix_list stateful; /* by state_link: used longest ago first */
    uint32_t n_kept, n_stateful;
};

rt_prefix *rt_prefix_create(const rt_prefix_limits *limits)
{
    rt_prefix *prefix = cm_alloc(sizeof(*prefix));
    prefix->limits = *limits;
    rt_pages_init(&prefix->pages, "kv pages", limits->page_max);
    rt_pages_init(&prefix->states, "kept states", limits->state_max);
    prefix->nodes = cm_alloc(sizeof(prefix_node) * limits->page_max);
    prefix->tokens = cm_alloc(sizeof(uint32_t) * limits->page_max * limits->page_tokens);
    cm_map_init(&prefix->keys, limits->page_max);
    TAILQ_INIT(&prefix->kept);
    TAILQ_INIT(&prefix->stateful);
    return prefix;
}

/* ---- nodes ---- */

static uint32_t node_page(const rt_prefix *prefix, const prefix_node *node)
{
    return node != NULL ? (uint32_t)(node - prefix->nodes) : RT_PREFIX_NONE;
}

static prefix_node *page_node(const rt_prefix *prefix, uint32_t page)
{
    CM_ASSERT(page == RT_PREFIX_NONE || page < prefix->limits.page_max);
    return page != RT_PREFIX_NONE ? &prefix->nodes[page] : NULL;
}

static uint32_t *node_tokens(const rt_prefix *prefix, const prefix_node *node)
{
    return prefix->tokens + (size_t)node_page(prefix, node) * prefix->limits.page_tokens;
}

static size_t tokens_bytes(const rt_prefix *prefix)
{
    return sizeof(uint32_t) * prefix->limits.page_tokens;
}

/* before: the hash of the page before, NULL where a sequence begins. */
static uint64_t key_hash(const rt_prefix *prefix, const uint8_t *salt, const uint64_t *before,
                         const uint32_t *tokens)
{
    uint64_t seed = before != NULL ? *before : XXH3_64bits(salt, RT_SALT_BYTES);
    return XXH3_64bits_withSeed(tokens, tokens_bytes(prefix), seed);
}

static uint64_t hash_behind(const rt_prefix *prefix, const uint8_t *salt, const prefix_node *before,
                            const uint32_t *tokens)
{
    return key_hash(prefix, salt, before != NULL ? &before->hash : NULL, tokens);
}

static prefix_node *keys_find(const rt_prefix *prefix, const uint8_t *salt, const prefix_node *before,
                              const uint32_t *tokens, uint64_t hash)
{
    prefix_node *node = cm_map_get(&prefix->keys, hash);
    while (node != NULL && (node->before != before || memcmp(node->salt, salt, RT_SALT_BYTES) != 0 ||
                            memcmp(node_tokens(prefix, node), tokens, tokens_bytes(prefix)) != 0)) {
        node = node->same_hash;
    }
    return node;
}

static void keys_add(rt_prefix *prefix, prefix_node *node)
{
    node->same_hash = cm_map_remove(&prefix->keys, node->hash);
    cm_status status = cm_map_put(&prefix->keys, node->hash, node);
    CM_ASSERT_MSG(status == CM_OK, "%s", cm_status_name(status)); /* as many entries as pages */
}

static void keys_remove(rt_prefix *prefix, prefix_node *node)
{
    prefix_node *at = cm_map_remove(&prefix->keys, node->hash), *first = at;
    if (at == node) {
        first = node->same_hash;
    } else {
        while (at->same_hash != node) {
            at = at->same_hash;
        }
        at->same_hash = node->same_hash;
    }
    if (first != NULL) {
        cm_status status = cm_map_put(&prefix->keys, node->hash, first);
        CM_ASSERT_MSG(status == CM_OK, "%s", cm_status_name(status));
    }
}

static void node_drop_state(rt_prefix *prefix, prefix_node *node)
{
    if (node->state != RT_PREFIX_NONE) {
        TAILQ_REMOVE(&prefix->stateful, node, state_link);
        prefix->n_stateful--;
        rt_pages_put(&prefix->states, node->state);
        node->state = RT_PREFIX_NONE;
    }
}

static void node_hold(rt_prefix *prefix, prefix_node *node)
{
    if (node->n_held++ == 0) {
        TAILQ_REMOVE(&prefix->kept, node, kept_link);
        prefix->n_kept--;
    }
}

/* Out of the tree; its page is free. */
static void node_give_up(rt_prefix *prefix, prefix_node *node)
{
    CM_ASSERT_MSG(node->n_held == 0 && node->n_child == 0, "page %u: %u hold it, %u come after it",
                  node_page(prefix, node), node->n_held, node->n_child);
    node_drop_state(prefix, node);
    keys_remove(prefix, node);
    TAILQ_REMOVE(&prefix->kept, node, kept_link);
    prefix->n_kept--;
    if (node->before != NULL) {
        node->before->n_child--;
    }
    rt_pages_put(&prefix->pages, node_page(prefix, node));
}

void rt_prefix_destroy(rt_prefix *prefix)
{
    rt_prefix_forget(prefix);
    rt_pages_fini(&prefix->pages);
    rt_pages_fini(&prefix->states);
    cm_map_fini(&prefix->keys);
    cm_free(prefix->nodes);
    cm_free(prefix->tokens);
    cm_free(prefix);
}

/* ---- pages ---- */

bool rt_prefix_page_take(rt_prefix *prefix, uint32_t *page_out)
{
    if (prefix->pages.n_free == 0 && !TAILQ_EMPTY(&prefix->kept)) {
        node_give_up(prefix, TAILQ_FIRST(&prefix->kept));
    }
    return rt_pages_take(&prefix->pages, page_out);
}

void rt_prefix_page_put(rt_prefix *prefix, uint32_t page)
{
    rt_pages_put(&prefix->pages, page);
}

uint32_t rt_prefix_page_room(const rt_prefix *prefix)
{
    return prefix->pages.n_free + prefix->n_kept;
}

/* ---- the tree ---- */

void rt_prefix_find(const rt_prefix *prefix, const uint8_t salt[RT_SALT_BYTES], const uint32_t *tokens,
                    uint32_t n_token, rt_prefix_chain *chain, rt_prefix_hit *hit_out)
{
    uint32_t page_tokens = prefix->limits.page_tokens, n_page = (n_token - 1) / page_tokens, n_kept = 0;
    const prefix_node *node = NULL;
    *hit_out = (rt_prefix_hit){.page = RT_PREFIX_NONE, .state = RT_PREFIX_NONE};
    for (uint32_t i = 0; i < n_page; i++) {
        const uint32_t *page = tokens + (size_t)i * page_tokens;
        if (i == chain->n) {
            chain->hash[chain->n++] = key_hash(prefix, salt, i > 0 ? &chain->hash[i - 1] : NULL, page);
        }
        node = keys_find(prefix, salt, node, page, chain->hash[i]);
        if (node == NULL) {
            return;
        }
        n_kept += node->n_held == 0;
        hit_out->n_known = i + 1;
        if (node->state != RT_PREFIX_NONE) {
            hit_out->page = node_page(prefix, node);
            hit_out->n_page = i + 1;
            hit_out->n_kept = n_kept;
            hit_out->state = node->state;
        }
    }
}

void rt_prefix_hold(rt_prefix *prefix, const rt_prefix_hit *hit, uint32_t *pages_out)
{
    prefix_node *node = page_node(prefix, hit->page);
    if (node == NULL) {
        return;
    }
    CM_ASSERT(node->state == hit->state);
    node->spare = false;
    TAILQ_REMOVE(&prefix->stateful, node, state_link);
    TAILQ_INSERT_TAIL(&prefix->stateful, node, state_link);
    for (uint32_t i = hit->n_page; i > 0; i--, node = node->before) {
        node_hold(prefix, node);
        pages_out[i - 1] = node_page(prefix, node);
    }
    CM_ASSERT(node == NULL);
}

uint32_t rt_prefix_add(rt_prefix *prefix, const uint8_t salt[RT_SALT_BYTES], uint32_t before, uint32_t page,
                       const uint32_t *tokens)
{
    prefix_node *parent = page_node(prefix, before);
    uint64_t hash = hash_behind(prefix, salt, parent, tokens);
    prefix_node *node = keys_find(prefix, salt, parent, tokens, hash);
    CM_ASSERT_MSG(parent == NULL || parent->n_held > 0, "nobody holds page %u", before);
    if (node != NULL) {
        node_hold(prefix, node);
        rt_pages_put(&prefix->pages, page);
        return node_page(prefix, node);
    }
    CM_ASSERT(page < prefix->limits.page_max && prefix->pages.in_use[page]);
    node = page_node(prefix, page);
    *node = (prefix_node){.before = parent, .hash = hash, .n_held = 1, .state = RT_PREFIX_NONE};
    memcpy(node->salt, salt, RT_SALT_BYTES);
    memcpy(node_tokens(prefix, node), tokens, tokens_bytes(prefix));
    if (parent != NULL) {
        parent->n_child++;
    }
    keys_add(prefix, node);
    return page;
}

void rt_prefix_release(rt_prefix *prefix, uint32_t page)
{
    for (prefix_node *node = page_node(prefix, page); node != NULL; node = node->before) {
        CM_ASSERT_MSG(node->n_held > 0, "nobody holds page %u", node_page(prefix, node));
        if (--node->n_held == 0) {
            TAILQ_INSERT_TAIL(&prefix->kept, node, kept_link);
            prefix->n_kept++;
        }
    }
}

void rt_prefix_forget(rt_prefix *prefix)
{
    while (!TAILQ_EMPTY(&prefix->kept)) {
        node_give_up(prefix, TAILQ_FIRST(&prefix->kept));
    }
    while (!TAILQ_EMPTY(&prefix->stateful)) {
        node_drop_state(prefix, TAILQ_FIRST(&prefix->stateful));
    }
}

/* ---- states ---- */

/* The one that makes room: a spare one if there is any; for a spare one no other. */
static prefix_node *oldest_state(rt_prefix *prefix, bool spare)
{
    prefix_node *node;
    TAILQ_FOREACH (node, &prefix->stateful, state_link) {
        if (node->spare) {
            return node;
        }
    }
    return spare ? NULL : TAILQ_FIRST(&prefix->stateful);
}

bool rt_prefix_state_take(rt_prefix *prefix, bool spare, uint32_t *state_out)
{
    if (prefix->states.n_free == 0) {
        prefix_node *node = oldest_state(prefix, spare);
        if (node == NULL) {
            return false;
        }
        node_drop_state(prefix, node);
    }
    return rt_pages_take(&prefix->states, state_out);
}

void rt_prefix_state_put(rt_prefix *prefix, uint32_t state)
{
    rt_pages_put(&prefix->states, state);
}

void rt_prefix_state_set(rt_prefix *prefix, uint32_t page, uint32_t state, bool spare)
{
    prefix_node *node = page_node(prefix, page);
    CM_ASSERT_MSG(node != NULL && node->n_held > 0, "nobody holds page %u", page);
    if (node->state != RT_PREFIX_NONE) {
        node->spare = node->spare && spare;
        rt_pages_put(&prefix->states, state);
        return;
    }
    node->state = state;
    node->spare = spare;
    TAILQ_INSERT_TAIL(&prefix->stateful, node, state_link);
    prefix->n_stateful++;
}

void rt_prefix_state_pass(rt_prefix *prefix, uint32_t page)
{
    prefix_node *node = page_node(prefix, page);
    if (node != NULL && node->state != RT_PREFIX_NONE && node->spare) {
        node_drop_state(prefix, node);
    }
}

void rt_prefix_state_stay(rt_prefix *prefix, uint32_t page)
{
    prefix_node *node = page_node(prefix, page);
    if (node != NULL) {
        node->spare = false;
    }
}

void rt_prefix_ledger_get(const rt_prefix *prefix, rt_prefix_ledger *ledger_out)
{
    uint32_t n_state = prefix->limits.state_max - prefix->states.n_free;
    *ledger_out = (rt_prefix_ledger){
        .n_held = prefix->limits.page_max - prefix->pages.n_free - prefix->n_kept,
        .n_kept = prefix->n_kept,
        .n_state = prefix->n_stateful,
        .n_writing = n_state - prefix->n_stateful,
    };
}
