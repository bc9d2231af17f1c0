/* The shape of a V4 model, read from its config.json and from nowhere else. Impossible combinations are
 * refused here, with the key named, so that nothing after the loader has to doubt a size. A value type: plain
 * numbers, copied freely. Thread: any. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/status.h"

enum {
    MD_LAYER_MAX = 256, /* trunk layers and drafter stages together */
    MD_STAGE_MAX = 8,   /* MTP or DSpark stages */
};

typedef enum md_expert_dtype { MD_EXPERT_FP4, MD_EXPERT_FP8 } md_expert_dtype;
typedef enum md_drafter { MD_DRAFTER_NONE, MD_DRAFTER_MTP, MD_DRAFTER_DSPARK } md_drafter;

typedef struct md_yarn {
    double factor;
    uint32_t original_positions;
    double beta_fast, beta_slow;
} md_yarn;

typedef struct md_geometry {
    uint32_t d;       /* hidden_size */
    uint32_t n_layer; /* trunk layers */
    uint32_t n_head;  /* query heads; one KV head */
    uint32_t head_dim, rope_dim;
    uint32_t q_rank;                            /* q_lora_rank */
    uint32_t o_groups, o_rank;                  /* output groups, rank of each */
    uint32_t window;                            /* raw rows every layer sees */
    uint32_t index_head, index_dim, index_topk; /* 0 without a ratio-4 layer */
    uint32_t n_expert, topk, n_shared,
        inner;             /* routed experts, chosen per token, shared experts, their inner size */
    uint32_t n_hash_layer; /* first layers, routed by token id */
    float route_scale, swiglu_limit, norm_eps;
    uint32_t hc, sinkhorn_iters;
    float hc_eps;
    uint32_t vocab, context; /* vocab_size, max_position_embeddings */
    uint32_t bos_id, eos_id;
    double rope_theta, compress_theta;
    md_yarn yarn;                 /* of layers with ratio != 0 */
    uint32_t ratio[MD_LAYER_MAX]; /* 0, 4 or 128 for layer 0 .. n_layer - 1, then one per drafter stage */
    md_expert_dtype expert_dtype;
    bool float_scales; /* block scales of E4M3 weights are F32 (-Base), not E8M0 */
    md_drafter drafter;
    uint32_t n_stage;     /* drafter stages: tensors mtp.0 .. */
    uint32_t dspark_rank; /* DSpark: markov rank */
    uint32_t dspark_target[MD_STAGE_MAX], n_dspark_target;
} md_geometry;

/* From the text of a config.json. CM_E_CORRUPT with err->field = the key. Unknown keys are ignored, unknown
 * values of known keys (scoring_func, hidden_act, ...) refused. float_scales stays false: md_checkpoint_open
 * finds it out from the tensors, since no key says it. */
CM_MUST_CHECK cm_status md_geometry_parse(const char *json, size_t n_bytes, md_geometry *geometry_out,
                                          cm_error *err);
/* Reads DIR/config.json. */
CM_MUST_CHECK cm_status md_geometry_load(const char *dir, md_geometry *geometry_out, cm_error *err);

/* Blocks that are served, the layers of a placement and of row frames: the trunk's, then the MTP block, if
 * there is one, as block n_layer. A DSpark drafter is not served. */
static inline uint32_t md_block_count(const md_geometry *g)
{
    return g->n_layer + (g->drafter == MD_DRAFTER_MTP ? 1 : 0);
}

enum { MD_BLOCK_NAME_MAX = 24 };
/* What the names of its tensors start with: "layers.12." or "mtp.0.". */
void md_block_name(const md_geometry *g, uint32_t block, char name_out[MD_BLOCK_NAME_MAX]);

static inline bool md_layer_is_hash(const md_geometry *g, uint32_t layer)
{
    return layer < g->n_hash_layer;
}
