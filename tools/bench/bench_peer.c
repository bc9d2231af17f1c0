#include "tools/bench/bench_peer.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "common/base/mem.h"

enum { PEERS_MAX = 4, PEER_CASES_MAX = 16, PEER_WORD = 64 };

typedef struct peer_case {
    char name[PEER_WORD];
    bench_samples samples;
} peer_case;

typedef struct peer {
    char name[PEER_WORD];
    peer_case cases[PEER_CASES_MAX];
    uint32_t n_case;
    char skipped[256];
} peer;

struct bench_peers {
    const char *command;
    peer peers[PEERS_MAX];
    uint32_t n_peer;
};

bench_peers *bench_peers_create(const char *command)
{
    bench_peers *p = cm_alloc(sizeof(*p));
    p->command = command;
    return p;
}

void bench_peers_destroy(bench_peers *p)
{
    cm_free(p);
}

/* NULL: there are too many. */
static peer *peer_named(bench_peers *p, const char *name)
{
    uint32_t i = 0;
    while (i < p->n_peer && strcmp(p->peers[i].name, name) != 0) {
        i++;
    }
    if (i == PEERS_MAX) {
        return NULL;
    }
    if (i == p->n_peer) {
        snprintf(p->peers[p->n_peer++].name, PEER_WORD, "%s", name);
    }
    return &p->peers[i];
}

static peer_case *case_named(peer *p, const char *name)
{
    uint32_t i = 0;
    while (i < p->n_case && strcmp(p->cases[i].name, name) != 0) {
        i++;
    }
    if (i == PEER_CASES_MAX) {
        return NULL;
    }
    if (i == p->n_case) {
        snprintf(p->cases[p->n_case++].name, PEER_WORD, "%s", name);
    }
    return &p->cases[i];
}

/* Whether the line said something. */
static bool take_line(bench_peers *p, const char *line)
{
    char name[PEER_WORD], what[PEER_WORD], reason[sizeof(p->peers[0].skipped)];
    double value;
    if (sscanf(line, "peer=%63s skipped=%255[^\n]", name, reason) == 2) {
        peer *of = peer_named(p, name);
        if (of != NULL) {
            snprintf(of->skipped, sizeof(of->skipped), "%s", reason);
        }
        return of != NULL;
    }
    if (sscanf(line, "peer=%63s case=%63s value=%lf", name, what, &value) != 3 || value <= 0) {
        return false;
    }
    peer *of = peer_named(p, name);
    peer_case *c = of != NULL ? case_named(of, what) : NULL;
    if (c == NULL || c->samples.n == BENCH_ROUNDS_MAX) {
        return false;
    }
    bench_add(&c->samples, value);
    return true;
}

cm_status bench_peers_run(bench_peers *p, cm_error *err)
{
    char line[1024];
    uint32_t n_said = 0;
    FILE *pipe = popen(p->command, "re");
    if (pipe == NULL) {
        return cm_error_set(err, CM_E_IO, "peer", "--peer: no shell to run it: %s", strerror(errno));
    }
    while (fgets(line, sizeof(line), pipe) != NULL) {
        n_said += take_line(p, line);
    }
    int code = pclose(pipe);
    if (code != 0 || n_said == 0) {
        return cm_error_set(
            err, CM_E_IO, "peer",
            "--peer: the command ended with %d and %u lines of peer=NAME case=CASE value=N: %s", code, n_said,
            p->command);
    }
    return CM_OK;
}

uint32_t bench_peers_count(const bench_peers *p)
{
    return p->n_peer;
}

const char *bench_peers_name(const bench_peers *p, uint32_t i)
{
    return p->peers[i].name;
}

const char *bench_peers_skipped(const bench_peers *p, uint32_t i)
{
    return p->peers[i].skipped;
}

const bench_samples *bench_peers_case(const bench_peers *p, uint32_t i, const char *name)
{
    size_t n = strlen(name);
    for (uint32_t k = 0; k < p->peers[i].n_case; k++) {
        const peer_case *c = &p->peers[i].cases[k];
        if (strncmp(c->name, name, n) == 0 && !isdigit((unsigned char)c->name[n])) {
            return &c->samples;
        }
    }
    return NULL;
}
