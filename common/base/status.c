#include "common/base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

cm_scope cm_status_scope(cm_status status)
{
    if (status >= 0) {
        return CM_SCOPE_NONE;
    }
    return status > -100 ? CM_SCOPE_REQUEST : status > -200 ? CM_SCOPE_PEER : CM_SCOPE_PROCESS;
}

const char *cm_status_name(cm_status status)
{
    switch (status) {
    case CM_OK:
        return "CM_OK";
    case CM_AGAIN:
        return "CM_AGAIN";
#define CM_X(name, number, text)                                                                             \
    case name:                                                                                               \
        return #name;
        CM_STATUS_TABLE(CM_X)
#undef CM_X
    }
    return "CM_E_?";
}

const char *cm_status_text(cm_status status)
{
    switch (status) {
    case CM_OK:
        return "ok";
    case CM_AGAIN:
        return "not finished";
#define CM_X(name, number, text)                                                                             \
    case name:                                                                                               \
        return text;
        CM_STATUS_TABLE(CM_X)
#undef CM_X
    }
    return "unknown status";
}

cm_status cm_error_set(cm_error *err, cm_status status, const char *field, const char *fmt, ...)
{
    if (err != NULL) {
        va_list args;
        err->status = status;
        snprintf(err->field, sizeof(err->field), "%s", field != NULL ? field : "");
        va_start(args, fmt);
        vsnprintf(err->text, sizeof(err->text), fmt, args);
        va_end(args);
    }
    return status;
}
