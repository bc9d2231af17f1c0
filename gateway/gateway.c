#include "gateway/gateway.h"

#include <stdio.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/model/checkpoint.h"
#include "common/proc/addresses.h"
#include "gateway/gateway_private.h"

/* ---- as a member of the cluster ---- */

static void on_welcome(void *ctx, uint32_t member_id, uint64_t cluster)
{
    gw_gateway *gateway = ctx;
    gateway->member_id = member_id;
    gw_routers_identity(gateway->routers, cluster, member_id);
}

/* We may not be in it yet, or not any more: then it is one of us more. */
static uint32_t count_gateways(const pc_epoch *epoch, uint32_t own_id)
{
    uint32_t n = 1;
    for (uint32_t i = 0; i < epoch->n_member; i++) {
        const struct pc_epoch_member *member = &epoch->members[i];
        n += member->role == BALEEN__CONTROL__V1__ROLE__ROLE_GATEWAY && member->id != own_id;
    }
    return n;
}

static void on_commit(void *ctx, pc_epoch *epoch)
{
    gw_gateway *gateway = ctx;
    pc_epoch_release(gateway->epoch);
    gateway->epoch = pc_epoch_hold(epoch);
    gw_turns_set_gateways(&gateway->turns, cm_now_ms(), count_gateways(epoch, gateway->member_id));
    gw_streams_place(gateway); /* its part may be larger now */
    gw_routers_epoch(gateway->routers, epoch);
    pc_member_committed(gateway->member, epoch->number);
    gw_seeks_changed(gateway);
    gw_probe_consider(gateway);
}

static void on_frame_key(void *ctx, uint64_t cluster, uint64_t epoch, const uint8_t *key)
{
    gw_routers_frame_key(((gw_gateway *)ctx)->routers, cluster, epoch, key);
}

static void on_retire(void *ctx, uint64_t oldest)
{
    gw_routers_retire_keys(((gw_gateway *)ctx)->routers, oldest);
}

static void on_cluster_stats(void *ctx, const Baleen__Control__V1__ClusterStats *stats)
{
    gw_member_stats_take(ctx, stats);
    gw_streams_room(ctx);
}

static void on_cluster_load(void *ctx, const Baleen__Control__V1__ClusterLoad *load)
{
    gw_cluster_load_take(ctx, load);
}

static void on_drain(void *ctx)
{
    gw_gateway *gateway = ctx;
    gateway->leave(gateway->ctx, CM_OK);
}

static void on_refused(void *ctx, cm_status status, const char *text)
{
    gw_gateway *gateway = ctx;
    cm_error_log("the coordinator refused us: %s", text);
    gateway->leave(gateway->ctx, status);
}

static void on_linked(void *ctx, gw_router *router)
{
    gw_streams_room(ctx);
    gw_streams_linked(ctx, router);
    gw_seeks_linked(ctx, router);
    gw_probe_consider(ctx);
}

static void on_lost(void *ctx, gw_router *router, cm_status status)
{
    gw_gateway *gateway = ctx;
    if (status != CM_OK) {
        pc_member_report_peer(gateway->member, gw_router_member(router), status);
    }
    gw_streams_room(gateway);
    gw_streams_lost(gateway, router);
    gw_seeks_lost(gateway, router);
    if (gw_routers_get_load(gateway->routers).n_linked == 0) {
        gw_probe_reset(gateway);
    }
}

static void on_unreachable(void *ctx, gw_router *router)
{
    gw_gateway *gateway = ctx;
    gw_place_unreachable(&gateway->place, gw_router_number(router));
    gw_streams_place(gateway);
}

static void on_stands(void *ctx, gw_router *router, gw_place_standing standing)
{
    gw_gateway *gateway = ctx;
    gw_place_stands(&gateway->place, cm_now_ms(), gw_router_number(router), standing);
    gw_streams_room(gateway);
    gw_streams_place(gateway);
    if (gw_routers_get_load(gateway->routers).n_linked == 0) {
        gw_probe_reset(gateway);
    }
}

static void on_gone(void *ctx, gw_router *router)
{
    gw_gateway *gateway = ctx;
    gw_place_gone(&gateway->place, cm_now_ms(), gw_router_number(router));
    gw_streams_place(gateway);
}

static void on_load(void *ctx, gw_router *router, uint32_t n_sequences)
{
    gw_gateway *gateway = ctx;
    gw_place_load(&gateway->place, gw_router_number(router), n_sequences);
    gw_streams_room(gateway);
}

/* ---- create ---- */

static const char *folder_name(const char *path, size_t *n_out)
{
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') {
        n--;
    }
    size_t first = n;
    while (first > 0 && path[first - 1] != '/') {
        first--;
    }
    *n_out = n - first;
    return path + first;
}

static cm_status take_names(gw_gateway *gateway, cm_error *err)
{
    const gw_config *config = gateway->config;
    size_t n;
    const char *folder = folder_name(config->model, &n);
    const char *name = config->scripted_model[0] != 0 ? config->scripted_model : config->model_name;
    gateway->model = cm_strdup(name[0] != 0 ? name : folder);
    if (name[0] == 0) {
        gateway->model[n] = 0;
    }
    for (const char *at = config->model_aliases; *at != 0;) {
        size_t length = strcspn(at, ",");
        if (gateway->n_alias == GW_ALIASES_MAX) {
            return cm_error_set(err, CM_E_CONFIG, "model_aliases", "more than %d aliases", GW_ALIASES_MAX);
        }
        if (length > 0) {
            char *alias = cm_strdup(at);
            alias[length] = 0;
            gateway->alias[gateway->n_alias++] = alias;
        }
        at += length + (at[length] == ',');
    }
    return CM_OK;
}

/* A gateway's host may have the tokenizer and config.json without the weights: then it cannot say which
 * weights it means, and says so by an empty fingerprint. */
static void take_fingerprint(gw_gateway *gateway)
{
    md_checkpoint *checkpoint;
    cm_error err = {0};
    if (gateway->config->scripted_model[0] != 0) {
        md_scripted_fingerprint(gateway->config->scripted_model, gateway->fingerprint);
        snprintf(gateway->served_fingerprint, sizeof(gateway->served_fingerprint), "fp_scripted");
        return;
    }
    cm_status status = md_checkpoint_open(gateway->config->model, &checkpoint, NULL, NULL, &err);
    if (status == CM_OK) {
        gateway->geometry = *md_checkpoint_geometry(checkpoint);
        status = md_checkpoint_fingerprint(checkpoint, gateway->fingerprint, &err);
        md_checkpoint_close(checkpoint);
    }
    if (status != CM_OK) {
        cm_warn("no fingerprint of the weights in %s: %s %s", gateway->config->model, err.field, err.text);
        gateway->fingerprint[0] = 0;
    }
    bool known = gateway->fingerprint[0] != 0;
    snprintf(gateway->served_fingerprint, sizeof(gateway->served_fingerprint), "fp_%.16s",
             known ? gateway->fingerprint : "0000000000000000");
}

static cm_status open_model(gw_gateway *gateway, cm_error *err)
{
    const char *dir = gateway->config->model;
    if (dir[0] == 0) {
        return cm_error_set(err, CM_E_CONFIG, "model", "the folder of the model must be given");
    }
    CM_TRY(take_names(gateway, err));
    CM_TRY(md_geometry_load(dir, &gateway->geometry, err));
    take_fingerprint(gateway);
    gateway->expert_bytes = md_expert_bytes(&gateway->geometry);
    cm_bytes path;
    cm_bytes_init(&path, 0);
    cm_bytes_printf(&path, "%s/tokenizer.json", dir);
    cm_status status =
        md_tokenizer_open(cm_bytes_text(&path), gateway->geometry.vocab, &gateway->tokenizer, err);
    cm_bytes_fini(&path);
    CM_TRY(status);
    return gw_tokenizer_zip(dir, &gateway->tokenizer_zip, gateway->tokenizer_sha256, err);
}

static cm_status open_serve_tls(gw_gateway *gateway, cm_error *err)
{
    const gw_config *config = gateway->config;
    bool cert = config->serve_cert[0] != 0, key = config->serve_key[0] != 0;
    if (cert != key) {
        return cm_error_set(err, CM_E_CONFIG, cert ? "serve_key" : "serve_cert",
                            "TLS needs a certificate and its key: give both --serve-cert and --serve-key");
    }
    return cert ? pc_serve_tls_open(config->serve_cert, config->serve_key, &gateway->serve_tls, err) : CM_OK;
}

static cm_status open_surfaces(gw_gateway *gateway, cm_error *err)
{
    const gw_config *config = gateway->config;
    CM_TRY(open_serve_tls(gateway, err));
    CM_TRY(gw_http_create(gateway, config->http, &gateway->http, gateway->http_bound, err));
    gateway->grpc_drained = true;
    if (config->grpc[0] != 0) {
        CM_TRY(gw_grpc_create(gateway, gateway->loop, config->grpc, gateway->serve_tls, &gateway->grpc,
                              gateway->grpc_bound, err));
        gateway->grpc_drained = false;
    }
    return CM_OK;
}

static void join_cluster(gw_gateway *gateway)
{
    static const pc_member_events events = {.welcome = on_welcome,
                                            .frame_key = on_frame_key,
                                            .commit = on_commit,
                                            .retire = on_retire,
                                            .cluster_stats = on_cluster_stats,
                                            .cluster_load = on_cluster_load,
                                            .drain = on_drain,
                                            .refused = on_refused};
    pc_member_options options = {.coordinator = gateway->config->coordinator,
                                 .tls = gateway->tls,
                                 .role = BALEEN__CONTROL__V1__ROLE__ROLE_GATEWAY,
                                 .http_address = gateway->http_bound,
                                 .grpc_address = gateway->grpc != NULL ? gateway->grpc_bound : NULL,
                                 .net = gateway->config->net,
                                 .fingerprint = gateway->fingerprint,
                                 .n_layer = md_block_count(&gateway->geometry),
                                 .n_expert = gateway->geometry.n_expert,
                                 .expert_bytes = gateway->expert_bytes};
    gateway->member = pc_member_create(gateway->loop, &options, &events, gateway);
}

static void drain_timeout(void *arg)
{
    gw_streams_fail_all(arg, GW_CAUSE_UNAVAILABLE, "this gateway is shutting down; please try again");
}

static void drain_tell(void *arg)
{
    gw_gateway *gateway = arg;
    gateway->drain_done(gateway->drain_arg);
}

static gw_gateway *gateway_make(pc_loop *loop, const gw_config *config, gw_leave_fn leave, void *ctx)
{
    gw_gateway *gateway = cm_alloc(sizeof(*gateway));
    gateway->loop = loop;
    gateway->config = config;
    gateway->leave = leave;
    gateway->ctx = ctx;
    gateway->born_ms = cm_now_ms();
    gateway->created_s = (int64_t)(cm_wall_us() / 1000000u);
    gw_streams_init(gateway);
    gateway->telemetry = gw_telemetry_create();
    TAILQ_INIT(&gateway->seeks);
    gateway->drain_timer = pc_timer_create(loop, drain_timeout, gateway);
    gateway->drain_task = (pc_task){.fn = drain_tell, .arg = gateway};
    gw_probe_init(gateway);
    return gateway;
}

cm_status gw_gateway_create(pc_loop *loop, const gw_config *config, gw_leave_fn leave, void *ctx,
                            gw_gateway **gateway_out, cm_error *err)
{
    static const gw_routers_events events = {.linked = on_linked,
                                             .lost = on_lost,
                                             .unreachable = on_unreachable,
                                             .stands = on_stands,
                                             .gone = on_gone,
                                             .load = on_load,
                                             .tokens = gw_streams_tokens,
                                             .found = gw_seeks_found};
    if (config->coordinator[0] == 0) {
        return cm_error_set(err, CM_E_CONFIG, "coordinator", "the address of the coordinator must be given");
    }
    pc_addresses coordinators;
    CM_TRY(pc_addresses_parse("coordinator", config->coordinator, &coordinators, err));
    gw_gateway *gateway = gateway_make(loop, config, leave, ctx);
    cm_status status = gw_tenants_create(loop, config->key_file, &gateway->turns, &gateway->tenants, err);
    if (status != CM_OK) {
        goto err_gateway;
    }
    status = pc_tls_open(&config->process.tls, config->coordinator, "gateway", &gateway->tls, err);
    if (status != CM_OK) {
        goto err_gateway;
    }
    status = open_model(gateway, err);
    if (status != CM_OK) {
        goto err_gateway;
    }
    status = gw_routers_create(loop, config->net, &events, gateway, &gateway->routers, err);
    if (status != CM_OK) {
        goto err_gateway;
    }
    gateway->encoder = (gw_encoder){.loop = loop,
                                    .jobs = cm_jobs_create("encode", (uint32_t)config->encode_threads,
                                                           (uint32_t)config->streams_max + GW_PROBES_MAX),
                                    .tokenizer = gateway->tokenizer,
                                    .profile = md_profile_detect(config->model),
                                    .strict_replay = strcmp(config->reasoning_replay, "strict") == 0,
                                    .json_word = config->json_word};
    status = open_surfaces(gateway, err);
    if (status != CM_OK) {
        goto err_gateway;
    }
    join_cluster(gateway);
    *gateway_out = gateway;
    return CM_OK;

err_gateway:
    gw_gateway_destroy(gateway);
    return status;
}

/* Takes apart what is there: also a gateway that was not created to its end. Surfaces end first: their
 * streams need the rest to say goodbye. */
void gw_gateway_destroy(gw_gateway *gateway)
{
    gateway->draining = true;
    gateway->drain_told = true; /* nobody hears of a drain any more */
    if (gateway->grpc != NULL) {
        gw_grpc_destroy(gateway->grpc);
    }
    if (gateway->http != NULL) {
        gw_http_destroy(gateway->http);
    }
    gw_probe_fini(gateway);
    if (gateway->member != NULL) {
        pc_member_destroy(gateway->member);
    }
    pc_tls_close(gateway->tls);
    pc_serve_tls_close(gateway->serve_tls);
    if (gateway->encoder.jobs != NULL) {
        cm_jobs_destroy(gateway->encoder.jobs);
    }
    gw_routers_destroy(gateway->routers);
    if (gateway->tokenizer != NULL) {
        md_tokenizer_close(gateway->tokenizer);
    }
    cm_bytes_fini(&gateway->tokenizer_zip);
    pc_epoch_release(gateway->epoch);
    gw_member_stats_free(gateway);
    gw_cluster_load_free(gateway);
    pc_timer_destroy(gateway->drain_timer);
    gw_streams_fini(gateway);
    gw_tenants_destroy(gateway->tenants);
    gw_telemetry_destroy(gateway->telemetry);
    for (uint32_t i = 0; i < gateway->n_alias; i++) {
        cm_free(gateway->alias[i]);
    }
    cm_free(gateway->model);
    cm_free(gateway);
}

/* ---- drain ---- */

void gw_drain_check(gw_gateway *gateway)
{
    if (!gateway->draining || gateway->drain_told) {
        return;
    }
    if (TAILQ_EMPTY(&gateway->streams) && gw_http_open(gateway->http) == 0 && gateway->grpc_drained) {
        gateway->drain_told = true;
        pc_timer_clear(gateway->drain_timer);
        pc_member_leave(gateway->member);
        pc_loop_post(gateway->loop, &gateway->drain_task);
    }
}

static void grpc_drained(void *arg)
{
    gw_gateway *gateway = arg;
    gateway->grpc_drained = true;
    gw_drain_check(gateway);
}

void gw_gateway_drain(gw_gateway *gateway, pc_fn done, void *arg)
{
    gateway->drain_done = done;
    gateway->drain_arg = arg;
    if (gateway->draining) {
        return;
    }
    gateway->draining = true;
    cm_info("draining: %u requests to finish", gateway->n_streams);
    pc_timer_set(gateway->drain_timer, gateway->config->drain_ms);
    if (gateway->probe.stream != NULL) {
        gw_stream *probe = gateway->probe.stream;
        gateway->probe.stream = NULL;
        gw_stream_cancel(probe);
    }
    if (gateway->grpc != NULL) {
        gw_grpc_drain(gateway->grpc, grpc_drained, gateway);
    }
    gw_drain_check(gateway);
}

/* ---- what surfaces ask ---- */

const char *gw_mute_reason(const gw_gateway *gateway)
{
    if (gateway->draining) {
        return "draining";
    }
    if (gateway->epoch == NULL) {
        return "no epoch heard of";
    }
    if (gateway->epoch->placement == NULL) {
        return "experts are not placed";
    }
    if (gw_routers_get_load(gateway->routers).n_linked == 0) {
        return "no router linked";
    }
    return NULL;
}

const char *gw_ready_reason(const gw_gateway *gateway)
{
    const char *mute = gw_mute_reason(gateway);
    return mute != NULL || gateway->probe.passed ? mute : "no token has come out yet";
}

static double kv_used(const gw_gateway *gateway)
{
    int64_t total = gw_member_stats_sum(gateway, 'R', CM_STAT_kv_pages_total);
    int64_t used = gw_member_stats_sum(gateway, 'R', CM_STAT_ledger_kv_pages);
    return total > 0 ? (double)used / (double)total : 0;
}

void gw_gateway_info(const gw_gateway *gateway, gw_info *info_out)
{
    gw_routers_load load = gw_routers_get_load(gateway->routers);
    *info_out = (gw_info){
        .model = gateway->model,
        .fingerprint = gateway->served_fingerprint,
        .context = gateway->geometry.context,
        .vocab = gateway->geometry.vocab,
        .bos_id = gateway->geometry.bos_id,
        .eos_id = gateway->geometry.eos_id,
        .profile = gateway->encoder.profile == MD_PROFILE_P ? 'P' : 'G',
        .ready = gw_ready_reason(gateway) == NULL,
        .draining = gateway->draining,
        .epoch = gateway->epoch != NULL ? gateway->epoch->number : 0,
        .running = load.running,
        .waiting = load.waiting,
        .kv_used = kv_used(gateway),
        .uptime_s = (double)(cm_now_ms() - gateway->born_ms) * 1e-3,
        .created_s = gateway->created_s,
        .choices_max = (uint32_t)gateway->config->choices_max,
    };
}

cm_status gw_gateway_identify(const gw_gateway *gateway, const char *authorization, const char *api_key,
                              gw_tenant **tenant_out, gw_error *error_out)
{
    return gw_tenants_identify(gateway->tenants, authorization, api_key, tenant_out, error_out);
}

const md_tokenizer *gw_gateway_tokenizer(const gw_gateway *gateway)
{
    return gateway->tokenizer;
}

void gw_gateway_tokenizer_files(const gw_gateway *gateway, gw_archive *archive_out)
{
    *archive_out = (gw_archive){.data = gateway->tokenizer_zip.data,
                                .n_bytes = gateway->tokenizer_zip.len,
                                .sha256 = gateway->tokenizer_sha256};
}

cm_status gw_model_check(const gw_gateway *gateway, const char *name, gw_error *error_out)
{
    if (name == NULL || strcmp(name, gateway->model) == 0) {
        return CM_OK;
    }
    for (uint32_t i = 0; i < gateway->n_alias; i++) {
        if (strcmp(name, gateway->alias[i]) == 0) {
            return CM_OK;
        }
    }
    gw_error_set(error_out, GW_CAUSE_MODEL_NOT_FOUND, "model",
                 "The model '%.200s' does not exist; this server has '%.100s'", name, gateway->model);
    return CM_E_NOT_FOUND;
}

cm_status gw_chat_ids(gw_gateway *gateway, const json_t *body, md_ids *ids_out, cm_bytes *text_out,
                      gw_error *error_out)
{
    bool continues;
    return gw_encode_chat(&gateway->encoder, body, ids_out, text_out, &continues, error_out);
}

const char *gw_gateway_http(const gw_gateway *gateway)
{
    return gateway->http_bound;
}

const char *gw_gateway_grpc(const gw_gateway *gateway)
{
    return gateway->grpc_bound;
}
