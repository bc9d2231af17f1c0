#include "common/base/stats.h"

#include <stdatomic.h>
#include <string.h>

#include "common/base/assert.h"

typedef enum stat_kind { COUNTER, GAUGE, HISTOGRAM_TIME } stat_kind;

static const struct {
    stat_kind kind;
    const char *roles, *name, *help;
} g_rows[] = {
#define CM_STAT(id, kind, roles, name, help) {kind, roles, name, help},
#include "common/base/stats.def"
#undef CM_STAT
};

/* upper bounds in seconds; the last bucket is +Inf */
static const double g_time_bounds[] = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
                                       1,     2.5,   5,    7.5,  10,   20,   40,   80,  160,  640, 2560};
enum { STAT_BOUNDS = sizeof(g_time_bounds) / sizeof(g_time_bounds[0]) };

static struct {
    _Atomic int64_t value[CM_STAT_COUNT];
    _Atomic int64_t bucket[CM_STAT_COUNT][STAT_BOUNDS + 1];
    _Atomic int64_t sum_ns[CM_STAT_COUNT];
} g_stats;

void cm_stat_add(cm_stat stat, int64_t n)
{
    atomic_fetch_add_explicit(&g_stats.value[stat], n, memory_order_relaxed);
}

void cm_stat_set(cm_stat stat, int64_t value)
{
    CM_DASSERT(g_rows[stat].kind == GAUGE);
    atomic_store_explicit(&g_stats.value[stat], value, memory_order_relaxed);
}

void cm_stat_observe(cm_stat stat, double value)
{
    int i = 0;
    CM_DASSERT(g_rows[stat].kind == HISTOGRAM_TIME);
    while (i < STAT_BOUNDS && value > g_time_bounds[i]) {
        i++;
    }
    atomic_fetch_add_explicit(&g_stats.bucket[stat][i], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&g_stats.sum_ns[stat], (int64_t)(value * 1e9), memory_order_relaxed);
    atomic_fetch_add_explicit(&g_stats.value[stat], 1, memory_order_relaxed);
}

int64_t cm_stat_get(cm_stat stat)
{
    return atomic_load_explicit(&g_stats.value[stat], memory_order_relaxed);
}

const char *cm_stat_name(cm_stat stat)
{
    return g_rows[stat].name;
}

bool cm_stat_has_role(cm_stat stat, char role)
{
    return strchr(g_rows[stat].roles, role) != NULL;
}

bool cm_stat_is_histogram(cm_stat stat)
{
    return g_rows[stat].kind == HISTOGRAM_TIME;
}

uint32_t cm_stats_snapshot(char role, cm_stat_value *out)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < CM_STAT_COUNT; i++) {
        if (cm_stat_has_role((cm_stat)i, role) && g_rows[i].kind != HISTOGRAM_TIME) {
            out[n++] = (cm_stat_value){i, cm_stat_get((cm_stat)i)};
        }
    }
    return n;
}

static void stats_render_histogram(uint32_t i, const char *member, cm_bytes *out)
{
    int64_t total = 0;
    for (int k = 0; k <= STAT_BOUNDS; k++) {
        total += atomic_load_explicit(&g_stats.bucket[i][k], memory_order_relaxed);
        if (k < STAT_BOUNDS) {
            cm_bytes_printf(out, "%s_bucket{member=\"%s\",le=\"%g\"} %lld\n", g_rows[i].name, member,
                            g_time_bounds[k], (long long)total);
        }
    }
    cm_bytes_printf(out, "%s_bucket{member=\"%s\",le=\"+Inf\"} %lld\n", g_rows[i].name, member,
                    (long long)total);
    cm_bytes_printf(out, "%s_sum{member=\"%s\"} %.9g\n", g_rows[i].name, member,
                    (double)atomic_load_explicit(&g_stats.sum_ns[i], memory_order_relaxed) * 1e-9);
    cm_bytes_printf(out, "%s_count{member=\"%s\"} %lld\n", g_rows[i].name, member, (long long)total);
}

static void stats_render_one(uint32_t i, const cm_stat_source *source, cm_bytes *out)
{
    if (source->values == NULL) {
        if (g_rows[i].kind == HISTOGRAM_TIME) {
            stats_render_histogram(i, source->member, out);
        } else {
            cm_bytes_printf(out, "%s{member=\"%s\"} %lld\n", g_rows[i].name, source->member,
                            (long long)cm_stat_get((cm_stat)i));
        }
        return;
    }
    for (uint32_t k = 0; k < source->n_values; k++) {
        if (source->values[k].stat == i) {
            cm_bytes_printf(out, "%s{member=\"%s\"} %lld\n", g_rows[i].name, source->member,
                            (long long)source->values[k].value);
        }
    }
}

void cm_stats_render(const cm_stat_source *sources, uint32_t n_sources, cm_bytes *out)
{
    static const char *const kind_names[] = {"counter", "gauge", "histogram"};
    for (uint32_t i = 0; i < CM_STAT_COUNT; i++) {
        bool headed = false;
        for (uint32_t s = 0; s < n_sources; s++) {
            if (!cm_stat_has_role((cm_stat)i, sources[s].role)) {
                continue;
            }
            if (!headed) {
                cm_bytes_printf(out, "# HELP %s %s\n# TYPE %s %s\n", g_rows[i].name, g_rows[i].help,
                                g_rows[i].name, kind_names[g_rows[i].kind]);
                headed = true;
            }
            stats_render_one(i, &sources[s], out);
        }
    }
}
