/* llama.cpp: a whole model, decode of so many sequences at once and prefill of one, for `baleen bench
 * serve.model
 * --peer`: llama_decode MODEL.gguf THREADS BATCHES PROMPT STEPS prints a line for each batch and one for the
 * prompt. Sequences begin with 16 tokens and go on by the likeliest. */
#include <llama.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/mem.h"
#include "tools/peers/peer.h"

enum { DECODE_FIRST = 16, DECODE_ROOM = 256, DECODE_ROWS = 512, DECODE_TIMES = 64, PREFILL_TIMES = 3 };

typedef struct decode {
    struct llama_model *model;
    struct llama_context *context;
    struct llama_batch batch;
    int32_t n_thread, n_vocab;
    uint64_t n_drawn;
    double seconds[DECODE_TIMES];
} decode;

/* Of all threads: llama.cpp has its own. */
static double now_s(const decode *d)
{
    struct rusage used;
    if (d->n_thread > 1) {
        return 1e-9 * (double)cm_now_ns();
    }
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           1e-6 * (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
}

static llama_token draw(decode *d)
{
    return (llama_token)(2 + peer_random(d->n_drawn++) % (uint32_t)(d->n_vocab - 2));
}

static void add(decode *d, llama_token token, int32_t pos, int32_t sequence, bool sample)
{
    int32_t i = d->batch.n_tokens++;
    d->batch.token[i] = token;
    d->batch.pos[i] = pos;
    d->batch.n_seq_id[i] = 1;
    d->batch.seq_id[i][0] = sequence;
    d->batch.logits[i] = sample;
}

static void run(decode *d)
{
    CM_ASSERT(llama_decode(d->context, d->batch) == 0);
    d->batch.n_tokens = 0;
}

static llama_token likeliest(const decode *d, int32_t row)
{
    const float *logits = llama_get_logits_ith(d->context, row);
    llama_token best = 2;
    for (llama_token t = 2; t < d->n_vocab; t++) {
        best = logits[t] > logits[best] ? t : best;
    }
    return best;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int32_t n)
{
    qsort(values, (size_t)n, sizeof(*values), by_value);
    return values[n / 2];
}

static void open_context(decode *d, int32_t n_sequence, int32_t n_token)
{
    struct llama_context_params params = llama_context_default_params();
    params.n_seq_max = (uint32_t)n_sequence;
    params.n_ctx = (uint32_t)(n_sequence * n_token);
    params.n_batch = params.n_ubatch = DECODE_ROWS;
    params.n_threads = params.n_threads_batch = d->n_thread;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    d->context = llama_init_from_model(d->model, params);
    CM_ASSERT_MSG(d->context != NULL, "no context for %d sequences", n_sequence);
    d->batch = llama_batch_init(DECODE_ROWS, 0, 1);
}

static void close_context(decode *d)
{
    llama_batch_free(d->batch);
    llama_free(d->context);
}

static void decode_batch(decode *d, int32_t n_sequence, int32_t n_step)
{
    llama_token *next = cm_alloc(sizeof(*next) * (size_t)n_sequence);
    open_context(d, n_sequence, DECODE_ROOM);
    for (int32_t s = 0; s < n_sequence; s++) {
        for (int32_t k = 0; k < DECODE_FIRST; k++) {
            add(d, draw(d), k, s, k == DECODE_FIRST - 1);
        }
        run(d);
        next[s] = draw(d);
    }
    for (int32_t i = 0; i < n_step; i++) {
        double start = now_s(d);
        for (int32_t s = 0; s < n_sequence; s++) {
            add(d, next[s], DECODE_FIRST + i, s, true);
        }
        run(d);
        for (int32_t s = 0; s < n_sequence; s++) {
            next[s] = likeliest(d, s);
        }
        d->seconds[i] = now_s(d) - start;
    }
    printf("peer=llama.cpp case=decode_b%d value=%.2f unit=tok/s\n", n_sequence,
           n_sequence / median(d->seconds, n_step));
    close_context(d);
    cm_free(next);
}

static void prefill(decode *d, int32_t n_token)
{
    open_context(d, 1, n_token + DECODE_ROOM);
    for (int i = 0; i < PREFILL_TIMES; i++) {
        llama_memory_clear(llama_get_memory(d->context), true);
        double start = now_s(d);
        for (int32_t k = 0; k < n_token; k++) {
            add(d, draw(d), k, 0, k == n_token - 1);
            if (d->batch.n_tokens == DECODE_ROWS || k == n_token - 1) {
                run(d);
            }
        }
        d->seconds[i] = now_s(d) - start;
    }
    printf("peer=llama.cpp case=prefill_p%d value=%.2f unit=tok/s\n", n_token,
           n_token / median(d->seconds, PREFILL_TIMES));
    close_context(d);
}

static void say_errors(enum ggml_log_level level, const char *text, void *arg)
{
    (void)arg;
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

int main(int argc, char **argv)
{
    decode d = {0};
    int32_t n_prompt = argc == 6 ? atoi(argv[4]) : 0, n_step = argc == 6 ? atoi(argv[5]) : 0;
    d.n_thread = argc == 6 ? atoi(argv[2]) : 0;
    if (d.n_thread < 1 || n_prompt < 1 || n_step < 1 || n_step > DECODE_TIMES) {
        fprintf(stderr, "usage: %s MODEL.gguf THREADS BATCH,BATCH.. PROMPT STEPS; at most %d steps\n",
                argv[0], DECODE_TIMES);
        return 2;
    }
    llama_log_set(say_errors, NULL);
    llama_backend_init();
    d.model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (d.model == NULL) {
        return 1;
    }
    d.n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(d.model));
    for (char *rest = argv[3], *word = strtok(rest, ","); word != NULL; word = strtok(NULL, ",")) {
        int32_t n_sequence = atoi(word);
        CM_ASSERT_MSG(n_sequence >= 1 && n_sequence <= DECODE_ROWS, "a batch of %s", word);
        decode_batch(&d, n_sequence, n_step);
    }
    prefill(&d, n_prompt);
    llama_model_free(d.model);
    return 0;
}
