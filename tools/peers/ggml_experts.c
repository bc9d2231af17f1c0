/* ggml: MXFP4 weights in the order that its CPU back-end repacks them to, activations rounded to 8 bits. */
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "tools/peers/peer.h"

enum { GGML_EXPERTS = 8, GGML_MATRICES = 3 * GGML_EXPERTS, GGML_BLOCK = 32, GGML_BLOCK_BYTES = 17 };

typedef struct weights {
    struct ggml_context *context;
    ggml_backend_buffer_t buffer;
    struct ggml_tensor *matrix[GGML_MATRICES]; /* of each expert: two of inner x d, one of d x inner */
} weights;

static struct ggml_context *new_context(void)
{
    return ggml_init((struct ggml_init_params){.mem_size = 8 << 20, .no_alloc = true});
}

/* The buffer type that repacks; NULL where this CPU has none. */
static ggml_backend_buffer_type_t repacking(void)
{
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    void *found = ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device),
                                                    "ggml_backend_dev_get_extra_bufts");
    ggml_backend_dev_get_extra_bufts_t get;
    memcpy(&get, &found, sizeof(get));
    for (ggml_backend_buffer_type_t *type = get != NULL ? get(device) : NULL; type != NULL && *type != NULL;
         type++) {
        if (strstr(ggml_backend_buft_name(*type), "REPACK") != NULL) {
            return *type;
        }
    }
    return NULL;
}

static void fill(struct ggml_tensor *matrix, uint8_t *bytes)
{
    size_t n = ggml_nbytes(matrix);
    for (size_t i = 0; i < n; i++) {
        bytes[i] = (uint8_t)(i % GGML_BLOCK_BYTES == 0 ? 117 + peer_random(i) % 4 : peer_random(i));
    }
    ggml_backend_tensor_set(matrix, bytes, 0, n);
}

static weights make_weights(const peer_args *args)
{
    weights w = {.context = new_context()};
    ggml_backend_buffer_type_t type = repacking();
    uint8_t *bytes = cm_alloc((uint64_t)args->d * args->inner / GGML_BLOCK * GGML_BLOCK_BYTES);
    for (uint32_t i = 0; i < GGML_MATRICES; i++) {
        w.matrix[i] = ggml_new_tensor_2d(w.context, GGML_TYPE_MXFP4, i % 3 < 2 ? args->d : args->inner,
                                         i % 3 < 2 ? args->inner : args->d);
    }
    w.buffer = ggml_backend_alloc_ctx_tensors_from_buft(w.context,
                                                        type != NULL ? type : ggml_backend_cpu_buffer_type());
    CM_ASSERT(w.buffer != NULL);
    for (uint32_t i = 0; i < GGML_MATRICES; i++) {
        fill(w.matrix[i], bytes);
    }
    cm_free(bytes);
    return w;
}

static struct ggml_tensor *new_rows(struct ggml_context *context, uint32_t k, uint32_t n)
{
    struct ggml_tensor *x = ggml_new_tensor_2d(context, GGML_TYPE_F32, k, n);
    ggml_set_input(x);
    return x;
}

static void fill_rows(struct ggml_tensor *x)
{
    float *value = ggml_get_data_f32(x);
    for (int64_t i = 0; i < ggml_nelements(x); i++) {
        value[i] = (float)peer_random((uint64_t)i) / 2147483648.0f - 1;
    }
}

static void run(const peer_args *args, const weights *w, ggml_backend_t cpu, uint32_t n)
{
    struct ggml_context *context = new_context();
    struct ggml_tensor *x = new_rows(context, args->d, n), *h = new_rows(context, args->inner, n);
    struct ggml_cgraph *graph = ggml_new_graph(context);
    ggml_backend_buffer_t buffer;
    double start;
    for (uint32_t i = 0; i < GGML_MATRICES; i++) {
        struct ggml_tensor *y = ggml_mul_mat(context, w->matrix[i], i % 3 < 2 ? x : h);
        ggml_set_output(y);
        ggml_build_forward_expand(graph, y);
    }
    buffer = ggml_backend_alloc_ctx_tensors(context, cpu);
    CM_ASSERT(buffer != NULL);
    fill_rows(x);
    fill_rows(h);
    ggml_backend_graph_compute(cpu, graph);
    start = peer_seconds(args);
    ggml_backend_graph_compute(cpu, graph);
    peer_say("ggml", n, (double)GGML_MATRICES * args->d * args->inner * n, peer_seconds(args) - start);
    ggml_backend_buffer_free(buffer);
    ggml_free(context);
}

static void say_nothing(enum ggml_log_level level, const char *text, void *arg)
{
    (void)level;
    (void)text;
    (void)arg;
}

int main(int argc, char **argv)
{
    peer_args args;
    ggml_backend_t cpu;
    weights w;
    if (!peer_args_of(argc, argv, &args)) {
        return 2;
    }
    ggml_log_set(say_nothing, NULL);
    cpu = ggml_backend_cpu_init();
    w = make_weights(&args);
    ggml_backend_cpu_set_n_threads(cpu, (int)args.threads);
    for (uint32_t i = 0; i < args.n_rows; i++) {
        run(&args, &w, cpu, args.rows[i]);
    }
    ggml_backend_free(cpu);
    ggml_backend_buffer_free(w.buffer);
    ggml_free(w.context);
    return 0;
}
