/* The device's limits: I/Os and bytes a second, shared by all of its queues, and the tags of this queue that wait for
 * them. */
#ifndef UQ_QUEUE_LIMIT_H
#define UQ_QUEUE_LIMIT_H

#include "queue_types.h"

void uq_limit_begin(struct uq *q);
/* Sets the clock of the limits, in nanoseconds, and reads limits that the daemon has changed. */
void uq_limit_time(struct uq *q, uint64_t now_ns);

/* Whether a request of this operation must wait its turn.  A FLUSH never waits; nothing waits on a queue that gives up.
 */
static inline bool uq_limit_holds(const struct uq *q, unsigned op)
{
	return __builtin_expect(q->limit.is_set, 0) && op != WIRE_FLUSH && !q->giving_up;
}

/* The tag waits behind those that wait already. */
void uq_limit_enqueue(struct uq *q, struct uq_tag *t);
/* Takes out the tag that has waited longest, if its time has come: that tag, or NULL. */
struct uq_tag *uq_limit_next(struct uq *q);

#endif
