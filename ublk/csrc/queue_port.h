/*
 * The worker's end of the rings that it shares with a backend: descriptors in and out, without a system call.
 *
 * The caller owns the memory, which outlives the port.  A hostile backend can write to it at any time, see
 * bufpool/wire/csrc/shared_ring.h.
 */
#ifndef UQ_QUEUE_PORT_H
#define UQ_QUEUE_PORT_H

#include "queue_core.h"

struct uq_port;

/* Entries in each direction for a queue of `depth`: more than an honest backend can leave unread. */
uint32_t uq_port_entries(unsigned depth);
uint64_t uq_port_bytes(uint32_t entries);

/* `memory` is uq_port_bytes(entries), zeroed, mapped shared.  NULL if memory is short. */
struct uq_port *uq_port_new(uint8_t *memory, uint32_t entries);
void uq_port_free(struct uq_port *p);

/*
 * Feeds the backend's descriptors to the queue, at most a ring's worth, and writes the queue's output as far as the
 * ring has room.  Does nothing while the queue has no link.  An impossible index cuts the link.
 *
 * Returns 1 if the backend sleeps and its doorbell is to be rung.
 */
int uq_port_turn(struct uq_port *p, struct uq *q);

/* Whether the backend has sent something and the link is up to read it. */
int uq_port_has_news(const struct uq_port *p, const struct uq *q);
/* The worker is about to sleep.  Returns 1 if the backend will ring, 0 if something has come. */
int uq_port_doze(struct uq_port *p, const struct uq *q);
/* The worker is awake: the backend need not ring. */
void uq_port_wake(struct uq_port *p);

#endif
