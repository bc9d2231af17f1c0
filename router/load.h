/* How often each expert was asked for, told to the coordinator every few seconds: it balances by that.
 * Thread: the loop's. */
#pragma once
#include "common/proc/member.h"
#include "router/engine/exchange.h"

typedef struct rt_load rt_load;

/* exchange and member are kept. */
rt_load *rt_load_create(pc_loop *loop, const rt_exchange *exchange, pc_member *member, uint32_t n_layer,
                        uint32_t n_expert);
void rt_load_destroy(rt_load *load);
