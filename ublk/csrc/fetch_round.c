/* See fetch_round.h. */
#include "fetch_round.h"

#include <errno.h>
#include "io_command.h"

/* A device in recovery gets no request, but without need_get_data the driver wants an address. */
static char nowhere[4096] __attribute__((aligned(4096)));

/* A refused command has completed when it was submitted; an accepted one stays with the driver. */
static int fetch_queue(struct io_uring *ring, int char_fd, uint16_t queue, unsigned depth)
{
	unsigned taken = 0, foreign = 0, head, seen = 0;
	struct io_uring_cqe *cqe;
	int e;

	for (unsigned tag = 0; tag < depth; tag++) {
		struct uq_io_command c = { .queue = queue, .tag = (uint16_t)tag, .address = (uintptr_t)nowhere };
		struct io_uring_sqe *s = io_uring_get_sqe(ring);

		if (!s)
			return -EIO;
		uq_prepare_io_command(s, char_fd, UQ_IO_FETCH, c);
	}
	e = io_uring_submit(ring);
	if (e != (int)depth)
		return e < 0 ? e : -EIO;
	io_uring_for_each_cqe(ring, head, cqe) {
		taken += cqe->res == -EBUSY;    /* a task has fetched this tag */
		foreign += cqe->res == -EINVAL; /* another task has fetched the whole queue */
		seen++;
	}
	io_uring_cq_advance(ring, seen);
	return foreign == depth || seen == taken ? 0 : -EBUSY;
}

int uq_fetch_round(int char_fd, unsigned queues, unsigned depth)
{
	struct io_uring ring;
	int e = io_uring_queue_init(depth, &ring, 0);

	for (unsigned queue = 0; !e && queue < queues; queue++)
		e = fetch_queue(&ring, char_fd, (uint16_t)queue, depth);
	/* The ring stays open: the end of the process gives the accepted commands up. */
	return e;
}
