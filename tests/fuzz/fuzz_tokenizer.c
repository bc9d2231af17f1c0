/* Input: a tokenizer.json. One that loads is used: byte-level ids give the text back whatever the merges are.
 */
#include <string.h>

#include "common/model/tokenizer_private.h"
#include "tests/fuzz/fuzz.h"

static void round_trip(const md_tokenizer *tokenizer, md_text_kind kind)
{
    static const char text[] = "The capital\n\n of <think> France  is 12345 \xe4\xb8\xad\xe2\x82 \xff'll";
    md_ids ids;
    size_t at = 0;
    md_ids_init(&ids);
    md_tokenizer_encode(tokenizer, text, sizeof(text), kind, &ids);
    for (size_t i = 0; i < ids.n; i++) {
        size_t n;
        const uint8_t *bytes = md_tokenizer_bytes(tokenizer, ids.id[i], &n);
        CM_ASSERT(bytes != NULL && n <= sizeof(text) - at && memcmp(bytes, text + at, n) == 0);
        at += n;
    }
    CM_ASSERT(at == sizeof(text));
    md_ids_fini(&ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    md_tokenizer *tokenizer;
    cm_error err = {0};
    json_t *root = json_loadb((const char *)data, size, JSON_REJECT_DUPLICATES, NULL);
    if (root == NULL) {
        return 0;
    }
    if (md_tokenizer_from_json(root, 0, &tokenizer, &err) == CM_OK) {
        round_trip(tokenizer, MD_TEXT_PLAIN);
        round_trip(tokenizer, MD_TEXT_CONTROL);
        md_tokenizer_close(tokenizer);
    } else {
        CM_ASSERT(err.text[0] != '\0' && err.field[0] != '\0');
    }
    json_decref(root);
    return 0;
}
