/* The worst error against its tolerance, per thing compared and per path, for who asks for the table
 * (--table); otherwise nothing is kept. Thread: one. */
#pragma once
#include <stdbool.h>

/* From here on errors are kept. */
void error_table_begin(void);
/* The path that the following errors belong to: a column. */
void error_table_path(const char *path);
/* One comparison: error of at most tolerance is right. Of the same group and what the one nearest to its
 * tolerance (or furthest beyond it) is kept, and where it was seen (may be NULL). A tolerance of 0 is for
 * what must be equal: error is the number of items that differ. */
void error_table_note(const char *group, const char *what, const char *where, double error, double tolerance);
/* Prints the table to stdout and forgets it; false when an error was above its tolerance. */
bool error_table_print(void);
