/*
 * Busy polling before a sleep, for as long as it has paid off lately.
 *
 * A sleep costs the other side a system call and the machine two context switches; polling burns CPU time that other
 * processes may need.  So a poll lasts at most `most_ns`, and half as long after each poll that found nothing.  Once it
 * is too short to find anything, only one wait in SPIN_SKIPS begins with a poll.  Both sides of a ring compile this.
 */
#ifndef UBLKPOOL_SPIN_H
#define UBLKPOOL_SPIN_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

enum { SPIN_SHORTEST_SHIFT = 4, SPIN_SKIPS = 64, SPIN_LOOKS = 32 };

struct spin {
	uint64_t most_ns; /* 0: never */
	uint64_t next_ns; /* how long the next poll may last */
	uint32_t skipped;
};

static inline void spin_begin(struct spin *s, uint64_t most_ns) { *s = (struct spin){ most_ns, most_ns, 0 }; }

static inline uint64_t spin_clock_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline void spin_pause(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* Nanoseconds that the next poll may last; 0: sleep at once. */
static inline uint64_t spin_budget_ns(struct spin *s)
{
	if (s->next_ns > s->most_ns >> SPIN_SHORTEST_SHIFT)
		return s->next_ns;
	if (!s->most_ns || ++s->skipped < SPIN_SKIPS)
		return 0;
	s->skipped = 0;
	return s->most_ns;
}

static inline void spin_over(struct spin *s, bool found) { s->next_ns = found ? s->most_ns : s->next_ns / 2; }

/* Whether `has_news` became true within `budget_ns`.  News that were there at once do not change the next budget. */
static inline bool spin_look(struct spin *s, uint64_t budget_ns, bool (*has_news)(const void *), const void *who)
{
	uint64_t end_ns;
	bool found;

	if (has_news(who))
		return true;
	end_ns = spin_clock_ns() + budget_ns;
	do {
		for (int i = 0; i < SPIN_LOOKS && !(found = has_news(who)); i++)
			spin_pause();
	} while (!found && spin_clock_ns() < end_ns);
	spin_over(s, found);
	return found;
}

#endif
