/* A timer that counts the time in which the machine was suspended, and sends this process a signal.
 *
 * The kernel sends it, before a process that wakes up from suspend runs again, so that with SIGKILL nothing more is
 * done after the time is over.
 */
#ifndef UBLKPOOL_BOOT_TIMER_H
#define UBLKPOOL_BOOT_TIMER_H

#include <stdint.h>

struct boot_timer;

/* NULL on failure, with *error, a negative errno. */
struct boot_timer *boot_timer_new(int signal, int *error);
/* Sends the signal at this time of CLOCK_BOOTTIME, instead of one set before; 0: never.  Returns 0 or a negative errno.
 */
int boot_timer_set(struct boot_timer *timer, int64_t at_ns);
void boot_timer_free(struct boot_timer *timer);

#endif
