/* What the C tests of the software device share: a pair of QPs, and checks. */
#ifndef KVX_TEST_HARNESS_H
#define KVX_TEST_HARNESS_H

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#include "../../kvxfer/softdev/softdev.h"

#define CHECK(condition)                                                     \
	do {                                                                 \
		if (!(condition)) {                                          \
			fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, \
				__LINE__, __func__, #condition);             \
			abort();                                             \
		}                                                            \
	} while (0)

#define ALL_ACCESS                                          \
	(IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | \
	 IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC)

extern struct kvx_verbs_table verbs;

/* One end: an adapter with one QP over one buffer. */
struct end {
	struct ibv_context *context;
	struct ibv_pd *pd;
	struct ibv_comp_channel *channel;
	struct ibv_cq *cq;
	struct ibv_qp *qp;
	struct ibv_mr *mr;
	uint8_t *buffer; /* a memfd on the shm wire */
	int fd;		 /* of the buffer, or -1 */
	size_t size;
	union ibv_gid gid;
	uint32_t psn;
};

/* How a pair is made; zero means the default. */
struct options {
	size_t size;
	uint32_t send_wr, recv_wr, cqe;
	uint8_t timeout, retry_cnt, rnr_retry; /* given when any_retry */
	bool any_retry;
	int qp_access, mr_access; /* -1: none */
	bool sig_all;
	uint8_t rd_atomic;
	const char *address;
	bool plain; /* on the shm wire as well: memory that is no file */
};

/* What one end has to know of the other; fit to be sent through a pipe. */
struct card {
	union ibv_gid gid;
	uint32_t qpn, psn, rkey;
	uint64_t addr;
};

/* A memfd that a peer may map. */
int sealed_memory(size_t size);
/* Map fd, or private memory (-1), where huge pages fit. size: whole pages. */
uint8_t *map_aligned(int fd, size_t size);
void open_end(struct end *end, const struct options *options);
void close_end(struct end *end);
struct card card_of(const struct end *end);
int to_init(struct end *end, const struct options *options);
int to_rtr(struct end *end, const struct card *peer,
	   const struct options *options);
int to_rts(struct end *end, const struct options *options);
int to_state(struct end *end, enum ibv_qp_state state);
void connect_end(struct end *end, const struct card *peer,
		 const struct options *options);
void make_pair(struct end *a, struct end *b, const struct options *options);

struct ibv_send_wr write_wr(const struct end *from, const struct card *to,
			    struct ibv_sge *sge, size_t from_off, size_t to_off,
			    uint32_t length);
int post_one(struct end *end, struct ibv_send_wr *wr);
int post_recv(struct end *end, uint64_t wr_id, size_t off, uint32_t length);
/* Sleep until the CQ may have something, by the recipe of the man page. */
void await(struct end *end, int ms);
/* Wait up to 20 s for n completions. */
void reap(struct end *end, struct ibv_wc *wc, int n);
/* Nothing arrives within the time. */
void quiet(struct end *end, int ms);
uint64_t now_ms(void);
void fill_random(uint8_t *at, size_t size);
void no_objects_left(void);

#endif
