#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/grammar/machine.h"
#include "common/grammar/places_private.h"

enum {
    HEAD = 2,           /* words of a place before its calls */
    LOOKED_MAX = 32768, /* places looked at for one set */
    TABLE = 2 * LOOKED_MAX,
};

void gm_places_init(gm_places *p, const gm_grammar *grammar)
{
    *p = (gm_places){.grammar = grammar,
                     .at = cm_alloc(sizeof(uint32_t) * LOOKED_MAX),
                     .slots = cm_alloc(sizeof(uint32_t) * LOOKED_MAX),
                     .table = cm_alloc(sizeof(uint32_t) * TABLE),
                     .kept = cm_alloc(sizeof(uint32_t) * GM_PLACES_MAX)};
}

void gm_places_fini(gm_places *p)
{
    cm_free(p->words);
    cm_free(p->at);
    cm_free(p->slots);
    cm_free(p->table);
    cm_free(p->set);
    cm_free(p->kept);
}

static size_t place_words(const uint32_t *place)
{
    return HEAD + 2 * (size_t)place[1];
}

/* ---- looking at places, each once ---- */

static uint32_t *slot_of(const gm_places *p, const uint32_t *place)
{
    size_t n = place_words(place);
    uint32_t i = (uint32_t)XXH3_64bits(place, n * sizeof(*place)) % TABLE;
    while (p->table[i] != 0) {
        const uint32_t *other = p->words + p->at[p->table[i] - 1];
        if (other[1] == place[1] && memcmp(other, place, n * sizeof(*place)) == 0) {
            break;
        }
        i = (i + 1) % TABLE;
    }
    return &p->table[i];
}

/* Room for a place of n_call calls behind the words; it counts once it is taken. */
static uint32_t *place_room(gm_places *p, uint32_t n_call)
{
    size_t n = p->n_word + HEAD + 2 * (size_t)n_call;
    if (n > p->word_cap) {
        p->word_cap = 2 * n + 256;
        p->words = cm_realloc(p->words, sizeof(uint32_t) * p->word_cap);
    }
    return p->words + p->n_word;
}

/* The place that was written into the room. From one that nests too deeply no end can be reached. */
static void place_take(gm_places *p)
{
    const uint32_t *place = p->words + p->n_word;
    if (place[1] + p->grammar->need[place[0]] > GM_DEPTH_MAX || p->n_at == LOOKED_MAX) {
        return;
    }
    uint32_t *slot = slot_of(p, place);
    if (*slot == 0) {
        p->slots[p->n_at] = (uint32_t)(slot - p->table);
        p->at[p->n_at++] = (uint32_t)p->n_word;
        *slot = p->n_at;
        p->n_word += place_words(place);
    }
}

/* place, at another state, with its calls but for the innermost n_less. from is an offset into p->words, or
 * beside it. */
static void place_move(gm_places *p, const uint32_t *from, uint32_t state, uint32_t n_less)
{
    uint32_t n_call = from[1] - n_less;
    size_t offset = (size_t)(from - p->words);
    bool inside = from >= p->words && offset < p->n_word;
    uint32_t *to = place_room(p, n_call);
    memcpy(to, inside ? p->words + offset : from, sizeof(uint32_t) * (HEAD + 2 * (size_t)n_call));
    to[0] = state;
    to[1] = n_call;
}

static void place_call(gm_places *p, uint32_t number, uint32_t e)
{
    const gm_edge *edge = &p->grammar->edges[e];
    const uint32_t *from = p->words + p->at[number];
    if (from[1] + p->grammar->need[edge->to] > GM_DEPTH_MAX) {
        return; /* inside the call would be fine, but nothing behind it */
    }
    place_room(p, from[1] + 1);
    place_move(p, p->words + p->at[number], p->grammar->rules[edge->rule].start, 0);
    uint32_t *to = p->words + p->n_word, n_call = to[1]++;
    to[HEAD + 2 * n_call] = e;
    to[HEAD + 2 * n_call + 1] = 1;
    place_take(p);
}

/* The end of a rule: once more, or on behind the call. Counts that cannot matter any more are not counted. */
static void place_return(gm_places *p, uint32_t number)
{
    const uint32_t *from = p->words + p->at[number];
    uint32_t n_call = from[1];
    if (n_call == 0) {
        p->accept = true;
        return;
    }
    uint32_t e = from[HEAD + 2 * (n_call - 1)], times = from[HEAD + 2 * (n_call - 1) + 1];
    const gm_edge *edge = &p->grammar->edges[e];
    if (times < edge->max) {
        place_move(p, from, p->grammar->rules[edge->rule].start, 0);
        uint32_t *count = &p->words[p->n_word + HEAD + 2 * (n_call - 1) + 1];
        *count = edge->max == GM_INF && times >= edge->min ? edge->min : times + 1;
        place_take(p);
    }
    if (times >= edge->min) {
        place_move(p, p->words + p->at[number], edge->to, 1);
        place_take(p);
    }
}

/* Everything that can be reached from place number without reading. */
static void place_look(gm_places *p, uint32_t number)
{
    const gm_grammar *g = p->grammar;
    uint32_t state = p->words[p->at[number]];
    bool leads_on = false;
    if (g->accept[state]) {
        place_return(p, number);
    }
    for (uint32_t e = g->first[state]; e < g->first[state + 1]; e++) {
        if (g->edges[e].kind == GM_EDGE_EMPTY) {
            place_move(p, p->words + p->at[number], g->edges[e].to, 0);
            place_take(p);
        } else if (g->edges[e].kind == GM_EDGE_CALL) {
            place_call(p, number, e);
        } else {
            leads_on = true;
        }
    }
    if (leads_on && p->n_kept < GM_PLACES_MAX) {
        p->kept[p->n_kept++] = number;
    }
}

/* ---- sets ---- */

void gm_places_begin(gm_places *p)
{
    for (uint32_t i = 0; i < p->n_at; i++) {
        p->table[p->slots[i]] = 0;
    }
    p->n_word = 0;
    p->n_at = p->n_kept = 0;
    p->accept = false;
}

void gm_places_add_start(gm_places *p)
{
    uint32_t *place = place_room(p, 0);
    place[0] = p->grammar->rules[0].start;
    place[1] = 0;
    place_take(p);
}

static void add_step(gm_places *p, const uint32_t *set, size_t n, gm_edge_kind kind, uint8_t value)
{
    const gm_grammar *g = p->grammar;
    for (size_t i = 0; i < n; i += place_words(set + i)) {
        for (uint32_t e = g->first[set[i]]; e < g->first[set[i] + 1]; e++) {
            const gm_edge *edge = &g->edges[e];
            if (edge->kind == kind && edge->lo <= value &&
                (kind == GM_EDGE_BYTE ? value <= edge->hi : value == edge->lo)) {
                place_move(p, set + i, edge->to, 0);
                place_take(p);
            }
        }
    }
}

void gm_places_add_byte(gm_places *p, const uint32_t *set, size_t n, uint8_t byte)
{
    add_step(p, set, n, GM_EDGE_BYTE, byte);
}

void gm_places_add_control(gm_places *p, const uint32_t *set, size_t n, md_control control)
{
    add_step(p, set, n, GM_EDGE_CONTROL, (uint8_t)control);
}

bool gm_places_has_control(const gm_places *p, const uint32_t *set, size_t n, md_control control)
{
    const gm_grammar *g = p->grammar;
    for (size_t i = 0; i < n; i += place_words(set + i)) {
        for (uint32_t e = g->first[set[i]]; e < g->first[set[i] + 1]; e++) {
            if (g->edges[e].kind == GM_EDGE_CONTROL && g->edges[e].lo == (uint8_t)control) {
                return true;
            }
        }
    }
    return false;
}

/* A count from which neither the least nor the most can be reached within so many times is as good as any
 * other such count. */
static uint32_t near_count(const gm_edge *edge, uint32_t times, uint32_t reach)
{
    if (edge->max == GM_INF && times >= edge->min) {
        return times;
    }
    if (times >= edge->min) {
        return edge->max - times > reach ? edge->min : times;
    }
    return edge->min - times > reach ? 1 : times;
}

void gm_places_add_near(gm_places *p, const uint32_t *set, size_t n, uint32_t reach)
{
    for (size_t i = 0; i < n; i += place_words(set + i)) {
        place_move(p, set + i, set[i], 0);
        uint32_t *place = p->words + p->n_word;
        for (uint32_t k = 0; k < place[1]; k++) {
            uint32_t *call = place + HEAD + 2 * k;
            call[1] = near_count(&p->grammar->edges[call[0]], call[1], reach);
        }
        place_take(p);
    }
}

static int place_compare(const uint32_t *a, const uint32_t *b)
{
    size_t n = place_words(a) < place_words(b) ? place_words(a) : place_words(b);
    for (size_t i = 0; i < n; i++) {
        if (a[i] != b[i]) {
            return a[i] < b[i] ? -1 : 1;
        }
    }
    return 0; /* the second word says how many there are: equal so far, equal */
}

static int kept_compare(const void *a, const void *b, void *ctx)
{
    const gm_places *p = ctx;
    return place_compare(p->words + p->at[*(const uint32_t *)a], p->words + p->at[*(const uint32_t *)b]);
}

void gm_places_end(gm_places *p)
{
    for (uint32_t i = 0; i < p->n_at; i++) {
        place_look(p, i);
    }
    qsort_r(p->kept, p->n_kept, sizeof(*p->kept), kept_compare, p);
    if (p->n_word > p->set_cap) {
        p->set_cap = 2 * p->n_word;
        p->set = cm_realloc(p->set, sizeof(uint32_t) * p->set_cap);
    }
    p->n_set = 0;
    for (uint32_t i = 0; i < p->n_kept; i++) {
        const uint32_t *place = p->words + p->at[p->kept[i]];
        memcpy(p->set + p->n_set, place, sizeof(uint32_t) * place_words(place));
        p->n_set += place_words(place);
    }
    p->n_place = p->n_kept;
}
