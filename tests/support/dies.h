/* Tests of our own assertions. Thread: one. */
#pragma once

/* Fails the test unless fn, run in a child process, is ended by a signal, as by an assertion. */
void t_dies(void (*fn)(void));
