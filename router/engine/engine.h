/* The dense path of a router and the dispatch of rows to experts, as a library: weights, KV, one forward pass
 * per step. Used by the router process, by `baleen logits`, and by tests. Everything is taken at create; a
 * step allocates nothing. Thread: one compute thread for life (create may run on another before it starts),
 * but for the calls marked "any". */
#pragma once
#include "common/model/checkpoint.h"
#include "kernels/kn.h"
#include "router/engine/batch.h"
#include "router/engine/exchange.h"
#include "router/engine/kv.h"
#include "router/sched/sched_core.h"

typedef struct rt_engine rt_engine;

/* Points inside a step where a tap may look (tests, bisection). */
typedef enum rt_tap_point {
    RT_TAP_STREAMS_IN,   /* BF16 [n_row][hc][d], before the layer */
    RT_TAP_ATTN_IN,      /* BF16 [n_row][d], after attn_norm */
    RT_TAP_PICKS,        /* int32 [n_row][index_topk]; ratio 4 only */
    RT_TAP_ATTN_OUT,     /* BF16 [n_row][d] */
    RT_TAP_STREAMS_MID,  /* BF16 [n_row][hc][d] */
    RT_TAP_FFN_IN,       /* BF16 [n_row][d], after ffn_norm */
    RT_TAP_EXPERTS,      /* int32 [n_row][topk] */
    RT_TAP_ROUTE,        /* F32 [n_row][topk] */
    RT_TAP_FFN_OUT,      /* BF16 [n_row][d] */
    RT_TAP_STREAMS_OUT,  /* BF16 [n_row][hc][d] */
    RT_TAP_LOGITS,       /* F32 [n_row][vocab], of every row that gave a token; layer = n_layer */
    RT_TAP_DRAFT_LOGITS, /* F32 [n_row][vocab], of every seg that wants this guess; layer = the guess, from 0
                          */
} rt_tap_point;
/* Once for each micro-batch: data holds its rows, row0 .. row0 + n_row - 1 of the step. Logits come once,
 * row0 0. */
typedef void (*rt_tap_fn)(void *ctx, uint32_t layer, rt_tap_point point, const rt_step *step, uint32_t row0,
                          const void *data, uint64_t row_bytes, uint32_t n_row);

typedef struct rt_engine_options {
    const md_checkpoint *checkpoint; /* kept */
    kn_device_options device;
    net_options rows;            /* the net object for expert ranks */
    const net_ops *rows_ops;     /* benchmarks: its back-end; NULL: the one that rows names */
    uint32_t row_max;            /* rows of a step */
    uint32_t slot_max;           /* sequences at once */
    uint64_t kv_bytes;           /* memory for KV pages */
    uint64_t prefix_bytes;       /* memory for states to go on from; 0: none is kept */
    uint32_t draft_max;          /* tokens guessed ahead; 0: none; RT_DRAFT_MAX at most */
    uint32_t answer_ms, wait_ms; /* see rt_exchange_options */
    uint32_t micro_batches;      /* 1, 2: of every step; 0: what pays */
    void (*peer_lost)(void *ctx, uint32_t member_id, cm_status status);
    void *ctx;
} rt_engine_options;

/* CM_E_CORRUPT, CM_E_MEMORY, CM_E_CONFIG with a sentence. */
CM_MUST_CHECK cm_status rt_engine_create(const rt_engine_options *options, rt_engine **engine_out,
                                         cm_error *err);
void rt_engine_destroy(rt_engine *engine);

/* Limits a scheduler must keep to: slots, rows, pages, context. */
void rt_engine_sched_limits(const rt_engine *engine, rt_sched_limits *limits_out);
const rt_kv_layout *rt_engine_kv(const rt_engine *engine);
rt_exchange *rt_engine_exchange(rt_engine *engine); /* epochs go in through it (any thread) */
void rt_engine_set_tap(rt_engine *engine, rt_tap_fn tap, void *ctx);
void rt_engine_set_cut(rt_engine *engine, rt_cut_fn cut, void *ctx); /* tests: cuts of their own */

/* One forward pass. results_out[i] for the i-th segment with sample. CM_E_NO_OWNER, CM_E_CANCELLED from the
 * exchange, CM_E_DEVICE; then nothing of the step counts and its sequences must start over or end. */
CM_MUST_CHECK cm_status rt_engine_step(rt_engine *engine, const rt_step *step, rt_step_result *results_out);
/* Logits of the last step: F32 [vocab] of the last n_draft + 1 rows of each segment with sample, valid until
 * the next. */
const float *rt_engine_logits(const rt_engine *engine);
