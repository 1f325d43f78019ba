/*
 * Connections: one carries a QP's requests one way and the answers the other, as
 * a stream of frames. What each side keeps of the frame under way is here too.
 */
#ifndef KVX_SOFT_CONNECTION_H
#define KVX_SOFT_CONNECTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "context.h"
#include "fault.h"
#include "frame.h"
#include "list.h"
#include "qp.h"

struct soft_shm;

enum conn_state {
	CONN_DIALING, /* out: connect() under way */
	CONN_HELLO,   /* out: waits for WELCOME; in: waits for HELLO */
	CONN_UP,
	CONN_DRAIN, /* in: NAK sent, the rest is thrown away */
	CONN_LATE,  /* out: its QP has failed, late is still to come */
	CONN_DEAD,  /* closed; freed by the device thread */
};

/* A frame of requests on its way out. */
struct soft_tx {
	bool busy;
	uint8_t head[FRAME_HEADER_BYTES + FRAME_TABLE_BYTES];
	size_t head_len, head_off;
	struct iovec iov[MAX_IOV];
	int n_iov, at_iov;
	uint64_t first_seq; /* its first WR; the last is sq.next or before */
	uint64_t mr_generation; /* when its WRs were checked */
};

enum rx_phase { RX_HEADER, RX_TABLE, RX_EXECUTE, RX_READ, RX_SKIP };

/* A frame of requests being executed. */
struct soft_rx {
	enum rx_phase phase;
	uint8_t raw[FRAME_HEADER_BYTES + FRAME_TABLE_BYTES];
	size_t raw_len; /* bytes received of the present part */
	struct frame_header header;
	struct frame_message message;
	struct frame_desc desc[FRAME_MAX_DESC];
	uint32_t at;	 /* descriptor under way */
	uint64_t at_off; /* bytes of it that are done */
	uint32_t bad;	 /* first descriptor that fails, or n_desc */
	struct soft_failure failure;
	uint64_t mr_generation; /* when the rest was last checked */
	uint64_t message_off;	/* bytes of the present message that are done */
	bool recv_checked;	/* SEND: its RECV is there and good */
	struct fault fault;	/* of the message under way */
	struct fault *faults; /* per descriptor; NULL: there was no plan yet */
	uint32_t acks_owed;   /* frames executed since the last */
	uint64_t owed_bytes;  /* those of them, and what of the next is done */
	uint64_t owed_ns;     /* since when there are any */
	bool again;	      /* the frame repeats what was executed */
	uint64_t skip; /* RX_SKIP: payload of it still to be thrown away */
	bool awaited;  /* one of them is for a WR that somebody waits for */
	/* RNR */
	bool parked;
	uint32_t rnr_tries;
	uint64_t rnr_at_ns;
	/* READ under way: a response frame and what is left after it. */
	uint64_t read_left;
	uint64_t fetched; /* atomic: what was there before */
	uint8_t read_head[FRAME_HEADER_BYTES];
	size_t read_head_off;
	size_t read_frame_left;
};

struct soft_conn {
	struct soft_list link;	     /* ctx->conns or ctx->dead */
	struct soft_list ready_link; /* ctx->ready; empty when not queued */
	struct soft_context *ctx;
	struct soft_qp *qp; /* NULL: not bound (yet, or any more) */
	int fd;
	enum conn_state state;
	bool outgoing;
	/* From epoll, edge-triggered; cleared on EAGAIN. */
	bool readable, writable;
	/* Bytes that come next and were asked for; see stream.c. */
	size_t asked_out, asked_in;
	uint64_t deadline_ns; /* HELLO, DRAIN: close when it passes */
	bool broken; /* reset by the peer: what is queued counts no more */
	bool deaf;   /* out: what the peer says is lost */
	struct soft_late *late;

	/* Small frames to send: hello, answers. */
	uint8_t out[1024];
	size_t out_len, out_off;
	/* A small frame being received: answers, hello. */
	uint8_t in[FRAME_HEADER_BYTES + FRAME_HELLO_BYTES];
	size_t in_len;

	/* Outgoing: the READ_RESP payload still to come. */
	size_t resp_left;
	bool resp_end, in_resp;

	/* Incoming: from the hello. */
	uint32_t rnr_retry;
	enum frame_wire wire;
	uint32_t peer_pid;
	uint64_t peer_nonce_addr;
	uint8_t peer_nonce[FRAME_NONCE_BYTES];

	struct soft_shm *shm; /* a unix socket; NULL: TCP */
	struct soft_tx *tx;
	struct soft_rx *rx;
};

/* connection.c; ctx->lock held */
void soft_tune_socket(const struct soft_context *ctx, int fd);
void soft_accept(struct soft_context *ctx);
/* Take over fd, also on failure. */
struct soft_conn *soft_new_conn(struct soft_context *ctx, int fd,
				enum conn_state state);
/* Be told no more that there is room in the socket: a unix socket says so each time
 * that the peer reads from it. */
void soft_conn_writes_elsewhere(struct soft_conn *conn);
/* The same for a caller who has yet to say hello. */
struct soft_conn *soft_greet(struct soft_context *ctx, int fd);
struct soft_conn *soft_dial(struct soft_qp *qp,
			    const struct sockaddr_storage *address);
void soft_conn_close(struct soft_conn *conn);
void soft_conn_free_dead(struct soft_context *ctx);
void soft_conn_service(struct soft_conn *conn);
/* Over a socket: is the peer at work on something that we wait for? */
bool soft_expects(const struct soft_conn *conn);
void soft_conn_expire(struct soft_conn *conn);
/* Say no more, and close when the peer has read what was said. */
void soft_conn_finish(struct soft_conn *conn);

/* stream.c; ctx->lock held */
/*
 * As sendmsg(2) and readv(2), never waiting, on whatever carries the connection.
 * user: some ranges are the application's, which may have unmapped them.
 */
ssize_t soft_stream_send(struct soft_conn *conn, const struct iovec *iov, int n,
			 bool user);
ssize_t soft_stream_recv(struct soft_conn *conn, const struct iovec *iov, int n,
			 bool user);
/* Throw up to n bytes away. As readv(2). */
ssize_t soft_stream_skip(struct soft_conn *conn, size_t n);
/* Queue a small frame and try to send it. False: the connection is lost. */
bool soft_conn_put(struct soft_conn *conn, const struct frame_header *header,
		   const uint8_t *payload);
bool soft_conn_flush(struct soft_conn *conn);
/* Fill buffer to want bytes. 1: there, 0: not yet, -1: the peer is gone. */
int soft_conn_fill(struct soft_conn *conn, uint8_t *buffer, size_t *have,
		   size_t want);

/* hello.c; ctx->lock held */
void soft_send_hello(struct soft_conn *conn);
void soft_answer_hello(struct soft_conn *conn);
void soft_take_welcome(struct soft_conn *conn);

#endif
