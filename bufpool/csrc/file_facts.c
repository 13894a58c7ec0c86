#include "file_facts.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define STATX_DIOALIGN_BIT 0x2000u

int file_direct_alignment(int file, uint32_t *memory_bytes, uint32_t *offset_bytes) {
    /* glibc's struct statx may be older than these fields: 32-bit words 38 and 39 of the kernel's 256 bytes. */
    uint32_t words[64] = {0};
    if (syscall(SYS_statx, file, "", AT_EMPTY_PATH, STATX_DIOALIGN_BIT, words))
        return -errno;
    bool known = words[0] & STATX_DIOALIGN_BIT;
    *memory_bytes = known ? words[38] : 0;
    *offset_bytes = known ? words[39] : 0;
    return 0;
}

int file_block_device(int file, uint64_t *size_bytes, uint32_t *logical_bytes, uint32_t *physical_bytes) {
    int logical = 0;
    unsigned physical = 0;
    if (ioctl(file, BLKGETSIZE64, size_bytes) || ioctl(file, BLKSSZGET, &logical) || ioctl(file, BLKPBSZGET, &physical))
        return -errno;
    *logical_bytes = (uint32_t)logical;
    *physical_bytes = physical;
    return 0;
}
