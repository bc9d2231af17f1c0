#include "worker/shard.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/failpoint.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/stats.h"
#include "common/model/load.h"

enum {
    SHARD_PROGRESS_MS = 2000,
    SHARD_TENSORS = 6,            /* of an expert */
    SHARD_BLOCK_BYTES = 32 << 20, /* small experts share a block, so that they too stand in huge pages */
    SHARD_BLOCK_MAX = 64,         /* experts of a block */
};

/* Memory of so many copies as shard.per_block says. */
typedef struct shard_block {
    kn_ptr memory;
    uint64_t used; /* a bit for each; 0: there is no memory */
} shard_block;

typedef struct shard_entry {
    kn_expert weights;
    kn_ptr copy;    /* the weights in the device's own order, if it has one */
    uint32_t block; /* where the copy stands */
    bool warm;      /* was read ahead; job thread's */
    bool placed;    /* weights can be used */
    _Atomic bool held;
} shard_entry;

struct wk_shard {
    const md_checkpoint *checkpoint;
    const md_geometry *geometry;
    kn_device *device;
    uint32_t n_threads;   /* of the first load */
    uint64_t copy_bytes;  /* of one expert in the device's order; 0: it has none */
    uint32_t per_block;   /* copies of a block */
    shard_entry *entries; /* [md_block_count * n_expert] */
    _Atomic uint32_t n_held;
    _Atomic bool stopping;
    bool served;         /* a load was complete once; job thread's */
    _Atomic bool let_go; /* since the last release an expert was */
    pthread_mutex_t
        lock; /* for weights, copy, block and placed of entries that are not held, and for blocks */
    shard_block *blocks;          /* [n_block] */
    uint32_t n_block, first_room; /* no block before first_room has room */
};

static size_t shard_size(const wk_shard *shard)
{
    return (size_t)md_block_count(shard->geometry) * shard->geometry->n_expert;
}

/* w1, w3 and w2, each with its weight and behind it its scale. Returns how many. */
static uint32_t shard_find(const wk_shard *shard, uint32_t layer, uint32_t expert,
                           const md_tensor *tensors_out[SHARD_TENSORS])
{
    static const char *const names[] = {"w1.weight", "w1.scale",  "w3.weight",
                                        "w3.scale",  "w2.weight", "w2.scale"};
    char block[MD_BLOCK_NAME_MAX];
    md_block_name(shard->geometry, layer, block);
    for (uint32_t i = 0; i < SHARD_TENSORS; i++) {
        tensors_out[i] =
            md_checkpoint_tensor(shard->checkpoint, "%sffn.experts.%u.%s", block, expert, names[i]);
    }
    return SHARD_TENSORS;
}

static void shard_tensors(const wk_shard *shard, uint32_t layer, uint32_t expert,
                          md_tensor tensors_out[SHARD_TENSORS])
{
    const md_tensor *found[SHARD_TENSORS];
    shard_find(shard, layer, expert, found);
    for (uint32_t i = 0; i < SHARD_TENSORS; i++) {
        tensors_out[i] = *found[i];
    }
}

/* Its shape. */
static void shard_matrix(const md_tensor *weight, const md_tensor *scale, kn_matrix *matrix_out)
{
    bool fp4 = weight->dtype == MD_I8;
    *matrix_out = (kn_matrix){
        .n_out = (uint32_t)weight->dim[0],
        .n_in = (uint32_t)weight->dim[1] * (fp4 ? 2 : 1),
        .dtype = fp4 ? KN_E2M1 : KN_E4M3,
        .scale_dtype = scale->dtype == MD_F32 ? KN_F32 : KN_E8M0,
    };
}

/* ---- creating ---- */

/* All experts of a model have the same shape. */
static void shard_plan_blocks(wk_shard *shard)
{
    md_tensor tensors[SHARD_TENSORS];
    kn_matrix matrix;
    shard_tensors(shard, 0, 0, tensors);
    for (uint32_t i = 0; i < SHARD_TENSORS; i += 2) {
        shard_matrix(&tensors[i], &tensors[i + 1], &matrix);
        shard->copy_bytes += kn_prepared_bytes(shard->device, &matrix);
    }
    uint64_t n = shard->copy_bytes > 0 ? SHARD_BLOCK_BYTES / shard->copy_bytes : 1;
    shard->per_block = n < 1 ? 1 : n < SHARD_BLOCK_MAX ? (uint32_t)n : SHARD_BLOCK_MAX;
}

cm_status wk_shard_create(const md_checkpoint *checkpoint, kn_device *device, uint32_t n_threads,
                          wk_shard **shard_out)
{
    const md_geometry *g = md_checkpoint_geometry(checkpoint);
    wk_shard *shard = cm_alloc(sizeof(*shard));
    shard->checkpoint = checkpoint;
    shard->geometry = g;
    shard->device = device;
    shard->n_threads = n_threads;
    shard->entries = cm_alloc(sizeof(shard_entry) * (size_t)md_block_count(g) * g->n_expert);
    shard_plan_blocks(shard);
    pthread_mutex_init(&shard->lock, NULL);
    *shard_out = shard;
    return CM_OK;
}

void wk_shard_destroy(wk_shard *shard)
{
    for (uint32_t i = 0; i < shard->n_block; i++) {
        kn_mem_free(shard->device, shard->blocks[i].memory);
    }
    pthread_mutex_destroy(&shard->lock);
    cm_free(shard->blocks);
    cm_free(shard->entries);
    cm_free(shard);
}

/* ---- memory for copies ---- */

static uint64_t block_full(const wk_shard *shard)
{
    return UINT64_MAX >> (64 - shard->per_block);
}

/* Under the lock. */
static cm_status copy_take(wk_shard *shard, kn_ptr *copy_out, uint32_t *block_out)
{
    uint32_t i = shard->first_room;
    while (i < shard->n_block && shard->blocks[i].used == block_full(shard)) {
        i++;
    }
    if (i == shard->n_block) {
        shard->blocks = cm_realloc(shard->blocks, sizeof(shard_block) * (i + 1));
        shard->blocks[i] = (shard_block){0};
        shard->n_block++;
    }
    shard->first_room = i;
    shard_block *block = &shard->blocks[i];
    if (block->used == 0) {
        CM_TRY(kn_mem_alloc(shard->device, shard->copy_bytes * shard->per_block, &block->memory));
    }
    uint32_t slot = (uint32_t)__builtin_ctzll(~block->used);
    block->used |= 1ull << slot;
    *copy_out = kn_at(block->memory, slot * shard->copy_bytes);
    *block_out = i;
    return CM_OK;
}

/* Under the lock. */
static void copy_give(wk_shard *shard, kn_ptr copy, uint32_t i)
{
    shard_block *block = &shard->blocks[i];
    uint64_t slot = (copy.addr - block->memory.addr) / shard->copy_bytes;
    CM_ASSERT((block->used >> slot & 1) != 0);
    block->used &= ~(1ull << slot);
    if (block->used == 0) {
        kn_mem_free(shard->device, block->memory);
        block->memory = (kn_ptr){0};
    }
    shard->first_room = i < shard->first_room ? i : shard->first_room;
}

/* ---- one expert ---- */

/* Its matrices where the tensors' data is. */
static cm_status expert_place(wk_shard *shard, const md_tensor *tensors, kn_expert *weights_out)
{
    kn_matrix *matrices[] = {&weights_out->w1, &weights_out->w3, &weights_out->w2};
    for (uint32_t i = 0; i < SHARD_TENSORS; i += 2) {
        kn_matrix *m = matrices[i / 2];
        shard_matrix(&tensors[i], &tensors[i + 1], m);
        CM_TRY(kn_mem_place(shard->device, tensors[i].data, tensors[i].n_bytes, &m->data));
        CM_TRY(kn_mem_place(shard->device, tensors[i + 1].data, tensors[i + 1].n_bytes, &m->scale));
    }
    return CM_OK;
}

/* A copy in the device's order, made from read, which may be a buffer. E4M3 scales are used later on too:
 * where the checkpoint's tensors are mapped. */
static cm_status expert_prepare(wk_shard *shard, const md_tensor *tensors, const md_tensor *read, kn_ptr copy,
                                kn_expert *weights_out)
{
    kn_matrix *matrices[] = {&weights_out->w1, &weights_out->w3, &weights_out->w2};
    kn_expert mapped;
    const kn_matrix *theirs[] = {&mapped.w1, &mapped.w3, &mapped.w2};
    uint64_t at = 0;
    CM_TRY(expert_place(shard, tensors, &mapped));
    CM_TRY(expert_place(shard, read, weights_out));
    for (uint32_t i = 0; i < 3; i++) {
        uint64_t n_bytes = kn_prepared_bytes(shard->device, matrices[i]);
        kn_prepare(shard->device, matrices[i], kn_at(copy, at));
        matrices[i]->scale = theirs[i]->scale;
        at += n_bytes;
    }
    CM_ASSERT(at == shard->copy_bytes);
    return CM_OK;
}

static cm_status expert_check(const wk_shard *shard, const md_tensor *read, cm_error *err)
{
    for (uint32_t i = 0; i < SHARD_TENSORS; i++) {
        CM_TRY(md_tensor_check_values(&read[i], shard->geometry, err));
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

static cm_status load_refusal(wk_shard *shard, uint32_t layer, uint32_t expert, cm_error *err)
{
    if (atomic_load(&shard->stopping)) {
        return cm_error_set(err, CM_E_CANCELLED, "", "stopping");
    }
    if (cm_failpoint_fires(CM_FAILPOINT_worker_load_stops)) {
        raise(SIGSTOP);
    }
    bool again = shard->served && cm_failpoint_fires(CM_FAILPOINT_worker_load_again_fails);
    if (again || cm_failpoint_fires(CM_FAILPOINT_worker_load_fails)) {
        return cm_error_set(err, CM_E_IO, "", "layer %u expert %u: load failed by a failpoint", layer,
                            expert);
    }
    return CM_OK;
}

/* Into values of the caller: nobody knows them yet, so several may be at it. */
static cm_status load_copy(wk_shard *shard, const shard_entry *entry, const md_tensor *tensors,
                           md_reader *reader, shard_entry *loaded, cm_error *err)
{
    md_tensor read[SHARD_TENSORS];
    memcpy(read, tensors, sizeof(read));
    CM_TRY(md_reader_read(reader, read, SHARD_TENSORS, entry->warm, err));
    CM_TRY(expert_check(shard, read, err));
    for (uint32_t i = 1; i < SHARD_TENSORS && tensors[0].dtype == MD_F8_E4M3; i += 2) {
        md_reader_keep(reader, &tensors[i]);
    }
    pthread_mutex_lock(&shard->lock);
    cm_status status = copy_take(shard, &loaded->copy, &loaded->block);
    pthread_mutex_unlock(&shard->lock);
    if (status != CM_OK) {
        goto err;
    }
    status = expert_prepare(shard, tensors, read, loaded->copy, &loaded->weights);
    if (status != CM_OK) {
        goto err_give;
    }
    return CM_OK;

err_give:
    pthread_mutex_lock(&shard->lock);
    copy_give(shard, loaded->copy, loaded->block);
    pthread_mutex_unlock(&shard->lock);
err:
    return cm_error_set(err, status, "expert_bytes_max", "no memory for the %llu bytes of another expert",
                        (unsigned long long)shard->copy_bytes);
}

static cm_status load_mapped(wk_shard *shard, const md_tensor *tensors, md_reader *reader,
                             shard_entry *loaded, cm_error *err)
{
    for (uint32_t i = 0; i < SHARD_TENSORS; i++) {
        md_reader_keep(reader, &tensors[i]);
    }
    CM_TRY(expert_check(shard, tensors, err));
    return expert_place(shard, tensors, &loaded->weights) == CM_OK
               ? CM_OK
               : cm_error_set(err, CM_E_MEMORY, tensors[0].name, "no device memory for %s", tensors[0].name);
}

static cm_status shard_load_expert(wk_shard *shard, uint32_t layer, uint32_t expert, md_reader *reader,
                                   cm_error *err)
{
    shard_entry *entry = &shard->entries[(size_t)layer * shard->geometry->n_expert + expert];
    md_tensor tensors[SHARD_TENSORS];
    shard_entry loaded = {0};
    CM_TRY(load_refusal(shard, layer, expert, err));
    if (shard_hold_copy(shard, entry)) {
        return CM_OK;
    }
    shard_tensors(shard, layer, expert, tensors);
    CM_TRY(shard->copy_bytes > 0 ? load_copy(shard, entry, tensors, reader, &loaded, err)
                                 : load_mapped(shard, tensors, reader, &loaded, err));
    pthread_mutex_lock(&shard->lock);
    if (!entry->placed) { /* what is mapped stays where it is for good */
        entry->weights = loaded.weights;
        entry->copy = loaded.copy;
        entry->block = loaded.block;
        entry->placed = true;
    }
    shard_hold(shard, entry);
    pthread_mutex_unlock(&shard->lock);
    return CM_OK;
}

/* ---- reading ahead ---- */

typedef struct warm_load {
    wk_shard *shard;
    uint32_t layer, expert;
} warm_load;

static cm_status warm_item(void *ctx, uint32_t i, md_reader *reader, cm_error *err)
{
    const warm_load *w = ctx;
    md_tensor tensors[SHARD_TENSORS];
    (void)i;
    shard_tensors(w->shard, w->layer, w->expert, tensors);
    for (uint32_t k = 0; k < SHARD_TENSORS; k++) {
        md_reader_keep(reader, &tensors[k]);
    }
    return expert_check(w->shard, tensors, err);
}

cm_status wk_shard_warm(wk_shard *shard, uint32_t layer, uint32_t expert, cm_error *err)
{
    warm_load w = {.shard = shard, .layer = layer, .expert = expert};
    md_load_bytes bytes;
    if (atomic_load(&shard->stopping)) {
        return cm_error_set(err, CM_E_CANCELLED, "", "stopping");
    }
    CM_TRY(md_load_run(&(md_load){.n_item = 1, .n_threads = 1, .item = warm_item, .ctx = &w}, &bytes, err));
    shard->entries[(size_t)layer * shard->geometry->n_expert + expert].warm = true;
    return CM_OK;
}

/* ---- one load ---- */

typedef struct shard_load {
    wk_shard *shard;
    uint32_t *pairs; /* [n] layer * n_expert + expert, in the order of the files */
    uint32_t n;
    _Atomic uint64_t told_ms;
} shard_load;

static void load_tell(shard_load *l, uint32_t i)
{
    uint64_t now = cm_now_ms(), told = atomic_load(&l->told_ms);
    if (now - told >= SHARD_PROGRESS_MS && atomic_compare_exchange_strong(&l->told_ms, &told, now)) {
        cm_info("loading experts: %u of %u", i, l->n);
    }
}

static cm_status load_item(void *ctx, uint32_t i, md_reader *reader, cm_error *err)
{
    shard_load *l = ctx;
    uint32_t n_expert = l->shard->geometry->n_expert;
    CM_TRY(shard_load_expert(l->shard, l->pairs[i] / n_expert, l->pairs[i] % n_expert, reader, err));
    load_tell(l, i);
    return CM_OK;
}

static uint32_t load_kept(void *ctx, uint32_t i, const md_tensor *tensors_out[MD_LOAD_TENSORS_MAX])
{
    const shard_load *l = ctx;
    uint32_t n_expert = l->shard->geometry->n_expert;
    return shard_find(l->shard, l->pairs[i] / n_expert, l->pairs[i] % n_expert, tensors_out);
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

static void load_report(const shard_load *l, const md_load_bytes *bytes, uint64_t start_ms)
{
    uint64_t expert_bytes = md_expert_bytes(l->shard->geometry);
    if (l->n > 0) {
        cm_info("loaded %u experts, %llu MB, in %llu ms, of them %llu MB from the page cache; %u held", l->n,
                (unsigned long long)(l->n * expert_bytes >> 20), (unsigned long long)(cm_now_ms() - start_ms),
                (unsigned long long)(bytes->cached >> 20), wk_shard_count(l->shard));
    }
    if (l->n > 0 && !l->shard->served) {
        cm_mem_resident r = cm_mem_resident_now();
        cm_info("memory: %llu MB of our own, %llu MB of it in huge pages, %llu MB of mapped files",
                (unsigned long long)(r.own_bytes >> 20), (unsigned long long)(r.huge_bytes >> 20),
                (unsigned long long)(r.file_bytes >> 20));
    }
}

/* Before anything is served the compute threads have nothing to do, so as many compute here; afterwards one,
 * beside them. */
cm_status wk_shard_load(wk_shard *shard, const pr_placement *placement, uint32_t rank, cm_error *err)
{
    uint64_t start_ms = cm_now_ms();
    shard_load l = {.shard = shard, .told_ms = start_ms};
    md_load_bytes bytes;
    load_list(&l, placement, rank);
    cm_status status = md_load_run(&(md_load){.n_item = l.n,
                                              .n_threads = shard->served ? 1 : shard->n_threads,
                                              .item_bytes_max = md_expert_bytes(shard->geometry),
                                              .item = load_item,
                                              .kept = shard->copy_bytes > 0 ? NULL : load_kept,
                                              .ctx = &l},
                                   &bytes, err);
    cm_free(l.pairs);
    CM_TRY(status);
    load_report(&l, &bytes, start_ms);
    shard->served = true;
    cm_stat_set(CM_STAT_worker_experts, wk_shard_count(shard));
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
            copy_give(shard, entry->copy, entry->block);
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
