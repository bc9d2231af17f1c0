#include "common/proc/process.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "common/base/failpoint.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/net/net_mpi.h"

enum { EXIT_USAGE = 2, EXIT_TERMINATED = 130, READY_LINE_MAX = 4096 };

static int process_refuse(const cm_cfg_table *table, void *config, const cm_error *err)
{
    fprintf(stderr, "%s: %s\n", table->program, err->text);
    if (config != NULL) {
        cm_cfg_free(table, config);
    }
    return EXIT_USAGE;
}

int pc_process_begin(const cm_cfg_table *table, void *config, const pc_process_config *common, int argc,
                     char **argv, const char *role)
{
    cm_cfg_outcome outcome;
    cm_error err = {0};
    cm_log_options log = {.fd = STDERR_FILENO};
    if (cm_cfg_load(table, config, argc, argv, NULL, 0, NULL, &outcome, &err) != CM_OK) {
        return process_refuse(table, NULL, &err); /* load has freed what it read */
    }
    if (outcome == CM_CFG_EXIT) {
        cm_cfg_free(table, config);
        return 0;
    }
    cm_status status = cm_log_level_parse(common->log_level, &log.level);
    CM_ASSERT_MSG(status == CM_OK, "the table let log_level %s through", common->log_level);
    log.json = strcmp(common->log_format, "json") == 0;
    cm_log_setup(&log);
    cm_log_identity(role, -1);
    if (cm_failpoints_arm(common->failpoints, common->seed, &err) != CM_OK) {
        return process_refuse(table, config, &err);
    }
    return -1;
}

static cm_status process_share(const char *mine, char coordinator_out[NET_ADDRESS_BYTES], cm_error *err)
{
    const net_mpi_module *mpi = net_mpi_load(err);
    return mpi != NULL ? mpi->share(mine, coordinator_out, err) : CM_E_DEVICE;
}

cm_status pc_process_find_coordinator(const cm_cfg_table *table, void *config, const char *coordinator,
                                      cm_error *err)
{
    char address[NET_ADDRESS_BYTES];
    if (strcmp(coordinator, "mpi") != 0) {
        return CM_OK;
    }
    CM_TRY(process_share("", address, err));
    return cm_cfg_set(table, config, "coordinator", address, err);
}

cm_status pc_process_tell_address(const char *address, cm_error *err)
{
    char again[NET_ADDRESS_BYTES];
    return process_share(address, again, err);
}

static void ready_append_string(cm_bytes *line, const char *text)
{
    cm_bytes_append_text(line, "\"");
    for (; *text != '\0'; text++) {
        if (*text == '"' || *text == '\\') {
            cm_bytes_printf(line, "\\%c", *text);
        } else if ((unsigned char)*text < 0x20) {
            cm_bytes_printf(line, "\\u%04x", (unsigned)*text);
        } else {
            cm_bytes_append(line, text, 1);
        }
    }
    cm_bytes_append_text(line, "\"");
}

void pc_process_ready(const pc_process_config *common, const char *const *pairs)
{
    cm_bytes line;
    int fd = (int)common->ready_fd;
    if (fd == 0) {
        return;
    }
    cm_bytes_init(&line, READY_LINE_MAX);
    cm_bytes_printf(&line, "{\"pid\":%ld", (long)getpid());
    for (; pairs[0] != NULL; pairs += 2) {
        cm_bytes_append_text(&line, ",");
        ready_append_string(&line, pairs[0]);
        cm_bytes_append_text(&line, ":");
        ready_append_string(&line, pairs[1]);
    }
    cm_bytes_append_text(&line, "}\n");
    CM_ASSERT(!line.overflow);
    /* shorter than a pipe's atomic write */
    if (write(fd, line.data, line.len) != (ssize_t)line.len) {
        cm_warn("the launcher's descriptor %d: %s", fd, strerror(errno));
    }
    close(fd);
    cm_bytes_fini(&line);
}

/* ---- signals ---- */

static struct {
    pc_fn fn;
    void *arg;
} g_terminate;

static void terminate_again(int number)
{
    (void)number;
    _exit(EXIT_TERMINATED);
}

/* The second signal must end us even when the loop hangs, so it does not go through the loop. */
static void terminate_first(void *arg)
{
    struct sigaction at_once = {.sa_handler = terminate_again};
    (void)arg;
    sigemptyset(&at_once.sa_mask);
    sigaction(SIGTERM, &at_once, NULL);
    sigaction(SIGINT, &at_once, NULL);
    pc_fn fn = g_terminate.fn;
    g_terminate.fn = NULL;
    if (fn == NULL) {
        _exit(EXIT_TERMINATED); /* both signals came before the loop's turn */
    }
    fn(g_terminate.arg);
}

void pc_process_on_terminate(pc_loop *loop, pc_fn fn, void *arg)
{
    struct sigaction ignore = {.sa_handler = SIG_IGN};
    sigemptyset(&ignore.sa_mask);
    sigaction(SIGPIPE, &ignore, NULL);
    g_terminate.fn = fn;
    g_terminate.arg = arg;
    pc_loop_on_signal(loop, SIGTERM, terminate_first, NULL);
    pc_loop_on_signal(loop, SIGINT, terminate_first, NULL);
}
