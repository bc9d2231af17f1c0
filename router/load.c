#include "router/load.h"

#include "common/base/mem.h"

enum { LOAD_EVERY_MS = 2000 };

struct rt_load {
    const rt_exchange *exchange;
    pc_member *member;
    pc_timer *timer;
    uint32_t n_layer, n_expert;
    uint32_t *told; /* [n_layer][n_expert] as last told */
    uint32_t *since;
};

static void load_tick(void *arg)
{
    rt_load *load = arg;
    uint32_t n_pair = load->n_layer * load->n_expert;
    bool any = false;
    for (uint32_t i = 0; i < n_pair; i++) {
        uint32_t now = rt_exchange_picks(load->exchange, i / load->n_expert, i % load->n_expert);
        load->since[i] = now - load->told[i]; /* also right when the counter has gone round */
        any |= load->since[i] != 0;
    }
    if (any && pc_member_load(load->member, load->since, load->n_layer, load->n_expert)) {
        for (uint32_t i = 0; i < n_pair; i++) {
            load->told[i] += load->since[i];
        }
    }
    pc_timer_set(load->timer, LOAD_EVERY_MS);
}

rt_load *rt_load_create(pc_loop *loop, const rt_exchange *exchange, pc_member *member, uint32_t n_layer,
                        uint32_t n_expert)
{
    rt_load *load = cm_alloc(sizeof(*load));
    *load = (rt_load){.exchange = exchange, .member = member, .n_layer = n_layer, .n_expert = n_expert};
    load->told = cm_alloc(sizeof(uint32_t) * n_layer * n_expert);
    load->since = cm_alloc(sizeof(uint32_t) * n_layer * n_expert);
    load->timer = pc_timer_create(loop, load_tick, load);
    pc_timer_set(load->timer, LOAD_EVERY_MS);
    return load;
}

void rt_load_destroy(rt_load *load)
{
    pc_timer_destroy(load->timer);
    cm_free(load->told);
    cm_free(load->since);
    cm_free(load);
}
