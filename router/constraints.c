#include "router/constraints.h"

#include <stdio.h>
#include <string.h>
#include <sys/queue.h>
#include <xxhash.h>

#include "common/base/clock.h"
#include "common/base/jobs.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/stats.h"

enum { KNOWN_MAX = 64, QUEUED_MAX = 256 };

typedef struct known {
    TAILQ_ENTRY(known) link;
    XXH128_hash_t hash; /* of kind and source */
    gm_machine *machine;
} known;

/* One that is being compiled. */
typedef struct order {
    TAILQ_ENTRY(order) link;
    rt_constraints *constraints;
    gm_kind kind;
    char *source;
    size_t n_source;
    XXH128_hash_t hash;
    rt_constraints_fn fn;
    void *ctx;
    pc_task done;
    gm_machine *machine; /* NULL: err says why */
    cm_error err;
} order;

struct rt_constraints {
    pc_loop *loop;
    const char *dir;
    uint32_t vocab_size;
    cm_jobs *jobs; /* one thread, which alone touches the next two until the end */
    md_tokenizer *tokenizer;
    gm_vocab *vocab;
    TAILQ_HEAD(known_list, known) known; /* used last first */
    uint32_t n_known;
    TAILQ_HEAD(, order) orders;
};

rt_constraints *rt_constraints_create(pc_loop *loop, const char *dir, uint32_t vocab)
{
    rt_constraints *c = cm_alloc(sizeof(*c));
    c->loop = loop;
    c->dir = dir;
    c->vocab_size = vocab;
    c->jobs = cm_jobs_create("constraints", 1, QUEUED_MAX);
    TAILQ_INIT(&c->known);
    TAILQ_INIT(&c->orders);
    return c;
}

/* ---- known ones ---- */

static XXH128_hash_t hash_of(gm_kind kind, const void *source, size_t n)
{
    return XXH3_128bits_withSeed(source, n, (XXH64_hash_t)kind);
}

static gm_machine *known_find(rt_constraints *c, XXH128_hash_t hash)
{
    known *k;
    TAILQ_FOREACH (k, &c->known, link) {
        if (XXH128_isEqual(k->hash, hash)) {
            TAILQ_REMOVE(&c->known, k, link);
            TAILQ_INSERT_HEAD(&c->known, k, link);
            return gm_machine_hold(k->machine);
        }
    }
    return NULL;
}

static void known_drop(rt_constraints *c, known *k)
{
    TAILQ_REMOVE(&c->known, k, link);
    c->n_known--;
    gm_machine_release(k->machine);
    cm_free(k);
}

static void known_add(rt_constraints *c, XXH128_hash_t hash, gm_machine *machine)
{
    known *k = cm_alloc(sizeof(*k));
    *k = (known){.hash = hash, .machine = gm_machine_hold(machine)};
    TAILQ_INSERT_HEAD(&c->known, k, link);
    if (++c->n_known > KNOWN_MAX) {
        known_drop(c, TAILQ_LAST(&c->known, known_list));
    }
}

/* ---- compiling ---- */

static cm_status read_vocab(rt_constraints *c, cm_error *err)
{
    char path[4096];
    uint64_t start_ns = cm_now_ns();
    if (c->vocab != NULL) {
        return CM_OK;
    }
    snprintf(path, sizeof(path), "%s/tokenizer.json", c->dir);
    if (c->tokenizer == NULL) {
        CM_TRY(md_tokenizer_open(path, c->vocab_size, &c->tokenizer, err));
    }
    CM_TRY(gm_vocab_of_tokenizer(c->tokenizer, c->vocab_size, &c->vocab, err));
    cm_info("vocabulary of %u ids read for constraints in %llu ms", c->vocab_size,
            (unsigned long long)((cm_now_ns() - start_ns) / 1000000));
    return CM_OK;
}

/* On the job thread. */
static void order_compile(void *arg)
{
    order *o = arg;
    gm_grammar *grammar;
    uint64_t start_ns = cm_now_ns();
    if (read_vocab(o->constraints, &o->err) == CM_OK &&
        gm_compile(o->kind, o->source, o->n_source, &grammar, &o->err) == CM_OK) {
        o->machine = gm_machine_create(grammar, o->constraints->vocab);
        cm_stat_add(CM_STAT_constraints_compiled, 1);
        cm_debug("constraint of %zu bytes compiled in %llu us", o->n_source,
                 (unsigned long long)((cm_now_ns() - start_ns) / 1000));
    }
    pc_loop_post(o->constraints->loop, &o->done);
}

static void order_free(order *o)
{
    TAILQ_REMOVE(&o->constraints->orders, o, link);
    cm_free(o->source);
    cm_free(o);
}

/* Back on the loop. */
static void order_done(void *arg)
{
    order *o = arg;
    gm_machine *machine = known_find(o->constraints, o->hash); /* the same one, ordered twice */
    if (machine != NULL && o->machine != NULL) {
        gm_machine_release(o->machine);
    } else if (o->machine != NULL) {
        machine = o->machine;
        known_add(o->constraints, o->hash, machine);
    }
    o->fn(o->ctx, machine, machine != NULL ? NULL : &o->err);
    order_free(o);
}

cm_status rt_constraints_get(rt_constraints *c, uint32_t kind, const void *source, size_t n,
                             rt_constraints_fn fn, void *ctx, gm_machine **machine_out, cm_error *err)
{
    if (!gm_kind_is_known(kind) || n > GM_SOURCE_BYTES_MAX) {
        return cm_error_set(err, CM_E_INVALID, "constraint",
                            "a constraint of kind %u and %zu bytes is not known here", kind, n);
    }
    XXH128_hash_t hash = hash_of((gm_kind)kind, source, n);
    cm_stat_add(CM_STAT_constraints, 1);
    *machine_out = known_find(c, hash);
    if (*machine_out != NULL) {
        return CM_OK;
    }
    order *o = cm_alloc(sizeof(*o));
    *o = (order){.constraints = c,
                 .kind = (gm_kind)kind,
                 .source = cm_alloc(n + 1),
                 .n_source = n,
                 .hash = hash,
                 .fn = fn,
                 .ctx = ctx,
                 .done = {.fn = order_done, .arg = o}};
    if (n > 0) { /* of JSON objects there is none */
        memcpy(o->source, source, n);
    }
    TAILQ_INSERT_TAIL(&c->orders, o, link);
    if (cm_jobs_submit(c->jobs, order_compile, o) != CM_OK) {
        order_free(o);
        return cm_error_set(err, CM_E_CAPACITY, "constraint",
                            "%d constraints wait to be compiled: try again later", QUEUED_MAX);
    }
    return CM_AGAIN;
}

void rt_constraints_destroy(rt_constraints *c)
{
    order *o;
    cm_jobs_destroy(c->jobs); /* all orders are done or posted */
    while ((o = TAILQ_FIRST(&c->orders)) != NULL) {
        pc_loop_unpost(c->loop, &o->done);
        if (o->machine != NULL) {
            gm_machine_release(o->machine);
        }
        order_free(o);
    }
    while (!TAILQ_EMPTY(&c->known)) {
        known_drop(c, TAILQ_FIRST(&c->known));
    }
    gm_vocab_destroy(c->vocab);
    if (c->tokenizer != NULL) {
        md_tokenizer_close(c->tokenizer);
    }
    cm_free(c);
}
