#include "tools/bench/bench_table.h"

#include <stdio.h>
#include <string.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"

enum { VALUES_MAX = 96 };

typedef enum bound { NO_GATE, AT_MOST, AT_LEAST } bound;
typedef enum verdict { NOT_MEASURED, MEASURED, MET, AT_EDGE, MISSED, N_VERDICT } verdict;
static const char *const VERDICTS[N_VERDICT] = {"not measured", "", "met", "at its edge", "missed"};

typedef struct ratio {
    const char *bench, *values, *rows, *what; /* as gates.def says */
    bound bound;
    double limit;
} ratio;

static const ratio RATIOS[] = {
#define BENCH_RATIO(...) {__VA_ARGS__},
#include "tools/bench/gates.def"
#undef BENCH_RATIO
};
enum { N_RATIO = sizeof(RATIOS) / sizeof(RATIOS[0]) };

/* ---- values of a report ---- */

typedef struct values {
    json_t *at[VALUES_MAX]; /* {"median":, "min":, "max":}, borrowed from the report */
    uint32_t n;
} values;

/* Whether the member's value is one of the words, parted by '|', of n letters. */
static bool is_one_of(const json_t *member, const char *words, size_t n)
{
    char text[64];
    if (json_is_string(member)) {
        snprintf(text, sizeof(text), "%s", json_string_value(member));
    } else {
        snprintf(text, sizeof(text), "%lld", (long long)json_integer_value(member));
    }
    for (size_t at = 0; at < n; at += strcspn(words + at, "| ") + 1) {
        size_t length = strcspn(words + at, "| ");
        if (length == strlen(text) && memcmp(words + at, text, length) == 0) {
            return true;
        }
    }
    return false;
}

static bool is_wanted(const json_t *row, const char *rows)
{
    while (*rows != '\0') {
        char key[32];
        size_t n_key = strcspn(rows, "="), n = strcspn(rows + n_key + 1, " ");
        snprintf(key, sizeof(key), "%.*s", (int)n_key, rows);
        if (!is_one_of(json_object_get(row, key), rows + n_key + 1, n)) {
            return false;
        }
        rows += n_key + 1 + n;
        rows += *rows == ' ';
    }
    return true;
}

/* Goes along the path; of lists through all elements, of the outermost one through those that are wanted. */
static void collect(json_t *from, const char *path, const char *rows, values *out)
{
    char key[32];
    size_t n = strcspn(path, "."), i;
    json_t *element;
    if (json_is_array(from)) {
        json_array_foreach(from, i, element)
        {
            if (is_wanted(element, rows)) {
                collect(element, path, "", out);
            }
        }
    } else if (*path != '\0') {
        snprintf(key, sizeof(key), "%.*s", (int)n, path);
        collect(json_object_get(from, key), path + n + (path[n] == '.'), rows, out);
    } else if (json_is_object(from) && out->n < VALUES_MAX) {
        out->at[out->n++] = from;
    }
}

static verdict judge(const ratio *r, const json_t *value)
{
    double median = json_number_value(json_object_get(value, "median"));
    double best = json_number_value(json_object_get(value, r->bound == AT_MOST ? "min" : "max"));
    if (r->bound == NO_GATE) {
        return MEASURED;
    }
    double sign = r->bound == AT_MOST ? 1 : -1;
    return sign * median <= sign * r->limit ? MET : sign * best <= sign * r->limit ? AT_EDGE : MISSED;
}

/* ---- the table ---- */

typedef struct count {
    uint32_t of[N_VERDICT];
} count;

/* The rest of the ratio's line; gives the worst verdict and the values for the report. */
static verdict print_values(const ratio *r, const values *v, json_t *list)
{
    verdict worst = NOT_MEASURED;
    cm_bytes text;
    cm_bytes_init(&text, 0);
    for (uint32_t i = 0; i < v->n; i++) {
        verdict one = judge(r, v->at[i]);
        const char *mark = one == MISSED ? "!" : one == AT_EDGE ? "~" : "";
        double median = json_number_value(json_object_get(v->at[i], "median"));
        worst = one > worst ? one : worst;
        cm_bytes_printf(&text, median < 0.1 ? " %.3f%s" : median < 10 ? " %.2f%s" : " %.1f%s", median, mark);
        json_array_append(list, v->at[i]);
    }
    printf("%-12s  %s:%s\n", VERDICTS[worst], r->what, v->n == 0 ? " -" : cm_bytes_text(&text));
    cm_bytes_fini(&text);
    return worst;
}

static void print_ratio(const ratio *r, json_t *report, json_t *ratios, count *c)
{
    values v = {0};
    char gate[24] = "";
    collect(report, r->values, r->rows, &v);
    if (r->bound == NO_GATE && v.n == 0) {
        return;
    }
    if (r->bound != NO_GATE) {
        snprintf(gate, sizeof(gate), "%s %.4g", r->bound == AT_MOST ? "<=" : ">=", r->limit);
    }
    json_t *list = json_array();
    printf("%-17s %-8s %8s  %-8s ", "", "", "", gate);
    verdict worst = print_values(r, &v, list);
    json_t *row = json_pack("{s:s, s:s, s:o}", "ratio", r->what, "rows", r->rows, "values", list);
    if (r->bound != NO_GATE) {
        c->of[worst]++;
        json_object_set_new(row, r->bound == AT_MOST ? "at_most" : "at_least", json_real(r->limit));
        json_object_set_new(row, "verdict", json_string(VERDICTS[worst]));
    }
    json_array_append_new(ratios, row);
}

static json_t *print_result(const bench_result *result, count *c)
{
    static const char *const endings[] = {"ok", "failed", "skipped"};
    json_t *ratios = json_array();
    const char *ending = endings[result->ending];
    printf("%-17s %-8s %8.1f%s%s\n", result->name, ending, result->seconds,
           result->ending == BENCH_SKIPPED ? "  " : "", result->reason.text);
    for (uint32_t i = 0; i < N_RATIO && result->ending == BENCH_OK; i++) {
        if (strcmp(RATIOS[i].bench, result->name) == 0) {
            print_ratio(&RATIOS[i], result->report, ratios, c);
        }
    }
    json_t *row = json_pack("{s:s, s:s, s:f, s:o}", "bench", result->name, "outcome", ending, "seconds",
                            result->seconds, "ratios", ratios);
    if (result->ending == BENCH_SKIPPED) {
        json_object_set_new(row, "reason", json_string(result->reason.text));
    }
    return row;
}

void bench_table_print(const bench_result *results, uint32_t n, uint64_t rounds)
{
    count c = {0};
    uint32_t endings[BENCH_SKIPPED + 1] = {0};
    double sum = 0;
    json_t *list = json_array();
    printf("all: medians of %u round%s; ! misses its gate, ~ misses it by less than its spread\n\n",
           (unsigned)rounds, rounds == 1 ? "" : "s");
    printf("%-17s %-8s %8s  %-8s %-12s  %s\n", "benchmark", "outcome", "seconds", "gate", "", "ratios");
    for (uint32_t i = 0; i < n; i++) {
        json_array_append_new(list, print_result(&results[i], &c));
        endings[results[i].ending]++;
        sum += results[i].seconds;
    }
    printf("%-17s %-8s %8.1f\n\n%u ok, %u failed, %u skipped; gates: %u met, %u at their edge, %u missed, %u "
           "not "
           "measured\n",
           "all", "", sum, endings[BENCH_OK], endings[BENCH_FAILED], endings[BENCH_SKIPPED], c.of[MET],
           c.of[AT_EDGE], c.of[MISSED], c.of[NOT_MEASURED]);
    if (rounds < BENCH_GATE_ROUNDS) {
        printf("gates are meant for medians of %d rounds or more: --rounds %d\n", BENCH_GATE_ROUNDS,
               BENCH_GATE_ROUNDS);
    }
    bench_end(json_pack("{s:s, s:s, s:I, s:i, s:{s:I, s:I, s:I, s:I}, s:o}", "bench", "all", "version",
                        BALEEN_VERSION, "rounds", (json_int_t)rounds, "gate_rounds", BENCH_GATE_ROUNDS,
                        "gates", "met", (json_int_t)c.of[MET], "at_edge", (json_int_t)c.of[AT_EDGE], "missed",
                        (json_int_t)c.of[MISSED], "not_measured", (json_int_t)c.of[NOT_MEASURED], "results",
                        list));
}
