#include "coordinator/etcd_log.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "proto/log.pb-c.h"
#include "proto/pack.h"

enum {
    LOG_VERSION = 1,
    LOG_EPOCHS_MAX = 100, /* older ones are of no use to anybody */
    LOG_OPS_MAX = 3,
    LOG_ARENA_BYTES = 4096,
};

#define ETCD_KV "/etcdserverpb.KV/"

/* ---- keys and the URL ---- */

typedef struct log_key {
    char text[CO_ETCD_KEY_BYTES];
} log_key;

static ProtobufCBinaryData bytes_of(const char *text)
{
    return (ProtobufCBinaryData){.len = strlen(text), .data = (uint8_t *)(uintptr_t)text}; /* only read */
}

static log_key key_of(const co_etcd_keys *keys, const char *name)
{
    log_key key;
    snprintf(key.text, sizeof(key.text), "%s/%s", keys->prefix, name);
    return key;
}

/* So many digits that the order of the keys is that of the numbers. */
static log_key key_of_epoch(const co_etcd_keys *keys, uint64_t number)
{
    log_key key;
    snprintf(key.text, sizeof(key.text), "%s/epochs/%020" PRIu64, keys->prefix, number);
    return key;
}

cm_status co_etcd_log_url(const char *url, pc_addresses *endpoints_out, co_etcd_keys *keys_out, cm_error *err)
{
    char list[PC_ADDRESSES_MAX * PC_ADDRESS_BYTES];
    const char *at = url + strlen("etcd://");
    size_t n_list = strcspn(at, "/"), n_prefix = strlen(at + n_list);
    if (n_list >= sizeof(list)) {
        return cm_error_set(err, CM_E_CONFIG, "store", "store: more than %zu bytes of addresses",
                            sizeof(list));
    }
    while (n_prefix > 0 && at[n_list + n_prefix - 1] == '/') {
        n_prefix--;
    }
    if (n_prefix < 2 || n_prefix >= CO_ETCD_PREFIX_BYTES) {
        return cm_error_set(err, CM_E_CONFIG, "store",
                            "store: '%.200s' must end in a prefix for this cluster's keys, of less than %d "
                            "bytes: etcd://HOST:PORT/baleen",
                            url, (int)CO_ETCD_PREFIX_BYTES);
    }
    snprintf(list, sizeof(list), "%.*s", (int)n_list, at);
    CM_TRY(pc_addresses_parse("store", list, endpoints_out, err));
    snprintf(keys_out->prefix, sizeof(keys_out->prefix), "%.*s", (int)n_prefix, at + n_list);
    return CM_OK;
}

/* ---- requests ---- */

typedef struct log_range {
    Etcdserverpb__RangeRequest range;
    Etcdserverpb__RequestOp op;
} log_range;

static void range_init(log_range *range, const log_key *key)
{
    etcdserverpb__range_request__init(&range->range);
    range->range.has_key = true;
    range->range.key = bytes_of(key->text);
    etcdserverpb__request_op__init(&range->op);
    range->op.request_case = ETCDSERVERPB__REQUEST_OP__REQUEST_REQUEST_RANGE;
    range->op.request_range = &range->range;
}

typedef struct log_put {
    Etcdserverpb__PutRequest put;
    Etcdserverpb__RequestOp op;
} log_put;

static void put_init(log_put *put, const log_key *key, const cm_bytes *value)
{
    etcdserverpb__put_request__init(&put->put);
    put->put.has_key = put->put.has_value = true;
    put->put.key = bytes_of(key->text);
    put->put.value = (ProtobufCBinaryData){.len = value->len, .data = value->data};
    etcdserverpb__request_op__init(&put->op);
    put->op.request_case = ETCDSERVERPB__REQUEST_OP__REQUEST_REQUEST_PUT;
    put->op.request_put = &put->put;
}

/* The key was made, or last changed, at that revision; 0: there is none. */
static void compare_init(Etcdserverpb__Compare *compare, const log_key *key, bool created, int64_t revision)
{
    etcdserverpb__compare__init(compare);
    compare->has_result = compare->has_target = compare->has_key = true;
    compare->result = ETCDSERVERPB__COMPARE__COMPARE_RESULT__EQUAL;
    compare->key = bytes_of(key->text);
    if (created) {
        compare->target = ETCDSERVERPB__COMPARE__COMPARE_TARGET__CREATE;
        compare->target_union_case = ETCDSERVERPB__COMPARE__TARGET_UNION_CREATE_REVISION;
        compare->create_revision = revision;
    } else {
        compare->target = ETCDSERVERPB__COMPARE__COMPARE_TARGET__MOD;
        compare->target_union_case = ETCDSERVERPB__COMPARE__TARGET_UNION_MOD_REVISION;
        compare->mod_revision = revision;
    }
}

static void txn_send(co_etcd *etcd, const Etcdserverpb__TxnRequest *txn, uint64_t deadline_ms, co_etcd_fn fn,
                     void *ctx)
{
    co_etcd_call(etcd, ETCD_KV "Txn", &txn->base, &etcdserverpb__txn_response__descriptor, deadline_ms, fn,
                 ctx);
}

void co_etcd_log_look(co_etcd *etcd, const co_etcd_keys *keys, uint64_t deadline_ms, co_etcd_fn fn, void *ctx)
{
    log_key key = key_of(keys, "leader");
    log_range range;
    range_init(&range, &key);
    co_etcd_call(etcd, ETCD_KV "Range", &range.range.base, &etcdserverpb__range_response__descriptor,
                 deadline_ms, fn, ctx);
}

void co_etcd_log_claim(co_etcd *etcd, const co_etcd_keys *keys, int64_t lease, const char *address,
                       const char *host, uint64_t deadline_ms, co_etcd_fn fn, void *ctx)
{
    log_key key = key_of(keys, "leader");
    Baleen__Log__V1__Leader leader = BALEEN__LOG__V1__LEADER__INIT;
    cm_bytes value;
    leader.address = address[0] != 0 ? (char *)(uintptr_t)address : NULL;
    leader.host = (char *)(uintptr_t)host;
    leader.has_pid = true;
    leader.pid = (uint32_t)getpid();
    cm_bytes_init(&value, 0);
    pr_pack(&leader.base, &value);

    Etcdserverpb__TxnRequest txn = ETCDSERVERPB__TXN_REQUEST__INIT;
    Etcdserverpb__Compare absent, *compares[] = {&absent};
    log_put put;
    log_range range;
    compare_init(&absent, &key, true, 0);
    put_init(&put, &key, &value);
    put.put.has_lease = true;
    put.put.lease = lease;
    range_init(&range, &key);
    txn.n_compare = txn.n_success = txn.n_failure = 1;
    txn.compare = compares;
    txn.success = (Etcdserverpb__RequestOp *[]){&put.op};
    txn.failure = (Etcdserverpb__RequestOp *[]){&range.op};
    txn_send(etcd, &txn, deadline_ms, fn, ctx);
    cm_bytes_fini(&value);
}

void co_etcd_log_read(co_etcd *etcd, const co_etcd_keys *keys, int64_t term, uint64_t deadline_ms,
                      co_etcd_fn fn, void *ctx)
{
    log_key leader = key_of(keys, "leader"), head = key_of(keys, "head");
    log_key first = key_of(keys, "epochs/"), end = key_of(keys, "epochs0"); /* '0' follows '/' */
    Etcdserverpb__TxnRequest txn = ETCDSERVERPB__TXN_REQUEST__INIT;
    Etcdserverpb__Compare ours, *compares[] = {&ours};
    log_range of_head, of_epochs;
    compare_init(&ours, &leader, true, term);
    range_init(&of_head, &head);
    range_init(&of_epochs, &first);
    of_epochs.range.has_range_end = of_epochs.range.has_limit = true;
    of_epochs.range.has_sort_order = of_epochs.range.has_sort_target = true;
    of_epochs.range.range_end = bytes_of(end.text);
    of_epochs.range.limit = 1;
    of_epochs.range.sort_order = ETCDSERVERPB__RANGE_REQUEST__SORT_ORDER__DESCEND;
    of_epochs.range.sort_target = ETCDSERVERPB__RANGE_REQUEST__SORT_TARGET__KEY;
    txn.n_compare = 1;
    txn.compare = compares;
    txn.n_success = 2;
    txn.success = (Etcdserverpb__RequestOp *[]){&of_head.op, &of_epochs.op};
    txn_send(etcd, &txn, deadline_ms, fn, ctx);
}

static void head_pack(int64_t term, const co_etcd_past *past, cm_bytes *out)
{
    Baleen__Log__V1__Head head = BALEEN__LOG__V1__HEAD__INIT;
    head.version = LOG_VERSION;
    head.cluster = past->cluster;
    head.next_member_id = past->next_member_id;
    head.next_number = past->next_number;
    head.writer = term;
    head.serial = past->serial;
    head.has_secret = past->has_secret;
    head.secret = (ProtobufCBinaryData){sizeof(past->secret), (uint8_t *)(uintptr_t)past->secret};
    head.n_drained = past->drains.n;
    head.drained = (uint32_t *)(uintptr_t)past->drains.id;
    cm_bytes_init(out, 0);
    pr_pack(&head.base, out);
}

void co_etcd_log_write(co_etcd *etcd, const co_etcd_keys *keys, int64_t term, const co_etcd_past *past,
                       const co_epoch *epoch, uint64_t deadline_ms, co_etcd_fn fn, void *ctx)
{
    log_key leader_key = key_of(keys, "leader"), head_key = key_of(keys, "head"), epoch_key, oldest, end;
    Etcdserverpb__TxnRequest txn = ETCDSERVERPB__TXN_REQUEST__INIT;
    Etcdserverpb__Compare ours, last, *compares[] = {&ours, &last};
    Etcdserverpb__RequestOp *ops[LOG_OPS_MAX], trim_op = ETCDSERVERPB__REQUEST_OP__INIT;
    Etcdserverpb__DeleteRangeRequest trim = ETCDSERVERPB__DELETE_RANGE_REQUEST__INIT;
    log_put put_head, put_epoch;
    log_range of_leader, of_head;
    cm_bytes head;
    compare_init(&ours, &leader_key, true, term);
    compare_init(&last, &head_key, false, past->head_revision);
    head_pack(term, past, &head);
    put_init(&put_head, &head_key, &head);
    ops[txn.n_success++] = &put_head.op;
    if (epoch != NULL) {
        epoch_key = key_of_epoch(keys, epoch->number);
        put_init(&put_epoch, &epoch_key, &epoch->packed);
        ops[txn.n_success++] = &put_epoch.op;
    }
    if (epoch != NULL && epoch->number > LOG_EPOCHS_MAX) {
        oldest = key_of_epoch(keys, 0);
        end = key_of_epoch(keys, epoch->number - LOG_EPOCHS_MAX + 1);
        trim.has_key = trim.has_range_end = true;
        trim.key = bytes_of(oldest.text);
        trim.range_end = bytes_of(end.text);
        trim_op.request_case = ETCDSERVERPB__REQUEST_OP__REQUEST_REQUEST_DELETE_RANGE;
        trim_op.request_delete_range = &trim;
        ops[txn.n_success++] = &trim_op;
    }
    range_init(&of_leader, &leader_key);
    range_init(&of_head, &head_key);
    txn.n_compare = 2;
    txn.compare = compares;
    txn.success = ops;
    txn.n_failure = 2;
    txn.failure = (Etcdserverpb__RequestOp *[]){&of_leader.op, &of_head.op};
    txn_send(etcd, &txn, deadline_ms, fn, ctx);
    cm_bytes_fini(&head);
}

/* ---- answers ---- */

/* The only key that the i-th question of a transaction has found; NULL when none. */
static const Etcdserverpb__KeyValue *txn_found(const Etcdserverpb__TxnResponse *txn, size_t i)
{
    if (i >= txn->n_responses ||
        txn->responses[i]->response_case != ETCDSERVERPB__RESPONSE_OP__RESPONSE_RESPONSE_RANGE ||
        txn->responses[i]->response_range->n_kvs == 0) {
        return NULL;
    }
    return txn->responses[i]->response_range->kvs[0];
}

const Etcdserverpb__KeyValue *co_etcd_log_leader(const Etcdserverpb__TxnResponse *txn)
{
    return txn->succeeded ? NULL : txn_found(txn, 0);
}

bool co_etcd_log_is_ours(const Etcdserverpb__TxnResponse *txn, int64_t term, co_etcd_past *past)
{
    const Etcdserverpb__KeyValue *found = txn_found(txn, 1);
    cm_bytes head;
    head_pack(term, past, &head);
    bool ours =
        found != NULL && found->value.len == head.len && memcmp(found->value.data, head.data, head.len) == 0;
    if (ours) {
        past->head_revision = found->mod_revision;
    }
    cm_bytes_fini(&head);
    return ours;
}

void co_etcd_log_leader_name(const Etcdserverpb__KeyValue *leader, char address_out[PC_ADDRESS_BYTES],
                             char who_out[300])
{
    cm_arena arena;
    Baleen__Log__V1__Leader *name = NULL;
    cm_arena_init(&arena, "leader", LOG_ARENA_BYTES, LOG_ARENA_BYTES);
    address_out[0] = 0;
    if (pr_unpack(&baleen__log__v1__leader__descriptor, leader->value.data, leader->value.len, &arena,
                  (ProtobufCMessage **)&name) != CM_OK) {
        snprintf(who_out, 300, "somebody who is no coordinator of ours");
    } else {
        const char *address = name->address != NULL ? name->address : "";
        snprintf(address_out, PC_ADDRESS_BYTES, "%s", address);
        snprintf(who_out, 300, "the coordinator %.127s%spid %u on %.100s", address,
                 address[0] != 0 ? ", " : "", name->pid, name->host != NULL ? name->host : "?");
    }
    cm_arena_fini(&arena);
}

static cm_status log_corrupt(const co_etcd_keys *keys, const char *key, const char *why, cm_error *err)
{
    return cm_error_set(
        err, CM_E_CORRUPT, "store",
        "etcd's %s/%s is damaged or no coordinator's log (%.160s): delete the keys under %s/ to "
        "start a new cluster, or give this one another prefix (--store)",
        keys->prefix, key, why, keys->prefix);
}

static cm_status head_take(const co_etcd_keys *keys, const Etcdserverpb__KeyValue *found,
                           co_etcd_past *past_out, cm_error *err)
{
    cm_arena arena;
    Baleen__Log__V1__Head *head = NULL;
    cm_arena_init(&arena, "head", LOG_ARENA_BYTES, LOG_ARENA_BYTES);
    cm_status status = pr_unpack(&baleen__log__v1__head__descriptor, found->value.data, found->value.len,
                                 &arena, (ProtobufCMessage **)&head);
    if (status != CM_OK) {
        status = log_corrupt(keys, "head", "not a head", err);
    } else if (head->version != LOG_VERSION) {
        status = cm_error_set(err, CM_E_UNSUPPORTED, "store",
                              "etcd's %s/head is of version %u, this program writes %d: use its release",
                              keys->prefix, head->version, (int)LOG_VERSION);
    } else if (head->cluster == 0 || head->next_member_id == 0 || head->next_number == 0 ||
               head->next_number > INT64_MAX) {
        status = log_corrupt(keys, "head", "numbers that cannot be", err);
    } else if (head->has_secret && head->secret.len != CO_SECRET_BYTES) {
        status = log_corrupt(keys, "head", "a secret of another length", err);
    } else if (head->n_drained > CO_DRAINS_MAX) {
        status = log_corrupt(keys, "head", "too many members that are drained", err);
    } else {
        *past_out = (co_etcd_past){.cluster = head->cluster,
                                   .next_member_id = head->next_member_id,
                                   .next_number = head->next_number,
                                   .drains.n = (uint32_t)head->n_drained,
                                   .serial = head->serial,
                                   .head_revision = found->mod_revision,
                                   .has_secret = head->has_secret};
        if (head->n_drained > 0) {
            memcpy(past_out->drains.id, head->drained, sizeof(head->drained[0]) * head->n_drained);
        }
        if (head->has_secret) {
            memcpy(past_out->secret, head->secret.data, CO_SECRET_BYTES);
        }
    }
    cm_arena_fini(&arena);
    return status;
}

cm_status co_etcd_log_take(const co_etcd_keys *keys, const Etcdserverpb__TxnResponse *txn,
                           co_etcd_past *past_out, cm_error *err)
{
    const Etcdserverpb__KeyValue *head = txn_found(txn, 0), *last = txn_found(txn, 1);
    co_etcd_past past = {0};
    co_epoch *epoch = NULL;
    cm_error why = {0};
    if (head == NULL && last != NULL) {
        return log_corrupt(keys, "epochs", "epochs without a head", err);
    }
    if (head != NULL) {
        CM_TRY(head_take(keys, head, &past, err));
    }
    if (last != NULL && co_epoch_unpack(last->value.data, last->value.len, &epoch, &why) != CM_OK) {
        return log_corrupt(keys, "epochs", why.text, err);
    }
    if (epoch != NULL && epoch->number >= past.next_number) {
        co_epoch_release(epoch);
        return log_corrupt(keys, "epochs", "an epoch whose number is still to come", err);
    }
    past.epoch = epoch;
    *past_out = past;
    return CM_OK;
}
