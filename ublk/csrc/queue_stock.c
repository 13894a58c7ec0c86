/* The queue's stock of pool buffers: who waits for one, what to lease and what to return. */
#include "queue_internal.h"

#include <string.h>

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

/* The backend that named the region is dead and its process cannot write any more: take the data along. */
static void rescue(struct uq *q, struct uq_tag *t)
{
	memcpy(uq_slot_address(q, t->slot), uq_region_address(q, t), t->length);
	q->config.stats->own_copy_bytes += t->length;
	q->config.stats->rescues++;
	uq_region_back(q, t, false);
}

static void give(struct uq *q, struct uq_tag *t, uint32_t slot)
{
	t->slot = slot;
	q->config.slots[slot].tag = uq_index(q, t) + 1;
	q->config.stats->buffers_lent++;
	q->config.stats->lent_total++;
	if (t->op == WIRE_WRITE && !t->copied) {
		if (uq_move(q, t, UQ_EV_BUFFER_TO_COPY))
			uq_get_data(q, t, uq_slot_address(q, slot));
		return;
	}
	if (t->own_segment)
		rescue(q, t);
	if (uq_move(q, t, UQ_EV_BUFFER_TO_SERVE))
		uq_ready(q, t);
}

uint32_t uq_stock_pop(struct uq *q, struct uq_stock *s)
{
	uq_stock_touch(q, s);
	s->count--;
	if (s->count < s->least)
		s->least = s->count;
	if (s->count < s->idle)
		s->idle = s->count;
	return s->slots[s->count];
}

static void enqueue(struct uq *q, struct uq_stock *s, struct uq_tag *t)
{
	uint16_t tag = (uint16_t)uq_index(q, t);

	t->next_waiter = UQ_NO_TAG;
	if (s->first_waiter == UQ_NO_TAG)
		s->first_waiter = tag;
	else
		q->tags[s->last_waiter].next_waiter = tag;
	s->last_waiter = tag;
	s->waiting++;
	q->config.stats->buffers_waiting++;
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

/* Buffers that other queues wait for; what is above the reserve goes to them first. */
static unsigned payable(const struct uq *q, const struct uq_stock *s)
{
	unsigned reserve = q->config.class[s - q->stock].reserve, spare = s->held > reserve ? s->held - reserve : 0;

	return s->owed < spare ? s->owed : spare;
}

static void serve_waiters(struct uq *q, struct uq_stock *s)
{
	while (s->count > payable(q, s) && s->first_waiter != UQ_NO_TAG) {
		struct uq_tag *t = dequeue(q, s);

		give(q, t, uq_stock_pop(q, s));
	}
}

/* In arrival order: a new request never overtakes one that already waits for the same class. */
void uq_need_buffer(struct uq *q, struct uq_tag *t)
{
	struct uq_stock *s;

	t->class = (uint8_t)uq_class_for(q, t->length);
	s = &q->stock[t->class];
	if (t->state != UQ_WAIT_BUFFER && !uq_move(q, t, UQ_EV_NEEDS_BUFFER))
		return;
	if (s->count > payable(q, s) && s->first_waiter == UQ_NO_TAG) {
		give(q, t, uq_stock_pop(q, s));
		return;
	}
	uq_stock_touch(q, s);
	q->config.stats->buffers_waited++;
	enqueue(q, s, t);
}

void uq_stop_waiting(struct uq *q, struct uq_tag *t)
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
	uq_stock_touch(q, s);
	q->config.stats->buffers_waiting--;
}

void uq_slot_back(struct uq *q, struct uq_tag *t)
{
	struct uq_stock *s = &q->stock[t->class];

	q->config.slots[t->slot].tag = 0;
	q->config.stats->buffers_lent--;
	q->config.stats->returned_total++;
	s->slots[s->count++] = t->slot;
	t->slot = UQ_BUFFER_NONE;
	uq_stock_touch(q, s);
	serve_waiters(q, s);
}

/* What lies there for a while nobody needs. */
void uq_stock_look(struct uq *q)
{
	for (unsigned c = 0; c < q->config.classes; c++) {
		struct uq_stock *s = &q->stock[c];

		s->idle = s->least;
		s->least = s->count;
		uq_stock_touch(q, s);
	}
}

/* Never more than a buffer per tag, or than can ever come; a batch ahead of need, and slack before any goes back, which
 * is what was not needed for a while: what one burst gives back the next one takes. */
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
	return s->idle > reserve + 3 * batch ? -(int)(s->idle - reserve - batch) : 0;
}

/* Asked in every turn, so only those are looked at of which something has changed. */
bool uq_stock_wanting(struct uq *q)
{
	while (q->stock_changed) {
		unsigned c = (unsigned)__builtin_ctz(q->stock_changed), bit = 1u << c;

		q->stock_changed &= ~bit;
		q->stock_wanting = uq_stock_want(q, c) ? q->stock_wanting | bit : q->stock_wanting & ~bit;
	}
	return q->stock_wanting;
}

void uq_stock_asked(struct uq *q, unsigned class, unsigned count)
{
	q->stock[class].pending += count;
	uq_stock_touch(q, &q->stock[class]);
}

int uq_stock_add(struct uq *q, unsigned class, const uint32_t *slots, unsigned count)
{
	const struct uq_class *c = class < q->config.classes ? &q->config.class[class] : NULL;
	struct uq_stock *s = &q->stock[class];

	for (unsigned i = 0; i < count; i++) {
		if (!c || slots[i] < c->first_slot || slots[i] - c->first_slot >= c->count || s->held == c->count) {
			uq_fail_now(q, UQ_F_GRANT, class, (int)slots[i]);
			return -1;
		}
		s->slots[s->count++] = slots[i];
		s->held++;
	}
	uq_stock_touch(q, s);
	q->config.stats->buffers_held += count;
	serve_waiters(q, s);
	return 0;
}

bool uq_stock_short(const struct uq *q)
{
	for (unsigned c = 0; c < q->config.classes; c++)
		if (q->stock[c].waiting || q->stock[c].owed)
			return true;
	return false;
}

unsigned uq_stock_take(struct uq *q, unsigned class, uint32_t *slots, unsigned max)
{
	struct uq_stock *s = &q->stock[class];
	unsigned count = s->count < max ? s->count : max;

	for (unsigned i = 0; i < count; i++)
		slots[i] = uq_stock_pop(q, s);
	s->held -= count;
	s->owed -= s->owed < count ? s->owed : count;
	q->config.stats->buffers_held -= count;
	return count;
}

void uq_stock_recall(struct uq *q, unsigned class, unsigned count)
{
	if (class >= q->config.classes)
		return;
	q->stock[class].owed = count;
	uq_stock_touch(q, &q->stock[class]);
}

void uq_stock_on_order(struct uq *q, unsigned class, unsigned count)
{
	if (class >= q->config.classes)
		return;
	q->stock[class].pending = count;
	uq_stock_touch(q, &q->stock[class]);
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
