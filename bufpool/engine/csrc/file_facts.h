/* What the kernel says about an open file. */
#ifndef UBLKPOOL_FILE_FACTS_H
#define UBLKPOOL_FILE_FACTS_H

#include <stdint.h>

/* What O_DIRECT on this file demands of offsets and memory; 0 if the file system does not say.  0 or -errno. */
int file_direct_alignment(int file, uint32_t *memory_bytes, uint32_t *offset_bytes);
/* Size, sector sizes and discard ability of a block device.  0 or -errno. */
int file_block_device(int file, uint64_t *size_bytes, uint32_t *logical_bytes, uint32_t *physical_bytes);
/* The file's handle (name_to_handle_at(2)): which inode it is, and for most file systems which of those that had its
   number.  `bytes` has room for `*size`, which becomes the handle's size.  0 or -errno. */
int file_handle(int file, uint8_t *bytes, uint32_t *size, int32_t *type);
/* The magic number of its file system (statfs(2)).  0 or -errno. */
int file_system_magic(int file, uint64_t *magic);
/* When the file was made, in seconds and nanoseconds since 1970; 0 and 0 if the file system does not say.  0 or -errno.
 */
int file_birth(int file, int64_t *seconds, uint32_t *nanoseconds);

#endif
