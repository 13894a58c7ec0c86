/*
 * Fuzzes the queue core with a backend's descriptors: in frames (-DRINGS=0), or in rings whose indices and entries the
 * backend can write as well (-DRINGS=1).
 *
 * The input is a program: requests arrive, the driver copies, the backend answers truly or not, dies and is followed by
 * another.  The driver follows the kernel's rules.  Its copies touch the memory that the core names, so a wrong address
 * is AddressSanitizer's to find; that the core keeps its invariants is checked by its checked build (-DUQ_CHECKED).  At
 * the end every request must be answered.
 */
#include <errno.h>

#include "input.h"
#include "queue_core.h"
#include "queue_port.h"
#include "shared_ring.h"

#ifndef RINGS
#define RINGS 0
#endif

enum {
	DEPTH = 4,
	CLASSES = 2,
	IO_BYTES = 4096,
	SMALL_BYTES = 1024,
	BLOCK = 512,
	SLOTS = 8,
	SEGMENT_BYTES = 2 * DEPTH * IO_BYTES
};
enum { DEVICE = 7, EPOCH = 3, STEPS_MAX = 400, TURNS_TO_END = 64, FRAME_MAX = 8 };

/* The holder of a tag, from the driver's side. */
enum holder { DRIVER, CORE, COPIES };

struct rig {
	struct input in;
	struct uq *q;
	struct uq_port *port;
	struct uq_config config;
	struct uq_block block;
	struct uq_iod descriptors[DEPTH];
	struct uq_slot slots[CLASSES * SLOTS];
	uint8_t *pool, *scratch;
	enum holder holder[DEPTH];
	uint64_t copies_to[DEPTH];
	struct wire_descriptor asked[DEPTH];
	bool is_free[CLASSES * SLOTS];
	uint8_t *segment, *ring_memory;
	struct sr_end from_worker, to_worker;
	uint32_t segment_number, numbers, entries;
	uint64_t now_ms;
	bool reads_own, head_is_poked;
};

static volatile uint8_t sink;

static uint8_t *memory(size_t bytes)
{
	uint8_t *at = malloc(bytes);

	MUST(at);
	memset(at, 0, bytes);
	return at;
}

static void check_fault(struct rig *r)
{
	unsigned tag;
	int detail;

	MUST(uq_fault(r->q, &tag, &detail) == UQ_F_NONE);
}

static void touch(uint64_t address, uint64_t bytes, bool writes)
{
	uint8_t *at = (uint8_t *)(uintptr_t)address;

	if (writes)
		memset(at, 0x5a, bytes);
	for (uint64_t i = 0; i < bytes; i += BLOCK)
		sink = at[i];
	if (bytes)
		sink = at[bytes - 1];
}

static void take_command(struct rig *r, const struct uq_command *c)
{
	const struct uq_iod *d = &r->descriptors[c->tag];

	MUST(r->holder[c->tag] == CORE);
	if (c->op == UQ_CMD_GET_DATA) {
		MUST(d->op_flags == WIRE_WRITE);
		r->holder[c->tag] = COPIES;
		r->copies_to[c->tag] = c->address;
		return;
	}
	r->holder[c->tag] = DRIVER;
	if (c->op == UQ_CMD_FETCH)
		return;
	MUST(c->result <= 0 || (uint64_t)c->result <= (uint64_t)d->sectors * BLOCK);
	if (d->op_flags == WIRE_READ && c->result > 0)
		touch(c->address, (uint64_t)c->result, false);
}

/* io_uring_enter consumes the commands. */
static void submit(struct rig *r)
{
	struct uq_command commands[DEPTH];
	unsigned count = uq_commands(r->q, commands, DEPTH);

	for (unsigned i = 0; i < count; i++)
		take_command(r, &commands[i]);
	uq_commands_taken(r->q, count);
}

static void new_request(struct rig *r, unsigned tag)
{
	static const uint8_t ops[] = { WIRE_WRITE, WIRE_READ, WIRE_WRITE, WIRE_FLUSH, WIRE_DISCARD, WIRE_WRITE_ZEROES };
	uint8_t op = ops[input_below(&r->in, sizeof ops)];

	r->descriptors[tag] = (struct uq_iod){ .op_flags = op,
					       .sectors = 1 + input_below(&r->in, IO_BYTES / BLOCK),
					       .start_sector = input_byte(&r->in) };
	r->holder[tag] = CORE;
	uq_complete(r->q, tag, op == WIRE_WRITE && r->config.need_get_data);
}

/* The kernel copies all of a write, less than all, or nothing and sends the write again. */
static void copy(struct rig *r, unsigned tag)
{
	struct uq_iod *d = &r->descriptors[tag];
	unsigned way = input_below(&r->in, 8);

	r->holder[tag] = CORE;
	if (way == 7) {
		d->sectors = 1 + input_below(&r->in, IO_BYTES / BLOCK);
		uq_complete(r->q, tag, 1);
		return;
	}
	if (way == 6 && d->sectors > 1)
		d->sectors--;
	touch(r->copies_to[tag], (uint64_t)d->sectors * BLOCK, true);
	uq_complete(r->q, tag, 0);
}

static void drive(struct rig *r)
{
	unsigned tag = input_below(&r->in, DEPTH);

	if (r->holder[tag] == DRIVER)
		new_request(r, tag);
	else if (r->holder[tag] == COPIES)
		copy(r, tag);
}

/* The broker gives and takes the buffers that the core asks for. */
static void stock(struct rig *r)
{
	unsigned class = input_below(&r->in, CLASSES), first = r->config.class[class].first_slot;
	int want = uq_stock_want(r->q, class);
	uint32_t taken[SLOTS];

	if (input_below(&r->in, 8) == 0)
		uq_stock_recall(r->q, class, input_below(&r->in, SLOTS));
	if (want < 0) {
		unsigned count = uq_stock_take(r->q, class, taken, (unsigned)-want);

		for (unsigned i = 0; i < count; i++)
			r->is_free[taken[i]] = true;
	}
	for (uint32_t slot = first; want > 0 && slot < first + SLOTS; slot++) {
		if (!r->is_free[slot])
			continue;
		r->is_free[slot] = false;
		MUST(uq_stock_add(r->q, class, &slot, 1) == 0);
		want--;
	}
}

/* A tail further from the worker's own index than the ring's length must cut the link. */
static void turn(struct rig *r)
{
	const struct sr_shared *s = (const struct sr_shared *)(r->ring_memory + SR_CONTROL_BYTES / 2);
	bool impossible = !r->head_is_poked && uq_link_state(r->q) != UQ_LINK_CUT &&
			  atomic_load(&s->tail) - atomic_load(&s->head) > r->entries;
	struct wire_descriptor culprit;

	uq_port_turn(r->port, r->q);
	MUST(!impossible || uq_violation(r->q, &culprit) == UQ_V_RING);
}

static void hear_one(struct rig *r, const struct wire_descriptor *d)
{
	if (d->kind == WIRE_REQUEST || d->kind == WIRE_PLACE || d->kind == WIRE_DATA)
		r->asked[d->tag] = *d;
}

static void hear_ring(struct rig *r)
{
	int64_t waiting = sr_waiting(&r->from_worker);

	while (waiting > 0) {
		const uint8_t *at;
		uint32_t count = sr_peek(&r->from_worker, (uint32_t)waiting, &at);

		for (uint32_t i = 0; i < count; i++) {
			struct wire_descriptor d;

			memcpy(&d, at + (size_t)i * sizeof d, sizeof d);
			if (d.tag < DEPTH)
				hear_one(r, &d);
		}
		sr_consumed(&r->from_worker, count);
		waiting -= count;
	}
}

/* The backend reads the core's descriptors. */
static void hear(struct rig *r)
{
	const struct wire_descriptor *first;
	unsigned count;

	if (RINGS) {
		turn(r);
		hear_ring(r);
		return;
	}
	count = uq_output(r->q, &first);
	for (unsigned i = 0; i < count; i++)
		hear_one(r, &first[i]);
	uq_output_sent(r->q, count);
}

static struct wire_descriptor link_word(uint8_t kind)
{
	return (struct wire_descriptor){ .kind = kind, .device = DEVICE, .epoch = EPOCH };
}

/* An honest backend's answer to the core's last descriptor about a tag. */
static struct wire_descriptor true_answer(struct rig *r)
{
	struct wire_descriptor a = r->asked[input_below(&r->in, DEPTH)];
	bool names = a.kind == WIRE_PLACE || (a.op == WIRE_READ && a.segment == WIRE_SEGMENT_NONE);

	a.flags = names && a.kind != WIRE_PLACE ? WIRE_REGION : 0;
	if (a.kind != WIRE_PLACE)
		a.result = a.op == WIRE_READ || a.op == WIRE_WRITE ? (int32_t)a.length : 0;
	a.kind = a.kind == WIRE_PLACE ? WIRE_PLACED : WIRE_DONE;
	a.segment = names ? r->segment_number : WIRE_SEGMENT_NONE;
	a.buffer = names ? (uint64_t)a.tag * IO_BYTES : 0;
	return a;
}

static struct wire_descriptor word(struct rig *r)
{
	static const uint8_t kinds[] = { WIRE_HELLO, WIRE_FENCED, WIRE_REJECT, WIRE_DONE, WIRE_PLACED };
	struct wire_descriptor d;

	switch (input_below(&r->in, 6)) {
	case 0:
	case 1:
		return true_answer(r);
	case 2:
		d = true_answer(r);
		break;
	case 3:
		d = link_word(WIRE_POST);
		d.length = r->config.class[input_below(&r->in, CLASSES)].buffer_bytes;
		d.segment = r->segment_number;
		d.buffer = (uint64_t)(DEPTH + input_below(&r->in, DEPTH)) * IO_BYTES;
		break;
	case 4:
		d = link_word(kinds[input_below(&r->in, sizeof kinds)]);
		break;
	default:
		for (size_t i = 0; i < sizeof d; i += 8)
			((uint64_t *)&d)[i / 8] = input_number(&r->in, 8);
		return d;
	}
	input_spoil(&r->in, &d);
	return d;
}

static void say_in_ring(struct rig *r, const struct wire_descriptor *words, unsigned count)
{
	int64_t room = sr_room(&r->to_worker, count);

	if (room > 0) {
		sr_write(&r->to_worker, words, (uint32_t)room);
		sr_publish(&r->to_worker, 0);
	}
	turn(r);
}

static void say(struct rig *r)
{
	struct wire_descriptor words[FRAME_MAX];
	unsigned count = 1 + input_below(&r->in, FRAME_MAX);
	size_t torn = input_below(&r->in, 16) == 0;

	for (unsigned i = 0; i < count; i++)
		words[i] = word(r);
	if (RINGS)
		say_in_ring(r, words, count);
	else
		uq_input(r->q, words, count * sizeof *words - torn);
}

/* The backend can write anywhere in the rings' memory. */
static void poke(struct rig *r)
{
	bool to_worker = input_bit(&r->in);
	struct sr_shared *s = (struct sr_shared *)(r->ring_memory + (to_worker ? SR_CONTROL_BYTES / 2 : 0));
	_Atomic uint32_t *words[] = { &s->tail, &s->head, &s->sleeping };
	_Atomic uint32_t *at = words[input_below(&r->in, 3)];
	uint8_t *entries = r->ring_memory + SR_CONTROL_BYTES;
	uint64_t bytes = uq_port_bytes(r->entries) - SR_CONTROL_BYTES;

	if (input_below(&r->in, 4) == 0) {
		entries[input_number(&r->in, 4) % bytes] = input_byte(&r->in);
	} else {
		atomic_store(at, (uint32_t)input_value(&r->in, atomic_load(at), 4));
		r->head_is_poked |= to_worker && at == &s->head;
	}
	uq_port_doze(r->port, r->q);
	uq_port_wake(r->port);
	turn(r);
}

static void open_port(struct rig *r)
{
	uint64_t bytes = uq_port_bytes(r->entries);

	r->ring_memory = aligned_alloc(SR_CONTROL_BYTES, bytes);
	MUST(r->ring_memory);
	memset(r->ring_memory, 0, bytes);
	r->head_is_poked = false;
	r->port = uq_port_new(r->ring_memory, r->entries);
	MUST(r->port);
	r->from_worker = sr_end_to_backend(r->ring_memory, r->entries, 0);
	r->to_worker = sr_end_to_worker(r->ring_memory, r->entries, 1);
}

static void close_port(struct rig *r)
{
	uq_port_free(r->port);
	free(r->ring_memory);
	r->port = NULL;
	r->ring_memory = NULL;
}

static void free_idle_segments(struct rig *r)
{
	uint8_t *base;
	uint64_t bytes;

	while (uq_segment_idle(r->q, &base, &bytes)) {
		MUST(bytes == SEGMENT_BYTES);
		free(base);
	}
}

static void attach(struct rig *r)
{
	struct wire_descriptor hello = link_word(WIRE_HELLO);
	bool names = r->config.place_in_backend || r->reads_own, fence = input_bit(&r->in);
	uint8_t *segment = names ? memory(SEGMENT_BYTES) : NULL;
	uint32_t number = names ? ++r->numbers + 1 : 0;

	free_idle_segments(r);
	if (uq_link_expect(r->q, number, segment, names ? SEGMENT_BYTES : 0, r->reads_own, fence)) {
		free(segment);
		return;
	}
	r->segment_number = number;
	if (RINGS) {
		open_port(r);
		say_in_ring(r, &hello, 1);
	} else {
		uq_input(r->q, &hello, sizeof hello);
	}
	hear(r);
}

static void lose(struct rig *r)
{
	if (RINGS && r->port)
		close_port(r);
	uq_link_lost(r->q);
	free_idle_segments(r);
}

static void backend(struct rig *r)
{
	int state = uq_link_state(r->q);

	if (state == UQ_LINK_CUT || (state != UQ_LINK_NONE && input_below(&r->in, 32) == 0))
		lose(r);
	else if (state == UQ_LINK_NONE)
		attach(r);
	else if (RINGS && input_below(&r->in, 4) == 0)
		poke(r);
	else
		say(r);
}

static void step(struct rig *r)
{
	switch (input_below(&r->in, 8)) {
	case 0:
	case 1:
		drive(r);
		break;
	case 2:
		submit(r);
		break;
	case 3:
		stock(r);
		break;
	case 4:
		r->now_ms += (uint64_t)input_byte(&r->in) * 8;
		uq_tick(r->q, r->now_ms);
		uq_set_real_time(r->q, r->now_ms * 1000000u);
		break;
	case 5:
		if (r->port || !RINGS)
			hear(r);
		break;
	default:
		backend(r);
	}
	uq_attention_clear(r->q, ~0u & ~(unsigned)UQ_ATT_FAULT);
	check_fault(r);
}

static void configure(struct rig *r)
{
	uint8_t shape = input_byte(&r->in);
	struct uq_config *c = &r->config;

	*c = (struct uq_config){ .device = DEVICE,
				 .epoch = EPOCH,
				 .max_io_bytes = IO_BYTES,
				 .block_bytes = BLOCK,
				 .depth = DEPTH,
				 .need_get_data = shape & 1,
				 .place_in_backend = shape & 1 && shape & 2,
				 .fail_on_timeout = shape >> 2 & 1,
				 .timeout_ms = shape & 8 ? 500 : 0,
				 .hello_timeout_ms = 1000,
				 .absent_ms = shape & 16 ? 1000 : 0,
				 .classes = CLASSES,
				 .class = { { 0, SMALL_BYTES, SLOTS, 0, 1, 1, SLOTS },
					    { (uint64_t)SLOTS * SMALL_BYTES, IO_BYTES, SLOTS, SLOTS, 1, 1, SLOTS } },
				 .descriptors = r->descriptors,
				 .pool = r->pool,
				 .slots = r->slots,
				 .scratch = r->scratch,
				 .stats = &r->block.stats,
				 .latencies = &r->block.latencies };
	r->reads_own = shape & 1 && shape & 32;
}

static void begin(struct rig *r)
{
	r->pool = memory((size_t)SLOTS * (SMALL_BYTES + IO_BYTES));
	r->scratch = memory(IO_BYTES);
	r->now_ms = 1;
	r->entries = uq_port_entries(DEPTH);
	configure(r);
	r->q = uq_new(&r->config);
	MUST(r->q);
	for (uint32_t slot = 0; slot < CLASSES * SLOTS; slot++) {
		r->is_free[slot] = slot % SLOTS >= DEPTH;
		if (!r->is_free[slot])
			MUST(uq_stock_add(r->q, slot / SLOTS, &slot, 1) == 0);
	}
	for (unsigned tag = 0; tag < DEPTH; tag++)
		r->holder[tag] = CORE;
	MUST(uq_start(r->q) == 0);
	submit(r);
	attach(r);
}

/* Without a backend and with nothing left to wait for, every request must be answered. */
static void end(struct rig *r)
{
	r->in.left = 0;
	lose(r);
	uq_give_up(r->q);
	for (unsigned turn = 0; turn < TURNS_TO_END; turn++) {
		submit(r);
		for (unsigned tag = 0; tag < DEPTH; tag++)
			if (r->holder[tag] == COPIES)
				copy(r, tag);
		check_fault(r);
	}
	MUST(uq_in_flight(r->q) == 0);
	free_idle_segments(r);
	uq_free(r->q);
	free(r->pool);
	free(r->scratch);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct rig r = { .in = { data, size } };

	begin(&r);
	for (unsigned steps = 0; r.in.left && steps < STEPS_MAX; steps++)
		step(&r);
	end(&r);
	return 0;
}
