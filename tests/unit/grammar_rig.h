/* A small vocabulary for grammars: every byte, some pieces of several bytes, a few control tokens. */
#pragma once
#include "common/grammar/machine.h"

enum { RIG_EOS = 256, RIG_THINK_END, RIG_DSML, RIG_USER, RIG_PIECES };

uint32_t rig_n_id(void);
gm_vocab *rig_vocab(void);                                       /* made once */
const uint8_t *rig_bytes(void *ctx, uint32_t id, size_t *n_out); /* of an id; NULL: control */
gm_machine *rig_machine(gm_kind kind, const char *source);       /* asserts that it compiles */
/* The state behind text, byte by byte, held; ^ stands for the DSML token. */
gm_state rig_run(gm_machine *machine, const char *text);
bool rig_accepts(gm_machine *machine, const char *text);
/* A random schema as JSON text, of what schemas can say; same seed, same schema. Owned by the caller
 * (cm_free). */
char *rig_random_schema(uint64_t seed);
char *rig_random_regex(uint64_t seed);
