#include "gateway/openai_logprobs.h"

#include "gateway/json_text.h"

void gw_openai_logprobs_init(gw_openai_logprobs *list, gw_ask_kind kind)
{
    *list = (gw_openai_logprobs){.kind = kind};
    cm_bytes_init(&list->content, 0);
    cm_bytes_init(&list->reasoning, 0);
    cm_bytes_init(&list->tokens, 0);
    cm_bytes_init(&list->logprobs, 0);
    cm_bytes_init(&list->top, 0);
    cm_bytes_init(&list->offsets, 0);
}

void gw_openai_logprobs_fini(gw_openai_logprobs *list)
{
    cm_bytes_fini(&list->content);
    cm_bytes_fini(&list->reasoning);
    cm_bytes_fini(&list->tokens);
    cm_bytes_fini(&list->logprobs);
    cm_bytes_fini(&list->top);
    cm_bytes_fini(&list->offsets);
}

/* ---- chat ---- */

static void put_token(cm_bytes *out, const gw_logprob *of)
{
    cm_bytes_append_text(out, "\"token\":");
    gw_json_string(out, (const char *)of->bytes, of->n_bytes);
    cm_bytes_printf(out, ",\"logprob\":%.9g,\"bytes\":[", (double)of->logprob);
    for (size_t i = 0; i < of->n_bytes; i++) {
        cm_bytes_printf(out, "%s%u", i > 0 ? "," : "", of->bytes[i]);
    }
    cm_bytes_append_text(out, "]");
}

void gw_openai_logprobs_object(const gw_logprobs *logprobs, cm_bytes *out)
{
    cm_bytes_append_text(out, "{");
    put_token(out, &logprobs->token);
    cm_bytes_append_text(out, ",\"top_logprobs\":[");
    for (uint32_t i = 0; i < logprobs->n_top; i++) {
        cm_bytes_append_text(out, i > 0 ? ",{" : "{");
        put_token(out, &logprobs->top[i]);
        cm_bytes_append_text(out, "}");
    }
    cm_bytes_append_text(out, "]}");
}

static void add_to_chat(gw_openai_logprobs *list, const gw_logprobs *logprobs)
{
    cm_bytes *out = logprobs->kind == MD_PIECE_REASONING ? &list->reasoning : &list->content;
    cm_bytes_append_text(out, out->len > 0 ? "," : "");
    gw_openai_logprobs_object(logprobs, out);
}

/* ---- completion ---- */

/* Tokens are keys of an object: those that are no text on their own must stay apart. */
static void put_name(cm_bytes *out, const gw_logprob *of)
{
    json_t *text = json_stringn(of->n_bytes > 0 ? (const char *)of->bytes : "", of->n_bytes);
    if (text != NULL) {
        gw_json_string(out, json_string_value(text), of->n_bytes);
        json_decref(text);
        return;
    }
    cm_bytes_append_text(out, "\"bytes:");
    for (size_t i = 0; i < of->n_bytes; i++) {
        cm_bytes_printf(out, "\\\\x%02x", of->bytes[i]);
    }
    cm_bytes_append_text(out, "\"");
}

static void put_pair(cm_bytes *out, const gw_logprob *of, const char *before)
{
    cm_bytes_append_text(out, before);
    put_name(out, of);
    cm_bytes_printf(out, ":%.9g", (double)of->logprob);
}

/* The chosen one is always among the alternatives told. */
static void put_alternatives(cm_bytes *out, const gw_logprobs *logprobs)
{
    bool has_token = false;
    cm_bytes_append_text(out, "{");
    for (uint32_t i = 0; i < logprobs->n_top; i++) {
        has_token = has_token || logprobs->top[i].id == logprobs->token.id;
        put_pair(out, &logprobs->top[i], i > 0 ? "," : "");
    }
    if (!has_token) {
        put_pair(out, &logprobs->token, logprobs->n_top > 0 ? "," : "");
    }
    cm_bytes_append_text(out, "}");
}

static void add_to_completion(gw_openai_logprobs *list, const gw_logprobs *logprobs)
{
    const gw_logprob *token = &logprobs->token;
    const char *comma = list->tokens.len > 0 ? "," : "";
    cm_bytes_append_text(&list->tokens, comma);
    put_name(&list->tokens, token);
    cm_bytes_printf(&list->logprobs, "%s%.9g", comma, (double)token->logprob);
    cm_bytes_append_text(&list->top, comma);
    put_alternatives(&list->top, logprobs);
    cm_bytes_printf(&list->offsets, "%s%llu", comma, (unsigned long long)list->n_chars);
    for (size_t i = 0; i < token->n_bytes; i++) {
        list->n_chars += (token->bytes[i] & 0xc0) != 0x80; /* each character once, by its first byte */
    }
}

/* ---- both ---- */

void gw_openai_logprobs_add(gw_openai_logprobs *list, const gw_logprobs *logprobs)
{
    if (logprobs->is_marker) {
        return;
    }
    list->n++;
    if (list->kind == GW_ASK_CHAT) {
        add_to_chat(list, logprobs);
    } else {
        add_to_completion(list, logprobs);
    }
}

static void put_list(cm_bytes *out, const char *head, cm_bytes *list)
{
    cm_bytes_append_text(out, head);
    cm_bytes_append(out, cm_bytes_text(list), list->len);
    cm_bytes_append_text(out, "]");
    cm_bytes_clear(list);
}

void gw_openai_logprobs_put(gw_openai_logprobs *list, bool thinking, cm_bytes *out)
{
    if (list->kind == GW_ASK_CHAT) {
        put_list(out, "{\"content\":[", &list->content);
        if (thinking) {
            put_list(out, ",\"reasoning_content\":[", &list->reasoning);
        }
    } else {
        put_list(out, "{\"tokens\":[", &list->tokens);
        put_list(out, ",\"token_logprobs\":[", &list->logprobs);
        put_list(out, ",\"top_logprobs\":[", &list->top);
        put_list(out, ",\"text_offset\":[", &list->offsets);
    }
    cm_bytes_append_text(out, "}");
    list->n = 0;
}
