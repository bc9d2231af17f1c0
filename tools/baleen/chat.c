/* baleen chat: a conversation with a cluster over gRPC. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/base/mem.h"
#include "tools/baleen/answer.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/run_folder.h"
#include "tools/baleen/verbs.h"

typedef struct chat_config {
    char *run, *grpc, *key, *serve_ca, *thinking, *temperature, *top_p, *seed, *system;
    uint64_t max_tokens;
} chat_config;

static const cm_cfg_field g_fields[] = {
    {"run", "", "run folder of a baleen up", CM_CFG_STRING(chat_config, run)},
    {"grpc", "", "host:port of a gateway's gRPC interface, in place of --run",
     CM_CFG_STRING(chat_config, grpc)},
    {"key", "", "API key, where the gateway wants one", CM_CFG_STRING(chat_config, key)},
    {"serve_ca", "", "authority of the gateway's certificate, PEM, where it speaks TLS; that names the host",
     CM_CFG_STRING(chat_config, serve_ca)},
    {"thinking", "on", "whether the model thinks before it answers",
     CM_CFG_CHOICE(chat_config, thinking, "on|off")},
    {"temperature", "0", "0..2; 0 takes the likeliest token: small models as nano err when tokens are drawn",
     CM_CFG_STRING(chat_config, temperature)},
    {"top_p", "1", "0..1; tokens are drawn from the likeliest with this sum of probabilities",
     CM_CFG_STRING(chat_config, top_p)},
    {"seed", "", "number that makes drawn answers repeatable; random when none is given",
     CM_CFG_STRING(chat_config, seed)},
    {"max_tokens", "0", "tokens of an answer at most, thinking included; 0 = the server's default",
     CM_CFG_UINT(chat_config, max_tokens, 0, 1u << 24)},
    {"system", "", "first message, from the system", CM_CFG_STRING(chat_config, system)},
};

static const cm_cfg_table g_table = {
    .program = "baleen chat",
    .summary = "talks to a cluster; without PROMPT each line of stdin is a turn of one conversation. The "
               "answer goes to "
               "stdout, thinking and numbers to stderr",
    .operands = "[PROMPT]",
    .fields = g_fields,
    .n_fields = sizeof(g_fields) / sizeof(g_fields[0]),
};

typedef struct chat {
    chat_config config;
    Baleen__V1__Sampling sampling;
    Baleen__V1__Message **messages; /* owned, with their texts */
    size_t n_messages;
    pc_loop *loop;
    pc_channel *channel;
} chat;

/* ---- the conversation ---- */

static void chat_add(chat *self, Baleen__V1__Role role, const char *content, const char *reasoning)
{
    Baleen__V1__Message *message = cm_alloc(sizeof(*message));
    baleen__v1__message__init(message);
    message->role = role;
    message->content = cm_strdup(content);
    message->reasoning_content = reasoning[0] != '\0' ? cm_strdup(reasoning) : NULL;
    self->messages = cm_realloc(self->messages, sizeof(message) * (self->n_messages + 1));
    self->messages[self->n_messages++] = message;
}

static void chat_forget_last(chat *self)
{
    Baleen__V1__Message *message = self->messages[--self->n_messages];
    cm_free(message->content);
    cm_free(message->reasoning_content);
    cm_free(message);
}

/* One turn; a failed one is forgotten, so that the next starts from what both sides have seen whole. */
static cm_status chat_turn(chat *self, const char *prompt, cm_error *err)
{
    answer got;
    Baleen__V1__ChatRequest request = BALEEN__V1__CHAT_REQUEST__INIT;
    answer_init(&got);
    chat_add(self, BALEEN__V1__ROLE__ROLE_USER, prompt, "");
    request.n_messages = self->n_messages;
    request.messages = self->messages;
    request.sampling = &self->sampling;
    request.has_thinking = true;
    request.thinking = strcmp(self->config.thinking, "on") == 0 ? BALEEN__V1__THINKING__THINKING_ENABLED
                                                                : BALEEN__V1__THINKING__THINKING_DISABLED;
    cm_status status = answer_ask(&got, self->loop, self->channel, &request, err);
    if (status == CM_OK) {
        chat_add(self, BALEEN__V1__ROLE__ROLE_ASSISTANT, cm_bytes_text(&got.content),
                 cm_bytes_text(&got.reasoning));
    } else {
        chat_forget_last(self);
    }
    answer_fini(&got);
    return status;
}

/* A line of stdin without its end; false when there is none. */
static bool read_line(cm_bytes *line_out)
{
    char piece[512];
    cm_bytes_clear(line_out);
    while (fgets(piece, sizeof(piece), stdin) != NULL) {
        size_t n = strcspn(piece, "\n");
        cm_bytes_append(line_out, piece, n);
        if (piece[n] == '\n') {
            return true;
        }
    }
    return line_out->len > 0;
}

/* Each line is a turn. A failed turn ends a script's conversation; a person may go on. */
static cm_status chat_converse(chat *self, cm_error *err)
{
    cm_bytes line;
    bool person = isatty(STDIN_FILENO) != 0;
    cm_status status = CM_OK;
    cm_bytes_init(&line, 0);
    while (status == CM_OK) {
        if (person) {
            fputs("> ", stderr);
        }
        if (!read_line(&line)) {
            break;
        }
        if (line.len == 0) {
            continue;
        }
        status = chat_turn(self, cm_bytes_text(&line), err);
        if (status != CM_OK && person) {
            cli_complain(&g_table, CLI_FAILED, "%s; this turn is forgotten", err->text);
            status = CM_OK;
        }
    }
    if (person) {
        fputc('\n', stderr);
    }
    cm_bytes_fini(&line);
    return status;
}

/* ---- options ---- */

static cm_status chat_sampling(chat *self, cm_error *err)
{
    double temperature, top_p;
    char *end;
    CM_TRY(cli_parse_double("temperature", self->config.temperature, 0, 2, &temperature, err));
    CM_TRY(cli_parse_double("top_p", self->config.top_p, 0, 1, &top_p, err));
    baleen__v1__sampling__init(&self->sampling);
    self->sampling.has_temperature = true;
    self->sampling.temperature = (float)temperature;
    self->sampling.has_top_p = true;
    self->sampling.top_p = (float)top_p;
    self->sampling.has_max_tokens = self->config.max_tokens > 0;
    self->sampling.max_tokens = (uint32_t)self->config.max_tokens;
    if (self->config.seed[0] != '\0') {
        errno = 0;
        self->sampling.has_seed = true;
        self->sampling.seed = strtoll(self->config.seed, &end, 10);
        if (*end != '\0' || errno != 0) {
            return cm_error_set(err, CM_E_CONFIG, "seed", "seed: '%s' is not a whole number of 64 bits",
                                self->config.seed);
        }
    }
    return CM_OK;
}

static cm_status chat_connect(chat *self, cm_error *err)
{
    run_addresses addresses = {0};
    if (self->config.grpc[0] == '\0' && self->config.run[0] == '\0') {
        return cm_error_set(
            err, CM_E_CONFIG, "run",
            "which cluster? give --run DIR (the run folder of baleen up) or --grpc HOST:PORT of a gateway");
    }
    if (self->config.grpc[0] == '\0') {
        CM_TRY(run_folder_addresses(self->config.run, &addresses, err));
    }
    if (pc_loop_create(&self->loop) != CM_OK) {
        return cm_error_set(err, CM_E_IO, NULL, "no event loop");
    }
    const char *address = self->config.grpc[0] != '\0' ? self->config.grpc : addresses.grpc;
    return pc_channel_create_client(self->loop, address, self->config.serve_ca, self->config.key,
                                    &self->channel, err);
}

static cm_status chat_run(chat *self, const char *prompt, cm_error *err)
{
    CM_TRY(chat_sampling(self, err));
    CM_TRY(chat_connect(self, err));
    if (self->config.system[0] != '\0') {
        chat_add(self, BALEEN__V1__ROLE__ROLE_SYSTEM, self->config.system, "");
    }
    return prompt != NULL ? chat_turn(self, prompt, err) : chat_converse(self, err);
}

int verb_chat(int argc, char **argv)
{
    chat self = {.loop = NULL};
    cm_error err = {0};
    const char *prompt = NULL;
    size_t n_operands;
    int code = cli_begin(&g_table, &self.config, argc, argv, &prompt, 1, &n_operands);
    if (code >= 0) {
        return code;
    }
    code = chat_run(&self, n_operands > 0 ? prompt : NULL, &err) == CM_OK ? CLI_OK : cli_fail(&g_table, &err);
    if (self.channel != NULL) {
        pc_channel_destroy(self.channel);
    }
    if (self.loop != NULL) {
        pc_loop_destroy(self.loop);
    }
    while (self.n_messages > 0) {
        chat_forget_last(&self);
    }
    cm_free(self.messages);
    cm_cfg_free(&g_table, &self.config);
    return code;
}
