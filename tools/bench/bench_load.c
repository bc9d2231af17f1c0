/* load.weights: how fast a worker has its experts and a router its dense weights, beside reading the same
 * files with read(2) in the same round. Cold: their pages are put out of the page cache before. Hot: they are
 * in it, so what remains is checking values and laying them in the order of the products. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/base/clock.h"
#include "common/base/mem.h"
#include "router/engine/engine.h"
#include "tools/bench/bench.h"
#include "tools/baleen/cli.h"
#include "worker/shard.h"

enum { LOAD_PIECE = 8 << 20, LOAD_FILES_MAX = 4096, LOAD_WAYS = 3 };

typedef struct load_way {
    const char *name, *doc;
    bench_samples rate[2], of_read[2]; /* cold, hot; bytes a second */
} load_way;

typedef struct load_run {
    const bench_config *config;
    char *files[LOAD_FILES_MAX];
    uint32_t n_file;
    uint8_t *piece;
    load_way ways[LOAD_WAYS];
} load_run;

static double now_s(void)
{
    return 1e-9 * (double)cm_now_ns(); /* waiting for a disk is no processor time */
}

/* ---- files ---- */

static cm_status list_files(load_run *l, cm_error *err)
{
    struct dirent *entry;
    DIR *dir = opendir(l->config->model);
    if (dir == NULL) {
        return cm_error_set(err, CM_E_NOT_FOUND, "model", "%s: %s", l->config->model, strerror(errno));
    }
    while ((entry = readdir(dir)) != NULL && l->n_file < LOAD_FILES_MAX) {
        const char *dot = strrchr(entry->d_name, '.');
        if (dot != NULL && strcmp(dot, ".safetensors") == 0) {
            cm_bytes path;
            cm_bytes_init(&path, 0);
            cm_bytes_printf(&path, "%s/%s", l->config->model, entry->d_name);
            l->files[l->n_file++] = cm_strdup(cm_bytes_text(&path));
            cm_bytes_fini(&path);
        }
    }
    closedir(dir);
    return CM_OK;
}

static void put_out(const load_run *l)
{
    for (uint32_t i = 0; i < l->n_file; i++) {
        int fd = open(l->files[i], O_RDONLY | O_CLOEXEC);
        if (fd >= 0) {
            (void)fdatasync(fd); /* what is not on disk yet would stay */
            (void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
            close(fd);
        }
    }
}

/* Bytes a second of reading all files from one end to the other. */
static double read_rate(const load_run *l)
{
    double start_s = now_s(), n_bytes = 0;
    for (uint32_t i = 0; i < l->n_file; i++) {
        int fd = open(l->files[i], O_RDONLY | O_CLOEXEC);
        ssize_t n = 1;
        while (fd >= 0 && n > 0) {
            n = read(fd, l->piece, LOAD_PIECE);
            n_bytes += n > 0 ? (double)n : 0;
        }
        if (fd >= 0) {
            close(fd);
        }
    }
    return n_bytes / (now_s() - start_s);
}

/* ---- loads ---- */

static cm_status open_device(const load_run *l, kn_device **device_out, cm_error *err)
{
    return kn_device_open(&(kn_device_options){.isa = "auto", .n_threads = (uint32_t)l->config->threads},
                          device_out, err);
}

/* All experts, as the only worker of a cluster has them. */
static cm_status load_worker(const load_run *l, double *rate_out, cm_error *err)
{
    uint32_t member = 1;
    uint64_t capacity = UINT64_MAX;
    md_checkpoint *checkpoint;
    kn_device *device;
    wk_shard *shard;
    pr_placement *placement;
    double start_s = now_s();
    CM_TRY(md_checkpoint_open(l->config->model, &checkpoint, NULL, NULL, err));
    const md_geometry *g = md_checkpoint_geometry(checkpoint);
    cm_status status = open_device(l, &device, err);
    if (status != CM_OK) {
        goto err_checkpoint;
    }
    status = pr_placement_plan(md_block_count(g), g->n_expert, &member, 1, &capacity, NULL, &placement, err);
    if (status != CM_OK) {
        goto err_device;
    }
    status = wk_shard_create(checkpoint, device, (uint32_t)l->config->threads, &shard);
    if (status == CM_OK) {
        status = wk_shard_load(shard, placement, 0, err);
        *rate_out =
            (double)md_block_count(g) * g->n_expert * (double)md_expert_bytes(g) / (now_s() - start_s);
        wk_shard_destroy(shard);
    }
    pr_placement_free(placement);
err_device:
    kn_device_close(device);
err_checkpoint:
    md_checkpoint_close(checkpoint);
    return status;
}

static cm_status load_router(const load_run *l, double *rate_out, cm_error *err)
{
    md_checkpoint *checkpoint;
    rt_engine *engine;
    rt_engine_options options = {
        .device = {.backend = "cpu", .isa = "auto", .n_threads = (uint32_t)l->config->threads},
        .row_max = 64,
        .slot_max = 1,
        .kv_bytes = 64 << 20,
        .answer_ms = 1000,
        .wait_ms = 1000};
    net_options_defaults(&options.rows);
    options.rows.backend = "local";
    double start_s = now_s();
    CM_TRY(md_checkpoint_open(l->config->model, &checkpoint, NULL, NULL, err));
    const md_geometry *g = md_checkpoint_geometry(checkpoint);
    double n_bytes = (double)md_checkpoint_bytes(checkpoint) -
                     (double)md_block_count(g) * g->n_expert * (double)md_expert_bytes(g);
    options.checkpoint = checkpoint;
    cm_status status = rt_engine_create(&options, &engine, err);
    if (status == CM_OK) {
        *rate_out = n_bytes / (now_s() - start_s);
        rt_engine_destroy(engine);
    }
    md_checkpoint_close(checkpoint);
    return status;
}

/* ---- the report ---- */

static cm_status take_round(load_run *l, cm_error *err)
{
    for (int hot = 0; hot < 2; hot++) {
        double rate[LOAD_WAYS] = {0};
        for (int way = 0; way < LOAD_WAYS; way++) {
            if (!hot) {
                put_out(l);
            }
            if (way == 0) {
                rate[way] = read_rate(l);
            } else {
                CM_TRY((way == 1 ? load_worker : load_router)(l, &rate[way], err));
            }
            bench_add(&l->ways[way].rate[hot], rate[way]);
            bench_add(&l->ways[way].of_read[hot], rate[way] / rate[0]);
        }
    }
    return CM_OK;
}

static void print_way(const load_way *w, json_t *results)
{
    static const char *const names[] = {"cold", "hot"};
    for (int hot = 0; hot < 2; hot++) {
        bench_summary rate = bench_summarize(&w->rate[hot]), ratio = bench_summarize(&w->of_read[hot]);
        printf("%-8s %-5s %8.2f GB/s (%.2f .. %.2f)   %5.2f (%.2f .. %.2f)   %s\n", w->name, names[hot],
               rate.median / 1e9, rate.min / 1e9, rate.max / 1e9, ratio.median, ratio.min, ratio.max,
               hot ? "" : w->doc);
        json_array_append_new(results,
                              json_pack("{s:s, s:b, s:o, s:o}", "who", w->name, "hot", hot, "bytes_s",
                                        bench_summary_json(rate), "of_read", bench_summary_json(ratio)));
    }
}

static cm_status load_measure(load_run *l, const bench *b, cm_error *err)
{
    CM_TRY(list_files(l, err));
    l->piece = cm_alloc(LOAD_PIECE);
    for (uint32_t round = 0; round < l->config->rounds; round++) {
        cli_progress("round %u of %u", round + 1, (unsigned)l->config->rounds);
        CM_TRY(take_round(l, err));
    }
    cli_progress_clear();
    json_t *report = bench_begin(b, l->config);
    printf("%s, %u files; time on the wall; of read: of the rate of read(2)\n%-14s %-28s of read\n",
           l->config->model, l->n_file, "", "rate");
    for (int way = 0; way < LOAD_WAYS; way++) {
        print_way(&l->ways[way], json_object_get(report, "results"));
    }
    bench_end(report);
    return CM_OK;
}

static int load_run_bench(const bench *b, const bench_config *config)
{
    load_run l = {.config = config,
                  .ways = {{.name = "read(2)", .doc = "all files, one after another"},
                           {.name = "worker", .doc = "all experts: open, check values, lay out"},
                           {.name = "router", .doc = "all else, and an engine that could begin"}}};
    cm_error err = {0};
    cm_status status = load_measure(&l, b, &err);
    for (uint32_t i = 0; i < l.n_file; i++) {
        cm_free(l.files[i]);
    }
    cm_free(l.piece);
    if (status != CM_OK) {
        fprintf(stderr, "baleen bench: %s\n", err.text);
    }
    return status == CM_OK ? CLI_OK : CLI_FAILED;
}

const bench bench_load_weights = {
    "load.weights", "how soon a worker and a router have a checkpoint's weights, against read(2)",
    load_run_bench};
