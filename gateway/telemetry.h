/* What clients got from this gateway, under the names that dashboards of vLLM and of SGLang look for where
 * the meaning is the same, and what each tenant used. Thread: the loop's. */
#pragma once
#include "common/base/bytes.h"
#include "gateway/stream.h"
#include "gateway/tenant_core.h"

enum { GW_TELEMETRY_TENANTS_MAX = 100 }; /* with a label of their own; the rest are "(others)" together */

typedef struct gw_telemetry gw_telemetry;

typedef enum gw_series {
    GW_SERIES_FIRST_TOKEN,   /* seconds from receipt to the first token */
    GW_SERIES_INTER_TOKEN,   /* seconds between two */
    GW_SERIES_REQUEST,       /* seconds from receipt to the end */
    GW_SERIES_QUEUE,         /* seconds from receipt until it went to a router */
    GW_SERIES_PROMPT_TOKENS, /* of each answer that ended */
    GW_SERIES_OUTPUT_TOKENS,
    GW_SERIES_COUNT
} gw_series;

typedef enum gw_ending {
    GW_ENDING_STOP,
    GW_ENDING_LENGTH,
    GW_ENDING_ABORT,
    GW_ENDING_ERROR,
    GW_ENDING_COUNT
} gw_ending;

typedef enum gw_usage_of {
    GW_USED_REQUESTS,
    GW_USED_REFUSED,
    GW_USED_PROMPT_TOKENS,
    GW_USED_OUTPUT_TOKENS,
    GW_USED_COUNT
} gw_usage_of;

gw_telemetry *gw_telemetry_create(void);
void gw_telemetry_destroy(gw_telemetry *telemetry);
void gw_telemetry_observe(gw_telemetry *telemetry, gw_series series, double value, uint32_t times);
void gw_telemetry_ended(gw_telemetry *telemetry, gw_ending ending);
void gw_telemetry_used(gw_telemetry *telemetry, const gw_tenant *tenant, gw_usage_of what, uint64_t n);

/* What others know. */
typedef struct gw_telemetry_now {
    const char *model;
    uint32_t running, waiting; /* this gateway's */
    double kv_used;            /* 0..1; of all routers, like the rest */
    int64_t preemptions, drafts, draft_tokens, accepted_tokens, prefix_queries, prefix_hits;
} gw_telemetry_now;
/* Prometheus text 0.0.4. */
void gw_telemetry_render(const gw_telemetry *telemetry, const gw_turns *turns, const gw_telemetry_now *now,
                         cm_bytes *out);
