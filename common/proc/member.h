/* A process as a member of the cluster: its session with the coordinator. Says hello, heartbeats with the
 * counters of its role, hears of epochs; reconnects by itself when the coordinator is lost (serving goes on
 * meanwhile on the epoch in force). Thread: the loop's; callbacks come on it. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/status.h"
#include "common/proc/loop.h"
#include "common/proc/tls.h"
#include "proto/placement.h"

typedef struct pc_member pc_member;

/* One epoch as a value, shared by counting: the loop and a compute thread may hold it at once. */
typedef struct pc_epoch {
    _Atomic uint32_t refs;
    uint64_t number, cluster;
    pr_placement *placement; /* NULL: none yet */
    uint32_t n_member;
    struct pc_epoch_member {
        uint32_t id;
        uint32_t role; /* Baleen__Control__V1__Role */
        uint64_t incarnation;
        char *data_address;        /* "" when none */
        bool draining;             /* a router that gets no new sequences */
        uint64_t expert_bytes_max; /* a worker's memory for experts */
    } * members;
} pc_epoch;
pc_epoch *pc_epoch_hold(pc_epoch *epoch);
void pc_epoch_release(pc_epoch *epoch); /* NULL is fine */
CM_MUST_CHECK cm_status pc_epoch_unpack(const Baleen__Control__V1__Epoch *message, pc_epoch **epoch_out,
                                        cm_error *err);
const struct pc_epoch_member *pc_epoch_member_find(const pc_epoch *epoch, uint32_t id); /* NULL when absent */

typedef struct pc_member_events {
    /* We are in: id and cluster are known now (set the net identity). Also after every reconnect. */
    void (*welcome)(void *ctx, uint32_t member_id, uint64_t cluster);
    /* The key of the data plane's messages for an epoch: before the commit of that epoch, and again with
     * every welcome while that epoch is in force. key: NET_KEY_BYTES, borrowed. */
    void (*frame_key)(void *ctx, uint64_t cluster, uint64_t epoch, const uint8_t *key);
    /* Workers: load, then pc_member_prepared. epoch is borrowed: hold it to keep it. */
    void (*prepare)(void *ctx, pc_epoch *epoch);
    void (*abort)(void *ctx, uint64_t epoch);
    /* In force: then pc_member_committed. */
    void (*commit)(void *ctx, pc_epoch *epoch);
    /* The oldest epoch that others may still use. Workers: when the coordinator says so. Others: after a
     * commit, the one before; nobody is waited for until they have heard of it. */
    void (*retire)(void *ctx, uint64_t oldest);
    /* Gateways: the other members' counters. Borrowed. */
    void (*cluster_stats)(void *ctx, const Baleen__Control__V1__ClusterStats *stats);
    /* Gateways: what pc_member_wish_load asked for. Borrowed. */
    void (*cluster_load)(void *ctx, const Baleen__Control__V1__ClusterLoad *load);
    /* Asked to finish and leave. */
    void (*drain)(void *ctx);
    /* Refused for good: text says why; the process should exit. */
    void (*refused)(void *ctx, cm_status status, const char *text);
} pc_member_events; /* members that a role does not use may be NULL */

typedef struct pc_member_options {
    /* "host:port[,host:port]", checked (addresses.h): one is active, others stand by */
    const char *coordinator;
    pc_tls *tls;                                            /* kept; NULL: plain */
    uint32_t role;                                          /* Baleen__Control__V1__Role */
    const char *data_address, *http_address, *grpc_address; /* NULL when none */
    const char *net;                                        /* the data plane's back-end; NULL: nobody asks */
    const char *fingerprint;
    uint64_t expert_bytes_max; /* workers */
    uint32_t n_layer, n_expert;
    uint64_t expert_bytes;
} pc_member_options;

/* Strings are copied. Connects in the background and for ever. */
pc_member *pc_member_create(pc_loop *loop, const pc_member_options *options, const pc_member_events *events,
                            void *ctx);
void pc_member_destroy(pc_member *member); /* not from inside a callback of it */

void pc_member_prepared(pc_member *member, uint64_t epoch, cm_status status, const char *text);
void pc_member_committed(pc_member *member, uint64_t epoch);
/* Without a session the first few are kept for the next one. */
void pc_member_report_peer(pc_member *member, uint32_t member_id, cm_status status);
/* Routers: rows per (layer, expert) since the last time it was said. false: nobody hears it now. */
bool pc_member_load(pc_member *member, uint32_t *count, uint32_t n_layer, uint32_t n_expert);
/* Gateways: asks for the load of all experts, once. Nothing without a session. */
void pc_member_wish_load(pc_member *member);
/* Tells the coordinator, again after a reconnect, that we want to go. It answers with drain when nobody
 * counts on us any more; an orderly end of the session is then the last one. */
void pc_member_leave(pc_member *member);
bool pc_member_connected(const pc_member *member);
