/* The backend's end of the rings that it shares with its workers: descriptors in and out.
 *
 * Owns the indices of each queue's two rings, and the descriptors that found no room in them.  Memory and doorbells are
 * the caller's and must stay until `ports_end`.  One thread uses a set; every function may be called without the GIL.
 */
#ifndef UBLKPOOL_PORT_H
#define UBLKPOOL_PORT_H

#include <stdint.h>

struct ports_statistics {
	uint64_t descriptors_in, descriptors_out;
	uint64_t dropped;  /* answers for a queue without a worker */
	uint64_t deferred; /* answers that waited because the ring was full */
};

/* How often a full ring is looked at again: the worker rings no doorbell when it has made room. */
enum { PORTS_LOOK_AGAIN_MS = 1 };

struct ports;

/* NULL: out of memory.  `epoch`: of the attach.  `later_max`: how many descriptors of a queue may wait for room in its
 * ring. */
struct ports *ports_new(uint32_t queues, uint32_t epoch, uint32_t later_max);
void ports_free(struct ports *ports);
/* The bytes of a pair of rings with so many entries; 0: no ring may have so many. */
uint64_t ports_memory_bytes(uint32_t entries);
/* Gives a queue its rings and two doorbells (eventfds), the backend's own and the worker's. */
void ports_open(struct ports *ports, uint32_t queue, uint8_t *memory, uint32_t entries, int ours, int workers);
/* Takes the queue's rings away; descriptors that wait to be sent there are dropped. */
void ports_end(struct ports *ports, uint32_t queue);
/* The highest epoch that a FENCE or the attach has brought. */
uint32_t ports_epoch(const struct ports *ports);

/* Takes up to `most` descriptors of a queue.  Returns how many, or -EPROTO. */
int32_t ports_take(struct ports *ports, uint32_t queue, void *to, uint32_t most);
/* Sends descriptors and rings the doorbell if the worker sleeps; those without room wait, in order, until ports_poll.
 * Returns 0, -EPROTO, -ENOMEM, or -ENOBUFS if too many would wait, in which case none of the rest is kept. */
int ports_send(struct ports *ports, uint32_t queue, const void *from, uint32_t count);
/* How many descriptors wait for room. */
uint64_t ports_deferred(const struct ports *ports);
/* Waits until a descriptor has come or one of `epoll`'s files is ready, `timeout_ms` at most (-1: for ever), and sends
 * the descriptors that waited for room.  Returns how many `files` are ready, the backend's doorbells left out, or a
 * negative errno; `queues` gets the queues with descriptors to take, *waiting their number.  -EPROTO: queue queues[0]
 * has an impossible index. */
int32_t ports_poll(struct ports *ports, int epoll, int timeout_ms, int32_t *files, int32_t most, uint32_t *queues,
		   uint32_t *waiting);
/* Sends the descriptors that wait for room, for `timeout_ms` at most. */
void ports_settle(struct ports *ports, int timeout_ms);
/* Ends the taking of descriptors; workers need not ring any more. */
void ports_deafen(struct ports *ports);

/* For a loop in C, which leaves entries where they are.  Returns how many descriptors lie in one piece at *at, or
 * -EPROTO for an impossible index.  They stay until ports_consumed, and the worker can change them until then. */
int32_t ports_peek(struct ports *ports, uint32_t queue, const void **at);
void ports_consumed(struct ports *ports, uint32_t queue, uint32_t count);
/* Sends as many as there is room for.  Returns how many, or -EPROTO; *bell: 1 if the caller must ring the doorbell. */
int32_t ports_write(struct ports *ports, uint32_t queue, const void *from, uint32_t count, int *bell);
/* Entries of a queue's ring, 0 if it has none. */
int32_t ports_size(const struct ports *ports, uint32_t queue);

/* Whether a descriptor has come; cheap enough for polling. */
int ports_have_news(const struct ports *ports);
/* Announces that the backend sleeps.  Returns 1 if it may: each worker rings the doorbell, for a RELEASE alone only if
 * `wants_regions`; 0 if descriptors have come. */
int ports_doze(struct ports *ports, int wants_regions);
/* Announces that the backend is awake: workers need not ring. */
void ports_wake(struct ports *ports);
void ports_count(const struct ports *ports, struct ports_statistics *statistics);

#endif
