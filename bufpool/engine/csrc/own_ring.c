#include "own_ring.h"

#include <errno.h>
#include <unistd.h>

#define RING_ENTRIES_MAX 4096u

int own_ring_open(struct own_ring *own, uint32_t entries, int event_file)
{
	static const unsigned modes[] = { IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
					  IORING_SETUP_COOP_TASKRUN, 0 };
	int error = -EINVAL;
	if (entries > RING_ENTRIES_MAX)
		entries = RING_ENTRIES_MAX;
	for (size_t i = 0; error == -EINVAL && i < sizeof modes / sizeof *modes; i++)
		error = io_uring_queue_init(entries, &own->ring, modes[i]);
	own->is_open = error == 0;
	/* Not a poll of the ring's own descriptor: with DEFER_TASKRUN a poll that began early misses the wake-up. */
	return error ? error : io_uring_register_eventfd(&own->ring, event_file);
}

void own_ring_close(struct own_ring *own)
{
	if (own->is_open)
		io_uring_queue_exit(&own->ring);
	own->is_open = false;
}

static void reap(struct own_ring *own, struct storage *s)
{
	struct io_uring_cqe *cqe;
	unsigned head, seen = 0;
	io_uring_for_each_cqe(&own->ring, head, cqe) {
		s->ops->complete(s, (uint32_t)io_uring_cqe_get_data64(cqe), cqe->res);
		seen++;
	}
	io_uring_cq_advance(&own->ring, seen);
}

static int submit(struct own_ring *own, struct storage *s)
{
	int result;
	do {
		s->ops->prepare(s);
		result = io_uring_submit(&own->ring);
		if (result == -EBUSY || result == -EAGAIN) {
			io_uring_get_events(&own->ring);
			reap(own, s);
		}
	} while (result == -EINTR || result == -EBUSY || result == -EAGAIN);
	return result < 0 ? result : 0;
}

static void quiet(int event_file)
{
	uint64_t events;
	if (read(event_file, &events, sizeof events) < 0)
		return;
}

int own_ring_turn(struct own_ring *own, struct storage *s)
{
	int error = submit(own, s);
	/* The eventfd is reset after the submission, since completions that came inline are reaped below and need no
	 * wake-up; and before io_uring_get_events(), since with DEFER_TASKRUN the kernel signals a completion before it
	 * lies in the ring. */
	quiet(s->event_file);
	io_uring_get_events(&own->ring);
	reap(own, s);
	/* Requests that moved only in part continue now; their completions make the eventfd readable. */
	return error ? error : submit(own, s);
}
