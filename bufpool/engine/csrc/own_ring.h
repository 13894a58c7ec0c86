/* A storage's own io_uring, in use until the engine is given another; the engine's eventfd says when to turn it. */
#ifndef UBLKPOOL_OWN_RING_H
#define UBLKPOOL_OWN_RING_H

#include <liburing.h>

#include "storage.h"

struct own_ring {
	struct io_uring ring;
	bool is_open;
};

/* Returns 0 or a negative errno. */
int own_ring_open(struct own_ring *own, uint32_t entries, int event_file);
/* Submits and reaps, through s->ops->prepare and s->ops->complete.  Returns 0 or a negative errno. */
int own_ring_turn(struct own_ring *own, struct storage *s);
void own_ring_close(struct own_ring *own);

#endif
