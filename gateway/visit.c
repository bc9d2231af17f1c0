#include "gateway/visit.h"

#include <stdio.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/rng.h"

enum { TRACE_ID_AT = 3, TRACE_ID_CHARS = 32, TRACE_PARENT_AT = 36, TRACE_FLAGS_AT = 53, TRACE_CHARS = 55 };

/* ---- traces ---- */

static bool is_hex(const char *text, size_t n)
{
    return strspn(text, "0123456789abcdef") >= n;
}

static bool is_zero(const char *text, size_t n)
{
    return strspn(text, "0") >= n;
}

bool gw_traceparent_is_valid(const char *text)
{
    size_t n = text != NULL ? strnlen(text, TRACE_CHARS + 1) : 0;
    if (n < TRACE_CHARS || !is_hex(text, 2) || strncmp(text, "ff", 2) == 0) {
        return false;
    }
    bool longer = text[TRACE_CHARS] != 0; /* only a later version may be */
    if (longer && (strncmp(text, "00", 2) == 0 || text[TRACE_CHARS] != '-')) {
        return false;
    }
    return text[2] == '-' && is_hex(text + TRACE_ID_AT, TRACE_ID_CHARS) &&
           !is_zero(text + TRACE_ID_AT, TRACE_ID_CHARS) && text[TRACE_PARENT_AT - 1] == '-' &&
           is_hex(text + TRACE_PARENT_AT, 16) && !is_zero(text + TRACE_PARENT_AT, 16) &&
           text[TRACE_FLAGS_AT - 1] == '-' && is_hex(text + TRACE_FLAGS_AT, 2);
}

static unsigned long long nonzero(void)
{
    return (unsigned long long)(cm_random_u64() | 1);
}

/* We add no span of our own: the client's parent stays everybody's. */
static void take_traceparent(gw_visit *visit, const char *given)
{
    if (gw_traceparent_is_valid(given)) {
        snprintf(visit->traceparent, sizeof(visit->traceparent), "%.*s", TRACE_CHARS, given);
        memcpy(visit->traceparent, "00", 2); /* what is passed on is of the version that we know */
    } else {
        snprintf(visit->traceparent, sizeof(visit->traceparent), "00-%016llx%016llx-%016llx-00", nonzero(),
                 nonzero(), nonzero());
    }
}

/* ---- a visit ---- */

/* It can stand in a header and in a line of words. */
static bool is_usable_id(const char *id)
{
    size_t n = id != NULL ? strnlen(id, GW_VISIT_ID_BYTES) : 0;
    for (size_t i = 0; i < n; i++) {
        if (id[i] <= ' ' || id[i] > '~') {
            return false;
        }
    }
    return n > 0 && n < GW_VISIT_ID_BYTES;
}

gw_visit *gw_visit_begin(const char *surface, const char *id, const char *traceparent)
{
    gw_visit *visit = cm_alloc(sizeof(*visit));
    visit->refs = 1;
    visit->surface = surface;
    visit->began_ns = cm_now_ns();
    if (is_usable_id(id)) {
        snprintf(visit->id, sizeof(visit->id), "%s", id);
    } else {
        snprintf(visit->id, sizeof(visit->id), "%016llx%016llx", (unsigned long long)cm_random_u64(),
                 (unsigned long long)cm_random_u64());
    }
    take_traceparent(visit, traceparent);
    return visit;
}

gw_visit *gw_visit_hold(gw_visit *visit)
{
    visit->refs++;
    return visit;
}

void gw_visit_release(gw_visit *visit)
{
    if (--visit->refs == 0) {
        cm_free(visit);
    }
}

void gw_visit_answered(gw_visit *visit, const gw_usage *usage, const char *end)
{
    visit->end = end;
    visit->completion_tokens += usage->completion_tokens;
    if (usage->prompt_tokens > visit->prompt_tokens) {
        visit->prompt_tokens = usage->prompt_tokens;
    }
    if (usage->queue_ms > visit->queue_ms) {
        visit->queue_ms = usage->queue_ms;
    }
    if (usage->completion_tokens > 0 &&
        (!visit->has_first || usage->first_token_ms < visit->first_token_ms)) {
        visit->has_first = true;
        visit->first_token_ms = usage->first_token_ms;
    }
}

void gw_visit_end(gw_visit *visit, int status)
{
    char first[32] = "-";
    if (visit->has_first) {
        snprintf(first, sizeof(first), "%.1f", visit->first_token_ms);
    }
    cm_log_line(visit->quiet ? CM_LOG_DEBUG : CM_LOG_INFO,
                "access id %s tenant %s surface %s status %d end %s prompt %u completion %llu queue_ms %.1f "
                "first_ms %s total_ms %.1f trace %.*s",
                visit->id, visit->tenant != NULL ? gw_tenant_name(visit->tenant) : "-", visit->surface,
                status, visit->end != NULL ? visit->end : "-", visit->prompt_tokens,
                (unsigned long long)visit->completion_tokens, visit->queue_ms, first,
                (double)(cm_now_ns() - visit->began_ns) * 1e-6, TRACE_ID_CHARS,
                visit->traceparent + TRACE_ID_AT);
    gw_visit_release(visit);
}
