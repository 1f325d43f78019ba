/* Whether memory is there, without touching it. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "mr.h"

/* Without /proc: is there any mapping at all? Says nothing of permissions. */
static int check_by_mincore(uintptr_t addr, size_t length)
{
	static const uintptr_t page = 4096, step = 4096u * 1024u;
	unsigned char resident[1024];
	uintptr_t at = addr & ~(page - 1), end = addr + length;

	while (at < end) {
		size_t part = end - at < step ? end - at : step;

		if (mincore((void *)at, part, resident))
			return EFAULT;
		at += part;
	}
	return 0;
}

static int check_lines(FILE *maps, uintptr_t addr, size_t length, bool write)
{
	uintptr_t at = addr, end = addr + length;
	unsigned long first, past;
	char flags[5];

	while (fscanf(maps, "%lx-%lx %4s%*[^\n]", &first, &past, flags) == 3) {
		if (past <= at)
			continue;
		if (first > at || flags[0] != 'r' || (write && flags[1] != 'w'))
			return EFAULT;
		at = past;
		if (at >= end)
			return 0;
	}
	return EFAULT;
}

/*
 * A NIC pins the pages, which finds bad ones and makes the others resident. We
 * only look: a big cache costs memory when it is used, not when registered.
 *
 * Returns 0, or EFAULT when part of the range is unmapped, not readable or, for
 * write, not writable.
 */
int soft_check_mapped(uintptr_t addr, size_t length, bool write)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	int err;

	if (!maps)
		return check_by_mincore(addr, length);
	err = check_lines(maps, addr, length, write);
	fclose(maps);
	return err;
}

bool soft_is_mapping_of(uintptr_t addr, size_t length, int fd, uint64_t offset)
{
	unsigned long first, past, at, major, minor, inode;
	FILE *maps = fopen("/proc/self/maps", "re");
	uintptr_t end = addr + length;
	struct stat status;
	bool found = false;
	char flags[5];

	if (!maps || fstat(fd, &status)) {
		if (maps)
			fclose(maps);
		return false;
	}
	while (!found &&
	       fscanf(maps, "%lx-%lx %4s %lx %lx:%lx %lu%*[^\n]", &first, &past,
		      flags, &at, &major, &minor, &inode) == 7)
		found = first <= addr && end <= past && flags[3] == 's' &&
			inode == status.st_ino &&
			makedev(major, minor) == status.st_dev &&
			at + (addr - first) == offset;
	fclose(maps);
	return found;
}
