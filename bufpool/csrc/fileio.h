/* The native file-I/O engine: frames of wire descriptors in, io_uring in between, frames of answers out.
 *
 * Owns one io_uring, the state of every (queue, tag) and the slots of the backend's own segment.  Knows nothing of
 * sockets and Python.  One thread uses an engine, the one that opened it; every function may be called without the GIL.
 * Memory that it is given (pool, own segment) must outlive it.
 */
#ifndef UBLKPOOL_FILEIO_H
#define UBLKPOOL_FILEIO_H

#include <stddef.h>
#include <stdint.h>

/* bufpool/wire.py is the original; tests/unit/test_fileio_native.py holds these to it. */
enum {
    FILEIO_REQUEST = 1, FILEIO_PLACE = 2, FILEIO_DATA = 3, FILEIO_RELEASE = 4, FILEIO_WELCOME = 5, FILEIO_FENCE = 6,
    FILEIO_PLACED = 16, FILEIO_REJECT = 17, FILEIO_DONE = 18, FILEIO_FENCED = 20,
};
enum { FILEIO_READ = 0, FILEIO_WRITE = 1, FILEIO_FLUSH = 2, FILEIO_DISCARD = 3, FILEIO_WRITE_ZEROES = 5 };
enum { FILEIO_FUA = 1, FILEIO_NOUNMAP = 2, FILEIO_REPLAY = 8 };
enum { FILEIO_SEGMENT_POOL = 1 };

struct fileio_descriptor {
    uint8_t kind, op;
    uint16_t flags;
    uint32_t device;
    uint16_t queue, tag;
    uint32_t epoch;
    uint64_t sequence, offset, length;
    int32_t result;
    uint32_t segment;
    uint64_t buffer, reserved;
};

/* Bits of fileio_setup.mode. */
enum {
    FILEIO_MODE_NOTHING = 1,      /* answer at once, store nothing; no file */
    FILEIO_MODE_BLOCK_DEVICE = 2, /* the file is a block device */
    FILEIO_MODE_READ_ONLY = 4,
};

struct fileio_setup {
    int file;
    uint32_t mode, device, epoch, queues, depth;
    uint64_t size_bytes;
    uint8_t *pool;
    uint64_t pool_bytes;
    uint8_t *own;
    uint64_t own_bytes;
    uint32_t own_segment;
    uint64_t slot_bytes;
};

struct fileio_statistics {
    uint64_t requests, answered, failed, replayed, dropped, fenced, continued, fallbacks;
    uint64_t bytes_read, bytes_written;
    uint64_t running, waiting, slots_lent;
};

struct fileio_engine;

/* NULL and *error (a negative errno) if there is no io_uring or no memory. */
struct fileio_engine *fileio_open(const struct fileio_setup *setup, int *error);
/* No request may be running, or its buffer must stay mapped until the process ends. */
void fileio_close(struct fileio_engine *engine);
/* An eventfd, readable when a completion waits. */
int fileio_file(const struct fileio_engine *engine);
/* Start what a frame asks for (submitted by the next fileio_turn).  0, or -EPROTO for a frame that makes no sense. */
int fileio_take(struct fileio_engine *engine, const void *frame, size_t frame_bytes);
/* Submit, reap, continue what moved only in part.  0 or a negative errno that ends the engine's use. */
int fileio_turn(struct fileio_engine *engine);
/* A queue's answers so far, valid until the next call on this engine; the count is reset. */
uint32_t fileio_answers(struct fileio_engine *engine, uint32_t queue, const struct fileio_descriptor **answers);
void fileio_count(const struct fileio_engine *engine, struct fileio_statistics *statistics);

/* What O_DIRECT on this file demands of offsets and memory; 0 if the file system does not say.  0 or -errno. */
int fileio_direct_alignment(int file, uint32_t *memory_bytes, uint32_t *offset_bytes);
/* Size, sector sizes and discard ability of a block device.  0 or -errno. */
int fileio_block_device(int file, uint64_t *size_bytes, uint32_t *logical_bytes, uint32_t *physical_bytes);

#endif
