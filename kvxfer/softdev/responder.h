/*
 * The side of a connection that carries out the peer's WRs: it puts their bytes
 * in place, chunk by chunk, and answers.
 */
#ifndef KVX_SOFT_RESPONDER_H
#define KVX_SOFT_RESPONDER_H

#include <stdbool.h>

#include "frame.h"

struct soft_conn;

/* responder.c; ctx->lock held */
void soft_respond(struct soft_conn *conn);
void soft_responder_timer(struct soft_conn *conn);

/* chunk.c */
/*
 * Move up to one chunk of WRITE and SEND data into place and advance over the
 * descriptors that this completes, up to one that needs a receive.
 */
enum chunk_result {
	CHUNK_MOVED,
	CHUNK_WAIT,
	CHUNK_LOST,
	CHUNK_NO_SOURCE,
	CHUNK_NO_DEST
};
enum chunk_result soft_move_chunk(struct soft_conn *conn);
/* Throw payload away; rx->skip is what is left of it. */
enum chunk_result soft_skip_payload(struct soft_conn *conn);
static inline bool soft_needs_recv(const struct frame_desc *desc)
{
	return desc->op == OP_SEND || desc->flags & DESC_IMM;
}

/* read.c; ctx->lock held */
/* False: an atomic's target is not mapped. */
bool soft_begin_read(struct soft_conn *conn);
/* Send the next piece. CHUNK_MOVED, _WAIT or _LOST. */
enum chunk_result soft_send_read(struct soft_conn *conn);
bool soft_read_in_frame(const struct soft_conn *conn);

#endif
