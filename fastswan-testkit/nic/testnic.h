/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * testnic: a NIC without hardware, for tests. Its ports come in pairs joined
 * back to back and do XFRM packet offload in software: policies, associations
 * and ESP are the port's work, and the stack and XDP see clear packets only.
 *
 * Out: stack or XDP -> frame -> policy -> association -> ESP -> the peer's queue
 * In:  queue -> ESP -> association -> policy -> XDP -> stack (with a secpath)
 *
 * Locking. The tables of a port are read under RCU and written under
 * port->table_lock. An association's lock guards its sequence number, window
 * and counters; it is a leaf: nothing else is taken and no cipher runs under
 * it. x->lock may be held around it (xdo_dev_state_update_stats), never the
 * other way round: the data path tells the kernel of a limit from a work item.
 * The log's lock is a leaf too. All of them are taken with bottom halves off.
 * The list of pairs is under a mutex of its own, taken before the RTNL.
 */
#ifndef TESTNIC_H
#define TESTNIC_H

#include <linux/bitmap.h>
#include <linux/etherdevice.h>
#include <linux/hashtable.h>
#include <linux/if_vlan.h>
#include <linux/netdevice.h>
#include <linux/ptr_ring.h>
#include <linux/seq_file.h>
#include <linux/version.h>
#include <linux/workqueue.h>
#include <net/xdp.h>
#include <net/xfrm.h>

/* What differs between 6.12 and 7.x. Keep all of it here. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 16, 0)
#define TN_STATE_ARGS(x)	struct net_device *xdo_dev, struct xfrm_state *x
#define TN_STATE_DEV(x)		xdo_dev
#else
#define TN_STATE_ARGS(x)	struct xfrm_state *x
#define TN_STATE_DEV(x)		((x)->xso.dev)
#endif

#define TN_QUEUE		4096	/* frames that wait at a port */
#define TN_WINDOW_MAX		256	/* packets, as in mlx5 */
#define TN_ICV			16
#define TN_ESP_HEAD		16	/* SPI, sequence number, IV */
#define TN_L2_MAX		(ETH_HLEN + 2 * VLAN_HLEN)
#define TN_MTU_MAX		9000

#define TN_COUNTERS(c) \
	c(TX_PLAIN, "tx_plain") c(TX_ESP, "tx_esp") c(TX_NO_SA, "tx_no_sa") \
	c(TX_FRAGMENT, "tx_fragment") c(TX_BLOCK, "tx_block") \
	c(TX_ERROR, "tx_error") c(TX_TOO_LONG, "tx_too_long") \
	c(TX_NO_CARRIER, "tx_no_carrier") \
	c(TX_UNCOVERED_XDP, "tx_uncovered_xdp") c(TX_LIMIT, "tx_limit") \
	c(CLEAR_NO_SA, "clear_no_sa") c(CLEAR_FRAGMENT, "clear_fragment") \
	c(CLEAR_REMOVED, "clear_removed") \
	c(RX_PLAIN, "rx_plain") c(RX_ESP, "rx_esp") c(RX_NO_SA, "rx_no_sa") \
	c(RX_BAD, "rx_bad") c(RX_REPLAY, "rx_replay") c(RX_LIMIT, "rx_limit") \
	c(RX_POLICY_DROP, "rx_policy_drop") c(RX_POLICY_LEAK, "rx_policy_leak") \
	c(RX_TOO_LONG, "rx_too_long") c(RX_DROPPED, "rx_dropped") \
	c(XDP_PASSED, "xdp_pass") c(XDP_DROPPED, "xdp_drop") \
	c(XDP_SENT, "xdp_tx") c(XDP_REDIRECTED, "xdp_redirect") \
	c(XDP_XMIT, "xdp_xmit") c(XDP_ERROR, "xdp_error")

enum tn_counter {
#define TN_ENUM(id, name) TN_##id,
	TN_COUNTERS(TN_ENUM)
#undef TN_ENUM
	TN_NR_COUNTERS
};

/* Where a frame comes from: the log of clear packets names it. */
enum tn_path { TN_PATH_STACK, TN_PATH_XDP };

enum tn_cause { TN_CAUSE_NO_SA, TN_CAUSE_FRAGMENT, TN_CAUSE_REMOVED };

/* A frame lies in pages of its own; this head sits in their first bytes, which
 * are XDP headroom, so it is gone once a program has run.
 */
struct tn_frame {
	u32 size;		/* of the whole buffer, in bytes */
	u32 start;		/* offset of the Ethernet header */
	u32 len;		/* from there */
};

/* What the NIC reads in a frame's headers. Addresses and ports are in network order. */
struct tn_flow {
	u16 family;
	u8 proto;
	bool fragment;
	bool extended;		/* IPv6 with extension headers */
	u8 l2len;
	u8 dsfield;
	u16 l3hlen;		/* without extension headers */
	u32 l3len;		/* as the header says, so without Ethernet padding */
	__be16 sport, dport;
	__be32 spi, seq;
	xfrm_address_t saddr, daddr;
};

/* By what an outbound policy finds its association. */
struct tn_sa_key {
	u32 reqid;
	u8 mode;
	u16 family;		/* of the outer addresses */
	xfrm_address_t saddr, daddr;
};

struct tn_port;
struct crypto_aead;

struct tn_sa {
	struct hlist_node node;
	struct rcu_work free;
	struct work_struct expire;
	struct tn_port *port;
	struct xfrm_state *x;	/* valid while the association is in the table */
	struct crypto_aead *aead;
	struct tn_sa_key key;
	__be32 spi;
	u8 dir;
	bool esn, linked;
	u16 window;
	u32 flags, extra_flags;	/* XFRM_STATE_*, XFRM_SA_XFLAG_* */
	u64 born;		/* larger is newer */

	spinlock_t lock;
	u64 seq;		/* out: last used, in: highest seen */
	DECLARE_BITMAP(seen, TN_WINDOW_MAX);
	u64 base;		/* packets before the port had it */
	u64 packets, bytes, replays, bad;
	time64_t used;		/* s, wall clock, of the last packet */
	u64 told_packets, told_bytes, told_replays, told_bad;
};

struct tn_policy {
	struct list_head node;
	struct rcu_head rcu;
	struct xfrm_policy *x;	/* valid while the policy is in the table */
	struct xfrm_selector sel;
	u8 dir, action;
	bool protects;		/* it has a template */
	u32 priority;
	struct tn_sa_key want;	/* zero addresses: any */

	spinlock_t lock;	/* counters */
	u64 packets, bytes;
};

struct tn_port {
	struct net_device *dev;
	struct tn_port *peer;
	char name[IFNAMSIZ];	/* at creation */
	struct dentry *dir;
	bool up, leak;

	struct napi_struct napi;
	struct ptr_ring queue;
	struct bpf_prog __rcu *prog;
	struct xdp_rxq_info rxq;
	atomic_t ip_id;

	spinlock_t table_lock;
	struct list_head policies;		/* by priority, then age */
	DECLARE_HASHTABLE(sas_out, 8);		/* by reqid */
	DECLARE_HASHTABLE(sas_in, 8);		/* by SPI */
	u64 births;

	struct tn_clear *clear;
	atomic64_t count[TN_NR_COUNTERS];
};

static inline void tn_count(struct tn_port *port, enum tn_counter which)
{
	atomic64_inc(&port->count[which]);
}

static inline u8 *tn_data(struct tn_frame *frame)
{
	return (u8 *)frame + frame->start;
}

/* frame.c */
struct tn_frame *tn_frame_alloc(unsigned int len);
struct tn_frame *tn_frame_from_bytes(const void *data, unsigned int len);
struct tn_frame *tn_frame_from_skb(const struct sk_buff *skb);
struct sk_buff *tn_frame_to_skb(void *buffer, unsigned int size, unsigned int start, unsigned int len);
void tn_frame_free(void *buffer);
bool tn_frame_tail(const struct tn_frame *frame, const u8 *end);
unsigned int tn_xdp_mtu(void);

/* port.c */
struct net_device *tn_port_alloc(const char *name, struct device *parent, int number);
void tn_port_free(struct net_device *dev);
int tn_stats_show(struct seq_file *m, void *unused);

/* match.c */
bool tn_parse(struct tn_frame *frame, struct tn_flow *flow);
bool tn_selects(const struct xfrm_selector *sel, const struct tn_flow *flow);
struct tn_policy *tn_policy_find(struct tn_port *port, u8 dir, const struct tn_flow *flow);
bool tn_sa_suits(const struct tn_sa_key *key, const struct tn_policy *policy,
		 const struct tn_flow *flow);
struct tn_sa *tn_sa_out(struct tn_port *port, const struct tn_policy *policy,
			const struct tn_flow *flow);
struct tn_sa *tn_sa_in(struct tn_port *port, const struct tn_flow *flow);

/* offload.c */
extern const struct xfrmdev_ops tn_xfrmdev_ops;
int tn_offload_init(void);
void tn_offload_exit(void);
void tn_sa_tell(struct tn_sa *sa);
void tn_policy_hit(struct tn_policy *policy, const struct tn_flow *flow);
int tn_associations_show(struct seq_file *m, void *unused);
int tn_policies_show(struct seq_file *m, void *unused);

/* esp.c */
int tn_encap(struct tn_port *port, struct tn_sa *sa, struct tn_frame *frame,
	     const struct tn_flow *flow);
int tn_decap(struct tn_port *port, struct tn_sa *sa, struct tn_frame *frame,
	     const struct tn_flow *flow);

/* clear.c */
struct tn_clear *tn_clear_alloc(void);
void tn_clear_free(struct tn_clear *clear);
void tn_clear_policy_removed(struct tn_port *port, const struct tn_policy *policy);
void tn_clear_sa_removed(struct tn_port *port, const struct tn_sa *sa);
bool tn_clear_removed(struct tn_port *port, const struct tn_flow *flow);
void tn_clear_note(struct tn_port *port, enum tn_cause cause, enum tn_path path,
		   const struct tn_policy *policy, const struct tn_flow *flow);
int tn_clear_show(struct seq_file *m, void *unused);

#endif
