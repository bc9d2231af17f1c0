/* The file of tenants and their API keys, as a value: JSON, checked as a whole, of keys only salted hashes.
 * Shared by the gateway, which reads it, and by the command that adds keys. Thread: any.
 *
 *   {"salt": "HEX",
 *    "tenants": [{"name": "acme", "weight": 2, "running_max": 32, "queue_max": 64,
 *                 "requests_per_minute": 600, "tokens_per_minute": 1000000, "operator": false,
 *                 "keys": [{"name": "laptop", "hash": "64 hex digits: HMAC-SHA256 of the key by the
 * salt"}]}]}
 *
 * Only name and keys must be there (gw_tenant_limits_defaults). */
#pragma once
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/status.h"
#include "gateway/tenant_core.h"

enum {
    GW_KEY_HASH_BYTES = 32,
    GW_KEY_SALT_BYTES_MIN = 16,
    GW_KEY_SALT_BYTES_MAX = 64,
    GW_KEY_TEXT_MAX = 512, /* longer ones are nobody's */
    GW_KEY_FILE_TENANTS_MAX = 1024,
    GW_KEY_FILE_KEYS_MAX = 16384,
};

typedef struct gw_key_tenant {
    char name[GW_TENANT_NAME_MAX + 1]; /* A-Z a-z 0-9 _ . - */
    gw_tenant_limits limits;
    bool is_operator; /* may see and end what belongs to all */
} gw_key_tenant;

typedef struct gw_key {
    uint8_t hash[GW_KEY_HASH_BYTES];
    uint32_t tenant; /* index */
} gw_key;

typedef struct gw_key_file {
    uint8_t salt[GW_KEY_SALT_BYTES_MAX];
    size_t n_salt;
    gw_key_tenant *tenants; /* [n_tenant] owned */
    uint32_t n_tenant;
    gw_key *keys; /* [n_key] owned */
    uint32_t n_key;
} gw_key_file;

/* CM_E_CONFIG: err names the place and what is wrong there; nothing is kept. */
CM_MUST_CHECK cm_status gw_key_file_parse(const json_t *root, gw_key_file *out, cm_error *err);
/* text: n_bytes of the whole file. */
CM_MUST_CHECK cm_status gw_key_file_read(const char *text, size_t n_bytes, gw_key_file *out, cm_error *err);
void gw_key_file_free(gw_key_file *file);

/* The same time whichever key fits, or none. NULL: nobody's. */
const gw_key_tenant *gw_key_file_find(const gw_key_file *file, const char *key);
void gw_key_hash(const uint8_t *salt, size_t n_salt, const char *key, uint8_t out[GW_KEY_HASH_BYTES]);
/* text: two digits a byte, no more than n_max of them. 0: it is not that. */
size_t gw_hex_read(const char *text, uint8_t *out, size_t n_max);
void gw_hex_write(const uint8_t *bytes, size_t n_bytes, char *out); /* 2 n_bytes + 1 */
