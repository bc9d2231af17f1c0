#include <string.h>

#include "common/model/tokenizer.h"
#include "common/model/utf8_private.h"

static const char REPLACEMENT[] = "\xEF\xBF\xBD"; /* U+FFFD */

void md_detok_init(md_detok *detok, bool skip_special)
{
    *detok = (md_detok){.skip_special = skip_special};
}

/* Takes the first n held bytes off. */
static void detok_drop(md_detok *detok, size_t n)
{
    detok->n_held = (uint8_t)(detok->n_held - n);
    memmove(detok->held, detok->held + n, detok->n_held);
}

/* Two bytes of a surrogate spelled as a character: invalid already, but the reference decoder waits for the
 * third, and what leaves after which token is part of the contract. */
static bool is_surrogate_start(const md_detok *detok)
{
    return detok->n_held == 2 && detok->held[0] == 0xED && detok->held[1] >= 0xA0 && detok->held[1] <= 0xBF;
}

/* Lets out what the held bytes have become: all but an incomplete tail. */
static void detok_settle(md_detok *detok, cm_bytes *text_out)
{
    while (detok->n_held > 0 && !is_surrogate_start(detok)) {
        size_t n;
        md_utf8 what = md_utf8_look(detok->held, detok->n_held, &n);
        if (what == MD_UTF8_INCOMPLETE) {
            return;
        }
        if (what == MD_UTF8_VALID) {
            cm_bytes_append(text_out, detok->held, n);
        } else {
            cm_bytes_append_text(text_out, REPLACEMENT);
        }
        detok_drop(detok, n);
    }
}

void md_detok_push_bytes(md_detok *detok, const uint8_t *bytes, size_t n, cm_bytes *text_out)
{
    for (size_t i = 0; i < n; i++) {
        detok->held[detok->n_held++] = bytes[i];
        detok_settle(detok, text_out);
    }
}

void md_detok_push(md_detok *detok, const md_tokenizer *tokenizer, uint32_t id, cm_bytes *text_out)
{
    size_t n;
    const uint8_t *bytes = md_tokenizer_bytes(tokenizer, id, &n);
    if (bytes != NULL && !(detok->skip_special && md_tokenizer_is_special(tokenizer, id))) {
        md_detok_push_bytes(detok, bytes, n, text_out);
    }
}

void md_detok_flush(md_detok *detok, cm_bytes *text_out)
{
    while (detok->n_held > 0) {
        size_t n;
        (void)md_utf8_look(detok->held, detok->n_held, &n);
        cm_bytes_append_text(text_out, REPLACEMENT);
        detok_drop(detok, n);
    }
}
