/* What a token is. Hidden states are 64-bit hashes; a layer folds in what came before (through the KV pages)
 * and the rows of the chosen experts, slot by slot: a row skipped, doubled, misplaced or of another epoch's
 * expert gives another token. */
#include <string.h>

#include "tests/sim/sim.h"

uint64_t sim_mix(uint64_t a, uint64_t b)
{
    uint64_t x = (a ^ 0x9E3779B97F4A7C15u) * 0xBF58476D1CE4E5B9u + b;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

uint64_t sim_model_embed(uint32_t token)
{
    return sim_mix(token, 1);
}

uint64_t sim_model_attend(uint64_t hidden, uint64_t kv_before, uint32_t layer, uint64_t *kv_out)
{
    uint64_t kv = sim_mix(sim_mix(hidden, layer), kv_before);
    *kv_out = kv;
    return sim_mix(hidden, kv);
}

void sim_model_row(uint64_t hidden, uint8_t codes_out[SIM_D], uint8_t *scale_out)
{
    for (uint32_t i = 0; i < SIM_D; i += 8) {
        uint64_t word = sim_mix(hidden, 100 + i);
        memcpy(codes_out + i, &word, 8);
    }
    *scale_out = (uint8_t)sim_mix(hidden, 99);
}

void sim_model_gate(const sim_shape *shape, uint64_t hidden, uint32_t layer, sim_expert_choice *out)
{
    bool taken[SIM_EXPERTS_MAX] = {false};
    for (uint32_t k = 0; k < shape->topk; k++) {
        uint64_t draw = sim_mix(sim_mix(hidden, 200 + layer), k);
        uint32_t e = (uint32_t)(draw % shape->n_expert);
        while (taken[e]) {
            e = (e + 1) % shape->n_expert;
        }
        taken[e] = true;
        out->expert[k] = (int32_t)e;
        out->weight[k] = (float)(1 + (draw >> 32) % 1000);
    }
}

void sim_model_expert(uint32_t layer, uint32_t expert, float weight, const uint8_t codes[SIM_D],
                      uint8_t scale, uint16_t out[SIM_D])
{
    uint64_t hash = sim_mix(sim_mix(layer, expert), sim_mix(scale, (uint64_t)weight));
    for (uint32_t i = 0; i < SIM_D; i += 8) {
        uint64_t word;
        memcpy(&word, codes + i, 8);
        hash = sim_mix(hash, word);
    }
    for (uint32_t i = 0; i < SIM_D; i += 4) {
        uint64_t word = sim_mix(hash, i);
        memcpy(out + i, &word, 8);
    }
}

uint64_t sim_model_combine(uint64_t hidden, const uint16_t *results, uint32_t topk)
{
    for (uint32_t i = 0; i < topk * SIM_D; i += 4) {
        uint64_t word;
        memcpy(&word, results + i, 8);
        hidden = sim_mix(hidden, word);
    }
    return hidden;
}

static bool is_stop(const rt_sampler *sampler, uint32_t token)
{
    for (uint32_t i = 0; i < sampler->n_stop; i++) {
        if (sampler->stop[i] == token) {
            return true;
        }
    }
    return false;
}

uint32_t sim_model_token(uint64_t hidden, uint64_t seed, uint32_t position, const rt_sampler *sampler,
                         bool stop_allowed)
{
    uint32_t token = (uint32_t)(sim_mix(sim_mix(hidden, seed), position) % SIM_VOCAB);
    while (!stop_allowed && is_stop(sampler, token)) {
        token = (token + 1) % SIM_VOCAB;
    }
    return token;
}

/* One position through all layers, as a router and its workers do it. */
static uint64_t alone_position(const sim_shape *shape, uint32_t token, uint64_t kv[SIM_LAYERS_MAX])
{
    uint64_t hidden = sim_model_embed(token);
    for (uint32_t layer = 0; layer < shape->n_layer; layer++) {
        uint8_t codes[SIM_D], scale;
        uint16_t results[SIM_TOPK_MAX * SIM_D];
        sim_expert_choice choice;
        hidden = sim_model_attend(hidden, kv[layer], layer, &kv[layer]);
        sim_model_row(hidden, codes, &scale);
        sim_model_gate(shape, hidden, layer, &choice);
        for (uint32_t k = 0; k < shape->topk; k++) {
            sim_model_expert(layer, (uint32_t)choice.expert[k], choice.weight[k], codes, scale,
                             results + k * SIM_D);
        }
        hidden = sim_model_combine(hidden, results, shape->topk);
    }
    return hidden;
}

void sim_model_answer(const sim_shape *shape, const uint32_t *prompt, uint32_t n_prompt,
                      const rt_sampler *sampler, uint32_t *tokens_out, uint32_t *n_out, rt_seq_end *end_out)
{
    uint64_t kv[SIM_LAYERS_MAX] = {0}, hidden = 0;
    uint32_t n = 0, position = 0;
    for (; position < n_prompt; position++) {
        hidden = alone_position(shape, prompt[position], kv);
    }
    *end_out = RT_END_LENGTH;
    while (n < sampler->tokens_max) {
        uint32_t token = sim_model_token(hidden, sampler->seed, position, sampler, n >= sampler->tokens_min);
        if (is_stop(sampler, token)) {
            *end_out = RT_END_STOP;
            break;
        }
        tokens_out[n++] = token;
        hidden = alone_position(shape, token, kv);
        position++;
    }
    *n_out = n;
}
