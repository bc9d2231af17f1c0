/* oneDNN: bf16 weights, expanded to four times the bytes, in whatever order it likes best. Its threads are
 * those of OMP_NUM_THREADS. */
#include <dnnl.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "tools/peers/peer.h"

static dnnl_engine_t g_engine;
static dnnl_stream_t g_stream;

static void must(dnnl_status_t status, const char *what)
{
    CM_ASSERT_MSG(status == dnnl_success, "%s failed with %d", what, (int)status);
}

/* About normal values of size one, and zeros where the library wants padding. */
static dnnl_memory_t new_memory(const dnnl_memory_desc_t *desc)
{
    dnnl_memory_t memory;
    size_t n = dnnl_memory_desc_get_size(desc);
    uint16_t *values = cm_alloc_aligned(n);
    for (size_t i = 0; i < n / sizeof(*values); i++) {
        values[i] = (uint16_t)(0x3f00 ^ (peer_random(i) & 0x80ff));
    }
    must(dnnl_memory_create(&memory, desc, g_engine, values), "memory");
    return memory;
}

static void free_memory(dnnl_memory_t memory)
{
    void *values;
    must(dnnl_memory_get_data_handle(memory, &values), "handle");
    must(dnnl_memory_destroy(memory), "destroying");
    cm_free(values);
}

/* y [n][n_out] = x [n][n_in] W, twice; seconds of the second time. */
static double product(const peer_args *args, uint32_t n, uint32_t n_in, uint32_t n_out)
{
    dnnl_dims_t x_dims = {n, n_in}, w_dims = {n_in, n_out}, y_dims = {n, n_out};
    dnnl_memory_desc_t x, w, y;
    dnnl_matmul_desc_t desc;
    dnnl_primitive_desc_t chosen;
    dnnl_primitive_t matmul;
    double seconds = 0;
    must(dnnl_memory_desc_init_by_tag(&x, 2, x_dims, dnnl_bf16, dnnl_ab), "x");
    must(dnnl_memory_desc_init_by_tag(&w, 2, w_dims, dnnl_bf16, dnnl_format_tag_any), "w");
    must(dnnl_memory_desc_init_by_tag(&y, 2, y_dims, dnnl_bf16, dnnl_ab), "y");
    must(dnnl_matmul_desc_init(&desc, &x, &w, NULL, &y), "matmul");
    must(dnnl_primitive_desc_create(&chosen, &desc, NULL, g_engine, NULL), "choosing");
    must(dnnl_primitive_create(&matmul, chosen), "primitive");
    dnnl_exec_arg_t operands[] = {
        {DNNL_ARG_SRC, new_memory(&x)},
        {DNNL_ARG_WEIGHTS, new_memory(dnnl_primitive_desc_query_md(chosen, dnnl_query_weights_md, 0))},
        {DNNL_ARG_DST, new_memory(&y)}};
    for (int i = 0; i < 2; i++) {
        double start = peer_seconds(args);
        must(dnnl_primitive_execute(matmul, g_stream, 3, operands), "executing");
        must(dnnl_stream_wait(g_stream), "waiting");
        seconds = peer_seconds(args) - start;
    }
    for (int i = 0; i < 3; i++) {
        free_memory(operands[i].memory);
    }
    dnnl_primitive_destroy(matmul);
    dnnl_primitive_desc_destroy(chosen);
    return seconds;
}

int main(int argc, char **argv)
{
    peer_args args;
    if (!peer_args_of(argc, argv, &args)) {
        return 2;
    }
    must(dnnl_engine_create(&g_engine, dnnl_cpu, 0), "engine");
    must(dnnl_stream_create(&g_stream, g_engine, dnnl_stream_default_flags), "stream");
    for (uint32_t i = 0; i < args.n_rows; i++) {
        uint32_t n = args.rows[i];
        double up = product(&args, n, args.d, args.inner), down = product(&args, n, args.inner, args.d);
        peer_say("onednn", n, 3.0 * args.d * args.inner * n, 2 * up + down);
    }
    dnnl_stream_destroy(g_stream);
    dnnl_engine_destroy(g_engine);
    return 0;
}
