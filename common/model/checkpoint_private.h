/* The parts of a checkpoint, for the files that open, compare and fingerprint it. */
#pragma once
#include <jansson.h>

#include "common/base/bytes.h"
#include "common/model/checkpoint.h"
#include "common/model/names_private.h"

typedef struct md_shard {
    char *name;           /* owned; as the index spells it */
    md_safetensors *file; /* owned; NULL when it could not be opened */
} md_shard;

/* One tensor that a shard holds. */
typedef struct md_entry {
    const md_tensor *tensor;
    uint32_t i_shard;
    bool indexed;  /* the index names it */
    bool expected; /* the closed list demands it */
    bool twice;    /* another shard has it too; reported, and compared no further */
} md_entry;

struct md_checkpoint {
    char *dir;
    cm_bytes config; /* text of config.json as parsed */
    md_geometry geometry;
    md_shard *shards; /* by ascending name, which is the order of the released files */
    uint32_t n_shards;
    md_entry *entries;
    uint32_t n_entries;
    md_names names; /* tensor name -> md_entry */
    uint64_t n_bytes;
};

/* Where findings go: all to fn, the first also to err. */
typedef struct md_report {
    md_finding_fn fn; /* may be NULL */
    void *ctx;
    cm_error *err; /* may be NULL */
    uint32_t n;
} md_report;

void md_report_add(md_report *report, const char *name, const char *fmt, ...) CM_PRINTF(3, 4);

/* Fills entries, names, n_bytes and geometry.float_scales from the open shards and compares them with the
 * index and the closed list. weight_map: tensor name -> shard name, all strings naming one of the shards;
 * borrowed. Linear in tensors. CM_E_MEMORY; what is wrong with the checkpoint goes to report. */
CM_MUST_CHECK cm_status md_audit(md_checkpoint *checkpoint, json_t *weight_map, md_report *report);

/* Index of a shard by name; n_shards when there is none. */
uint32_t md_checkpoint_shard(const md_checkpoint *checkpoint, const char *name);
