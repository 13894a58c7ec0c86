/* A disk in a regular file: one block with an identity, then the disk's bytes.
 *
 * An answered write is in the page cache, so it survives the death of this process; FLUSH and FUA put it on the medium.
 * Results are bytes, 0, or a negative errno, as a DONE carries them. */
#ifndef EXAMPLE_DISK_H
#define EXAMPLE_DISK_H

#include <stdbool.h>
#include <stdint.h>

#include "attach.h"

enum { DISK_HEADER_BYTES = 4096, DISK_BLOCK_BYTES = 512, DISK_IDENTITY_BYTES = 33 };

struct disk {
	const char *path;
	int file;
	uint64_t bytes;
	bool read_only;
	char identity[DISK_IDENTITY_BYTES];
};

/* Opens the file, alone: a predecessor that was killed keeps its lock until its last write has ended, and this waits
 * for that.  Makes a missing file of `size_bytes` (0: the device's) if the device was never served; never replaces one.
 */
void disk_open(struct disk *disk, const char *path, uint64_t size_bytes, const struct described *described);

/* A read or write past the end of the file ends the program: the store was cut, and its requests go to a successor. */
int32_t disk_read(const struct disk *disk, void *to, uint64_t offset, uint64_t length);
int32_t disk_write(const struct disk *disk, const void *from, uint64_t offset, uint64_t length, bool fua);
int32_t disk_flush(const struct disk *disk);
int32_t disk_discard(const struct disk *disk, uint64_t offset, uint64_t length);
int32_t disk_zero(const struct disk *disk, uint64_t offset, uint64_t length, bool may_unmap, bool fua);

#endif
