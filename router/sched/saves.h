/* Which states a running sequence leaves for others to go on from (prefix_core.h): where its prompt's last
 * page ends, since the same prompt may come again, with more behind it; where what others had computed of its
 * tokens ends, since a third may begin like both; now and then in between. For whoever goes on with its
 * answer, the last page's end before its end: each is written as it is passed, and goes when the next one is
 * there, and stays when the sequence ends. The last two are spare. A value, part of a sequence; used by the
 * scheduler. Thread: the owner's. */
#pragma once
#include "router/sched/prefix_core.h"

enum { RT_SAVE_MAX = 4 }; /* of one sequence in one step */

/* Being written in the step in flight. */
typedef struct rt_save {
    uint32_t pos, state;
    bool spare, passing;
} rt_save;

typedef struct rt_saves {
    uint32_t n_start; /* tokens that there were when it began to run */
    uint32_t n_known; /* of them: so many another had computed */
    uint32_t passing; /* page of its last passing state; RT_PREFIX_NONE: none */
    uint32_t n;
    rt_save at[RT_SAVE_MAX];
} rt_saves;

void rt_saves_begin(rt_saves *saves, uint32_t n_start, uint32_t n_known);
/* For rows pos0 .. end - 1, those from sure on guesses: room for states is taken, as far as there is any. */
void rt_saves_choose(rt_saves *saves, rt_prefix *prefix, uint32_t page_tokens, uint32_t pos0, uint32_t sure,
                     uint32_t end);
/* They are written; n_done tokens are computed, their complete pages [n_done / page_tokens] in the tree. */
void rt_saves_hang(rt_saves *saves, rt_prefix *prefix, uint32_t page_tokens, const uint32_t *pages,
                   uint32_t n_done);
/* The sequence stops running: they are not. Before it lets go of its pages. */
void rt_saves_stop(rt_saves *saves, rt_prefix *prefix);
