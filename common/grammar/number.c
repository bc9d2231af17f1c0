/* Numbers between bounds, digit by digit: a state knows whether the digits so far are still those of the
 * lower or of the upper bound. Numbers have at most 15 digits before and behind the point, so that a reader's
 * double keeps their order; with bounds they have no exponent. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/mem.h"
#include "common/grammar/build_private.h"

enum { DIGITS = 15, WORDS_MAX = 4096, REMAINDERS_MAX = 1000 };
#define WHOLE_MAX   999999999999999ull   /* DIGITS digits */
#define INTEGER_MAX 999999999999999999ll /* when the schema's own bounds ask for more */

static uint32_t digit_rule(gm_build *b)
{
    if (b->rule_digit == 0) {
        b->rule_digit = gm_rule_new(b, NULL);
        gm_byte(b, b->rules[b->rule_digit].start, b->rules[b->rule_digit].accept, '0', '9');
    }
    return b->rule_digit;
}

/* ---- whole numbers without a sign ---- */

static void put_digits(gm_build *b, uint32_t from, uint32_t to, int lo, int hi)
{
    if (lo <= hi) {
        gm_byte(b, from, to, (uint8_t)lo, (uint8_t)hi);
    }
}

/* n digits from those of lo to those of hi. */
static void fixed_range(gm_build *b, uint32_t from, uint32_t to, const char *lo, const char *hi, size_t n)
{
    bool split = false; /* the digits of the bounds have differed */
    uint32_t both = from, low = from, high = from, any = from;
    for (size_t i = 0; i < n; i++) {
        bool last = i + 1 == n;
        uint32_t next_both = last ? to : gm_state_new(b), next_low = last ? to : gm_state_new(b);
        uint32_t next_high = last ? to : gm_state_new(b), next_any = last ? to : gm_state_new(b);
        if (split) {
            put_digits(b, low, next_low, lo[i], lo[i]);
            put_digits(b, low, next_any, lo[i] + 1, '9');
            put_digits(b, high, next_high, hi[i], hi[i]);
            put_digits(b, high, next_any, '0', hi[i] - 1);
            put_digits(b, any, next_any, '0', '9');
        } else if (lo[i] == hi[i]) {
            put_digits(b, both, next_both, lo[i], lo[i]);
        } else {
            split = true;
            put_digits(b, both, next_low, lo[i], lo[i]);
            put_digits(b, both, next_high, hi[i], hi[i]);
            put_digits(b, both, next_any, lo[i] + 1, hi[i] - 1);
        }
        both = next_both;
        low = next_low;
        high = next_high;
        any = next_any;
    }
}

static void whole_range(gm_build *b, uint32_t from, uint32_t to, uint64_t lo, uint64_t hi)
{
    char first[24], last[24];
    for (uint64_t begin = 0, end = 9; begin <= hi && end < UINT64_MAX / 10;
         begin = end + 1, end = end * 10 + 9) {
        if (end < lo) {
            continue;
        }
        int n = snprintf(first, sizeof(first), "%llu", (unsigned long long)(begin > lo ? begin : lo));
        snprintf(last, sizeof(last), "%llu", (unsigned long long)(end < hi ? end : hi));
        fixed_range(b, from, to, first, last, (size_t)n);
    }
}

/* ---- fractions ---- */

/* A bound without its sign: whole.digits, no zeros at the end of digits. */
typedef struct decimal {
    uint64_t whole;
    char digits[24];
    size_t n;
    bool open;
} decimal;

static bool decimal_of(double x, bool open, decimal *out)
{
    char text[64];
    for (int precision = 0; precision <= DIGITS; precision++) {
        snprintf(text, sizeof(text), "%.*f", precision, x);
        double back = strtod(text, NULL);
        if (!(back < x) && !(back > x)) {
            char *point = strchr(text, '.');
            out->whole = strtoull(text, NULL, 10);
            out->n = point != NULL ? strlen(point + 1) : 0;
            memcpy(out->digits, point != NULL ? point + 1 : "", out->n + 1);
            out->open = open;
            return true;
        }
    }
    return false;
}

/* What a fraction must keep to; NULL: anything. */
typedef struct fraction {
    gm_build *b;
    const decimal *lo, *hi;
    uint32_t state[DIGITS + 1][2][2]; /* so many digits read; still at lo's, at hi's */
    uint32_t to;
} fraction;

static int bound_digit(const decimal *bound, size_t i)
{
    return i < bound->n ? bound->digits[i] : '0';
}

/* May the number end behind n digits? */
static bool fraction_ends(const fraction *f, size_t n, bool at_lo, bool at_hi)
{
    bool above = !at_lo || (n >= f->lo->n && !f->lo->open);
    bool below = !at_hi || n < f->hi->n || !f->hi->open;
    return above && below;
}

static void fraction_state(const fraction *f, size_t n, bool at_lo, bool at_hi)
{
    uint32_t from = f->state[n][at_lo][at_hi];
    if (n > 0 && fraction_ends(f, n, at_lo, at_hi)) {
        gm_empty(f->b, from, f->to);
    }
    for (int digit = '0'; digit <= '9' && n < DIGITS; digit++) {
        int lo = at_lo ? bound_digit(f->lo, n) : '0', hi = at_hi ? bound_digit(f->hi, n) : '9';
        if (digit >= lo && digit <= hi) {
            uint32_t next = f->state[n + 1][at_lo && digit == lo][at_hi && digit == hi];
            gm_byte(f->b, from, next, (uint8_t)digit, (uint8_t)digit);
        }
    }
}

/* Behind the whole part: nothing, or a point and digits. lo, hi: the whole part was this bound's, so the
 * fraction must keep to it; NULL: it need not. */
static void put_fraction(gm_build *b, uint32_t from, uint32_t to, const decimal *lo, const decimal *hi)
{
    fraction f = {.b = b, .lo = lo, .hi = hi, .to = to};
    for (size_t n = 0; n <= DIGITS; n++) {
        for (uint32_t k = 0; k < 4; k++) {
            f.state[n][k & 1][k >> 1] = gm_state_new(b);
        }
    }
    for (size_t n = 0; n <= DIGITS; n++) {
        for (uint32_t k = 0; k < 4; k++) {
            bool at_lo = (k & 1) != 0, at_hi = k >> 1 != 0;
            if ((lo != NULL || !at_lo) && (hi != NULL || !at_hi)) {
                fraction_state(&f, n, at_lo, at_hi);
            }
        }
    }
    if (fraction_ends(&f, 0, lo != NULL, hi != NULL)) {
        gm_empty(b, from, to);
    }
    gm_byte(b, from, f.state[0][lo != NULL][hi != NULL], '.', '.');
}

/* From lo to hi, without a sign. */
static void put_magnitude(gm_build *b, uint32_t from, uint32_t to, const decimal *lo, const decimal *hi)
{
    uint32_t whole = gm_state_new(b), first = gm_state_new(b), last = gm_state_new(b);
    if (lo->whole > hi->whole) {
        return;
    }
    whole_range(b, from, first, lo->whole, lo->whole);
    if (lo->whole == hi->whole) {
        put_fraction(b, first, to, lo, hi);
        return;
    }
    put_fraction(b, first, to, lo, NULL);
    whole_range(b, from, last, hi->whole, hi->whole);
    put_fraction(b, last, to, NULL, hi);
    if (lo->whole + 1 < hi->whole) {
        whole_range(b, from, whole, lo->whole + 1, hi->whole - 1);
        put_fraction(b, whole, to, NULL, NULL);
    }
}

/* -?(0|[1-9]\d{0,14})(\.\d{1,15})?([eE][+-]?\d{1,2})? */
static void any_number(gm_build *b, uint32_t from, uint32_t to)
{
    uint32_t sign = gm_state_new(b), more = gm_state_new(b), whole = gm_state_new(b), point = gm_state_new(b);
    uint32_t mantissa = gm_state_new(b), e = gm_state_new(b), exponent = gm_state_new(b),
             digit = digit_rule(b);
    gm_empty(b, from, sign);
    gm_byte(b, from, sign, '-', '-');
    gm_byte(b, sign, whole, '0', '0');
    gm_byte(b, sign, more, '1', '9');
    gm_call(b, more, whole, digit, 0, DIGITS - 1);
    gm_empty(b, whole, mantissa);
    gm_byte(b, whole, point, '.', '.');
    gm_call(b, point, mantissa, digit, 1, DIGITS);
    gm_empty(b, mantissa, to);
    gm_byte(b, mantissa, e, 'e', 'e');
    gm_byte(b, mantissa, e, 'E', 'E');
    gm_empty(b, e, exponent);
    gm_byte(b, e, exponent, '+', '+');
    gm_byte(b, e, exponent, '-', '-');
    gm_call(b, exponent, to, digit, 1, 2);
}

/* Bounds outside of what is written anyway bound nothing. */
static void drop_far_bounds(gm_bounds *bounds)
{
    bounds->has_min &= bounds->min > -1e15;
    bounds->has_max &= bounds->max < 1e15;
}

static void refuse_bound(gm_build *b, const char *path)
{
    gm_build_fail(b, CM_E_UNSUPPORTED, path,
                  "a bound of a number must be below 1e15 and have at most 15 digits behind the point");
}

void gm_number(gm_build *b, uint32_t from, uint32_t to, const gm_bounds *given, const char *path)
{
    static const decimal zero = {0};
    const decimal far = {.whole = WHOLE_MAX, .digits = "999999999999999", .n = DIGITS};
    gm_bounds is = *given;
    decimal min = zero, max = far;
    bool bad = (is.has_min && is.min >= 1e15) || (is.has_max && is.max <= -1e15);
    drop_far_bounds(&is);
    if (!is.has_min && !is.has_max && !bad) {
        any_number(b, from, to);
        return;
    }
    if (bad || (is.has_min && !decimal_of(fabs(is.min), is.open_min, &min)) ||
        (is.has_max && !decimal_of(fabs(is.max), is.open_max, &max))) {
        refuse_bound(b, path);
        return;
    }
    decimal nil = {.open = is.has_max && is.open_max && !(is.max > 0)}; /* where the negative ones begin */
    if (!is.has_min || is.min < 0) {
        uint32_t sign = gm_state_new(b);
        gm_byte(b, from, sign, '-', '-');
        put_magnitude(b, sign, to, is.has_max && is.max < 0 ? &max : &nil, is.has_min ? &min : &far);
    }
    if (!is.has_max || !(is.max < 0)) {
        put_magnitude(b, from, to, is.has_min && !(is.min < 0) ? &min : &zero, &max);
    }
}

/* ---- integers ---- */

static void integer_range(gm_build *b, uint32_t from, uint32_t to, int64_t lo, int64_t hi)
{
    if (lo < 0) {
        uint32_t sign = gm_state_new(b);
        gm_byte(b, from, sign, '-', '-');
        whole_range(b, sign, to, hi < 0 ? (uint64_t)-hi : 1, (uint64_t)-lo);
    }
    if (hi >= 0) {
        whole_range(b, from, to, lo > 0 ? (uint64_t)lo : 0, (uint64_t)hi);
    }
}

/* Every one of them as a word. */
static void integer_words(gm_build *b, uint32_t from, uint32_t to, int64_t first, int64_t last, int64_t step)
{
    enum { TEXT = 24 };
    size_t n = (size_t)((last - first) / step + 1);
    char *texts = cm_alloc(n * TEXT);
    gm_word *words = cm_alloc(n * sizeof(*words));
    for (size_t i = 0; i < n; i++) {
        words[i].bytes = texts + i * TEXT;
        words[i].n = (size_t)snprintf(texts + i * TEXT, TEXT, "%lld", (long long)(first + (int64_t)i * step));
    }
    gm_words(b, from, to, words, n);
    cm_free(words);
    cm_free(texts);
}

/* Remainders of the digits so far, of one digit, of two and so on. */
static void positive_multiples(gm_build *b, uint32_t from, uint32_t to, uint32_t m)
{
    uint32_t first = b->n_state;
    b->n_state += m * DIGITS;
    for (uint32_t digit = 1; digit <= 9; digit++) {
        gm_byte(b, from, first + digit % m, (uint8_t)('0' + digit), (uint8_t)('0' + digit));
    }
    for (uint32_t n = 1; n <= DIGITS && b->status == CM_OK; n++, first += m) {
        for (uint32_t i = 0; i < 10 * m && n < DIGITS; i++) { /* remainder i / 10, then digit i % 10 */
            uint8_t digit = (uint8_t)('0' + i % 10);
            gm_byte(b, first + i / 10, first + m + i % m, digit, digit);
        }
        gm_empty(b, first, to);
    }
}

static void put_multiples(gm_build *b, uint32_t from, uint32_t to, int64_t lo, int64_t hi, int64_t m,
                          const char *path)
{
    int64_t far = (int64_t)WHOLE_MAX, first = lo > 0 ? (lo + m - 1) / m * m : -(-lo / m * m);
    int64_t last = hi < 0 ? -((-hi + m - 1) / m * m) : hi / m * m;
    if (first > last) {
        return;
    }
    if ((last - first) / m < WORDS_MAX) {
        integer_words(b, from, to, first, last, m);
        return;
    }
    if (hi != far || (lo != -far && lo != 0 && lo != 1) || m > REMAINDERS_MAX) {
        gm_build_fail(b, CM_E_UNSUPPORTED, path,
                      "multipleOf %lld is supported up to %d, and with bounds that leave at most %d numbers",
                      (long long)m, REMAINDERS_MAX, WORDS_MAX);
        return;
    }
    uint32_t rule = gm_rule_new(b, NULL), sign = gm_state_new(b);
    positive_multiples(b, b->rules[rule].start, b->rules[rule].accept, (uint32_t)m);
    gm_call(b, from, to, rule, 1, 1);
    if (lo < 0) {
        gm_byte(b, from, sign, '-', '-');
        gm_call(b, sign, to, rule, 1, 1);
    }
    if (lo <= 0) {
        gm_byte(b, from, to, '0', '0');
    }
}

void gm_integer(gm_build *b, uint32_t from, uint32_t to, const gm_bounds *is, int64_t multiple,
                const char *path)
{
    int64_t lo = -(int64_t)WHOLE_MAX, hi = (int64_t)WHOLE_MAX;
    if ((is->has_min && !(fabs(is->min) < 1e18)) || (is->has_max && !(fabs(is->max) < 1e18))) {
        gm_build_fail(b, CM_E_UNSUPPORTED, path, "a bound of an integer must be below 1e18");
        return;
    }
    if (is->has_min) {
        double least = ceil(is->min);
        lo = (int64_t)least + (is->open_min && !(least > is->min));
    }
    if (is->has_max) {
        double most = floor(is->max);
        hi = (int64_t)most - (is->open_max && !(most < is->max));
    }
    hi = !is->has_max && lo > hi ? INTEGER_MAX : hi;
    lo = !is->has_min && hi < lo ? -INTEGER_MAX : lo;
    if (lo > hi) {
        return;
    }
    if (multiple > 0) {
        put_multiples(b, from, to, lo, hi, multiple, path);
    } else {
        integer_range(b, from, to, lo, hi);
    }
}
