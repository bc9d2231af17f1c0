/* Ceilings: how fast this machine reads and multiplies when nothing else is to be done. */
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/base/mem.h"
#include "kernels/cpu/team.h"
#include "tools/bench/bench.h"

enum {
    PROBE_AHEAD = 8192,    /* bytes that are asked for before they are read: a fifth more than without */
    PROBE_PIECE = 4096,    /* bytes a thread reads at a time */
    PROBE_LOOPS = 1 << 20, /* rounds of the arithmetic probes */
    PROBE_CHAINS = 12,     /* independent sums: more than latency times issue rate */
    PROBE_CHAINS_BF16 = 16,
    PROBE_COST = 1u << 30, /* an item is always worth a thread */
};

struct bench_team {
    kn_team *team;
    uint64_t sum; /* what was read, so that reading is no dead code */
};

bench_team *bench_team_create(uint32_t n_threads)
{
    bench_team *t = cm_alloc(sizeof(*t));
    t->team = kn_team_create(n_threads);
    return t;
}

void bench_team_destroy(bench_team *t)
{
    kn_team_destroy(t->team);
    cm_free(t);
}

/* ---- memory ---- */

typedef uint64_t probe_vector __attribute__((vector_size(64)));

typedef struct read_job {
    const uint8_t *data;
    uint64_t *sum;
} read_job;

static void read_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    enum { N = 4 };
    const read_job *job = arg;
    const uint8_t *from = job->data + (uint64_t)begin * PROBE_PIECE,
                  *to = job->data + (uint64_t)end * PROBE_PIECE;
    probe_vector sum[N] = {0};
    uint64_t total = i_thread;
    for (; from < to; from += sizeof(sum)) {
        for (int i = 0; i < N; i++) {
            probe_vector v;
            __builtin_prefetch(from + i * (int)sizeof(v) + PROBE_AHEAD);
            memcpy(&v, from + i * (int)sizeof(v), sizeof(v));
            sum[i] ^= v;
        }
    }
    for (int i = 0; i < N; i++) {
        for (int k = 0; k < 8; k++) {
            total ^= sum[i][k];
        }
    }
    __atomic_fetch_xor(job->sum, total, __ATOMIC_RELAXED);
}

void bench_read(bench_team *t, const void *data, uint64_t n_bytes)
{
    read_job job = {.data = data, .sum = &t->sum};
    kn_team_run(t->team, (uint32_t)(n_bytes / PROBE_PIECE), PROBE_COST, read_part, &job);
}

/* ---- arithmetic ---- */

#define SIXTEEN(op) TWELVE(op) op(12) op(13) op(14) op(15)
#define TWELVE(op)  op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11)

#if defined(__x86_64__)
#define KEEP(i) __asm__ volatile("" : "+v"(acc[i]));

__attribute__((target("avx512f"))) static void fma_512(void)
{
    __m512 acc[PROBE_CHAINS] = {0}, x = _mm512_set1_ps(0.5f), w = _mm512_set1_ps(0.25f);
#define FMA(i) acc[i] = _mm512_fmadd_ps(x, w, acc[i]);
    for (uint32_t n = 0; n < PROBE_LOOPS; n++) {
        TWELVE(FMA)
        TWELVE(KEEP)
    }
#undef FMA
}

__attribute__((target("avx2,fma"))) static void fma_256(void)
{
    __m256 acc[PROBE_CHAINS] = {0}, x = _mm256_set1_ps(0.5f), w = _mm256_set1_ps(0.25f);
#define FMA(i) acc[i] = _mm256_fmadd_ps(x, w, acc[i]);
    for (uint32_t n = 0; n < PROBE_LOOPS; n++) {
        TWELVE(FMA)
        TWELVE(KEEP)
    }
#undef FMA
}

__attribute__((target("avx512f"))) static void fma64_512(void)
{
    __m512d acc[PROBE_CHAINS] = {0}, x = _mm512_set1_pd(0.5), w = _mm512_set1_pd(0.25);
#define FMA(i) acc[i] = _mm512_fmadd_pd(x, w, acc[i]);
    for (uint32_t n = 0; n < PROBE_LOOPS; n++) {
        TWELVE(FMA)
        TWELVE(KEEP)
    }
#undef FMA
}

__attribute__((target("avx2,fma"))) static void fma64_256(void)
{
    __m256d acc[PROBE_CHAINS] = {0}, x = _mm256_set1_pd(0.5), w = _mm256_set1_pd(0.25);
#define FMA(i) acc[i] = _mm256_fmadd_pd(x, w, acc[i]);
    for (uint32_t n = 0; n < PROBE_LOOPS; n++) {
        TWELVE(FMA)
        TWELVE(KEEP)
    }
#undef FMA
}

__attribute__((target("avx512f,avx512vnni"))) static void vnni_512(void)
{
    __m512i acc[PROBE_CHAINS] = {0}, x = _mm512_set1_epi8(1), w = _mm512_set1_epi8(2);
#define DOT(i) acc[i] = _mm512_dpbusd_epi32(acc[i], x, w);
    for (uint32_t n = 0; n < PROBE_LOOPS; n++) {
        TWELVE(DOT)
        TWELVE(KEEP)
    }
#undef DOT
}

__attribute__((target("avx512f,avx512bf16"))) static void bf16_512(void)
{
    __m512 acc[PROBE_CHAINS_BF16] = {0};
    __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f003f00), w = (__m512bh)_mm512_set1_epi32(0x3e803e80);
#define DOT(i) acc[i] = _mm512_dpbf16_ps(acc[i], x, w);
    for (uint32_t n = 0; n < PROBE_LOOPS; n++) {
        SIXTEEN(DOT)
        SIXTEEN(KEEP)
    }
#undef DOT
}

/* Products of 16-bit integers and their addition, as the paths without VNNI multiply. */
__attribute__((target("avx2"))) static void madd_256(void)
{
    __m256i acc[PROBE_CHAINS] = {0}, x = _mm256_set1_epi16(3), w = _mm256_set1_epi16(5);
#define MADD(i)                                                                                              \
    {                                                                                                        \
        __m256i product;                                                                                     \
        __asm__ volatile("vpmaddwd %1, %2, %0" : "=x"(product) : "x"(x), "x"(w));                            \
        acc[i] = _mm256_add_epi32(acc[i], product);                                                          \
    }
    for (uint32_t n = 0; n < PROBE_LOOPS; n++) {
        TWELVE(MADD)
        TWELVE(KEEP)
    }
#undef MADD
}

bool bench_has_madd(void)
{
    return __builtin_cpu_supports("avx2");
}

static uint32_t fma_width(void)
{
    return __builtin_cpu_supports("avx512f") ? 16 : __builtin_cpu_supports("fma") ? 8 : 0;
}

static void fma_loop(void)
{
    if (fma_width() == 16) {
        fma_512();
    } else if (fma_width() == 8) {
        fma_256();
    }
}

static void fma64_loop(void)
{
    if (fma_width() == 16) {
        fma64_512();
    } else if (fma_width() == 8) {
        fma64_256();
    }
}

bool bench_has_vnni(void)
{
    return __builtin_cpu_supports("avx512vnni");
}

bool bench_has_bf16(void)
{
    return __builtin_cpu_supports("avx512bf16");
}
#else
static uint32_t fma_width(void)
{
    return 0;
}

static void fma_loop(void)
{
}

static void fma64_loop(void)
{
}

static void vnni_512(void)
{
}

static void madd_256(void)
{
}

static void fma64_256(void)
{
}

bool bench_has_madd(void)
{
    return false;
}

static void bf16_512(void)
{
}

bool bench_has_vnni(void)
{
    return false;
}

bool bench_has_bf16(void)
{
    return false;
}
#endif

static void fma_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    (void)arg;
    (void)i_thread;
    for (uint32_t i = begin; i < end; i++) {
        fma_loop();
    }
}

static void fma64_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    (void)arg;
    (void)i_thread;
    for (uint32_t i = begin; i < end; i++) {
        fma64_loop();
    }
}

static void vnni_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    (void)arg;
    (void)i_thread;
    for (uint32_t i = begin; i < end; i++) {
        vnni_512();
    }
}

static void madd_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    (void)arg;
    (void)i_thread;
    for (uint32_t i = begin; i < end; i++) {
        madd_256();
    }
}

static void fma64_256_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    (void)arg;
    (void)i_thread;
    for (uint32_t i = begin; i < end; i++) {
        fma64_256();
    }
}

static void bf16_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    (void)arg;
    (void)i_thread;
    for (uint32_t i = begin; i < end; i++) {
        bf16_512();
    }
}

uint64_t bench_fma_macs(void)
{
    return (uint64_t)PROBE_LOOPS * PROBE_CHAINS * fma_width();
}

uint64_t bench_fma64_macs(void)
{
    return bench_fma_macs() / 2;
}

uint64_t bench_madd_macs(void)
{
    return (uint64_t)PROBE_LOOPS * PROBE_CHAINS * 16;
}

uint64_t bench_fma64_256_macs(void)
{
    return (uint64_t)PROBE_LOOPS * PROBE_CHAINS * 4;
}

uint64_t bench_vnni_macs(void)
{
    return (uint64_t)PROBE_LOOPS * PROBE_CHAINS * 64;
}

uint64_t bench_bf16_macs(void)
{
    return (uint64_t)PROBE_LOOPS * PROBE_CHAINS_BF16 * 32;
}

void bench_fma(bench_team *t)
{
    kn_team_run(t->team, kn_team_size(t->team), PROBE_COST, fma_part, NULL);
}

void bench_fma64(bench_team *t)
{
    kn_team_run(t->team, kn_team_size(t->team), PROBE_COST, fma64_part, NULL);
}

void bench_madd(bench_team *t)
{
    kn_team_run(t->team, kn_team_size(t->team), PROBE_COST, madd_part, NULL);
}

void bench_fma64_256(bench_team *t)
{
    kn_team_run(t->team, kn_team_size(t->team), PROBE_COST, fma64_256_part, NULL);
}

void bench_vnni(bench_team *t)
{
    kn_team_run(t->team, kn_team_size(t->team), PROBE_COST, vnni_part, NULL);
}

void bench_bf16(bench_team *t)
{
    kn_team_run(t->team, kn_team_size(t->team), PROBE_COST, bf16_part, NULL);
}
