#include "tests/sim/etcd.h"

#include <string.h>

#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "common/base/rng.h"
#include "coordinator/epoch.h"
#include "coordinator/etcd.h"
#include "proto/etcd.pb-c.h"
#include "proto/pack.h"

enum { ETCD_LATENCY_MAX_US = 400, ETCD_ARENA_BYTES = 4 << 20 };

typedef struct etcd_lease {
    LIST_ENTRY(etcd_lease) link;
    int64_t id;
    uint64_t ttl_us, until_us;
} etcd_lease;

typedef struct etcd_key {
    LIST_ENTRY(etcd_key) link;
    cm_bytes name, value;
    int64_t created, changed, lease;
} etcd_key;

struct pc_timer {
    LIST_ENTRY(pc_timer) link;
    sim_proc *proc;
    pc_fn fn;
    void *arg;
    uint64_t setting; /* counts them; 0: destroyed */
    bool set;
};

struct co_etcd {
    LIST_ENTRY(co_etcd) link;
    sim_proc *proc;
    uint64_t wanted; /* calls before that number are of no interest any more */
    uint64_t n_call;
};

/* One call. */
typedef struct etcd_call {
    LIST_ENTRY(etcd_call) link;
    co_etcd *client;
    uint64_t number;
    char method[16];
    cm_bytes request, reply;
    const ProtobufCMessageDescriptor *reply_kind;
    co_etcd_fn fn;
    void *ctx;
    bool answered;
} etcd_call;

typedef struct sim_etcd {
    sim *world;
    int64_t revision;
    LIST_HEAD(, etcd_lease) leases;
    LIST_HEAD(, etcd_key) keys;
    /* all there ever were: events may be under way */
    LIST_HEAD(, pc_timer) timers;
    LIST_HEAD(, co_etcd) clients;
    LIST_HEAD(, etcd_call) calls;
    cm_arena arena;
} sim_etcd;

static sim_etcd g_etcd; /* of the run under way: the store's time and chance have no argument */

/* ---- what the store takes from the system ---- */

uint64_t sim_store_ms(void)
{
    return sim_ms(g_etcd.world);
}

uint64_t sim_store_u64(void)
{
    return sim_draw(g_etcd.world, SIM_TIMES);
}

void sim_store_random(void *out, unsigned long n_bytes)
{
    memset(out, (int)sim_below(g_etcd.world, SIM_TIMES, 256), n_bytes);
}

pid_t sim_store_pid(void)
{
    return 1;
}

int sim_store_host(char *name, size_t n)
{
    snprintf(name, n, "sim");
    return 0;
}

/* ---- timers ---- */

pc_timer *pc_timer_create(pc_loop *loop, pc_fn fn, void *arg)
{
    pc_timer *timer = cm_alloc(sizeof(*timer));
    *timer = (pc_timer){.proc = (sim_proc *)loop, .fn = fn, .arg = arg, .setting = 1};
    LIST_INSERT_HEAD(&g_etcd.timers, timer, link);
    return timer;
}

static void timer_fires(sim *s, void *arg, uint64_t setting)
{
    pc_timer *timer = arg;
    if (!timer->set || timer->setting != setting || !timer->proc->alive ||
        sim_put_off(s, timer->proc, timer_fires, arg, setting)) {
        return;
    }
    timer->set = false;
    timer->fn(timer->arg);
    sim_go(s, timer->proc);
}

void pc_timer_set(pc_timer *timer, uint64_t after_ms)
{
    timer->set = true;
    sim_at(g_etcd.world, g_etcd.world->now_us + after_ms * SIM_MS, timer_fires, timer, ++timer->setting);
}

void pc_timer_clear(pc_timer *timer)
{
    timer->set = false;
}

void pc_timer_destroy(pc_timer *timer)
{
    if (timer != NULL) {
        timer->set = false;
    }
}

/* ---- keys and leases ---- */

static void key_free(etcd_key *key)
{
    LIST_REMOVE(key, link);
    cm_bytes_fini(&key->name);
    cm_bytes_fini(&key->value);
    cm_free(key);
}

static bool name_is(const etcd_key *key, ProtobufCBinaryData name)
{
    return key->name.len == name.len && memcmp(key->name.data, name.data, name.len) == 0;
}

static etcd_key *key_find(ProtobufCBinaryData name)
{
    etcd_key *key;
    LIST_FOREACH (key, &g_etcd.keys, link) {
        if (name_is(key, name)) {
            return key;
        }
    }
    return NULL;
}

static etcd_lease *lease_find(int64_t id)
{
    etcd_lease *lease;
    LIST_FOREACH (lease, &g_etcd.leases, link) {
        if (lease->id == id) {
            return lease;
        }
    }
    return NULL;
}

static void lease_end(etcd_lease *lease)
{
    etcd_key *key, *after;
    for (key = LIST_FIRST(&g_etcd.keys); key != NULL; key = after) {
        after = LIST_NEXT(key, link);
        if (key->lease == lease->id) {
            key_free(key);
            g_etcd.revision++;
        }
    }
    LIST_REMOVE(lease, link);
    cm_free(lease);
}

static void leases_expire(const sim *s)
{
    etcd_lease *lease, *after;
    for (lease = LIST_FIRST(&g_etcd.leases); lease != NULL; lease = after) {
        after = LIST_NEXT(lease, link);
        if (s->now_us >= lease->until_us) {
            lease_end(lease);
        }
    }
}

/* ---- one request ---- */

static void *take(size_t n_bytes)
{
    return cm_arena_take(&g_etcd.arena, n_bytes);
}

static Etcdserverpb__ResponseHeader *header(void)
{
    Etcdserverpb__ResponseHeader *out = take(sizeof(*out));
    etcdserverpb__response_header__init(out);
    out->has_revision = true;
    out->revision = g_etcd.revision;
    return out;
}

static int name_order(const etcd_key *a, const etcd_key *b)
{
    size_t n = a->name.len < b->name.len ? a->name.len : b->name.len;
    int order = memcmp(a->name.data, b->name.data, n);
    return order != 0 ? order : (a->name.len > b->name.len) - (a->name.len < b->name.len);
}

static bool in_range(const etcd_key *key, ProtobufCBinaryData first, bool has_end, ProtobufCBinaryData end)
{
    etcd_key low = {.name = {.data = first.data, .len = first.len}};
    etcd_key high = {.name = {.data = end.data, .len = end.len}};
    return has_end ? name_order(key, &low) >= 0 && name_order(key, &high) < 0 : name_is(key, first);
}

/* The log asks for one key, or for the last of a range. */
static Etcdserverpb__RangeResponse *do_range(const Etcdserverpb__RangeRequest *request)
{
    Etcdserverpb__RangeResponse *out = take(sizeof(*out));
    const etcd_key *key, *last = NULL;
    etcdserverpb__range_response__init(out);
    out->header = header();
    LIST_FOREACH (key, &g_etcd.keys, link) {
        if (in_range(key, request->key, request->has_range_end, request->range_end) &&
            (last == NULL || name_order(key, last) > 0)) {
            last = key;
        }
    }
    if (last != NULL) {
        Etcdserverpb__KeyValue *kv = take(sizeof(*kv));
        etcdserverpb__key_value__init(kv);
        kv->has_key = kv->has_value = kv->has_create_revision = kv->has_mod_revision = kv->has_lease = true;
        kv->key = (ProtobufCBinaryData){.len = last->name.len, .data = last->name.data};
        kv->value = (ProtobufCBinaryData){.len = last->value.len, .data = last->value.data};
        kv->create_revision = last->created;
        kv->mod_revision = last->changed;
        kv->lease = last->lease;
        out->n_kvs = 1;
        out->kvs = take(sizeof(void *));
        out->kvs[0] = kv;
    }
    return out;
}

/* An epoch that is written is one for good. */
static void check_put(sim *s, const Etcdserverpb__PutRequest *put)
{
    static const char epochs[] = "/sim/epochs/";
    co_epoch *epoch = NULL;
    cm_error err = {0};
    if (put->key.len < sizeof(epochs) || memcmp(put->key.data, epochs, sizeof(epochs) - 1) != 0) {
        return;
    }
    if (co_epoch_unpack(put->value.data, put->value.len, &epoch, &err) != CM_OK) {
        sim_fail(s, "what is written is no epoch: %s", err.text);
    }
    sim_check_stored(s, epoch->message->cluster, epoch->number, put->value.data, put->value.len,
                     epoch->placement);
    co_epoch_release(epoch);
}

static void do_put(sim *s, const Etcdserverpb__PutRequest *put)
{
    etcd_key *key = key_find(put->key);
    check_put(s, put);
    if (key == NULL) {
        key = cm_alloc(sizeof(*key));
        cm_bytes_init(&key->name, 0);
        cm_bytes_init(&key->value, 0);
        cm_bytes_append(&key->name, put->key.data, put->key.len);
        key->created = g_etcd.revision;
        LIST_INSERT_HEAD(&g_etcd.keys, key, link);
    }
    cm_bytes_clear(&key->value);
    cm_bytes_append(&key->value, put->value.data, put->value.len);
    key->changed = g_etcd.revision;
    key->lease = put->has_lease ? put->lease : 0;
}

static void do_delete(const Etcdserverpb__DeleteRangeRequest *request)
{
    etcd_key *key, *after;
    for (key = LIST_FIRST(&g_etcd.keys); key != NULL; key = after) {
        after = LIST_NEXT(key, link);
        if (in_range(key, request->key, request->has_range_end, request->range_end)) {
            key_free(key);
        }
    }
}

static bool compare_holds(const Etcdserverpb__Compare *compare)
{
    const etcd_key *key = key_find(compare->key);
    bool created = compare->target == ETCDSERVERPB__COMPARE__COMPARE_TARGET__CREATE;
    CM_ASSERT(compare->result == ETCDSERVERPB__COMPARE__COMPARE_RESULT__EQUAL &&
              (created || compare->target == ETCDSERVERPB__COMPARE__COMPARE_TARGET__MOD));
    int64_t is = key == NULL ? 0 : created ? key->created : key->changed;
    return is == (created ? compare->create_revision : compare->mod_revision);
}

static Etcdserverpb__ResponseOp *do_op(sim *s, const Etcdserverpb__RequestOp *op)
{
    Etcdserverpb__ResponseOp *out = take(sizeof(*out));
    etcdserverpb__response_op__init(out);
    if (op->request_case == ETCDSERVERPB__REQUEST_OP__REQUEST_REQUEST_RANGE) {
        out->response_case = ETCDSERVERPB__RESPONSE_OP__RESPONSE_RESPONSE_RANGE;
        out->response_range = do_range(op->request_range);
    } else if (op->request_case == ETCDSERVERPB__REQUEST_OP__REQUEST_REQUEST_PUT) {
        do_put(s, op->request_put);
    } else {
        do_delete(op->request_delete_range);
    }
    return out;
}

/* A lease that has ended takes no key. */
static bool leases_are_there(const Etcdserverpb__TxnRequest *txn)
{
    for (size_t i = 0; i < txn->n_success; i++) {
        const Etcdserverpb__RequestOp *op = txn->success[i];
        if (op->request_case == ETCDSERVERPB__REQUEST_OP__REQUEST_REQUEST_PUT && op->request_put->has_lease &&
            lease_find(op->request_put->lease) == NULL) {
            return false;
        }
    }
    return true;
}

static ProtobufCMessage *do_txn(sim *s, const Etcdserverpb__TxnRequest *txn)
{
    Etcdserverpb__TxnResponse *out = take(sizeof(*out));
    etcdserverpb__txn_response__init(out);
    out->has_succeeded = out->succeeded = true;
    for (size_t i = 0; i < txn->n_compare; i++) {
        out->succeeded = out->succeeded && compare_holds(txn->compare[i]);
    }
    if (out->succeeded && !leases_are_there(txn)) {
        return NULL;
    }
    bool puts = out->succeeded && txn->n_success > 0 &&
                txn->success[0]->request_case == ETCDSERVERPB__REQUEST_OP__REQUEST_REQUEST_PUT;
    g_etcd.revision += puts;
    out->n_responses = out->succeeded ? txn->n_success : txn->n_failure;
    out->responses = take(sizeof(void *) * out->n_responses);
    for (size_t i = 0; i < out->n_responses; i++) {
        out->responses[i] = do_op(s, out->succeeded ? txn->success[i] : txn->failure[i]);
    }
    out->header = header();
    return &out->base;
}

static ProtobufCMessage *do_grant(const sim *s, const Etcdserverpb__LeaseGrantRequest *request)
{
    Etcdserverpb__LeaseGrantResponse *out = take(sizeof(*out));
    etcd_lease *lease = cm_alloc(sizeof(*lease));
    lease->id = ++g_etcd.revision;
    lease->ttl_us = (uint64_t)request->ttl * 1000 * SIM_MS;
    lease->until_us = s->now_us + lease->ttl_us;
    LIST_INSERT_HEAD(&g_etcd.leases, lease, link);
    etcdserverpb__lease_grant_response__init(out);
    out->has_id = out->has_ttl = true;
    out->id = lease->id;
    out->ttl = request->ttl;
    return &out->base;
}

static ProtobufCMessage *do_keep_alive(const sim *s, const Etcdserverpb__LeaseKeepAliveRequest *request)
{
    Etcdserverpb__LeaseKeepAliveResponse *out = take(sizeof(*out));
    etcd_lease *lease = lease_find(request->id);
    etcdserverpb__lease_keep_alive_response__init(out);
    if (lease != NULL) {
        lease->until_us = s->now_us + lease->ttl_us;
        out->has_ttl = true;
        out->ttl = (int64_t)(lease->ttl_us / (1000 * SIM_MS));
    }
    return &out->base;
}

static ProtobufCMessage *do_revoke(const Etcdserverpb__LeaseRevokeRequest *request)
{
    Etcdserverpb__LeaseRevokeResponse *out = take(sizeof(*out));
    etcd_lease *lease = lease_find(request->id);
    if (lease == NULL) {
        return NULL;
    }
    lease_end(lease);
    etcdserverpb__lease_revoke_response__init(out);
    return &out->base;
}

/* NULL: it says no, and nothing was done. In the arena. */
static ProtobufCMessage *etcd_do(sim *s, const etcd_call *call)
{
    static const struct {
        const char *method;
        const ProtobufCMessageDescriptor *descriptor;
    } methods[] = {{"Range", &etcdserverpb__range_request__descriptor},
                   {"Txn", &etcdserverpb__txn_request__descriptor},
                   {"LeaseGrant", &etcdserverpb__lease_grant_request__descriptor},
                   {"LeaseKeepAlive", &etcdserverpb__lease_keep_alive_request__descriptor},
                   {"LeaseRevoke", &etcdserverpb__lease_revoke_request__descriptor}};
    ProtobufCMessage *request = NULL;
    size_t i = 0;
    while (strcmp(methods[i].method, call->method) != 0) {
        i++;
        CM_ASSERT_MSG(i < sizeof(methods) / sizeof(methods[0]), "%s", call->method);
    }
    cm_arena_reset(&g_etcd.arena);
    if (pr_unpack(methods[i].descriptor, call->request.data, call->request.len, &g_etcd.arena, &request) !=
        CM_OK) {
        sim_fail(s, "etcd cannot read a %s", call->method);
    }
    leases_expire(s);
    switch (i) {
    case 0:
        return &do_range((const Etcdserverpb__RangeRequest *)request)->base;
    case 1:
        return do_txn(s, (const Etcdserverpb__TxnRequest *)request);
    case 2:
        return do_grant(s, (const Etcdserverpb__LeaseGrantRequest *)request);
    case 3:
        return do_keep_alive(s, (const Etcdserverpb__LeaseKeepAliveRequest *)request);
    default:
        return do_revoke((const Etcdserverpb__LeaseRevokeRequest *)request);
    }
}

/* ---- calls: there and back ---- */

static bool call_is_wanted(const etcd_call *call)
{
    return !call->answered && call->number >= call->client->wanted && call->client->proc->alive;
}

static void call_answer(sim *s, etcd_call *call, cm_status status)
{
    ProtobufCMessage *reply = NULL;
    if (!call_is_wanted(call)) {
        return;
    }
    call->answered = true;
    cm_arena arena;
    cm_arena_init(&arena, "sim etcd", 16 << 10, ETCD_ARENA_BYTES);
    if (status == CM_OK &&
        pr_unpack(call->reply_kind, call->reply.data, call->reply.len, &arena, &reply) != CM_OK) {
        sim_fail(s, "an answer of etcd to a %s cannot be read", call->method);
    }
    if (status != CM_OK) {
        sim_trace(s, call->client->proc, "%s: %s", call->method, cm_status_text(status));
    }
    call->fn(call->ctx, status, reply, status == CM_OK ? "" : "etcd does not answer");
    sim_go(s, call->client->proc);
    cm_arena_fini(&arena);
}

static void call_returns(sim *s, void *arg, uint64_t refused)
{
    etcd_call *call = arg;
    const sim_proc *proc = call->client->proc;
    if (s->now_us >= s->hosts[proc->host].store_cut_until_us &&
        !sim_put_off(s, proc, call_returns, arg, refused)) {
        call_answer(s, call, refused != 0 ? CM_E_REFUSED : CM_OK);
    }
}

static void call_arrives(sim *s, void *arg, uint64_t tag)
{
    etcd_call *call = arg;
    (void)tag;
    if (s->now_us < s->hosts[call->client->proc->host].store_cut_until_us ||
        sim_strikes(s, SIM_FAULT_disk_fails)) {
        return;
    }
    const ProtobufCMessage *reply = etcd_do(s, call);
    if (reply != NULL) {
        pr_pack(reply, &call->reply);
    }
    if (!sim_strikes(s, SIM_FAULT_disk_unsure)) {
        sim_at(s, s->now_us + sim_between(s, SIM_TIMES, 20, ETCD_LATENCY_MAX_US), call_returns, call,
               reply == NULL);
    }
}

static void call_expires(sim *s, void *arg, uint64_t tag)
{
    etcd_call *call = arg;
    if (!sim_put_off(s, call->client->proc, call_expires, arg, tag)) {
        call_answer(s, call, CM_E_UNAVAILABLE);
    }
}

co_etcd *co_etcd_create(pc_loop *loop, const pc_addresses *endpoints)
{
    co_etcd *client = cm_alloc(sizeof(*client));
    (void)endpoints;
    client->proc = (sim_proc *)loop;
    LIST_INSERT_HEAD(&g_etcd.clients, client, link);
    return client;
}

void co_etcd_destroy(co_etcd *etcd)
{
    co_etcd_forget(etcd);
}

void co_etcd_forget(co_etcd *etcd)
{
    etcd->wanted = etcd->n_call + 1;
}

const char *co_etcd_endpoint(const co_etcd *etcd)
{
    (void)etcd;
    return "etcd";
}

/* It arrives even when its caller has given up or died. */
void co_etcd_call(co_etcd *etcd, const char *path, const ProtobufCMessage *request,
                  const ProtobufCMessageDescriptor *reply, uint64_t deadline_ms, co_etcd_fn fn, void *ctx)
{
    sim *s = g_etcd.world;
    etcd_call *call = cm_alloc(sizeof(*call));
    *call = (etcd_call){.client = etcd, .number = ++etcd->n_call, .reply_kind = reply, .fn = fn, .ctx = ctx};
    snprintf(call->method, sizeof(call->method), "%s", strrchr(path, '/') + 1);
    cm_bytes_init(&call->request, 0);
    cm_bytes_init(&call->reply, 0);
    pr_pack(request, &call->request);
    LIST_INSERT_HEAD(&g_etcd.calls, call, link);
    uint64_t us = sim_between(s, SIM_TIMES, 20, ETCD_LATENCY_MAX_US);
    us += strcmp(call->method, "Txn") == 0 ? sim_below(s, SIM_TIMES, s->shape.disk_ms * 1000) : 0;
    us += sim_strikes(s, SIM_FAULT_disk_slow) ? sim_between(s, SIM_TIMES, 100, 6000) * SIM_MS : 0;
    sim_at(s, s->now_us + us, call_arrives, call, 0);
    sim_at(s, s->now_us + deadline_ms * SIM_MS, call_expires, call, 0);
}

/* ---- the whole ---- */

void sim_etcd_start(sim *s)
{
    memset(&g_etcd, 0, sizeof(g_etcd)); /* of a run that failed something may be left: as it is */
    g_etcd.world = s;
    g_etcd.revision = 1;
    cm_arena_init(&g_etcd.arena, "sim etcd", 64 << 10, ETCD_ARENA_BYTES);
}

void sim_etcd_fini(sim *s)
{
    pc_timer *timer;
    co_etcd *client;
    etcd_call *call;
    (void)s;
    while (!LIST_EMPTY(&g_etcd.leases)) {
        lease_end(LIST_FIRST(&g_etcd.leases));
    }
    while (!LIST_EMPTY(&g_etcd.keys)) {
        key_free(LIST_FIRST(&g_etcd.keys));
    }
    while ((timer = LIST_FIRST(&g_etcd.timers)) != NULL) {
        LIST_REMOVE(timer, link);
        cm_free(timer);
    }
    while ((client = LIST_FIRST(&g_etcd.clients)) != NULL) {
        LIST_REMOVE(client, link);
        cm_free(client);
    }
    while ((call = LIST_FIRST(&g_etcd.calls)) != NULL) {
        LIST_REMOVE(call, link);
        cm_bytes_fini(&call->request);
        cm_bytes_fini(&call->reply);
        cm_free(call);
    }
    cm_arena_fini(&g_etcd.arena);
}
