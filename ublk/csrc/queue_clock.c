/* See queue_clock.h. */
#include "queue_clock.h"

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

uint64_t uq_clock_read(struct uq_clock *c, uint64_t now_ms, unsigned waited_ms)
{
	uint64_t before_ms = c->read_ms ? c->read_ms : now_ms;
	uint64_t gap_ms = now_ms > before_ms ? now_ms - before_ms : 0;
	uint64_t late_ms = gap_ms > waited_ms ? gap_ms - waited_ms : 0;

	if (late_ms > UQ_PAUSE_MS) {
		c->missed_ms += gap_ms;
		c->quiet_until_ms = now_ms + least(2 * late_ms, UQ_QUIET_MS);
		c->pauses++;
	} else if (before_ms < c->quiet_until_ms) {
		c->missed_ms += least(gap_ms, c->quiet_until_ms - before_ms);
	}
	c->read_ms = before_ms + gap_ms;
	return c->read_ms - c->missed_ms;
}
