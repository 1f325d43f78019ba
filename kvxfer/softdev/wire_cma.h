/*
 * The wire between two processes of one host where one may read the other's
 * memory (process_vm_readv): the responder pulls the bytes.
 */
#ifndef KVX_SOFT_WIRE_CMA_H
#define KVX_SOFT_WIRE_CMA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "responder.h"

struct frame_hello;
struct soft_conn;
struct soft_context;

/* wire_cma.c */
uint64_t soft_pid_namespace(void);
/* 0: this process can read the hello's sender; else an errno. */
int soft_cma_probe(const struct soft_context *ctx,
		   const struct frame_hello *hello);
/* Allow pid to read us, where that needs saying. False: it cannot be had. */
bool soft_cma_allow(uint32_t pid);
/*
 * Pull *bytes from n_remote ranges of ctx->remote_iov into n_local ones of
 * ctx->local_iov; both have one entry free for the nonce, and are used up. *bytes
 * becomes what arrived; CHUNK_WAIT does not happen.
 */
enum chunk_result soft_cma_pull(struct soft_conn *conn, int n_local,
				int n_remote, size_t *bytes);

#endif
