/* The requests that wait for a backend, all together: they go on, are held back, or fail. */
#ifndef UQ_QUEUE_WAITING_H
#define UQ_QUEUE_WAITING_H

#include "queue_types.h"

/* Requests that wait for a backend go to the one whose link has come up, in the order of their arrival. */
void uq_requests_resume(struct uq *q);

#endif
