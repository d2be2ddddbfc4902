// SPDX-License-Identifier: GPL-2.0-only
/*
 * ESP (RFC 4303) with AES-GCM (RFC 4106), in place in the frame. Headers of a
 * tunnel are made as the kernel's own tunnel mode makes them: DSCP and ECN as
 * RFC 6040 and the state's flags say, DF copied from IPv4 and set for IPv6.
 */
#include <crypto/aead.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/scatterlist.h>
#include <linux/unaligned.h>
#include <net/dsfield.h>
#include <net/inet_ecn.h>
#include <net/ip.h>
#include <net/ipv6.h>
#include "testnic.h"

#define OUTER_TTL	64

/* At @data: ciphertext of @len bytes with its ICV to decrypt, or clear text of @len to encrypt. */
static int run_cipher(struct tn_sa *sa, bool encrypt, u64 seq, const u8 *iv, u8 *data,
		      unsigned int len)
{
	unsigned int aad_len = sa->esn ? 20 : 16;
	struct {
		u8 aad[20], iv[8];
	} *side;
	struct aead_request *req;
	struct scatterlist sg[2];
	int err = -ENOMEM;
	u8 *at;

	side = kmalloc(sizeof(*side), GFP_ATOMIC);
	if (!side)
		return err;
	req = aead_request_alloc(sa->aead, GFP_ATOMIC);
	if (!req)
		goto out;
	memcpy(side->aad, &sa->spi, 4);
	at = side->aad + 4;
	if (sa->esn) {
		put_unaligned_be32(seq >> 32, at);
		at += 4;
	}
	put_unaligned_be32((u32)seq, at);
	memcpy(at + 4, iv, 8);
	memcpy(side->iv, iv, 8);
	sg_init_table(sg, 2);
	sg_set_buf(&sg[0], side->aad, aad_len);
	sg_set_buf(&sg[1], data, len + (encrypt ? TN_ICV : 0));
	aead_request_set_callback(req, 0, NULL, NULL);
	aead_request_set_ad(req, aad_len);
	aead_request_set_crypt(req, sg, sg, len, side->iv);
	err = encrypt ? crypto_aead_encrypt(req) : crypto_aead_decrypt(req);
	aead_request_free(req);
out:
	kfree(side);
	return err;
}

static u8 outer_dsfield(const struct tn_sa *sa, u8 inner)
{
	u8 ds = sa->extra_flags & XFRM_SA_XFLAG_DONT_ENCAP_DSCP ? 0 : inner;

	ds = INET_ECN_encapsulate(ds, inner);
	if (sa->flags & XFRM_STATE_NOECN)
		ds &= ~INET_ECN_MASK;
	return ds;
}

static void outer_ipv4(struct tn_port *port, const struct tn_sa *sa, u8 *at, const u8 *inner,
		       const struct tn_flow *flow, unsigned int len)
{
	struct iphdr *ip = (void *)at;

	memset(ip, 0, sizeof(*ip));
	ip->version = 4;
	ip->ihl = 5;
	ip->tos = outer_dsfield(sa, flow->dsfield);
	ip->tot_len = htons(len);
	if (sa->flags & XFRM_STATE_NOPMTUDISC)
		ip->frag_off = 0;
	else if (flow->family == AF_INET)
		ip->frag_off = ((const struct iphdr *)inner)->frag_off & htons(IP_DF);
	else
		ip->frag_off = htons(IP_DF);
	/* A packet that may be cut on its way needs an identification (RFC 6864). */
	if (!ip->frag_off)
		ip->id = htons(atomic_inc_return(&port->ip_id));
	ip->ttl = OUTER_TTL;
	ip->protocol = IPPROTO_ESP;
	ip->saddr = sa->key.saddr.a4;
	ip->daddr = sa->key.daddr.a4;
	ip->check = ip_fast_csum(at, ip->ihl);
}

static void outer_ipv6(const struct tn_sa *sa, u8 *at, const u8 *inner, const struct tn_flow *flow,
		       unsigned int payload)
{
	struct ipv6hdr *ip = (void *)at;
	__be32 label = 0;

	if (flow->family == AF_INET6)
		label = ip6_flowlabel((const struct ipv6hdr *)inner);
	memset(ip, 0, sizeof(*ip));
	ip6_flow_hdr(ip, outer_dsfield(sa, flow->dsfield), label);
	ip->payload_len = htons(payload);
	ip->nexthdr = IPPROTO_ESP;
	ip->hop_limit = OUTER_TTL;
	memcpy(&ip->saddr, sa->key.saddr.a6, 16);
	memcpy(&ip->daddr, sa->key.daddr.a6, 16);
}

/* The header keeps its length; what it carries is now @proto of @payload bytes. */
static void carry(u8 *l3, const struct tn_flow *flow, u8 proto, unsigned int payload)
{
	if (flow->family == AF_INET) {
		struct iphdr *ip = (void *)l3;

		ip->protocol = proto;
		ip->tot_len = htons(flow->l3hlen + payload);
		ip->check = 0;
		ip->check = ip_fast_csum(l3, ip->ihl);
	} else {
		struct ipv6hdr *ip = (void *)l3;

		ip->nexthdr = proto;
		ip->payload_len = htons(payload);
	}
}

/* Takes a sequence number, unless the limit is reached: -EDQUOT. */
static int take_seq(struct tn_sa *sa, const struct tn_flow *flow, u64 *seq)
{
	u64 hard = READ_ONCE(sa->x->lft.hard_packet_limit);
	u64 soft = READ_ONCE(sa->x->lft.soft_packet_limit);
	bool tell = false;
	int err = 0;
	u64 used;

	spin_lock_bh(&sa->lock);
	used = sa->base + sa->packets;
	if (used >= hard) {
		err = -EDQUOT;
		tell = true;
	} else if (!sa->esn && sa->seq >= U32_MAX) {
		err = -EOVERFLOW;
	} else {
		*seq = ++sa->seq;
		sa->packets++;
		sa->bytes += flow->l3len;
		sa->used = ktime_get_real_seconds();
		tell = used + 1 == soft || used + 1 == hard;
	}
	spin_unlock_bh(&sa->lock);
	if (tell)
		tn_sa_tell(sa);
	return err;
}

/*
 * 0: the frame is ESP now. -EDQUOT: beyond the packet limit. -EMSGSIZE: longer
 * than the port's MTU. Anything else: could not be done.
 */
int tn_encap(struct tn_port *port, struct tn_sa *sa, struct tn_frame *frame,
	     const struct tn_flow *flow)
{
	bool tunnel = sa->key.mode == XFRM_MODE_TUNNEL;
	unsigned int outer = tunnel ? (sa->key.family == AF_INET ? sizeof(struct iphdr) :
				       sizeof(struct ipv6hdr)) : flow->l3hlen;
	unsigned int kept = tunnel ? 0 : flow->l3hlen;
	unsigned int clear_len = flow->l3len - kept;
	unsigned int pad = ALIGN(clear_len + 2, 4) - clear_len - 2;
	unsigned int esp_len = TN_ESP_HEAD + clear_len + pad + 2 + TN_ICV;
	u8 *l2 = tn_data(frame), *l3 = l2 + flow->l2len, *clear = l3 + kept;
	u8 *end = clear + clear_len, *esp = clear - TN_ESP_HEAD, *header = esp - outer;
	u8 proto = flow->proto;
	unsigned int i;
	u64 seq;
	int err;

	if (!tunnel && flow->extended)
		return -EPROTONOSUPPORT;
	if (outer + esp_len > READ_ONCE(port->dev->mtu))
		return -EMSGSIZE;
	if (frame->start < outer + TN_ESP_HEAD + XDP_PACKET_HEADROOM - kept ||
	    !tn_frame_tail(frame, end + pad + 2 + TN_ICV))
		return -ENOBUFS;
	err = take_seq(sa, flow, &seq);
	if (err)
		return err;

	memmove(header - flow->l2len, l2, flow->l2len + kept);
	if (tunnel) {
		struct ethhdr *eth = (void *)(header - flow->l2len);
		__be16 *type = (__be16 *)(header - 2);

		/* The NIC knows the way to the tunnel's end; on this wire it is the peer. */
		ether_addr_copy(eth->h_dest, port->peer->dev->dev_addr);
		ether_addr_copy(eth->h_source, port->dev->dev_addr);
		*type = sa->key.family == AF_INET ? htons(ETH_P_IP) : htons(ETH_P_IPV6);
		proto = flow->family == AF_INET ? IPPROTO_IPIP : IPPROTO_IPV6;
		if (sa->key.family == AF_INET)
			outer_ipv4(port, sa, header, l3, flow, outer + esp_len);
		else
			outer_ipv6(sa, header, l3, flow, esp_len);
	} else {
		carry(header, flow, IPPROTO_ESP, esp_len);
	}
	memcpy(esp, &sa->spi, 4);
	put_unaligned_be32((u32)seq, esp + 4);
	put_unaligned_be64(seq, esp + 8);
	for (i = 0; i < pad; i++)
		end[i] = i + 1;
	end[pad] = pad;
	end[pad + 1] = proto;
	err = run_cipher(sa, true, seq, esp + 8, clear, clear_len + pad + 2);
	if (err)
		return err;
	frame->start = header - flow->l2len - (u8 *)frame;
	frame->len = flow->l2len + outer + esp_len;
	return 0;
}

/* RFC 4303 appendix A2.2: the high half that the window implies. */
static u64 whole_seq(const struct tn_sa *sa, u32 low)
{
	u32 window = max_t(u32, sa->window, 1);
	u32 top = (u32)sa->seq, high = sa->seq >> 32, bottom = top - window + 1;

	if (!sa->esn)
		return low;
	if (top >= window - 1)
		high += low < bottom;
	else
		high -= low >= bottom;
	return (u64)high << 32 | low;
}

static bool seq_is_new(const struct tn_sa *sa, u64 seq)
{
	if (!sa->window)
		return true;
	if (!seq)
		return false;
	if (seq > sa->seq)
		return true;
	return sa->seq - seq < sa->window && !test_bit(seq % TN_WINDOW_MAX, sa->seen);
}

static void seq_seen(struct tn_sa *sa, u64 seq)
{
	u64 skipped;

	if (seq > sa->seq) {
		if (seq - sa->seq >= TN_WINDOW_MAX)
			bitmap_zero(sa->seen, TN_WINDOW_MAX);
		else
			for (skipped = sa->seq + 1; skipped < seq; skipped++)
				__clear_bit(skipped % TN_WINDOW_MAX, sa->seen);
		sa->seq = seq;
	}
	__set_bit(seq % TN_WINDOW_MAX, sa->seen);
}

/* -EALREADY: seen before or too old. -EDQUOT: beyond the packet limit. */
static int accept(struct tn_sa *sa, u64 seq, unsigned int len)
{
	u64 hard = READ_ONCE(sa->x->lft.hard_packet_limit);
	u64 soft = READ_ONCE(sa->x->lft.soft_packet_limit);
	bool tell = false;
	int err = 0;
	u64 used;

	spin_lock_bh(&sa->lock);
	used = sa->base + sa->packets;
	if (!seq_is_new(sa, seq)) {
		sa->replays++;
		err = -EALREADY;
	} else if (used >= hard) {
		err = -EDQUOT;
		tell = true;
	} else {
		seq_seen(sa, seq);
		sa->packets++;
		sa->bytes += len;
		sa->used = ktime_get_real_seconds();
		tell = used + 1 == soft || used + 1 == hard;
	}
	spin_unlock_bh(&sa->lock);
	if (tell)
		tn_sa_tell(sa);
	return err;
}

/* RFC 6040: congestion met by the outer header is the inner packet's. */
static void inner_dsfield(const struct tn_sa *sa, u8 *inner, u8 proto, u8 outer)
{
	u8 ds;

	if (proto == IPPROTO_IPIP) {
		struct iphdr *ip = (void *)inner;

		if (sa->flags & XFRM_STATE_DECAP_DSCP)
			ipv4_change_dsfield(ip, INET_ECN_MASK, outer & ~INET_ECN_MASK);
		if (!(sa->flags & XFRM_STATE_NOECN) && INET_ECN_is_ce(outer))
			IP_ECN_set_ce(ip);
	} else {
		struct ipv6hdr *ip = (void *)inner;

		if (sa->flags & XFRM_STATE_DECAP_DSCP)
			ipv6_change_dsfield(ip, INET_ECN_MASK, outer & ~INET_ECN_MASK);
		ds = ipv6_get_dsfield(ip);
		if (!(sa->flags & XFRM_STATE_NOECN) && INET_ECN_is_ce(outer) &&
		    !INET_ECN_is_not_ect(ds))
			ipv6_change_dsfield(ip, (u8)~INET_ECN_MASK, INET_ECN_CE);
	}
}

static void count_bad(struct tn_sa *sa)
{
	spin_lock_bh(&sa->lock);
	sa->bad++;
	spin_unlock_bh(&sa->lock);
}

/* 0: the frame is clear now. -EALREADY and -EDQUOT as above; anything else: not to be trusted. */
int tn_decap(struct tn_port *port, struct tn_sa *sa, struct tn_frame *frame,
	     const struct tn_flow *flow)
{
	u8 *l2 = tn_data(frame), *l3 = l2 + flow->l2len, *esp = l3 + flow->l3hlen;
	u8 *clear = esp + TN_ESP_HEAD, *start;
	unsigned int len = flow->l3len - flow->l3hlen, clear_len, pad;
	bool fresh;
	u8 proto;
	u64 seq;
	int err;

	if (len < TN_ESP_HEAD + 4 + TN_ICV || len % 4)
		return -EINVAL;
	len -= TN_ESP_HEAD;
	spin_lock_bh(&sa->lock);
	seq = whole_seq(sa, ntohl(flow->seq));
	fresh = seq_is_new(sa, seq);
	if (!fresh)
		sa->replays++;
	spin_unlock_bh(&sa->lock);
	if (!fresh)
		return -EALREADY;

	err = run_cipher(sa, false, seq, esp + 8, clear, len);
	if (err) {
		if (err == -EBADMSG)
			count_bad(sa);
		return err;
	}
	len -= TN_ICV;
	pad = clear[len - 2];
	proto = clear[len - 1];
	if (pad + 2 > len)
		return -EINVAL;
	clear_len = len - pad - 2;
	/* Only now is the packet known to be genuine: it may move the window. */
	err = accept(sa, seq, sa->key.mode == XFRM_MODE_TUNNEL ? clear_len :
		     flow->l3hlen + clear_len);
	if (err)
		return err;

	if (sa->key.mode == XFRM_MODE_TUNNEL) {
		__be16 *type;

		if (proto == IPPROTO_IPIP ? clear_len < sizeof(struct iphdr) :
		    proto != IPPROTO_IPV6 || clear_len < sizeof(struct ipv6hdr))
			return -EINVAL;
		inner_dsfield(sa, clear, proto, flow->dsfield);
		start = clear - flow->l2len;
		memmove(start, l2, flow->l2len);
		type = (__be16 *)(clear - 2);
		*type = proto == IPPROTO_IPIP ? htons(ETH_P_IP) : htons(ETH_P_IPV6);
		frame->len = flow->l2len + clear_len;
	} else {
		carry(l3, flow, proto, clear_len);
		start = l2 + TN_ESP_HEAD;
		memmove(start, l2, flow->l2len + flow->l3hlen);
		frame->len = flow->l2len + flow->l3hlen + clear_len;
	}
	frame->start = start - (u8 *)frame;
	return 0;
}
