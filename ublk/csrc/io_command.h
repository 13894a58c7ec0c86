/* A command for one tag, in the driver's layout of a ring's entry. */
#ifndef UQ_IO_COMMAND_H
#define UQ_IO_COMMAND_H

#include <liburing.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "queue_core.h"

/* include/uapi/linux/ublk_cmd.h: _IOWR('u', nr, struct ublksrv_io_cmd), pinned by tests/unit/test_abi.py. */
#define UQ_IO_FETCH 0xc0107520u
#define UQ_IO_COMMIT_AND_FETCH 0xc0107521u
#define UQ_IO_NEED_GET_DATA 0xc0107522u

static inline uint32_t uq_io_opcode(uint8_t op)
{
	return op == UQ_CMD_FETCH ? UQ_IO_FETCH : op == UQ_CMD_GET_DATA ? UQ_IO_NEED_GET_DATA : UQ_IO_COMMIT_AND_FETCH;
}

struct uq_io_command { /* struct ublksrv_io_cmd */
	uint16_t queue, tag;
	int32_t result;
	uint64_t address;
};
_Static_assert(sizeof(struct uq_io_command) == 16, "ublksrv_io_cmd");

/* What `addr` of an entry says to a device with UBLK_F_AUTO_BUF_REG, struct ublk_auto_buf_reg: a 16-bit place in the
 * ring's buffer table, flags, zeros.  Without UBLK_AUTO_BUF_REG_FALLBACK the driver itself fails a request whose pages
 * it cannot register, for want of memory. */
static inline uint64_t uq_auto_buffer(uint16_t place) { return place; }

/* A 64-byte entry is enough: the command lies in its last 16 bytes. */
static inline void uq_prepare_io_command(struct io_uring_sqe *s, int char_fd, uint32_t op, struct uq_io_command c)
{
	memset(s, 0, 64);
	s->opcode = IORING_OP_URING_CMD;
	s->fd = char_fd;
	memcpy((char *)s + offsetof(struct io_uring_sqe, off), &op, sizeof op);
	memcpy((char *)s + 48, &c, sizeof c);
	s->user_data = c.tag;
}

#endif
