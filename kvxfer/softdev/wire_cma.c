/* The same-host wire: the responder pulls with process_vm_readv. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "connection.h"
#include "context.h"
#include "copier.h"
#include "frame.h"
#include "responder.h"
#include "wire_cma.h"

/*
 * What makes this safe against a pid that means somebody else: every batch
 * reads, as its last range, the 16 random bytes that the initiator's QP keeps
 * for this connection and wipes before it leaves RTS. While they match, all
 * that came before them in the batch was read from the right process while its
 * work requests were still outstanding. If the process was replaced, has ended
 * or has reused its pid, or the QP has moved on, they do not, and the batch is
 * not acknowledged. So no pidfd is needed, and a caller that takes its source
 * blocks back after an error cannot have the new bytes delivered as the old.
 */

uint64_t soft_pid_namespace(void)
{
	struct stat status;

	return stat("/proc/self/ns/pid", &status) ? 0 : status.st_ino;
}

static int read_remote(uint32_t pid, uint64_t addr, void *out, size_t size)
{
	struct iovec local = { out, size };
	struct iovec remote = { (void *)(uintptr_t)addr, size };
	ssize_t got = process_vm_readv((pid_t)pid, &local, 1, &remote, 1, 0);

	if (got < 0)
		return errno;
	return (size_t)got == size ? 0 : EFAULT;
}

static int yama_scope(void)
{
	FILE *file = fopen("/proc/sys/kernel/yama/ptrace_scope", "re");
	int scope = 0;

	if (!file)
		return 0;
	if (fscanf(file, "%d", &scope) != 1)
		scope = 0;
	fclose(file);
	return scope;
}

int soft_cma_probe(const struct soft_context *ctx,
		   const struct frame_hello *hello)
{
	uint8_t nonce[FRAME_NONCE_BYTES];
	int err;

	/* The same inode may be another host's: the nonce decides. */
	if (!ctx->pid_ns || hello->pid_ns != ctx->pid_ns || !hello->pid)
		return ENXIO;
	err = read_remote(hello->pid, hello->nonce_addr, nonce, sizeof(nonce));
	if (err == EPERM)
		return yama_scope() == 1 ? EPERM : EACCES;
	if (err)
		return err;
	return memcmp(nonce, hello->nonce, sizeof(nonce)) ? ENXIO : 0;
}

bool soft_cma_allow(uint32_t pid)
{
	/* Yama knows one tracer a process. The first peer has it; for others
	 * the answer is the tcp wire, not a first peer that loses its own. */
	static _Atomic uint32_t tracer;
	uint32_t none = 0;

	if (yama_scope() != 1)
		return false;
	if (!atomic_compare_exchange_strong(&tracer, &none, pid) && none != pid)
		return false;
	return prctl(PR_SET_PTRACER, (unsigned long)pid, 0, 0, 0) == 0;
}

/* Bytes to be read in one call; both lists have an entry free for the nonce. */
struct pull {
	const struct soft_conn *conn;
	struct iovec *local, *remote;
	int n_local, n_remote;
	size_t bytes; /* what is asked for, then what arrived */
	enum chunk_result result;
};

/* Is each page of the first range readable? */
static bool source_is_there(const struct pull *pull)
{
	const uintptr_t page = 4096;
	uintptr_t addr = (uintptr_t)pull->remote[0].iov_base;
	uintptr_t end = addr + pull->remote[0].iov_len;
	uint8_t byte;

	for (; addr < end; addr = (addr & ~(page - 1)) + page)
		if (read_remote(pull->conn->peer_pid, addr, &byte, 1))
			return false;
	return true;
}

static bool nonce_matches(const struct soft_conn *conn)
{
	uint8_t nonce[FRAME_NONCE_BYTES];

	return !read_remote(conn->peer_pid, conn->peer_nonce_addr, nonce,
			    sizeof(nonce)) &&
	       !memcmp(nonce, conn->peer_nonce, sizeof(nonce));
}

static enum chunk_result read_ranges(struct pull *pull)
{
	const struct soft_conn *conn = pull->conn;
	uint8_t nonce[FRAME_NONCE_BYTES];
	ssize_t got;

	pull->local[pull->n_local] = (struct iovec){ nonce, sizeof(nonce) };
	pull->remote[pull->n_remote] = (struct iovec){
		(void *)(uintptr_t)conn->peer_nonce_addr, sizeof(nonce)
	};
	got = process_vm_readv((pid_t)conn->peer_pid, pull->local,
			       (unsigned long)pull->n_local + 1, pull->remote,
			       (unsigned long)pull->n_remote + 1, 0);
	if (got == (ssize_t)(pull->bytes + sizeof(nonce)))
		return memcmp(nonce, conn->peer_nonce, sizeof(nonce)) ?
			       CHUNK_LOST :
			       CHUNK_MOVED;
	if ((got < 0 && errno != EFAULT) || !nonce_matches(conn))
		return CHUNK_LOST;

	/* Stopped by a bad address, of theirs or of ours. What came before it
	 * counts; the next call starts there and comes to the point. */
	if (got > 0 && (size_t)got < pull->bytes) {
		pull->bytes = (size_t)got;
		return CHUNK_MOVED;
	}
	pull->bytes = 0;
	return source_is_there(pull) ? CHUNK_NO_DEST : CHUNK_NO_SOURCE;
}

/* A soft_part_fn. */
static void read_parts(void *job, uint32_t first, uint32_t end, bool down)
{
	struct pull *pulls = job;

	(void)down;
	for (; first < end; first++)
		pulls[first].result = read_ranges(&pulls[first]);
}

/* Move what lies behind the first bytes of a list to another; returns how many
 * ranges are left. */
static int split(struct iovec *list, int n, size_t bytes, struct iovec *rest,
		 int *n_rest)
{
	int at = 0;

	for (; bytes >= list[at].iov_len; at++)
		bytes -= list[at].iov_len;
	*n_rest = n - at;
	memcpy(rest, list + at, (size_t)*n_rest * sizeof(*rest));
	rest->iov_base = (uint8_t *)rest->iov_base + bytes;
	rest->iov_len -= bytes;
	list[at].iov_len = bytes;
	return bytes ? at + 1 : at;
}

/* In two halves, one by the copier. */
static enum chunk_result pull_halves(struct pull *first, size_t *bytes)
{
	struct soft_context *ctx = first->conn->ctx;
	size_t half = *bytes / 2 & ~(size_t)63;
	struct pull halves[2] = { *first, *first };

	halves[1].local = ctx->more_local_iov;
	halves[1].remote = ctx->more_remote_iov;
	halves[0].n_local = split(first->local, first->n_local, half,
				  halves[1].local, &halves[1].n_local);
	halves[0].n_remote = split(first->remote, first->n_remote, half,
				   halves[1].remote, &halves[1].n_remote);
	halves[0].bytes = half;
	halves[1].bytes = *bytes - half;
	soft_copier_share(ctx, read_parts, halves, 2, 1);

	*bytes = halves[0].bytes;
	/* Of WRs in the second half bytes may have landed, although they end as
	 * flushed: what is in their target then is undefined. */
	if (halves[0].result != CHUNK_MOVED || *bytes < half)
		return halves[0].result;
	/* What is wrong with the second is said when it comes first. */
	if (halves[1].result == CHUNK_MOVED)
		*bytes += halves[1].bytes;
	return halves[1].result == CHUNK_LOST ? CHUNK_LOST : CHUNK_MOVED;
}

enum chunk_result soft_cma_pull(struct soft_conn *conn, int n_local,
				int n_remote, size_t *bytes)
{
	struct pull pull = { conn,
			     conn->ctx->local_iov,
			     conn->ctx->remote_iov,
			     n_local,
			     n_remote,
			     *bytes,
			     CHUNK_MOVED };
	enum chunk_result result;

	if (soft_copier_joins(conn, pull.local, (uint32_t)n_local, *bytes))
		return pull_halves(&pull, bytes);
	result = read_ranges(&pull);
	*bytes = pull.bytes;
	return result;
}
