/* The same-host wire: the responder pulls with process_vm_readv. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "internal.h"

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

/* Is each page of the range that has byte number at readable? */
static bool source_is_there(struct soft_conn *conn, int n_remote, size_t at)
{
	const size_t page = 4096;
	const struct iovec *iov = conn->ctx->remote_iov;
	uintptr_t addr, end;
	uint8_t byte;
	int i;

	for (i = 0; i < n_remote && at >= iov[i].iov_len; i++)
		at -= iov[i].iov_len;
	if (i == n_remote)
		return true;
	addr = (uintptr_t)iov[i].iov_base + at;
	end = (uintptr_t)iov[i].iov_base + iov[i].iov_len;
	for (; addr < end; addr = (addr & ~(page - 1)) + page)
		if (read_remote(conn->peer_pid, addr, &byte, 1))
			return false;
	return true;
}

static bool nonce_matches(struct soft_conn *conn)
{
	uint8_t nonce[FRAME_NONCE_BYTES];

	return !read_remote(conn->peer_pid, conn->peer_nonce_addr, nonce,
			    sizeof(nonce)) &&
	       !memcmp(nonce, conn->peer_nonce, sizeof(nonce));
}

enum chunk_result soft_cma_pull(struct soft_conn *conn, int n_local,
				int n_remote, size_t *bytes)
{
	struct iovec *local = conn->ctx->local_iov;
	struct iovec *remote = conn->ctx->remote_iov;
	uint8_t nonce[FRAME_NONCE_BYTES];
	ssize_t got;

	local[n_local] = (struct iovec){ nonce, sizeof(nonce) };
	remote[n_remote] = (struct iovec){
		(void *)(uintptr_t)conn->peer_nonce_addr, sizeof(nonce)
	};
	got = process_vm_readv((pid_t)conn->peer_pid, local,
			       (unsigned long)n_local + 1, remote,
			       (unsigned long)n_remote + 1, 0);
	if (got == (ssize_t)(*bytes + sizeof(nonce)))
		return memcmp(nonce, conn->peer_nonce, sizeof(nonce)) ?
			       CHUNK_LOST :
			       CHUNK_MOVED;
	if ((got < 0 && errno != EFAULT) || !nonce_matches(conn))
		return CHUNK_LOST;

	/* Stopped by a bad address, of theirs or of ours. What came before it
	 * counts; the next call starts there and comes to the point. */
	if (got > 0 && (size_t)got < *bytes) {
		*bytes = (size_t)got;
		return CHUNK_MOVED;
	}
	*bytes = 0;
	return source_is_there(conn, n_remote, 0) ? CHUNK_NO_DEST :
						    CHUNK_NO_SOURCE;
}
