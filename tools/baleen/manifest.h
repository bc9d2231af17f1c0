/* DIR/baleen.manifest.json: what every tensor of a checkpoint was when somebody trusted it. The released
 * index has no digests, so a flipped bit in a weight is seen against this file only.
 *   {"version": 1, "fingerprint": HEX, "config": config.json as it was, "tensors": {NAME: XXH3-128 of its
 *   bytes, HEX}}
 * Thread: one at a time. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common/base/status.h"

#define MANIFEST_NAME "baleen.manifest.json"

typedef struct manifest manifest;
typedef struct manifest_digest {
    uint8_t bytes[16]; /* big-endian, as XXH3 prints it */
    char hex[33];
} manifest_digest;

manifest_digest manifest_digest_of(const void *data, size_t n_bytes);

manifest *manifest_create(void);
/* *manifest_out is NULL when there is no such file. CM_E_CORRUPT for one that is no manifest of this version,
 * CM_E_IO. */
CM_MUST_CHECK cm_status manifest_load(const char *dir, manifest **manifest_out, cm_error *err);
void manifest_destroy(manifest *it);
/* Replaces the file in one step. CM_E_IO. */
CM_MUST_CHECK cm_status manifest_save(const manifest *it, const char *dir, const char *fingerprint,
                                      cm_error *err);

void manifest_put(manifest *it, const char *name, const char *hex);
const char *manifest_find(const manifest *it, const char *name); /* NULL when absent; borrowed */
const char *manifest_fingerprint(const manifest *it);            /* of one that was loaded; borrowed */
/* Names that are in one and not in the other. */
typedef void (*manifest_name_fn)(void *ctx, const char *name);
void manifest_each_extra(const manifest *it, const manifest *other, manifest_name_fn fn, void *ctx);

/* What config.json says otherwise than when the manifest was written: path of the key
 * ("rope_scaling.factor"), then and now as JSON; "nothing" where one lacks it. */
typedef void (*manifest_change_fn)(void *ctx, const char *path, const char *was, const char *is);
void manifest_each_config_change(const manifest *it, const char *dir, manifest_change_fn fn, void *ctx);
