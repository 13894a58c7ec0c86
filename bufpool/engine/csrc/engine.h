/* The native engine: wire descriptors in, a storage's work in between, answers out.
 *
 * Owns the protocol's half of a backend: the state of each (queue, tag), epochs and fences, the regions of the
 * backend's own segment (named for a request, waited for, posted ahead), and the answers.  A storage (storage.h) moves
 * the data.  The engine knows nothing of sockets, descriptor rings and Python.  Only the thread that opened an engine
 * uses it; each function may be called without the GIL.  The memory that the engine is given (pool, client area, own
 * segment) must outlive it.
 */
#ifndef UBLKPOOL_ENGINE_H
#define UBLKPOOL_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#include "engine_calls.h"
#include "wire.h"

#define ENGINE_POST_SIZES_MAX 8

struct engine_setup {
	uint32_t device, epoch, queues, depth, read_only;
	/* A read or write without a buffer is on the fixed buffer that has its tag's number in the caller's io_uring
	 * (engine_use_ring()).  For one queue, and a storage that knows them. */
	uint32_t fixed_buffers;
	uint64_t size_bytes;
	uint8_t *pool;
	uint64_t pool_bytes;
	uint8_t *slices[WIRE_CLIENT_SLICES_MAX]; /* of the client area; NULL: absent */
	uint64_t slice_bytes;
	uint8_t *own;
	uint64_t own_bytes;
	uint32_t own_segment;
	/* The sizes in which buffers may be posted, ascending; the last holds the largest write.  With 0 sizes every
	 * write asks for its place. */
	uint32_t post_sizes;
	uint64_t post_bytes[8];
};

struct engine_statistics {
	uint64_t requests, answered, failed, replayed, dropped, fenced, continued, fallbacks;
	uint64_t bytes_read, bytes_written;
	uint64_t running, waiting, waited, lent;
	uint64_t posted, unasked; /* regions posted ahead, and writes that landed in one */
};

struct engine;
struct storage;
struct io_uring;

/* The functions below that a loop of another native module calls. */
const struct engine_calls *engine_calls(void);

/* Takes ownership of the storage, also on failure, which returns NULL and sets *error to a negative errno. */
struct engine *engine_open(const struct engine_setup *setup, struct storage *storage, int *error);
/* The buffer of a request that still runs must stay mapped until the process ends. */
void engine_close(struct engine *engine);

/* Executes `count` descriptors.  Each is copied before it is checked, so they may lie in shared memory, at any
 * alignment.  Returns 0, or -EPROTO for a descriptor that breaks the protocol. */
int engine_take(struct engine *engine, const struct wire_descriptor *descriptors, uint32_t count);
/* Points *answers to a queue's unsent answers and returns their number.  The pointer is valid until the next call on
 * this engine; the answers stay until engine_answers_sent().  0 once the engine's use has ended. */
uint32_t engine_answers(struct engine *engine, uint32_t queue, const struct wire_descriptor **answers);
void engine_answers_sent(struct engine *engine, uint32_t queue, uint32_t count);

/* With the engine's own io_uring, which is in use until engine_use_ring(): submits, reaps, and continues requests that
 * moved only in part.  Returns 0, or a negative errno that ends the engine's use. */
int engine_turn(struct engine *engine);
/* An eventfd, readable when a completion waits; a storage that completes at once never signals it. */
int engine_file(const struct engine *engine);

/* Whether the storage executes a request within a call, so that it can do without descriptors: engine_run(). */
int engine_can_run(const struct engine *engine);
/* Executes the request whose descriptor would have these fields: a read whose data lies in *memory, a write that is
 * done when its data has been copied there, or another.  *memory is NULL if the storage keeps no data: any memory will
 * do.  Returns the full length for reads and writes, 0 for other operations, or a negative errno.
 *
 * Neither a fence nor a region that is lent holds it up: it is for a caller whose requests all end with its own
 * process, and which copies one request's data at a time. */
int32_t engine_run(struct engine *engine, uint8_t op, uint64_t offset, uint64_t length, uint8_t **memory);

/* Whether requests may go without descriptors to a storage that finishes them later: engine_begin().  For an engine
 * with one queue. */
int engine_can_begin(const struct engine *engine);
/* Begins a request on memory that stays until its result has come.  No other request with the same tag may be running.
 * What fences do to requests that came as descriptors they do to this one too. */
void engine_begin(struct engine *engine, const struct engine_request *request);
/* Points *results to what has become of requests that were begun, and returns their number.  Each is returned once; the
 * pointer is valid until the call after the next.  0 once the engine's use has ended. */
uint32_t engine_results(struct engine *engine, const struct engine_result **results);

/* Makes the engine use the caller's io_uring, which the caller submits and waits for; NULL: the engine's own again.  No
 * request may be running.  Returns 0 or a negative errno.  The engine sets ENGINE_USER_DATA in the user_data of its
 * entries; no other entry may have that bit. */
int engine_use_ring(struct engine *engine, struct io_uring *ring);
/* Fills submission entries with the requests that wait for one.  Returns how many still wait: submit and call again. */
uint32_t engine_prepare(struct engine *engine);
/* Handles one completion with ENGINE_USER_DATA.  Afterwards requests may wait for engine_prepare(). */
void engine_complete(struct engine *engine, uint64_t user_data, int32_t result);
/* For a storage whose caller does the work (calls.h): makes a batch of the waiting requests and returns its size; 0: no
 * request waits, or the storage does its work itself.  The batch before must have been collected. */
uint32_t engine_hand_out(struct engine *engine);
/* Finishes the requests of the batch, which the caller has executed. */
void engine_collect(struct engine *engine);
/* The store has grown to `size_bytes`, at least the present size: from now on requests up to there are executed. */
void engine_resize(struct engine *engine, uint64_t size_bytes);
/* Tries again to name a region for each request that waits for one. */
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

/* The storages' constructors.  NULL: out of memory. */

/* A regular file or a block device, through io_uring.  Placed writes land in slots of the own segment. */
struct storage *storage_file_new(int file, int is_block_device, uint64_t slot_bytes);
/* A storage that answers at once and keeps no data.  Placed writes land in slots of the own segment. */
struct storage *storage_null_new(uint64_t slot_bytes);
/* A disk in the own segment, which is at least as large as the device.  A block's place is the block: placed writes
 * land where they stay, and with `names_reads` reads that bring no buffer are answered by naming it. */
struct storage *storage_memory_new(int names_reads);

#endif
