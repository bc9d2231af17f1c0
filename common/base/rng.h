/* Counter-based random numbers (Philox 4x32-10, Salmon et al. 2011): the n-th number of a key is a pure
 * function of (key, n), so nothing has to be stored, restored or advanced. Sampling uses key = request seed,
 * counter = position. Thread: any. */
#pragma once
#include <stdint.h>

#include "common/base/status.h"

typedef struct cm_rng_block {
    uint32_t word[4];
} cm_rng_block;

cm_rng_block cm_rng_at(uint64_t key, uint64_t counter_lo, uint64_t counter_hi);
/* [0, 1) with 53 random bits. */
double cm_rng_uniform(uint64_t key, uint64_t counter_lo, uint64_t counter_hi);
/* Bytes from the system, for ids and keys; never for anything that must be repeatable. */
void cm_random_bytes(void *out, unsigned long n_bytes);
uint64_t cm_random_u64(void);
