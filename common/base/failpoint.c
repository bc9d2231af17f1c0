#include "common/base/failpoint.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "common/base/log.h"
#include "common/base/rng.h"

enum { FAILPOINT_ODDS_MAX = 10000 };

static const char *const g_names[] = {
#define CM_FAILPOINT(name, doc) #name,
#include "common/base/failpoint.def"
#undef CM_FAILPOINT
};

static struct {
    _Atomic uint32_t odds[CM_FAILPOINT_COUNT];
    _Atomic uint64_t n_asked[CM_FAILPOINT_COUNT];
    _Atomic uint64_t seed;
} g_failpoints;

static cm_status failpoint_arm_one(const char *text, size_t len, cm_error *err)
{
    char name[64];
    unsigned odds = FAILPOINT_ODDS_MAX;
    snprintf(name, sizeof(name), "%.*s", (int)(len < sizeof(name) ? len : sizeof(name) - 1), text);
    char *colon = strchr(name, ':');
    if (colon != NULL) {
        *colon = '\0';
        if (sscanf(colon + 1, "%u", &odds) != 1 || odds > FAILPOINT_ODDS_MAX) {
            return cm_error_set(err, CM_E_CONFIG, "failpoints", "failpoint %s: odds must be 0..%d", name,
                                FAILPOINT_ODDS_MAX);
        }
    }
    for (int i = 0; i < CM_FAILPOINT_COUNT; i++) {
        if (strcmp(g_names[i], name) == 0) {
            atomic_store(&g_failpoints.odds[i], odds);
            cm_warn("failpoint %s is armed with odds %u in %d", name, odds, FAILPOINT_ODDS_MAX);
            return CM_OK;
        }
    }
    return cm_error_set(err, CM_E_CONFIG, "failpoints", "unknown failpoint '%s'", name);
}

cm_status cm_failpoints_arm(const char *spec, uint64_t seed, cm_error *err)
{
    atomic_store(&g_failpoints.seed, seed);
    while (*spec != '\0') {
        size_t len = strcspn(spec, ",");
        CM_TRY(failpoint_arm_one(spec, len, err));
        spec += len + (spec[len] == ',');
    }
    return CM_OK;
}

bool cm_failpoint_fires(cm_failpoint point)
{
    uint32_t odds = atomic_load_explicit(&g_failpoints.odds[point], memory_order_relaxed);
    if (__builtin_expect(odds == 0, 1)) {
        return false;
    }
    uint64_t n = atomic_fetch_add(&g_failpoints.n_asked[point], 1);
    return cm_rng_at(atomic_load(&g_failpoints.seed), n, (uint64_t)point).word[0] % FAILPOINT_ODDS_MAX < odds;
}
