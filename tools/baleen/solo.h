/* A cluster inside one process, without coordinator: one router engine and N expert engines on threads of
 * their own, the same objects and messages as between processes. For `baleen logits` and for tests. Thread:
 * the caller's is the router's compute thread. */
#pragma once
#include "router/engine/engine.h"

typedef struct solo solo;

typedef struct solo_options {
    const char *model;     /* folder */
    uint32_t n_worker;     /* >= 1 */
    const char *transport; /* "local" or "ucx" */
    const char *device;    /* "cpu" or "ref" */
    const char *isa;       /* "auto" or a path name */
    uint32_t n_threads;    /* of each engine */
    uint32_t row_max, slot_max;
    uint64_t kv_bytes;
    uint32_t draft_max;     /* 0: no speculation */
    uint32_t micro_batches; /* as rt_engine_options */
} solo_options;
void solo_options_defaults(solo_options *options);

/* Ready when it returns: experts loaded, links up. */
CM_MUST_CHECK cm_status solo_create(const solo_options *options, solo **solo_out, cm_error *err);
void solo_destroy(solo *s);
rt_engine *solo_engine(solo *s);
const md_geometry *solo_geometry(const solo *s);

/* The pages of a slot, [*n_out]: for steps that a test makes itself. */
const uint32_t *solo_pages(const solo *s, uint32_t slot, uint32_t *n_out);

/* One forward pass of one sequence's rows pos0 .. pos0 + n_row - 1 in a slot; with sample, *token_out is the
 * greedy choice after the last of them and rt_engine_logits(solo_engine(s)) its logits. */
CM_MUST_CHECK cm_status solo_step(solo *s, uint32_t slot, uint32_t pos0, const uint32_t *tokens,
                                  uint32_t n_row, bool sample, uint32_t *token_out);
/* One sequence from its prompt: prefill in chunks of at most chunk rows, then n_greedy greedy tokens, stop
 * ids ignored. last_logits (may be NULL): F32 [vocab], of the last prompt position. slot: 0 .. slot_max - 1.
 */
CM_MUST_CHECK cm_status solo_greedy(solo *s, uint32_t slot, const uint32_t *prompt, uint32_t n_prompt,
                                    uint32_t chunk, uint32_t n_greedy, uint32_t *greedy_out,
                                    float *last_logits);
