/* FP8 products where integers of 16 bits do not hold all of an input or weight, or sums reach their bound:
 * every path of the cpu back-end against the oracle, bit for bit. The second half of each row undoes the
 * first but for what is to be seen: in a bf16 of the whole sum it would not show. Usage: t_fp8 [seed] */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "tests/unit/kernel_random.h"

enum { N = 67, K = 1024, HALF = K / 2, O = 50, LARGE = 0x78, MOST = 0x7e };

typedef enum form {
    FORM_PLAIN,       /* all codes alike */
    FORM_INPUT_REST,  /* among large ones small inputs, whose last bits stand apart */
    FORM_WEIGHT_REST, /* small weights likewise */
    FORM_BOTH_REST,   /* one meets the other */
    FORM_FEW_RESTS,   /* about one in a block and row, each row's elsewhere */
    FORM_MANY_RESTS,  /* as beside outliers: as many as ten in a block, likewise */
    FORM_MOST,        /* nothing but 448 in the first half: the largest sums of all */
    FORM_LEAST,       /* nothing but 2^-9 to 7 2^-9 */
    FORM_ENDS,        /* scales at the ends of E8M0 */
    FORM_ZEROS,       /* zeros of either sign in most blocks and some rows, and in weights */
    FORM_NAN_WEIGHT,
    FORM_NAN_INPUT,
    FORM_N
} form;

typedef struct operands {
    uint8_t codes[N][K], scales[N][K / KN_ACT_BLOCK];
    uint8_t w_codes[O][K], w_scales[K / KN_ACT_BLOCK];
} operands;

enum { ROW_KEY = 10, OUT_KEY = 300 };

/* Of the row or output that has the key. Where small inputs are drawn most weights are small, so that with
 * few of them some outputs have nothing but products of two small ones left. */
static bool is_small(form f, uint64_t key, uint32_t i)
{
    uint32_t u = random_u32(1000 + key, i);
    if (f != FORM_FEW_RESTS && f != FORM_MANY_RESTS) {
        return i % 16 == 5;
    }
    return key >= OUT_KEY ? u % 4 != 0 : u % (f == FORM_FEW_RESTS ? 128 : 8 + key % 16) == 0;
}

/* i < HALF; small ones are odd multiples of 2^-9, or of many sizes where they are drawn. */
static uint8_t code_at(form f, uint64_t key, uint32_t i, bool with_small)
{
    uint32_t u = random_u32(key, i), sign = u >> 24 & 0x80;
    switch (f) {
    case FORM_INPUT_REST:
    case FORM_WEIGHT_REST:
    case FORM_BOTH_REST:
        return (uint8_t)(sign | (with_small && is_small(f, key, i) ? 1 + u % 4 * 2 : LARGE + u % 7));
    case FORM_FEW_RESTS:
    case FORM_MANY_RESTS:
        return (uint8_t)(sign | (is_small(f, key, i) ? 1 + u % 0x3f : LARGE + u % 7));
    case FORM_MOST:
        return MOST;
    case FORM_LEAST:
        return (uint8_t)(sign | u % 8);
    case FORM_ZEROS:
        return (uint8_t)(sign | (i / KN_ACT_BLOCK % 2 == 0 ? 0 : u % 0x7f));
    default:
        return (uint8_t)(sign | u % 0x7f);
    }
}

/* What of the second half is not there: the rest of it is the first, with weights negated. */
static bool is_left_out(form f, uint64_t key, uint32_t i)
{
    bool rests = f >= FORM_INPUT_REST && f <= FORM_MANY_RESTS;
    return (rests && is_small(f, key, i)) || f == FORM_MOST;
}

static void make(form f, operands *x)
{
    for (uint32_t r = 0; r < N; r++) {
        for (uint32_t i = 0; i < HALF; i++) {
            uint8_t code =
                f == FORM_ZEROS && r % 3 == 0 ? 0x80 : code_at(f, ROW_KEY + r, i, f != FORM_WEIGHT_REST);
            x->codes[r][i] = code;
            x->codes[r][i + HALF] = is_left_out(f, ROW_KEY + r, i) ? 0 : code;
        }
        for (uint32_t b = 0; b < K / KN_ACT_BLOCK; b++) {
            uint32_t u = random_u32(200 + r, b % (HALF / KN_ACT_BLOCK));
            x->scales[r][b] = (uint8_t)(f == FORM_ENDS ? u % 2 * 254 : 120 + u % 4);
        }
    }
    for (uint32_t o = 0; o < O; o++) {
        for (uint32_t i = 0; i < HALF; i++) {
            uint8_t code = code_at(f, OUT_KEY + o, i, f != FORM_INPUT_REST);
            x->w_codes[o][i] = code;
            x->w_codes[o][i + HALF] = code ^ 0x80;
        }
    }
    for (uint32_t b = 0; b < K / KN_ACT_BLOCK; b++) {
        uint32_t u = random_u32(400, b % (HALF / KN_ACT_BLOCK));
        x->w_scales[b] = (uint8_t)(f == FORM_ENDS ? u % 2 * 254 : 117 + u % 4);
    }
    if (f == FORM_NAN_WEIGHT) {
        x->w_codes[7][3] = 0xff;
        x->w_codes[33][K - 200] = 0x7f;
    }
    if (f == FORM_NAN_INPUT) {
        x->codes[4][K - 200] = 0xff;
    }
}

/* Products of all rows, at most `cut` in a call, with the first k inputs of them. */
static void multiply(rig *r, const operands *x, uint32_t k, uint32_t cut, bool prepare, uint16_t y_out[N][O])
{
    uint32_t n_scale = kn_blocks(k, KN_ACT_BLOCK);
    uint8_t *codes = cm_alloc(N * k), *scales = cm_alloc(N * n_scale), *w_codes = cm_alloc(O * k);
    kn_matrix w = {.n_out = O, .n_in = k, .dtype = KN_E4M3, .scale_dtype = KN_E8M0};
    kn_ptr y = rig_new(r, sizeof(uint16_t) * N * O);
    for (uint32_t i = 0; i < N; i++) {
        memcpy(codes + i * k, x->codes[i], k);
        memcpy(scales + i * n_scale, x->scales[i], n_scale);
    }
    for (uint32_t i = 0; i < O; i++) {
        memcpy(w_codes + i * k, x->w_codes[i], k);
    }
    kn_q8 q = {rig_up(r, codes, N * k), rig_up(r, scales, N * n_scale)};
    w.data = rig_up(r, w_codes, O * k);
    w.scale = rig_up(r, x->w_scales, n_scale);
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
    rig_reset(r);
}

static const kn_limits LIMITS = {
    .n_row = N, .n_in = K, .n_inner = 128, .n_head = 1, .head_dim = 64, .n_key = 1, .n_expert = 1};

static void compare(form f, uint32_t k)
{
    static const uint32_t cuts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, N};
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
FORM_TEST(input_rest, FORM_INPUT_REST)
FORM_TEST(weight_rest, FORM_WEIGHT_REST)
FORM_TEST(both_rest, FORM_BOTH_REST)
FORM_TEST(few_rests, FORM_FEW_RESTS)
FORM_TEST(many_rests, FORM_MANY_RESTS)
FORM_TEST(most, FORM_MOST)
FORM_TEST(least, FORM_LEAST)
FORM_TEST(ends, FORM_ENDS)
FORM_TEST(zeros, FORM_ZEROS)
FORM_TEST(nan_weight, FORM_NAN_WEIGHT)
FORM_TEST(nan_input, FORM_NAN_INPUT)

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plain),       cmocka_unit_test(test_input_rest),
        cmocka_unit_test(test_weight_rest), cmocka_unit_test(test_both_rest),
        cmocka_unit_test(test_few_rests),   cmocka_unit_test(test_many_rests),
        cmocka_unit_test(test_most),        cmocka_unit_test(test_least),
        cmocka_unit_test(test_ends),        cmocka_unit_test(test_zeros),
        cmocka_unit_test(test_nan_weight),  cmocka_unit_test(test_nan_input),
    };
    if (argc > 1) {
        random_seed = strtoull(argv[1], NULL, 0);
    }
    print_message("seed %llu\n", (unsigned long long)random_seed);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
