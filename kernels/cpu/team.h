/* A fixed team of threads that share one piece of work at a time: the caller's thread and n_threads - 1
 * workers. Work is cut by index range only, so what is computed for an index never depends on the team's
 * size. Thread: run and destroy from one thread, the owner. */
#pragma once
#include <stdint.h>

typedef struct kn_team kn_team;
/* Does items begin .. end - 1. */
typedef void (*kn_team_fn)(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread);

kn_team *kn_team_create(uint32_t n_threads);
void kn_team_destroy(kn_team *team);
uint32_t kn_team_size(const kn_team *team);
/* Returns when all n items are done. item_cost: about how many multiplications one item takes; jobs too small
 * to be worth waking a worker are done by the caller alone. */
void kn_team_run(kn_team *team, uint32_t n, uint64_t item_cost, kn_team_fn fn, void *arg);
