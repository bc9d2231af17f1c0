/* A gateway as a library: member of the cluster, links to the routers, streams, HTTP and gRPC. main.c and
 * tests make one. Thread: the loop's. */
#pragma once
#include "common/proc/loop.h"
#include "gateway/gw_config.h"
#include "gateway/stream.h"

/* The coordinator wants the process to go: CM_OK after a drain (which has begun), else it was refused for
 * good. */
typedef void (*gw_leave_fn)(void *ctx, cm_status status);

/* Listens and begins to look for the coordinator. config is kept and must outlive the gateway. CM_E_CONFIG,
 * CM_E_CORRUPT, CM_E_EXISTS: err names the option, file or address. An empty grpc address leaves that surface
 * out. */
CM_MUST_CHECK cm_status gw_gateway_create(pc_loop *loop, const gw_config *config, gw_leave_fn leave,
                                          void *ctx, gw_gateway **gateway_out, cm_error *err);
/* New requests are refused (UNAVAILABLE); running ones may finish within drain_ms, then they fail. done runs
 * when the last answer was written. A second call only replaces done. */
void gw_gateway_drain(gw_gateway *gateway, pc_fn done, void *arg);
/* Ends whatever still runs. */
void gw_gateway_destroy(gw_gateway *gateway);

const char *gw_gateway_http(const gw_gateway *gateway); /* "host:port" in use */
const char *gw_gateway_grpc(const gw_gateway *gateway); /* "" when left out */
