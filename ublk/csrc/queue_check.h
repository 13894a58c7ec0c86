/* Run-time assertions of the core's invariants, in the checked build (-DUQ_CHECKED) that unit tests and simulation use.
 */
#ifndef UQ_QUEUE_CHECK_H
#define UQ_QUEUE_CHECK_H

#include "queue_types.h"

#ifdef UQ_CHECKED
/* Makes an invariant that does not hold the queue's fault, and names it on stderr; does nothing once there is a fault.
 */
void uq_check(struct uq *q);
/* Called once, when the queue is made. */
void uq_check_begin(struct uq *q);
#else
static inline void uq_check(struct uq *q) {}
static inline void uq_check_begin(struct uq *q) {}
#endif

#endif
