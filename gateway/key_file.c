#include "gateway/key_file.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

/* ---- hex ---- */

static int hex_value(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

size_t gw_hex_read(const char *text, uint8_t *out, size_t n_max)
{
    size_t n = text != NULL ? strlen(text) : 0;
    if (n % 2 != 0 || n / 2 > n_max) {
        return 0;
    }
    for (size_t i = 0; i < n / 2; i++) {
        int high = hex_value(text[2 * i]), low = hex_value(text[2 * i + 1]);
        if (high < 0 || low < 0) {
            return 0;
        }
        out[i] = (uint8_t)(high * 16 + low);
    }
    return n / 2;
}

void gw_hex_write(const uint8_t *bytes, size_t n_bytes, char *out)
{
    for (size_t i = 0; i < n_bytes; i++) {
        snprintf(out + 2 * i, 3, "%02x", bytes[i]);
    }
}

/* ---- keys ---- */

void gw_key_hash(const uint8_t *salt, size_t n_salt, const char *key, uint8_t out[GW_KEY_HASH_BYTES])
{
    unsigned n = 0;
    const uint8_t *made = HMAC(EVP_sha256(), salt, (int)n_salt, (const uint8_t *)key, strlen(key), out, &n);
    CM_ASSERT(made != NULL && n == GW_KEY_HASH_BYTES);
}

const gw_key_tenant *gw_key_file_find(const gw_key_file *file, const char *key)
{
    uint8_t hash[GW_KEY_HASH_BYTES];
    uint32_t found = UINT32_MAX;
    if (strlen(key) > GW_KEY_TEXT_MAX) {
        return NULL;
    }
    gw_key_hash(file->salt, file->n_salt, key, hash);
    for (uint32_t i = 0; i < file->n_key; i++) {
        uint32_t same = CRYPTO_memcmp(file->keys[i].hash, hash, sizeof(hash)) == 0;
        found = (found & (same - 1)) | (file->keys[i].tenant & ~(same - 1));
    }
    return found != UINT32_MAX ? &file->tenants[found] : NULL;
}

/* ---- the file ---- */

typedef struct place {
    char field[96]; /* what is being read */
    cm_error *err;
} place;

static cm_status wrong(const place *at, const char *what)
{
    return cm_error_set(at->err, CM_E_CONFIG, at->field, "%s %s", at->field, what);
}

static cm_status read_count(place *at, const json_t *object, const char *key, uint64_t least, uint64_t most,
                            uint64_t *out)
{
    const json_t *value = json_object_get(object, key);
    char what[96];
    if (value == NULL) {
        return CM_OK;
    }
    json_int_t n = json_is_integer(value) ? json_integer_value(value) : -1;
    if (n < 0 || (uint64_t)n < least || (uint64_t)n > most) {
        size_t end = strlen(at->field);
        snprintf(at->field + end, sizeof(at->field) - end, ".%s", key);
        snprintf(what, sizeof(what), "must be a whole number from %llu to %llu", (unsigned long long)least,
                 (unsigned long long)most);
        return wrong(at, what);
    }
    *out = (uint64_t)n;
    return CM_OK;
}

static cm_status read_limits(place *at, const json_t *object, gw_tenant_limits *limits)
{
    gw_tenant_limits_defaults(limits);
    uint64_t weight = limits->weight, running_max = limits->running_max, queue_max = limits->queue_max;
    CM_TRY(read_count(at, object, "weight", 1, GW_WEIGHT_MAX, &weight));
    CM_TRY(read_count(at, object, "running_max", 1, UINT32_MAX, &running_max));
    CM_TRY(read_count(at, object, "queue_max", 0, UINT32_MAX, &queue_max));
    CM_TRY(read_count(at, object, "requests_per_minute", 1, 1u << 30, &limits->requests_per_minute));
    CM_TRY(read_count(at, object, "tokens_per_minute", 1, 1ull << 50, &limits->tokens_per_minute));
    limits->weight = (uint32_t)weight;
    limits->running_max = (uint32_t)running_max;
    limits->queue_max = (uint32_t)queue_max;
    return CM_OK;
}

/* A limit that nobody reads because it is misspelt would be none. */
static cm_status check_names(place *at, const json_t *object, const char *const *known)
{
    const char *key;
    json_t *value;
    if (!json_is_object(object)) {
        return wrong(at, "must be an object");
    }
    json_object_foreach((json_t *)(uintptr_t)object, key, value)
    {
        size_t i = 0;
        while (known[i] != NULL && strcmp(known[i], key) != 0) {
            i++;
        }
        if (known[i] == NULL) {
            char what[128];
            snprintf(what, sizeof(what), "has '%.60s', which is not known there", key);
            return wrong(at, what);
        }
    }
    return CM_OK;
}

static bool is_name(const char *name)
{
    size_t n = name != NULL ? strlen(name) : 0;
    return n >= 1 && n <= GW_TENANT_NAME_MAX &&
           strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-") == n;
}

static cm_status read_key(place *at, const json_t *value, uint32_t tenant, gw_key_file *file)
{
    static const char *const known[] = {"name", "hash", NULL};
    gw_key *key = &file->keys[file->n_key];
    CM_TRY(check_names(at, value, known));
    const char *hash = json_string_value(json_object_get(value, "hash"));
    if (gw_hex_read(hash, key->hash, GW_KEY_HASH_BYTES) != GW_KEY_HASH_BYTES) {
        return wrong(at, "needs a hash of 64 digits 0-9 a-f; 'baleen keys' makes one");
    }
    key->tenant = tenant;
    file->n_key++;
    return CM_OK;
}

static cm_status read_keys(place *at, const json_t *list, uint32_t tenant, gw_key_file *file)
{
    size_t i, end = strlen(at->field);
    json_t *value;
    if (!json_is_array(list)) {
        return wrong(at, "needs keys, a list");
    }
    if (file->n_key + json_array_size(list) > GW_KEY_FILE_KEYS_MAX) {
        return wrong(at, "has too many keys: the file may hold 16384");
    }
    file->keys = cm_realloc(file->keys, sizeof(*file->keys) * (file->n_key + json_array_size(list)));
    json_array_foreach(list, i, value)
    {
        snprintf(at->field + end, sizeof(at->field) - end, ".keys[%zu]", i);
        CM_TRY(read_key(at, value, tenant, file));
    }
    return CM_OK;
}

static cm_status read_tenant(place *at, const json_t *value, gw_key_file *file)
{
    static const char *const known[] = {
        "name",     "weight", "running_max", "queue_max", "requests_per_minute", "tokens_per_minute",
        "operator", "keys",   NULL};
    gw_key_tenant *tenant = &file->tenants[file->n_tenant];
    CM_TRY(check_names(at, value, known));
    const char *name = json_string_value(json_object_get(value, "name"));
    const json_t *is_operator = json_object_get(value, "operator");
    if (!is_name(name)) {
        return wrong(at, "needs a name of 1 to 64 characters of A-Z a-z 0-9 _ . -");
    }
    if (is_operator != NULL && !json_is_boolean(is_operator)) {
        return wrong(at, "has an operator that is neither true nor false");
    }
    for (uint32_t i = 0; i < file->n_tenant; i++) {
        if (strcmp(file->tenants[i].name, name) == 0) {
            return wrong(at, "has the name of another tenant in the file");
        }
    }
    snprintf(tenant->name, sizeof(tenant->name), "%s", name);
    tenant->is_operator = json_is_true(is_operator);
    CM_TRY(read_limits(at, value, &tenant->limits));
    return read_keys(at, json_object_get(value, "keys"), file->n_tenant++, file);
}

static int hash_order(const void *a, const void *b)
{
    return memcmp(((const gw_key *)a)->hash, ((const gw_key *)b)->hash, GW_KEY_HASH_BYTES);
}

/* Their order in memory means nothing. */
static cm_status check_once(place *at, gw_key_file *file)
{
    if (file->n_key > 0) {
        qsort(file->keys, file->n_key, sizeof(*file->keys), hash_order);
    }
    for (uint32_t i = 1; i < file->n_key; i++) {
        if (hash_order(&file->keys[i - 1], &file->keys[i]) == 0) {
            snprintf(at->field, sizeof(at->field), "tenant '%s'", file->tenants[file->keys[i].tenant].name);
            return wrong(at, "has a key that is in the file twice");
        }
    }
    return CM_OK;
}

static cm_status read_root(place *at, const json_t *root, gw_key_file *file)
{
    static const char *const known[] = {"salt", "tenants", NULL};
    const json_t *list = json_object_get(root, "tenants");
    size_t i;
    json_t *value;
    CM_TRY(check_names(at, root, known));
    file->n_salt =
        gw_hex_read(json_string_value(json_object_get(root, "salt")), file->salt, GW_KEY_SALT_BYTES_MAX);
    if (file->n_salt < GW_KEY_SALT_BYTES_MIN) {
        return wrong(at, "needs a salt of 32 to 128 digits 0-9 a-f; 'baleen keys' makes one");
    }
    if (!json_is_array(list) || json_array_size(list) > GW_KEY_FILE_TENANTS_MAX) {
        return wrong(at, "needs tenants, a list of at most 1024");
    }
    file->tenants = cm_alloc(sizeof(*file->tenants) * json_array_size(list));
    json_array_foreach(list, i, value)
    {
        snprintf(at->field, sizeof(at->field), "tenants[%zu]", i);
        CM_TRY(read_tenant(at, value, file));
    }
    return check_once(at, file);
}

cm_status gw_key_file_parse(const json_t *root, gw_key_file *out, cm_error *err)
{
    place at = {.field = "the file", .err = err};
    gw_key_file file = {0};
    cm_status status = read_root(&at, root, &file);
    if (status != CM_OK) {
        gw_key_file_free(&file);
        return status;
    }
    *out = file;
    return CM_OK;
}

cm_status gw_key_file_read(const char *text, size_t n_bytes, gw_key_file *out, cm_error *err)
{
    json_error_t where;
    json_t *root = json_loadb(text, n_bytes, JSON_REJECT_DUPLICATES, &where);
    if (root == NULL) {
        return cm_error_set(err, CM_E_CONFIG, "the file", "line %d, column %d: %s", where.line, where.column,
                            where.text);
    }
    cm_status status = gw_key_file_parse(root, out, err);
    json_decref(root);
    return status;
}

void gw_key_file_free(gw_key_file *file)
{
    cm_free(file->tenants);
    cm_free(file->keys);
    *file = (gw_key_file){0};
}
