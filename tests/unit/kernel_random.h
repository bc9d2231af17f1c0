/* Random operands for the tests of kernels: a pure function of (random_seed, key, index). Memory is the
 * rig's. */
#pragma once
#include "tests/golden/kernel_rig.h"

extern uint64_t random_seed;

uint32_t random_u32(uint64_t key, uint64_t i);
uint32_t random_between(uint64_t key, uint32_t low, uint32_t high);
/* About normal size, now and then zero, tiny or large. */
float random_value(uint64_t key, uint64_t i);
kn_ptr random_bf16(rig *r, uint64_t key, uint64_t n);
kn_ptr random_f32(rig *r, uint64_t key, uint64_t n);
/* Bytes low .. low + n_kind - 1. */
kn_ptr random_bytes(rig *r, uint64_t key, uint64_t n, uint32_t low, uint32_t n_kind);
/* E4M3 codes without NaN. */
kn_ptr random_codes(rig *r, uint64_t key, uint64_t n);
kn_matrix random_matrix(rig *r, uint64_t key, uint32_t n_out, uint32_t n_in, kn_dtype dtype, kn_dtype scale);
/* The matrix in the device's own order where it has one: of no effect on any output. */
kn_matrix prepared(rig *r, kn_matrix m);
kn_q8 random_q8(rig *r, uint64_t key, uint32_t n, uint32_t k);

/* Inputs at the edges of what the grouped projection may keep of its fast way. */
typedef enum wide_kind {
    WIDE_PLAIN,
    WIDE_SPREAD,    /* over far more than 2^22 in every block: integers of 22 bits lose some */
    WIDE_CANCEL,    /* sums that are zero but for rounding: certain of nothing */
    WIDE_ZERO,      /* rows and blocks of zeros, of both signs */
    WIDE_TINY,      /* subnormal or nearly */
    WIDE_HUGE,      /* near the largest; sums overflow */
    WIDE_ODD,       /* an infinity in one row, a NaN in another */
    WIDE_TINY_CODE, /* many weights below 2^-3 of the code's unit */
    WIDE_NAN_CODE,  /* one weight that is NaN */
    WIDE_SCALES,    /* scales at the ends of their range */
    WIDE_N
} wide_kind;
/* The i-th BF16 input, of rows of k. */
uint16_t wide_input(wide_kind kind, uint64_t key, uint32_t i, uint32_t k);
