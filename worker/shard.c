#include "worker/shard.h"

#include <pthread.h>
#include <stdatomic.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/base/clock.h"
#include "common/base/failpoint.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/stats.h"

enum {
    SHARD_PROGRESS_MS = 2000,
    SHARD_TOUCH_BYTES = 4096,     /* no page is smaller */
    SHARD_AHEAD_BYTES = 64 << 20, /* on their way from the disk while experts before them are laid out */
    SHARD_THREADS_MAX = 64,
};

typedef struct shard_entry {
    kn_expert weights;
    kn_ptr copy;  /* the weights in the device's own order, if it has one */
    bool checked; /* its values are good; job thread's */
    bool placed;  /* weights can be used */
    _Atomic bool held;
} shard_entry;

struct wk_shard {
    const md_checkpoint *checkpoint;
    const md_geometry *geometry;
    kn_device *device;
    uint32_t n_threads;   /* of the first load */
    shard_entry *entries; /* [md_block_count * n_expert] */
    _Atomic uint32_t n_held;
    _Atomic bool stopping;
    bool served;          /* a load was complete once; job thread's */
    _Atomic bool let_go;  /* since the last release an expert was */
    pthread_mutex_t lock; /* for weights, copy and placed of entries that are not held */
};

cm_status wk_shard_create(const md_checkpoint *checkpoint, kn_device *device, uint32_t n_threads,
                          wk_shard **shard_out)
{
    const md_geometry *g = md_checkpoint_geometry(checkpoint);
    wk_shard *shard = cm_alloc(sizeof(*shard));
    shard->checkpoint = checkpoint;
    shard->geometry = g;
    shard->device = device;
    shard->n_threads = n_threads < SHARD_THREADS_MAX ? n_threads : SHARD_THREADS_MAX;
    shard->entries = cm_alloc(sizeof(shard_entry) * (size_t)md_block_count(g) * g->n_expert);
    pthread_mutex_init(&shard->lock, NULL);
    *shard_out = shard;
    return CM_OK;
}

static size_t shard_size(const wk_shard *shard)
{
    return (size_t)md_block_count(shard->geometry) * shard->geometry->n_expert;
}

void wk_shard_destroy(wk_shard *shard)
{
    for (size_t i = 0; i < shard_size(shard); i++) {
        kn_mem_free(shard->device, shard->entries[i].copy);
    }
    pthread_mutex_destroy(&shard->lock);
    cm_free(shard->entries);
    cm_free(shard);
}

/* Each has a weight and a scale: the six tensors of an expert. */
static const char *const g_matrices[] = {"w1", "w3", "w2"};

static const md_tensor *shard_tensor(const wk_shard *shard, uint32_t layer, uint32_t expert,
                                     const char *matrix, const char *part)
{
    char block[MD_BLOCK_NAME_MAX];
    md_block_name(shard->geometry, layer, block);
    return md_checkpoint_tensor(shard->checkpoint, "%sffn.experts.%u.%s.%s", block, expert, matrix, part);
}

/* Has the disk begin with an expert that will be read soon. */
static void shard_announce(const wk_shard *shard, uint32_t layer, uint32_t expert)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (uint32_t i = 0; i < 6; i++) {
        const md_tensor *t =
            shard_tensor(shard, layer, expert, g_matrices[i / 2], i % 2 == 0 ? "weight" : "scale");
        uintptr_t at = (uintptr_t)t->data / page * page;
        madvise((void *)at, (uintptr_t)t->data + t->n_bytes - at, MADV_WILLNEED); /* advice: no harm if not */
    }
}

/* A byte of each page: rows must not wait for the disk in the middle of a step. */
static void shard_read_through(const md_tensor *tensor)
{
    const volatile uint8_t *data = tensor->data;
    for (uint64_t i = 0; i < tensor->n_bytes; i += SHARD_TOUCH_BYTES) {
        (void)data[i];
    }
    (void)data[tensor->n_bytes - 1];
}

static cm_status shard_read_expert(wk_shard *shard, uint32_t layer, uint32_t expert, cm_error *err)
{
    shard_entry *entry = &shard->entries[(size_t)layer * shard->geometry->n_expert + expert];
    for (uint32_t i = 0; i < 6; i++) {
        const md_tensor *tensor =
            shard_tensor(shard, layer, expert, g_matrices[i / 2], i % 2 == 0 ? "weight" : "scale");
        shard_read_through(tensor);
        if (!entry->checked) {
            CM_TRY(md_tensor_check_values(tensor, shard->geometry, err));
        }
    }
    entry->checked = true;
    return CM_OK;
}

static cm_status shard_place_matrix(wk_shard *shard, uint32_t layer, uint32_t expert, const char *name,
                                    kn_matrix *matrix_out, cm_error *err)
{
    const md_tensor *weight = shard_tensor(shard, layer, expert, name, "weight");
    const md_tensor *scale = shard_tensor(shard, layer, expert, name, "scale");
    bool fp4 = weight->dtype == MD_I8;
    kn_matrix matrix = {
        .n_out = (uint32_t)weight->dim[0],
        .n_in = (uint32_t)weight->dim[1] * (fp4 ? 2 : 1),
        .dtype = fp4 ? KN_E2M1 : KN_E4M3,
        .scale_dtype = scale->dtype == MD_F32 ? KN_F32 : KN_E8M0,
    };
    if (kn_mem_place(shard->device, weight->data, weight->n_bytes, &matrix.data) != CM_OK ||
        kn_mem_place(shard->device, scale->data, scale->n_bytes, &matrix.scale) != CM_OK) {
        return cm_error_set(err, CM_E_MEMORY, weight->name, "no device memory for %s", weight->name);
    }
    *matrix_out = matrix;
    return CM_OK;
}

/* Where the device has an order of its own the expert becomes a copy, and its pages of the mapping can go. */
static cm_status shard_prepare(wk_shard *shard, kn_expert *weights, kn_ptr *copy_out, cm_error *err)
{
    kn_matrix *matrices[] = {&weights->w1, &weights->w3, &weights->w2};
    uint64_t n_bytes = 0, at = 0;
    for (uint32_t i = 0; i < 3; i++) {
        n_bytes += kn_prepared_bytes(shard->device, matrices[i]);
    }
    if (n_bytes == 0) {
        return CM_OK;
    }
    if (kn_mem_alloc(shard->device, n_bytes, copy_out) != CM_OK) {
        return cm_error_set(err, CM_E_MEMORY, "expert_bytes_max",
                            "no memory for the %llu bytes of another expert", (unsigned long long)n_bytes);
    }
    for (uint32_t i = 0; i < 3; i++) {
        uint64_t size = kn_prepared_bytes(shard->device, matrices[i]);
        kn_prepare(shard->device, matrices[i], kn_at(*copy_out, at));
        at += size;
    }
    return CM_OK;
}

/* The checkpoint's own pages of what has been copied: read again from the file should anyone ask. */
static void shard_forget(const wk_shard *shard, uint32_t layer, uint32_t expert)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (uint32_t i = 0; i < 3; i++) {
        const md_tensor *t = shard_tensor(shard, layer, expert, g_matrices[i], "weight");
        uintptr_t from = ((uintptr_t)t->data + page - 1) / page * page;
        uintptr_t to = ((uintptr_t)t->data + t->n_bytes) / page * page;
        if (from < to) {
            (void)madvise((void *)from, to - from, MADV_DONTNEED); /* advice */
        }
    }
}

/* Into values of the caller: nobody knows them yet, so several may be at it. */
static cm_status shard_place(wk_shard *shard, uint32_t layer, uint32_t expert, kn_expert *weights_out,
                             kn_ptr *copy_out, cm_error *err)
{
    CM_TRY(shard_place_matrix(shard, layer, expert, "w1", &weights_out->w1, err));
    CM_TRY(shard_place_matrix(shard, layer, expert, "w3", &weights_out->w3, err));
    CM_TRY(shard_place_matrix(shard, layer, expert, "w2", &weights_out->w2, err));
    CM_TRY(shard_prepare(shard, weights_out, copy_out, err));
    if (copy_out->addr != 0) {
        shard_forget(shard, layer, expert);
    }
    return CM_OK;
}

static void shard_hold(wk_shard *shard, shard_entry *entry)
{
    atomic_store(&entry->held, true);
    atomic_fetch_add(&shard->n_held, 1);
}

/* A copy that was let go and is still there needs nothing of the checkpoint; false: there is none. */
static bool shard_hold_copy(wk_shard *shard, shard_entry *entry)
{
    pthread_mutex_lock(&shard->lock);
    bool there = entry->copy.addr != 0;
    if (there) {
        shard_hold(shard, entry);
    }
    pthread_mutex_unlock(&shard->lock);
    return there;
}

static cm_status shard_load_expert(wk_shard *shard, uint32_t layer, uint32_t expert, cm_error *err)
{
    shard_entry *entry = &shard->entries[(size_t)layer * shard->geometry->n_expert + expert];
    if (cm_failpoint_fires(CM_FAILPOINT_worker_load_stops)) {
        raise(SIGSTOP);
    }
    bool again = shard->served && cm_failpoint_fires(CM_FAILPOINT_worker_load_again_fails);
    if (again || cm_failpoint_fires(CM_FAILPOINT_worker_load_fails)) {
        return cm_error_set(err, CM_E_IO, "", "layer %u expert %u: load failed by a failpoint", layer,
                            expert);
    }
    if (shard_hold_copy(shard, entry)) {
        return CM_OK;
    }
    CM_TRY(shard_read_expert(shard, layer, expert, err));
    kn_expert weights = {0};
    kn_ptr copy = {0};
    bool placed = entry->placed; /* no copy, so release leaves it alone */
    if (!placed) {
        CM_TRY(shard_place(shard, layer, expert, &weights, &copy, err));
    }
    pthread_mutex_lock(&shard->lock);
    if (!placed) {
        entry->weights = weights;
        entry->copy = copy;
        entry->placed = true;
    }
    shard_hold(shard, entry);
    pthread_mutex_unlock(&shard->lock);
    return CM_OK;
}

cm_status wk_shard_warm(wk_shard *shard, uint32_t layer, uint32_t expert, cm_error *err)
{
    if (atomic_load(&shard->stopping)) {
        return cm_error_set(err, CM_E_CANCELLED, "", "stopping");
    }
    shard_announce(shard, layer, expert);
    return shard_read_expert(shard, layer, expert, err);
}

/* ---- one load ---- */

typedef struct shard_load {
    wk_shard *shard;
    uint32_t *pairs; /* [n] layer * n_expert + expert, in the order of the files */
    uint32_t n, n_ahead;
    _Atomic uint32_t next, announced; /* of pairs */
    _Atomic bool failed;
    pthread_mutex_t lock; /* for status and err */
    cm_status status;     /* the first that went wrong */
    cm_error err;
    _Atomic uint64_t told_ms;
} shard_load;

static void load_announce(shard_load *l, uint32_t i)
{
    uint32_t n_expert = l->shard->geometry->n_expert;
    uint32_t until = l->n - i < l->n_ahead ? l->n : i + l->n_ahead, at = atomic_load(&l->announced);
    while (at < until) {
        if (atomic_compare_exchange_weak(&l->announced, &at, at + 1)) {
            shard_announce(l->shard, l->pairs[at] / n_expert, l->pairs[at] % n_expert);
            at++;
        }
    }
}

static void load_tell(shard_load *l, uint32_t i)
{
    uint64_t now = cm_now_ms(), told = atomic_load(&l->told_ms);
    if (now - told >= SHARD_PROGRESS_MS && atomic_compare_exchange_strong(&l->told_ms, &told, now)) {
        cm_info("loading experts: %u of %u", i, l->n);
    }
}

static void load_fail(shard_load *l, cm_status status, const cm_error *err)
{
    pthread_mutex_lock(&l->lock);
    if (l->status == CM_OK) {
        l->status = status;
        l->err = *err;
    }
    pthread_mutex_unlock(&l->lock);
    atomic_store(&l->failed, true);
}

static void *load_some(void *arg)
{
    shard_load *l = arg;
    uint32_t i, n_expert = l->shard->geometry->n_expert;
    while (!atomic_load(&l->failed) && (i = atomic_fetch_add(&l->next, 1)) < l->n) {
        cm_error err = {0};
        load_announce(l, i);
        cm_status status =
            atomic_load(&l->shard->stopping)
                ? cm_error_set(&err, CM_E_CANCELLED, "", "stopping")
                : shard_load_expert(l->shard, l->pairs[i] / n_expert, l->pairs[i] % n_expert, &err);
        if (status != CM_OK) {
            load_fail(l, status, &err);
        }
        load_tell(l, i);
    }
    return NULL;
}

/* Before anything is served the compute threads have nothing to do, so there are as many at it as those;
 * afterwards one, beside them. */
static void load_all(shard_load *l)
{
    pthread_t threads[SHARD_THREADS_MAX];
    uint32_t n = l->shard->served ? 1 : l->shard->n_threads, n_started = 0;
    while (n_started + 1 < n && pthread_create(&threads[n_started], NULL, load_some, l) == 0) {
        n_started++; /* with fewer it takes longer */
    }
    load_some(l);
    for (uint32_t i = 0; i < n_started; i++) {
        pthread_join(threads[i], NULL);
    }
}

static void load_list(shard_load *l, const pr_placement *placement, uint32_t rank)
{
    const md_geometry *g = l->shard->geometry;
    l->pairs = cm_alloc(sizeof(uint32_t) * pr_placement_count(placement, rank));
    for (uint32_t layer = 0; layer < md_block_count(g); layer++) {
        for (uint32_t e = 0; e < g->n_expert; e++) {
            if (pr_placement_owns(placement, layer, e, rank) && wk_shard_expert(l->shard, layer, e) == NULL) {
                l->pairs[l->n++] = layer * g->n_expert + e;
            }
        }
    }
}

cm_status wk_shard_load(wk_shard *shard, const pr_placement *placement, uint32_t rank, cm_error *err)
{
    uint64_t start_ms = cm_now_ms(), expert_bytes = md_expert_bytes(shard->geometry);
    shard_load l = {
        .shard = shard, .n_ahead = 1 + (uint32_t)(SHARD_AHEAD_BYTES / expert_bytes), .told_ms = start_ms};
    pthread_mutex_init(&l.lock, NULL);
    load_list(&l, placement, rank);
    load_all(&l);
    pthread_mutex_destroy(&l.lock);
    cm_free(l.pairs);
    if (l.status != CM_OK) {
        *err = l.err;
        return l.status;
    }
    shard->served = true;
    cm_stat_set(CM_STAT_worker_experts, wk_shard_count(shard));
    if (l.n > 0) {
        cm_info("loaded %u experts, %llu MB, in %llu ms; %u held", l.n,
                (unsigned long long)(l.n * expert_bytes >> 20), (unsigned long long)(cm_now_ms() - start_ms),
                wk_shard_count(shard));
    }
    return CM_OK;
}

void wk_shard_keep(wk_shard *shard, const pr_placement *const *placements, const uint32_t *ranks, uint32_t n)
{
    const md_geometry *g = shard->geometry;
    for (uint32_t layer = 0; layer < md_block_count(g); layer++) {
        for (uint32_t e = 0; e < g->n_expert; e++) {
            shard_entry *entry = &shard->entries[(size_t)layer * g->n_expert + e];
            bool wanted = false;
            for (uint32_t i = 0; i < n && !wanted; i++) {
                wanted = pr_placement_owns(placements[i], layer, e, ranks[i]);
            }
            if (!wanted && atomic_load(&entry->held)) {
                atomic_store(&entry->held, false);
                atomic_fetch_sub(&shard->n_held, 1);
                atomic_store(&shard->let_go, true);
            }
        }
    }
    cm_stat_set(CM_STAT_worker_experts, wk_shard_count(shard));
}

void wk_shard_release(wk_shard *shard)
{
    if (!atomic_load(&shard->let_go) || pthread_mutex_trylock(&shard->lock) != 0) {
        return; /* nothing to do, or a load is at it: next time */
    }
    atomic_store(&shard->let_go, false);
    for (size_t i = 0; i < shard_size(shard); i++) {
        shard_entry *entry = &shard->entries[i];
        if (entry->copy.addr != 0 && !atomic_load(&entry->held)) {
            kn_mem_free(shard->device, entry->copy);
            entry->copy = (kn_ptr){0};
            entry->placed = false;
        }
    }
    pthread_mutex_unlock(&shard->lock);
}

const kn_expert *wk_shard_expert(const wk_shard *shard, uint32_t layer, uint32_t expert)
{
    const shard_entry *entry = &shard->entries[(size_t)layer * shard->geometry->n_expert + expert];
    return atomic_load(&entry->held) ? &entry->weights : NULL;
}

const kn_expert *wk_shard_weights(const wk_shard *shard, uint32_t layer, uint32_t expert)
{
    return &shard->entries[(size_t)layer * shard->geometry->n_expert + expert].weights;
}

void wk_shard_stop(wk_shard *shard)
{
    atomic_store(&shard->stopping, true);
}

uint32_t wk_shard_count(const wk_shard *shard)
{
    return atomic_load(&shard->n_held);
}
