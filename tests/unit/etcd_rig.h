/* A real etcd on a loopback port chosen by the system, and a relay in front of it that can be made deaf or
 * mute. Failures fail the running test. Thread: the loop's. */
#pragma once
#include <event2/event.h>
#include <stdbool.h>
#include <sys/types.h>

#include "tests/support/temp_folder.h"

typedef struct etcd_server {
    pid_t pid;                                       /* 0: not running */
    int log;                                         /* reading end of what it says */
    char folder[T_FOLDER_MAX], client[64], peer[64]; /* client: "127.0.0.1:PORT" */
} etcd_server;

/* Its own folder; answers when it returns. */
void etcd_server_start(etcd_server *server);
void etcd_server_stop(etcd_server *server);  /* and removes the folder */
void etcd_server_pause(etcd_server *server); /* SIGSTOP: connections stay, nothing is answered */
void etcd_server_go_on(etcd_server *server);

typedef struct relay relay;
relay *relay_create(struct event_base *base, const char *to);
void relay_destroy(relay *r);
const char *relay_address(const relay *r);
/* What comes from either side waits; connections stay. */
void relay_hold(relay *r, bool requests, bool answers);
