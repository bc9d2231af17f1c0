#include "common/base/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "common/base/assert.h"
#include "common/base/log.h"

static _Thread_local const char *t_guard_what;
static _Thread_local int t_guard_depth;

static void mem_guard_check(size_t n_bytes)
{
    CM_ASSERT_MSG(t_guard_depth == 0, "allocation of %zu bytes inside %s", n_bytes, t_guard_what);
}

static void *mem_or_die(void *p, size_t n_bytes)
{
    if (p == NULL) {
        cm_error_log("out of memory: %zu bytes refused by the system", n_bytes);
        cm_log_dump(2);
        abort();
    }
    return p;
}

void *cm_alloc(size_t n_bytes)
{
    mem_guard_check(n_bytes);
    return mem_or_die(calloc(1, n_bytes != 0 ? n_bytes : 1), n_bytes);
}

/* As it comes: a large block costs no memory before it is written to. */
static void *mem_raw_aligned(size_t n_bytes)
{
    mem_guard_check(n_bytes);
    size_t rounded = (n_bytes + 63) / 64 * 64;
    return mem_or_die(aligned_alloc(64, rounded != 0 ? rounded : 64), n_bytes);
}

void *cm_alloc_aligned(size_t n_bytes)
{
    return memset(mem_raw_aligned(n_bytes), 0, n_bytes);
}

void *cm_try_alloc(size_t n_bytes)
{
    mem_guard_check(n_bytes);
    return calloc(1, n_bytes != 0 ? n_bytes : 1);
}

void *cm_realloc(void *p, size_t n_bytes)
{
    mem_guard_check(n_bytes);
    return mem_or_die(realloc(p, n_bytes != 0 ? n_bytes : 1), n_bytes);
}

char *cm_strdup(const char *text)
{
    size_t n = strlen(text) + 1;
    return memcpy(cm_alloc(n), text, n);
}

void cm_free(void *p)
{
    free(p);
}

void cm_mem_guard_begin(const char *what)
{
    t_guard_what = what;
    t_guard_depth++;
}

void cm_mem_guard_end(void)
{
    CM_ASSERT(t_guard_depth > 0);
    t_guard_depth--;
}

int cm_mem_guard_pause(void)
{
    int depth = t_guard_depth;
    t_guard_depth = 0;
    return depth;
}

void cm_mem_guard_resume(int depth)
{
    t_guard_depth = depth;
}

/* ---- huge pages ---- */

enum { MEM_HUGE = 2 << 20 };

static size_t mem_round_up(size_t n_bytes, size_t to)
{
    return (n_bytes + to - 1) / to * to;
}

static void *mem_map(size_t n_bytes, int flags)
{
    void *p = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    return p != MAP_FAILED ? p : NULL;
}

void *cm_huge_alloc(size_t n_bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), size = mem_round_up(n_bytes != 0 ? n_bytes : 1, page);
    mem_guard_check(n_bytes);
    if (n_bytes > SIZE_MAX / 2) {
        return NULL;
    }
    void *p = n_bytes >= MEM_HUGE ? mem_map(mem_round_up(size, MEM_HUGE), MAP_HUGETLB) : NULL;
    if (p != NULL) {
        return p;
    }
    uint8_t *wide = mem_map(size + MEM_HUGE, 0);
    if (wide == NULL) {
        return NULL;
    }
    uint8_t *at = wide + (MEM_HUGE - (uintptr_t)wide % MEM_HUGE) % MEM_HUGE, *end = wide + size + MEM_HUGE;
    if (at > wide) {
        munmap(wide, (size_t)(at - wide));
    }
    if (end > at + size) {
        munmap(at + size, (size_t)(end - at) - size);
    }
    (void)madvise(at, size, MADV_HUGEPAGE); /* a wish, no more */
    return at;
}

void cm_huge_free(void *p, size_t n_bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), size = mem_round_up(n_bytes != 0 ? n_bytes : 1, page);
    if (p == NULL) {
        return;
    }
    /* of the operator's pool only whole pages can be given back: that much was mapped there */
    if (munmap(p, size) != 0) {
        int failed = munmap(p, mem_round_up(size, MEM_HUGE));
        CM_ASSERT(failed == 0);
    }
}

void cm_copy_past_caches(void *to, const void *from, size_t n_bytes)
{
#ifdef __SSE2__
    if ((uintptr_t)to % sizeof(__m128i) == 0 && n_bytes % (4 * sizeof(__m128i)) == 0) {
        __m128i *lane_to = to;
        const __m128i *lane = from;
        for (size_t i = 0; i < n_bytes / sizeof(__m128i); i += 4) {
            __m128i a = _mm_loadu_si128(lane + i), b = _mm_loadu_si128(lane + i + 1),
                    c = _mm_loadu_si128(lane + i + 2), d = _mm_loadu_si128(lane + i + 3);
            _mm_stream_si128(lane_to + i, a);
            _mm_stream_si128(lane_to + i + 1, b);
            _mm_stream_si128(lane_to + i + 2, c);
            _mm_stream_si128(lane_to + i + 3, d);
        }
        _mm_sfence(); /* such stores are in no order with those that tell another thread of them */
        return;
    }
#endif
    memcpy(to, from, n_bytes);
}

cm_mem_resident cm_mem_resident_now(void)
{
    cm_mem_resident r = {0};
    char line[128];
    FILE *file = fopen("/proc/self/smaps_rollup", "re");
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        unsigned long long kb;
        char name[32];
        if (sscanf(line, "%31[^:]: %llu kB", name, &kb) != 2) {
            continue;
        }
        uint64_t n = kb << 10;
        bool anonymous = strcmp(name, "Anonymous") == 0, hugetlb = strcmp(name, "Private_Hugetlb") == 0;
        r.own_bytes += anonymous || hugetlb ? n : 0;
        r.huge_bytes += hugetlb || strcmp(name, "AnonHugePages") == 0 ? n : 0;
        r.file_bytes += strcmp(name, "Rss") == 0 ? n : 0;
        r.file_bytes -= anonymous ? n : 0; /* its line comes after that of Rss */
    }
    if (file != NULL) {
        fclose(file);
    }
    return r;
}

/* ---- arena ---- */

struct cm_arena_chunk {
    cm_arena_chunk *next;
    size_t cap, used;
    uint8_t *bytes; /* 64-byte aligned, follows this struct */
};

static cm_arena_chunk *arena_chunk_create(size_t cap)
{
    cm_arena_chunk *chunk = cm_alloc_aligned(64 + cap);
    _Static_assert(sizeof(cm_arena_chunk) <= 64, "chunk head fits its 64 bytes");
    chunk->cap = cap;
    chunk->bytes = (uint8_t *)chunk + 64;
    return chunk;
}

void cm_arena_init(cm_arena *arena, const char *name, size_t chunk_bytes, size_t max_bytes)
{
    CM_ASSERT(chunk_bytes > 0 && chunk_bytes <= max_bytes);
    *arena = (cm_arena){.name = name, .chunk_bytes = chunk_bytes, .max_bytes = max_bytes};
    arena->first = arena->at = arena_chunk_create(chunk_bytes);
    arena->total_bytes = chunk_bytes;
}

void cm_arena_fini(cm_arena *arena)
{
    for (cm_arena_chunk *chunk = arena->first, *next; chunk != NULL; chunk = next) {
        next = chunk->next;
        cm_free(chunk);
    }
    *arena = (cm_arena){0};
}

void *cm_arena_alloc(cm_arena *arena, size_t n_bytes)
{
    if (n_bytes > SIZE_MAX - 63) {
        return NULL;
    }
    size_t rounded = (n_bytes + 63) / 64 * 64;
    cm_arena_chunk *chunk = arena->at;
    if (chunk->cap - chunk->used < rounded) {
        size_t cap = rounded > arena->chunk_bytes ? rounded : arena->chunk_bytes;
        if (cap > arena->max_bytes - arena->total_bytes) {
            if (rounded > arena->max_bytes - arena->total_bytes) {
                return NULL;
            }
            cap = rounded;
        }
        chunk = arena_chunk_create(cap);
        arena->total_bytes += cap;
        arena->at->next = chunk;
        arena->at = chunk;
    }
    void *p = chunk->bytes + chunk->used;
    chunk->used += rounded;
    arena->used_bytes += rounded;
    if (arena->used_bytes > arena->peak_bytes) {
        arena->peak_bytes = arena->used_bytes;
    }
    memset(p, 0, n_bytes);
    return p;
}

void *cm_arena_take(cm_arena *arena, size_t n_bytes)
{
    void *p = cm_arena_alloc(arena, n_bytes);
    CM_ASSERT_MSG(p != NULL, "arena %s: %zu bytes asked, %zu of %zu used", arena->name, n_bytes,
                  arena->used_bytes, arena->max_bytes);
    return p;
}

char *cm_arena_strdup(cm_arena *arena, const char *text)
{
    size_t n = strlen(text) + 1;
    char *copy = cm_arena_alloc(arena, n);
    return copy != NULL ? memcpy(copy, text, n) : NULL;
}

void cm_arena_reset(cm_arena *arena)
{
    for (cm_arena_chunk *chunk = arena->first->next, *next; chunk != NULL; chunk = next) {
        next = chunk->next;
        arena->total_bytes -= chunk->cap;
        cm_free(chunk);
    }
    arena->first->next = NULL;
    arena->first->used = 0;
    arena->at = arena->first;
    arena->used_bytes = 0;
}

/* ---- pool ---- */

void cm_pool_init(cm_pool *pool, const char *name, size_t object_bytes, uint32_t n_max)
{
    CM_ASSERT(object_bytes > 0 && n_max > 0);
    size_t stride = (object_bytes + 15) / 16 * 16;
    *pool = (cm_pool){.name = name, .object_bytes = stride, .n_max = n_max};
    pool->objects = mem_raw_aligned(stride * n_max); /* zeroed when handed out */
    pool->free_stack = cm_alloc(sizeof(uint32_t) * n_max);
    pool->in_use = cm_alloc(n_max);
    for (uint32_t i = 0; i < n_max; i++) {
        pool->free_stack[i] = n_max - 1 - i; /* index 0 is handed out first */
    }
}

uint32_t cm_pool_fini(cm_pool *pool)
{
    uint32_t n_leaked = pool->n_used;
    for (uint32_t i = 0; i < pool->n_max && n_leaked > 0; i++) {
        if (pool->in_use[i]) {
            const uint8_t *b = pool->objects + pool->object_bytes * i;
            cm_warn("pool %s: object %u was not returned, begins %02x%02x%02x%02x %02x%02x%02x%02x",
                    pool->name, i, b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]);
        }
    }
    cm_free(pool->objects);
    cm_free(pool->free_stack);
    cm_free(pool->in_use);
    *pool = (cm_pool){0};
    return n_leaked;
}

cm_status cm_pool_get(cm_pool *pool, void **object_out)
{
    if (pool->n_used == pool->n_max) {
        return CM_AGAIN;
    }
    uint32_t index = pool->free_stack[pool->n_max - pool->n_used - 1];
    pool->n_used++;
    pool->n_peak = pool->n_used > pool->n_peak ? pool->n_used : pool->n_peak;
    pool->in_use[index] = 1;
    *object_out = pool->objects + pool->object_bytes * index;
    memset(*object_out, 0, pool->object_bytes);
    return CM_OK;
}

uint32_t cm_pool_index(const cm_pool *pool, const void *object)
{
    size_t offset = (size_t)((const uint8_t *)object - pool->objects);
    CM_ASSERT_MSG(offset % pool->object_bytes == 0 && offset / pool->object_bytes < pool->n_max,
                  "pool %s: not its object", pool->name);
    return (uint32_t)(offset / pool->object_bytes);
}

void cm_pool_put(cm_pool *pool, void *object)
{
    uint32_t index = cm_pool_index(pool, object);
    CM_ASSERT_MSG(pool->in_use[index], "pool %s: object %u returned twice", pool->name, index);
    pool->in_use[index] = 0;
    pool->n_used--;
    pool->free_stack[pool->n_max - pool->n_used - 1] = index;
}

void *cm_pool_at(const cm_pool *pool, uint32_t index)
{
    return index < pool->n_max && pool->in_use[index] ? pool->objects + pool->object_bytes * index : NULL;
}
