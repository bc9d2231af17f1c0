/* The methods that answer at once: Tokenize, Detokenize, Abort, Info. */
#include <stdio.h>
#include <string.h>

#include "gateway/grpc_private.h"

enum { ABORT_IDS_MAX = 1024 };

/* ---- Tokenize ---- */

static void tokenize_text(const md_tokenizer *tokenizer, const Baleen__V1__TokenizeRequest *request,
                          md_ids *ids, cm_bytes *rendered)
{
    md_text_kind kind =
        request->has_allow_control && request->allow_control ? MD_TEXT_CONTROL : MD_TEXT_PLAIN;
    if (request->has_add_bos && request->add_bos) {
        md_ids_push(ids, md_tokenizer_control(tokenizer, MD_CTL_BOS));
        cm_bytes_append_text(rendered, md_control_text(MD_CTL_BOS));
    }
    size_t n = strlen(request->text);
    md_tokenizer_encode(tokenizer, request->text, n, kind, ids);
    cm_bytes_append(rendered, request->text, n);
}

/* Fields of the chat inside, as the client wrote them. */
static void name_chat_field(gw_error *error)
{
    char field[sizeof(error->param)];
    if (error->param[0] != 0) {
        gw_grpc_name_field(error);
        snprintf(field, sizeof(field), "chat.%.*s", (int)sizeof(field) - 6, error->param);
        memcpy(error->param, field, sizeof(field));
    }
}

static cm_status tokenize_chat(gw_gateway *gateway, const Baleen__V1__ChatRequest *chat, md_ids *ids,
                               cm_bytes *rendered, gw_error *error_out)
{
    Baleen__V1__ChatRequest prompt = *chat;
    json_t *body = NULL;
    prompt.sampling = NULL;
    prompt.routing = NULL;
    cm_status status = gw_grpc_chat_body(&prompt, &body, error_out);
    if (status == CM_OK) {
        status = gw_model_check(gateway, chat->model, error_out);
    }
    if (status == CM_OK) {
        status = gw_chat_ids(gateway, body, ids, rendered, error_out);
    }
    if (status != CM_OK) {
        name_chat_field(error_out);
    }
    json_decref(body);
    return status;
}

static cm_status tokenize(gw_gateway *gateway, const Baleen__V1__TokenizeRequest *request, md_ids *ids,
                          cm_bytes *rendered, gw_error *error_out)
{
    CM_TRY(gw_model_check(gateway, request->model, error_out));
    switch (request->input_case) {
    case BALEEN__V1__TOKENIZE_REQUEST__INPUT_TEXT:
        tokenize_text(gw_gateway_tokenizer(gateway), request, ids, rendered);
        return CM_OK;
    case BALEEN__V1__TOKENIZE_REQUEST__INPUT_CHAT:
        return tokenize_chat(gateway, request->chat, ids, rendered, error_out);
    default:
        gw_error_set(error_out, GW_CAUSE_INVALID, "input", "input is missing: set text or chat");
        return CM_E_INVALID;
    }
}

static void send_ids(gw_grpc_call *call, const md_ids *ids, const cm_bytes *rendered)
{
    Baleen__V1__TokenizeResponse response = BALEEN__V1__TOKENIZE_RESPONSE__INIT;
    gw_info info;
    gw_gateway_info(call->grpc->gateway, &info);
    response.n_ids = ids->n;
    response.ids = ids->id;
    response.has_max_model_len = true;
    response.max_model_len = info.context;
    if (rendered != NULL) {
        gw_grpc_put_text(call->grpc, &response.base, "rendered", rendered->data, rendered->len);
    }
    gw_grpc_answer(call, &response.base);
}

void gw_grpc_tokenize(gw_grpc_call *call, const ProtobufCMessage *message)
{
    const Baleen__V1__TokenizeRequest *request = (const Baleen__V1__TokenizeRequest *)message;
    md_ids ids;
    cm_bytes rendered;
    gw_error error;
    md_ids_init(&ids);
    cm_bytes_init(&rendered, 0);
    if (tokenize(call->grpc->gateway, request, &ids, &rendered, &error) == CM_OK) {
        send_ids(call, &ids, request->has_return_text && request->return_text ? &rendered : NULL);
    } else {
        gw_grpc_fail(call, &error);
    }
    cm_bytes_fini(&rendered);
    md_ids_fini(&ids);
}

/* ---- Detokenize ---- */

static cm_status detokenize(gw_gateway *gateway, const Baleen__V1__DetokenizeRequest *request, cm_bytes *text,
                            cm_bytes *raw, gw_error *error_out)
{
    const md_tokenizer *tokenizer = gw_gateway_tokenizer(gateway);
    md_detok detok;
    CM_TRY(gw_model_check(gateway, request->model, error_out));
    md_detok_init(&detok, request->has_skip_special_tokens && request->skip_special_tokens);
    for (size_t i = 0; i < request->n_ids; i++) {
        size_t n = 0;
        uint32_t id = request->ids[i];
        const uint8_t *bytes = md_tokenizer_bytes(tokenizer, id, &n);
        if (bytes == NULL) {
            gw_error_set(error_out, GW_CAUSE_INVALID, "ids",
                         "ids[%zu] is %u, which is no token id of this model", i, id);
            return CM_E_INVALID;
        }
        md_detok_push(&detok, tokenizer, id, text);
        if (!detok.skip_special || !md_tokenizer_is_special(tokenizer, id)) {
            cm_bytes_append(raw, bytes, n);
        }
    }
    md_detok_flush(&detok, text);
    return CM_OK;
}

void gw_grpc_detokenize(gw_grpc_call *call, const ProtobufCMessage *message)
{
    const Baleen__V1__DetokenizeRequest *request = (const Baleen__V1__DetokenizeRequest *)message;
    Baleen__V1__DetokenizeResponse response = BALEEN__V1__DETOKENIZE_RESPONSE__INIT;
    cm_bytes text, raw;
    gw_error error;
    cm_bytes_init(&text, 0);
    cm_bytes_init(&raw, 0);
    if (detokenize(call->grpc->gateway, request, &text, &raw, &error) == CM_OK) {
        gw_grpc_put_text(call->grpc, &response.base, "text", text.data, text.len);
        response.has_raw = true;
        response.raw = (ProtobufCBinaryData){.data = raw.data, .len = raw.len};
        gw_grpc_answer(call, &response.base);
    } else {
        gw_grpc_fail(call, &error);
    }
    cm_bytes_fini(&raw);
    cm_bytes_fini(&text);
}

/* ---- Abort ---- */

cm_status gw_grpc_abort_ids(gw_grpc_call *call, char *const *ids, size_t n, uint32_t *aborted_out,
                            gw_error *error_out)
{
    uint32_t aborted = 0;
    if (n > ABORT_IDS_MAX) {
        gw_error_set(error_out, GW_CAUSE_INVALID, "request_ids",
                     "request_ids has %zu entries, at most %d are accepted", n, ABORT_IDS_MAX);
        return CM_E_INVALID;
    }
    for (size_t i = 0; i < n; i++) {
        aborted += gw_stream_abort(call->grpc->gateway, call->visit->tenant, ids[i]);
    }
    *aborted_out = aborted;
    return CM_OK;
}

void gw_grpc_abort(gw_grpc_call *call, const ProtobufCMessage *message)
{
    const Baleen__V1__AbortRequest *request = (const Baleen__V1__AbortRequest *)message;
    Baleen__V1__AbortResponse response = BALEEN__V1__ABORT_RESPONSE__INIT;
    gw_error error;
    if (gw_grpc_abort_ids(call, request->request_ids, request->n_request_ids, &response.aborted, &error) !=
        CM_OK) {
        gw_grpc_fail(call, &error);
        return;
    }
    if (request->has_all && request->all) {
        response.aborted += gw_stream_abort_all(call->grpc->gateway, call->visit->tenant);
    }
    response.has_aborted = true;
    gw_grpc_answer(call, &response.base);
}

/* ---- Info ---- */

static void fill_info(const gw_info *info, Baleen__V1__InfoResponse *response)
{
    response->has_ready = response->has_draining = response->has_epoch = response->has_running = true;
    response->has_waiting = response->has_kv_used = response->has_uptime_s = true;
    response->ready = info->ready;
    response->draining = info->draining;
    response->epoch = info->epoch;
    response->running = info->running;
    response->waiting = info->waiting;
    response->kv_used = info->kv_used;
    response->uptime_s = info->uptime_s;
}

void gw_grpc_info(gw_grpc_call *call, const ProtobufCMessage *message)
{
    Baleen__V1__InfoResponse response = BALEEN__V1__INFO_RESPONSE__INIT;
    Baleen__V1__ModelInfo model = BALEEN__V1__MODEL_INFO__INIT;
    Baleen__V1__ModelInfo *models[] = {&model};
    gw_info info;
    (void)message;
    gw_gateway_info(call->grpc->gateway, &info);
    char profile[] = {info.profile, 0};
    model.name = (char *)info.model;
    model.has_max_model_len = model.has_vocab_size = model.has_bos_id = true;
    model.max_model_len = info.context;
    model.vocab_size = info.vocab;
    model.bos_id = info.bos_id;
    model.n_eos_ids = 1;
    model.eos_ids = &info.eos_id;
    model.effort_profile = profile;
    model.fingerprint = (char *)info.fingerprint;
    response.version = BALEEN_VERSION;
    response.n_models = 1;
    response.models = models;
    fill_info(&info, &response);
    gw_grpc_answer(call, &response.base);
}
