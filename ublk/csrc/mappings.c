/* See mappings.h. */
#include "mappings.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "queue_core.h"

#define MAX_DEPTH 4096
#define IOD_BYTES sizeof(struct uq_iod)
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#define HUGE_PAGE_BYTES (2ull << 20) /* bufpool/huge_pages.py makes them */

static size_t page_align(size_t bytes)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	return (bytes + page - 1) / page * page;
}

void *uq_map_descriptors(int char_fd, unsigned queue, unsigned depth)
{
	off_t offset = (off_t)(queue * page_align(MAX_DEPTH * IOD_BYTES));
	void *at = mmap(NULL, page_align(depth * IOD_BYTES), PROT_READ, MAP_SHARED | MAP_POPULATE, char_fd, offset);

	return at == MAP_FAILED ? NULL : at;
}

int uq_unmap_descriptors(void *address, unsigned depth) { return munmap(address, page_align(depth * IOD_BYTES)); }

/* MAP_POPULATE would do nothing in a process that locks its memory on fault (MCL_ONFAULT). */
static void *populated(void *at, uint64_t bytes, int advice)
{
	int e;

	if (at == MAP_FAILED || !madvise(at, bytes, advice))
		return at == MAP_FAILED ? NULL : at;
	e = errno;
	munmap(at, bytes);
	errno = e;
	return NULL;
}

/* Maps into `room` if that is not NULL.  MADV_POPULATE_READ: the file's pages are allocated, and a read fault maps many
 * at once, writable, too. */
static void *map_shared(void *room, int fd, uint64_t bytes)
{
	void *at = mmap(room, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | (room ? MAP_FIXED : 0), fd, 0);

	if (at == MAP_FAILED && room)
		munmap(room, bytes);
	return populated(at, bytes, MADV_POPULATE_READ);
}

/* Reserves `bytes` of addresses at a multiple of a huge page's size.  The kernel chooses such addresses only for files
 * of a mount with huge pages. */
static uint8_t *aligned_room(uint64_t bytes)
{
	uint8_t *from =
		mmap(NULL, bytes + HUGE_PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint64_t before = -(uintptr_t)from & (HUGE_PAGE_BYTES - 1);

	if (from == MAP_FAILED)
		return NULL;
	if (before)
		munmap(from, before);
	munmap(from + before + bytes, HUGE_PAGE_BYTES - before);
	return from + before;
}

void *uq_map_segment(int fd, uint64_t bytes)
{
	uint8_t *room = bytes < HUGE_PAGE_BYTES ? NULL : aligned_room(page_align(bytes));

	return room || bytes < HUGE_PAGE_BYTES ? map_shared(room, fd, bytes) : NULL;
}

int uq_unmap_segment(void *address, uint64_t bytes) { return munmap(address, bytes); }

int uq_map_over(void *at, void *fresh, uint64_t bytes)
{
	return mremap(fresh, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, at) == MAP_FAILED ? -errno : 0;
}

/* Maps the file's first `unit` bytes again and again, until `bytes` of addresses lead there. */
static int map_again(uint8_t *room, int fd, uint64_t bytes, uint64_t unit)
{
	for (uint64_t at = 0; at < bytes; at += unit) {
		uint64_t left = bytes - at;

		if (mmap(room + at, left < unit ? left : unit, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) ==
		    MAP_FAILED)
			return -errno;
	}
	return madvise(room, bytes, MADV_POPULATE_WRITE) ? -errno : 0;
}

void *uq_map_sink(uint64_t bytes)
{
	uint64_t whole = page_align(bytes);
	int fd = memfd_create("ublkpool-sink", MFD_CLOEXEC), e = fd < 0 ? -errno : 0;
	uint8_t *room = MAP_FAILED;

	if (!e && ftruncate(fd, UQ_SINK_BYTES))
		e = -errno;
	if (!e) {
		room = mmap(NULL, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		e = room == MAP_FAILED ? -errno : map_again(room, fd, whole, UQ_SINK_BYTES);
	}
	if (fd >= 0)
		close(fd);
	if (e && room != MAP_FAILED)
		munmap(room, whole);
	errno = -e;
	return e ? NULL : room;
}
