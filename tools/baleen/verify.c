/* baleen verify: a checkpoint against the closed list, then every value of every tensor. */
#include <stdio.h>
#include <xxhash.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/model/checkpoint.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/verbs.h"

static const cm_cfg_table g_table = {
    .program = "baleen verify",
    .summary =
        "holds a checkpoint against the list of tensors its config.json demands, then reads every value",
    .operands = "DIR",
};

enum { VERIFY_BAR = 30, VERIFY_REDRAW_MS = 100 };

typedef struct verify_run {
    const md_checkpoint *checkpoint;
    uint32_t n_wrong;
    uint64_t n_tensors, n_bytes;
    uint64_t begin_ms, drawn_ms;
    XXH3_state_t *digest; /* of all data in the order of the closed list */
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

static bool verify_tensor(void *ctx, const md_expect *expect)
{
    verify_run *run = ctx;
    cm_error err = {0};
    const md_tensor *tensor = md_checkpoint_tensor(run->checkpoint, "%s", expect->name);
    if (md_tensor_check_values(tensor, md_checkpoint_geometry(run->checkpoint), &err) != CM_OK) {
        md_finding finding;
        snprintf(finding.name, sizeof(finding.name), "%s", tensor->name);
        snprintf(finding.text, sizeof(finding.text), "%.255s", err.text);
        verify_finding(run, &finding);
    }
    /* also reads what has no forbidden values */
    XXH3_128bits_update(run->digest, tensor->data, (size_t)tensor->n_bytes);
    run->n_tensors++;
    run->n_bytes += tensor->n_bytes;
    verify_draw(run);
    return true;
}

static int verify_values(verify_run *run)
{
    char fingerprint[33], size[32];
    cm_error err = {0};
    XXH128_canonical_t canonical;
    run->digest = XXH3_createState();
    CM_ASSERT_MSG(run->digest != NULL, "no memory for a digest's state");
    XXH3_128bits_reset(run->digest);
    md_expect_each(md_checkpoint_geometry(run->checkpoint), verify_tensor, run);
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(run->digest));
    XXH3_freeState(run->digest);
    cli_progress_clear();
    cli_format_bytes(run->n_bytes, size);
    printf("%s%llu tensors, %s (%llu bytes), %.0f MB/s\n", run->n_wrong > 0 ? "\n" : "",
           (unsigned long long)run->n_tensors, size, (unsigned long long)run->n_bytes,
           (double)run->n_bytes / 1e6 / verify_seconds(run));
    printf("data         ");
    for (size_t i = 0; i < sizeof(canonical.digest); i++) {
        printf("%02x", canonical.digest[i]);
    }
    printf("\n");
    if (md_checkpoint_fingerprint(run->checkpoint, fingerprint, &err) != CM_OK) {
        return cli_fail(&g_table, &err);
    }
    printf("fingerprint  %s\n", fingerprint);
    return CLI_OK;
}

int verb_verify(int argc, char **argv)
{
    char config; /* no options of its own */
    const char *dir;
    size_t n_operands;
    verify_run run = {.begin_ms = cm_now_ms()};
    md_checkpoint *checkpoint;
    cm_error err = {0};
    int code = cli_begin(&g_table, &config, argc, argv, &dir, 1, &n_operands);
    if (code >= 0) {
        return code;
    }
    if (n_operands == 0) {
        return cli_complain(&g_table, CLI_USAGE, "which folder? usage: baleen verify DIR");
    }
    cm_status status = md_checkpoint_open(dir, &checkpoint, verify_finding, &run, &err);
    if (status != CM_OK) {
        if (run.n_wrong == 0) {
            return cli_complain(&g_table, CLI_FAILED, "%s", err.text);
        }
        printf("\n%u wrong: not read further\n", run.n_wrong);
        return CLI_FAILED;
    }
    run.checkpoint = checkpoint;
    code = verify_values(&run);
    if (run.n_wrong > 0) {
        printf("%u tensors hold wrong values\n", run.n_wrong);
        code = CLI_FAILED;
    } else if (code == CLI_OK) {
        printf("%s is in order\n", dir);
    }
    md_checkpoint_close(checkpoint);
    return code;
}
