#include "router/sched/request.h"

#include <float.h>
#include <math.h>

static cm_status request_ids_check(const rt_sched_limits *limits, const char *field, const uint32_t *ids,
                                   uint32_t n, cm_error *err)
{
    for (uint32_t i = 0; i < n; i++) {
        if (ids[i] >= limits->vocab) {
            return cm_error_set(err, CM_E_INVALID, field,
                                "%s: id %u at %u is not below the vocabulary size %u", field, ids[i], i,
                                limits->vocab);
        }
    }
    return CM_OK;
}

static cm_status request_penalty_check(const char *field, float penalty, float least, cm_error *err)
{
    if (!isfinite(penalty) || penalty < least) {
        return cm_error_set(err, CM_E_INVALID, field, "%s %g is not a number that can be used", field,
                            (double)penalty);
    }
    return CM_OK;
}

static cm_status request_bias_check(const rt_sched_limits *limits, const rt_sampler *sampler, cm_error *err)
{
    if (sampler->n_bias > RT_BIAS_MAX) {
        return cm_error_set(err, CM_E_INVALID, "bias", "%u biases, at most %d", sampler->n_bias, RT_BIAS_MAX);
    }
    for (uint32_t i = 0; i < sampler->n_bias; i++) {
        CM_TRY(request_ids_check(limits, "bias", &sampler->bias[i].id, 1, err));
        CM_TRY(request_penalty_check("bias", sampler->bias[i].bias, -FLT_MAX, err));
    }
    return CM_OK;
}

/* What changes the logits, and what is told about them. */
static cm_status request_logits_check(const rt_sched_limits *limits, const rt_sampler *sampler, cm_error *err)
{
    if (!(sampler->min_p >= 0 && sampler->min_p <= 1)) {
        return cm_error_set(err, CM_E_INVALID, "min_p", "min_p %g is not from 0 to 1",
                            (double)sampler->min_p);
    }
    CM_TRY(request_penalty_check("repetition_penalty", sampler->repetition_penalty, 0, err));
    CM_TRY(request_penalty_check("frequency_penalty", sampler->frequency_penalty, -FLT_MAX, err));
    CM_TRY(request_penalty_check("presence_penalty", sampler->presence_penalty, -FLT_MAX, err));
    if (sampler->n_top > RT_LOGPROBS_TOP_MAX) {
        return cm_error_set(err, CM_E_INVALID, "top_logprobs", "%u log-probabilities a token, at most %d",
                            sampler->n_top, RT_LOGPROBS_TOP_MAX);
    }
    return request_bias_check(limits, sampler, err);
}

static cm_status request_sampler_check(const rt_sched_limits *limits, const rt_sampler *sampler,
                                       cm_error *err)
{
    if (!isfinite(sampler->temperature) || sampler->temperature < 0) {
        return cm_error_set(err, CM_E_INVALID, "temperature", "temperature %g is not a number from 0 up",
                            (double)sampler->temperature);
    }
    if (!(sampler->top_p > 0 && sampler->top_p <= 1)) {
        return cm_error_set(err, CM_E_INVALID, "top_p", "top_p %g is not above 0 and at most 1",
                            (double)sampler->top_p);
    }
    if (sampler->tokens_max == 0) {
        return cm_error_set(err, CM_E_INVALID, "tokens_max", "tokens_max is 0: nothing to generate");
    }
    if (sampler->tokens_min > sampler->tokens_max) {
        return cm_error_set(err, CM_E_INVALID, "tokens_min", "tokens_min %u is above tokens_max %u",
                            sampler->tokens_min, sampler->tokens_max);
    }
    if (sampler->n_stop > RT_STOP_MAX) {
        return cm_error_set(err, CM_E_INVALID, "stop", "%u stop ids, at most %d", sampler->n_stop,
                            RT_STOP_MAX);
    }
    CM_TRY(request_logits_check(limits, sampler, err));
    return request_ids_check(limits, "stop", sampler->stop, sampler->n_stop, err);
}

cm_status rt_request_check(const rt_sched_limits *limits, const rt_seq_request *request, cm_error *err)
{
    if (request->key.owner == 0) {
        return cm_error_set(err, CM_E_INVALID, "owner", "owner 0 is not used");
    }
    if (request->n_prompt == 0) {
        return cm_error_set(err, CM_E_INVALID, "prompt", "the prompt is empty");
    }
    CM_TRY(request_sampler_check(limits, &request->sampler, err));
    if (request->n_emitted >= request->sampler.tokens_max) {
        return cm_error_set(err, CM_E_INVALID, "emitted",
                            "%u tokens were generated before, tokens_max is %u: none is left",
                            request->n_emitted, request->sampler.tokens_max);
    }
    uint64_t n_token = (uint64_t)request->n_prompt + request->sampler.tokens_max,
             n_page = (n_token + limits->page_tokens - 1) / limits->page_tokens;
    if (n_token > limits->context) {
        return cm_error_set(
            err, CM_E_TOO_LONG, "tokens_max",
            "a prompt of %u tokens and up to %u generated are more than the context of %u: shorten the "
            "prompt or ask for fewer tokens",
            request->n_prompt, request->sampler.tokens_max, limits->context);
    }
    if (n_page > limits->page_max) {
        return cm_error_set(
            err, CM_E_TOO_LONG, "tokens_max",
            "a prompt of %u tokens and up to %u generated need %llu KV pages of %u tokens, this router has "
            "%u: shorten the prompt, ask for fewer tokens or give the router more KV memory",
            request->n_prompt, request->sampler.tokens_max, (unsigned long long)n_page, limits->page_tokens,
            limits->page_max);
    }
    CM_TRY(request_ids_check(limits, "prompt", request->prompt, request->n_prompt, err));
    return request_ids_check(limits, "emitted", request->emitted, request->n_emitted, err);
}
