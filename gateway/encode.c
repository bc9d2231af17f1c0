#include "gateway/encode.h"

#include <string.h>

#include "common/base/mem.h"

struct gw_encode {
    pc_task task;
    gw_encoder encoder;
    gw_encoded_fn fn; /* NULL: forgotten; the loop's alone, as ctx */
    void *ctx;
    gw_ask_kind kind;
    json_t *body; /* chat: a copy of our own, because jansson's counts are not for two threads */
    char *prompt, *suffix;
    size_t prompt_bytes, suffix_bytes;
    gw_constraint constraint; /* a copy: to be compiled */
    gw_encoded result;
};

static cm_status refuse(const cm_error *err, cm_status status, gw_error *error_out)
{
    gw_cause cause = status == CM_E_INVALID       ? GW_CAUSE_INVALID
                     : status == CM_E_UNSUPPORTED ? GW_CAUSE_UNSUPPORTED
                                                  : GW_CAUSE_INTERNAL;
    gw_error_set(error_out, cause, err->field, "%s", err->text);
    return status;
}

/* The key has to be there; what it holds may be empty. */
static cm_status check_replay(const json_t *messages, gw_error *error_out)
{
    size_t i;
    json_t *message;
    json_array_foreach(messages, i, message)
    {
        if (json_array_size(json_object_get(message, "tool_calls")) > 0 &&
            json_object_get(message, "reasoning_content") == NULL) {
            gw_error_set(error_out, GW_CAUSE_INVALID, "messages",
                         "The `reasoning_content` in the thinking mode must be passed back to the API.");
            return CM_E_INVALID;
        }
    }
    return CM_OK;
}

static bool says_json(const json_t *content)
{
    const char *text = json_string_value(content);
    size_t i;
    json_t *part;
    if (text != NULL) {
        return strcasestr(text, "json") != NULL;
    }
    json_array_foreach(content, i, part)
    {
        if (says_json(json_object_get(part, "text"))) {
            return true;
        }
    }
    return false;
}

static cm_status check_json_word(const json_t *body, const json_t *messages, gw_error *error_out)
{
    const json_t *format = json_object_get(body, "response_format");
    const char *type = json_string_value(json_object_get(format, "type"));
    size_t i;
    json_t *message;
    if (type == NULL || strcmp(type, "json_object") != 0) {
        return CM_OK;
    }
    json_array_foreach(messages, i, message)
    {
        if (says_json(json_object_get(message, "content"))) {
            return CM_OK;
        }
    }
    gw_error_set(error_out, GW_CAUSE_INVALID, "messages",
                 "Prompt must contain the word 'json' in some form to use 'response_format' of type "
                 "'json_object'.");
    return CM_E_INVALID;
}

/* What this server asks of a chat beyond what the encoder needs. */
static cm_status check_rules(const gw_encoder *encoder, const json_t *body, const json_t *messages,
                             bool thinking, gw_error *error_out)
{
    if (encoder->strict_replay && thinking) {
        CM_TRY(check_replay(messages, error_out));
    }
    return encoder->json_word ? check_json_word(body, messages, error_out) : CM_OK;
}

cm_status gw_encode_chat(const gw_encoder *encoder, const json_t *body, md_ids *ids_out, cm_bytes *text_out,
                         bool *continues_out, gw_error *error_out)
{
    json_t *messages;
    md_chat_options options;
    cm_error err = {0};
    cm_status status = md_chat_from_request(body, encoder->profile, &messages, &options, &err);
    if (status != CM_OK) {
        return refuse(&err, status, error_out);
    }
    status = check_rules(encoder, body, messages, options.thinking, error_out);
    if (status != CM_OK) {
        json_decref(messages);
        return status;
    }
    status = md_chat_encode(encoder->tokenizer, messages, &options, ids_out, text_out, &err);
    if (status == CM_OK) {
        const json_t *last = json_array_get(messages, json_array_size(messages) - 1);
        const char *role = json_string_value(json_object_get(last, "role"));
        *continues_out = role != NULL && strcmp(role, "assistant") == 0;
    }
    json_decref(messages);
    return status == CM_OK ? CM_OK : refuse(&err, status, error_out);
}

/* The last of <think> and </think> behind the last <Assistant> decides. */
static bool ends_in_thinking(const md_tokenizer *tokenizer, const md_ids *ids)
{
    uint32_t think = md_tokenizer_control(tokenizer, MD_CTL_THINK);
    uint32_t think_end = md_tokenizer_control(tokenizer, MD_CTL_THINK_END);
    uint32_t assistant = md_tokenizer_control(tokenizer, MD_CTL_ASSISTANT);
    for (size_t i = ids->n; i > 0; i--) {
        uint32_t id = ids->id[i - 1];
        if (id == think || id == think_end || id == assistant) {
            return id == think;
        }
    }
    return false;
}

/* On a job thread. */
static void encode_run(void *arg)
{
    gw_encode *encode = arg;
    const md_tokenizer *tokenizer = encode->encoder.tokenizer;
    gw_encoded *result = &encode->result;
    result->status = gw_constraint_check(&encode->constraint, &result->error);
    if (result->status != CM_OK) {
        pc_loop_post(encode->encoder.loop, &encode->task);
        return;
    }
    if (encode->kind == GW_ASK_CHAT) {
        result->status = gw_encode_chat(&encode->encoder, encode->body, &result->ids, NULL,
                                        &result->continues, &result->error);
        result->thinking = ends_in_thinking(tokenizer, &result->ids);
    } else if (encode->suffix != NULL) {
        md_fim_encode(tokenizer, encode->prompt, encode->prompt_bytes, encode->suffix, encode->suffix_bytes,
                      &result->ids, NULL);
    } else if (encode->prompt != NULL) {
        md_raw_encode(tokenizer, encode->prompt, encode->prompt_bytes, &result->ids);
    }
    pc_loop_post(encode->encoder.loop, &encode->task);
}

/* Back on the loop. */
static void encode_done(void *arg)
{
    gw_encode *encode = arg;
    if (encode->fn != NULL) {
        encode->fn(encode->ctx, &encode->result);
    }
    json_decref(encode->body);
    cm_free(encode->prompt);
    cm_free(encode->suffix);
    gw_constraint_free(&encode->constraint);
    md_ids_fini(&encode->result.ids);
    cm_free(encode);
}

cm_status gw_encode_begin(const gw_encoder *encoder, gw_request *request, const json_t *body,
                          gw_encoded_fn fn, void *ctx, gw_encode **encode_out)
{
    gw_encode *encode = cm_alloc(sizeof(*encode));
    *encode = (gw_encode){.encoder = *encoder,
                          .fn = fn,
                          .ctx = ctx,
                          .kind = request->kind,
                          .prompt = request->prompt,
                          .prompt_bytes = request->prompt_bytes,
                          .suffix = request->suffix,
                          .suffix_bytes = request->suffix_bytes,
                          .result = {.ids = request->prompt_ids}};
    gw_constraint_copy(&request->constraint, &encode->constraint);
    request->prompt = request->suffix = NULL;
    md_ids_init(&request->prompt_ids);
    encode->task = (pc_task){.fn = encode_done, .arg = encode};
    encode->body = request->kind == GW_ASK_CHAT ? json_deep_copy(body) : NULL;
    cm_status status = cm_jobs_submit(encoder->jobs, encode_run, encode);
    if (status != CM_OK) {
        encode->fn = NULL;
        encode_done(encode);
        return status;
    }
    *encode_out = encode;
    return CM_OK;
}

void gw_encode_forget(gw_encode *encode)
{
    encode->fn = NULL;
}
