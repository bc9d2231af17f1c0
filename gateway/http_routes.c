/* Which path does what. */
#include <stdio.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/mem.h"
#include "gateway/anthropic_body.h"
#include "gateway/http_private.h"
#include "gateway/json_text.h"

typedef void (*route_fn)(gw_http *http, struct evhttp_request *req, const char *rest);

/* ---- models ---- */

/* One object for two kinds of clients: OpenAI's look for object, created and owned_by, Anthropic's for type,
 * display_name and created_at. */
static json_t *model_object(const gw_info *info, const char *id)
{
    char created_at[32];
    cm_wall_format((uint64_t)info->created_s * 1000000u, created_at, sizeof(created_at));
    return json_pack("{s:s, s:s, s:I, s:s, s:I, s:s, s:s, s:s, s:s}", "id", id, "object", "model", "created",
                     (json_int_t)info->created_s, "owned_by", "deepseek", "max_model_len",
                     (json_int_t)info->context, "root", info->model, "type", "model", "display_name", id,
                     "created_at", created_at);
}

static void route_models(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)rest;
    gw_info info;
    gw_gateway_info(http->gateway, &info);
    json_t *list = json_array();
    json_array_append_new(list, model_object(&info, info.model));
    for (uint32_t i = 0; i < http->gateway->n_alias; i++) {
        json_array_append_new(list, model_object(&info, http->gateway->alias[i]));
    }
    const json_t *first = json_array_get(list, 0), *last = json_array_get(list, json_array_size(list) - 1);
    json_t *reply =
        json_pack("{s:s, s:o, s:b, s:O, s:O}", "object", "list", "data", list, "has_more", 0, "first_id",
                  json_object_get(first, "id"), "last_id", json_object_get(last, "id"));
    gw_reply_json(req, 200, reply);
    json_decref(reply);
}

static int hex_digit(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

void gw_http_percent_decode(char *text)
{
    char *to = text;
    for (const char *at = text; *at != 0; at++) {
        int high = *at == '%' ? hex_digit(at[1]) : -1;
        int low = high >= 0 ? hex_digit(at[2]) : -1;
        if (low >= 0 && high * 16 + low != 0) {
            *to++ = (char)(high * 16 + low);
            at += 2;
        } else {
            *to++ = *at;
        }
    }
    *to = 0;
}

static void route_model(gw_http *http, struct evhttp_request *req, const char *rest)
{
    char *id = cm_strdup(rest);
    gw_error error;
    gw_http_percent_decode(id);
    if (gw_model_check(http->gateway, id, &error) != CM_OK) {
        gw_reply_error(req, &error);
    } else {
        gw_info info;
        gw_gateway_info(http->gateway, &info);
        json_t *reply = model_object(&info, id);
        gw_reply_json(req, 200, reply);
        json_decref(reply);
    }
    cm_free(id);
}

/* ---- tokenizer ---- */

static void append_token_strings(const md_tokenizer *tokenizer, const md_ids *ids, cm_bytes *out)
{
    for (size_t i = 0; i < ids->n; i++) {
        size_t n = 0;
        const uint8_t *bytes = md_tokenizer_bytes(tokenizer, ids->id[i], &n);
        cm_bytes_append_text(out, i == 0 ? ",\"token_strs\":[" : ",");
        gw_json_string(out, (const char *)bytes, n);
    }
    cm_bytes_append_text(out, ids->n > 0 ? "]" : ",\"token_strs\":[]");
}

static void reply_ids(gw_http *http, struct evhttp_request *req, const md_ids *ids, bool with_strings)
{
    gw_info info;
    cm_bytes out;
    gw_gateway_info(http->gateway, &info);
    cm_bytes_init(&out, 0);
    cm_bytes_printf(&out, "{\"count\":%zu,\"max_model_len\":%u,\"tokens\":[", ids->n, info.context);
    for (size_t i = 0; i < ids->n; i++) {
        cm_bytes_printf(&out, "%s%u", i == 0 ? "" : ",", ids->id[i]);
    }
    cm_bytes_append_text(&out, "]");
    if (with_strings) {
        append_token_strings(gw_gateway_tokenizer(http->gateway), ids, &out);
    }
    cm_bytes_append_text(&out, "}");
    gw_reply(req, 200, "application/json", out.data, out.len);
    cm_bytes_fini(&out);
}

static cm_status prompt_ids(gw_http *http, const json_t *body, md_ids *ids, gw_error *error)
{
    const json_t *prompt = json_object_get(body, "prompt");
    const json_t *special = json_object_get(body, "add_special_tokens");
    const md_tokenizer *tokenizer = gw_gateway_tokenizer(http->gateway);
    if (json_object_get(body, "messages") != NULL) {
        return gw_chat_ids(http->gateway, body, ids, NULL, error);
    }
    if (!json_is_string(prompt)) {
        gw_error_set(error, GW_CAUSE_INVALID, "prompt", "prompt must be a string, or messages must be given");
        return CM_E_INVALID;
    }
    if (special != NULL && !json_is_boolean(special)) {
        gw_error_set(error, GW_CAUSE_INVALID, "add_special_tokens",
                     "add_special_tokens must be true or false");
        return CM_E_INVALID;
    }
    if (json_is_false(special)) {
        md_tokenizer_encode(tokenizer, json_string_value(prompt), json_string_length(prompt), MD_TEXT_CONTROL,
                            ids);
    } else {
        md_raw_encode(tokenizer, json_string_value(prompt), json_string_length(prompt), ids);
    }
    return CM_OK;
}

static void route_tokenize(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)rest;
    json_t *body = gw_request_json(http, req);
    if (body == NULL) {
        return;
    }
    md_ids ids;
    gw_error error;
    md_ids_init(&ids);
    cm_status status =
        gw_model_check(http->gateway, json_string_value(json_object_get(body, "model")), &error);
    if (status == CM_OK) {
        status = prompt_ids(http, body, &ids, &error);
    }
    if (status == CM_OK) {
        reply_ids(http, req, &ids, json_is_true(json_object_get(body, "return_token_strs")));
    } else {
        gw_reply_error(req, &error);
    }
    md_ids_fini(&ids);
    json_decref(body);
}

static cm_status detokenize(const md_tokenizer *tokenizer, const json_t *tokens, cm_bytes *text,
                            gw_error *error)
{
    md_detok detok;
    size_t i;
    json_t *id;
    size_t n;
    if (!json_is_array(tokens)) {
        gw_error_set(error, GW_CAUSE_INVALID, "tokens", "tokens must be a list of token ids");
        return CM_E_INVALID;
    }
    md_detok_init(&detok, false);
    json_array_foreach(tokens, i, id)
    {
        json_int_t value = json_is_integer(id) ? json_integer_value(id) : -1;
        if (value < 0 || value > UINT32_MAX || md_tokenizer_bytes(tokenizer, (uint32_t)value, &n) == NULL) {
            gw_error_set(error, GW_CAUSE_INVALID, "tokens", "tokens[%zu] is no token id of this model", i);
            return CM_E_INVALID;
        }
        md_detok_push(&detok, tokenizer, (uint32_t)value, text);
    }
    md_detok_flush(&detok, text);
    return CM_OK;
}

static void route_detokenize(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)rest;
    json_t *body = gw_request_json(http, req);
    if (body == NULL) {
        return;
    }
    cm_bytes text, out;
    gw_error error;
    cm_bytes_init(&text, 0);
    cm_bytes_init(&out, 0);
    if (detokenize(gw_gateway_tokenizer(http->gateway), json_object_get(body, "tokens"), &text, &error) ==
        CM_OK) {
        cm_bytes_append_text(&out, "{\"prompt\":");
        gw_json_string(&out, cm_bytes_text(&text), text.len);
        cm_bytes_append_text(&out, "}");
        gw_reply(req, 200, "application/json", out.data, out.len);
    } else {
        gw_reply_error(req, &error);
    }
    cm_bytes_fini(&out);
    cm_bytes_fini(&text);
    json_decref(body);
}

/* ---- for operators ---- */

static void route_root(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)http;
    (void)rest;
    gw_http_root(req);
}

static void route_cluster(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)rest;
    gw_http_cluster(http, req);
}

static void route_cluster_experts(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)rest;
    gw_http_cluster_experts(http, req);
}

static void route_health(gw_http *http, struct evhttp_request *req, const char *rest)
{
    static const char text[] = "{\"status\":\"ok\"}";
    (void)http;
    (void)rest;
    gw_reply(req, 200, "application/json", text, sizeof(text) - 1);
}

static void route_ready(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)rest;
    const char *reason = gw_ready_reason(http->gateway);
    json_t *reply = reason == NULL ? json_pack("{s:b}", "ready", 1)
                                   : json_pack("{s:b, s:s}", "ready", 0, "reason", reason);
    gw_reply_json(req, reason == NULL ? 200 : 503, reply);
    json_decref(reply);
}

/* For balancers that know vLLM: what this gateway has under way. */
static void route_load(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)rest;
    json_t *reply = json_pack("{s:I}", "server_load", (json_int_t)http->gateway->n_streams);
    gw_reply_json(req, 200, reply);
    json_decref(reply);
}

static void route_metrics(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)rest;
    cm_bytes out;
    cm_bytes_init(&out, 0);
    gw_metrics_render(http->gateway, &out);
    gw_reply(req, 200, "text/plain; version=0.0.4; charset=utf-8", out.data, out.len);
    cm_bytes_fini(&out);
}

/* What may_enter lets only operators do. */
static void route_forget(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)rest;
    json_t *reply = json_pack("{s:i}", "routers", (int)gw_routers_forget_prefixes(http->gateway->routers));
    gw_reply_json(req, 200, reply);
    json_decref(reply);
}

static void route_version(gw_http *http, struct evhttp_request *req, const char *rest)
{
    static const char text[] = "{\"version\":\"" BALEEN_VERSION "\"}";
    (void)http;
    (void)rest;
    gw_reply(req, 200, "application/json", text, sizeof(text) - 1);
}

static void route_chat(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)rest;
    gw_http_generate(http, req, &gw_surface_chat);
}

static void route_complete(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)rest;
    gw_http_generate(http, req, &gw_surface_complete);
}

static void route_messages(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)rest;
    gw_http_generate(http, req, &gw_surface_messages);
}

static void route_responses(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)rest;
    gw_http_generate(http, req, &gw_surface_responses);
}

static cm_status count_tokens(gw_http *http, const json_t *given, size_t *n_out, gw_error *error)
{
    json_t *body;
    md_ids ids;
    CM_TRY(gw_anthropic_count_body(given, &body, error));
    md_ids_init(&ids);
    cm_status status =
        gw_model_check(http->gateway, json_string_value(json_object_get(body, "model")), error);
    if (status == CM_OK) {
        status = gw_chat_ids(http->gateway, body, &ids, NULL, error);
    }
    *n_out = ids.n;
    md_ids_fini(&ids);
    json_decref(body);
    return status;
}

static void route_count_tokens(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)rest;
    json_t *given = gw_request_json(http, req);
    gw_error error;
    size_t n;
    if (given == NULL) {
        return;
    }
    if (count_tokens(http, given, &n, &error) == CM_OK) {
        json_t *reply = json_pack("{s:I}", "input_tokens", (json_int_t)n);
        gw_reply_json(req, 200, reply);
        json_decref(reply);
    } else {
        gw_reply_refusal(http, req, &gw_surface_messages, &error);
    }
    json_decref(given);
}

static void route_stream(gw_http *http, struct evhttp_request *req, const char *rest)
{
    gw_error error;
    if (evhttp_request_get_command(req) == EVHTTP_REQ_HEAD) {
        gw_error_set(&error, GW_CAUSE_METHOD, NULL, "a stream is asked for with GET");
        gw_reply_error(req, &error);
        return;
    }
    char *id = cm_strdup(rest);
    gw_http_percent_decode(id);
    gw_http_resume(http, req, id);
    cm_free(id);
}

static void route_stream_end(gw_http *http, struct evhttp_request *req, const char *rest)
{
    char *id = cm_strdup(rest);
    gw_http_percent_decode(id);
    gw_http_end(http, req, id);
    cm_free(id);
}

/* ---- the table ---- */

typedef struct route {
    const char *path;
    bool api;                    /* also below /v1 and the like */
    bool prefix;                 /* what follows path is the handler's */
    enum evhttp_cmd_type method; /* HEAD wherever GET is */
    route_fn fn;
} route;

static const route ROUTES[] = {
    {"/chat/completions", true, false, EVHTTP_REQ_POST, route_chat},
    {"/completions", true, false, EVHTTP_REQ_POST, route_complete},
    {"/messages", true, false, EVHTTP_REQ_POST, route_messages},
    {"/messages/count_tokens", true, false, EVHTTP_REQ_POST, route_count_tokens},
    {"/responses", true, false, EVHTTP_REQ_POST, route_responses},
    {"/streams/", true, true, EVHTTP_REQ_GET, route_stream},
    {"/streams/", true, true, EVHTTP_REQ_DELETE, route_stream_end},
    {"/cluster", true, false, EVHTTP_REQ_GET, route_cluster},
    {"/cluster/experts", true, false, EVHTTP_REQ_GET, route_cluster_experts},
    {"/models", true, false, EVHTTP_REQ_GET, route_models},
    {"/models/", true, true, EVHTTP_REQ_GET, route_model},
    {"/tokenize", false, false, EVHTTP_REQ_POST, route_tokenize},
    {"/detokenize", false, false, EVHTTP_REQ_POST, route_detokenize},
    {"/health", false, false, EVHTTP_REQ_GET, route_health},
    {"/ping", false, false, EVHTTP_REQ_GET, route_health},
    {"/livez", false, false, EVHTTP_REQ_GET, route_health},
    {"/healthz", false, false, EVHTTP_REQ_GET, route_health},
    {"/health_generate", false, false, EVHTTP_REQ_GET, gw_http_health_generate},
    {"/ready", false, false, EVHTTP_REQ_GET, route_ready},
    {"/readyz", false, false, EVHTTP_REQ_GET, route_ready},
    {"/load", false, false, EVHTTP_REQ_GET, route_load},
    {"/loads", true, false, EVHTTP_REQ_GET, gw_http_loads},
    {"/get_load", false, false, EVHTTP_REQ_GET, gw_http_get_load},
    {"/get_model_info", false, false, EVHTTP_REQ_GET, gw_http_model_info},
    {"/model_info", false, false, EVHTTP_REQ_GET, gw_http_model_info},
    {"/get_server_info", false, false, EVHTTP_REQ_GET, gw_http_server_info},
    {"/server_info", false, false, EVHTTP_REQ_GET, gw_http_server_info},
    {"/metrics", false, false, EVHTTP_REQ_GET, route_metrics},
    {"/reset_prefix_cache", false, false, EVHTTP_REQ_POST, route_forget},
    {"/flush_cache", false, false, EVHTTP_REQ_POST, route_forget},
    {"/version", false, false, EVHTTP_REQ_GET, route_version},
    {"/v2", false, false, EVHTTP_REQ_GET, gw_kserve_http_server},
    {"/v2/health/live", false, false, EVHTTP_REQ_GET, gw_kserve_http_live},
    {"/v2/health/ready", false, false, EVHTTP_REQ_GET, gw_kserve_http_ready},
    {"/v2/models/", false, true, EVHTTP_REQ_GET, gw_kserve_http_model},
    {"/v2/models/", false, true, EVHTTP_REQ_POST, gw_kserve_http_ask},
    {"", false, false, EVHTTP_REQ_GET, route_root},
};
enum { N_ROUTES = sizeof(ROUTES) / sizeof(ROUTES[0]) };

const char *gw_http_below_base(const char *path)
{
    static const char *const bases[] = {"/v1", "/beta", "/anthropic/v1"};
    for (size_t i = 0; i < sizeof(bases) / sizeof(bases[0]); i++) {
        size_t n = strlen(bases[i]);
        if (strncmp(path, bases[i], n) == 0 && path[n] == '/') {
            return path + n;
        }
    }
    return path;
}

/* NULL, or what follows the route's path ("" unless it is a prefix). */
static const char *route_match(const route *r, const char *path)
{
    size_t n = strlen(r->path);
    path = r->api ? gw_http_below_base(path) : path;
    if (strncmp(path, r->path, n) != 0 || (r->prefix ? path[n] == 0 : path[n] != 0)) {
        return NULL;
    }
    return path + n;
}

static void reply_options(struct evhttp_request *req)
{
    struct evkeyvalq *out = evhttp_request_get_output_headers(req);
    evhttp_add_header(out, "Access-Control-Allow-Methods", "GET, POST, DELETE, HEAD, OPTIONS");
    const char *wanted =
        evhttp_find_header(evhttp_request_get_input_headers(req), "Access-Control-Request-Headers");
    evhttp_add_header(out, "Access-Control-Allow-Headers", wanted != NULL ? wanted : "*");
    evhttp_add_header(out, "Access-Control-Max-Age", "86400");
    gw_reply(req, 204, NULL, "", 0);
}

static const char *method_words(enum evhttp_cmd_type method)
{
    return method == EVHTTP_REQ_GET ? "GET, HEAD" : method == EVHTTP_REQ_POST ? "POST" : "DELETE";
}

static void reply_no_route(struct evhttp_request *req, const char *path)
{
    gw_error error;
    char allow[64] = "";
    for (size_t i = 0; i < N_ROUTES; i++) {
        if (route_match(&ROUTES[i], path) != NULL) {
            size_t n = strlen(allow);
            snprintf(allow + n, sizeof(allow) - n, "%s, ", method_words(ROUTES[i].method));
        }
    }
    if (allow[0] != 0) {
        size_t n = strlen(allow);
        gw_error_set(&error, GW_CAUSE_METHOD, NULL, "%.200s takes %.*s only", path[0] != 0 ? path : "/",
                     (int)n - 2, allow);
        snprintf(allow + n, sizeof(allow) - n, "OPTIONS");
        evhttp_add_header(evhttp_request_get_output_headers(req), "Allow", allow);
    } else {
        gw_error_set(&error, GW_CAUSE_NO_ROUTE, NULL, "there is nothing at %.200s", path);
    }
    gw_reply_error(req, &error);
}

/* Without a key: signs of life, and whose key it is cannot matter. */
static bool is_open(const gw_http *http, const route *r)
{
    return r->fn == route_root || r->fn == route_health || r->fn == route_ready ||
           r->fn == gw_http_health_generate ||
           (r->fn == route_metrics && http->gateway->config->metrics_open);
}

/* What asks every few seconds for as long as the process lives. */
static bool is_quiet(const route *r)
{
    return r->fn == route_health || r->fn == route_ready || r->fn == gw_http_health_generate ||
           r->fn == route_metrics;
}

/* false: it was answered that it may not. */
static bool may_enter(gw_http *http, struct evhttp_request *req, const route *r)
{
    struct evkeyvalq *in = evhttp_request_get_input_headers(req);
    const gw_tenants *tenants = http->gateway->tenants;
    gw_error error;
    if (is_open(http, r)) {
        return true;
    }
    cm_status status = gw_gateway_identify(http->gateway, evhttp_find_header(in, "authorization"),
                                           evhttp_find_header(in, "x-api-key"), &http->visit->tenant, &error);
    bool of_operators = r->fn == route_metrics || r->fn == route_forget;
    if (status == CM_OK && of_operators && !gw_tenants_is_operator(tenants, http->visit->tenant)) {
        gw_error_set(&error, GW_CAUSE_FORBIDDEN, NULL, "%s is for operators", r->path);
        status = CM_E_INVALID;
    }
    if (status != CM_OK) {
        gw_reply_error(req, &error);
    }
    return status == CM_OK;
}

static void enter(gw_http *http, struct evhttp_request *req, const route *r, const char *rest)
{
    http->visit->surface = r->path[0] != 0 ? r->path : "/";
    http->visit->quiet = is_quiet(r);
    if (may_enter(http, req, r)) {
        r->fn(http, req, rest);
    }
}

/* path: without the slash at its end. */
static void dispatch(gw_http *http, struct evhttp_request *req, const char *path)
{
    enum evhttp_cmd_type method = evhttp_request_get_command(req);
    enum evhttp_cmd_type wanted = method == EVHTTP_REQ_HEAD ? EVHTTP_REQ_GET : method;
    if (method == EVHTTP_REQ_OPTIONS) {
        reply_options(req);
        return;
    }
    for (size_t i = 0; i < N_ROUTES; i++) {
        const char *rest = route_match(&ROUTES[i], path);
        if (rest != NULL && ROUTES[i].method == wanted) {
            enter(http, req, &ROUTES[i], rest);
            return;
        }
    }
    reply_no_route(req, path);
}

void gw_http_dispatch(struct evhttp_request *req, void *arg)
{
    gw_http *http = arg;
    struct evkeyvalq *in = evhttp_request_get_input_headers(req);
    const struct evhttp_uri *uri = evhttp_request_get_evhttp_uri(req);
    const char *given = uri != NULL ? evhttp_uri_get_path(uri) : NULL;
    char *path = cm_strdup(given != NULL ? given : "");
    for (size_t n = strlen(path); n > 0 && path[n - 1] == '/'; n--) {
        path[n - 1] = 0;
    }
    gw_connections_dispatched(http->connections,
                              evhttp_connection_get_bufferevent(evhttp_request_get_connection(req)));
    http->visit =
        gw_visit_begin("-", evhttp_find_header(in, "x-request-id"), evhttp_find_header(in, "traceparent"));
    gw_reply_headers(req, http->visit);
    dispatch(http, req, path);
    if (http->visit != NULL) {
        gw_visit_end(http->visit, evhttp_request_get_response_code(req));
        http->visit = NULL;
    }
    cm_free(path);
}
