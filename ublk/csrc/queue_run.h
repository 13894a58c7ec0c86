/* Requests that this process answers itself: with an engine that runs them within a call or begins them and finishes
 * later (engine_run() and engine_begin() in bufpool/engine/csrc/engine.h), or without any. */
#ifndef UQ_QUEUE_RUN_H
#define UQ_QUEUE_RUN_H

#include "queue_types.h"

static inline bool uq_runs(const struct uq *q) { return q->runs; }
static inline bool uq_begins(const struct uq *q) { return q->begins; }

/* This engine gets the queue's requests from now on, without descriptors if it can: before the queue has a link. */
void uq_run_begin(struct uq *q, const struct engine_calls *calls, struct engine *engine);

/* Runs a request that has arrived.  A read or another request is finished then; a write gets its data, and is finished
 * when that has come.  Returns 0, or the negative errno with which the request is to fail. */
int uq_run(struct uq *q, struct uq_tag *t);
/* Has the engine begin a request, whose result comes through queue_inside.c; false if its data lies neither in a buffer
 * of the pool nor in pages that the driver has registered, so that only a descriptor can name it. */
bool uq_begin(struct uq *q, const struct uq_tag *t);
/* A worker without a backend copies a write as any other and drops it, reads zeros, and completes the rest at once. */
void uq_answer_alone(struct uq *q, struct uq_tag *t);

#endif
