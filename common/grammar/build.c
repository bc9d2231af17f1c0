#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/grammar/build_private.h"

enum { NEED_NEVER = UINT16_MAX };

/* ---- putting together ---- */

void gm_build_init(gm_build *b, cm_error *err)
{
    *b = (gm_build){.err = err};
}

void gm_build_fail(gm_build *b, cm_status status, const char *path, const char *fmt, ...)
{
    char text[384];
    va_list args;
    if (b->status != CM_OK) {
        return;
    }
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    b->status = cm_error_set(b->err, status, path, "%s", text);
}

uint32_t gm_state_new(gm_build *b)
{
    return b->n_state++;
}

static gm_edge *edge_new(gm_build *b, uint32_t from, uint32_t to, gm_edge_kind kind)
{
    static gm_edge nowhere; /* written by none that is read: the build has failed */
    if (b->n_edge >= GM_EDGES_MAX) {
        gm_build_fail(
            b, CM_E_TOO_LONG, NULL,
            "it needs a grammar of more than %d edges: make it smaller, or bound lengths less finely",
            GM_EDGES_MAX);
    }
    if (b->status != CM_OK) {
        nowhere = (gm_edge){0};
        return &nowhere;
    }
    if (b->n_edge == b->edge_cap) {
        b->edge_cap = b->edge_cap > 0 ? 2 * b->edge_cap : 256;
        b->edges = cm_realloc(b->edges, sizeof(gm_edge) * b->edge_cap);
    }
    gm_edge *edge = &b->edges[b->n_edge++];
    *edge = (gm_edge){.from = from, .to = to, .kind = (uint8_t)kind};
    return edge;
}

uint32_t gm_rule_new(gm_build *b, const char *path)
{
    if (b->n_rule == b->rule_cap) {
        b->rule_cap = b->rule_cap > 0 ? 2 * b->rule_cap : 64;
        b->rules = cm_realloc(b->rules, sizeof(gm_rule) * b->rule_cap);
    }
    gm_rule *rule = &b->rules[b->n_rule];
    rule->start = gm_state_new(b);
    rule->accept = gm_state_new(b);
    rule->path = cm_strdup(path != NULL ? path : "");
    return b->n_rule++;
}

void gm_byte(gm_build *b, uint32_t from, uint32_t to, uint8_t lo, uint8_t hi)
{
    gm_edge *edge = edge_new(b, from, to, GM_EDGE_BYTE);
    edge->lo = lo;
    edge->hi = hi;
}

void gm_empty(gm_build *b, uint32_t from, uint32_t to)
{
    edge_new(b, from, to, GM_EDGE_EMPTY);
}

void gm_call(gm_build *b, uint32_t from, uint32_t to, uint32_t rule, uint32_t min, uint32_t max)
{
    if (min == 0) {
        gm_empty(b, from, to);
    }
    if (max > 0 && min <= max) {
        gm_edge *edge = edge_new(b, from, to, GM_EDGE_CALL);
        edge->rule = rule;
        edge->min = min > 0 ? min : 1; /* none at all is the edge above */
        edge->max = max;
    }
}

void gm_control(gm_build *b, uint32_t from, uint32_t to, md_control control)
{
    edge_new(b, from, to, GM_EDGE_CONTROL)->lo = (uint8_t)control;
}

void gm_bytes_of(gm_build *b, uint32_t from, uint32_t to, const char *bytes, size_t n)
{
    if (n == 0) {
        gm_empty(b, from, to);
    }
    for (size_t i = 0; i < n && b->status == CM_OK; i++) {
        uint32_t next = i + 1 < n ? gm_state_new(b) : to;
        gm_byte(b, from, next, (uint8_t)bytes[i], (uint8_t)bytes[i]);
        from = next;
    }
}

void gm_text(gm_build *b, uint32_t from, uint32_t to, const char *text)
{
    gm_bytes_of(b, from, to, text, strlen(text));
}

static int word_compare(const void *a, const void *b)
{
    const gm_word *x = a, *y = b;
    int order = memcmp(x->bytes, y->bytes, x->n < y->n ? x->n : y->n);
    return order != 0 ? order : (x->n > y->n) - (x->n < y->n);
}

static size_t word_common(const gm_word *a, const gm_word *b)
{
    size_t n = 0;
    while (n < a->n && n < b->n && a->bytes[n] == b->bytes[n]) {
        n++;
    }
    return n;
}

void gm_words(gm_build *b, uint32_t from, uint32_t to, gm_word *words, size_t n)
{
    size_t longest = 0;
    for (size_t i = 0; i < n; i++) {
        longest = words[i].n > longest ? words[i].n : longest;
    }
    uint32_t *at =
        cm_alloc(sizeof(*at) * (longest + 1)); /* the state behind so many bytes of the last word */
    qsort(words, n, sizeof(*words), word_compare);
    at[0] = from;
    for (size_t i = 0; i < n && b->status == CM_OK; i++) {
        size_t shared = i > 0 ? word_common(&words[i - 1], &words[i]) : 0;
        if (i > 0 && shared == words[i].n && shared == words[i - 1].n) {
            continue; /* the same word again */
        }
        for (size_t k = shared; k < words[i].n && b->status == CM_OK; k++) {
            at[k + 1] = gm_state_new(b);
            gm_byte(b, at[k], at[k + 1], (uint8_t)words[i].bytes[k], (uint8_t)words[i].bytes[k]);
        }
        gm_empty(b, at[words[i].n], to);
    }
    cm_free(at);
}

/* ---- finishing: what may be empty ---- */

/* The edges into each state, and the calls of each rule. */
typedef struct gm_back {
    uint32_t *first, *edge;           /* [n_state + 1], [n_edge] */
    uint32_t *call_first, *call_edge; /* [n_rule + 1], [n_edge] */
    uint32_t *rule_at;                /* [n_state] the rule that starts here, else GM_NO_RULE */
    uint32_t *pending;                /* [n_pending] states to look at; a state may be in it once */
    uint8_t *queued;                  /* [n_state] */
    uint32_t n_pending;
} gm_back;

static void index_by(const gm_build *b, bool calls, uint32_t n_key, uint32_t *first, uint32_t *out)
{
    for (uint32_t i = 0; i < b->n_edge; i++) {
        const gm_edge *e = &b->edges[i];
        if (!calls || e->kind == GM_EDGE_CALL) {
            first[(calls ? e->rule : e->to) + 1]++;
        }
    }
    for (uint32_t i = 0; i < n_key; i++) {
        first[i + 1] += first[i];
    }
    uint32_t *at = cm_alloc(sizeof(*at) * (n_key + 1));
    memcpy(at, first, sizeof(*at) * (n_key + 1));
    for (uint32_t i = 0; i < b->n_edge; i++) {
        const gm_edge *e = &b->edges[i];
        if (!calls || e->kind == GM_EDGE_CALL) {
            out[at[calls ? e->rule : e->to]++] = i;
        }
    }
    cm_free(at);
}

static void back_init(const gm_build *b, gm_back *back)
{
    *back = (gm_back){
        .first = cm_alloc(sizeof(uint32_t) * (b->n_state + 1)),
        .edge = cm_alloc(sizeof(uint32_t) * (b->n_edge + 1)),
        .call_first = cm_alloc(sizeof(uint32_t) * (b->n_rule + 1)),
        .call_edge = cm_alloc(sizeof(uint32_t) * (b->n_edge + 1)),
        .rule_at = cm_alloc(sizeof(uint32_t) * b->n_state),
        .pending = cm_alloc(sizeof(uint32_t) * b->n_state),
        .queued = cm_alloc(b->n_state),
    };
    index_by(b, false, b->n_state, back->first, back->edge);
    index_by(b, true, b->n_rule, back->call_first, back->call_edge);
    memset(back->rule_at, 0xff, sizeof(uint32_t) * b->n_state);
    for (uint32_t i = 0; i < b->n_rule; i++) {
        back->rule_at[b->rules[i].start] = i;
    }
}

static void back_fini(gm_back *back)
{
    cm_free(back->first);
    cm_free(back->edge);
    cm_free(back->call_first);
    cm_free(back->call_edge);
    cm_free(back->rule_at);
    cm_free(back->pending);
    cm_free(back->queued);
}

static void back_queue(gm_back *back, uint32_t state)
{
    if (!back->queued[state]) {
        back->queued[state] = 1;
        back->pending[back->n_pending++] = state;
    }
}

static uint32_t back_next(gm_back *back)
{
    uint32_t state = back->pending[--back->n_pending];
    back->queued[state] = 0;
    return state;
}

/* What one edge says about the state it leaves: need of the depth of calls, from what is known behind it. */
typedef uint32_t (*gm_weigh_fn)(const gm_build *b, const gm_edge *e, const uint16_t *value);

/* Depth: how many calls deep the cheapest way to the end of the rule goes. */
static uint32_t weigh_depth(const gm_build *b, const gm_edge *e, const uint16_t *value)
{
    uint32_t there = value[e->to];
    if (e->kind != GM_EDGE_CALL || there == NEED_NEVER) {
        return there;
    }
    uint32_t inside = value[b->rules[e->rule].start];
    return inside == NEED_NEVER ? NEED_NEVER : inside + 1 > there ? inside + 1 : there;
}

/* Emptiness: 0 when the end of the rule can be reached without reading anything. */
static uint32_t weigh_empty(const gm_build *b, const gm_edge *e, const uint16_t *value)
{
    bool free = e->kind == GM_EDGE_EMPTY || (e->kind == GM_EDGE_CALL && value[b->rules[e->rule].start] == 0);
    return free ? value[e->to] : NEED_NEVER;
}

static void settle_edge(const gm_build *b, gm_back *back, gm_weigh_fn weigh, uint32_t i, uint16_t *value)
{
    const gm_edge *e = &b->edges[i];
    uint32_t w = weigh(b, e, value);
    if (w < value[e->from]) {
        value[e->from] = (uint16_t)w;
        back_queue(back, e->from);
    }
}

/* The smallest value of every state: 0 at the ends of rules, else the least that an edge offers. */
static uint16_t *settle(const gm_build *b, gm_back *back, gm_weigh_fn weigh)
{
    uint16_t *value = cm_alloc(sizeof(*value) * b->n_state);
    memset(value, 0xff, sizeof(*value) * b->n_state);
    for (uint32_t i = 0; i < b->n_rule; i++) {
        value[b->rules[i].accept] = 0;
        back_queue(back, b->rules[i].accept);
    }
    while (back->n_pending > 0) {
        uint32_t state = back_next(back), rule = back->rule_at[state];
        for (uint32_t k = back->first[state]; k < back->first[state + 1]; k++) {
            settle_edge(b, back, weigh, back->edge[k], value);
        }
        for (uint32_t k = rule != GM_NO_RULE ? back->call_first[rule] : 0;
             rule != GM_NO_RULE && k < back->call_first[rule + 1]; k++) {
            settle_edge(b, back, weigh, back->call_edge[k], value);
        }
    }
    return value;
}

/* ---- finishing: a rule that begins with itself would be entered for ever ---- */

typedef struct gm_walk {
    const gm_build *b;
    const uint32_t *first;  /* of a build whose edges are sorted */
    const uint16_t *empty;  /* weigh_empty */
    uint8_t *colour;        /* [n_rule] 0 not seen, 1 on the path, 2 done */
    uint32_t *seen, n_pass; /* [n_state] the pass in which it was looked at */
    uint32_t *stack;        /* [n_rule + n_edge] rules to look at; ~rule: leave it */
} gm_walk;

/* Rules that may be called before anything was read in rule r, onto the stack. */
static uint32_t walk_first_calls(gm_walk *w, uint32_t r, uint32_t n_stack, uint32_t *pending)
{
    uint32_t n_pending = 0;
    w->n_pass++;
    pending[n_pending++] = w->b->rules[r].start;
    w->seen[pending[0]] = w->n_pass;
    while (n_pending > 0) {
        uint32_t state = pending[--n_pending];
        for (uint32_t i = w->first[state]; i < w->first[state + 1]; i++) {
            const gm_edge *e = &w->b->edges[i];
            bool call = e->kind == GM_EDGE_CALL;
            if (call && w->colour[e->rule] != 2) {
                w->stack[n_stack++] = e->rule;
            }
            bool through = e->kind == GM_EDGE_EMPTY || (call && w->empty[w->b->rules[e->rule].start] == 0);
            if (through && w->seen[e->to] != w->n_pass) {
                w->seen[e->to] = w->n_pass;
                pending[n_pending++] = e->to;
            }
        }
    }
    return n_stack;
}

/* A rule on a cycle of such calls, GM_NO_RULE: none. Depth first without recursion. */
static uint32_t walk_find_cycle(gm_walk *w, uint32_t *pending)
{
    for (uint32_t root = 0; root < w->b->n_rule; root++) {
        uint32_t n_stack = 0;
        w->stack[n_stack++] = root;
        while (n_stack > 0) {
            uint32_t top = w->stack[--n_stack];
            if (top >= w->b->n_rule) {
                w->colour[~top] = 2;
            } else if (w->colour[top] == 1) {
                return top;
            } else if (w->colour[top] == 0) {
                w->colour[top] = 1;
                w->stack[n_stack++] = ~top;
                n_stack = walk_first_calls(w, top, n_stack, pending);
            }
        }
    }
    return GM_NO_RULE;
}

static void check_left_recursion(gm_build *b, const uint32_t *first, const uint16_t *empty)
{
    gm_walk w = {.b = b,
                 .first = first,
                 .empty = empty,
                 .colour = cm_alloc(b->n_rule),
                 .seen = cm_alloc(sizeof(uint32_t) * b->n_state),
                 .stack = cm_alloc(sizeof(uint32_t) * (2ull * b->n_rule + b->n_edge + 1))};
    uint32_t *pending = cm_alloc(sizeof(*pending) * b->n_state);
    uint32_t rule = walk_find_cycle(&w, pending);
    if (rule != GM_NO_RULE) {
        gm_build_fail(b, CM_E_INVALID, b->rules[rule].path,
                      "a reference leads back to itself before anything was written: no text can satisfy it");
    }
    cm_free(pending);
    cm_free(w.colour);
    cm_free(w.seen);
    cm_free(w.stack);
}

/* ---- finishing ---- */

/* Drops edges that lead to no end; the others by their states, in their order. */
static void sort_edges(gm_build *b, const uint16_t *need, uint32_t *first)
{
    gm_edge *sorted = cm_alloc(sizeof(*sorted) * (b->n_edge + 1));
    uint32_t *at = cm_alloc(sizeof(*at) * (b->n_state + 1)), n = 0;
    for (uint32_t i = 0; i < b->n_edge; i++) {
        if (need == NULL || weigh_depth(b, &b->edges[i], need) != NEED_NEVER) {
            first[b->edges[i].from + 1]++;
            b->edges[n++] = b->edges[i];
        }
    }
    b->n_edge = n;
    for (uint32_t i = 0; i < b->n_state; i++) {
        first[i + 1] += first[i];
    }
    memcpy(at, first, sizeof(*at) * (b->n_state + 1));
    for (uint32_t i = 0; i < n; i++) {
        sorted[at[b->edges[i].from]++] = b->edges[i];
    }
    cm_free(at);
    cm_free(b->edges);
    b->edges = sorted;
}

/* A rule that may be empty can be repeated as often as must be by saying nothing. */
static void relax_counts(gm_build *b, const uint16_t *empty)
{
    for (uint32_t i = 0; i < b->n_edge; i++) {
        gm_edge *e = &b->edges[i];
        if (e->kind == GM_EDGE_CALL && empty[b->rules[e->rule].start] == 0) {
            e->min = 1;
        }
    }
}

static void find_classes(gm_grammar *g)
{
    uint8_t begins[257] = {1};
    for (uint32_t i = 0; i < g->n_edge; i++) {
        if (g->edges[i].kind == GM_EDGE_BYTE) {
            begins[g->edges[i].lo] = begins[g->edges[i].hi + 1] = 1;
        }
    }
    for (uint32_t byte = 0; byte < 256; byte++) {
        if (begins[byte]) {
            g->class_byte[g->n_class++] = (uint8_t)byte;
        }
        g->class_of[byte] = (uint8_t)(g->n_class - 1);
    }
}

static void build_fini(gm_build *b)
{
    for (uint32_t i = 0; i < b->n_rule; i++) {
        cm_free(b->rules[i].path);
    }
    cm_free(b->edges);
    cm_free(b->rules);
    *b = (gm_build){.status = b->status};
}

/* Everything the build's arrays hold goes to the grammar. */
static gm_grammar *build_give(gm_build *b, uint32_t *first, uint16_t *need)
{
    gm_grammar *g = cm_alloc(sizeof(*g));
    *g = (gm_grammar){.edges = b->edges,
                      .first = first,
                      .need = need,
                      .accept = cm_alloc(b->n_state),
                      .rules = b->rules,
                      .n_edge = b->n_edge,
                      .n_state = b->n_state,
                      .n_rule = b->n_rule};
    for (uint32_t i = 0; i < g->n_rule; i++) {
        g->accept[g->rules[i].accept] = 1;
        cm_free(g->rules[i].path);
        g->rules[i].path = NULL;
    }
    find_classes(g);
    return g;
}

cm_status gm_build_finish(gm_build *b, gm_grammar **grammar_out)
{
    gm_back back;
    if (b->status != CM_OK) {
        build_fini(b);
        return b->status;
    }
    back_init(b, &back);
    uint16_t *empty = settle(b, &back, weigh_empty);
    relax_counts(b, empty);
    uint16_t *need = settle(b, &back, weigh_depth);
    back_fini(&back);
    uint32_t *first = cm_alloc(sizeof(*first) * (b->n_state + 1));
    sort_edges(b, need, first);
    check_left_recursion(b, first, empty);
    uint32_t depth = need[b->rules[0].start];
    if (depth == NEED_NEVER) {
        gm_build_fail(b, CM_E_INVALID, NULL, "no text can satisfy it");
    } else if (depth > GM_DEPTH_MAX) {
        gm_build_fail(b, CM_E_TOO_LONG, NULL,
                      "every text that satisfies it nests too deeply: %u calls, at most %d", depth,
                      GM_DEPTH_MAX);
    }
    cm_free(empty);
    if (b->status != CM_OK) {
        cm_free(first);
        cm_free(need);
        build_fini(b);
        return b->status;
    }
    *grammar_out = build_give(b, first, need);
    return CM_OK;
}

void gm_grammar_destroy(gm_grammar *g)
{
    cm_free(g->edges);
    cm_free(g->first);
    cm_free(g->need);
    cm_free(g->accept);
    cm_free(g->rules);
    cm_free(g);
}

size_t gm_grammar_bytes(const gm_grammar *g)
{
    return sizeof(*g) + sizeof(gm_edge) * g->n_edge +
           (sizeof(uint32_t) + sizeof(uint16_t) + 1ull) * g->n_state + sizeof(gm_rule) * g->n_rule;
}
