/* An image in a Ceph cluster, through librbd, which the caller loads at run time: nothing here links to it. */
#ifndef UBLKPOOL_STORAGE_RBD_H
#define UBLKPOOL_STORAGE_RBD_H

#include <stddef.h>
#include <stdint.h>

struct storage;

/* An open image, and librbd's functions rbd_aio_*. */
struct rbd_calls {
	void *image;
	int (*create_completion)(void *arg, void (*done)(void *completion, void *arg), void **completion);
	int64_t (*get_return_value)(void *completion);
	void (*release)(void *completion);
	int (*read)(void *image, uint64_t offset, size_t length, char *memory, void *completion);
	int (*write)(void *image, uint64_t offset, size_t length, const char *memory, void *completion);
	int (*flush)(void *image, void *completion);
	int (*discard)(void *image, uint64_t offset, uint64_t length, void *completion);
	int (*write_zeroes)(void *image, uint64_t offset, size_t length, void *completion, int zero_flags,
			    int op_flags);
};

/* Placed writes land in slots of the own segment.  NULL: out of memory.  The image must stay open until librbd has
 * answered every request; a storage that is closed before leaves its own memory to librbd. */
struct storage *storage_rbd_new(const struct rbd_calls *calls, uint64_t slot_bytes);

#endif
