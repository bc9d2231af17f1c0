/* What clients send: a JSON object, plain or packed with gzip. A small packed body can hold a huge one, so it
 * is unpacked only as far as a plain one may be long. */
#include <string.h>
#include <strings.h>
#include <zlib.h>

#include "gateway/http_private.h"

enum { INFLATE_STEP = 64 * 1024, GZIP_WINDOW = 15 + 16 /* of 32 KiB, and gzip's own frame */ };

static void too_large(const gw_http *http, size_t n_bytes, const char *more, gw_error *error)
{
    gw_error_set(error, GW_CAUSE_TOO_LARGE, NULL,
                 "the request body has %s%zu bytes, at most %llu are accepted", more, n_bytes,
                 (unsigned long long)http->gateway->config->request_bytes_max);
}

/* ---- what it is ---- */

static bool word_is(const char *text, size_t n, const char *word)
{
    return strlen(word) == n && strncasecmp(text, word, n) == 0;
}

/* Of "application/json; charset=utf-8" the type itself. A form's is what curl says of anything. tensors: they
 * come behind the JSON, in bytes. */
static bool is_json(const char *type, bool tensors)
{
    static const char suffix[] = "+json";
    size_t n = strcspn(type, "; \t");
    return n == 0 || (tensors && word_is(type, n, "application/octet-stream")) ||
           word_is(type, n, "application/json") || word_is(type, n, "application/x-www-form-urlencoded") ||
           (n > strlen(suffix) && word_is(type + n - strlen(suffix), strlen(suffix), suffix));
}

static cm_status check_type(struct evhttp_request *req, gw_error *error_out)
{
    struct evkeyvalq *in = evhttp_request_get_input_headers(req);
    const char *type = evhttp_find_header(in, "Content-Type");
    bool tensors = evhttp_find_header(in, "Inference-Header-Content-Length") != NULL;
    if (type == NULL || is_json(type, tensors)) {
        return CM_OK;
    }
    gw_error_set(error_out, GW_CAUSE_MEDIA_TYPE, "Content-Type",
                 "the request body must be JSON (Content-Type: application/json), not %.80s", type);
    return CM_E_INVALID;
}

/* ---- gzip ---- */

static cm_status unpack(const gw_http *http, struct evbuffer *input, struct evbuffer *out,
                        gw_error *error_out)
{
    size_t most = http->gateway->config->request_bytes_max;
    uint8_t step[INFLATE_STEP];
    z_stream z = {.avail_in = (uInt)evbuffer_get_length(input), .next_in = evbuffer_pullup(input, -1)};
    int rc = inflateInit2(&z, GZIP_WINDOW);
    while (rc == Z_OK && evbuffer_get_length(out) <= most) {
        z.next_out = step;
        z.avail_out = sizeof(step);
        rc = inflate(&z, Z_NO_FLUSH);
        evbuffer_add(out, step, sizeof(step) - z.avail_out);
    }
    bool whole = rc == Z_STREAM_END && z.avail_in == 0;
    inflateEnd(&z);
    if (evbuffer_get_length(out) > most) {
        too_large(http, most, "more than ", error_out);
        return CM_E_TOO_LONG;
    }
    if (!whole) {
        gw_error_set(error_out, GW_CAUSE_INVALID, NULL,
                     "the request body is not whole gzip data, as its Content-Encoding says");
        return CM_E_INVALID;
    }
    return CM_OK;
}

static cm_status unpack_in_place(const gw_http *http, struct evhttp_request *req, gw_error *error_out)
{
    struct evbuffer *input = evhttp_request_get_input_buffer(req), *out = evbuffer_new();
    cm_status status = unpack(http, input, out, error_out);
    if (status == CM_OK) {
        evbuffer_drain(input, evbuffer_get_length(input));
        evbuffer_add_buffer(input, out);
        evhttp_remove_header(evhttp_request_get_input_headers(req), "Content-Encoding");
    }
    evbuffer_free(out);
    return status;
}

/* ---- the whole ---- */

static cm_status parse(const char *text, size_t n_bytes, json_t **body_out, gw_error *error_out)
{
    json_error_t where;
    json_t *body = json_loadb(text, n_bytes, JSON_ALLOW_NUL, &where);
    if (body == NULL) {
        gw_error_set(error_out, GW_CAUSE_BAD_JSON, NULL,
                     "the request body is not valid JSON: %s (line %d, column %d)", where.text, where.line,
                     where.column);
        return CM_E_INVALID;
    }
    if (!json_is_object(body)) {
        json_decref(body);
        gw_error_set(error_out, GW_CAUSE_INVALID, NULL, "the request body must be a JSON object");
        return CM_E_INVALID;
    }
    *body_out = body;
    return CM_OK;
}

cm_status gw_request_unpack(const gw_http *http, struct evhttp_request *req, gw_error *error_out)
{
    const char *encoding = evhttp_find_header(evhttp_request_get_input_headers(req), "Content-Encoding");
    size_t n = evbuffer_get_length(evhttp_request_get_input_buffer(req));
    CM_TRY(check_type(req, error_out));
    if (n > http->gateway->config->request_bytes_max) {
        too_large(http, n, "", error_out);
        return CM_E_TOO_LONG;
    }
    if (encoding == NULL || encoding[0] == 0 || strcasecmp(encoding, "identity") == 0) {
        return CM_OK;
    }
    if (strcasecmp(encoding, "gzip") == 0) {
        return unpack_in_place(http, req, error_out);
    }
    gw_error_set(error_out, GW_CAUSE_MEDIA_TYPE, "Content-Encoding",
                 "the request body is packed with %.80s: gzip is understood, or none", encoding);
    return CM_E_INVALID;
}

static cm_status read_body(const gw_http *http, struct evhttp_request *req, json_t **body_out,
                           gw_error *error_out)
{
    struct evbuffer *input = evhttp_request_get_input_buffer(req);
    CM_TRY(gw_request_unpack(http, req, error_out));
    size_t n = evbuffer_get_length(input);
    return parse(n > 0 ? (const char *)evbuffer_pullup(input, -1) : "", n, body_out, error_out);
}

json_t *gw_request_json(gw_http *http, struct evhttp_request *req)
{
    struct evbuffer *input = evhttp_request_get_input_buffer(req);
    json_t *body;
    gw_error error;
    cm_status status = read_body(http, req, &body, &error);
    if (status != CM_OK) {
        gw_reply_error(req, &error);
        return NULL;
    }
    evbuffer_drain(input, evbuffer_get_length(input));
    return body;
}
