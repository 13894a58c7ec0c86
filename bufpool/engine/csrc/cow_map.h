/* The map of a copy-on-write overlay: two bits for each block of 4 KiB say where the block's content is.
 *
 * docs/COW.md describes the file.  Owns the map in memory, which is the newest; which of its pages the durable copy in
 * the file lacks; and which pages have their room in the file.  The file holds the map twice.  The live copy is written
 * before a change is answered, lies in the page cache and so survives every process, but after a power failure it may
 * name blocks whose data is lost.  The durable copy is written only after the data has been synced.
 *
 * The file is the caller's and outlives the map.  One thread uses a map.
 */
#ifndef UBLKPOOL_COW_MAP_H
#define UBLKPOOL_COW_MAP_H

#include <stdint.h>

enum { COW_BASE = 0, COW_DATA = 1, COW_ZERO = 2 };
enum { COW_BLOCK_BYTES = 4096, COW_PAGE_BYTES = 4096, COW_PAGE_BLOCKS = 16384, COW_PAGE_WORDS = 512 };

/* Offsets in the overlay, and sizes. */
struct cow_layout {
	uint64_t size_bytes;     /* the device's */
	uint64_t capacity_bytes; /* the largest device that the map has room for, a multiple of 64 MiB */
	uint64_t live_at, durable_at, data_at;
	uint64_t base_bytes; /* the base reads as zeros from here on */
};

struct cow_map;

/* Reads both copies.  With `trusts_live` the live one counts, else the durable one.  NULL on failure, with *error a
 * negative errno: -EBADMSG for a map with a state that does not exist. */
struct cow_map *cow_map_open(int file, const struct cow_layout *layout, int trusts_live, int *error);
void cow_map_close(struct cow_map *map);
/* Makes the file's live copy equal to the map.  Returns 0 or a negative errno. */
int cow_map_write_live(const struct cow_map *map);
/* Syncs the data and makes the durable copy equal to the map: no request may be running.  Returns 0 or a negative
 * errno; -ENODATA if the file is shorter than its device. */
int cow_map_sync(struct cow_map *map);
/* The state of a block and how many blocks from it on, up to `end`, have the same. */
uint64_t cow_map_run(const struct cow_map *map, uint64_t block, uint64_t end, int *state);
/* How many of the blocks up to `end` are in the state. */
uint64_t cow_map_count(const struct cow_map *map, uint64_t end, int state);

struct storage;

/* The disk whose map this is.  `base` and `overlay` are open files, which like the map outlive the storage.  Placed
 * writes land in slots of the own segment.  NULL: out of memory. */
struct storage *storage_cow_new(int base, int overlay, struct cow_map *map, uint64_t slot_bytes);

#endif
