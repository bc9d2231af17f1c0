/* A checkpoint of random weights, for benchmarks at sizes that nobody has a checkpoint of. Thread: main. */
#pragma once
#include "common/base/status.h"

/* Writes `config`, the text of a config.json, and one shard with every tensor it demands into a new folder
 * `dir`. Values are plausible (codes about normal up to the end of their range, scales that keep products of
 * about size one), finite, and the same each time. CM_E_CONFIG, CM_E_IO with a sentence. */
CM_MUST_CHECK cm_status synthetic_write(const char *dir, const char *config, cm_error *err);
/* Removes what it wrote; an open mapping of it stays readable. */
void synthetic_remove(const char *dir);
