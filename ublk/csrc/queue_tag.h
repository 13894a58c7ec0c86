/* A tag's transitions, and what leaves the queue: commands for the kernel, descriptors for the backend. */
#ifndef UQ_QUEUE_TAG_H
#define UQ_QUEUE_TAG_H

#include "queue_types.h"

/* Moves the tag; false, and the queue's fault, if the table has no such transition. */
bool uq_move(struct uq *q, struct uq_tag *t, enum uq_event event);
void uq_fail_now(struct uq *q, unsigned fault, unsigned tag, int detail);

void uq_command(struct uq *q, struct uq_tag *t, uint8_t op, int result, const uint8_t *address);
/* Takes the oldest command out, which is valid until the next one comes; NULL if there is none. */
const struct uq_command *uq_command_pop(struct uq *q);

/* A descriptor about this tag's request, to be completed by the caller.  If there is no room, `output_overflowed` is
 * set and the descriptor is written where nothing reads it. */
struct wire_descriptor *uq_put(struct uq *q, const struct uq_tag *t, uint8_t kind);
/* A descriptor about the link itself. */
void uq_put_link(struct uq *q, uint8_t kind);
void uq_output_clear(struct uq *q);

#endif
