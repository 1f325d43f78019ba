/* Whether memory is there, without touching it. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/mman.h>

#include "internal.h"

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
