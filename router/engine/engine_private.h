/* The engine's inside, for router/engine and for tests of single sub-blocks. */
#pragma once
#include "router/engine/engine.h"
#include "router/engine/masks.h"
#include "router/engine/sample.h"
#include "router/engine/weights.h"

/* Device memory of one step, or of a micro-batch of it; row counts are row_max unless said. What is counted
 * by rows belongs to a micro-batch until the step is over: nothing of it is shared by two. */
typedef struct rt_buffers {
    kn_ptr ids, pos;    /* uint32 [n] */
    kn_ptr segs, pages; /* kn_seg [slot_max + 1], uint32 [all pages of all sequences] */
    kn_ptr x;           /* BF16 [n][hc][d] streams */
    kn_ptr in, out;     /* BF16 [n][d] input and output of a site */
    kn_ptr post, comb;  /* F32 [n][hc], [n][hc][hc] */
    kn_q8 q8, q8_low; /* quantized rows: of the site's input or output projection; of the query's low rank */
    kn_ptr qr, q, kv, rows;        /* BF16 [n][q_rank], [n][head][dim], [n][dim]; stored rows */
    kn_ptr o, t;                   /* BF16 [n][head][dim], [n][o_groups * o_rank] */
    kn_ptr ckv, cscore;            /* F32 [n][width] of the main compressor */
    kn_ptr ikv, iscore;            /* F32 [n][width] of the indexer's */
    kn_ptr iq, iq_rows, iw;        /* BF16 [n][index_head][index_dim], stored, BF16 [n][index_head] */
    kn_ptr picks;                  /* int32 [n][index_topk] */
    kn_ptr cs_window, cs_compress; /* F32 [n][rope / 2][2] */
    kn_ptr experts, route;         /* int32, F32 [n][topk] */
    kn_ptr g, u, h;                /* BF16 [n][inner] shared expert */
    kn_q8 q8_h;
    kn_ptr shared;       /* BF16 [n][d] */
    kn_ptr slots;        /* BF16 [n][topk][d] results of routed experts */
    kn_ptr last, logits; /* BF16 [n_out][d], F32 [n_out][vocab]: rows that give a token, see rt_out_max */
} rt_buffers;

/* Rows of a step that go through the layers together; while one micro-batch's rows are with the experts the
 * other is computed. */
typedef struct rt_micro {
    uint32_t row0;    /* its first row in the step */
    uint32_t pos_end; /* all its rows' positions are below */
    kn_batch batch;
    rt_buffers buf;        /* the step's, from row0 on */
    int32_t *host_experts; /* [n_row][topk] likewise */
    float *host_route;
} rt_micro;

struct rt_engine {
    rt_engine_options options;
    const md_geometry *geometry;
    kn_device *device;
    kn_stream *stream;
    const kn_dense_ops *dense;
    const kn_attn_ops *attn;
    const kn_moe_ops *moe;
    rt_weights weights;
    rt_kv_layout kv;
    kn_ptr page_pool, slot_pool, kept_pool;
    uint32_t n_page, n_state;
    uint32_t page_list_max; /* pages of all sequences of a step: those that several share count for each */
    rt_buffers buf;
    rt_exchange *exchange;
    rt_sample_scratch *scratch;
    rt_masks *masks;
    uint32_t draft_max; /* 0: no speculation */
    uint64_t n_pass;    /* forward passes ever: what row frames call the step */
    rt_sampler guess_sampler;
    rt_tap_fn tap;
    void *tap_ctx;
    rt_cut_fn cut; /* NULL: rt_micro_cut */
    void *cut_ctx;
    rt_micro_core micro_core;

    /* the step under way */
    const rt_step *step;
    uint32_t n_save; /* of its saves, while the batch is the step's rows; then 0 */
    rt_micro micros[RT_MICRO_MAX];
    rt_batch host;         /* of the pass under way */
    int32_t *host_experts; /* [row_max][topk] */
    float *host_route;
    float *host_logits;  /* [rt_out_max][vocab] */
    uint32_t *host_last; /* [slot_max]: row of the newest token of each segment that is guessed for */
};

CM_MUST_CHECK cm_status rt_buffers_create(rt_engine *engine, cm_error *err);
void rt_buffers_destroy(rt_engine *engine);
/* The step's buffers from row0 on. */
void rt_buffers_from(rt_engine *engine, uint32_t row0, rt_buffers *buffers_out);

/* What a sequence goes on from besides its pages (states.c). Load: the step's, before its first layer. Save:
 * one layer's part of those that end in a micro-batch, after compress and before the commits. */
void rt_states_load(rt_engine *engine, const rt_step *step);
void rt_states_save(rt_engine *engine, const rt_micro *micro, uint32_t layer);

/* Rows of a step that give a token, at most. */
uint32_t rt_out_max(const rt_engine *engine);
/* Puts a step's ids, positions, segments and pages on the device. */
void rt_step_begin(rt_engine *engine, const rt_step *step);
/* The rows are what `host` says, from here on, in n_micro micro-batches. */
void rt_place_rows(rt_engine *engine, uint32_t n_micro);
/* Blocks first .. end - 1 over all rows: streams in buf.x to streams in buf.x. */
CM_MUST_CHECK cm_status rt_blocks(rt_engine *engine, uint32_t first, uint32_t end);
/* Logits of the n rows in buf.last, already the output of an hc_head, behind `norm`, into host_logits. */
CM_MUST_CHECK cm_status rt_logits(rt_engine *engine, kn_ptr norm, uint32_t n);
/* After the tokens of the step are drawn: runs the MTP block over the step's rows and guesses what follows
 * (draft.c). */
CM_MUST_CHECK cm_status rt_draft(rt_engine *engine, rt_step_result *results);
/* Of one micro-batch: buf.in (attn_norm-ed rows) -> buf.out; enters the rows into windows, pages and states.
 */
void rt_layer_attention(rt_engine *engine, const rt_micro *micro, uint32_t layer);
/* buf.in (ffn_norm-ed rows) go to the experts and through the shared one. */
CM_MUST_CHECK cm_status rt_layer_moe_begin(rt_engine *engine, const rt_micro *micro, uint32_t layer);
/* The shared expert, while rows fly: quantized rows in buf.q8 -> buf.shared. */
void rt_layer_shared(rt_engine *engine, const rt_micro *micro, const rt_layer *layer);
/* The experts' rows -> buf.out. */
CM_MUST_CHECK cm_status rt_layer_moe_finish(rt_engine *engine, const rt_micro *micro);
void rt_tap_at(rt_engine *engine, const rt_micro *micro, uint32_t layer, rt_tap_point point, kn_ptr data,
               uint64_t row_bytes);
