#include "gateway/kserve.h"

#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"

const gw_kserve_tensor gw_kserve_inputs[GW_KSERVE_INPUTS] = {
    [GW_KSERVE_TEXT] = {"text_input", GW_KSERVE_BYTES, 1},
    [GW_KSERVE_IDS] = {"input_ids", GW_KSERVE_INT32, -1},
    [GW_KSERVE_MESSAGES] = {"messages", GW_KSERVE_BYTES, 1},
    [GW_KSERVE_STREAM] = {"stream", GW_KSERVE_BOOL, 1},
    [GW_KSERVE_SAMPLING] = {"sampling_parameters", GW_KSERVE_BYTES, 1},
    [GW_KSERVE_EXCLUDE] = {"exclude_input_in_output", GW_KSERVE_BOOL, 1},
};

const char *gw_kserve_type_name(gw_kserve_type type)
{
    static const char *const names[] = {"BYTES", "BOOL", "INT32"};
    return names[type];
}

static cm_status refuse(gw_error *error, const char *field, const char *what)
{
    gw_error_set(error, GW_CAUSE_INVALID, field, "%s %s", field, what);
    return CM_E_INVALID;
}

static cm_status refuse_number(gw_error *error, const gw_kserve_tensor *tensor)
{
    CM_ASSERT(tensor->n == 1); /* there are no others of a fixed number */
    return refuse(error, tensor->name, "must have one element");
}

cm_status gw_kserve_check_model(const gw_gateway *gateway, const char *name, const char *version,
                                gw_error *error_out)
{
    CM_TRY(gw_model_check(gateway, name != NULL && name[0] != 0 ? name : NULL, error_out));
    if (version == NULL || version[0] == 0 || strcmp(version, GW_KSERVE_VERSION) == 0) {
        return CM_OK;
    }
    gw_error_set(error_out, GW_CAUSE_MODEL_NOT_FOUND, "model_version",
                 "there is no version %.100s of the model: leave it out", version);
    return CM_E_NOT_FOUND;
}

/* ---- tensors ---- */

void gw_kserve_request_fini(gw_kserve_request *request)
{
    for (int i = 0; i < GW_KSERVE_INPUTS; i++) {
        json_decref(request->data[i]);
        request->data[i] = NULL;
    }
}

cm_status gw_kserve_find(const char *name, const char *datatype, gw_kserve_name *name_out,
                         gw_error *error_out)
{
    for (int i = 0; i < GW_KSERVE_INPUTS; i++) {
        const gw_kserve_tensor *tensor = &gw_kserve_inputs[i];
        if (name == NULL || strcmp(tensor->name, name) != 0) {
            continue;
        }
        if (datatype == NULL || strcmp(gw_kserve_type_name(tensor->type), datatype) != 0) {
            gw_error_set(error_out, GW_CAUSE_INVALID, name, "%s must have the datatype %s", name,
                         gw_kserve_type_name(tensor->type));
            return CM_E_INVALID;
        }
        *name_out = (gw_kserve_name)i;
        return CM_OK;
    }
    gw_error_set(error_out, GW_CAUSE_INVALID, "inputs", "the model has no input '%.100s'",
                 name != NULL ? name : "");
    return CM_E_INVALID;
}

static uint32_t le32(const uint8_t *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

/* One element; *n_out: bytes it took. NULL: it is cut, or no text. */
static json_t *raw_element(gw_kserve_type type, const uint8_t *raw, size_t n_bytes, size_t *n_out)
{
    if (type == GW_KSERVE_BOOL) {
        *n_out = 1;
        return json_boolean(raw[0] != 0);
    }
    if (n_bytes < 4) {
        return NULL;
    }
    uint32_t word = le32(raw);
    *n_out = 4;
    if (type == GW_KSERVE_INT32) {
        return json_integer((int32_t)word);
    }
    if (word > n_bytes - 4) {
        return NULL;
    }
    *n_out += word;
    return json_stringn((const char *)raw + 4, word);
}

cm_status gw_kserve_from_raw(gw_kserve_name name, const uint8_t *raw, size_t n_bytes, json_t **data_out,
                             gw_error *error_out)
{
    const gw_kserve_tensor *tensor = &gw_kserve_inputs[name];
    json_t *list = json_array();
    for (size_t at = 0, n; at < n_bytes; at += n) {
        if (tensor->n >= 0 && json_array_size(list) == (size_t)tensor->n) {
            json_decref(list);
            return refuse_number(error_out, tensor);
        }
        json_t *element = raw_element(tensor->type, raw + at, n_bytes - at, &n);
        if (element == NULL) {
            json_decref(list);
            return refuse(error_out, tensor->name,
                          tensor->type == GW_KSERVE_BYTES
                              ? "must be UTF-8 text behind its length (4 bytes, little-endian)"
                              : "must have 4 bytes for each element");
        }
        json_array_append_new(list, element);
    }
    *data_out = list;
    return CM_OK;
}

static bool is_element(gw_kserve_type type, const json_t *value)
{
    switch (type) {
    case GW_KSERVE_BYTES:
        return json_is_string(value);
    case GW_KSERVE_BOOL:
        return json_is_boolean(value);
    case GW_KSERVE_INT32:
        return json_is_integer(value);
    }
    return false;
}

static bool fits_shape(const int64_t *shape, size_t n_dim, size_t n_elements)
{
    size_t product = 1;
    for (size_t i = 0; i < n_dim; i++) {
        if (shape[i] < 0 || __builtin_mul_overflow(product, (size_t)shape[i], &product)) {
            return false;
        }
    }
    return product == n_elements;
}

static cm_status check_data(const gw_kserve_tensor *tensor, const int64_t *shape, size_t n_dim,
                            const json_t *data, gw_error *error)
{
    size_t n = json_array_size(data), i;
    json_t *value;
    if (!fits_shape(shape, n_dim, n)) {
        return refuse(error, tensor->name, "has a shape that does not fit the number of its elements");
    }
    if (tensor->n >= 0 && n != (size_t)tensor->n) {
        return refuse_number(error, tensor);
    }
    json_array_foreach(data, i, value)
    {
        if (!is_element(tensor->type, value)) {
            gw_error_set(error, GW_CAUSE_INVALID, tensor->name, "%s must have elements of %s", tensor->name,
                         gw_kserve_type_name(tensor->type));
            return CM_E_INVALID;
        }
    }
    return CM_OK;
}

cm_status gw_kserve_put(gw_kserve_request *request, gw_kserve_name name, const int64_t *shape, size_t n_dim,
                        json_t *data, gw_error *error_out)
{
    const gw_kserve_tensor *tensor = &gw_kserve_inputs[name];
    cm_status status = request->data[name] != NULL ? refuse(error_out, tensor->name, "is given twice")
                                                   : check_data(tensor, shape, n_dim, data, error_out);
    if (status != CM_OK) {
        json_decref(data);
        return status;
    }
    request->data[name] = data;
    return CM_OK;
}

/* ---- what is asked ---- */

/* The only element; NULL: the tensor was not given. */
static const json_t *only(const gw_kserve_request *request, gw_kserve_name name)
{
    return json_array_get(request->data[name], 0);
}

/* The JSON inside a BYTES tensor. */
static cm_status read_json(const gw_kserve_request *request, gw_kserve_name name, json_t **value_out,
                           gw_error *error)
{
    const json_t *text = only(request, name);
    json_error_t where;
    *value_out = json_loadb(json_string_value(text), json_string_length(text), JSON_ALLOW_NUL, &where);
    if (*value_out == NULL) {
        gw_error_set(error, GW_CAUSE_BAD_JSON, gw_kserve_inputs[name].name,
                     "%s is not valid JSON: %s (line %d, column %d)", gw_kserve_inputs[name].name, where.text,
                     where.line, where.column);
        return CM_E_INVALID;
    }
    return CM_OK;
}

/* The fields of a body but those that come from tensors, and those that would be told in vain. */
static cm_status read_sampling(const gw_kserve_request *request, json_t **body_out, gw_error *error)
{
    static const char *const elsewhere[] = {"model",  "messages",       "prompt",   "suffix",
                                            "stream", "stream_options", "logprobs", "top_logprobs"};
    if (only(request, GW_KSERVE_SAMPLING) == NULL) {
        *body_out = json_object();
        return CM_OK;
    }
    json_t *body;
    CM_TRY(read_json(request, GW_KSERVE_SAMPLING, &body, error));
    cm_status status = json_is_object(body)
                           ? CM_OK
                           : refuse(error, "sampling_parameters", "must be the text of a JSON object");
    for (size_t i = 0; i < sizeof(elsewhere) / sizeof(elsewhere[0]) && status == CM_OK; i++) {
        if (json_object_get(body, elsewhere[i]) != NULL) {
            gw_error_set(error, GW_CAUSE_INVALID, "sampling_parameters",
                         "sampling_parameters must not have %s: it is an input, or cannot be answered here",
                         elsewhere[i]);
            status = CM_E_INVALID;
        }
    }
    const json_t *n = json_object_get(body, "n");
    if (status == CM_OK && n != NULL && json_integer_value(n) != 1) {
        gw_error_set(error, GW_CAUSE_UNSUPPORTED, "n", "n must be 1: ask again for more answers");
        status = CM_E_UNSUPPORTED;
    }
    if (status != CM_OK) {
        json_decref(body);
        return status;
    }
    *body_out = body;
    return CM_OK;
}

static cm_status put_prompt(const gw_kserve_request *request, gw_kserve_ask *ask, gw_error *error)
{
    const json_t *text = only(request, GW_KSERVE_TEXT);
    bool has_ids = request->data[GW_KSERVE_IDS] != NULL, has_chat = only(request, GW_KSERVE_MESSAGES) != NULL;
    if ((text != NULL) + has_ids + has_chat != 1) {
        return refuse(error, "text_input", "or input_ids or messages must be given, and only one of them");
    }
    ask->kind = has_chat ? GW_ASK_CHAT : GW_ASK_COMPLETE;
    if (has_chat) {
        json_t *messages;
        CM_TRY(read_json(request, GW_KSERVE_MESSAGES, &messages, error));
        json_object_set_new(ask->body, "messages", messages);
    } else {
        json_object_set(ask->body, "prompt",
                        has_ids ? request->data[GW_KSERVE_IDS] : (json_t *)(uintptr_t)text);
    }
    return CM_OK;
}

/* The prompt before the answer is Triton's habit, for a text that is answered at once. */
static cm_status choose_echo(const gw_kserve_request *request, gw_kserve_ask *ask, gw_error *error)
{
    bool can = only(request, GW_KSERVE_TEXT) != NULL && !ask->stream;
    const json_t *exclude = only(request, GW_KSERVE_EXCLUDE);
    if (json_is_false(exclude) && !can) {
        return refuse(error, "exclude_input_in_output", "must be true with stream, input_ids or messages");
    }
    ask->echo = can && !json_is_true(exclude);
    return CM_OK;
}

static cm_status fill(const gw_kserve_request *request, gw_kserve_ask *ask, gw_error *error)
{
    ask->stream = json_is_true(only(request, GW_KSERVE_STREAM));
    CM_TRY(put_prompt(request, ask, error));
    return choose_echo(request, ask, error);
}

cm_status gw_kserve_make_ask(const gw_kserve_request *request, const char *model, gw_kserve_ask *ask_out,
                             gw_error *error_out)
{
    gw_kserve_ask ask = {0};
    CM_TRY(read_sampling(request, &ask.body, error_out));
    if (model != NULL && model[0] != 0) {
        json_object_set_new(ask.body, "model", json_string(model));
    }
    cm_status status = fill(request, &ask, error_out);
    if (status != CM_OK) {
        gw_kserve_ask_fini(&ask);
        return status;
    }
    *ask_out = ask;
    return CM_OK;
}

void gw_kserve_ask_fini(gw_kserve_ask *ask)
{
    json_decref(ask->body);
    ask->body = NULL;
}

void gw_kserve_name_field(gw_error *error)
{
    static const char *const ours[] = {"",      "inputs", "outputs", "raw_input_contents", "model_version",
                                       "stream"};
    char field[sizeof(error->param)];
    for (size_t i = 0; i < sizeof(ours) / sizeof(ours[0]); i++) {
        if (strcmp(error->param, ours[i]) == 0) {
            return;
        }
    }
    for (int i = 0; i < GW_KSERVE_INPUTS; i++) {
        size_t n = strlen(gw_kserve_inputs[i].name);
        if (strncmp(error->param, gw_kserve_inputs[i].name, n) == 0) {
            return; /* "messages[0].role" too */
        }
    }
    if (strcmp(error->param, "model") == 0 || strcmp(error->param, "prompt") == 0) {
        snprintf(error->param, sizeof(error->param), "%s",
                 error->param[0] == 'm' ? "model_name" : "text_input");
        return;
    }
    snprintf(field, sizeof(field), "sampling_parameters.%.70s", error->param);
    snprintf(error->param, sizeof(error->param), "%s", field);
}
