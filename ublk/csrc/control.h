/* A ublk control command on a ring of its own, and the process settings for which Python has no call. */
#ifndef UQ_CONTROL_H
#define UQ_CONTROL_H

#include <stdint.h>

/*
 * Sends control command `op` (ioctl-encoded) for `device` and waits for it.  `queue` is 0xffff for most commands.
 * The first `path_bytes` of `buffer` are the path of the device's node, which the driver wants of an ordinary user.
 * The ring lives for this call only.  Returns the command's result: 0 or more, or a negative errno.
 */
int uq_control(int control_fd, uint32_t op, uint32_t device, uint16_t queue, void *buffer, uint16_t bytes,
	       uint16_t path_bytes, uint64_t data);

/* PR_SET_IO_FLUSHER (Linux 5.6, needs CAP_SYS_RESOURCE): this thread's allocations never wait for its own device.
 * Returns 0 or a negative errno. */
int uq_set_io_flusher(void);
/* mlockall() of present mappings and of pages as they are touched.  Returns 0 or a negative errno. */
int uq_lock_memory(void);
/* Moves this process into a private mount namespace, so that it holds no mount of its own device that is made later.
 * Returns 0 or a negative errno. */
int uq_private_mounts(void);
/* Unmounts `path` in this process's mount namespace.  Returns 0 or a negative errno. */
int uq_leave_mount(const char *path);
/* Moves this process into the mount namespace behind `fd`; its root and working directory are that namespace's root.
 * Returns 0 or a negative errno. */
int uq_enter_mounts(int fd);
/* The name that ps shows, cut to 15 characters.  Returns 0 or a negative errno. */
int uq_set_name(const char *name);
/* The kernel kills this process (SIGKILL) when `parent` ends; -ESRCH if `parent` is no longer its parent. */
int uq_die_with(int parent);
/* As fork(), but the child is a child of this process's parent, which gets SIGCHLD and the exit status.  For a process
 * with one thread; pthread_atfork() handlers do not run.  Returns the child's number, 0 in the child, or a negative
 * errno. */
int uq_fork_beside(void);
/* Closes every descriptor but those in `keep`, which is in ascending order.  Returns 0 or a negative errno. */
int uq_close_all_but(const int *keep, unsigned count);

#endif
