/* One random schedule, drawn from its seed: what runs, among whom, in which pieces, on which cluster. The
 * same seed draws the same case on machines with the same CPU paths. Thread: any. */
#pragma once
#include "common/model/geometry.h"
#include "kernels/kn.h"
#include "router/sched/sched_core.h"

enum {
    T_SEQ_MAX = 5,   /* sequences whose results are judged */
    T_EXTRA_MAX = 3, /* more that are cancelled on the way */
    T_ALL_MAX = T_SEQ_MAX + T_EXTRA_MAX,
    T_WORKER_MAX = 7,
    T_PROMPT_MAX = 400,
    T_TOKENS_MAX = 192,
    T_MODELS = 5,
    T_CONSTRAINTS = 4,        /* kinds that are drawn */
    T_CONSTRAINT_VOCAB = 260, /* ids that a vocabulary for them has at least: every byte and control tokens */
};

extern const char *const t_model_names[T_MODELS];

typedef struct t_rng {
    uint64_t key, n;
} t_rng;
uint32_t t_below(t_rng *rng, uint32_t n);
uint32_t t_between(t_rng *rng, uint32_t low, uint32_t high); /* both included */

typedef struct t_seq {
    uint32_t prompt[T_PROMPT_MAX], n_prompt;
    uint32_t
        after; /* 0, or 1 + the sequence whose prompt and answer it begins with; the answer is not drawn */
    rt_sampler sampler;
    uint32_t constraint; /* 0: none; else one of schedule_constraint.h's */
    bool thinking;       /* it begins behind a </think> */
    uint32_t arrival;    /* turn in which it is opened */
    uint32_t cancel;     /* extras: turn in which it is cancelled */
    bool cancel_flying;  /* while the turn's step is computed, not before it */
} t_seq;

typedef struct t_device {
    const char *isa;
    uint32_t n_threads;
} t_device;

typedef struct t_case {
    uint64_t seed;
    uint32_t model;
    char path[512];
    md_geometry geometry;
    t_seq seqs[T_ALL_MAX]; /* the judged ones first */
    uint32_t n_seq, n_all;
    uint32_t slot_max, row_max, chunk_max, page_max;
    uint32_t state_max;     /* 0: nothing is used again */
    uint32_t draft_max;     /* 0: no speculation */
    uint32_t micro_batches; /* of a step: 1 or 2 */
    bool cut_anywhere;      /* not where the engine would cut */
    uint32_t hint;          /* so many in 4 guesses are made right ones: a random model's hardly ever are */
    uint32_t n_worker;
    const char *transport;
    uint64_t frame_bytes; /* largest message: small ones make many frames of one layer */
    uint32_t frame_max, window_us;
    t_device router, workers[T_WORKER_MAX];
    bool whole;           /* every worker owns every expert; else owners are random */
    uint32_t epoch_turn;  /* turn in whose step the second placement comes; 0: none */
    uint32_t epoch_layer; /* just before this layer's experts */
    bool epoch_late;      /* of the second micro-batch */
    bool router_first;    /* the router hears of it before the workers do */
    bool retire;          /* the first is refused at once by the workers */
} t_case;

void t_case_draw(uint64_t seed, t_case *case_out);
/* The same judged sequences on an undisturbed cluster: one worker, local, one path, room for a prompt in
 * one step and for each sequence's own slot and pages. */
void t_case_undisturbed(const t_case *c, t_case *case_out);
void t_case_print(const t_case *c);

uint32_t t_pages(uint32_t n_token);
uint32_t t_seq_pages(const t_seq *seq); /* of its longest */
