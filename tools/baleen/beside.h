/* What lies beside this program: in `bin` of a build tree or of an installed package the servers' programs,
 * in `share/baleen/models` next to that the models that come along. Thread: any. */
#pragma once
#include "common/base/status.h"

/* The folder of this program; to be freed with cm_free. */
CM_MUST_CHECK cm_status beside_programs(char **dir_out, cm_error *err);
/* Folder of the model `name`, with a config.json; to be freed with cm_free. CM_E_NOT_FOUND: it does not come
 * with this installation; the sentence says where it was looked for. */
CM_MUST_CHECK cm_status beside_model(const char *name, char **dir_out, cm_error *err);
/* Whether the servers' programs are there; the sentence says which is not. */
CM_MUST_CHECK cm_status beside_servers(cm_error *err);
