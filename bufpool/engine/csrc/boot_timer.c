#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "boot_timer.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>

#define NS_PER_S 1000000000ll

struct boot_timer {
	timer_t id;
};

struct boot_timer *boot_timer_new(int signal, int *error)
{
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = signal };
	struct boot_timer *timer = calloc(1, sizeof *timer);
	*error = -ENOMEM;
	if (!timer)
		return NULL;
	if (timer_create(CLOCK_BOOTTIME, &event, &timer->id) == 0)
		return timer;
	*error = -errno;
	free(timer);
	return NULL;
}

int boot_timer_set(struct boot_timer *timer, int64_t at_ns)
{
	struct itimerspec when = { .it_value = { .tv_sec = at_ns / NS_PER_S, .tv_nsec = at_ns % NS_PER_S } };
	return timer_settime(timer->id, TIMER_ABSTIME, &when, NULL) ? -errno : 0;
}

void boot_timer_free(struct boot_timer *timer)
{
	timer_delete(timer->id);
	free(timer);
}
