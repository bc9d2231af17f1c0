#include "tools/bench/svg.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/bytes.h"

enum { SVG_WIDTH = 640, SVG_HEIGHT = 400, SVG_LEFT = 70, SVG_RIGHT = 26, SVG_TOP = 74, SVG_BOTTOM = 52 };

/* Told apart without colour vision too (Okabe and Ito). */
static const char *const COLORS[SVG_SERIES_MAX] = {"#0072B2", "#D55E00", "#009E73",
                                                   "#CC79A7", "#E69F00", "#555555"};

typedef struct svg_frame {
    double x_min, x_max, y_min, y_max;
    bool log_y;
} svg_frame;

/* ---- scales ---- */

static void frame_take(svg_frame *f, double x, double y)
{
    f->x_min = x < f->x_min ? x : f->x_min;
    f->x_max = x > f->x_max ? x : f->x_max;
    f->y_min = y < f->y_min ? y : f->y_min;
    f->y_max = y > f->y_max ? y : f->y_max;
}

/* 1, 2 or 5 times a power of ten, at least v. */
static double round_up(double v)
{
    double unit = pow(10, floor(log10(v)));
    return unit * (v <= unit ? 1 : v <= 2 * unit ? 2 : v <= 5 * unit ? 5 : 10);
}

static double round_down(double v)
{
    double unit = pow(10, floor(log10(v)));
    return unit * (v >= 5 * unit ? 5 : v >= 2 * unit ? 2 : 1);
}

static svg_frame frame_of(const svg_chart *chart)
{
    svg_frame f = {.x_min = INFINITY, .x_max = 0, .y_min = INFINITY, .y_max = 0, .log_y = chart->log_y};
    for (uint32_t s = 0; s < chart->n; s++) {
        for (uint32_t i = 0; i < chart->series[s].n; i++) {
            const svg_point *p = &chart->series[s].points[i];
            frame_take(&f, p->x, p->high > p->low ? p->low : p->y);
            frame_take(&f, p->x, p->high > p->low ? p->high : p->y);
        }
    }
    CM_ASSERT_MSG(f.x_min > 0 && f.y_max > 0, "a chart of nothing");
    f.y_min = f.log_y ? round_down(f.y_min) : 0;
    f.y_max = round_up(f.y_max);
    return f;
}

static double at_x(const svg_frame *f, double x)
{
    double span = f->x_max > f->x_min ? log2(f->x_max / f->x_min) : 1;
    return SVG_LEFT + (SVG_WIDTH - SVG_LEFT - SVG_RIGHT) * log2(x / f->x_min) / span;
}

static double at_y(const svg_frame *f, double y)
{
    double part = f->log_y ? log(y / f->y_min) / log(f->y_max / f->y_min) : y / f->y_max;
    return SVG_HEIGHT - SVG_BOTTOM - (SVG_HEIGHT - SVG_TOP - SVG_BOTTOM) * part;
}

/* ---- drawing ---- */

static void format_tick(double v, char out[16])
{
    if (v >= 1024 && fmod(v, 1024) == 0) {
        snprintf(out, 16, "%gK", v / 1024);
    } else {
        snprintf(out, 16, "%g", v);
    }
}

static void draw_x_ticks(cm_bytes *svg, const svg_frame *f)
{
    for (double x = f->x_min; x <= f->x_max * 1.001; x *= 2) {
        char label[16];
        format_tick(x, label);
        cm_bytes_printf(
            svg,
            "<path class=\"g\" d=\"M%.1f %d V%d\"/><text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">"
            "%s</text>\n",
            at_x(f, x), SVG_TOP, SVG_HEIGHT - SVG_BOTTOM, at_x(f, x), SVG_HEIGHT - SVG_BOTTOM + 16, label);
    }
}

static void draw_y_tick(cm_bytes *svg, const svg_frame *f, double y)
{
    cm_bytes_printf(svg,
                    "<path class=\"g\" d=\"M%d %.1f H%d\"/><text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%g"
                    "</text>\n",
                    SVG_LEFT, at_y(f, y), SVG_WIDTH - SVG_RIGHT, SVG_LEFT - 6, at_y(f, y) + 4, y);
}

static void draw_y_ticks(cm_bytes *svg, const svg_frame *f)
{
    if (!f->log_y) {
        for (int i = 0; i <= 5; i++) {
            draw_y_tick(svg, f, f->y_max * i / 5);
        }
        return;
    }
    for (double y = f->y_min; y <= f->y_max * 1.001; y = round_up(y * 1.01)) {
        draw_y_tick(svg, f, y);
    }
}

static void draw_series(cm_bytes *svg, const svg_frame *f, const svg_series *s, const char *color)
{
    cm_bytes_printf(svg, "<path fill=\"none\" stroke=\"%s\" stroke-width=\"2\"%s d=\"", color,
                    s->dashed ? " stroke-dasharray=\"6 4\"" : "");
    for (uint32_t i = 0; i < s->n; i++) {
        cm_bytes_printf(svg, "%c%.1f %.1f ", i == 0 ? 'M' : 'L', at_x(f, s->points[i].x),
                        at_y(f, s->points[i].y));
    }
    cm_bytes_append_text(svg, "\"/>\n");
    for (uint32_t i = 0; i < s->n && !s->dashed; i++) {
        const svg_point *p = &s->points[i];
        cm_bytes_printf(svg, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", at_x(f, p->x),
                        at_y(f, p->y), color);
        if (p->high > p->low) {
            cm_bytes_printf(svg, "<path stroke=\"%s\" d=\"M%.1f %.1f V%.1f\"/>\n", color, at_x(f, p->x),
                            at_y(f, p->low), at_y(f, p->high));
        }
    }
}

static const char *color_of(const svg_chart *chart, uint32_t i)
{
    return COLORS[chart->series[i].dashed && i > 0 ? i - 1 : i];
}

static void draw_legend(cm_bytes *svg, const svg_chart *chart)
{
    for (uint32_t i = 0; i < chart->n; i++) {
        uint32_t x = SVG_LEFT + i % 3 * 190, y = 40 + i / 3 * 18;
        cm_bytes_printf(
            svg,
            "<path stroke=\"%s\" stroke-width=\"2\"%s d=\"M%u %u h22\"/><text x=\"%u\" y=\"%u\">%s"
            "</text>\n",
            color_of(chart, i), chart->series[i].dashed ? " stroke-dasharray=\"6 4\"" : "", x, y, x + 28,
            y + 4, chart->series[i].name);
    }
}

static void draw_labels(cm_bytes *svg, const svg_chart *chart)
{
    int middle = SVG_TOP + (SVG_HEIGHT - SVG_TOP - SVG_BOTTOM) / 2;
    cm_bytes_printf(svg, "<text x=\"%d\" y=\"20\" font-size=\"14\" font-weight=\"bold\">%s</text>\n",
                    SVG_LEFT, chart->title);
    cm_bytes_printf(svg, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%s</text>\n",
                    (SVG_LEFT + SVG_WIDTH - SVG_RIGHT) / 2, SVG_HEIGHT - 12, chart->x_label);
    cm_bytes_printf(
        svg, "<text x=\"16\" y=\"%d\" text-anchor=\"middle\" transform=\"rotate(-90 16 %d)\">%s%s</text>\n",
        middle, middle, chart->y_label, chart->log_y ? ", logarithmic" : "");
    cm_bytes_printf(
        svg, "<text x=\"%d\" y=\"20\" text-anchor=\"end\" fill=\"#777\">median of %u round%s%s</text>\n",
        SVG_WIDTH - SVG_RIGHT, chart->n_rounds, chart->n_rounds == 1 ? "" : "s",
        chart->n_rounds == 1 ? "" : "; bars: least to most");
}

cm_status svg_write(const svg_chart *chart, const char *path, cm_error *err)
{
    svg_frame f = frame_of(chart);
    cm_bytes svg;
    cm_bytes_init(&svg, 0);
    cm_bytes_printf(
        &svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" "
        "font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n"
        "<style>.g{stroke:#ddd;fill:none}</style>\n<rect width=\"100%%\" height=\"100%%\" "
        "fill=\"#fff\"/>\n",
        SVG_WIDTH, SVG_HEIGHT, SVG_WIDTH, SVG_HEIGHT);
    draw_x_ticks(&svg, &f);
    draw_y_ticks(&svg, &f);
    draw_labels(&svg, chart);
    draw_legend(&svg, chart);
    for (uint32_t i = 0; i < chart->n; i++) {
        draw_series(&svg, &f, &chart->series[i], color_of(chart, i));
    }
    cm_bytes_append_text(&svg, "</svg>\n");
    FILE *file = fopen(path, "we");
    bool good = file != NULL && fwrite(svg.data, 1, svg.len, file) == svg.len;
    if (file != NULL && fclose(file) != 0) {
        good = false;
    }
    cm_bytes_fini(&svg);
    return good ? CM_OK : cm_error_set(err, CM_E_IO, "svg", "--svg %s: %s", path, strerror(errno));
}
