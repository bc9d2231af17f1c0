#include "common/grammar/machine.h"

#include <pthread.h>
#include <string.h>
#include <xxhash.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/grammar/places_private.h"
#include "common/grammar/vocab_private.h"

enum {
    FIRST_ID = 4,      /* behind the states that have names */
    STATES_MAX = 8192, /* more, and those that nobody holds are forgotten */
    MASK_PLACES_MAX =
        8192,        /* places of all states behind one mask; behind them only single bytes are looked at */
    MASKS_MAX = 128, /* remembered */
    MASK_NODES_MIN = 2048, /* a mask found in fewer steps is found again as fast */
    NEAR_PLACES_MAX = 8,   /* of a state that another stands for */
    BUCKETS = 1 << 13,
};

typedef struct state {
    uint32_t refs;
    uint32_t next_same; /* hash chain; of free ones the free list */
    uint32_t *set;      /* [n_set] owned; NULL: free */
    size_t n_set;
    uint32_t n_place;
    bool accept;
    uint32_t near;      /* the state whose mask is the same; 0: not known */
    uint64_t visited;   /* the number of the last walk that came here */
    uint32_t *row;      /* [n_class] successors; 0: not known. The machine's zeros until one is */
    uint32_t *mask;     /* remembered; NULL: not */
    uint32_t mask_most; /* most places of a state behind it */
    uint64_t mask_used;
} state;

struct gm_machine {
    pthread_mutex_t lock; /* protects everything but the two pointers */
    gm_grammar *grammar;
    const gm_vocab *vocab;
    uint32_t refs;
    gm_places places;
    state *states; /* [n_state], by id */
    uint32_t n_state, cap, n_live, free_list, collect_at;
    uint32_t buckets[BUCKETS];
    uint32_t *zeros; /* [n_class] */
    uint64_t n_walk, n_use;
    uint32_t n_masks;
    gm_machine_stats stats;
};

/* ---- states ---- */

gm_machine *gm_machine_create(gm_grammar *grammar, const gm_vocab *vocab)
{
    gm_machine *m = cm_alloc(sizeof(*m));
    pthread_mutex_init(&m->lock, NULL);
    m->grammar = grammar;
    m->vocab = vocab;
    m->refs = 1;
    m->zeros = cm_alloc(sizeof(uint32_t) * grammar->n_class);
    m->n_state = FIRST_ID;
    m->collect_at = STATES_MAX;
    gm_places_init(&m->places, grammar);
    return m;
}

static void state_free(gm_machine *m, uint32_t id)
{
    state *s = &m->states[id];
    cm_free(s->set);
    cm_free(s->mask);
    if (s->row != m->zeros) {
        cm_free(s->row);
    }
    m->n_masks -= s->mask != NULL;
    *s = (state){.next_same = m->free_list};
    m->free_list = id;
    m->n_live--;
}

static void machine_destroy(gm_machine *m)
{
    for (uint32_t id = FIRST_ID; id < m->n_state; id++) {
        if (m->states[id].set != NULL) {
            CM_ASSERT_MSG(m->states[id].refs == 0, "state %u is held %u times", id, m->states[id].refs);
            state_free(m, id);
        }
    }
    gm_places_fini(&m->places);
    gm_grammar_destroy(m->grammar);
    pthread_mutex_destroy(&m->lock);
    cm_free(m->states);
    cm_free(m->zeros);
    cm_free(m);
}

gm_machine *gm_machine_hold(gm_machine *m)
{
    pthread_mutex_lock(&m->lock);
    m->refs++;
    pthread_mutex_unlock(&m->lock);
    return m;
}

void gm_machine_release(gm_machine *m)
{
    pthread_mutex_lock(&m->lock);
    bool last = --m->refs == 0;
    pthread_mutex_unlock(&m->lock);
    if (last) {
        machine_destroy(m);
    }
}

/* Forgets what nobody holds. Never while a walk goes on: what one counts must not depend on what came before.
 */
static void collect(gm_machine *m)
{
    if (m->n_live <= m->collect_at) {
        return;
    }
    memset(m->buckets, 0, sizeof(m->buckets));
    for (uint32_t id = FIRST_ID; id < m->n_state; id++) {
        state *s = &m->states[id];
        if (s->set != NULL && s->refs == 0) {
            state_free(m, id);
        } else if (s->set != NULL) {
            uint32_t *bucket = &m->buckets[XXH3_64bits(s->set, s->n_set * sizeof(*s->set)) % BUCKETS];
            s->next_same = *bucket;
            *bucket = id;
            s->near = 0;
            if (s->row != m->zeros) {
                memset(s->row, 0, sizeof(*s->row) * m->grammar->n_class);
            }
        }
    }
    m->collect_at = m->n_live + STATES_MAX;
}

static uint32_t state_new(gm_machine *m)
{
    uint32_t id = m->free_list;
    if (id != 0) {
        m->free_list = m->states[id].next_same;
    } else {
        if (m->n_state >= m->cap) {
            m->cap = m->cap > 0 ? 2 * m->cap : 64;
            m->states = cm_realloc(m->states, sizeof(state) * m->cap);
        }
        id = m->n_state++;
    }
    m->n_live++;
    return id;
}

/* The state of the set that m->places has just ended. */
static uint32_t state_of_places(gm_machine *m)
{
    const gm_places *p = &m->places;
    size_t n_bytes = p->n_set * sizeof(*p->set);
    if (p->n_set == 0 && !p->accept) {
        return GM_DEAD;
    }
    /* whether the text may end is not in the words */
    uint32_t *bucket = &m->buckets[XXH3_64bits(p->set, n_bytes) % BUCKETS];
    for (uint32_t id = *bucket; id != 0; id = m->states[id].next_same) {
        const state *s = &m->states[id];
        if (s->n_set == p->n_set && s->accept == p->accept && memcmp(s->set, p->set, n_bytes) == 0) {
            return id;
        }
    }
    uint32_t id = state_new(m);
    m->states[id] = (state){.next_same = *bucket,
                            .set = cm_alloc(n_bytes),
                            .n_set = p->n_set,
                            .n_place = p->n_place,
                            .accept = p->accept,
                            .row = m->zeros};
    memcpy(m->states[id].set, p->set, n_bytes);
    *bucket = id;
    return id;
}

/* The successor by a byte of a class. */
static uint32_t state_next(gm_machine *m, uint32_t id, uint8_t class)
{
    state *s = &m->states[id];
    if (s->row[class] != 0) {
        return s->row[class];
    }
    gm_places_begin(&m->places);
    gm_places_add_byte(&m->places, s->set, s->n_set, m->grammar->class_byte[class]);
    gm_places_end(&m->places);
    uint32_t next = state_of_places(m);
    s = &m->states[id]; /* they may have moved */
    if (s->row == m->zeros) {
        s->row = cm_alloc(sizeof(uint32_t) * m->grammar->n_class);
    }
    s->row[class] = next;
    return next;
}

static uint32_t state_begin(gm_machine *m)
{
    gm_places_begin(&m->places);
    gm_places_add_start(&m->places);
    gm_places_end(&m->places);
    uint32_t id = state_of_places(m);
    CM_ASSERT(id != GM_DEAD); /* gm_compile has refused it */
    return id;
}

static uint32_t state_control(gm_machine *m, uint32_t id, md_control control)
{
    const state *s = &m->states[id];
    gm_places_begin(&m->places);
    gm_places_add_control(&m->places, s->set, s->n_set, control);
    gm_places_end(&m->places);
    return state_of_places(m);
}

/* The state with the same mask that stands for many: counts are far from their ends in most places. Several
 * places of the real one, or of what follows it, may be one of this one's: as long as neither has many, none
 * is left out behind the one that is kept behind the other (see mask_of_state). */
static uint32_t state_near(gm_machine *m, uint32_t id)
{
    state *s = &m->states[id];
    if (s->near == 0) {
        bool accept = s->accept;
        gm_places_begin(&m->places);
        gm_places_add_near(&m->places, s->set, s->n_set, m->vocab->longest);
        gm_places_end(&m->places);
        m->places.accept = accept;
        uint32_t near = state_of_places(m);
        m->states[id].near = near;
    }
    return m->states[id].near;
}

static uint32_t counted(gm_machine *m, uint32_t id)
{
    if (id >= FIRST_ID) {
        m->states[id].refs++;
    }
    return id;
}

gm_state gm_begin(gm_machine *m, bool thinking)
{
    pthread_mutex_lock(&m->lock);
    collect(m);
    uint32_t id = thinking ? (uint32_t)GM_THINK : counted(m, state_begin(m));
    pthread_mutex_unlock(&m->lock);
    return id;
}

gm_state gm_state_hold(gm_machine *m, gm_state id)
{
    pthread_mutex_lock(&m->lock);
    counted(m, id);
    pthread_mutex_unlock(&m->lock);
    return id;
}

void gm_state_release(gm_machine *m, gm_state id)
{
    if (id >= FIRST_ID) {
        pthread_mutex_lock(&m->lock);
        CM_ASSERT(m->states[id].refs > 0);
        m->states[id].refs--;
        pthread_mutex_unlock(&m->lock);
    }
}

bool gm_is_complete(gm_machine *m, gm_state id)
{
    pthread_mutex_lock(&m->lock);
    bool complete = id == GM_DONE || (id >= FIRST_ID && m->states[id].accept);
    pthread_mutex_unlock(&m->lock);
    return complete;
}

/* ---- tokens ---- */

static bool is_text(const gm_vocab *v, uint32_t id)
{
    return id < v->source.n_id && (v->text[id / 32] >> id % 32 & 1) != 0;
}

static uint32_t advance_text(gm_machine *m, uint32_t at, uint32_t id)
{
    size_t n = 0;
    const uint8_t *bytes = m->vocab->source.bytes(m->vocab->source.ctx, id, &n);
    for (size_t i = 0; i < n && at != GM_DEAD; i++) {
        at = state_next(m, at, m->grammar->class_of[bytes[i]]);
    }
    return at;
}

static uint32_t advance(gm_machine *m, uint32_t at, uint32_t id)
{
    const gm_vocab_source *v = &m->vocab->source;
    if (at == GM_THINK) {
        return id == v->think_end      ? state_begin(m)
               : is_text(m->vocab, id) ? (uint32_t)GM_THINK
                                       : (uint32_t)GM_DEAD;
    }
    if (at == GM_DONE || id == v->eos) {
        return id == v->eos && (at == GM_DONE || m->states[at].accept) ? (uint32_t)GM_DONE
                                                                       : (uint32_t)GM_DEAD;
    }
    if (id == v->dsml) {
        return state_control(m, at, MD_CTL_DSML);
    }
    return is_text(m->vocab, id) ? advance_text(m, at, id) : (uint32_t)GM_DEAD;
}

gm_state gm_advance(gm_machine *m, gm_state at, uint32_t id)
{
    CM_ASSERT(at != GM_DEAD);
    pthread_mutex_lock(&m->lock);
    collect(m);
    uint32_t next = counted(m, advance(m, at, id));
    pthread_mutex_unlock(&m->lock);
    return next;
}

/* ---- masks ---- */

static void mask_put(uint32_t *bits, uint32_t id)
{
    if (id != GM_NO_ID) {
        bits[id / 32] |= 1u << id % 32;
    }
}

/* All tokens along the tree, as far as the states lead. Returns how many nodes were looked at. *most_out: the
 * most places that any of the states had. */
static uint32_t walk(gm_machine *m, uint32_t at, uint32_t *bits, uint32_t *most_out)
{
    const gm_vocab *v = m->vocab;
    uint32_t path[GM_TOKEN_BYTES_MAX + 1], n_looked = 0, n_place = 0;
    *most_out = 0;
    path[0] = at;
    m->n_walk++;
    for (uint32_t i = 0; i < v->n_node; n_looked++) {
        const gm_node *node = &v->nodes[i];
        uint32_t from = path[node->depth - 1];
        bool too_far = node->depth > 1 && n_place > MASK_PLACES_MAX;
        uint32_t next = too_far ? (uint32_t)GM_DEAD : state_next(m, from, m->grammar->class_of[node->byte]);
        if (next == GM_DEAD) {
            i = node->end;
            continue;
        }
        if (next != from && m->states[next].visited != m->n_walk) {
            m->states[next].visited = m->n_walk;
            n_place += m->states[next].n_place + 1;
            *most_out = m->states[next].n_place > *most_out ? m->states[next].n_place : *most_out;
        }
        path[node->depth] = next;
        for (uint32_t id = node->id; id != GM_NO_ID; id = v->same[id]) {
            mask_put(bits, id);
        }
        i++;
    }
    return n_looked;
}

/* Remembers a mask in the place of the one that was not used for longest. */
static void mask_keep(gm_machine *m, uint32_t at, const uint32_t *bits, uint32_t n_word, uint32_t most)
{
    uint32_t oldest = 0;
    for (uint32_t id = FIRST_ID; m->n_masks >= MASKS_MAX && id < m->n_state; id++) {
        const state *s = &m->states[id];
        if (s->mask != NULL && (oldest == 0 || s->mask_used < m->states[oldest].mask_used)) {
            oldest = id;
        }
    }
    uint32_t *mask = oldest != 0 ? m->states[oldest].mask : cm_alloc(sizeof(*mask) * n_word);
    m->n_masks += oldest == 0;
    if (oldest != 0) {
        m->states[oldest].mask = NULL;
    }
    memcpy(mask, bits, sizeof(*mask) * n_word);
    m->states[at].mask = mask;
    m->states[at].mask_most = most;
}

/* The mask of a state. Returns the most places of a state behind it. */
static uint32_t mask_find(gm_machine *m, uint32_t at, uint32_t *bits, uint32_t n_word)
{
    uint32_t most;
    state *s = &m->states[at];
    s->mask_used = ++m->n_use;
    if (s->mask != NULL) {
        m->stats.n_mask_kept++;
        memcpy(bits, s->mask, sizeof(*bits) * n_word);
        return s->mask_most;
    }
    memset(bits, 0, sizeof(*bits) * n_word);
    uint32_t n_looked = walk(m, at, bits, &most);
    s = &m->states[at]; /* they may have moved */
    if (s->accept) {
        mask_put(bits, m->vocab->source.eos);
    }
    if (gm_places_has_control(&m->places, s->set, s->n_set, MD_CTL_DSML)) {
        mask_put(bits, m->vocab->source.dsml);
    }
    if (n_looked >= MASK_NODES_MIN) {
        mask_keep(m, at, bits, n_word, most);
    }
    return most;
}

static void mask_of_state(gm_machine *m, uint32_t at, uint32_t *bits, uint32_t n_word)
{
    uint32_t near = m->states[at].n_place <= NEAR_PLACES_MAX ? state_near(m, at) : at;
    if (mask_find(m, near, bits, n_word) > GM_PLACES_MAX / NEAR_PLACES_MAX && near != at) {
        mask_find(m, at, bits, n_word);
    }
}

void gm_mask(gm_machine *m, gm_state at, uint32_t *bits)
{
    uint32_t n_word = gm_vocab_words(m->vocab->source.n_id);
    CM_ASSERT(at != GM_DEAD);
    pthread_mutex_lock(&m->lock);
    m->stats.n_mask++;
    if (at == GM_DONE) {
        memset(bits, 0, sizeof(*bits) * n_word);
        mask_put(bits, m->vocab->source.eos);
    } else if (at == GM_THINK) {
        memcpy(bits, m->vocab->text, sizeof(*bits) * n_word);
        mask_put(bits, m->vocab->source.think_end);
    } else {
        collect(m);
        mask_of_state(m, at, bits, n_word);
    }
    pthread_mutex_unlock(&m->lock);
}

void gm_machine_stats_get(gm_machine *m, gm_machine_stats *stats_out)
{
    pthread_mutex_lock(&m->lock);
    *stats_out = m->stats;
    stats_out->n_state = m->n_live;
    stats_out->n_kept = m->n_masks;
    pthread_mutex_unlock(&m->lock);
}
