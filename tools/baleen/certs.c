/* baleen certs: the certificates of a cluster whose control channel is secured. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tools/baleen/cert_maker.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/verbs.h"

enum { CERTS_DAY_S = 86400, CERTS_AUTHORITY_DAYS = 3650 };

typedef struct certs_config {
    char *hosts;
    uint64_t days;
    bool renew;
} certs_config;

static const cm_cfg_field g_fields[] = {
    {"hosts", "localhost,127.0.0.1,::1",
     "names and addresses under which members reach the coordinator, comma separated",
     CM_CFG_STRING(certs_config, hosts)},
    {"days", "397", "how long the roles' certificates are valid",
     CM_CFG_UINT(certs_config, days, 1, CERTS_AUTHORITY_DAYS)},
    {"renew", "off",
     "replace the roles' certificates by new ones of the authority that is in DIR; say --hosts as before",
     CM_CFG_BOOL(certs_config, renew)},
};

static const cm_cfg_table g_table = {
    .program = "baleen certs",
    .summary = "makes an authority and one certificate for each role, in DIR: NAME.crt and NAME.key, "
               "readable by their owner "
               "only. Give each machine ca.crt and the pairs of the roles it runs; keep ca.key to yourself",
    .operands = "DIR",
    .fields = g_fields,
    .n_fields = sizeof(g_fields) / sizeof(g_fields[0]),
};

/* Nothing of a set that may be in use is written over. */
static cm_status certs_refuse_existing(const char *dir, cm_error *err)
{
    static const char *const suffixes[] = {"crt", "key"};
    for (uint32_t i = 0; i < 2 * (CERT_ROLES + 1); i++) {
        char path[512];
        const char *name = i / 2 < CERT_ROLES ? cert_roles[i / 2] : "ca";
        snprintf(path, sizeof(path), "%s/%s.%s", dir, name, suffixes[i % 2]);
        if (access(path, F_OK) == 0) {
            return cm_error_set(
                err, CM_E_EXISTS, "DIR",
                "%s is there already and is not written over: give another folder, or --renew for new "
                "certificates of the same authority",
                path);
        }
    }
    return CM_OK;
}

static cm_status certs_authority(const certs_config *config, const char *dir, cert_authority **authority_out,
                                 cm_error *err)
{
    if (config->renew) {
        return cert_authority_load(dir, authority_out, err);
    }
    if (mkdir(dir, 0700) != 0 && errno != EEXIST) {
        return cm_error_set(err, CM_E_IO, "DIR", "cannot make %s: %s", dir, strerror(errno));
    }
    CM_TRY(certs_refuse_existing(dir, err));
    return cert_authority_create((int64_t)CERTS_AUTHORITY_DAYS * CERTS_DAY_S, authority_out, err);
}

static cm_status certs_make(const certs_config *config, const char *dir, cm_error *err)
{
    cert_authority *authority;
    CM_TRY(certs_authority(config, dir, &authority, err));
    cm_status status = CM_OK;
    for (uint32_t i = 0; i < CERT_ROLES && status == CM_OK; i++) {
        cert_request request = {.role = cert_roles[i],
                                .hosts = config->hosts,
                                .from_s = -CERT_CLOCK_SKEW_S,
                                .until_s = (int64_t)config->days * CERTS_DAY_S};
        status = cert_make(authority, dir, &request, err);
    }
    if (status == CM_OK && !config->renew) {
        status = cert_authority_save(authority, dir, err);
    }
    cert_authority_destroy(authority);
    return status;
}

int verb_certs(int argc, char **argv)
{
    certs_config config = {0};
    cm_error err = {0};
    const char *dir = NULL;
    size_t n_dir = 0;
    int code = cli_begin(&g_table, &config, argc, argv, &dir, 1, &n_dir);
    if (code >= 0) {
        return code;
    }
    if (n_dir == 0) {
        code = cli_complain(&g_table, CLI_USAGE, "where to? give a folder: baleen certs DIR");
    } else if (certs_make(&config, dir, &err) != CM_OK) {
        code = cli_fail(&g_table, &err);
    } else {
        printf("%s certificates of %s for %s, valid for %llu days\n",
               config.renew ? "renewed the" : "made the", dir, config.hosts, (unsigned long long)config.days);
        code = CLI_OK;
    }
    cm_cfg_free(&g_table, &config);
    return code;
}
