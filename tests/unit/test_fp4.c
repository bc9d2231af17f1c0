/* FP4 products where a fast path must notice that it may not be exact: every path of the cpu back-end against
 * the oracle, bit for bit. The second half of each row undoes the first but for what is to be seen: small
 * inputs, or the order in which sums were rounded; in a bf16 of the whole sum neither would show. Usage:
 * t_fp4 [seed] */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "tests/unit/kernel_random.h"

enum { N = 21, K = 1280, HALF = K / 2, O = 50 };

typedef enum form {
    FORM_PLAIN,      /* all sums exact */
    FORM_SMALL,      /* small inputs among the largest: a block's sum has too many bits for float32 */
    FORM_CHUNK,      /* scales in a chunk so far apart that its sum has too many bits for an integer */
    FORM_ROW_INPUT,  /* inputs' scales so far apart that a row's sum has too many for a double */
    FORM_ROW_WEIGHT, /* weights' scales likewise */
    FORM_ENDS,       /* scales at the ends of E8M0 */
    FORM_ZEROS,      /* no input but zeros, of either sign, in most chunks and some rows; and in weights */
    FORM_NAN_SCALE,  /* a weight's scale is NaN */
    FORM_NAN_INPUT,
    FORM_N
} form;

typedef struct operands {
    uint8_t codes[N][K], scales[N][K / KN_ACT_BLOCK];
    uint8_t w_codes[O][K / 2], w_scales[O][K / KN_FP4_BLOCK];
} operands;

static bool is_small(form f, uint32_t i)
{
    return f == FORM_SMALL && i % 16 == 5;
}

static uint8_t code_at(form f, uint32_t r, uint32_t i)
{
    uint32_t u = random_u32(10 + f, (uint64_t)r * K + i), sign = u >> 24 & 0x80;
    switch (f) {
    case FORM_SMALL: /* odd multiples of 2^-9, below 2^-5 */
        return (uint8_t)(sign | (is_small(f, i) ? 1 + u % 4 * 2 : 0x78 + u % 7));
    case FORM_CHUNK:
        return (uint8_t)(sign | (i % 32 == 3 ? 1 : 0x70 + u % 15));
    case FORM_ZEROS:
        return (uint8_t)(sign | (r % 3 == 0 || i / KN_ACT_BLOCK % 2 == 0 ? 0 : u % 0x7f));
    case FORM_NAN_INPUT:
        return r == 4 && i == K - 1 ? 0xff : (uint8_t)(sign | u % 0x7f);
    default:
        return (uint8_t)(sign | u % 0x7f);
    }
}

static uint8_t scale_at(form f, uint32_t r, uint32_t c)
{
    uint32_t u = random_u32(30 + f, r * 100 + c);
    switch (f) {
    case FORM_ROW_INPUT:
        return (uint8_t)(107 + u % 41);
    case FORM_ENDS:
        return u % 2 ? 254 : 0;
    default:
        return (uint8_t)(120 + u % 4);
    }
}

static uint8_t w_scale_at(form f, uint32_t o, uint32_t b)
{
    uint32_t u = random_u32(50 + f, o * 100 + b);
    switch (f) {
    case FORM_CHUNK:
        return (uint8_t)(110 + u % 12);
    case FORM_ROW_WEIGHT: /* alike in a chunk */
        return (uint8_t)(100 + random_u32(50 + f, o * 100 + b / 4) % 41 + u % 2);
    case FORM_ENDS:
        return u % 2 ? 254 : 0;
    case FORM_NAN_SCALE:
        return o == 7 && b == 3 ? 255 : 254;
    default:
        return (uint8_t)(117 + u % 4);
    }
}

static void make(form f, operands *x)
{
    for (uint32_t r = 0; r < N; r++) {
        for (uint32_t i = 0; i < K; i++) {
            bool second = i >= HALF;
            x->codes[r][i] = !second               ? code_at(f, r, i)
                             : is_small(f, i)      ? 0
                             : f > FORM_ROW_WEIGHT ? code_at(f, r, i)
                                                   : x->codes[r][i - HALF];
        }
        for (uint32_t c = 0; c < K / KN_ACT_BLOCK; c++) {
            x->scales[r][c] = scale_at(f, r, c % (HALF / KN_ACT_BLOCK));
        }
    }
    for (uint32_t o = 0; o < O; o++) {
        for (uint32_t i = 0; i < K / 2; i++) {
            bool second = i >= HALF / 2;
            x->w_codes[o][i] = second                          ? x->w_codes[o][i - HALF / 2] ^ 0x88
                               : f == FORM_ZEROS && o % 4 == 0 ? (uint8_t)(random_u32(70, i) & 0x88)
                                                               : (uint8_t)random_u32(70 + f, o * K + i);
        }
        for (uint32_t b = 0; b < K / KN_FP4_BLOCK; b++) {
            x->w_scales[o][b] = w_scale_at(f, o, b % (HALF / KN_FP4_BLOCK));
        }
    }
}

/* Products of all rows, at most `cut` in a call, with the first k inputs of them (whose scales and codes then
 * stand closer together). */
static void multiply(rig *r, const operands *x, uint32_t k, uint32_t cut, bool prepare, uint16_t y_out[N][O])
{
    uint32_t n_scale = kn_blocks(k, KN_ACT_BLOCK), n_w_scale = kn_blocks(k, KN_FP4_BLOCK);
    uint8_t *codes = cm_alloc(N * k), *scales = cm_alloc(N * n_scale);
    uint8_t *w_codes = cm_alloc(O * k / 2), *w_scales = cm_alloc(O * n_w_scale);
    kn_matrix w = {.n_out = O, .n_in = k, .dtype = KN_E2M1, .scale_dtype = KN_E8M0};
    kn_ptr y = rig_new(r, sizeof(uint16_t) * N * O);
    kn_q8 q;
    for (uint32_t i = 0; i < N; i++) {
        memcpy(codes + i * k, x->codes[i], k);
        memcpy(scales + i * n_scale, x->scales[i], n_scale);
    }
    for (uint32_t i = 0; i < O; i++) {
        memcpy(w_codes + i * k / 2, x->w_codes[i], k / 2);
        memcpy(w_scales + i * n_w_scale, x->w_scales[i], n_w_scale);
    }
    q = (kn_q8){rig_up(r, codes, N * k), rig_up(r, scales, N * n_scale)};
    w.data = rig_up(r, w_codes, O * k / 2);
    w.scale = rig_up(r, w_scales, O * n_w_scale);
    w = prepare ? prepared(r, w) : w;
    for (uint32_t at = 0; at < N; at += cut) {
        kn_dense(r->device)->linear_q8(r->stream,
                                       (kn_q8){kn_at(q.codes, at * k), kn_at(q.scales, at * n_scale)}, &w,
                                       N - at < cut ? N - at : cut, kn_at(y, sizeof(uint16_t) * at * O));
    }
    rig_down(r, y_out, y, sizeof(uint16_t) * N * O);
    cm_free(codes);
    cm_free(scales);
    cm_free(w_codes);
    cm_free(w_scales);
    rig_reset(r);
}

static const kn_limits LIMITS = {
    .n_row = N, .n_in = K, .n_inner = 128, .n_head = 1, .head_dim = 64, .n_key = 1, .n_expert = 1};

static void compare(form f, uint32_t k)
{
    static const uint32_t cuts[] = {1, 2, 3, 4, 5, 6, 7, 8, 11, N};
    static uint16_t want[N][O], got[N][O];
    operands *x = cm_alloc(sizeof(*x));
    rig r;
    make(f, x);
    rig_open(&r, "ref", NULL, 1, &LIMITS);
    multiply(&r, x, k, N, false, want);
    rig_close(&r);
    for (uint32_t i = 0; kn_cpu_isa_at(i) != NULL; i++) {
        rig_open(&r, "cpu", kn_cpu_isa_at(i), 2, &LIMITS);
        for (uint32_t way = 0; way < 2 * sizeof(cuts) / sizeof(cuts[0]); way++) {
            multiply(&r, x, k, cuts[way / 2], way % 2, got);
            for (uint32_t at = 0; at < N * O; at++) {
                if (got[at / O][at % O] != want[at / O][at % O]) {
                    fail_msg(
                        "%s, form %u, %u inputs, %u rows at once, prepared %u, seed %llu: row %u output %u "
                        "is %04x, not %04x",
                        kn_device_isa(r.device), f, k, cuts[way / 2], way % 2,
                        (unsigned long long)random_seed, at / O, at % O, got[at / O][at % O],
                        want[at / O][at % O]);
                }
            }
        }
        rig_close(&r);
    }
    cm_free(x);
}

#define FORM_TEST(name, form)                                                                                \
    static void test_##name(void **state)                                                                    \
    {                                                                                                        \
        (void)state;                                                                                         \
        compare(form, K);                                                                                    \
        compare(form, K - 70); /* ends in a block */                                                         \
    }
FORM_TEST(plain, FORM_PLAIN)
FORM_TEST(small, FORM_SMALL)
FORM_TEST(chunk, FORM_CHUNK)
FORM_TEST(row_input, FORM_ROW_INPUT)
FORM_TEST(row_weight, FORM_ROW_WEIGHT)
FORM_TEST(ends, FORM_ENDS)
FORM_TEST(zeros, FORM_ZEROS)
FORM_TEST(nan_scale, FORM_NAN_SCALE)
FORM_TEST(nan_input, FORM_NAN_INPUT)

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plain),     cmocka_unit_test(test_small),      cmocka_unit_test(test_chunk),
        cmocka_unit_test(test_row_input), cmocka_unit_test(test_row_weight), cmocka_unit_test(test_ends),
        cmocka_unit_test(test_zeros),     cmocka_unit_test(test_nan_scale),  cmocka_unit_test(test_nan_input),
    };
    if (argc > 1) {
        random_seed = strtoull(argv[1], NULL, 0);
    }
    print_message("seed %llu\n", (unsigned long long)random_seed);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
