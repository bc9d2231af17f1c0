/* The only home of time. Machines (*_core.c) never call it: their time comes in as an argument.
 * Thread: any. */
#pragma once
#include <stddef.h>
#include <stdint.h>

uint64_t cm_now_ns(void); /* monotonic, from an arbitrary start */
uint64_t cm_now_ms(void); /* the same clock in milliseconds */
/* Processor time this thread has used: for measurements beside other load, never for decisions. */
uint64_t cm_thread_cpu_ns(void);
uint64_t cm_wall_us(void); /* microseconds since 1970-01-01 UTC */
/* "2026-11-22T08:16:03.123Z" */
void cm_wall_format(uint64_t wall_us, char *text_out, size_t cap);
