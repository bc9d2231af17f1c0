/* load.weights: how fast a worker has its experts and a router its dense weights, beside reading the same
 * files with read(2) in the same round: through one buffer, which is as fast as it goes, and into as much new
 * memory, which is what a load cannot do without either. Cold: their pages are put out of the page cache
 * before. Hot: they are in it, so what remains is checking values and laying them in the order of the
 * products. */
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

enum { LOAD_PIECE = 8 << 20, LOAD_FILES_MAX = 4096 };

typedef enum load_kind { LOAD_READ, LOAD_KEPT, LOAD_WORKER, LOAD_ROUTER, LOAD_WAYS } load_kind;

typedef struct load_way {
    const char *name, *doc;
    bench_samples rate[2], of_read[2], of_kept[2]; /* cold, hot; rates in bytes a second */
} load_way;

typedef struct load_run {
    const bench_config *config;
    char *files[LOAD_FILES_MAX];
    uint32_t n_file;
    uint64_t n_bytes; /* of all files */
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

/* Bytes a second of reading all files from one end to the other; into kept [n_bytes] unless NULL. */
static double read_rate(load_run *l, uint8_t *kept)
{
    double start_s = now_s();
    uint64_t n_bytes = 0;
    for (uint32_t i = 0; i < l->n_file; i++) {
        int fd = open(l->files[i], O_RDONLY | O_CLOEXEC);
        ssize_t n = 1;
        while (fd >= 0 && n > 0) {
            uint64_t room =
                kept != NULL && l->n_bytes - n_bytes < LOAD_PIECE ? l->n_bytes - n_bytes : LOAD_PIECE;
            n = read(fd, kept != NULL ? kept + n_bytes : l->piece, room);
            n_bytes += n > 0 ? (uint64_t)n : 0;
        }
        if (fd >= 0) {
            close(fd);
        }
    }
    l->n_bytes = n_bytes;
    return (double)n_bytes / (now_s() - start_s);
}

static cm_status read_kept(load_run *l, double *rate_out, cm_error *err)
{
    uint64_t n_bytes = l->n_bytes;
    uint8_t *kept = cm_huge_alloc(n_bytes);
    if (kept == NULL) {
        return cm_error_set(err, CM_E_MEMORY, "model", "no memory for the %llu bytes of the model",
                            (unsigned long long)n_bytes);
    }
    *rate_out = read_rate(l, kept);
    cm_huge_free(kept, n_bytes);
    return CM_OK;
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

static cm_status take_way(load_run *l, load_kind kind, double *rate_out, cm_error *err)
{
    switch (kind) {
    case LOAD_KEPT:
        return read_kept(l, rate_out, err);
    case LOAD_WORKER:
        return load_worker(l, rate_out, err);
    case LOAD_ROUTER:
        return load_router(l, rate_out, err);
    default:
        *rate_out = read_rate(l, NULL);
        return CM_OK;
    }
}

static cm_status take_round(load_run *l, cm_error *err)
{
    for (int hot = 0; hot < 2; hot++) {
        double rate[LOAD_WAYS] = {0};
        if (hot) {
            (void)read_rate(l, NULL); /* what was cold may have gone past the page cache */
        }
        for (load_kind kind = 0; kind < LOAD_WAYS; kind++) {
            load_way *way = &l->ways[kind];
            if (!hot) {
                put_out(l);
            }
            CM_TRY(take_way(l, kind, &rate[kind], err));
            bench_add(&way->rate[hot], rate[kind]);
            bench_add(&way->of_read[hot], rate[kind] / rate[LOAD_READ]);
            bench_add(&way->of_kept[hot], kind == LOAD_READ ? 0 : rate[kind] / rate[LOAD_KEPT]);
        }
    }
    return CM_OK;
}

static void print_way(const load_way *w, json_t *results)
{
    static const char *const names[] = {"cold", "hot"};
    for (int hot = 0; hot < 2; hot++) {
        bench_summary rate = bench_summarize(&w->rate[hot]), ratio = bench_summarize(&w->of_read[hot]);
        bench_summary kept = bench_summarize(&w->of_kept[hot]);
        printf("%-8s %-5s %6.2f GB/s (%.2f .. %.2f)  %5.2f (%.2f .. %.2f)", w->name, names[hot],
               rate.median / 1e9, rate.min / 1e9, rate.max / 1e9, ratio.median, ratio.min, ratio.max);
        if (kept.max > 0) {
            printf("  %5.2f (%.2f .. %.2f)", kept.median, kept.min, kept.max);
        }
        printf("%s%s\n", hot ? "" : "   ", hot ? "" : w->doc);
        json_array_append_new(results,
                              json_pack("{s:s, s:b, s:o, s:o, s:o}", "who", w->name, "hot", hot, "bytes_s",
                                        bench_summary_json(rate), "of_read", bench_summary_json(ratio),
                                        "of_read_kept", bench_summary_json(kept)));
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
    printf(
        "%s, %u files; time on the wall; beside reading all files through one buffer, and into new memory\n"
        "%-14s %-25s %-19s of kept\n",
        l->config->model, l->n_file, "", "rate", "of read");
    for (int way = 0; way < LOAD_WAYS; way++) {
        print_way(&l->ways[way], json_object_get(report, "results"));
    }
    bench_end(report);
    return CM_OK;
}

static int load_run_bench(const bench *b, const bench_config *config)
{
    load_run l = {.config = config,
                  .ways = {[LOAD_READ] = {.name = "read", .doc = "all files, one after another"},
                           [LOAD_KEPT] = {.name = "kept", .doc = "the same into new memory"},
                           [LOAD_WORKER] = {.name = "worker", .doc = "all experts: open, check, lay out"},
                           [LOAD_ROUTER] = {.name = "router", .doc = "all else: until it could begin"}}};
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
