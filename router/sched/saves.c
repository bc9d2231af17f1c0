#include "router/sched/saves.h"

enum { EVERY_PAGES = 32 }; /* of a long prompt: its pages are four times as large as a state */

void rt_saves_begin(rt_saves *saves, uint32_t n_start, uint32_t n_known)
{
    *saves = (rt_saves){.n_start = n_start, .n_known = n_known, .passing = RT_PREFIX_NONE};
}

/* The last multiple of n_token; 0: none. */
static uint32_t end_between(uint32_t after, uint32_t until, uint32_t n_token)
{
    uint32_t end = until - until % n_token;
    return end > after ? end : 0;
}

static void save_at(rt_saves *saves, rt_prefix *prefix, uint32_t pos, bool spare, bool passing)
{
    uint32_t state;
    for (uint32_t i = 0; i < saves->n; i++) {
        if (saves->at[i].pos == pos) {
            return;
        }
    }
    if (rt_prefix_state_take(prefix, spare, &state)) {
        saves->at[saves->n++] = (rt_save){pos, state, spare, passing};
    }
}

void rt_saves_choose(rt_saves *saves, rt_prefix *prefix, uint32_t page_tokens, uint32_t pos0, uint32_t sure,
                     uint32_t end)
{
    uint32_t prompt = end_between(0, saves->n_start - 1, page_tokens);
    uint32_t passed = end_between(pos0, end, page_tokens);
    uint32_t sparse = end_between(pos0, sure, EVERY_PAGES * page_tokens);
    if (prompt > pos0 && prompt <= sure) {
        save_at(saves, prefix, prompt, false, false);
    }
    if (saves->n_known > pos0 && saves->n_known <= sure) {
        save_at(saves, prefix, saves->n_known, false, false);
    }
    if (sparse != 0) {
        save_at(saves, prefix, sparse, true, false);
    }
    if (passed > prompt) {
        save_at(saves, prefix, passed, true, true);
    }
}

void rt_saves_hang(rt_saves *saves, rt_prefix *prefix, uint32_t page_tokens, const uint32_t *pages,
                   uint32_t n_done)
{
    for (; saves->n > 0; saves->n--) {
        const rt_save *save = &saves->at[saves->n - 1];
        if (save->pos > n_done) { /* behind a wrong guess */
            rt_prefix_state_put(prefix, save->state);
            continue;
        }
        uint32_t page = pages[save->pos / page_tokens - 1];
        rt_prefix_state_set(prefix, page, save->state, save->spare);
        if (save->passing) {
            rt_prefix_state_pass(prefix, saves->passing);
            saves->passing = page;
        }
    }
}

void rt_saves_stop(rt_saves *saves, rt_prefix *prefix)
{
    rt_prefix_state_stay(prefix, saves->passing);
    for (; saves->n > 0; saves->n--) {
        rt_prefix_state_put(prefix, saves->at[saves->n - 1].state);
    }
}
