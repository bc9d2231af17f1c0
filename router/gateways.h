/* A router's links to gateways: messages in become calls on what is kept for them (keep_core.h), its logs
 * become one StepTokens per gateway and step. Thread: the loop's. */
#pragma once
#include "common/net/net.h"
#include "common/proc/loop.h"
#include "router/constraints.h"
#include "router/keep_core.h"

typedef struct rt_gateways rt_gateways;

typedef struct rt_gateways_options {
    uint32_t gateway_max; /* links */
    uint32_t runnable;    /* sequences that the scheduler runs at once: gateways are told */
    rt_keep_limits keep;
    rt_constraints *constraints; /* kept; NULL: sequences with a constraint are refused */
} rt_gateways_options;

/* n is owned from now on. changed runs after anything that may have made work for the scheduler. */
rt_gateways *rt_gateways_create(pc_loop *loop, net *n, rt_sched *sched, const rt_gateways_options *options,
                                pc_fn changed, void *ctx);
/* options->constraints goes after it, without a turn of the loop in between. */
void rt_gateways_destroy(rt_gateways *gateways);
/* What is told in greetings from now on. */
/* For a keyed net: see net_key_add and net_key_retire. */
void rt_gateways_frame_key(rt_gateways *gateways, uint64_t cluster, uint64_t epoch, const uint8_t *key);
void rt_gateways_retire_keys(rt_gateways *gateways, uint64_t oldest);
void rt_gateways_identify(rt_gateways *gateways, const net_identity *identity);
/* A word of the scheduler; sent with rt_gateways_flush. Matches rt_word_fn. */
void rt_gateways_word(void *gateways, const rt_word *word);
/* Once a turn: what is to be told is sent, as far as links take it; what was kept too long is dropped. */
void rt_gateways_flush(rt_gateways *gateways, uint64_t step);
bool rt_gateways_all_told(const rt_gateways *gateways); /* nothing waits to be sent or is on its way */
void rt_gateways_ledger(const rt_gateways *gateways, rt_keep_ledger *ledger_out);
