#include "common/model/utf8_private.h"

/* Length that a first byte announces, and the range of its second byte; 0 for a byte that starts nothing. */
static size_t utf8_first(uint8_t first, uint8_t *lo_out, uint8_t *hi_out)
{
    *lo_out = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
    *hi_out = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
    if (first < 0x80) {
        return 1;
    }
    if (first >= 0xC2 && first <= 0xDF) {
        return 2;
    }
    if (first >= 0xE0 && first <= 0xEF) {
        return 3;
    }
    return first >= 0xF0 && first <= 0xF4 ? 4 : 0;
}

md_utf8 md_utf8_look(const uint8_t *bytes, size_t n, size_t *n_out)
{
    uint8_t lo, hi;
    size_t length = utf8_first(bytes[0], &lo, &hi);
    *n_out = 1;
    if (length == 0) {
        return MD_UTF8_INVALID;
    }
    for (; *n_out < length; (*n_out)++) {
        if (*n_out == n) {
            return MD_UTF8_INCOMPLETE;
        }
        if (bytes[*n_out] < lo || bytes[*n_out] > hi) {
            return MD_UTF8_INVALID;
        }
        lo = 0x80;
        hi = 0xBF;
    }
    return MD_UTF8_VALID;
}
