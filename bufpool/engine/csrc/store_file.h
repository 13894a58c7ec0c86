/* What a storage knows of a regular file that it does I/O on. */
#ifndef UBLKPOOL_STORE_FILE_H
#define UBLKPOOL_STORE_FILE_H

#include <fcntl.h>
#include <linux/magic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

/* A longer copy is worth a kernel thread that runs beside this one. */
#define STORE_AT_ONCE_BYTES_MAX (128u << 10)
/* In one entry of the ring. */
#define STORE_IO_BYTES_MAX (1u << 30)

struct store_file {
	int file;
	/* is_memory: I/O never waits, but io_uring would pass each request to a kernel thread, and two context switches
	 * cost more than the copy.  is_local: lseek(SEEK_END) only reads the inode's size (generic_file_llseek). */
	bool is_memory, is_local;
};

static inline struct store_file store_file_of(int file)
{
	struct store_file f = { .file = file };
	struct statfs status;
	if (fstatfs(file, &status) == 0) {
		f.is_memory = status.f_type == TMPFS_MAGIC || status.f_type == RAMFS_MAGIC;
		f.is_local = f.is_memory || status.f_type == EXT4_SUPER_MAGIC || status.f_type == XFS_SUPER_MAGIC ||
			     status.f_type == BTRFS_SUPER_MAGIC;
	}
	return f;
}

/* Whether the file is shorter than `bytes`; false if the kernel does not say.  lseek costs far less than statx, but may
 * wait for a server (nfs_file_llseek); statx with AT_STATX_DONT_SYNC is answered from the file system's cache. */
static inline bool store_file_is_short(const struct store_file *f, uint64_t bytes)
{
	struct statx facts;
	if (f->is_local) {
		off_t end = lseek(f->file, 0, SEEK_END);
		return end >= 0 && (uint64_t)end < bytes;
	}
	return statx(f->file, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_SIZE, &facts) == 0 &&
	       facts.stx_size < bytes;
}

#endif
