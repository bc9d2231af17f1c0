#include "tools/peers/peer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/rng.h"

bool peer_args_of(int argc, char **argv, peer_args *args_out)
{
    peer_args args = {0};
    const char *rows = argc == 5 ? argv[4] : "";
    if (argc == 5) {
        args.threads = (uint32_t)strtoul(argv[1], NULL, 10);
        args.d = (uint32_t)strtoul(argv[2], NULL, 10);
        args.inner = (uint32_t)strtoul(argv[3], NULL, 10);
    }
    for (; *rows != '\0' && args.n_rows < sizeof(args.rows) / sizeof(args.rows[0]); args.n_rows++) {
        char *end;
        args.rows[args.n_rows] = (uint32_t)strtoul(rows, &end, 10);
        rows = *end == ',' ? end + 1 : "";
    }
    if (args.threads == 0 || args.d % 128 != 0 || args.inner % 128 != 0 || args.n_rows == 0 ||
        args.rows[0] == 0) {
        fprintf(stderr, "usage: %s THREADS D INNER ROWS[,ROWS..]; D and INNER multiples of 128\n", argv[0]);
        return false;
    }
    *args_out = args;
    return true;
}

uint32_t peer_random(uint64_t i)
{
    return cm_rng_at(7, i, 1).word[0];
}

double peer_seconds(const peer_args *args)
{
    return 1e-9 * (double)(args->threads == 1 ? cm_thread_cpu_ns() : cm_now_ns());
}

void peer_say(const char *peer, uint32_t rows, double macs, double seconds)
{
    printf("peer=%s case=rows_%u value=%.2f unit=GMAC/s\n", peer, rows, macs / seconds / 1e9);
}
