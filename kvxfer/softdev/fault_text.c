/* Fault plans: from text to rules. */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <infiniband/verbs.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "fault.h"

#define UNSET UINT64_MAX

static const struct action {
	const char *name;
	enum fault_act act;
	enum fault_point point; /* unless on= says otherwise */
	bool either;		/* on= may say otherwise */
	bool timed;		/* may have t= */
	bool waits;		/* must have us= */
} actions[] = {
	{ "status", FAULT_STATUS, POINT_INITIATOR, true, false, false },
	{ "ack_lost", FAULT_ACK_LOST, POINT_INITIATOR, false, false, false },
	{ "drop", FAULT_DROP, POINT_INITIATOR, false, false, false },
	{ "delay", FAULT_DELAY, POINT_INITIATOR, false, false, true },
	{ "late_write", FAULT_LATE_WRITE, POINT_INITIATOR, false, false, true },
	{ "cq_overflow", FAULT_CQ_OVERFLOW, POINT_INITIATOR, true, false,
	  false },
	{ "enomem", FAULT_ENOMEM, POINT_POST, false, false, false },
	{ "slow_post", FAULT_SLOW_POST, POINT_CALL, false, false, true },
	{ "dup", FAULT_DUP, POINT_INITIATOR, false, false, false },
	{ "partial_then_die", FAULT_DIE, POINT_TARGET, true, false, false },
	{ "qp_fatal", FAULT_QP_FATAL, POINT_INITIATOR, true, false, false },
	{ "device_fatal", FAULT_DEVICE_FATAL, POINT_INITIATOR, true, true,
	  false },
	{ "posted_write_delay", FAULT_LATE_BYTES, POINT_TARGET, false, false,
	  true },
	{ "gpu_write_delay", FAULT_LATE_GPU, POINT_TARGET, false, false, true },
	{ "reorder_bytes", FAULT_REORDER_BYTES, POINT_TARGET, false, false,
	  false },
	{ "port_down", FAULT_PORT_DOWN, POINT_INITIATOR, true, true, false },
	{ "port_up", FAULT_PORT_UP, POINT_TIME, false, true, false },
	{ "gid_change", FAULT_GID_CHANGE, POINT_INITIATOR, true, true, false },
};

/* By number, without IBV_WC_ in front. */
static const char *const statuses[] = {
	"SUCCESS",
	"LOC_LEN_ERR",
	"LOC_QP_OP_ERR",
	"LOC_EEC_OP_ERR",
	"LOC_PROT_ERR",
	"WR_FLUSH_ERR",
	"MW_BIND_ERR",
	"BAD_RESP_ERR",
	"LOC_ACCESS_ERR",
	"REM_INV_REQ_ERR",
	"REM_ACCESS_ERR",
	"REM_OP_ERR",
	"RETRY_EXC_ERR",
	"RNR_RETRY_EXC_ERR",
	"LOC_RDD_VIOL_ERR",
	"REM_INV_RD_REQ_ERR",
	"REM_ABORT_ERR",
	"INV_EECN_ERR",
	"INV_EEC_STATE_ERR",
	"FATAL_ERR",
	"RESP_TIMEOUT_ERR",
	"GENERAL_ERR",
	"TM_ERR",
	"TM_RNDV_INCOMPLETE",
};

#define N(array) (sizeof(array) / sizeof((array)[0]))

/* The text, and how far it has been read. */
struct reader {
	const char *text;
	size_t at;
};

/* A rule as it is written, before it is known whether it makes sense. */
struct draft {
	struct fault_rule rule;
	const struct action *action;
	size_t status_at, on_at, t_at, us_at;
	bool on_given;
};

static char peek(const struct reader *in)
{
	return in->text[in->at];
}

static void skip_blanks(struct reader *in)
{
	while (peek(in) == ' ' || peek(in) == '\n' || peek(in) == '\t')
		in->at++;
}

static bool take(struct reader *in, char wanted)
{
	skip_blanks(in);
	if (peek(in) != wanted)
		return false;
	in->at++;
	return true;
}

/* A name: letters, digits, underscores. Its length; 0: there is none. */
static size_t word(struct reader *in, const char **start)
{
	skip_blanks(in);
	*start = in->text + in->at;
	while (isalnum((unsigned char)peek(in)) || peek(in) == '_')
		in->at++;
	return (size_t)(in->text + in->at - *start);
}

static bool is(const char *start, size_t length, const char *name)
{
	return strlen(name) == length && !strncasecmp(start, name, length);
}

static bool number(struct reader *in, uint64_t *value)
{
	size_t start;

	skip_blanks(in);
	start = in->at;
	*value = 0;
	while (isdigit((unsigned char)peek(in))) {
		if (*value > UINT64_MAX / 1000000000000u)
			return false;
		*value = *value * 10 + (uint64_t)(peek(in) - '0');
		in->at++;
	}
	return in->at != start;
}

/* 0.001, 1, .5: a part of one, as a part of 2^32. */
static bool fraction(struct reader *in, uint64_t *rate)
{
	uint64_t whole = 0, part = 0, unit = 1;
	bool any;

	any = number(in, &whole);
	if (peek(in) == '.') {
		in->at++;
		while (isdigit((unsigned char)peek(in)) && unit < 1000000000) {
			part = part * 10 + (uint64_t)(peek(in) - '0');
			unit *= 10;
			in->at++;
			any = true;
		}
	}
	*rate = whole << 32 | (part << 32) / unit;
	return any && whole <= 1 && *rate <= 1ull << 32;
}

static bool microseconds(struct reader *in, struct fault_rule *rule)
{
	if (!number(in, &rule->min_us))
		return false;
	rule->max_us = rule->min_us;
	if (peek(in) != '.')
		return true;
	if (in->text[in->at + 1] != '.')
		return false;
	in->at += 2;
	return number(in, &rule->max_us) && rule->max_us >= rule->min_us;
}

static bool moment(struct reader *in, struct fault_rule *rule)
{
	const char *unit;
	uint64_t value;
	size_t length;

	if (!number(in, &value))
		return false;
	length = word(in, &unit);
	if (is(unit, length, "s"))
		rule->at_ns = value * 1000000000u;
	else if (is(unit, length, "ms"))
		rule->at_ns = value * 1000000u;
	else if (is(unit, length, "us"))
		rule->at_ns = value * 1000u;
	else
		return false;
	rule->point = POINT_TIME;
	rule->times = 1;
	return true;
}

/* IBV_WC_REM_ACCESS_ERR, rem_access_err or rem_access; a failure, not 0. */
static bool status(struct reader *in, uint32_t *found)
{
	const char *start;
	size_t length = word(in, &start), full, i;

	if (length > 7 && is(start, 7, "IBV_WC_")) {
		start += 7;
		length -= 7;
	}
	for (i = 1; i < N(statuses); i++) {
		full = strlen(statuses[i]);
		if (!is(start, length, statuses[i]) &&
		    !(full > 4 && length == full - 4 &&
		      !strcmp(statuses[i] + length, "_ERR") &&
		      !strncasecmp(start, statuses[i], length)))
			continue;
		*found = (uint32_t)i;
		return true;
	}
	return false;
}

static bool action(struct reader *in, struct draft *draft)
{
	const char *start;
	size_t length = word(in, &start), i;

	for (i = 0; i < N(actions) && !draft->action; i++)
		if (is(start, length, actions[i].name))
			draft->action = &actions[i];
	if (!draft->action)
		return false;
	draft->rule.act = draft->action->act;
	if (draft->rule.act != FAULT_STATUS)
		return true;
	draft->status_at = in->at + 1;
	return take(in, ':') && status(in, &draft->rule.status);
}

static bool side(struct reader *in, struct draft *draft)
{
	const char *start;
	size_t length = word(in, &start);

	draft->on_given = true;
	if (is(start, length, "initiator"))
		draft->rule.point = POINT_INITIATOR;
	else if (is(start, length, "target"))
		draft->rule.point = POINT_TARGET;
	else
		return false;
	return true;
}

static bool queue_pair(struct reader *in, struct fault_rule *rule)
{
	uint64_t qpn = 0;

	if (take(in, '*'))
		return true;
	if (!number(in, &qpn) || qpn == 0 || qpn > 0xffffff)
		return false;
	rule->qpn = (uint32_t)qpn;
	return true;
}

/* What stands behind name=; in->at is moved past it. */
static bool value_of(struct reader *in, const char *name, size_t length,
		     struct draft *draft)
{
	struct fault_rule *rule = &draft->rule;

	if (is(name, length, "act"))
		return !draft->action && action(in, draft);
	if (is(name, length, "qp"))
		return queue_pair(in, rule);
	if (is(name, length, "nth") || is(name, length, "post"))
		return number(in, &rule->nth) && rule->nth;
	if (is(name, length, "rate"))
		return fraction(in, &rule->rate);
	if (is(name, length, "times"))
		return number(in, &rule->times) && rule->times;
	if (is(name, length, "us")) {
		draft->us_at = in->at;
		return microseconds(in, rule);
	}
	if (is(name, length, "t")) {
		draft->t_at = in->at;
		return moment(in, rule);
	}
	draft->on_at = in->at;
	return is(name, length, "on") && side(in, draft);
}

/* Which side may a WR with this status have failed on? */
static bool is_said_by_target(uint32_t status)
{
	return status == IBV_WC_REM_INV_REQ_ERR ||
	       status == IBV_WC_REM_ACCESS_ERR || status == IBV_WC_REM_OP_ERR ||
	       status == IBV_WC_RNR_RETRY_EXC_ERR;
}

/* Do the fields go together? If not, *at is the one that does not. */
static bool finish(struct draft *draft, size_t start, size_t *at)
{
	struct fault_rule *rule = &draft->rule;
	const struct action *act = draft->action;

	*at = start;
	if (!act)
		return false;
	if (draft->t_at) {
		*at = draft->t_at;
		return act->timed && !draft->on_given && !rule->nth &&
		       rule->rate == UNSET;
	}
	if (act->point == POINT_TIME || (act->waits && !draft->us_at))
		return false;
	*at = draft->us_at;
	if (draft->us_at && !act->waits)
		return false;
	*at = draft->on_at;
	if (!draft->on_given)
		rule->point = is_said_by_target(rule->status) ? POINT_TARGET :
								act->point;
	else if (!act->either && rule->point != act->point)
		return false;
	*at = draft->status_at;
	if (rule->act == FAULT_STATUS &&
	    is_said_by_target(rule->status) != (rule->point == POINT_TARGET))
		return false;
	if (!rule->times)
		rule->times = rule->nth ? 1 : UNSET;
	return true;
}

static bool read_rule(struct reader *in, struct fault_rule *rule)
{
	struct draft draft = { .rule.rate = UNSET };
	const char *name;
	size_t start, length, at;

	skip_blanks(in);
	start = in->at;
	do {
		length = word(in, &name);
		at = (size_t)(name - in->text);
		if (!length || !take(in, '=')) {
			in->at = at;
			return false;
		}
		skip_blanks(in);
		at = in->at;
		if (!value_of(in, name, length, &draft)) {
			in->at = at;
			return false;
		}
	} while (take(in, ',') || take(in, '@'));
	if (!finish(&draft, start, &at)) {
		in->at = at;
		return false;
	}
	*rule = draft.rule;
	return true;
}

static bool read_seed(struct reader *in, uint64_t *seed)
{
	size_t start = in->at;
	const char *name;

	if (is(name, word(in, &name), "seed") && take(in, '='))
		return number(in, seed);
	in->at = start;
	return false;
}

int fault_parse(const char *text, struct fault_rule rules[FAULT_MAX_RULES],
		uint32_t *n, uint64_t *seed, size_t *at)
{
	struct reader in = { text, 0 };
	bool good = true;

	*n = 0;
	*seed = 0;
	while (good) {
		while (take(&in, ';'))
			;
		if (!peek(&in))
			return 0;
		good = read_seed(&in, seed) ||
		       (*n < FAULT_MAX_RULES && read_rule(&in, &rules[(*n)++]));
		if (good && peek(&in) != ';') {
			skip_blanks(&in);
			good = !peek(&in) || peek(&in) == ';';
		}
	}
	*at = in.at;
	return EINVAL;
}
