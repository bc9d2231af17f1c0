/* Counters, gauges and histograms of this process, defined once in stats.def. Thread: any (relaxed atomics).
 */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/bytes.h"

typedef enum cm_stat {
#define CM_STAT(id, kind, roles, name, help) CM_STAT_##id,
#include "common/base/stats.def"
#undef CM_STAT
    CM_STAT_COUNT
} cm_stat;

void cm_stat_add(cm_stat stat, int64_t n);        /* counter or gauge; a gauge may go down */
void cm_stat_set(cm_stat stat, int64_t value);    /* gauge */
void cm_stat_observe(cm_stat stat, double value); /* histogram; seconds */
int64_t cm_stat_get(cm_stat stat);                /* histogram: number of observations */
const char *cm_stat_name(cm_stat stat);           /* exposed name */
bool cm_stat_has_role(cm_stat stat, char role);   /* 'G', 'R', 'W' or 'C' */
bool cm_stat_is_histogram(cm_stat stat);

/* Value of another process, as it travels in heartbeats: counters and gauges only. */
typedef struct cm_stat_value {
    uint32_t stat; /* cm_stat; unknown numbers (a newer peer) are skipped */
    int64_t value;
} cm_stat_value;

/* One process' values for rendering. */
typedef struct cm_stat_source {
    const char *member; /* label member="..." */
    char role;
    const cm_stat_value *values; /* NULL: this process' own, histograms included */
    uint32_t n_values;
} cm_stat_source;

/* All counters and gauges of a role; out has room for CM_STAT_COUNT. Returns how many. */
uint32_t cm_stats_snapshot(char role, cm_stat_value *out);
/* Prometheus text 0.0.4 of all sources, each metric with one HELP and TYPE. */
void cm_stats_render(const cm_stat_source *sources, uint32_t n_sources, cm_bytes *out);
