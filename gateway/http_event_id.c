#include <stdlib.h>
#include <string.h>

#include "gateway/http_private.h"

/* One count; NULL: there is none. */
static const char *parse_count(const char *at, uint32_t *out)
{
    char *end;
    unsigned long long value = *at >= '0' && *at <= '9' ? strtoull(at, &end, 10) : UINT64_MAX;
    *out = (uint32_t)value;
    return value <= UINT32_MAX ? end : NULL;
}

bool gw_event_id_parse(const char *text, gw_event_id *out)
{
    const char *colon = strrchr(text, ':');
    size_t n_id = colon != NULL ? (size_t)(colon - text) : 0;
    *out = (gw_event_id){.n = 0};
    if (n_id == 0 || n_id >= sizeof(out->id)) {
        return false;
    }
    memcpy(out->id, text, n_id);
    const char *at = colon;
    do {
        at = out->n < GW_CHOICES_MAX ? parse_count(at + 1, &out->count[out->n++]) : NULL;
    } while (at != NULL && *at == '.');
    return at != NULL && *at == 0;
}
