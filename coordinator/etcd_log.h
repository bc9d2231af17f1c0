/* The log's keys and transactions in etcd: requests built and sent, answers taken apart. Who is active and
 * what is written when is store_etcd.c's. Thread: the loop's. */
#pragma once
#include "coordinator/drains.h"
#include "coordinator/epoch.h"
#include "coordinator/etcd.h"
#include "coordinator/frame_key.h"
#include "proto/etcd.pb-c.h"

enum { CO_ETCD_PREFIX_BYTES = 128, CO_ETCD_KEY_BYTES = CO_ETCD_PREFIX_BYTES + 32 };

typedef struct co_etcd_keys {
    char prefix[CO_ETCD_PREFIX_BYTES]; /* without a slash at its end */
} co_etcd_keys;

/* The log as it is, or, in a write, as it shall be. */
typedef struct co_etcd_past {
    uint64_t cluster; /* 0: there is no log */
    bool has_secret;
    uint8_t secret[CO_SECRET_BYTES];
    uint32_t next_member_id;
    uint64_t next_number;
    co_drains drains;
    uint64_t serial;       /* of the last write, or of this one */
    int64_t head_revision; /* of the head that is there; 0: none */
    co_epoch *epoch;       /* taken: the last one, NULL if none; the caller's to release */
} co_etcd_past;

/* "etcd://HOST:PORT[,HOST:PORT]/PREFIX" */
CM_MUST_CHECK cm_status co_etcd_log_url(const char *url, pc_addresses *endpoints_out, co_etcd_keys *keys_out,
                                        cm_error *err);

/* Asks for the leader key: fn gets a RangeResponse. */
void co_etcd_log_look(co_etcd *etcd, const co_etcd_keys *keys, uint64_t deadline_ms, co_etcd_fn fn,
                      void *ctx);
/* Makes the leader key if there is none; the others: fn gets a TxnResponse; not succeeded: see
 * co_etcd_log_leader. address: "" = none to name. */
void co_etcd_log_claim(co_etcd *etcd, const co_etcd_keys *keys, int64_t lease, const char *address,
                       const char *host, uint64_t deadline_ms, co_etcd_fn fn, void *ctx);
/* While the leader key is of that term (create revision): */
void co_etcd_log_read(co_etcd *etcd, const co_etcd_keys *keys, int64_t term, uint64_t deadline_ms,
                      co_etcd_fn fn, void *ctx);
/* ... and the head of past->head_revision: the new head and the epoch (may be NULL), all or nothing. */
void co_etcd_log_write(co_etcd *etcd, const co_etcd_keys *keys, int64_t term, const co_etcd_past *past,
                       const co_epoch *epoch, uint64_t deadline_ms, co_etcd_fn fn, void *ctx);

/* What a read has found. CM_E_CORRUPT, CM_E_UNSUPPORTED (of another version): err says what to do. */
CM_MUST_CHECK cm_status co_etcd_log_take(const co_etcd_keys *keys, const Etcdserverpb__TxnResponse *txn,
                                         co_etcd_past *past_out, cm_error *err);
/* The leader key in the answer of a transaction that did not hold; NULL: there is none. */
const Etcdserverpb__KeyValue *co_etcd_log_leader(const Etcdserverpb__TxnResponse *txn);
/* Whether the head in the answer of such a write is the one that past should have made; then its revision is
 * taken over. */
bool co_etcd_log_is_ours(const Etcdserverpb__TxnResponse *txn, int64_t term, co_etcd_past *past);
/* who_out: for sentences. */
void co_etcd_log_leader_name(const Etcdserverpb__KeyValue *leader, char address_out[PC_ADDRESS_BYTES],
                             char who_out[300]);
