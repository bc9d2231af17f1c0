#include "tools/baleen/manifest.h"

#include <errno.h>
#include <jansson.h>
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

/* ---- writing ---- */

cm_status manifest_save(const manifest *it, const char *dir, const char *fingerprint, cm_error *err)
{
    cm_bytes text;
    cm_bytes_init(&text, 0);
    json_t *root = json_pack("{s:i, s:s, s:O}", "version", MANIFEST_VERSION, "fingerprint", fingerprint,
                             "tensors", it->tensors);
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
