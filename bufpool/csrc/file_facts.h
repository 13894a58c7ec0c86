/* What the kernel says about an open file. */
#ifndef UBLKPOOL_FILE_FACTS_H
#define UBLKPOOL_FILE_FACTS_H

#include <stdint.h>

/* What O_DIRECT on this file demands of offsets and memory; 0 if the file system does not say.  0 or -errno. */
int file_direct_alignment(int file, uint32_t *memory_bytes, uint32_t *offset_bytes);
/* Size, sector sizes and discard ability of a block device.  0 or -errno. */
int file_block_device(int file, uint64_t *size_bytes, uint32_t *logical_bytes, uint32_t *physical_bytes);

#endif
