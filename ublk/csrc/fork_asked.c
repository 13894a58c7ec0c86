/* See fork_asked.h. */
#include "fork_asked.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "control.h"

/* Returns 1, or 0 at the end of the socket, or a negative errno.  A request that is not whole has no bytes. */
static int receive(int sock, struct uq_asked *a, int *problem)
{
	union {
		struct cmsghdr aligned;
		char bytes[CMSG_SPACE(sizeof a->fds)];
	} room;
	struct iovec packet = { .iov_base = a->packet, .iov_len = sizeof a->packet };
	struct msghdr m = {
		.msg_iov = &packet, .msg_iovlen = 1, .msg_control = room.bytes, .msg_controllen = sizeof room.bytes
	};
	ssize_t n;

	do
		n = recvmsg(sock, &m, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	a->bytes = (uint32_t)n;
	a->fd_count = 0;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
		size_t bytes = c->cmsg_len - CMSG_LEN(0);

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		memcpy(a->fds, CMSG_DATA(c), bytes);
		a->fd_count = (uint32_t)(bytes / sizeof *a->fds);
	}
	*problem = m.msg_flags & MSG_TRUNC ? -EMSGSIZE : m.msg_flags & MSG_CTRUNC ? -EMFILE : 0;
	return n > 0;
}

static void answer(const struct uq_asked *a, int pid)
{
	struct uq_forked f = { .queue = pid < 0 ? -1 : 0, .pid = pid };

	/* The daemon may have given the request up, and closed the other end. */
	if (a->fd_count && write(a->fds[0], &f, sizeof f) < 0)
		return;
}

int uq_fork_when_asked(int sock, struct uq_asked *asked)
{
	for (;;) {
		int pid = 0;
		int e = receive(sock, asked, &pid);

		if (e <= 0)
			return e ? e : 1;
		if (!pid)
			pid = uq_fork_beside();
		if (!pid)
			return 0;
		answer(asked, pid);
		for (uint32_t i = 0; i < asked->fd_count; i++)
			close(asked->fds[i]);
	}
}
