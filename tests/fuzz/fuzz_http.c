/* Input: the text of a request's path or header. What the HTTP surface reads of it beyond libevent's own
 * parser. */
#include <string.h>

#include "common/base/mem.h"
#include "gateway/http_private.h"
#include "gateway/visit.h"
#include "tests/fuzz/fuzz.h"

static void check_event_id(const char *text)
{
    gw_event_id id;
    if (gw_event_id_parse(text, &id)) {
        CM_ASSERT(id.id[0] != '\0' && memchr(id.id, '\0', sizeof(id.id)) != NULL);
        CM_ASSERT(id.n <= GW_CHOICES_MAX && strlen(id.id) < strlen(text));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *text = cm_alloc(size + 1);
    memcpy(text, data, size);
    check_event_id(text);
    if (gw_traceparent_is_valid(text)) {
        CM_ASSERT(strlen(text) < GW_TRACEPARENT_BYTES);
    }
    size_t n = strlen(text);
    gw_http_percent_decode(text);
    CM_ASSERT(strlen(text) <= n);
    cm_free(text);
    return 0;
}
