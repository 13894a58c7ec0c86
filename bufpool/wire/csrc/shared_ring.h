/*
 * A queue's descriptors in shared memory: one ring of 64-byte entries in each direction, for one producer and one
 * consumer that need not trust each other.
 *
 * Compiled into both sides, the worker's (ublk/csrc/queue_port.c) and the backend's (port.c), which is why everything
 * is here.  Makes no system call: `sr_publish` says when a doorbell is due, whoever calls it rings.
 *
 * Of what the other side can write nothing is believed: an index that makes no sense is an error (-1), then and in every
 * later call, and never leads outside the ring.  One's own index lives in private memory; what is in the shared one is for the other to read.  An
 * entry can change while it is looked at, so it is copied before it is judged.
 *
 * Sleeping: a consumer that is about to sleep calls `sr_doze` and sleeps only if that returns 1.  It says whether it is
 * to be woken for whatever comes, or only for what cannot wait (for a backend: anything but a RELEASE).  The producer stores
 * its tail before it looks for a sleeper, the consumer says that it sleeps before it looks for a tail: both with full
 * barriers between, so one of them sees the other.
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
	bool lied; /* the other index was impossible once: this end of the ring is over, whatever the index says later */
};

/* What both directions need: a control page, then the entries towards the backend, then those towards the worker. */
static inline uint64_t sr_pair_bytes(uint32_t entries) { return SR_CONTROL_BYTES + 2ull * entries * SR_ENTRY_BYTES; }

/* Where both ends begin: not at 0, so that indexes wrap around soon, in every test and not after four thousand million
 * descriptors.  Whoever makes the memory calls this before anybody else has it. */
static inline void sr_begin(uint8_t *memory, uint32_t entries)
{
	for (unsigned i = 0; i < 2; i++) {
		struct sr_shared *s = (struct sr_shared *)(memory + i * SR_CONTROL_BYTES / 2);

		atomic_store_explicit(&s->tail, 0u - entries, memory_order_relaxed);
		atomic_store_explicit(&s->head, 0u - entries, memory_order_relaxed);
	}
}

/* One's own index as it stands: nobody else writes to it.  The other's is read when it is needed. */
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

/* An impossible index is not kept: room and count are always computed from one that was possible. */
static inline int64_t sr_lied(struct sr_end *e)
{
	e->lied = true;
	return -1;
}

/* Producer: how many entries may be written now, up to `wanted`; -1 if the consumer's index makes no sense, or once did. */
static inline int64_t sr_room(struct sr_end *e, uint32_t wanted)
{
	uint32_t used = e->mine - e->theirs, head;

	if (e->lied)
		return -1;
	if (e->size - used >= wanted)
		return wanted;
	head = atomic_load_explicit(&e->shared->head, memory_order_acquire);
	/* Between where it stood and where we have written to: it neither goes back nor reads what is not there. */
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

/* Producer: let the consumer see what was written; 1 if it sleeps and its doorbell is to be rung.  `can_wait`: nothing
 * of it is work, see SR_WAKE_FOR_WORK. */
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

/* Consumer: how many entries wait; -1 if the producer's index makes no sense, or once did. */
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

/* Consumer: whether something has come, or makes no sense; for one that looks again and again. */
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

/* Consumer: awake again, so nobody need ring. */
static inline void sr_wake(struct sr_end *e)
{
	atomic_store_explicit(&e->shared->sleeping, SR_AWAKE, memory_order_relaxed);
}

/* Consumer: about to sleep.  1: do, the doorbell will ring; 0: something waits (or makes no sense), look again. */
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
