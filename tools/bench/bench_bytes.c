#include "tools/bench/bench_bytes.h"

#include <string.h>
#include <sys/mman.h>

#include "router/engine/kv.h"

/* Not the embedding, of which a step reads a row, nor a drafter's, which is no part of the model. */
static bool is_dense(const md_expect *e)
{
    return strstr(e->name, ".experts.") == NULL && strcmp(e->name, "embed.weight") != 0 &&
           e->dtype != MD_I64 && strncmp(e->name, "mtp.", 4) != 0;
}

static double n_values(const md_expect *e)
{
    return (double)e->dim[0] * (e->n_dim > 1 ? (double)e->dim[1] : 1);
}

static bool add_bytes(void *ctx, const md_expect *e)
{
    *(double *)ctx += is_dense(e) ? n_values(e) * md_dtype_bytes(e->dtype) : 0;
    return true;
}

static bool add_macs(void *ctx, const md_expect *e)
{
    bool weights = e->n_dim == 2 && e->dtype != MD_F8_E8M0 && strcmp(e->name, "head.weight") != 0;
    *(double *)ctx += is_dense(e) && weights ? n_values(e) : 0;
    return true;
}

double bench_step_bytes(const md_geometry *g, uint32_t n_row)
{
    double dense = 0, missed = 1;
    md_expect_each(g, add_bytes, &dense);
    for (uint32_t r = 0; r < n_row; r++) {
        missed *= 1 - (double)g->topk / g->n_expert;
    }
    return dense + g->n_layer * g->n_expert * (1 - missed) * (double)md_expert_bytes(g);
}

double bench_token_macs(const md_geometry *g)
{
    double dense = 0;
    md_expect_each(g, add_macs, &dense);
    return dense + 3.0 * g->n_layer * g->topk * g->inner * g->d;
}

double bench_kv_read_bytes(const md_geometry *g, uint32_t pos)
{
    double sum = 0, row = (double)kn_kv_row_bytes(g->head_dim, g->rope_dim);
    uint32_t window = pos < g->window ? pos : g->window;
    for (uint32_t l = 0; l < g->n_layer; l++) {
        uint32_t n = g->ratio[l] == 0 ? 0 : pos / g->ratio[l];
        if (g->ratio[l] == 4) {
            sum += (double)n * (double)kn_index_row_bytes(g->index_dim);
            n = n < g->index_topk ? n : g->index_topk;
        }
        sum += row * (window + n);
    }
    return sum;
}

uint64_t bench_kv_bytes(const md_geometry *g, uint32_t n_token)
{
    rt_kv_sizes sizes;
    rt_kv_sizes_get(g, 0, &sizes);
    return rt_kv_seq_bytes(&sizes, n_token);
}

void *bench_read_alloc(uint64_t n_bytes)
{
    void *memory = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return NULL;
    }
    (void)madvise(memory, n_bytes, MADV_HUGEPAGE); /* a wish, no more */
    memset(memory, 1, n_bytes);
    return memory;
}

void bench_read_free(void *memory, uint64_t n_bytes)
{
    if (memory != NULL) {
        munmap(memory, n_bytes);
    }
}
