/*
 * A queue on a real driver: one io_uring that carries the queue's commands and polls the owner's descriptors.
 *
 * Made, used and freed in the worker, after fork.  uq_ring_run() is entered without Python's lock and comes back when
 * the owner has something to do, which is not once a request while descriptors travel in batches.
 */
#ifndef UQ_QUEUE_RING_H
#define UQ_QUEUE_RING_H

#include "engine_calls.h"
#include "queue_core.h"
#include "queue_port.h"

enum { UQ_WATCHES_MAX = 8, UQ_WATCH_SHIFT = 16 };

struct uq_ring;

/* `char_fd` is /dev/ublkcN, which the ring holds open too.  Before it sleeps the ring polls for news for up to
 * `spin_us` microseconds, see spin.h.  It has room for the I/O of an engine with `engine_requests` requests, see
 * uq_ring_use_engine().  Returns 0 or a negative errno. */
int uq_ring_new(struct uq *q, int char_fd, unsigned depth, unsigned spin_us, unsigned engine_requests,
		struct uq_ring **out);
void uq_ring_free(struct uq_ring *r);

/* Have uq_ring_run() return with bit (UQ_WATCH_SHIFT + index) when `fd` is readable; -1 stops watching. */
int uq_ring_watch(struct uq_ring *r, unsigned index, int fd);

/*
 * Descriptors travel through this port from now on, none through Python; NULL ends that.  The backend writes to the
 * eventfd `bell_in` when it has something for a sleeping worker, the ring writes to `bell_out`.  The owner closes both,
 * at once after the port was replaced.
 */
void uq_ring_use_port(struct uq_ring *r, struct uq_port *port, int bell_in, int bell_out);

/*
 * This engine answers from now on, in the place of a backend (queue_inside.h), and does its I/O through this ring:
 * once, before the queue has a link.  Returns 0 or a negative errno.
 */
int uq_ring_use_engine(struct uq_ring *r, const struct engine_calls *calls, struct engine *engine);

/* For uq_ring_run(): no time limit. */
enum { UQ_FOREVER_MS = 0x7fffffff };

/*
 * Submits what is to be submitted, waits at most `timeout_ms` (0: does not wait) for completions, and feeds them to the
 * queue until it wants attention or a watched descriptor is readable.
 *
 * Returns attention bits and watch bits, 0 after the timeout, or a negative errno.
 */
int uq_ring_run(struct uq_ring *r, unsigned timeout_ms);

#endif
