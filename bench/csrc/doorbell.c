/*
 * Two processes pass one descriptor to and fro through shared memory; before a process sleeps it says so, and who finds
 * the other asleep wakes it.  How it is woken is what is measured; every sleep is in io_uring_enter, as a worker's is.
 *
 *     doorbell WAY CPU CPU MILLISECONDS
 *
 * prints round trips a second and the CPU time of both for each, microseconds.  Status 3: this kernel has no such way.
 */
#include <errno.h>
#include <liburing.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Newer than Debian 12's headers. */
#define OP_FUTEX_WAIT 51
#define OP_FUTEX_WAKE 52
#define FUTEX2_U32 2
#define ENTRIES 8
#define WAITING 1ull
#define OTHER 2ull
#define STATUS_UNKNOWN_WAY 3
#define US_PER_S 1e6

enum way { EVENTFD_RING, EVENTFD_WRITE, FUTEX_RING, FUTEX_CALL, WAYS };

static const char *const names[WAYS] = { "eventfd-ring", "eventfd-write", "futex-ring", "futex-call" };

struct side {
	_Alignas(64) _Atomic uint32_t turn; /* How often the other has written here; what a futex waits on. */
	_Atomic uint32_t sleeps;
	uint8_t descriptor[64];
};

struct shared {
	struct side side[2];
	_Atomic uint64_t trips;
	_Atomic bool over;
};

struct party {
	struct io_uring ring;
	struct side *mine, *theirs;
	int bell_in, bell_out;
	enum way way;
	bool armed;
	uint32_t seen;
};

static _Noreturn void die(const char *what, int error)
{
	fprintf(stderr, "%s: %s\n", what, strerror(error));
	exit(error == EINVAL || error == ENOSYS ? STATUS_UNKNOWN_WAY : 1);
}

static struct io_uring_sqe *entry(struct party *p, uint64_t data)
{
	struct io_uring_sqe *s = io_uring_get_sqe(&p->ring);

	if (!s)
		die("no room in the submission queue", ENOSPC);
	memset(s, 0, sizeof *s);
	s->user_data = data;
	return s;
}

static void futex_entry(struct io_uring_sqe *s, uint8_t op, _Atomic uint32_t *word, uint64_t value)
{
	s->opcode = op;
	s->fd = FUTEX2_U32;
	s->addr = (uint64_t)(uintptr_t)word;
	s->off = value;
	*(uint64_t *)((char *)s + 48) = FUTEX_BITSET_MATCH_ANY; /* addr3 */
}

static void wake(struct party *p)
{
	static const uint64_t one = 1;
	struct io_uring_sqe *s;

	switch (p->way) {
	case EVENTFD_RING:
		s = entry(p, OTHER);
		io_uring_prep_write(s, p->bell_out, &one, sizeof one, 0);
		s->user_data = OTHER;
		s->flags |= IOSQE_CQE_SKIP_SUCCESS;
		break;
	case EVENTFD_WRITE:
		if (write(p->bell_out, &one, sizeof one) != sizeof one)
			die("eventfd", errno);
		break;
	case FUTEX_RING:
		/* Without IOSQE_CQE_SKIP_SUCCESS: how many it woke is an answer, and tells an old kernel. */
		futex_entry(entry(p, OTHER), OP_FUTEX_WAKE, &p->theirs->turn, 1);
		break;
	default:
		if (syscall(SYS_futex, &p->theirs->turn, FUTEX_WAKE, 1, NULL, NULL, 0) < 0)
			die("futex", errno);
	}
}

static void arm(struct party *p)
{
	struct io_uring_sqe *s;

	if (p->armed)
		return;
	s = entry(p, WAITING);
	if (p->way == EVENTFD_RING || p->way == EVENTFD_WRITE) {
		io_uring_prep_poll_multishot(s, p->bell_in, POLLIN);
		s->user_data = WAITING;
	} else {
		futex_entry(s, OP_FUTEX_WAIT, &p->mine->turn, p->seen);
	}
	p->armed = true;
}

static void harvest(struct party *p)
{
	struct io_uring_cqe *c;

	while (!io_uring_peek_cqe(&p->ring, &c)) {
		bool stale = c->res == -EAGAIN && c->user_data == WAITING;

		if (c->res < 0 && !stale)
			die(names[p->way], -c->res);
		if (c->user_data == WAITING && !(c->flags & IORING_CQE_F_MORE))
			p->armed = false;
		io_uring_cqe_seen(&p->ring, c);
	}
}

static void await_turn(struct party *p)
{
	while (atomic_load(&p->mine->turn) == p->seen) {
		arm(p);
		atomic_store(&p->mine->sleeps, 1);
		unsigned waits = atomic_load(&p->mine->turn) == p->seen;
		int e = io_uring_submit_and_wait(&p->ring, waits);

		if (e < 0 && e != -EINTR)
			die("io_uring_enter", -e);
		atomic_store(&p->mine->sleeps, 0);
		harvest(p);
	}
	p->seen++;
}

static void pass(struct party *p)
{
	memcpy(p->theirs->descriptor, p->mine->descriptor, sizeof p->mine->descriptor);
	atomic_fetch_add(&p->theirs->turn, 1);
	if (atomic_exchange(&p->theirs->sleeps, 0))
		wake(p);
}

static void begin(struct party *p, int cpu)
{
	struct io_uring_params params = { .flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN };
	cpu_set_t set;
	int e;

	CPU_ZERO(&set);
	CPU_SET((size_t)cpu, &set);
	if (sched_setaffinity(0, sizeof set, &set))
		die("sched_setaffinity", errno);
	e = io_uring_queue_init_params(ENTRIES, &p->ring, &params);
	if (e)
		die("io_uring", -e);
	io_uring_register_ring_fd(&p->ring);
}

static double now_s(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void answer(struct party *p, struct shared *shared, int cpu)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	begin(p, cpu);
	for (;;) {
		await_turn(p);
		if (shared->over)
			exit(0);
		pass(p);
		/* What was put into the submission queue to wake the other goes with the next wait. */
	}
}

static uint64_t ask(struct party *p, struct shared *shared, double seconds, double *took_s)
{
	double began_s = now_s(), until_s = began_s + seconds;
	uint64_t trips = 0;

	/* At least once: on a busy machine the time may be over before it begins. */
	do {
		pass(p);
		await_turn(p);
		trips++;
	} while (now_s() < until_s);
	*took_s = now_s() - began_s;
	shared->over = true;
	pass(p);
	io_uring_submit(&p->ring);
	return trips;
}

static double cpu_s(int who)
{
	struct rusage used;

	getrusage(who, &used);
	return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
	       (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / US_PER_S;
}

int main(int argc, char **argv)
{
	struct shared *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct party one = { 0 }, two = { 0 };
	int bells[2] = { eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) }, status = 0;
	unsigned way = 0;
	double took_s;
	uint64_t trips;

	if (argc != 5 || shared == MAP_FAILED || bells[0] < 0 || bells[1] < 0)
		die("usage: doorbell WAY CPU CPU MILLISECONDS", EPERM);
	while (way < WAYS && strcmp(names[way], argv[1]))
		way++;
	if (way == WAYS)
		die(argv[1], ENOENT);
	one = (struct party){ .mine = &shared->side[0], .theirs = &shared->side[1], .way = way };
	two = (struct party){ .mine = &shared->side[1], .theirs = &shared->side[0], .way = way };
	one.bell_in = two.bell_out = bells[0];
	one.bell_out = two.bell_in = bells[1];
	pid_t child = fork();
	if (child < 0)
		die("fork", errno);
	if (!child)
		answer(&two, shared, atoi(argv[3]));
	begin(&one, atoi(argv[2]));
	trips = ask(&one, shared, atof(argv[4]) / 1e3, &took_s);
	if (waitpid(child, &status, 0) != child || !WIFEXITED(status))
		return 1;
	if (WEXITSTATUS(status))
		return WEXITSTATUS(status);
	printf("%.3f %.3f\n", (double)trips / took_s,
	       (cpu_s(RUSAGE_SELF) + cpu_s(RUSAGE_CHILDREN)) * US_PER_S / (double)trips);
	return 0;
}
