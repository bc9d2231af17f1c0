/* Input: a kind, a seed, then a source. One that compiles is walked through its masks: never a dead end, and
 * whatever a mask allows can be said. */
#include <string.h>

#include "common/base/assert.h"
#include "common/base/rng.h"
#include "tests/fuzz/fuzz.h"
#include "tests/unit/grammar_rig.h"

enum { STEPS = 60 };

static void walk(gm_machine *machine, uint64_t seed)
{
    uint32_t bits[32], allowed[1024];
    gm_state at = gm_begin(machine, false);
    for (uint64_t step = 0; step < STEPS && at != GM_DONE; step++) {
        uint32_t n = 0;
        gm_mask(machine, at, bits);
        for (uint32_t id = 0; id < rig_n_id(); id++) {
            if ((bits[id / 32] >> id % 32 & 1) != 0) {
                allowed[n++] = id;
            }
        }
        CM_ASSERT(n > 0);
        gm_state next = gm_advance(machine, at, allowed[(uint32_t)(cm_rng_uniform(seed, step, 0) * n)]);
        CM_ASSERT(next != GM_DEAD);
        gm_state_release(machine, at);
        at = next;
    }
    gm_state_release(machine, at);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    gm_grammar *grammar;
    cm_error err = {0};
    if (size < 2) {
        return 0;
    }
    gm_kind kind = (gm_kind)(GM_JSON_OBJECT + data[0] % GM_TOOLS);
    if (gm_compile(kind, (const char *)data + 2, size - 2, &grammar, &err) != CM_OK) {
        CM_ASSERT(err.text[0] != '\0');
        return 0;
    }
    gm_machine *machine = gm_machine_create(grammar, rig_vocab());
    walk(machine, data[1]);
    gm_machine_release(machine);
    return 0;
}
