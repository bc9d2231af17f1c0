#include "tools/baleen/manifest.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/replace.h"

enum { MANIFEST_VERSION = 1 };

struct manifest {
    json_t *tensors;      /* name -> digest */
    json_t *config;       /* config.json as it was; NULL before it is loaded */
    char fingerprint[33]; /* "" before it is loaded */
};

manifest_digest manifest_digest_of(const void *data, size_t n_bytes)
{
    static const char digits[] = "0123456789abcdef";
    manifest_digest digest = {0};
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(data, n_bytes));
    memcpy(digest.bytes, canonical.digest, sizeof(digest.bytes));
    for (size_t i = 0; i < sizeof(digest.bytes); i++) {
        digest.hex[2 * i] = digits[digest.bytes[i] >> 4];
        digest.hex[2 * i + 1] = digits[digest.bytes[i] & 15];
    }
    return digest;
}

manifest *manifest_create(void)
{
    manifest *it = cm_alloc(sizeof(*it));
    it->tensors = json_object();
    return it;
}

void manifest_destroy(manifest *it)
{
    if (it != NULL) {
        json_decref(it->tensors);
        json_decref(it->config);
        cm_free(it);
    }
}

/* ---- reading ---- */

static bool is_digest(const json_t *value)
{
    const char *hex = json_string_value(value);
    return json_string_length(value) == 32 && strspn(hex, "0123456789abcdef") == 32;
}

static cm_status corrupt(cm_error *err, const char *path, const char *what)
{
    return cm_error_set(
        err, CM_E_CORRUPT, MANIFEST_NAME,
        "%s is no manifest: %s; if the checkpoint can be trusted, write a new one with --write", path, what);
}

static cm_status check_root(const json_t *root, const char *path, cm_error *err)
{
    const json_t *version = json_object_get(root, "version"), *tensors = json_object_get(root, "tensors");
    const char *name;
    json_t *value;
    if (!json_is_integer(version)) {
        return corrupt(err, path, "it has no version");
    }
    if (json_integer_value(version) != MANIFEST_VERSION) {
        return cm_error_set(err, CM_E_CORRUPT, MANIFEST_NAME,
                            "%s has version %lld, this program knows version %d", path,
                            (long long)json_integer_value(version), MANIFEST_VERSION);
    }
    if (!is_digest(json_object_get(root, "fingerprint"))) {
        return corrupt(err, path, "its fingerprint is not 32 hexadecimal digits");
    }
    if (!json_is_object(json_object_get(root, "config"))) {
        return corrupt(err, path, "it has no config");
    }
    if (!json_is_object(tensors)) {
        return corrupt(err, path, "it has no tensors");
    }
    json_object_foreach((json_t *)tensors, name, value)
    {
        if (!is_digest(value)) {
            char what[160];
            snprintf(what, sizeof(what), "the digest of %.96s is not 32 hexadecimal digits", name);
            return corrupt(err, path, what);
        }
    }
    return CM_OK;
}

static cm_status load_path(const char *path, manifest **manifest_out, cm_error *err)
{
    json_error_t why;
    json_t *root;
    if (access(path, F_OK) != 0 && errno == ENOENT) {
        *manifest_out = NULL;
        return CM_OK;
    }
    root = json_load_file(path, JSON_REJECT_DUPLICATES, &why);
    if (root == NULL) {
        if (json_error_code(&why) == json_error_cannot_open_file) {
            return cm_error_set(err, CM_E_IO, MANIFEST_NAME, "%s", why.text);
        }
        char what[sizeof(why.text) + 32];
        snprintf(what, sizeof(what), "line %d: %s", why.line, why.text);
        return corrupt(err, path, what);
    }
    cm_status status = check_root(root, path, err);
    if (status == CM_OK) {
        manifest *it = cm_alloc(sizeof(*it));
        it->tensors = json_incref(json_object_get(root, "tensors"));
        it->config = json_incref(json_object_get(root, "config"));
        memcpy(it->fingerprint, json_string_value(json_object_get(root, "fingerprint")),
               sizeof(it->fingerprint));
        *manifest_out = it;
    }
    json_decref(root);
    return status;
}

cm_status manifest_load(const char *dir, manifest **manifest_out, cm_error *err)
{
    cm_bytes path;
    cm_bytes_init(&path, 0);
    cm_bytes_printf(&path, "%s/" MANIFEST_NAME, dir);
    cm_status status = load_path(cm_bytes_text(&path), manifest_out, err);
    cm_bytes_fini(&path);
    return status;
}

/* Of a checkpoint that opened; NULL when it is gone since. */
static json_t *load_config(const char *dir)
{
    cm_bytes path;
    cm_bytes_init(&path, 0);
    cm_bytes_printf(&path, "%s/config.json", dir);
    json_t *config = json_load_file(cm_bytes_text(&path), JSON_REJECT_DUPLICATES, NULL);
    cm_bytes_fini(&path);
    return config;
}

/* ---- writing ---- */

cm_status manifest_save(const manifest *it, const char *dir, const char *fingerprint, cm_error *err)
{
    cm_bytes text;
    json_t *config = load_config(dir);
    if (config == NULL) {
        return cm_error_set(err, CM_E_IO, "config.json", "%s/config.json changed while it was being verified",
                            dir);
    }
    cm_bytes_init(&text, 0);
    json_t *root = json_pack("{s:i, s:s, s:o, s:O}", "version", MANIFEST_VERSION, "fingerprint", fingerprint,
                             "config", config, "tensors", it->tensors);
    cli_append_json(&text, root, JSON_INDENT(1));
    cm_bytes_append(&text, "\n", 1);
    json_decref(root);
    cm_status status = replace_file(dir, MANIFEST_NAME, text.data, text.len, err);
    cm_bytes_fini(&text);
    return status;
}

/* ---- digests ---- */

void manifest_put(manifest *it, const char *name, const char *hex)
{
    json_object_set_new(it->tensors, name, json_string(hex));
}

const char *manifest_find(const manifest *it, const char *name)
{
    return json_string_value(json_object_get(it->tensors, name));
}

const char *manifest_fingerprint(const manifest *it)
{
    return it->fingerprint;
}

void manifest_each_extra(const manifest *it, const manifest *other, manifest_name_fn fn, void *ctx)
{
    const char *name;
    json_t *value;
    json_object_foreach(it->tensors, name, value)
    {
        if (manifest_find(other, name) == NULL) {
            fn(ctx, name);
        }
    }
}

/* ---- config.json then and now ---- */

typedef struct config_walk {
    manifest_change_fn fn;
    void *ctx;
} config_walk;

static void config_differs(const config_walk *w, const char *path, const json_t *was, const json_t *is)
{
    cm_bytes then, now;
    cm_bytes_init(&then, 0);
    cm_bytes_init(&now, 0);
    if (was != NULL) {
        cli_append_json(&then, was, JSON_ENCODE_ANY | JSON_COMPACT);
    }
    if (is != NULL) {
        cli_append_json(&now, is, JSON_ENCODE_ANY | JSON_COMPACT);
    }
    w->fn(w->ctx, path, was != NULL ? cm_bytes_text(&then) : "nothing",
          is != NULL ? cm_bytes_text(&now) : "nothing");
    cm_bytes_fini(&then);
    cm_bytes_fini(&now);
}

static void config_compare(const config_walk *w, const char *path, json_t *was, json_t *is)
{
    char below[160];
    const char *key, *dot = path[0] != '\0' ? "." : "";
    json_t *value;
    if (was != NULL && is != NULL && json_equal(was, is)) {
        return;
    }
    if (!json_is_object(was) || !json_is_object(is)) {
        config_differs(w, path, was, is);
        return;
    }
    json_object_foreach(was, key, value)
    {
        snprintf(below, sizeof(below), "%.60s%s%.90s", path, dot, key);
        config_compare(w, below, value, json_object_get(is, key));
    }
    json_object_foreach(is, key, value)
    {
        if (json_object_get(was, key) == NULL) {
            snprintf(below, sizeof(below), "%.60s%s%.90s", path, dot, key);
            config_differs(w, below, NULL, value);
        }
    }
}

void manifest_each_config_change(const manifest *it, const char *dir, manifest_change_fn fn, void *ctx)
{
    const config_walk walk = {fn, ctx};
    json_t *config = load_config(dir);
    if (config != NULL) {
        config_compare(&walk, "", it->config, config);
    }
    json_decref(config);
}
