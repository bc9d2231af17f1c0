/* baleen tokenize, encode, parse: JSON lines on stdin to JSON lines on stdout, one for one, for scripts. */
#include <stdio.h>
#include <string.h>

#include "common/base/mem.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/rows.h"
#include "tools/baleen/verbs.h"

/* ---- the loop ---- */

typedef struct filter_config {
    char *tokenizer, *profile, *special, *decode;
    md_tokenizer *opened; /* the tokenizer's file, NULL for a filter without one */
} filter_config;

typedef cm_status (*filter_fn)(const filter_config *config, const json_t *row, json_t **answer_out,
                               cm_error *err);

/* A sentence may quote input that was cut inside a character. */
static json_t *error_json(const cm_error *err)
{
    cm_bytes text;
    md_detok detok;
    cm_bytes_init(&text, 0);
    md_detok_init(&detok, false);
    md_detok_push_bytes(&detok, (const uint8_t *)err->text, strlen(err->text), &text);
    md_detok_flush(&detok, &text);
    json_t *answer = json_pack("{s:s}", "error", cm_bytes_text(&text));
    cm_bytes_fini(&text);
    return answer;
}

static cm_status filter_line(const filter_config *config, filter_fn fn, const char *line, size_t n,
                             cm_bytes *out)
{
    json_error_t why;
    json_t *answer = NULL, *row = json_loadb(line, n, JSON_ALLOW_NUL, &why);
    cm_error err = {0};
    cm_status status = row != NULL ? fn(config, row, &answer, &err)
                                   : cm_error_set(&err, CM_E_INVALID, NULL, "not JSON: %s", why.text);
    if (status != CM_OK) {
        answer = error_json(&err);
    }
    cli_append_json(out, answer, JSON_COMPACT);
    cm_bytes_append(out, "\n", 1);
    json_decref(answer);
    json_decref(row);
    return status;
}

static int filter_lines(const cm_cfg_table *table, const filter_config *config, filter_fn fn)
{
    char *line = NULL;
    size_t cap = 0, n_lines = 0, n_bad = 0;
    ssize_t length;
    cm_bytes out;
    cm_bytes_init(&out, 0);
    bool written = true;
    while (written && (length = getline(&line, &cap, stdin)) >= 0) {
        n_lines++;
        n_bad += filter_line(config, fn, line, (size_t)length, &out) != CM_OK;
        /* at once: a script may wait for this answer before it asks the next */
        written = fwrite(out.data, 1, out.len, stdout) == out.len && fflush(stdout) == 0;
        cm_bytes_clear(&out);
    }
    cm_bytes_fini(&out);
    cm_free(line);
    if (!written || ferror(stdin)) {
        return cli_complain(table, CLI_FAILED, "%s",
                            written ? "cannot read stdin" : "cannot write to stdout");
    }
    if (n_bad > 0) {
        return cli_complain(table, CLI_FAILED, "%zu of %zu lines have an error for an answer", n_bad,
                            n_lines);
    }
    return CLI_OK;
}

static int filter_run(const cm_cfg_table *table, filter_config *config, filter_fn fn)
{
    cm_error err = {0};
    if (config->tokenizer != NULL && config->tokenizer[0] == '\0') {
        return cli_complain(table, CLI_USAGE, "which tokenizer? give --tokenizer FILE (a tokenizer.json)");
    }
    if (config->tokenizer != NULL &&
        md_tokenizer_open(config->tokenizer, 0, &config->opened, &err) != CM_OK) {
        return cli_fail(table, &err);
    }
    int code = filter_lines(table, config, fn);
    md_tokenizer_close(config->opened);
    return code;
}

#define TOKENIZER_FIELD                                                                                      \
    {                                                                                                        \
        "tokenizer", "", "a tokenizer.json", CM_CFG_STRING(filter_config, tokenizer)                         \
    }

/* ---- tokenize ---- */

static const cm_cfg_field g_tokenize_fields[] = {
    TOKENIZER_FIELD,
    {"special", "off", "control spellings in the text become their ids, as in raw prompts",
     CM_CFG_CHOICE(filter_config, special, "off|on")},
    {"decode", "off", "the other way: {\"ids\"} to {\"pieces\", \"text\"}",
     CM_CFG_CHOICE(filter_config, decode, "off|on")},
};

static const cm_cfg_table g_tokenize = {
    .program = "baleen tokenize",
    .summary = "JSON lines {\"text\"} or {\"hex\"} to {\"ids\"}",
    .operands = "",
    .fields = g_tokenize_fields,
    .n_fields = sizeof(g_tokenize_fields) / sizeof(g_tokenize_fields[0]),
};

static bool is_on(const char *word)
{
    return strcmp(word, "on") == 0;
}

static cm_status tokenize_row(const filter_config *config, const json_t *row, json_t **answer_out,
                              cm_error *err)
{
    if (is_on(config->decode)) {
        return row_detokenize(config->opened, row, false, answer_out, err);
    }
    return row_tokenize(config->opened, row, is_on(config->special) ? MD_TEXT_CONTROL : MD_TEXT_PLAIN,
                        answer_out, err);
}

int verb_tokenize(int argc, char **argv)
{
    filter_config config = {0};
    int code = cli_begin(&g_tokenize, &config, argc, argv, NULL, 0, NULL);
    if (code >= 0) {
        return code;
    }
    if (is_on(config.decode) && is_on(config.special)) {
        code = cli_complain(&g_tokenize, CLI_USAGE,
                            "--special says how text is read: it has no meaning with --decode");
    } else {
        code = filter_run(&g_tokenize, &config, tokenize_row);
    }
    cm_cfg_free(&g_tokenize, &config);
    return code;
}

/* ---- encode ---- */

static const cm_cfg_field g_encode_fields[] = {
    TOKENIZER_FIELD,
    {"profile", "G", "chat encoding of rows that do not say one",
     CM_CFG_CHOICE(filter_config, profile, "G|P")},
};

static const cm_cfg_table g_encode = {
    .program = "baleen encode",
    .summary = "JSON lines {\"level\": \"request\", \"endpoint\", \"body\"} or {\"level\": \"encoder\", "
               "\"messages\", "
               "\"mode\", \"effort\"} to {\"prompt\", \"ids\"}",
    .operands = "",
    .fields = g_encode_fields,
    .n_fields = sizeof(g_encode_fields) / sizeof(g_encode_fields[0]),
};

static cm_status encode_row(const filter_config *config, const json_t *row, json_t **answer_out,
                            cm_error *err)
{
    md_profile profile = config->profile[0] == 'P' ? MD_PROFILE_P : MD_PROFILE_G;
    return row_encode(config->opened, row, profile, false, answer_out, err);
}

int verb_encode(int argc, char **argv)
{
    filter_config config = {0};
    int code = cli_begin(&g_encode, &config, argc, argv, NULL, 0, NULL);
    if (code >= 0) {
        return code;
    }
    code = filter_run(&g_encode, &config, encode_row);
    cm_cfg_free(&g_encode, &config);
    return code;
}

/* ---- parse ---- */

static const cm_cfg_table g_parse = {
    .program = "baleen parse",
    .summary = "JSON lines {\"start\", \"tools\", \"prefix\", \"stop\", \"engine\", \"text\"} to "
               "{\"reasoning_content\", "
               "\"content\", \"tool_calls\", \"finish_reason\"}",
    .operands = "",
};

static cm_status parse_row(const filter_config *config, const json_t *row, json_t **answer_out, cm_error *err)
{
    (void)config;
    return row_parse(row, SIZE_MAX, 1, answer_out, err);
}

int verb_parse(int argc, char **argv)
{
    filter_config config = {0};
    int code = cli_begin(&g_parse, &config, argc, argv, NULL, 0, NULL);
    return code >= 0 ? code : filter_run(&g_parse, &config, parse_row);
}
