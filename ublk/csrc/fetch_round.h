/* Fetches every tag without a worker, which makes START_USER_RECOVERY safe on drivers before 6.15. */
#ifndef UQ_FETCH_ROUND_H
#define UQ_FETCH_ROUND_H

/*
 * Sends FETCH_REQ for every tag of every queue; the driver accepts those that no task has fetched since the last
 * START_USER_RECOVERY.  The caller exits right after, which gives the tags up again.  Returns 0 when every queue now
 * has, or had, a task; -EBUSY if one has not; another negative errno if the ring failed.
 */
int uq_fetch_round(int char_fd, unsigned queues, unsigned depth);

#endif
