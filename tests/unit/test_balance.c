/* Rebalancing by load: imbalance before and after on recorded and synthetic loads, few moves at a time,
 * within memory, to an end. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "coordinator/balance_core.h"

static uint64_t g_seed;

typedef struct bench {
    uint32_t n_layer, n_expert, n_rank;
    uint64_t *load;     /* [pair] */
    uint64_t *capacity; /* [n_rank] */
    pr_placement *place;
    co_balance_report report; /* of the last plan */
} bench;

/* spare: places beyond an even share. */
static void bench_init(bench *b, uint32_t n_layer, uint32_t n_expert, uint32_t n_rank, uint32_t spare)
{
    uint32_t members[PR_RANK_MAX];
    *b = (bench){.n_layer = n_layer, .n_expert = n_expert, .n_rank = n_rank};
    b->load = cm_alloc(sizeof(uint64_t) * n_layer * n_expert);
    b->capacity = cm_alloc(sizeof(uint64_t) * n_rank);
    for (uint32_t r = 0; r < n_rank; r++) {
        members[r] = 10 + r;
        b->capacity[r] = (n_layer * n_expert + n_rank - 1) / n_rank + spare;
    }
    assert_int_equal(
        pr_placement_plan(n_layer, n_expert, members, n_rank, b->capacity, NULL, &b->place, NULL), CM_OK);
}

static void bench_fini(bench *b)
{
    pr_placement_free(b->place);
    cm_free(b->load);
    cm_free(b->capacity);
}

static uint32_t pairs_of(const bench *b)
{
    return b->n_layer * b->n_expert;
}

/* Expert ranks by popularity are another permutation in each layer; the k-th gets 1 / k^exponent. */
static void load_zipf(bench *b, double exponent, uint64_t key)
{
    uint32_t *order = cm_alloc(sizeof(uint32_t) * b->n_expert);
    for (uint32_t l = 0; l < b->n_layer; l++) {
        for (uint32_t e = 0; e < b->n_expert; e++) {
            uint32_t k = cm_rng_at(key, l, e).word[0] % (e + 1);
            order[e] = order[k];
            order[k] = e;
        }
        for (uint32_t e = 0; e < b->n_expert; e++) {
            b->load[l * b->n_expert + order[e]] = (uint64_t)(1e6 / pow(e + 1, exponent));
        }
    }
    cm_free(order);
}

/* What must hold of every plan, whatever the load. */
static void check_plan(const bench *b, const pr_placement *next, uint32_t moves_max)
{
    uint32_t n_loads = 0;
    uint32_t *held = cm_alloc(sizeof(uint32_t) * b->n_rank); /* old and new together */
    assert_int_equal(next->n_rank, b->n_rank);
    assert_memory_equal(next->rank_member, b->place->rank_member, sizeof(uint32_t) * b->n_rank);
    for (uint32_t i = 0; i < pairs_of(b); i++) {
        uint32_t n;
        const uint16_t *owners = pr_placement_owners(next, i / b->n_expert, i % b->n_expert, &n);
        assert_true(n >= 1 && n <= PR_COPIES_MAX && n <= b->n_rank);
        for (uint32_t k = 0; k < n; k++) {
            for (uint32_t j = 0; j < k; j++) {
                assert_true(owners[j] != owners[k]);
            }
        }
        for (uint32_t r = 0; r < b->n_rank; r++) {
            bool has = pr_placement_owns(b->place, i / b->n_expert, i % b->n_expert, r);
            bool will = pr_placement_owns(next, i / b->n_expert, i % b->n_expert, r);
            held[r] += has || will;
            n_loads += will && !has;
        }
    }
    for (uint32_t r = 0; r < b->n_rank; r++) {
        assert_true(held[r] <= b->capacity[r]);
    }
    assert_int_equal(n_loads, b->report.n_moves);
    assert_true(n_loads <= moves_max);
    cm_free(held);
}

/* One epoch; false when nothing is worth moving. */
static bool bench_step(bench *b, uint32_t moves_max)
{
    pr_placement *next = co_balance_plan(b->place, b->load, b->capacity, moves_max, &b->report);
    assert_true(fabs(b->report.before - co_balance_imbalance(b->place, b->load)) < 1e-9);
    if (next == NULL) {
        return false;
    }
    check_plan(b, next, moves_max);
    assert_true(fabs(b->report.after - co_balance_imbalance(next, b->load)) < 1e-9);
    pr_placement_free(b->place);
    b->place = next;
    return true;
}

/* Until nothing is worth moving; the number of epochs. */
static uint32_t bench_run(bench *b, const char *what, uint32_t moves_max, uint32_t epochs_max)
{
    uint32_t n_epochs = 0, n_moves = 0;
    double first = co_balance_imbalance(b->place, b->load);
    while (bench_step(b, moves_max)) {
        assert_true(b->report.after < b->report.before || b->report.n_dropped > 0);
        assert_true(b->report.after < b->report.before + 1e-9);
        assert_true(++n_epochs <= epochs_max);
        n_moves += b->report.n_moves;
    }
    printf("  %-44s %.3f -> %.3f in %u epochs, %u moves\n", what, first,
           co_balance_imbalance(b->place, b->load), n_epochs, n_moves);
    return n_epochs;
}

/* ---- recorded loads ---- */

enum { NANO_LAYERS = 5, NANO_EXPERTS = 16 };

/* The kind of prompts of that name from the recording. */
static void load_nano(bench *b, const char *kind)
{
    char line[512];
    FILE *file = fopen(UNIT_TEST_DATA "/nano_load.txt", "re");
    assert_non_null(file);
    do {
        assert_non_null(fgets(line, sizeof(line), file));
    } while (strncmp(line, kind, strlen(kind)) != 0);
    for (uint32_t i = 0; i < NANO_LAYERS * NANO_EXPERTS; i++) {
        unsigned long rows;
        assert_int_equal(fscanf(file, "%lu", &rows), 1);
        b->load[i] = rows;
    }
    fclose(file);
}

static void recorded_loads(void **state)
{
    (void)state;
    static const char *const kinds[] = {"count", "capitals", "mixed"};
    static const uint32_t workers[] = {2, 3, 5, 8};
    for (size_t k = 0; k < 3; k++) {
        for (size_t w = 0; w < 4; w++) {
            bench b;
            char what[64];
            bench_init(&b, NANO_LAYERS, NANO_EXPERTS, workers[w], 6);
            load_nano(&b, kinds[k]);
            snprintf(what, sizeof(what), "nano, %s, %u workers, 4 a time", kinds[k], workers[w]);
            double before = co_balance_imbalance(b.place, b.load);
            bench_run(&b, what, 4, 20);
            double after = co_balance_imbalance(b.place, b.load);
            assert_true(after - 1 <= (before - 1) / 2); /* what was too much is at least halved */
            bench_fini(&b);
        }
    }
}

/* ---- limits ---- */

static void what_cannot_be_better_stays(void **state)
{
    (void)state;
    bench b;
    bench_init(&b, 4, 32, 4, 8);
    assert_false(bench_step(&b, 10)); /* no load */
    assert_true(b.report.before == 1);
    for (uint32_t i = 0; i < pairs_of(&b); i++) {
        b.load[i] = 1000;
    }
    assert_false(bench_step(&b, 10)); /* even */
    load_zipf(&b, 1, 3);
    assert_false(bench_step(&b, 0)); /* nothing may be loaded */
    bench_fini(&b);

    bench_init(&b, 4, 32, 4, 0); /* full: no place for old and new together */
    load_zipf(&b, 1, 3);
    assert_false(bench_step(&b, 10));
    assert_true(b.report.before > 1.2);
    bench_fini(&b);
}

/* An expert with half of the rows needs copies; when another one is hot they are given up for the other's. */
static void hot_experts_get_copies(void **state)
{
    (void)state;
    bench b;
    uint32_t n_first, n_second;
    bench_init(&b, 1, 32, 4, 2);
    for (uint32_t hot = 3; hot < 20; hot += 9) {
        for (uint32_t e = 0; e < 32; e++) {
            b.load[e] = e == hot ? 3100 : 100;
        }
        bench_run(&b, "one hot expert, 4 workers, 2 spare", 4, 20);
        assert_true(co_balance_imbalance(b.place, b.load) < 1.25);
        pr_placement_owners(b.place, 0, hot, &n_second);
        assert_true(n_second >= 3);
        if (hot > 3) {
            pr_placement_owners(b.place, 0, hot - 9, &n_first);
            assert_true(n_first < n_second);
        }
    }
    bench_fini(&b);
}

static void random_loads(void **state)
{
    (void)state;
    uint64_t at = 0;
    uint32_t n_epochs = 0;
    for (uint32_t round = 0; round < 200; round++) {
        uint32_t word[4], n_rank;
        memcpy(word, cm_rng_at(g_seed, at++, 0).word, sizeof(word));
        n_rank = 1 + word[0] % 12;
        bench b;
        bench_init(&b, 1 + word[1] % 4, 8 + word[2] % 40, n_rank, word[3] % 12);
        for (uint32_t turn = 0; turn < 4;
             turn++) { /* the load changes, the placement goes on from where it is */
            for (uint32_t i = 0; i < pairs_of(&b); i++) {
                uint32_t dice = cm_rng_at(g_seed, at++, 1).word[0];
                b.load[i] = dice % 4 == 0 ? dice % 100000 : dice % 100;
            }
            for (uint32_t n = 0; n < 30 && bench_step(&b, 1 + word[0] % 9); n++) {
                n_epochs++;
            }
        }
        co_balance_report report;
        pr_placement *one = co_balance_plan(b.place, b.load, b.capacity, 5, &report);
        pr_placement *two = co_balance_plan(b.place, b.load, b.capacity, 5, &report);
        assert_true((one == NULL) == (two == NULL));
        if (one != NULL) {
            uint32_t n = one->first[pairs_of(&b)];
            assert_int_equal(n, two->first[pairs_of(&b)]);
            assert_memory_equal(one->owner, two->owner, sizeof(uint16_t) * n);
        }
        pr_placement_free(one);
        pr_placement_free(two);
        bench_fini(&b);
    }
    printf("  %u epochs\n", n_epochs);
    assert_true(n_epochs > 500);
}

/* ---- real sizes ---- */

static void pro_on_16_workers(void **state)
{
    (void)state;
    static const struct {
        const char *what;
        double exponent;
        uint32_t spare, moves;
        double before_min, after_max;
    } rows[] = {
        {"61x384 on 16, zipf 0.5, 64 spare, 256 a time", 0.5, 64, 256, 1.2, 1.1},
        {"61x384 on 16, zipf 0.8, 64 spare, 256 a time", 0.8, 64, 256, 1.5, 1.1},
        {"61x384 on 16, zipf 1.0, 256 spare, 256 a time", 1.0, 256, 256, 2.0, 1.15},
        {"61x384 on 16, zipf 0.8, 16 spare, 64 a time", 0.8, 16, 64, 1.5, 1.3},
        {"61x384 on 16, zipf 0.8, 2 spare, 64 a time", 0.8, 2, 64, 1.5, 1.7},
        {"61x384 on 64, zipf 0.8, 32 spare, 256 a time", 0.8, 32, 256, 1.5, 1.3},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        bench b;
        bench_init(&b, 61, 384, strstr(rows[i].what, "on 64") != NULL ? 64 : 16, rows[i].spare);
        load_zipf(&b, rows[i].exponent, 7);
        assert_true(co_balance_imbalance(b.place, b.load) > rows[i].before_min);
        bench_run(&b, rows[i].what, rows[i].moves, 100);
        assert_true(co_balance_imbalance(b.place, b.load) < rows[i].after_max);
        bench_fini(&b);
    }
}

int main(int argc, char **argv)
{
    g_seed = argc > 1 ? strtoull(argv[1], NULL, 0) : cm_random_u64();
    printf("seed %llu\n", (unsigned long long)g_seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(recorded_loads),         cmocka_unit_test(what_cannot_be_better_stays),
        cmocka_unit_test(hot_experts_get_copies), cmocka_unit_test(random_loads),
        cmocka_unit_test(pro_on_16_workers),
    };
    int rc = cmocka_run_group_tests(tests, NULL, NULL);
    printf("seed %llu\n", (unsigned long long)g_seed);
    return rc;
}
