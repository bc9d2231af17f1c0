/* The peer of ep.exchange: MPI_Alltoallv with exact counts, moving between the same ranks the bytes that an
 * exchange moves: from rank 0 to the others, then other bytes back.
 *
 *   mpirun -n RANKS baleen-alltoallv MILLISECONDS OUT:BACK,OUT:BACK... ...
 *
 * One word for each size: bytes to and from rank 1, 2, ... Prints for each the median time of both exchanges
 * at rank 0, in microseconds. */
#include <mpi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RANKS_MAX = 64, TIMES_MAX = 100000 };

typedef struct exchange {
    int out[RANKS_MAX], back[RANKS_MAX]; /* of rank 0, by rank */
} exchange;

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static exchange parse(char *word)
{
    exchange e = {0};
    char *save = NULL;
    int rank = 1;
    for (char *pair = strtok_r(word, ",", &save); pair != NULL && rank < RANKS_MAX;
         pair = strtok_r(NULL, ",", &save)) {
        char *colon = strchr(pair, ':');
        e.out[rank] = atoi(pair);
        e.back[rank++] = colon != NULL ? atoi(colon + 1) : 0;
    }
    return e;
}

/* from0: what rank 0 sends; to0: what it receives. */
static void move(const int *from0, const int *to0, int rank, int n_rank, char *send, char *receive)
{
    int n_send[RANKS_MAX] = {0}, n_receive[RANKS_MAX] = {0}, at_send[RANKS_MAX] = {0},
        at_receive[RANKS_MAX] = {0};
    if (rank == 0) {
        memcpy(n_send, from0, sizeof(n_send));
        memcpy(n_receive, to0, sizeof(n_receive));
    } else {
        n_send[0] = to0[rank];
        n_receive[0] = from0[rank];
    }
    for (int r = 1; r < n_rank; r++) {
        at_send[r] = at_send[r - 1] + n_send[r - 1];
        at_receive[r] = at_receive[r - 1] + n_receive[r - 1];
    }
    MPI_Alltoallv(send, n_send, at_send, MPI_CHAR, receive, n_receive, at_receive, MPI_CHAR, MPI_COMM_WORLD);
}

static void measure(const exchange *e, double seconds, int rank, int n_rank, char *a, char *b)
{
    static double times[TIMES_MAX];
    static const int none[RANKS_MAX];
    int n = 0, go = 1;
    double begin = MPI_Wtime();
    while (go != 0) {
        double t = MPI_Wtime();
        move(e->out, none, rank, n_rank, a, b);
        move(none, e->back, rank, n_rank, b, a);
        times[n++] = 1e6 * (MPI_Wtime() - t);
        if (n % 16 == 0 || n < 16) {
            go = n < TIMES_MAX && MPI_Wtime() - begin < seconds;
            MPI_Bcast(&go, 1, MPI_INT, 0, MPI_COMM_WORLD);
        }
    }
    qsort(times, (size_t)n, sizeof(times[0]), by_value);
    if (rank == 0) {
        printf("%.3f\n", times[n / 2]);
    }
}

int main(int argc, char **argv)
{
    int rank, n_rank;
    enum { BYTES = 64 << 20 };
    static char a[BYTES], b[BYTES];
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &n_rank);
    memset(a, 1, sizeof(a)); /* pages of their own */
    memset(b, 2, sizeof(b));
    for (int i = 2; i < argc && n_rank <= RANKS_MAX; i++) {
        exchange e = parse(argv[i]);
        measure(&e, 1e-3 * atoi(argv[1]), rank, n_rank, a, b);
    }
    MPI_Finalize();
    return 0;
}
