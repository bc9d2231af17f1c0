#include "tests/golden/error_table.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { ROWS_MAX = 512, PATHS_MAX = 8 };

typedef struct table_cell {
    bool seen;
    double error, tolerance;
} table_cell;

typedef struct table_row {
    char group[48], what[48];
    char where[32]; /* of the worst cell */
    double worst;   /* its ratio */
    table_cell cells[PATHS_MAX];
} table_row;

static bool g_on;
static char g_paths[PATHS_MAX][24];
static unsigned g_n_path, g_n_row;
static table_row g_rows[ROWS_MAX];

void error_table_begin(void)
{
    g_on = true;
}

void error_table_path(const char *path)
{
    if (g_on && (g_n_path == 0 || strcmp(g_paths[g_n_path - 1], path) != 0)) {
        assert_true(g_n_path < PATHS_MAX);
        snprintf(g_paths[g_n_path++], sizeof(g_paths[0]), "%s", path);
    }
}

static table_row *row_of(const char *group, const char *what)
{
    for (unsigned i = 0; i < g_n_row; i++) {
        if (strcmp(g_rows[i].group, group) == 0 && strcmp(g_rows[i].what, what) == 0) {
            return &g_rows[i];
        }
    }
    assert_true(g_n_row < ROWS_MAX);
    table_row *row = &g_rows[g_n_row++];
    *row = (table_row){.worst = -1};
    snprintf(row->group, sizeof(row->group), "%s", group);
    snprintf(row->what, sizeof(row->what), "%s", what);
    return row;
}

/* Of the tolerance; what must be equal and is not is infinitely far off, and so is a NaN. */
static double ratio_of(double error, double tolerance)
{
    if (tolerance > 0 && !isnan(error)) {
        return error / tolerance;
    }
    return error == 0 ? 0 : INFINITY;
}

void error_table_note(const char *group, const char *what, const char *where, double error, double tolerance)
{
    if (!g_on) {
        return;
    }
    assert_true(g_n_path > 0);
    table_row *row = row_of(group, what);
    table_cell *cell = &row->cells[g_n_path - 1];
    double ratio = ratio_of(error, tolerance);
    if (!cell->seen || ratio > ratio_of(cell->error, cell->tolerance)) {
        *cell = (table_cell){true, error, tolerance};
    }
    if (ratio > row->worst) {
        row->worst = ratio;
        snprintf(row->where, sizeof(row->where), "%s", where != NULL ? where : "");
    }
}

static void print_cell(const table_cell *cell)
{
    char text[40] = "-";
    if (cell->seen && cell->tolerance == 0) {
        snprintf(text, sizeof(text), cell->error == 0 ? "equal" : "%.0f differ", cell->error);
    } else if (cell->seen) {
        snprintf(text, sizeof(text), cell->error == 0 ? "%.0f of %.1e" : "%.1e of %.1e", cell->error,
                 cell->tolerance);
    }
    printf("  %18s", text);
}

bool error_table_print(void)
{
    bool good = g_n_row > 0;
    printf("%-10s %-34s", "", "worst error of tolerance");
    for (unsigned p = 0; p < g_n_path; p++) {
        printf("  %18s", g_paths[p]);
    }
    printf("  %6s  where\n", "ratio");
    for (unsigned i = 0; i < g_n_row; i++) {
        const table_row *row = &g_rows[i];
        bool repeated = i > 0 && strcmp(row->group, g_rows[i - 1].group) == 0;
        printf("%-10s %-34s", repeated ? "" : row->group, row->what);
        for (unsigned p = 0; p < g_n_path; p++) {
            print_cell(&row->cells[p]);
        }
        printf("  %6.3f  %s%s\n", row->worst, row->where, row->worst > 1 ? "  TOO FAR" : "");
        good = good && row->worst <= 1;
    }
    g_n_row = g_n_path = 0;
    return good;
}
