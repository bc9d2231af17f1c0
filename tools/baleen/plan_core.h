/* What a cluster of given sizes holds and how fast its memory, arithmetic and links would let it be:
 * arithmetic on the geometry alone, nothing is measured. Used by `baleen plan`. Thread: any. */
#pragma once
#include "common/model/geometry.h"

typedef struct plan_model {
    md_geometry geometry;
    uint32_t draft_max;
    uint64_t tensors, bytes; /* of the checkpoint */
    uint64_t expert_bytes;   /* one routed expert */
    uint64_t experts_bytes;  /* all of them, those of the MTP block too */
    uint64_t embed_bytes;    /* looked up, not read through */
    uint64_t router_bytes;   /* all a router holds: everything but the routed experts */
    uint64_t step_bytes;     /* what a router reads for a step whatever its rows: the trunk without embed */
    uint64_t kv_page_bytes;  /* for 128 tokens of a sequence */
    uint64_t kv_slot_bytes;  /* for a sequence, whatever its length */
    double dense_values;     /* weights that each row is multiplied by outside the routed experts */
    double expert_values;    /* of one routed expert */
} plan_model;

/* draft_max as the router's option; 0 where the checkpoint has no MTP block. */
void plan_model_of(const md_geometry *geometry, uint32_t draft_max, plan_model *model_out);

typedef struct plan_cluster {
    uint32_t n_worker, n_router;
    uint32_t context;    /* tokens of each sequence */
    double read_bytes_s; /* memory of one worker, and of one router */
    double flops_s;      /* of either; 0: arithmetic costs nothing */
    double link_bytes_s; /* one direction of one router's link; 0: links cost nothing */
} plan_cluster;

/* Experts that the fullest of n_worker workers holds. */
uint64_t plan_worker_experts(const plan_model *model, uint32_t n_worker);
/* The fewest workers of bytes each that hold all experts; 0: bytes does not hold a single one. */
uint32_t plan_workers_min(const plan_model *model, uint64_t bytes);
/* Sequences of n_token tokens that kv_bytes hold. */
uint64_t plan_sequences(const plan_model *model, uint64_t kv_bytes, uint64_t n_token);

/* A decode step in which each router has n_row sequences. Routing uniform, no speculation. */
typedef struct plan_step {
    double hit;                             /* experts of a layer that a worker reads */
    double dense_s, experts_s, attention_s; /* all layers; each the longer of reading and multiplying */
    double link_bytes;                      /* of one router, the busier direction */
    double link_s;
    double over_s, serial_s; /* the step if links are hidden behind the rest, and if nothing is */
} plan_step;
void plan_step_of(const plan_model *model, const plan_cluster *cluster, uint32_t n_row, plan_step *step_out);
