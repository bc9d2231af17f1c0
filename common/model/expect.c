/* The closed list of tensors (model section 8.1), from the geometry alone. */
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/model/checkpoint.h"

/* A size and the keys it comes from. */
typedef struct expect_size {
    uint64_t n;
    const char *key;
} expect_size;

typedef struct expect_walk {
    const md_geometry *g;
    md_expect_fn fn;
    void *ctx;
    bool stopped;    /* fn had enough */
    char prefix[40]; /* "layers.12.", "mtp.0." or "" */
    expect_size d, head, q_rank, q, o_group, o, inner, vocab, n_expert, topk, hc, hc_d, hc_mix, index_head,
        index_dim, index_q;
} expect_walk;

static expect_walk expect_walk_of(const md_geometry *g, md_expect_fn fn, void *ctx)
{
    uint64_t q = (uint64_t)g->n_head * g->head_dim;
    return (expect_walk){
        .g = g,
        .fn = fn,
        .ctx = ctx,
        .d = {g->d, "hidden_size"},
        .head = {g->head_dim, "head_dim"},
        .q_rank = {g->q_rank, "q_lora_rank"},
        .q = {q, "num_attention_heads and head_dim"},
        .o_group = {g->o_groups != 0 ? q / g->o_groups : 0, "num_attention_heads, head_dim and o_groups"},
        .o = {(uint64_t)g->o_groups * g->o_rank, "o_groups and o_lora_rank"},
        .inner = {g->inner, "moe_intermediate_size"},
        .vocab = {g->vocab, "vocab_size"},
        .n_expert = {g->n_expert, "n_routed_experts"},
        .topk = {g->topk, "num_experts_per_tok"},
        .hc = {g->hc, "hc_mult"},
        .hc_d = {(uint64_t)g->hc * g->d, "hc_mult and hidden_size"},
        .hc_mix = {(uint64_t)(2 + g->hc) * g->hc, "hc_mult"},
        .index_head = {g->index_head, "index_n_heads"},
        .index_dim = {g->index_dim, "index_head_dim"},
        .index_q = {(uint64_t)g->index_head * g->index_dim, "index_n_heads and index_head_dim"},
    };
}

/* ---- single rows ---- */

static void expect_put(expect_walk *w, const char *part, const char *suffix, md_dtype dtype,
                       expect_size size0, expect_size size1)
{
    if (w->stopped) {
        return;
    }
    md_expect row = {.dtype = dtype,
                     .n_dim = size1.n != 0 ? 2 : 1,
                     .dim = {size0.n, size1.n},
                     .key = {size0.key, size1.key}};
    int n = snprintf(row.name, sizeof row.name, "%s%s%s", w->prefix, part, suffix);
    CM_ASSERT(n > 0 && (size_t)n < sizeof row.name);
    w->stopped = !w->fn(w->ctx, &row);
}

/* A tensor of one dimension. */
static void expect_list(expect_walk *w, const char *part, const char *suffix, md_dtype dtype,
                        expect_size size)
{
    expect_put(w, part, suffix, dtype, size, (expect_size){0});
}

static expect_size expect_fixed(uint64_t n)
{
    return (expect_size){n, NULL};
}

static expect_size expect_blocks(expect_size size, uint64_t block)
{
    return (expect_size){(size.n + block - 1) / block, size.key};
}

static void expect_norm(expect_walk *w, const char *part, expect_size size)
{
    expect_list(w, part, ".weight", MD_BF16, size);
}

static void expect_bf16(expect_walk *w, const char *part, expect_size out, expect_size in)
{
    expect_put(w, part, ".weight", MD_BF16, out, in);
}

/* E4M3 with one scale per 128x128 block; blocks at the edges may be partial. */
static void expect_fp8(expect_walk *w, const char *part, expect_size out, expect_size in)
{
    expect_put(w, part, ".weight", MD_F8_E4M3, out, in);
    expect_put(w, part, ".scale", w->g->float_scales ? MD_F32 : MD_F8_E8M0, expect_blocks(out, 128),
               expect_blocks(in, 128));
}

/* Two E2M1 codes per byte, one scale per 32 inputs of a row. */
static void expect_fp4(expect_walk *w, const char *part, expect_size out, expect_size in)
{
    expect_put(w, part, ".weight", MD_I8, out, (expect_size){in.n / 2, in.key});
    expect_put(w, part, ".scale", MD_F8_E8M0, out, expect_blocks(in, 32));
}

/* ---- parts of a block ---- */

static void expect_hc(expect_walk *w, const char *part, expect_size mix, uint64_t n_scale)
{
    expect_put(w, part, "_fn", MD_F32, mix, w->hc_d);
    expect_list(w, part, "_base", MD_F32, mix);
    expect_list(w, part, "_scale", MD_F32, expect_fixed(n_scale));
}

static void expect_hc_head(expect_walk *w)
{
    expect_hc(w, "hc_head", w->hc, 1);
}

/* part: "attn.compressor" or "attn.indexer.compressor". Ratio 4 overlaps two windows, so its rows are twice
 * as wide. */
static void expect_compressor(expect_walk *w, const char *part, uint32_t ratio, expect_size size,
                              const char *width_key)
{
    expect_size width = {ratio == 4 ? 2 * size.n : size.n, width_key};
    expect_put(w, part, ".wkv.weight", MD_BF16, width, w->d);
    expect_put(w, part, ".wgate.weight", MD_BF16, width, w->d);
    expect_put(w, part, ".ape", MD_F32, (expect_size){ratio, "compress_ratios"}, width);
    expect_list(w, part, ".norm.weight", MD_BF16, size);
}

static void expect_attention(expect_walk *w, uint32_t ratio)
{
    expect_list(w, "attn.attn_sink", "", MD_F32, (expect_size){w->g->n_head, "num_attention_heads"});
    expect_fp8(w, "attn.wq_a", w->q_rank, w->d);
    expect_norm(w, "attn.q_norm", w->q_rank);
    expect_fp8(w, "attn.wq_b", w->q, w->q_rank);
    expect_fp8(w, "attn.wkv", w->head, w->d);
    expect_norm(w, "attn.kv_norm", w->head);
    expect_fp8(w, "attn.wo_a", w->o, w->o_group);
    expect_fp8(w, "attn.wo_b", w->d, w->o);
    if (ratio != 0) {
        expect_compressor(w, "attn.compressor", ratio, w->head, "head_dim and compress_ratios");
    }
    if (ratio == 4) {
        expect_fp8(w, "attn.indexer.wq_b", w->index_q, w->q_rank);
        expect_bf16(w, "attn.indexer.weights_proj", w->index_head, w->d);
        expect_compressor(w, "attn.indexer.compressor", 4, w->index_dim, "index_head_dim");
    }
}

static void expect_expert(expect_walk *w, uint32_t expert)
{
    void (*matrix)(expect_walk *, const char *, expect_size, expect_size) =
        w->g->expert_dtype == MD_EXPERT_FP4 ? expect_fp4 : expect_fp8;
    char part[48];
    for (int i = 1; i <= 3; i++) {
        bool down = i == 2;
        snprintf(part, sizeof part, "ffn.experts.%u.w%d", expert, i);
        matrix(w, part, down ? w->d : w->inner, down ? w->inner : w->d);
    }
}

static void expect_ffn(expect_walk *w, bool is_hash)
{
    expect_bf16(w, "ffn.gate", w->n_expert, w->d);
    if (is_hash) {
        expect_put(w, "ffn.gate.tid2eid", "", MD_I64, w->vocab, w->topk);
    } else {
        expect_list(w, "ffn.gate.bias", "", MD_F32, w->n_expert);
    }
    for (uint32_t e = 0; e < w->g->n_expert && !w->stopped; e++) {
        expect_expert(w, e);
    }
    expect_fp8(w, "ffn.shared_experts.w1", w->inner, w->d);
    expect_fp8(w, "ffn.shared_experts.w2", w->d, w->inner);
    expect_fp8(w, "ffn.shared_experts.w3", w->inner, w->d);
}

static void expect_block(expect_walk *w, uint32_t ratio, bool is_hash)
{
    expect_norm(w, "attn_norm", w->d);
    expect_norm(w, "ffn_norm", w->d);
    expect_hc(w, "hc_attn", w->hc_mix, 3);
    expect_hc(w, "hc_ffn", w->hc_mix, 3);
    expect_attention(w, ratio);
    expect_ffn(w, is_hash);
}

/* ---- drafter stages (model section 7) ---- */

static void expect_stage_extras_mtp(expect_walk *w)
{
    expect_fp8(w, "e_proj", w->d, w->d);
    expect_fp8(w, "h_proj", w->d, w->d);
    expect_norm(w, "enorm", w->d);
    expect_norm(w, "hnorm", w->d);
    expect_norm(w, "norm", w->d);
    expect_hc_head(w);
}

/* The first stage takes in the target layers, the last one holds the heads. */
static void expect_stage_extras_dspark(expect_walk *w, uint32_t stage)
{
    const md_geometry *g = w->g;
    if (stage == 0) {
        expect_size targets = {(uint64_t)g->n_dspark_target * g->d,
                               "dspark_target_layer_ids and hidden_size"};
        expect_fp8(w, "main_proj", w->d, targets);
        expect_norm(w, "main_norm", w->d);
    }
    if (stage == g->n_stage - 1) {
        expect_size rank = {g->dspark_rank, "dspark_markov_rank"};
        expect_size seen = {(uint64_t)g->d + g->dspark_rank, "hidden_size and dspark_markov_rank"};
        expect_norm(w, "norm", w->d);
        expect_hc_head(w);
        expect_bf16(w, "markov_head.markov_w1", w->vocab, rank);
        expect_bf16(w, "markov_head.markov_w2", w->vocab, rank);
        expect_bf16(w, "confidence_head.proj", expect_fixed(1), seen);
    }
}

static void expect_stage(expect_walk *w, uint32_t stage)
{
    snprintf(w->prefix, sizeof w->prefix, "mtp.%u.", stage);
    expect_block(w, 0, false);
    if (w->g->drafter == MD_DRAFTER_DSPARK) {
        expect_stage_extras_dspark(w, stage);
    } else {
        expect_stage_extras_mtp(w);
    }
}

/* ---- the list ---- */

void md_expect_each(const md_geometry *geometry, md_expect_fn fn, void *ctx)
{
    expect_walk w = expect_walk_of(geometry, fn, ctx);
    expect_bf16(&w, "embed", w.vocab, w.d);
    for (uint32_t l = 0; l < geometry->n_layer && !w.stopped; l++) {
        snprintf(w.prefix, sizeof w.prefix, "layers.%u.", l);
        expect_block(&w, geometry->ratio[l], md_layer_is_hash(geometry, l));
    }
    w.prefix[0] = '\0';
    expect_bf16(&w, "head", w.vocab, w.d);
    expect_norm(&w, "norm", w.d);
    expect_hc_head(&w);
    for (uint32_t s = 0; s < geometry->n_stage && !w.stopped; s++) {
        expect_stage(&w, s);
    }
}

typedef struct expect_sum {
    uint64_t n_tensors, n_bytes;
} expect_sum;

static bool expect_add(void *ctx, const md_expect *expect)
{
    expect_sum *sum = ctx;
    uint64_t n_bytes = md_dtype_bytes(expect->dtype);
    for (uint32_t i = 0; i < expect->n_dim; i++) {
        n_bytes *= expect->dim[i];
    }
    sum->n_tensors++;
    sum->n_bytes += n_bytes;
    return true;
}

void md_expect_totals(const md_geometry *geometry, uint64_t *n_tensors_out, uint64_t *n_bytes_out)
{
    expect_sum sum = {0};
    md_expect_each(geometry, expect_add, &sum);
    *n_tensors_out = sum.n_tensors;
    *n_bytes_out = sum.n_bytes;
}

uint64_t md_expert_bytes(const md_geometry *geometry)
{
    expect_sum sum = {0};
    expect_walk w = expect_walk_of(geometry, expect_add, &sum);
    expect_expert(&w, 0);
    return sum.n_bytes;
}
