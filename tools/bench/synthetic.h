/* Checkpoints of random weights, with the names, shapes and formats that a config.json demands, to measure
 * with where no released one fits. Weights are about normal with a standard deviation of 1 / sqrt(inputs), so
 * that activations stay of the size a trained model's have. Thread: main. */
#pragma once
#include "common/base/bytes.h"
#include "common/base/status.h"

/* Writes such a checkpoint and a tokenizer of single bytes into the new folder `dir`; config: the text of a
 * config.json. The same seed and config give the same bytes. CM_E_CONFIG, CM_E_IO with a sentence. */
CM_MUST_CHECK cm_status synthetic_write(const char *config, const char *dir, uint64_t seed, cm_error *err);
/* The config.json of the folder `model`, after it has been checked. text_out: cm_bytes_fini it. */
CM_MUST_CHECK cm_status synthetic_config(const char *model, cm_bytes *text_out, cm_error *err);
