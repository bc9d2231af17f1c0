#include "gateway/request.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"

enum {
    TOKENS_MAX_CHAT = 8192, /* encoding section 10 */
    TOKENS_MAX_THINKING = 65536,
    GW_SALT_BYTES_MAX = 512,
};

static cm_status refuse(gw_error *error, const char *param, const char *what)
{
    gw_error_set(error, GW_CAUSE_INVALID, param, "%s %s", param, what);
    return CM_E_INVALID;
}

static cm_status unsupported(gw_error *error, const char *param, const char *what)
{
    gw_error_set(error, GW_CAUSE_UNSUPPORTED, param, "%s %s", param, what);
    return CM_E_UNSUPPORTED;
}

static char *copy_string(const json_t *value, size_t *n_out)
{
    size_t n = json_string_length(value);
    char *copy = cm_alloc(n + 1);
    memcpy(copy, json_string_value(value), n);
    *n_out = n;
    return copy;
}

/* ---- fields with a shape of their own ---- */

typedef struct parse_at {
    const char *name;
    const json_t *value; /* neither absent nor null */
    gw_request *request;
    uint32_t vocab;
    gw_error *error;
} parse_at;

static cm_status parse_stop(const parse_at *at)
{
    gw_request *r = at->request;
    bool one = json_is_string(at->value);
    size_t n = one ? 1 : json_array_size(at->value);
    if ((!one && !json_is_array(at->value)) || n > GW_STOP_MAX) {
        return refuse(at->error, at->name, "must be a string or a list of at most 16 strings");
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *text = one ? at->value : json_array_get(at->value, i);
        if (!json_is_string(text)) {
            return refuse(at->error, at->name, "must be a string or a list of at most 16 strings");
        }
        if (json_string_length(text) != strlen(json_string_value(text))) {
            return refuse(at->error, at->name, "must not contain U+0000");
        }
        if (json_string_length(text) > 0) {
            r->stop[r->n_stop++] = cm_strdup(json_string_value(text));
        }
    }
    return CM_OK;
}

static bool is_id(const json_t *value, uint32_t vocab)
{
    return json_is_integer(value) && json_integer_value(value) >= 0 &&
           json_integer_value(value) < (json_int_t)vocab;
}

static cm_status parse_stop_ids(const parse_at *at)
{
    gw_request *r = at->request;
    size_t i;
    json_t *id;
    if (json_array_size(at->value) > GW_STOP_IDS_MAX) {
        return refuse(at->error, at->name, "must be a list of at most 64 token ids");
    }
    json_array_foreach(at->value, i, id)
    {
        if (!is_id(id, at->vocab)) {
            return refuse(at->error, at->name, "holds something that is no token id of this model");
        }
        r->stop_id[r->n_stop_id++] = (uint32_t)json_integer_value(id);
    }
    return CM_OK;
}

static cm_status parse_prompt_ids(const parse_at *at, const json_t *list)
{
    size_t i;
    json_t *id;
    json_array_foreach(list, i, id)
    {
        if (!is_id(id, at->vocab)) {
            return refuse(at->error, at->name, "holds something that is no token id of this model");
        }
        md_ids_push(&at->request->prompt_ids, (uint32_t)json_integer_value(id));
    }
    return CM_OK;
}

/* A string, a list of ids, or a list of one of those. */
static cm_status parse_prompt(const parse_at *at)
{
    const json_t *prompt = at->value;
    const json_t *first = json_array_get(prompt, 0);
    if (json_is_string(first) || json_is_array(first)) {
        if (json_array_size(prompt) > 1) {
            return unsupported(at->error, at->name,
                               "with more than one entry is not supported: send one request for each");
        }
        prompt = first;
    }
    if (json_is_string(prompt)) {
        at->request->prompt = copy_string(prompt, &at->request->prompt_bytes);
        return CM_OK;
    }
    if (json_array_size(prompt) == 0) {
        return refuse(at->error, at->name, "must be a string or a list of at least one token id");
    }
    return parse_prompt_ids(at, prompt);
}

static cm_status parse_suffix(const parse_at *at)
{
    at->request->suffix = copy_string(at->value, &at->request->suffix_bytes);
    return CM_OK;
}

static cm_status parse_messages(const parse_at *at)
{
    return json_array_size(at->value) > 0
               ? CM_OK
               : refuse(at->error, at->name, "must be a list of at least one message");
}

static cm_status parse_stream_options(const parse_at *at)
{
    static const char *const names[] = {"include_usage", "continuous_usage_stats", "resumable"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        const json_t *value = json_object_get(at->value, names[i]);
        if (value != NULL && !json_is_boolean(value) && !json_is_null(value)) {
            char name[64];
            snprintf(name, sizeof(name), "stream_options.%s", names[i]);
            return refuse(at->error, name, "must be true or false");
        }
    }
    at->request->include_usage = json_is_true(json_object_get(at->value, "include_usage"));
    return CM_OK;
}

/* What a tool looks like is the chat encoder's to check. */
static cm_status parse_tools(const parse_at *at)
{
    at->request->tools = json_array_size(at->value) > 0;
    return CM_OK;
}

static cm_status parse_tool_choice(const parse_at *at)
{
    const char *word = json_string_value(at->value);
    if (word != NULL && strcmp(word, "none") == 0) {
        at->request->tools = false;
        return CM_OK;
    }
    if (word != NULL && strcmp(word, "auto") == 0) {
        return CM_OK;
    }
    if (json_is_object(at->value) || (word != NULL && strcmp(word, "required") == 0)) {
        at->request->tools = true; /* whether there are any: gw_constraint_read */
        return CM_OK;
    }
    return refuse(at->error, at->name, "must be none, auto, required or an object that names a function");
}

static bool is_count(const json_t *value, json_int_t most)
{
    return json_is_integer(value) && json_integer_value(value) >= 0 && json_integer_value(value) <= most;
}

/* Of a completion: a number of alternatives, or false; any number, also 0, asks for log-probabilities. */
static cm_status parse_text_logprobs(const parse_at *at)
{
    if (json_is_false(at->value)) {
        return CM_OK;
    }
    if (!is_count(at->value, GW_TOP_LOGPROBS_MAX)) {
        return refuse(at->error, at->name, "must be an integer from 0 to 20");
    }
    at->request->logprobs = true;
    at->request->n_top = (uint32_t)json_integer_value(at->value);
    return CM_OK;
}

static cm_status parse_prompt_logprobs(const parse_at *at)
{
    if (json_is_false(at->value)) {
        return CM_OK;
    }
    if (json_is_true(at->value) || is_count(at->value, INT64_MAX)) {
        return unsupported(at->error, at->name, "is not supported: leave it out");
    }
    return refuse(at->error, at->name, "must be an integer from 0");
}

/* 0 and -1 are two ways to say: all. */
static cm_status parse_top_k(const parse_at *at)
{
    json_int_t k = json_integer_value(at->value);
    if (k < -1) {
        return refuse(at->error, at->name, "must be -1 or an integer from 0");
    }
    at->request->top_k = k <= 0 || k >= (json_int_t)at->vocab ? 0 : (uint32_t)k;
    return CM_OK;
}

/* Decimal digits only, no leading zero: another spelling could name an id twice. */
static bool parse_id(const char *text, uint32_t vocab, uint32_t *id_out)
{
    uint64_t id = 0;
    size_t n = strlen(text);
    if (n == 0 || n > 10 || (n > 1 && text[0] == '0')) {
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        if (text[i] < '0' || text[i] > '9') {
            return false;
        }
        id = id * 10 + (uint64_t)(text[i] - '0');
    }
    *id_out = (uint32_t)id;
    return id < vocab;
}

static cm_status parse_logit_bias(const parse_at *at)
{
    gw_request *r = at->request;
    size_t n = json_object_size(at->value);
    const char *key;
    json_t *value;
    if (n > GW_BIAS_MAX) {
        return refuse(at->error, at->name, "must have at most 1024 entries");
    }
    r->bias_id = cm_alloc(sizeof(*r->bias_id) * (n + 1));
    r->bias = cm_alloc(sizeof(*r->bias) * (n + 1));
    json_object_foreach((json_t *)(uintptr_t)at->value, key, value)
    {
        double bias = json_number_value(value);
        if (!parse_id(key, at->vocab, &r->bias_id[r->n_bias])) {
            return refuse(at->error, at->name, "has a key that is no token id of this model");
        }
        if (!json_is_number(value) || !(bias >= -100 && bias <= 100)) {
            return refuse(at->error, at->name, "must give each token id a number from -100 to 100");
        }
        r->bias[r->n_bias++] = (float)bias;
    }
    return CM_OK;
}

static cm_status parse_keep_special(const parse_at *at)
{
    at->request->keep_special = json_is_false(at->value);
    return CM_OK;
}

static cm_status parse_parallel_calls(const parse_at *at)
{
    at->request->one_call = json_is_false(at->value);
    return CM_OK;
}

/* Each by its name, so that no two of them mean the same. */
static cm_status parse_salt(const parse_at *at)
{
    cm_bytes text;
    char *before = at->request->salt;
    if (json_string_length(at->value) > GW_SALT_BYTES_MAX) {
        return refuse(at->error, at->name, "must have at most 512 bytes");
    }
    if (json_string_length(at->value) != strlen(json_string_value(at->value))) {
        return refuse(at->error, at->name, "must not contain U+0000");
    }
    cm_bytes_init(&text, 0);
    cm_bytes_printf(&text, "%s%s %zu %s\n", before != NULL ? before : "", at->name,
                    json_string_length(at->value), json_string_value(at->value));
    at->request->salt = cm_strdup(cm_bytes_text(&text));
    cm_bytes_fini(&text);
    cm_free(before);
    return CM_OK;
}

static cm_status parse_seed(const parse_at *at)
{
    at->request->has_seed = true;
    at->request->seed = json_integer_value(at->value);
    return CM_OK;
}

/* ---- the table ----
 * A row says which bodies a field belongs to, what its value must be and where it goes. A row with a neutral
 * value is a field that we cannot honour: only the value that changes nothing is let through. JSON null is an
 * absent field. */

typedef enum field_type {
    FIELD_BOOL,
    FIELD_UINT,
    FIELD_INT,
    FIELD_NUMBER,
    FIELD_STRING,
    FIELD_OBJECT,
    FIELD_LIST,
    FIELD_ANY
} field_type;

enum { CHAT = 1u << GW_ASK_CHAT, TEXT = 1u << GW_ASK_COMPLETE, BOTH = CHAT | TEXT };

typedef struct field {
    const char *name;
    uint32_t in;
    field_type type;
    double min, max;   /* numbers: both belong to the range */
    bool above_min;    /* min itself does not */
    bool neutral_only; /* any other value would change the answer, and we cannot do it */
    double neutral;    /* numbers, booleans; of strings, objects and lists the empty one */
    bool stored;       /* BOOL, UINT, NUMBER: goes to offset */
    size_t offset;     /* in gw_request */
    cm_status (*parse)(const parse_at *at); /* after the check of the type; may be NULL */
} field;

#define TO(member_)       .stored = true, .offset = offsetof(gw_request, member_)
#define ONLY(value_)      .neutral_only = true, .neutral = (value_)
#define TYPE_ONLY         .stored = false
#define RANGE(min_, max_) .min = (min_), .max = (max_)

/* max_completion_tokens stands behind max_tokens, and tool_choice behind tools, because they win. */
static const field FIELDS[] = {
    {"model", BOTH, FIELD_STRING, TYPE_ONLY},
    {"messages", CHAT, FIELD_LIST, .parse = parse_messages},
    {"prompt", TEXT, FIELD_ANY, .parse = parse_prompt},
    {"suffix", TEXT, FIELD_STRING, .parse = parse_suffix},
    {"stream", BOTH, FIELD_BOOL, TO(stream)},
    {"stream_options", BOTH, FIELD_OBJECT, .parse = parse_stream_options},
    {"max_tokens", BOTH, FIELD_UINT, RANGE(1, UINT32_MAX), TO(tokens_max)},
    {"max_completion_tokens", CHAT, FIELD_UINT, RANGE(1, UINT32_MAX), TO(tokens_max)},
    {"min_tokens", BOTH, FIELD_UINT, RANGE(0, UINT32_MAX), TO(tokens_min)},
    {"temperature", BOTH, FIELD_NUMBER, RANGE(0, 2), TO(temperature)},
    {"top_p", BOTH, FIELD_NUMBER, RANGE(0, 1), .above_min = true, TO(top_p)},
    {"seed", BOTH, FIELD_INT, .parse = parse_seed},
    {"stop", BOTH, FIELD_ANY, .parse = parse_stop},
    {"stop_token_ids", BOTH, FIELD_LIST, .parse = parse_stop_ids},
    {"ignore_eos", BOTH, FIELD_BOOL, TO(ignore_eos)},
    {"include_stop_str_in_output", BOTH, FIELD_BOOL, TO(include_stop)},
    {"skip_special_tokens", BOTH, FIELD_BOOL, .parse = parse_keep_special},
    {"thinking", CHAT, FIELD_OBJECT, TYPE_ONLY},
    {"reasoning_effort", CHAT, FIELD_STRING, TYPE_ONLY},
    {"chat_template_kwargs", CHAT, FIELD_OBJECT, TYPE_ONLY},
    {"n", BOTH, FIELD_UINT, RANGE(1, GW_CHOICES_MAX), TO(n_choice)},
    {"best_of", TEXT, FIELD_UINT, RANGE(1, GW_CHOICES_MAX), ONLY(1)},
    {"echo", TEXT, FIELD_BOOL, ONLY(0)},
    {"presence_penalty", BOTH, FIELD_NUMBER, RANGE(-2, 2), TO(presence_penalty)},
    {"frequency_penalty", BOTH, FIELD_NUMBER, RANGE(-2, 2), TO(frequency_penalty)},
    {"repetition_penalty", BOTH, FIELD_NUMBER, RANGE(0, 2), .above_min = true, TO(repetition_penalty)},
    {"top_k", BOTH, FIELD_INT, .parse = parse_top_k},
    {"min_p", BOTH, FIELD_NUMBER, RANGE(0, 1), TO(min_p)},
    {"logit_bias", BOTH, FIELD_OBJECT, .parse = parse_logit_bias},
    {"logprobs", CHAT, FIELD_BOOL, TO(logprobs)},
    {"logprobs", TEXT, FIELD_ANY, .parse = parse_text_logprobs},
    {"top_logprobs", CHAT, FIELD_UINT, RANGE(0, GW_TOP_LOGPROBS_MAX), TO(n_top)},
    {"prompt_logprobs", BOTH, FIELD_ANY, .parse = parse_prompt_logprobs},
    {"response_format", BOTH, FIELD_OBJECT, TYPE_ONLY}, /* it and the four below: gw_constraint_read */
    {"structured_outputs", BOTH, FIELD_OBJECT, TYPE_ONLY},
    {"guided_json", BOTH, FIELD_ANY, TYPE_ONLY},
    {"guided_regex", BOTH, FIELD_STRING, TYPE_ONLY},
    {"guided_choice", BOTH, FIELD_LIST, TYPE_ONLY},
    {"tools", CHAT, FIELD_LIST, .parse = parse_tools},
    {"functions", CHAT, FIELD_LIST, ONLY(0)},
    {"tool_choice", CHAT, FIELD_ANY, .parse = parse_tool_choice},
    {"parallel_tool_calls", CHAT, FIELD_BOOL, .parse = parse_parallel_calls},
    {"user_id", BOTH, FIELD_STRING, .parse = parse_salt},
    {"user", BOTH, FIELD_STRING, .parse = parse_salt},
    {"safety_identifier", BOTH, FIELD_STRING, .parse = parse_salt},
    {"prompt_cache_key", BOTH, FIELD_STRING, .parse = parse_salt},
    {"cache_salt", BOTH, FIELD_STRING, .parse = parse_salt},
};
enum { N_FIELDS = sizeof(FIELDS) / sizeof(FIELDS[0]) };

static cm_status refuse_range(const field *f, gw_error *error)
{
    char what[128];
    const char *kind = f->type == FIELD_UINT ? "an integer" : "a number";
    snprintf(what, sizeof(what), "must be %s %s %g%s%g", kind, f->above_min ? "above" : "from", f->min,
             f->above_min ? " and up to " : " to ", f->max);
    if (f->type == FIELD_UINT && f->max >= UINT32_MAX) {
        snprintf(what, sizeof(what), "must be an integer from %g to %u", f->min, UINT32_MAX);
    }
    return refuse(error, f->name, what);
}

static cm_status check_number(const field *f, const json_t *value, gw_error *error)
{
    bool right = f->type == FIELD_UINT ? json_is_integer(value) : json_is_number(value);
    double x = json_number_value(value);
    bool in_range = f->above_min ? x > f->min && x <= f->max : x >= f->min && x <= f->max;
    return right && in_range ? CM_OK : refuse_range(f, error);
}

static cm_status check_type(const field *f, const json_t *value, gw_error *error)
{
    switch (f->type) {
    case FIELD_BOOL:
        return json_is_boolean(value) ? CM_OK : refuse(error, f->name, "must be true or false");
    case FIELD_UINT:
    case FIELD_NUMBER:
        return check_number(f, value, error);
    case FIELD_INT:
        return json_is_integer(value) ? CM_OK : refuse(error, f->name, "must be an integer of 64 bits");
    case FIELD_STRING:
        return json_is_string(value) ? CM_OK : refuse(error, f->name, "must be a string");
    case FIELD_OBJECT:
        return json_is_object(value) ? CM_OK : refuse(error, f->name, "must be an object");
    case FIELD_LIST:
        return json_is_array(value) ? CM_OK : refuse(error, f->name, "must be a list");
    case FIELD_ANY:
        return CM_OK;
    }
    return CM_OK;
}

static bool is_neutral(const field *f, const json_t *value)
{
    if (json_is_object(value)) {
        return json_object_size(value) == 0;
    }
    if (json_is_array(value)) {
        return json_array_size(value) == 0;
    }
    double x = json_is_boolean(value) ? (json_is_true(value) ? 1 : 0) : json_number_value(value);
    return !(x < f->neutral) && !(x > f->neutral);
}

static void store(const field *f, const json_t *value, gw_request *request)
{
    void *to = (char *)request + f->offset;
    switch (f->type) {
    case FIELD_BOOL:
        *(bool *)to = json_is_true(value);
        break;
    case FIELD_UINT:
        *(uint32_t *)to = (uint32_t)json_integer_value(value);
        break;
    default:
        *(double *)to = json_number_value(value);
        break;
    }
}

static cm_status parse_field(const field *f, const json_t *value, gw_request *request, uint32_t vocab,
                             gw_error *error)
{
    CM_TRY(check_type(f, value, error));
    if (f->neutral_only && !is_neutral(f, value)) {
        return unsupported(error, f->name, "is not supported with this value: leave it out");
    }
    if (f->stored) {
        store(f, value, request);
    }
    parse_at at = {f->name, value, request, vocab, error};
    return f->parse != NULL ? f->parse(&at) : CM_OK;
}

/* What no single field can tell. */
static cm_status check_together(const json_t *body, const gw_request *r, gw_error *error)
{
    if (r->kind == GW_ASK_CHAT && json_is_null(json_object_get(body, "messages"))) {
        return refuse(error, "messages", "must be a list of at least one message");
    }
    if (r->kind == GW_ASK_CHAT && json_object_get(body, "messages") == NULL) {
        return refuse(error, "messages", "is missing");
    }
    if (r->kind == GW_ASK_COMPLETE && r->prompt == NULL && r->prompt_ids.n == 0) {
        return refuse(error, "prompt", "is missing");
    }
    if (r->suffix != NULL && r->prompt == NULL) {
        return refuse(error, "suffix", "needs a prompt that is text");
    }
    if (r->n_top > 0 && !r->logprobs) {
        return refuse(error, "top_logprobs", "needs logprobs to be true");
    }
    if (r->tokens_max != 0 && r->tokens_min > r->tokens_max) {
        return refuse(error, "min_tokens", "must not be above the most tokens that may be generated");
    }
    return CM_OK;
}

cm_status gw_request_parse(gw_ask_kind kind, const json_t *body, uint32_t vocab, gw_request *request_out,
                           gw_error *error_out)
{
    gw_request r = {.kind = kind, .temperature = 1, .top_p = 1, .repetition_penalty = 1, .n_choice = 1};
    if (!json_is_object(body)) {
        gw_error_set(error_out, GW_CAUSE_INVALID, NULL, "the request must be a JSON object");
        return CM_E_INVALID;
    }
    md_ids_init(&r.prompt_ids);
    cm_status status = CM_OK;
    for (size_t i = 0; i < N_FIELDS && status == CM_OK; i++) {
        const json_t *value =
            (FIELDS[i].in & (1u << kind)) != 0 ? json_object_get(body, FIELDS[i].name) : NULL;
        if (value != NULL && !json_is_null(value)) {
            status = parse_field(&FIELDS[i], value, &r, vocab, error_out);
        }
    }
    if (status == CM_OK) {
        status = check_together(body, &r, error_out);
    }
    if (status == CM_OK) {
        status = gw_constraint_read(body, r.tools, &r.constraint, error_out);
    }
    if (status != CM_OK) {
        gw_request_free(&r);
        return status;
    }
    *request_out = r;
    return CM_OK;
}

void gw_request_free(gw_request *request)
{
    for (uint32_t i = 0; i < request->n_stop; i++) {
        cm_free(request->stop[i]);
    }
    cm_free(request->prompt);
    cm_free(request->suffix);
    cm_free(request->salt);
    cm_free(request->bias_id);
    cm_free(request->bias);
    md_ids_fini(&request->prompt_ids);
    gw_constraint_free(&request->constraint);
    *request = (gw_request){.kind = request->kind};
}

bool gw_request_streams(const json_t *body)
{
    return json_is_true(json_object_get(body, "stream"));
}

bool gw_request_is_resumable(const json_t *body)
{
    return json_is_true(json_object_get(json_object_get(body, "stream_options"), "resumable"));
}

bool gw_request_wants_usage(const json_t *body)
{
    return json_is_true(json_object_get(json_object_get(body, "stream_options"), "include_usage"));
}

bool gw_request_wants_usage_always(const json_t *body)
{
    return gw_request_wants_usage(body) &&
           json_is_true(json_object_get(json_object_get(body, "stream_options"), "continuous_usage_stats"));
}

bool gw_request_wants_logprobs(gw_ask_kind kind, const json_t *body)
{
    const json_t *wants = json_object_get(body, "logprobs");
    return kind == GW_ASK_CHAT ? json_is_true(wants) : json_is_integer(wants);
}

uint32_t gw_request_choices(const json_t *body)
{
    const json_t *n = json_object_get(body, "n");
    return is_count(n, GW_CHOICES_MAX) && json_integer_value(n) > 1 ? (uint32_t)json_integer_value(n) : 1;
}

cm_status gw_request_budget(const gw_request *request, bool thinking, uint32_t n_prompt, uint32_t context,
                            uint32_t *tokens_max_out, gw_error *error_out)
{
    if (n_prompt >= context) {
        gw_error_too_long(error_out, request->kind == GW_ASK_CHAT ? "messages" : "prompt", n_prompt, context);
        return CM_E_TOO_LONG;
    }
    uint32_t wanted = request->tokens_max;
    if (wanted == 0) {
        wanted = thinking ? TOKENS_MAX_THINKING : TOKENS_MAX_CHAT;
    }
    *tokens_max_out = wanted < context - n_prompt ? wanted : context - n_prompt;
    return CM_OK;
}
