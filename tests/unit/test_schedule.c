/* The determinism contract as a property: under random schedules (who else is in the batch, chunks, scarce pages, workers,
 * placement and its change, transport, CPU paths, cancels) every sequence's logits and tokens are bit for bit those it has
 * alone on one worker in one chunk. --seeds N runs seeds 1 .. N, --seed S runs one again. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/clock.h"
#include "common/base/log.h"
#include "kernels/kn.h"
#include "tests/unit/schedule_run.h"

static const char *g_program;
static uint64_t g_first = 1, g_n_seed = 60;

/* ---- what was drawn ---- */

enum { ISA_MAX = 8 };

typedef struct tally {
    uint64_t n_seed, model[T_MODELS], worker[T_WORKER_MAX + 1], ucx, isa[ISA_MAX], threads[4], n_seq, n_token, greedy;
    uint64_t epochs, preempted_seeds;
    t_events sum;
    uint64_t slowest_ns, total_ns;
} tally;

static uint32_t isa_index(const char *isa)
{
    uint32_t i = 0;
    while (strcmp(kn_cpu_isa_at(i), isa) != 0) {
        i++;
    }
    return i;
}

static void tally_add(tally *all, const t_case *c, const t_events *events, uint64_t took_ns)
{
    all->n_seed++;
    all->model[c->model]++;
    all->worker[c->n_worker]++;
    all->ucx += strcmp(c->transport, "ucx") == 0;
    all->isa[isa_index(c->router.isa)]++;
    all->threads[c->router.n_threads]++;
    for (uint32_t i = 0; i < c->n_worker; i++) {
        all->isa[isa_index(c->workers[i].isa)]++;
        all->threads[c->workers[i].n_threads]++;
    }
    for (uint32_t i = 0; i < c->n_seq; i++) {
        all->n_seq++;
        all->n_token += c->seqs[i].sampler.tokens_max;
        all->greedy += c->seqs[i].sampler.temperature == 0;
    }
    all->epochs += events->epoch_changed;
    all->preempted_seeds += events->n_preempted > 0;
    all->sum.n_step += events->n_step;
    all->sum.n_chunk += events->n_chunk;
    all->sum.n_decode += events->n_decode;
    all->sum.n_preempted += events->n_preempted;
    all->sum.n_cancelled += events->n_cancelled;
    all->sum.n_retry += events->n_retry;
    all->total_ns += took_ns;
    all->slowest_ns = took_ns > all->slowest_ns ? took_ns : all->slowest_ns;
}

static void tally_print(const tally *all)
{
    print_message("%llu seeds, %.2f s each, slowest %.2f s; models", (unsigned long long)all->n_seed,
                  (double)all->total_ns * 1e-9 / (double)all->n_seed, (double)all->slowest_ns * 1e-9);
    for (uint32_t i = 0; i < T_MODELS; i++) {
        print_message(" %s %llu", t_model_names[i], (unsigned long long)all->model[i]);
    }
    print_message("\nworkers");
    for (uint32_t i = 1; i <= T_WORKER_MAX; i++) {
        print_message(" %u: %llu", i, (unsigned long long)all->worker[i]);
    }
    print_message("; transport ucx %llu local %llu; paths", (unsigned long long)all->ucx,
                  (unsigned long long)(all->n_seed - all->ucx));
    for (uint32_t i = 0; kn_cpu_isa_at(i) != NULL; i++) {
        print_message(" %s %llu", kn_cpu_isa_at(i), (unsigned long long)all->isa[i]);
    }
    print_message("; threads 1: %llu 2: %llu 3: %llu\n", (unsigned long long)all->threads[1],
                  (unsigned long long)all->threads[2], (unsigned long long)all->threads[3]);
    print_message("%llu sequences (%llu greedy), %llu tokens, %llu steps, %llu chunks, %llu decode rows, %llu preemptions in %llu "
                  "seeds, %llu cancels, %llu placement changes, %llu layers asked again\n",
                  (unsigned long long)all->n_seq, (unsigned long long)all->greedy, (unsigned long long)all->n_token,
                  (unsigned long long)all->sum.n_step, (unsigned long long)all->sum.n_chunk,
                  (unsigned long long)all->sum.n_decode, (unsigned long long)all->sum.n_preempted,
                  (unsigned long long)all->preempted_seeds, (unsigned long long)all->sum.n_cancelled,
                  (unsigned long long)all->epochs, (unsigned long long)all->sum.n_retry);
}

/* ---- the property ---- */

/* The first sequence and token that differ; false when none does. */
static bool find_difference(const t_case *c, const t_outcome *alone, const t_outcome *together)
{
    for (uint32_t s = 0; s < c->n_seq; s++) {
        uint32_t n = c->seqs[s].sampler.tokens_max;
        for (uint32_t i = 0; i < n; i++) {
            if (alone->logits[s][i] != together->logits[s][i] || alone->tokens[s][i] != together->tokens[s][i]) {
                print_message("sequence %u token %u (position %u): logits %016llx token %u, alone %016llx token %u\n", s, i,
                              c->seqs[s].n_prompt + i, (unsigned long long)together->logits[s][i], together->tokens[s][i],
                              (unsigned long long)alone->logits[s][i], alone->tokens[s][i]);
                return true;
            }
        }
        assert_int_equal(alone->n[s], n);
        assert_int_equal(together->n[s], n);
    }
    return false;
}

/* Both runs once more, every row of every layer looked at. */
static void bisect(const t_case *c)
{
    static t_outcome out;
    t_events events;
    t_trace *trace = t_trace_create(c);
    t_run_alone(c, trace, &out);
    t_trace_compare(trace);
    t_run_together(c, trace, &out, &events);
    t_trace_print(trace);
    t_trace_destroy(trace);
    print_message("  again: %s --seed %llu\n", g_program, (unsigned long long)c->seed);
}

static void test_schedules(void **state)
{
    static t_case c;
    static t_outcome alone, together;
    static tally all;
    (void)state;
    for (uint64_t seed = g_first; seed < g_first + g_n_seed; seed++) {
        uint64_t start_ns = cm_now_ns();
        t_events events;
        t_case_draw(seed, &c);
        t_case_print(&c);
        t_run_alone(&c, NULL, &alone);
        t_run_together(&c, NULL, &together, &events);
        if (find_difference(&c, &alone, &together)) {
            bisect(&c);
            fail_msg("seed %llu: other bits than the undisturbed run", (unsigned long long)seed);
        }
        tally_add(&all, &c, &events, cm_now_ns() - start_ns);
    }
    tally_print(&all);
}

int main(int argc, char **argv)
{
    g_program = argv[0];
    if (argc == 3 && strcmp(argv[1], "--seed") == 0) {
        g_first = strtoull(argv[2], NULL, 10);
        g_n_seed = 1;
    } else if (argc == 3 && strcmp(argv[1], "--seeds") == 0) {
        g_n_seed = strtoull(argv[2], NULL, 10);
    } else if (argc != 1) {
        fprintf(stderr, "usage: %s [--seed S | --seeds N]\n", argv[0]);
        return 2;
    }
    cm_log_setup(&(cm_log_options){.level = CM_LOG_WARN, .fd = 2});
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_schedules)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
