/*
 * How long requests take: histograms of durations, in the control segment.
 *
 * A histogram has four buckets for each power of two of nanoseconds, so that a bucket's upper bound is at most a
 * quarter above its lower bound.  A bucket contains its upper bound.  The first one has all durations up to 896 ns, the
 * last one all above 68.7 s.  daemon/latency.py has the same bounds; a test compares the two.
 *
 * The number of durations is the sum of the buckets, and is stored nowhere else: a reader never finds the two unequal.
 *
 * Five histograms of 64-bit counters have no room in a queue's statistics block.  So a counter's value is
 * `high << UQ_LOW_BITS` plus the low UQ_LOW_BITS bits of `low`.  The two bits of `low` above them repeat the lowest two
 * of `high`.  If the worker is killed after it has written `low` and before it has written `high`, or if a reader comes
 * between the two, these bits differ, and the reader knows by how much `high` is wrong (uq_histogram_read).  A counter
 * wraps at 2^46: one that counts a million requests a second does so after two years.
 */
#ifndef UQ_QUEUE_LATENCY_H
#define UQ_QUEUE_LATENCY_H

#include <stdint.h>

enum { UQ_BUCKETS = 107, UQ_LOW_BITS = 30 };

struct uq_histogram {
	uint64_t sum_ns;
	uint32_t low[UQ_BUCKETS];
	uint16_t high[UQ_BUCKETS];
};
_Static_assert(sizeof(struct uq_histogram) == 656, "a worker and a daemon of different versions share it");

enum uq_latency {
	UQ_LATENCY_READ, /* of a request, from its arrival to its commit */
	UQ_LATENCY_WRITE,
	UQ_LATENCY_OTHER,       /* flush, discard, write zeroes, and what is not supported */
	UQ_LATENCY_BUFFER_WAIT, /* each wait for a pool buffer, or for a backend that names a region */
	UQ_LATENCY_BACKEND,     /* of a request, from its first hand-over to a backend until a backend's answer */
	UQ_LATENCIES,
};

struct uq_latencies {
	struct uq_histogram of[UQ_LATENCIES];
};

/* Count a duration.  A clock that went back counts as no time. */
void uq_histogram_add(struct uq_histogram *h, uint64_t from_ns, uint64_t to_ns);
/* The counts of UQ_BUCKETS buckets.  `h` is a copy or is being written by a worker. */
void uq_histogram_read(const struct uq_histogram *h, uint64_t *counts);
/* A bucket's upper bound in nanoseconds, 0 for the last, which has none. */
uint64_t uq_bucket_bound_ns(unsigned bucket);

#endif
