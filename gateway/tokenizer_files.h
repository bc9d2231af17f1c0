/* The files of a tokenizer as one zip archive, made once at start. Thread: start-up only. */
#pragma once
#include "common/base/bytes.h"

enum { GW_SHA256_HEX = 65 };

/* Of what is there: tokenizer.json and its companions. zip_out: initialised; the same files give the same
 * bytes. CM_E_IO: one could not be read; then zip_out is of no use. */
CM_MUST_CHECK cm_status gw_tokenizer_zip(const char *dir, cm_bytes *zip_out, char sha256_out[GW_SHA256_HEX],
                                         cm_error *err);
