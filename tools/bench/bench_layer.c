/* cpu.layer_decode: one layer of ratio 4 and one of ratio 128 at the sizes of V4-Pro, over a synthetic
 * checkpoint with 16 experts a layer, at 8192 tokens of context. The router's engine runs its own operations
 * in their order; rows go to no worker: their experts are computed here, by the same thread. A line for each
 * kind of operation says what to speed up. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "kernels/kn_math.h"
#include "router/engine/engine_private.h"
#include "tools/bench/bench.h"
#include "tools/baleen/cli.h"
#include "tools/bench/bench_room.h"
#include "tools/bench/synthetic.h"

static const char CONFIG[] =
    "{\"architectures\":[\"DeepseekV4ForCausalLM\"],\"model_type\":\"deepseek_v4\",\"num_key_value_heads\":1,"
    "\"head_dim\":512,\"qk_rope_head_dim\":64,\"sliding_window\":128,\"index_head_dim\":128,"
    "\"num_experts_per_tok\":6,\"n_shared_experts\":1,\"scoring_func\":\"sqrtsoftplus\","
    "\"topk_method\":\"noaux_tc\",\"norm_topk_prob\":true,\"swiglu_limit\":10.0,\"rms_norm_eps\":1e-06,"
    "\"hc_mult\":4,\"hc_sinkhorn_iters\":20,\"hc_eps\":1e-06,\"num_nextn_predict_layers\":0,"
    "\"bos_token_id\":0,\"eos_token_id\":1,\"tie_word_embeddings\":false,\"hidden_act\":\"silu\","
    "\"attention_bias\":false,\"attention_dropout\":0.0,\"torch_dtype\":\"bfloat16\",\"rope_theta\":10000.0,"
    "\"compress_rope_theta\":160000.0,\"hidden_size\":7168,\"num_hidden_layers\":2,"
    "\"num_attention_heads\":128,\"q_lora_rank\":1536,\"o_groups\":16,\"o_lora_rank\":1024,"
    "\"index_n_heads\":64,\"index_topk\":1024,\"n_routed_experts\":16,\"moe_intermediate_size\":3072,"
    "\"routed_scaling_factor\":2.5,\"num_hash_layers\":0,\"vocab_size\":1024,\"compress_ratios\":[4,128],"
    "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":16,\"original_max_position_embeddings\":65536,"
    "\"beta_fast\":32,\"beta_slow\":1},\"max_position_embeddings\":16384,\"expert_dtype\":\"fp4\","
    "\"quantization_config\":{\"activation_scheme\":\"dynamic\",\"fmt\":\"e4m3\",\"quant_method\":\"fp8\","
    "\"weight_block_size\":[128,128],\"scale_fmt\":\"ue8m0\"}}";

enum {
    LAYER_SEED = 13,
    LAYERS = 2,
    LAYER_CONTEXT = 8192, /* position of the row of every sequence */
    LAYER_SEQUENCES = 4,
    LAYER_PAGES = LAYER_CONTEXT / KN_PAGE_TOKENS + 1, /* of one sequence */
    LAYER_CASES = 2,
    LAYER_TOPK_MAX = 8,
};
static const uint32_t LAYER_ROWS[LAYER_CASES] = {1, LAYER_SEQUENCES};

/* Kinds of operations, in the order of a layer. */
#define LINES(X)                                                                                             \
    X(HC, "hyper-connections")                                                                               \
    X(NORM, "norms")                                                                                         \
    X(QUANT, "quantize rows")                                                                                \
    X(WQ_A, "wq_a FP8")                                                                                      \
    X(WQ_B, "wq_b FP8")                                                                                      \
    X(WKV, "wkv FP8")                                                                                        \
    X(ROPE, "rope, pack")                                                                                    \
    X(COMPRESSOR, "compressors BF16")                                                                        \
    X(COMPRESS, "pool, commit")                                                                              \
    X(INDEX_Q, "indexer wq_b FP8")                                                                           \
    X(INDEX_W, "indexer weights BF16")                                                                       \
    X(TOPK, "indexer scan, top-k")                                                                           \
    X(ATTENTION, "attention")                                                                                \
    X(WO_A, "wo_a FP8 x BF16")                                                                               \
    X(WO_B, "wo_b FP8")                                                                                      \
    X(GATE, "gate BF16")                                                                                     \
    X(SHARED, "shared expert FP8")                                                                           \
    X(SWIGLU, "swiglu")                                                                                      \
    X(EXPERTS, "routed experts FP4")                                                                         \
    X(COMBINE, "combine")

#define LINE_ID(id, name) LINE_##id,
typedef enum line { LINES(LINE_ID) N_LINE } line;
#define LINE_NAME(id, name) name,
static const char *const LINE_NAMES[N_LINE] = {LINES(LINE_NAME)};

/* What one run of a layer took, by kind of operation. */
typedef struct tally {
    double seconds[N_LINE];
    uint64_t bytes[N_LINE]; /* weights and stored rows it cannot do without reading once */
    double all;             /* seconds of the whole layer */
} tally;

/* One engine over the checkpoint, with the experts that a worker would have. */
typedef struct bench_engine {
    rt_engine *engine;
    kn_expert *experts; /* [LAYERS][n_expert] */
    kn_ptr copies;      /* of the experts, in the device's order */
    uint64_t copies_bytes;
} bench_engine;

typedef struct layer_case {
    uint32_t layer, n_row;
    bench_samples ratio, all, seconds[N_LINE], ratios[N_LINE];
    uint64_t bytes[N_LINE];
} layer_case;

/* ---- operations that note what they take ----
 * The engine calls through its tables; while a layer is measured these stand in them. One engine at a time.
 */

static struct {
    const bench_config *config;
    const kn_dense_ops *dense;
    const kn_attn_ops *attn;
    const kn_moe_ops *moe;
    const rt_engine *engine;
    tally *tally;
} g_timed;

#define TIMED(line_, bytes_, call_)                                                                          \
    do {                                                                                                     \
        double start_ = bench_now(g_timed.config);                                                           \
        call_;                                                                                               \
        g_timed.tally->seconds[line_] += bench_now(g_timed.config) - start_;                                 \
        g_timed.tally->bytes[line_] += (bytes_);                                                             \
    } while (0)

static uint64_t matrix_bytes(const kn_matrix *w)
{
    uint64_t n = (uint64_t)w->n_out * w->n_in;
    uint64_t blocks = (uint64_t)kn_blocks(w->n_out, KN_ACT_BLOCK) * kn_blocks(w->n_in, KN_ACT_BLOCK);
    return w->dtype == KN_BF16   ? 2 * n
           : w->dtype == KN_E2M1 ? n / 2 + (uint64_t)w->n_out * kn_blocks(w->n_in, KN_FP4_BLOCK)
                                 : n + blocks * (w->scale_dtype == KN_F32 ? 4 : 1);
}

static line line_of(const kn_matrix *w)
{
    for (uint32_t l = 0; l < LAYERS; l++) {
        const rt_layer *layer = &g_timed.engine->weights.layers[l];
        const struct {
            const kn_matrix *w;
            line line;
        } table[] = {{&layer->wq_a, LINE_WQ_A},
                     {&layer->wq_b, LINE_WQ_B},
                     {&layer->wkv, LINE_WKV},
                     {&layer->wo_b, LINE_WO_B},
                     {&layer->main.wkv, LINE_COMPRESSOR},
                     {&layer->main.wgate, LINE_COMPRESSOR},
                     {&layer->index.wkv, LINE_COMPRESSOR},
                     {&layer->index.wgate, LINE_COMPRESSOR},
                     {&layer->index_wq_b, LINE_INDEX_Q},
                     {&layer->index_weights, LINE_INDEX_W},
                     {&layer->shared_w1, LINE_SHARED},
                     {&layer->shared_w2, LINE_SHARED},
                     {&layer->shared_w3, LINE_SHARED}};
        for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
            if (table[i].w == w) {
                return table[i].line;
            }
        }
    }
    CM_ASSERT_MSG(false, "a matrix of no layer, %u x %u", w->n_out, w->n_in);
    return N_LINE;
}

static void timed_hc_pre(kn_stream *s, const kn_hc *p, kn_ptr x, uint32_t n, kn_ptr x_out, kn_ptr post,
                         kn_ptr comb)
{
    TIMED(LINE_HC, 4ull * (2 + p->hc) * p->hc * p->hc * p->d,
          g_timed.dense->hc_pre(s, p, x, n, x_out, post, comb));
}

static void timed_hc_post(kn_stream *s, uint32_t d, uint32_t hc, kn_ptr y, kn_ptr x, kn_ptr post, kn_ptr comb,
                          uint32_t n, kn_ptr x_out)
{
    TIMED(LINE_HC, 0, g_timed.dense->hc_post(s, d, hc, y, x, post, comb, n, x_out));
}

static void timed_rmsnorm(kn_stream *s, kn_ptr x, kn_ptr w, uint32_t n, uint32_t d, float eps, kn_ptr y)
{
    TIMED(LINE_NORM, 0, g_timed.dense->rmsnorm(s, x, w, n, d, eps, y));
}

static void timed_quant_act(kn_stream *s, kn_ptr x, uint32_t n, uint32_t k, kn_q8 q)
{
    TIMED(LINE_QUANT, 0, g_timed.dense->quant_act(s, x, n, k, q));
}

static void timed_linear_q8(kn_stream *s, kn_q8 x, const kn_matrix *w, uint32_t n, kn_ptr y)
{
    TIMED(line_of(w), matrix_bytes(w), g_timed.dense->linear_q8(s, x, w, n, y));
}

static void timed_linear_bf16(kn_stream *s, kn_ptr x, const kn_matrix *w, uint32_t n, kn_dtype dtype,
                              kn_ptr y)
{
    TIMED(line_of(w), matrix_bytes(w), g_timed.dense->linear_bf16(s, x, w, n, dtype, y));
}

static void timed_linear_grouped(kn_stream *s, kn_ptr x, const kn_matrix *w, uint32_t groups, uint32_t n,
                                 kn_ptr y)
{
    TIMED(LINE_WO_A, matrix_bytes(w), g_timed.dense->linear_grouped(s, x, w, groups, n, y));
}

static void timed_rope(kn_stream *s, kn_ptr x, uint32_t n, uint32_t heads, uint32_t dim, uint32_t half,
                       kn_ptr cs, bool inverse)
{
    TIMED(LINE_ROPE, 0, g_timed.attn->rope(s, x, n, heads, dim, half, cs, inverse));
}

static void timed_kv_pack(kn_stream *s, kn_ptr kv, uint32_t n, uint32_t dim, uint32_t rope, kn_ptr rows)
{
    TIMED(LINE_ROPE, 0, g_timed.attn->kv_pack(s, kv, n, dim, rope, rows));
}

static void timed_index_pack(kn_stream *s, kn_ptr x, uint32_t n, uint32_t heads, uint32_t dim, kn_ptr rows)
{
    TIMED(LINE_ROPE, 0, g_timed.attn->index_pack(s, x, n, heads, dim, rows));
}

static void timed_compress(kn_stream *s, const kn_batch *b, const kn_compress *c, kn_ptr kv, kn_ptr score)
{
    TIMED(LINE_COMPRESS, 0, g_timed.attn->compress(s, b, c, kv, score));
}

static void timed_compress_commit(kn_stream *s, const kn_batch *b, const kn_compress *c, kn_ptr kv,
                                  kn_ptr score)
{
    TIMED(LINE_COMPRESS, 0, g_timed.attn->compress_commit(s, b, c, kv, score));
}

static void timed_index_topk(kn_stream *s, const kn_batch *b, const kn_kv_layout *layout, uint32_t heads,
                             uint32_t dim, uint32_t topk, kn_ptr iq, kn_ptr w, kn_ptr picks)
{
    TIMED(LINE_TOPK, (uint64_t)b->n_row * LAYER_CONTEXT / layout->ratio * layout->index_bytes,
          g_timed.attn->index_topk(s, b, layout, heads, dim, topk, iq, w, picks));
}

static void timed_attention(kn_stream *s, const kn_batch *b, const kn_attn *a, kn_ptr q, kn_ptr rows,
                            kn_ptr picks, kn_ptr o)
{
    uint64_t compressed = a->layout.ratio == 4 ? a->topk : LAYER_CONTEXT / a->layout.ratio;
    TIMED(LINE_ATTENTION, b->n_row * (a->window + compressed) * a->layout.row_bytes,
          g_timed.attn->attention(s, b, a, q, rows, picks, o));
}

static void timed_raw_commit(kn_stream *s, const kn_batch *b, const kn_attn *a, kn_ptr rows)
{
    TIMED(LINE_COMPRESS, 0, g_timed.attn->raw_commit(s, b, a, rows));
}

static void timed_gate(kn_stream *s, const kn_gate *g, kn_ptr x, kn_ptr ids, uint32_t n, kn_ptr experts,
                       kn_ptr weights)
{
    TIMED(LINE_GATE, matrix_bytes(&g->weight), g_timed.moe->gate(s, g, x, ids, n, experts, weights));
}

static void timed_swiglu(kn_stream *s, kn_ptr g, kn_ptr u, kn_ptr weight, uint32_t n, uint32_t inner,
                         float limit, kn_ptr h)
{
    TIMED(LINE_SWIGLU, 0, g_timed.moe->swiglu(s, g, u, weight, n, inner, limit, h));
}

static void timed_experts(kn_stream *s, const kn_expert_group *groups, uint32_t n_group,
                          const kn_expert_item *items, kn_q8 x, float limit, kn_ptr y)
{
    const kn_expert *one = groups[0].expert;
    uint64_t bytes = matrix_bytes(&one->w1) + matrix_bytes(&one->w3) + matrix_bytes(&one->w2);
    TIMED(LINE_EXPERTS, n_group * bytes, g_timed.moe->experts(s, groups, n_group, items, x, limit, y));
}

static void timed_combine(kn_stream *s, kn_ptr y, kn_ptr experts, kn_ptr shared, uint32_t n, uint32_t topk,
                          uint32_t d, kn_ptr out)
{
    TIMED(LINE_COMBINE, 0, g_timed.moe->combine(s, y, experts, shared, n, topk, d, out));
}

static const kn_dense_ops TIMED_DENSE = {.hc_pre = timed_hc_pre,
                                         .hc_post = timed_hc_post,
                                         .rmsnorm = timed_rmsnorm,
                                         .quant_act = timed_quant_act,
                                         .linear_q8 = timed_linear_q8,
                                         .linear_bf16 = timed_linear_bf16,
                                         .linear_grouped = timed_linear_grouped};
static const kn_attn_ops TIMED_ATTN = {.rope = timed_rope,
                                       .kv_pack = timed_kv_pack,
                                       .index_pack = timed_index_pack,
                                       .compress = timed_compress,
                                       .compress_commit = timed_compress_commit,
                                       .index_topk = timed_index_topk,
                                       .attention = timed_attention,
                                       .raw_commit = timed_raw_commit};
static const kn_moe_ops TIMED_MOE = {
    .gate = timed_gate, .swiglu = timed_swiglu, .experts = timed_experts, .combine = timed_combine};

/* ---- one layer ---- */

/* The rows' experts, one group each, as a worker gathers them. */
static void run_experts(bench_engine *b, uint32_t layer)
{
    rt_engine *e = b->engine;
    const rt_micro *m = &e->micros[0];
    const md_geometry *g = e->geometry;
    uint32_t n_slot = m->batch.n_row * g->topk, n_group = 0, n_item = 0;
    kn_expert_group groups[LAYER_SEQUENCES * LAYER_TOPK_MAX];
    kn_expert_item items[LAYER_SEQUENCES * LAYER_TOPK_MAX];
    kn_copy_to_host(e->stream, m->host_experts, m->buf.experts, 4ull * n_slot);
    kn_copy_to_host(e->stream, m->host_route, m->buf.route, 4ull * n_slot);
    for (uint32_t x = 0; x < g->n_expert; x++) {
        kn_expert_group group = {&b->experts[layer * g->n_expert + x], n_item, 0};
        for (uint32_t i = 0; i < n_slot; i++) {
            if (m->host_experts[i] == (int32_t)x) {
                items[n_item++] = (kn_expert_item){.row = i / g->topk, .out = i, .weight = m->host_route[i]};
                group.n_item++;
            }
        }
        if (group.n_item > 0) {
            groups[n_group++] = group;
        }
    }
    e->moe->experts(e->stream, groups, n_group, items, m->buf.q8, g->swiglu_limit, m->buf.slots);
}

/* One micro-batch through a block as the engine does it, but for the exchange. */
static void run_layer(bench_engine *b, uint32_t layer)
{
    rt_engine *e = b->engine;
    const md_geometry *g = e->geometry;
    const rt_layer *w = &e->weights.layers[layer];
    const rt_micro *m = &e->micros[0];
    const rt_buffers *buf = &m->buf;
    uint32_t n = m->batch.n_row;
    e->dense->hc_pre(e->stream, &w->hc_attn, buf->x, n, buf->in, buf->post, buf->comb);
    e->dense->rmsnorm(e->stream, buf->in, w->attn_norm, n, g->d, g->norm_eps, buf->in);
    rt_layer_attention(e, m, layer);
    e->dense->hc_post(e->stream, g->d, g->hc, buf->out, buf->x, buf->post, buf->comb, n, buf->x);
    e->dense->hc_pre(e->stream, &w->hc_ffn, buf->x, n, buf->in, buf->post, buf->comb);
    e->dense->rmsnorm(e->stream, buf->in, w->ffn_norm, n, g->d, g->norm_eps, buf->in);
    e->moe->gate(e->stream, &w->gate, buf->in, buf->ids, n, buf->experts, buf->route);
    e->dense->quant_act(e->stream, buf->in, n, g->d, buf->q8);
    run_experts(b, layer);
    rt_layer_shared(e, m, w);
    e->moe->combine(e->stream, buf->slots, buf->experts, buf->shared, n, g->topk, g->d, buf->out);
    e->dense->hc_post(e->stream, g->d, g->hc, buf->out, buf->x, buf->post, buf->comb, n, buf->x);
}

static void time_layer(const bench_config *config, bench_engine *b, uint32_t layer, tally *out)
{
    rt_engine *e = b->engine;
    double start;
    *out = (tally){0};
    g_timed.config = config;
    g_timed.dense = e->dense;
    g_timed.attn = e->attn;
    g_timed.moe = e->moe;
    g_timed.engine = e;
    g_timed.tally = out;
    e->dense = &TIMED_DENSE;
    e->attn = &TIMED_ATTN;
    e->moe = &TIMED_MOE;
    start = bench_now(config);
    run_layer(b, layer);
    out->all = bench_now(config) - start;
    e->dense = g_timed.dense;
    e->attn = g_timed.attn;
    e->moe = g_timed.moe;
}

/* ---- data ---- */

static uint16_t random_bf16(uint64_t key, uint64_t i)
{
    cm_rng_block b = cm_rng_at(LAYER_SEED, i, key);
    float v = ((float)b.word[0] + (float)b.word[1] + (float)b.word[2]) / 2147483648.0f - 3;
    return kn_bf16_encode(v);
}

/* n rows of `dim` values in `rows`, packed by the engine's device. */
static void fill_rows(rt_engine *e, uint64_t key, uint32_t n, uint32_t dim, kn_ptr rows, bool index)
{
    uint16_t *x = cm_alloc(2ull * n * dim);
    for (uint64_t i = 0; i < (uint64_t)n * dim; i++) {
        x[i] = random_bf16(key, i);
    }
    if (index) {
        e->attn->index_pack(e->stream, (kn_ptr){(uintptr_t)x}, n, 1, dim, rows);
    } else {
        e->attn->kv_pack(e->stream, (kn_ptr){(uintptr_t)x}, n, dim, e->geometry->rope_dim, rows);
    }
    cm_free(x);
}

static void fill_state(rt_engine *e, uint64_t key, uint32_t ratio, uint32_t dim, kn_ptr at)
{
    float *state = kn_mem_host(e->device, at);
    uint64_t n = kn_compress_state_bytes(ratio, dim, 0) / sizeof(*state);
    for (uint64_t i = 0; i < n; i++) {
        state[i] = (float)cm_rng_uniform(LAYER_SEED + key, i, 0) - 0.5f;
    }
}

/* A context of LAYER_CONTEXT tokens in every slot. */
static void fill_kv(rt_engine *e)
{
    const md_geometry *g = e->geometry;
    for (uint32_t l = 0; l < LAYERS; l++) {
        const kn_kv_layout *kv = &e->kv.layer[l];
        for (uint32_t p = 0; p < LAYER_SEQUENCES * LAYER_PAGES; p++) {
            kn_ptr page = kn_at(e->page_pool, p * e->kv.page_bytes);
            fill_rows(e, 1000 * (l + 1) + p, KN_PAGE_TOKENS / kv->ratio, g->head_dim,
                      kn_at(page, kv->page_rows), false);
            if (kv->ratio == 4) {
                fill_rows(e, 5000 * (l + 1) + p, KN_PAGE_TOKENS / kv->ratio, g->index_dim,
                          kn_at(page, kv->page_index), true);
            }
        }
        for (uint32_t s = 0; s < LAYER_SEQUENCES; s++) {
            kn_ptr slot = kn_at(e->slot_pool, s * e->kv.slot_bytes);
            fill_rows(e, 9000 * (l + 1) + s, kv->ring, g->head_dim, kn_at(slot, kv->slot_raw), false);
            fill_state(e, 100 * l + s, kv->ratio, g->head_dim, kn_at(slot, kv->slot_main));
            if (kv->ratio == 4) {
                fill_state(e, 500 + s, kv->ratio, g->index_dim, kn_at(slot, kv->slot_index));
            }
        }
    }
}

/* n sequences with one row each, streams as before a layer. */
static void place_rows(rt_engine *e, uint32_t n)
{
    uint16_t *x = kn_mem_host(e->device, e->buf.x);
    uint32_t pages[LAYER_SEQUENCES][LAYER_PAGES], tokens[LAYER_SEQUENCES];
    rt_step_seg segs[LAYER_SEQUENCES];
    rt_step step = {.n_seg = n, .n_row = n, .segs = segs};
    for (uint32_t s = 0; s < n; s++) {
        tokens[s] = s;
        for (uint32_t p = 0; p < LAYER_PAGES; p++) {
            pages[s][p] = s * LAYER_PAGES + p;
        }
        segs[s] = (rt_step_seg){.slot = s,
                                .pos0 = LAYER_CONTEXT - 1,
                                .n_row = 1,
                                .tokens = &tokens[s],
                                .pages = pages[s],
                                .n_page = LAYER_PAGES};
    }
    rt_batch_fill(&e->host, &step, e->slot_pool, e->kv.slot_bytes);
    rt_place_rows(e, 1);
    for (uint64_t i = 0; i < (uint64_t)n * e->geometry->hc * e->geometry->d; i++) {
        x[i] = random_bf16(7, i);
    }
}

/* ---- engines ---- */

static kn_matrix expert_matrix(const md_checkpoint *checkpoint, uint32_t layer, uint32_t expert,
                               const char *name)
{
    const md_tensor *t =
        md_checkpoint_tensor(checkpoint, "layers.%u.ffn.experts.%u.%s.weight", layer, expert, name);
    const md_tensor *scale =
        md_checkpoint_tensor(checkpoint, "layers.%u.ffn.experts.%u.%s.scale", layer, expert, name);
    return (kn_matrix){.data = {(uintptr_t)t->data},
                       .scale = {(uintptr_t)scale->data},
                       .n_out = (uint32_t)t->dim[0],
                       .n_in = 2 * (uint32_t)t->dim[1],
                       .dtype = KN_E2M1,
                       .scale_dtype = KN_E8M0};
}

static bool open_experts(bench_engine *b, const md_checkpoint *checkpoint)
{
    uint32_t n = LAYERS * b->engine->geometry->n_expert;
    kn_device *device = b->engine->device;
    uint64_t at = 0, one;
    b->experts = cm_alloc(n * sizeof(*b->experts));
    for (uint32_t i = 0; i < n; i++) {
        uint32_t layer = i / b->engine->geometry->n_expert, expert = i % b->engine->geometry->n_expert;
        b->experts[i] = (kn_expert){expert_matrix(checkpoint, layer, expert, "w1"),
                                    expert_matrix(checkpoint, layer, expert, "w3"),
                                    expert_matrix(checkpoint, layer, expert, "w2")};
    }
    one = kn_prepared_bytes(device, &b->experts[0].w1) * 2 + kn_prepared_bytes(device, &b->experts[0].w2);
    b->copies_bytes = n * one / 4096 * 4096;
    if (one > 0 && kn_mem_alloc(device, n * one, &b->copies) != CM_OK) {
        return false;
    }
    for (uint32_t i = 0; i < n && one > 0; i++) {
        kn_matrix *matrices[] = {&b->experts[i].w1, &b->experts[i].w3, &b->experts[i].w2};
        for (uint32_t k = 0; k < 3; k++) {
            uint64_t size = kn_prepared_bytes(device, matrices[k]);
            kn_prepare(device, matrices[k], kn_at(b->copies, at));
            at += size;
        }
    }
    return true;
}

static void close_engine(bench_engine *b)
{
    if (b->engine != NULL) {
        kn_mem_free(b->engine->device, b->copies);
        cm_free(b->experts);
        rt_engine_destroy(b->engine);
    }
}

static cm_status open_engine(const bench_config *config, const char *backend, const md_checkpoint *checkpoint,
                             bench_engine *b, cm_error *err)
{
    rt_engine_options options = {
        .checkpoint = checkpoint,
        .device = {.backend = backend, .isa = config->isa, .n_threads = (uint32_t)config->threads},
        .row_max = LAYER_SEQUENCES,
        .slot_max = LAYER_SEQUENCES,
        .kv_bytes = 64 << 20,
        .answer_ms = 1000,
        .wait_ms = 1000};
    net_options_defaults(&options.rows);
    options.rows.backend = "local";
    CM_TRY(rt_engine_create(&options, &b->engine, err));
    if (!open_experts(b, checkpoint)) {
        return cm_error_set(err, CM_E_MEMORY, "", "no memory for the experts");
    }
    return CM_OK;
}

/* ---- the benchmark ---- */

/* Whether one row through both layers gives what the oracle gives; from outputs that were poisoned. */
static bool check_engine(const bench_config *config, const md_checkpoint *checkpoint, bench_engine *b)
{
    bench_config plain = *config;
    bench_engine ref = {0};
    rt_engine *e = b->engine;
    uint64_t n_bytes = 2ull * e->geometry->hc * e->geometry->d;
    cm_error err;
    bool same = false;
    plain.threads = 1;
    plain.isa = NULL;
    cli_progress("checking against the oracle");
    if (open_engine(&plain, "ref", checkpoint, &ref, &err) == CM_OK) {
        rt_engine *r = ref.engine;
        memcpy(kn_mem_host(r->device, r->page_pool), kn_mem_host(e->device, e->page_pool),
               LAYER_SEQUENCES * LAYER_PAGES * e->kv.page_bytes);
        memcpy(kn_mem_host(r->device, r->slot_pool), kn_mem_host(e->device, e->slot_pool),
               LAYER_SEQUENCES * e->kv.slot_bytes);
        memset(kn_mem_host(e->device, e->buf.out), 0xff, 2ull * e->geometry->d);
        place_rows(r, 1);
        place_rows(e, 1);
        for (uint32_t l = 0; l < LAYERS; l++) {
            run_layer(&ref, l);
            run_layer(b, l);
        }
        same = memcmp(kn_mem_host(e->device, e->buf.x), kn_mem_host(r->device, r->buf.x), n_bytes) == 0;
    }
    close_engine(&ref);
    cli_progress_clear();
    if (!same) {
        fprintf(stderr, "path %s does not give the oracle's values: not timed\n", kn_device_isa(e->device));
    }
    return same;
}

static void measure(const bench_config *config, bench_engine *b, layer_case *cases, uint32_t n_case,
                    bench_samples *bandwidth)
{
    bench_team *team = bench_team_create((uint32_t)config->threads);
    const void *weights =
        kn_mem_host(b->engine->device, b->copies.addr != 0 ? b->copies : b->engine->page_pool);
    for (uint32_t round = 0; round < config->rounds; round++) {
        for (uint32_t c = 0; c < n_case; c++) {
            tally t;
            double start = bench_now(config), speed;
            uint64_t bytes = 0;
            cli_progress("round %u of %u", round + 1, (unsigned)config->rounds);
            bench_read(team, weights, b->copies_bytes);
            speed = (double)b->copies_bytes / (bench_now(config) - start);
            bench_add(bandwidth, speed / 1e9);
            place_rows(b->engine, cases[c].n_row);
            time_layer(config, b, cases[c].layer, &t);
            for (line i = 0; i < N_LINE; i++) {
                double floor = (double)t.bytes[i] / speed;
                bytes += t.bytes[i];
                cases[c].bytes[i] = t.bytes[i];
                bench_add(&cases[c].seconds[i], t.seconds[i]);
                bench_add(&cases[c].ratios[i], floor > 0 ? t.seconds[i] / floor : 0);
            }
            bench_add(&cases[c].all, t.all);
            bench_add(&cases[c].ratio, t.all * speed / (double)bytes);
        }
    }
    cli_progress_clear();
    bench_team_destroy(team);
}

static json_t *report_lines(const layer_case *c, double all)
{
    json_t *lines = json_object();
    printf("  %-22s %8s %8s %7s  %s\n", "operation", "ms", "MB", "share", "time / (bytes / bandwidth)");
    for (line i = 0; i < N_LINE; i++) {
        bench_summary t = bench_summarize(&c->seconds[i]), r = bench_summarize(&c->ratios[i]);
        if (t.max == 0) {
            continue;
        }
        printf("  %-22s %8.3f %8.1f %6.1f%%", LINE_NAMES[i], 1e3 * t.median, (double)c->bytes[i] / 1e6,
               100 * t.median / all);
        printf(c->bytes[i] > 0 ? "  %.2f (%.2f .. %.2f)\n" : "\n", r.median, r.min, r.max);
        json_object_set_new(lines, LINE_NAMES[i],
                            json_pack("{s:o, s:I, s:f}", "seconds", bench_summary_json(t), "bytes",
                                      (json_int_t)c->bytes[i], "time_over_floor", r.median));
    }
    return lines;
}

static void report_cases(const rt_engine *e, const layer_case *cases, uint32_t n_case,
                         const bench_samples *bandwidth, json_t *report)
{
    bench_summary bw = bench_summarize(bandwidth);
    printf("path %s, read bandwidth of the run %.1f GB/s (%.1f .. %.1f)\n", kn_device_isa(e->device),
           bw.median, bw.min, bw.max);
    json_object_set_new(report, "read_gb_s", bench_summary_json(bw));
    for (uint32_t c = 0; c < n_case; c++) {
        bench_summary t = bench_summarize(&cases[c].all), r = bench_summarize(&cases[c].ratio);
        uint32_t ratio = e->geometry->ratio[cases[c].layer];
        uint64_t bytes = 0;
        for (line i = 0; i < N_LINE; i++) {
            bytes += cases[c].bytes[i];
        }
        printf("\nratio %u, %u row%s: %.2f ms, %.1f MB, time / (bytes / bandwidth) %.2f (%.2f .. %.2f)\n",
               ratio, cases[c].n_row, cases[c].n_row == 1 ? "" : "s", 1e3 * t.median, (double)bytes / 1e6,
               r.median, r.min, r.max);
        json_array_append_new(json_object_get(report, "results"),
                              json_pack("{s:i, s:i, s:o, s:I, s:o, s:o}", "ratio", (int)ratio, "rows",
                                        (int)cases[c].n_row, "seconds", bench_summary_json(t), "bytes",
                                        (json_int_t)bytes, "time_over_floor", bench_summary_json(r),
                                        "operations", report_lines(&cases[c], t.median)));
    }
}

static int run_engine(const bench *b, const bench_config *config, const md_checkpoint *checkpoint,
                      cm_error *err)
{
    layer_case *cases = cm_alloc(LAYERS * LAYER_CASES * sizeof(*cases));
    bench_samples bandwidth = {0};
    bench_engine engine = {0};
    int code = CLI_FAILED;
    for (uint32_t c = 0; c < LAYERS * LAYER_CASES; c++) {
        cases[c].layer = c / LAYER_CASES;
        cases[c].n_row = LAYER_ROWS[c % LAYER_CASES];
    }
    if (open_engine(config, "cpu", checkpoint, &engine, err) != CM_OK) {
        fprintf(stderr, "%s: %s\n", b->name, err->text);
    } else {
        fill_kv(engine.engine);
        if (check_engine(config, checkpoint, &engine)) {
            json_t *report = bench_begin(b, config);
            measure(config, &engine, cases, LAYERS * LAYER_CASES, &bandwidth);
            report_cases(engine.engine, cases, LAYERS * LAYER_CASES, &bandwidth, report);
            bench_end(report);
            code = CLI_OK;
        }
    }
    close_engine(&engine);
    cm_free(cases);
    return code;
}

static int layer_run(const bench *b, const bench_config *config)
{
    cm_bytes dir;
    md_checkpoint *checkpoint = NULL;
    cm_error err = {0};
    int code = CLI_FAILED;
    cm_bytes_init(&dir, 0);
    cm_bytes_printf(&dir, "%s/pro", bench_room());
    cli_progress("making a checkpoint of 2 GB");
    cm_status status = synthetic_write(CONFIG, cm_bytes_text(&dir), LAYER_SEED, &err);
    if (status == CM_OK) {
        status = md_checkpoint_open(cm_bytes_text(&dir), &checkpoint, NULL, NULL, &err);
    }
    cm_bytes_fini(&dir);
    if (status != CM_OK) {
        fprintf(stderr, "%s: %s\n", b->name, err.text);
        return CLI_FAILED;
    }
    code = run_engine(b, config, checkpoint, &err);
    md_checkpoint_close(checkpoint);
    return code;
}

const bench bench_layer_decode = {
    "cpu.layer_decode",
    "a CSA and an HCA layer of V4-Pro for 1 and 4 rows at 8K, by operation, against the "
    "read bandwidth",
    layer_run};
