#include "file_facts.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#define STATX_DIOALIGN_BIT 0x2000u
#define STATX_BTIME_BIT 0x800u
#define HANDLE_BYTES_MAX 128

int file_direct_alignment(int file, uint32_t *memory_bytes, uint32_t *offset_bytes)
{
	/* glibc's struct statx may be older than these fields: 32-bit words 38 and 39 of the kernel's 256 bytes. */
	uint32_t words[64] = { 0 };
	if (syscall(SYS_statx, file, "", AT_EMPTY_PATH, STATX_DIOALIGN_BIT, words))
		return -errno;
	bool known = words[0] & STATX_DIOALIGN_BIT;
	*memory_bytes = known ? words[38] : 0;
	*offset_bytes = known ? words[39] : 0;
	return 0;
}

int file_block_device(int file, uint64_t *size_bytes, uint32_t *logical_bytes, uint32_t *physical_bytes)
{
	int logical = 0;
	unsigned physical = 0;
	if (ioctl(file, BLKGETSIZE64, size_bytes) || ioctl(file, BLKSSZGET, &logical) ||
	    ioctl(file, BLKPBSZGET, &physical))
		return -errno;
	*logical_bytes = (uint32_t)logical;
	*physical_bytes = physical;
	return 0;
}

int file_handle(int file, uint8_t *bytes, uint32_t *size, int32_t *type)
{
	/* struct file_handle: two 32-bit words, then the handle.  glibc declares it only with _GNU_SOURCE. */
	struct {
		uint32_t size;
		int32_t type;
		uint8_t bytes[HANDLE_BYTES_MAX];
	} handle = { .size = HANDLE_BYTES_MAX };
	int mount;
	if (syscall(SYS_name_to_handle_at, file, "", &handle, &mount, AT_EMPTY_PATH))
		return -errno;
	if (handle.size > *size)
		return -EOVERFLOW;
	*size = handle.size;
	*type = handle.type;
	memcpy(bytes, handle.bytes, handle.size);
	return 0;
}

int file_system_magic(int file, uint64_t *magic)
{
	struct statfs about;
	if (fstatfs(file, &about))
		return -errno;
	*magic = (uint32_t)about.f_type;
	return 0;
}

int file_birth(int file, int64_t *seconds, uint32_t *nanoseconds)
{
	/* struct statx, stx_btime: bytes 80 to 91. */
	uint32_t words[64] = { 0 };
	if (syscall(SYS_statx, file, "", AT_EMPTY_PATH, STATX_BTIME_BIT, words))
		return -errno;
	bool known = words[0] & STATX_BTIME_BIT;
	memcpy(seconds, &words[20], sizeof *seconds);
	if (!known)
		*seconds = 0;
	*nanoseconds = known ? words[22] : 0;
	return 0;
}
