/* `baleen bench`: what its benchmarks share. A benchmark prepares its data, checks the paths it will time
 * against the oracle, then runs rounds: the ceilings and every candidate one after another, so that a round's
 * figures were taken under the same load. What it reports is the median over the rounds of each round's own
 * ratio. With one thread times are the thread's processor time, which other load disturbs less; with more,
 * wall time. Thread: main; the kernels' team beside it. */
#pragma once
#include <jansson.h>
#include <stdint.h>

#include "kernels/kn.h"

enum { BENCH_ROUNDS_MAX = 99, BENCH_PATHS_MAX = 8 };

typedef struct bench_config {
    uint64_t threads, rounds, weight_bytes, d, inner, streams, stream_tokens, batch, ranks, layers;
    uint64_t workers, steps, prompt, context;
    bool paced;           /* steps take their time */
    char *isa;            /* paths, comma separated; each is measured in every round */
    char *model;          /* folder, of the kind that the benchmark says; "": there is none */
    char *svg;            /* file that gets a chart; "": none */
    char *batches, *peer; /* serve.model: numbers, comma separated; a shell command or "" */
    bool keyed;           /* messages carry tags */
    char *net;            /* transports, comma separated */
    char *processes;      /* of an exchange, the router one of them; comma separated */
} bench_config;

typedef struct bench bench;
struct bench {
    const char *name, *doc;
    int (*run)(const bench *b, const bench_config *config); /* exit code */
};

#define BENCH(id, ...) extern const bench bench_##id;
#include "tools/bench/benches.def"
#undef BENCH

/* ---- samples ---- */

typedef struct bench_samples {
    double value[BENCH_ROUNDS_MAX];
    uint32_t n;
} bench_samples;

typedef struct bench_summary {
    double median, min, max;
} bench_summary;

void bench_add(bench_samples *samples, double value);
bench_summary bench_summarize(const bench_samples *samples);
/* {"median":, "min":, "max":} */
json_t *bench_summary_json(bench_summary summary);

/* ---- one run ---- */

double bench_now(const bench_config *config); /* seconds of the clock described above */
/* Heading of the table on stdout, and the JSON object that bench_end prints below it. */
json_t *bench_begin(const bench *b, const bench_config *config);
void bench_end(json_t *report); /* given */

/* ---- paths ---- */

typedef struct bench_path {
    kn_device *device;
    kn_stream *stream;
    kn_expert *experts; /* the benchmark's */
    kn_ptr
        prepared; /* those, where they are a copy in the device's order; the device is another path's then */
} bench_path;

/* Opens the paths that config names; returns how many, 0 after having complained. */
uint32_t bench_open_paths(const bench_config *config, const kn_limits *limits,
                          bench_path paths_out[BENCH_PATHS_MAX]);
void bench_close_paths(bench_path *paths, uint32_t n);
/* The oracle, to check against. */
bench_path bench_open_ref(const kn_limits *limits);

/* ---- ceilings (bench_probe.c) ---- */

typedef struct bench_team bench_team;
bench_team *bench_team_create(uint32_t n_threads);
void bench_team_destroy(bench_team *team);
/* Reads all bytes once with the team; n_bytes a multiple of 4096. */
void bench_read(bench_team *team, const void *data, uint64_t n_bytes);
/* Multiplications in one call of the probes below, and whether this CPU has the instruction. */
uint64_t bench_fma_macs(void);
uint64_t bench_fma64_macs(void);
uint64_t bench_fma64_256_macs(void);
uint64_t bench_madd_macs(void);
uint64_t bench_vnni_macs(void);
uint64_t bench_bf16_macs(void);
bool bench_has_madd(void);
bool bench_has_vnni(void);
bool bench_has_bf16(void);
void bench_fma(bench_team *team);   /* float32 fused multiply-adds in the widest registers */
void bench_fma64(bench_team *team); /* the same in double */
void bench_fma64_256(bench_team *team);
void bench_madd(bench_team *team); /* vpmaddwd and its addition in 256-bit registers */
void bench_vnni(bench_team *team); /* vpdpbusd in 512-bit registers */
void bench_bf16(bench_team *team); /* vdpbf16ps in 512-bit registers */
