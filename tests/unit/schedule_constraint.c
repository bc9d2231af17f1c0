#include "tests/unit/schedule_constraint.h"

#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

static const struct {
    gm_kind kind;
    const char *source;
} GRAMMARS[T_CONSTRAINTS] = {
    {GM_JSON_OBJECT, ""},
    {GM_JSON_SCHEMA,
     "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"string\",\"minLength\":3,\"maxLength\":300},"
     "\"b\":{\"type\":"
     "\"array\",\"items\":{\"type\":\"integer\"},\"minItems\":5,\"maxItems\":90}},\"required\":[\"b\"]}"},
    {GM_REGEX, "([a-z]{1,3} ?)*([0-9]{2,400}|.*a.{0,40})"},
    {GM_TOOLS, "{\"tools\":[{\"name\":\"f\",\"parameters\":{\"type\":\"object\",\"properties\":{\"x\":{"
               "\"type\":\"string\"}}}}]}"},
};

struct t_constraints {
    gm_vocab *vocab;
    gm_machine *machines[T_CONSTRAINTS];
};

enum { EOS = 1, THINK_END = 2, DSML = 3, FIRST_BYTE = 4, FIRST_PAIR = T_CONSTRAINT_VOCAB };

/* Ids from 4: each byte, then pairs that texts and JSON have. */
static const uint8_t *bytes_of(void *ctx, uint32_t id, size_t *n_out)
{
    static const char marks[] = "\"{}[],: 0123456789abcdefghijklmnopqrstuvwxyz<>/_\n";
    static uint8_t bytes[256], pairs[sizeof(marks) - 1][sizeof(marks) - 1][2];
    const uint32_t n = sizeof(marks) - 1;
    (void)ctx;
    if (id < FIRST_BYTE) {
        return NULL;
    }
    if (id < FIRST_PAIR) {
        bytes[id - FIRST_BYTE] = (uint8_t)(id - FIRST_BYTE);
        *n_out = 1;
        return &bytes[id - FIRST_BYTE];
    }
    uint32_t a = (id - FIRST_PAIR) / n % n, b = (id - FIRST_PAIR) % n;
    pairs[a][b][0] = (uint8_t)marks[a];
    pairs[a][b][1] = (uint8_t)marks[b];
    *n_out = 2;
    return pairs[a][b];
}

t_constraints *t_constraints_create(const t_case *c)
{
    t_constraints *constraints = cm_alloc(sizeof(*constraints));
    gm_vocab_source source = {
        .n_id = c->geometry.vocab, .bytes = bytes_of, .eos = EOS, .think_end = THINK_END, .dsml = DSML};
    if (c->geometry.vocab < T_CONSTRAINT_VOCAB) {
        return constraints;
    }
    cm_status status = gm_vocab_create(&source, &constraints->vocab, NULL);
    CM_ASSERT(status == CM_OK);
    for (uint32_t i = 0; i < T_CONSTRAINTS; i++) {
        gm_grammar *grammar;
        status = gm_compile(GRAMMARS[i].kind, GRAMMARS[i].source, strlen(GRAMMARS[i].source), &grammar, NULL);
        CM_ASSERT(status == CM_OK);
        constraints->machines[i] = gm_machine_create(grammar, constraints->vocab);
    }
    return constraints;
}

void t_constraints_destroy(t_constraints *constraints)
{
    for (uint32_t i = 0; i < T_CONSTRAINTS; i++) {
        if (constraints->machines[i] != NULL) {
            gm_machine_release(constraints->machines[i]);
        }
    }
    gm_vocab_destroy(constraints->vocab);
    cm_free(constraints);
}

rt_constraint *t_constraint_make(t_constraints *constraints, const t_seq *seq)
{
    if (seq->constraint == 0) {
        return NULL;
    }
    return rt_constraint_create(gm_machine_hold(constraints->machines[seq->constraint - 1]), seq->thinking);
}
