#include "tests/unit/field_rules.h"

#include <stdio.h>
#include <string.h>

static const char *const unread[] = {
    "architectures",        /* the family is model_type's */
    "torch_dtype",          /* every tensor has a dtype of its own, and it is checked */
    "attention_dropout",    /* training */
    "initializer_range",    /* training */
    "use_cache",            /* a default of another program */
    "dspark_block_size",    /* how far a drafter would draft; it is not run */
    "dspark_noise_token_id" /* the same */
};

static const char *const free_ones[] = {
    "sliding_window",
    "index_topk",
    "num_experts_per_tok", /* shows in tid2eid where there is a hash layer */
    "routed_scaling_factor",
    "swiglu_limit",
    "rms_norm_eps",
    "hc_eps",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "rope_theta",
    "compress_rope_theta",
    "rope_scaling.factor",
    "rope_scaling.original_max_position_embeddings",
    "rope_scaling.beta_fast",
    "rope_scaling.beta_slow",
    "qk_rope_head_dim",        /* a part of head_dim */
    "dspark_target_layer_ids", /* which layers; how many shows */
};

static const char *const optional[] = {
    "attention_bias",      /* a bias would be an extra tensor */
    "tie_word_embeddings", /* the head must be there */
    "expert_dtype",        /* absent means fp4, and the experts' dtype is checked */
    "quantization_config.scale_fmt",
};

#define IS_IN(list, path) is_in(list, sizeof(list) / sizeof((list)[0]), path)

/* Also what lies below a listed key. */
static bool is_in(const char *const *list, unsigned n, const char *path)
{
    for (unsigned i = 0; i < n; i++) {
        size_t length = strlen(list[i]);
        if (strncmp(path, list[i], length) == 0 &&
            (path[length] == '\0' || path[length] == '[' || path[length] == '.')) {
            return true;
        }
    }
    return false;
}

bool field_is_unread(const char *path)
{
    return IS_IN(unread, path);
}

bool field_is_free(const char *path)
{
    return IS_IN(free_ones, path);
}

bool field_may_be_absent(const char *path)
{
    return IS_IN(optional, path);
}

bool field_is_named(const char *path, const char *sentence)
{
    char key[160];
    const char *dot = strrchr(path, '.');
    snprintf(key, sizeof key, "%s", dot != NULL ? dot + 1 : path);
    key[strcspn(key, "[")] = '\0';
    return strstr(sentence, key) != NULL;
}
