/*
 * A worker and a backend pass one descriptor to and fro through shared memory; before one of them sleeps it says so,
 * and the other, if it finds it asleep, wakes it.  What is measured is how each is woken, and in what the backend
 * sleeps.  The worker sleeps in io_uring_enter, since its driver's commands end there; only in "calls-only" it does
 * not, which shows the least that two processes cost.
 *
 *     doorbell WAY CPU CPU MILLISECONDS
 *
 * prints round trips a second and the CPU time of both for each, microseconds.  Status 3: this kernel has no such way.
 */
#include <errno.h>
#include <fcntl.h>
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
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
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

/* How a process rings for the other one. */
enum ring { EVENTFD_SQE, EVENTFD_WRITE, FUTEX_SQE, FUTEX_CALL, SOCKET_SEND, PIPE_WRITE, RING_MESSAGE };
/* In what a process sleeps. */
enum wait { IN_RING_POLL, IN_RING_FUTEX, IN_RING, IN_EPOLL, IN_READ, IN_FUTEX };

static const struct way {
	const char *name;
	enum ring worker_rings, backend_rings;
	enum wait worker_waits, backend_waits;
} ways[] = {
	{ "eventfd-ring", EVENTFD_SQE, EVENTFD_SQE, IN_RING_POLL, IN_RING_POLL },
	{ "eventfd-write", EVENTFD_WRITE, EVENTFD_WRITE, IN_RING_POLL, IN_RING_POLL },
	{ "futex-ring", FUTEX_SQE, FUTEX_SQE, IN_RING_FUTEX, IN_RING_FUTEX },
	{ "futex-call", FUTEX_CALL, FUTEX_CALL, IN_RING_FUTEX, IN_RING_FUTEX },
	{ "backend-writes", EVENTFD_SQE, EVENTFD_WRITE, IN_RING_POLL, IN_RING_POLL },
	{ "backend-in-epoll", EVENTFD_SQE, EVENTFD_WRITE, IN_RING_POLL, IN_EPOLL },
	{ "backend-in-read", EVENTFD_WRITE, EVENTFD_WRITE, IN_RING_POLL, IN_READ },
	{ "backend-in-futex", FUTEX_CALL, EVENTFD_WRITE, IN_RING_POLL, IN_FUTEX },
	{ "backend-in-futex-sqe", FUTEX_SQE, EVENTFD_WRITE, IN_RING_POLL, IN_FUTEX },
	{ "backend-in-ring-futex", FUTEX_CALL, EVENTFD_WRITE, IN_RING_POLL, IN_RING_FUTEX },
	{ "socket", SOCKET_SEND, EVENTFD_WRITE, IN_RING_POLL, IN_READ },
	{ "pipe", PIPE_WRITE, EVENTFD_WRITE, IN_RING_POLL, IN_READ },
	{ "calls-only", EVENTFD_WRITE, EVENTFD_WRITE, IN_READ, IN_READ },
	{ "ring-message", RING_MESSAGE, EVENTFD_WRITE, IN_RING_POLL, IN_RING },
};
#define WAYS (sizeof ways / sizeof *ways)

struct side {
	_Alignas(64) _Atomic uint32_t turn; /* How often the other has written here; what a futex waits on. */
	_Atomic uint32_t sleeps;
	uint8_t descriptor[64];
};

struct shared {
	struct side side[2];
	_Atomic int backend_ring; /* its descriptor in the backend, plus 1; 0: not yet */
	_Atomic bool over;
};

struct party {
	struct io_uring ring;
	struct side *mine, *theirs;
	int bell_in, bell_out, epoll;
	const char *name;
	enum ring rings;
	enum wait waits;
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

static void ring(struct party *p)
{
	static const uint64_t one = 1;
	struct io_uring_sqe *s;

	switch (p->rings) {
	case EVENTFD_SQE:
		s = entry(p, OTHER);
		io_uring_prep_write(s, p->bell_out, &one, sizeof one, 0);
		s->user_data = OTHER;
		s->flags |= IOSQE_CQE_SKIP_SUCCESS;
		break;
	case RING_MESSAGE:
		s = entry(p, OTHER);
		io_uring_prep_msg_ring(s, p->bell_out, 0, OTHER, 0);
		s->user_data = OTHER;
		s->flags |= IOSQE_CQE_SKIP_SUCCESS;
		break;
	case FUTEX_SQE:
		/* Without IOSQE_CQE_SKIP_SUCCESS: how many it woke is an answer, and tells an old kernel. */
		futex_entry(entry(p, OTHER), OP_FUTEX_WAKE, &p->theirs->turn, 1);
		break;
	case FUTEX_CALL:
		if (syscall(SYS_futex, &p->theirs->turn, FUTEX_WAKE, 1, NULL, NULL, 0) < 0)
			die("futex", errno);
		break;
	case SOCKET_SEND:
		if (send(p->bell_out, &one, sizeof one, MSG_DONTWAIT | MSG_NOSIGNAL) != sizeof one)
			die("socket", errno);
		break;
	default:
		if (write(p->bell_out, &one, sizeof one) != sizeof one)
			die("write", errno);
	}
}

static void arm(struct party *p)
{
	struct io_uring_sqe *s;

	if (p->armed || p->waits > IN_RING_FUTEX)
		return;
	s = entry(p, WAITING);
	if (p->waits == IN_RING_POLL) {
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
			die(p->name, -c->res);
		if (c->user_data == WAITING && !(c->flags & IORING_CQE_F_MORE))
			p->armed = false;
		io_uring_cqe_seen(&p->ring, c);
	}
}

static void sleep_in_call(struct party *p)
{
	struct epoll_event event;
	uint64_t count;
	ssize_t e = 0;

	if (p->waits == IN_EPOLL)
		e = epoll_wait(p->epoll, &event, 1, -1);
	else if (p->waits == IN_READ)
		e = read(p->bell_in, &count, sizeof count);
	else if (syscall(SYS_futex, &p->mine->turn, FUTEX_WAIT, p->seen, NULL, NULL, 0) < 0 && errno != EAGAIN)
		e = -1;
	if (e < 0 && errno != EINTR)
		die(p->name, errno);
}

static void sleep_in_ring(struct party *p, unsigned waits)
{
	int e = io_uring_submit_and_wait(&p->ring, waits);

	if (e < 0 && e != -EINTR)
		die("io_uring_enter", -e);
}

static void await_turn(struct party *p)
{
	while (atomic_load(&p->mine->turn) == p->seen) {
		unsigned waits;

		arm(p);
		atomic_store(&p->mine->sleeps, 1);
		waits = atomic_load(&p->mine->turn) == p->seen;
		if (p->waits <= IN_RING)
			sleep_in_ring(p, waits);
		else if (waits)
			sleep_in_call(p);
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
		ring(p);
}

static void begin(struct party *p, int cpu)
{
	struct io_uring_params params = { .flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
						   IORING_SETUP_TASKRUN_FLAG };
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
	if (p->waits != IN_EPOLL)
		return;
	/* Edge-triggered and never read, as in a ring's poll. */
	p->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (p->epoll < 0 ||
	    epoll_ctl(p->epoll, EPOLL_CTL_ADD, p->bell_in, &(struct epoll_event){ EPOLLIN | EPOLLET, { 0 } }))
		die("epoll", errno);
}

static void make_eventfd(int *reads, int *writes, int flags)
{
	*reads = *writes = eventfd(0, EFD_CLOEXEC | flags);
	if (*reads < 0)
		die("eventfd", errno);
}

/* What the worker rings and the backend hears.  The backend's read must block, so this is the benchmark's blocking one.
 */
static void make_bell(enum ring rings, enum wait waits, int *reads, int *writes)
{
	int ends[2];

	if (rings == SOCKET_SEND) {
		if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
			die("socketpair", errno);
	} else if (rings == PIPE_WRITE) {
		char name[32];

		if (pipe2(ends, O_CLOEXEC))
			die("pipe", errno);
		close(ends[1]);
		snprintf(name, sizeof name, "/proc/self/fd/%d", ends[0]);
		/* An open file of its own: the reader cannot change its O_NONBLOCK. */
		ends[1] = open(name, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
		if (ends[1] < 0)
			die("pipe's second open", errno);
	} else {
		make_eventfd(&ends[0], &ends[1], waits == IN_READ ? 0 : EFD_NONBLOCK);
	}
	*reads = ends[0];
	*writes = ends[1];
}

/* The worker's copy of the backend's ring. */
static int ring_of(pid_t backend, struct shared *shared)
{
	int file, process = (int)syscall(SYS_pidfd_open, backend, 0);

	while (!atomic_load(&shared->backend_ring))
		sched_yield();
	file = (int)syscall(SYS_pidfd_getfd, process, atomic_load(&shared->backend_ring) - 1, 0);
	if (file < 0)
		die("pidfd_getfd", errno);
	return file;
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
	atomic_store(&shared->backend_ring, p->ring.ring_fd + 1);
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

static const struct way *way_of(const char *name)
{
	for (unsigned i = 0; i < WAYS; i++)
		if (!strcmp(ways[i].name, name))
			return &ways[i];
	die(name, ENOENT);
}

int main(int argc, char **argv)
{
	struct shared *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct party one, two;
	int status = 0;
	double took_s;
	uint64_t trips;

	if (argc != 5 || shared == MAP_FAILED)
		die("usage: doorbell WAY CPU CPU MILLISECONDS", EPERM);
	const struct way *way = way_of(argv[1]);
	one = (struct party){ .mine = &shared->side[0], .theirs = &shared->side[1], .name = way->name };
	two = (struct party){ .mine = &shared->side[1], .theirs = &shared->side[0], .name = way->name };
	one.rings = way->worker_rings;
	one.waits = way->worker_waits;
	two.rings = way->backend_rings;
	two.waits = way->backend_waits;
	make_eventfd(&one.bell_in, &two.bell_out, one.waits == IN_READ ? 0 : EFD_NONBLOCK);
	make_bell(one.rings, two.waits, &two.bell_in, &one.bell_out);
	pid_t child = fork();
	if (child < 0)
		die("fork", errno);
	if (!child)
		answer(&two, shared, atoi(argv[3]));
	if (one.rings == RING_MESSAGE)
		one.bell_out = ring_of(child, shared);
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
