/* VllmEngine's GenerateRequest to the JSON body of a completion. Refused here is only what a body cannot say;
 * the body's own checks come with the stream. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "gateway/grpc_vllm.h"

typedef Vllm__Grpc__Engine__GenerateRequest generate_request;
typedef Vllm__Grpc__Engine__SamplingParams sampling_params;

static cm_status refuse(gw_error *error, gw_cause cause, const char *field, const char *what)
{
    gw_error_set(error, cause, field, "%s %s", field, what);
    return cause == GW_CAUSE_UNSUPPORTED ? CM_E_UNSUPPORTED : CM_E_INVALID;
}

void gw_vllm_name_field(gw_error *error)
{
    static const char *const names[][2] = {
        {"max_tokens", "sampling_params.max_tokens"},
        {"min_tokens", "sampling_params.min_tokens"},
        {"temperature", "sampling_params.temperature"},
        {"top_p", "sampling_params.top_p"},
        {"top_k", "sampling_params.top_k"},
        {"min_p", "sampling_params.min_p"},
        {"presence_penalty", "sampling_params.presence_penalty"},
        {"frequency_penalty", "sampling_params.frequency_penalty"},
        {"repetition_penalty", "sampling_params.repetition_penalty"},
        {"seed", "sampling_params.seed"},
        {"n", "sampling_params.n"},
        {"stop", "sampling_params.stop"},
        {"stop_token_ids", "sampling_params.stop_token_ids"},
        {"logit_bias", "sampling_params.logit_bias"},
        {"logprobs", "sampling_params.logprobs"},
        {"prompt_logprobs", "sampling_params.prompt_logprobs"},
        {"response_format", "sampling_params.constraint"},
        {"response_format.type", "sampling_params.constraint"},
        {"response_format.json_schema", "sampling_params.json_schema"},
        {"structured_outputs", "sampling_params.constraint"},
        {"prompt", "input"},
    };
    gw_grpc_rename_field(error, names, sizeof(names) / sizeof(names[0]));
}

/* ---- sampling ---- */

/* Without presence in the original protocol: zero is "not given". */
static void put_count(json_t *body, const char *key, uint32_t value)
{
    if (value != 0) {
        json_object_set_new(body, key, json_integer(value));
    }
}

static cm_status put_numbers(json_t *body, const sampling_params *s, gw_error *error)
{
    const struct {
        const char *key;
        bool has;
        float value;
    } numbers[] = {
        {"temperature", s->has_temperature, s->temperature},
        {"top_p", fpclassify(s->top_p) != FP_ZERO, s->top_p},
        {"min_p", fpclassify(s->min_p) != FP_ZERO, s->min_p},
        {"frequency_penalty", fpclassify(s->frequency_penalty) != FP_ZERO, s->frequency_penalty},
        {"presence_penalty", fpclassify(s->presence_penalty) != FP_ZERO, s->presence_penalty},
        {"repetition_penalty", fpclassify(s->repetition_penalty) != FP_ZERO, s->repetition_penalty},
    };
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        if (numbers[i].has && !isfinite(numbers[i].value)) {
            char field[64];
            snprintf(field, sizeof(field), "sampling_params.%s", numbers[i].key);
            return refuse(error, GW_CAUSE_INVALID, field, "must be a finite number");
        }
        if (numbers[i].has) {
            json_object_set_new(body, numbers[i].key, json_real((double)numbers[i].value));
        }
    }
    return CM_OK;
}

static cm_status put_logit_bias(json_t *body, const sampling_params *s, gw_error *error)
{
    if (s->n_logit_bias == 0) {
        return CM_OK;
    }
    json_t *map = json_object();
    json_object_set_new(body, "logit_bias", map);
    for (size_t i = 0; i < s->n_logit_bias; i++) {
        char id[16];
        if (!isfinite(s->logit_bias[i]->value)) {
            return refuse(error, GW_CAUSE_INVALID, "sampling_params.logit_bias", "must have finite numbers");
        }
        snprintf(id, sizeof(id), "%d", s->logit_bias[i]->key);
        json_object_set_new(map, id, json_real((double)s->logit_bias[i]->value));
    }
    return CM_OK;
}

/* ---- constraints ---- */

static void put_structured(json_t *body, const char *key, json_t *value)
{
    json_object_set_new(body, "structured_outputs", json_pack("{s:o}", key, value));
}

static json_t *choices_json(const Vllm__Grpc__Engine__ChoiceConstraint *choice)
{
    json_t *list = json_array();
    for (size_t i = 0; i < choice->n_choices; i++) {
        json_array_append_new(list, json_string(choice->choices[i]));
    }
    return list;
}

static cm_status put_constraint(json_t *body, const sampling_params *s, gw_error *error)
{
    switch (s->constraint_case) {
    case VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_JSON_SCHEMA:
        return gw_grpc_put_schema(body, "sampling_params.json_schema", s->json_schema, error);
    case VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_JSON_OBJECT:
        if (s->json_object) {
            json_object_set_new(body, "response_format", json_pack("{s:s}", "type", "json_object"));
        }
        return CM_OK;
    case VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_REGEX:
        put_structured(body, "regex", json_string(s->regex));
        return CM_OK;
    case VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_GRAMMAR:
        put_structured(body, "grammar", json_string(s->grammar));
        return CM_OK;
    case VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_STRUCTURAL_TAG:
        put_structured(body, "structural_tag", json_string(s->structural_tag));
        return CM_OK;
    case VLLM__GRPC__ENGINE__SAMPLING_PARAMS__CONSTRAINT_CHOICE:
        put_structured(body, "choice", choices_json(s->choice));
        return CM_OK;
    default:
        return CM_OK;
    }
}

static cm_status put_sampling(json_t *body, const sampling_params *s, gw_error *error)
{
    if (s == NULL) {
        return CM_OK;
    }
    if (s->has_truncate_prompt_tokens) {
        return refuse(error, GW_CAUSE_UNSUPPORTED, "sampling_params.truncate_prompt_tokens",
                      "is not supported: send the prompt as it is meant");
    }
    if (s->has_max_tokens) {
        json_object_set_new(body, "max_tokens", json_integer(s->max_tokens));
    }
    put_count(body, "min_tokens", s->min_tokens);
    put_count(body, "top_k", s->top_k);
    put_count(body, "n", s->n);
    if (s->has_seed) {
        json_object_set_new(body, "seed", json_integer(s->seed));
    }
    if (s->has_logprobs) {
        json_object_set_new(body, "logprobs", json_integer(s->logprobs));
    }
    if (s->has_prompt_logprobs) {
        json_object_set_new(body, "prompt_logprobs", json_integer(s->prompt_logprobs));
    }
    json_object_set_new(body, "ignore_eos", json_boolean(s->ignore_eos));
    gw_grpc_put_stops(body, s->stop, s->n_stop, s->stop_token_ids, s->n_stop_token_ids);
    CM_TRY(put_numbers(body, s, error));
    CM_TRY(put_logit_bias(body, s, error));
    return put_constraint(body, s, error);
}

/* ---- the whole ---- */

static cm_status check_extras(const generate_request *request, gw_error *error)
{
    if (request->mm_inputs != NULL) {
        return refuse(error, GW_CAUSE_UNSUPPORTED, "mm_inputs", "is not supported: the model takes text");
    }
    if (request->kv_transfer_params != NULL || request->kv_transfer_params_json != NULL) {
        return refuse(error, GW_CAUSE_UNSUPPORTED, "kv_transfer_params",
                      "is not supported: the cluster moves its KV cache itself");
    }
    if (request->has_data_parallel_rank && request->data_parallel_rank != 0) {
        return refuse(error, GW_CAUSE_UNSUPPORTED, "data_parallel_rank",
                      "must be 0: the gateway chooses routers itself");
    }
    return CM_OK;
}

static cm_status fill(json_t *body, const generate_request *request, gw_error *error)
{
    CM_TRY(check_extras(request, error));
    if (request->input_case == VLLM__GRPC__ENGINE__GENERATE_REQUEST__INPUT_TEXT) {
        json_object_set_new(body, "prompt", json_string(request->text));
    } else if (request->input_case == VLLM__GRPC__ENGINE__GENERATE_REQUEST__INPUT_TOKENIZED) {
        gw_grpc_put_ids(body, "prompt", request->tokenized->input_ids, request->tokenized->n_input_ids);
    } else {
        return refuse(error, GW_CAUSE_INVALID, "input", "is missing: set tokenized or text");
    }
    return put_sampling(body, request->sampling_params, error);
}

cm_status gw_vllm_body(const generate_request *request, json_t **body_out, gw_error *error_out)
{
    json_t *body = json_object();
    cm_status status = fill(body, request, error_out);
    if (status != CM_OK) {
        json_decref(body);
        return status;
    }
    *body_out = body;
    return CM_OK;
}
