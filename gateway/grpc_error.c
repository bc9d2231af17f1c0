/* What a client is told when a call fails: code, sentence and google.rpc details. */
#include <stdio.h>
#include <string.h>

#include "gateway/grpc_private.h"
#include "proto/rpc_status.pb-c.h"

void gw_grpc_rename_field(gw_error *error, const char *const names[][2], size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (strcmp(error->param, names[i][0]) == 0) {
            snprintf(error->param, sizeof(error->param), "%s", names[i][1]);
            return;
        }
    }
}

void gw_grpc_name_field(gw_error *error)
{
    static const char *const names[][2] = {
        {"max_tokens", "sampling.max_tokens"},
        {"min_tokens", "sampling.min_tokens"},
        {"temperature", "sampling.temperature"},
        {"top_p", "sampling.top_p"},
        {"top_k", "sampling.top_k"},
        {"min_p", "sampling.min_p"},
        {"presence_penalty", "sampling.presence_penalty"},
        {"frequency_penalty", "sampling.frequency_penalty"},
        {"repetition_penalty", "sampling.repetition_penalty"},
        {"seed", "sampling.seed"},
        {"stop", "sampling.stop"},
        {"stop_token_ids", "sampling.stop_token_ids"},
        {"ignore_eos", "sampling.ignore_eos"},
        {"include_stop_str_in_output", "sampling.include_stop"},
        {"logit_bias", "sampling.logit_bias"},
        {"logprobs", "sampling.top_logprobs"},
        {"top_logprobs", "sampling.top_logprobs"},
        {"response_format", "sampling.constraint"},
        {"response_format.type", "sampling.constraint"},
        {"response_format.json_schema", "sampling.json_schema"},
        {"structured_outputs.regex", "sampling.regex"},
        {"structured_outputs.choice", "sampling.choice"},
        {"tool_choice", "tool_mode"},
        {"thinking.type", "thinking"},
        {"reasoning_effort", "effort"},
        {"chat_template_kwargs", "drop_thinking"},
        {"user_id", "routing.user_id"},
        {"priority", "routing.priority"},
        {"request_id", "routing.request_id"},
    };
    gw_grpc_rename_field(error, names, sizeof(names) / sizeof(names[0]));
}

void gw_grpc_clean(char *text, size_t cap)
{
    md_detok detok;
    cm_bytes out;
    cm_bytes_init(&out, cap - 1);
    md_detok_init(&detok, false);
    md_detok_push_bytes(&detok, (const uint8_t *)text, strlen(text), &out);
    memcpy(text, cm_bytes_text(&out), out.len + 1);
    cm_bytes_fini(&out);
}

/* value: a packed message, kept until any is packed itself. */
static void wrap(const ProtobufCMessage *message, char *type_url, cm_bytes *value, Google__Rpc__Any *any_out)
{
    cm_bytes_init(value, 0);
    pr_pack(message, value);
    google__rpc__any__init(any_out);
    any_out->type_url = type_url;
    any_out->has_value = true;
    any_out->value = (ProtobufCBinaryData){.data = value->data, .len = value->len};
}

static void wrap_field(gw_error *error, cm_bytes *value, Google__Rpc__Any *any_out)
{
    Google__Rpc__BadRequest bad = GOOGLE__RPC__BAD_REQUEST__INIT;
    Google__Rpc__BadRequest__FieldViolation violation = GOOGLE__RPC__BAD_REQUEST__FIELD_VIOLATION__INIT;
    Google__Rpc__BadRequest__FieldViolation *violations[] = {&violation};
    violation.field = error->param;
    violation.description = error->message;
    bad.n_field_violations = 1;
    bad.field_violations = violations;
    wrap(&bad.base, "type.googleapis.com/google.rpc.BadRequest", value, any_out);
}

static void wrap_retry(const gw_error *error, cm_bytes *value, Google__Rpc__Any *any_out)
{
    Google__Rpc__RetryInfo retry = GOOGLE__RPC__RETRY_INFO__INIT;
    Google__Rpc__Duration delay = GOOGLE__RPC__DURATION__INIT;
    delay.has_seconds = delay.has_nanos = true;
    delay.seconds = error->retry_ms / 1000;
    delay.nanos = (int32_t)(error->retry_ms % 1000) * 1000000;
    retry.retry_delay = &delay;
    wrap(&retry.base, "type.googleapis.com/google.rpc.RetryInfo", value, any_out);
}

void gw_grpc_fail(gw_grpc_call *call, const gw_error *error)
{
    gw_error e = *error;
    cm_bytes values[2], packed;
    Google__Rpc__Any any[2], *details[] = {&any[0], &any[1]};
    Google__Rpc__Status status = GOOGLE__RPC__STATUS__INIT;
    if (call->method->name_field != NULL) {
        call->method->name_field(&e);
    }
    gw_grpc_clean(e.param, sizeof(e.param));
    gw_grpc_clean(e.message, sizeof(e.message));
    if (e.param[0] != 0) {
        wrap_field(&e, &values[status.n_details], &any[status.n_details]);
        status.n_details++;
    }
    if (e.retry_ms > 0) {
        wrap_retry(&e, &values[status.n_details], &any[status.n_details]);
        status.n_details++;
    }
    status.details = details;
    status.has_code = true;
    status.code = (int32_t)gw_error_grpc(&e);
    status.message = e.message;
    cm_bytes_init(&packed, 0);
    pr_pack(&status.base, &packed);
    call->code = (int)gw_error_grpc(&e);
    if (call->visit->end == NULL) {
        call->visit->end = gw_error_code(&e);
    }
    pc_call_finish(call->call, gw_error_grpc(&e), e.message, packed.data, packed.len,
                   gw_error_is_final(&e) ? PC_RETRY_NEVER : (int64_t)e.retry_ms);
    cm_bytes_fini(&packed);
    for (size_t i = 0; i < status.n_details; i++) {
        cm_bytes_fini(&values[i]);
    }
}
