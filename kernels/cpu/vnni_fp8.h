/* E4M3 weights in digits, for the files that multiply them: w = 8 (255 e1 + e0) + s in units of 2^-9.
 *
 * Base 255 because its digits reach from -127 to 127: the digits of -w are those of w negated, so a table has
 * magnitudes only (128 bytes, one permutation of two registers) and the sign is one masked subtraction.
 * Digits are biased by 128 into unsigned bytes. An s is rare (0 unless |w| < 2^-3) and listed one by one. */
#pragma once
#include "kernels/cpu/vnni.h"

enum {
    FP8_COLUMNS = CPU_CHUNK / 4, /* of a block */
    FP8_BIAS = 128,
    FP8_BASE = 255,   /* of the weights' digits */
    FP8_AHEAD = 8192, /* bytes of weights that are asked for before they are needed */
};

/* An s that is not zero. */
typedef struct fp8_rest {
    uint8_t out, input; /* of the 16 outputs, of the block's inputs */
    int8_t s;
} fp8_rest;

/* The weights of one block and 16 outputs. */
typedef struct fp8_weights {
    const __m512i *codes; /* [FP8_COLUMNS]: in a prepared matrix, or buffer */
    __m512i buffer[FP8_COLUMNS];
    __m512i e1[FP8_COLUMNS], e0[FP8_COLUMNS]; /* biased; filled where several groups of rows read them */
    uint32_t with_rest;                       /* bit j: column j has an s, or a NaN */
    uint32_t n_rest;
    fp8_rest rest[VNNI_OUTS * CPU_CHUNK]; /* all s of the block */
} fp8_weights;

/* Of a magnitude, in units of 2^-9: without NaN, and in eighths what has no rest. */
#define UNITS(c)   ((c) < 8 || (c) == 127 ? 0 : (8 + ((c)&7)) << (((c) >> 3) - 1))
#define EIGHTHS(c) (UNITS(c) % 8 != 0 ? 0 : UNITS(c) / 8)
#define DIGIT1(c)  ((EIGHTHS(c) + 127) / FP8_BASE)
#define BIASED1(c) (FP8_BIAS + DIGIT1(c))
#define BIASED0(c) (FP8_BIAS + EIGHTHS(c) - FP8_BASE * DIGIT1(c))
#define X4(f, c)   f(c), f((c) + 1), f((c) + 2), f((c) + 3)
#define X16(f, c)  X4(f, c), X4(f, (c) + 4), X4(f, (c) + 8), X4(f, (c) + 12)
#define X64(f, c)  X16(f, c), X16(f, (c) + 16), X16(f, (c) + 32), X16(f, (c) + 48)

/* Biased digits of the magnitudes 0 .. 63 and 64 .. 127. */
static const uint8_t FP8_DIGITS[2][2][64] = {{{X64(BIASED1, 0)}, {X64(BIASED1, 64)}},
                                             {{X64(BIASED0, 0)}, {X64(BIASED0, 64)}}};

/* The same in registers. */
typedef struct fp8_tables {
    __m512i digit[2][2];
} fp8_tables;

INLINED fp8_tables load_tables(void)
{
    fp8_tables t;
    for (int which = 0; which < 2; which++) {
        for (int half = 0; half < 2; half++) {
            t.digit[which][half] = _mm512_loadu_si512(FP8_DIGITS[which][half]);
            /* Otherwise the compiler reads them from memory at each use, beside all other loads. */
            __asm__("" : "+v"(t.digit[which][half]));
        }
    }
    return t;
}

/* Digit 1 (which 0) or 0 (which 1) of 64 codes. Of a negative one 128 - d = 0 - (128 + d) in a byte. */
INLINED __m512i weight_digit(const fp8_tables *t, __m512i codes, int which)
{
    __m512i digit = _mm512_permutex2var_epi8(t->digit[which][0], codes, t->digit[which][1]);
    return _mm512_mask_sub_epi8(digit, _mm512_movepi8_mask(codes), _mm512_setzero_si512(), digit);
}

/* Whether a column has an s, or a NaN. */
static inline bool column_with_rest(__m512i codes)
{
    const __m512i magnitude = _mm512_set1_epi8(127);
    __m512i rest = vnni_look_up(KN_FN(kn_vnni_digits).r, codes);
    return _mm512_test_epi8_mask(rest, rest) != 0 ||
           _mm512_cmpeq_epi8_mask(_mm512_and_si512(codes, magnitude), magnitude) != 0;
}

static inline uint32_t columns_with_rest(const __m512i columns[FP8_COLUMNS])
{
    uint32_t bits = 0;
    for (uint32_t j = 0; j < FP8_COLUMNS; j++) {
        bits |= (uint32_t)column_with_rest(columns[j]) << j;
    }
    return bits;
}

/* Columns of block b of 16 rows in the stored form. */
static inline void read_columns(const vnni_rows *rows, uint32_t n_in, uint32_t b,
                                __m512i columns_out[FP8_COLUMNS])
{
    uint32_t at = b * CPU_CHUNK;
    KN_FN(kn_vnni_columns)(rows, at, n_in, columns_out);
    if (n_in - at > 64) {
        KN_FN(kn_vnni_columns)(rows, at + 64, n_in, columns_out + 16);
    } else {
        memset(columns_out + 16, 0, 16 * sizeof(columns_out[0]));
    }
}

/* A prepared matrix: columns [tile of outputs][block][FP8_COLUMNS], then which have a rest
 * [tile of outputs][block]. */
static inline uint64_t n_prepared_blocks(const kn_matrix *m)
{
    return (uint64_t)kn_blocks(m->n_out, VNNI_OUTS) * kn_blocks(m->n_in, CPU_CHUNK);
}

/* Block b of the outputs at o. */
static inline void read_weights(const kn_matrix *m, uint32_t o, uint32_t b, fp8_weights *w)
{
    if (m->prepared) {
        uint64_t at = (uint64_t)(o / VNNI_OUTS) * kn_blocks(m->n_in, CPU_CHUNK) + b;
        const __m512i *columns = kn_host(m->data);
        w->codes = columns + at * FP8_COLUMNS;
        w->with_rest = ((const uint32_t *)(columns + n_prepared_blocks(m) * FP8_COLUMNS))[at];
    } else {
        vnni_rows rows = vnni_rows_at(kn_host(m->data), m->n_in, o, m->n_out);
        read_columns(&rows, m->n_in, b, w->buffer);
        w->codes = w->buffer;
        w->with_rest = columns_with_rest(w->buffer);
    }
}

/* Left to itself the machine reads too little ahead of so much arithmetic. */
INLINED void ask_ahead(const __m512i *codes)
{
    _mm_prefetch((const char *)codes + FP8_AHEAD, _MM_HINT_T0);
}

static inline void decode_columns(fp8_weights *w)
{
    fp8_tables tables = load_tables();
    for (uint32_t j = 0; j < FP8_COLUMNS; j++) {
        ask_ahead(&w->codes[j]);
        w->e1[j] = weight_digit(&tables, w->codes[j], 0);
        w->e0[j] = weight_digit(&tables, w->codes[j], 1);
    }
}

/* Notes what has a rest, and the first NaN of each output. */
static inline void find_rests(fp8_weights *w, uint16_t nan[VNNI_OUTS])
{
    const __m512i magnitude = _mm512_set1_epi8(127);
    w->n_rest = 0;
    for (uint32_t bits = w->with_rest; bits != 0; bits &= bits - 1) {
        uint32_t j = (uint32_t)__builtin_ctz(bits);
        uint8_t code[4 * VNNI_OUTS];
        int8_t s[4 * VNNI_OUTS];
        __m512i codes = w->codes[j], rests = vnni_look_up(KN_FN(kn_vnni_digits).r, codes);
        uint64_t with_s = _mm512_test_epi8_mask(rests, rests),
                 found = _mm512_cmpeq_epi8_mask(_mm512_and_si512(codes, magnitude), magnitude);
        _mm512_storeu_si512(s, rests);
        for (; with_s != 0; with_s &= with_s - 1) {
            uint32_t at = (uint32_t)__builtin_ctzll(with_s);
            w->rest[w->n_rest++] = (fp8_rest){(uint8_t)(at / 4), (uint8_t)(4 * j + at % 4), s[at]};
        }
        _mm512_storeu_si512(code, codes);
        for (; found != 0; found &= found - 1) {
            uint32_t at = (uint32_t)__builtin_ctzll(found);
            if (nan[at / 4] == 0) {
                nan[at / 4] = (uint16_t)(VNNI_NAN_CODE | (code[at] & 0x80) << 8);
            }
        }
    }
}

/* acc + dot products of a column with the dword at x. The dword is broadcast by the load of the product
 * itself, twice a cycle; the compiler would share registers of broadcast dwords, which takes longer and
 * drives sums out of registers. */
INLINED __m512i dot(__m512i acc, __m512i column, const uint8_t *x)
{
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(column), "m"(*(const uint8_t(*)[4])x));
    return acc;
}

/* The low (0) or high (1) dwords of every four, in the order of vnni_sums. */
INLINED __m512d to_double(__m512i v, int high)
{
    const __m512i two52 = _mm512_set1_epi32(0x43300000);
    __m512i positive = _mm512_xor_si512(v, _mm512_set1_epi32(INT32_MIN));
    __m512i bits = high ? _mm512_unpackhi_epi32(positive, two52) : _mm512_unpacklo_epi32(positive, two52);
    return _mm512_sub_pd(_mm512_castsi512_pd(bits), _mm512_set1_pd(0x1p52 + 0x1p31));
}

/* high * factor + low, exact: two int32 and a factor of at most 2^8. */
INLINED __m512d joined(__m512i high, double factor, __m512i low, int half)
{
    return _mm512_fmadd_pd(to_double(high, half), _mm512_set1_pd(factor), to_double(low, half));
}
