/* The types and functions that only the engine's own files share. */
#ifndef UBLKPOOL_ENGINE_INTERNAL_H
#define UBLKPOOL_ENGINE_INTERNAL_H

#include "fifo.h"
#include "slots.h"
#include "storage.h"

/* NAMED: a write has its region, and its data is still to come.  ANSWERED: the region stays lent until RELEASE, since
 * the worker may still read the data from it. */
enum state { IDLE, WAITING, NAMED, RUNNING, ANSWERED };

struct answers {
	struct wire_descriptor *items;
	uint32_t first, count, capacity;
};

/* What became of requests that were begun, in two halves of `depth` places: the caller reads one half while the next
 * results go into the other. */
struct results {
	struct engine_result *items;
	uint32_t count, half;
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
	struct results results;
	struct engine_statistics count;
};

/* Whether the request has a region or waits for one, and the storage is not executing it. */
static inline bool may_let_go(const struct storage_request *r)
{
	return r->state == NAMED || r->state == WAITING || r->state == ANSWERED;
}

/* engine.c */
/* 0, or why the engine executes no request with these fields: a negative errno. */
int32_t engine_objection(const struct engine *e, uint8_t op, uint64_t offset, uint64_t length);

/* engine_inside.c */
/* Keeps the result of a request that was begun. */
void engine_add_result(struct engine *e, const struct storage_request *r, int32_t result);
bool engine_open_results(struct engine *e);

/* engine_answers.c */
/* Adds an answer, which the caller may fill in further.  Without memory it returns a scratch descriptor, and the
 * engine's use ends. */
struct wire_descriptor *engine_answer(struct engine *e, const struct wire_descriptor *to, uint8_t kind, int32_t result);
void engine_answer_done(struct engine *e, const struct storage_request *r, int32_t result);
void engine_count_start(struct engine *e, const struct storage_request *r);
/* A request that has its result. */
void engine_count_end(struct engine *e, uint8_t op, uint64_t length, int32_t result);
void engine_name_in(const struct engine *e, struct wire_descriptor *d, const struct storage_request *r);

/* engine_regions.c */
/* Names a region for the request, now or when one is free; refuses the request if `problem` is an errno. */
void engine_ask_for_region(struct engine *e, struct storage_request *r, int32_t problem);
/* Offers regions that were given back to the waiting requests, in their order of arrival. */
void engine_name_for_waiting(struct engine *e);
void engine_give_back(struct engine *e, struct storage_request *r);
/* Ends the request's wait for a region, or gives its region back. */
void engine_abandon(struct engine *e, struct storage_request *r);
/* Ends the post of the region that the descriptor names.  Returns its bytes, or 0 if it is not posted. */
uint64_t engine_claim(struct engine *e, const struct wire_descriptor *d);
/* Takes back the regions that were posted to a queue's worker before this epoch. */
void engine_forget_posts(struct engine *e, uint32_t queue, uint32_t epoch);
/* Posts regions to each queue that needs them.  Called after engine_name_for_waiting(): waiting requests come before
 * writes that may arrive. */
void engine_post_to_all(struct engine *e);

#endif
