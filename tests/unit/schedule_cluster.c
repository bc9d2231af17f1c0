#include "tests/unit/schedule_cluster.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/clock.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "worker/engine.h"

enum { ROUTER_ID = 1, WORKER_ID = 2, WAIT_MS = 60000, EPOCHS = 2, REPLICA_MAX = 3 };

typedef struct cluster_worker {
    wk_engine *engine;
    pthread_t thread;
    char address[NET_ADDRESS_BYTES];
} cluster_worker;

struct t_cluster {
    const t_case *c;
    md_checkpoint *checkpoint;
    rt_engine *engine;
    cluster_worker workers[T_WORKER_MAX];
    pc_epoch *epochs[EPOCHS];
    uint64_t id;
};

static void rows_options(const t_case *c, net_options *options_out)
{
    net_options_defaults(options_out);
    options_out->backend = c->transport;
    options_out->message_bytes_max = c->frame_bytes;
    options_out->silence_ms = 600000; /* threads of one process die together */
}

/* ---- placements ---- */

/* Ranks of one epoch: a random part of the workers in random order. */
static uint32_t draw_members(const t_case *c, t_rng *rng, uint32_t members[T_WORKER_MAX])
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < c->n_worker; i++) {
        if (c->whole || t_below(rng, 4) != 0) {
            uint32_t at = t_below(rng, n + 1);
            members[n++] = members[at];
            members[at] = WORKER_ID + i;
        }
    }
    if (n == 0) {
        members[n++] = WORKER_ID + t_below(rng, c->n_worker);
    }
    return n;
}

/* Up to REPLICA_MAX different ranks, the first at random. */
static uint32_t draw_owners(t_rng *rng, uint32_t n_rank, uint16_t *owner_out)
{
    uint32_t n = t_below(rng, 3) != 0 ? 1 : t_between(rng, 1, n_rank < REPLICA_MAX ? n_rank : REPLICA_MAX);
    uint32_t first = t_below(rng, n_rank);
    for (uint32_t i = 0; i < n; i++) {
        owner_out[i] = (uint16_t)((first + i) % n_rank);
    }
    return n;
}

static pr_placement *draw_placement(const t_case *c, t_rng *rng)
{
    uint32_t members[T_WORKER_MAX] = {0}, n_pair = md_block_count(&c->geometry) * c->geometry.n_expert;
    pr_placement *p = cm_alloc(sizeof(*p));
    p->n_layer = md_block_count(&c->geometry);
    p->n_expert = c->geometry.n_expert;
    p->n_rank = draw_members(c, rng, members);
    p->rank_member = cm_alloc(sizeof(uint32_t) * p->n_rank);
    memcpy(p->rank_member, members, sizeof(uint32_t) * p->n_rank);
    p->first = cm_alloc(sizeof(uint32_t) * (n_pair + 1));
    p->owner = cm_alloc(sizeof(uint16_t) * n_pair * REPLICA_MAX);
    for (uint32_t i = 0; i < n_pair; i++) {
        p->first[i + 1] = p->first[i] + draw_owners(rng, p->n_rank, p->owner + p->first[i]);
    }
    return p;
}

static void cluster_load(t_cluster *cluster, const pr_placement *placement)
{
    for (uint32_t r = 0; r < placement->n_rank; r++) {
        cm_error err = {0};
        wk_engine *engine = cluster->workers[placement->rank_member[r] - WORKER_ID].engine;
        if (wk_shard_load(wk_engine_shard(engine), placement, r, &err) != CM_OK) {
            fail_msg("worker %u: %s", placement->rank_member[r], err.text);
        }
    }
}

static void cluster_draw_epoch(t_cluster *cluster, uint32_t i)
{
    t_rng rng = {cluster->c->seed, (uint64_t)(i + 1) << 32};
    uint32_t n = cluster->c->n_worker;
    pc_epoch *epoch = cm_alloc(sizeof(*epoch));
    epoch->refs = 1;
    epoch->number = i + 1;
    epoch->cluster = cluster->id;
    epoch->n_member = n;
    epoch->members = cm_alloc(sizeof(*epoch->members) * n);
    for (uint32_t k = 0; k < n; k++) {
        epoch->members[k].id = WORKER_ID + k;
        epoch->members[k].role = BALEEN__CONTROL__V1__ROLE__ROLE_WORKER;
        epoch->members[k].data_address = cm_strdup(cluster->workers[k].address);
    }
    epoch->placement = draw_placement(cluster->c, &rng);
    cluster->epochs[i] = epoch;
    cluster_load(cluster, epoch->placement);
}

/* All workers hear of an epoch, also those without experts in it: it tells them their cluster. */
static void cluster_commit(t_cluster *cluster, uint32_t i)
{
    for (uint32_t k = 0; k < cluster->c->n_worker; k++) {
        wk_engine_commit(cluster->workers[k].engine, cluster->epochs[i], WORKER_ID + k);
    }
}

void t_cluster_prepare(t_cluster *cluster)
{
    cluster_draw_epoch(cluster, 1);
}

void t_cluster_switch(t_cluster *cluster)
{
    rt_exchange *exchange = rt_engine_exchange(cluster->engine);
    if (cluster->c->router_first) {
        rt_exchange_offer_epoch(exchange, cluster->epochs[1], ROUTER_ID);
        cluster_commit(cluster, 1);
    } else {
        cluster_commit(cluster, 1);
        rt_exchange_offer_epoch(exchange, cluster->epochs[1], ROUTER_ID);
    }
    for (uint32_t k = 0; k < cluster->c->n_worker && cluster->c->retire; k++) {
        wk_engine_retire(cluster->workers[k].engine, cluster->epochs[1]->number);
    }
}

/* ---- life ---- */

static void *worker_thread(void *arg)
{
    wk_engine_run(arg);
    return NULL;
}

static void cluster_start_worker(t_cluster *cluster, uint32_t i)
{
    const t_case *c = cluster->c;
    cluster_worker *worker = &cluster->workers[i];
    char name[64];
    cm_error err = {0};
    snprintf(name, sizeof(name), "t_schedule-%016llx-%u", (unsigned long long)cluster->id, i);
    wk_engine_options options = {
        .checkpoint = cluster->checkpoint,
        .device = {.backend = "cpu", .isa = c->workers[i].isa, .n_threads = c->workers[i].n_threads},
        .address = strcmp(c->transport, "local") == 0 ? name : "127.0.0.1:0",
        .row_max = c->row_max * c->geometry.topk,
        .frame_max = c->frame_max,
        .router_max = 2,
        .window_max_us = c->window_us,
        .answer_ms = WAIT_MS,
    };
    rows_options(c, &options.rows);
    if (wk_engine_create(&options, &worker->engine, worker->address, &err) != CM_OK) {
        fail_msg("worker %u: %s", i, err.text);
    }
    assert_int_equal(pthread_create(&worker->thread, NULL, worker_thread, worker->engine), 0);
}

/* The same for the same rows: the step that fails is cut there again. */
static uint32_t cluster_cut(void *ctx, const kn_seg *segs, uint32_t n_seg, uint32_t n_row)
{
    const t_case *c = ctx;
    uint64_t what = 0;
    for (uint32_t i = 0; i < n_seg; i++) {
        what = what * 31 + segs[i].pos0 + segs[i].n_row;
    }
    return 1 + cm_rng_at(c->seed, what, n_row).word[0] % (n_row - 1);
}

static void cluster_create_router(t_cluster *cluster)
{
    const t_case *c = cluster->c;
    cm_error err = {0};
    rt_kv_sizes kv;
    rt_kv_sizes_get(&c->geometry, c->draft_max, &kv);
    rt_engine_options options = {
        .checkpoint = cluster->checkpoint,
        .device = {.backend = "cpu", .isa = c->router.isa, .n_threads = c->router.n_threads},
        .row_max = c->row_max,
        .slot_max = c->slot_max,
        .kv_bytes = c->page_max * kv.page_bytes,
        .prefix_bytes = c->state_max * kv.kept_bytes,
        .draft_max = c->draft_max,
        .micro_batches = c->micro_batches,
        .answer_ms = WAIT_MS,
        .wait_ms = WAIT_MS,
    };
    rows_options(c, &options.rows);
    if (rt_engine_create(&options, &cluster->engine, &err) != CM_OK) {
        fail_msg("router: %s", err.text);
    }
    if (c->cut_anywhere) {
        rt_engine_set_cut(cluster->engine, cluster_cut, (void *)c);
    }
}

static void cluster_link(t_cluster *cluster)
{
    rt_exchange *exchange = rt_engine_exchange(cluster->engine);
    uint64_t give_up_ms = cm_now_ms() + WAIT_MS;
    rt_exchange_offer_epoch(exchange, cluster->epochs[0], ROUTER_ID);
    while (!rt_exchange_ready(exchange)) {
        rt_exchange_idle(exchange, 10);
        if (cm_now_ms() >= give_up_ms) {
            fail_msg("the workers' links did not come up in %d ms", WAIT_MS);
        }
    }
}

t_cluster *t_cluster_create(const t_case *c)
{
    cm_error err = {0};
    t_cluster *cluster = cm_alloc(sizeof(*cluster));
    cluster->c = c;
    cluster->id = cm_random_u64();
    if (md_checkpoint_open(c->path, &cluster->checkpoint, NULL, NULL, &err) != CM_OK) {
        fail_msg("%s: %s", c->path, err.text);
    }
    for (uint32_t i = 0; i < c->n_worker; i++) {
        cluster_start_worker(cluster, i);
    }
    cluster_draw_epoch(cluster, 0);
    cluster_commit(cluster, 0);
    cluster_create_router(cluster);
    cluster_link(cluster);
    return cluster;
}

void t_cluster_destroy(t_cluster *cluster)
{
    rt_engine_destroy(cluster->engine);
    for (uint32_t i = 0; i < cluster->c->n_worker; i++) {
        wk_engine_stop(cluster->workers[i].engine);
    }
    for (uint32_t i = 0; i < cluster->c->n_worker; i++) {
        pthread_join(cluster->workers[i].thread, NULL);
        wk_engine_destroy(cluster->workers[i].engine);
    }
    for (uint32_t i = 0; i < EPOCHS; i++) {
        pc_epoch_release(cluster->epochs[i]);
    }
    md_checkpoint_close(cluster->checkpoint);
    cm_free(cluster);
}

rt_engine *t_cluster_engine(t_cluster *cluster)
{
    return cluster->engine;
}
