/* Mapping memory files, ours and our peers'. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include "wire_shm.h"

#define HUGE_BYTES (2u << 20)
#define OFFSET_MAX (1ull << 47) /* more than any address space */

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

int soft_check_sealed(int fd, uint64_t offset, uint64_t length)
{
	int seals = fcntl(fd, F_GET_SEALS);
	struct stat status;
	struct statfs system;

	/* Memory of another kind (hugetlbfs for one) can run out of pages, and
	 * touching what is not there ends the process. */
	if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(fd, &status) ||
	    fstatfs(fd, &system) || system.f_type != TMPFS_MAGIC)
		return EPERM;
	if (offset > OFFSET_MAX || length > OFFSET_MAX || length == 0 ||
	    (uint64_t)status.st_size < offset + length)
		return EINVAL;
	return 0;
}

/* Bytes that could be had without swapping; 0: not known. */
static uint64_t available_memory(void)
{
	FILE *file = fopen("/proc/meminfo", "re");
	unsigned long long kib = 0;
	char line[128];

	while (file && !kib && fgets(line, sizeof(line), file))
		if (sscanf(line, "MemAvailable: %llu", &kib) != 1)
			kib = 0;
	if (file)
		fclose(file);
	return kib * 1024;
}

/*
 * Small blocks are copied about twice as fast on huge pages. A page of each has
 * to be there before the rest can be had, so this takes all of the memory now,
 * as pinning it for a NIC does; a region that would need much of what is left
 * stays as it is.
 */
void soft_make_huge(uint8_t *addr, size_t length)
{
	uint8_t *end = addr + length;
	volatile const uint8_t *at;

	addr = (uint8_t *)(((uintptr_t)addr + HUGE_BYTES - 1) &
			   ~(uintptr_t)(HUGE_BYTES - 1));
	if (addr >= end || (size_t)(end - addr) < HUGE_BYTES ||
	    length > available_memory() / 2)
		return;
	length = (size_t)(end - addr) & ~(size_t)(HUGE_BYTES - 1);
	for (at = addr; at < addr + length; at += HUGE_BYTES)
		(void)*at;
	(void)madvise(addr, length, MADV_COLLAPSE);
}

int soft_map(struct soft_map *map, int fd, uint64_t offset, size_t length,
	     int prot)
{
	uint64_t first = offset & ~(uint64_t)(HUGE_BYTES - 1);
	size_t size = (size_t)(offset - first) + length;
	uint8_t *all, *at;

	/* Address and offset must agree on where a huge page begins: then the
	 * first touch maps the whole of it. MADV_COLLAPSE of this mapping would
	 * add nothing, and costs milliseconds a call on a machine whose CPUs
	 * are busy, as it has each of them give up pages that it keeps. */
	all = mmap(NULL, size + HUGE_BYTES, PROT_NONE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (all == MAP_FAILED)
		return errno;
	at = (uint8_t *)(((uintptr_t)all + HUGE_BYTES - 1) &
			 ~(uintptr_t)(HUGE_BYTES - 1));
	if (mmap(at, size, prot, MAP_SHARED | MAP_FIXED, fd, (off_t)first) ==
	    MAP_FAILED) {
		int err = errno;

		munmap(all, size + HUGE_BYTES);
		return err;
	}
	(void)madvise(all, size + HUGE_BYTES, MADV_DONTFORK);
	*map = (struct soft_map){ .base = at + (offset - first),
				  .length = length,
				  .mapping = all,
				  .mapped = size + HUGE_BYTES };
	return 0;
}

void soft_unmap(struct soft_map *map)
{
	if (map->base)
		munmap(map->mapping, map->mapped);
	*map = (struct soft_map){ 0 };
}
