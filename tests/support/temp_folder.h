/* A folder of a test's own below TMPDIR (/tmp when unset), for files that the code under test reads and
 * writes. Whatever fails here fails the test. Thread: one at a time. */
#pragma once

enum { T_FOLDER_MAX = 128 }; /* bytes of its path */

/* name: of the test, for whoever finds what a killed run left. */
void t_folder_make(char folder_out[T_FOLDER_MAX], const char *name);
/* With all that is in it; links are not followed. "" is fine; the path is "" afterwards. */
void t_folder_remove(char folder[T_FOLDER_MAX]);
/* A checkpoint's files by link, so that a test may replace some. */
void t_folder_link_checkpoint(const char *folder, const char *checkpoint);
