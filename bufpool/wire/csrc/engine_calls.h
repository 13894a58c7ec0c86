/* A native engine inside another process's loop: the functions that the loop calls, without linking them.
 *
 * `bufpool`'s native module fills the table (engine_calls), a worker's queue calls through it
 * (ublk/csrc/queue_inside.c). Both are one build: the table has no version.  What each function does stands in
 * engine.h.
 */
#ifndef UBLKPOOL_ENGINE_CALLS_H
#define UBLKPOOL_ENGINE_CALLS_H

#include <stdint.h>

#include "wire.h"

/* The engine sets this bit in the user_data of its entries in the caller's io_uring; no other entry may have it. */
#define ENGINE_USER_DATA (1ull << 63)

struct engine;
struct io_uring;

/* A request as it lies in a queue's tag, without a descriptor. */
struct engine_request {
	uint64_t sequence, offset, length;
	uint8_t *memory; /* of a read or a write; NULL: the tag's fixed buffer */
	uint16_t tag, flags;
	uint8_t op;
};

/* What became of it.  `sequence` is the request's: the queue compares it with that of its tag. */
struct engine_result {
	uint64_t sequence;
	int32_t result;
	uint16_t tag;
};

struct engine_calls {
	int (*take)(struct engine *engine, const struct wire_descriptor *descriptors, uint32_t count);
	uint32_t (*answers)(struct engine *engine, uint32_t queue, const struct wire_descriptor **answers);
	void (*answers_sent)(struct engine *engine, uint32_t queue, uint32_t count);
	int (*use_ring)(struct engine *engine, struct io_uring *ring);
	uint32_t (*prepare)(struct engine *engine);
	void (*complete)(struct engine *engine, uint64_t user_data, int32_t result);
	int (*error)(const struct engine *engine);
	int (*can_run)(const struct engine *engine);
	int32_t (*run)(struct engine *engine, uint8_t op, uint64_t offset, uint64_t length, uint8_t **memory);
	int (*can_begin)(const struct engine *engine);
	void (*begin)(struct engine *engine, const struct engine_request *request);
	uint32_t (*results)(struct engine *engine, const struct engine_result **results);
};

#endif
