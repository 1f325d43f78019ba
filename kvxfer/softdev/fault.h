/*
 * Faults on purpose: a plan, and which of its rules a work request meets.
 *
 * Pure: text in, rules out; one work request in, a decision out. What a decision
 * does to the device is in inject.c. A plan decides from its text, its seed and
 * the work requests that it is shown, in their order, and from nothing else.
 *
 *   plan  = item *( ";" item )
 *   item  = "seed=" number | rule
 *   rule  = field *( ( "," | "@" ) field )     one of them act=
 *   field = "act=" action [ ":" status ]
 *         | "qp=" ( "*" | number )   queue pairs that it counts; default all
 *         | "nth=" number            from this one on, counted from 1
 *         | "post=" number           the same, said of act=enomem
 *         | "rate=" fraction         with this probability
 *         | "times=" number          at most; default 1 with nth, else no end
 *         | "us=" number [ ".." number ]  microseconds, for actions that wait
 *         | "t=" number ( "s" | "ms" | "us" )  once, so long after the plan is set
 *         | "on=" ( "initiator" | "target" )   whose work is counted
 */
#ifndef KVX_SOFT_FAULT_H
#define KVX_SOFT_FAULT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FAULT_MAX_RULES 32

enum fault_act {
	FAULT_NONE = 0,
	FAULT_STATUS,	    /* the WR fails with this status */
	FAULT_ACK_LOST,	    /* executed, and no answer from there on arrives */
	FAULT_DROP,	    /* neither it nor what follows reaches the peer */
	FAULT_DELAY,	    /* it leaves late */
	FAULT_LATE_WRITE,   /* as drop, but it arrives when the QP has failed */
	FAULT_CQ_OVERFLOW,  /* a completion of its CQ is lost */
	FAULT_ENOMEM,	    /* post_send refuses it */
	FAULT_SLOW_POST,    /* post_send takes its time */
	FAULT_DUP,	    /* it reaches the peer twice */
	FAULT_DIE,	    /* half of its bytes move, then SIGKILL */
	FAULT_QP_FATAL,	    /* its QP fails for no fault of the WR */
	FAULT_DEVICE_FATAL, /* the adapter is lost */
	FAULT_LATE_BYTES,   /* acknowledged before its bytes are in place */
	FAULT_LATE_GPU,	    /* the same, and announced as well */
	FAULT_REORDER_BYTES, /* its bytes are put in place last to first */
	FAULT_PORT_DOWN,
	FAULT_PORT_UP,
	FAULT_GID_CHANGE,
	FAULT_N_ACTS,
};

/* Where a rule looks. */
enum fault_point {
	POINT_CALL,	 /* post_send is called with a WR */
	POINT_POST,	 /* post_send is given a WR */
	POINT_INITIATOR, /* a WR is about to leave */
	POINT_TARGET,	 /* a WR has arrived */
	POINT_TIME,
};

struct fault_rule {
	enum fault_act act;
	enum fault_point point;
	uint32_t status; /* FAULT_STATUS: enum ibv_wc_status */
	uint32_t qpn;	 /* 0: any */
	uint64_t nth;	 /* 0: any */
	uint64_t times;	 /* left; UINT64_MAX: no end */
	uint64_t rate;	 /* of 2^32; UINT64_MAX: not given */
	uint64_t min_us, max_us;
	uint64_t at_ns; /* POINT_TIME, after the plan was set */
	uint64_t seen;	/* WRs counted so far */
};

/* What is to happen to a WR. */
struct fault {
	enum fault_act act;
	uint32_t status;
	uint64_t delay_ns;
};

struct fault_plan {
	atomic_bool on; /* there are rules; all else by lock, a leaf */
	pthread_mutex_t lock;
	uint64_t random, since_ns;
	uint32_t n_rules;
	struct fault_rule rules[FAULT_MAX_RULES];
};

/*
 * Read a plan; an empty text is an empty plan. Returns 0, or EINVAL with *at the
 * offset in text of what is wrong; then rules and n are not to be used.
 */
int fault_parse(const char *text, struct fault_rule rules[FAULT_MAX_RULES],
		uint32_t *n, uint64_t *seed, size_t *at);

/* Replace the plan. As fault_parse(); after an error the old one is in force. */
int fault_set(struct fault_plan *plan, const char *text, uint64_t now_ns,
	      size_t *at);

/* Show the plan a WR. FAULT_NONE: nothing happens to it. */
struct fault fault_meet(struct fault_plan *plan, enum fault_point point,
			uint32_t qpn);

/*
 * The next action whose time has come. FAULT_NONE: none has, and *next_ns is
 * when the next one will, or UINT64_MAX.
 */
enum fault_act fault_due(struct fault_plan *plan, uint64_t now_ns,
			 uint64_t *next_ns);

#endif
