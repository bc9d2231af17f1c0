/* Input: which mode (1 byte), then a request's body. */
#include <math.h>

#include "gateway/request.h"
#include "tests/fuzz/fuzz.h"

enum { VOCAB = 1000, CONTEXT = 4096 };

static void check_accepted(const gw_request *request)
{
    gw_error error;
    uint32_t tokens_max;
    CM_ASSERT(isfinite(request->temperature) && isfinite(request->top_p));
    CM_ASSERT(request->n_stop <= GW_STOP_MAX && request->n_stop_id <= GW_STOP_IDS_MAX);
    for (size_t i = 0; i < request->prompt_ids.n; i++) {
        CM_ASSERT(request->prompt_ids.id[i] < VOCAB);
    }
    if (gw_request_budget(request, true, 1 + (uint32_t)request->prompt_ids.n, CONTEXT, &tokens_max, &error) ==
        CM_OK) {
        CM_ASSERT(tokens_max >= 1 && tokens_max + 1 + request->prompt_ids.n <= CONTEXT);
    } else {
        CM_ASSERT(error.message[0] != '\0');
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0) {
        return 0;
    }
    json_t *body = json_loadb((const char *)data + 1, size - 1, JSON_ALLOW_NUL | JSON_DECODE_ANY, NULL);
    if (body == NULL) {
        return 0;
    }
    gw_request request;
    gw_error error = {0};
    (void)gw_request_streams(body);
    (void)gw_request_wants_usage(body);
    if (gw_request_parse((data[0] & 1) != 0 ? GW_ASK_CHAT : GW_ASK_COMPLETE, body, VOCAB, &request, &error) ==
        CM_OK) {
        check_accepted(&request);
        gw_request_free(&request);
    } else {
        CM_ASSERT(error.message[0] != '\0' && error.cause < GW_CAUSE_COUNT);
    }
    json_decref(body);
    return 0;
}
