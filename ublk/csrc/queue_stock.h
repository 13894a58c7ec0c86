/* The queue's stock of pool buffers, and the tags that wait for one, for each class (a size). */
#ifndef UQ_QUEUE_STOCK_H
#define UQ_QUEUE_STOCK_H

#include "queue_types.h"

/* The smallest class whose buffers hold `bytes`; the largest if none does. */
unsigned uq_class_for(const struct uq *q, uint64_t bytes);
uint64_t uq_slot_offset(const struct uq *q, uint32_t slot);
uint8_t *uq_slot_address(const struct uq *q, uint32_t slot);

bool uq_stock_allocate(struct uq *q);
void uq_stock_free(struct uq *q);

/* The tag waits for a buffer of its class, behind those that wait already. */
void uq_stock_enqueue(struct uq *q, struct uq_tag *t);
/* The tag stops waiting, if it does wait. */
void uq_stock_forget(struct uq *q, struct uq_tag *t);
/* Gives a buffer to the tag that has waited longest for one of this class: that tag, which holds it now, or NULL. */
struct uq_tag *uq_stock_serve(struct uq *q, unsigned class);
/* Lends a buffer of the tag's class to it; false if there is none, or other tags or the broker come first. */
bool uq_stock_lend(struct uq *q, struct uq_tag *t);
/* Takes the tag's buffer back. */
void uq_stock_return(struct uq *q, struct uq_tag *t);
/* Adds leased slots; false, and the queue's fault, if one does not belong to the class. */
bool uq_stock_fill(struct uq *q, unsigned class, const uint32_t *slots, unsigned count);

/* Looks at the classes that have changed. */
void uq_stock_settle(struct uq *q);
/* Starts another period over which the fewest idle buffers are noted. */
void uq_stock_look(struct uq *q);

/* Whether buffers of the class may go back to the broker once they have been idle for a while, see uq_stock_want(). */
bool uq_stock_may_return(const struct uq *q, unsigned class);

/* Whether a tag or the broker waits for a buffer.  The worker asks this and the next in every turn. */
static inline bool uq_stock_short(struct uq *q)
{
	if (q->stock_changed)
		uq_stock_settle(q);
	return q->stock_short;
}

/* Whether a class is to be leased or returned. */
static inline bool uq_stock_wanting(struct uq *q)
{
	if (q->stock_changed)
		uq_stock_settle(q);
	return q->stock_wanting;
}

#endif
