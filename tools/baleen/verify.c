/* baleen verify: a checkpoint against the closed list, every value of every tensor, and the manifest beside
 * it. */
#include <stdio.h>
#include <string.h>

#include "common/base/bytes.h"
#include "common/base/clock.h"
#include "common/model/checkpoint.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/manifest.h"
#include "tools/baleen/verbs.h"

typedef struct verify_config {
    bool write;
} verify_config;

static const cm_cfg_field g_fields[] = {
    {"write", "off", "when all is in order, write the digest of every tensor to DIR/" MANIFEST_NAME,
     CM_CFG_BOOL(verify_config, write)},
};

static const cm_cfg_table g_table = {
    .program = "baleen verify",
    .summary =
        "holds a checkpoint against the list of tensors its config.json demands, then reads every value and "
        "compares it with the manifest, if there is one",
    .operands = "DIR",
    .fields = g_fields,
    .n_fields = sizeof(g_fields) / sizeof(g_fields[0]),
};

enum { VERIFY_BAR = 30, VERIFY_REDRAW_MS = 100 };

typedef struct verify_run {
    const md_checkpoint *checkpoint;
    uint32_t n_wrong;
    uint64_t n_tensors, n_bytes;
    uint64_t begin_ms, drawn_ms;
    const manifest *kept; /* the one beside the checkpoint; NULL: none, or to be written */
    manifest *found;      /* what was read */
    cm_bytes digests;     /* of all tensors in the order of the closed list */
} verify_run;

static void verify_finding(void *ctx, const md_finding *finding)
{
    verify_run *run = ctx;
    cli_progress_clear();
    if (run->n_wrong++ == 0) {
        printf("%-48s  what is wrong\n", "tensor or file");
    }
    printf("%-48s  %s\n", finding->name, finding->text);
}

static double verify_seconds(const verify_run *run)
{
    return (double)(cm_now_ms() - run->begin_ms + 1) / 1e3;
}

static void verify_draw(verify_run *run)
{
    uint64_t now_ms = cm_now_ms(), total = md_checkpoint_bytes(run->checkpoint);
    if (now_ms - run->drawn_ms < VERIFY_REDRAW_MS) {
        return;
    }
    char have[32], all[32];
    double share = total > 0 ? (double)run->n_bytes / (double)total : 1;
    int n = (int)(share * VERIFY_BAR);
    run->drawn_ms = now_ms;
    cli_format_bytes(run->n_bytes, have);
    cli_format_bytes(total, all);
    cli_progress("[%.*s%.*s] %3.0f%%  %s of %s  %.0f MB/s", n, "##############################",
                 VERIFY_BAR - n, "..............................", share * 100, have, all,
                 (double)run->n_bytes / 1e6 / verify_seconds(run));
}

static void verify_wrong(verify_run *run, const char *name, const char *text)
{
    md_finding finding;
    snprintf(finding.name, sizeof(finding.name), "%.95s", name);
    snprintf(finding.text, sizeof(finding.text), "%.255s", text);
    verify_finding(run, &finding);
}

static void verify_digest(verify_run *run, const md_tensor *tensor)
{
    manifest_digest digest = manifest_digest_of(tensor->data, (size_t)tensor->n_bytes);
    cm_bytes_append(&run->digests, digest.bytes, sizeof(digest.bytes));
    manifest_put(run->found, tensor->name, digest.hex);
    const char *kept = run->kept != NULL ? manifest_find(run->kept, tensor->name) : digest.hex;
    if (kept == NULL) {
        verify_wrong(run, tensor->name, "is not in the manifest");
    } else if (strcmp(kept, digest.hex) != 0) {
        verify_wrong(run, tensor->name, "holds other bytes than when the manifest was written");
    }
}

static bool verify_tensor(void *ctx, const md_expect *expect)
{
    verify_run *run = ctx;
    cm_error err = {0};
    const md_tensor *tensor = md_checkpoint_tensor(run->checkpoint, "%s", expect->name);
    if (md_tensor_check_values(tensor, md_checkpoint_geometry(run->checkpoint), &err) != CM_OK) {
        verify_wrong(run, tensor->name, err.text);
    }
    verify_digest(run, tensor);
    run->n_tensors++;
    run->n_bytes += tensor->n_bytes;
    verify_draw(run);
    return true;
}

static void verify_extra(void *ctx, const char *name)
{
    verify_wrong(ctx, name, "is in the manifest, but not in the checkpoint");
}

static void verify_config_change(void *ctx, const char *path, const char *was, const char *is)
{
    char text[256];
    snprintf(text, sizeof(text), "%.80s is %.60s, and was %.60s when the manifest was written", path, is,
             was);
    verify_wrong(ctx, "config.json", text);
}

/* What the manifest says beyond the digests of the tensors that are there. */
static void verify_rest(verify_run *run, const char *fingerprint)
{
    manifest_each_extra(run->kept, run->found, verify_extra, run);
    manifest_each_config_change(run->kept, md_checkpoint_dir(run->checkpoint), verify_config_change, run);
    if (run->n_wrong == 0 && strcmp(manifest_fingerprint(run->kept), fingerprint) != 0) {
        verify_wrong(
            run, MANIFEST_NAME,
            "is of another fingerprint: the text of config.json or of a shard's header changed since it "
            "was written");
    }
}

static cm_status verify_values(verify_run *run, char fingerprint_out[33], cm_error *err)
{
    char size[32];
    md_expect_each(md_checkpoint_geometry(run->checkpoint), verify_tensor, run);
    CM_TRY(md_checkpoint_fingerprint(run->checkpoint, fingerprint_out, err));
    if (run->kept != NULL) {
        verify_rest(run, fingerprint_out);
    }
    cli_progress_clear();
    cli_format_bytes(run->n_bytes, size);
    printf("%s%llu tensors, %s (%llu bytes), %.0f MB/s\n", run->n_wrong > 0 ? "\n" : "",
           (unsigned long long)run->n_tensors, size, (unsigned long long)run->n_bytes,
           (double)run->n_bytes / 1e6 / verify_seconds(run));
    printf("data         %s\n", manifest_digest_of(run->digests.data, run->digests.len).hex);
    printf("fingerprint  %s\n", fingerprint_out);
    return CM_OK;
}

/* The answer's last lines. */
static int verify_conclude(verify_run *run, const verify_config *config, const char *dir,
                           const char *fingerprint)
{
    cm_error err = {0};
    if (run->n_wrong > 0) {
        printf("%u wrong%s\n", run->n_wrong, config->write ? ": no manifest is written" : "");
        return CLI_FAILED;
    }
    if (config->write && manifest_save(run->found, dir, fingerprint, &err) != CM_OK) {
        return cli_fail(&g_table, &err);
    }
    printf("manifest     %s\n", config->write       ? "written"
                                : run->kept != NULL ? "agrees"
                                                    : "none (--write makes one)");
    printf("%s is in order\n", dir);
    return CLI_OK;
}

static int verify_open(verify_run *run, const verify_config *config, const char *dir)
{
    char fingerprint[33];
    md_checkpoint *checkpoint;
    cm_error err = {0};
    if (md_checkpoint_open(dir, &checkpoint, verify_finding, run, &err) != CM_OK) {
        if (run->n_wrong == 0) {
            return cli_complain(&g_table, CLI_FAILED, "%s", err.text);
        }
        printf("\n%u wrong: not read further\n", run->n_wrong);
        return CLI_FAILED;
    }
    run->checkpoint = checkpoint;
    int code = verify_values(run, fingerprint, &err) == CM_OK ? verify_conclude(run, config, dir, fingerprint)
                                                              : cli_fail(&g_table, &err);
    md_checkpoint_close(checkpoint);
    return code;
}

static int verify_dir(const verify_config *config, const char *dir)
{
    manifest *kept = NULL;
    cm_error err = {0};
    if (!config->write && manifest_load(dir, &kept, &err) != CM_OK) {
        return cli_fail(&g_table, &err);
    }
    verify_run run = {.begin_ms = cm_now_ms(), .kept = kept, .found = manifest_create()};
    cm_bytes_init(&run.digests, 0);
    int code = verify_open(&run, config, dir);
    cm_bytes_fini(&run.digests);
    manifest_destroy(run.found);
    manifest_destroy(kept);
    return code;
}

int verb_verify(int argc, char **argv)
{
    verify_config config = {0};
    const char *dir;
    size_t n_operands;
    int code = cli_begin(&g_table, &config, argc, argv, &dir, 1, &n_operands);
    if (code >= 0) {
        return code;
    }
    code = n_operands == 0 ? cli_complain(&g_table, CLI_USAGE, "which folder? usage: baleen verify DIR")
                           : verify_dir(&config, dir);
    cm_cfg_free(&g_table, &config);
    return code;
}
