/* The closed list of tensors (model section 8.1), from the geometry alone. */
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/model/checkpoint.h"

typedef struct expect_walk {
    const md_geometry *g;
    md_expect_fn fn;
    void *ctx;
    bool stopped;    /* fn had enough */
    char prefix[40]; /* "layers.12.", "mtp.0." or "" */
} expect_walk;

/* ---- single rows ---- */

static void expect_put(expect_walk *w, const char *part, const char *suffix, md_dtype dtype, uint64_t dim0,
                       uint64_t dim1)
{
    if (w->stopped) {
        return;
    }
    md_expect row = {.dtype = dtype, .n_dim = dim1 != 0 ? 2 : 1, .dim = {dim0, dim1}};
    int n = snprintf(row.name, sizeof row.name, "%s%s%s", w->prefix, part, suffix);
    CM_ASSERT(n > 0 && (size_t)n < sizeof row.name);
    w->stopped = !w->fn(w->ctx, &row);
}

static uint64_t expect_blocks(uint64_t n, uint64_t block)
{
    return (n + block - 1) / block;
}

static void expect_norm(expect_walk *w, const char *part, uint64_t n)
{
    expect_put(w, part, ".weight", MD_BF16, n, 0);
}

static void expect_bf16(expect_walk *w, const char *part, uint64_t out, uint64_t in)
{
    expect_put(w, part, ".weight", MD_BF16, out, in);
}

/* E4M3 with one scale per 128x128 block; blocks at the edges may be partial. */
static void expect_fp8(expect_walk *w, const char *part, uint64_t out, uint64_t in)
{
    expect_put(w, part, ".weight", MD_F8_E4M3, out, in);
    expect_put(w, part, ".scale", w->g->float_scales ? MD_F32 : MD_F8_E8M0, expect_blocks(out, 128),
               expect_blocks(in, 128));
}

/* Two E2M1 codes per byte, one scale per 32 inputs of a row. */
static void expect_fp4(expect_walk *w, const char *part, uint64_t out, uint64_t in)
{
    expect_put(w, part, ".weight", MD_I8, out, in / 2);
    expect_put(w, part, ".scale", MD_F8_E8M0, out, expect_blocks(in, 32));
}

/* ---- parts of a block ---- */

static void expect_hc(expect_walk *w, const char *part, uint64_t n_mix, uint64_t n_scale)
{
    expect_put(w, part, "_fn", MD_F32, n_mix, (uint64_t)w->g->hc * w->g->d);
    expect_put(w, part, "_base", MD_F32, n_mix, 0);
    expect_put(w, part, "_scale", MD_F32, n_scale, 0);
}

static void expect_hc_head(expect_walk *w)
{
    expect_hc(w, "hc_head", w->g->hc, 1);
}

/* part: "attn.compressor" or "attn.indexer.compressor". Ratio 4 overlaps two windows, so its rows are twice
 * as wide. */
static void expect_compressor(expect_walk *w, const char *part, uint32_t ratio, uint64_t dim)
{
    uint64_t width = ratio == 4 ? 2 * dim : dim;
    expect_put(w, part, ".wkv.weight", MD_BF16, width, w->g->d);
    expect_put(w, part, ".wgate.weight", MD_BF16, width, w->g->d);
    expect_put(w, part, ".ape", MD_F32, ratio, width);
    expect_put(w, part, ".norm.weight", MD_BF16, dim, 0);
}

static void expect_attention(expect_walk *w, uint32_t ratio)
{
    const md_geometry *g = w->g;
    uint64_t q_dim = (uint64_t)g->n_head * g->head_dim;
    uint64_t o_dim = (uint64_t)g->o_groups * g->o_rank;
    expect_put(w, "attn.attn_sink", "", MD_F32, g->n_head, 0);
    expect_fp8(w, "attn.wq_a", g->q_rank, g->d);
    expect_norm(w, "attn.q_norm", g->q_rank);
    expect_fp8(w, "attn.wq_b", q_dim, g->q_rank);
    expect_fp8(w, "attn.wkv", g->head_dim, g->d);
    expect_norm(w, "attn.kv_norm", g->head_dim);
    expect_fp8(w, "attn.wo_a", o_dim, q_dim / g->o_groups);
    expect_fp8(w, "attn.wo_b", g->d, o_dim);
    if (ratio != 0) {
        expect_compressor(w, "attn.compressor", ratio, g->head_dim);
    }
    if (ratio == 4) {
        expect_fp8(w, "attn.indexer.wq_b", (uint64_t)g->index_head * g->index_dim, g->q_rank);
        expect_bf16(w, "attn.indexer.weights_proj", g->index_head, g->d);
        expect_compressor(w, "attn.indexer.compressor", 4, g->index_dim);
    }
}

static void expect_expert(expect_walk *w, uint32_t expert)
{
    void (*matrix)(expect_walk *, const char *, uint64_t, uint64_t) =
        w->g->expert_dtype == MD_EXPERT_FP4 ? expect_fp4 : expect_fp8;
    char part[48];
    for (int i = 1; i <= 3; i++) {
        bool down = i == 2;
        snprintf(part, sizeof part, "ffn.experts.%u.w%d", expert, i);
        matrix(w, part, down ? w->g->d : w->g->inner, down ? w->g->inner : w->g->d);
    }
}

static void expect_ffn(expect_walk *w, bool is_hash)
{
    const md_geometry *g = w->g;
    expect_bf16(w, "ffn.gate", g->n_expert, g->d);
    if (is_hash) {
        expect_put(w, "ffn.gate.tid2eid", "", MD_I64, g->vocab, g->topk);
    } else {
        expect_put(w, "ffn.gate.bias", "", MD_F32, g->n_expert, 0);
    }
    for (uint32_t e = 0; e < g->n_expert && !w->stopped; e++) {
        expect_expert(w, e);
    }
    expect_fp8(w, "ffn.shared_experts.w1", g->inner, g->d);
    expect_fp8(w, "ffn.shared_experts.w2", g->d, g->inner);
    expect_fp8(w, "ffn.shared_experts.w3", g->inner, g->d);
}

static void expect_block(expect_walk *w, uint32_t ratio, bool is_hash)
{
    uint64_t n_mix = (uint64_t)(2 + w->g->hc) * w->g->hc;
    expect_norm(w, "attn_norm", w->g->d);
    expect_norm(w, "ffn_norm", w->g->d);
    expect_hc(w, "hc_attn", n_mix, 3);
    expect_hc(w, "hc_ffn", n_mix, 3);
    expect_attention(w, ratio);
    expect_ffn(w, is_hash);
}

/* ---- drafter stages (model section 7) ---- */

static void expect_stage_extras_mtp(expect_walk *w)
{
    expect_fp8(w, "e_proj", w->g->d, w->g->d);
    expect_fp8(w, "h_proj", w->g->d, w->g->d);
    expect_norm(w, "enorm", w->g->d);
    expect_norm(w, "hnorm", w->g->d);
    expect_norm(w, "norm", w->g->d);
    expect_hc_head(w);
}

/* The first stage takes in the target layers, the last one holds the heads. */
static void expect_stage_extras_dspark(expect_walk *w, uint32_t stage)
{
    const md_geometry *g = w->g;
    if (stage == 0) {
        expect_fp8(w, "main_proj", g->d, (uint64_t)g->n_dspark_target * g->d);
        expect_norm(w, "main_norm", g->d);
    }
    if (stage == g->n_stage - 1) {
        expect_norm(w, "norm", g->d);
        expect_hc_head(w);
        expect_bf16(w, "markov_head.markov_w1", g->vocab, g->dspark_rank);
        expect_bf16(w, "markov_head.markov_w2", g->vocab, g->dspark_rank);
        expect_bf16(w, "confidence_head.proj", 1, (uint64_t)g->d + g->dspark_rank);
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
    expect_walk w = {.g = geometry, .fn = fn, .ctx = ctx};
    expect_bf16(&w, "embed", geometry->vocab, geometry->d);
    for (uint32_t l = 0; l < geometry->n_layer && !w.stopped; l++) {
        snprintf(w.prefix, sizeof w.prefix, "layers.%u.", l);
        expect_block(&w, geometry->ratio[l], md_layer_is_hash(geometry, l));
    }
    w.prefix[0] = '\0';
    expect_bf16(&w, "head", geometry->vocab, geometry->d);
    expect_norm(&w, "norm", geometry->d);
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
    expect_walk w = {.g = geometry, .fn = expect_add, .ctx = &sum};
    expect_expert(&w, 0);
    return sum.n_bytes;
}
