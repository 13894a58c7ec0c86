/* The native engine: wire descriptors in, a storage's work in between, answers out.
 *
 * Owns the protocol's half of a backend: the state of every (queue, tag), epochs and fences, which region of the own
 * segment is named for whom, who waits for one, what is posted ahead, and the answers.  What is done with the data is a
 * storage's (storage.h), which the engine is opened on.  Knows nothing of sockets, rings of descriptors and Python. One
 * thread uses an engine, the one that opened it; every function may be called without the GIL.  Memory that it is given
 * (pool, client area, own segment) must outlive it.
 */
#ifndef UBLKPOOL_ENGINE_H
#define UBLKPOOL_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#include "wire.h"

#define ENGINE_USER_DATA (1ull << 63)
#define ENGINE_POST_SIZES_MAX 8

struct engine_setup {
	uint32_t device, epoch, queues, depth, read_only;
	uint64_t size_bytes;
	uint8_t *pool;
	uint64_t pool_bytes;
	uint8_t *slices[WIRE_CLIENT_SLICES_MAX]; /* of the client area, NULL for one that is not there */
	uint64_t slice_bytes;
	uint8_t *own;
	uint64_t own_bytes;
	uint32_t own_segment;
	/* Ascending, the last for the largest write: in which sizes buffers may be posted.  None: writes ask, all of
	 * them. */
	uint32_t post_sizes;
	uint64_t post_bytes[8];
};

struct engine_statistics {
	uint64_t requests, answered, failed, replayed, dropped, fenced, continued, fallbacks;
	uint64_t bytes_read, bytes_written;
	uint64_t running, waiting, waited, lent;
	uint64_t posted, unasked; /* regions posted ahead, and writes that came in one */
};

struct engine;
struct storage;
struct io_uring;

/* The storage is the engine's from here on, also if this fails: NULL and *error (a negative errno). */
struct engine *engine_open(const struct engine_setup *setup, struct storage *storage, int *error);
/* No request may be running, or its buffer must stay mapped until the process ends. */
void engine_close(struct engine *engine);

/* Start what `count` descriptors ask for.  Each is copied before it is judged, so they may lie in shared memory, at any
 * alignment.  0, or -EPROTO for one that makes no sense. */
int engine_take(struct engine *engine, const struct wire_descriptor *descriptors, uint32_t count);
/* A queue's answers that were not sent, valid until the next call on this engine.  They stay until they are sent. */
uint32_t engine_answers(struct engine *engine, uint32_t queue, const struct wire_descriptor **answers);
void engine_answers_sent(struct engine *engine, uint32_t queue, uint32_t count);

/* On an io_uring of its own, which an engine has until it is given another: submit, reap, continue what moved only in
 * part.  0 or a negative errno that ends the engine's use. */
int engine_turn(struct engine *engine);
/* An eventfd, readable when a completion waits; a storage that completes at once never rings it. */
int engine_file(const struct engine *engine);

/* On an io_uring that somebody else owns, submits and waits for.  Only while nothing runs; NULL: its own again.
 * 0 or a negative errno.  Entries of the engine's have ENGINE_USER_DATA in their user_data, nobody else's may. */
int engine_use_ring(struct engine *engine, struct io_uring *ring);
/* Fill submission entries with what waits to be submitted; how many found no room: submit and call again. */
uint32_t engine_prepare(struct engine *engine);
/* One completion with ENGINE_USER_DATA.  May leave something to prepare. */
void engine_complete(struct engine *engine, uint64_t user_data, int32_t result);
/* For a storage whose work its caller does (calls.h): what waits becomes a batch, of so many; 0: nothing, or a storage
 * that does it itself.  The batch before must have been collected. */
uint32_t engine_hand_out(struct engine *engine);
/* The caller has done the batch. */
void engine_collect(struct engine *engine);
/* Try again to name a region for every request that waits for one. */
void engine_ask_again(struct engine *engine);
/* Whether a request waits for a region, so that a RELEASE must wake the backend. */
int engine_wants_regions(const struct engine *engine);
/* 0, or the negative errno that ends the engine's use: -ENOMEM if there was no room for an answer, -ENODATA if the
 * store became shorter than the device. */
int engine_error(const struct engine *engine);

void engine_count(const struct engine *engine, struct engine_statistics *statistics);
/* The first `most` requests that the storage has not finished, to be shown; returns how many there are.  May be called
 * from another thread while the engine's hangs. */
uint32_t engine_running(const struct engine *engine, struct wire_descriptor *out, uint32_t most);

/* Storages.  NULL if there is no memory. */

/* A regular file or a block device, through io_uring.  Placed writes land in slots of the own segment. */
struct storage *storage_file_new(int file, int is_block_device, uint64_t slot_bytes);
/* Answers at once and stores nothing.  Placed writes land in slots of the own segment. */
struct storage *storage_null_new(uint64_t slot_bytes);
/* A disk in the own segment, which is at least as large as the device.  A block's place is the block: placed writes
 * land where they stay, and with `names_reads` reads that bring no buffer are answered by naming it. */
struct storage *storage_memory_new(int names_reads);

#endif
