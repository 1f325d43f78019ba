/* The shm wire: its rings. wire_shm.h has the idea. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "connection.h"
#include "context.h"
#include "frame.h"
#include "list.h"
#include "wire_shm.h"

#ifdef __SANITIZE_THREAD__
uint64_t shm_words[SHM_WORDS][2];
#endif

static bool is_up(const struct soft_shm *shm)
{
	return !list_empty(&shm->link);
}

static void use_page(struct soft_shm *shm, uint8_t *memory, bool initiator)
{
	uint8_t *requests = memory + SHM_PAGE_BYTES;
	uint8_t *answers = requests + SHM_RING_BYTES;

	shm->page = (struct shm_page *)memory;
	shm->out.pipe = initiator ? &shm->page->requests : &shm->page->answers;
	shm->out.bytes = initiator ? requests : answers;
	shm->in.pipe = initiator ? &shm->page->answers : &shm->page->requests;
	shm->in.bytes = initiator ? answers : requests;
}

static bool map_page(struct soft_shm *shm, int fd, bool initiator)
{
	void *memory = mmap(NULL, SHM_TOTAL_BYTES, PROT_READ | PROT_WRITE,
			    MAP_SHARED, fd, 0);

	if (memory == MAP_FAILED)
		return false;
	(void)madvise(memory, SHM_TOTAL_BYTES, MADV_DONTFORK);
	use_page(shm, memory, initiator);
	return true;
}

static bool make_page(struct soft_shm *shm)
{
	const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
	int fd = memfd_create("kvxfer-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	shm->ring_fd = fd;
	return fd >= 0 && !ftruncate(fd, SHM_TOTAL_BYTES) &&
	       !fcntl(fd, F_ADD_SEALS, seals) && map_page(shm, fd, true);
}

struct soft_shm *soft_shm_new(struct soft_conn *conn, bool initiator)
{
	struct soft_shm *shm = calloc(1, sizeof(*shm));

	if (!shm)
		return NULL;
	list_init(&shm->link);
	shm->conn = conn;
	shm->ring_fd = -1;
	shm->matter = SHM_NEWS;
	if (initiator && !make_page(shm)) {
		soft_shm_free(shm);
		return NULL;
	}
	return shm;
}

static void drop_ring_fd(struct soft_shm *shm)
{
	if (shm->ring_fd >= 0)
		close(shm->ring_fd);
	shm->ring_fd = -1;
}

void soft_shm_free(struct soft_shm *shm)
{
	int i;

	if (!shm)
		return;
	list_remove(&shm->link);
	drop_ring_fd(shm);
	if (shm->page)
		munmap(shm->page, SHM_TOTAL_BYTES);
	for (i = 0; i < SHM_MAX_REGIONS; i++)
		soft_unmap(&shm->regions[i]);
	free(shm);
}

void soft_shm_unlink(struct soft_shm *shm)
{
	if (is_up(shm) && shm->conn->outgoing)
		atomic_fetch_sub(&shm->conn->ctx->n_rings, 1);
	list_remove(&shm->link);
}

/* What page->life is while the QP lives. */
static void set_life(struct soft_shm *shm, const uint8_t *nonce, bool initiator)
{
	memcpy(&shm->life, nonce, sizeof(shm->life));
	shm->life |= 1; /* never what the end of a life looks like */
	shm_meet(&shm->out, initiator ? shm->life : shm->life - 1);
	shm_meet(&shm->in, initiator ? shm->life - 1 : shm->life);
}

void soft_shm_begin(struct soft_shm *shm, const uint8_t *nonce)
{
	memcpy(shm->page->nonce, nonce, FRAME_NONCE_BYTES);
	set_life(shm, nonce, true);
	atomic_store(&shm->page->life, shm->life);
}

void soft_shm_end_life(struct soft_shm *shm)
{
	if (shm->page)
		atomic_store(&shm->page->life, 0);
}

bool soft_shm_probe(struct soft_shm *shm, const struct frame_hello *hello)
{
	bool good = shm->ring_fd >= 0 &&
		    !soft_check_sealed(shm->ring_fd, 0, SHM_TOTAL_BYTES) &&
		    map_page(shm, shm->ring_fd, false);

	drop_ring_fd(shm);
	set_life(shm, hello->nonce, false);
	return good && soft_shm_alive(shm) &&
	       !memcmp(shm->page->nonce, hello->nonce, FRAME_NONCE_BYTES);
}

void soft_shm_up(struct soft_shm *shm)
{
	drop_ring_fd(shm);
	shm->packets = true;
	list_append(&shm->conn->ctx->shms, &shm->link);
	if (shm->conn->outgoing)
		atomic_fetch_add(&shm->conn->ctx->n_rings, 1);
	shm->conn->readable = shm->conn->writable = true;
	soft_conn_writes_elsewhere(shm->conn);
}

bool soft_shm_alive(const struct soft_shm *shm)
{
	return atomic_load_explicit(&shm->page->life, memory_order_acquire) ==
	       shm->life;
}

ssize_t soft_shm_send(struct soft_conn *conn, const struct iovec *iov, int n,
		      bool user)
{
	struct soft_shm *shm = conn->shm;
	struct iovec spans[2];
	int64_t room;
	ssize_t done;
	int n_spans;

	if (!is_up(shm)) {
		done = soft_local_send(conn->fd, iov, n, shm->ring_fd);
		return done;
	}
	room = shm_room(&shm->out);
	if (room <= 0) {
		errno = room ? EPROTO : EAGAIN;
		return -1;
	}
	n_spans = shm_spans(&shm->out, (uint64_t)room, spans);
	done = user ? soft_copy_guarded(spans, n_spans, iov, n) :
		      (ssize_t)soft_copy(spans, n_spans, iov, n);
	if (done > 0) {
		shm_put(&shm->out, (uint64_t)done);
		if (shm_wanted(&shm->out.pipe->data_wanted, shm->matter))
			soft_shm_wake_peer(shm);
	}
	return done;
}

/* A packet of the hello, with the memfd that comes beside it. */
static ssize_t recv_packet(struct soft_conn *conn, const struct iovec *iov,
			   int n)
{
	int fd;
	ssize_t got = soft_local_recv(conn->fd, iov, n, &fd);

	if (fd >= 0 && !conn->outgoing && conn->shm->ring_fd < 0)
		conn->shm->ring_fd = fd;
	else if (fd >= 0)
		close(fd);
	return got;
}

/* Bytes in the ring. 0: the peer has gone; -1 with errno, EAGAIN if there are
 * none yet. */
static int64_t arrived(struct soft_conn *conn)
{
	struct soft_shm *shm = conn->shm;
	int64_t data;

	data = shm_data(&shm->in);
	if (data == 0) {
		/* What it said before it closed is in the ring by then. */
		soft_shm_hear(conn);
		data = shm_data(&shm->in);
	}
	if (data <= 0) {
		errno = data ? EPROTO : EAGAIN;
		return data == 0 && shm->gone ? 0 : -1;
	}
	return data;
}

ssize_t soft_shm_recv(struct soft_conn *conn, const struct iovec *iov, int n,
		      bool user)
{
	struct soft_shm *shm = conn->shm;
	struct iovec spans[2];
	int64_t data;
	ssize_t done;
	int n_spans;

	if (!is_up(shm))
		return recv_packet(conn, iov, n);
	data = arrived(conn);
	if (data <= 0)
		return data;
	n_spans = shm_spans(&shm->in, (uint64_t)data, spans);
	done = user ? soft_copy_guarded(iov, n, spans, n_spans) :
		      (ssize_t)soft_copy(iov, n, spans, n_spans);
	if (done > 0 && shm_take(&shm->in, (uint64_t)done))
		soft_shm_wake_peer(shm);
	return done;
}

ssize_t soft_shm_skip(struct soft_conn *conn, size_t n)
{
	int64_t data = arrived(conn);

	if (data <= 0)
		return data;
	if (n > (uint64_t)data)
		n = (size_t)data;
	if (shm_take(&conn->shm->in, n))
		soft_shm_wake_peer(conn->shm);
	return (ssize_t)n;
}

bool soft_shm_answered(struct soft_conn *conn)
{
	if (!is_up(conn->shm) || conn->deaf || conn->ctx->port_down ||
	    !shm_data(&conn->shm->in))
		return false;
	conn->readable = true;
	return true;
}
