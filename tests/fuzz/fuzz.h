/* A fuzz target: one function that libFuzzer calls with inputs of its own making (tests/fuzz/run.sh). A
 * property that does not hold is a CM_ASSERT, which is a crash to libFuzzer. Thread: main. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common/base/assert.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
/* Once, before the first input; optional. */
int LLVMFuzzerInitialize(int *argc, char ***argv);
