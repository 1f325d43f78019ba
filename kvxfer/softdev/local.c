/* The unix socket by which two processes of one host find each other. */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "connection.h"
#include "context.h"
#include "frame.h"
#include "mr.h"
#include "qp.h"
#include "wire_shm.h"

#define ACCEPTS_PER_TURN 64

/*
 * An abstract name: no file, no permission, gone with the socket. It is made of
 * the GID, of which 48 bits are random, and is seen in the network namespace
 * alone. Whoever calls still has to present the token; whoever is called has to
 * be of our user.
 */
static socklen_t name_of(const union ibv_gid *gid, struct sockaddr_un *address)
{
	char *at = address->sun_path + 1;
	size_t i;

	memset(address, 0, sizeof(*address));
	address->sun_family = AF_UNIX;
	at += sprintf(at, "kvxfer-");
	for (i = 0; i < sizeof(gid->raw); i++)
		at += sprintf(at, "%02x", gid->raw[i]);
	return (socklen_t)(at - (char *)address);
}

static int packet_socket(void)
{
	return socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK,
		      0);
}

void soft_local_listen(struct soft_context *ctx)
{
	struct epoll_event event = { .events = EPOLLIN };
	struct sockaddr_un address;
	socklen_t length = name_of(&ctx->gid, &address);

	if (ctx->local_fd >= 0)
		close(ctx->local_fd);
	ctx->local_fd = -1;
	if (!(ctx->wires & ~(1u << WIRE_TCP)))
		return;
	event.data.ptr = &ctx->local_fd;
	ctx->local_fd = packet_socket();
	if (ctx->local_fd >= 0 &&
	    (bind(ctx->local_fd, (struct sockaddr *)&address, length) ||
	     listen(ctx->local_fd, SOMAXCONN) ||
	     epoll_ctl(ctx->epoll_fd, EPOLL_CTL_ADD, ctx->local_fd, &event))) {
		close(ctx->local_fd);
		ctx->local_fd = -1;
	}
}

void soft_local_accept(struct soft_context *ctx)
{
	struct soft_conn *conn;
	int i, fd;

	for (i = 0; i < ACCEPTS_PER_TURN; i++) {
		fd = accept4(ctx->local_fd, NULL, NULL,
			     SOCK_CLOEXEC | SOCK_NONBLOCK);
		if (fd < 0)
			return;
		conn = soft_greet(ctx, fd);
		if (!conn)
			continue;
		conn->shm = soft_shm_new(conn, false);
		if (!conn->shm)
			soft_conn_close(conn);
	}
}

bool soft_can_be_mapped(const struct soft_qp *qp)
{
	struct soft_pd *pd = to_pd(qp->ibv.pd);

	return atomic_load(&pd->shared_bytes) > atomic_load(&pd->private_bytes);
}

bool soft_local_first(const struct soft_qp *qp)
{
	const uint32_t shm = 1u << WIRE_SHM, cma = 1u << WIRE_CMA;
	uint32_t wires = qp_wires(qp);

	if (qp->wire_out != WIRE_NONE)
		wires = 1u << qp->wire_out;
	if (qp->no_shm)
		return false;
	return wires == shm || (wires & cma && !qp->no_cma) ||
	       (wires & shm && soft_can_be_mapped(qp));
}

bool soft_only_local(const struct soft_qp *qp)
{
	return qp->wire_out == WIRE_SHM || qp_wires(qp) == 1u << WIRE_SHM;
}

static bool is_of_our_user(int fd)
{
	struct ucred peer;
	socklen_t length = sizeof(peer);

	return !getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) &&
	       (peer.uid == geteuid() || peer.uid == 0);
}

struct soft_conn *soft_local_dial(struct soft_qp *qp)
{
	struct sockaddr_un address;
	socklen_t length = name_of(&qp->peer_gid, &address);
	struct soft_conn *conn;
	int err, fd = packet_socket();

	if (fd < 0)
		return NULL;
	if (connect(fd, (struct sockaddr *)&address, length)) {
		err = errno;
		close(fd);
		errno = err;
		return NULL;
	}
	if (!is_of_our_user(fd)) {
		close(fd);
		errno = ECONNREFUSED;
		return NULL;
	}
	conn = soft_new_conn(qp_context(qp), fd, CONN_DIALING);
	if (!conn) {
		errno = ENOMEM;
		return NULL;
	}
	conn->outgoing = true;
	conn->shm = soft_shm_new(conn, true);
	if (!conn->shm) {
		soft_conn_close(conn);
		errno = ECONNREFUSED; /* there is another wire */
		return NULL;
	}
	conn->qp = qp;
	qp->out = conn;
	return conn;
}

ssize_t soft_local_send(int fd, const struct iovec *iov, int n, int passed_fd)
{
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control;
	struct msghdr message = { .msg_iov = (struct iovec *)iov,
				  .msg_iovlen = (size_t)n };

	if (passed_fd >= 0) {
		memset(&control, 0, sizeof(control));
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(&control.header), &passed_fd, sizeof(int));
		message.msg_control = &control;
		message.msg_controllen = sizeof(control.bytes);
	}
	return sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

ssize_t soft_local_recv(int fd, const struct iovec *iov, int n, int *passed_fd)
{
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control;
	/* With room for one descriptor, the kernel closes all others itself. */
	struct msghdr message = { .msg_iov = (struct iovec *)iov,
				  .msg_iovlen = (size_t)n,
				  .msg_control = &control,
				  .msg_controllen = sizeof(control.bytes) };
	struct cmsghdr *header;
	ssize_t got;

	*passed_fd = -1;
	got = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	if (got < 0)
		return got;
	header = CMSG_FIRSTHDR(&message);
	if (header && header->cmsg_level == SOL_SOCKET &&
	    header->cmsg_type == SCM_RIGHTS &&
	    header->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(passed_fd, CMSG_DATA(header), sizeof(int));
	return got;
}
