/* The life of a connection, whichever side dialled. */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "connection.h"
#include "context.h"
#include "frame.h"
#include "initiator.h"
#include "inject.h"
#include "list.h"
#include "qp.h"
#include "responder.h"
#include "wire_shm.h"

#define MAX_GREETING 256	       /* strangers at a time */
#define GREETING_NS (5000 * NS_PER_MS) /* to say hello */
#define FINISH_NS (2000 * NS_PER_MS)
#define ACCEPTS_PER_TURN 64
#define DISCARD_BYTES (1u << 20)
#define LISTENS (EPOLLIN | EPOLLRDHUP | EPOLLET)

static void set_option(int fd, int level, int name, int value)
{
	/* Each of them makes things faster or tidier; none is needed. */
	(void)setsockopt(fd, level, name, &value, sizeof(value));
}

static bool is_loopback(const struct sockaddr_storage *address)
{
	const struct sockaddr_in *v4 = (const struct sockaddr_in *)address;
	const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)address;

	if (address->ss_family == AF_INET6)
		return IN6_IS_ADDR_LOOPBACK(&v6->sin6_addr);
	return ntohl(v4->sin_addr.s_addr) >> 24 == IN_LOOPBACKNET;
}

void soft_tune_socket(const struct soft_context *ctx, int fd)
{
	set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
	set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
	set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 30);
	set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 10);
	set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
	if (ctx->socket_buffer) {
		set_option(fd, SOL_SOCKET, SO_SNDBUF, (int)ctx->socket_buffer);
		set_option(fd, SOL_SOCKET, SO_RCVBUF, (int)ctx->socket_buffer);
	}
}

static void tune_for_peer(int fd, const struct sockaddr_storage *peer)
{
	static const char cubic[] = "cubic";

	/* Pacing (bbr) only holds a loopback connection back. */
	if (is_loopback(peer))
		(void)setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, cubic,
				 sizeof(cubic) - 1);
}

struct soft_conn *soft_new_conn(struct soft_context *ctx, int fd,
				enum conn_state state)
{
	struct epoll_event event = { .events = LISTENS | EPOLLOUT };
	struct soft_conn *conn = calloc(1, sizeof(*conn));

	if (!conn)
		goto fail;
	conn->ctx = ctx;
	conn->fd = fd;
	conn->state = state;
	conn->deadline_ns = NEVER;
	event.data.ptr = conn;
	if (epoll_ctl(ctx->epoll_fd, EPOLL_CTL_ADD, fd, &event))
		goto fail;
	list_append(&ctx->conns, &conn->link);
	list_init(&conn->ready_link);
	atomic_fetch_add(&soft_tally.connections, 1);
	return conn;

fail:
	close(fd);
	free(conn);
	return NULL;
}

void soft_conn_writes_elsewhere(struct soft_conn *conn)
{
	struct epoll_event event = { .events = LISTENS };

	event.data.ptr = conn;
	(void)epoll_ctl(conn->ctx->epoll_fd, EPOLL_CTL_MOD, conn->fd, &event);
}

struct soft_conn *soft_greet(struct soft_context *ctx, int fd)
{
	struct soft_conn *conn;

	if (ctx->n_greeting >= MAX_GREETING) {
		close(fd);
		return NULL;
	}
	conn = soft_new_conn(ctx, fd, CONN_HELLO);
	if (!conn)
		return NULL;
	ctx->n_greeting++;
	/* Try at once; EAGAIN will say if that was too early. */
	conn->readable = conn->writable = true;
	soft_ready(conn);
	conn->deadline_ns = ctx->now_ns + GREETING_NS;
	soft_want_timer(ctx, conn->deadline_ns);
	return conn;
}

void soft_accept(struct soft_context *ctx)
{
	struct sockaddr_storage peer;
	socklen_t length;
	int i, fd;

	for (i = 0; i < ACCEPTS_PER_TURN; i++) {
		length = sizeof(peer);
		fd = accept4(ctx->listen_fd, (struct sockaddr *)&peer, &length,
			     SOCK_CLOEXEC | SOCK_NONBLOCK);
		if (fd < 0)
			return;
		soft_tune_socket(ctx, fd);
		tune_for_peer(fd, &peer);
		soft_greet(ctx, fd);
	}
}

struct soft_conn *soft_dial(struct soft_qp *qp,
			    const struct sockaddr_storage *address)
{
	static const struct linger at_once = { .l_onoff = 1, .l_linger = 0 };
	struct soft_context *ctx = qp_context(qp);
	struct soft_conn *conn;
	int fd;

	fd = socket(address->ss_family,
		    SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return NULL;
	soft_tune_socket(ctx, fd);
	tune_for_peer(fd, address);
	/* When we close, what is still in the send buffer must not go on. */
	(void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
	if (connect(fd, (const struct sockaddr *)address,
		    soft_address_len(address)) &&
	    errno != EINPROGRESS) {
		int err = errno;

		close(fd);
		errno = err;
		return NULL;
	}
	conn = soft_new_conn(ctx, fd, CONN_DIALING);
	if (!conn) {
		errno = ENOMEM;
		return NULL;
	}
	conn->outgoing = true;
	conn->qp = qp;
	qp->out = conn;
	return conn;
}

void soft_conn_close(struct soft_conn *conn)
{
	struct soft_context *ctx = conn->ctx;

	if (conn->state == CONN_DEAD)
		return;
	if (!conn->outgoing && conn->state == CONN_HELLO)
		ctx->n_greeting--;
	conn->state = CONN_DEAD;
	if (conn->qp && conn->qp->out == conn)
		conn->qp->out = NULL;
	if (conn->qp && conn->qp->in == conn)
		conn->qp->in = NULL;
	conn->qp = NULL;
	if (conn->shm)
		soft_shm_unlink(conn->shm);
	list_remove(&conn->ready_link);
	list_remove(&conn->link);
	list_append(&ctx->dead, &conn->link);
	/* By hand: a child that has just been forked may hold the fd open, and
	 * then closing it here would leave it in the epoll set. */
	(void)epoll_ctl(ctx->epoll_fd, EPOLL_CTL_DEL, conn->fd, NULL);
	close(conn->fd);
	conn->fd = -1;
	atomic_fetch_sub(&soft_tally.connections, 1);
}

void soft_conn_free_dead(struct soft_context *ctx)
{
	struct soft_list *link;
	struct soft_conn *conn;

	while ((link = list_pop(&ctx->dead))) {
		conn = soft_of(link, struct soft_conn, link);
		free(conn->tx);
		if (conn->rx)
			free(conn->rx->faults);
		free(conn->rx);
		free(conn->late);
		soft_shm_free(conn->shm);
		free(conn);
	}
}

/* The peer has been told; read on, so that its data does not turn our close
 * into a reset that would overtake the answer. */
static void drain(struct soft_conn *conn)
{
	ssize_t got;

	if (!soft_conn_flush(conn)) {
		soft_conn_close(conn);
		return;
	}
	if (!conn->readable)
		return;
	/* With TCP, MSG_TRUNC throws the bytes away without copying them. */
	got = recv(conn->fd, NULL, DISCARD_BYTES, MSG_TRUNC);
	if (got > 0 || (got < 0 && errno == EINTR)) {
		soft_ready(conn);
	} else if (got < 0 && errno == EAGAIN) {
		conn->readable = false;
	} else {
		soft_conn_close(conn);
	}
}

static void finish_dialing(struct soft_conn *conn)
{
	struct soft_qp *qp = conn->qp;
	socklen_t length = sizeof(int);
	int err = 0;

	if (!conn->writable)
		return;
	if (getsockopt(conn->fd, SOL_SOCKET, SO_ERROR, &err, &length))
		err = errno;
	if (err) {
		soft_conn_close(conn);
		soft_out_lost(qp, err == ECONNREFUSED);
		return;
	}
	conn->broken = false; /* said before there was a connection */
	soft_send_hello(conn);
}

void soft_conn_finish(struct soft_conn *conn)
{
	static const struct linger in_good_order = { .l_onoff = 0 };

	(void)setsockopt(conn->fd, SOL_SOCKET, SO_LINGER, &in_good_order,
			 sizeof(in_good_order));
	(void)shutdown(conn->fd, SHUT_WR);
	conn->state = CONN_DRAIN;
	conn->deadline_ns = conn->ctx->now_ns + FINISH_NS;
	soft_want_timer(conn->ctx, conn->deadline_ns);
	conn->readable = true;
	soft_ready(conn);
}

bool soft_expects(const struct soft_conn *conn)
{
	const struct soft_rx *rx = conn->rx;

	if (conn->shm || conn->state != CONN_UP || !conn->qp)
		return false;
	if (conn->outgoing)
		return soft_outstanding(conn->qp);
	/* It waits for a receive of ours. */
	if (rx->parked)
		return false;
	/* What ends with an immediate, or has not begun, may be all. */
	return rx->phase != RX_HEADER ||
	       (rx->header.n_desc &&
		!(rx->desc[rx->header.n_desc - 1].flags & DESC_IMM));
}

void soft_conn_service(struct soft_conn *conn)
{
	switch (conn->state) {
	case CONN_DIALING:
		finish_dialing(conn);
		break;
	case CONN_HELLO:
		if (conn->outgoing)
			soft_take_welcome(conn);
		else
			soft_answer_hello(conn);
		break;
	case CONN_UP:
		if (conn->outgoing)
			soft_take_answers(conn);
		else if (conn->broken)
			soft_conn_close(conn);
		else
			soft_respond(conn);
		break;
	case CONN_DRAIN:
		drain(conn);
		break;
	case CONN_LATE: /* waits for its time */
	case CONN_DEAD:
		break;
	}
}

void soft_conn_expire(struct soft_conn *conn)
{
	if (conn->ctx->now_ns < conn->deadline_ns)
		soft_want_timer(conn->ctx, conn->deadline_ns);
	else if (conn->state == CONN_LATE)
		soft_inject_late(conn);
	else
		soft_conn_close(conn);
}
