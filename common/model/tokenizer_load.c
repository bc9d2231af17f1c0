/* tokenizer.json to tables. Everything that a different kind of tokenizer would do differently is refused
 * here. */
#include <string.h>

#include "common/base/mem.h"
#include "common/model/tokenizer_private.h"
#include "common/model/utf8_private.h"

enum {
    ID_MAX = 1 << 24,       /* ids are bounded before tables are sized by them */
    SYMBOL_MAX = 0x100 + 68 /* code points that stand for bytes are below it */
};

static const char *const CONTROL_TEXT[MD_CTL_COUNT] = {
    [MD_CTL_BOS] = "<｜begin▁of▁sentence｜>",
    [MD_CTL_EOS] = "<｜end▁of▁sentence｜>",
    [MD_CTL_USER] = "<｜User｜>",
    [MD_CTL_ASSISTANT] = "<｜Assistant｜>",
    [MD_CTL_REMINDER] = "<｜latest_reminder｜>",
    [MD_CTL_THINK] = "<think>",
    [MD_CTL_THINK_END] = "</think>",
    [MD_CTL_DSML] = "｜DSML｜",
    [MD_CTL_ACTION] = "<｜action｜>",
    [MD_CTL_QUERY] = "<｜query｜>",
    [MD_CTL_AUTHORITY] = "<｜authority｜>",
    [MD_CTL_DOMAIN] = "<｜domain｜>",
    [MD_CTL_TITLE] = "<｜title｜>",
    [MD_CTL_READ_URL] = "<｜read_url｜>",
    [MD_CTL_FIM_BEGIN] = "<｜fim▁begin｜>",
    [MD_CTL_FIM_HOLE] = "<｜fim▁hole｜>",
    [MD_CTL_FIM_END] = "<｜fim▁end｜>",
};

const char *md_control_text(md_control control)
{
    return CONTROL_TEXT[control];
}

/* ---- small checks ---- */

static cm_status corrupt_type(const char *field, const char *wanted, cm_error *err)
{
    return cm_error_set(err, CM_E_CORRUPT, field, "%s of tokenizer.json is missing or not %s", field, wanted);
}

/* Absent, null, false or "": a feature that is off. */
static cm_status expect_off(const json_t *parent, const char *key, cm_error *err)
{
    const json_t *value = json_object_get(parent, key);
    if (value == NULL || json_is_null(value) || json_is_false(value) ||
        (json_is_string(value) && json_string_length(value) == 0)) {
        return CM_OK;
    }
    return cm_error_set(err, CM_E_CORRUPT, key,
                        "%s of tokenizer.json is set: this kind of tokenizer is not supported", key);
}

static bool is_type(const json_t *object, const char *type)
{
    const char *text = json_string_value(json_object_get(object, "type"));
    return text != NULL && strcmp(text, type) == 0;
}

static cm_status check_kind(const json_t *root, cm_error *err)
{
    const json_t *normalizer = json_object_get(root, "normalizer");
    const json_t *post = json_object_get(root, "post_processor");
    const json_t *model = json_object_get(root, "model");
    if (!json_is_null(normalizer) && normalizer != NULL &&
        (!is_type(normalizer, "Sequence") ||
         json_array_size(json_object_get(normalizer, "normalizers")) != 0)) {
        return cm_error_set(err, CM_E_CORRUPT, "normalizer",
                            "tokenizer.json has a normalizer: not supported");
    }
    if (post != NULL && !json_is_null(post) && !is_type(post, "ByteLevel")) {
        return cm_error_set(err, CM_E_CORRUPT, "post_processor",
                            "post_processor of tokenizer.json is not ByteLevel");
    }
    if (!is_type(json_object_get(root, "decoder"), "ByteLevel")) {
        return cm_error_set(err, CM_E_CORRUPT, "decoder", "decoder of tokenizer.json is not ByteLevel");
    }
    if (!is_type(model, "BPE")) {
        return cm_error_set(err, CM_E_CORRUPT, "model", "model of tokenizer.json is not BPE");
    }
    static const char *const off[] = {
        "dropout",       "unk_token",    "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
        "byte_fallback", "ignore_merges"};
    for (size_t i = 0; i < sizeof(off) / sizeof(off[0]); i++) {
        CM_TRY(expect_off(model, off[i], err));
    }
    CM_TRY(expect_off(root, "truncation", err));
    return expect_off(root, "padding", err);
}

/* ---- pre-tokenizer ---- */

static cm_status load_split(md_tokenizer *tokenizer, const json_t *step, cm_error *err)
{
    const json_t *pattern = json_object_get(json_object_get(step, "pattern"), "Regex");
    const char *behavior = json_string_value(json_object_get(step, "behavior"));
    if (!json_is_string(pattern)) {
        return corrupt_type("pre_tokenizer", "a Split with a Regex pattern", err);
    }
    if (behavior == NULL || strcmp(behavior, "Isolated") != 0) {
        return corrupt_type("pre_tokenizer", "a Split with behavior Isolated", err);
    }
    CM_TRY(expect_off(step, "invert", err));
    return md_pretok_add(&tokenizer->pretok, json_string_value(pattern), json_string_length(pattern), err);
}

/* Any number of Splits, then ByteLevel without an expression of its own. */
static cm_status load_pretokenizer(md_tokenizer *tokenizer, const json_t *root, cm_error *err)
{
    const json_t *sequence = json_object_get(root, "pre_tokenizer");
    const json_t *steps = json_object_get(sequence, "pretokenizers");
    if (!is_type(sequence, "Sequence") || json_array_size(steps) == 0) {
        return corrupt_type("pre_tokenizer", "a Sequence of steps", err);
    }
    size_t last = json_array_size(steps) - 1;
    for (size_t i = 0; i < last; i++) {
        const json_t *step = json_array_get(steps, i);
        if (!is_type(step, "Split")) {
            const char *type = json_string_value(json_object_get(step, "type"));
            return cm_error_set(err, CM_E_CORRUPT, "pre_tokenizer", "step %zu is of unsupported type %s", i,
                                type != NULL ? type : "(none)");
        }
        CM_TRY(load_split(tokenizer, step, err));
    }
    const json_t *byte_level = json_array_get(steps, last);
    if (!is_type(byte_level, "ByteLevel")) {
        return corrupt_type("pre_tokenizer", "a Sequence that ends in ByteLevel", err);
    }
    CM_TRY(expect_off(byte_level, "add_prefix_space", err));
    return expect_off(byte_level, "use_regex", err);
}

/* ---- tokens ---- */

static cm_status check_id(const json_t *value, const char *text, uint32_t vocab, uint32_t *id_out,
                          cm_error *err)
{
    json_int_t id = json_integer_value(value);
    if (!json_is_integer(value) || id < 0 || id >= ID_MAX) {
        return cm_error_set(err, CM_E_CORRUPT, "tokenizer.json", "token \"%.100s\" has no usable id", text);
    }
    if (vocab != 0 && id >= vocab) {
        return cm_error_set(err, CM_E_CORRUPT, "tokenizer.json",
                            "token \"%.100s\" has id %lld, but the model has %u rows (vocab_size)", text,
                            (long long)id, vocab);
    }
    *id_out = (uint32_t)id;
    return CM_OK;
}

/* Sizes the table by the highest id of both lists. */
static cm_status count_tokens(md_tokenizer *tokenizer, const json_t *vocab_object, const json_t *added,
                              uint32_t vocab, cm_error *err)
{
    const char *text;
    json_t *value;
    uint32_t id, highest = 0;
    json_object_foreach((json_t *)vocab_object, text, value)
    {
        CM_TRY(check_id(value, text, vocab, &id, err));
        highest = id > highest ? id : highest;
    }
    size_t i;
    json_array_foreach(added, i, value)
    {
        const char *content = json_string_value(json_object_get(value, "content"));
        if (content == NULL || content[0] == 0) {
            return cm_error_set(err, CM_E_CORRUPT, "added_tokens", "added_tokens[%zu] has no content", i);
        }
        CM_TRY(check_id(json_object_get(value, "id"), content, vocab, &id, err));
        highest = id > highest ? id : highest;
    }
    tokenizer->n_tokens = highest + 1;
    tokenizer->tokens = cm_alloc(sizeof(md_token) * tokenizer->n_tokens);
    return CM_OK;
}

static cm_status put_token(md_tokenizer *tokenizer, uint32_t id, const char *text, size_t n, cm_error *err)
{
    md_token *token = &tokenizer->tokens[id];
    if (token->present) {
        return cm_error_set(err, CM_E_CORRUPT, "tokenizer.json", "id %u has two tokens", id);
    }
    *token = (md_token){.at = (uint32_t)tokenizer->blob.len, .n_bytes = (uint32_t)n, .present = true};
    cm_bytes_append(&tokenizer->blob, text, n);
    return CM_OK;
}

static cm_status load_added(md_tokenizer *tokenizer, const json_t *added, cm_error *err)
{
    size_t i;
    json_t *value;
    json_array_foreach(added, i, value)
    {
        const json_t *content = json_object_get(value, "content");
        uint32_t id = (uint32_t)json_integer_value(json_object_get(value, "id"));
        CM_TRY(put_token(tokenizer, id, json_string_value(content), json_string_length(content), err));
        CM_TRY(expect_off(value, "lstrip", err));
        CM_TRY(expect_off(value, "rstrip", err));
        CM_TRY(expect_off(value, "single_word", err));
        tokenizer->tokens[id].added = true;
        tokenizer->tokens[id].special = json_is_true(json_object_get(value, "special"));
    }
    md_added_sort(tokenizer);
    return CM_OK;
}

/* ---- byte-level symbols ---- */

/* The byte map of byte-level BPE: printable Latin-1 stands for itself, the other 68 bytes in order for U+0100
 * on. */
static void fill_symbols(uint16_t symbol_of_byte[256], int16_t byte_of_symbol[SYMBOL_MAX])
{
    memset(byte_of_symbol, -1, sizeof(int16_t) * SYMBOL_MAX);
    uint16_t next = 0x100;
    for (uint16_t b = 0; b < 256; b++) {
        bool itself = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b != 0xAD);
        symbol_of_byte[b] = itself ? b : next++;
        byte_of_symbol[symbol_of_byte[b]] = (int16_t)b;
    }
}

/* False when a character is no byte symbol. All symbols are one or two bytes of UTF-8. */
static bool symbols_to_bytes(const int16_t byte_of_symbol[SYMBOL_MAX], const char *text, cm_bytes *bytes_out)
{
    cm_bytes_clear(bytes_out);
    for (const uint8_t *at = (const uint8_t *)text; *at != 0;) {
        uint32_t symbol = at[0];
        if (symbol >= 0x80) {
            if (symbol > 0xDF) {
                return false;
            }
            symbol = (symbol & 0x1Fu) << 6 | (at[1] & 0x3Fu);
            at++;
        }
        at++;
        if (symbol >= SYMBOL_MAX || byte_of_symbol[symbol] < 0) {
            return false;
        }
        uint8_t byte = (uint8_t)byte_of_symbol[symbol];
        cm_bytes_append(bytes_out, &byte, 1);
    }
    return bytes_out->len > 0;
}

/* Vocabulary entries that are added tokens too stand in their own spelling there; the others are byte
 * symbols. */
static cm_status load_vocab(md_tokenizer *tokenizer, const json_t *vocab_object, cm_error *err)
{
    uint16_t symbol_of_byte[256];
    int16_t byte_of_symbol[SYMBOL_MAX];
    fill_symbols(symbol_of_byte, byte_of_symbol);
    cm_bytes bytes;
    cm_bytes_init(&bytes, 0);
    cm_status status = CM_OK;
    const char *text;
    json_t *value;
    json_object_foreach((json_t *)vocab_object, text, value)
    {
        uint32_t id = (uint32_t)json_integer_value(value);
        const md_token *token = &tokenizer->tokens[id];
        if (token->added && token->n_bytes == strlen(text) &&
            memcmp(tokenizer->blob.data + token->at, text, token->n_bytes) == 0) {
            continue;
        }
        if (!symbols_to_bytes(byte_of_symbol, text, &bytes)) {
            status = cm_error_set(err, CM_E_CORRUPT, "model.vocab", "token %u \"%.100s\" is not byte-level",
                                  id, text);
            break;
        }
        status = put_token(tokenizer, id, cm_bytes_text(&bytes), bytes.len, err);
        if (status != CM_OK) {
            break;
        }
        if (bytes.len == 1) {
            tokenizer->bpe.byte_id[bytes.data[0]] = id;
        }
    }
    cm_bytes_fini(&bytes);
    for (uint32_t b = 0; b < 256 && status == CM_OK; b++) {
        const md_token *token = &tokenizer->tokens[tokenizer->bpe.byte_id[b]];
        if (!token->present || token->added || token->n_bytes != 1 || tokenizer->blob.data[token->at] != b) {
            status = cm_error_set(err, CM_E_CORRUPT, "model.vocab", "byte 0x%02x has no token", b);
        }
    }
    return status;
}

/* ---- merges ---- */

/* "left right" or ["left", "right"]. */
static bool split_merge(const json_t *value, const char **left_out, size_t *n_left_out,
                        const char **right_out, size_t *n_right_out)
{
    if (json_is_array(value) && json_array_size(value) == 2) {
        *left_out = json_string_value(json_array_get(value, 0));
        *right_out = json_string_value(json_array_get(value, 1));
        *n_left_out = json_string_length(json_array_get(value, 0));
        *n_right_out = json_string_length(json_array_get(value, 1));
        return *left_out != NULL && *right_out != NULL;
    }
    *left_out = json_string_value(value);
    const char *space = *left_out != NULL ? strchr(*left_out, ' ') : NULL;
    if (space == NULL) {
        return false;
    }
    *n_left_out = (size_t)(space - *left_out);
    *right_out = space + 1;
    *n_right_out = strlen(*right_out);
    return true;
}

static cm_status load_merge(md_tokenizer *tokenizer, const json_t *vocab_object, const json_t *value,
                            cm_bytes *joined)
{
    const char *left, *right;
    size_t n_left, n_right;
    if (!split_merge(value, &left, &n_left, &right, &n_right)) {
        return CM_E_CORRUPT;
    }
    cm_bytes_clear(joined);
    cm_bytes_append(joined, left, n_left);
    cm_bytes_append(joined, right, n_right);
    const json_t *left_id = json_object_getn(vocab_object, left, n_left);
    const json_t *right_id = json_object_getn(vocab_object, right, n_right);
    const json_t *joined_id = json_object_getn(vocab_object, cm_bytes_text(joined), joined->len);
    if (left_id == NULL || right_id == NULL || joined_id == NULL) {
        return CM_E_CORRUPT;
    }
    return md_bpe_add(&tokenizer->bpe, (md_merge){.left = (uint32_t)json_integer_value(left_id),
                                                  .right = (uint32_t)json_integer_value(right_id),
                                                  .id = (uint32_t)json_integer_value(joined_id)});
}

static cm_status load_merges(md_tokenizer *tokenizer, const json_t *vocab_object, const json_t *merges,
                             cm_error *err)
{
    cm_bytes joined;
    cm_bytes_init(&joined, 0);
    cm_status status = CM_OK;
    size_t i;
    json_t *value;
    json_array_foreach(merges, i, value)
    {
        status = load_merge(tokenizer, vocab_object, value, &joined);
        if (status != CM_OK) {
            status =
                cm_error_set(err, CM_E_CORRUPT, "model.merges", "merge %zu is %s", i,
                             status == CM_E_EXISTS ? "there twice" : "not two tokens that join to a third");
            break;
        }
    }
    cm_bytes_fini(&joined);
    return status;
}

/* ---- all ---- */

static cm_status find_controls(md_tokenizer *tokenizer, cm_error *err)
{
    for (uint32_t i = 0; i < MD_CTL_COUNT; i++) {
        const char *text = CONTROL_TEXT[i];
        size_t n = strlen(text);
        if (md_added_match(tokenizer, (const uint8_t *)text, n, &tokenizer->control[i]) != n) {
            return cm_error_set(err, CM_E_CORRUPT, "added_tokens",
                                "protocol token %s is not one id in tokenizer.json", text);
        }
    }
    return CM_OK;
}

cm_status md_tokenizer_load(md_tokenizer *tokenizer, const json_t *root, uint32_t vocab, cm_error *err)
{
    const json_t *vocab_object = json_object_get(json_object_get(root, "model"), "vocab");
    const json_t *merges = json_object_get(json_object_get(root, "model"), "merges");
    const json_t *added = json_object_get(root, "added_tokens");
    CM_TRY(check_kind(root, err));
    if (!json_is_object(vocab_object)) {
        return corrupt_type("model.vocab", "an object", err);
    }
    if (!json_is_array(merges) || json_array_size(merges) > ID_MAX) {
        return corrupt_type("model.merges", "a list", err);
    }
    if (!json_is_array(added)) {
        return corrupt_type("added_tokens", "a list", err);
    }
    md_bpe_init(&tokenizer->bpe, (uint32_t)json_array_size(merges));
    CM_TRY(load_pretokenizer(tokenizer, root, err));
    CM_TRY(count_tokens(tokenizer, vocab_object, added, vocab, err));
    CM_TRY(load_added(tokenizer, added, err));
    CM_TRY(load_vocab(tokenizer, vocab_object, err));
    CM_TRY(load_merges(tokenizer, vocab_object, merges, err));
    return find_controls(tokenizer, err);
}
