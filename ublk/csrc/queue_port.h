/*
 * The worker's end of the rings that it shares with a backend: descriptors in and out, without a system call.
 *
 * The memory is the owner's and outlives the port.  What lies in it is written by somebody who may be hostile, see
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
 * Feeds the queue what has come, at most a ring's worth, and takes its output for as far as there is room.  Does
 * nothing while the queue has no link.  An index that makes no sense cuts the link.
 *
 * Returns whether the backend sleeps and its doorbell is to be rung.
 */
int uq_port_turn(struct uq_port *p, struct uq *q);

/* Whether something has come that would be listened to. */
int uq_port_has_news(const struct uq_port *p, const struct uq *q);
/* About to sleep: 1, the backend will ring; 0, something has come. */
int uq_port_doze(struct uq_port *p, const struct uq *q);
/* Awake: nobody need ring. */
void uq_port_wake(struct uq_port *p);

#endif
