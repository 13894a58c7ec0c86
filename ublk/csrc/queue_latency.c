/* See queue_latency.h. */
#include "queue_latency.h"

/* A duration of 2^octave ns or more, in the quarter of its octave that begins at quarter << (octave - 2), 4 <= quarter
 * < 8, has the number 4 * octave + quarter.  Bucket 1 has this number: */
#define BUCKET_1 (4 * 9 + 7)
#define BOUND_0_NS 896u /* 7 << (9 - 2) */

#define LOW_MASK ((1u << UQ_LOW_BITS) - 1)

static unsigned bucket_of(uint64_t ns)
{
	unsigned octave, bucket;

	/* A bucket contains its upper bound and not its lower. */
	ns -= ns != 0;
	if (ns < BOUND_0_NS)
		return 0;
	octave = 63u - (unsigned)__builtin_clzll(ns);
	bucket = 4 * octave + (unsigned)(ns >> (octave - 2)) - (BUCKET_1 - 1);
	return bucket < UQ_BUCKETS - 1 ? bucket : UQ_BUCKETS - 1;
}

uint64_t uq_bucket_bound_ns(unsigned bucket)
{
	unsigned number = bucket + BUCKET_1;

	return bucket < UQ_BUCKETS - 1 ? (uint64_t)(number % 4 + 4) << (number / 4 - 1 - 2) : 0;
}

/* By how much `high` is behind `low`: 3 means that it is ahead by one. */
static unsigned behind(uint32_t low, uint16_t high) { return ((low >> UQ_LOW_BITS) - high) & 3; }

void uq_histogram_add(struct uq_histogram *h, uint64_t from_ns, uint64_t to_ns)
{
	uint64_t ns = to_ns > from_ns ? to_ns - from_ns : 0;
	unsigned i = bucket_of(ns);
	uint32_t low = h->low[i] + 1;

	h->sum_ns += ns;
	__atomic_store_n(&h->low[i], low, __ATOMIC_RELAXED);
	if (!(low & LOW_MASK)) /* also repairs what a worker left that was killed here */
		__atomic_store_n(&h->high[i], (uint16_t)(h->high[i] + behind(low, h->high[i])), __ATOMIC_RELEASE);
}

void uq_histogram_read(const struct uq_histogram *h, uint64_t *counts)
{
	for (unsigned i = 0; i < UQ_BUCKETS; i++) {
		uint32_t low = __atomic_load_n(&h->low[i], __ATOMIC_RELAXED);
		uint16_t high = __atomic_load_n(&h->high[i], __ATOMIC_RELAXED);
		unsigned missing = behind(low, high);

		high = (uint16_t)(missing == 3 ? high - 1 : high + (int)missing);
		counts[i] = (uint64_t)high << UQ_LOW_BITS | (low & LOW_MASK);
	}
}
