/*
 * A native engine in the worker's own process, in place of a backend: requests and the few descriptors that it gets
 * travel by function calls.  The core judges its answers as it judges any backend's.
 *
 * One engine serves one queue, which it knows as its queue 0.
 */
#ifndef UQ_QUEUE_INSIDE_H
#define UQ_QUEUE_INSIDE_H

#include "engine_calls.h"
#include "queue_core.h"

/* Before the queue has a link: from then on the engine gets requests without descriptors (queue_run.c). */
void uq_inside_begin(struct uq *q, const struct engine_calls *calls, struct engine *engine);

/* Whether the engine has nothing to do: one that runs requests has an answer only to what it was handed. */
int uq_inside_is_idle(const struct uq *q);

/*
 * Hands the queue's output to the engine, and its answers and results to the queue, until neither has any.  Does
 * nothing while the queue has no link.  An engine whose use has ended cuts the link.
 */
void uq_inside_turn(struct uq *q, const struct engine_calls *calls, struct engine *engine);

#endif
