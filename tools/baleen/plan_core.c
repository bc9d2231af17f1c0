#include "tools/baleen/plan_core.h"

#include <math.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/model/checkpoint.h"
#include "router/engine/kv.h"

/* ---- the model ---- */

static bool ends_with(const char *name, const char *end)
{
    size_t n = strlen(name), n_end = strlen(end);
    return n >= n_end && strcmp(name + n - n_end, end) == 0;
}

/* Weights that a row is multiplied by: matrices, and not their scales. */
static bool is_matrix(const md_expect *e)
{
    return e->n_dim == 2 && e->dtype != MD_I64 && !ends_with(e->name, ".scale") &&
           !ends_with(e->name, ".ape");
}

static bool model_add(void *ctx, const md_expect *e)
{
    plan_model *m = ctx;
    uint64_t n = e->dim[0] * (e->n_dim == 2 ? e->dim[1] : 1), bytes = n * md_dtype_bytes(e->dtype);
    bool stage = strncmp(e->name, "mtp.", 4) == 0;
    m->tensors++;
    m->bytes += bytes;
    if (strstr(e->name, ".ffn.experts.") != NULL || (stage && m->geometry.drafter != MD_DRAFTER_MTP)) {
        return true; /* a worker's, or nobody's: a DSpark drafter is not served */
    }
    m->router_bytes += bytes;
    if (strcmp(e->name, "embed.weight") == 0) {
        m->embed_bytes = bytes;
    } else if (!stage) {
        m->step_bytes += bytes;
        m->dense_values += is_matrix(e) ? (double)n : 0;
    }
    return true;
}

void plan_model_of(const md_geometry *geometry, uint32_t draft_max, plan_model *model_out)
{
    rt_kv_sizes kv;
    uint32_t drafts = geometry->drafter == MD_DRAFTER_MTP ? draft_max : 0;
    *model_out =
        (plan_model){.geometry = *geometry, .draft_max = drafts, .expert_bytes = md_expert_bytes(geometry)};
    md_expect_each(geometry, model_add, model_out);
    model_out->experts_bytes =
        (uint64_t)md_block_count(geometry) * geometry->n_expert * model_out->expert_bytes;
    model_out->expert_values = 3.0 * geometry->d * geometry->inner;
    rt_kv_sizes_get(geometry, drafts, &kv);
    model_out->kv_page_bytes = kv.page_bytes;
    model_out->kv_slot_bytes = kv.slot_bytes;
}

/* ---- what fits where ---- */

uint64_t plan_worker_experts(const plan_model *m, uint32_t n_worker)
{
    uint64_t n = (uint64_t)md_block_count(&m->geometry) * m->geometry.n_expert;
    CM_ASSERT(n_worker > 0);
    return (n + n_worker - 1) / n_worker;
}

uint32_t plan_workers_min(const plan_model *m, uint64_t bytes)
{
    uint64_t n = (uint64_t)md_block_count(&m->geometry) * m->geometry.n_expert,
             held = bytes / m->expert_bytes;
    return held == 0 ? 0 : (uint32_t)((n + held - 1) / held);
}

uint64_t plan_sequences(const plan_model *m, uint64_t kv_bytes, uint64_t n_token)
{
    uint64_t page = KN_PAGE_TOKENS, pages = (n_token + page - 1) / page;
    return kv_bytes / (pages * m->kv_page_bytes + m->kv_slot_bytes);
}

/* ---- a step ---- */

/* Of a layer's keys, how many a row at position `context` attends, and how many the indexer scores for it. */
static void layer_keys(const md_geometry *g, uint32_t ratio, uint32_t context, double *attended_out,
                       double *scored_out)
{
    double window = fmin(g->window, context), rows = ratio == 0 ? 0 : floor((double)context / ratio);
    *scored_out = ratio == 4 ? rows : 0;
    *attended_out = window + (ratio == 4 ? fmin(rows, g->index_topk) : rows);
}

/* Longer of reading and multiplying. */
static double longer(const plan_cluster *c, double bytes, double values)
{
    double reading = bytes / c->read_bytes_s, multiplying = c->flops_s > 0 ? 2 * values / c->flops_s : 0;
    return fmax(reading, multiplying);
}

static double attention_s(const plan_model *m, const plan_cluster *c, uint32_t n_row)
{
    const md_geometry *g = &m->geometry;
    double bytes = 0, values = 0, attended, scored;
    for (uint32_t l = 0; l < g->n_layer; l++) {
        layer_keys(g, g->ratio[l], c->context, &attended, &scored);
        bytes +=
            attended * kn_kv_row_bytes(g->head_dim, g->rope_dim) + scored * kn_index_row_bytes(g->index_dim);
        values += 2 * attended * g->n_head * g->head_dim + scored * g->index_head * g->index_dim;
    }
    return longer(c, n_row * bytes, n_row * values);
}

/* Workers that one row of a layer goes to, of n: each holds an equal part of the experts. */
static double workers_of_row(const md_geometry *g, uint32_t n)
{
    double none = 1, others = (double)g->n_expert - (double)g->n_expert / n;
    for (uint32_t k = 0; k < g->topk; k++) {
        none *= fmax(others - k, 0) / (g->n_expert - k);
    }
    return n * (1 - none);
}

void plan_step_of(const plan_model *m, const plan_cluster *c, uint32_t n_row, plan_step *out)
{
    const md_geometry *g = &m->geometry;
    double rows = (double)n_row * c->n_router, chosen = (double)g->topk / g->n_expert;
    double there = workers_of_row(g, c->n_worker) * (g->d + kn_blocks(g->d, KN_ACT_BLOCK)),
           back = 2.0 * g->topk * g->d;
    *out = (plan_step){.hit = (double)g->n_expert / c->n_worker * (1 - pow(1 - chosen, rows))};
    out->dense_s = longer(c, (double)m->step_bytes, n_row * m->dense_values);
    out->experts_s = g->n_layer * longer(c, out->hit * (double)m->expert_bytes,
                                         rows * g->topk / c->n_worker * m->expert_values);
    out->attention_s = attention_s(m, c, n_row);
    out->link_bytes = g->n_layer * n_row * fmax(there, back);
    out->link_s = c->link_bytes_s > 0 ? out->link_bytes / c->link_bytes_s : 0;
    double computing = out->dense_s + out->experts_s + out->attention_s;
    out->over_s = fmax(computing, out->link_s);
    out->serial_s =
        computing + g->n_layer * n_row * (c->link_bytes_s > 0 ? (there + back) / c->link_bytes_s : 0);
}
