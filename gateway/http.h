/* The gateway's HTTP surface (libevent's evhttp): OpenAI endpoints, tokenizer endpoints, operators'
 * endpoints. Thread: the loop's. */
#pragma once
#include "common/base/status.h"
#include "gateway/stream.h"

typedef struct gw_http gw_http;

/* Listens. bound_out: "host:port" really in use. CM_E_EXISTS: the address is taken; CM_E_INVALID: it cannot
 * be read. */
CM_MUST_CHECK cm_status gw_http_create(gw_gateway *gateway, const char *address, gw_http **http_out,
                                       char bound_out[128], cm_error *err);
/* Cancels what still runs and closes all connections. */
void gw_http_destroy(gw_http *http);
/* Generating requests whose last byte was not yet written. */
uint32_t gw_http_open(const gw_http *http);
