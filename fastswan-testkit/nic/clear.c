// SPDX-License-Identifier: GPL-2.0-only
/*
 * The log of clear packets that left a port although a policy covered them,
 * with the time since the kernel took the policy or the association away. It
 * remembers what was removed; all of its memory is bounded and the oldest is
 * overwritten.
 */
#include <linux/mm.h>
#include <linux/timekeeping.h>
#include "testnic.h"

#define LOG_LINES	4096
#define REMOVED		2048
#define REMOVED_FOR	(10 * NSEC_PER_SEC)

struct removed_policy {
	u64 when;
	struct xfrm_selector sel;
};

struct removed_sa {
	u64 when;
	struct tn_sa_key key;
};

struct line {
	u64 when;
	s64 since;		/* ns, or -1 */
	u8 cause, path, proto;
	u16 family;
	u32 len;
	xfrm_address_t saddr, daddr;
};

struct tn_clear {
	spinlock_t lock;
	u64 lines, policies, sas;	/* ever written; the index is modulo the size */
	struct line line[LOG_LINES];
	struct removed_policy policy[REMOVED];
	struct removed_sa sa[REMOVED];
};

static const char * const causes[] = { "no_sa", "fragment", "removed" };
static const char * const paths[] = { "stack", "xdp" };

struct tn_clear *tn_clear_alloc(void)
{
	struct tn_clear *clear = kvzalloc(sizeof(*clear), GFP_KERNEL);

	if (clear)
		spin_lock_init(&clear->lock);
	return clear;
}

void tn_clear_free(struct tn_clear *clear)
{
	kvfree(clear);
}

/* A bypass policy that goes away uncovers nothing. */
void tn_clear_policy_removed(struct tn_port *port, const struct tn_policy *policy)
{
	struct tn_clear *clear = port->clear;
	struct removed_policy *r;

	if (policy->dir != XFRM_DEV_OFFLOAD_OUT ||
	    (!policy->protects && policy->action == XFRM_POLICY_ALLOW))
		return;
	spin_lock_bh(&clear->lock);
	r = &clear->policy[clear->policies++ % REMOVED];
	r->when = ktime_get_ns();
	r->sel = policy->sel;
	spin_unlock_bh(&clear->lock);
}

void tn_clear_sa_removed(struct tn_port *port, const struct tn_sa *sa)
{
	struct tn_clear *clear = port->clear;
	struct removed_sa *r;

	if (sa->dir != XFRM_DEV_OFFLOAD_OUT)
		return;
	spin_lock_bh(&clear->lock);
	r = &clear->sa[clear->sas++ % REMOVED];
	r->when = ktime_get_ns();
	r->key = sa->key;
	spin_unlock_bh(&clear->lock);
}

/* When the newest removed policy went that covered the flow, or 0; with the lock held. */
static u64 policy_went(const struct tn_clear *clear, const struct tn_flow *flow, u64 now)
{
	u64 i, oldest = clear->policies > REMOVED ? clear->policies - REMOVED : 0;

	for (i = clear->policies; i-- > oldest; ) {
		const struct removed_policy *r = &clear->policy[i % REMOVED];

		if (now - r->when > REMOVED_FOR)
			break;
		if (tn_selects(&r->sel, flow))
			return r->when;
	}
	return 0;
}

static u64 sa_went(const struct tn_clear *clear, const struct tn_policy *policy,
		   const struct tn_flow *flow)
{
	u64 i, oldest = clear->sas > REMOVED ? clear->sas - REMOVED : 0;

	for (i = clear->sas; i-- > oldest; ) {
		const struct removed_sa *r = &clear->sa[i % REMOVED];

		if (tn_sa_suits(&r->key, policy, flow))
			return r->when;
	}
	return 0;
}

/* Whether a policy that was removed lately covered the flow. */
bool tn_clear_removed(struct tn_port *port, const struct tn_flow *flow)
{
	bool covered;

	spin_lock_bh(&port->clear->lock);
	covered = policy_went(port->clear, flow, ktime_get_ns());
	spin_unlock_bh(&port->clear->lock);
	return covered;
}

void tn_clear_note(struct tn_port *port, enum tn_cause cause, enum tn_path path,
		   const struct tn_policy *policy, const struct tn_flow *flow)
{
	static const enum tn_counter counters[] = { TN_CLEAR_NO_SA, TN_CLEAR_FRAGMENT,
						    TN_CLEAR_REMOVED };
	struct tn_clear *clear = port->clear;
	u64 now = ktime_get_ns(), went = 0;
	struct line *line;

	tn_count(port, counters[cause]);
	spin_lock_bh(&clear->lock);
	if (cause == TN_CAUSE_NO_SA)
		went = sa_went(clear, policy, flow);
	else if (cause == TN_CAUSE_REMOVED)
		went = policy_went(clear, flow, now);
	line = &clear->line[clear->lines++ % LOG_LINES];
	line->when = now;
	line->since = went ? now - went : -1;
	line->cause = cause;
	line->path = path;
	line->proto = flow->proto;
	line->family = flow->family;
	line->len = flow->l3len;
	line->saddr = flow->saddr;
	line->daddr = flow->daddr;
	spin_unlock_bh(&clear->lock);
}

static void show_line(struct seq_file *m, const struct line *line)
{
	seq_printf(m, "%llu %s %s ", line->when, causes[line->cause], paths[line->path]);
	if (line->since < 0)
		seq_puts(m, "-");
	else
		seq_printf(m, "%lld", line->since);
	if (line->family == AF_INET)
		seq_printf(m, " %pI4 %pI4", &line->saddr.a4, &line->daddr.a4);
	else
		seq_printf(m, " %pI6c %pI6c", line->saddr.a6, line->daddr.a6);
	seq_printf(m, " %u %u\n", line->proto, line->len);
}

int tn_clear_show(struct seq_file *m, void *unused)
{
	struct tn_port *port = m->private;
	struct tn_clear *clear = port->clear;
	struct line line;
	u64 i;

	/* Line by line, so that a long log never holds up the traffic. */
	for (i = 0; ; i++) {
		spin_lock_bh(&clear->lock);
		if (clear->lines > LOG_LINES && i < clear->lines - LOG_LINES)
			i = clear->lines - LOG_LINES;
		if (i >= clear->lines) {
			spin_unlock_bh(&clear->lock);
			return 0;
		}
		line = clear->line[i % LOG_LINES];
		spin_unlock_bh(&clear->lock);
		show_line(m, &line);
	}
}
