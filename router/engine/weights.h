/* The dense weights of a checkpoint, bound by meaning once: after this no name is looked up and no shape is
 * doubted. Weights stay in the checkpoint's mapping, in their stored formats, except matrices that the device
 * reads faster in an order of its own (kn_prepare): of those it has a copy of the same size, in huge pages
 * where the machine has them, and nothing of the file, so that what is resident is one copy. Several routers
 * on one machine share the pages of a mapping, not the copies. Thread: any after open (read-only). */
#pragma once
#include "common/model/checkpoint.h"
#include "kernels/kn.h"
#include "router/engine/kv.h"

/* A compressor's products; kn is what the compress operation wants. */
typedef struct rt_compressor {
    kn_matrix wkv, wgate; /* BF16 [width][d] */
    kn_compress kn;
} rt_compressor;

typedef struct rt_layer {
    kn_hc hc_attn, hc_ffn;
    kn_ptr attn_norm, q_norm, kv_norm, ffn_norm; /* BF16 */
    kn_matrix wq_a, wq_b, wkv, wo_a, wo_b;
    kn_attn attn;
    kn_ptr inv_freq;     /* F32 [rope / 2] of this layer's rotation */
    rt_compressor main;  /* ratio != 0 */
    rt_compressor index; /* ratio 4 */
    kn_matrix index_wq_b, index_weights;
    kn_gate gate;
    kn_matrix shared_w1, shared_w3, shared_w2;
} rt_layer;

/* What the MTP block has beside those of a layer (model 7.1). */
typedef struct rt_mtp {
    kn_ptr enorm, hnorm, norm; /* BF16 [d] */
    kn_matrix e_proj, h_proj;
    kn_hc hc_head;
} rt_mtp;

typedef struct rt_weights {
    const md_geometry *geometry; /* borrowed from the checkpoint */
    kn_device *device;           /* borrowed */
    kn_matrix embed, head;
    kn_ptr norm;
    kn_hc hc_head;
    kn_ptr inv_freq_window, inv_freq_compress; /* F32 [rope / 2]; owned */
    rt_layer *layers;                          /* [kv->n_layer] */
    rt_mtp mtp;                                /* when the MTP block is among them */
    kn_ptr prepared; /* owned; all matrices in the device's order; none if it has none */
    void **copies;   /* owned; tensors whose place in the file is not aligned for their type */
    uint32_t n_copies;
    uint64_t n_bytes; /* of all dense weights */
} rt_weights;

/* Reads and checks every dense weight of kv's layers (md_tensor_check_values) with n_threads >= 1 threads.
 * CM_E_CORRUPT names the tensor. */
CM_MUST_CHECK cm_status rt_weights_open(const md_checkpoint *checkpoint, const rt_kv_layout *kv,
                                        kn_device *device, kn_stream *stream, uint32_t n_threads,
                                        rt_weights *weights_out, cm_error *err);
void rt_weights_close(rt_weights *weights);
