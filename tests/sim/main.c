/* t_sim [--seeds N] [--first S]   runs N seeds from S on; even seeds have all faults, odd ones subsets
 * t_sim --seed S                  replays one with its trace
 * --faults NAME,NAME              of what a seed draws only these faults happen */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/base/clock.h"
#include "common/base/log.h"
#include "tests/sim/sim.h"

enum { SEEDS_DEFAULT = 400 };

static volatile uint64_t g_seed; /* under way, for who reads an assertion */

static void on_abort(int signal_number)
{
    char text[128];
    (void)signal_number;
    int n = snprintf(text, sizeof(text), "t_sim: assertion in seed %llu: t_sim --seed %llu\n",
                     (unsigned long long)g_seed, (unsigned long long)g_seed);
    ssize_t written = write(2, text, (size_t)n);
    (void)written;
    signal(SIGABRT, SIG_DFL);
}

static void quiet(void *ctx, cm_log_level level, const char *text)
{
    (void)ctx;
    (void)level;
    (void)text;
}

static void counts_add(sim_counts *sum, const sim_counts *one)
{
    uint64_t *to = (uint64_t *)sum, healing_ms = sum->healing_ms;
    const uint64_t *from = (const uint64_t *)one;
    for (size_t i = 0; i < sizeof(*sum) / sizeof(*to); i++) {
        to[i] += from[i];
    }
    sum->healing_ms = healing_ms > one->healing_ms ? healing_ms : one->healing_ms;
}

static void counts_print(const sim_counts *c)
{
    typedef unsigned long long ull;
    printf("faults:");
    for (uint32_t i = 0; i < SIM_FAULT_COUNT; i++) {
        printf(" %s %llu", sim_fault_names[i], (ull)c->faults[i]);
    }
    printf("\nrequests: %llu done, %llu cancelled, %llu over their deadline; %llu tokens delivered; %llu "
           "times told that all is busy, %llu that experts or routers are not available; healing took at "
           "most %llu ms\n",
           (ull)c->done, (ull)c->cancelled, (ull)c->expired, (ull)c->tokens, (ull)c->told_busy,
           (ull)c->told_unavailable, (ull)c->healing_ms);
    printf("streams: %llu reopened, %llu resumed at a router, %llu copies forgotten; clients that came back: "
           "%llu found, %llu not\n",
           (ull)c->reopened, (ull)c->rebound, (ull)c->copies, (ull)c->resumed, (ull)c->not_found);
    printf("operators: %llu wishes, %llu done; coordinators: %llu times one became active\n", (ull)c->wishes,
           (ull)c->wishes_done, (ull)c->takeovers);
    printf(
        "cluster: %llu epochs, %llu aborts, %llu steps, %llu layers, %llu of them stuck once or more, %llu "
        "frames refused, %llu preemptions, %llu sequences began behind another's tokens, %llu of prompts not "
        "computed, %llu times a router forgot what it had kept; %llu messages, %llu events, %llu s of "
        "virtual time\n",
        (ull)c->epochs, (ull)c->aborts, (ull)c->steps, (ull)c->exchanges, (ull)c->retries,
        (ull)c->frames_refused, (ull)c->preempted, (ull)c->gone_on, (ull)c->hit_tokens, (ull)c->forgets,
        (ull)c->messages, (ull)c->events, (ull)c->virtual_ms / 1000);
}

/* 0: well. The digest of its trace comes out. */
static int run_seed(sim *s, uint64_t seed, bool trace, sim_counts *sum, uint64_t *digest_out)
{
    g_seed = seed;
    sim_run(s, seed, trace);
    *digest_out = s->digest;
    if (s->verdict[0] != 0) {
        printf("seed %llu: %s\n  again: t_sim --seed %llu\n", (unsigned long long)seed, s->verdict,
               (unsigned long long)seed);
        fflush(stdout);
        return 1;
    }
    sim_fini(s);
    counts_add(sum, &s->counts);
    return 0;
}

/* Equal seeds run equally, different ones differently. */
static int check_repeats(sim *s, uint64_t seed)
{
    sim_counts sum = {0};
    uint64_t first, again, other;
    int failed = run_seed(s, seed, false, &sum, &first) + run_seed(s, seed, false, &sum, &again) +
                 run_seed(s, seed + 1, false, &sum, &other);
    if (failed == 0 && (first != again || first == other)) {
        printf("seed %llu: its runs differ, or do not differ from seed %llu's\n", (unsigned long long)seed,
               (unsigned long long)seed + 1);
        failed = 1;
    }
    return failed;
}

static int run_seeds(sim *s, uint64_t first, uint64_t n)
{
    sim_counts sum = {0};
    int failures = check_repeats(s, first);
    uint64_t start_ms = cm_now_ms(), digest;
    printf("t_sim: %llu seeds from %llu on\n", (unsigned long long)n, (unsigned long long)first);
    for (uint64_t seed = first; seed < first + n; seed++) {
        failures += run_seed(s, seed, false, &sum, &digest);
    }
    counts_print(&sum);
    printf("t_sim: %llu seeds from %llu on in %llu ms, failures %d\n", (unsigned long long)n,
           (unsigned long long)first, (unsigned long long)(cm_now_ms() - start_ms), failures);
    return failures != 0;
}

static bool names_contain(const char *names, const char *name)
{
    size_t n = strlen(name);
    for (const char *at = names; at != NULL; at = strchr(at, ',')) {
        at += *at == ',';
        if (strncmp(at, name, n) == 0 && (at[n] == ',' || at[n] == 0)) {
            return true;
        }
    }
    return false;
}

static void only_faults(const char *names)
{
    for (uint32_t i = 0; i < SIM_FAULT_COUNT; i++) {
        sim_fault_off[i] = !names_contain(names, sim_fault_names[i]);
    }
}

int main(int argc, char **argv)
{
    uint64_t n = SEEDS_DEFAULT, first = 1, one = 0;
    bool single = false;
    for (int i = 1; i + 1 < argc; i += 2) {
        uint64_t value = strtoull(argv[i + 1], NULL, 10);
        if (strcmp(argv[i], "--seeds") == 0) {
            n = value;
        } else if (strcmp(argv[i], "--first") == 0) {
            first = value;
        } else if (strcmp(argv[i], "--faults") == 0) {
            only_faults(argv[i + 1]);
        } else if (strcmp(argv[i], "--seed") == 0) {
            single = true;
            one = value;
        }
    }
    cm_log_handler(quiet, NULL);
    signal(SIGABRT, on_abort);
    sim *s = cm_alloc(sizeof(*s));
    int rc;
    if (single) {
        sim_counts sum = {0};
        uint64_t digest;
        rc = run_seed(s, one, true, &sum, &digest);
        counts_print(&s->counts);
    } else {
        rc = run_seeds(s, first, n);
    }
    cm_free(s);
    return rc;
}
