/* E4M3 weights by rows of 16-bit integers, for the files that multiply them so: w = 8 (64 a + b) + s in units
 * of 2^-9, a from exponents 10 to 15 and b from 4 to 9, so that one of them is zero, both are at most 480 in
 * magnitude, and 128 products with 16-bit integers of at most 2^15 fit 32 bits. An s is rare (0 unless |w| <
 * 2^-3) and listed one by one.
 *
 * Columns hold codes with their sign moved beside the mantissa: the exponent is the upper half byte, 8 + m
 * with its sign comes from the lower by one byte shuffle, its power of two by another, and vpmaddubsw
 * multiplies both and widens: of 32 codes the even or the odd ones, as the other powers are made zero. */
#pragma once
#include <assert.h>

#include "kernels/cpu/avx2.h"

enum {
    FP8_COLUMNS = CPU_CHUNK / 4, /* of a block */
    FP8_AHEAD = 4096,            /* bytes of weights that are asked for before they are needed */
    FP8_DIGITS = 4, /* of a column: a of even inputs, a of odd ones, b of even ones, b of odd ones */
    FP8_RESTS = 20, /* of a block's s that stand with its codes */
    FP8_MANY = 0xffff,
    FP8_FUSED = 2, /* 16-bit rows, at most, for which columns are decoded while they are multiplied */
};

/* An s that is not zero. */
typedef struct fp8_rest {
    uint8_t out, input; /* of the 16 outputs, of the block's inputs */
    int8_t s;
} fp8_rest;

/* The weights of one block and 16 outputs: prepared ones [tile of outputs][block], stored ones one at a time.
 * The s of a block, unless it has more than fit, or a NaN. */
typedef struct fp8_chunk {
    __m256i codes[FP8_COLUMNS][2];
    uint16_t n_rest; /* FP8_MANY: look for them */
    fp8_rest rest[FP8_RESTS];
} fp8_chunk;
static_assert(sizeof(fp8_chunk) % 64 == 0, "chunks stand one behind the other");

/* One of them, as it is multiplied. */
typedef struct fp8_weights {
    const __m256i (*codes)[2];
    const fp8_rest *rest; /* all s of the block */
    uint32_t n_rest;
    fp8_chunk buffer;
    __m256i digits[2][FP8_COLUMNS][FP8_DIGITS]; /* filled where several groups of rows read them */
    fp8_rest found[AVX2_OUTS * CPU_CHUNK];
} fp8_weights;

/* ---- codes ---- */

/* Sign beside the mantissa, and back. */
static inline __m256i fp8_recoded(__m256i codes)
{
    __m256i exponent = _mm256_and_si256(_mm256_slli_epi16(codes, 1), _mm256_set1_epi8((char)0xf0)),
            sign = _mm256_and_si256(_mm256_srli_epi16(codes, 4), _mm256_set1_epi8(8)),
            m = _mm256_and_si256(codes, _mm256_set1_epi8(7));
    return _mm256_or_si256(_mm256_or_si256(exponent, sign), m);
}

static inline uint8_t fp8_code(uint8_t recoded)
{
    return (uint8_t)((recoded >> 4) << 3 | (recoded & 8) << 4 | (recoded & 7));
}

/* Which of 32 recoded codes are NaN. */
static inline uint32_t fp8_nans(__m256i codes)
{
    const __m256i nan = _mm256_set1_epi8((char)0xf7);
    return (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_and_si256(codes, nan), nan));
}

/* The s of byte `at` of half i % 2 of column i / 2. */
static inline fp8_rest fp8_rest_at(__m256i codes, uint32_t i, uint32_t at)
{
    uint8_t bytes[32];
    _mm256_storeu_si256((__m256i *)(void *)bytes, codes);
    return (fp8_rest){(uint8_t)(AVX2_HALF * (i % 2) + at / 4), (uint8_t)(4 * (i / 2) + at % 4),
                      (int8_t)avx2_units(fp8_code(bytes[at]))};
}

/* Which have an s: exponents below 4, but for zeros. */
static inline uint32_t fp8_with_s(__m256i codes)
{
    const __m256i none = _mm256_set1_epi8((char)0xc0), zero = _mm256_set1_epi8((char)0xf7);
    __m256i small = _mm256_cmpeq_epi8(_mm256_and_si256(codes, none), _mm256_setzero_si256()),
            is_zero = _mm256_cmpeq_epi8(_mm256_and_si256(codes, zero), _mm256_setzero_si256());
    return (uint32_t)_mm256_movemask_epi8(_mm256_andnot_si256(is_zero, small));
}

/* ---- reading ---- */

/* Block b of 16 rows in the stored form. */
static inline void read_chunk(const avx2_rows *rows, uint32_t n_in, uint32_t b, fp8_chunk *chunk_out)
{
    __m256i(*codes)[2] = chunk_out->codes;
    chunk_out->n_rest = 0;
    for (uint32_t i = 0; i < FP8_COLUMNS; i += 8) {
        KN_FN(kn_avx2_columns)(rows, b * CPU_CHUNK + 4 * i, n_in, codes + i);
    }
    for (uint32_t i = 0; i < FP8_COLUMNS * 2; i++) {
        __m256i *column = &codes[i / 2][i % 2];
        *column = fp8_recoded(*column);
        for (uint32_t with_s = fp8_with_s(*column); with_s != 0; with_s &= with_s - 1) {
            uint32_t at = (uint32_t)__builtin_ctz(with_s);
            if (chunk_out->n_rest >= FP8_RESTS) {
                chunk_out->n_rest = FP8_MANY;
                break;
            }
            chunk_out->rest[chunk_out->n_rest++] = fp8_rest_at(*column, i, at);
        }
        if (fp8_nans(*column) != 0) {
            chunk_out->n_rest = FP8_MANY;
        }
    }
}

static inline uint64_t n_prepared_chunks(const kn_matrix *m)
{
    return (uint64_t)kn_blocks(m->n_out, AVX2_OUTS) * kn_blocks(m->n_in, CPU_CHUNK);
}

/* Notes what has a rest, and the first NaN of each output. */
APART void look_for_rests(fp8_weights *w, uint16_t nan[AVX2_OUTS])
{
    w->n_rest = 0;
    w->rest = w->found;
    for (uint32_t i = 0; i < FP8_COLUMNS * 2; i++) {
        __m256i column = w->codes[i / 2][i % 2];
        const uint8_t *codes = (const uint8_t *)&w->codes[i / 2][i % 2];
        for (uint32_t with_s = fp8_with_s(column); with_s != 0; with_s &= with_s - 1) {
            w->found[w->n_rest++] = fp8_rest_at(column, i, (uint32_t)__builtin_ctz(with_s));
        }
        for (uint32_t bits = fp8_nans(column); bits != 0; bits &= bits - 1) {
            uint32_t at = (uint32_t)__builtin_ctz(bits), out = AVX2_HALF * (i % 2) + at / 4;
            if (nan[out] == 0) {
                nan[out] = (uint16_t)(AVX2_NAN_CODE | (codes[at] & 8) << 12);
            }
        }
    }
}

/* Block b of the outputs at o. */
static inline void read_weights(const kn_matrix *m, uint32_t o, uint32_t b, fp8_weights *w,
                                uint16_t nan[AVX2_OUTS])
{
    const fp8_chunk *chunk = &w->buffer;
    if (m->prepared) {
        chunk = (const fp8_chunk *)kn_host(m->data) +
                (uint64_t)(o / AVX2_OUTS) * kn_blocks(m->n_in, CPU_CHUNK) + b;
    } else {
        avx2_rows rows = avx2_rows_at(kn_host(m->data), m->n_in, o, m->n_out);
        read_chunk(&rows, m->n_in, b, &w->buffer);
    }
    w->codes = chunk->codes;
    w->rest = chunk->rest;
    w->n_rest = chunk->n_rest;
    if (w->n_rest == FP8_MANY) {
        look_for_rests(w, nan);
    }
}

/* ---- products ---- */

/* What a byte shuffle makes of the halves of a code. */
typedef struct fp8_tables {
    __m256i mantissa, a, b;
} fp8_tables;

INLINED fp8_tables load_tables(void)
{
    return (fp8_tables){
        .mantissa = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(8, 9, 10, 11, 12, 13, 14, 15, -8, -9, -10, -11, -12, -13, -14, -15)),
        .a = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32)),
        .b = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 0, 0, 0, 0, 0, 0)),
    };
}

INLINED void decode_column(const fp8_tables *t, __m256i codes, __m256i digits_out[FP8_DIGITS])
{
    __m256i m = _mm256_shuffle_epi8(t->mantissa, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
    __m256i exponents = _mm256_srli_epi16(codes, 4);
    __m256i even = _mm256_and_si256(exponents, _mm256_set1_epi16(0x000f)),
            odd = _mm256_and_si256(exponents, _mm256_set1_epi16(0x0f00));
    digits_out[0] = _mm256_maddubs_epi16(_mm256_shuffle_epi8(t->a, even), m);
    digits_out[1] = _mm256_maddubs_epi16(_mm256_shuffle_epi8(t->a, odd), m);
    digits_out[2] = _mm256_maddubs_epi16(_mm256_shuffle_epi8(t->b, even), m);
    digits_out[3] = _mm256_maddubs_epi16(_mm256_shuffle_epi8(t->b, odd), m);
}

/* Left to itself the machine reads too little ahead of so much arithmetic. */
INLINED void ask_ahead(const void *codes)
{
    _mm_prefetch((const char *)codes + FP8_AHEAD, _MM_HINT_T0);
}

static inline void decode_columns(fp8_weights *w)
{
    fp8_tables tables = load_tables();
    for (uint32_t j = 0; j < FP8_COLUMNS; j++) {
        ask_ahead(w->codes[j]);
        decode_column(&tables, w->codes[j][0], w->digits[0][j]);
        decode_column(&tables, w->codes[j][1], w->digits[1][j]);
    }
}

/* Of n 16-bit rows and half h of the outputs the sums of the products with a and b. x: the rows' first two
 * dwords of the block, [FP8_COLUMNS][2][n_x]: inputs 0 and 2 of a column, then 1 and 3. Columns are decoded
 * here, or have been (decoded). */
INLINED void main_sums(const fp8_weights *w, int h, const uint8_t *x, uint32_t n_x, __m256i *a_out,
                       __m256i *b_out, const uint32_t n, const bool decoded)
{
    const uint64_t next = 4ull * n_x;
    fp8_tables tables = load_tables();
    __m256i a[AVX2_GROUP], b[AVX2_GROUP];
    for (uint32_t r = 0; r < n; r++) {
        a[r] = b[r] = _mm256_setzero_si256();
    }
    for (uint32_t j = 0; j < FP8_COLUMNS; j++, x += 2 * next) {
        __m256i own[FP8_DIGITS];
        const __m256i *digits = decoded ? w->digits[h][j] : own;
        if (!decoded) {
            if (h == 0) {
                ask_ahead(w->codes[j]);
            }
            decode_column(&tables, w->codes[j][h], own);
        }
        for (uint32_t r = 0; r < n; r++) {
            __m256i even = avx2_broadcast(x + 4 * r), odd = avx2_broadcast(x + next + 4 * r);
            a[r] = avx2_plus32(a[r], _mm256_madd_epi16(even, digits[0]));
            b[r] = avx2_plus32(b[r], _mm256_madd_epi16(even, digits[2]));
            a[r] = avx2_plus32(a[r], _mm256_madd_epi16(odd, digits[1]));
            b[r] = avx2_plus32(b[r], _mm256_madd_epi16(odd, digits[3]));
        }
    }
    for (uint32_t r = 0; r < n; r++) {
        a_out[r] = a[r];
        b_out[r] = b[r];
    }
}

/* 64 a + b of the lower (0) or upper (1) four outputs. */
INLINED __m256d fp8_joined(__m256i a, __m256i b, int upper)
{
    __m128i high = upper ? _mm256_extracti128_si256(a, 1) : _mm256_castsi256_si128(a),
            low = upper ? _mm256_extracti128_si256(b, 1) : _mm256_castsi256_si128(b);
    return _mm256_fmadd_pd(_mm256_cvtepi32_pd(high), _mm256_set1_pd(64), _mm256_cvtepi32_pd(low));
}
