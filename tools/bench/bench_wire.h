/* A wire to experts that need no time, for benchmarks of a router alone: a back-end of net whose every
 * address is a worker that answers a dispatch frame by itself, at once or after as long as a wire would take.
 * All links share one wire, full duplex: a frame waits for those before it, takes bytes / bytes_s and then
 * latency. It sends and receives nothing, so that what is left is the router's own work. Thread: one; one
 * object at a time. */
#pragma once
#include <stdint.h>

#include "common/net/net.h"
#include "common/proc/member.h"

enum { BENCH_WIRE_CLUSTER = 7 };

typedef struct bench_wire {
    uint64_t latency_ns; /* each way */
    double bytes_s;      /* 0: no time */
    bool values;         /* rows of results are a function of expert and row; else whatever */
    /* counted */
    uint64_t n_frame, out_bytes, back_bytes;
} bench_wire;

/* How the next object that is opened on this table does it; kept, may be changed meanwhile. */
void bench_wire_use(bench_wire *wire);
extern const net_ops bench_wire_ops;
/* Epoch 1 of n_rank workers at the end of such a wire; every expert has one owner. */
pc_epoch *bench_wire_epoch(uint32_t n_layer, uint32_t n_expert, uint32_t n_rank);
