/* A router's engine and up to T_WORKER_MAX expert engines in one process, on random placements that change by
 * epoch. What cannot be set up fails the test. Thread: the caller's is the router's compute thread. */
#pragma once
#include "router/engine/engine.h"
#include "tests/unit/schedule_case.h"

typedef struct t_cluster t_cluster;

/* Ready when it returns: the first placement loaded, links up. c is kept. */
t_cluster *t_cluster_create(const t_case *c);
void t_cluster_destroy(t_cluster *cluster);
rt_engine *t_cluster_engine(t_cluster *cluster);

/* The second placement: drawn and loaded here, put in force by t_cluster_switch, which does not allocate. */
void t_cluster_prepare(t_cluster *cluster);
void t_cluster_switch(t_cluster *cluster);
