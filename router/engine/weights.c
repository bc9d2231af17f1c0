#include "router/engine/weights.h"

#include <stdio.h>
#include <string.h>

#include "common/base/mem.h"
#include "common/model/load.h"
#include "kernels/kn_math.h"
#include "router/engine/kv.h"

/* A tensor that has been bound and not read yet. */
typedef struct weight_item {
    const md_tensor *tensor;
    kn_matrix *matrix; /* that moves into the device's order; NULL: it is used where it is mapped */
    uint64_t at;       /* in rt_weights.prepared */
} weight_item;

/* Binding stops at the first error and keeps it: calls after it do nothing, one check at the end suffices. */
typedef struct weight_binder {
    const md_checkpoint *checkpoint;
    rt_weights *weights;
    const char *prefix; /* "layers.3." */
    uint32_t ahead;     /* spare entries of compressor states */
    weight_item *items; /* [n_item], in the order of the files */
    uint32_t n_item;
    uint64_t prepared_bytes;
    cm_status status;
    cm_error *err;
} weight_binder;

static kn_dtype weight_dtype(md_dtype dtype)
{
    static const kn_dtype table[MD_DTYPE_COUNT] = {
        [MD_F32] = KN_F32,      [MD_BF16] = KN_BF16, [MD_F8_E4M3] = KN_E4M3,
        [MD_F8_E8M0] = KN_E8M0, [MD_I8] = KN_E2M1,   [MD_I64] = KN_I64,
    };
    return table[dtype];
}

static void weight_note(weight_binder *binder, const md_tensor *tensor)
{
    binder->items = cm_realloc(binder->items, sizeof(weight_item) * (binder->n_item + 1));
    binder->items[binder->n_item++] = (weight_item){.tensor = tensor};
}

static void weight_place(weight_binder *binder, const md_tensor *tensor, kn_ptr *ptr_out)
{
    rt_weights *weights = binder->weights;
    if (binder->status != CM_OK) {
        return;
    }
    weight_note(binder, tensor);
    weights->n_bytes += tensor->n_bytes;
    if ((uintptr_t)tensor->data % md_dtype_bytes(tensor->dtype) == 0) {
        binder->status = kn_mem_place(weights->device, tensor->data, tensor->n_bytes, ptr_out);
        return;
    }
    /* safetensors promises no alignment; kernels want their type's */
    void *aligned = cm_alloc_aligned(tensor->n_bytes);
    memcpy(aligned, tensor->data, tensor->n_bytes);
    weights->copies = cm_realloc(weights->copies, sizeof(void *) * (weights->n_copies + 1));
    weights->copies[weights->n_copies++] = aligned;
    binder->status = kn_mem_place(weights->device, aligned, tensor->n_bytes, ptr_out);
}

static const md_tensor *weight_tensor(const weight_binder *binder, const char *name, const char *suffix)
{
    return md_checkpoint_tensor(binder->checkpoint, "%s%s%s", binder->prefix, name, suffix);
}

static void weight_vector(weight_binder *binder, const char *name, kn_ptr *ptr_out)
{
    weight_place(binder, weight_tensor(binder, name, ""), ptr_out);
}

static void weight_matrix(weight_binder *binder, const char *name, kn_matrix *matrix_out)
{
    const md_tensor *tensor = weight_tensor(binder, name, ".weight");
    *matrix_out = (kn_matrix){.n_out = (uint32_t)tensor->dim[0],
                              .n_in = (uint32_t)tensor->dim[1],
                              .dtype = weight_dtype(tensor->dtype)};
    uint32_t item = binder->n_item;
    weight_place(binder, tensor, &matrix_out->data);
    if (tensor->dtype == MD_F8_E4M3) {
        const md_tensor *scale = weight_tensor(binder, name, ".scale");
        matrix_out->scale_dtype = weight_dtype(scale->dtype);
        weight_place(binder, scale, &matrix_out->scale);
    }
    uint64_t n_bytes = (kn_prepared_bytes(binder->weights->device, matrix_out) + 63) / 64 * 64;
    if (binder->status == CM_OK && n_bytes > 0) {
        binder->items[item].matrix = matrix_out;
        binder->items[item].at = binder->prepared_bytes;
        binder->prepared_bytes += n_bytes;
    }
}

/* One item on a thread of the load: it is in memory and its values are good when this returns, and a matrix
 * stands in the device's order. */
static cm_status weight_read(void *ctx, uint32_t i, md_reader *reader, cm_error *err)
{
    const weight_binder *binder = ctx;
    const weight_item *item = &binder->items[i];
    kn_device *device = binder->weights->device;
    md_tensor read = *item->tensor;
    if (item->matrix == NULL) {
        md_reader_keep(reader, item->tensor);
        return md_tensor_check_values(item->tensor, binder->weights->geometry, err);
    }
    CM_TRY(md_reader_read(reader, &read, 1, false, err));
    CM_TRY(md_tensor_check_values(&read, binder->weights->geometry, err));
    CM_TRY(kn_mem_place(device, read.data, read.n_bytes, &item->matrix->data));
    kn_prepare(device, item->matrix, kn_at(binder->weights->prepared, item->at));
    return CM_OK;
}

static uint32_t weight_kept(void *ctx, uint32_t i, const md_tensor *tensors_out[MD_LOAD_TENSORS_MAX])
{
    const weight_item *item = &((const weight_binder *)ctx)->items[i];
    tensors_out[0] = item->tensor;
    return item->matrix == NULL ? 1 : 0;
}

/* All is bound: it is read, and matrices move into one block of device memory, in the device's order. */
static void weight_load(weight_binder *binder, uint32_t n_threads)
{
    md_load load = {.n_item = binder->n_item,
                    .n_threads = n_threads,
                    .item = weight_read,
                    .kept = weight_kept,
                    .ctx = binder};
    md_load_bytes bytes;
    if (binder->status == CM_OK && binder->prepared_bytes > 0) {
        binder->status =
            kn_mem_alloc(binder->weights->device, binder->prepared_bytes, &binder->weights->prepared);
        if (binder->status != CM_OK) {
            cm_error_set(binder->err, binder->status, "",
                         "no memory for %llu bytes of dense weights in the order of the kernels",
                         (unsigned long long)binder->prepared_bytes);
        }
    }
    for (uint32_t i = 0; i < binder->n_item; i++) {
        const weight_item *item = &binder->items[i];
        if (item->matrix != NULL && item->tensor->n_bytes > load.item_bytes_max) {
            load.item_bytes_max = item->tensor->n_bytes;
        }
    }
    if (binder->status == CM_OK) {
        binder->status = md_load_run(&load, &bytes, binder->err);
    }
}

static void weight_hc(weight_binder *binder, const char *name, kn_hc *hc_out)
{
    const md_geometry *g = binder->weights->geometry;
    char full[64];
    *hc_out = (kn_hc){.d = g->d,
                      .hc = g->hc,
                      .sinkhorn_iters = g->sinkhorn_iters,
                      .norm_eps = g->norm_eps,
                      .hc_eps = g->hc_eps};
    snprintf(full, sizeof(full), "%s_fn", name);
    weight_vector(binder, full, &hc_out->fn);
    snprintf(full, sizeof(full), "%s_base", name);
    weight_vector(binder, full, &hc_out->base);
    snprintf(full, sizeof(full), "%s_scale", name);
    weight_vector(binder, full, &hc_out->scale);
}

static void weight_compressor(weight_binder *binder, const char *name, const kn_kv_layout *kv, bool index,
                              rt_compressor *compressor_out)
{
    const md_geometry *g = binder->weights->geometry;
    char full[64];
    snprintf(full, sizeof(full), "%s.wkv", name);
    weight_matrix(binder, full, &compressor_out->wkv);
    snprintf(full, sizeof(full), "%s.wgate", name);
    weight_matrix(binder, full, &compressor_out->wgate);
    compressor_out->kn = (kn_compress){
        .inv_freq = binder->weights->inv_freq_compress,
        .ratio = kv->ratio,
        .dim = index ? g->index_dim : g->head_dim,
        .rope = g->rope_dim,
        .span = kn_compress_span(kv->ratio, binder->ahead),
        .eps = g->norm_eps,
        .index = index,
        .page_rows = index ? kv->page_index : kv->page_rows,
        .slot_state = index ? kv->slot_index : kv->slot_main,
        .row_bytes = index ? kv->index_bytes : kv->row_bytes,
    };
    snprintf(full, sizeof(full), "%s.ape", name);
    weight_vector(binder, full, &compressor_out->kn.ape);
    snprintf(full, sizeof(full), "%s.norm.weight", name);
    weight_vector(binder, full, &compressor_out->kn.norm);
}

static void weight_attention(weight_binder *binder, const kn_kv_layout *kv, rt_layer *layer)
{
    const md_geometry *g = binder->weights->geometry;
    weight_vector(binder, "attn_norm.weight", &layer->attn_norm);
    weight_vector(binder, "attn.q_norm.weight", &layer->q_norm);
    weight_vector(binder, "attn.kv_norm.weight", &layer->kv_norm);
    weight_matrix(binder, "attn.wq_a", &layer->wq_a);
    weight_matrix(binder, "attn.wq_b", &layer->wq_b);
    weight_matrix(binder, "attn.wkv", &layer->wkv);
    weight_matrix(binder, "attn.wo_a", &layer->wo_a);
    weight_matrix(binder, "attn.wo_b", &layer->wo_b);
    layer->inv_freq = kv->ratio == 0 ? binder->weights->inv_freq_window : binder->weights->inv_freq_compress;
    layer->attn = (kn_attn){.layout = *kv,
                            .n_head = g->n_head,
                            .dim = g->head_dim,
                            .rope = g->rope_dim,
                            .window = g->window,
                            .topk = kv->ratio == 4 ? g->index_topk : 0};
    weight_vector(binder, "attn.attn_sink", &layer->attn.sink);
    if (kv->ratio != 0) {
        weight_compressor(binder, "attn.compressor", kv, false, &layer->main);
    }
    if (kv->ratio == 4) {
        weight_compressor(binder, "attn.indexer.compressor", kv, true, &layer->index);
        weight_matrix(binder, "attn.indexer.wq_b", &layer->index_wq_b);
        weight_matrix(binder, "attn.indexer.weights_proj", &layer->index_weights);
    }
}

static void weight_ffn(weight_binder *binder, bool hash, rt_layer *layer)
{
    const md_geometry *g = binder->weights->geometry;
    weight_vector(binder, "ffn_norm.weight", &layer->ffn_norm);
    layer->gate = (kn_gate){.n_expert = g->n_expert, .topk = g->topk, .route_scale = g->route_scale};
    weight_matrix(binder, "ffn.gate", &layer->gate.weight);
    if (hash) {
        weight_vector(binder, "ffn.gate.tid2eid", &layer->gate.tid2eid);
    } else {
        weight_vector(binder, "ffn.gate.bias", &layer->gate.bias);
    }
    weight_matrix(binder, "ffn.shared_experts.w1", &layer->shared_w1);
    weight_matrix(binder, "ffn.shared_experts.w3", &layer->shared_w3);
    weight_matrix(binder, "ffn.shared_experts.w2", &layer->shared_w2);
}

static void weight_mtp(weight_binder *binder, rt_mtp *mtp_out)
{
    weight_vector(binder, "enorm.weight", &mtp_out->enorm);
    weight_vector(binder, "hnorm.weight", &mtp_out->hnorm);
    weight_vector(binder, "norm.weight", &mtp_out->norm);
    weight_matrix(binder, "e_proj", &mtp_out->e_proj);
    weight_matrix(binder, "h_proj", &mtp_out->h_proj);
    weight_hc(binder, "hc_head", &mtp_out->hc_head);
}

/* The rotation tables are ours, not the checkpoint's: computed once, kept on the device. */
static cm_status weight_rope_tables(rt_weights *weights, kn_stream *stream)
{
    const md_geometry *g = weights->geometry;
    uint64_t n_bytes = sizeof(float) * (g->rope_dim / 2);
    float *window = cm_alloc(n_bytes), *compress = cm_alloc(n_bytes);
    kn_rope_inv_freq(g->rope_theta, g->rope_dim, 1, 1, 1, 1, false, window);
    kn_rope_inv_freq(g->compress_theta, g->rope_dim, g->yarn.factor, g->yarn.original_positions,
                     g->yarn.beta_fast, g->yarn.beta_slow, g->yarn.factor > 0, compress);
    cm_status status = kn_mem_alloc(weights->device, n_bytes, &weights->inv_freq_window);
    if (status == CM_OK) {
        status = kn_mem_alloc(weights->device, n_bytes, &weights->inv_freq_compress);
    }
    if (status == CM_OK) {
        kn_copy_to_device(stream, weights->inv_freq_window, window, n_bytes);
        kn_copy_to_device(stream, weights->inv_freq_compress, compress, n_bytes);
        status = kn_stream_sync(stream);
    }
    cm_free(window);
    cm_free(compress);
    return status;
}

cm_status rt_weights_open(const md_checkpoint *checkpoint, const rt_kv_layout *kv, kn_device *device,
                          kn_stream *stream, uint32_t n_threads, rt_weights *weights_out, cm_error *err)
{
    const md_geometry *g = md_checkpoint_geometry(checkpoint);
    rt_weights weights = {.geometry = g, .device = device};
    weight_binder binder = {
        .checkpoint = checkpoint, .weights = &weights, .prefix = "", .ahead = kv->draft_max, .err = err};
    char prefix[MD_BLOCK_NAME_MAX];

    weights.layers = cm_alloc(sizeof(rt_layer) * kv->n_layer);
    binder.status = weight_rope_tables(&weights, stream);
    if (binder.status != CM_OK) {
        cm_error_set(err, binder.status, "", "no device memory for the rotation tables");
    }
    weight_matrix(&binder, "embed", &weights.embed);
    weight_matrix(&binder, "head", &weights.head);
    weight_vector(&binder, "norm.weight", &weights.norm);
    weight_hc(&binder, "hc_head", &weights.hc_head);
    binder.prefix = prefix;
    for (uint32_t l = 0; l < kv->n_layer && binder.status == CM_OK; l++) {
        md_block_name(g, l, prefix);
        weight_hc(&binder, "hc_attn", &weights.layers[l].hc_attn);
        weight_hc(&binder, "hc_ffn", &weights.layers[l].hc_ffn);
        weight_attention(&binder, &kv->layer[l], &weights.layers[l]);
        weight_ffn(&binder, md_layer_is_hash(g, l), &weights.layers[l]);
    }
    if (binder.status == CM_OK && kv->n_layer > g->n_layer) {
        weight_mtp(&binder, &weights.mtp); /* its prefix is the last one's */
    }
    weight_load(&binder, n_threads);
    cm_free(binder.items);
    if (binder.status != CM_OK) {
        rt_weights_close(&weights);
        return binder.status;
    }
    *weights_out = weights;
    return CM_OK;
}

void rt_weights_close(rt_weights *weights)
{
    kn_mem_free(weights->device, weights->prepared);
    kn_mem_free(weights->device, weights->inv_freq_window);
    kn_mem_free(weights->device, weights->inv_freq_compress);
    for (uint32_t i = 0; i < weights->n_copies; i++) {
        cm_free(weights->copies[i]);
    }
    cm_free(weights->copies);
    cm_free(weights->layers);
    *weights = (rt_weights){0};
}
