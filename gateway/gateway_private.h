/* What the parts of the gateway share. Thread: the loop's. */
#pragma once
#include <sys/queue.h>

#include "common/base/map.h"
#include "common/base/stats.h"
#include "common/model/geometry.h"
#include "common/proc/member.h"
#include "gateway/encode.h"
#include "gateway/gateway.h"
#include "gateway/grpc.h"
#include "gateway/http.h"
#include "gateway/place_core.h"
#include "gateway/routers.h"
#include "gateway/stream.h"
#include "gateway/telemetry.h"
#include "gateway/tenant_core.h"
#include "gateway/tenants.h"
#include "gateway/tokenizer_files.h"

enum { GW_RETRY_MS = 1000, GW_ALIASES_MAX = 16, GW_PROBES_MAX = 2 /* streams of our own at once */ };

/* Another member, as it was last told of. */
typedef struct gw_member_stats {
    char label[32]; /* "router-2" */
    char role;
    uint32_t id;
    char state[16];
    uint64_t epoch; /* in force there */
    cm_stat_value *values;
    uint32_t n_values;
} gw_member_stats;

/* What the routers' rows went to, as it last came. Asked for only when somebody looks, and not more often
 * than it changes. */
typedef struct gw_expert_load {
    uint32_t n_layer, n_expert;
    uint8_t *level;    /* [n_layer * n_expert], see ClusterLoad; NULL: none came */
    uint64_t asked_ms; /* for the newest; 0: never */
} gw_expert_load;

/* One token through the whole path, asked by ourselves when experts are placed and a router is linked. */
typedef struct gw_probe {
    gw_stream *stream; /* NULL: none runs */
    pc_timer *retry;
    bool passed;
} gw_probe;

typedef TAILQ_HEAD(gw_stream_list, gw_stream) gw_stream_list;

struct gw_gateway {
    pc_loop *loop;
    const gw_config *config;
    gw_leave_fn leave;
    void *ctx;
    uint64_t born_ms;
    int64_t created_s;

    md_geometry geometry;
    uint64_t expert_bytes;
    char fingerprint[33]; /* "" when the weights are not here */
    char served_fingerprint[32];
    char *model; /* served name */
    char *alias[GW_ALIASES_MAX];
    uint32_t n_alias;
    md_tokenizer *tokenizer;
    cm_bytes tokenizer_zip; /* its files, for clients; its hash in hex */
    char tokenizer_sha256[GW_SHA256_HEX];
    gw_encoder encoder;

    gw_routers *routers;
    pc_tls *tls;             /* of the control channel; NULL: plain */
    pc_serve_tls *serve_tls; /* of both clients' ports; NULL: plain */
    pc_member *member;
    uint32_t member_id;
    pc_epoch *epoch; /* in force; NULL before the first */
    gw_member_stats *stats;
    uint32_t n_stats;
    bool changing; /* a next epoch is on its way */
    gw_expert_load load;

    gw_stream_list streams;
    uint32_t n_streams; /* without the probe's */
    uint64_t next_serial;
    cm_map by_number; /* as which streams are known at routers -> gw_stream */
    uint64_t last_number;
    gw_turns turns; /* whose stream may go to a router next */
    gw_tenants *tenants;
    gw_telemetry *telemetry;
    gw_place place; /* which router computes which stream */
    pc_timer *place_timer;
    pc_task place_task;
    gw_probe probe;
    TAILQ_HEAD(, gw_seek) seeks;
    uint64_t last_ask;

    gw_http *http;
    gw_grpc *grpc; /* NULL when left out */
    char http_bound[128], grpc_bound[128];

    bool draining, grpc_drained, drain_told;
    pc_timer *drain_timer;
    pc_task drain_task;
    pc_fn drain_done;
    void *drain_arg;
};

/* ---- stream.c ---- */
/* As gw_stream_open, for ourselves: not counted, not refused for a limit. */
CM_MUST_CHECK cm_status gw_stream_open_probe(gw_gateway *gateway, const gw_ask *ask,
                                             const gw_stream_events *events, void *ctx,
                                             gw_stream **stream_out, gw_error *error_out);
void gw_streams_init(gw_gateway *gateway);
void gw_streams_fini(gw_gateway *gateway); /* all have ended */
/* Routers are linked or not, or can run more or fewer. */
void gw_streams_room(gw_gateway *gateway);
/* Streams look for their routers, soon. */
void gw_streams_place(gw_gateway *gateway);
void gw_streams_linked(gw_gateway *gateway, gw_router *router);
void gw_streams_tokens(void *gateway, gw_router *router, const Baleen__Engine__V1__SeqTokens *seq);
void gw_streams_lost(gw_gateway *gateway, gw_router *router);
/* Fails every stream; routers keep them for clients that go on elsewhere. */
void gw_streams_fail_all(gw_gateway *gateway, gw_cause cause, const char *message);

/* ---- origin.c ---- */
enum { GW_KEY_BYTES = 16 };
/* Nobody can make an id that has the hash of another tenant's. */
void gw_origin_hash(const gw_tenant *tenant, const char *id, uint8_t key_out[GW_KEY_BYTES]);
/* Whose it is: what it is known by at routers. */
void gw_origin_bind(gw_origin *origin, const gw_tenant *tenant);
void gw_origin_key(const gw_origin *origin, uint32_t choice, Baleen__Engine__V1__SeqKey *key_out);
/* false: it cannot be told by another gateway. Borrowed from origin. */
bool gw_origin_resume(const gw_origin *origin, ProtobufCBinaryData *resume_out);
/* all: what gw_origin_resume gave, read as JSON. Its client comes after after_term. NULL: it is none. */
gw_origin *gw_origin_read(const json_t *all, uint64_t after_term);
uint64_t gw_origin_birth(const gw_origin *origin);
uint64_t gw_origin_term(const gw_origin *origin);
uint64_t gw_origin_seed(const gw_origin *origin);
int64_t gw_origin_created_s(const gw_origin *origin);

/* ---- seek.c ---- */
void gw_seeks_linked(gw_gateway *gateway, gw_router *router);
void gw_seeks_lost(gw_gateway *gateway, gw_router *router);
void gw_seeks_found(void *gateway, gw_router *router, const Baleen__Engine__V1__SeqFound *found);
void gw_seeks_changed(gw_gateway *gateway); /* the epoch did */

/* ---- probe.c ---- */
void gw_probe_init(gw_gateway *gateway);
void gw_probe_fini(gw_gateway *gateway);
/* One token of nobody's prompt, as gw_stream_open_probe. */
CM_MUST_CHECK cm_status gw_probe_open(gw_gateway *gateway, uint64_t deadline_ms,
                                      void (*finished)(void *ctx, const gw_finish *finish),
                                      void (*failed)(void *ctx, const gw_error *error), void *ctx,
                                      gw_stream **stream_out, gw_error *error_out);
/* Starts a probe if one is due. */
void gw_probe_consider(gw_gateway *gateway);
/* No router is linked any more: what was proven is not. */
void gw_probe_reset(gw_gateway *gateway);

/* ---- gateway.c ---- */
/* NULL when ready, else why not. */
const char *gw_ready_reason(const gw_gateway *gateway);
/* Why no token can come out now; NULL: one may. */
const char *gw_mute_reason(const gw_gateway *gateway);
/* Something ended: tells the one who drains when it was the last. */
void gw_drain_check(gw_gateway *gateway);

/* ---- metrics.c ---- */
void gw_member_stats_take(gw_gateway *gateway, const Baleen__Control__V1__ClusterStats *message);
void gw_member_stats_free(gw_gateway *gateway);
/* Sum of a stat over the members of a role. */
int64_t gw_member_stats_sum(const gw_gateway *gateway, char role, cm_stat stat);
uint32_t gw_member_stats_gateways(const gw_gateway *gateway); /* of the cluster, this one too */

/* ---- cluster.c ---- */
void gw_cluster_load_take(gw_gateway *gateway, const Baleen__Control__V1__ClusterLoad *message);
void gw_cluster_load_free(gw_gateway *gateway);
/* Members and their counters; no addresses, hosts or names of users. The caller's. */
json_t *gw_cluster_json(gw_gateway *gateway);
/* Load per (layer, expert), and who owns what unless the caller has the placement of the epoch in force
 * (known_epoch). The caller's. */
json_t *gw_cluster_experts_json(gw_gateway *gateway, uint64_t known_epoch);
