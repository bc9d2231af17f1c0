#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "gateway/json_text.h"
#include "gateway/stream.h"

typedef struct error_row {
    int http;
    const char *type, *code;
    pc_code grpc;
} error_row;

static const error_row ERROR_ROW[GW_CAUSE_COUNT] = {
#define GW_ERROR(name, http_, type_, code_, grpc_)                                                           \
    [GW_CAUSE_##name] = {.http = (http_), .type = (type_), .code = (code_), .grpc = (grpc_)},
#include "gateway/errors.def"
#undef GW_ERROR
};

int gw_error_http(const gw_error *error)
{
    return ERROR_ROW[error->cause].http;
}

const char *gw_error_type(const gw_error *error)
{
    return ERROR_ROW[error->cause].type;
}

const char *gw_error_code(const gw_error *error)
{
    return ERROR_ROW[error->cause].code;
}

pc_code gw_error_grpc(const gw_error *error)
{
    return ERROR_ROW[error->cause].grpc;
}

void gw_error_set(gw_error *error, gw_cause cause, const char *param, const char *fmt, ...)
{
    va_list args;
    *error = (gw_error){.cause = cause};
    snprintf(error->param, sizeof(error->param), "%s", param != NULL ? param : "");
    va_start(args, fmt);
    vsnprintf(error->message, sizeof(error->message), fmt, args);
    va_end(args);
}

void gw_openai_error(const gw_error *error, cm_bytes *out)
{
    cm_bytes_append_text(out, "{\"error\":{\"message\":");
    gw_json_string(out, error->message, strlen(error->message));
    cm_bytes_printf(out, ",\"type\":\"%s\",\"param\":", gw_error_type(error));
    if (error->param[0] != 0) {
        gw_json_string(out, error->param, strlen(error->param));
    } else {
        cm_bytes_append_text(out, "null");
    }
    cm_bytes_printf(out, ",\"code\":\"%s\"}}", gw_error_code(error));
}
