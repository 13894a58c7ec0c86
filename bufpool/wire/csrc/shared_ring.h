/*
 * A queue's descriptors in shared memory: one ring of 64-byte entries in each direction, for one producer and one
 * consumer that need not trust each other.
 *
 * A header, since both sides compile it: the worker's (ublk/csrc/queue_port.c) and the backend's (port.c).  Makes no
 * system call: `sr_publish` returns whether a doorbell is due, and its caller rings.
 *
 * Neither side trusts what the other can write.  An impossible index is an error (-1), in this and every later call,
 * and never leads outside the ring.  Each side keeps its own index in private memory and publishes a copy for the
 * other.  An entry can change at any time, so a reader copies it before judging it.
 *
 * Sleeping: a consumer that is about to sleep calls `sr_doze` and sleeps only if that returns 1.  It asks to be woken
 * for every entry, or only for those that cannot wait (for a backend: all but a RELEASE).  The producer publishes its
 * tail before it reads `sleeping`, the consumer sets `sleeping` before it reads the tail, each with a full barrier
 * between, so at least one of them sees the other.
 */
#ifndef UBLKPOOL_SHARED_RING_H
#define UBLKPOOL_SHARED_RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum sr_sleep { SR_AWAKE, SR_WAKE_FOR_ALL, SR_WAKE_FOR_WORK };

enum { SR_ENTRY_BYTES = 64, SR_LINE_BYTES = 64, SR_CONTROL_BYTES = 4096, SR_ENTRIES_MAX = 1 << 16 };

/* In shared memory.  Each line has one writer, but for `sleeping`, which the consumer sets and the producer clears. */
struct sr_shared {
	_Alignas(SR_LINE_BYTES) _Atomic uint32_t tail; /* the producer's: entries ever written */
	_Alignas(SR_LINE_BYTES) _Atomic uint32_t head; /* the consumer's: entries ever read */
	_Alignas(SR_LINE_BYTES) _Atomic uint32_t sleeping;
};
_Static_assert(sizeof(struct sr_shared) <= SR_CONTROL_BYTES / 2, "control page");

/* One end of one ring; in private memory. */
struct sr_end {
	struct sr_shared *shared;
	uint8_t *entries;
	uint32_t size;   /* entries, a power of two */
	uint32_t mine;   /* tail of the producer, head of the consumer */
	uint32_t theirs; /* the other index, as last read and found possible */
	bool lied;       /* the other index was impossible once: every later call fails */
};

/* What both directions need: a control page, then the entries towards the backend, then those towards the worker. */
static inline uint64_t sr_pair_bytes(uint32_t entries) { return SR_CONTROL_BYTES + 2ull * entries * SR_ENTRY_BYTES; }

/* Sets both ends' first index just below 2^32, so that every test sees the index wrap around.  The process that makes
 * the memory calls this before it shares the memory. */
static inline void sr_begin(uint8_t *memory, uint32_t entries)
{
	for (unsigned i = 0; i < 2; i++) {
		struct sr_shared *s = (struct sr_shared *)(memory + i * SR_CONTROL_BYTES / 2);

		atomic_store_explicit(&s->tail, 0u - entries, memory_order_relaxed);
		atomic_store_explicit(&s->head, 0u - entries, memory_order_relaxed);
	}
}

/* Starts with the published copy of this end's own index, which nobody else wrote yet; reads the other's when needed.
 */
static inline struct sr_end sr_end_at(struct sr_shared *shared, uint8_t *entries, uint32_t size, int produces)
{
	uint32_t mine = atomic_load_explicit(produces ? &shared->tail : &shared->head, memory_order_acquire);

	return (struct sr_end){ .shared = shared, .entries = entries, .size = size, .mine = mine, .theirs = mine };
}

static inline struct sr_end sr_end_to_backend(uint8_t *memory, uint32_t entries, int produces)
{
	return sr_end_at((struct sr_shared *)memory, memory + SR_CONTROL_BYTES, entries, produces);
}

static inline struct sr_end sr_end_to_worker(uint8_t *memory, uint32_t entries, int produces)
{
	return sr_end_at((struct sr_shared *)(memory + SR_CONTROL_BYTES / 2),
			 memory + SR_CONTROL_BYTES + (uint64_t)entries * SR_ENTRY_BYTES, entries, produces);
}

static inline uint8_t *sr_entry(const struct sr_end *e, uint32_t index)
{
	return e->entries + (uint64_t)(index & (e->size - 1)) * SR_ENTRY_BYTES;
}

/* An impossible index is not stored: room and count are computed from possible ones only. */
static inline int64_t sr_lied(struct sr_end *e)
{
	e->lied = true;
	return -1;
}

/* Producer: how many entries may be written now, up to `wanted`; -1 if the consumer's index is, or ever was,
 * impossible. */
static inline int64_t sr_room(struct sr_end *e, uint32_t wanted)
{
	uint32_t used = e->mine - e->theirs, head;

	if (e->lied)
		return -1;
	if (e->size - used >= wanted)
		return wanted;
	head = atomic_load_explicit(&e->shared->head, memory_order_acquire);
	/* The consumer's index may only move from its last value towards the producer's. */
	if (e->mine - head > used)
		return sr_lied(e);
	e->theirs = head;
	used = e->mine - head;
	return e->size - used < wanted ? e->size - used : wanted;
}

/* Producer: write `count` entries that sr_room() has granted.  The consumer sees them after sr_publish(). */
static inline void sr_write(struct sr_end *e, const void *from, uint32_t count)
{
	uint32_t first = e->size - (e->mine & (e->size - 1));

	if (first > count)
		first = count;
	memcpy(sr_entry(e, e->mine), from, (size_t)first * SR_ENTRY_BYTES);
	memcpy(e->entries, (const uint8_t *)from + (size_t)first * SR_ENTRY_BYTES,
	       (size_t)(count - first) * SR_ENTRY_BYTES);
	e->mine += count;
}

/* Producer: publish the written entries; 1 if the consumer sleeps and its doorbell is to be rung.  With `can_wait` a
 * consumer that sleeps in SR_WAKE_FOR_WORK is left asleep. */
static inline int sr_publish(struct sr_end *e, int can_wait)
{
	uint32_t sleep;

	atomic_store_explicit(&e->shared->tail, e->mine, memory_order_release);
	atomic_thread_fence(memory_order_seq_cst);
	sleep = atomic_load_explicit(&e->shared->sleeping, memory_order_relaxed);
	if (sleep == SR_AWAKE || (sleep == SR_WAKE_FOR_WORK && can_wait))
		return 0;
	return atomic_exchange_explicit(&e->shared->sleeping, SR_AWAKE, memory_order_relaxed) != SR_AWAKE;
}

/* Consumer: how many entries wait; -1 if the producer's index is, or ever was, impossible. */
static inline int64_t sr_waiting(struct sr_end *e)
{
	uint32_t count = e->theirs - e->mine, tail;

	if (e->lied)
		return -1;
	if (count)
		return count;
	tail = atomic_load_explicit(&e->shared->tail, memory_order_acquire);
	if (tail - e->mine > e->size)
		return sr_lied(e);
	e->theirs = tail;
	return tail - e->mine;
}

/* Consumer: whether the producer's index has moved or was impossible; cheap enough for polling. */
static inline int sr_has_news(const struct sr_end *e)
{
	return e->lied || atomic_load_explicit(&e->shared->tail, memory_order_relaxed) != e->mine;
}

/* Consumer: how many of the waiting entries lie in one piece at *at; they stay until sr_consumed(). */
static inline uint32_t sr_peek(const struct sr_end *e, uint32_t waiting, const uint8_t **at)
{
	uint32_t first = e->size - (e->mine & (e->size - 1));

	*at = sr_entry(e, e->mine);
	return waiting < first ? waiting : first;
}

/* Consumer: `count` entries were read and may be overwritten. */
static inline void sr_consumed(struct sr_end *e, uint32_t count)
{
	e->mine += count;
	atomic_store_explicit(&e->shared->head, e->mine, memory_order_release);
}

/* Consumer: awake, the producer need not ring. */
static inline void sr_wake(struct sr_end *e)
{
	atomic_store_explicit(&e->shared->sleeping, SR_AWAKE, memory_order_relaxed);
}

/* Consumer: about to sleep.  1: sleep, the doorbell will ring; 0: entries wait, or the index is impossible. */
static inline int sr_doze(struct sr_end *e, enum sr_sleep sleep)
{
	atomic_store_explicit(&e->shared->sleeping, sleep, memory_order_relaxed);
	atomic_thread_fence(memory_order_seq_cst);
	if (!e->lied && atomic_load_explicit(&e->shared->tail, memory_order_relaxed) == e->mine)
		return 1;
	sr_wake(e);
	return 0;
}

#endif
