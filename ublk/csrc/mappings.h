/* A worker's mappings: the driver's descriptors, shared segments, private memory. */
#ifndef UQ_MAPPINGS_H
#define UQ_MAPPINGS_H

#include <stdint.h>

enum { UQ_SINK_BYTES = 65536 };

/* Maps a queue's descriptor array read-only (offset queue * 4096 * 24, length depth * 24, page-aligned).
 * The driver lets only the first address space map it; a mapping made before fork stays valid in the child.  NULL: see
 * errno. */
void *uq_map_descriptors(int char_fd, unsigned queue, unsigned depth);
int uq_unmap_descriptors(void *address, unsigned depth);

/* Maps `bytes` of a segment shared, writable, populated, at an address where its huge pages fit.  NULL: see errno. */
void *uq_map_segment(int fd, uint64_t bytes);
int uq_unmap_segment(void *address, uint64_t bytes);
/* Moves the mapping `fresh` to `at`, in place of the mapping there.  Returns 0, or -errno, after which `at` may be
 * unmapped. */
int uq_map_over(void *at, void *fresh, uint64_t bytes);
/* Memory of this process for what is written and not read, populated: all of its addresses lead to UQ_SINK_BYTES of
 * memory, again and again.  NULL: see errno. */
void *uq_map_sink(uint64_t bytes);

#endif
