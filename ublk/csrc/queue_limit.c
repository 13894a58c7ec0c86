/*
 * The device's limits.  See queue_types.h for the order of files, queue_core.h for the memory that the queues share.
 *
 * A limit is one 64-bit word, `paid_until`: the time up to which the I/Os (or bytes) that have been let through fill
 * the rate.  A request of cost c raises it by c / rate, from now if it lies in the past; the request passes when the
 * word's earlier value is at most a burst ahead of the clock (GCRA, ITU-T I.371).  So one compare-and-exchange charges
 * a request.  A worker that dies before it has charged nothing, after it at most one batch that never passed.  Idle
 * time earns a burst at most, and a request that is larger than the burst passes and leaves a debt.
 *
 * Each queue charges for one batch of its oldest waiting tags at a time, and for the next one only when that batch has
 * passed.  The queues of a device thus take turns, each with a batch, and each knows when its turn comes: the workers
 * do not compete, and need one wake-up for a batch.
 */
#include "queue_limit.h"

#include <string.h>

/* Times are kept in 1/64 ns, or else the rounding of a request's cost would slow high rates down. */
#define TICK_BITS 6
#define NS_PER_S 1000000000ull
#define TICKS_PER_S (NS_PER_S << TICK_BITS)
/* The most of a batch, and the part of the burst that it may take, so that a late wake-up costs no throughput. */
#define BATCH_NS 4000000ull
#define BATCHES_PER_BURST 4
/* A time after which a worker looks again at a word that makes no sense, and at limits that may have changed. */
#define LOOK_NS 1000000ull
#define LOOK_MS_MAX 100u
/* Bounds what absurd limits can ask for. */
#define COST_MAX (3600 * TICKS_PER_S)

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

static int64_t ahead(uint64_t time, uint64_t now) { return (int64_t)(time - now); }

void uq_limit_begin(struct uq *q) { q->limit.first = q->limit.last = UQ_NO_TAG; }

static uint64_t price(const struct uq_limit *l, unsigned which, uint64_t amount)
{
	uint64_t rate = l->per_s[which];

	/* Amounts are below 2^26 and a second has fewer than 2^36 ticks. */
	return rate ? least((amount * TICKS_PER_S + rate - 1) / rate, COST_MAX) : 0;
}

/* DISCARD and WRITE_ZEROES move no data: each is one I/O without bytes, whatever its length. */
static uint64_t bytes_of(const struct uq_tag *t) { return t->op == WIRE_READ || t->op == WIRE_WRITE ? t->length : 0; }

static uint64_t cost(const struct uq_limit *l, unsigned which, const struct uq_tag *t)
{
	return price(l, which, which == UQ_LIMIT_IOS ? 1 : bytes_of(t));
}

/* What the word can be ahead of the clock at most: the burst, and the batch of each queue. */
static uint64_t most_ahead(const struct uq *q, unsigned which)
{
	const struct uq_limit *l = &q->limit;
	uint64_t largest = price(l, which, which == UQ_LIMIT_IOS ? 1 : q->config.max_io_bytes);

	return l->burst + q->config.queues * (l->batch + largest);
}

static void shorten_wait(struct uq *q)
{
	struct uq_limit *l = &q->limit;
	uint64_t most = 0;

	for (unsigned i = 0; i < UQ_LIMITS; i++)
		if (l->per_s[i] && most_ahead(q, i) > most)
			most = most_ahead(q, i);
	if (ahead(l->passes, l->now) > (int64_t)most)
		l->passes = l->now + most;
}

static void read_limits(struct uq *q, uint64_t generation)
{
	const struct uq_limits *shared = q->config.limits;
	struct uq_limit *l = &q->limit;

	l->generation = generation;
	l->is_set = false;
	for (unsigned i = 0; i < UQ_LIMITS; i++) {
		l->per_s[i] = __atomic_load_n(&shared->per_s[i], __ATOMIC_RELAXED);
		l->is_set |= l->per_s[i] != 0;
	}
	l->burst = least(__atomic_load_n(&shared->burst_ns, __ATOMIC_RELAXED), COST_MAX >> TICK_BITS) << TICK_BITS;
	l->batch = least(BATCH_NS << TICK_BITS, l->burst / BATCHES_PER_BURST);
	if (!l->paid)
		l->passes = l->now;
	shorten_wait(q);
}

void uq_limit_time(struct uq *q, uint64_t now_ns)
{
	uint64_t generation = __atomic_load_n(&q->config.limits->generation, __ATOMIC_ACQUIRE);

	q->limit.now = now_ns << TICK_BITS;
	if (generation != q->limit.generation)
		read_limits(q, generation);
}

/* Pays `paid` and returns when this passes. */
static uint64_t charge(struct uq *q, unsigned which, uint64_t paid)
{
	uint64_t *word = &q->config.limits->paid_until[which], now = q->limit.now;
	uint64_t was = __atomic_load_n(word, __ATOMIC_RELAXED), from;

	do {
		int64_t lead = ahead(was, now), most = (int64_t)most_ahead(q, which);

		from = lead < 0 ? now : lead > most ? now + (uint64_t)most : was;
	} while (!__atomic_compare_exchange_n(word, &was, from + paid, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
	return from - q->limit.burst;
}

static bool is_absurd(const struct uq *q, unsigned which)
{
	uint64_t word = __atomic_load_n(&q->config.limits->paid_until[which], __ATOMIC_RELAXED);

	return q->limit.per_s[which] && ahead(word, q->limit.now) > (int64_t)most_ahead(q, which);
}

/* A word far ahead may be right and this worker's clock old, if it was stopped since it read it.  So it is set back
 * only when it is still far ahead at a later time. */
static bool doubts(struct uq *q)
{
	struct uq_limit *l = &q->limit;
	bool absurd = is_absurd(q, UQ_LIMIT_IOS) || is_absurd(q, UQ_LIMIT_BYTES);

	l->doubted = absurd && !l->doubted;
	return l->doubted;
}

static uint64_t later(uint64_t a, uint64_t b) { return ahead(a, b) > 0 ? a : b; }

/* Pays for the tags that have waited longest: one at least, and no more once they fill a batch. */
static void pay(struct uq *q)
{
	struct uq_limit *l = &q->limit;
	uint64_t sum[UQ_LIMITS] = { 0 };

	if (doubts(q)) {
		l->passes = l->now + (LOOK_NS << TICK_BITS);
		return;
	}
	for (uint16_t i = l->first; i != UQ_NO_TAG; i = q->tags[i].next_waiter) {
		if (l->paid && (sum[UQ_LIMIT_IOS] >= l->batch || sum[UQ_LIMIT_BYTES] >= l->batch))
			break;
		for (unsigned w = 0; w < UQ_LIMITS; w++)
			sum[w] += cost(l, w, &q->tags[i]);
		l->paid++;
	}
	l->passes = l->now;
	for (unsigned w = 0; w < UQ_LIMITS; w++)
		if (l->per_s[w])
			l->passes = later(charge(q, w, sum[w]), l->passes);
}

void uq_limit_enqueue(struct uq *q, struct uq_tag *t)
{
	struct uq_limit *l = &q->limit;
	uint16_t tag = (uint16_t)uq_index(q, t);

	t->next_waiter = UQ_NO_TAG;
	t->limited_since = l->now;
	if (l->first == UQ_NO_TAG)
		l->first = tag;
	else
		q->tags[l->last].next_waiter = tag;
	l->last = tag;
	q->config.stats->limit_waiting++;
}

static struct uq_tag *dequeue(struct uq *q)
{
	struct uq_limit *l = &q->limit;
	struct uq_tag *t = &q->tags[l->first];
	struct uq_stats *s = q->config.stats;

	l->first = t->next_waiter;
	t->next_waiter = UQ_NO_TAG;
	l->paid -= l->paid > 0;
	s->limit_waiting--;
	s->limited += l->now != t->limited_since;
	s->limited_ns += (l->now - t->limited_since) >> TICK_BITS;
	return t;
}

struct uq_tag *uq_limit_next(struct uq *q)
{
	struct uq_limit *l = &q->limit;

	if (l->first == UQ_NO_TAG)
		return NULL;
	if (!l->is_set || q->giving_up)
		return dequeue(q);
	/* A batch that has been paid for has a time; without one `passes` is when to look again. */
	if (!l->paid && ahead(l->passes, l->now) <= 0)
		pay(q);
	if (!l->paid || ahead(l->passes, l->now) > 0)
		return NULL;
	return dequeue(q);
}

int uq_limit_is_used(const struct uq *q)
{
	return __atomic_load_n(&q->config.limits->generation, __ATOMIC_RELAXED) != q->limit.generation ||
	       q->limit.is_set;
}

unsigned uq_limit_wait_ms(const struct uq *q, unsigned most_ms)
{
	const struct uq_limit *l = &q->limit;
	uint64_t ms = 1, tick_per_ms = 1000000ull << TICK_BITS;

	if (l->first == UQ_NO_TAG)
		return most_ms;
	if (ahead(l->passes, l->now) > 0)
		ms = (l->passes - l->now + tick_per_ms - 1) / tick_per_ms;
	return (unsigned)least(least(ms, LOOK_MS_MAX), most_ms);
}
