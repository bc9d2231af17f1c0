/* What a step of a model cannot do without: bytes to read and weights to multiply by, from its geometry
 * alone. The limits that whole-model benchmarks are held against. Thread: any. */
#pragma once
#include "common/model/checkpoint.h"

/* Bytes of weights that a step of n_row rows reads: of the routed experts those that are hit at least once,
 * if all are as likely; of the embedding nothing. */
double bench_step_bytes(const md_geometry *geometry, uint32_t n_row);
/* Multiplications by weights for one row of a prompt: it gives no logits. */
double bench_token_macs(const md_geometry *geometry);
/* What one row at a position reads of KV: the window, the picked or all compressed rows, all indexer keys. */
double bench_kv_read_bytes(const md_geometry *geometry, uint32_t pos);
/* What a sequence of n_token tokens takes. */
uint64_t bench_kv_bytes(const md_geometry *geometry, uint32_t n_token);

/* Memory for bench_read that was touched, in large pages if there are any; NULL when there is none. */
void *bench_read_alloc(uint64_t n_bytes);
void bench_read_free(void *memory, uint64_t n_bytes); /* NULL is fine */
