/* Reads tensors of a checkpoint from beginning to end, once, with several threads: for those who check them
 * and lay copies of them out. What the page cache has is used where it is mapped. All else is read past it
 * (O_DIRECT) into a buffer of the thread, so that a checkpoint larger than memory drives nothing out of the
 * cache and is not there twice; where the file system has no such way it is read through the mapping.
 * Thread: any; one load has its own threads, which end with it. */
#pragma once
#include "common/model/checkpoint.h"

enum { MD_LOAD_TENSORS_MAX = 8 };

typedef struct md_reader md_reader; /* one thread's way to the tensors */

typedef struct md_load {
    uint32_t n_item;
    uint32_t n_threads; /* that compute at once, >= 1; while these do, as many others wait for the disk */
    uint64_t
        item_bytes_max; /* of the tensors that one item reads: there are as many buffers as fit a bound */
    /* Item i of n_item, each once, begun in this order; on one of the load's threads. It reads first and
     * computes then. The first error ends the load. */
    cm_status (*item)(void *ctx, uint32_t i, md_reader *reader, cm_error *err);
    /* The tensors of item i that will be kept where they are mapped, so that the disk begins with them before
     * their turn comes; returns how many. NULL: none of any item. Threads as above. */
    uint32_t (*kept)(void *ctx, uint32_t i, const md_tensor *tensors_out[MD_LOAD_TENSORS_MAX]);
    void *ctx;
} md_load;

/* How much came which way; of data, without what is used where it is mapped. */
typedef struct md_load_bytes {
    uint64_t cached, direct, mapped; /* mapped: was in no cache, and O_DIRECT is not there */
} md_load_bytes;

/* Ends with the first error of an item, or CM_OK. */
CM_MUST_CHECK cm_status md_load_run(const md_load *load, md_load_bytes *bytes_out, cm_error *err);

/* For an item, once: makes tensors[i].data (n <= MD_LOAD_TENSORS_MAX copies of a checkpoint's) point to where
 * they can be read until the item ends. likely: they were read not long ago, which decides where the system
 * does not tell whether the page cache has them. CM_E_IO, CM_E_MEMORY. */
CM_MUST_CHECK cm_status md_reader_read(md_reader *reader, md_tensor *tensors, uint32_t n, bool likely,
                                       cm_error *err);
/* The same for a tensor that stays in use where it is mapped: it is in the page cache then. */
void md_reader_keep(md_reader *reader, const md_tensor *tensor);
