/* What the storage needs of the map beside cow_map.h. */
#ifndef UBLKPOOL_COW_MAP_INTERNAL_H
#define UBLKPOOL_COW_MAP_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>

#include "cow_map.h"

/* By page of the map. */
enum cow_page {
	COW_DIRTY = 1,    /* the durable copy lacks a change */
	COW_ROUND = 2,    /* the running flush writes it */
	COW_RESERVED = 4, /* both copies have their room in the file */
	/* A change gives it that room by writing both copies.  Other changes of the page wait: a write that is late
	 * would carry their states into the durable copy before their data is synced. */
	COW_RESERVING = 8,
};

struct cow_map {
	struct cow_layout layout;
	int file;
	uint64_t pages;
	uint64_t *words;   /* the map */
	uint64_t *durable; /* what the durable copy has, or gets in the running flush */
	uint8_t *flags;    /* enum cow_page */
};

/* A range of the map's words, and where its live copy is in the file. */
struct cow_piece {
	void *memory;
	uint64_t at, bytes;
};

static inline uint64_t cow_word(uint64_t block) { return block / 32; }

struct cow_piece cow_map_live(const struct cow_map *m, uint64_t first, uint64_t end);
/* Sets blocks; whether one of them had another state. */
bool cow_map_set(struct cow_map *m, uint64_t first, uint64_t end, int state);
/* Puts back the states of these blocks from `before`, a copy of their words. */
void cow_map_revert(struct cow_map *m, uint64_t first, uint64_t end, const uint64_t *before);
/* Whether no page of these blocks has a change that the durable copy lacks. */
bool cow_map_is_durable(const struct cow_map *m, uint64_t first, uint64_t end);
/* The next run of pages from *page on, below `end`, whose flags masked with `mask` equal `flags`.  Returns its length,
 * and moves *page to its begin; 0: none. */
uint64_t cow_map_pages(const struct cow_map *m, uint64_t *page, uint64_t end, uint8_t mask, uint8_t flags);
/* The pages in the live or the durable copy. */
struct cow_piece cow_map_page_piece(const struct cow_map *m, uint64_t page, uint64_t count, bool is_durable);
void cow_map_reserved(struct cow_map *m, uint64_t page, uint64_t count);
/* Whether another change gives one of the pages of these blocks its room. */
bool cow_map_is_reserving(const struct cow_map *m, uint64_t first, uint64_t end);
/* Begins to give those of the pages that have none their room, or ends it.  Returns whether there is one. */
bool cow_map_reserving(struct cow_map *m, uint64_t first, uint64_t end, bool begins);
/* Begins a flush: the present map is what it makes durable, after the data was synced.  Returns whether there is
 * anything to write. */
bool cow_map_round(struct cow_map *m);
/* Ends it; what a failed flush was to write remains to be written. */
void cow_map_round_over(struct cow_map *m, bool failed);

#endif
