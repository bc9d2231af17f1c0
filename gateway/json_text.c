#include "gateway/json_text.h"

#include <string.h>

/* Length of the UTF-8 character at text[0], 0 if there is none (RFC 3629: no surrogates, nothing overlong).
 */
static size_t utf8_length(const unsigned char *text, size_t n)
{
    unsigned char lead = text[0];
    size_t length = lead < 0x80                   ? 1
                    : lead >= 0xc2 && lead < 0xe0 ? 2
                    : (lead & 0xf0) == 0xe0       ? 3
                    : lead >= 0xf0 && lead < 0xf5 ? 4
                                                  : 0;
    if (length == 0 || length > n) {
        return 0;
    }
    for (size_t i = 1; i < length; i++) {
        if ((text[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    bool overlong = (lead == 0xe0 && text[1] < 0xa0) || (lead == 0xf0 && text[1] < 0x90);
    bool outside = (lead == 0xed && text[1] > 0x9f) || (lead == 0xf4 && text[1] > 0x8f);
    return overlong || outside ? 0 : length;
}

static void append_escaped(cm_bytes *out, unsigned char c)
{
    static const char plain[] = "\"\\\b\f\n\r\t", letter[] = "\"\\bfnrt";
    const char *at = c != 0 ? strchr(plain, c) : NULL;
    if (at != NULL) {
        cm_bytes_printf(out, "\\%c", letter[at - plain]);
    } else {
        cm_bytes_printf(out, "\\u%04x", c);
    }
}

void gw_json_string(cm_bytes *out, const char *text, size_t n_bytes)
{
    const unsigned char *at = (const unsigned char *)text;
    size_t kept = 0; /* bytes from kept on are still to be copied */
    cm_bytes_append(out, "\"", 1);
    for (size_t i = 0; i < n_bytes;) {
        size_t length = utf8_length(at + i, n_bytes - i);
        bool raw = length > 1 || (length == 1 && at[i] >= 0x20 && at[i] != '"' && at[i] != '\\');
        if (raw) {
            i += length;
            continue;
        }
        cm_bytes_append(out, text + kept, i - kept);
        if (length == 1) {
            append_escaped(out, at[i]);
        } else {
            cm_bytes_append_text(out, "\xef\xbf\xbd");
        }
        i++;
        kept = i;
    }
    cm_bytes_append(out, text + kept, n_bytes - kept);
    cm_bytes_append(out, "\"", 1);
}
