/* Arithmetic of kernels/kn_math.h against libm and its own definitions. Usage: t_kn_math [seed] */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <cmocka.h>

#include "common/base/rng.h"
#include "kernels/kn_math.h"

static uint64_t seed = 20240607;

/* Distance in units of the last place of want. */
static double ulps(double got, double want)
{
    double unit;
    if (got == want || (isnan(got) && isnan(want))) {
        return 0;
    }
    unit = nextafter(fabs(want), INFINITY) - fabs(want);
    return fabs(got - want) / unit;
}

static void test_exp_log(void **state)
{
    static const double edges[] = {0,      -0.0,      1,      -1,      709.78, 709.79, 720,
                                   1e308,  INFINITY,  -708.4, -744.4,  -745.1, -745.2, -750,
                                   -1e308, -INFINITY, 1e-300, -1e-300, NAN};
    double worst_exp = 0, worst_log1p = 0, worst_log = 0;
    (void)state;
    for (size_t i = 0; i < sizeof(edges) / sizeof(edges[0]); i++) {
        assert_true(ulps(kn_exp(edges[i]), exp(edges[i])) <= 1);
    }
    assert_true(kn_log1p(INFINITY) == INFINITY && isnan(kn_log1p(NAN)));
    for (uint64_t i = 0; i < 200000; i++) {
        double u = cm_rng_uniform(seed, i, 600) * 2 - 1;
        double span = i % 2 ? 745 : 2, tiny = exp((u - 1) * 300);
        double x = i % 3 == 0 ? tiny : i % 3 == 1 ? exp(u * 20) : u * 0.9;
        worst_exp = fmax(worst_exp, ulps(kn_exp(u * span), exp(u * span)));
        worst_log1p = fmax(worst_log1p, ulps(kn_log1p(x), log1p(x)));
        worst_log = fmax(worst_log, ulps(kn_log(exp(u * 300)), log(exp(u * 300))));
    }
    print_message("units in the last place: exp %.2f log1p %.2f log %.2f\n", worst_exp, worst_log1p,
                  worst_log);
    assert_true(worst_exp <= 1 && worst_log1p <= 2 && worst_log <= 2);
}

static void test_sin_cos(void **state)
{
    double worst_sin = 0, worst_cos = 0;
    (void)state;
    for (uint64_t i = 0; i < 400000; i++) {
        double u = cm_rng_uniform(seed, i, 601);
        /* anywhere, small, a float32 angle, and next to a multiple of pi/2 */
        double x = i % 4 == 0   ? u * 2.2e6 - 1.1e6
                   : i % 4 == 1 ? (u - 0.5) * 4
                   : i % 4 == 2 ? (double)((float)(uint32_t)(u * 1048576) * 0.76f)
                                : floor(u * 700000) * 1.5707963267948966;
        worst_sin = fmax(worst_sin, ulps(kn_sin(x), sin(x)));
        worst_cos = fmax(worst_cos, ulps(kn_cos(x), cos(x)));
    }
    print_message("units in the last place: sin %.2f cos %.2f\n", worst_sin, worst_cos);
    assert_true(worst_sin <= 1 && worst_cos <= 1);
}

/* Tables of the specification (section 13), first, middle and last entries. */
static void test_inv_freq(void **state)
{
    float plain[32], yarn[32];
    (void)state;
    kn_rope_inv_freq(10000, 64, 0, 0, 0, 0, false, plain);
    kn_rope_inv_freq(160000, 64, 16, 65536, 32, 1, true, yarn);
    assert_true(plain[0] == 1.0f && plain[1] == 7.49894202e-1f && plain[31] == 1.33352150e-4f);
    assert_true(yarn[15] == 3.63553851e-03f && yarn[16] == 2.26562493e-03f && yarn[24] == 1.95312532e-05f &&
                yarn[31] == 5.68052940e-07f);
}

static void test_topk(void **state)
{
    enum { N = 5000 };
    static float score[N];
    static int32_t picks[N];
    (void)state;
    for (uint32_t i = 0; i < N; i++) {
        score[i] = (float)(cm_rng_at(seed, i, 610).word[0] % 97) - 40.0f;
        score[i] = score[i] == 0 && i % 2 ? -0.0f : score[i];
    }
    for (uint32_t k = 0; k <= N; k += 417) {
        kn_topk(score, N, k, picks);
        for (uint32_t i = 1; i < k; i++) {
            float a = score[picks[i - 1]], b = score[picks[i]];
            assert_true(a > b || (a == b && picks[i - 1] < picks[i]));
        }
        for (uint32_t i = 0, n_better = 0; k > 0 && i < N; i++) {
            int32_t last = picks[k - 1];
            n_better += score[i] > score[last] || (score[i] == score[last] && (int32_t)i < last);
            assert_true(n_better < k);
        }
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exp_log),
        cmocka_unit_test(test_sin_cos),
        cmocka_unit_test(test_inv_freq),
        cmocka_unit_test(test_topk),
    };
    if (argc > 1) {
        seed = strtoull(argv[1], NULL, 0);
    }
    print_message("seed %llu\n", (unsigned long long)seed);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
