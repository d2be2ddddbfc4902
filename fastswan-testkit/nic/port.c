// SPDX-License-Identifier: GPL-2.0-only
/*
 * A port: its net device, its queue with NAPI, XDP, and the way of a frame out
 * and in. Everything that touches a frame runs under RCU with bottom halves
 * off; closing a port clears @up, waits for that, and then empties the queue.
 */
#include <linux/bpf.h>
#include <linux/bpf_trace.h>
#include <linux/ethtool.h>
#include <linux/filter.h>
#include "testnic.h"

static void to_peer(struct tn_port *port, struct tn_frame *frame)
{
	struct tn_port *peer = port->peer;
	unsigned int len = frame->len;

	if (!READ_ONCE(peer->up)) {
		tn_count(port, TN_TX_NO_CARRIER);
		goto drop;
	}
	if (ptr_ring_produce_bh(&peer->queue, frame)) {
		tn_count(peer, TN_RX_DROPPED);
		dev_core_stats_rx_dropped_inc(peer->dev);
		tn_frame_free(frame);
		return;
	}
	dev_sw_netstats_tx_add(port->dev, 1, len);
	napi_schedule(&peer->napi);
	return;
drop:
	dev_core_stats_tx_dropped_inc(port->dev);
	tn_frame_free(frame);
}

static void count_encap(struct tn_port *port, int err)
{
	switch (err) {
	case 0:
		tn_count(port, TN_TX_ESP);
		break;
	case -EDQUOT:
		tn_count(port, TN_TX_LIMIT);
		break;
	case -EMSGSIZE:
		tn_count(port, TN_TX_TOO_LONG);
		break;
	default:
		tn_count(port, TN_TX_ERROR);
	}
}

/* What no policy covers: the stack may send it, XDP only if the port leaks. */
static bool may_leave_uncovered(struct tn_port *port, enum tn_path path, const struct tn_flow *flow)
{
	if (path == TN_PATH_STACK)
		return true;
	tn_count(port, TN_TX_UNCOVERED_XDP);
	if (!READ_ONCE(port->leak))
		return false;
	if (flow && tn_clear_removed(port, flow))
		tn_clear_note(port, TN_CAUSE_REMOVED, path, NULL, flow);
	return true;
}

/* Under a policy that cannot be followed: out in clear and noted, or dropped and counted. */
static bool may_leave_clear(struct tn_port *port, enum tn_cause cause, enum tn_path path,
			    const struct tn_policy *policy, const struct tn_flow *flow)
{
	tn_count(port, cause == TN_CAUSE_NO_SA ? TN_TX_NO_SA : TN_TX_FRAGMENT);
	if (!READ_ONCE(port->leak))
		return false;
	tn_clear_note(port, cause, path, policy, flow);
	return true;
}

/* Whether the frame, as it now is, may leave. */
static bool process_out(struct tn_port *port, struct tn_frame *frame, enum tn_path path)
{
	struct tn_policy *policy;
	struct tn_flow flow;
	struct tn_sa *sa;
	int err;

	if (!tn_parse(frame, &flow)) {
		if (!may_leave_uncovered(port, path, NULL))
			return false;
		goto plain;
	}
	policy = tn_policy_find(port, XFRM_DEV_OFFLOAD_OUT, &flow);
	if (!policy) {
		if (!may_leave_uncovered(port, path, &flow))
			return false;
		goto plain;
	}
	tn_policy_hit(policy, &flow);
	if (policy->action == XFRM_POLICY_ALLOW && !policy->protects)
		goto plain;
	if (flow.fragment) {
		if (!may_leave_clear(port, TN_CAUSE_FRAGMENT, path, policy, &flow))
			return false;
		goto plain;
	}
	if (policy->action != XFRM_POLICY_ALLOW) {
		tn_count(port, TN_TX_BLOCK);
		return false;
	}
	sa = tn_sa_out(port, policy, &flow);
	if (!sa) {
		if (!may_leave_clear(port, TN_CAUSE_NO_SA, path, policy, &flow))
			return false;
		goto plain;
	}
	err = tn_encap(port, sa, frame, &flow);
	count_encap(port, err);
	return !err;
plain:
	tn_count(port, TN_TX_PLAIN);
	return true;
}

/* Takes the frame. */
static void transmit(struct tn_port *port, struct tn_frame *frame, enum tn_path path)
{
	if (process_out(port, frame, path)) {
		to_peer(port, frame);
	} else {
		dev_core_stats_tx_dropped_inc(port->dev);
		tn_frame_free(frame);
	}
}

/*
 * Under an offloaded tunnel the kernel does not write the Ethernet header of a
 * forwarded packet (xfrm_dev_direct_output): what stands there is left over.
 */
static void restore_type(struct tn_frame *frame, const struct sk_buff *skb)
{
	struct ethhdr *eth = (void *)tn_data(frame);

	if (skb->protocol == htons(ETH_P_IP) || skb->protocol == htons(ETH_P_IPV6))
		eth->h_proto = skb->protocol;
}

static netdev_tx_t start_xmit(struct sk_buff *skb, struct net_device *dev)
{
	struct tn_port *port = netdev_priv(dev);
	struct tn_frame *frame = NULL;

	/* No segmentation is announced, so the stack has done it; checksums are left to the NIC. */
	if (!skb_is_gso(skb) && skb->len >= ETH_HLEN &&
	    !(skb->ip_summed == CHECKSUM_PARTIAL && skb_checksum_help(skb)))
		frame = tn_frame_from_skb(skb);
	if (!frame) {
		tn_count(port, TN_TX_ERROR);
		dev_core_stats_tx_dropped_inc(dev);
		dev_kfree_skb_any(skb);
		return NETDEV_TX_OK;
	}
	restore_type(frame, skb);
	skb_tx_timestamp(skb);
	rcu_read_lock();
	transmit(port, frame, TN_PATH_STACK);
	rcu_read_unlock();
	dev_consume_skb_any(skb);
	return NETDEV_TX_OK;
}

static bool transmit_xdp(struct tn_port *port, const void *data, unsigned int len)
{
	struct tn_frame *frame;

	if (len < ETH_HLEN)
		return false;
	frame = tn_frame_from_bytes(data, len);
	if (!frame)
		return false;
	transmit(port, frame, TN_PATH_XDP);
	return true;
}

/* The number of frames taken; the caller frees the others. */
static int xdp_xmit(struct net_device *dev, int n, struct xdp_frame **frames, u32 flags)
{
	struct tn_port *port = netdev_priv(dev);
	int i;

	if (unlikely(flags & ~XDP_XMIT_FLAGS_MASK))
		return -EINVAL;
	rcu_read_lock();
	if (!READ_ONCE(port->up)) {
		rcu_read_unlock();
		return -ENETDOWN;
	}
	for (i = 0; i < n; i++) {
		struct xdp_frame *frame = frames[i];

		if (xdp_frame_has_frags(frame) || !transmit_xdp(port, frame->data, frame->len)) {
			tn_count(port, TN_XDP_ERROR);
			break;
		}
		tn_count(port, TN_XDP_XMIT);
		xdp_return_frame_rx_napi(frame);
	}
	rcu_read_unlock();
	return i;
}

/* What the program makes of the frame: a socket buffer to pass on, or NULL. Takes the frame. */
static struct sk_buff *run_program(struct tn_port *port, struct bpf_prog *prog,
				   struct tn_frame *frame, bool *redirected)
{
	unsigned int size = frame->size, meta;
	void *buffer = frame;
	struct sk_buff *skb;
	struct xdp_buff xdp;
	u32 act;

	xdp_init_buff(&xdp, size, &port->rxq);
	xdp_prepare_buff(&xdp, buffer, frame->start, frame->len, true);
	act = bpf_prog_run_xdp(prog, &xdp);
	switch (act) {
	case XDP_PASS:
		tn_count(port, TN_XDP_PASSED);
		meta = xdp.data - xdp.data_meta;
		skb = tn_frame_to_skb(buffer, size, xdp.data - buffer, xdp.data_end - xdp.data);
		if (skb && meta)
			skb_metadata_set(skb, meta);
		return skb;
	case XDP_TX:
		if (transmit_xdp(port, xdp.data, xdp.data_end - xdp.data))
			tn_count(port, TN_XDP_SENT);
		else
			tn_count(port, TN_XDP_ERROR);
		break;
	case XDP_REDIRECT:
		if (!xdp_do_redirect(port->dev, &xdp, prog)) {
			tn_count(port, TN_XDP_REDIRECTED);
			*redirected = true;
			return NULL;
		}
		tn_count(port, TN_XDP_ERROR);
		trace_xdp_exception(port->dev, prog, act);
		break;
	default:
		bpf_warn_invalid_xdp_action(port->dev, prog, act);
		fallthrough;
	case XDP_ABORTED:
		trace_xdp_exception(port->dev, prog, act);
		fallthrough;
	case XDP_DROP:
		tn_count(port, TN_XDP_DROPPED);
		break;
	}
	tn_frame_free(buffer);
	return NULL;
}

/* Tells the stack that the NIC has decrypted and checked the packet. */
static bool mark_decrypted(struct sk_buff *skb, struct xfrm_state *x)
{
	struct sec_path *sp = secpath_set(skb);
	struct xfrm_offload *xo;

	if (!sp)
		return false;
	xfrm_state_hold(x);
	sp->xvec[sp->len++] = x;
	sp->olen++;
	xo = xfrm_offload(skb);
	xo->flags = CRYPTO_DONE;
	xo->status = CRYPTO_SUCCESS;
	return true;
}

static bool decrypt(struct tn_port *port, struct tn_sa *sa, struct tn_frame *frame,
		    struct tn_flow *flow)
{
	switch (tn_decap(port, sa, frame, flow)) {
	case 0:
		if (tn_parse(frame, flow)) {
			tn_count(port, TN_RX_ESP);
			return true;
		}
		fallthrough;
	default:
		tn_count(port, TN_RX_BAD);
		return false;
	case -EALREADY:
		tn_count(port, TN_RX_REPLAY);
		return false;
	case -EDQUOT:
		tn_count(port, TN_RX_LIMIT);
		return false;
	}
}

/*
 * The inbound policies. After decryption the association must be one of the
 * policy's. A clear packet under a policy is dropped, or passes if the port
 * leaks: real hardware lets only ESP into its tables.
 */
static bool inbound_allowed(struct tn_port *port, const struct tn_sa *sa, const struct tn_flow *flow)
{
	struct tn_policy *policy = tn_policy_find(port, XFRM_DEV_OFFLOAD_IN, flow);

	if (!policy)
		return true;
	tn_policy_hit(policy, flow);
	if (policy->action == XFRM_POLICY_ALLOW) {
		if (!policy->protects)
			return true;
		if (sa && (!policy->want.reqid || policy->want.reqid == sa->key.reqid))
			return true;
	}
	if (!sa && READ_ONCE(port->leak)) {
		tn_count(port, TN_RX_POLICY_LEAK);
		return true;
	}
	tn_count(port, TN_RX_POLICY_DROP);
	return false;
}

/* The state that decrypted the frame is returned in @x, referenced; in @esp whether it still is ESP. */
static bool process_in(struct tn_port *port, struct tn_frame *frame, struct xfrm_state **x, bool *esp)
{
	struct tn_flow flow;
	struct tn_sa *sa;

	if (!tn_parse(frame, &flow)) {
		tn_count(port, TN_RX_PLAIN);
		return true;
	}
	if (flow.proto != IPPROTO_ESP) {
		tn_count(port, TN_RX_PLAIN);
		return inbound_allowed(port, NULL, &flow);
	}
	sa = tn_sa_in(port, &flow);
	if (!sa) {
		tn_count(port, TN_RX_NO_SA);
		*esp = true;
		return true;
	}
	if (!decrypt(port, sa, frame, &flow) || !inbound_allowed(port, sa, &flow))
		return false;
	if (!refcount_inc_not_zero(&sa->x->refcnt))
		return false;
	*x = sa->x;
	return true;
}

static struct sk_buff *to_stack(struct tn_port *port, struct tn_frame *frame, bool *redirected)
{
	struct bpf_prog *prog = rcu_dereference(port->prog);

	if (!prog)
		return tn_frame_to_skb(frame, frame->size, frame->start, frame->len);
	if (frame->size > PAGE_SIZE) {
		tn_count(port, TN_XDP_ERROR);
		tn_frame_free(frame);
		return NULL;
	}
	return run_program(port, prog, frame, redirected);
}

/* Takes the frame. */
static void receive(struct tn_port *port, struct tn_frame *frame, bool *redirected)
{
	struct xfrm_state *x = NULL;
	struct sk_buff *skb;
	bool esp = false;

	if (frame->len > READ_ONCE(port->dev->mtu) + TN_L2_MAX) {
		tn_count(port, TN_RX_TOO_LONG);
		goto drop;
	}
	if (!process_in(port, frame, &x, &esp))
		goto drop;
	dev_sw_netstats_rx_add(port->dev, frame->len);
	skb = to_stack(port, frame, redirected);
	if (!skb)
		goto out;
	if (skb->len < ETH_HLEN || (x && !mark_decrypted(skb, x))) {
		kfree_skb(skb);
		goto out;
	}
	skb->protocol = eth_type_trans(skb, port->dev);
	/* GRO would decrypt it (esp4_offload) before a capture sees what was on the wire. */
	if (esp)
		netif_receive_skb(skb);
	else
		napi_gro_receive(&port->napi, skb);
out:
	if (x)
		xfrm_state_put(x);
	return;
drop:
	dev_core_stats_rx_dropped_inc(port->dev);
	tn_frame_free(frame);
}

static int poll(struct napi_struct *napi, int budget)
{
	struct tn_port *port = container_of(napi, struct tn_port, napi);
	bool redirected = false;
	struct tn_frame *frame;
	int done = 0;

	rcu_read_lock();
	while (done < budget && (frame = ptr_ring_consume_bh(&port->queue))) {
		receive(port, frame, &redirected);
		done++;
	}
	rcu_read_unlock();
	if (redirected)
		xdp_do_flush();
	/* A frame may have come after the last look and before the poll was over. */
	if (done < budget && napi_complete_done(napi, done) && !ptr_ring_empty_bh(&port->queue))
		napi_schedule(napi);
	return done;
}

/* There is a carrier only if both ends are up. */
static void update_carrier(struct tn_port *port)
{
	struct tn_port *peer = port->peer;

	if (READ_ONCE(port->up) && READ_ONCE(peer->up)) {
		netif_carrier_on(port->dev);
		netif_carrier_on(peer->dev);
	} else {
		netif_carrier_off(port->dev);
		netif_carrier_off(peer->dev);
	}
}

static int port_open(struct net_device *dev)
{
	struct tn_port *port = netdev_priv(dev);
	int err;

	err = xdp_rxq_info_reg(&port->rxq, dev, 0, 0);
	if (err)
		return err;
	err = xdp_rxq_info_reg_mem_model(&port->rxq, MEM_TYPE_PAGE_SHARED, NULL);
	if (err) {
		xdp_rxq_info_unreg(&port->rxq);
		return err;
	}
	napi_enable(&port->napi);
	WRITE_ONCE(port->up, true);
	netif_start_queue(dev);
	update_carrier(port);
	return 0;
}

static int port_stop(struct net_device *dev)
{
	struct tn_port *port = netdev_priv(dev);
	struct tn_frame *frame;

	WRITE_ONCE(port->up, false);
	netif_stop_queue(dev);
	update_carrier(port);
	synchronize_net();
	napi_disable(&port->napi);
	while ((frame = ptr_ring_consume_bh(&port->queue)))
		tn_frame_free(frame);
	xdp_rxq_info_unreg(&port->rxq);
	return 0;
}

static int port_change_mtu(struct net_device *dev, int mtu)
{
	struct tn_port *port = netdev_priv(dev);

	if (rtnl_dereference(port->prog) && mtu > tn_xdp_mtu()) {
		netdev_info(dev, "with an XDP program the MTU is at most %u\n", tn_xdp_mtu());
		return -EINVAL;
	}
	WRITE_ONCE(dev->mtu, mtu);
	return 0;
}

static int port_bpf(struct net_device *dev, struct netdev_bpf *bpf)
{
	struct tn_port *port = netdev_priv(dev);
	struct bpf_prog *old;

	if (bpf->command != XDP_SETUP_PROG)
		return -EINVAL;
	if (bpf->prog && dev->mtu > tn_xdp_mtu()) {
		NL_SET_ERR_MSG_MOD(bpf->extack, "the MTU is too large for XDP buffers");
		return -EINVAL;
	}
	old = rtnl_dereference(port->prog);
	rcu_assign_pointer(port->prog, bpf->prog);
	if (old)
		bpf_prog_put(old);
	return 0;
}

static const struct net_device_ops port_ops = {
	.ndo_open		= port_open,
	.ndo_stop		= port_stop,
	.ndo_start_xmit		= start_xmit,
	.ndo_change_mtu		= port_change_mtu,
	.ndo_set_mac_address	= eth_mac_addr,
	.ndo_validate_addr	= eth_validate_addr,
	.ndo_bpf		= port_bpf,
	.ndo_xdp_xmit		= xdp_xmit,
};

static void get_drvinfo(struct net_device *dev, struct ethtool_drvinfo *info)
{
	strscpy(info->driver, KBUILD_MODNAME, sizeof(info->driver));
	if (dev->dev.parent)
		strscpy(info->bus_info, dev_name(dev->dev.parent), sizeof(info->bus_info));
}

static const struct ethtool_ops port_ethtool_ops = {
	.get_drvinfo	= get_drvinfo,
	.get_link	= ethtool_op_get_link,
};

static void setup(struct net_device *dev)
{
	ether_setup(dev);
	dev->netdev_ops = &port_ops;
	dev->ethtool_ops = &port_ethtool_ops;
	dev->xfrmdev_ops = &tn_xfrmdev_ops;
	dev->max_mtu = TN_MTU_MAX;
	dev->features = NETIF_F_HW_ESP | NETIF_F_HW_CSUM | NETIF_F_SG;
	dev->hw_features = dev->features;
	dev->hw_enc_features = dev->features;
	dev->vlan_features = NETIF_F_HW_CSUM | NETIF_F_SG;
	dev->pcpu_stat_type = NETDEV_PCPU_STAT_TSTATS;
	dev->xdp_features = NETDEV_XDP_ACT_BASIC | NETDEV_XDP_ACT_REDIRECT |
			    NETDEV_XDP_ACT_NDO_XMIT;
	eth_hw_addr_random(dev);
}

struct net_device *tn_port_alloc(const char *name, struct device *parent, int number)
{
	struct net_device *dev;
	struct tn_port *port;

	dev = alloc_netdev(sizeof(*port), name, NET_NAME_USER, setup);
	if (!dev)
		return NULL;
	SET_NETDEV_DEV(dev, parent);
	dev->dev_port = number;
	port = netdev_priv(dev);
	port->dev = dev;
	strscpy(port->name, name, sizeof(port->name));
	spin_lock_init(&port->table_lock);
	INIT_LIST_HEAD(&port->policies);
	hash_init(port->sas_out);
	hash_init(port->sas_in);
	port->clear = tn_clear_alloc();
	if (!port->clear)
		goto no_clear;
	if (ptr_ring_init(&port->queue, TN_QUEUE, GFP_KERNEL))
		goto no_queue;
	netif_napi_add(dev, &port->napi, poll);
	netif_carrier_off(dev);
	return dev;
no_queue:
	tn_clear_free(port->clear);
no_clear:
	free_netdev(dev);
	return NULL;
}

/* After it is unregistered, or instead of being registered. */
void tn_port_free(struct net_device *dev)
{
	struct tn_port *port = netdev_priv(dev);

	ptr_ring_cleanup(&port->queue, tn_frame_free);
	tn_clear_free(port->clear);
	free_netdev(dev);
}

int tn_stats_show(struct seq_file *m, void *unused)
{
	static const char * const names[] = {
#define TN_NAME(id, name) name,
		TN_COUNTERS(TN_NAME)
#undef TN_NAME
	};
	struct tn_port *port = m->private;
	int i;

	for (i = 0; i < TN_NR_COUNTERS; i++)
		seq_printf(m, "%s %lld\n", names[i], (long long)atomic64_read(&port->count[i]));
	return 0;
}
