/* Named places where a test may make something fail that no table reaches. Nothing is armed unless asked for;
 * an unarmed failpoint is one relaxed load. Thread: any. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/status.h"

typedef enum cm_failpoint {
#define CM_FAILPOINT(name, doc) CM_FAILPOINT_##name,
#include "common/base/failpoint.def"
#undef CM_FAILPOINT
    CM_FAILPOINT_COUNT
} cm_failpoint;

/* "name:odds,name:odds", "" arms nothing. seed makes the firing repeatable. CM_E_CONFIG names the unknown
 * one. */
CM_MUST_CHECK cm_status cm_failpoints_arm(const char *spec, uint64_t seed, cm_error *err);
bool cm_failpoint_fires(cm_failpoint point);
