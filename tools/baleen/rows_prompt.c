#include <string.h>

#include "tools/baleen/rows.h"

/* Index of the word at key in NULL-terminated words; the first one also where it is absent or null. */
static cm_status row_word(const json_t *row, const char *key, const char *const *words, size_t *i_out,
                          cm_error *err)
{
    const json_t *value = json_object_get(row, key);
    const char *word = json_string_value(value);
    size_t i = 0;
    if (value != NULL && !json_is_null(value)) {
        while (words[i] != NULL && (word == NULL || strcmp(word, words[i]) != 0)) {
            i++;
        }
    }
    if (words[i] == NULL) {
        return cm_error_set(err, CM_E_INVALID, key, "%s of the row is none of the known words", key);
    }
    *i_out = i;
    return CM_OK;
}

static cm_status row_profile(const json_t *row, md_profile otherwise, md_profile *profile_out, cm_error *err)
{
    static const char *const words[] = {"", "G", "P", NULL};
    size_t i;
    CM_TRY(row_word(row, "profile", words, &i, err));
    *profile_out = i == 0 ? otherwise : i == 1 ? MD_PROFILE_G : MD_PROFILE_P;
    return CM_OK;
}

/* ---- level encoder ---- */

static cm_status encoder_messages(const json_t *row, md_profile profile, json_t **messages_out,
                                  md_chat_options *options_out, cm_error *err)
{
    static const char *const modes[] = {"chat", "thinking", NULL};
    static const char *const efforts[] = {"none", "low", "high", "max", NULL};
    static const md_effort effort_of[] = {MD_EFFORT_NONE, MD_EFFORT_LOW, MD_EFFORT_HIGH, MD_EFFORT_MAX};
    json_t *messages = json_object_get(row, "messages");
    size_t mode, effort;
    CM_TRY(row_word(row, "mode", modes, &mode, err));
    CM_TRY(row_word(row, "effort", efforts, &effort, err));
    if (!json_is_array(messages)) {
        return cm_error_set(err, CM_E_INVALID, "messages", "messages must be a list");
    }
    *messages_out = json_incref(messages);
    *options_out = (md_chat_options){.profile = profile,
                                     .thinking = mode == 1,
                                     .effort = effort_of[effort],
                                     .drop_thinking = !json_is_false(json_object_get(row, "drop_thinking"))};
    return CM_OK;
}

/* ---- level request ---- */

enum { ENDPOINT_CHAT, ENDPOINT_MESSAGES, ENDPOINT_RESPONSES, ENDPOINT_COMPLETIONS };

static cm_status request_endpoint(const json_t *row, size_t *endpoint_out, cm_error *err)
{
    static const char *const endpoints[] = {"chat/completions", "messages", "responses", "completions", NULL};
    CM_TRY(row_word(row, "endpoint", endpoints, endpoint_out, err));
    if (!json_is_object(json_object_get(row, "body"))) {
        return cm_error_set(err, CM_E_INVALID, "body", "body must be an object: what a client would send");
    }
    return CM_OK;
}

static cm_status request_messages(const json_t *row, md_profile profile, json_t **messages_out,
                                  md_chat_options *options_out, cm_error *err)
{
    const json_t *body = json_object_get(row, "body");
    json_t *chat_body;
    size_t endpoint;
    CM_TRY(request_endpoint(row, &endpoint, err));
    if (endpoint == ENDPOINT_CHAT) {
        return md_chat_from_request(body, profile, messages_out, options_out, err);
    }
    if (endpoint == ENDPOINT_COMPLETIONS) {
        return cm_error_set(err, CM_E_INVALID, "endpoint", "completions has no messages");
    }
    CM_TRY(md_chat_body_convert(endpoint == ENDPOINT_MESSAGES ? MD_SURFACE_ANTHROPIC : MD_SURFACE_RESPONSES,
                                body, &chat_body, err));
    cm_status status = md_chat_from_request(chat_body, profile, messages_out, options_out, err);
    json_decref(chat_body);
    return status;
}

/* ---- both ---- */

static cm_status row_is_request(const json_t *row, bool *request_out, cm_error *err)
{
    static const char *const levels[] = {"request", "encoder", NULL};
    size_t level;
    CM_TRY(row_word(row, "level", levels, &level, err));
    *request_out = level == 0;
    return CM_OK;
}

cm_status row_messages(const json_t *row, md_profile profile, json_t **messages_out,
                       md_chat_options *options_out, cm_error *err)
{
    bool request;
    CM_TRY(row_is_request(row, &request, err));
    CM_TRY(row_profile(row, profile, &profile, err));
    return request ? request_messages(row, profile, messages_out, options_out, err)
                   : encoder_messages(row, profile, messages_out, options_out, err);
}

static cm_status encode_messages(const md_tokenizer *tokenizer, const json_t *row, md_profile profile,
                                 bool reference, md_ids *ids, cm_bytes *text, cm_error *err)
{
    json_t *messages;
    md_chat_options options;
    CM_TRY(row_messages(row, profile, &messages, &options, err));
    options.reference = reference;
    cm_status status = md_chat_encode(tokenizer, messages, &options, ids, text, err);
    json_decref(messages);
    return status;
}

static void append_tokens(const md_tokenizer *tokenizer, const md_ids *ids, cm_bytes *text)
{
    for (size_t i = 0; i < ids->n; i++) {
        size_t n;
        const uint8_t *bytes = md_tokenizer_bytes(tokenizer, ids->id[i], &n);
        cm_bytes_append(text, bytes, n);
    }
}

static cm_status encode_completion(const md_tokenizer *tokenizer, const json_t *row, md_ids *ids,
                                   cm_bytes *text, cm_error *err)
{
    const json_t *body = json_object_get(row, "body");
    const json_t *prompt = json_object_get(body, "prompt"), *suffix = json_object_get(body, "suffix");
    if (!json_is_string(prompt)) {
        return cm_error_set(err, CM_E_INVALID, "prompt", "prompt must be a string");
    }
    if (suffix == NULL || json_is_null(suffix)) {
        md_raw_encode(tokenizer, json_string_value(prompt), json_string_length(prompt), ids);
        append_tokens(tokenizer, ids, text);
        return CM_OK;
    }
    if (!json_is_string(suffix)) {
        return cm_error_set(err, CM_E_INVALID, "suffix", "suffix must be a string");
    }
    md_fim_encode(tokenizer, json_string_value(prompt), json_string_length(prompt), json_string_value(suffix),
                  json_string_length(suffix), ids, text);
    return CM_OK;
}

static cm_status encode_any(const md_tokenizer *tokenizer, const json_t *row, md_profile profile,
                            bool reference, md_ids *ids, cm_bytes *text, cm_error *err)
{
    bool request;
    CM_TRY(row_is_request(row, &request, err));
    if (request) {
        size_t endpoint;
        CM_TRY(request_endpoint(row, &endpoint, err));
        if (endpoint == ENDPOINT_COMPLETIONS) {
            return encode_completion(tokenizer, row, ids, text, err);
        }
    }
    return encode_messages(tokenizer, row, profile, reference, ids, text, err);
}

cm_status row_encode(const md_tokenizer *tokenizer, const json_t *row, md_profile profile, bool reference,
                     json_t **answer_out, cm_error *err)
{
    md_ids ids;
    cm_bytes text;
    md_ids_init(&ids);
    cm_bytes_init(&text, 0);
    cm_status status = encode_any(tokenizer, row, profile, reference, &ids, &text, err);
    if (status == CM_OK) {
        *answer_out = json_pack("{s:o, s:o}", "prompt", json_stringn(cm_bytes_text(&text), text.len), "ids",
                                row_ids(&ids));
    }
    cm_bytes_fini(&text);
    md_ids_fini(&ids);
    return status;
}
