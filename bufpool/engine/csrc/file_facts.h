/* The kernel's facts about an open file. */
#ifndef UBLKPOOL_FILE_FACTS_H
#define UBLKPOOL_FILE_FACTS_H

#include <stdint.h>

/* The alignment that O_DIRECT on this file demands of memory and offsets; 0: the file system does not say.  Returns 0
 * or -errno. */
int file_direct_alignment(int file, uint32_t *memory_bytes, uint32_t *offset_bytes);
/* A block device's size and sector sizes, in bytes.  Returns 0 or -errno. */
int file_block_device(int file, uint64_t *size_bytes, uint32_t *logical_bytes, uint32_t *physical_bytes);
/* The file's handle (name_to_handle_at(2)), which identifies its inode and, on most file systems, the inode's
 * generation.  `bytes` has room for `*size`, which becomes the handle's size.  Returns 0 or -errno. */
int file_handle(int file, uint8_t *bytes, uint32_t *size, int32_t *type);
/* The magic number of the file's file system (statfs(2)).  Returns 0 or -errno. */
int file_system_magic(int file, uint64_t *magic);
/* The file's time of birth in seconds and nanoseconds since 1970; 0 and 0 if the file system does not say.  Returns 0
 * or -errno. */
int file_birth(int file, int64_t *seconds, uint32_t *nanoseconds);

#endif
