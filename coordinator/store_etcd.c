/* The log in etcd, and who may write it.
 *
 *   PREFIX/leader        exists while a coordinator is active; attached to that one's lease
 *   PREFIX/head          cluster, its secret, next member id, next number; changed by every write
 *   PREFIX/epochs/N      the last epochs
 *
 *   watching -> claiming (lease, leader key, read the log) -> active -> watching
 *
 * Every write is a transaction that holds only while our leader key is the one that was made when we became
 * active, and while the head is the one we left. The first keeps out a coordinator that does not know yet
 * that it is not active any more; the second an attempt of our own whose answer was lost and which arrives
 * late. An attempt without an answer is made again until there is one or the claim is lost: then whoever is
 * active next reads what came of it. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/queue.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "coordinator/etcd.h"
#include "coordinator/etcd_log.h"
#include "coordinator/store.h"
#include "proto/pack.h"

enum {
    ETCD_CALL_MS_MIN = 200,
    ETCD_CALL_MS_MAX = 2000,
    ETCD_AGAIN_MS = 200, /* after a call without an answer */
    ETCD_REFRESH_MS_MAX =
        1000, /* gRPC servers end connections that are pinged more often than they are used */
    ETCD_WATCH_MS_MIN = 100,
    ETCD_WATCH_MS_MAX = 500,
};

typedef enum etcd_state {
    ETCD_WATCHING,
    ETCD_CLAIMING,
    ETCD_ACTIVE,
    ETCD_OVER, /* stopped or failed */
} etcd_state;

typedef struct etcd_write {
    STAILQ_ENTRY(etcd_write) link;
    uint64_t ticket;
    uint32_t next_member_id;
    uint64_t next_number;
    co_drains drains;
    co_epoch *epoch;
} etcd_write;

typedef struct etcd_store {
    co_store base;
    pc_loop *loop;
    co_etcd *client;
    co_store_events events;
    void *ctx;
    co_etcd_keys keys;
    char address[PC_ADDRESS_BYTES]; /* "" when of no use to others */
    char host[256];
    uint64_t lease_ms; /* asked for */

    etcd_state state;
    pc_timer *turn;    /* watching: look again; active: keep the lease alive */
    pc_timer *expiry;  /* active: the claim may run out elsewhere */
    pc_timer *again;   /* active: the write that had no answer */
    int64_t lease;     /* 0: none. After a claim was lost: to be revoked */
    uint64_t ttl_ms;   /* granted */
    uint64_t asked_ms; /* when the last grant or keep-alive was sent */
    uint64_t until_ms; /* our claim holds at least until then */
    int64_t term;      /* create revision of our leader key */
    co_etcd_past past; /* claiming: as read; active: head and its revision */

    STAILQ_HEAD(, etcd_write) writes; /* the first one is on its way */
    uint32_t n_writes, n_writes_max;

    bool told; /* since we were active last: events.standby was called, with */
    char told_address[PC_ADDRESS_BYTES];
    bool told_trouble; /* that etcd does not answer: one sentence, not one for each attempt */
    char trouble[416]; /* of the last keep-alive; "" */
    pc_fn stopped;
    void *stopped_arg;
} etcd_store;

static void etcd_look(void *arg);
static void etcd_write_next(etcd_store *store);

static uint64_t within(uint64_t value, uint64_t min, uint64_t max)
{
    return value < min ? min : value > max ? max : value;
}

/* So that several attempts find room within a claim. */
static uint64_t etcd_call_ms(const etcd_store *store)
{
    return within(store->lease_ms / 6, ETCD_CALL_MS_MIN, ETCD_CALL_MS_MAX);
}

/* A fifth of the lease is for clocks that run at different speeds and for a loop that is late. It counts from
 * before the request was sent, so etcd's own count began later. */
static uint64_t etcd_claim_end(const etcd_store *store)
{
    return store->asked_ms + store->ttl_ms - store->ttl_ms / 5;
}

/* ---- standing by ---- */

static void etcd_tell(etcd_store *store, const char *address, bool trouble, const char *text)
{
    if (store->told && strcmp(store->told_address, address) == 0 && store->told_trouble == trouble) {
        return;
    }
    store->told = true;
    store->told_trouble = trouble;
    snprintf(store->told_address, sizeof(store->told_address), "%s", address);
    store->events.standby(store->ctx, address, text);
}

static void etcd_drop_writes(etcd_store *store)
{
    while (!STAILQ_EMPTY(&store->writes)) {
        etcd_write *write = STAILQ_FIRST(&store->writes);
        STAILQ_REMOVE_HEAD(&store->writes, link);
        co_epoch_release(write->epoch);
        cm_free(write);
    }
    store->n_writes = 0;
}

/* Whatever is under way is of no interest any more; the lease, if there is one, is revoked first thing. */
static void etcd_rest(etcd_store *store)
{
    co_etcd_forget(store->client);
    pc_timer_clear(store->expiry);
    pc_timer_clear(store->again);
    etcd_drop_writes(store);
    co_epoch_release(store->past.epoch);
    store->past.epoch = NULL;
    store->state = ETCD_WATCHING;
    store->term = 0;
    pc_timer_set(store->turn, within(store->lease_ms / 8, ETCD_WATCH_MS_MIN, ETCD_WATCH_MS_MAX));
}

static void etcd_stand_by(etcd_store *store, const char *address, const char *text)
{
    etcd_rest(store);
    etcd_tell(store, address, false, text);
}

static void etcd_fail(etcd_store *store, const cm_error *err)
{
    co_etcd_forget(store->client);
    pc_timer_clear(store->turn);
    store->state = ETCD_OVER;
    store->events.failed(store->ctx, err);
}

/* True: the call had no answer, or the wrong one, and we stand by. */
static bool etcd_gave_up(etcd_store *store, cm_status status, const char *text)
{
    if (status == CM_OK) {
        return false;
    }
    char why[480];
    snprintf(why, sizeof(why), "cannot become the active one: %.400s", text);
    etcd_rest(store);
    etcd_tell(store, "", true, why);
    return true;
}

/* ---- claiming: lease, leader key, the log ---- */

static void etcd_keep_alive(etcd_store *store);

static void etcd_become_active(etcd_store *store)
{
    const co_etcd_past *past = &store->past;
    store->until_ms = etcd_claim_end(store);
    uint64_t now_ms = cm_now_ms();
    if (now_ms >= store->until_ms) {
        etcd_stand_by(store, "", "becoming the active one took longer than the lease");
        return;
    }
    store->state = ETCD_ACTIVE;
    store->told = false;
    store->trouble[0] = 0;
    pc_timer_set(store->expiry, store->until_ms - now_ms);
    etcd_keep_alive(store);
    co_store_past log = {.cluster = past->cluster,
                         .next_member_id = past->next_member_id,
                         .next_number = past->next_number,
                         .drains = past->drains,
                         .epoch = past->epoch};
    memcpy(log.secret, past->secret, sizeof(log.secret));
    store->events.active(store->ctx, &log);
    co_epoch_release(store->past.epoch);
    store->past.epoch = NULL;
}

static void etcd_made(void *ctx, cm_status status, const void *reply, const char *text)
{
    etcd_store *store = ctx;
    const Etcdserverpb__TxnResponse *txn = reply;
    if (etcd_gave_up(store, status, text)) {
        return;
    }
    if (!txn->succeeded || txn->header == NULL) {
        etcd_stand_by(store, "", "another coordinator was faster");
        return;
    }
    store->past.head_revision = txn->header->revision;
    etcd_become_active(store);
}

/* Of a new log, or of one of a release that had none. */
static void etcd_draw_secret(etcd_store *store)
{
    cm_random_bytes(store->past.secret, sizeof(store->past.secret));
    store->past.has_secret = true;
    store->past.serial++;
    co_etcd_log_write(store->client, &store->keys, store->term, &store->past, NULL, etcd_call_ms(store),
                      etcd_made, store);
}

static void etcd_make_log(etcd_store *store)
{
    cm_info("store: a new log under %s", store->keys.prefix);
    do {
        store->past.cluster = cm_random_u64();
    } while (store->past.cluster == 0);
    store->past.next_member_id = 1;
    store->past.next_number = 1;
    etcd_draw_secret(store);
}

static void etcd_have_read(void *ctx, cm_status status, const void *reply, const char *text)
{
    etcd_store *store = ctx;
    cm_error err = {0};
    const Etcdserverpb__TxnResponse *txn = reply;
    if (etcd_gave_up(store, status, text)) {
        return;
    }
    if (!txn->succeeded) {
        etcd_stand_by(store, "", "another coordinator was faster");
        return;
    }
    if (co_etcd_log_take(&store->keys, txn, &store->past, &err) != CM_OK) {
        etcd_fail(store, &err);
    } else if (store->past.cluster == 0) {
        etcd_make_log(store);
    } else if (!store->past.has_secret) {
        etcd_draw_secret(store);
    } else {
        etcd_become_active(store);
    }
}

static void etcd_claimed(void *ctx, cm_status status, const void *reply, const char *text)
{
    etcd_store *store = ctx;
    if (etcd_gave_up(store, status, text)) {
        return;
    }
    const Etcdserverpb__KeyValue *leader = co_etcd_log_leader(reply);
    const Etcdserverpb__TxnResponse *txn = reply;
    if (txn->succeeded && txn->header != NULL) {
        store->term = txn->header->revision;
    } else if (leader != NULL && leader->lease == store->lease) {
        store->term = leader->create_revision; /* an attempt whose answer was lost */
    } else {
        etcd_stand_by(store, "", "another coordinator was faster");
        return;
    }
    co_etcd_log_read(store->client, &store->keys, store->term, etcd_call_ms(store), etcd_have_read, store);
}

static void etcd_granted(void *ctx, cm_status status, const void *reply, const char *text)
{
    etcd_store *store = ctx;
    const Etcdserverpb__LeaseGrantResponse *grant = reply;
    if (etcd_gave_up(store, status, text)) {
        return;
    }
    store->lease = grant->id;
    store->ttl_ms = grant->ttl > 0 ? (uint64_t)grant->ttl * 1000 : 0;
    co_etcd_log_claim(store->client, &store->keys, store->lease, store->address, store->host,
                      etcd_call_ms(store), etcd_claimed, store);
}

static void etcd_claim(etcd_store *store)
{
    Etcdserverpb__LeaseGrantRequest request = ETCDSERVERPB__LEASE_GRANT_REQUEST__INIT;
    request.has_ttl = true;
    request.ttl = (int64_t)((store->lease_ms + 999) / 1000);
    store->state = ETCD_CLAIMING;
    store->asked_ms = cm_now_ms();
    co_etcd_call(store->client, "/etcdserverpb.Lease/LeaseGrant", &request.base,
                 &etcdserverpb__lease_grant_response__descriptor, etcd_call_ms(store), etcd_granted, store);
}

/* ---- watching ---- */

static void etcd_looked(void *ctx, cm_status status, const void *reply, const char *text)
{
    etcd_store *store = ctx;
    char address[PC_ADDRESS_BYTES], who[300], why[416];
    if (etcd_gave_up(store, status, text)) {
        return;
    }
    const Etcdserverpb__RangeResponse *range = reply;
    if (range->n_kvs == 0) {
        etcd_claim(store);
        return;
    }
    co_etcd_log_leader_name(range->kvs[0], address, who);
    snprintf(why, sizeof(why), "standing by, %s is active", who);
    etcd_stand_by(store, address, why);
}

static void etcd_revoked(void *ctx, cm_status status, const void *reply, const char *text)
{
    etcd_store *store = ctx;
    (void)reply;
    if (status == CM_E_UNAVAILABLE) {
        etcd_gave_up(store, status, text);
        return;
    }
    store->lease = 0; /* or etcd had forgotten it */
    etcd_look(store);
}

static void etcd_revoke(etcd_store *store, co_etcd_fn fn)
{
    Etcdserverpb__LeaseRevokeRequest request = ETCDSERVERPB__LEASE_REVOKE_REQUEST__INIT;
    request.has_id = true;
    request.id = store->lease;
    co_etcd_call(store->client, "/etcdserverpb.Lease/LeaseRevoke", &request.base,
                 &etcdserverpb__lease_revoke_response__descriptor, etcd_call_ms(store), fn, store);
}

static void etcd_look(void *arg)
{
    etcd_store *store = arg;
    if (store->lease != 0) {
        etcd_revoke(store, etcd_revoked);
        return;
    }
    co_etcd_log_look(store->client, &store->keys, etcd_call_ms(store), etcd_looked, store);
}

/* ---- active: the lease ---- */

static void etcd_kept(void *ctx, cm_status status, const void *reply, const char *text)
{
    etcd_store *store = ctx;
    const Etcdserverpb__LeaseKeepAliveResponse *answer = reply;
    uint64_t now_ms = cm_now_ms();
    if (status != CM_OK) {
        if (store->trouble[0] == 0) {
            cm_warn("cannot renew the claim to be the active coordinator: %s; trying on for %" PRIu64 " ms",
                    text, store->until_ms > now_ms ? store->until_ms - now_ms : 0);
        }
        snprintf(store->trouble, sizeof(store->trouble), "%s", text);
        pc_timer_set(store->turn, ETCD_AGAIN_MS);
        return;
    }
    if (answer->ttl <= 0) {
        etcd_stand_by(store, "", "not active any more: etcd has ended the lease");
        return;
    }
    if (now_ms >= store->until_ms) {
        return; /* decisions were dropped meanwhile: the expiry timer ends it */
    }
    store->trouble[0] = 0;
    store->ttl_ms = (uint64_t)answer->ttl * 1000;
    store->until_ms = etcd_claim_end(store);
    pc_timer_set(store->expiry, store->until_ms > now_ms ? store->until_ms - now_ms : 0);
    pc_timer_set(store->turn,
                 store->ttl_ms / 3 < ETCD_REFRESH_MS_MAX ? store->ttl_ms / 3 : ETCD_REFRESH_MS_MAX);
}

static void etcd_keep_alive(etcd_store *store)
{
    Etcdserverpb__LeaseKeepAliveRequest request = ETCDSERVERPB__LEASE_KEEP_ALIVE_REQUEST__INIT;
    request.has_id = true;
    request.id = store->lease;
    store->asked_ms = cm_now_ms();
    co_etcd_call(store->client, "/etcdserverpb.Lease/LeaseKeepAlive", &request.base,
                 &etcdserverpb__lease_keep_alive_response__descriptor, etcd_call_ms(store), etcd_kept, store);
}

static void etcd_expired(void *arg)
{
    etcd_store *store = arg;
    char why[480];
    snprintf(why, sizeof(why), "not active any more: the claim could not be renewed in time: %.400s",
             store->trouble[0] != 0 ? store->trouble : co_etcd_endpoint(store->client));
    etcd_rest(store);
    etcd_tell(store, "", true, why);
}

static void etcd_turn(void *arg)
{
    etcd_store *store = arg;
    if (store->state == ETCD_ACTIVE) {
        etcd_keep_alive(store);
    } else {
        etcd_look(store);
    }
}

/* ---- active: writes ---- */

static void etcd_write_done(etcd_store *store, cm_status status, const char *text)
{
    etcd_write *write = STAILQ_FIRST(&store->writes);
    uint64_t ticket = write->ticket;
    STAILQ_REMOVE_HEAD(&store->writes, link);
    store->n_writes--;
    co_epoch_release(write->epoch);
    cm_free(write);
    etcd_write_next(store);
    store->events.written(store->ctx, ticket, status, text);
}

/* The guard did not hold. Why not: our earlier attempt went through, we are not active, or someone wrote
 * without being it. */
static void etcd_write_missed(etcd_store *store, const Etcdserverpb__TxnResponse *txn)
{
    char address[PC_ADDRESS_BYTES], who[300], why[416];
    const Etcdserverpb__KeyValue *leader = co_etcd_log_leader(txn);
    if (leader == NULL) {
        etcd_stand_by(store, "", "not active any more: etcd has ended the lease");
    } else if (leader->create_revision != store->term) {
        co_etcd_log_leader_name(leader, address, who);
        snprintf(why, sizeof(why), "not active any more: %s is", who);
        etcd_stand_by(store, address, why);
    } else if (co_etcd_log_is_ours(txn, store->term, &store->past)) {
        etcd_write_done(store, CM_OK, "");
    } else {
        etcd_stand_by(store, "", "somebody else wrote the log: reading it again");
    }
}

static void etcd_written(void *ctx, cm_status status, const void *reply, const char *text)
{
    etcd_store *store = ctx;
    const Etcdserverpb__TxnResponse *txn = reply;
    if (status == CM_E_UNAVAILABLE) {
        cm_debug("a write of the log has no answer: %s", text);
        pc_timer_set(store->again, ETCD_AGAIN_MS);
    } else if (status != CM_OK) {
        etcd_write_done(store, CM_E_IO, text);
    } else if (txn->succeeded && txn->header != NULL) {
        store->past.head_revision = txn->header->revision;
        etcd_write_done(store, CM_OK, "");
    } else {
        etcd_write_missed(store, txn);
    }
}

static void etcd_write_attempt(void *arg)
{
    etcd_store *store = arg;
    const etcd_write *write = STAILQ_FIRST(&store->writes);
    co_etcd_log_write(store->client, &store->keys, store->term, &store->past, write->epoch,
                      etcd_call_ms(store), etcd_written, store);
}

/* The serial is the write's, not the attempt's: that is how an attempt that went through is known. */
static void etcd_write_next(etcd_store *store)
{
    const etcd_write *write = STAILQ_FIRST(&store->writes);
    if (write != NULL) {
        store->past.next_member_id = write->next_member_id;
        store->past.next_number = write->next_number;
        store->past.drains = write->drains;
        store->past.serial++;
        etcd_write_attempt(store);
    }
}

/* ---- the table ---- */

static bool etcd_is_active(const co_store *base)
{
    const etcd_store *store = (const etcd_store *)base;
    return store->state == ETCD_ACTIVE && cm_now_ms() < store->until_ms;
}

static cm_status etcd_write_add(co_store *base, uint64_t ticket, uint32_t next_member_id,
                                uint64_t next_number, const co_drains *drains, co_epoch *epoch)
{
    etcd_store *store = (etcd_store *)base;
    if (store->state != ETCD_ACTIVE) {
        return CM_E_UNAVAILABLE;
    }
    if (store->n_writes == store->n_writes_max) {
        return CM_E_CAPACITY;
    }
    etcd_write *write = cm_alloc(sizeof(*write));
    *write = (etcd_write){
        .ticket = ticket, .next_member_id = next_member_id, .next_number = next_number, .drains = *drains};
    write->epoch = epoch != NULL ? co_epoch_hold(epoch) : NULL;
    STAILQ_INSERT_TAIL(&store->writes, write, link);
    if (store->n_writes++ == 0) {
        etcd_write_next(store);
    }
    return CM_OK;
}

/* A wildcard is of no use to a member on another machine. */
static void etcd_take_address(etcd_store *store, const char *address)
{
    if (strncmp(address, "0.0.0.0:", 8) != 0) {
        snprintf(store->address, sizeof(store->address), "%s", address);
    }
    gethostname(store->host, sizeof(store->host) - 1);
}

static cm_status etcd_open(pc_loop *loop, const co_store_options *options, const co_store_events *events,
                           void *ctx, co_store **store_out, cm_error *err)
{
    pc_addresses endpoints;
    co_etcd_keys keys;
    CM_TRY(co_etcd_log_url(options->url, &endpoints, &keys, err));
    etcd_store *store = cm_alloc(sizeof(*store));
    *store = (etcd_store){.base.ops = &co_store_etcd_ops, .loop = loop, .events = *events, .ctx = ctx};
    store->keys = keys;
    store->lease_ms = options->lease_ms;
    store->n_writes_max = options->n_queued_max;
    STAILQ_INIT(&store->writes);
    etcd_take_address(store, options->address);
    store->client = co_etcd_create(loop, &endpoints);
    store->turn = pc_timer_create(loop, etcd_turn, store);
    store->expiry = pc_timer_create(loop, etcd_expired, store);
    store->again = pc_timer_create(loop, etcd_write_attempt, store);
    *store_out = &store->base;
    etcd_look(store);
    return CM_OK;
}

static void etcd_stopped(void *ctx, cm_status status, const void *reply, const char *text)
{
    etcd_store *store = ctx;
    (void)status; /* without it the lease ends by itself, later */
    (void)reply;
    (void)text;
    store->stopped(store->stopped_arg);
}

static void etcd_stop(co_store *base, pc_fn done, void *arg)
{
    etcd_store *store = (etcd_store *)base;
    co_etcd_forget(store->client);
    pc_timer_clear(store->turn);
    pc_timer_clear(store->expiry);
    pc_timer_clear(store->again);
    store->state = ETCD_OVER;
    if (store->lease == 0) {
        done(arg);
        return;
    }
    store->stopped = done;
    store->stopped_arg = arg;
    etcd_revoke(store, etcd_stopped);
}

static void etcd_close(co_store *base)
{
    etcd_store *store = (etcd_store *)base;
    co_etcd_destroy(store->client);
    pc_timer_destroy(store->turn);
    pc_timer_destroy(store->expiry);
    pc_timer_destroy(store->again);
    etcd_drop_writes(store);
    co_epoch_release(store->past.epoch);
    cm_free(store);
}

const co_store_ops co_store_etcd_ops = {.scheme = "etcd",
                                        .open = etcd_open,
                                        .is_active = etcd_is_active,
                                        .write = etcd_write_add,
                                        .stop = etcd_stop,
                                        .close = etcd_close};
