#include "common/model/json_private.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/model/chat.h"

/* ---- strings ---- */

static const char *short_escape(char c)
{
    switch (c) {
    case '"':
        return "\\\"";
    case '\\':
        return "\\\\";
    case '\n':
        return "\\n";
    case '\r':
        return "\\r";
    case '\t':
        return "\\t";
    case '\b':
        return "\\b";
    case '\f':
        return "\\f";
    default:
        return NULL;
    }
}

void md_json_escape(const char *text, size_t n, cm_bytes *out)
{
    size_t plain = 0;
    for (size_t i = 0; i < n; i++) {
        const char *escape = short_escape(text[i]);
        if (escape == NULL && (uint8_t)text[i] >= 0x20) {
            continue;
        }
        cm_bytes_append(out, text + plain, i - plain);
        if (escape != NULL) {
            cm_bytes_append_text(out, escape);
        } else {
            cm_bytes_printf(out, "\\u%04x", (unsigned)(uint8_t)text[i]);
        }
        plain = i + 1;
    }
    cm_bytes_append(out, text + plain, n - plain);
}

static void dump_string(const char *text, size_t n, cm_bytes *out)
{
    cm_bytes_append_text(out, "\"");
    md_json_escape(text, n, out);
    cm_bytes_append_text(out, "\"");
}

/* ---- floats: Python's repr, the shortest digits that read back as the same double ---- */

/* "d.ddde+xx" with n_digits digits in text; bumped: last digit one up. False when the bump would carry. */
static bool bump_last_digit(char *text, int n_digits)
{
    char *last = text + (text[0] == '-') + (n_digits > 1 ? n_digits : 0);
    if (*last == '9') {
        return false;
    }
    (*last)++;
    return true;
}

/* Scientific form with the fewest digits. At a power of two the interval of a double is lopsided, and the
 * nearest decimal of some length may fall out while the next one away from zero is still inside. */
static int shortest_digits(double value, char *text, size_t cap)
{
    for (int n_digits = 1; n_digits < 17; n_digits++) {
        snprintf(text, cap, "%.*e", n_digits - 1, value);
        if (strtod(text, NULL) == value || (bump_last_digit(text, n_digits) && strtod(text, NULL) == value)) {
            return n_digits;
        }
    }
    snprintf(text, cap, "%.16e", value);
    return 17;
}

static void dump_real(double value, cm_bytes *out)
{
    char text[40], digits[24];
    int n = shortest_digits(value, text, sizeof(text)), exponent = atoi(strchr(text, 'e') + 1);
    const char *first = text;
    if (*first == '-') {
        cm_bytes_append_text(out, "-");
        first++;
    }
    digits[0] = first[0];
    memcpy(digits + 1, first + 2, (size_t)(n - 1));
    if (exponent < -4 || exponent >= 16) {
        cm_bytes_printf(out, "%c%s%.*se%+03d", digits[0], n > 1 ? "." : "", n - 1, digits + 1, exponent);
    } else if (exponent < 0) {
        cm_bytes_printf(out, "0.%.*s%.*s", -exponent - 1, "000", n, digits);
    } else if (n <= exponent + 1) {
        cm_bytes_printf(out, "%.*s%.*s.0", n, digits, exponent + 1 - n, "0000000000000000");
    } else {
        cm_bytes_printf(out, "%.*s.%.*s", exponent + 1, digits, n - exponent - 1, digits + exponent + 1);
    }
}

/* ---- reading: what jansson cannot hold ----
 * md_json_read turns an integer of 19 digits or more into the string "\0<digits>", and puts one more NUL
 * before a string that begins with one: so no string of the caller's can be taken for a number. */

/* The number that begins at text[0]: its length, and whether it is an integer that needs keeping. */
static size_t scan_number(const char *text, size_t n, bool *keep_out)
{
    size_t i = text[0] == '-', digits = 0;
    bool leading_zero = i < n && text[i] == '0';
    for (; i < n && text[i] >= '0' && text[i] <= '9'; i++) {
        digits++;
    }
    bool integer = i == n || strchr(".eE+-", text[i]) == NULL || text[i] == 0;
    *keep_out = integer && digits >= 19 && !leading_zero;
    while (i < n && text[i] != 0 && strchr("0123456789.eE+-", text[i]) != NULL) {
        i++;
    }
    return i;
}

/* Length of the string that begins with the quote at text[0], the closing quote included if there. */
static size_t scan_string(const char *text, size_t n)
{
    for (size_t i = 1; i < n; i++) {
        if (text[i] == '"') {
            return i + 1;
        }
        i += text[i] == '\\';
    }
    return n;
}

static void mark_text(const char *text, size_t n, cm_bytes *out)
{
    static const char nul[] = "\\u0000";
    for (size_t i = 0, length; i < n; i += length) {
        bool keep = false;
        length = 1;
        if (text[i] == '"') {
            length = scan_string(text + i, n - i);
            if (length > sizeof(nul) && memcmp(text + i + 1, nul, sizeof(nul) - 1) == 0) {
                cm_bytes_append_text(out, "\"\\u0000");
                cm_bytes_append(out, text + i + 1, length - 1);
                continue;
            }
        } else if (text[i] == '-' || (text[i] >= '0' && text[i] <= '9')) {
            length = scan_number(text + i, n - i, &keep);
        }
        if (keep) {
            cm_bytes_printf(out, "\"%s%.*s\"", nul, (int)length, text + i);
        } else {
            cm_bytes_append(out, text + i, length);
        }
    }
}

json_t *md_json_read(const char *text, size_t n)
{
    cm_bytes marked;
    cm_bytes_init(&marked, 0);
    mark_text(text, n, &marked);
    json_t *value = json_loadb(cm_bytes_text(&marked), marked.len, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
    cm_bytes_fini(&marked);
    return value;
}

static bool is_kept_integer(const json_t *value)
{
    const char *text = json_string_value(value);
    return json_string_length(value) > 1 && text[0] == 0 && text[1] != 0;
}

const char *md_json_string(const json_t *value, size_t *n_out)
{
    const char *text = json_string_value(value);
    if (text == NULL || is_kept_integer(value)) {
        return NULL;
    }
    size_t doubled = json_string_length(value) > 1 && text[0] == 0;
    *n_out = json_string_length(value) - doubled;
    return text + doubled;
}

/* ---- values ---- */

static void dump_value(const json_t *value, bool read, cm_bytes *out);

static void dump_object(const json_t *object, bool read, cm_bytes *out)
{
    const char *key, *comma = "";
    size_t n_key;
    json_t *value;
    cm_bytes_append_text(out, "{");
    json_object_keylen_foreach((json_t *)object, key, n_key, value)
    {
        cm_bytes_append_text(out, comma);
        dump_string(key, n_key, out);
        cm_bytes_append_text(out, ": ");
        dump_value(value, read, out);
        comma = ", ";
    }
    cm_bytes_append_text(out, "}");
}

static void dump_array(const json_t *array, bool read, cm_bytes *out)
{
    size_t i;
    json_t *value;
    cm_bytes_append_text(out, "[");
    json_array_foreach(array, i, value)
    {
        cm_bytes_append_text(out, i > 0 ? ", " : "");
        dump_value(value, read, out);
    }
    cm_bytes_append_text(out, "]");
}

static void dump_text(const json_t *value, bool read, cm_bytes *out)
{
    size_t n = json_string_length(value);
    const char *text = json_string_value(value);
    if (read && is_kept_integer(value)) {
        cm_bytes_append(out, text + 1, n - 1);
        return;
    }
    if (read) {
        text = md_json_string(value, &n);
    }
    dump_string(text, n, out);
}

static void dump_value(const json_t *value, bool read, cm_bytes *out)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        dump_object(value, read, out);
        break;
    case JSON_ARRAY:
        dump_array(value, read, out);
        break;
    case JSON_STRING:
        dump_text(value, read, out);
        break;
    case JSON_INTEGER:
        cm_bytes_printf(out, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
        break;
    case JSON_REAL:
        dump_real(json_real_value(value), out);
        break;
    case JSON_TRUE:
        cm_bytes_append_text(out, "true");
        break;
    case JSON_FALSE:
        cm_bytes_append_text(out, "false");
        break;
    case JSON_NULL:
        cm_bytes_append_text(out, "null");
        break;
    }
}

void md_json_dumps(const json_t *value, cm_bytes *out)
{
    dump_value(value, false, out);
}

void md_json_dumps_read(const json_t *value, cm_bytes *out)
{
    dump_value(value, true, out);
}
