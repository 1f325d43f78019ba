/* Fault plans: which rule a work request meets. */
#include <errno.h>
#include <string.h>

#include "fault.h"

int fault_set(struct fault_plan *plan, const char *text, uint64_t now_ns,
	      size_t *at)
{
	struct fault_rule rules[FAULT_MAX_RULES];
	uint64_t seed;
	uint32_t n;
	int err;

	err = fault_parse(text, rules, &n, &seed, at);
	if (err)
		return err;
	pthread_mutex_lock(&plan->lock);
	memcpy(plan->rules, rules, n * sizeof(rules[0]));
	plan->n_rules = n;
	plan->random = seed;
	plan->since_ns = now_ns;
	atomic_store(&plan->on, n > 0);
	pthread_mutex_unlock(&plan->lock);
	return 0;
}

/* splitmix64: all that is asked of it is to be the same everywhere. */
static uint64_t draw(struct fault_plan *plan)
{
	uint64_t z = plan->random += 0x9e3779b97f4a7c15u;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
	z = (z ^ z >> 27) * 0x94d049bb133111ebu;
	return z ^ z >> 31;
}

/* Count a WR; is it one that the rule is for? */
static bool strikes(struct fault_plan *plan, struct fault_rule *rule)
{
	bool chosen = true;

	rule->seen++;
	/* Drawn for each WR, so that one rule does not change another's luck. */
	if (rule->rate != UINT64_MAX)
		chosen = draw(plan) >> 32 < rule->rate;
	return chosen && rule->times && rule->seen >= rule->nth;
}

struct fault fault_meet(struct fault_plan *plan, enum fault_point point,
			uint32_t qpn)
{
	struct fault fault = { FAULT_NONE, 0, 0 };
	struct fault_rule *rule;
	uint32_t i;

	pthread_mutex_lock(&plan->lock);
	for (i = 0; i < plan->n_rules; i++) {
		rule = &plan->rules[i];
		if (rule->point != point || (rule->qpn && rule->qpn != qpn))
			continue;
		/* All count it, the first one that strikes has it. */
		if (!strikes(plan, rule) || fault.act != FAULT_NONE)
			continue;
		if (rule->times != UINT64_MAX)
			rule->times--;
		fault.act = rule->act;
		fault.status = rule->status;
		fault.delay_ns = 1000 * (rule->min_us +
					 draw(plan) % (rule->max_us -
						       rule->min_us + 1));
	}
	pthread_mutex_unlock(&plan->lock);
	return fault;
}

enum fault_act fault_due(struct fault_plan *plan, uint64_t now_ns,
			 uint64_t *next_ns)
{
	enum fault_act act = FAULT_NONE;
	struct fault_rule *rule, *first = NULL;
	uint32_t i;

	*next_ns = UINT64_MAX;
	pthread_mutex_lock(&plan->lock);
	for (i = 0; i < plan->n_rules; i++) {
		rule = &plan->rules[i];
		if (rule->point == POINT_TIME && rule->times &&
		    (!first || rule->at_ns < first->at_ns))
			first = rule;
	}
	if (first && now_ns >= plan->since_ns + first->at_ns) {
		first->times = 0;
		act = first->act;
	} else if (first) {
		*next_ns = plan->since_ns + first->at_ns;
	}
	pthread_mutex_unlock(&plan->lock);
	return act;
}
