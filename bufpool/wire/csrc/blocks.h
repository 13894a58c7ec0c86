/* A bit for each block of a disk or a segment; a range is asked, set and cleared by words. */
#ifndef UBLKPOOL_BLOCKS_H
#define UBLKPOOL_BLOCKS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

enum { BLOCK_BYTES = 512, WORD_BITS = 64 };

struct blocks {
	uint64_t *words;
};

/* None is set.  False if memory is short. */
static inline bool blocks_open(struct blocks *b, uint64_t bytes)
{
	b->words = calloc(bytes / BLOCK_BYTES / WORD_BITS + 1, sizeof *b->words);
	return b->words;
}

static inline void blocks_close(struct blocks *b)
{
	free(b->words);
	b->words = NULL;
}

/* The bits of [first, end) in the word of bit `first`. */
static inline uint64_t blocks_mask(uint64_t first, uint64_t end)
{
	uint64_t low = first % WORD_BITS, count = end - first;
	uint64_t ones = count < WORD_BITS ? (1ull << count) - 1 : UINT64_MAX;
	return ones << low;
}

static inline uint64_t blocks_first(uint64_t offset) { return offset / BLOCK_BYTES; }

/* A block that is touched in part counts as a whole. */
static inline uint64_t blocks_end(uint64_t offset, uint64_t length)
{
	return length ? (offset + length - 1) / BLOCK_BYTES + 1 : offset / BLOCK_BYTES;
}

static inline bool blocks_any(const struct blocks *b, uint64_t offset, uint64_t length)
{
	uint64_t end = blocks_end(offset, length);
	for (uint64_t at = blocks_first(offset); at < end; at += WORD_BITS - at % WORD_BITS)
		if (b->words[at / WORD_BITS] & blocks_mask(at, end))
			return true;
	return false;
}

static inline void blocks_set(struct blocks *b, uint64_t offset, uint64_t length)
{
	uint64_t end = blocks_end(offset, length);
	for (uint64_t at = blocks_first(offset); at < end; at += WORD_BITS - at % WORD_BITS)
		b->words[at / WORD_BITS] |= blocks_mask(at, end);
}

static inline void blocks_clear(struct blocks *b, uint64_t offset, uint64_t length)
{
	uint64_t end = blocks_end(offset, length);
	for (uint64_t at = blocks_first(offset); at < end; at += WORD_BITS - at % WORD_BITS)
		b->words[at / WORD_BITS] &= ~blocks_mask(at, end);
}

#endif
