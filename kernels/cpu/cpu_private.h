/* The cpu back-end: the same values as the oracle, bit for bit, from C that the compiler turns into vector
 * code. The files named in KN_CPU_ISA_SOURCES are compiled once per instruction set with KN_ISA as the suffix
 * of what they export; cpu_open.c picks one set of tables. */
#pragma once
#include "kernels/cpu/team.h"
#include "kernels/kn_math.h"
#include "kernels/kn_private.h"

enum {
    CPU_TILE = 8,             /* rows that share one decoding of the weights */
    CPU_ROWS = 64,            /* most rows of a quantized tile on any path */
    CPU_X_BYTES = 544,        /* scratch a tile has for each input: CPU_ROWS doubles and some */
    CPU_OUTS = 4,             /* outputs that share one reading of the inputs */
    CPU_CHUNK = KN_ACT_BLOCK, /* inputs decoded at a time */
    CPU_HEADS = 128,           /* most heads that share one decoding of the keys */
    CPU_HEADS_TILE = 4,       /* of which so many at a time meet a few keys */
    CPU_KEYS = 48,            /* keys decoded at a time */
    CPU_DIM_PAD = 32,         /* dims of the attention's scratch are a multiple of it */
    CPU_INDEX_ROWS = 4,       /* indexer queries of one sequence that share one decoding of the keys */
    CPU_INDEX_HEADS = 256,    /* most indexer heads */
    CPU_INDEX_PAD = 64,       /* indexer heads are filled up to a multiple of it */
    CPU_INDEX_MAX = 1 << 16,  /* those * dim */
};

/* How a path wants quantized weights: products_q8.c, or vnni.c. */
typedef struct cpu_prepare_ops {
    uint64_t (*bytes)(const kn_matrix *w);
    void (*prepare)(const kn_matrix *w, void *out); /* out: 64-byte aligned */
} cpu_prepare_ops;

typedef struct cpu_tables {
    const char *isa;
    const kn_dense_ops *dense;
    const kn_attn_ops *attn;
    const kn_moe_ops *moe;
    const cpu_prepare_ops *prepare;
} cpu_tables;

typedef struct cpu_device {
    kn_device base;
    const cpu_prepare_ops *prepare;
    kn_team *team;
} cpu_device;

/* Attention scratch of one thread; rows of cpu_attn_row_width(head_dim). */
typedef struct cpu_attn_scratch {
    double *rows;        /* [CPU_HEADS]: queries, and when all scores are there, outputs */
    double *key;         /* [CPU_KEYS] rows: decoded keys */
    double *score;       /* [CPU_HEADS][n_key rounded up to CPU_KEYS] */
    const uint8_t **row; /* [n_key + CPU_HEADS / CPU_HEADS_TILE] stored keys of a unit's rows, in order */
} cpu_attn_scratch;

typedef struct cpu_stream {
    kn_stream base;
    kn_team *team;
    kn_limits limits;
    kn_ptr block;          /* all that follows lies in it */
    void *x_tile;          /* [n_in rounded up to CPU_CHUNK][CPU_X_BYTES], inputs as the products read them */
    void *h_tile;          /* [n_inner rounded up][CPU_X_BYTES], expert inner values likewise */
    uint16_t *inner;       /* [3][CPU_ROWS][n_inner]: g, u, h */
    uint8_t *codes;        /* [CPU_ROWS][n_inner], h quantized */
    uint8_t *scales;       /* [CPU_ROWS][blocks of n_inner] */
    float *gate;           /* [n_row][n_expert] logits */
    float *biased;         /* [n_expert] for each thread */
    float *index_score;    /* [CPU_INDEX_ROWS] rows of cpu_index_width(n_index_row) */
    uint32_t *index_spare; /* the same for those that may be picked */
    uint8_t *index_q;      /* [CPU_INDEX_ROWS][CPU_INDEX_MAX * 2] codes of the queries */
    double *index_scale;   /* [CPU_INDEX_ROWS][CPU_INDEX_MAX / KN_FP4_BLOCK] their scales */
    cpu_attn_scratch *attn; /* one for each thread */
} cpu_stream;

static inline uint32_t cpu_round_up(uint32_t n, uint32_t to)
{
    return kn_blocks(n, to) * to;
}

/* Scores of a row: whole registers may be written behind the last. */
static inline uint64_t cpu_index_width(uint32_t n_index_row)
{
    return n_index_row + 16ull;
}

/* Doubles from one row to the next: a cache line more than its dims, so that the same dim of several rows
 * does not meet in one set of the cache. */
static inline uint64_t cpu_attn_row_width(uint32_t dim)
{
    return cpu_round_up(dim, CPU_DIM_PAD) + 8;
}
