#include "common/base/config.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/log.h"
#include "common/base/mem.h"

extern char **environ;

static const cm_cfg_field *cfg_find(const cm_cfg_table *table, const char *name, size_t len)
{
    for (size_t i = 0; i < table->n_fields; i++) {
        const char *have = table->fields[i].name;
        if (strlen(have) != len) {
            continue;
        }
        size_t k = 0;
        while (k < len && (have[k] == name[k] || (have[k] == '_' && name[k] == '-'))) {
            k++;
        }
        if (k == len) {
            return &table->fields[i];
        }
    }
    return NULL;
}

static cm_status cfg_parse_number(const cm_cfg_field *field, const char *value, uint64_t *out, cm_error *err)
{
    char *end;
    errno = 0;
    unsigned long long n = strtoull(value, &end, 10);
    uint64_t unit = 1;
    bool known = true;
    if (!isdigit((unsigned char)value[0]) || errno != 0) {
        return cm_error_set(err, CM_E_CONFIG, field->name, "%s: '%s' is not a number", field->name, value);
    }
    if (*end != '\0') {
        if (field->type == CM_CFG_TYPE_MS) {
            known = true;
            unit = strcmp(end, "ms") == 0  ? 1
                   : strcmp(end, "s") == 0 ? 1000
                   : strcmp(end, "m") == 0 ? 60000
                                           : 0;
        } else if (field->type == CM_CFG_TYPE_BYTES) {
            char c = (char)tolower((unsigned char)end[0]);
            unit = end[1] != '\0' ? 0 : c == 'k' ? 1u << 10 : c == 'm' ? 1u << 20 : c == 'g' ? 1u << 30 : 0;
        } else {
            unit = 0;
        }
        known = unit != 0;
    }
    if (!known) {
        return cm_error_set(err, CM_E_CONFIG, field->name, "%s: '%s' has an unknown unit '%s'", field->name,
                            value, end);
    }
    if (n > UINT64_MAX / unit || n * unit < field->min || n * unit > field->max) {
        return cm_error_set(err, CM_E_CONFIG, field->name, "%s: %s is outside %llu..%llu", field->name, value,
                            (unsigned long long)field->min, (unsigned long long)field->max);
    }
    *out = n * unit;
    return CM_OK;
}

static cm_status cfg_parse_bool(const cm_cfg_field *field, const char *value, bool *out, cm_error *err)
{
    static const char *const yes[] = {"on", "true", "1", "yes"}, *const no[] = {"off", "false", "0", "no"};
    for (int i = 0; i < 4; i++) {
        if (strcmp(value, yes[i]) == 0 || strcmp(value, no[i]) == 0) {
            *out = strcmp(value, yes[i]) == 0;
            return CM_OK;
        }
    }
    return cm_error_set(err, CM_E_CONFIG, field->name, "%s: '%s' is neither on nor off", field->name, value);
}

static bool cfg_choice_known(const char *choices, const char *value)
{
    size_t n = strlen(value);
    for (const char *at = choices; at != NULL; at = strchr(at, '|')) {
        at += *at == '|';
        if (n > 0 && strncmp(at, value, n) == 0 && (at[n] == '|' || at[n] == '\0')) {
            return true;
        }
    }
    return false;
}

static cm_status cfg_assign(const cm_cfg_field *field, void *config, const char *value, cm_error *err)
{
    void *at = (char *)config + field->offset;
    switch (field->type) {
    case CM_CFG_TYPE_CHOICE:
        if (!cfg_choice_known(field->choices, value)) {
            return cm_error_set(err, CM_E_CONFIG, field->name, "%s: '%s' is none of %s", field->name, value,
                                field->choices);
        }
        /* fall through */
    case CM_CFG_TYPE_STRING: {
        char *copy = cm_strdup(value);
        cm_free(*(char **)at);
        *(char **)at = copy;
        return CM_OK;
    }
    case CM_CFG_TYPE_BOOL:
        return cfg_parse_bool(field, value, at, err);
    case CM_CFG_TYPE_UINT:
    case CM_CFG_TYPE_MS:
    case CM_CFG_TYPE_BYTES:
        return cfg_parse_number(field, value, at, err);
    }
    CM_ASSERT_MSG(false, "option %s has type %d", field->name, (int)field->type);
    return CM_E_CONFIG;
}

void cm_cfg_defaults(const cm_cfg_table *table, void *config)
{
    for (size_t i = 0; i < table->n_fields; i++) {
        cm_error err;
        if (table->fields[i].type == CM_CFG_TYPE_STRING || table->fields[i].type == CM_CFG_TYPE_CHOICE) {
            *(char **)((char *)config + table->fields[i].offset) = NULL;
        }
        cm_status status = cfg_assign(&table->fields[i], config, table->fields[i].default_value, &err);
        CM_ASSERT_MSG(status == CM_OK, "default of option: %s", err.text);
    }
}

cm_status cm_cfg_set(const cm_cfg_table *table, void *config, const char *name, const char *value,
                     cm_error *err)
{
    const cm_cfg_field *field = cfg_find(table, name, strlen(name));
    if (field == NULL) {
        return cm_error_set(err, CM_E_CONFIG, name, "unknown option '%s'; --help lists them", name);
    }
    return cfg_assign(field, config, value, err);
}

void cm_cfg_free(const cm_cfg_table *table, void *config)
{
    for (size_t i = 0; i < table->n_fields; i++) {
        if (table->fields[i].type == CM_CFG_TYPE_STRING || table->fields[i].type == CM_CFG_TYPE_CHOICE) {
            char **at = (char **)((char *)config + table->fields[i].offset);
            cm_free(*at);
            *at = NULL;
        }
    }
}

static char *cfg_trim(char *text)
{
    while (isspace((unsigned char)*text)) {
        text++;
    }
    size_t n = strlen(text);
    while (n > 0 && isspace((unsigned char)text[n - 1])) {
        text[--n] = '\0';
    }
    return text;
}

static cm_status cfg_load_file(const cm_cfg_table *table, void *config, const char *path, cm_error *err)
{
    char line[4096];
    cm_status status = CM_OK;
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        return cm_error_set(err, CM_E_CONFIG, "config", "config file %s: %s", path, strerror(errno));
    }
    for (int i = 1; status == CM_OK && fgets(line, sizeof(line), file) != NULL; i++) {
        char *text = cfg_trim(line);
        if (*text == '\0' || *text == '#') {
            continue;
        }
        char *equals = strchr(text, '=');
        if (equals == NULL) {
            status = cm_error_set(err, CM_E_CONFIG, "config", "%s line %d: no '=' in '%.60s'", path, i, text);
            break;
        }
        *equals = '\0';
        cm_error inner;
        status = cm_cfg_set(table, config, cfg_trim(text), cfg_trim(equals + 1), &inner);
        if (status != CM_OK) {
            cm_error_set(err, status, inner.field, "%s line %d: %.300s", path, i, inner.text);
        }
    }
    fclose(file);
    return status;
}

static cm_status cfg_load_environment(const cm_cfg_table *table, void *config, cm_error *err)
{
    for (char **at = environ; *at != NULL; at++) {
        static const char prefix[] = "BALEEN_";
        if (strncmp(*at, prefix, sizeof(prefix) - 1) != 0) {
            continue;
        }
        const char *name = *at + sizeof(prefix) - 1, *equals = strchr(name, '=');
        if (equals == NULL || equals - name > 100) {
            continue;
        }
        char lower[104];
        size_t n = (size_t)(equals - name);
        for (size_t i = 0; i < n; i++) {
            lower[i] = (char)tolower((unsigned char)name[i]);
        }
        const cm_cfg_field *field = cfg_find(table, lower, n);
        if (field == NULL) {
            cm_warn("environment variable %s%.*s is no option of %s and is ignored", prefix, (int)n, name,
                    table->program);
            continue;
        }
        CM_TRY(cfg_assign(field, config, equals + 1, err));
    }
    return CM_OK;
}

typedef struct cfg_args {
    const char **operands;
    size_t operands_max, n_operands;
    bool help, print, version;
    const char *file;
} cfg_args;

/* Two passes over argv: the first (config NULL) finds --config, --help and --print-config, the second
 * assigns. */
static cm_status cfg_walk_args(const cm_cfg_table *table, void *config, int argc, char **argv, cfg_args *args,
                               cm_error *err)
{
    bool only_operands = false;
    args->n_operands = 0;
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i];
        if (only_operands || strncmp(word, "--", 2) != 0) {
            if (word[0] == '-' && word[1] != '\0' && !only_operands) {
                return cm_error_set(err, CM_E_CONFIG, word, "unknown option '%s'; options are written --name",
                                    word);
            }
            if (args->n_operands == args->operands_max) {
                return cm_error_set(err, CM_E_CONFIG, word, "unexpected word '%s'", word);
            }
            args->operands[args->n_operands++] = word;
            continue;
        }
        if (word[2] == '\0') {
            only_operands = true;
            continue;
        }
        const char *name = word + 2, *equals = strchr(name, '=');
        size_t n = equals != NULL ? (size_t)(equals - name) : strlen(name);
        if (n == 4 && strncmp(name, "help", n) == 0) {
            args->help = true;
            continue;
        }
        if (n == 7 && strncmp(name, "version", n) == 0) {
            args->version = true;
            continue;
        }
        if (n == 12 && strncmp(name, "print-config", n) == 0) {
            args->print = true;
            continue;
        }
        bool is_file = n == 6 && strncmp(name, "config", n) == 0;
        const cm_cfg_field *field = cfg_find(table, name, n);
        if (field == NULL && !is_file) {
            return cm_error_set(err, CM_E_CONFIG, word, "unknown option '--%.*s'; --help lists them", (int)n,
                                name);
        }
        const char *value = equals != NULL ? equals + 1 : NULL;
        if (value == NULL && !is_file && field->type == CM_CFG_TYPE_BOOL) {
            value = "on";
        }
        if (value == NULL) {
            if (i + 1 == argc) {
                return cm_error_set(err, CM_E_CONFIG, word, "option %s needs a value", word);
            }
            value = argv[++i];
        }
        if (is_file) {
            args->file = value;
        } else if (config != NULL) {
            CM_TRY(cfg_assign(field, config, value, err));
        }
    }
    return CM_OK;
}

cm_status cm_cfg_load(const cm_cfg_table *table, void *config, int argc, char **argv,
                      const char **operands_out, size_t operands_max, size_t *n_operands_out,
                      cm_cfg_outcome *outcome_out, cm_error *err)
{
    cfg_args args = {.operands = operands_out, .operands_max = operands_max};
    cm_cfg_defaults(table, config);
    cm_status status = cfg_walk_args(table, NULL, argc, argv, &args, err);
    if (args.help) {
        cm_cfg_print_help(table, stdout);
        *outcome_out = CM_CFG_EXIT;
        return CM_OK;
    }
    if (args.version) {
        printf("%s %s\n", table->program, BALEEN_VERSION);
        *outcome_out = CM_CFG_EXIT;
        return CM_OK;
    }
    if (status == CM_OK && args.file != NULL) {
        status = cfg_load_file(table, config, args.file, err);
    }
    if (status == CM_OK) {
        status = cfg_load_environment(table, config, err);
    }
    if (status == CM_OK) {
        status = cfg_walk_args(table, config, argc, argv, &args, err);
    }
    if (status != CM_OK) {
        cm_cfg_free(table, config);
        return status;
    }
    if (args.print) {
        cm_cfg_print(table, config, stdout);
    }
    if (n_operands_out != NULL) {
        *n_operands_out = args.n_operands;
    }
    *outcome_out = args.print ? CM_CFG_EXIT : CM_CFG_RUN;
    return CM_OK;
}

static void cfg_print_flag(const cm_cfg_field *field, FILE *to)
{
    static const char *const value_names[] = {"TEXT", "on|off", "N", "MS", "BYTES", ""};
    char flag[160];
    int n = snprintf(flag, sizeof(flag), "  --%s %s", field->name,
                     field->type == CM_CFG_TYPE_CHOICE ? field->choices : value_names[field->type]);
    for (int i = 2; i < n && flag[i] != ' '; i++) {
        flag[i] = flag[i] == '_' ? '-' : flag[i];
    }
    fprintf(to, "%-34s %s", flag, field->doc);
    if (field->type != CM_CFG_TYPE_BOOL || strcmp(field->default_value, "off") != 0) {
        fprintf(to, " (default %s)", field->default_value[0] != '\0' ? field->default_value : "none");
    }
    fputc('\n', to);
}

void cm_cfg_print_help(const cm_cfg_table *table, FILE *to)
{
    fprintf(to, "%s: %s\n\nusage: %s [options]%s%s\n\n", table->program, table->summary, table->program,
            table->operands[0] != '\0' ? " " : "", table->operands);
    for (size_t i = 0; i < table->n_fields; i++) {
        cfg_print_flag(&table->fields[i], to);
    }
    fprintf(to,
            "  --config FILE                    lines 'name = value', # comments; flags and environment win\n"
            "  --print-config                   print what is in force, in the file's format, and exit\n"
            "  --version, --help\n\n"
            "Each option can also be set as environment variable BALEEN_NAME.\n");
}

void cm_cfg_print(const cm_cfg_table *table, const void *config, FILE *to)
{
    fprintf(to, "# %s %s\n", table->program, BALEEN_VERSION);
    for (size_t i = 0; i < table->n_fields; i++) {
        const cm_cfg_field *field = &table->fields[i];
        const void *at = (const char *)config + field->offset;
        fprintf(to, "\n# %s\n%s = ", field->doc, field->name);
        switch (field->type) {
        case CM_CFG_TYPE_STRING:
        case CM_CFG_TYPE_CHOICE:
            fprintf(to, "%s\n", *(char *const *)at);
            break;
        case CM_CFG_TYPE_BOOL:
            fprintf(to, "%s\n", *(const bool *)at ? "on" : "off");
            break;
        case CM_CFG_TYPE_UINT:
        case CM_CFG_TYPE_MS:
        case CM_CFG_TYPE_BYTES:
            fprintf(to, "%llu\n", (unsigned long long)*(const uint64_t *)at);
            break;
        }
    }
}

const char *cm_env_get(const char *name)
{
    return getenv(name);
}

void cm_env_default(const char *name, const char *value)
{
    int rc = setenv(name, value, 0);
    CM_ASSERT_MSG(rc == 0, "environment variable %s", name);
}
