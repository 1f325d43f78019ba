/* What the tests of memory windows share: binds, and accesses through them. */
#ifndef KVX_TEST_BINDING_H
#define KVX_TEST_BINDING_H

#include "harness.h"

/* Where the windows begin in their regions, and how long they are. */
#define FROM 4096
#define LENGTH 8192

extern const struct options bindable; /* a region that may have windows */

struct ibv_mw *new_window(const struct end *end, enum ibv_mw_type type);
struct ibv_mw_bind_info part(const struct end *end, unsigned int access);
struct ibv_send_wr bind_wr(struct ibv_mw *mw, uint32_t rkey,
			   struct ibv_mw_bind_info info);
struct ibv_send_wr invalidate_wr(enum ibv_wr_opcode opcode, uint32_t rkey);
struct ibv_wc one(struct end *end);
void must(struct end *end, struct ibv_send_wr wr, enum ibv_wc_opcode opcode);
void must_fail(struct end *end, struct ibv_send_wr wr,
	       enum ibv_wc_status status, uint32_t vendor_err);
/* Bind part of the end's buffer; returns the rkey that peers may use. */
uint32_t bind_part(struct end *end, struct ibv_mw *mw, unsigned int access);
struct ibv_send_wr access_wr(const struct end *from, const struct end *to,
			     struct ibv_sge *sge, uint32_t rkey,
			     enum ibv_wr_opcode opcode, size_t off,
			     uint32_t length);
/* What the device thread has read for a READ, it has read before this. That a
 * peer's answer says so as well, ThreadSanitizer cannot know. */
void settle(struct end *end);
void write_well(struct end *from, struct end *to, uint32_t rkey);
/* The access is refused, and both QPs are in ERR. */
void refuse(struct end *from, struct end *to, uint32_t rkey,
	    enum ibv_wr_opcode opcode, size_t off, uint32_t length,
	    uint32_t vendor_err);
void end_pair(struct end *a, struct end *b, struct ibv_mw *mw);

#endif
