/* See queue_check.h. */
#include "queue_check.h"

#ifdef UQ_CHECKED

#include <stdio.h>

#include "queue_tag.h"

#define HOLDS(condition)                                           \
	do {                                                       \
		if (!(condition))                                  \
			broken(q, #condition, __func__, __LINE__); \
	} while (0)

static void broken(struct uq *q, const char *condition, const char *where, int line)
{
	fprintf(stderr, "queue %u: %s:%d: %s does not hold\n", q->config.queue, where, line, condition);
	uq_fail_now(q, UQ_F_INVARIANT, 0, line);
}

static bool has_slot(const struct uq_tag *t) { return t->slot != UQ_BUFFER_NONE; }

static bool is_request(const struct uq_tag *t) { return t->state != UQ_KERNEL && t->state != UQ_GONE; }

/* A buffer has one owner: it is free in the stock, or lent to the tag that its slot header names. */
static void check_buffers(struct uq *q, unsigned class)
{
	const struct uq_class *c = &q->config.class[class];
	const struct uq_stock *s = &q->stock[class];
	unsigned lent = 0;

	HOLDS(s->count <= c->count);
	for (unsigned i = 0; i < s->count; i++) {
		HOLDS(s->slots[i] - c->first_slot < c->count);
		HOLDS(q->config.slots[s->slots[i]].tag == 0);
	}
	for (unsigned i = 0; i < q->config.depth; i++) {
		const struct uq_tag *t = &q->tags[i];

		if (!has_slot(t) || t->class != class)
			continue;
		lent++;
		HOLDS(t->slot - c->first_slot < c->count);
		HOLDS(q->config.slots[t->slot].tag == i + 1);
	}
	HOLDS(s->count + lent == s->held);
	HOLDS(q->stock_changed >> class & 1 || (q->stock_short >> class & 1) == (s->waiting || s->recalled));
}

/* Tags that wait for a buffer are in the list of their class, each once, and no other tag is. */
static void check_waiters(struct uq *q, unsigned class)
{
	const struct uq_stock *s = &q->stock[class];
	unsigned listed = 0, waiting = 0;
	uint16_t last = UQ_NO_TAG;

	for (uint16_t i = s->first_waiter; i != UQ_NO_TAG; i = q->tags[i].next_waiter) {
		HOLDS(i < q->config.depth && listed < q->config.depth);
		HOLDS(q->tags[i].state == UQ_WAIT_BUFFER && q->tags[i].class == class);
		last = i;
		listed++;
	}
	for (unsigned i = 0; i < q->config.depth; i++)
		waiting += q->tags[i].state == UQ_WAIT_BUFFER && q->tags[i].class == class;
	HOLDS(listed == waiting && listed == s->waiting);
	HOLDS(!listed || s->last_waiter == last);
}

/* Tags that wait for the limits are in their list, each once and without a buffer, and no other tag is. */
static void check_limited(struct uq *q)
{
	const struct uq_limit *l = &q->limit;
	unsigned listed = 0, waiting = 0;
	uint16_t last = UQ_NO_TAG;

	for (uint16_t i = l->first; i != UQ_NO_TAG; i = q->tags[i].next_waiter) {
		HOLDS(i < q->config.depth && listed < q->config.depth);
		HOLDS(q->tags[i].state == UQ_WAIT_LIMIT);
		HOLDS(!q->config.need_get_data || !has_slot(&q->tags[i]));
		HOLDS(!q->tags[i].own_segment);
		last = i;
		listed++;
	}
	for (unsigned i = 0; i < q->config.depth; i++)
		waiting += q->tags[i].state == UQ_WAIT_LIMIT;
	HOLDS(listed == waiting && listed == q->config.stats->limit_waiting);
	HOLDS(!listed || l->last == last);
	HOLDS(l->paid <= listed);
	HOLDS(!listed || l->is_set);
	HOLDS(!listed || !q->giving_up);
}

/* A tag has at most one command on its way; one that is committing has its commit there. */
static void check_commands(struct uq *q)
{
	unsigned commits = 0, committing = 0;

	HOLDS(q->commands_count <= q->config.depth);
	for (unsigned i = 0; i < q->commands_count; i++) {
		const struct uq_command *c = &q->commands[(q->commands_first + i) & q->commands_mask];

		HOLDS(c->tag < q->config.depth);
		commits += c->op == UQ_CMD_COMMIT;
		HOLDS(c->op != UQ_CMD_COMMIT || q->tags[c->tag].state == UQ_COMMITTING);
	}
	for (unsigned i = 0; i < q->config.depth; i++)
		committing += q->tags[i].state == UQ_COMMITTING;
	HOLDS(commits == committing);
}

static unsigned tags_in(const struct uq *q, uint32_t segment)
{
	unsigned count = 0;

	for (unsigned i = 0; i < q->config.depth; i++)
		count += q->tags[i].own_segment == segment;
	return count;
}

static void check_segments(struct uq *q)
{
	HOLDS(q->regions == q->config.depth - tags_in(q, 0));
	for (unsigned i = 0; i < UQ_SEGMENTS_MAX; i++)
		if (q->segments[i].number)
			HOLDS(q->segments[i].data_tags == tags_in(q, q->segments[i].number));
}

/* Regions that are lent to writes or posted are disjoint: together they have as many blocks as are marked. */
static void check_regions(struct uq *q)
{
	uint64_t expected = 0, marked = 0, words;

	if (!q->own_segment)
		return;
	for (unsigned i = 0; i < q->config.depth; i++) {
		const struct uq_tag *t = &q->tags[i];

		if (t->own_segment == q->own_segment && t->op == WIRE_WRITE)
			expected += blocks_end(t->own_buffer, t->own_bytes) - blocks_first(t->own_buffer);
	}
	for (unsigned c = 0; c < q->config.classes; c++)
		expected += (uint64_t)q->posts[c].count * q->config.class[c].buffer_bytes / BLOCK_BYTES;
	for (unsigned i = 0; i < UQ_SEGMENTS_MAX; i++) {
		if (q->segments[i].number != q->own_segment)
			continue;
		words = q->segments[i].bytes / BLOCK_BYTES / WORD_BITS + 1;
		for (uint64_t w = 0; w < words; w++)
			marked += (unsigned)__builtin_popcountll(q->occupied.words[w]);
	}
	/* After a cut the posted regions are forgotten and stay marked until the backend is dead. */
	HOLDS(q->link == UQ_LINK_CUT ? marked >= expected : marked == expected);
}

static bool waits_for_buffer(const struct uq_tag *t)
{
	return t->state == UQ_WAIT_BUFFER || t->state == UQ_WAIT_PLACE || t->state == UQ_PLACING;
}

static void check_gauges(struct uq *q)
{
	unsigned requests = 0, lent = 0;

	for (unsigned i = 0; i < q->config.depth; i++) {
		HOLDS(q->tags[i].waits == waits_for_buffer(&q->tags[i]));
		requests += is_request(&q->tags[i]);
		lent += has_slot(&q->tags[i]);
	}
	HOLDS(q->config.stats->in_flight == requests);
	HOLDS(q->config.stats->buffers_lent == lent);
}

/* How many more requests than durations there are, by kind. */
static void count_missing(const struct uq *q, uint64_t *missing)
{
	uint64_t counts[UQ_BUCKETS];

	for (unsigned kind = UQ_LATENCY_READ; kind <= UQ_LATENCY_OTHER; kind++) {
		uq_histogram_read(&q->config.latencies->of[kind], counts);
		missing[kind] = 0;
		for (unsigned i = 0; i < UQ_BUCKETS; i++)
			missing[kind] -= counts[i];
	}
	for (unsigned op = 0; op < UQ_OPS; op++)
		missing[op < UQ_LATENCY_OTHER ? op : UQ_LATENCY_OTHER] += q->config.stats->requests[op];
}

static void check_durations(struct uq *q)
{
	uint64_t missing[UQ_LATENCY_OTHER + 1];

	count_missing(q, missing);
	for (unsigned kind = UQ_LATENCY_READ; kind <= UQ_LATENCY_OTHER; kind++)
		HOLDS(missing[kind] == q->without_duration[kind]);
}

void uq_check_begin(struct uq *q) { count_missing(q, q->without_duration); }

void uq_check(struct uq *q)
{
	if (q->fault)
		return;
	HOLDS(q->output_first + q->output_count <= q->output_max);
	for (unsigned c = 0; c < q->config.classes; c++) {
		check_buffers(q, c);
		check_waiters(q, c);
	}
	check_limited(q);
	check_commands(q);
	check_segments(q);
	check_regions(q);
	check_gauges(q);
	check_durations(q);
}

#endif
