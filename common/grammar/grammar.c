#include "common/grammar/grammar.h"

#include <jansson.h>
#include <string.h>

#include "common/base/mem.h"
#include "common/grammar/build_private.h"

void gm_choice_text(gm_build *b, uint32_t from, uint32_t to, const char *source, size_t n_source)
{
    json_t *list = json_loadb(source, n_source, 0, NULL);
    size_t n = json_array_size(list);
    gm_word *words = cm_alloc(sizeof(*words) * (n + 1));
    for (size_t i = 0; i < n; i++) {
        const json_t *word = json_array_get(list, i);
        words[i] = (gm_word){json_string_value(word), json_string_length(word)};
        if (!json_is_string(word) || words[i].n == 0) {
            gm_build_fail(b, CM_E_INVALID, NULL, "choice %zu is no text, or an empty one", i);
            n = 0;
        }
    }
    if (n == 0) {
        gm_build_fail(b, CM_E_INVALID, NULL, "choices must be a list of at least one text");
    }
    gm_words(b, from, to, words, n);
    cm_free(words);
    json_decref(list);
}

bool gm_kind_is_known(uint32_t kind)
{
    return kind >= GM_JSON_OBJECT && kind <= GM_TOOLS;
}

cm_status gm_compile(gm_kind kind, const char *source, size_t n, gm_grammar **grammar_out, cm_error *err)
{
    gm_build b;
    if (n > GM_SOURCE_BYTES_MAX) {
        return cm_error_set(err, CM_E_TOO_LONG, NULL, "it has %zu bytes, at most %d are taken", n,
                            GM_SOURCE_BYTES_MAX);
    }
    gm_build_init(&b, err);
    uint32_t whole = gm_rule_new(&b, NULL), from = b.rules[whole].start, to = b.rules[whole].accept;
    switch (kind) {
    case GM_JSON_OBJECT:
        gm_call(&b, from, to, gm_json_object_rule(&b), 1, 1);
        break;
    case GM_JSON_SCHEMA:
        gm_schema_text(&b, from, to, source, n);
        break;
    case GM_REGEX:
        gm_regex(&b, from, to, source, n, GM_RAW, false, NULL);
        break;
    case GM_CHOICE:
        gm_choice_text(&b, from, to, source, n);
        break;
    case GM_TOOLS:
        gm_tools_text(&b, from, to, source, n);
        break;
    }
    return gm_build_finish(&b, grammar_out);
}
