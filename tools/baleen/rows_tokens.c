#include <ctype.h>
#include <string.h>

#include "common/base/mem.h"
#include "tools/baleen/rows.h"

static cm_status hex_bytes(const json_t *value, cm_bytes *bytes_out, cm_error *err)
{
    static const char digits[] = "0123456789abcdef";
    const char *hex = json_string_value(value);
    size_t n = json_string_length(value);
    for (size_t i = 0; i + 1 < n && hex[i] != '\0' && hex[i + 1] != '\0'; i += 2) {
        const char *high = strchr(digits, tolower((unsigned char)hex[i]));
        const char *low = strchr(digits, tolower((unsigned char)hex[i + 1]));
        if (high == NULL || low == NULL) {
            break;
        }
        uint8_t byte = (uint8_t)((high - digits) << 4 | (low - digits));
        cm_bytes_append(bytes_out, &byte, 1);
    }
    if (hex == NULL || bytes_out->len * 2 != n) {
        return cm_error_set(err, CM_E_INVALID, "hex",
                            "hex must be a string of two hexadecimal digits a byte");
    }
    return CM_OK;
}

cm_status row_bytes(const json_t *row, cm_bytes *bytes_out, cm_error *err)
{
    const json_t *text = json_object_get(row, "text"), *hex = json_object_get(row, "hex");
    if (hex != NULL && text == NULL) {
        return hex_bytes(hex, bytes_out, err);
    }
    if (!json_is_string(text) || hex != NULL) {
        return cm_error_set(err, CM_E_INVALID, "text", "a row must have either text or hex, a string");
    }
    cm_bytes_append(bytes_out, json_string_value(text), json_string_length(text));
    return CM_OK;
}

json_t *row_ids(const md_ids *ids)
{
    json_t *list = json_array();
    for (size_t i = 0; i < ids->n; i++) {
        json_array_append_new(list, json_integer(ids->id[i]));
    }
    return list;
}

cm_status row_tokenize(const md_tokenizer *tokenizer, const json_t *row, md_text_kind kind,
                       json_t **answer_out, cm_error *err)
{
    cm_bytes bytes;
    cm_bytes_init(&bytes, 0);
    cm_status status = row_bytes(row, &bytes, err);
    if (status == CM_OK) {
        md_ids ids;
        md_ids_init(&ids);
        md_tokenizer_encode(tokenizer, cm_bytes_text(&bytes), bytes.len, kind, &ids);
        *answer_out = json_pack("{s:o}", "ids", row_ids(&ids));
        md_ids_fini(&ids);
    }
    cm_bytes_fini(&bytes);
    return status;
}

static cm_status check_ids(const md_tokenizer *tokenizer, const json_t *ids, cm_error *err)
{
    size_t i, n;
    json_t *value;
    if (!json_is_array(ids)) {
        return cm_error_set(err, CM_E_INVALID, "ids", "ids must be a list of token ids");
    }
    json_array_foreach(ids, i, value)
    {
        json_int_t id = json_integer_value(value);
        if (!json_is_integer(value) || id < 0 || id >= md_tokenizer_vocab(tokenizer) ||
            md_tokenizer_bytes(tokenizer, (uint32_t)id, &n) == NULL) {
            return cm_error_set(err, CM_E_INVALID, "ids", "ids[%zu] is no token of this tokenizer", i);
        }
    }
    return CM_OK;
}

static json_t *text_from(const cm_bytes *text, size_t from)
{
    return json_stringn(cm_bytes_text(text) + from, text->len - from);
}

cm_status row_detokenize(const md_tokenizer *tokenizer, const json_t *row, bool skip_special,
                         json_t **answer_out, cm_error *err)
{
    const json_t *ids = json_object_get(row, "ids");
    size_t i, from = 0;
    json_t *value, *pieces;
    cm_bytes text;
    md_detok detok;
    CM_TRY(check_ids(tokenizer, ids, err));
    pieces = json_array();
    cm_bytes_init(&text, 0);
    md_detok_init(&detok, skip_special);
    json_array_foreach(ids, i, value)
    {
        md_detok_push(&detok, tokenizer, (uint32_t)json_integer_value(value), &text);
        json_array_append_new(pieces, text_from(&text, from));
        from = text.len;
    }
    md_detok_flush(&detok, &text);
    json_array_append_new(pieces, text_from(&text, from));
    *answer_out = json_pack("{s:o, s:o}", "pieces", pieces, "text", text_from(&text, 0));
    cm_bytes_fini(&text);
    return CM_OK;
}
