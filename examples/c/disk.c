#include "disk.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { LOCK_PATIENCE_S = 20, ZEROS_BYTES = 1 << 20 };

struct header {
	char magic[16];
	char identity[DISK_IDENTITY_BYTES];
};
static const char magic[16] = "ublkpool example";

static void write_header(int file, const char *path)
{
	static uint8_t block[DISK_HEADER_BYTES];
	struct header header;
	uint8_t random[16];

	if (getrandom(random, sizeof random, 0) != sizeof random)
		fail("getrandom: %s", strerror(errno));
	memcpy(header.magic, magic, sizeof magic);
	for (unsigned i = 0; i < sizeof random; i++)
		snprintf(header.identity + 2 * (size_t)i, 3, "%02x", random[i]);
	memcpy(block, &header, sizeof header);
	if (pwrite(file, block, sizeof block, 0) != sizeof block)
		fail("%s: writing its header: %s", path, strerror(errno));
}

/* The file appears under its name when it is whole, and never in place of another. */
static void create(const char *path, uint64_t bytes)
{
	char name[PATH_BYTES], folder[PATH_BYTES];
	int length = snprintf(name, sizeof name, "%s.XXXXXX", path), file;
	char *slash;

	if (length < 0 || (size_t)length >= sizeof name)
		fail("%s: too long", path);
	memcpy(folder, name, sizeof folder);
	slash = strrchr(folder, '/');
	file = mkostemp(name, O_CLOEXEC);
	if (file < 0)
		fail("%s: %s", path, strerror(errno));
	if (ftruncate(file, (off_t)(DISK_HEADER_BYTES + bytes)))
		fail("%s: %s", path, strerror(errno));
	write_header(file, path);
	if (fsync(file) || (link(name, path) && errno != EEXIST) || unlink(name))
		fail("%s: %s", path, strerror(errno));
	close(file);
	if (slash)
		slash[1] = 0;
	file = open(slash ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (file < 0 || fsync(file))
		fail("%s: its directory: %s", path, strerror(errno));
	close(file);
}

static void ignore(int number) { (void)number; }

static void lock_alone(int file, const char *path)
{
	struct sigaction on_alarm = { .sa_handler = ignore };

	if (!flock(file, LOCK_EX | LOCK_NB))
		return;
	sigaction(SIGALRM, &on_alarm, NULL);
	alarm(LOCK_PATIENCE_S);
	if (flock(file, LOCK_EX))
		fail("%s: another process has had it for %d s", path, LOCK_PATIENCE_S);
	alarm(0);
}

static void read_header(struct disk *disk)
{
	struct header header;

	if (pread(disk->file, &header, sizeof header, 0) != sizeof header ||
	    memcmp(header.magic, magic, sizeof magic) || header.identity[DISK_IDENTITY_BYTES - 1])
		fail("%s: no disk of this program; it makes the file itself", disk->path);
	memcpy(disk->identity, header.identity, sizeof header.identity);
}

void disk_open(struct disk *disk, const char *path, uint64_t size_bytes, const struct described *described)
{
	uint64_t wanted = described->size_bytes ? described->size_bytes : size_bytes;
	struct stat about;

	disk->path = path;
	disk->read_only = described->read_only;
	if (access(path, F_OK) && errno == ENOENT && described->may_create && !disk->read_only) {
		if (!wanted || wanted % DISK_BLOCK_BYTES)
			fail("say a size, a multiple of %d bytes: the device has none", DISK_BLOCK_BYTES);
		create(path, wanted);
	}
	disk->file = open(path, (disk->read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
	if (disk->file < 0 || fstat(disk->file, &about))
		fail("%s: %s", path, strerror(errno));
	if (!S_ISREG(about.st_mode))
		fail("%s: no regular file", path);
	lock_alone(disk->file, path);
	read_header(disk);
	disk->bytes = ((uint64_t)about.st_size - DISK_HEADER_BYTES) & ~(uint64_t)(DISK_BLOCK_BYTES - 1);
	if (!described->size_bytes && size_bytes && size_bytes < disk->bytes)
		disk->bytes = size_bytes;
	if (about.st_size <= DISK_HEADER_BYTES || disk->bytes < wanted)
		fail("%s: it has room for %llu bytes, the device has %llu", path, (unsigned long long)disk->bytes,
		     (unsigned long long)wanted);
}

static off_t in_file(uint64_t offset) { return (off_t)(DISK_HEADER_BYTES + offset); }

static bool is_inside(const struct disk *disk, uint64_t offset, uint64_t length)
{
	return offset <= disk->bytes && length <= disk->bytes - offset;
}

int32_t disk_read(const struct disk *disk, void *to, uint64_t offset, uint64_t length)
{
	uint64_t done = 0;

	if (!is_inside(disk, offset, length))
		return -EINVAL;
	while (done < length) {
		ssize_t bytes = pread(disk->file, (uint8_t *)to + done, length - done, in_file(offset + done));

		if (bytes < 0 && errno != EINTR)
			return -errno;
		if (bytes == 0)
			fail("%s: it became shorter than its device", disk->path);
		done += bytes < 0 ? 0 : (uint64_t)bytes;
	}
	return (int32_t)length;
}

/* A write to a file that was cut would make it longer again, with zeros where data was. */
static void check_length(const struct disk *disk)
{
	struct stat about;

	if (fstat(disk->file, &about) || about.st_size < in_file(disk->bytes))
		fail("%s: it became shorter than its device", disk->path);
}

int32_t disk_write(const struct disk *disk, const void *from, uint64_t offset, uint64_t length, bool fua)
{
	uint64_t done = 0;

	if (!is_inside(disk, offset, length))
		return -EINVAL;
	check_length(disk);
	while (done < length) {
		struct iovec piece = { (uint8_t *)(uintptr_t)from + done, length - done };
		ssize_t bytes = pwritev2(disk->file, &piece, 1, in_file(offset + done), fua ? RWF_DSYNC : 0);

		if (bytes < 0 && errno != EINTR)
			return -errno;
		done += bytes < 0 ? 0 : (uint64_t)bytes;
	}
	return (int32_t)length;
}

int32_t disk_flush(const struct disk *disk) { return fdatasync(disk->file) ? -errno : 0; }

static int change_range(const struct disk *disk, int mode, uint64_t offset, uint64_t length)
{
	return fallocate(disk->file, mode | FALLOC_FL_KEEP_SIZE, in_file(offset), (off_t)length) ? errno : 0;
}

int32_t disk_discard(const struct disk *disk, uint64_t offset, uint64_t length)
{
	int error;

	if (!is_inside(disk, offset, length))
		return -EINVAL;
	error = change_range(disk, FALLOC_FL_PUNCH_HOLE, offset, length);
	/* A discard is a hint: a file system without holes keeps the data. */
	return error == EOPNOTSUPP ? 0 : -error;
}

static int32_t write_zeros(const struct disk *disk, uint64_t offset, uint64_t length)
{
	static const uint8_t zeros[ZEROS_BYTES];
	int32_t result = 0;

	for (uint64_t done = 0; done < length && result >= 0; done += (uint64_t)result) {
		uint64_t left = length - done;
		result = disk_write(disk, zeros, offset + done, left < ZEROS_BYTES ? left : ZEROS_BYTES, false);
	}
	return result < 0 ? result : 0;
}

int32_t disk_zero(const struct disk *disk, uint64_t offset, uint64_t length, bool may_unmap, bool fua)
{
	int32_t result;

	if (!is_inside(disk, offset, length))
		return -EINVAL;
	check_length(disk);
	result = -change_range(disk, may_unmap ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE, offset, length);
	if (result == -EOPNOTSUPP)
		result = write_zeros(disk, offset, length);
	return result || !fua ? result : disk_flush(disk);
}
