/* Keys of messages. A net object holds the keys its owner gave it, the newest of which both ends of a link
 * have is the one a sender uses. From each key and the two greetings both ends derive a key for each
 * direction of this very link (HKDF-SHA256), and every message carries a GMAC (AES-128) over its number,
 * type, header and payload under it: a message of another link, another direction, another key or another
 * place in the order has no valid tag. Nothing is encrypted. */
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <openssl/params.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/log.h"
#include "common/base/stats.h"
#include "common/net/net_private.h"

enum {
    NET_LINK_KEY_BYTES = 16,   /* AES-128 */
    NET_REFUSED_LOG_MS = 1000, /* one line for all that was refused since the last */
    NET_IV_BYTES = 12,
};

/* What a link's key of one direction is derived from, beside the shared key. */
typedef struct key_context {
    char label[16];
    uint64_t cluster;
    uint32_t from_role, from_member, to_role, to_member;
    uint64_t from_nonce[2], to_nonce[2];
} key_context;
_Static_assert(sizeof(key_context) == 72, "both ends hash the same bytes");

/* What is authenticated in front of header and payload. */
typedef struct sealed_head {
    uint64_t seq, payload_bytes;
    uint32_t key, header_bytes;
    uint32_t type, zero;
} sealed_head;
_Static_assert(sizeof(sealed_head) == 32, "both ends hash the same bytes");

/* ---- derivation; OpenSSL fails here for want of memory only ---- */

static void key_derive(const uint8_t key[NET_KEY_BYTES], const void *context, size_t context_bytes, void *out,
                       size_t n_bytes)
{
    EVP_KDF *kdf = EVP_KDF_fetch(NULL, "HKDF", NULL);
    EVP_KDF_CTX *ctx = EVP_KDF_CTX_new(kdf);
    OSSL_PARAM params[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, (char[]){"SHA256"}, 0),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, (void *)(uintptr_t)key, NET_KEY_BYTES),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, (void *)(uintptr_t)context, context_bytes),
        OSSL_PARAM_construct_end(),
    };
    CM_ASSERT(ctx != NULL && EVP_KDF_derive(ctx, out, n_bytes, params) == 1);
    EVP_KDF_CTX_free(ctx);
    EVP_KDF_free(kdf);
}

static EVP_MAC_CTX *mac_create(const uint8_t key[NET_KEY_BYTES], const key_context *context)
{
    uint8_t link_key[NET_LINK_KEY_BYTES];
    OSSL_PARAM params[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_CIPHER, (char[]){"AES-128-GCM"}, 0),
        OSSL_PARAM_construct_end(),
    };
    key_derive(key, context, sizeof(*context), link_key, sizeof(link_key));
    EVP_MAC *mac = EVP_MAC_fetch(NULL, "GMAC", NULL);
    EVP_MAC_CTX *ctx = EVP_MAC_CTX_new(mac);
    CM_ASSERT(ctx != NULL && EVP_MAC_init(ctx, link_key, sizeof(link_key), params) == 1);
    EVP_MAC_free(mac);
    OPENSSL_cleanse(link_key, sizeof(link_key));
    return ctx;
}

static uint32_t key_id(const uint8_t key[NET_KEY_BYTES])
{
    static const char label[] = "baleen key id";
    uint32_t id;
    key_derive(key, label, sizeof(label), &id, sizeof(id));
    return id != 0 ? id : 1; /* 0 is no key */
}

/* ---- the tag of a message ---- */

/* Allocates nothing. A number is used once for each kind of message, so no IV comes twice under a key. */
static void tag_make(EVP_MAC_CTX *ctx, const sealed_head *head, const void *header, const net_iov *iov,
                     uint32_t n_iov, uint8_t tag_out[NET_TAG_BYTES])
{
    struct {
        uint64_t seq;
        uint32_t internal;
    } iv = {head->seq, head->type >= NET_TYPE_INTERNAL};
    OSSL_PARAM params[] = {
        OSSL_PARAM_construct_octet_string(OSSL_MAC_PARAM_IV, &iv, NET_IV_BYTES),
        OSSL_PARAM_construct_end(),
    };
    size_t n_tag;
    bool ok = EVP_MAC_init(ctx, NULL, 0, params) == 1 &&
              EVP_MAC_update(ctx, (const uint8_t *)head, sizeof(*head)) == 1;
    if (head->header_bytes > 0) {
        ok = ok && EVP_MAC_update(ctx, header, head->header_bytes) == 1;
    }
    for (uint32_t i = 0; i < n_iov; i++) {
        ok = ok && (iov[i].n_bytes == 0 || EVP_MAC_update(ctx, iov[i].data, iov[i].n_bytes) == 1);
    }
    ok = ok && EVP_MAC_final(ctx, tag_out, &n_tag, NET_TAG_BYTES) == 1;
    CM_ASSERT_MSG(ok && n_tag == NET_TAG_BYTES, "tag of a message of type %u", head->type);
}

/* The layer's own always have one: they show the key. */
static bool tag_wanted(const net_peer *peer, uint16_t type)
{
    bool vouched = peer->net->ops->vouches && peer->proven && type < NET_TYPE_INTERNAL;
    return peer->net->options.keyed && !vouched;
}

void net_seal(const net_peer *peer, const net_message *message, uint64_t payload_bytes, net_prefix *prefix)
{
    if (peer->net->options.keyed && !tag_wanted(peer, message->type)) {
        return;
    }
    const net_link_key *link_key = net_peer_sender(peer);
    if (link_key == NULL) { /* no keys here, or a list of ours that goes out before there is one in common */
        CM_ASSERT(!peer->net->options.keyed || message->type == NET_TYPE_KEYS);
        return;
    }
    prefix->key = link_key->id;
    sealed_head head = {.seq = prefix->seq,
                        .payload_bytes = payload_bytes,
                        .key = prefix->key,
                        .header_bytes = message->header_bytes,
                        .type = message->type};
    tag_make(link_key->tx, &head, message->header, message->iov, message->n_iov, prefix->tag);
}

static bool tag_fits(const net_link_key *link_key, const net_event *message, const net_prefix *prefix)
{
    uint8_t tag[NET_TAG_BYTES];
    net_iov payload = {message->payload, message->payload_bytes};
    sealed_head head = {.seq = prefix->seq,
                        .payload_bytes = message->payload_bytes,
                        .key = prefix->key,
                        .header_bytes = message->header_bytes - (uint32_t)sizeof(*prefix),
                        .type = message->type};
    tag_make(link_key->rx, &head, (const uint8_t *)message->header + sizeof(*prefix), &payload, 1, tag);
    return CRYPTO_memcmp(tag, prefix->tag, sizeof(tag)) == 0;
}

const char *net_unseal(const net_peer *peer, const net_event *message, net_prefix *prefix_out)
{
    bool known = false;
    if (message->header_bytes < sizeof(*prefix_out)) {
        return "it is too short";
    }
    memcpy(prefix_out, message->header, sizeof(*prefix_out));
    if (!tag_wanted(peer, message->type)) {
        return NULL;
    }
    for (uint32_t i = 0; i < peer->n_link_keys; i++) {
        if (peer->link_keys[i].id != prefix_out->key) {
            continue;
        }
        known = true;
        if (tag_fits(&peer->link_keys[i], message, prefix_out)) {
            uint64_t n_before = message->type >= NET_TYPE_INTERNAL ? peer->n_notes_taken : peer->n_taken;
            return prefix_out->seq <= n_before ? "it came before" : NULL;
        }
    }
    return known ? "its tag is wrong" : "it is under a key that is not ours";
}

void net_refuse(net_peer *peer, uint16_t type, const char *why)
{
    net *n = peer->net;
    cm_stat_add(CM_STAT_net_refused, 1);
    n->keys.n_refused++;
    if (n->now_ms >= n->keys.refused_log_ms) {
        n->keys.refused_log_ms = n->now_ms + NET_REFUSED_LOG_MS;
        cm_warn("message of type %u on link %s refused: %s (%llu refused so far)", type, peer->address, why,
                (unsigned long long)n->keys.n_refused);
    }
}

/* ---- the keys of a link ---- */

static void link_key_derive(const net_peer *peer, const net_key *key, net_link_key *out)
{
    const net_identity *us = &peer->told, *them = &peer->identity;
    key_context tx = {.label = "baleen link",
                      .cluster = us->cluster,
                      .from_role = us->role,
                      .from_member = us->member,
                      .to_role = them->role,
                      .to_member = them->member};
    key_context rx = tx;
    rx.from_role = them->role;
    rx.from_member = them->member;
    rx.to_role = us->role;
    rx.to_member = us->member;
    memcpy(tx.from_nonce, peer->nonce, sizeof(peer->nonce));
    memcpy(tx.to_nonce, peer->their_nonce, sizeof(peer->nonce));
    memcpy(rx.from_nonce, peer->their_nonce, sizeof(peer->nonce));
    memcpy(rx.to_nonce, peer->nonce, sizeof(peer->nonce));
    *out =
        (net_link_key){.id = key->id, .tx = mac_create(key->bytes, &tx), .rx = mac_create(key->bytes, &rx)};
}

static void link_key_free(net_link_key *link_key)
{
    EVP_MAC_CTX_free(link_key->tx);
    EVP_MAC_CTX_free(link_key->rx);
    *link_key = (net_link_key){0};
}

void net_link_keys_free(net_peer *peer)
{
    for (uint32_t i = 0; i < peer->n_link_keys; i++) {
        link_key_free(&peer->link_keys[i]);
    }
    peer->n_link_keys = 0;
}

void net_link_keys_follow(net_peer *peer)
{
    const net_keys *keys = &peer->net->keys;
    net_link_key next[NET_KEYS_MAX] = {0};
    for (uint32_t i = 0; i < keys->n; i++) {
        for (uint32_t k = 0; k < peer->n_link_keys; k++) {
            if (peer->link_keys[k].id == keys->key[i].id) {
                next[i] = peer->link_keys[k];
                peer->link_keys[k] = (net_link_key){0};
            }
        }
        if (next[i].tx == NULL) {
            link_key_derive(peer, &keys->key[i], &next[i]);
        }
    }
    net_link_keys_free(peer);
    memcpy(peer->link_keys, next, sizeof(next));
    peer->n_link_keys = keys->n;
}

const net_link_key *net_peer_sender(const net_peer *peer)
{
    for (uint32_t i = peer->n_link_keys; i > 0; i--) {
        for (uint32_t k = 0; k < NET_KEYS_MAX; k++) {
            if (peer->link_keys[i - 1].id == peer->their_ids[k]) {
                return &peer->link_keys[i - 1];
            }
        }
    }
    return NULL;
}

void net_key_ids(const net *n, uint32_t ids_out[NET_KEYS_MAX])
{
    for (uint32_t i = 0; i < NET_KEYS_MAX; i++) {
        ids_out[i] = i < n->keys.n ? n->keys.key[i].id : 0;
    }
}

/* ---- the keys of the object ---- */

static void keys_drop(net_keys *keys, uint32_t i)
{
    OPENSSL_cleanse(&keys->key[i], sizeof(keys->key[i]));
    memmove(&keys->key[i], &keys->key[i + 1], sizeof(keys->key[0]) * (keys->n - i - 1));
    keys->n--;
}

static bool keys_have(const net_keys *keys, const net_key *key)
{
    for (uint32_t i = 0; i < keys->n; i++) {
        if (CRYPTO_memcmp(keys->key[i].bytes, key->bytes, NET_KEY_BYTES) == 0) {
            return true;
        }
    }
    return false;
}

/* Full: the oldest goes, retired or not; owners hold few. */
static bool keys_put(net_keys *keys, const net_key *key)
{
    if (keys_have(keys, key)) {
        return false;
    }
    if (keys->n == NET_KEYS_MAX) {
        keys_drop(keys, 0);
    }
    keys->key[keys->n++] = *key;
    return true;
}

static void keys_set_timer(net *n)
{
    n->keys.expire_ms = UINT64_MAX;
    for (uint32_t i = 0; i < n->keys.n; i++) {
        n->keys.expire_ms =
            n->keys.key[i].end_ms < n->keys.expire_ms ? n->keys.key[i].end_ms : n->keys.expire_ms;
    }
    net_timer_at(n, n->keys.expire_ms);
}

static void keys_tell_links(net *n)
{
    net_peer *peer, *next;
    for (peer = TAILQ_FIRST(&n->live); peer != NULL; peer = next) {
        next = TAILQ_NEXT(peer, entry);
        net_peer_keys_changed(peer);
    }
}

/* What other threads have left. A retired key stays for what is on its way and for peers that hear of the
 * next one a little later. */
static bool keys_take(net *n)
{
    net_keys *keys = &n->keys;
    bool changed = false;
    pthread_mutex_lock(&keys->lock);
    atomic_store(&keys->news, false);
    for (uint32_t i = 0; i < keys->n_added; i++) {
        keys->added[i].id = key_id(keys->added[i].bytes);
        changed = keys_put(keys, &keys->added[i]) || changed;
    }
    OPENSSL_cleanse(keys->added, sizeof(keys->added));
    keys->n_added = 0;
    uint64_t oldest = keys->retire_before, cluster = keys->cluster;
    pthread_mutex_unlock(&keys->lock);
    for (uint32_t i = 0; i < keys->n; i++) {
        bool retired = keys->key[i].cluster != cluster || keys->key[i].generation < oldest;
        if (retired && keys->key[i].end_ms == UINT64_MAX) {
            keys->key[i].end_ms = n->now_ms + n->options.silence_ms;
        }
    }
    return changed;
}

void net_keys_step(net *n)
{
    bool changed = atomic_load(&n->keys.news) && keys_take(n);
    for (uint32_t i = n->keys.n; i > 0; i--) {
        if (n->now_ms >= n->keys.key[i - 1].end_ms) {
            keys_drop(&n->keys, i - 1);
            changed = true;
        }
    }
    keys_set_timer(n);
    if (changed) {
        keys_tell_links(n);
    }
}

void net_keys_init(net *n)
{
    pthread_mutex_init(&n->keys.lock, NULL);
    n->keys.expire_ms = UINT64_MAX;
}

void net_keys_fini(net *n)
{
    OPENSSL_cleanse(n->keys.key, sizeof(n->keys.key));
    OPENSSL_cleanse(n->keys.added, sizeof(n->keys.added));
    pthread_mutex_destroy(&n->keys.lock);
}

/* ---- from any thread ---- */

void net_key_add(net *n, uint64_t cluster, uint64_t generation, const uint8_t key[NET_KEY_BYTES])
{
    net_keys *keys = &n->keys;
    CM_ASSERT(n->options.keyed);
    pthread_mutex_lock(&keys->lock);
    if (keys->n_added ==
        NET_KEYS_MAX) { /* the owner was away for so long: the oldest would fall out anyway */
        memmove(&keys->added[0], &keys->added[1], sizeof(keys->added[0]) * (NET_KEYS_MAX - 1));
        keys->n_added--;
    }
    if (keys->cluster != cluster) { /* another cluster counts from the start */
        keys->cluster = cluster;
        keys->retire_before = 0;
    }
    net_key *added = &keys->added[keys->n_added++];
    *added = (net_key){.cluster = cluster, .generation = generation, .end_ms = UINT64_MAX};
    memcpy(added->bytes, key, NET_KEY_BYTES);
    atomic_store(&keys->news, true);
    pthread_mutex_unlock(&keys->lock);
}

void net_key_retire(net *n, uint64_t oldest)
{
    pthread_mutex_lock(&n->keys.lock);
    n->keys.retire_before = oldest > n->keys.retire_before ? oldest : n->keys.retire_before;
    atomic_store(&n->keys.news, true);
    pthread_mutex_unlock(&n->keys.lock);
}
