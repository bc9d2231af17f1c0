/* cpu.indexer_attn: the indexer (scan and choice) and the attention of one layer at growing context, in the
 * dimensions of V4-Pro: a layer of ratio 4 whose rows attend to the window and their 1024 picks, and one of
 * ratio 128 whose rows attend to all there is. Floor of an operation: the longer of its bytes at the read
 * bandwidth (each stored row of a sequence once) and its multiplications at the peak of the instruction that
 * does them (vpdpbusd for the indexer, double multiply-add for attention); of both together, their sum. */
#include <stdio.h>
#include <string.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "kernels/kn_math.h"
#include "tools/bench/bench.h"
#include "tools/baleen/cli.h"

enum {
    ATTN_SEED = 13,
    ATTN_HEADS = 128,
    ATTN_DIM = 512,
    ATTN_ROPE = 64,
    ATTN_WINDOW = 128,
    ATTN_TOPK = 1024,
    INDEX_HEADS = 64,
    INDEX_DIM = 128,
    N_SEQ = 4,
    CHUNK = 128, /* rows of the prefill case, a multiple of the window */
    CONTEXT_MAX = 1 << 17,
    N_PAGE = CONTEXT_MAX / KN_PAGE_TOKENS,
    KV_KINDS = 1021,      /* different KV rows; the pages repeat them */
    REPEAT_MACS = 1 << 29 /* small cases are done again until they have this many */
};

typedef struct attn_world {
    const bench_config *config;
    kn_attn a;
    kn_batch b;
    kn_seg segs[N_SEQ];
    uint32_t pages[N_SEQ * N_PAGE];
    uint8_t *pool, *slots, *rows, *iq;
    uint16_t *q, *w, *o;
    int32_t *picks;
    uint64_t slot_bytes;
} attn_world;

enum { OP_INDEX, OP_ATTENTION, OP_BOTH, N_OP };
static const char *const OP_NAMES[N_OP] = {"indexer", "attention", "together"};

typedef struct attn_case {
    uint32_t context, n_seq, n_row;     /* rows of each sequence, the last ones of the context */
    double macs[N_OP - 1], bytes[N_OP]; /* of one call */
    bench_samples seconds[BENCH_PATHS_MAX][N_OP], ratio[BENCH_PATHS_MAX][N_OP];
} attn_case;

typedef struct ceilings {
    bench_samples read, fma64, scan; /* bytes, multiplications a second */
    const char *scan_name;
} ceilings;

/* ---- data ---- */

static double random_normal(uint64_t key, uint64_t i)
{
    cm_rng_block b = cm_rng_at(ATTN_SEED, i, key);
    double sum = 0;
    for (int k = 0; k < 4; k++) {
        sum += (double)b.word[k] / 2147483648.0 - 1;
    }
    return sum;
}

/* About normal, of the given size. */
static uint16_t *random_rows(uint64_t key, uint64_t n, double size)
{
    uint16_t *x = cm_alloc(n * sizeof(*x));
    for (uint64_t i = 0; i < n; i++) {
        x[i] = kn_bf16_encode((float)(size * random_normal(key, i)));
    }
    return x;
}

static kn_ptr ptr_of(const void *host)
{
    return (kn_ptr){(uintptr_t)host};
}

/* Stored KV rows like a normed kv: KV_KINDS of them. */
static uint8_t *make_kv_rows(const bench_path *path)
{
    uint16_t *kv = random_rows(1, (uint64_t)KV_KINDS * ATTN_DIM, 0.7);
    uint8_t *rows = cm_alloc((uint64_t)KV_KINDS * kn_kv_row_bytes(ATTN_DIM, ATTN_ROPE));
    kn_attention(path->device)
        ->kv_pack(path->stream, ptr_of(kv), KV_KINDS, ATTN_DIM, ATTN_ROPE, ptr_of(rows));
    cm_free(kv);
    return rows;
}

/* One sequence's compressed rows and indexer keys, in pages 0 .. N_PAGE - 1; the others are copies. */
static void fill_pages(attn_world *w, const bench_path *path, const uint8_t *kv_rows)
{
    const kn_kv_layout *l = &w->a.layout;
    uint32_t per_page = KN_PAGE_TOKENS / l->ratio;
    uint64_t n_row = (uint64_t)N_PAGE * per_page;
    for (uint64_t j = 0; j < n_row; j++) {
        uint8_t *page = w->pool + j / per_page * w->b.page_bytes;
        memcpy(page + l->page_rows + j % per_page * l->row_bytes, kv_rows + j % KV_KINDS * l->row_bytes,
               l->row_bytes);
    }
    if (l->index_bytes != 0) {
        uint16_t *x = random_rows(2, n_row * INDEX_DIM, 1);
        for (uint32_t p = 0; p < N_PAGE; p++) {
            kn_attention(path->device)
                ->index_pack(path->stream, ptr_of(x + (uint64_t)p * per_page * INDEX_DIM), per_page, 1,
                             INDEX_DIM, ptr_of(w->pool + p * w->b.page_bytes + l->page_index));
        }
        cm_free(x);
    }
    for (uint32_t s = 1; s < N_SEQ; s++) {
        memcpy(w->pool + s * N_PAGE * w->b.page_bytes, w->pool, N_PAGE * w->b.page_bytes);
    }
}

/* Raw rows repeat with the window: a chunk's row is the ring's, so that a row of a chunk has the same keys
 * when it comes alone. */
static void fill_raw(attn_world *w, const uint8_t *kv_rows)
{
    uint64_t n_bytes = (uint64_t)ATTN_WINDOW * w->a.layout.row_bytes;
    for (uint32_t s = 0; s < N_SEQ; s++) {
        memcpy(w->slots + s * w->slot_bytes, kv_rows, n_bytes);
    }
    for (uint32_t r = 0; r < CHUNK; r += ATTN_WINDOW) {
        memcpy(w->rows + r * (uint64_t)w->a.layout.row_bytes, kv_rows, n_bytes);
    }
}

static void fill_queries(attn_world *w, const bench_path *path)
{
    uint16_t *x = random_rows(5, (uint64_t)CHUNK * INDEX_HEADS * INDEX_DIM, 1);
    w->q = random_rows(3, (uint64_t)CHUNK * ATTN_HEADS * ATTN_DIM, 0.7);
    w->w = random_rows(4, (uint64_t)CHUNK * INDEX_HEADS, 1);
    w->iq = cm_alloc((uint64_t)CHUNK * INDEX_HEADS * kn_index_row_bytes(INDEX_DIM));
    kn_attention(path->device)
        ->index_pack(path->stream, ptr_of(x), CHUNK, INDEX_HEADS, INDEX_DIM, ptr_of(w->iq));
    cm_free(x);
}

static void world_open(attn_world *w, const bench_config *config, uint32_t ratio, const bench_path *path)
{
    static float sink[ATTN_HEADS];
    uint32_t per_page = KN_PAGE_TOKENS / ratio;
    kn_kv_layout l = {.ratio = ratio,
                      .ring = ATTN_WINDOW,
                      .row_bytes = kn_kv_row_bytes(ATTN_DIM, ATTN_ROPE),
                      .index_bytes = ratio == 4 ? kn_index_row_bytes(INDEX_DIM) : 0,
                      .page_index = (uint64_t)per_page * kn_kv_row_bytes(ATTN_DIM, ATTN_ROPE)};
    uint8_t *kv_rows;
    w->config = config;
    w->a = (kn_attn){.layout = l,
                     .sink = ptr_of(sink),
                     .n_head = ATTN_HEADS,
                     .dim = ATTN_DIM,
                     .rope = ATTN_ROPE,
                     .window = ATTN_WINDOW,
                     .topk = ratio == 4 ? ATTN_TOPK : 0};
    w->b = (kn_batch){.segs = ptr_of(w->segs),
                      .pages = ptr_of(w->pages),
                      .page_bytes = l.page_index + (uint64_t)per_page * l.index_bytes};
    w->slot_bytes = (uint64_t)ATTN_WINDOW * l.row_bytes;
    w->pool = cm_alloc_aligned(N_SEQ * N_PAGE * w->b.page_bytes);
    w->b.page_pool = ptr_of(w->pool);
    w->slots = cm_alloc_aligned(N_SEQ * w->slot_bytes);
    w->rows = cm_alloc_aligned((uint64_t)CHUNK * l.row_bytes);
    w->o = cm_alloc_aligned(2ull * CHUNK * ATTN_HEADS * ATTN_DIM);
    w->picks = cm_alloc_aligned(4ull * CHUNK * ATTN_TOPK);
    for (uint32_t i = 0; i < N_SEQ * N_PAGE; i++) {
        w->pages[i] = i / N_PAGE * N_PAGE + (5 * i + 3) % N_PAGE;
    }
    cli_progress("making the keys of ratio %u", ratio);
    kv_rows = make_kv_rows(path);
    fill_pages(w, path, kv_rows);
    fill_raw(w, kv_rows);
    fill_queries(w, path);
    cm_free(kv_rows);
}

static void world_close(attn_world *w)
{
    void *const all[] = {w->pool, w->slots, w->rows, w->iq, w->q, w->w, w->o, w->picks};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        cm_free(all[i]);
    }
}

/* ---- cases ---- */

/* The case's rows as the batch; the first sequence is the world's number seq0. */
static void set_batch(attn_world *w, const attn_case *c, uint32_t seq0)
{
    w->b.n_seg = c->n_seq;
    w->b.n_row = c->n_seq * c->n_row;
    for (uint32_t i = 0; i < c->n_seq; i++) {
        uint32_t seq = (seq0 + i) % N_SEQ;
        w->segs[i] = (kn_seg){.row0 = i * c->n_row,
                              .n_row = c->n_row,
                              .pos0 = c->context - c->n_row,
                              .page0 = seq * N_PAGE,
                              .slot = ptr_of(w->slots + seq * w->slot_bytes)};
    }
}

/* What the case takes at least: see the head of this file. */
static void count_work(const attn_world *w, attn_case *c)
{
    const kn_kv_layout *l = &w->a.layout;
    double rows = 0, keys = 0, n_raw = ATTN_WINDOW + c->n_row - 1, stored;
    for (uint32_t p = c->context - c->n_row; p < c->context; p++) {
        uint32_t visible = (p + 1) / l->ratio;
        rows += visible;
        keys += ATTN_WINDOW + (l->ratio == 4 && visible > ATTN_TOPK ? ATTN_TOPK : visible);
    }
    stored = c->context / l->ratio;
    if (l->ratio == 4 && stored > (double)ATTN_TOPK * c->n_row) {
        stored = (double)ATTN_TOPK * c->n_row;
    }
    c->macs[OP_INDEX] = l->ratio == 4 ? c->n_seq * rows * INDEX_HEADS * INDEX_DIM : 0;
    c->macs[OP_ATTENTION] = c->n_seq * keys * ATTN_HEADS * ATTN_DIM * 2;
    c->bytes[OP_INDEX] = c->n_seq * (double)(c->context / l->ratio) * l->index_bytes;
    c->bytes[OP_ATTENTION] =
        c->n_seq * ((n_raw + stored) * l->row_bytes + 4.0 * c->n_row * ATTN_HEADS * ATTN_DIM);
}

static void run_index(attn_world *w, const bench_path *path)
{
    if (w->a.layout.ratio == 4) {
        kn_attention(path->device)
            ->index_topk(path->stream, &w->b, &w->a.layout, INDEX_HEADS, INDEX_DIM, ATTN_TOPK, ptr_of(w->iq),
                         ptr_of(w->w), ptr_of(w->picks));
    }
}

static void run_attention(attn_world *w, const bench_path *path)
{
    kn_ptr picks = w->a.layout.ratio == 4 ? ptr_of(w->picks) : (kn_ptr){0};
    kn_attention(path->device)
        ->attention(path->stream, &w->b, &w->a, ptr_of(w->q), ptr_of(w->rows), picks, ptr_of(w->o));
}

/* ---- check ---- */

/* Whether picks and outputs of the case's last row, poisoned before, are the oracle's. */
static bool check_case(attn_world *w, const attn_case *c, const bench_path *paths, uint32_t n_path,
                       const bench_path *ref)
{
    uint32_t last = c->n_seq * c->n_row - 1;
    uint64_t o_bytes = 2ull * ATTN_HEADS * ATTN_DIM, p_bytes = 4ull * ATTN_TOPK;
    uint8_t *o = (uint8_t *)w->o + last * o_bytes, *p = (uint8_t *)w->picks + last * p_bytes;
    uint8_t *want = cm_alloc(o_bytes + p_bytes);
    bool same = true;
    set_batch(w, c, 0);
    w->segs[0] = w->segs[c->n_seq - 1];
    w->segs[0].row0 = last;
    w->segs[0].pos0 = c->context - 1;
    w->segs[0].n_row = w->b.n_seg = w->b.n_row = 1;
    run_index(w, ref);
    run_attention(w, ref);
    memcpy(want, o, o_bytes);
    memcpy(want + o_bytes, p, p_bytes);
    for (uint32_t i = 0; i < n_path && same; i++) {
        set_batch(w, c, 0);
        memset(o, 0xff, o_bytes);
        memset(p, w->a.layout.ratio == 4 ? 0xff : 0, p_bytes);
        run_index(w, &paths[i]);
        run_attention(w, &paths[i]);
        same = memcmp(want, o, o_bytes) == 0 && memcmp(want + o_bytes, p, p_bytes) == 0;
        if (!same) {
            fprintf(stderr,
                    "ratio %u, context %u, %u rows: path %s does not give the oracle's values: not timed\n",
                    w->a.layout.ratio, c->context, w->b.n_row, kn_device_isa(paths[i].device));
        }
    }
    cm_free(want);
    return same;
}

/* All shapes at the shortest context, one row at the others: the oracle takes a second for a row. */
static bool check_cases(attn_world *w, const attn_case *cases, uint32_t n_case, const bench_path *paths,
                        uint32_t n_path, const kn_limits *limits)
{
    bench_path ref = bench_open_ref(limits);
    bool same = true;
    for (uint32_t i = 0; i < n_case && same; i++) {
        if (cases[i].context == cases[0].context || cases[i].n_row * cases[i].n_seq == 1) {
            cli_progress("checking context %u against the oracle", cases[i].context);
            same = check_case(w, &cases[i], paths, n_path, &ref);
        }
    }
    bench_close_paths(&ref, 1);
    cli_progress_clear();
    return same;
}

/* ---- rounds ---- */

/* Of the instructions that the path has: a path of 256 bits meets those. */
static void take_ceilings(const bench_config *config, bench_team *team, const uint8_t *data, uint64_t n_bytes,
                          const char *isa, ceilings *top)
{
    double all = (double)config->threads, start = bench_now(config), then;
    bool narrow = strcmp(isa, "avx2") == 0;
    bench_read(team, data, n_bytes);
    then = bench_now(config);
    bench_add(&top->read, (double)n_bytes / (then - start));
    (narrow ? bench_fma64_256 : bench_fma64)(team);
    start = bench_now(config);
    bench_add(&top->fma64,
              all * (double)(narrow ? bench_fma64_256_macs() : bench_fma64_macs()) / (start - then));
    if (strcmp(isa, "avx512vnni") == 0 || strcmp(isa, "avx512bf16") == 0) {
        top->scan_name = "vpdpbusd";
        bench_vnni(team);
        bench_add(&top->scan, all * (double)bench_vnni_macs() / (bench_now(config) - start));
    } else if (strcmp(isa, "portable") != 0) { /* twice as many bytes as pairs of them */
        top->scan_name = "vpmaddubsw + vpaddw";
        bench_madd(team);
        bench_add(&top->scan, 2 * all * (double)bench_madd_macs() / (bench_now(config) - start));
    } else {
        top->scan_name = "float32 multiply-add";
        bench_fma(team);
        bench_add(&top->scan, all * (double)bench_fma_macs() / (bench_now(config) - start));
    }
}

static double newest_of(const bench_samples *s)
{
    return s->value[s->n - 1];
}

static double longer(double a, double b)
{
    return a > b ? a : b;
}

static void time_case(attn_world *w, attn_case *c, uint32_t i_path, const bench_path *path,
                      const ceilings *top)
{
    uint32_t n = 1 + (uint32_t)(REPEAT_MACS / (c->macs[OP_INDEX] + c->macs[OP_ATTENTION]));
    double t[N_OP] = {0}, floor[N_OP];
    for (uint32_t i = 0; i < n; i++) {
        double start, then;
        set_batch(w, c, i);
        start = bench_now(w->config);
        run_index(w, path);
        then = bench_now(w->config);
        run_attention(w, path);
        t[OP_INDEX] += (then - start) / n;
        t[OP_ATTENTION] += (bench_now(w->config) - then) / n;
    }
    floor[OP_INDEX] =
        longer(c->bytes[OP_INDEX] / newest_of(&top->read), c->macs[OP_INDEX] / newest_of(&top->scan));
    floor[OP_ATTENTION] = longer(c->bytes[OP_ATTENTION] / newest_of(&top->read),
                                 c->macs[OP_ATTENTION] / newest_of(&top->fma64));
    t[OP_BOTH] = t[OP_INDEX] + t[OP_ATTENTION];
    floor[OP_BOTH] = floor[OP_INDEX] + floor[OP_ATTENTION];
    for (uint32_t op = 0; op < N_OP; op++) {
        bench_add(&c->seconds[i_path][op], t[op]);
        bench_add(&c->ratio[i_path][op], floor[op] > 0 ? t[op] / floor[op] : 0);
    }
}

static void run_rounds(attn_world *w, attn_case *cases, uint32_t n_case, const bench_path *paths,
                       uint32_t n_path, const uint8_t *data, ceilings *top)
{
    bench_team *team = bench_team_create((uint32_t)w->config->threads);
    uint64_t n_bytes = w->config->weight_bytes / 4096 * 4096;
    for (uint32_t round = 0; round < w->config->rounds; round++) {
        for (uint32_t i = 0; i < n_case; i++) {
            for (uint32_t p = 0; p < n_path; p++) {
                ceilings now = {0};
                cli_progress("ratio %u, round %u of %u, context %u", w->a.layout.ratio, round + 1,
                             (unsigned)w->config->rounds, cases[i].context);
                take_ceilings(w->config, team, data, n_bytes, kn_device_isa(paths[p].device), &now);
                time_case(w, &cases[i], p, &paths[p], &now);
                if (i == 0 && p == 0) {
                    top->scan_name = now.scan_name;
                    bench_add(&top->read, newest_of(&now.read));
                    bench_add(&top->fma64, newest_of(&now.fma64));
                    bench_add(&top->scan, newest_of(&now.scan));
                }
            }
        }
    }
    cli_progress_clear();
    bench_team_destroy(team);
}

/* ---- report ---- */

static void report_ceilings(const ceilings *top, json_t *report)
{
    bench_summary read = bench_summarize(&top->read), fma64 = bench_summarize(&top->fma64),
                  scan = bench_summarize(&top->scan);
    printf("ceilings of the run, of the first path: read %.1f GB/s (%.1f .. %.1f), double multiply-add %.1f "
           "GMAC/s (%.1f .. %.1f), "
           "%s %.0f GMAC/s (%.0f .. %.0f)\n",
           read.median / 1e9, read.min / 1e9, read.max / 1e9, fma64.median / 1e9, fma64.min / 1e9,
           fma64.max / 1e9, top->scan_name, scan.median / 1e9, scan.min / 1e9, scan.max / 1e9);
    printf("%-11s %5s %7s %9s  %-9s  %9s  %7s  %s\n", "path", "ratio", "context", "rows", "operation", "ms",
           "GMAC/s", "time / floor");
    json_object_set_new(report, "read_bytes_s", bench_summary_json(read));
    json_object_set_new(report, "fma64_mac_s", bench_summary_json(fma64));
    json_object_set_new(report, "scan_mac_s", bench_summary_json(scan));
}

static void report_case(const attn_world *w, const attn_case *c, uint32_t i_path, const bench_path *path,
                        json_t *report)
{
    const char *isa = kn_device_isa(path->device);
    char rows[32];
    snprintf(rows, sizeof(rows), "%u x %u", c->n_seq, c->n_row);
    for (uint32_t op = w->a.layout.ratio == 4 ? OP_INDEX : OP_ATTENTION; op < N_OP; op++) {
        bench_summary t = bench_summarize(&c->seconds[i_path][op]),
                      r = bench_summarize(&c->ratio[i_path][op]);
        double macs = op == OP_BOTH ? c->macs[OP_INDEX] + c->macs[OP_ATTENTION] : c->macs[op];
        if (op == OP_BOTH && w->a.layout.ratio != 4) {
            continue;
        }
        printf("%-11s %5u %7u %9s  %-9s  %9.3f  %7.1f  %.2f (%.2f .. %.2f)\n", isa, w->a.layout.ratio,
               c->context, rows, OP_NAMES[op], 1e3 * t.median, macs / t.median / 1e9, r.median, r.min, r.max);
        json_array_append_new(json_object_get(report, "results"),
                              json_pack("{s:s, s:i, s:i, s:i, s:i, s:s, s:o, s:o}", "path", isa, "ratio",
                                        (int)w->a.layout.ratio, "context", (int)c->context, "sequences",
                                        (int)c->n_seq, "rows", (int)c->n_row, "operation", OP_NAMES[op],
                                        "seconds", bench_summary_json(t), "time_over_floor",
                                        bench_summary_json(r)));
    }
}

/* ---- the benchmark ---- */

static const struct {
    uint32_t n_seq, n_row;
} SHAPES[] = {{1, 1}, {N_SEQ, 1}, {1, CHUNK}};
static const uint32_t CONTEXTS[] = {1 << 13, 1 << 15, CONTEXT_MAX};
enum { N_SHAPE = 3, N_CONTEXT = 3, N_CASE = N_SHAPE * N_CONTEXT, N_WORLD = 2 };

static void list_cases(const attn_world *w, attn_case *cases)
{
    for (uint32_t i = 0; i < N_CASE; i++) {
        cases[i].context = CONTEXTS[i / N_SHAPE];
        cases[i].n_seq = SHAPES[i % N_SHAPE].n_seq;
        cases[i].n_row = SHAPES[i % N_SHAPE].n_row;
        count_work(w, &cases[i]);
    }
}

static bool run_world(attn_world *w, attn_case *cases, const bench_path *paths, uint32_t n_path,
                      const kn_limits *limits, const uint8_t *data, ceilings *top)
{
    bool ok;
    list_cases(w, cases);
    ok = check_cases(w, cases, N_CASE, paths, n_path, limits);
    if (ok) {
        run_rounds(w, cases, N_CASE, paths, n_path, data, top);
    }
    return ok;
}

static const uint32_t RATIOS[N_WORLD] = {4, 128};
static const kn_limits LIMITS = {.n_row = CHUNK,
                                 .n_in = 128,
                                 .n_inner = 128,
                                 .n_head = ATTN_HEADS,
                                 .head_dim = ATTN_DIM,
                                 .n_key = ATTN_WINDOW +
                                          (CONTEXT_MAX / 128 > ATTN_TOPK ? CONTEXT_MAX / 128 : ATTN_TOPK),
                                 .n_index_row = CONTEXT_MAX / 4,
                                 .n_expert = 1};

static int attn_run(const bench *b, const bench_config *config)
{
    bench_path paths[BENCH_PATHS_MAX] = {0};
    ceilings top = {0};
    attn_world *worlds = cm_alloc(N_WORLD * sizeof(*worlds));
    attn_case *cases = cm_alloc(N_WORLD * N_CASE * sizeof(*cases));
    uint32_t n_path = bench_fma_macs() > 0 ? bench_open_paths(config, &LIMITS, paths) : 0;
    bool ok = n_path > 0;
    if (ok) {
        uint8_t *data = cm_alloc_aligned(config->weight_bytes);
        memset(data, 1, config->weight_bytes);
        json_t *report = bench_begin(b, config);
        for (uint32_t i = 0; i < N_WORLD && ok; i++) {
            world_open(&worlds[i], config, RATIOS[i], &paths[0]);
            ok = run_world(&worlds[i], cases + i * N_CASE, paths, n_path, &LIMITS, data,
                           i == 0 ? &top : &(ceilings){0});
            world_close(&worlds[i]);
        }
        if (ok) {
            report_ceilings(&top, report);
            for (uint32_t p = 0; p < n_path; p++) {
                for (uint32_t i = 0; i < N_WORLD * N_CASE; i++) {
                    report_case(&worlds[i / N_CASE], &cases[i], p, &paths[p], report);
                }
            }
            bench_end(report);
        } else {
            json_decref(report);
        }
        cm_free(data);
        bench_close_paths(paths, n_path);
    }
    cm_free(worlds);
    cm_free(cases);
    return ok ? CLI_OK : CLI_FAILED;
}

const bench bench_indexer_attn = {
    "cpu.indexer_attn", "indexer and attention of a layer at 8K to 128K tokens, against the arithmetic",
    attn_run};
