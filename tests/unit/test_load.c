/* Loads: every tensor reaches its item whole, whatever way it comes, and once. */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/base/failpoint.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/model/load.h"
#include "common/model/safetensors_private.h"
#include "tests/support/temp_folder.h"

enum { FILES = 2, PAGE = 4096, GROUPS = 5, GROUP_MAX = 3, TENSORS = 8 };

/* Of each file; the last ends where no page does. The gap of 300000 is more than a read bridges. */
static const uint32_t SIZES[TENSORS] = {1, 5000, 3 * PAGE, 300000, 77, 2 * PAGE - 1, 123456, 4099};
/* Items: {file, tensor} pairs, out of order and of both files too. */
typedef struct part {
    uint32_t file, tensor;
} part;
static const part ITEMS[GROUPS][GROUP_MAX] = {{{0, 2}, {0, 0}, {0, 1}},
                                              {{0, 4}, {1, 7}, {0, 7}},
                                              {{1, 0}, {1, 2}, {1, 6}},
                                              {{1, 5}, {1, 4}, {1, 3}},
                                              {{0, 6}, {0, 3}, {0, 5}}};

typedef struct world {
    char folder[T_FOLDER_MAX], path[FILES][T_FOLDER_MAX + 16];
    md_safetensors *file[FILES];
    uint8_t *content[FILES]; /* of the data part */
    uint32_t at[TENSORS];    /* of each tensor in it */
    _Atomic uint32_t seen[GROUPS];
    _Atomic uint32_t n_computing, n_computing_max;
    uint32_t fails_at; /* GROUPS: none */
    bool keeps;
} world;

/* ---- files ---- */

static void write_file(world *w, uint32_t f)
{
    char header[1024];
    uint64_t n = 0, at = 0;
    n += (uint64_t)snprintf(header, sizeof(header), "{");
    for (uint32_t i = 0; i < TENSORS; i++) {
        w->at[i] = (uint32_t)at;
        n += (uint64_t)snprintf(header + n, sizeof(header) - n,
                                "%s\"t%u\":{\"dtype\":\"U8\",\"shape\":[%u],\"data_offsets\":[%llu,%llu]}",
                                i == 0 ? "" : ",", i, SIZES[i], (unsigned long long)at,
                                (unsigned long long)(at + SIZES[i]));
        at += SIZES[i];
    }
    n += (uint64_t)snprintf(header + n, sizeof(header) - n, "}");
    w->content[f] = cm_alloc(at);
    for (uint64_t i = 0; i < at; i++) {
        w->content[f][i] = (uint8_t)cm_rng_at(7, i, f).word[0];
    }
    snprintf(w->path[f], sizeof(w->path[f]), "%s/%u", w->folder, f);
    FILE *file = fopen(w->path[f], "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(&n, sizeof(n), 1, file), 1);
    assert_int_equal(fwrite(header, 1, n, file), n);
    assert_int_equal(fwrite(w->content[f], 1, at, file), at);
    assert_int_equal(fflush(file), 0);
    assert_int_equal(fsync(fileno(file)), 0);
    assert_int_equal(fclose(file), 0);
}

static int setup(void **state)
{
    cm_error err;
    world *w = cm_alloc(sizeof(*w));
    t_folder_make(w->folder, "load");
    w->fails_at = GROUPS;
    for (uint32_t f = 0; f < FILES; f++) {
        write_file(w, f);
        assert_int_equal(md_safetensors_open(w->path[f], &w->file[f], &err), CM_OK);
    }
    *state = w;
    return 0;
}

static int teardown(void **state)
{
    world *w = *state;
    assert_int_equal(cm_failpoints_arm("load_direct_refused:0", 0, NULL), CM_OK);
    for (uint32_t f = 0; f < FILES; f++) {
        md_safetensors_close(w->file[f]);
        cm_free(w->content[f]);
    }
    t_folder_remove(w->folder);
    cm_free(w);
    return 0;
}

static void put_out(const world *w)
{
    for (uint32_t f = 0; f < FILES; f++) {
        md_tensor t = *md_safetensors_at(w->file[f], 0);
        uintptr_t page = (uintptr_t)t.data / PAGE * PAGE;
        int fd = open(w->path[f], O_RDONLY | O_CLOEXEC);
        assert_int_equal(madvise((void *)page, md_safetensors_data_bytes(t.file), MADV_DONTNEED), 0);
        assert_int_equal(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
        close(fd);
    }
}

static void read_all(const world *w)
{
    for (uint32_t f = 0; f < FILES; f++) {
        uint8_t piece[PAGE];
        int fd = open(w->path[f], O_RDONLY | O_CLOEXEC);
        while (read(fd, piece, sizeof(piece)) > 0) {
        }
        close(fd);
    }
}

/* Whether a page of the middle is in the page cache. */
static bool is_there(const world *w, uint32_t f)
{
    unsigned char there = 0;
    uintptr_t at = (uintptr_t)md_safetensors_find(w->file[f], "t3")->data + 150000;
    assert_int_equal(mincore((void *)(at / PAGE * PAGE), 1, &there), 0);
    return there & 1;
}

/* ---- loads ---- */

static const md_tensor *tensor_of(const world *w, part p)
{
    char name[8];
    snprintf(name, sizeof(name), "t%u", p.tensor);
    return md_safetensors_find(w->file[p.file], name);
}

static uint32_t kept(void *ctx, uint32_t i, const md_tensor *tensors_out[MD_LOAD_TENSORS_MAX])
{
    for (uint32_t k = 0; k < GROUP_MAX; k++) {
        tensors_out[k] = tensor_of(ctx, ITEMS[i][k]);
    }
    return GROUP_MAX;
}

static void count_turn(world *w)
{
    uint32_t n = atomic_fetch_add(&w->n_computing, 1) + 1, most = atomic_load(&w->n_computing_max);
    while (n > most && !atomic_compare_exchange_weak(&w->n_computing_max, &most, n)) {
    }
}

static cm_status item(void *ctx, uint32_t i, md_reader *reader, cm_error *err)
{
    world *w = ctx;
    md_tensor tensors[GROUP_MAX];
    if (i == w->fails_at) {
        return cm_error_set(err, CM_E_CORRUPT, "here", "item %u", i);
    }
    for (uint32_t k = 0; k < GROUP_MAX; k++) {
        tensors[k] = *tensor_of(w, ITEMS[i][k]);
        if (w->keeps) {
            md_reader_keep(reader, tensor_of(w, ITEMS[i][k]));
        }
    }
    if (!w->keeps) {
        CM_TRY(md_reader_read(reader, tensors, GROUP_MAX, false, err));
    }
    count_turn(w);
    for (uint32_t k = 0; k < GROUP_MAX; k++) {
        part p = ITEMS[i][k];
        if (tensors[k].n_bytes != SIZES[p.tensor] ||
            memcmp(tensors[k].data, w->content[p.file] + w->at[p.tensor], SIZES[p.tensor]) != 0) {
            return cm_error_set(err, CM_E_INVALID, "", "item %u: other bytes",
                                i); /* no assertions on threads */
        }
    }
    atomic_fetch_add(&w->seen[i], 1);
    atomic_fetch_sub(&w->n_computing, 1);
    return CM_OK;
}

static cm_status run(world *w, uint32_t n_threads, md_load_bytes *bytes_out, cm_error *err)
{
    for (uint32_t i = 0; i < GROUPS; i++) {
        w->seen[i] = 0;
    }
    w->n_computing_max = 0;
    return md_load_run(&(md_load){.n_item = GROUPS,
                                  .n_threads = n_threads,
                                  .item_bytes_max = 500000,
                                  .item = item,
                                  .kept = w->keeps ? kept : NULL,
                                  .ctx = w},
                       bytes_out, err);
}

static uint64_t run_whole(world *w, uint32_t n_threads, md_load_bytes *bytes_out)
{
    cm_error err;
    uint64_t n_bytes = 0;
    assert_int_equal(run(w, n_threads, bytes_out, &err), CM_OK);
    for (uint32_t i = 0; i < GROUPS; i++) {
        assert_int_equal(w->seen[i], 1);
        for (uint32_t k = 0; k < GROUP_MAX; k++) {
            n_bytes += SIZES[ITEMS[i][k].tensor];
        }
    }
    assert_in_range(w->n_computing_max, 1, n_threads);
    return n_bytes;
}

/* Whether the page cache can be told to let the files go: not where they live in it. */
static bool can_be_cold(const world *w)
{
    put_out(w);
    return !is_there(w, 0) && !is_there(w, 1);
}

static void test_cached(void **state)
{
    world *w = *state;
    md_load_bytes bytes;
    for (uint32_t n = 1; n <= 4; n++) {
        read_all(w);
        uint64_t n_bytes = run_whole(w, n, &bytes);
        assert_int_equal(bytes.cached, n_bytes);
        assert_int_equal(bytes.direct + bytes.mapped, 0);
    }
}

static void test_past_the_cache(void **state)
{
    world *w = *state;
    md_load_bytes bytes;
    for (uint32_t n = 1; n <= 4; n++) {
        if (!can_be_cold(w) || !md_safetensors_direct(w->file[0])) {
            skip(); /* files live in memory here, or this file system has no such way */
        }
        uint64_t n_bytes = run_whole(w, n, &bytes);
        assert_int_equal(bytes.direct, n_bytes);
        assert_false(is_there(w, 0));
        assert_false(is_there(w, 1));
    }
}

/* The file system said yes when it was opened and no when it was read. */
static void test_refused(void **state)
{
    world *w = *state;
    md_load_bytes bytes;
    cm_error err;
    assert_int_equal(cm_failpoints_arm("load_direct_refused:10000", 1, &err), CM_OK);
    if (!can_be_cold(w) || !md_safetensors_direct(w->file[0])) {
        skip();
    }
    uint64_t n_bytes = run_whole(w, 2, &bytes);
    assert_int_equal(bytes.direct, 0);
    assert_int_equal(bytes.mapped + bytes.cached, n_bytes);
    assert_false(md_safetensors_direct(w->file[0]));
}

static void test_kept(void **state)
{
    world *w = *state;
    md_load_bytes bytes;
    w->keeps = true;
    for (uint32_t n = 1; n <= 4; n++) {
        put_out(w);
        run_whole(w, n, &bytes);
        assert_true(is_there(w, 0));
        assert_true(is_there(w, 1));
    }
}

static void test_error_ends(void **state)
{
    world *w = *state;
    md_load_bytes bytes;
    for (uint32_t i = 0; i < GROUPS; i++) {
        cm_error err = {0};
        w->fails_at = i;
        assert_int_equal(run(w, 1 + i % 3, &bytes, &err), CM_E_CORRUPT);
        assert_string_equal(err.field, "here");
    }
}

/* Became shorter after it was opened: an error, where the mapping would be a signal. */
static void test_truncated(void **state)
{
    world *w = *state;
    md_load_bytes bytes;
    cm_error err = {0};
    if (!can_be_cold(w) || !md_safetensors_direct(w->file[0])) {
        skip();
    }
    assert_int_equal(truncate(w->path[1], PAGE), 0);
    assert_int_equal(run(w, 1, &bytes, &err), CM_E_IO);
    assert_non_null(strstr(err.text, "became shorter"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_cached, setup, teardown),
        cmocka_unit_test_setup_teardown(test_past_the_cache, setup, teardown),
        cmocka_unit_test_setup_teardown(test_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_kept, setup, teardown),
        cmocka_unit_test_setup_teardown(test_error_ends, setup, teardown),
        cmocka_unit_test_setup_teardown(test_truncated, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
