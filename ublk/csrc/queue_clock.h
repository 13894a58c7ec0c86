/*
 * The time in which this worker was able to serve.  It stands still while the process does not run.
 *
 * A worker can be stopped: SIGSTOP, a frozen cgroup, a suspended or migrated virtual machine.  CLOCK_MONOTONIC goes on
 * then (only a suspend of the whole machine stops it, which is why it is read here and not CLOCK_BOOTTIME), but the
 * worker hears no answer, and the backend may have been stopped with it.  A deadline that counted this time would cut
 * off a healthy backend.  So no deadline of the core is measured on the system's clock: uq_tick() is given this one.
 *
 * A read that comes more than UQ_PAUSE_MS later than expected means that the process did not run.  Nothing of that gap
 * counts.  After it this clock stands still for twice as long as the gap, UQ_QUIET_MS at most: the other side needs
 * time to run again, to be read in from swap, or to connect again.
 */
#ifndef UQ_QUEUE_CLOCK_H
#define UQ_QUEUE_CLOCK_H

#include <stdint.h>

enum { UQ_PAUSE_MS = 500, UQ_QUIET_MS = 5000 };

/* All zero before the first read. */
struct uq_clock {
	uint64_t read_ms;        /* the system's clock at the last read */
	uint64_t missed_ms;      /* how far this clock is behind the system's */
	uint64_t quiet_until_ms; /* on the system's clock: until then this one stands still */
	uint64_t pauses;         /* gaps that were noticed */
};

/* Returns this clock's time, in milliseconds.  `now_ms` is the system's clock; since the last read the caller meant to
 * wait for `waited_ms` at most. */
uint64_t uq_clock_read(struct uq_clock *c, uint64_t now_ms, unsigned waited_ms);

#endif
