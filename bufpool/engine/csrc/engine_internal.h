/* What engine.c, engine_answers.c and engine_regions.c share and nobody else sees. */
#ifndef UBLKPOOL_ENGINE_INTERNAL_H
#define UBLKPOOL_ENGINE_INTERNAL_H

#include "fifo.h"
#include "slots.h"
#include "storage.h"

/* NAMED: the data of its write is still to come.  ANSWERED: a region stays lent until RELEASE, since the worker may
 * still take the data from it. */
enum state { IDLE, WAITING, NAMED, RUNNING, ANSWERED };

struct answers {
	struct wire_descriptor *items;
	uint32_t first, count, capacity;
};

struct queue {
	uint32_t epoch, running, running_old, worker_epoch;
	bool fenced, is_welcome;
	struct wire_descriptor fence;
	struct answers answers;
};

struct engine {
	struct engine_setup setup;
	struct storage *storage;
	int event_file, error;
	bool came_back, posts_due;
	struct queue *queues;
	struct storage_request *requests;
	struct fifo waiting;
	struct engine_statistics count;
};

/* It names or wants a region and nothing of it is running. */
static inline bool may_let_go(const struct storage_request *r)
{
	return r->state == NAMED || r->state == WAITING || r->state == ANSWERED;
}

/* engine_answers.c */
/* An answer to fill in further; somewhere else if there is no memory, which ends the engine's use. */
struct wire_descriptor *engine_answer(struct engine *e, const struct wire_descriptor *to, uint8_t kind, int32_t result);
void engine_answer_done(struct engine *e, const struct storage_request *r, int32_t result);
void engine_count_start(struct engine *e, const struct storage_request *r);
void engine_name_in(const struct engine *e, struct wire_descriptor *d, const struct storage_request *r);

/* engine_regions.c */
/* Name a region for it now or when there is one; with a problem refuse. */
void engine_ask_for_region(struct engine *e, struct storage_request *r, int32_t problem);
/* Something came back: those who wait are asked again, in the order in which they came. */
void engine_name_for_waiting(struct engine *e);
void engine_give_back(struct engine *e, struct storage_request *r);
/* It is over: it waits no longer and has no region. */
void engine_abandon(struct engine *e, struct storage_request *r);
/* A region that was posted is used, or comes back unused: its bytes, 0 if it is not. */
uint64_t engine_claim(struct engine *e, const struct wire_descriptor *d);
/* What a dead worker was posted is nobody's now. */
void engine_forget_posts(struct engine *e, uint32_t queue, uint32_t epoch);
/* After those who wait were asked again: they go before those who might come. */
void engine_post_to_all(struct engine *e);

#endif
