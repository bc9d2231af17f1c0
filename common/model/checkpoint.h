/* A released checkpoint: config.json, model.safetensors.index.json and its shards, held against the closed
 * list of tensors that the geometry demands (model section 8). Opening maps the shards and reads headers
 * only; weights are read when touched. Thread: after open any (read-only). */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/status.h"
#include "common/model/geometry.h"
#include "common/model/safetensors.h"

typedef struct md_checkpoint md_checkpoint;

/* One row of the closed list. */
typedef struct md_expect {
    char name[96];
    md_dtype dtype;
    uint32_t n_dim;
    uint64_t dim[MD_DIMS_MAX];
    const char *key[MD_DIMS_MAX]; /* what of config.json decides that size, in words; NULL: nothing */
} md_expect;

/* The whole list for a geometry, from arithmetic alone, in the order of the released shards (embed, layers,
 * head, stages). Calls fn for each row until it returns false. */
typedef bool (*md_expect_fn)(void *ctx, const md_expect *expect);
void md_expect_each(const md_geometry *geometry, md_expect_fn fn, void *ctx);
/* Number of tensors and sum of their bytes. */
void md_expect_totals(const md_geometry *geometry, uint64_t *n_tensors_out, uint64_t *n_bytes_out);

/* What is wrong with one tensor, or with the set. */
typedef struct md_finding {
    char name[96];
    char text[256];
} md_finding;
typedef void (*md_finding_fn)(void *ctx, const md_finding *finding);

/* Opens DIR and checks it against the closed list: every tensor there, none more, names, shapes, dtypes,
 * index and shards agreeing. The first finding is the error (CM_E_CORRUPT, err->field = tensor or file); fn,
 * if not NULL, gets all of them, the first included. */
CM_MUST_CHECK cm_status md_checkpoint_open(const char *dir, md_checkpoint **checkpoint_out, md_finding_fn fn,
                                           void *ctx, cm_error *err);
void md_checkpoint_close(md_checkpoint *checkpoint);
const md_geometry *md_checkpoint_geometry(const md_checkpoint *checkpoint);
const char *md_checkpoint_dir(const md_checkpoint *checkpoint);
/* NULL never happens for a name of the closed list; a name outside it is our bug (assertion). */
const md_tensor *md_checkpoint_tensor(const md_checkpoint *checkpoint, const char *fmt, ...) CM_PRINTF(2, 3);
uint64_t md_checkpoint_bytes(const md_checkpoint *checkpoint); /* of all tensors */

/* Values that loading checks in what it reads: a NaN scale byte (E8M0 255), a non-finite F32 scale, an E4M3
 * NaN code, a repeated or out-of-range expert in tid2eid. CM_E_CORRUPT names tensor, row and value. */
CM_MUST_CHECK cm_status md_tensor_check_values(const md_tensor *tensor, const md_geometry *geometry,
                                               cm_error *err);

/* 128-bit identity of a checkpoint: config.json, all shard headers, and samples of the data of every shard.
 * Cheap (megabytes read, whatever the size); two processes with the same fingerprint hold the same weights
 * for all that an operator can mix up. out: 32 lower-case hex digits and NUL. */
CM_MUST_CHECK cm_status md_checkpoint_fingerprint(const md_checkpoint *checkpoint, char out[33],
                                                  cm_error *err);

/* In its place where no weights are served: routers that answer from a script under a name, and the gateways
 * that serve it. No checkpoint has one like it. */
void md_scripted_fingerprint(const char *name, char out[33]);

/* Bytes of one routed expert (weights and scales). */
uint64_t md_expert_bytes(const md_geometry *geometry);
