/* Memory, map, random numbers, bytes, jobs, log, counters and failpoints. Options have test_config.c. --seed
 * N repeats a random run. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/base/bytes.h"
#include "common/base/failpoint.h"
#include "common/base/jobs.h"
#include "common/base/log.h"
#include "common/base/map.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/base/stats.h"
#include "tests/support/dies.h"

static uint64_t g_seed = 1;

/* ---- helpers ---- */

typedef struct t_lines {
    uint32_t n;
    cm_log_level levels[16];
    char texts[16][256];
} t_lines;

static void t_keep_line(void *ctx, cm_log_level level, const char *text)
{
    t_lines *lines = ctx;
    if (lines->n < 16) {
        lines->levels[lines->n] = level;
        snprintf(lines->texts[lines->n], sizeof(lines->texts[0]), "%s", text);
    }
    lines->n++;
}

/* ---- status ---- */

static void test_status(void **state)
{
    (void)state;
    cm_error err;
    assert_int_equal(cm_status_scope(CM_OK), CM_SCOPE_NONE);
    assert_int_equal(cm_status_scope(CM_AGAIN), CM_SCOPE_NONE);
    assert_int_equal(cm_status_scope(CM_E_UNAVAILABLE), CM_SCOPE_REQUEST);
    assert_int_equal(cm_status_scope(CM_E_UNREACHABLE), CM_SCOPE_PEER);
    assert_int_equal(cm_status_scope(CM_E_REFUSED), CM_SCOPE_PEER);
    assert_int_equal(cm_status_scope(CM_E_MEMORY), CM_SCOPE_PROCESS);
    assert_string_equal(cm_status_name(CM_E_STALE), "CM_E_STALE");
    assert_string_equal(cm_status_text(CM_E_STALE), "stale epoch");
    assert_string_equal(cm_status_text((cm_status)-999), "unknown status");
    assert_int_equal(cm_error_set(&err, CM_E_INVALID, NULL, "%d is odd", 3), CM_E_INVALID);
    assert_int_equal(err.status, CM_E_INVALID);
    assert_string_equal(err.field, "");
    assert_string_equal(err.text, "3 is odd");
    assert_int_equal(cm_error_set(NULL, CM_E_IO, "x", "y"), CM_E_IO);
}

/* ---- memory ---- */

static void test_alloc(void **state)
{
    (void)state;
    uint8_t *p = cm_alloc(100), *aligned = cm_alloc_aligned(100);
    assert_true((uintptr_t)aligned % 64 == 0);
    for (int i = 0; i < 100; i++) {
        assert_int_equal(p[i] | aligned[i], 0);
    }
    memset(p, 7, 100);
    p = cm_realloc(p, 1000);
    assert_int_equal(p[99], 7);
    cm_free(p);
    cm_free(aligned);
    p = cm_alloc(0);
    assert_non_null(p);
    cm_free(p);
    cm_free(NULL);
}

static void t_alloc_guarded(void)
{
    cm_mem_guard_begin("test");
    cm_free(cm_alloc(1));
}

static void t_try_alloc_guarded(void)
{
    cm_mem_guard_begin("outer");
    cm_mem_guard_begin("inner");
    cm_mem_guard_end();
    cm_free(cm_try_alloc(1));
}

/* Any place and length, and nothing beside it. */
static void test_copy_past_caches(void **state)
{
    (void)state;
    enum { N = 4096 };
    uint8_t *from = cm_alloc_aligned(N), *to = cm_alloc_aligned(N), *expected = cm_alloc(N);
    for (uint32_t i = 0; i < N; i++) {
        from[i] = (uint8_t)cm_rng_at(g_seed, i, 0).word[0];
    }
    for (uint32_t i = 0; i < 2000; i++) {
        cm_rng_block r = cm_rng_at(g_seed, i, 1);
        size_t n = i % 2 == 0 ? r.word[0] % 30 * 64 : r.word[0] % 2000, at = r.word[1] % 1000,
               from_at = r.word[2] % 1000;
        at = r.word[3] % 2 == 0 ? at / 16 * 16 : at;
        memset(to, 0, N);
        memset(expected, 0, N);
        memcpy(expected + at, from + from_at, n);
        cm_copy_past_caches(to + at, from + from_at, n);
        assert_memory_equal(to, expected, N);
    }
    cm_free(from);
    cm_free(to);
    cm_free(expected);
}

static void test_guard(void **state)
{
    (void)state;
    cm_mem_guard_begin("test");
    cm_mem_guard_end();
    cm_free(cm_alloc(1)); /* off again */
    t_dies(t_alloc_guarded);
    t_dies(t_try_alloc_guarded);
    t_dies(cm_mem_guard_end);
}

static void test_arena(void **state)
{
    (void)state;
    cm_arena arena;
    cm_arena_init(&arena, "test", 256, 1024);
    uint8_t *a = cm_arena_alloc(&arena, 1), *b = cm_arena_alloc(&arena, 65);
    assert_true((uintptr_t)a % 64 == 0 && (uintptr_t)b % 64 == 0);
    assert_true(b == a + 64); /* from one chunk, rounded up */
    memset(b, 9, 65);
    assert_int_equal(arena.used_bytes, 64 + 128);
    assert_null(cm_arena_alloc(&arena, 1025));
    assert_null(cm_arena_alloc(&arena, SIZE_MAX));
    assert_non_null(cm_arena_alloc(&arena, 512)); /* a chunk of its own */
    assert_int_equal(arena.total_bytes, 256 + 512);
    assert_non_null(cm_arena_alloc(&arena, 256));
    assert_null(cm_arena_alloc(&arena, 128)); /* the chunks are at their bound */
    assert_int_equal(arena.total_bytes, 1024);
    size_t peak = arena.used_bytes;
    cm_arena_reset(&arena);
    assert_int_equal(arena.used_bytes, 0);
    assert_int_equal(arena.total_bytes, 256);
    assert_int_equal(arena.peak_bytes, peak);
    cm_mem_guard_begin("the first chunk is kept");
    uint8_t *again = cm_arena_take(&arena, 256);
    cm_mem_guard_end();
    assert_ptr_equal(again, a);
    for (int i = 0; i < 256; i++) {
        assert_int_equal(again[i], 0);
    }
    cm_arena_reset(&arena);
    assert_string_equal(cm_arena_strdup(&arena, "word"), "word");
    cm_arena_fini(&arena);
}

static void t_arena_take_too_much(void)
{
    cm_arena arena;
    cm_arena_init(&arena, "test", 64, 64);
    (void)cm_arena_take(&arena, 65);
}

static void t_pool_put_twice(void)
{
    cm_pool pool;
    void *object;
    cm_pool_init(&pool, "test", 8, 2);
    if (cm_pool_get(&pool, &object) == CM_OK) {
        cm_pool_put(&pool, object);
        cm_pool_put(&pool, object);
    }
}

static void t_pool_put_stranger(void)
{
    cm_pool pool;
    void *object;
    cm_pool_init(&pool, "test", 8, 2);
    if (cm_pool_get(&pool, &object) == CM_OK) {
        cm_pool_put(&pool, (uint8_t *)object + 1);
    }
}

static void test_pool(void **state)
{
    (void)state;
    cm_pool pool;
    void *objects[3], *more;
    t_lines lines = {0};
    cm_pool_init(&pool, "beans", 24, 3);
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(cm_pool_get(&pool, &objects[i]), CM_OK);
        assert_int_equal(cm_pool_index(&pool, objects[i]), i);
        assert_true(cm_pool_at(&pool, i) == objects[i]);
        memset(objects[i], 0xA0 + (int)i, 24);
    }
    assert_int_equal(cm_pool_get(&pool, &more), CM_AGAIN);
    cm_pool_put(&pool, objects[1]);
    assert_null(cm_pool_at(&pool, 1));
    assert_null(cm_pool_at(&pool, 3));
    assert_int_equal(cm_pool_get(&pool, &more), CM_OK);
    assert_ptr_equal(more, objects[1]);
    assert_int_equal(*(uint8_t *)more, 0); /* comes zeroed */
    assert_int_equal(pool.n_peak, 3);
    cm_pool_put(&pool, objects[0]);
    cm_log_handler(t_keep_line, &lines);
    uint32_t n_leaked = cm_pool_fini(&pool);
    cm_log_handler(NULL, NULL);
    assert_int_equal(n_leaked, 2);
    assert_int_equal(lines.n, 2); /* one line for each, and nothing else */
    assert_int_equal(lines.levels[0], CM_LOG_WARN);
    assert_non_null(strstr(lines.texts[0], "beans: object 1"));
    assert_non_null(strstr(lines.texts[1], "beans: object 2"));
    assert_non_null(strstr(lines.texts[1], "a2a2a2a2"));
    t_dies(t_arena_take_too_much);
    t_dies(t_pool_put_twice);
    t_dies(t_pool_put_stranger);
}

/* ---- map ---- */

/* Against an array indexed by key; keys are few and close, so that runs of the table collide and wrap. */
static void test_map(void **state)
{
    (void)state;
    enum { KEYS = 64, ENTRIES = 30 };
    static const uint64_t strides[] = {1, 1ull << 32, 0x9E3779B97F4A7C15u, 64};
    for (size_t s = 0; s < 4; s++) {
        cm_map map;
        char values[KEYS];
        bool have[KEYS] = {false};
        uint32_t n = 0;
        cm_map_init(&map, ENTRIES);
        for (uint64_t i = 0; i < 20000; i++) {
            cm_rng_block random = cm_rng_at(g_seed, i, s);
            uint32_t k = random.word[0] % KEYS;
            uint64_t key = k * strides[s];
            if (random.word[1] % 2 == 0) {
                cm_status want = have[k] ? CM_E_EXISTS : n == ENTRIES ? CM_AGAIN : CM_OK;
                assert_int_equal(cm_map_put(&map, key, &values[k]), want);
                n += want == CM_OK;
                have[k] = have[k] || want == CM_OK;
            } else {
                assert_ptr_equal(cm_map_remove(&map, key), have[k] ? &values[k] : NULL);
                n -= have[k];
                have[k] = false;
            }
            assert_int_equal(map.n_used, n);
            uint32_t probe = random.word[2] % KEYS;
            assert_ptr_equal(cm_map_get(&map, probe * strides[s]), have[probe] ? &values[probe] : NULL);
        }
        uint32_t at = 0, n_walked = 0;
        uint64_t key;
        void *value;
        while (cm_map_next(&map, &at, &key, &value)) {
            ptrdiff_t k = (char *)value - values;
            assert_true(k >= 0 && k < KEYS && have[k] && key == (uint64_t)k * strides[s]);
            n_walked++;
        }
        assert_int_equal(n_walked, n);
        cm_map_fini(&map);
    }
}

/* ---- random numbers ---- */

/* The known answers published with the generator (Random123, kat_vectors, philox4x32 10). */
static void test_rng_known_answers(void **state)
{
    (void)state;
    static const struct {
        uint64_t key, lo, hi;
        uint32_t want[4];
    } rows[] = {
        {0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {UINT64_MAX, UINT64_MAX, UINT64_MAX, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {0x299f31d0a4093822,
         0x85a308d3243f6a88,
         0x0370734413198a2e,
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < 3; i++) {
        cm_rng_block block = cm_rng_at(rows[i].key, rows[i].lo, rows[i].hi);
        assert_memory_equal(block.word, rows[i].want, sizeof(rows[i].want));
    }
}

static void test_rng_uniform(void **state)
{
    (void)state;
    double sum = 0, least = 1, most = 0;
    for (uint64_t i = 0; i < 100000; i++) {
        double u = cm_rng_uniform(7, i, 0);
        assert_true(u >= 0 && u < 1);
        sum += u;
        least = u < least ? u : least;
        most = u > most ? u : most;
    }
    assert_true(sum / 100000 > 0.49 && sum / 100000 < 0.51);
    assert_true(least < 0.001 && most > 0.999);
    assert_true(cm_rng_uniform(7, 5, 0) == cm_rng_uniform(7, 5, 0));
    assert_true(cm_rng_uniform(7, 5, 0) != cm_rng_uniform(8, 5, 0));
    assert_true(cm_random_u64() != cm_random_u64());
}

/* ---- bytes ---- */

static void test_bytes(void **state)
{
    (void)state;
    cm_bytes bytes;
    cm_bytes_init(&bytes, 10);
    assert_string_equal(cm_bytes_text(&bytes), "");
    cm_bytes_append_text(&bytes, "0123456");
    cm_bytes_printf(&bytes, "%d", 789);
    assert_string_equal(cm_bytes_text(&bytes), "0123456789"); /* exactly full */
    assert_false(bytes.overflow);
    cm_bytes_append(&bytes, "x", 1);
    assert_true(bytes.overflow);
    assert_string_equal(cm_bytes_text(&bytes), "0123456789"); /* refused whole */
    cm_bytes_consume(&bytes, 4);
    assert_string_equal(cm_bytes_text(&bytes), "456789");
    assert_true(bytes.overflow); /* sticky */
    cm_bytes_printf(&bytes, "%s", "too long");
    assert_string_equal(cm_bytes_text(&bytes), "456789");
    cm_bytes_clear(&bytes);
    assert_false(bytes.overflow);
    assert_string_equal(cm_bytes_text(&bytes), "");
    cm_bytes_consume(&bytes, 0);
    cm_bytes_fini(&bytes);
    cm_bytes_init(&bytes, 0);
    for (int i = 0; i < 1000; i++) {
        cm_bytes_append(&bytes, "\0a", 2);
    }
    assert_int_equal(bytes.len, 2000);
    assert_int_equal(bytes.data[1999], 'a');
    assert_int_equal(bytes.data[2000], 0);
    cm_bytes_fini(&bytes);
}

/* ---- jobs ---- */

typedef struct t_job {
    int told, go; /* writes a byte, then waits for one; -1: neither */
    int order;
    int *n_run;
} t_job;

static void t_job_run(void *arg)
{
    t_job *job = arg;
    char byte = 'x';
    if (job->told >= 0 && (write(job->told, &byte, 1) != 1 || read(job->go, &byte, 1) != 1)) {
        return;
    }
    job->order = (*job->n_run)++; /* one thread: no race */
}

static void test_jobs(void **state)
{
    (void)state;
    enum { QUEUE = 3 };
    int told[2], go[2], n_run = 0;
    char byte;
    t_job jobs[QUEUE + 2];
    assert_int_equal(pipe(told), 0);
    assert_int_equal(pipe(go), 0);
    cm_jobs *team = cm_jobs_create("test", 1, QUEUE);
    for (int i = 0; i < QUEUE + 2; i++) {
        jobs[i] = (t_job){i == 0 ? told[1] : -1, go[0], -1, &n_run};
    }
    assert_int_equal(cm_jobs_submit(team, t_job_run, &jobs[0]), CM_OK);
    assert_int_equal(read(told[0], &byte, 1), 1); /* it is out of the queue and keeps the only thread */
    for (int i = 1; i <= QUEUE; i++) {
        assert_int_equal(cm_jobs_submit(team, t_job_run, &jobs[i]), CM_OK);
    }
    assert_int_equal(cm_jobs_submit(team, t_job_run, &jobs[QUEUE + 1]), CM_E_CAPACITY);
    assert_int_equal(write(go[1], "x", 1), 1);
    cm_jobs_destroy(team); /* runs what is queued */
    assert_int_equal(n_run, QUEUE + 1);
    for (int i = 0; i <= QUEUE; i++) {
        assert_int_equal(jobs[i].order, i);
    }
    assert_int_equal(jobs[QUEUE + 1].order, -1);
    for (int i = 0; i < 2; i++) {
        close(told[i]);
        close(go[i]);
    }
}

/* ---- log ---- */

/* What one line looks like on its fd. */
static void t_log_one(bool json, cm_log_level level, const char *text, char *out, size_t cap)
{
    int fds[2];
    assert_int_equal(pipe(fds), 0);
    cm_log_setup(&(cm_log_options){.level = CM_LOG_INFO, .json = json, .fd = fds[1]});
    cm_log_line(level, "%s", text);
    cm_log_setup(&(cm_log_options){.level = CM_LOG_INFO, .fd = 2});
    close(fds[1]);
    ssize_t n = read(fds[0], out, cap - 1);
    out[n > 0 ? n : 0] = '\0';
    close(fds[0]);
}

static void test_log(void **state)
{
    (void)state;
    char line[2048], text[1200];
    cm_log_level level;
    t_log_one(false, CM_LOG_WARN, "odd", line, sizeof(line));
    assert_non_null(strstr(line, " warn  odd\n"));
    t_log_one(false, CM_LOG_DEBUG, "odd", line, sizeof(line));
    assert_string_equal(line, ""); /* above the level */
    cm_log_identity("router", 3);
    cm_log_epoch(7);
    t_log_one(false, CM_LOG_INFO, "up", line, sizeof(line));
    assert_non_null(strstr(line, "router 3 epoch 7: up\n"));
    t_log_one(true, CM_LOG_ERROR, "a \"b\" c:\\d\n\x01\xc3\xa9", line, sizeof(line));
    assert_non_null(strstr(line, "\"level\":\"error\",\"role\":\"router\",\"id\":3,\"epoch\":7,"));
    assert_non_null(strstr(line, "\"text\":\"a \\\"b\\\" c:\\\\d\\u000a\\u0001\xc3\xa9\"}\n"));
    memset(text, 'x', sizeof(text));
    text[sizeof(text) - 1] = '\0';
    t_log_one(false, CM_LOG_INFO, text, line, sizeof(line));
    size_t n = strlen(line);
    assert_true(n > 800 && n < 1024 && line[n - 1] == '\n' &&
                strchr(line, '\n') == line + n - 1); /* cut, one line */
    assert_int_equal(cm_log_level_parse("debug", &level), CM_OK);
    assert_int_equal(level, CM_LOG_DEBUG);
    assert_int_equal(cm_log_level_parse("loud", &level), CM_E_CONFIG);
}

/* ---- counters ---- */

static void test_stats(void **state)
{
    (void)state;
    cm_stat_value values[CM_STAT_COUNT], foreign[] = {{CM_STAT_steps, 41}, {CM_STAT_COUNT + 5, 1}};
    cm_bytes text;
    cm_stat_add(CM_STAT_steps, 2);
    cm_stat_add(CM_STAT_steps, 3);
    cm_stat_set(CM_STAT_seq_running, 9);
    cm_stat_observe(CM_STAT_step_seconds, 0.0005);
    cm_stat_observe(CM_STAT_step_seconds, 0.001); /* a bound belongs to its bucket */
    cm_stat_observe(CM_STAT_step_seconds, 1e6);
    assert_int_equal(cm_stat_get(CM_STAT_steps), 5);
    assert_int_equal(cm_stat_get(CM_STAT_step_seconds), 3);
    uint32_t n = cm_stats_snapshot('R', values), found = 0;
    for (uint32_t i = 0; i < n; i++) {
        assert_true(cm_stat_has_role((cm_stat)values[i].stat, 'R'));
        assert_false(cm_stat_is_histogram((cm_stat)values[i].stat));
        found += values[i].stat == CM_STAT_steps && values[i].value == 5;
    }
    assert_int_equal(found, 1);
    cm_bytes_init(&text, 0);
    cm_stat_source sources[] = {{"router-1", 'R', NULL, 0}, {"router-2", 'R', foreign, 2}};
    cm_stats_render(sources, 2, &text);
    const char *at = cm_bytes_text(&text);
    assert_non_null(strstr(at,
                           "# TYPE baleen_steps_total counter\nbaleen_steps_total{member=\"router-1\"} 5\n"
                           "baleen_steps_total{member=\"router-2\"} 41\n"));
    assert_non_null(strstr(
        at, "# TYPE baleen_sequences_running gauge\nbaleen_sequences_running{member=\"router-1\"} 9\n"));
    assert_non_null(strstr(at, "# TYPE baleen_step_seconds histogram\n"));
    assert_non_null(strstr(at, "baleen_step_seconds_bucket{member=\"router-1\",le=\"0.001\"} 2\n"));
    assert_non_null(strstr(at, "baleen_step_seconds_bucket{member=\"router-1\",le=\"2560\"} 2\n"));
    assert_non_null(strstr(at, "baleen_step_seconds_bucket{member=\"router-1\",le=\"+Inf\"} 3\n"));
    assert_non_null(strstr(at, "baleen_step_seconds_count{member=\"router-1\"} 3\n"));
    assert_null(strstr(at, "baleen_streams")); /* a gateway's */
    const char *head = strstr(at, "# HELP baleen_steps_total ");
    assert_non_null(head);
    assert_null(strstr(head + 1, "# HELP baleen_steps_total ")); /* once for all members */
    cm_bytes_fini(&text);
}

/* ---- failpoints ---- */

static void test_failpoints(void **state)
{
    (void)state;
    t_lines lines = {0};
    cm_error err;
    uint64_t pattern = 0, again = 0;
    uint32_t n = 0;
    for (int i = 0; i < 100; i++) {
        assert_false(cm_failpoint_fires(CM_FAILPOINT_router_step_slow)); /* nothing is armed by itself */
    }
    assert_int_equal(cm_failpoints_arm("", g_seed, &err), CM_OK);
    assert_int_equal(cm_failpoints_arm("no_such_point:1", g_seed, &err), CM_E_CONFIG);
    assert_non_null(strstr(err.text, "no_such_point"));
    assert_int_equal(cm_failpoints_arm("router_step_slow:10001", g_seed, &err), CM_E_CONFIG);
    assert_int_equal(cm_failpoints_arm("router_step_slow:x", g_seed, &err), CM_E_CONFIG);
    cm_log_handler(t_keep_line, &lines);
    assert_int_equal(cm_failpoints_arm("router_step_slow:2500,worker_load_fails", g_seed, &err), CM_OK);
    assert_int_equal(lines.n, 2); /* said aloud */
    for (int i = 0; i < 10000; i++) {
        n += cm_failpoint_fires(CM_FAILPOINT_router_step_slow);
        assert_true(cm_failpoint_fires(CM_FAILPOINT_worker_load_fails)); /* without odds: always */
        assert_false(cm_failpoint_fires(CM_FAILPOINT_worker_combine_late));
    }
    assert_in_range(n, 2200, 2800);
    for (int i = 0; i < 64; i++) {
        pattern = pattern << 1 | cm_failpoint_fires(CM_FAILPOINT_router_step_slow);
        again = again << 1 | cm_failpoint_fires(CM_FAILPOINT_router_step_slow);
    }
    assert_true(pattern != again); /* a sequence, not one draw repeated */
    assert_int_equal(cm_failpoints_arm("router_step_slow:0,worker_load_fails:0", g_seed, &err), CM_OK);
    cm_log_handler(NULL, NULL);
    assert_false(cm_failpoint_fires(CM_FAILPOINT_worker_load_fails));
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "--seed") == 0) {
        g_seed = strtoull(argv[2], NULL, 10);
    }
    printf("seed %llu\n", (unsigned long long)g_seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_status),
        cmocka_unit_test(test_alloc),
        cmocka_unit_test(test_copy_past_caches),
        cmocka_unit_test(test_guard),
        cmocka_unit_test(test_arena),
        cmocka_unit_test(test_pool),
        cmocka_unit_test(test_map),
        cmocka_unit_test(test_rng_known_answers),
        cmocka_unit_test(test_rng_uniform),
        cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_jobs),
        cmocka_unit_test(test_log),
        cmocka_unit_test(test_stats),
        cmocka_unit_test(test_failpoints),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
