/* A prompt of the whole context on nano (16k tokens), under two schedules at once: other chunks, other
 * workers. Equal bits, memory that does not grow beyond the KV formula, and an indexer that has to select.
 * Usage: t_long [prompt tokens [seed]] */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "router/engine/engine.h"
#include "tools/baleen/solo.h"

enum { GREEDY = 24, CONTEXT = 16384, VOCAB = 4096, WARM = 600, TOPK = 64, SLACK_BYTES = 2 << 20 };

static uint32_t g_n_prompt = CONTEXT - GREEDY, g_prompt[CONTEXT];
static uint64_t g_seed = 20240712, g_pages_bytes; /* of one sequence of the whole context */

/* ---- what one sequence leaves behind ---- */

typedef struct picks_seen {
    uint32_t n_row;   /* compressed rows of the sequence */
    uint32_t n_lists; /* rows whose picks were looked at */
    uint32_t n_old;   /* picks outside the newest 64 */
    uint32_t n_wrong; /* lists that are not 64 ascending rows that exist */
    bool chosen[CONTEXT / 4];
} picks_seen;

typedef struct schedule {
    const char *name;
    uint32_t n_worker, chunk_max; /* chunk_max: exact when seed is 0, else the most that is drawn */
    uint64_t seed;
    cm_status status;
    uint32_t greedy[GREEDY];
    float logits[VOCAB];
    picks_seen seen;
    solo *s;
    pthread_barrier_t *gate;
} schedule;

static void see_picks(void *ctx, uint32_t layer, rt_tap_point point, const rt_step *step, uint32_t row0,
                      const void *data, uint64_t row_bytes, uint32_t n_row)
{
    picks_seen *seen = ctx;
    (void)layer;
    if (point != RT_TAP_PICKS) {
        return;
    }
    for (uint32_t r = 0; r < n_row; r++) {
        const int32_t *picks = (const int32_t *)(const void *)((const uint8_t *)data + r * row_bytes);
        uint32_t visible = (step->segs[0].pos0 + row0 + r + 1) / 4;
        if (visible <= TOPK) {
            continue;
        }
        seen->n_row = visible > seen->n_row ? visible : seen->n_row;
        seen->n_lists++;
        bool wrong = false;
        for (uint32_t k = 0; k < TOPK; k++) {
            wrong |= picks[k] < 0 || (uint32_t)picks[k] >= visible || (k > 0 && picks[k] <= picks[k - 1]);
            if (!wrong) {
                seen->n_old += (uint32_t)picks[k] + TOPK < visible;
                seen->chosen[picks[k]] = true;
            }
        }
        seen->n_wrong += wrong;
    }
}

/* ---- one schedule ---- */

static cm_status prefill(schedule *c, uint32_t n, uint32_t *token_out)
{
    uint32_t rows;
    for (uint32_t at = 0, k = 0; at < n; at += rows, k++) {
        rows = c->seed == 0 ? c->chunk_max : 1 + cm_rng_at(c->seed, k, 1).word[0] % c->chunk_max;
        rows = rows < n - at ? rows : n - at;
        CM_TRY(solo_step(c->s, 0, at, g_prompt + at, rows, at + rows == n, token_out));
    }
    return CM_OK;
}

static cm_status run_prompt(schedule *c)
{
    uint32_t token = 0;
    CM_TRY(prefill(c, g_n_prompt, &token));
    memcpy(c->logits, rt_engine_logits(solo_engine(c->s)), sizeof c->logits);
    for (uint32_t i = 0; i < GREEDY; i++) {
        c->greedy[i] = token;
        CM_TRY(solo_step(c->s, 0, g_n_prompt + i, &c->greedy[i], 1, true, &token));
    }
    return CM_OK;
}

static cm_status open_solo(schedule *c)
{
    cm_error err = {0};
    solo_options options;
    solo_options_defaults(&options);
    options.model = BALEEN_NANO;
    options.n_worker = c->n_worker;
    options.kv_bytes = 0;
    md_geometry geometry;
    rt_kv_sizes sizes;
    CM_TRY(md_geometry_load(BALEEN_NANO, &geometry, &err));
    rt_kv_sizes_get(&geometry, 0, &sizes);
    options.kv_bytes =
        sizes.page_bytes * rt_kv_seq_pages(CONTEXT); /* pages for one sequence, and none to spare */
    cm_status status = solo_create(&options, &c->s, &err);
    if (status != CM_OK) {
        fprintf(stderr, "%s: %s\n", c->name, err.text);
    }
    return status;
}

/* Opens, takes a short prompt so that everything has been used once, waits for the measurement, and runs. */
static void *run_schedule(void *arg)
{
    schedule *c = arg;
    uint32_t token;
    c->status = open_solo(c);
    if (c->status == CM_OK) {
        c->status = prefill(c, WARM < g_n_prompt ? WARM : g_n_prompt, &token);
    }
    pthread_barrier_wait(c->gate);
    pthread_barrier_wait(c->gate); /* measured */
    if (c->status == CM_OK) {
        rt_engine_set_tap(solo_engine(c->s), see_picks, &c->seen);
        c->status = run_prompt(c);
    }
    pthread_barrier_wait(c->gate);
    pthread_barrier_wait(c->gate);
    if (c->s != NULL) {
        solo_destroy(c->s);
    }
    return NULL;
}

/* Memory that belongs to nobody else and to no file. */
static uint64_t own_bytes(void)
{
    char line[256];
    unsigned long long kib = 0;
    FILE *file = fopen("/proc/self/status", "r");
    assert_non_null(file);
    while (fgets(line, sizeof line, file) != NULL && sscanf(line, "RssAnon: %llu kB", &kib) != 1) {
    }
    fclose(file);
    assert_true(kib > 0);
    return kib * 1024;
}

static void check_picks(const schedule *c)
{
    uint32_t n_chosen = 0;
    for (uint32_t j = 0; j < c->seen.n_row; j++) {
        n_chosen += c->seen.chosen[j];
    }
    print_message(
        "%s: %u lists of 64 picks among up to %u rows; %.0f%% of picks older than the newest 64, %u rows "
        "were picked at least once\n",
        c->name, c->seen.n_lists, c->seen.n_row, 100.0 * c->seen.n_old / ((double)c->seen.n_lists * TOPK),
        n_chosen);
    assert_int_equal(c->seen.n_wrong, 0);
    assert_int_equal(c->seen.n_row, (g_n_prompt + GREEDY) / 4);
    assert_int_equal(c->seen.n_lists, 2 * (g_n_prompt + GREEDY - 4 * TOPK - 3)); /* two layers of ratio 4 */
    /* neither the newest nor always the same: it chooses by score */
    assert_true(c->seen.n_old > c->seen.n_lists && n_chosen > c->seen.n_row / 4);
}

static void test_long_prompt(void **state)
{
    static schedule ways[2] = {{.name = "one worker, chunks of 256", .n_worker = 1, .chunk_max = 256},
                               {.name = "three workers, chunks as drawn", .n_worker = 3, .chunk_max = 256}};
    pthread_t threads[2];
    pthread_barrier_t gate;
    uint64_t before, after;
    md_geometry geometry;
    rt_kv_sizes sizes;
    (void)state;
    assert_int_equal(md_geometry_load(BALEEN_NANO, &geometry, NULL), CM_OK);
    rt_kv_sizes_get(&geometry, 0, &sizes);
    g_pages_bytes = sizes.page_bytes * rt_kv_seq_pages(CONTEXT);
    ways[1].seed = g_seed;
    for (uint32_t i = 0; i < g_n_prompt; i++) {
        g_prompt[i] = cm_rng_at(g_seed, i, 2).word[0] % 4000;
    }
    assert_int_equal(pthread_barrier_init(&gate, NULL, 3), 0);
    for (int i = 0; i < 2; i++) {
        ways[i].gate = &gate;
        assert_int_equal(pthread_create(&threads[i], NULL, run_schedule, &ways[i]), 0);
    }
    pthread_barrier_wait(&gate);
    before = own_bytes();
    pthread_barrier_wait(&gate);
    pthread_barrier_wait(&gate);
    after = own_bytes();
    pthread_barrier_wait(&gate);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
    }
    pthread_barrier_destroy(&gate);
    print_message(
        "%u tokens: %.1f MiB before, %.1f MiB after; by the formula two sequences have %.1f MiB of pages\n",
        g_n_prompt, (double)before / 1048576, (double)after / 1048576, 2 * (double)g_pages_bytes / 1048576);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(ways[i].status, CM_OK);
        check_picks(&ways[i]);
    }
    /* the pages were reserved when the engines were made and are touched as the sequence grows: that is all
     */
    assert_true(after <= before + 2 * g_pages_bytes + SLACK_BYTES);
    assert_memory_equal(ways[0].logits, ways[1].logits, sizeof ways[0].logits);
    assert_memory_equal(ways[0].greedy, ways[1].greedy, sizeof ways[0].greedy);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_long_prompt)};
    if (argc > 1) {
        g_n_prompt = (uint32_t)strtoul(argv[1], NULL, 0);
    }
    if (argc > 2) {
        g_seed = strtoull(argv[2], NULL, 0);
    }
    if (g_n_prompt < WARM || g_n_prompt > CONTEXT - GREEDY) {
        fprintf(stderr, "the prompt must have %d to %d tokens\n", WARM, CONTEXT - GREEDY);
        return 2;
    }
    print_message("seed %llu\n", (unsigned long long)g_seed);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
