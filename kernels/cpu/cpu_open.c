#include <stdio.h>
#include <string.h>

#include "common/base/mem.h"
#include "kernels/cpu/cpu_private.h"

#define DECLARE_PATH(isa)                                                                                    \
    extern const kn_dense_ops kn_cpu_dense_##isa;                                                            \
    extern const kn_attn_ops kn_cpu_attn_##isa;                                                              \
    extern const kn_moe_ops kn_cpu_moe_##isa;                                                                \
    extern const cpu_prepare_ops kn_cpu_prepare_##isa;
#define PATH(isa)                                                                                            \
    {                                                                                                        \
#isa, &kn_cpu_dense_##isa, &kn_cpu_attn_##isa, &kn_cpu_moe_##isa, &kn_cpu_prepare_##isa              \
    }

DECLARE_PATH(portable)
#if defined(__x86_64__)
DECLARE_PATH(avx2)
DECLARE_PATH(avx512)
DECLARE_PATH(avx512vnni)
DECLARE_PATH(avx512bf16)
#endif

/* Best last; each one's machines can run all before it. */
static const cpu_tables PATHS[] = {
    PATH(portable),
#if defined(__x86_64__)
    PATH(avx2),     PATH(avx512), PATH(avx512vnni), PATH(avx512bf16),
#endif
};
enum { N_PATH = sizeof(PATHS) / sizeof(PATHS[0]) };

/* What the compiler may use for x86-64-v3 and x86-64-v4, and beyond. */
static bool machine_has(const char *isa)
{
#if defined(__x86_64__)
    bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl");
    bool vnni = v4 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
    if (strcmp(isa, "avx2") == 0) {
        return v3;
    }
    if (strcmp(isa, "avx512") == 0) {
        return v4;
    }
    if (strcmp(isa, "avx512vnni") == 0) {
        return vnni;
    }
    /* Others than AMD multiply bfloat16 at half the rate of float32, and the bytes of the path before faster.
     */
    if (strcmp(isa, "avx512bf16") == 0) {
        return vnni && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
    }
#endif
    return strcmp(isa, "portable") == 0;
}

const char *kn_cpu_isa_at(uint32_t i)
{
    return i < N_PATH && machine_has(PATHS[i].isa) ? PATHS[i].isa : NULL;
}

/* NULL: this machine or this build has no such path. */
static const cpu_tables *choose_path(const char *isa)
{
    const cpu_tables *chosen = NULL;
    bool best = isa == NULL || strcmp(isa, "auto") == 0;
    for (uint32_t i = 0; kn_cpu_isa_at(i) != NULL; i++) {
        if (best || strcmp(PATHS[i].isa, isa) == 0) {
            chosen = &PATHS[i];
        }
    }
    return chosen;
}

static cm_status refuse_isa(const char *isa, cm_error *err)
{
    char names[64] = "";
    size_t n = 0;
    for (uint32_t i = 0; kn_cpu_isa_at(i) != NULL && n < sizeof(names); i++) {
        n += (size_t)snprintf(names + n, sizeof(names) - n, "%s%s", i > 0 ? ", " : "", kn_cpu_isa_at(i));
    }
    return cm_error_set(err, CM_E_CONFIG, "isa", "this machine has no path \"%s\"; it has %s", isa, names);
}

static cm_status cpu_open(const kn_device_options *options, kn_device **device_out, cm_error *err)
{
    const cpu_tables *path = choose_path(options->isa);
    cpu_device *device;
    kn_numa *numa = NULL;
    if (path == NULL) {
        return refuse_isa(options->isa, err);
    }
    if (options->n_threads == 0) {
        return cm_error_set(err, CM_E_CONFIG, "n_threads", "the cpu back-end needs at least one thread");
    }
    if (options->numa_node != NULL) {
        CM_TRY(kn_numa_open(options->numa_node, &numa, err));
    }
    device = cm_alloc(sizeof(*device));
    device->base = (kn_device){.backend = &kn_backend_cpu,
                               .isa = path->isa,
                               .dense = path->dense,
                               .attn = path->attn,
                               .moe = path->moe,
                               .numa = numa};
    device->prepare = path->prepare;
    device->team = kn_team_create(options->n_threads);
    *device_out = &device->base;
    return CM_OK;
}

static void cpu_close(kn_device *base)
{
    cpu_device *device = (cpu_device *)base;
    kn_team_destroy(device->team);
    kn_numa_close(base->numa);
    cm_free(device);
}

static uint64_t cpu_prepared_bytes(const kn_device *device, const kn_matrix *w)
{
    return ((const cpu_device *)device)->prepare->bytes(w);
}

static void cpu_prepare(const kn_device *device, const kn_matrix *w, kn_ptr at)
{
    ((const cpu_device *)device)->prepare->prepare(w, kn_host(at));
}

/* ---- streams ---- */

/* Hands out the next n_bytes of the block, 64-byte aligned; without a block it only counts. */
static void *take(uint8_t *block, uint64_t *at, uint64_t n_bytes)
{
    void *taken = block != NULL ? block + *at : NULL;
    *at += (n_bytes + 63) / 64 * 64;
    return taken;
}

/* Lays out all scratch in the block; returns its size. block NULL: only the size is wanted. */
static uint64_t lay_out(cpu_stream *s, uint8_t *block, uint32_t n_threads)
{
    const kn_limits *l = &s->limits;
    uint64_t at = 0, row = cpu_attn_row_width(l->head_dim) * sizeof(double);
    uint64_t n_key = cpu_round_up(l->n_key, CPU_KEYS);
    uint64_t index_max = l->n_index_row > 0 ? CPU_INDEX_MAX : 0;
    s->attn = take(block, &at, n_threads * sizeof(*s->attn));
    s->x_tile = take(block, &at, (uint64_t)CPU_X_BYTES * cpu_round_up(l->n_in, CPU_CHUNK));
    s->h_tile = take(block, &at, (uint64_t)CPU_X_BYTES * cpu_round_up(l->n_inner, CPU_CHUNK));
    s->inner = take(block, &at, 3ull * CPU_ROWS * l->n_inner * sizeof(uint16_t));
    s->codes = take(block, &at, (uint64_t)CPU_ROWS * l->n_inner);
    s->scales = take(block, &at, (uint64_t)CPU_ROWS * kn_blocks(l->n_inner, KN_ACT_BLOCK));
    s->gate = take(block, &at, (uint64_t)l->n_row * l->n_expert * sizeof(float));
    s->biased = take(block, &at, (uint64_t)n_threads * l->n_expert * sizeof(float));
    s->index_score = take(block, &at, CPU_INDEX_ROWS * cpu_index_width(l->n_index_row) * sizeof(float));
    s->index_spare = take(block, &at, CPU_INDEX_ROWS * cpu_index_width(l->n_index_row) * sizeof(uint32_t));
    s->index_q = take(block, &at, CPU_INDEX_ROWS * 2 * index_max);
    s->index_scale = take(block, &at, CPU_INDEX_ROWS * index_max / KN_FP4_BLOCK * sizeof(double));
    for (uint32_t i = 0; i < n_threads; i++) {
        cpu_attn_scratch t = {.rows = take(block, &at, CPU_HEADS * row),
                              .key = take(block, &at, CPU_KEYS * row),
                              .score = take(block, &at, CPU_HEADS * n_key * sizeof(double)),
                              .row =
                                  take(block, &at, (n_key + CPU_HEADS / CPU_HEADS_TILE) * sizeof(uint8_t *))};
        if (block != NULL) {
            s->attn[i] = t;
        }
    }
    return at;
}

static cm_status cpu_stream_open(kn_device *device, const kn_limits *limits, kn_stream **stream_out)
{
    kn_team *team = ((cpu_device *)device)->team;
    cpu_stream *s = cm_alloc(sizeof(*s));
    cm_status status;
    kn_host_check_limits(limits);
    s->base.device = device;
    s->team = team;
    s->limits = *limits;
    status = kn_host_alloc(device, lay_out(s, NULL, kn_team_size(team)), &s->block);
    if (status != CM_OK) {
        cm_free(s);
        return status;
    }
    lay_out(s, kn_host(s->block), kn_team_size(team));
    *stream_out = &s->base;
    return CM_OK;
}

static void cpu_stream_close(kn_stream *base)
{
    cpu_stream *s = (cpu_stream *)base;
    kn_host_free(base->device, s->block);
    cm_free(s);
}

const kn_backend kn_backend_cpu = {
    .version = KN_VERSION,
    .name = "cpu",
    .open = cpu_open,
    .close = cpu_close,
    .stream_open = cpu_stream_open,
    .stream_close = cpu_stream_close,
    .stream_sync = kn_host_sync,
    .mem_alloc = kn_host_alloc,
    .mem_free = kn_host_free,
    .mem_place = kn_host_place,
    .mem_host = kn_host_view,
    .prepared_bytes = cpu_prepared_bytes,
    .prepare = cpu_prepare,
    .copy_to_device = kn_host_copy_to_device,
    .copy_to_host = kn_host_copy_to_host,
    .copy = kn_host_copy,
};
