#include "common/model/tokenizer.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/model/tokenizer_private.h"
#include "common/model/utf8_private.h"

/* ---- id lists ---- */

void md_ids_init(md_ids *ids)
{
    *ids = (md_ids){0};
}

void md_ids_fini(md_ids *ids)
{
    cm_free(ids->id);
    *ids = (md_ids){0};
}

void md_ids_push(md_ids *ids, uint32_t id)
{
    if (ids->n == ids->cap) {
        ids->cap = ids->cap != 0 ? ids->cap * 2 : 64;
        ids->id = cm_realloc(ids->id, sizeof(uint32_t) * ids->cap);
    }
    ids->id[ids->n++] = id;
}

/* ---- open and close ---- */

static cm_status read_json(const char *path, json_t **root_out, cm_error *err)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        return cm_error_set(err, errno == ENOENT ? CM_E_NOT_FOUND : CM_E_IO, "tokenizer.json",
                            "cannot open %s: %s", path, strerror(errno));
    }
    json_error_t why;
    json_t *root = json_loadf(file, JSON_REJECT_DUPLICATES, &why);
    fclose(file);
    if (root == NULL) {
        return cm_error_set(err, CM_E_CORRUPT, "tokenizer.json", "%s line %d: %s", path, why.line, why.text);
    }
    *root_out = root;
    return CM_OK;
}

cm_status md_tokenizer_open(const char *path, uint32_t vocab, md_tokenizer **tokenizer_out, cm_error *err)
{
    json_t *root;
    CM_TRY(read_json(path, &root, err));
    cm_status status = md_tokenizer_from_json(root, vocab, tokenizer_out, err);
    json_decref(root);
    return status;
}

cm_status md_tokenizer_from_json(const json_t *root, uint32_t vocab, md_tokenizer **tokenizer_out,
                                 cm_error *err)
{
    md_tokenizer *tokenizer = cm_alloc(sizeof(*tokenizer));
    md_pretok_init(&tokenizer->pretok);
    cm_status status = md_tokenizer_load(tokenizer, root, vocab, err);
    if (status != CM_OK) {
        md_tokenizer_close(tokenizer);
        return status;
    }
    *tokenizer_out = tokenizer;
    return CM_OK;
}

void md_tokenizer_close(md_tokenizer *tokenizer)
{
    if (tokenizer == NULL) {
        return;
    }
    cm_free(tokenizer->tokens);
    cm_bytes_fini(&tokenizer->blob);
    cm_free(tokenizer->added.ids);
    md_bpe_fini(&tokenizer->bpe);
    md_pretok_fini(&tokenizer->pretok);
    cm_free(tokenizer);
}

/* ---- encode ---- */

typedef struct encode_call {
    const md_tokenizer *tokenizer;
    md_bpe_scratch scratch;
    pcre2_match_data *match;
    md_ids *ids;
} encode_call;

static void encode_piece(void *ctx, const char *piece, size_t n)
{
    encode_call *call = ctx;
    md_bpe_encode(&call->tokenizer->bpe, &call->scratch, (const uint8_t *)piece, n, call->ids);
}

static void encode_stretch(encode_call *call, const uint8_t *text, size_t n)
{
    if (n > 0) {
        md_pretok_run(&call->tokenizer->pretok, call->match, (const char *)text, n, encode_piece, call);
    }
}

/* Text without added tokens: stretches of valid UTF-8 go through the pre-tokenizer, every other byte is a
 * piece. */
static void encode_plain(encode_call *call, const uint8_t *text, size_t n)
{
    size_t begin = 0, at = 0, step;
    while (at < n) {
        if (md_utf8_look(text + at, n - at, &step) == MD_UTF8_VALID) {
            at += step;
            continue;
        }
        encode_stretch(call, text + begin, at - begin);
        encode_piece(call, (const char *)text + at, 1);
        begin = ++at;
    }
    encode_stretch(call, text + begin, n - begin);
}

static void encode_control(encode_call *call, const uint8_t *text, size_t n)
{
    size_t begin = 0, at = 0;
    while (at < n) {
        uint32_t id;
        size_t length = md_added_match(call->tokenizer, text + at, n - at, &id);
        if (length == 0) {
            at++;
            continue;
        }
        encode_plain(call, text + begin, at - begin);
        md_ids_push(call->ids, id);
        begin = at += length;
    }
    encode_plain(call, text + begin, n - begin);
}

void md_tokenizer_encode(const md_tokenizer *tokenizer, const char *text, size_t n_bytes, md_text_kind kind,
                         md_ids *ids)
{
    if (n_bytes == 0) {
        return;
    }
    encode_call call = {.tokenizer = tokenizer, .ids = ids, .match = pcre2_match_data_create(1, NULL)};
    CM_ASSERT(call.match != NULL);
    if (kind == MD_TEXT_CONTROL) {
        encode_control(&call, (const uint8_t *)text, n_bytes);
    } else {
        encode_plain(&call, (const uint8_t *)text, n_bytes);
    }
    pcre2_match_data_free(call.match);
    md_bpe_scratch_fini(&call.scratch);
}

/* ---- one id ---- */

static const md_token *token_at(const md_tokenizer *tokenizer, uint32_t id)
{
    return id < tokenizer->n_tokens && tokenizer->tokens[id].present ? &tokenizer->tokens[id] : NULL;
}

const uint8_t *md_tokenizer_bytes(const md_tokenizer *tokenizer, uint32_t id, size_t *n_bytes_out)
{
    const md_token *token = token_at(tokenizer, id);
    if (token == NULL) {
        return NULL;
    }
    *n_bytes_out = token->n_bytes;
    return tokenizer->blob.data + token->at;
}

bool md_tokenizer_is_special(const md_tokenizer *tokenizer, uint32_t id)
{
    const md_token *token = token_at(tokenizer, id);
    return token != NULL && token->special;
}

bool md_tokenizer_is_added(const md_tokenizer *tokenizer, uint32_t id)
{
    const md_token *token = token_at(tokenizer, id);
    return token != NULL && token->added;
}

uint32_t md_tokenizer_vocab(const md_tokenizer *tokenizer)
{
    return tokenizer->n_tokens;
}

uint32_t md_tokenizer_control(const md_tokenizer *tokenizer, md_control control)
{
    CM_ASSERT(control < MD_CTL_COUNT);
    return tokenizer->control[control];
}
