/* One look at the front of some bytes that should be UTF-8. Thread: any. */
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef enum md_utf8 {
    MD_UTF8_VALID,      /* one whole character */
    MD_UTF8_INCOMPLETE, /* all bytes given may still become one */
    MD_UTF8_INVALID,    /* no character begins here */
} md_utf8;

/* *n_out: length of the character, of the incomplete start, or of the maximal part that one U+FFFD stands
 * for. n > 0. Overlong forms, surrogates and code points above U+10FFFF are invalid from the byte that shows
 * it. */
md_utf8 md_utf8_look(const uint8_t *bytes, size_t n, size_t *n_out);
