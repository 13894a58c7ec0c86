/* Forks on request, in a process that writes to as little of its memory as can be between two forks. */
#ifndef UQ_FORK_ASKED_H
#define UQ_FORK_ASKED_H

#include <stdint.h>

enum {
	UQ_ASKED_BYTES = 65536,
	UQ_ASKED_FDS = 128, /* Fewer than SCM_MAX_FD, 253. */
};

/* A request: a packet, and its descriptors, which are close-on-exec.  The first one is where the answer goes. */
struct uq_asked {
	uint32_t bytes, fd_count;
	int32_t fds[UQ_ASKED_FDS];
	uint8_t packet[UQ_ASKED_BYTES];
};

/* An answer to a request: the process of a queue; or queue -1 and a negative errno. */
struct uq_forked {
	int32_t queue, pid;
};

/*
 * Takes requests from the SOCK_SEQPACKET socket `sock`, and forks with uq_fork_beside() for each.  Returns 0 in the
 * child, whose request `asked` then is, and 1 when the socket has ended; or a negative errno, if the socket cannot be
 * read.  The parent answers with the child, as the process of queue 0, or with the reason of a failure, and keeps none
 * of the descriptors.  A request that is larger than `asked`, or whose descriptors had no room here, is answered with
 * -EMSGSIZE or -EMFILE.
 */
int uq_fork_when_asked(int sock, struct uq_asked *asked);

#endif
