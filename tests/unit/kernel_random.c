#include "tests/unit/kernel_random.h"

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "kernels/kn_math.h"

uint64_t random_seed = 20240607;

uint32_t random_u32(uint64_t key, uint64_t i)
{
    return cm_rng_at(random_seed, i, key).word[0];
}

uint32_t random_between(uint64_t key, uint32_t low, uint32_t high)
{
    return low + random_u32(key, 0) % (high - low + 1);
}

float random_value(uint64_t key, uint64_t i)
{
    cm_rng_block b = cm_rng_at(random_seed, i, key);
    float v = ((float)b.word[0] / 2147483648.0f - 1.0f) * 3.0f;
    switch (b.word[1] % 64) {
    case 0:
        return 0;
    case 1:
        return v * 1e-6f;
    case 2:
        return v * 300.0f;
    default:
        return v;
    }
}

kn_ptr random_bf16(rig *r, uint64_t key, uint64_t n)
{
    uint16_t *x = cm_alloc(n * 2);
    kn_ptr p;
    for (uint64_t i = 0; i < n; i++) {
        x[i] = kn_bf16_encode(random_value(key, i));
    }
    p = rig_up(r, x, n * 2);
    cm_free(x);
    return p;
}

kn_ptr random_f32(rig *r, uint64_t key, uint64_t n)
{
    float *x = cm_alloc(n * 4);
    kn_ptr p;
    for (uint64_t i = 0; i < n; i++) {
        x[i] = random_value(key, i);
    }
    p = rig_up(r, x, n * 4);
    cm_free(x);
    return p;
}

kn_ptr random_bytes(rig *r, uint64_t key, uint64_t n, uint32_t low, uint32_t n_kind)
{
    uint8_t *x = cm_alloc(n);
    kn_ptr p;
    for (uint64_t i = 0; i < n; i++) {
        x[i] = (uint8_t)(low + random_u32(key, i) % n_kind);
    }
    p = rig_up(r, x, n);
    cm_free(x);
    return p;
}

kn_ptr random_codes(rig *r, uint64_t key, uint64_t n)
{
    uint8_t *x = cm_alloc(n);
    kn_ptr p;
    for (uint64_t i = 0; i < n; i++) {
        uint32_t u = random_u32(key, i);
        x[i] = (uint8_t)((u % 0x7f) | (u >> 24 & 0x80));
    }
    p = rig_up(r, x, n);
    cm_free(x);
    return p;
}

kn_matrix random_matrix(rig *r, uint64_t key, uint32_t n_out, uint32_t n_in, kn_dtype dtype, kn_dtype scale)
{
    kn_matrix m = {.n_out = n_out, .n_in = n_in, .dtype = dtype, .scale_dtype = scale};
    uint64_t n = (uint64_t)n_out * n_in, n_scale;
    if (dtype == KN_BF16) {
        m.data = random_bf16(r, key, n);
        return m;
    }
    n_scale = dtype == KN_E2M1 ? (uint64_t)n_out * kn_blocks(n_in, KN_FP4_BLOCK)
                               : (uint64_t)kn_blocks(n_out, KN_ACT_BLOCK) * kn_blocks(n_in, KN_ACT_BLOCK);
    m.data = dtype == KN_E2M1 ? random_bytes(r, key, n / 2, 0, 256) : random_codes(r, key, n);
    m.scale =
        scale == KN_F32 ? random_f32(r, key + 1000, n_scale) : random_bytes(r, key + 1000, n_scale, 110, 20);
    return m;
}

kn_matrix prepared(rig *r, kn_matrix m)
{
    uint64_t n = kn_prepared_bytes(r->device, &m);
    CM_ASSERT(n % 64 == 0); /* copies stand one behind another */
    if (n > 0) {
        kn_prepare(r->device, &m, rig_new(r, n));
    }
    return m;
}

kn_q8 random_q8(rig *r, uint64_t key, uint32_t n, uint32_t k)
{
    return (kn_q8){random_codes(r, key, (uint64_t)n * k),
                   random_bytes(r, key + 1000, (uint64_t)n * kn_blocks(k, KN_ACT_BLOCK), 105, 40)};
}

uint16_t wide_input(wide_kind kind, uint64_t key, uint32_t i, uint32_t k)
{
    uint32_t u = random_u32(key, i);
    uint16_t plain = kn_bf16_encode(random_value(key, i));
    switch (kind) {
    case WIDE_SPREAD:
        return (uint16_t)((u & 0x807f) | (100 + (u >> 8) % 60) << 7);
    case WIDE_ZERO:
        return (uint16_t)(i / k % 3 == 0 || i % k / 128 == 1 ? (u & 0x8000) : plain);
    case WIDE_TINY:
        return (uint16_t)((u & 0x807f) | ((u >> 8) % 3) << 7);
    case WIDE_HUGE:
        return (uint16_t)((u & 0x807f) | (252 + (u >> 8) % 3) << 7);
    case WIDE_ODD:
        return i == 5 ? 0x7f80 : i == 2 * k + 7 ? 0xffc1 : plain;
    default:
        return plain;
    }
}
