/* What a config.json may say otherwise without being refused, as closed lists: every other change of one of
 * its fields must be refused with the field named. For the unit test that walks all fields and for the fuzz
 * target that draws them. Thread: any. */
#pragma once
#include <stdbool.h>

/* Keys that no arithmetic of the model depends on and that nobody reads, top level and below. */
bool field_is_unread(const char *path);
/* Keys that no tensor shows: another value in range is another model, as well formed as this one. It must
 * arrive in the geometry as written; only digests (a manifest, the fingerprint members compare) can tell it
 * from the one that was released. */
bool field_is_free(const char *path);
/* Keys that may be absent, since what they say is held against the tensors or has one value only. */
bool field_may_be_absent(const char *path);
/* Whether a refusal's sentence names the field: the last key of its path; a list's entry by its list. */
bool field_is_named(const char *path, const char *sentence);
