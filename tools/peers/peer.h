/* What the peer programs share. A peer computes the products of routed experts with another library, for
 * `baleen bench cpu.fp4_gemv --peer` and cpu.moe_prefill, which run it once in every round: PROGRAM THREADS D
 * INNER ROWS,ROWS.. prints a line for each number of rows. Thread: main. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

typedef struct peer_args {
    uint32_t threads, d, inner, n_rows, rows[16];
} peer_args;

/* False, after a sentence, when they are not as above. */
bool peer_args_of(int argc, char **argv, peer_args *args_out);
uint32_t peer_random(uint64_t i);
/* With one thread processor time, as baleen bench. */
double peer_seconds(const peer_args *args);
/* macs multiplications of `rows` rows took so long. */
void peer_say(const char *peer, uint32_t rows, double macs, double seconds);
