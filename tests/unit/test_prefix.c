/* What is kept of earlier sequences, against a model that knows every token: random sequences of few tokens
 * begin, grow, write states and end, among pages and states that never suffice. --seed N repeats a run. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/rng.h"
#include "router/sched/prefix_core.h"

enum { PAGE_TOKENS = 4, LOG_MAX = 40, SEQS = 6, PAGES_MAX = 40, STATES_MAX = 8, SALTS = 2, HASHES = 10 };

static uint64_t g_seed = 1;

typedef struct rng {
    uint64_t key, n;
} rng;

static uint32_t below(rng *r, uint32_t n)
{
    return cm_rng_at(r->key, r->n++, 0).word[0] % n;
}

/* Tokens from a sequence's beginning, and whose. */
typedef struct text {
    uint8_t salt;
    uint32_t n, tokens[LOG_MAX];
} text;

static bool begins_with(const text *a, const text *b)
{
    return a->salt == b->salt && a->n >= b->n && memcmp(a->tokens, b->tokens, sizeof(uint32_t) * b->n) == 0;
}

typedef struct seq {
    bool open;
    text log;
    uint32_t n_done, n_page, n_tree, pages[LOG_MAX / PAGE_TOKENS];
} seq;

/* What the numbers stand for. */
typedef struct page_model {
    enum { PAGE_FREE, PAGE_PRIVATE, PAGE_TREE } kind;
    text until; /* PAGE_TREE: everything up to its end */
    bool has_state, spare;
    uint32_t state;
} page_model;

typedef struct world {
    rng r;
    rt_prefix *prefix;
    rt_prefix_limits limits;
    seq seqs[SEQS];
    page_model pages[PAGES_MAX];
    text states[STATES_MAX]; /* what went through it */
    uint64_t n_hit, n_evicted, n_shared, n_known, n_passed;
} world;

static void salt_of(const text *log, uint8_t salt[RT_SALT_BYTES])
{
    memset(salt, 0, RT_SALT_BYTES);
    salt[RT_SALT_BYTES - 1] = log->salt;
}

static uint32_t holders(const world *w, uint32_t page)
{
    uint32_t n = 0;
    for (uint32_t s = 0; s < SEQS; s++) {
        for (uint32_t i = 0; i < w->seqs[s].n_page; i++) {
            n += w->seqs[s].open && w->seqs[s].pages[i] == page;
        }
    }
    return n;
}

static page_model *tree_page(world *w, const text *until)
{
    for (uint32_t p = 0; p < w->limits.page_max; p++) {
        const text *t = &w->pages[p].until;
        if (w->pages[p].kind == PAGE_TREE && t->n == until->n && begins_with(t, until)) {
            return &w->pages[p];
        }
    }
    return NULL;
}

/* A page that was in the tree is handed out: nobody had it, and nothing came after it. */
static void check_given_up(world *w, uint32_t page)
{
    page_model *m = &w->pages[page];
    assert_int_equal(holders(w, page), 0);
    for (uint32_t p = 0; p < w->limits.page_max; p++) {
        assert_int_not_equal(w->pages[p].kind, PAGE_FREE); /* kept ones last */
        if (p != page && w->pages[p].kind == PAGE_TREE) {
            assert_false(begins_with(&w->pages[p].until, &m->until));
        }
    }
    w->n_evicted++;
}

static bool page_take(world *w, uint32_t *page_out)
{
    uint32_t room = rt_prefix_page_room(w->prefix);
    if (!rt_prefix_page_take(w->prefix, page_out)) {
        assert_int_equal(room, 0);
        return false;
    }
    assert_int_equal(rt_prefix_page_room(w->prefix), room - 1);
    assert_int_not_equal(w->pages[*page_out].kind, PAGE_PRIVATE);
    if (w->pages[*page_out].kind == PAGE_TREE) {
        check_given_up(w, *page_out);
    }
    w->pages[*page_out] = (page_model){.kind = PAGE_PRIVATE};
    return true;
}

/* ---- what sequences do ---- */

static text text_upto(const text *log, uint32_t n)
{
    text t = {.salt = log->salt, .n = n};
    memcpy(t.tokens, log->tokens, sizeof(uint32_t) * n);
    return t;
}

static void check_hit(world *w, const seq *s, const rt_prefix_hit *hit)
{
    uint32_t n_page = 0, n_kept = 0, n_known = 0, n_pages = (s->log.n - 1) / PAGE_TOKENS, kept = 0;
    for (uint32_t i = 1; i <= n_pages; i++) {
        text t = text_upto(&s->log, i * PAGE_TOKENS);
        const page_model *m = tree_page(w, &t);
        if (m == NULL) {
            break;
        }
        n_known = i;
        kept += holders(w, (uint32_t)(m - w->pages)) == 0;
        if (m->has_state) {
            n_page = i;
            n_kept = kept;
        }
    }
    assert_int_equal(hit->n_known, n_known);
    assert_int_equal(hit->n_page, n_page);
    assert_int_equal(hit->n_kept, n_kept);
    assert_int_equal(hit->page == RT_PREFIX_NONE, n_page == 0);
    w->n_known += n_known > n_page;
}

static void begin(world *w, seq *s)
{
    const text *like = &w->seqs[below(&w->r, SEQS)].log;
    uint8_t salt[RT_SALT_BYTES];
    uint64_t hashes[HASHES];
    rt_prefix_hit hit;
    uint32_t n_like = below(&w->r, like->n < LOG_MAX ? like->n + 1 : LOG_MAX);
    text log = text_upto(like, n_like);
    log.salt = (uint8_t)(below(&w->r, 6) == 0 ? below(&w->r, SALTS) : like->salt);
    log.n = n_like + 1 + below(&w->r, LOG_MAX - n_like > 12 ? 12 : LOG_MAX - n_like);
    log.n = log.n > LOG_MAX ? LOG_MAX : log.n;
    for (uint32_t i = n_like; i < log.n; i++) {
        log.tokens[i] = below(&w->r, 2);
    }
    *s = (seq){.log = log};
    salt_of(&log, salt);
    rt_prefix_find(w->prefix, salt, log.tokens, log.n, &(rt_prefix_chain){.hash = hashes}, &hit);
    check_hit(w, s, &hit);
    uint32_t room = rt_prefix_page_room(w->prefix);
    rt_prefix_hold(w->prefix, &hit, s->pages);
    assert_int_equal(rt_prefix_page_room(w->prefix), room - hit.n_kept);
    s->open = true;
    s->n_page = s->n_tree = hit.n_page;
    s->n_done = hit.n_page * PAGE_TOKENS;
    if (hit.n_page > 0) {
        w->n_hit++;
        w->pages[hit.page].spare = false;
        assert_int_equal(w->states[hit.state].n, s->n_done);
        assert_true(begins_with(&log, &w->states[hit.state]));
    }
    for (uint32_t i = 0; i < hit.n_page; i++) {
        text t = text_upto(&log, (i + 1) * PAGE_TOKENS);
        assert_ptr_equal(tree_page(w, &t), &w->pages[s->pages[i]]);
    }
}

static void end(world *w, seq *s)
{
    while (s->n_page > s->n_tree) {
        uint32_t page = s->pages[--s->n_page];
        w->pages[page] = (page_model){.kind = PAGE_FREE};
        rt_prefix_page_put(w->prefix, page);
    }
    rt_prefix_release(w->prefix, s->n_tree > 0 ? s->pages[s->n_tree - 1] : RT_PREFIX_NONE);
    s->open = false;
    s->n_page = s->n_tree = 0;
}

static void add(world *w, seq *s)
{
    uint8_t salt[RT_SALT_BYTES];
    uint32_t page = s->pages[s->n_tree], before = s->n_tree > 0 ? s->pages[s->n_tree - 1] : RT_PREFIX_NONE;
    text until = text_upto(&s->log, (s->n_tree + 1) * PAGE_TOKENS);
    page_model *known = tree_page(w, &until);
    salt_of(&s->log, salt);
    uint32_t now =
        rt_prefix_add(w->prefix, salt, before, page, s->log.tokens + (size_t)s->n_tree * PAGE_TOKENS);
    if (known != NULL) {
        assert_ptr_equal(known, &w->pages[now]);
        w->pages[page] = (page_model){.kind = PAGE_FREE};
        w->n_shared++;
    } else {
        assert_int_equal(now, page);
        w->pages[page] = (page_model){.kind = PAGE_TREE, .until = until};
    }
    s->pages[s->n_tree++] = now;
}

static bool state_hangs(const world *w, uint32_t state, uint32_t *page_out)
{
    for (uint32_t p = 0; p < w->limits.page_max; p++) {
        if (w->pages[p].kind == PAGE_TREE && w->pages[p].has_state && w->pages[p].state == state) {
            *page_out = p;
            return true;
        }
    }
    return false;
}

static bool a_spare_one_hangs(const world *w)
{
    for (uint32_t p = 0; p < w->limits.page_max; p++) {
        if (w->pages[p].kind == PAGE_TREE && w->pages[p].has_state && w->pages[p].spare) {
            return true;
        }
    }
    return false;
}

/* At the end of the page that was added last. */
static void write_state(world *w, seq *s)
{
    uint32_t state, page = s->pages[s->n_tree - 1], other;
    bool spare = below(&w->r, 2) == 0, any_spare = a_spare_one_hangs(w);
    if (!rt_prefix_state_take(w->prefix, spare, &state)) {
        assert_true(w->limits.state_max == 0 || (spare && !any_spare));
        return;
    }
    if (state_hangs(w, state, &other)) { /* it was the one to make room */
        assert_true(w->pages[other].spare == any_spare && (any_spare || !spare));
        w->pages[other].has_state = false;
    }
    if (below(&w->r, 8) == 0) {
        rt_prefix_state_put(w->prefix, state);
        return;
    }
    rt_prefix_state_set(w->prefix, page, state, spare);
    w->pages[page].spare = spare && (w->pages[page].spare || !w->pages[page].has_state);
    if (!w->pages[page].has_state) {
        w->pages[page].has_state = true;
        w->pages[page].state = state;
        w->states[state] = w->pages[page].until;
    }
}

static void grow(world *w, seq *s)
{
    uint32_t page;
    if (s->n_done == s->log.n) {
        end(w, s);
        return;
    }
    if (s->n_done == s->n_page * PAGE_TOKENS) {
        if (!page_take(w, &page)) {
            end(w, s);
            return;
        }
        s->pages[s->n_page++] = page;
    }
    s->n_done++;
    if (s->n_done % PAGE_TOKENS == 0) {
        add(w, s);
        if (below(&w->r, 3) != 0) {
            write_state(w, s);
        }
    }
}

/* A spare state goes, others stay; in a quarter of cases it is to stay. */
static void pass(world *w, seq *s)
{
    rt_prefix_ledger before, after;
    if (s->n_tree == 0) {
        return;
    }
    page_model *m = &w->pages[s->pages[s->n_tree - 1]];
    rt_prefix_ledger_get(w->prefix, &before);
    if (below(&w->r, 4) == 0) {
        rt_prefix_state_stay(w->prefix, s->pages[s->n_tree - 1]);
        m->spare = false;
    }
    rt_prefix_state_pass(w->prefix, s->pages[s->n_tree - 1]);
    rt_prefix_ledger_get(w->prefix, &after);
    assert_int_equal(before.n_state - after.n_state, m->has_state && m->spare);
    if (after.n_state < before.n_state) {
        m->has_state = false;
        w->n_passed++;
    }
}

/* What nobody holds is gone, and from nothing that is there can a sequence go on. */
static void forget(world *w)
{
    rt_prefix_forget(w->prefix);
    for (uint32_t p = 0; p < w->limits.page_max; p++) {
        page_model *m = &w->pages[p];
        m->has_state = false;
        if (m->kind == PAGE_TREE && holders(w, p) == 0) {
            m->kind = PAGE_FREE;
        }
    }
}

static void check_ledger(world *w)
{
    rt_prefix_ledger ledger;
    uint32_t n_held = 0, n_tree = 0, n_state = 0, n_free = 0;
    rt_prefix_ledger_get(w->prefix, &ledger);
    for (uint32_t p = 0; p < w->limits.page_max; p++) {
        bool held = holders(w, p) > 0;
        n_held += held;
        n_tree += w->pages[p].kind == PAGE_TREE && !held;
        n_free += w->pages[p].kind == PAGE_FREE;
        n_state += w->pages[p].kind == PAGE_TREE && w->pages[p].has_state;
    }
    assert_int_equal(ledger.n_held, n_held);
    assert_int_equal(ledger.n_kept, n_tree);
    assert_int_equal(ledger.n_state, n_state);
    assert_int_equal(ledger.n_writing, 0);
    assert_int_equal(rt_prefix_page_room(w->prefix), n_free + n_tree);
}

static void run(uint64_t seed, uint64_t sums[5])
{
    static world w;
    w = (world){.r = {seed, 0}};
    w.limits = (rt_prefix_limits){.page_max = 1 + below(&w.r, PAGES_MAX),
                                  .page_tokens = PAGE_TOKENS,
                                  .state_max = below(&w.r, STATES_MAX + 1)};
    w.prefix = rt_prefix_create(&w.limits);
    for (uint32_t i = 0; i < 1500; i++) {
        seq *s = &w.seqs[below(&w.r, SEQS)];
        uint32_t dice = below(&w.r, 40);
        if (!s->open) {
            begin(&w, s);
        } else if (dice == 0) {
            end(&w, s);
        } else if (dice < 3) {
            pass(&w, s);
        } else if (dice == 3 && below(&w.r, 4) == 0) {
            forget(&w);
        } else {
            grow(&w, s);
        }
        check_ledger(&w);
    }
    for (uint32_t i = 0; i < SEQS; i++) {
        end(&w, &w.seqs[i]);
    }
    check_ledger(&w);
    rt_prefix_destroy(w.prefix);
    const uint64_t n[5] = {w.n_hit, w.n_evicted, w.n_shared, w.n_known, w.n_passed};
    for (uint32_t i = 0; i < 5; i++) {
        sums[i] += n[i];
    }
}

static void test_model(void **state)
{
    uint64_t sums[5] = {0};
    (void)state;
    for (uint64_t i = 0; i < 200; i++) {
        run(g_seed * 1000 + i, sums);
    }
    print_message("%llu hits, %llu pages given up, %llu shared, %llu known without a state, %llu passed\n",
                  (unsigned long long)sums[0], (unsigned long long)sums[1], (unsigned long long)sums[2],
                  (unsigned long long)sums[3], (unsigned long long)sums[4]);
    for (uint32_t i = 0; i < 5; i++) {
        assert_true(sums[i] > 100);
    }
}

/* ---- in words ---- */

static const uint8_t NO_SALT[RT_SALT_BYTES] = {0};
static const uint32_t TOKENS[16] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3};

static rt_prefix *make(uint32_t page_max, uint32_t state_max)
{
    return rt_prefix_create(&(rt_prefix_limits){page_max, PAGE_TOKENS, state_max});
}

/* A sequence computes the first n pages of TOKENS and ends; a state at each page's end of `states` (bits). */
static void compute(rt_prefix *prefix, uint32_t n, uint32_t states, bool spare)
{
    uint32_t last = RT_PREFIX_NONE, page, state;
    for (uint32_t i = 0; i < n; i++) {
        assert_true(rt_prefix_page_take(prefix, &page));
        last = rt_prefix_add(prefix, NO_SALT, last, page, TOKENS + (size_t)i * PAGE_TOKENS);
        if ((states >> i & 1) != 0) {
            assert_true(rt_prefix_state_take(prefix, spare, &state));
            rt_prefix_state_set(prefix, last, state, spare);
        }
    }
    rt_prefix_release(prefix, last);
}

static uint32_t found(const rt_prefix *prefix, uint32_t n_token)
{
    rt_prefix_hit hit;
    uint64_t hashes[HASHES];
    rt_prefix_find(prefix, NO_SALT, TOKENS, n_token, &(rt_prefix_chain){.hash = hashes}, &hit);
    return hit.n_page;
}

/* The last token's row gives the first answer: it is never found. */
static void test_last_token(void **state)
{
    rt_prefix *prefix = make(8, 4);
    (void)state;
    compute(prefix, 2, 3, false);
    assert_int_equal(found(prefix, 9), 2);
    assert_int_equal(found(prefix, 8), 1);
    assert_int_equal(found(prefix, 5), 1);
    assert_int_equal(found(prefix, 4), 0);
    assert_int_equal(found(prefix, 1), 0);
    rt_prefix_destroy(prefix);
}

static void test_oldest_state_makes_room(void **state)
{
    rt_prefix *prefix = make(8, 2);
    uint32_t pages[2];
    uint64_t hashes[HASHES];
    rt_prefix_hit hit;
    (void)state;
    compute(prefix, 3, 3, false);
    rt_prefix_find(prefix, NO_SALT, TOKENS, 5, &(rt_prefix_chain){.hash = hashes}, &hit);
    rt_prefix_hold(prefix, &hit, pages); /* the first is the newest now */
    rt_prefix_release(prefix, hit.page);
    compute(prefix, 3, 4, false);
    assert_int_equal(found(prefix, 16), 3);
    assert_int_equal(found(prefix, 12), 1);
    rt_prefix_destroy(prefix);
}

/* From the end of a sequence, the one that ended first before others. */
static void test_pages_go_from_the_end(void **state)
{
    rt_prefix *prefix = make(4, 4);
    uint32_t page[4];
    (void)state;
    compute(prefix, 3, 7, false);
    assert_true(rt_prefix_page_take(prefix, &page[0])); /* the free one */
    assert_int_equal(found(prefix, 16), 3);
    for (uint32_t i = 1; i < 4; i++) {
        assert_true(rt_prefix_page_take(prefix, &page[i]));
        assert_int_equal(found(prefix, 16), 3 - i);
    }
    assert_false(rt_prefix_page_take(prefix, &page[0]));
    for (uint32_t i = 0; i < 4; i++) {
        rt_prefix_page_put(prefix, page[i]);
    }
    rt_prefix_destroy(prefix);
}

/* A spare state that another went on from stays. */
static void test_passing(void **state)
{
    rt_prefix *prefix = make(8, 4);
    uint32_t pages[1];
    uint64_t hashes[HASHES];
    rt_prefix_hit hit;
    (void)state;
    compute(prefix, 1, 1, true);
    rt_prefix_find(prefix, NO_SALT, TOKENS, 5, &(rt_prefix_chain){.hash = hashes}, &hit);
    rt_prefix_state_pass(prefix, RT_PREFIX_NONE);
    rt_prefix_hold(prefix, &hit, pages);
    rt_prefix_state_pass(prefix, hit.page);
    assert_int_equal(found(prefix, 5), 1);
    rt_prefix_release(prefix, hit.page);
    compute(prefix, 2, 2, true);
    rt_prefix_find(prefix, NO_SALT, TOKENS, 9, &(rt_prefix_chain){.hash = hashes}, &hit);
    rt_prefix_state_pass(prefix, hit.page);
    assert_int_equal(found(prefix, 9), 1);
    rt_prefix_destroy(prefix);
}

/* What is known of the tokens is not hashed again, what comes behind it is, and nothing beyond what was
 * searched. */
static void test_hashes_are_kept(void **state)
{
    rt_prefix *prefix = make(8, 4);
    uint64_t hashes[HASHES], first;
    rt_prefix_chain chain = {.hash = hashes};
    rt_prefix_hit hit;
    (void)state;
    compute(prefix, 3, 7, false);
    rt_prefix_find(prefix, NO_SALT, TOKENS, 9, &chain, &hit);
    assert_int_equal(hit.n_page, 2);
    assert_int_equal(chain.n, 2);
    rt_prefix_find(prefix, NO_SALT, TOKENS, 16, &chain, &hit);
    assert_int_equal(hit.n_page, 3);
    assert_int_equal(chain.n, 3);
    first = hashes[0]++;
    rt_prefix_find(prefix, NO_SALT, TOKENS, 16, &chain, &hit);
    assert_int_equal(hit.n_known, 0);
    hashes[0] = first;
    hashes[2]++;
    rt_prefix_find(prefix, NO_SALT, TOKENS, 16, &chain, &hit);
    assert_int_equal(hit.n_known, 2);
    rt_prefix_destroy(prefix);
}

/* Also beneath what a sequence still has, which goes on. */
static void test_forgetting(void **state)
{
    rt_prefix *prefix = make(8, 4);
    uint32_t pages[2], page, last;
    uint64_t hashes[HASHES];
    rt_prefix_hit hit;
    (void)state;
    compute(prefix, 3, 7, false);
    rt_prefix_find(prefix, NO_SALT, TOKENS, 9, &(rt_prefix_chain){.hash = hashes}, &hit);
    rt_prefix_hold(prefix, &hit, pages);
    rt_prefix_forget(prefix);
    assert_int_equal(found(prefix, 16), 0);
    assert_int_equal(rt_prefix_page_room(prefix), 6);
    assert_true(rt_prefix_page_take(prefix, &page));
    last = rt_prefix_add(prefix, NO_SALT, hit.page, page, TOKENS + 8);
    rt_prefix_release(prefix, last);
    assert_int_equal(found(prefix, 16), 0);
    compute(prefix, 3, 4, false); /* and is computed anew */
    assert_int_equal(found(prefix, 16), 3);
    rt_prefix_destroy(prefix);
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "--seed") == 0) {
        g_seed = strtoull(argv[2], NULL, 10);
    }
    printf("seed %llu\n", (unsigned long long)g_seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_model),
        cmocka_unit_test(test_last_token),
        cmocka_unit_test(test_oldest_state_makes_room),
        cmocka_unit_test(test_pages_go_from_the_end),
        cmocka_unit_test(test_passing),
        cmocka_unit_test(test_hashes_are_kept),
        cmocka_unit_test(test_forgetting),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
