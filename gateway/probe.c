/* Whether a token really comes out: one generation of one token through the whole path. */
#include "common/base/log.h"
#include "gateway/gateway_private.h"

enum { PROBE_DEADLINE_MS = 60000, PROBE_RETRY_MS = 1000 };

static void probe_started(void *ctx, const gw_start *start)
{
    (void)ctx;
    (void)start;
}

static void probe_piece(void *ctx, const md_piece *piece)
{
    (void)ctx;
    (void)piece;
}

static void probe_flush(void *ctx)
{
    (void)ctx;
}

cm_status gw_probe_open(gw_gateway *gateway, uint64_t deadline_ms,
                        void (*finished)(void *, const gw_finish *), void (*failed)(void *, const gw_error *),
                        void *ctx, gw_stream **stream_out, gw_error *error_out)
{
    gw_stream_events events = {.started = probe_started,
                               .piece = probe_piece,
                               .flush = probe_flush,
                               .finished = finished,
                               .failed = failed};
    json_t *body = json_pack("{s:[i], s:i, s:i, s:b}", "prompt",
                             (int)md_tokenizer_control(gateway->tokenizer, MD_CTL_BOS), "max_tokens", 1,
                             "temperature", 0, "ignore_eos", 1);
    gw_ask ask = {.kind = GW_ASK_COMPLETE, .body = body, .deadline_ms = deadline_ms};
    cm_status status = gw_stream_open_probe(gateway, &ask, &events, ctx, stream_out, error_out);
    json_decref(body);
    return status;
}

static void probe_finished(void *ctx, const gw_finish *finish)
{
    gw_gateway *gateway = ctx;
    (void)finish;
    gateway->probe.stream = NULL;
    gateway->probe.passed = gw_routers_get_load(gateway->routers).n_linked > 0;
    cm_info("ready: a token came out");
}

static void probe_failed(void *ctx, const gw_error *error)
{
    gw_gateway *gateway = ctx;
    gateway->probe.stream = NULL;
    cm_info("not ready: %s", error->message);
    pc_timer_set(gateway->probe.retry, PROBE_RETRY_MS);
}

static void probe_retry(void *arg)
{
    gw_probe_consider(arg);
}

void gw_probe_init(gw_gateway *gateway)
{
    gateway->probe.retry = pc_timer_create(gateway->loop, probe_retry, gateway);
}

void gw_probe_fini(gw_gateway *gateway)
{
    if (gateway->probe.stream != NULL) {
        gw_stream_cancel(gateway->probe.stream);
        gateway->probe.stream = NULL;
    }
    pc_timer_destroy(gateway->probe.retry);
}

void gw_probe_consider(gw_gateway *gateway)
{
    bool possible = gateway->epoch != NULL && gateway->epoch->placement != NULL &&
                    gw_routers_get_load(gateway->routers).n_linked > 0;
    if (!possible || gateway->probe.passed || gateway->probe.stream != NULL || gateway->draining) {
        return;
    }
    gw_error error;
    cm_status status = gw_probe_open(gateway, PROBE_DEADLINE_MS, probe_finished, probe_failed, gateway,
                                     &gateway->probe.stream, &error);
    if (status != CM_OK) {
        probe_failed(gateway, &error);
    }
}

void gw_probe_reset(gw_gateway *gateway)
{
    gateway->probe.passed = false;
}
