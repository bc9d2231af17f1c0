/* The grouped projection where its fast way must not be trusted: inputs whose exact sum lies at a tie of bf16
 * and is moved off it by what integers of two digits drop, or by what sums of doubles absorb in another order
 * than the contract's. Every path of the cpu back-end against the oracle, bit for bit. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "kernels/kn_math.h"
#include "tests/unit/kernel_random.h"

enum { N = 9, K = 384, O = 40, ONE = 0x38, UNIT = 127 };

/* Inputs of a row at which weights are 1; -1 at that of `minus`; all others are zero. */
typedef struct term {
    uint32_t at;
    float value;
} term;

typedef struct trap {
    const char *name;
    term of[6];
    uint32_t n;
} trap;

/* What the contract gives depends on the last term of each: 1 + 2^-8 is half way between two bf16. */
static const trap TRAPS[] = {
    {"a digit lost beside large ones that cancel",
     {{0, 0x1p20f}, {16, -0x1p20f}, {2, 1}, {3, 0x1p-8f}, {4, 0x1p-30f}},
     5},
    {"the same below the tie",
     {{0, 0x1p20f}, {16, -0x1p20f}, {2, 1}, {3, 0x1p-8f}, {4, -0x1p-30f}, {5, 0x1p-7f}},
     6},
    {"all small ones lost", {{0, 0x1p40f}, {16, -0x1p40f}, {2, 1}, {3, 0x1p-8f}, {4, 0x1p-9f}}, 5},
    {"absorbed between blocks that cancel", {{0, 0x1p60f}, {256, -0x1p60f}, {130, 1}, {131, 0x1p-6f}}, 4},
    {"absorbed in a lane", {{0, 0x1p60f}, {128, 1}, {256, -0x1p60f}, {131, 0x1p-6f}}, 4},
    {"off a tie by the last bit", {{0, 1}, {129, 0x1p-8f}, {257, 0x1p-52f}}, 3},
    {"on a tie by the last bit", {{0, 1}, {128, 0x1p-8f}, {256, 0x1p-54f}}, 3},
};
enum { N_TRAP = sizeof(TRAPS) / sizeof(TRAPS[0]) };

/* Row r holds trap (r + shift) % N_TRAP times a power of two; every third is negated. */
static void fill(uint16_t x[N][K], uint32_t shift)
{
    for (uint32_t r = 0; r < N; r++) {
        const trap *t = &TRAPS[(r + shift) % N_TRAP];
        for (uint32_t i = 0; i < K; i++) {
            x[r][i] = 0;
        }
        for (uint32_t i = 0; i < t->n; i++) {
            x[r][t->of[i].at] =
                kn_bf16_encode((r % 3 == 2 ? -1.0f : 1.0f) * t->of[i].value * kn_exp2i((int32_t)r - 4));
        }
    }
}

static void multiply(rig *r, uint16_t x[N][K], uint32_t cut, bool prepare, uint16_t y_out[N][O])
{
    uint8_t codes[O][K], scales[K / KN_ACT_BLOCK];
    memset(codes, ONE, sizeof(codes));
    memset(scales, UNIT, sizeof(scales));
    kn_matrix w = {.data = rig_up(r, codes, sizeof(codes)),
                   .scale = rig_up(r, scales, sizeof(scales)),
                   .n_out = O,
                   .n_in = K,
                   .dtype = KN_E4M3,
                   .scale_dtype = KN_E8M0};
    kn_ptr at = rig_up(r, x, sizeof(uint16_t) * N * K), y = rig_new(r, sizeof(uint16_t) * N * O);
    w = prepare ? prepared(r, w) : w;
    for (uint32_t row = 0; row < N; row += cut) {
        kn_dense(r->device)->linear_grouped(r->stream, kn_at(at, sizeof(uint16_t) * row * K), &w, 1,
                                            N - row < cut ? N - row : cut,
                                            kn_at(y, sizeof(uint16_t) * row * O));
    }
    rig_down(r, y_out, y, sizeof(uint16_t) * N * O);
    rig_reset(r);
}

static const kn_limits LIMITS = {
    .n_row = N, .n_in = K, .n_inner = 128, .n_head = 1, .head_dim = 64, .n_key = 1, .n_expert = 1};

static void compare(rig *r, uint32_t shift)
{
    static const uint32_t cuts[] = {1, 2, 3, 4, N};
    uint16_t x[N][K], want[N][O], got[N][O];
    rig ref;
    fill(x, shift);
    rig_open(&ref, "ref", NULL, 1, &LIMITS);
    multiply(&ref, x, N, false, want);
    rig_close(&ref);
    for (uint32_t way = 0; way < 2 * sizeof(cuts) / sizeof(cuts[0]); way++) {
        multiply(r, x, cuts[way / 2], way % 2, got);
        for (uint32_t at = 0; at < N * O; at++) {
            if (got[at / O][at % O] != want[at / O][at % O]) {
                fail_msg("%s, %s, %u rows at once, prepared %u: row %u output %u is %04x, not %04x",
                         kn_device_isa(r->device), TRAPS[(at / O + shift) % N_TRAP].name, cuts[way / 2],
                         way % 2, at / O, at % O, got[at / O][at % O], want[at / O][at % O]);
            }
        }
    }
}

static void test_traps(void **state)
{
    (void)state;
    for (uint32_t i = 0; kn_cpu_isa_at(i) != NULL; i++) {
        for (uint32_t shift = 0; shift < N_TRAP; shift++) {
            rig r;
            rig_open(&r, "cpu", kn_cpu_isa_at(i), 2, &LIMITS);
            compare(&r, shift);
            rig_close(&r);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_traps)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
