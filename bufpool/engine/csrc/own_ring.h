/* The storage's own io_uring, used until the engine is given another, and the eventfd that says when to turn it. */
#ifndef UBLKPOOL_OWN_RING_H
#define UBLKPOOL_OWN_RING_H

#include <liburing.h>

#include "storage.h"

struct own_ring {
	struct io_uring ring;
	bool is_open;
};

/* 0 or a negative errno. */
int own_ring_open(struct own_ring *own, uint32_t entries, int event_file);
/* Submit and reap with s->ops->prepare and complete.  0 or a negative errno. */
int own_ring_turn(struct own_ring *own, struct storage *s);
void own_ring_close(struct own_ring *own);

#endif
