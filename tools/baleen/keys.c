/* baleen keys: a new API key in a gateway's key file. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "gateway/key_file.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/verbs.h"

enum { KEYS_SECRET_BYTES = 32, KEYS_SALT_BYTES = 32 };

typedef struct keys_config {
    char *name;
    bool is_operator;
} keys_config;

static const cm_cfg_field g_fields[] = {
    {"name", "", "what the key is called in the file, to find it when it is to be taken out",
     CM_CFG_STRING(keys_config, name)},
    {"operator", "off", "make the tenant an operator: it may read /metrics and end requests of other tenants",
     CM_CFG_BOOL(keys_config, is_operator)},
};

static const cm_cfg_table g_table = {
    .program = "baleen keys",
    .summary =
        "makes an API key of TENANT and adds its hash to the key FILE of a gateway (--key-file), which "
        "takes it up by itself; file and tenant are made when there is none. The key is printed once "
        "and kept nowhere. Limits are in the file, beside the tenant's name",
    .operands = "FILE TENANT",
    .fields = g_fields,
    .n_fields = sizeof(g_fields) / sizeof(g_fields[0]),
};

static json_t *keys_new_file(void)
{
    uint8_t salt[KEYS_SALT_BYTES];
    char text[2 * KEYS_SALT_BYTES + 1];
    cm_random_bytes(salt, sizeof(salt));
    gw_hex_write(salt, sizeof(salt), text);
    return json_pack("{s:s, s:[]}", "salt", text, "tenants");
}

/* The file as it is, checked; a fresh one when there is none. */
static cm_status keys_load(const char *path, json_t **root_out, gw_key_file *file_out, cm_error *err)
{
    json_error_t where;
    json_t *root = access(path, F_OK) != 0 && errno == ENOENT
                       ? keys_new_file()
                       : json_load_file(path, JSON_REJECT_DUPLICATES, &where);
    cm_error inner = {0};
    if (root == NULL) {
        return cm_error_set(err, CM_E_IO, "FILE", "%s, line %d, column %d: %s", path, where.line,
                            where.column, where.text);
    }
    if (gw_key_file_parse(root, file_out, &inner) != CM_OK) {
        json_decref(root);
        return cm_error_set(err, CM_E_IO, "FILE", "%s: %s", path, inner.text);
    }
    *root_out = root;
    return CM_OK;
}

static json_t *keys_tenant(json_t *root, const char *name)
{
    json_t *list = json_object_get(root, "tenants"), *tenant;
    size_t i;
    json_array_foreach(list, i, tenant)
    {
        if (strcmp(json_string_value(json_object_get(tenant, "name")), name) == 0) {
            return tenant;
        }
    }
    tenant = json_pack("{s:s, s:i, s:[]}", "name", name, "weight", 1, "keys");
    json_array_append_new(list, tenant);
    return tenant;
}

/* key_out: for its owner. */
static void keys_add(json_t *root, const gw_key_file *file, const keys_config *config, const char *tenant,
                     char key_out[80])
{
    uint8_t secret[KEYS_SECRET_BYTES], hash[GW_KEY_HASH_BYTES];
    char text[2 * GW_KEY_HASH_BYTES + 1];
    cm_random_bytes(secret, sizeof(secret));
    memcpy(key_out, "bl-", 3);
    gw_hex_write(secret, sizeof(secret), key_out + 3);
    gw_key_hash(file->salt, file->n_salt, key_out, hash);
    gw_hex_write(hash, sizeof(hash), text);
    json_t *to = keys_tenant(root, tenant), *entry = json_object();
    if (config->name[0] != '\0') {
        json_object_set_new(entry, "name", json_string(config->name));
    }
    json_object_set_new(entry, "hash", json_string(text));
    json_array_append_new(json_object_get(to, "keys"), entry);
    if (config->is_operator) {
        json_object_set_new(to, "operator", json_true());
    }
}

/* Whole or not at all: a gateway may be reading it. */
static cm_status keys_save(const char *path, const json_t *root, cm_error *err)
{
    cm_bytes temporary;
    cm_status status = CM_OK;
    cm_bytes_init(&temporary, 0);
    cm_bytes_printf(&temporary, "%s.new", path);
    const char *name = cm_bytes_text(&temporary);
    int fd = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) {
        status = cm_error_set(err, CM_E_IO, "FILE", "cannot write %s: %s", name, strerror(errno));
    } else {
        bool ok = json_dumpfd(root, fd, JSON_INDENT(2)) == 0 && write(fd, "\n", 1) == 1 && fsync(fd) == 0;
        ok = close(fd) == 0 && ok && rename(name, path) == 0;
        if (!ok) {
            status = cm_error_set(err, CM_E_IO, "FILE", "cannot write %s: %s", path, strerror(errno));
            (void)unlink(name);
        }
    }
    cm_bytes_fini(&temporary);
    return status;
}

static cm_status keys_make(const keys_config *config, const char *path, const char *tenant, char key_out[80],
                           cm_error *err)
{
    json_t *root = NULL;
    gw_key_file file = {0};
    cm_error inner = {0};
    CM_TRY(keys_load(path, &root, &file, err));
    keys_add(root, &file, config, tenant, key_out);
    gw_key_file_free(&file);
    cm_status status = gw_key_file_parse(root, &file, &inner);
    if (status != CM_OK) {
        status = cm_error_set(err, CM_E_CONFIG, "TENANT", "%s", inner.text);
    } else {
        gw_key_file_free(&file);
        status = keys_save(path, root, err);
    }
    json_decref(root);
    return status;
}

int verb_keys(int argc, char **argv)
{
    keys_config config = {0};
    cm_error err = {0};
    const char *operands[2] = {NULL, NULL};
    char key[80];
    size_t n = 0;
    int code = cli_begin(&g_table, &config, argc, argv, operands, 2, &n);
    if (code >= 0) {
        return code;
    }
    if (n < 2) {
        code = cli_complain(&g_table, CLI_USAGE, "whose key, and where? baleen keys FILE TENANT");
    } else if (keys_make(&config, operands[0], operands[1], key, &err) != CM_OK) {
        code = cli_fail(&g_table, &err);
    } else {
        printf("%s\n", key);
        code = CLI_OK;
    }
    cm_cfg_free(&g_table, &config);
    return code;
}
