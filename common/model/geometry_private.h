/* For the checkpoint, which keeps the text it parsed. Thread: any. */
#pragma once
#include "common/base/bytes.h"
#include "common/model/geometry.h"

/* The text of DIR/config.json; the caller frees it. */
CM_MUST_CHECK cm_status md_config_read(const char *dir, cm_bytes *text_out, cm_error *err);
