#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "gateway/json_text.h"
#include "gateway/stream.h"

typedef struct error_row {
    int http;
    const char *type, *code;
    pc_code grpc;
    int anthropic_http;
    const char *anthropic_type;
} error_row;

static const error_row ERROR_ROW[GW_CAUSE_COUNT] = {
#define GW_ERROR(name, http_, type_, code_, grpc_, anthropic_http_, anthropic_type_)                         \
    [GW_CAUSE_##name] = {.http = (http_),                                                                    \
                         .type = (type_),                                                                    \
                         .code = (code_),                                                                    \
                         .grpc = (grpc_),                                                                    \
                         .anthropic_http = (anthropic_http_),                                                \
                         .anthropic_type = (anthropic_type_)},
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

int gw_error_anthropic_http(const gw_error *error)
{
    return ERROR_ROW[error->cause].anthropic_http;
}

pc_code gw_error_grpc(const gw_error *error)
{
    return ERROR_ROW[error->cause].grpc;
}

bool gw_error_is_final(const gw_error *error)
{
    return error->cause == GW_CAUSE_ABORTED || error->cause == GW_CAUSE_ENDS_ROUTERS;
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

void gw_error_too_long(gw_error *error, const char *param, uint64_t n_prompt, uint32_t context)
{
    gw_error_set(error, GW_CAUSE_CONTEXT, param,
                 "This model's maximum context length is %u tokens. However, your prompt has %llu tokens. "
                 "Please shorten it.",
                 context, (unsigned long long)n_prompt);
    error->tokens = n_prompt < UINT32_MAX ? (uint32_t)n_prompt : UINT32_MAX;
    error->tokens_max = context - 1;
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

/* Clients of this surface know a prompt that is too long by how the sentence begins. */
static void put_anthropic_message(const gw_error *error, cm_bytes *out)
{
    char message[sizeof(error->message) + 64];
    if (error->cause != GW_CAUSE_CONTEXT) {
        snprintf(message, sizeof(message), "%s", error->message);
    } else if (error->tokens == 0) {
        snprintf(message, sizeof(message), "prompt is too long: %s", error->message);
    } else {
        snprintf(message, sizeof(message), "prompt is too long: %u tokens > %u maximum", error->tokens,
                 error->tokens_max);
    }
    gw_json_string(out, message, strlen(message));
}

void gw_anthropic_error(const gw_error *error, const char *request_id, cm_bytes *out)
{
    cm_bytes_printf(out, "{\"type\":\"error\",\"error\":{\"type\":\"%s\",\"message\":",
                    ERROR_ROW[error->cause].anthropic_type);
    put_anthropic_message(error, out);
    cm_bytes_append_text(out, "},\"request_id\":");
    if (request_id != NULL) {
        gw_json_string(out, request_id, strlen(request_id));
    } else {
        cm_bytes_append_text(out, "null");
    }
    cm_bytes_append_text(out, "}");
}
