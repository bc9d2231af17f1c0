/* JSON schemas to rules: shared by response formats (schema.c) and tools' parameters (tools.c). */
#pragma once
#include <jansson.h>

#include "common/base/map.h"
#include "common/grammar/build_private.h"

/* Types of JSON values. A number that need not be an integer is both of two. */
enum {
    SC_NULL = 1u << 0,
    SC_BOOL = 1u << 1,
    SC_INTEGER = 1u << 2,
    SC_FRACTION = 1u << 3,
    SC_NUMBER = SC_INTEGER | SC_FRACTION,
    SC_STRING = 1u << 4,
    SC_OBJECT = 1u << 5,
    SC_ARRAY = 1u << 6,
    SC_ALL = (1u << 7) - 1,
};

/* What is to be written of a schema: values of these types, strings with quotes or raw. */
typedef struct sc_want {
    uint32_t types;
    gm_spelling spelling;
} sc_want;

/* One schema whose rule is made but not filled. */
typedef struct sc_item {
    const json_t *schema, *root; /* root: what its references are relative to */
    sc_want want;
    uint32_t rule;
    char *path; /* owned */
} sc_item;

typedef struct sc_compiler {
    gm_build *b;
    sc_item *items;
    uint32_t n_item, cap, n_done;
    cm_map rules; /* of (schema, want) -> index of its item + 1 */
} sc_compiler;

/* n_source: bytes of the JSON text, which bound how many schemas there can be. */
void sc_init(sc_compiler *c, gm_build *b, size_t n_source);
void sc_fini(sc_compiler *c);
/* The rule of a schema; sc_fill fills it. path is copied. */
uint32_t sc_rule(sc_compiler *c, const json_t *schema, const json_t *root, sc_want want, const char *path);
void sc_fill(sc_compiler *c);

/* ---- questions (schema_keywords.c) ---- */
/* Every keyword is known and supported; else the build has failed. */
bool sc_check_keywords(gm_build *b, const json_t *schema, const char *path);
/* Has it any keyword that says something besides these (a list that ends with NULL)? Annotations and $defs do
 * not. NULL: none, else its name. */
const char *sc_other_keyword(const json_t *schema, const char *const *these);
/* The types that its values may have. */
uint32_t sc_types(const json_t *schema, const json_t *root);
uint32_t sc_type_of(const json_t *value);
/* The schema that a $ref names; NULL: nothing. */
const json_t *sc_resolve(const json_t *root, const char *reference);
/* No value satisfies both, as far as can be seen. */
bool sc_disjoint(const json_t *a, const json_t *b, const json_t *root);

/* ---- strings (schema_string.c) ---- */
void sc_string(gm_build *b, const json_t *schema, uint32_t from, uint32_t to, gm_spelling spelling,
               const char *path);
/* `"` and a key that is none of these properties, `"`. */
void sc_other_key(gm_build *b, uint32_t from, uint32_t to, const json_t *properties, const char *path);
