/* What a client of the Anthropic surface asks for, as a chat body. Thread: any. */
#pragma once
#include "gateway/surface.h"

extern const gw_surface_field gw_anthropic_fields[];

/* Of a Messages request. A new reference; CM_E_INVALID with error_out in the client's own words. */
CM_MUST_CHECK cm_status gw_anthropic_body(const json_t *given, json_t **body_out, gw_error *error_out);
/* The same of a request to count its tokens: it may have no max_tokens. */
CM_MUST_CHECK cm_status gw_anthropic_count_body(const json_t *given, json_t **body_out, gw_error *error_out);
