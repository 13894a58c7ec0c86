#include "queue_descriptor.h"

/* Bits of ublksrv_io_desc.op_flags (include/uapi/linux/ublk_cmd.h): the operation, then positions in the same word. */
#define IOD_OP_MASK 0xffu
#define IOD_FUA (1u << 13)
#define IOD_NOUNMAP (1u << 15)
#define IOD_SHMEM_ZC (1u << 19)

/* The high half of the address names the slice of the client area that holds the data, the low half the byte in it. */
static bool find_client_buffer(const struct uq *q, struct uq_tag *t, uint64_t address)
{
	uint64_t bytes = q->config.slice_bytes, slice = address >> 32;

	t->slice = (uint32_t)slice;
	t->client_buffer = address & 0xffffffffu;
	return slice < WIRE_CLIENT_SLICES_MAX && q->config.slices >> slice & 1 && t->length <= bytes &&
	       t->client_buffer <= bytes - t->length && t->client_buffer % q->config.block_bytes == 0;
}

static const struct uq_iod *descriptor_of(const struct uq *q, const struct uq_tag *t)
{
	return &q->config.descriptors[uq_index(q, t)];
}

bool uq_descriptor_read(struct uq *q, struct uq_tag *t)
{
	const struct uq_iod *d = descriptor_of(q, t);
	uint32_t op_flags = d->op_flags;

	t->op = op_flags & IOD_OP_MASK;
	t->flags = (op_flags & IOD_FUA ? WIRE_FUA : 0) | (op_flags & IOD_NOUNMAP ? WIRE_NOUNMAP : 0);
	t->offset = d->start_sector << 9;
	t->length = uq_descriptor_length(q, t);
	/* NEED_GET_DATA replaces this address by the worker's own (ublk_get_data). */
	t->in_place = op_flags & IOD_SHMEM_ZC;
	if (t->in_place && !find_client_buffer(q, t, d->address))
		return false;
	if (t->op == WIRE_READ || t->op == WIRE_WRITE) {
		t->in_place |= q->config.zero_copy;
		return t->length && t->length <= q->config.max_io_bytes;
	}
	return t->op == WIRE_FLUSH || t->op == WIRE_DISCARD || t->op == WIRE_WRITE_ZEROES;
}

bool uq_descriptor_is_write(const struct uq *q, const struct uq_tag *t)
{
	return (descriptor_of(q, t)->op_flags & IOD_OP_MASK) == WIRE_WRITE;
}

uint64_t uq_descriptor_length(const struct uq *q, const struct uq_tag *t)
{
	return (uint64_t)descriptor_of(q, t)->sectors << 9;
}
