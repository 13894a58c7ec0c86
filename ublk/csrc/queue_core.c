/* Tags: the transition table, arrivals, completions, commits.  See queue_core.h for the contract. */
#include "queue_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Bits of ublksrv_io_desc.op_flags (include/uapi/linux/ublk_cmd.h): the operation, then positions in the same word. */
#define IOD_OP_MASK 0xffu
#define IOD_FUA (1u << 13)
#define IOD_NOUNMAP (1u << 15)
#define IOD_SHMEM_ZC (1u << 19)
#define RES_NEED_GET_DATA 1

/* Next state plus one, so that what is not named is illegal. */
#define TO(state) (state) + 1
static const uint8_t transitions[UQ_STATES][UQ_EVENTS] = {
	[UQ_KERNEL] = {
		[UQ_EV_NEEDS_BUFFER] = TO(UQ_WAIT_BUFFER),
		[UQ_EV_NEEDS_PLACE] = TO(UQ_WAIT_PLACE),
		[UQ_EV_READY] = TO(UQ_WAIT_LINK),
		[UQ_EV_THROW_AWAY] = TO(UQ_COPYING),
		[UQ_EV_IN_PLACE] = TO(UQ_COPYING),
		[UQ_EV_FAIL_UNCOPIED] = TO(UQ_FAILING),
		[UQ_EV_FINISH] = TO(UQ_COMMITTING),
		[UQ_EV_ABORTED] = TO(UQ_GONE) },
	[UQ_WAIT_BUFFER] = {
		[UQ_EV_BUFFER_TO_COPY] = TO(UQ_COPYING),
		[UQ_EV_BUFFER_TO_SERVE] = TO(UQ_WAIT_LINK),
		[UQ_EV_FAIL_UNCOPIED] = TO(UQ_FAILING),
		[UQ_EV_FINISH] = TO(UQ_COMMITTING) },
	[UQ_WAIT_PLACE] = {
		[UQ_EV_ASK] = TO(UQ_PLACING),
		[UQ_EV_POSTED] = TO(UQ_COPYING),
		[UQ_EV_FAIL_UNCOPIED] = TO(UQ_FAILING) },
	[UQ_PLACING] = {
		[UQ_EV_PLACED] = TO(UQ_COPYING),
		[UQ_EV_LINK_LOST] = TO(UQ_WAIT_PLACE),
		[UQ_EV_FAIL_UNCOPIED] = TO(UQ_FAILING) },
	[UQ_COPYING] = {
		[UQ_EV_COPIED] = TO(UQ_WAIT_LINK),
		[UQ_EV_RESCUE] = TO(UQ_WAIT_BUFFER),
		[UQ_EV_REQUEUED] = TO(UQ_KERNEL),
		[UQ_EV_FINISH] = TO(UQ_COMMITTING),
		[UQ_EV_ABORTED] = TO(UQ_GONE) },
	[UQ_WAIT_LINK] = {
		[UQ_EV_HAND_OVER] = TO(UQ_SERVING),
		[UQ_EV_NEEDS_BUFFER] = TO(UQ_WAIT_BUFFER),
		[UQ_EV_RESCUE] = TO(UQ_WAIT_BUFFER),
		[UQ_EV_FINISH] = TO(UQ_COMMITTING) },
	[UQ_SERVING] = {
		[UQ_EV_LINK_LOST] = TO(UQ_WAIT_LINK),
		[UQ_EV_RESCUE] = TO(UQ_WAIT_BUFFER),
		[UQ_EV_FINISH] = TO(UQ_COMMITTING) },
	[UQ_FAILING] = {
		[UQ_EV_REQUEUED] = TO(UQ_KERNEL),
		[UQ_EV_FINISH] = TO(UQ_COMMITTING),
		[UQ_EV_ABORTED] = TO(UQ_GONE) },
	[UQ_COMMITTING] = { [UQ_EV_TAKEN] = TO(UQ_KERNEL) },
	[UQ_GONE] = { 0 },
};

int uq_next_state(unsigned state, unsigned event)
{
	uint8_t next = state < UQ_STATES && event < UQ_EVENTS ? transitions[state][event] : 0;

	return next ? next - 1 : UQ_ILLEGAL;
}

void uq_fail_now(struct uq *q, unsigned fault, unsigned tag, int detail)
{
	if (!q->fault) {
		q->fault = fault;
		q->fault_tag = tag;
		q->fault_detail = detail;
	}
	q->attention |= UQ_ATT_FAULT;
}

bool uq_move(struct uq *q, struct uq_tag *t, enum uq_event event)
{
	uint8_t next = transitions[t->state][event];

	if (!next) {
		uq_fail_now(q, UQ_F_TRANSITION, uq_index(q, t), t->state << 8 | event);
		return false;
	}
	t->state = next - 1;
	return true;
}

static void command(struct uq *q, struct uq_tag *t, uint8_t op, int result, const uint8_t *address)
{
	unsigned at = (q->commands_first + q->commands_count) & q->commands_mask;

	if (q->commands_count > q->commands_mask) {
		uq_fail_now(q, UQ_F_OVERFLOW, uq_index(q, t), op);
		return;
	}
	q->commands_count++;
	q->commands[at] = (struct uq_command){
		.tag = (uint16_t)uq_index(q, t), .op = op, .result = result, .address = (uintptr_t)address };
}

void uq_get_data(struct uq *q, struct uq_tag *t, uint8_t *address)
{
	command(q, t, UQ_CMD_GET_DATA, 0, address);
}

/* A read must name an address even to fail; with need_get_data off the commit also lends the next request's buffer. */
static const uint8_t *commit_address(const struct uq *q, const struct uq_tag *t)
{
	if (t->op == WIRE_READ && t->own_segment)
		return uq_region_address(q, t);
	if (t->slot != UQ_BUFFER_NONE && (t->op == WIRE_READ || !q->config.need_get_data))
		return uq_slot_address(q, t->slot);
	if (t->op != WIRE_READ)
		return NULL;
	return q->config.zeros ? q->config.zeros : q->config.scratch;
}

static void count_result(struct uq *q, const struct uq_tag *t)
{
	struct uq_stats *s = q->config.stats;

	if (t->op >= UQ_OPS)
		return;
	s->requests[t->op]++;
	if (t->result < 0) {
		s->errors++;
		return;
	}
	s->bytes[t->op] += t->op == WIRE_READ || t->op == WIRE_WRITE ? (uint64_t)t->result : t->length;
	if (t->in_place) {
		s->zero_copies++;
		s->zero_copy_bytes += (uint64_t)t->result;
	} else if (t->op == WIRE_READ) {
		s->kernel_read_bytes += (uint64_t)t->result;
	}
}

void uq_finish(struct uq *q, struct uq_tag *t, int result)
{
	if (!uq_move(q, t, UQ_EV_FINISH))
		return;
	t->result = result;
	count_result(q, t);
	command(q, t, UQ_CMD_COMMIT, result, commit_address(q, t));
}

/* A write that still waits for its data can only be committed after the kernel has copied it somewhere. */
static void fail_uncopied(struct uq *q, struct uq_tag *t, int error)
{
	if (!uq_move(q, t, UQ_EV_FAIL_UNCOPIED))
		return;
	t->result = error;
	uq_get_data(q, t, q->config.scratch);
}

static bool waits_for_data(const struct uq *q, const struct uq_tag *t)
{
	return t->op == WIRE_WRITE && q->config.need_get_data && !t->copied;
}

void uq_fail(struct uq *q, struct uq_tag *t, int error)
{
	if (t->state == UQ_WAIT_BUFFER)
		uq_stop_waiting(q, t);
	if (waits_for_data(q, t))
		fail_uncopied(q, t, error);
	else
		uq_finish(q, t, error);
}

/* Data (if any) and buffer are there: on to the backend, or wait for one. */
void uq_ready(struct uq *q, struct uq_tag *t)
{
	if (t->doomed || (q->giving_up && q->link != UQ_LINK_UP))
		uq_fail(q, t, -EIO);
	else if (q->link == UQ_LINK_UP)
		uq_hand_over(q, t);
}

/* Where a request's data lies that is in the client area: the slice above, the byte in it below 32 bits. */
static bool find_client_buffer(const struct uq *q, struct uq_tag *t, uint64_t address)
{
	uint64_t bytes = q->config.slice_bytes, slice = address >> 32;

	t->slice = (uint32_t)slice;
	t->client_buffer = address & 0xffffffffu;
	return slice < UQ_SLICES_MAX && q->config.slices >> slice & 1 && t->length <= bytes &&
	       t->client_buffer <= bytes - t->length && t->client_buffer % q->config.block_bytes == 0;
}

static bool read_descriptor(struct uq *q, struct uq_tag *t)
{
	const struct uq_iod *d = &q->config.descriptors[uq_index(q, t)];
	uint32_t op_flags = d->op_flags;

	t->op = op_flags & IOD_OP_MASK;
	t->flags = (op_flags & IOD_FUA ? WIRE_FUA : 0) | (op_flags & IOD_NOUNMAP ? WIRE_NOUNMAP : 0);
	t->offset = d->start_sector << 9;
	t->length = (uint64_t)d->sectors << 9;
	/* Now: NEED_GET_DATA puts our own address in its place (ublk_get_data). */
	t->in_place = op_flags & IOD_SHMEM_ZC;
	if (t->in_place && !find_client_buffer(q, t, d->address))
		return false;
	if (t->op == WIRE_READ || t->op == WIRE_WRITE)
		return t->length && t->length <= q->config.max_io_bytes;
	return t->op == WIRE_FLUSH || t->op == WIRE_DISCARD || t->op == WIRE_WRITE_ZEROES;
}

static void begin(struct uq *q, struct uq_tag *t)
{
	struct uq_stats *s = q->config.stats;

	t->sequence = ++q->sequence;
	t->arrived_ms = q->now_ms;
	t->copied = t->given = t->doomed = t->overdue = false;
	if (++s->in_flight > s->in_flight_max)
		s->in_flight_max = s->in_flight;
}

static void route_write(struct uq *q, struct uq_tag *t)
{
	if (q->giving_up && q->link != UQ_LINK_UP) {
		fail_uncopied(q, t, -EIO);
	} else if (t->in_place) {
		/* The driver wants the command and looks at no address (ublk_start_io): nothing is copied. */
		if (uq_move(q, t, UQ_EV_IN_PLACE))
			uq_get_data(q, t, q->config.scratch);
	} else if (q->config.place_in_backend) {
		if (uq_move(q, t, UQ_EV_NEEDS_PLACE) && q->link == UQ_LINK_UP)
			uq_ask_place(q, t);
	} else {
		uq_need_buffer(q, t);
	}
}

/* With no backend: a write is copied as any other and forgotten, a read is of zeros, the rest is done. */
static void answer_ourselves(struct uq *q, struct uq_tag *t)
{
	if (t->op == WIRE_READ)
		uq_finish(q, t, (int)t->length);
	else if (t->op != WIRE_WRITE)
		uq_finish(q, t, 0);
	else if (uq_move(q, t, UQ_EV_THROW_AWAY))
		uq_get_data(q, t, q->config.scratch);
}

static void route(struct uq *q, struct uq_tag *t, int res)
{
	bool lends = t->op == WIRE_READ && !t->in_place && q->config.need_get_data && q->link == UQ_LINK_UP && !q->reads_own;

	if (res == RES_NEED_GET_DATA) {
		route_write(q, t);
		return;
	}
	if (t->op == WIRE_WRITE) {
		t->copied = true;
		q->config.stats->kernel_write_bytes += t->in_place ? 0 : t->length;
	}
	if (lends)
		uq_need_buffer(q, t);
	else if (uq_move(q, t, UQ_EV_READY))
		uq_ready(q, t);
}

static void arrive(struct uq *q, struct uq_tag *t, int res)
{
	bool usable = read_descriptor(q, t);
	bool asks = res == RES_NEED_GET_DATA;

	begin(q, t);
	/* The driver asks for a buffer exactly for the writes of a device that wants it; else address 0 was copied to. */
	if (asks != (t->op == WIRE_WRITE && q->config.need_get_data)) {
		uq_fail_now(q, UQ_F_COMPLETION, uq_index(q, t), res);
	} else if (!usable) {
		q->config.stats->unsupported++;
		uq_fail(q, t, t->op == WIRE_READ || t->op == WIRE_WRITE ? -EINVAL : -EOPNOTSUPP);
	} else if (q->config.zeros) {
		answer_ourselves(q, t);
	} else {
		route(q, t, res);
	}
}

static void copied(struct uq *q, struct uq_tag *t)
{
	uint64_t length = (uint64_t)q->config.descriptors[uq_index(q, t)].sectors << 9;

	/* Committing what was copied would be enough for 6.12, which sends the rest; 7.3 takes it for the whole. */
	if (length < t->length) {
		q->config.stats->short_copies++;
		t->doomed = true;
	}
	q->config.stats->kernel_write_bytes += t->in_place ? 0 : length;
	t->copied = true;
	if (t->doomed) {
		uq_finish(q, t, -EIO);
	} else if (q->config.zeros) {
		uq_finish(q, t, (int)t->length);
	} else if (t->own_segment && uq_region_orphaned(q, t)) {
		if (uq_move(q, t, UQ_EV_RESCUE))
			uq_need_buffer(q, t);
	} else if (uq_move(q, t, UQ_EV_COPIED)) {
		uq_ready(q, t);
	}
}

/* Drops whatever buffer the tag holds, when nobody reads or writes it any more. */
static void let_go(struct uq *q, struct uq_tag *t)
{
	if (t->own_segment)
		uq_region_back(q, t, true);
	if (q->config.need_get_data && t->slot != UQ_BUFFER_NONE)
		uq_slot_back(q, t);
	q->config.stats->in_flight--;
}

static void aborted(struct uq *q, struct uq_tag *t, int res)
{
	bool busy = t->state != UQ_KERNEL;

	if (!uq_move(q, t, UQ_EV_ABORTED))
		return;
	if (busy)
		let_go(q, t);
	if (res != -ENODEV && res != -ECANCELED)
		uq_fail_now(q, UQ_F_COMPLETION, uq_index(q, t), res);
	q->config.stats->tags_gone++;
	if (++q->gone == q->config.depth)
		q->attention |= UQ_ATT_GONE;
}

/* The driver could copy nothing and sends the write again, as a new request and perhaps on another tag: with an I/O
 * scheduler a requeued request gives its tag up. */
static void requeued(struct uq *q, struct uq_tag *t, int res)
{
	q->config.stats->requeues++;
	if (!uq_move(q, t, UQ_EV_REQUEUED))
		return;
	let_go(q, t);
	arrive(q, t, res);
}

/* Only a write is ever copied for: result 0 with another operation is the tag's next request. */
static bool was_copied(const struct uq *q, const struct uq_tag *t, int res)
{
	return res != RES_NEED_GET_DATA && (q->config.descriptors[uq_index(q, t)].op_flags & IOD_OP_MASK) == WIRE_WRITE;
}

void uq_complete(struct uq *q, unsigned tag, int res)
{
	struct uq_tag *t = &q->tags[tag];

	if (tag >= q->config.depth)
		uq_fail_now(q, UQ_F_COMPLETION, tag, res);
	else if (res < 0)
		aborted(q, t, res);
	else if (t->state == UQ_KERNEL)
		arrive(q, t, res);
	else if (t->state != UQ_COPYING && t->state != UQ_FAILING)
		uq_fail_now(q, UQ_F_COMPLETION, tag, t->state << 8 | res);
	else if (!was_copied(q, t, res))
		requeued(q, t, res);
	else if (t->state == UQ_COPYING)
		copied(q, t);
	else
		uq_finish(q, t, t->result);
}

unsigned uq_commands(struct uq *q, struct uq_command *out, unsigned max)
{
	unsigned count = q->commands_count < max ? q->commands_count : max;

	for (unsigned i = 0; i < count; i++)
		out[i] = q->commands[(q->commands_first + i) & q->commands_mask];
	return count;
}

int uq_commit_is_awaited(const struct uq *q)
{
	unsigned commits = 0, regions = 0;

	for (unsigned i = 0; i < q->commands_count; i++) {
		const struct uq_command *c = &q->commands[(q->commands_first + i) & q->commands_mask];

		commits += c->op == UQ_CMD_COMMIT;
		regions += c->op == UQ_CMD_COMMIT && q->tags[c->tag].own_segment;
	}
	/* Requests that are with the backend may wait for a region of its. */
	return commits && (uq_stock_short(q) || (regions && q->config.stats->in_flight > commits));
}

static void commit_taken(struct uq *q, struct uq_tag *t)
{
	q->config.stats->commits++;
	if (uq_move(q, t, UQ_EV_TAKEN))
		let_go(q, t);
}

void uq_commands_taken(struct uq *q, unsigned count)
{
	while (count-- && q->commands_count) {
		struct uq_command c = q->commands[q->commands_first];

		q->commands_first = (q->commands_first + 1) & q->commands_mask;
		q->commands_count--;
		if (c.op == UQ_CMD_COMMIT)
			commit_taken(q, &q->tags[c.tag]);
	}
}

int uq_start(struct uq *q)
{
	unsigned class = uq_class_for(q, q->config.max_io_bytes);
	struct uq_stock *s = &q->stock[class];

	if (!q->config.need_get_data && s->count < q->config.depth)
		return -1;
	for (unsigned i = 0; i < q->config.depth; i++) {
		struct uq_tag *t = &q->tags[i];
		uint8_t *address = NULL;

		if (!q->config.need_get_data) {
			t->class = (uint8_t)class;
			t->slot = uq_stock_pop(q, s);
			q->config.slots[t->slot].tag = i + 1;
			address = uq_slot_address(q, t->slot);
			q->config.stats->buffers_lent++;
			q->config.stats->lent_total++;
		}
		command(q, t, UQ_CMD_FETCH, 0, address);
	}
	return 0;
}

unsigned uq_attention(struct uq *q)
{
	return q->attention | (q->output_count && !q->output_held ? UQ_ATT_OUTPUT : 0) |
	       (uq_stock_wanting(q) ? UQ_ATT_STOCK : 0);
}

void uq_attention_clear(struct uq *q, unsigned bits) { q->attention &= ~bits; }

int uq_fault(const struct uq *q, unsigned *tag, int *detail)
{
	*tag = q->fault_tag;
	*detail = q->fault_detail;
	return q->fault;
}

unsigned uq_in_flight(const struct uq *q) { return (unsigned)q->config.stats->in_flight; }

int uq_tag_state(const struct uq *q, unsigned tag) { return tag < q->config.depth ? q->tags[tag].state : -1; }

unsigned uq_queue_number(const struct uq *q) { return q->config.queue; }

struct uq_stats *uq_stats_of(struct uq *q) { return q->config.stats; }

static bool usable(const struct uq_config *c)
{
	return c->depth && c->depth <= 4096 && c->classes && c->classes <= UQ_CLASSES_MAX && c->block_bytes >= 512 &&
	       c->descriptors && c->pool && c->slots && c->scratch && c->stats &&
	       c->class[c->classes - 1].buffer_bytes >= c->max_io_bytes &&
	       (c->need_get_data || (!c->place_in_backend && !c->zeros));
}

static bool allocate(struct uq *q)
{
	unsigned depth = q->config.depth, room = 1, sizes = q->config.place_in_backend ? q->config.classes : 0;

	while (room < depth)
		room *= 2;
	q->commands_mask = room - 1;
	/* A write that the driver sends again releases a posted region each time. */
	q->output_max = (4 + sizes) * depth + 16;
	q->tags = calloc(depth, sizeof *q->tags);
	q->commands = calloc(room, sizeof *q->commands);
	q->output = calloc(q->output_max, sizeof *q->output);
	q->replay = calloc(depth, sizeof *q->replay);
	for (unsigned c = 0; c < q->config.classes; c++) {
		q->stock[c].slots = calloc(q->config.class[c].count, sizeof(uint32_t));
		q->stock[c].first_waiter = q->stock[c].last_waiter = UQ_NO_TAG;
		if (!q->stock[c].slots)
			return false;
	}
	return q->tags && q->commands && q->output && q->replay && uq_posts_allocate(q);
}

/* Counters go on over a recovery; what the worker before this one held was taken from it. */
static void reset_gauges(struct uq_stats *s)
{
	s->in_flight = s->buffers_held = s->buffers_lent = s->buffers_waiting = s->tags_gone = 0;
	s->returned_total = s->lent_total;
}

struct uq *uq_new(const struct uq_config *config)
{
	struct uq *q = usable(config) ? calloc(1, sizeof *q) : NULL;

	if (!q)
		return NULL;
	q->config = *config;
	if (!allocate(q)) {
		uq_free(q);
		return NULL;
	}
	q->stock_changed = (1u << config->classes) - 1;
	for (unsigned i = 0; i < config->depth; i++)
		q->tags[i] = (struct uq_tag){ .slot = UQ_BUFFER_NONE, .next_waiter = UQ_NO_TAG };
	reset_gauges(config->stats);
	return q;
}

void uq_free(struct uq *q)
{
	if (!q)
		return;
	for (unsigned c = 0; c < q->config.classes; c++)
		free(q->stock[c].slots);
	uq_posts_free(q);
	free(q->tags);
	free(q->commands);
	free(q->output);
	uq_regions_end(q);
	free(q->replay);
	free(q);
}
