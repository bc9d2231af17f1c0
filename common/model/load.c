#include "common/model/load.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/model/safetensors_private.h"

enum {
    LOAD_THREADS_MAX = 128,
    LOAD_SECTOR = 4096,       /* reads past the page cache begin and end at multiples of it */
    LOAD_GAP_MAX = 256 << 10, /* bytes that are read although nobody wants them, rather than in two reads */
    LOAD_PROBES = 8,          /* pages of a tensor that are looked for in the page cache */
    LOAD_AHEAD_BYTES = 64 << 20, /* of what is kept mapped, on their way from the disk before their turn */
    LOAD_BUFFERS_MAX = 1 << 30   /* bytes of all buffers, unless one alone is larger */
};

/* Threads beyond n_threads are for waiting: a turn is held while computing, and there are n_threads turns. */
typedef struct load_run {
    const md_load *load;
    _Atomic uint32_t next;
    _Atomic bool failed;
    _Atomic uint64_t n_cached, n_direct, n_mapped;
    pthread_mutex_t lock; /* for what follows */
    pthread_cond_t turn;
    uint32_t n_turns; /* free */
    cm_status status; /* the first that went wrong */
    cm_error err;
    pthread_mutex_t ahead_lock; /* for what follows */
    uint32_t n_ahead;           /* items announced */
    uint64_t ahead_bytes;       /* announced and not begun */
} load_run;

struct md_reader {
    load_run *run;
    uint8_t *buffer; /* [buffer_bytes]; NULL before the first read past the cache */
    uint64_t buffer_bytes;
    md_tensor mapped[MD_LOAD_TENSORS_MAX]; /* [n_mapped]; whose pages the mapping need not keep */
    uint32_t n_mapped;
    bool has_turn;
};

/* ---- turns ---- */

static void reader_take_turn(md_reader *reader)
{
    load_run *run = reader->run;
    if (reader->has_turn) {
        return;
    }
    pthread_mutex_lock(&run->lock);
    while (run->n_turns == 0) {
        pthread_cond_wait(&run->turn, &run->lock);
    }
    run->n_turns--;
    pthread_mutex_unlock(&run->lock);
    reader->has_turn = true;
}

static void advise(const md_tensor *tensor, int advice)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)tensor->data;
    uintptr_t end = begin + tensor->n_bytes;
    /* neighbours may want their part of a page that is to be let go */
    begin = advice == MADV_DONTNEED ? (begin + page - 1) / page * page : begin / page * page;
    end = advice == MADV_DONTNEED ? end / page * page : end;
    if (begin < end) {
        (void)madvise((void *)begin, end - begin, advice); /* no harm if not taken */
    }
}

static void reader_end_item(md_reader *reader)
{
    load_run *run = reader->run;
    for (uint32_t i = 0; i < reader->n_mapped; i++) {
        advise(&reader->mapped[i], MADV_DONTNEED);
    }
    reader->n_mapped = 0;
    if (reader->has_turn) {
        pthread_mutex_lock(&run->lock);
        run->n_turns++;
        pthread_cond_signal(&run->turn);
        pthread_mutex_unlock(&run->lock);
        reader->has_turn = false;
    }
}

/* ---- through the mapping ---- */

/* A byte of each page: whoever uses it must not wait for the disk then. */
static void touch(const md_tensor *tensor)
{
    const volatile uint8_t *data = tensor->data;
    for (uint64_t i = 0; i < tensor->n_bytes; i += LOAD_SECTOR) {
        (void)data[i];
    }
    (void)data[tensor->n_bytes - 1];
}

static uint64_t announce_item(load_run *run, uint32_t i, bool now)
{
    const md_tensor *kept[MD_LOAD_TENSORS_MAX];
    uint32_t n = run->load->kept(run->load->ctx, i, kept);
    uint64_t n_bytes = 0;
    for (uint32_t k = 0; k < n; k++) {
        n_bytes += kept[k]->n_bytes;
        if (now) {
            advise(kept[k], MADV_WILLNEED);
        }
    }
    return n_bytes;
}

/* Item i is about to begin. */
static void announce(load_run *run, uint32_t i)
{
    if (run->load->kept == NULL) {
        return;
    }
    pthread_mutex_lock(&run->ahead_lock);
    while (run->n_ahead < run->load->n_item && (run->n_ahead <= i || run->ahead_bytes < LOAD_AHEAD_BYTES)) {
        run->ahead_bytes += announce_item(run, run->n_ahead++, true);
    }
    run->ahead_bytes -= announce_item(run, i, false);
    pthread_mutex_unlock(&run->ahead_lock);
}

/* Pages from the first to the last, a few between: what was put out of the cache has lost whole stretches. */
static bool is_cached(const md_tensor *tensor, bool likely)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)tensor->data;
    if (!md_safetensors_tells_cache(tensor->file)) {
        return likely;
    }
    for (uint64_t i = 0; i < LOAD_PROBES; i++) {
        uintptr_t at = begin + (tensor->n_bytes - 1) * i / (LOAD_PROBES - 1);
        unsigned char there = 0;
        if (mincore((void *)(at / page * page), 1, &there) != 0 || (there & 1) == 0) {
            return false;
        }
    }
    return true;
}

static bool all_cached(const md_tensor *tensors, uint32_t n, bool likely)
{
    bool all = true;
    for (uint32_t i = 0; i < n && all; i++) {
        all = is_cached(&tensors[i], likely);
    }
    return all;
}

static void read_mapped(md_reader *reader, const md_tensor *tensors, uint32_t n, bool cached)
{
    if (cached) {
        reader_take_turn(reader); /* pages are only entered into our tables, which is work */
    }
    for (uint32_t i = 0; i < n && !cached; i++) {
        advise(&tensors[i], MADV_WILLNEED);
    }
    for (uint32_t i = 0; i < n && !cached; i++) {
        touch(&tensors[i]);
    }
    if (!cached) {
        reader_take_turn(reader);
    }
    memcpy(reader->mapped, tensors, sizeof(tensors[0]) * n);
    reader->n_mapped = n;
}

/* ---- past the page cache ---- */

/* A stretch of one file that is read at once. */
typedef struct load_piece {
    md_safetensors *file;
    uint64_t begin, end; /* whole sectors */
    uint64_t at;         /* in the buffer */
} load_piece;

static uint64_t sector_up(uint64_t at)
{
    return (at + LOAD_SECTOR - 1) / LOAD_SECTOR * LOAD_SECTOR;
}

/* Tensors of a list that stand close together make one piece. */
static uint32_t pieces_of(const md_tensor *tensors, uint32_t n, load_piece pieces[MD_LOAD_TENSORS_MAX])
{
    uint32_t n_piece = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t begin = md_tensor_offset(&tensors[i]) / LOAD_SECTOR * LOAD_SECTOR;
        uint64_t end = sector_up(md_tensor_offset(&tensors[i]) + tensors[i].n_bytes);
        uint32_t k = 0;
        while (k < n_piece && (pieces[k].file != tensors[i].file || begin > pieces[k].end + LOAD_GAP_MAX ||
                               pieces[k].begin > end + LOAD_GAP_MAX)) {
            k++;
        }
        if (k == n_piece) {
            pieces[n_piece++] = (load_piece){.file = tensors[i].file, .begin = begin, .end = end};
        } else {
            pieces[k].begin = begin < pieces[k].begin ? begin : pieces[k].begin;
            pieces[k].end = end > pieces[k].end ? end : pieces[k].end;
        }
    }
    return n_piece;
}

/* Where in the buffer a tensor stands. */
static uint64_t place_in(const load_piece *pieces, const md_tensor *tensor)
{
    uint64_t offset = md_tensor_offset(tensor);
    while (pieces->file != tensor->file || offset < pieces->begin || offset + tensor->n_bytes > pieces->end) {
        pieces++; /* one of them holds it */
    }
    return pieces->at + (offset - pieces->begin);
}

static cm_status reader_room(md_reader *reader, uint64_t n_bytes, cm_error *err)
{
    if (n_bytes > reader->buffer_bytes) {
        cm_huge_free(reader->buffer, reader->buffer_bytes);
        reader->buffer_bytes = 0;
        reader->buffer = cm_huge_alloc(n_bytes);
        if (reader->buffer == NULL) {
            return cm_error_set(err, CM_E_MEMORY, "", "no memory for %llu bytes to read into",
                                (unsigned long long)n_bytes);
        }
        reader->buffer_bytes = n_bytes;
    }
    return CM_OK;
}

/* CM_E_UNSUPPORTED: the file system has no such way after all. */
static cm_status read_direct(md_reader *reader, md_tensor *tensors, uint32_t n, cm_error *err)
{
    load_piece pieces[MD_LOAD_TENSORS_MAX];
    uint32_t n_piece = pieces_of(tensors, n, pieces);
    uint64_t n_bytes = 0;
    for (uint32_t i = 0; i < n_piece; i++) {
        pieces[i].at = n_bytes;
        n_bytes += pieces[i].end - pieces[i].begin;
    }
    CM_TRY(reader_room(reader, n_bytes, err));
    for (uint32_t i = 0; i < n_piece; i++) {
        const load_piece *p = &pieces[i];
        CM_TRY(md_safetensors_read_direct(p->file, p->begin, reader->buffer + p->at, p->end - p->begin, err));
    }
    for (uint32_t i = 0; i < n; i++) {
        tensors[i].data = reader->buffer + place_in(pieces, &tensors[i]);
    }
    return CM_OK;
}

cm_status md_reader_read(md_reader *reader, md_tensor *tensors, uint32_t n, bool likely, cm_error *err)
{
    md_tensor read[MD_LOAD_TENSORS_MAX];
    load_run *run = reader->run;
    uint64_t n_bytes = 0;
    bool cached = all_cached(tensors, n, likely), direct = !cached;
    CM_ASSERT(n > 0 && n <= MD_LOAD_TENSORS_MAX && reader->n_mapped == 0);
    for (uint32_t i = 0; i < n; i++) {
        n_bytes += tensors[i].n_bytes;
        direct = direct && md_safetensors_direct(tensors[i].file);
    }
    if (direct) {
        memcpy(read, tensors, sizeof(read[0]) * n);
        cm_status status = read_direct(reader, read, n, err);
        if (status != CM_E_UNSUPPORTED) {
            CM_TRY(status);
            memcpy(tensors, read, sizeof(read[0]) * n);
            atomic_fetch_add(&run->n_direct, n_bytes);
            reader_take_turn(reader);
            return CM_OK;
        }
    }
    read_mapped(reader, tensors, n, cached);
    atomic_fetch_add(cached ? &run->n_cached : &run->n_mapped, n_bytes);
    return CM_OK;
}

void md_reader_keep(md_reader *reader, const md_tensor *tensor)
{
    bool cached = is_cached(tensor, false);
    if (cached) {
        reader_take_turn(reader);
    } else {
        advise(tensor, MADV_WILLNEED);
    }
    touch(tensor);
    if (!cached) {
        reader_take_turn(reader);
    }
}

/* ---- threads ---- */

static void load_fail(load_run *run, cm_status status, const cm_error *err)
{
    pthread_mutex_lock(&run->lock);
    if (run->status == CM_OK) {
        run->status = status;
        run->err = *err;
    }
    pthread_mutex_unlock(&run->lock);
    atomic_store(&run->failed, true);
}

static void *load_some(void *arg)
{
    load_run *run = arg;
    md_reader reader = {.run = run};
    uint32_t i;
    while (!atomic_load(&run->failed) && (i = atomic_fetch_add(&run->next, 1)) < run->load->n_item) {
        cm_error err = {0};
        announce(run, i);
        cm_status status = run->load->item(run->load->ctx, i, &reader, &err);
        reader_end_item(&reader);
        if (status != CM_OK) {
            load_fail(run, status, &err);
        }
    }
    cm_huge_free(reader.buffer, reader.buffer_bytes);
    return NULL;
}

/* Two for each that computes, so that one of them can wait for the disk. */
static uint32_t threads_of(const md_load *load)
{
    uint64_t buffer = load->item_bytes_max + 2ull * MD_LOAD_TENSORS_MAX * LOAD_SECTOR;
    uint64_t n = 2ull * load->n_threads, n_buffer = LOAD_BUFFERS_MAX / buffer;
    n = n < load->n_item ? n : load->n_item;
    n = n < n_buffer ? n : n_buffer;
    return n < 1 ? 1 : n < LOAD_THREADS_MAX ? (uint32_t)n : LOAD_THREADS_MAX;
}

cm_status md_load_run(const md_load *load, md_load_bytes *bytes_out, cm_error *err)
{
    pthread_t threads[LOAD_THREADS_MAX];
    uint32_t n = threads_of(load), n_started = 0;
    load_run run = {.load = load, .n_turns = load->n_threads};
    CM_ASSERT(load->n_threads > 0);
    pthread_mutex_init(&run.lock, NULL);
    pthread_mutex_init(&run.ahead_lock, NULL);
    pthread_cond_init(&run.turn, NULL);
    while (n_started + 1 < n && pthread_create(&threads[n_started], NULL, load_some, &run) == 0) {
        n_started++; /* with fewer it takes longer */
    }
    load_some(&run);
    for (uint32_t i = 0; i < n_started; i++) {
        pthread_join(threads[i], NULL);
    }
    pthread_cond_destroy(&run.turn);
    pthread_mutex_destroy(&run.ahead_lock);
    pthread_mutex_destroy(&run.lock);
    if (run.status != CM_OK) {
        *err = run.err;
        return run.status;
    }
    *bytes_out = (md_load_bytes){run.n_cached, run.n_direct, run.n_mapped};
    return CM_OK;
}
