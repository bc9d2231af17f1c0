/* grpc.health.v1: the same fact as /ready. Readiness changes in many places and seldom, so watchers are
 * served by looking at it from time to time. */
#include <string.h>

#include "gateway/grpc_private.h"

typedef Grpc__Health__V1__HealthCheckResponse__ServingStatus serving_status;
#define SERVING(name_) GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__##name_

enum { POLL_MS = 250 };

/* All of them ("" or absent), or one that has a method. */
static bool is_service(const char *service)
{
    size_t n = service != NULL ? strlen(service) : 0;
    for (size_t i = 0; i < GW_GRPC_N_METHODS && n > 0; i++) {
        const char *path = gw_grpc_methods[i].path + 1;
        if (strncmp(path, service, n) == 0 && path[n] == '/') {
            return true;
        }
    }
    return n == 0;
}

static serving_status status_now(const gw_grpc *grpc)
{
    gw_info info;
    gw_gateway_info(grpc->gateway, &info);
    return info.ready && !info.draining && !grpc->draining ? SERVING(SERVING) : SERVING(NOT_SERVING);
}

static void send_status(gw_grpc_call *call, serving_status status)
{
    Grpc__Health__V1__HealthCheckResponse response = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    response.has_status = true;
    response.status = status;
    gw_grpc_send(call, &response.base);
}

void gw_grpc_health_check(gw_grpc_call *call, const ProtobufCMessage *message)
{
    const Grpc__Health__V1__HealthCheckRequest *request =
        (const Grpc__Health__V1__HealthCheckRequest *)message;
    if (!is_service(request->service)) {
        gw_error error; /* what the cause is to other surfaces does not matter here: its code is NOT_FOUND */
        gw_error_set(&error, GW_CAUSE_MODEL_NOT_FOUND, "service", "no service %.200s here", request->service);
        gw_grpc_fail(call, &error);
        return;
    }
    send_status(call, status_now(call->grpc));
    gw_grpc_finish(call);
}

static void watch_tell(gw_grpc_call *call, serving_status now)
{
    gw_grpc_watch *watch = &call->watch;
    serving_status status = watch->known ? now : SERVING(SERVICE_UNKNOWN);
    if (!watch->on || status != watch->told) {
        send_status(call, status);
    }
    watch->on = true;
    watch->told = status;
    if (call->grpc->draining) {
        gw_error error;
        gw_error_set(&error, GW_CAUSE_UNAVAILABLE, NULL, "this gateway is shutting down");
        gw_grpc_fail(call, &error);
    }
}

void gw_grpc_health_watch(gw_grpc_call *call, const ProtobufCMessage *message)
{
    const Grpc__Health__V1__HealthCheckRequest *request =
        (const Grpc__Health__V1__HealthCheckRequest *)message;
    call->watch.known = is_service(request->service);
    watch_tell(call, status_now(call->grpc));
    pc_timer_set(call->grpc->poll, POLL_MS);
}

void gw_grpc_health_poll(void *arg)
{
    gw_grpc *grpc = arg;
    gw_grpc_call *call;
    bool watched = false;
    serving_status now = status_now(grpc);
    TAILQ_FOREACH (call, &grpc->calls, link) {
        if (call->method->ask == gw_grpc_health_watch) {
            watch_tell(call, now);
            watched = true;
        }
    }
    if (watched) {
        pc_timer_set(grpc->poll, POLL_MS);
    }
}
