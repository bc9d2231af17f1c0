/* The gateway's gRPC surface: asks, streams and answers through gateway/stream.h alone. Thread: the loop's.
 */
#pragma once
#include "common/proc/loop.h"
#include "common/proc/serve_tls.h"
#include "gateway/stream.h"

typedef struct gw_grpc gw_grpc;

/* Listens. tls: kept; NULL: plain. bound_out: "host:port" really in use. CM_E_EXISTS: the address is taken.
 */
CM_MUST_CHECK cm_status gw_grpc_create(gw_gateway *gateway, pc_loop *loop, const char *address,
                                       pc_serve_tls *tls, gw_grpc **grpc_out, char bound_out[128],
                                       cm_error *err);
/* Refuses new calls, running ones go on; done runs when none is left. */
void gw_grpc_drain(gw_grpc *grpc, pc_fn done, void *arg);
/* Cancels what still runs. */
void gw_grpc_destroy(gw_grpc *grpc);
