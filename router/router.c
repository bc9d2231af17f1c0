#include "router/router.h"

#include <pthread.h>
#include <string.h>
#include <sys/queue.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/stats.h"
#include "common/proc/addresses.h"
#include "common/proc/member.h"
#include "proto/messages.h"
#include "router/engine/engine.h"
#include "router/gateways.h"
#include "router/load.h"
#include "router/runner.h"
#include "router/script.h"

enum {
    ROUTER_SENDS_MAX = 256
}; /* frames on their way to one worker; a link takes the smaller of both sides' bounds */
enum {
    ROUTER_DOORS_MS = 200
}; /* a sequence opened just before its gateway heard of our drain may still be on its way */
enum { ROUTER_OPEN_BYTES_MIN = 1 << 20 }; /* room for a SeqOpen beside its ids */

struct router_report;

struct rt_router {
    pc_loop *loop;
    const rt_config *config;
    void (*finished)(void *ctx, int code);
    void *ctx;
    md_checkpoint *checkpoint; /* NULL with a script */
    rt_engine *engine;         /* or */
    rt_script *script;
    rt_exchange *exchange; /* the engine's, or with a script one of our own that never has rows to send */
    rt_sched *sched;
    rt_runner *runner;
    rt_gateways *gateways;
    rt_constraints *constraints;
    pc_tls *tls; /* NULL: plain */
    pc_member *member;
    rt_load *load;
    pc_timer *deadline_timer, *drain_timer, *doors_timer;
    char address[NET_ADDRESS_BYTES];
    char fingerprint[33];
    uint32_t self;
    pthread_mutex_t reports_lock;
    LIST_HEAD(, router_report) reports; /* of the compute thread, on their way to the loop */
    rt_step step;
    bool in_flight; /* step is being computed */
    bool resting;   /* workers were told that nothing comes */
    bool leaving; /* the coordinator knows or will know; sequences are taken until it says that none will come
                   */
    bool draining; /* no new sequences: ends with the last one */
};

/* ---- scheduling ---- */

static void router_count(cm_stat stat, uint64_t n_ever)
{
    cm_stat_add(stat, (int64_t)n_ever - cm_stat_get(stat));
}

static void router_show_ledger(rt_router *r)
{
    rt_sched_ledger ledger;
    rt_sched_ledger_get(r->sched, &ledger);
    cm_stat_set(CM_STAT_ledger_sequences, ledger.n_seq);
    cm_stat_set(CM_STAT_ledger_kv_pages, ledger.n_page);
    cm_stat_set(CM_STAT_ledger_seq_slots, ledger.n_slot);
    cm_stat_set(CM_STAT_seq_running, ledger.n_running);
    cm_stat_set(CM_STAT_seq_waiting, ledger.n_waiting);
    cm_stat_set(CM_STAT_kv_pages_total, ledger.page_max);
    cm_stat_set(CM_STAT_kv_pages_kept, ledger.n_page_kept);
    cm_stat_set(CM_STAT_prefix_states, ledger.n_state);
    router_count(CM_STAT_prefix_queries, ledger.n_query_token);
    router_count(CM_STAT_prefix_hits, ledger.n_hit_token);
    router_count(CM_STAT_preemptions, ledger.n_preempted);
    router_count(CM_STAT_seq_cancelled, ledger.n_cancelled);
    router_count(CM_STAT_drafts, ledger.n_draft);
    router_count(CM_STAT_draft_tokens, ledger.n_draft_token);
    router_count(CM_STAT_accepted_tokens, ledger.n_accepted_token);
    router_count(CM_STAT_decode_tokens, ledger.n_decode_token);
    rt_keep_ledger kept;
    rt_gateways_ledger(r->gateways, &kept);
    cm_stat_set(CM_STAT_sequences_kept, kept.n_orphan + kept.n_ended);
    bool alone = r->leaving && !pc_member_connected(r->member);
    bool idle = ledger.n_seq == 0 && !r->in_flight && rt_gateways_all_told(r->gateways);
    if ((r->draining || alone) && idle) {
        r->finished(r->ctx, 0);
    }
}

/* Once per turn of the loop: whatever came in, the next step is made from all of it. */
static void router_before_sleep(void *arg)
{
    rt_router *r = arg;
    uint64_t now = cm_now_ms();
    if (!r->in_flight && rt_sched_next(r->sched, now, &r->step)) {
        r->in_flight = true;
        r->resting = false;
        rt_runner_start(r->runner, &r->step);
    } else if (!r->in_flight && !r->resting) {
        r->resting = true;
        rt_runner_rest(r->runner);
    }
    rt_sched_words(r->sched, rt_gateways_word, r->gateways);
    rt_gateways_flush(r->gateways, r->step.number);
    uint64_t deadline = rt_sched_next_deadline(r->sched);
    if (deadline != UINT64_MAX) {
        pc_timer_set(r->deadline_timer, deadline > now ? deadline - now : 1);
    }
    router_show_ledger(r);
}

/* Compute thread. */
static cm_status router_step(void *ctx, const rt_step *step, rt_step_result *results_out)
{
    rt_router *r = ctx;
    return r->script != NULL ? rt_script_step(r->script, step, results_out)
                             : rt_engine_step(r->engine, step, results_out);
}

static void router_step_done(void *ctx, cm_status status, uint64_t took_ns, const rt_step_result *results)
{
    rt_router *r = ctx;
    uint64_t now = cm_now_ms();
    r->in_flight = false;
    if (status == CM_OK) {
        rt_sched_complete(r->sched, now, took_ns, results, rt_gateways_word, r->gateways);
    } else {
        bool no_owner = status == CM_E_NO_OWNER;
        cm_error_log("step %llu of %u rows failed: %s", (unsigned long long)r->step.number, r->step.n_row,
                     cm_status_text(status));
        rt_sched_fail_step(r->sched, now, CM_E_UNAVAILABLE,
                           no_owner ? rt_exchange_why(rt_engine_exchange(r->engine))
                                    : "the experts for this request are not available at the moment",
                           rt_gateways_word, r->gateways);
    }
}

/* The loop is about to sleep anyway: its before-sleep hook does the work. */
static void router_changed(void *arg)
{
    (void)arg;
}

/* ---- membership ---- */

static void router_on_welcome(void *ctx, uint32_t member_id, uint64_t cluster)
{
    rt_router *r = ctx;
    r->self = member_id;
    rt_gateways_identify(r->gateways,
                         &(net_identity){cluster, BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER, member_id});
    cm_info("joined cluster %016llx as member %u", (unsigned long long)cluster, member_id);
}

static void router_on_commit(void *ctx, pc_epoch *epoch)
{
    rt_router *r = ctx;
    rt_exchange_offer_epoch(r->exchange, epoch, r->self);
    pc_member_committed(r->member, epoch->number);
}

static void router_on_frame_key(void *ctx, uint64_t cluster, uint64_t epoch, const uint8_t *key)
{
    rt_router *r = ctx;
    rt_gateways_frame_key(r->gateways, cluster, epoch, key);
    rt_exchange_frame_key(r->exchange, cluster, epoch, key);
}

static void router_on_retire(void *ctx, uint64_t oldest)
{
    rt_router *r = ctx;
    rt_gateways_retire_keys(r->gateways, oldest);
    rt_exchange_retire_keys(r->exchange, oldest);
}

static void router_close_doors(void *arg)
{
    rt_router *r = arg;
    r->draining = true;
    rt_sched_drain(r->sched);
}

/* No gateway chooses us any more. */
static void router_on_drain(void *ctx)
{
    rt_router *r = ctx;
    rt_router_drain(r);
    pc_timer_set(r->doors_timer, ROUTER_DOORS_MS);
}

static void router_on_refused(void *ctx, cm_status status, const char *text)
{
    rt_router *r = ctx;
    cm_error_log("the coordinator refused us: %s: %s", cm_status_text(status), text);
    r->finished(r->ctx, 1);
}

static const pc_member_events g_member_events = {
    .welcome = router_on_welcome,
    .frame_key = router_on_frame_key,
    .commit = router_on_commit,
    .retire = router_on_retire,
    .drain = router_on_drain,
    .refused = router_on_refused,
};

typedef struct router_report {
    LIST_ENTRY(router_report) link;
    rt_router *router; /* NULL: it is gone */
    uint32_t member_id;
    cm_status status;
} router_report;

static void router_report_peer(void *arg)
{
    router_report *report = arg;
    rt_router *r = report->router;
    if (r != NULL) {
        pthread_mutex_lock(&r->reports_lock);
        LIST_REMOVE(report, link);
        pthread_mutex_unlock(&r->reports_lock);
        pc_member_report_peer(r->member, report->member_id, report->status);
    }
    cm_free(report);
}

/* Compute thread. */
static void router_peer_lost(void *ctx, uint32_t member_id, cm_status status)
{
    rt_router *r = ctx;
    int guard = cm_mem_guard_pause();
    router_report *report = cm_alloc(sizeof(*report));
    *report = (router_report){.router = r, .member_id = member_id, .status = status};
    pthread_mutex_lock(&r->reports_lock);
    LIST_INSERT_HEAD(&r->reports, report, link);
    pthread_mutex_unlock(&r->reports_lock);
    pc_loop_post_new(r->loop, router_report_peer, report);
    cm_mem_guard_resume(guard);
}

/* ---- life ---- */

static void router_net_options(const rt_config *config, net_options *options_out)
{
    net_options_defaults(options_out);
    options_out->backend = config->net;
    options_out->silence_ms = (uint32_t)config->silence_ms;
    options_out->keyed = true;
}

static void router_rows_options(const rt_config *config, net_options *options_out)
{
    router_net_options(config, options_out);
    options_out->message_bytes_max = config->frame_bytes;
    options_out->peers_max = PR_RANK_MAX;
    options_out->sends_max = ROUTER_SENDS_MAX;
}

static cm_status router_create_engine(rt_router *r, rt_sched_limits *limits_out, cm_error *err)
{
    const rt_config *config = r->config;
    CM_TRY(md_checkpoint_open(config->model, &r->checkpoint, NULL, NULL, err));
    CM_TRY(md_checkpoint_fingerprint(r->checkpoint, r->fingerprint, err));
    rt_engine_options options = {
        .checkpoint = r->checkpoint,
        .device = {.backend = config->device,
                   .isa = config->cpu_isa,
                   .n_threads = (uint32_t)config->threads,
                   .numa_node = config->numa_node},
        .row_max = (uint32_t)config->rows_max,
        .slot_max = (uint32_t)config->sequences_max,
        .kv_bytes = config->kv_bytes,
        .prefix_bytes = config->prefix_bytes,
        .draft_max = (uint32_t)config->drafts_max,
        .micro_batches = (uint32_t)config->micro_batches,
        .answer_ms = (uint32_t)config->answer_ms,
        .wait_ms = (uint32_t)config->wait_ms,
        .peer_lost = router_peer_lost,
        .ctx = r,
    };
    router_rows_options(config, &options.rows);
    CM_TRY(rt_engine_create(&options, &r->engine, err));
    r->exchange = rt_engine_exchange(r->engine);
    rt_engine_sched_limits(r->engine, limits_out);
    return CM_OK;
}

static cm_status router_create_script(rt_router *r, rt_sched_limits *limits_out, cm_error *err)
{
    const rt_config *config = r->config;
    net_options rows;
    rt_script_options options = {.dir = config->model,
                                 .row_max = (uint32_t)config->rows_max,
                                 .slot_max = (uint32_t)config->sequences_max,
                                 .kv_bytes = config->kv_bytes,
                                 .prefix_bytes = config->prefix_bytes};
    rt_exchange_options exchange = {.limits = {.row_max = 1, .topk = 1, .d = 1},
                                    .answer_ms = (uint32_t)config->answer_ms,
                                    .wait_ms = (uint32_t)config->wait_ms};
    md_scripted_fingerprint(config->scripted_model, r->fingerprint);
    CM_TRY(rt_script_create(&options, &r->script, err));
    rt_script_sched_limits(r->script, limits_out);
    router_rows_options(config, &rows);
    exchange.limits.frame_bytes_max = rows.message_bytes_max;
    CM_TRY(net_open(&rows, &exchange.rows, err));
    cm_status status = rt_exchange_create(&exchange, &r->exchange, err);
    if (status != CM_OK) {
        net_close(exchange.rows);
        return status;
    }
    cm_warn("answers are scripts: this router serves %s for tests, no model", config->scripted_model);
    return CM_OK;
}

static bool router_is_scripted(const rt_router *r)
{
    return r->config->scripted_model[0] != '\0';
}

/* Whatever of it there is. */
static void router_destroy_model(rt_router *r)
{
    if (r->engine != NULL) {
        rt_engine_destroy(r->engine);
    } else if (r->exchange != NULL) {
        rt_exchange_destroy(r->exchange);
    }
    rt_script_destroy(r->script);
    if (r->checkpoint != NULL) {
        md_checkpoint_close(r->checkpoint);
    }
}

static cm_status router_open_gateways(rt_router *r, uint32_t context, uint32_t vocab, cm_error *err)
{
    net_options options;
    net *n;
    router_net_options(r->config, &options);
    options.peers_max = (uint32_t)r->config->gateways_max;
    options.message_bytes_max =
        ROUTER_OPEN_BYTES_MIN + PR_RESUME_BYTES_MAX + 5ull * context; /* a varint id takes at most 5 bytes */
    CM_TRY(net_open(&options, &n, err));
    cm_status status = net_listen(n, r->config->address, r->address, err);
    if (status != CM_OK) {
        net_close(n);
        return status;
    }
    r->constraints = rt_constraints_create(r->loop, r->config->model, vocab);
    rt_gateways_options gateways = {
        .gateway_max = (uint32_t)r->config->gateways_max,
        .runnable = (uint32_t)r->config->sequences_max,
        .keep = {.live_max = (uint32_t)(r->config->sequences_max + r->config->queue_max),
                 .ended_max = (uint32_t)r->config->kept_max,
                 .bytes_max = r->config->kept_bytes,
                 .grace_ms = r->config->gateway_grace_ms},
        .constraints = r->constraints,
    };
    r->gateways = rt_gateways_create(r->loop, n, r->sched, &gateways, router_changed, r);
    return CM_OK;
}

static void router_join(rt_router *r)
{
    pc_member_options options = {
        .coordinator = r->config->coordinator,
        .tls = r->tls,
        .role = BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER,
        .data_address = r->address,
        .net = r->config->net,
        .fingerprint = r->fingerprint,
    };
    if (!router_is_scripted(r)) { /* a script has no experts */
        const md_geometry *g = md_checkpoint_geometry(r->checkpoint);
        options.n_layer = md_block_count(g);
        options.n_expert = g->n_expert;
        options.expert_bytes = md_expert_bytes(g);
    }
    r->member = pc_member_create(r->loop, &options, &g_member_events, r);
    r->load = rt_load_create(r->loop, r->exchange, r->member, options.n_layer, options.n_expert);
}

cm_status rt_router_create(pc_loop *loop, const rt_config *config, void (*finished)(void *ctx, int code),
                           void *ctx, rt_router **router_out, cm_error *err)
{
    if (config->model[0] == '\0' || config->coordinator[0] == '\0') {
        return cm_error_set(err, CM_E_CONFIG, "model",
                            "a router needs --model DIR and --coordinator HOST:PORT");
    }
    pc_addresses coordinators;
    CM_TRY(pc_addresses_parse("coordinator", config->coordinator, &coordinators, err));
    rt_sched_limits limits;
    rt_router *r = cm_alloc(sizeof(*r));
    pthread_mutex_init(&r->reports_lock, NULL);
    r->loop = loop;
    r->config = config;
    r->finished = finished;
    r->ctx = ctx;
    cm_status status = pc_tls_open(&config->process.tls, config->coordinator, "router", &r->tls, err);
    if (status != CM_OK) {
        goto err_free;
    }
    status =
        router_is_scripted(r) ? router_create_script(r, &limits, err) : router_create_engine(r, &limits, err);
    if (status != CM_OK) {
        goto err_model;
    }
    limits.chunk_max = (uint32_t)config->chunk_max;
    limits.step_ns = config->step_ms * 1000000;
    limits.queue_max = (uint32_t)config->queue_max;
    r->sched = rt_sched_create(&limits);
    status = router_open_gateways(r, limits.context, limits.vocab, err);
    if (status != CM_OK) {
        goto err_sched;
    }
    r->runner = rt_runner_create(&(rt_runner_options){.loop = loop,
                                                      .exchange = r->exchange,
                                                      .sample_max = limits.slot_max,
                                                      .step = router_step,
                                                      .done = router_step_done,
                                                      .ctx = r});
    r->deadline_timer = pc_timer_create(loop, router_changed, r);
    r->doors_timer = pc_timer_create(loop, router_close_doors, r);
    pc_loop_before_sleep(loop, router_before_sleep, r);
    router_join(r);
    *router_out = r;
    return CM_OK;

err_sched:
    rt_sched_destroy(r->sched);
err_model:
    router_destroy_model(r);
    pc_tls_close(r->tls);
err_free:
    pthread_mutex_destroy(&r->reports_lock);
    cm_free(r);
    return status;
}

const char *rt_router_address(const rt_router *r)
{
    return r->address;
}

static void router_drain_expired(void *arg)
{
    rt_router *r = arg;
    rt_sched_ledger ledger;
    rt_sched_ledger_get(r->sched, &ledger);
    cm_warn("stopping with %u sequences unfinished after %llu ms", ledger.n_seq,
            (unsigned long long)r->config->drain_ms);
    r->finished(r->ctx, 0);
}

void rt_router_drain(rt_router *r)
{
    if (r->leaving) {
        return;
    }
    r->leaving = true;
    pc_member_leave(r->member);
    r->drain_timer = pc_timer_create(r->loop, router_drain_expired, r);
    pc_timer_set(r->drain_timer, r->config->drain_ms);
}

/* The compute thread has ended; what it posted is still to run. */
static void router_disown_reports(rt_router *r)
{
    router_report *report;
    while ((report = LIST_FIRST(&r->reports)) != NULL) {
        LIST_REMOVE(report, link);
        report->router = NULL;
    }
}

void rt_router_destroy(rt_router *r)
{
    pc_timer_destroy(r->drain_timer);
    pc_timer_destroy(r->doors_timer);
    pc_timer_destroy(r->deadline_timer);
    rt_runner_destroy(r->runner);
    router_disown_reports(r);
    rt_load_destroy(r->load);
    pc_member_destroy(r->member);
    rt_gateways_destroy(r->gateways);
    rt_sched_destroy(r->sched);
    rt_constraints_destroy(r->constraints);
    router_destroy_model(r);
    pc_tls_close(r->tls);
    pthread_mutex_destroy(&r->reports_lock);
    cm_free(r);
}
