#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "cow_map_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define COW_LANES 32u
#define COW_LOW_BITS ((uint64_t)0x5555555555555555)

static uint64_t map_lower(uint64_t one, uint64_t other) { return one < other ? one : other; }

/* The lanes of the blocks [first, end) in the word of `first`. */
static uint64_t lanes(uint64_t first, uint64_t end)
{
	uint64_t from = first % COW_LANES, count = map_lower(COW_LANES - from, end - first);
	return (count == COW_LANES ? UINT64_MAX : (1ull << 2 * count) - 1) << 2 * from;
}

static uint64_t next_word(uint64_t block) { return block - block % COW_LANES + COW_LANES; }

static void *zeroed(uint64_t bytes)
{
	/* The room for the largest device; only what is used takes memory. */
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return at == MAP_FAILED ? NULL : at;
}

static uint64_t map_bytes(const struct cow_map *m) { return m->pages * COW_PAGE_BYTES; }

static int read_all(int file, uint8_t *to, uint64_t at, uint64_t bytes)
{
	while (bytes) {
		ssize_t count = pread(file, to, bytes, (off_t)at);
		if (count <= 0)
			return count ? -errno : -ENODATA;
		to += count;
		at += (uint64_t)count;
		bytes -= (uint64_t)count;
	}
	return 0;
}

static int write_all(int file, const uint8_t *from, uint64_t at, uint64_t bytes)
{
	while (bytes) {
		ssize_t count = pwrite(file, from, bytes, (off_t)at);
		if (count < 0)
			return -errno;
		from += count;
		at += (uint64_t)count;
		bytes -= (uint64_t)count;
	}
	return 0;
}

void cow_map_reserved(struct cow_map *m, uint64_t page, uint64_t count)
{
	while (count--)
		m->flags[page++] |= COW_RESERVED;
}

/* Reads part of a copy of the map; its pages count as reserved until judge_pages(). */
static int read_part(struct cow_map *m, uint64_t *to, uint64_t from, uint64_t at, uint64_t end)
{
	uint64_t page = (at - from) / COW_PAGE_BYTES;
	cow_map_reserved(m, page, (end - from - 1) / COW_PAGE_BYTES - page + 1);
	return read_all(m->file, (uint8_t *)to + (at - from), at, end - at);
}

/* Reads a copy of the map, whose holes are zeros. */
static int read_copy(struct cow_map *m, uint64_t *to, uint64_t from)
{
	off_t end = (off_t)(from + map_bytes(m)), at = (off_t)from;
	while (at < end) {
		off_t data = lseek(m->file, at, SEEK_DATA);
		if (data < 0)
			return errno == ENXIO ? 0 : -errno;
		off_t hole = data < end ? lseek(m->file, data, SEEK_HOLE) : data;
		if (hole < 0)
			return -errno;
		hole = hole < end ? hole : end;
		int error = data < hole ? read_part(m, to, from, (uint64_t)data, (uint64_t)hole) : 0;
		if (error)
			return error;
		at = hole > data ? hole : end;
	}
	return 0;
}

static uint64_t *page_words(uint64_t *words, uint64_t page) { return words + page * COW_PAGE_WORDS; }

/* Looks through a page for what is set and for a state that does not exist. */
static int examine(const uint64_t *words, bool *is_used)
{
	uint64_t any = 0, wrong = 0;
	for (unsigned i = 0; i < COW_PAGE_WORDS; i++) {
		any |= words[i];
		wrong |= words[i] & words[i] >> 1 & COW_LOW_BITS;
	}
	*is_used |= any != 0;
	return wrong ? -EBADMSG : 0;
}

static int judge_pages(struct cow_map *m, bool trusts_live)
{
	for (uint64_t page = 0; page < m->pages; page++) {
		uint64_t *words = page_words(m->words, page), *durable = page_words(m->durable, page);
		bool is_used = false;
		if (!(m->flags[page] & COW_RESERVED))
			continue;
		/* The live copy may be torn after a power failure, and is not looked at then. */
		int error = trusts_live ? examine(words, &is_used) : 0;
		if (!error)
			error = examine(durable, &is_used);
		if (error)
			return error;
		/* A file system that knows no holes names all pages; the unused ones may have no room yet. */
		if (!is_used)
			m->flags[page] &= (uint8_t)~COW_RESERVED;
		/* Also where the copies are equal: a flush that was killed may have written the durable one without the
		 * sync behind it, and a write with FUA would rely on it. */
		if (trusts_live && is_used)
			m->flags[page] |= COW_DIRTY;
	}
	return 0;
}

static int load(struct cow_map *m, bool trusts_live)
{
	int error = read_copy(m, m->durable, m->layout.durable_at);
	if (!error && trusts_live)
		error = read_copy(m, m->words, m->layout.live_at);
	if (!error)
		error = judge_pages(m, trusts_live);
	for (uint64_t page = 0; !error && !trusts_live && page < m->pages; page++)
		if (m->flags[page] & COW_RESERVED)
			memcpy(page_words(m->words, page), page_words(m->durable, page), COW_PAGE_BYTES);
	return error;
}

struct cow_map *cow_map_open(int file, const struct cow_layout *layout, int trusts_live, int *error)
{
	struct cow_map *m = calloc(1, sizeof *m);
	*error = -ENOMEM;
	if (!m)
		return NULL;
	m->layout = *layout;
	m->file = file;
	m->pages = layout->capacity_bytes / COW_BLOCK_BYTES / COW_PAGE_BLOCKS;
	m->words = zeroed(map_bytes(m));
	m->durable = zeroed(map_bytes(m));
	m->flags = zeroed(m->pages);
	if (m->words && m->durable && m->flags)
		*error = load(m, trusts_live);
	if (*error == 0)
		return m;
	cow_map_close(m);
	return NULL;
}

void cow_map_close(struct cow_map *m)
{
	if (m->words)
		munmap(m->words, map_bytes(m));
	if (m->durable)
		munmap(m->durable, map_bytes(m));
	if (m->flags)
		munmap(m->flags, m->pages);
	free(m);
}

int cow_map_write_live(const struct cow_map *m)
{
	uint64_t *found = malloc(COW_PAGE_BYTES);
	int error = found ? 0 : -ENOMEM;
	for (uint64_t page = 0; !error && page < m->pages; page++) {
		struct cow_piece piece = cow_map_page_piece(m, page, 1, false);
		off_t data = lseek(m->file, (off_t)piece.at, SEEK_DATA);
		bool is_hole = data < 0 ? errno == ENXIO : (uint64_t)data >= piece.at + piece.bytes;
		if (is_hole)
			memset(found, 0, COW_PAGE_BYTES);
		else
			error = read_all(m->file, (uint8_t *)found, piece.at, piece.bytes);
		if (!error && memcmp(found, piece.memory, COW_PAGE_BYTES) != 0)
			error = write_all(m->file, piece.memory, piece.at, piece.bytes);
	}
	free(found);
	return error;
}

static int map_is_cut(const struct cow_map *m)
{
	struct stat status;
	if (fstat(m->file, &status))
		return -errno;
	return (uint64_t)status.st_size < m->layout.data_at + m->layout.size_bytes ? -ENODATA : 0;
}

static int write_round(const struct cow_map *m)
{
	uint64_t count;
	for (uint64_t page = 0; (count = cow_map_pages(m, &page, m->pages, COW_ROUND, COW_ROUND)); page += count) {
		struct cow_piece piece = cow_map_page_piece(m, page, count, true);
		int error = write_all(m->file, piece.memory, piece.at, piece.bytes);
		if (error)
			return error;
	}
	return fdatasync(m->file) ? -errno : 0;
}

int cow_map_sync(struct cow_map *m)
{
	int error = map_is_cut(m);
	if (error)
		return error;
	bool has_pages = cow_map_round(m);
	error = fdatasync(m->file) ? -errno : 0;
	if (!error && has_pages)
		error = write_round(m);
	cow_map_round_over(m, error);
	return error;
}

uint64_t cow_map_run(const struct cow_map *m, uint64_t block, uint64_t end, int *state)
{
	uint64_t at = block;
	*state = (int)(m->words[cow_word(block)] >> 2 * (block % COW_LANES) & 3);
	uint64_t same = (uint64_t)*state * COW_LOW_BITS;
	for (; at < end; at = next_word(at)) {
		uint64_t other = (m->words[cow_word(at)] ^ same) & lanes(at, end);
		if (other)
			return at - at % COW_LANES + (uint64_t)__builtin_ctzll(other) / 2 - block;
	}
	return end - block;
}

uint64_t cow_map_count(const struct cow_map *m, uint64_t end, int state)
{
	uint64_t count = 0;
	for (uint64_t at = 0; at < end; at = next_word(at)) {
		uint64_t other = m->words[cow_word(at)] ^ (uint64_t)state * COW_LOW_BITS;
		uint64_t differs = (other | other >> 1) & COW_LOW_BITS;
		count += (uint64_t)__builtin_popcountll(~differs & COW_LOW_BITS & lanes(at, end));
	}
	return count;
}

static void touched(struct cow_map *m, uint64_t block) { m->flags[block / COW_PAGE_BLOCKS] |= COW_DIRTY; }

bool cow_map_set(struct cow_map *m, uint64_t first, uint64_t end, int state)
{
	bool changed = false;
	for (uint64_t at = first; at < end; at = next_word(at)) {
		uint64_t *word = &m->words[cow_word(at)], mask = lanes(at, end);
		uint64_t now = (*word & ~mask) | ((uint64_t)state * COW_LOW_BITS & mask);
		if (now == *word)
			continue;
		*word = now;
		touched(m, at);
		changed = true;
	}
	return changed;
}

void cow_map_revert(struct cow_map *m, uint64_t first, uint64_t end, const uint64_t *before)
{
	for (uint64_t at = first; at < end; at = next_word(at), before++) {
		uint64_t *word = &m->words[cow_word(at)], mask = lanes(at, end);
		*word = (*word & ~mask) | (*before & mask);
		touched(m, at);
	}
}

struct cow_piece cow_map_live(const struct cow_map *m, uint64_t first, uint64_t end)
{
	uint64_t word = cow_word(first), count = cow_word(end - 1) - word + 1;
	return (struct cow_piece){ &m->words[word], m->layout.live_at + word * sizeof *m->words,
				   count * sizeof *m->words };
}

bool cow_map_is_durable(const struct cow_map *m, uint64_t first, uint64_t end)
{
	for (uint64_t page = first / COW_PAGE_BLOCKS; page <= (end - 1) / COW_PAGE_BLOCKS; page++)
		if (m->flags[page] & (COW_DIRTY | COW_ROUND))
			return false;
	return true;
}

bool cow_map_is_reserving(const struct cow_map *m, uint64_t first, uint64_t end)
{
	for (uint64_t page = first / COW_PAGE_BLOCKS; page <= (end - 1) / COW_PAGE_BLOCKS; page++)
		if (m->flags[page] & COW_RESERVING)
			return true;
	return false;
}

bool cow_map_reserving(struct cow_map *m, uint64_t first, uint64_t end, bool begins)
{
	bool any = false;
	for (uint64_t page = first / COW_PAGE_BLOCKS; page <= (end - 1) / COW_PAGE_BLOCKS; page++) {
		if (begins ? m->flags[page] & COW_RESERVED : !(m->flags[page] & COW_RESERVING))
			continue;
		m->flags[page] ^= COW_RESERVING;
		any = true;
	}
	return any;
}

uint64_t cow_map_pages(const struct cow_map *m, uint64_t *page, uint64_t end, uint8_t mask, uint8_t flags)
{
	uint64_t last;
	while (*page < end && (m->flags[*page] & mask) != flags)
		++*page;
	for (last = *page; last < end && (m->flags[last] & mask) == flags;)
		last++;
	return last - *page;
}

struct cow_piece cow_map_page_piece(const struct cow_map *m, uint64_t page, uint64_t count, bool is_durable)
{
	return (struct cow_piece){ page_words(is_durable ? m->durable : m->words, page),
				   (is_durable ? m->layout.durable_at : m->layout.live_at) + page * COW_PAGE_BYTES,
				   count * COW_PAGE_BYTES };
}

bool cow_map_round(struct cow_map *m)
{
	bool any = false;
	for (uint64_t page = 0; page < m->pages; page++) {
		if (!(m->flags[page] & COW_DIRTY))
			continue;
		m->flags[page] = (uint8_t)((m->flags[page] & ~COW_DIRTY) | COW_ROUND);
		memcpy(page_words(m->durable, page), page_words(m->words, page), COW_PAGE_BYTES);
		any = true;
	}
	return any;
}

void cow_map_round_over(struct cow_map *m, bool failed)
{
	for (uint64_t page = 0; page < m->pages; page++) {
		if (!(m->flags[page] & COW_ROUND))
			continue;
		m->flags[page] &= (uint8_t)~COW_ROUND;
		if (failed)
			m->flags[page] |= COW_DIRTY;
	}
}
