/* The inside of a vocabulary, for the machine that walks it. */
#pragma once
#include "common/grammar/machine.h"

#define GM_NO_ID UINT32_MAX

typedef struct gm_node {
    uint32_t end; /* the next node that does not lie behind this one */
    uint32_t id;  /* the token that ends here; GM_NO_ID: none does */
    uint8_t byte, depth;
} gm_node;

struct gm_vocab {
    gm_vocab_source source;
    gm_node *nodes; /* [n_node] */
    uint32_t n_node;
    uint32_t *same;   /* [n_id] another id with the same bytes; GM_NO_ID: none */
    uint32_t *text;   /* mask of all that stand for text */
    uint32_t longest; /* token, in bytes */
};
