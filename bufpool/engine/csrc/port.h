/* The backend's end of the rings that it shares with its workers: descriptors in and out.
 *
 * Owns the indices of every queue's two rings and what found no room in them.  Memory and doorbells are the caller's
 * and must stay until `ports_end`.  One thread uses a set; every function may be called without the GIL.
 */
#ifndef UBLKPOOL_PORT_H
#define UBLKPOOL_PORT_H

#include <stdint.h>

struct ports_statistics {
	uint64_t descriptors_in, descriptors_out;
	uint64_t dropped;  /* answers for a queue without a worker */
	uint64_t deferred; /* answers that found the ring full and waited */
};

/* A full ring is looked at again this often: its worker rings no doorbell when it has made room. */
enum { PORTS_LOOK_AGAIN_MS = 1 };

struct ports;

/* NULL if there is no memory.  `epoch`: the one of the attach.  `later_max`: of what found no room, as much as a queue
 * may have waiting. */
struct ports *ports_new(uint32_t queues, uint32_t epoch, uint32_t later_max);
void ports_free(struct ports *ports);
/* What a pair of rings of so many entries takes; 0 if there are no such rings. */
uint64_t ports_memory_bytes(uint32_t entries);
/* A queue has rings from now on, and two doorbells (eventfds): ours and its worker's. */
void ports_open(struct ports *ports, uint32_t queue, uint8_t *memory, uint32_t entries, int ours, int workers);
/* The queue has no rings any more: descriptors that wait to be sent there are dropped. */
void ports_end(struct ports *ports, uint32_t queue);
/* The highest epoch that a FENCE or the attach has brought. */
uint32_t ports_epoch(const struct ports *ports);

/* Take up to `most` descriptors of a queue: how many, or -EPROTO. */
int32_t ports_take(struct ports *ports, uint32_t queue, void *to, uint32_t most);
/* Send, and ring if the worker sleeps; what finds no room stays in order until ports_poll.  0, -EPROTO, -ENOMEM, or
 * -ENOBUFS if too much would wait: then none of the rest is kept. */
int ports_send(struct ports *ports, uint32_t queue, const void *from, uint32_t count);
/* How many descriptors found no room yet. */
uint64_t ports_deferred(const struct ports *ports);
/* Wait until something is there to be taken, or one of `epoll`'s files is ready, `timeout_ms` at most (-1: for ever).
 * Those files, but no doorbells of ours, and how many they are, or a negative errno; the queues on which something
 * waits, and in *waiting how many.  -EPROTO for an index that makes no sense, of queue queues[0].  Tries again what
 * found no room. */
int32_t ports_poll(struct ports *ports, int epoll, int timeout_ms, int32_t *files, int32_t most, uint32_t *queues,
		   uint32_t *waiting);
/* Send the descriptors that found no room, for `timeout_ms` at most. */
void ports_settle(struct ports *ports, int timeout_ms);
/* Nothing is taken any more, and workers need not ring. */
void ports_deafen(struct ports *ports);

/* For a loop in C, which leaves entries where they are.  How many descriptors lie in one piece at *at, -EPROTO for an
 * index that makes no sense; they stay until ports_consumed, and their worker can change them until then. */
int32_t ports_peek(struct ports *ports, uint32_t queue, const void **at);
void ports_consumed(struct ports *ports, uint32_t queue, uint32_t count);
/* Send as many as there is room for: how many, or -EPROTO; *bell is 1 if the doorbell is to be rung. */
int32_t ports_write(struct ports *ports, uint32_t queue, const void *from, uint32_t count, int *bell);
/* Entries of a queue's ring, 0 if it has none. */
int32_t ports_size(const struct ports *ports, uint32_t queue);

/* Whether a descriptor has come; cheap enough for polling. */
int ports_have_news(const struct ports *ports);
/* About to sleep.  1: sleep, every worker will ring, for a RELEASE alone only if `wants_regions`; 0: descriptors wait.
 */
int ports_doze(struct ports *ports, int wants_regions);
/* Awake: workers need not ring. */
void ports_wake(struct ports *ports);
void ports_count(const struct ports *ports, struct ports_statistics *statistics);

#endif
