#include "tools/bench/bench_ucx.h"

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/mem.h"

enum { ADDRESS_MAX = 4096, PINGS = 20000 };

typedef struct ucx_end {
    ucp_context_h context;
    ucp_worker_h worker;
    ucp_ep_h ep;
    uint64_t n_received;
} ucx_end;

struct bench_ucx {
    ucx_end end;
    pid_t pid;
    int to, from; /* pipes */
};

static ucs_status_t end_on_message(void *arg, const void *header, size_t header_length, void *data,
                                   size_t length, const ucp_am_recv_param_t *param)
{
    (void)header;
    (void)header_length;
    (void)data;
    (void)length;
    (void)param;
    ((ucx_end *)arg)->n_received++;
    return UCS_OK;
}

static bool end_open(ucx_end *end)
{
    ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES, .features = UCP_FEATURE_AM};
    ucp_worker_params_t worker = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                                  .thread_mode = UCS_THREAD_MODE_SINGLE};
    ucp_am_handler_param_t handler = {.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID |
                                                    UCP_AM_HANDLER_PARAM_FIELD_CB |
                                                    UCP_AM_HANDLER_PARAM_FIELD_ARG,
                                      .id = 0,
                                      .cb = end_on_message,
                                      .arg = end};
    return ucp_init(&params, NULL, &end->context) == UCS_OK &&
           ucp_worker_create(end->context, &worker, &end->worker) == UCS_OK &&
           ucp_worker_set_am_recv_handler(end->worker, &handler) == UCS_OK;
}

/* Ours out, theirs in, then an endpoint to them. */
static bool end_connect(ucx_end *end, int to, int from)
{
    ucp_address_t *address;
    size_t n_bytes = 0;
    uint8_t theirs[ADDRESS_MAX] = {0}, ours[ADDRESS_MAX] = {0};
    if (ucp_worker_get_address(end->worker, &address, &n_bytes) != UCS_OK || n_bytes > sizeof(ours)) {
        return false;
    }
    memcpy(ours, address, n_bytes);
    ucp_worker_release_address(end->worker, address);
    bool ok = write(to, ours, sizeof(ours)) == sizeof(ours);
    for (size_t at = 0; at < sizeof(theirs) && ok;) {
        ssize_t n = read(from, theirs + at, sizeof(theirs) - at);
        ok = n > 0;
        at += ok ? (size_t)n : 0;
    }
    ucp_ep_params_t params = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS,
                              .address = (const ucp_address_t *)theirs};
    return ok && ucp_ep_create(end->worker, &params, &end->ep) == UCS_OK;
}

static void end_send(ucx_end *end)
{
    static const uint64_t word = 1;
    ucp_request_param_t param = {0};
    ucs_status_ptr_t request = ucp_am_send_nbx(end->ep, 0, NULL, 0, &word, sizeof(word), &param);
    while (UCS_PTR_IS_PTR(request) && ucp_request_check_status(request) == UCS_INPROGRESS) {
        ucp_worker_progress(end->worker);
    }
    if (UCS_PTR_IS_PTR(request)) {
        ucp_request_free(request);
    }
}

static void end_await(ucx_end *end, uint64_t n)
{
    while (end->n_received < n) {
        ucp_worker_progress(end->worker);
    }
}

_Noreturn static void other_process(int to, int from)
{
    ucx_end end = {0};
    char word;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    bool ok = end_open(&end) && end_connect(&end, to, from);
    while (ok && read(from, &word, 1) == 1) {
        uint64_t begin = end.n_received;
        for (uint64_t i = 1; i <= PINGS; i++) {
            end_await(&end, begin + i);
            end_send(&end);
        }
    }
    for (;;) {
        raise(SIGKILL);
    }
}

cm_status bench_ucx_open(bench_ucx **ucx_out, cm_error *err)
{
    int there[2], back[2];
    if (pipe(there) != 0 || pipe(back) != 0) {
        return cm_error_set(err, CM_E_IO, NULL, "no pipe: %s", strerror(errno));
    }
    bench_ucx *u = cm_alloc(sizeof(*u));
    u->pid = fork();
    if (u->pid == 0) {
        close(there[1]);
        close(back[0]);
        other_process(back[1], there[0]);
    }
    close(there[0]);
    close(back[1]);
    u->to = there[1];
    u->from = back[0];
    *ucx_out = u;
    if (u->pid < 0) {
        bench_ucx_close(u);
        *ucx_out = NULL;
        return cm_error_set(err, CM_E_IO, NULL, "no new process: %s", strerror(errno));
    }
    return CM_OK;
}

static void ucx_connect(bench_ucx *u)
{
    bool ok = end_open(&u->end) && end_connect(&u->end, u->to, u->from);
    CM_ASSERT_MSG(ok, "UCX does not connect two processes");
}

void bench_ucx_close(bench_ucx *u)
{
    if (u->pid > 0) {
        kill(u->pid, SIGKILL);
        waitpid(u->pid, NULL, 0);
    }
    if (u->end.worker != NULL) {
        ucp_worker_destroy(u->end.worker);
    }
    if (u->end.context != NULL) {
        ucp_cleanup(u->end.context);
    }
    close(u->to);
    close(u->from);
    cm_free(u);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_ucx_one_way_us(bench_ucx *u)
{
    static double times[PINGS];
    if (u->end.ep == NULL) {
        ucx_connect(u);
    }
    uint64_t begin = u->end.n_received;
    if (write(u->to, "g", 1) != 1) {
        return 0;
    }
    for (uint64_t i = 1; i <= PINGS; i++) {
        uint64_t t = cm_now_ns();
        end_send(&u->end);
        end_await(&u->end, begin + i);
        times[i - 1] = 1e-3 * (double)(cm_now_ns() - t);
    }
    qsort(times, PINGS, sizeof(times[0]), by_value);
    return times[PINGS / 2] / 2;
}
