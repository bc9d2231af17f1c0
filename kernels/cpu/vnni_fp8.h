/* E4M3 weights as 16-bit integers, for the files that multiply them by vpdpwssd: w = 8 W + s in units of
 * 2^-9, W rounded towards zero. An s is rare (0 unless |w| < 2^-3), and the columns that have one are listed.
 *
 * vpdpwssd adds two products of 16 bits to a sum of 32, in a lane for each output: half as many products as
 * vpdpbusd, which would need four of digits where this one needs one. */
#pragma once
#include "kernels/cpu/vnni.h"

enum {
    FP8_COLUMNS = CPU_CHUNK / 4, /* of a block; a column is four inputs of 16 outputs */
    FP8_PAIRS = CPU_CHUNK / 2,   /* of a block; pairs 2 j and 2 j + 1 are inputs 0 2 and 1 3 of column j */
    FP8_WEIGHT_MAX = 448 << 6,   /* of |W| */
    /* Inputs whose magnitudes add up to it have products that add up to less than 2^31. */
    FP8_INPUTS_MAX = INT32_MAX / FP8_WEIGHT_MAX,
    FP8_AHEAD = 8192, /* bytes of weights that are asked for before they are needed */
};

/* The pairs of a column, in the dwords of 16 outputs. */
typedef struct fp8_column {
    __m512i pair[2];
} fp8_column;

/* The weights of one block and 16 outputs. */
typedef struct fp8_weights {
    const __m512i *codes; /* [FP8_COLUMNS]: in a prepared matrix, or buffer */
    __m512i buffer[FP8_COLUMNS];
    __m512i pairs[FP8_PAIRS];            /* W */
    uint32_t with_rest;                  /* bit j: column j has an s, or a NaN */
    uint32_t n_rest, rest_of[FP8_PAIRS]; /* pairs with an s */
    __m512i rests[FP8_PAIRS];            /* theirs */
} fp8_weights;

/* Of a magnitude, in units of 2^-9: without NaN. */
#define UNITS(c)  ((c) < 8 ? (c) : (c) == 127 ? 0 : (8 + ((c)&7)) << (((c) >> 3) - 1))
#define LOW(c)    (UNITS(c) / 8 % 256)
#define HIGH(c)   (UNITS(c) / 8 / 256)
#define REST(c)   (UNITS(c) % 8)
#define X4(f, c)  f(c), f((c) + 1), f((c) + 2), f((c) + 3)
#define X16(f, c) X4(f, c), X4(f, (c) + 4), X4(f, (c) + 8), X4(f, (c) + 12)
#define X64(f, c) X16(f, c), X16(f, (c) + 16), X16(f, (c) + 32), X16(f, (c) + 48)

/* Bytes of W, and s, of the magnitudes 0 .. 63 and 64 .. 127. */
static const uint8_t FP8_WORDS[2][2][64] = {{{X64(LOW, 0)}, {X64(LOW, 64)}},
                                            {{X64(HIGH, 0)}, {X64(HIGH, 64)}}};
static const uint8_t FP8_RESTS[2][64] = {{X64(REST, 0)}, {X64(REST, 64)}};

/* The former in registers. */
typedef struct fp8_tables {
    __m512i byte[2][2];
} fp8_tables;

INLINED fp8_tables load_tables(void)
{
    fp8_tables t;
    for (int which = 0; which < 2; which++) {
        for (int half = 0; half < 2; half++) {
            t.byte[which][half] = _mm512_loadu_si512(FP8_WORDS[which][half]);
            /* Otherwise the compiler reads them from memory at each use, beside all other loads. */
            __asm__("" : "+v"(t.byte[which][half]));
        }
    }
    return t;
}

/* Negates words where codes are negative: those of the even bytes, and of the odd ones. */
INLINED fp8_column with_signs(__m512i even, __m512i odd, __m512i codes)
{
    const __m512i zero = _mm512_setzero_si512();
    __mmask32 even_minus = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x80));
    return (fp8_column){{_mm512_mask_sub_epi16(even, even_minus, zero, even),
                         _mm512_mask_sub_epi16(odd, _mm512_movepi16_mask(codes), zero, odd)}};
}

/* W of a column. */
INLINED fp8_column decode_column(const fp8_tables *t, __m512i codes)
{
    const __m512i swap = _mm512_set4_epi32(0x0e0f0c0d, 0x0a0b0809, 0x06070405, 0x02030001);
    __m512i low = _mm512_permutex2var_epi8(t->byte[0][0], codes, t->byte[0][1]);
    __m512i high = _mm512_permutex2var_epi8(t->byte[1][0], codes, t->byte[1][1]);
    return with_signs(_mm512_mask_shuffle_epi8(low, 0xaaaaaaaaaaaaaaaa, high, swap),
                      _mm512_mask_shuffle_epi8(high, 0x5555555555555555, low, swap), codes);
}

static inline __m512i rest_bytes(__m512i codes)
{
    return _mm512_permutex2var_epi8(_mm512_loadu_si512(FP8_RESTS[0]), codes,
                                    _mm512_loadu_si512(FP8_RESTS[1]));
}

/* Whether a column has an s, or a NaN. */
static inline bool column_with_rest(__m512i codes)
{
    const __m512i magnitude = _mm512_set1_epi8(127);
    __m512i rest = rest_bytes(codes);
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
        fp8_column column = decode_column(&tables, w->codes[j]);
        ask_ahead(&w->codes[j]);
        w->pairs[2 * j] = column.pair[0];
        w->pairs[2 * j + 1] = column.pair[1];
    }
}

/* The first NaN of each output. */
static inline void note_nan(__m512i codes, uint64_t found, uint16_t nan[VNNI_OUTS])
{
    uint8_t code[4 * VNNI_OUTS];
    _mm512_storeu_si512(code, codes);
    for (; found != 0; found &= found - 1) {
        uint32_t at = (uint32_t)__builtin_ctzll(found);
        if (nan[at / 4] == 0) {
            nan[at / 4] = (uint16_t)(VNNI_NAN_CODE | (code[at] & 0x80) << 8);
        }
    }
}

/* Notes what has a rest, and what is NaN. */
static inline void find_rests(fp8_weights *w, uint16_t nan[VNNI_OUTS])
{
    const __m512i magnitude = _mm512_set1_epi8(127);
    w->n_rest = 0;
    for (uint32_t bits = w->with_rest; bits != 0; bits &= bits - 1) {
        uint32_t j = (uint32_t)__builtin_ctz(bits);
        __m512i codes = w->codes[j], rest = rest_bytes(codes);
        uint64_t found = _mm512_cmpeq_epi8_mask(_mm512_and_si512(codes, magnitude), magnitude);
        fp8_column column =
            with_signs(_mm512_and_si512(rest, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(rest, 8), codes);
        for (uint32_t i = 0; i < 2; i++) {
            w->rest_of[w->n_rest] = 2 * j + i;
            w->rests[w->n_rest] = column.pair[i];
            w->n_rest += _mm512_test_epi32_mask(column.pair[i], column.pair[i]) != 0;
        }
        if (found != 0) {
            note_nan(codes, found, nan);
        }
    }
}

/* acc + products of pairs of weights with one pair of inputs. Not as an intrinsic: of that the compiler makes
 * copies of every sum. */
INLINED __m512i dot(__m512i acc, __m512i weights, uint32_t pair)
{
    __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(_mm512_set1_epi32((int32_t)pair)));
    return acc;
}

/* Sums start 2^31 too large, so that they are unsigned: as the low dword of a double of exponent 2^52 one is
 * its value. The low (0) or high (1) dwords of every four, in the order of vnni_sums. */
INLINED __m512d to_double(__m512i sum, int high)
{
    const __m512i two52 = _mm512_set1_epi32(0x43300000);
    __m512i bits = high ? _mm512_unpackhi_epi32(sum, two52) : _mm512_unpacklo_epi32(sum, two52);
    return _mm512_sub_pd(_mm512_castsi512_pd(bits), _mm512_set1_pd(0x1p52 + 0x1p31));
}
