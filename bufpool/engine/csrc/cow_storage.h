/* What the parts of the copy-on-write storage share: storage_cow.c has its requests and their I/O, cow_change.c what a
 * change of blocks goes through, cow_flush.c the flushes. */
#ifndef UBLKPOOL_COW_STORAGE_H
#define UBLKPOOL_COW_STORAGE_H

#include "blocks.h"
#include "cow_map_internal.h"
#include "fifo.h"
#include "own_ring.h"
#include "slots.h"
#include "store_file.h"

#define BOUNCES_MAX 32u
#define KEPT_WORDS 8u
#define COW_SECTOR_BYTES 512u

enum cow_step {
	COW_READ,
	COW_RESERVE_LIVE,
	COW_RESERVE_DURABLE,
	COW_COPY_READ,
	COW_COPY_WRITE,
	COW_WRITE,
	COW_PUNCH,
	COW_MAP,
	COW_MAP_BACK,
	COW_FLUSH_DATA,
	COW_FLUSH_MAP,
	COW_FLUSH_END
};
enum cow_io { COW_IO_BASE, COW_IO_READ, COW_IO_WRITE, COW_IO_PUNCH, COW_IO_SYNC };
/* NEXT: the request's next I/O is set up; AWAY: it has ended, or waits for another request. */
enum cow_next { NEXT, AWAY };

/* A request's progress, by its index. */
struct cow_work {
	struct cow_piece io; /* what is left of the present I/O */
	uint64_t done;       /* bytes of the request */
	uint64_t page;       /* of the map, in a flush and when room is reserved */
	uint64_t zeroed;     /* bytes behind a read from the base, to the end of its last sector */
	uint64_t *before;    /* the map's words before the request changed them */
	uint64_t kept[KEPT_WORDS];
	uint8_t *bounce;
	int32_t error;               /* of COW_MAP */
	uint8_t step, kind;          /* kind: enum cow_io */
	bool is_dsync, is_copied[2]; /* is_copied: the first and the last block, from the base */
};

struct cow_storage {
	struct storage base;
	struct slots slots;
	struct own_ring own;
	struct io_uring *ring;
	struct cow_map *map;
	struct cow_work *work;
	struct fifo runnable;
	struct fifo flushing, flushes; /* the requests of the running flush, and of the next */
	struct blocks busy;            /* blocks that a request changes */
	uint32_t *waiting, waits;      /* changes that wait for others, in their order of arrival */
	uint8_t *zeroes, *bounces, *bounce[BOUNCES_MAX];
	uint32_t bounces_free, requests, writes_runnable;
	struct store_file base_file, file;
	bool was_measured, was_changed, is_cut; /* as in storage_file.c */
	bool is_news;                           /* a change or a flush has ended, for which others may wait */
};

static inline struct cow_storage *cow_of(struct storage *s) { return (struct cow_storage *)s; }

static inline struct cow_work *cow_work_of(const struct cow_storage *c, const struct storage_request *r)
{
	return &c->work[r->index];
}

static inline uint64_t cow_lower(uint64_t one, uint64_t other) { return one < other ? one : other; }

static inline bool cow_is_change(const struct storage_request *r)
{
	return r->d.op != WIRE_READ && r->d.op != WIRE_FLUSH;
}

static inline uint64_t cow_end(const struct storage_request *r) { return r->d.offset + r->d.length; }

static inline uint64_t cow_first_block(const struct storage_request *r) { return r->d.offset / COW_BLOCK_BYTES; }

static inline uint64_t cow_end_block(const struct storage_request *r) { return (cow_end(r) - 1) / COW_BLOCK_BYTES + 1; }

static inline int cow_state_of(const struct cow_storage *c, uint64_t block)
{
	int state;
	cow_map_run(c->map, block, block + 1, &state);
	return state;
}

/* Sets up an I/O. */
static inline enum cow_next cow_next_io(struct cow_work *w, enum cow_step step, enum cow_io kind,
					struct cow_piece piece)
{
	w->step = (uint8_t)step;
	w->kind = (uint8_t)kind;
	w->io = piece;
	return NEXT;
}

/* cow_flush.c */
/* Lets the request end with the next flush. */
enum cow_next cow_flush_join(struct cow_storage *c, const struct storage_request *r);
/* Begins a flush if one is wanted and none runs; the request that does it for all, or NULL. */
struct storage_request *cow_flush_begin(struct cow_storage *c);
enum cow_next cow_flush_stepped(struct cow_storage *c, struct cow_work *w);
enum cow_next cow_flush_over(struct cow_storage *c, int32_t error);

/* cow_change.c */
/* Whether a change may begin, before which the first `earlier` of the waiting ones came. */
bool cow_change_may_begin(const struct cow_storage *c, const struct storage_request *r, uint32_t earlier);
enum cow_next cow_change_begin(struct cow_storage *c, struct storage_request *r);
enum cow_next cow_change_stepped(struct cow_storage *c, struct storage_request *r);
enum cow_next cow_change_failed(struct cow_storage *c, struct storage_request *r, int32_t error);

#endif
