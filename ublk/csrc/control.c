/* See control.h. */
#include "control.h"

#include <errno.h>
#include <liburing.h>
#include <linux/close_range.h>
#include <sched.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

struct control_command { /* struct ublksrv_ctrl_cmd (include/uapi/linux/ublk_cmd.h) */
	uint32_t device;
	uint16_t queue, bytes;
	uint64_t buffer, data;
	uint16_t path_bytes, pad;
	uint32_t reserved;
};
_Static_assert(sizeof(struct control_command) == 32, "ublksrv_ctrl_cmd");

static int run(struct io_uring *ring)
{
	struct io_uring_cqe *cqe;
	int e = io_uring_submit(ring);

	if (e < 0)
		return e;
	do
		e = io_uring_wait_cqe(ring, &cqe);
	while (e == -EINTR);
	return e ? e : cqe->res;
}

int uq_control(int control_fd, uint32_t op, uint32_t device, uint16_t queue, void *buffer, uint16_t bytes,
	       uint16_t path_bytes, uint64_t data)
{
	struct control_command c = { .device = device,
				     .queue = queue,
				     .bytes = bytes,
				     .buffer = (uintptr_t)buffer,
				     .data = data,
				     .path_bytes = path_bytes };
	struct io_uring_sqe *s;
	struct io_uring ring;
	int e = io_uring_queue_init(4, &ring, IORING_SETUP_SQE128);

	if (e)
		return e;
	s = io_uring_get_sqe(&ring);
	if (!s) {
		io_uring_queue_exit(&ring);
		return -EBUSY;
	}
	memset(s, 0, 128);
	s->opcode = IORING_OP_URING_CMD;
	s->fd = control_fd;
	memcpy((char *)s + offsetof(struct io_uring_sqe, off), &op, sizeof op);
	memcpy((char *)s + 48, &c, sizeof c);
	e = run(&ring);
	io_uring_queue_exit(&ring);
	return e;
}

int uq_set_io_flusher(void) { return prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) ? -errno : 0; }

int uq_lock_memory(void) { return mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) ? -errno : 0; }

int uq_private_mounts(void)
{
	if (unshare(CLONE_NEWNS))
		return -errno;
	return mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) ? -errno : 0;
}

int uq_die_with(int parent)
{
	if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))
		return -errno;
	/* The parent may have died before prctl(). */
	return getppid() == parent ? 0 : -ESRCH;
}

int uq_leave_mount(const char *path) { return umount2(path, MNT_DETACH) ? -errno : 0; }

/* With a type: a filter such as systemd's RestrictNamespaces=mnt refuses a setns with type 0. */
int uq_enter_mounts(int fd) { return setns(fd, CLONE_NEWNS) ? -errno : 0; }

int uq_set_name(const char *name) { return prctl(PR_SET_NAME, name, 0, 0, 0) ? -errno : 0; }

int uq_fork_beside(void)
{
	/* Not clone3(), whose flags no filter sees: systemd's RestrictNamespaces= refuses it as a whole. */
	unsigned long flags = CLONE_PARENT | CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | SIGCHLD;
	int *thread_number = NULL;
	void *robust = NULL;
	size_t robust_bytes = 0;
	long child;

	/* What fork() of the C library does for the child's thread: where its number is, and its robust mutexes. */
	if (prctl(PR_GET_TID_ADDRESS, &thread_number, 0, 0, 0) ||
	    syscall(SYS_get_robust_list, 0, &robust, &robust_bytes))
		return -errno;
	/* The last two arguments change places between architectures; the other one is not looked at. */
	child = syscall(SYS_clone, flags, NULL, NULL, thread_number, thread_number);
	if (!child && robust)
		syscall(SYS_set_robust_list, robust, robust_bytes);
	return child < 0 ? -errno : (int)child;
}

int uq_close_all_but(const int *keep, unsigned count)
{
	unsigned first = 0;

	for (unsigned i = 0; i < count; i++) {
		if ((unsigned)keep[i] > first && syscall(SYS_close_range, first, keep[i] - 1, 0))
			return -errno;
		first = (unsigned)keep[i] + 1;
	}
	return syscall(SYS_close_range, first, ~0u, 0) ? -errno : 0;
}
