#include "common/net/net_mpi_world.h"

#include <mpi.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/log.h"
#include "common/base/mem.h"

enum { MPI_DROPS_MAX = 8 }; /* messages being thrown away at once */

typedef enum mpi_port { MPI_PORT_FREE, MPI_PORT_USED, MPI_PORT_LISTENING, MPI_PORT_CLOSED } mpi_port;

/* A message for nobody on its way to nowhere. */
typedef struct mpi_drop {
    MPI_Request request;
    void *memory;
} mpi_drop;

/* The world, and which of its ports are in use. */
static struct {
    pthread_mutex_t lock; /* protects all, and entering MPI */
    bool started;
    int rank, n_rank;
    mpi_port ports[MPI_PORTS_MAX];
    mpi_drop drops[MPI_DROPS_MAX];
    uint32_t n_drops;
    uint32_t n_links; /* ever, of all objects: what is late for one that used a port before is not the next
                         one's */
} g_world = {.lock = PTHREAD_MUTEX_INITIALIZER};

void mpi_world_lock(void)
{
    pthread_mutex_lock(&g_world.lock);
}

void mpi_world_unlock(void)
{
    pthread_mutex_unlock(&g_world.lock);
}

int mpi_world_rank(void)
{
    return g_world.rank;
}

int mpi_world_size(void)
{
    return g_world.n_rank;
}

uint32_t mpi_world_number(void)
{
    pthread_mutex_lock(&g_world.lock);
    uint32_t number = ++g_world.n_links;
    pthread_mutex_unlock(&g_world.lock);
    return number;
}

static void world_end_drops_locked(void)
{
    for (uint32_t i = g_world.n_drops; i-- > 0;) {
        int done = 0;
        MPI_Test(&g_world.drops[i].request, &done, MPI_STATUS_IGNORE);
        if (done) {
            cm_free(g_world.drops[i].memory);
            g_world.drops[i] = g_world.drops[--g_world.n_drops];
        }
    }
}

/* Begins to take one message with that tag, if there is one: its sender waits for somebody to. Does not wait
 * for the sender, which may be stopped in the middle of it. */
static bool world_discard_locked(int tag)
{
    int found = 0, n = 0;
    MPI_Message message;
    MPI_Status status;
    if (g_world.n_drops == MPI_DROPS_MAX) {
        return false;
    }
    MPI_Improbe(MPI_ANY_SOURCE, tag, MPI_COMM_WORLD, &found, &message, &status);
    if (found) {
        mpi_drop *drop = &g_world.drops[g_world.n_drops++];
        MPI_Get_count(&status, MPI_BYTE, &n);
        drop->memory = cm_alloc((size_t)n);
        MPI_Imrecv(drop->memory, n, MPI_BYTE, &message, &drop->request);
    }
    return found;
}

void mpi_world_discard(void)
{
    pthread_mutex_lock(&g_world.lock);
    world_end_drops_locked();
    for (int port = 0; port < MPI_PORTS_MAX; port++) {
        while (g_world.ports[port] == MPI_PORT_CLOSED &&
               (world_discard_locked(2 * port) || world_discard_locked(2 * port + 1))) {
        }
    }
    pthread_mutex_unlock(&g_world.lock);
}

/* A failed process does not wait for the others: mpirun ends them. */
static void world_leave(int code, void *unused)
{
    MPI_Request all_here;
    int here = 0;
    (void)unused;
    if (code != 0) {
        return;
    }
    MPI_Ibarrier(MPI_COMM_WORLD, &all_here);
    for (;;) {
        MPI_Test(&all_here, &here, MPI_STATUS_IGNORE);
        world_end_drops_locked();
        if (here && g_world.n_drops == 0) {
            break;
        }
        if (!world_discard_locked(MPI_ANY_TAG)) {
            poll(NULL, 0, 1);
        }
    }
    MPI_Finalize();
}

static cm_status world_start_locked(cm_error *err)
{
    int provided;
    if (g_world.started) {
        return CM_OK;
    }
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &provided) != MPI_SUCCESS ||
        provided < MPI_THREAD_SERIALIZED) {
        return cm_error_set(err, CM_E_DEVICE, "net", "MPI does not start, or not for several threads");
    }
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &g_world.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &g_world.n_rank);
    if (on_exit(world_leave, NULL) != 0) {
        return cm_error_set(err, CM_E_MEMORY, "net", "no room to remember that MPI has to be ended");
    }
    g_world.started = true;
    cm_warn(
        "rank %d of %d of an MPI world: it is fixed; nobody can join, and when one process dies mpirun ends "
        "all of them",
        g_world.rank, g_world.n_rank);
    return CM_OK;
}

static cm_status world_start(cm_error *err)
{
    pthread_mutex_lock(&g_world.lock);
    cm_status status = world_start_locked(err);
    pthread_mutex_unlock(&g_world.lock);
    return status;
}

static cm_status world_choose(const char *all, int n_rank, char coordinator_out[NET_ADDRESS_BYTES],
                              cm_error *err)
{
    uint32_t n = 0;
    for (int i = 0; i < n_rank; i++) {
        const char *address = all + (size_t)i * NET_ADDRESS_BYTES;
        if (address[0] != '\0' && n++ == 0) {
            memcpy(coordinator_out, address, NET_ADDRESS_BYTES);
        }
    }
    if (n_rank == 1) {
        return cm_error_set(
            err, CM_E_INVALID, "coordinator",
            "this process is alone in its MPI world: start all of the cluster in one mpirun line");
    }
    if (n != 1) {
        return cm_error_set(err, CM_E_INVALID, "coordinator",
                            "%u of the %d processes of the mpirun line are coordinators, 1 is needed", n,
                            n_rank);
    }
    return CM_OK;
}

cm_status mpi_world_share(const char *mine, char coordinator_out[NET_ADDRESS_BYTES], cm_error *err)
{
    char text[NET_ADDRESS_BYTES] = "";
    CM_ASSERT(strlen(mine) < sizeof(text));
    memcpy(text, mine, strlen(mine));
    CM_TRY(world_start(err));
    char *all = cm_alloc((size_t)g_world.n_rank * NET_ADDRESS_BYTES);
    int code =
        MPI_Allgather(text, NET_ADDRESS_BYTES, MPI_CHAR, all, NET_ADDRESS_BYTES, MPI_CHAR, MPI_COMM_WORLD);
    cm_status status = code == MPI_SUCCESS ? world_choose(all, g_world.n_rank, coordinator_out, err)
                                           : cm_error_set(err, CM_E_DEVICE, "coordinator",
                                                          "MPI_Allgather failed: code %d", code);
    cm_free(all);
    return status;
}

bool mpi_world_listens(uint32_t port)
{
    pthread_mutex_lock(&g_world.lock);
    bool has = g_world.ports[port] == MPI_PORT_LISTENING;
    pthread_mutex_unlock(&g_world.lock);
    return has;
}

cm_status mpi_world_take_port(uint32_t *port_out, cm_error *err)
{
    uint32_t port = 0;
    pthread_mutex_lock(&g_world.lock);
    cm_status status = world_start_locked(err);
    while (status == CM_OK && port < MPI_PORTS_MAX &&
           (g_world.ports[port] == MPI_PORT_USED || g_world.ports[port] == MPI_PORT_LISTENING)) {
        port++;
    }
    if (status == CM_OK && port == MPI_PORTS_MAX) {
        status = cm_error_set(err, CM_E_CAPACITY, "net", "%d objects of this process use MPI already",
                              MPI_PORTS_MAX);
    }
    if (status == CM_OK) {
        g_world.ports[port] = MPI_PORT_USED;
        *port_out = port;
    }
    pthread_mutex_unlock(&g_world.lock);
    return status;
}

void mpi_world_listen(uint32_t port)
{
    pthread_mutex_lock(&g_world.lock);
    g_world.ports[port] = MPI_PORT_LISTENING;
    pthread_mutex_unlock(&g_world.lock);
}

void mpi_world_free_port(uint32_t port)
{
    pthread_mutex_lock(&g_world.lock);
    g_world.ports[port] = MPI_PORT_CLOSED;
    pthread_mutex_unlock(&g_world.lock);
}
