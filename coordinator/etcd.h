/* Calls to an etcd cluster over its gRPC API: one attempt each, at the endpoint that answered last; one that
 * does not answer makes the next call go to the next endpoint. Who calls decides what is tried again. Thread:
 * the loop's; results come on it. */
#pragma once
#include <protobuf-c/protobuf-c.h>

#include "common/proc/addresses.h"
#include "common/proc/loop.h"

typedef struct co_etcd co_etcd;

/* status: CM_OK, reply is the unpacked answer, borrowed; CM_E_REFUSED: etcd says no, nothing was done;
 * CM_E_UNAVAILABLE: no answer, so it may have been done or still be done. text: why, with the endpoint. */
typedef void (*co_etcd_fn)(void *ctx, cm_status status, const void *reply, const char *text);

co_etcd *co_etcd_create(pc_loop *loop, const pc_addresses *endpoints);
void co_etcd_destroy(co_etcd *etcd); /* no fn runs any more. Not from inside one */
/* Methods that stream are asked once: one message up, one down. */
void co_etcd_call(co_etcd *etcd, const char *path, const ProtobufCMessage *request,
                  const ProtobufCMessageDescriptor *reply, uint64_t deadline_ms, co_etcd_fn fn, void *ctx);
const char *co_etcd_endpoint(const co_etcd *etcd); /* that the next call goes to */
/* Nobody wants the results of the calls under way any more. */
void co_etcd_forget(co_etcd *etcd);
