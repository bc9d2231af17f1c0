#include "router/sched/words.h"

#include "common/base/assert.h"
#include "common/base/mem.h"

void rt_words_init(rt_words *words, uint32_t n_max)
{
    *words = (rt_words){.at = cm_alloc(sizeof(rt_word) * n_max), .n_max = n_max};
}

void rt_words_fini(rt_words *words)
{
    cm_free(words->at);
}

rt_word *rt_words_add(rt_words *words, rt_word word)
{
    CM_ASSERT(words->n < words->n_max && word.key.owner != 0);
    words->at[words->n] = word;
    return &words->at[words->n++];
}

void rt_words_tell(rt_words *words, rt_word_fn fn, void *ctx)
{
    /* one by one, as fn may make others forgotten; none is added without a step */
    for (uint32_t i = 0; i < words->n; i++) {
        rt_word word = words->at[i];
        if (word.key.owner != 0) { /* 0: forgotten */
            fn(ctx, &word);
        }
    }
    words->n = 0;
}

void rt_words_forget(rt_words *words, rt_seq_key key)
{
    for (uint32_t i = 0; i < words->n; i++) {
        if (words->at[i].key.owner == key.owner && words->at[i].key.stream == key.stream) {
            words->at[i].key.owner = 0;
        }
    }
}

void rt_words_forget_owner(rt_words *words, uint64_t owner)
{
    for (uint32_t i = 0; i < words->n; i++) {
        if (words->at[i].key.owner == owner) {
            words->at[i].key.owner = 0;
        }
    }
}
