/* A line chart as an SVG file: what a benchmark draws of its figures. x steps by factors of two, y begins at
 * zero or steps by tens. Thread: any. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/status.h"

enum { SVG_SERIES_MAX = 6, SVG_POINTS_MAX = 16 };

typedef struct svg_point {
    double x, y, low, high; /* low == high: no bar */
} svg_point;

typedef struct svg_series {
    char name[26]; /* a third of the width */
    bool dashed;   /* the limit of the series before it, in that one's colour */
    svg_point points[SVG_POINTS_MAX];
    uint32_t n;
} svg_series;

typedef struct svg_chart {
    const char *title, *x_label, *y_label; /* plain text: no markup, no & or < */
    bool log_y;                            /* is said beside y_label */
    uint32_t n_rounds;                     /* points are medians of so many */
    svg_series series[SVG_SERIES_MAX];
    uint32_t n;
} svg_chart;

/* Points have positive x and, with log_y, y. CM_E_IO. */
CM_MUST_CHECK cm_status svg_write(const svg_chart *chart, const char *path, cm_error *err);
