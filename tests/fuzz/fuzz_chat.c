/* Input: which interface and profile (1 byte), then a request's body. */
#include <string.h>

#include "common/model/chat.h"
#include "tests/fuzz/fuzz.h"

static md_tokenizer *g_tokenizer;

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    cm_error err = {0};
    cm_status status = md_tokenizer_open(BALEEN_NANO "/tokenizer.json", 0, &g_tokenizer, &err);
    CM_ASSERT_MSG(status == CM_OK, "%s", err.text);
    return 0;
}

/* The ids spell the prompt. */
static void check_prompt(const md_ids *ids, const cm_bytes *text)
{
    size_t at = 0;
    for (size_t i = 0; i < ids->n; i++) {
        size_t n;
        const uint8_t *bytes = md_tokenizer_bytes(g_tokenizer, ids->id[i], &n);
        CM_ASSERT(bytes != NULL && n <= text->len - at && memcmp(bytes, text->data + at, n) == 0);
        at += n;
    }
    CM_ASSERT(at == text->len);
}

static void encode(const json_t *body, md_profile profile, bool reference)
{
    json_t *messages;
    md_chat_options options;
    md_ids ids;
    cm_bytes text;
    cm_error err = {0};
    if (md_chat_from_request(body, profile, &messages, &options, &err) != CM_OK) {
        CM_ASSERT(err.text[0] != '\0' && err.field[0] != '\0');
        return;
    }
    options.reference = reference;
    md_ids_init(&ids);
    cm_bytes_init(&text, 0);
    if (md_chat_encode(g_tokenizer, messages, &options, &ids, &text, &err) == CM_OK) {
        check_prompt(&ids, &text);
    } else {
        CM_ASSERT(err.text[0] != '\0' && err.field[0] != '\0');
    }
    cm_bytes_fini(&text);
    md_ids_fini(&ids);
    json_decref(messages);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0) {
        return 0;
    }
    md_profile profile = (data[0] & 1) != 0 ? MD_PROFILE_P : MD_PROFILE_G;
    json_t *body = json_loadb((const char *)data + 1, size - 1, JSON_ALLOW_NUL, NULL), *chat_body;
    cm_error err = {0};
    if (!json_is_object(body)) { /* as a surface refuses it */
        json_decref(body);
        return 0;
    }
    if ((data[0] & 4) == 0) {
        encode(body, profile, (data[0] & 2) != 0);
    } else if (md_chat_body_convert((data[0] & 8) != 0 ? MD_SURFACE_ANTHROPIC : MD_SURFACE_RESPONSES, body,
                                    &chat_body, &err) == CM_OK) {
        encode(chat_body, profile, (data[0] & 2) != 0);
        json_decref(chat_body);
    } else {
        CM_ASSERT(err.text[0] != '\0' && err.field[0] != '\0');
    }
    json_decref(body);
    return 0;
}
