/* The queue's stock of pool buffers.  See queue_types.h for the order of files, queue_core.h for the public contract.
 */
#include "queue_stock.h"

#include <stdlib.h>
#include <string.h>

#include "queue_tag.h"

unsigned uq_class_for(const struct uq *q, uint64_t bytes)
{
	unsigned c = 0;

	while (c + 1 < q->config.classes && q->config.class[c].buffer_bytes < bytes)
		c++;
	return c;
}

static unsigned class_of(const struct uq *q, uint32_t slot)
{
	unsigned c = 0;

	while (c + 1 < q->config.classes && slot >= q->config.class[c + 1].first_slot)
		c++;
	return c;
}

uint64_t uq_slot_offset(const struct uq *q, uint32_t slot)
{
	const struct uq_class *c = &q->config.class[class_of(q, slot)];

	return c->base_offset + (uint64_t)(slot - c->first_slot) * c->buffer_bytes;
}

uint8_t *uq_slot_address(const struct uq *q, uint32_t slot) { return q->config.pool + uq_slot_offset(q, slot); }

void uq_pool_copy(const struct uq *q, uint8_t *to)
{
	for (unsigned i = 0; i < q->config.depth; i++) {
		const struct uq_tag *t = &q->tags[i];
		uint64_t bytes;

		if (t->slot == UQ_BUFFER_NONE)
			continue;
		bytes = q->config.class[class_of(q, t->slot)].buffer_bytes;
		memcpy(to + uq_slot_offset(q, t->slot), uq_slot_address(q, t->slot),
		       t->length < bytes ? t->length : bytes);
	}
}

bool uq_stock_allocate(struct uq *q)
{
	for (unsigned c = 0; c < q->config.classes; c++) {
		q->stock[c].slots = calloc(q->config.class[c].count, sizeof(uint32_t));
		q->stock[c].first_waiter = q->stock[c].last_waiter = UQ_NO_TAG;
		if (!q->stock[c].slots)
			return false;
	}
	q->stock_changed = (1u << q->config.classes) - 1;
	return true;
}

void uq_stock_free(struct uq *q)
{
	for (unsigned c = 0; c < q->config.classes; c++)
		free(q->stock[c].slots);
}

static void touch(struct uq *q, const struct uq_stock *s) { q->stock_changed |= 1u << (s - q->stock); }

static uint32_t pop(struct uq *q, struct uq_stock *s)
{
	touch(q, s);
	s->count--;
	if (s->count < s->low_water)
		s->low_water = s->count;
	if (s->count < s->previous_low_water)
		s->previous_low_water = s->count;
	return s->slots[s->count];
}

/* Buffers that go back to the broker before this queue's own tags get one; never out of the reserve. */
static unsigned payable(const struct uq *q, const struct uq_stock *s)
{
	unsigned reserve = q->config.class[s - q->stock].reserve, spare = s->held > reserve ? s->held - reserve : 0;

	return s->recalled < spare ? s->recalled : spare;
}

static void lend(struct uq *q, struct uq_stock *s, struct uq_tag *t)
{
	t->slot = pop(q, s);
	q->config.slots[t->slot].tag = uq_index(q, t) + 1;
	q->config.stats->buffers_lent++;
	q->config.stats->lent_total++;
}

bool uq_stock_lend(struct uq *q, struct uq_tag *t)
{
	struct uq_stock *s = &q->stock[t->class];

	if (s->first_waiter != UQ_NO_TAG || s->count <= payable(q, s))
		return false;
	lend(q, s, t);
	return true;
}

void uq_stock_enqueue(struct uq *q, struct uq_tag *t)
{
	struct uq_stock *s = &q->stock[t->class];
	uint16_t tag = (uint16_t)uq_index(q, t);

	t->next_waiter = UQ_NO_TAG;
	if (s->first_waiter == UQ_NO_TAG)
		s->first_waiter = tag;
	else
		q->tags[s->last_waiter].next_waiter = tag;
	s->last_waiter = tag;
	s->waiting++;
	touch(q, s);
	q->config.stats->buffers_waiting++;
	q->config.stats->buffers_waited++;
}

static struct uq_tag *dequeue(struct uq *q, struct uq_stock *s)
{
	struct uq_tag *t = &q->tags[s->first_waiter];

	s->first_waiter = t->next_waiter;
	t->next_waiter = UQ_NO_TAG;
	s->waiting--;
	q->config.stats->buffers_waiting--;
	return t;
}

struct uq_tag *uq_stock_serve(struct uq *q, unsigned class)
{
	struct uq_stock *s = &q->stock[class];
	struct uq_tag *t;

	if (s->first_waiter == UQ_NO_TAG || s->count <= payable(q, s))
		return NULL;
	t = dequeue(q, s);
	lend(q, s, t);
	return t;
}

void uq_stock_forget(struct uq *q, struct uq_tag *t)
{
	struct uq_stock *s = &q->stock[t->class];
	uint16_t *link = &s->first_waiter, tag = (uint16_t)uq_index(q, t), before = UQ_NO_TAG;

	while (*link != UQ_NO_TAG && *link != tag) {
		before = *link;
		link = &q->tags[*link].next_waiter;
	}
	if (*link == UQ_NO_TAG)
		return;
	*link = t->next_waiter;
	if (s->last_waiter == tag)
		s->last_waiter = before;
	t->next_waiter = UQ_NO_TAG;
	s->waiting--;
	touch(q, s);
	q->config.stats->buffers_waiting--;
}

void uq_stock_return(struct uq *q, struct uq_tag *t)
{
	struct uq_stock *s = &q->stock[t->class];

	q->config.slots[t->slot].tag = 0;
	q->config.stats->buffers_lent--;
	q->config.stats->returned_total++;
	s->slots[s->count++] = t->slot;
	t->slot = UQ_BUFFER_NONE;
	touch(q, s);
}

void uq_stock_look(struct uq *q)
{
	for (unsigned c = 0; c < q->config.classes; c++) {
		struct uq_stock *s = &q->stock[c];

		s->previous_low_water = s->low_water;
		s->low_water = s->count;
		touch(q, s);
	}
}

/* More idle buffers than this go back. */
static unsigned idle_max(const struct uq *q, unsigned class)
{
	return q->config.class[class].reserve + 3 * q->config.class[class].batch;
}

bool uq_stock_may_return(const struct uq *q, unsigned class) { return q->stock[class].count > idle_max(q, class); }

/* A queue leases a batch ahead of need, but never more than a buffer for each tag or than the broker can ever give it.
 * It returns the buffers that stayed idle over a whole period, except for the reserve and a batch, so that a burst
 * finds in the stock the buffers of the burst before it. */
int uq_stock_want(const struct uq *q, unsigned class)
{
	const struct uq_stock *s = &q->stock[class];
	unsigned reserve = q->config.class[class].reserve, batch = q->config.class[class].batch;
	unsigned most = q->config.class[class].most < q->config.depth ? q->config.class[class].most : q->config.depth;
	unsigned holds = s->held + s->pending, room = most > holds ? most - holds : 0;
	unsigned has = s->count + s->pending, low = s->waiting + (batch + 1) / 2;
	unsigned owes = payable(q, s);

	if (owes && s->count)
		return -(int)(s->count < owes ? s->count : owes);
	if (has < low && room) {
		unsigned ask = s->waiting + batch - has;

		return (int)(ask < room ? ask : room);
	}
	if (s->waiting)
		return 0;
	return s->previous_low_water > idle_max(q, class) ? -(int)(s->previous_low_water - reserve - batch) : 0;
}

static unsigned with(unsigned bits, unsigned bit, bool on) { return on ? bits | bit : bits & ~bit; }

void uq_stock_settle(struct uq *q)
{
	while (q->stock_changed) {
		unsigned c = (unsigned)__builtin_ctz(q->stock_changed), bit = 1u << c;
		const struct uq_stock *s = &q->stock[c];

		q->stock_changed &= ~bit;
		q->stock_wanting = with(q->stock_wanting, bit, uq_stock_want(q, c));
		q->stock_short = with(q->stock_short, bit, s->waiting || s->recalled);
	}
}

void uq_stock_asked(struct uq *q, unsigned class, unsigned count)
{
	q->stock[class].pending += count;
	touch(q, &q->stock[class]);
}

bool uq_stock_fill(struct uq *q, unsigned class, const uint32_t *slots, unsigned count)
{
	const struct uq_class *c = class < q->config.classes ? &q->config.class[class] : NULL;
	struct uq_stock *s = &q->stock[class];

	for (unsigned i = 0; i < count; i++) {
		if (!c || slots[i] < c->first_slot || slots[i] - c->first_slot >= c->count || s->held == c->count) {
			uq_fail_now(q, UQ_F_GRANT, class, (int)slots[i]);
			return false;
		}
		s->slots[s->count++] = slots[i];
		s->held++;
		q->config.stats->buffers_held++;
	}
	if (c)
		touch(q, s);
	return true;
}

/* Writes the broker's fields of the headers as well: the sequence counts the slot's owners. */
static void own(struct uq *q, uint32_t slot)
{
	struct uq_slot *h = &q->config.slots[slot];

	h->sequence++;
	h->tag = 0;
	h->epoch = q->config.epoch;
	h->owner = q->config.queue + 1u;
}

void uq_stock_own(struct uq *q)
{
	for (unsigned c = 0; c < q->config.classes; c++) {
		const struct uq_class *class = &q->config.class[c];

		for (uint32_t i = 0; i < class->count; i++) {
			uint32_t slot = class->first_slot + i;

			own(q, slot);
			uq_stock_fill(q, c, &slot, 1);
		}
	}
}

unsigned uq_stock_take(struct uq *q, unsigned class, uint32_t *slots, unsigned max)
{
	struct uq_stock *s = &q->stock[class];
	unsigned count = s->count < max ? s->count : max;

	for (unsigned i = 0; i < count; i++)
		slots[i] = pop(q, s);
	s->held -= count;
	s->recalled -= s->recalled < count ? s->recalled : count;
	q->config.stats->buffers_held -= count;
	return count;
}

void uq_stock_recall(struct uq *q, unsigned class, unsigned count)
{
	if (class >= q->config.classes)
		return;
	q->stock[class].recalled = count;
	touch(q, &q->stock[class]);
}

void uq_stock_on_order(struct uq *q, unsigned class, unsigned count)
{
	if (class >= q->config.classes)
		return;
	q->stock[class].pending = count;
	touch(q, &q->stock[class]);
}

unsigned uq_stock_held(const struct uq *q, unsigned class, uint32_t *slots, unsigned max)
{
	const struct uq_stock *s = &q->stock[class];
	unsigned count = 0;

	for (unsigned i = 0; i < s->count && count < max; i++)
		slots[count++] = s->slots[i];
	for (unsigned i = 0; i < q->config.depth && count < max; i++)
		if (q->tags[i].slot != UQ_BUFFER_NONE && q->tags[i].class == class)
			slots[count++] = q->tags[i].slot;
	return count;
}
