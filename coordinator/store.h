/* The coordinator's log behind one table: the cluster's id and secret, the next free member id and epoch
 * number, who is being drained, and the last epochs. Only one coordinator at a time may decide: the store
 * says who. A file (SQLite) is ours when it is open; with etcd the holder of a lease is active and the others
 * stand by.
 *
 *   --store DIR                               a file in that folder; "" = in memory
 *   --store etcd://HOST:PORT[,..]/PREFIX      etcd v3, keys under PREFIX
 *
 * Thread: the loop's; events come on it, never from inside co_store_write. */
#pragma once
#include "common/proc/loop.h"
#include "coordinator/drains.h"
#include "coordinator/epoch.h"
#include "coordinator/frame_key.h"

typedef struct co_store co_store;
typedef struct co_store_ops co_store_ops;

/* What the log knows when a coordinator becomes the active one. */
typedef struct co_store_past {
    uint64_t cluster;                /* drawn when the log was made */
    uint8_t secret[CO_SECRET_BYTES]; /* drawn with it, or now in a log of a release that had none */
    uint32_t next_member_id;         /* 1 in a new log */
    uint64_t next_number;            /* 1 in a new log */
    co_drains drains;
    co_epoch *epoch; /* the last one, NULL if none */
} co_store_past;

typedef struct co_store_events {
    /* We are the active coordinator and this is the log. past is borrowed. */
    void (*active)(void *ctx, const co_store_past *past);
    /* We are not, or not any more: no write that is not yet answered will be. address: the active one's, ""
     * when there is none or nobody knows; text: why we are not. Again when either changes. */
    void (*standby)(void *ctx, const char *address, const char *text);
    /* How a write went. CM_OK: it is durable; otherwise nothing was written and text says why. */
    void (*written)(void *ctx, uint64_t ticket, cm_status status, const char *text);
    /* The log cannot be used and a person has to look: nothing more will come. */
    void (*failed)(void *ctx, const cm_error *err);
} co_store_events;

typedef struct co_store_options {
    const char *url;
    const char *address; /* of this coordinator, for the others to know */
    uint64_t lease_ms;   /* etcd: how long the claim of an active coordinator outlives it */
    uint32_t n_queued_max;
} co_store_options;

struct co_store {
    const co_store_ops *ops;
};

struct co_store_ops {
    const char *scheme; /* of the URL; "" = a plain path */
    cm_status (*open)(pc_loop *loop, const co_store_options *options, const co_store_events *events,
                      void *ctx, co_store **store_out, cm_error *err);
    bool (*is_active)(const co_store *store);
    cm_status (*write)(co_store *store, uint64_t ticket, uint32_t next_member_id, uint64_t next_number,
                       const co_drains *drains, co_epoch *epoch);
    void (*stop)(co_store *store, pc_fn done, void *arg);
    void (*close)(co_store *store);
};
extern const co_store_ops co_store_sqlite_ops, co_store_etcd_ops;

/* events and options are copied; *store_out is set before the first event, which may come at once.
 * CM_E_CONFIG: no URL of ours; what a file can be wrong with: see sqlite_log.h. That etcd does not answer is
 * no error: then we stand by and say so. */
CM_MUST_CHECK cm_status co_store_open(pc_loop *loop, const co_store_options *options,
                                      const co_store_events *events, void *ctx, co_store **store_out,
                                      cm_error *err);
/* Whether we may decide now. Ask before each decision: a claim may have run out while this process slept. */
bool co_store_is_active(const co_store *store);
/* In order; drains is copied, epoch (may be NULL) is held until the answer. CM_E_CAPACITY: n_queued_max
 * writes wait; CM_E_UNAVAILABLE: not the active one. */
CM_MUST_CHECK cm_status co_store_write(co_store *store, uint64_t ticket, uint32_t next_member_id,
                                       uint64_t next_number, const co_drains *drains, co_epoch *epoch);
/* Gives the claim up so that another one need not wait for its end; no event follows. done may run at once.
 */
void co_store_stop(co_store *store, pc_fn done, void *arg);
/* Waits for writes that run. */
void co_store_close(co_store *store);
