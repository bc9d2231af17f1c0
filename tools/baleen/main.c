/* The baleen command: the first word chooses what to do. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/base/log.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/verbs.h"

typedef struct main_verb {
    const char *word;
    int (*run)(int argc, char **argv);
    const char *doc;
} main_verb;

static const main_verb g_verbs[] = {
    {"up", verb_up, "run a whole cluster on this machine, in the foreground"},
    {"chat", verb_chat, "talk to a cluster"},
    {"status", verb_status, "members of a cluster, its epoch, placement and load"},
    {"scale", verb_scale, "have so many workers serve"},
    {"drain", verb_drain, "let a member finish what it does and leave"},
    {"rebalance", verb_rebalance, "move experts by their load, once"},
    {"certs", verb_certs, "certificates for a cluster whose control channel is secured"},
    {"keys", verb_keys, "a new API key in a gateway's key file"},
    {"plan", verb_plan, "what a cluster of given sizes would hold, and how fast it could be"},
    {"verify", verb_verify, "check a checkpoint: names, shapes, types, values"},
    {"logits", verb_logits,
     "logits and greedy tokens of given token ids, to compare with other implementations"},
    {"bench", verb_bench, "measure kernels and a gateway against what this machine can do"},
    {"synth", verb_synth, "a checkpoint of random weights from a config.json, to measure with"},
    {"tokenize", verb_tokenize, "a filter of JSON lines: text to token ids, and back"},
    {"encode", verb_encode, "a filter of JSON lines: requests to prompts"},
    {"parse", verb_parse, "a filter of JSON lines: completions to reasoning, content and tool calls"},
};
enum { MAIN_VERBS = sizeof(g_verbs) / sizeof(g_verbs[0]) };

static void main_help(FILE *to)
{
    fprintf(to, "baleen: DeepSeek-V4 served by a cluster of processes\n\nusage: baleen VERB [options]\n\n");
    for (size_t i = 0; i < MAIN_VERBS; i++) {
        fprintf(to, "  %-9s %s\n", g_verbs[i].word, g_verbs[i].doc);
    }
    fprintf(to,
            "\nbaleen VERB --help lists a verb's options; baleen --version says which version this is.\n");
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        main_help(stderr);
        return CLI_USAGE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "help") == 0) {
        main_help(stdout);
        return CLI_OK;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("baleen %s\n", BALEEN_VERSION);
        return CLI_OK;
    }
    cm_log_setup(&(cm_log_options){.level = CM_LOG_WARN, .fd = STDERR_FILENO});
    for (size_t i = 0; i < MAIN_VERBS; i++) {
        if (strcmp(argv[1], g_verbs[i].word) == 0) {
            return g_verbs[i].run(argc - 1, argv + 1);
        }
    }
    fprintf(stderr, "baleen: unknown verb '%s'; baleen --help lists them\n", argv[1]);
    return CLI_USAGE;
}
