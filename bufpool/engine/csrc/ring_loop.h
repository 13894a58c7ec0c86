/* The loop of a native engine over rings: descriptors from the workers into the engine, answers back, without Python.
 *
 * Owns one io_uring with all that the backend waits for: the workers' doorbells, the engine's file I/O, and one
 * descriptor of the caller's.  A turn is at most one system call, which submits what the turn has made
 * (file I/O, doorbells to workers) and waits.  One thread uses a loop, the one that made it; every function may be
 * called without the GIL.  Ports and engine are the caller's and outlive it.
 */
#ifndef UBLKPOOL_RING_LOOP_H
#define UBLKPOOL_RING_LOOP_H

#include <stdint.h>

#include "engine.h"
#include "port.h"

struct ring_loop_statistics {
	uint64_t turns, calls; /* calls: io_uring_enter */
	uint64_t bells;        /* rung for workers */
};

struct ring_loop;

/* `watched`: the descriptor whose readiness ends a run.  Without io_uring or memory returns NULL and sets *error, a
 * negative errno.  The engine does its I/O through this loop from now on. */
struct ring_loop *ring_loop_new(struct ports *ports, struct engine *engine, uint32_t queues, uint32_t depth,
				int watched, int *error);
/* The engine may then only be closed. */
void ring_loop_free(struct ring_loop *loop);
/* Sets a queue's doorbells, the backend's own and the worker's; -1 and -1 before the caller closes them. */
void ring_loop_bells(struct ring_loop *loop, uint32_t queue, int ours, int workers);
enum { RING_LOOP_WATCHED = 1, RING_LOOP_CALLS = 2 };

/* Collects the batch that the caller has executed, then turns until `watched` is readable or the engine has handed out
 * calls (returns one or both of RING_LOOP_*), `timeout_ms` have passed (0; -1: never), a signal came (-EINTR), a worker
 * has broken the protocol (-EPROTO, see ring_loop_wrong()), or another errno ends the loop's use.  Without `hears` the
 * loop takes no descriptors from the rings any more, and returns 0 when no request runs. */
int ring_loop_run(struct ring_loop *loop, int timeout_ms, int hears);
/* Sets for how many microseconds the loop polls for work before it sleeps, see spin.h. */
void ring_loop_spin(struct ring_loop *loop, uint32_t most_us);
/* The queue whose worker has broken the protocol. */
uint32_t ring_loop_wrong(const struct ring_loop *loop);
/* Sends the answers that wait for room, for `timeout_ms` at most.  Returns how many still wait, or a negative errno. */
int ring_loop_settle(struct ring_loop *loop, int timeout_ms);
void ring_loop_count(const struct ring_loop *loop, struct ring_loop_statistics *statistics);

#endif
