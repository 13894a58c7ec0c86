/* What the driver's descriptor of a tag says: its request, and the length that the kernel has copied. */
#ifndef UQ_QUEUE_DESCRIPTOR_H
#define UQ_QUEUE_DESCRIPTOR_H

#include "queue_types.h"

/* Copy every field on arrival: the driver may overwrite the descriptor once the tag is committed.  False for a request
 * that the queue cannot serve. */
bool uq_descriptor_read(struct uq *q, struct uq_tag *t);
bool uq_descriptor_is_write(const struct uq *q, const struct uq_tag *t);
uint64_t uq_descriptor_length(const struct uq *q, const struct uq_tag *t);

#endif
