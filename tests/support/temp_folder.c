#include "tests/support/temp_folder.h"

#include <dirent.h>
#include <ftw.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

void t_folder_make(char folder_out[T_FOLDER_MAX], const char *name)
{
    const char *below = getenv("TMPDIR");
    int n = snprintf(folder_out, T_FOLDER_MAX, "%s/baleen_%s.XXXXXX",
                     below != NULL && below[0] != '\0' ? below : "/tmp", name);
    assert_true(n > 0 && n < T_FOLDER_MAX);
    assert_non_null(mkdtemp(folder_out));
}

static int remove_one(const char *path, const struct stat *info, int kind, struct FTW *where)
{
    (void)info;
    (void)kind;
    (void)where;
    return remove(path);
}

void t_folder_remove(char folder[T_FOLDER_MAX])
{
    if (folder[0] != '\0') {
        assert_int_equal(nftw(folder, remove_one, 8, FTW_DEPTH | FTW_PHYS), 0);
        folder[0] = '\0';
    }
}

static int is_of_checkpoint(const struct dirent *item)
{
    return strstr(item->d_name, ".json") != NULL || strstr(item->d_name, ".safetensors") != NULL;
}

void t_folder_link_checkpoint(const char *folder, const char *checkpoint)
{
    struct dirent **items;
    int n = scandir(checkpoint, &items, is_of_checkpoint, alphasort);
    assert_true(n > 0);
    for (int i = 0; i < n; i++) {
        char link[1024], target[1024];
        snprintf(link, sizeof(link), "%s/%s", folder, items[i]->d_name);
        snprintf(target, sizeof(target), "%s/%s", checkpoint, items[i]->d_name);
        assert_int_equal(symlink(target, link), 0);
        free(items[i]);
    }
    free(items);
}
