// SPDX-License-Identifier: GPL-2.0-only
/*
 * The xfrmdev operations: which states and policies the NIC takes (the rules
 * of mlx5 in packet mode, each refusal with its reason), and its tables.
 */
#include <crypto/aead.h>
#include <linux/pfkeyv2.h>
#include "testnic.h"

/* Frees associations, and tells the kernel of limits: both need process context. */
static struct workqueue_struct *work;

#define REFUSE(extack, why) ({ NL_SET_ERR_MSG_MOD(extack, why); -EINVAL; })

static int check_cipher(const struct xfrm_state *x, struct netlink_ext_ack *extack)
{
	if (x->props.aalgo != SADB_AALG_NONE)
		return REFUSE(extack, "a separate authentication algorithm cannot be offloaded");
	if (x->props.ealgo != SADB_X_EALG_AES_GCM_ICV16 || !x->aead)
		return REFUSE(extack, "only AES-GCM with a 128 bit ICV can be offloaded");
	if (x->props.calgo != SADB_X_CALG_NONE)
		return REFUSE(extack, "compression cannot be offloaded");
	if (x->aead->alg_icv_len != 128)
		return REFUSE(extack, "the ICV must have 128 bits");
	if (x->aead->alg_key_len != 128 + 32 && x->aead->alg_key_len != 256 + 32)
		return REFUSE(extack, "the key must have 128 or 256 bits");
	if (!x->geniv || strcmp(x->geniv, "seqiv"))
		return REFUSE(extack, "the IV generator must be seqiv");
	return 0;
}

static int check_state(const struct xfrm_state *x, struct netlink_ext_ack *extack)
{
	const struct xfrm_lifetime_cfg *lft = &x->lft;
	int err;

	if (x->xso.type != XFRM_DEV_OFFLOAD_PACKET)
		return REFUSE(extack, "only packet offload is supported");
	if (x->id.proto != IPPROTO_ESP)
		return REFUSE(extack, "only ESP can be offloaded");
	if (x->props.family != AF_INET && x->props.family != AF_INET6)
		return REFUSE(extack, "only IPv4 and IPv6 can be offloaded");
	err = check_cipher(x, extack);
	if (err)
		return err;
	if (x->encap)
		return REFUSE(extack, "UDP encapsulation cannot be offloaded");
	if (x->tfcpad)
		return REFUSE(extack, "traffic flow padding cannot be offloaded");
	if (x->sel.proto != IPPROTO_IP && x->sel.proto != IPPROTO_TCP && x->sel.proto != IPPROTO_UDP)
		return REFUSE(extack, "the selector's protocol must be any, TCP or UDP");
	if (x->props.mode != XFRM_MODE_TUNNEL && x->props.mode != XFRM_MODE_TRANSPORT)
		return REFUSE(extack, "only tunnel and transport mode can be offloaded");
	if (x->xso.dir == XFRM_DEV_OFFLOAD_IN && x->replay_esn &&
	    x->replay_esn->replay_window != 32 && x->replay_esn->replay_window != 64 &&
	    x->replay_esn->replay_window != 128 && x->replay_esn->replay_window != 256)
		return REFUSE(extack, "the replay window must be 32, 64, 128 or 256 packets");
	if (!x->props.reqid)
		return REFUSE(extack, "a state without reqid cannot be offloaded");
	if (lft->hard_byte_limit != XFRM_INF || lft->soft_byte_limit != XFRM_INF)
		return REFUSE(extack, "limits in bytes cannot be offloaded");
	if (!lft->soft_packet_limit || !lft->hard_packet_limit)
		return REFUSE(extack, "a packet limit of 0 cannot be offloaded");
	if (lft->hard_packet_limit != XFRM_INF && lft->soft_packet_limit >= lft->hard_packet_limit)
		return REFUSE(extack, "the hard packet limit must be above the soft one");
	return 0;
}

/* The kernel reads the counters itself, through update_stats, and sends EXPIRE. */
static void expire(struct work_struct *w)
{
	struct tn_sa *sa = container_of(w, struct tn_sa, expire);
	struct xfrm_state *x = sa->x;

	spin_lock_bh(&x->lock);
	if (x->km.state == XFRM_STATE_VALID)
		xfrm_state_check_expire(x);
	spin_unlock_bh(&x->lock);
	xfrm_state_put(x);
}

/* A limit is reached. Called under RCU with the association in the table, or just taken out. */
void tn_sa_tell(struct tn_sa *sa)
{
	if (!refcount_inc_not_zero(&sa->x->refcnt))
		return;
	if (!queue_work(work, &sa->expire))
		xfrm_state_put(sa->x);
}

static struct crypto_aead *make_cipher(const struct xfrm_state *x, struct netlink_ext_ack *extack)
{
	struct crypto_aead *aead;
	int err;

	/* A synchronous one: it runs in softirq context and in place. */
	aead = crypto_alloc_aead("rfc4106(gcm(aes))", 0, CRYPTO_ALG_ASYNC);
	if (IS_ERR(aead)) {
		NL_SET_ERR_MSG_MOD(extack, "the kernel has no synchronous rfc4106(gcm(aes))");
		return aead;
	}
	err = crypto_aead_setkey(aead, x->aead->alg_key, (x->aead->alg_key_len + 7) / 8);
	if (!err)
		err = crypto_aead_setauthsize(aead, TN_ICV);
	if (err) {
		NL_SET_ERR_MSG_MOD(extack, "the cipher does not take this key");
		crypto_free_aead(aead);
		return ERR_PTR(err);
	}
	return aead;
}

static void set_sequence(struct tn_sa *sa, const struct xfrm_state *x)
{
	const struct xfrm_replay_state_esn *esn = x->replay_esn;
	bool out = sa->dir == XFRM_DEV_OFFLOAD_OUT;
	unsigned int i;

	if (!esn) {
		sa->seq = out ? x->replay.oseq : x->replay.seq;
		sa->window = x->props.replay_window;
	} else if (out) {
		sa->seq = (u64)esn->oseq_hi << 32 | esn->oseq;
	} else {
		sa->seq = (u64)esn->seq_hi << 32 | esn->seq;
		sa->window = min_t(u32, esn->replay_window, TN_WINDOW_MAX);
	}
	/* What came before the port had the state is not to come again. */
	if (!out)
		for (i = 0; i < TN_WINDOW_MAX && i <= sa->seq; i++)
			__set_bit((sa->seq - i) % TN_WINDOW_MAX, sa->seen);
}

static int state_add(TN_STATE_ARGS(x), struct netlink_ext_ack *extack)
{
	struct tn_port *port = netdev_priv(TN_STATE_DEV(x));
	struct tn_sa *sa;
	int err;

	/* A larval state of an ACQUIRE: the kernel waits for IKE, the NIC has nothing to do. */
	if (x->xso.flags & XFRM_DEV_OFFLOAD_FLAG_ACQ) {
		x->xso.offload_handle = 0;
		return 0;
	}
	err = check_state(x, extack);
	if (err)
		return err;
	sa = kzalloc(sizeof(*sa), GFP_KERNEL);
	if (!sa)
		return -ENOMEM;
	sa->aead = make_cipher(x, extack);
	if (IS_ERR(sa->aead)) {
		err = PTR_ERR(sa->aead);
		kfree(sa);
		return err;
	}
	spin_lock_init(&sa->lock);
	INIT_WORK(&sa->expire, expire);
	sa->port = port;
	sa->x = x;
	sa->key.reqid = x->props.reqid;
	sa->key.mode = x->props.mode;
	sa->key.family = x->props.family;
	sa->key.saddr = x->props.saddr;
	sa->key.daddr = x->id.daddr;
	sa->spi = x->id.spi;
	sa->dir = x->xso.dir;
	sa->esn = x->props.flags & XFRM_STATE_ESN;
	sa->flags = x->props.flags;
	sa->extra_flags = x->props.extra_flags;
	sa->base = x->curlft.packets;
	set_sequence(sa, x);
	x->xso.offload_handle = (unsigned long)sa;
	spin_lock_bh(&port->table_lock);
	sa->born = ++port->births;
	sa->linked = true;
	if (sa->dir == XFRM_DEV_OFFLOAD_OUT)
		hash_add_rcu(port->sas_out, &sa->node, sa->key.reqid);
	else
		hash_add_rcu(port->sas_in, &sa->node, (__force u32)sa->spi);
	spin_unlock_bh(&port->table_lock);
	return 0;
}

static void unlink_sa(struct tn_sa *sa)
{
	struct tn_port *port = sa->port;

	spin_lock_bh(&port->table_lock);
	if (sa->linked) {
		sa->linked = false;
		hash_del_rcu(&sa->node);
		tn_clear_sa_removed(port, sa);
	}
	spin_unlock_bh(&port->table_lock);
}

static void state_delete(TN_STATE_ARGS(x))
{
	struct tn_sa *sa = (void *)x->xso.offload_handle;

	if (sa)
		unlink_sa(sa);
}

static void free_sa(struct work_struct *w)
{
	struct tn_sa *sa = container_of(to_rcu_work(w), struct tn_sa, free);

	/* Readers are gone, so nothing queues it again. A queued one holds the state. */
	if (cancel_work_sync(&sa->expire))
		xfrm_state_put(sa->x);
	crypto_free_aead(sa->aead);
	kfree(sa);
}

static void state_free(TN_STATE_ARGS(x))
{
	struct tn_sa *sa = (void *)x->xso.offload_handle;

	if (!sa)
		return;
	x->xso.offload_handle = 0;
	unlink_sa(sa);
	INIT_RCU_WORK(&sa->free, free_sa);
	queue_rcu_work(work, &sa->free);
}

/* As mlx5: neither IPv4 options nor IPv6 extension headers. The kernel drops such a packet. */
static bool offload_ok(struct sk_buff *skb, struct xfrm_state *x)
{
	if (ip_hdr(skb)->version == 4)
		return ip_hdr(skb)->ihl == 5;
	return !ipv6_ext_hdr(ipv6_hdr(skb)->nexthdr);
}

/* The port counts in 64 bits; the kernel only asks for this before it offloads ESN. */
static void state_advance_esn(struct xfrm_state *x)
{
}

/* Called with x->lock held. */
static void state_update_stats(struct xfrm_state *x)
{
	struct tn_sa *sa = (void *)x->xso.offload_handle;

	if (!sa)
		return;
	spin_lock_bh(&sa->lock);
	x->curlft.packets += sa->packets - sa->told_packets;
	x->curlft.bytes += sa->bytes - sa->told_bytes;
	if (sa->used)
		WRITE_ONCE(x->lastused, sa->used);
	x->stats.replay += sa->replays - sa->told_replays;
	x->stats.integrity_failed += sa->bad - sa->told_bad;
	sa->told_packets = sa->packets;
	sa->told_bytes = sa->bytes;
	sa->told_replays = sa->replays;
	sa->told_bad = sa->bad;
	spin_unlock_bh(&sa->lock);
}

static bool is_zero(const xfrm_address_t *a)
{
	return !memchr_inv(a, 0, sizeof(*a));
}

static int check_policy(const struct xfrm_policy *x, struct netlink_ext_ack *extack)
{
	const struct xfrm_selector *sel = &x->selector;

	if (x->xdo.type != XFRM_DEV_OFFLOAD_PACKET)
		return REFUSE(extack, "only packet offload is supported");
	if (x->type != XFRM_POLICY_TYPE_MAIN)
		return REFUSE(extack, "only policies of the main type can be offloaded");
	if (x->xdo.dir != XFRM_DEV_OFFLOAD_IN && x->xdo.dir != XFRM_DEV_OFFLOAD_OUT)
		return REFUSE(extack, "forward policies cannot be offloaded");
	if (x->xfrm_nr > 1)
		return REFUSE(extack, "at most one template can be offloaded");
	if (sel->proto != IPPROTO_IP && sel->proto != IPPROTO_TCP && sel->proto != IPPROTO_UDP)
		return REFUSE(extack, "the selector's protocol must be any, TCP or UDP");
	if (!x->xfrm_vec[0].reqid && sel->proto == IPPROTO_IP && is_zero(&sel->saddr) &&
	    is_zero(&sel->daddr))
		return REFUSE(extack, "a policy without reqid needs a protocol or an address");
	if (x->priority == U32_MAX)
		return REFUSE(extack, "the lowest priority cannot be offloaded");
	return 0;
}

static int policy_add(struct xfrm_policy *x, struct netlink_ext_ack *extack)
{
	struct tn_port *port = netdev_priv(x->xdo.dev);
	const struct xfrm_tmpl *t = &x->xfrm_vec[0];
	struct tn_policy *policy, *other;
	int err;

	err = check_policy(x, extack);
	if (err)
		return err;
	policy = kzalloc(sizeof(*policy), GFP_KERNEL);
	if (!policy)
		return -ENOMEM;
	spin_lock_init(&policy->lock);
	policy->x = x;
	policy->sel = x->selector;
	if (!policy->sel.family)
		policy->sel.family = x->family;
	policy->dir = x->xdo.dir;
	policy->action = x->action;
	policy->priority = x->priority;
	policy->protects = x->xfrm_nr;
	if (x->xfrm_nr) {
		policy->want.reqid = t->reqid;
		policy->want.mode = t->mode;
		policy->want.family = t->encap_family;
		policy->want.saddr = t->saddr;
		policy->want.daddr = t->id.daddr;
	}
	x->xdo.offload_handle = (unsigned long)policy;
	spin_lock_bh(&port->table_lock);
	list_for_each_entry(other, &port->policies, node)
		if (other->priority > policy->priority)
			break;
	list_add_tail_rcu(&policy->node, &other->node);
	spin_unlock_bh(&port->table_lock);
	return 0;
}

static void policy_delete(struct xfrm_policy *x)
{
	struct tn_policy *policy = (void *)x->xdo.offload_handle;
	struct tn_port *port = netdev_priv(x->xdo.dev);

	spin_lock_bh(&port->table_lock);
	list_del_rcu(&policy->node);
	tn_clear_policy_removed(port, policy);
	spin_unlock_bh(&port->table_lock);
}

static void policy_free(struct xfrm_policy *x)
{
	struct tn_policy *policy = (void *)x->xdo.offload_handle;

	kfree_rcu(policy, rcu);
}

/* The kernel has no operation that asks for a policy's counters, so they are written into it. */
void tn_policy_hit(struct tn_policy *policy, const struct tn_flow *flow)
{
	struct xfrm_lifetime_cur *cur = &policy->x->curlft;

	spin_lock_bh(&policy->lock);
	policy->packets++;
	policy->bytes += flow->l3len;
	WRITE_ONCE(cur->packets, policy->packets);
	WRITE_ONCE(cur->bytes, policy->bytes);
	WRITE_ONCE(cur->use_time, ktime_get_real_seconds());
	spin_unlock_bh(&policy->lock);
}

const struct xfrmdev_ops tn_xfrmdev_ops = {
	.xdo_dev_state_add		= state_add,
	.xdo_dev_state_delete		= state_delete,
	.xdo_dev_state_free		= state_free,
	.xdo_dev_offload_ok		= offload_ok,
	.xdo_dev_state_advance_esn	= state_advance_esn,
	.xdo_dev_state_update_stats	= state_update_stats,
	.xdo_dev_policy_add		= policy_add,
	.xdo_dev_policy_delete		= policy_delete,
	.xdo_dev_policy_free		= policy_free,
};

int tn_offload_init(void)
{
	work = alloc_workqueue("testnic", WQ_UNBOUND, 0);
	return work ? 0 : -ENOMEM;
}

/* After the last port is gone. */
void tn_offload_exit(void)
{
	rcu_barrier();
	destroy_workqueue(work);
}

static void show_address(struct seq_file *m, const char *name, u16 family, const xfrm_address_t *a,
			 int prefix)
{
	if (family == AF_INET)
		seq_printf(m, " %s %pI4", name, &a->a4);
	else
		seq_printf(m, " %s %pI6c", name, a->a6);
	if (prefix >= 0)
		seq_printf(m, "/%d", prefix);
}

static const char *direction(u8 dir)
{
	return dir == XFRM_DEV_OFFLOAD_OUT ? "out" : "in";
}

static const char *mode(u8 mode)
{
	return mode == XFRM_MODE_TUNNEL ? "tunnel" : "transport";
}

static void show_sa(struct seq_file *m, struct tn_sa *sa)
{
	spin_lock_bh(&sa->lock);
	seq_printf(m, "dir %s spi 0x%08x mode %s reqid %u", direction(sa->dir), ntohl(sa->spi),
		   mode(sa->key.mode), sa->key.reqid);
	show_address(m, "src", sa->key.family, &sa->key.saddr, -1);
	show_address(m, "dst", sa->key.family, &sa->key.daddr, -1);
	seq_printf(m, " esn %u window %u seq %llu packets %llu bytes %llu replays %llu bad %llu\n",
		   sa->esn, sa->window, sa->seq, sa->packets, sa->bytes, sa->replays, sa->bad);
	spin_unlock_bh(&sa->lock);
}

int tn_associations_show(struct seq_file *m, void *unused)
{
	struct tn_port *port = m->private;
	struct tn_sa *sa;
	int bucket;

	rcu_read_lock();
	hash_for_each_rcu(port->sas_out, bucket, sa, node)
		show_sa(m, sa);
	hash_for_each_rcu(port->sas_in, bucket, sa, node)
		show_sa(m, sa);
	rcu_read_unlock();
	return 0;
}

int tn_policies_show(struct seq_file *m, void *unused)
{
	struct tn_port *port = m->private;
	struct tn_policy *policy;

	rcu_read_lock();
	list_for_each_entry_rcu(policy, &port->policies, node) {
		const struct xfrm_selector *sel = &policy->sel;

		seq_printf(m, "dir %s priority %u action %s", direction(policy->dir),
			   policy->priority, policy->action == XFRM_POLICY_ALLOW ? "allow" : "block");
		show_address(m, "src", sel->family, &sel->saddr, sel->prefixlen_s);
		show_address(m, "dst", sel->family, &sel->daddr, sel->prefixlen_d);
		seq_printf(m, " proto %u sport %u/%#x dport %u/%#x", sel->proto, ntohs(sel->sport),
			   ntohs(sel->sport_mask), ntohs(sel->dport), ntohs(sel->dport_mask));
		if (policy->protects)
			seq_printf(m, " mode %s reqid %u", mode(policy->want.mode), policy->want.reqid);
		spin_lock_bh(&policy->lock);
		seq_printf(m, " packets %llu bytes %llu\n", policy->packets, policy->bytes);
		spin_unlock_bh(&policy->lock);
	}
	rcu_read_unlock();
	return 0;
}
