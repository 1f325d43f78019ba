/*
 * Memory windows: rkeys for a part of a region, which a work request gives and
 * another one takes back.
 *
 * An rkey of a window is its index, for life, above eight bits that change with each
 * bind. A window of type 1 is its PD's and is bound by ibv_bind_mw, also over an
 * older binding. One of type 2 belongs to the QP that has bound it until it is
 * invalidated (2B in the words of the specification).
 *
 * The WRs that bind and invalidate are carried out by the QP's own side: no peer
 * hears of them. One waits until all before it are done, and all behind it wait for
 * it, so a fence adds nothing.
 */
#ifndef KVX_SOFT_WINDOWS_H
#define KVX_SOFT_WINDOWS_H

#include <infiniband/verbs.h>
#include <stdbool.h>
#include <stdint.h>

struct soft_context;
struct soft_mr;
struct soft_qp;

#define SOFT_MAX_MW 65536

/* In the slot of a WR that binds or invalidates. */
struct soft_local {
	uint64_t addr, length;
	uint32_t rkey; /* of the window; the last eight bits: to be */
	uint32_t lkey; /* of the region; 0: none */
	uint32_t access;
};

static inline bool soft_is_local(uint8_t opcode)
{
	return opcode == IBV_WR_BIND_MW || opcode == IBV_WR_LOCAL_INV;
}

/* Put what allocates and binds into context->ops. */
void soft_offer_windows(struct ibv_context *context);
/* What the WR says, into its slot. An errno for what makes no sense. */
int soft_fill_local(uint8_t *slot, const struct ibv_send_wr *wr);

/* ctx->lock held from here on */
/* Carry out what is next in the send queue, if it is of this kind and due. */
void soft_run_local(struct soft_qp *qp);
/* Is the key one that some window has, had or may have? */
bool soft_is_window_key(const struct soft_context *ctx, uint32_t rkey);
/* The region behind a bound window's rkey, or NULL. */
struct soft_mr *soft_window_region(const struct soft_context *ctx,
				   uint32_t rkey);
/* As soft_check_remote(). */
uint32_t soft_check_window(const struct soft_qp *qp, uint32_t rkey,
			   uint64_t addr, uint64_t length, unsigned int access);
/* May the QP's peer invalidate it? The vendor_err, or 0. */
uint32_t soft_check_invalidate(const struct soft_qp *qp, uint32_t rkey);
/* After that check. */
void soft_invalidate(struct soft_context *ctx, uint32_t rkey);
/* The QP ends, and what it has bound. */
void soft_forget_windows(const struct soft_qp *qp);

#endif
