/* The indexer's scan: what index.c and its forms (index_scan.c, index_avx2.c, index_vnni.c) share. */
#pragma once
#include "kernels/cpu/isa.h"

/* A query as a form of the scan keeps it. */
typedef struct cpu_index_query {
    void *codes;                    /* scratch, 64-byte aligned, of CPU_INDEX_MAX * 2 bytes */
    double *scale;                  /* scratch [blocks][width] */
    double weight[CPU_INDEX_HEADS]; /* f32(w * factor), what else is in it is the form's; zero past heads */
    _Alignas(64) int32_t start[CPU_INDEX_HEADS]; /* vnni's */
    bool narrow;                                 /* vnni's and avx2's */
} cpu_index_query;

/* Up to CPU_INDEX_ROWS queries of one sequence that meet the same keys. */
typedef struct cpu_index_scan {
    uint32_t heads, dim, n_row;
    uint32_t width; /* heads rounded up to CPU_INDEX_PAD */
    float factor;   /* f32(dim^-0.5 * heads^-0.5) */
    cpu_index_query query[CPU_INDEX_ROWS];
} cpu_index_scan;

/* Enters a query: stored rows [heads] and their weights BF16 [heads]. */
void KN_FN(kn_cpu_index_load)(const cpu_index_scan *scan, const uint8_t *rows, const uint16_t *w,
                              cpu_index_query *query);
/* Scores of n stored keys: those of query i at score + i * stride. */
void KN_FN(kn_cpu_index_score)(const cpu_index_scan *scan, const uint8_t *const *keys, uint32_t n,
                               float *score, uint64_t stride);
