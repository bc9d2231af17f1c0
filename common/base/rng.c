#include "common/base/rng.h"

#include <errno.h>
#include <sys/random.h>

#include "common/base/assert.h"

static void rng_mul(uint32_t a, uint32_t b, uint32_t *hi, uint32_t *lo)
{
    uint64_t product = (uint64_t)a * b;
    *hi = (uint32_t)(product >> 32);
    *lo = (uint32_t)product;
}

cm_rng_block cm_rng_at(uint64_t key, uint64_t counter_lo, uint64_t counter_hi)
{
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    uint32_t c0 = (uint32_t)counter_lo, c1 = (uint32_t)(counter_lo >> 32);
    uint32_t c2 = (uint32_t)counter_hi, c3 = (uint32_t)(counter_hi >> 32);
    for (int round = 0; round < 10; round++) {
        uint32_t hi0, lo0, hi1, lo1;
        rng_mul(0xD2511F53u, c0, &hi0, &lo0);
        rng_mul(0xCD9E8D57u, c2, &hi1, &lo1);
        uint32_t n0 = hi1 ^ c1 ^ k0, n2 = hi0 ^ c3 ^ k1;
        c0 = n0;
        c1 = lo1;
        c2 = n2;
        c3 = lo0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (cm_rng_block){{c0, c1, c2, c3}};
}

double cm_rng_uniform(uint64_t key, uint64_t counter_lo, uint64_t counter_hi)
{
    cm_rng_block block = cm_rng_at(key, counter_lo, counter_hi);
    uint64_t bits = ((uint64_t)block.word[0] << 32 | block.word[1]) >> 11;
    return (double)bits * 0x1p-53;
}

void cm_random_bytes(void *out, unsigned long n_bytes)
{
    unsigned char *at = out;
    while (n_bytes > 0) {
        ssize_t got = getrandom(at, n_bytes, 0);
        if (got < 0) {
            CM_ASSERT(errno == EINTR);
            continue;
        }
        at += got;
        n_bytes -= (unsigned long)got;
    }
}

uint64_t cm_random_u64(void)
{
    uint64_t value;
    cm_random_bytes(&value, sizeof(value));
    return value;
}
