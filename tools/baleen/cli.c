#include "tools/baleen/cli.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/base/assert.h"

static bool g_progress; /* a progress line is on the terminal */

int cli_begin(const cm_cfg_table *table, void *config, int argc, char **argv, const char **operands_out,
              size_t operands_max, size_t *n_operands_out)
{
    cm_cfg_outcome outcome;
    cm_error err = {0};
    if (cm_cfg_load(table, config, argc, argv, operands_out, operands_max, n_operands_out, &outcome, &err) !=
        CM_OK) {
        return cli_complain(table, CLI_USAGE, "%s", err.text);
    }
    if (outcome == CM_CFG_EXIT) {
        cm_cfg_free(table, config);
        return CLI_OK;
    }
    return -1;
}

int cli_complain(const cm_cfg_table *table, int code, const char *fmt, ...)
{
    va_list args;
    cli_progress_clear();
    fprintf(stderr, "%s: ", table->program);
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    fputc('\n', stderr);
    return code;
}

int cli_fail(const cm_cfg_table *table, const cm_error *err)
{
    return cli_complain(table, err->status == CM_E_CONFIG ? CLI_USAGE : CLI_FAILED, "%s",
                        err->text[0] != '\0' ? err->text : cm_status_text(err->status));
}

cm_status cli_parse_double(const char *option, const char *text, double min, double max, double *value_out,
                           cm_error *err)
{
    char *end;
    errno = 0;
    double value = strtod(text, &end);
    if (end == text || *end != '\0' || errno != 0 || !isfinite(value)) {
        return cm_error_set(err, CM_E_CONFIG, option, "%s: '%s' is not a number", option, text);
    }
    if (value < min || value > max) {
        return cm_error_set(err, CM_E_CONFIG, option, "%s: %s is outside %g..%g", option, text, min, max);
    }
    *value_out = value;
    return CM_OK;
}

void cli_progress(const char *fmt, ...)
{
    va_list args;
    if (!isatty(STDERR_FILENO)) {
        return;
    }
    fputs("\r\033[K", stderr);
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    fflush(stderr);
    g_progress = true;
}

void cli_progress_clear(void)
{
    if (g_progress) {
        fputs("\r\033[K", stderr);
        fflush(stderr);
        g_progress = false;
    }
}

void cli_format_bytes(uint64_t n_bytes, char out[32])
{
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB", "PB"};
    double value = (double)n_bytes;
    int unit = 0;
    while (value >= 999.5 && unit < 5) {
        value /= 1000;
        unit++;
    }
    snprintf(out, 32, unit == 0 ? "%.0f %s" : "%.2f %s", value, units[unit]);
}

static int append_piece(const char *piece, size_t n, void *text)
{
    cm_bytes_append(text, piece, n);
    return 0;
}

void cli_append_json(cm_bytes *text, const json_t *value, size_t flags)
{
    int rc = json_dump_callback(value, append_piece, text, flags);
    CM_ASSERT_MSG(rc == 0, "a value that is no JSON");
}

/* ---- the coordinator's channel ---- */

cm_status cli_open_certs(const char *dir, pc_tls **tls_out, cm_error *err)
{
    char ca[600], cert[600], key[600];
    pc_tls_config config = {
        .control_security = (char[]){"tls"}, .tls_ca = ca, .tls_cert = cert, .tls_key = key};
    snprintf(ca, sizeof(ca), "%.500s/ca.crt", dir);
    snprintf(cert, sizeof(cert), "%.500s/admin.crt", dir);
    snprintf(key, sizeof(key), "%.500s/admin.key", dir);
    return pc_tls_open(&config, "", "admin", tls_out, err); /* which address matters to plain only */
}

void cli_explain_channel(const char *address, pc_tls *tls, cm_status status, const cm_error *inner,
                         cm_error *err)
{
    char text[400];
    if (status == CM_E_UNAVAILABLE && tls != NULL && pc_tls_explain(tls, address, text, sizeof(text))) {
        cm_error_set(err, status, NULL, "%s", text);
        return;
    }
    bool may_be_tls = tls == NULL && strstr(inner->text, "Socket closed") != NULL;
    cm_error_set(err, status, NULL, "the coordinator at %s: %.250s%s", address,
                 inner->text[0] != '\0' ? inner->text : cm_status_text(status),
                 may_be_tls ? "; if it wants TLS, give --tls-ca, --tls-cert and --tls-key" : "");
}
