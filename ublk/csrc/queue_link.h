/* The link to the backend; see queue_core.h for what the queue's owner calls. */
#ifndef UQ_QUEUE_LINK_H
#define UQ_QUEUE_LINK_H

#include "queue_types.h"

/* Whether the backend's descriptors are read and descriptors for it are sent. */
static inline bool uq_link_talks(const struct uq *q) { return q->link != UQ_LINK_NONE && q->link != UQ_LINK_CUT; }
/* An engine in this process says what has become of a request that it was given without a descriptor. */
void uq_link_ended(struct uq *q, const struct engine_result *said);
/* Cuts the link if a descriptor found no room. */
static inline void uq_link_settle(struct uq *q)
{
	if (q->output_overflowed)
		uq_link_cut(q, UQ_V_UNEXPECTED);
}

#endif
