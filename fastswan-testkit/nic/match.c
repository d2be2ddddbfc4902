// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the NIC reads in a frame, and which policy and association it chooses:
 * the policy with the lowest priority number, then the oldest; for it the
 * newest association that has its reqid, mode and addresses.
 */
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <net/dsfield.h>
#include <net/ip.h>
#include <net/ipv6.h>
#include "testnic.h"

static void parse_upper(struct tn_flow *flow, const u8 *upper, const u8 *end)
{
	if (flow->fragment)
		return;
	switch (flow->proto) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
	case IPPROTO_SCTP:
	case IPPROTO_DCCP:
		if (end - upper >= 4) {
			memcpy(&flow->sport, upper, 2);
			memcpy(&flow->dport, upper + 2, 2);
		}
		break;
	case IPPROTO_ESP:
		if (end - upper >= 8) {
			memcpy(&flow->spi, upper, 4);
			memcpy(&flow->seq, upper + 4, 4);
		}
		break;
	}
}

static bool parse_ipv4(struct tn_flow *flow, const u8 *l3, unsigned int room)
{
	const struct iphdr *ip = (const void *)l3;

	if (room < sizeof(*ip) || ip->version != 4)
		return false;
	flow->l3hlen = ip->ihl * 4;
	flow->l3len = ntohs(ip->tot_len);
	if (flow->l3hlen < sizeof(*ip) || flow->l3len < flow->l3hlen || flow->l3len > room)
		return false;
	flow->family = AF_INET;
	flow->saddr.a4 = ip->saddr;
	flow->daddr.a4 = ip->daddr;
	flow->proto = ip->protocol;
	flow->dsfield = ip->tos;
	flow->fragment = ip->frag_off & htons(IP_OFFSET | IP_MF);
	parse_upper(flow, l3 + flow->l3hlen, l3 + flow->l3len);
	return true;
}

/* Follows extension headers, as the kernel does to choose a policy. */
static bool parse_ipv6(struct tn_flow *flow, const u8 *l3, unsigned int room)
{
	const struct ipv6hdr *ip = (const void *)l3;
	const u8 *next, *end;

	if (room < sizeof(*ip) || ip->version != 6)
		return false;
	flow->l3hlen = sizeof(*ip);
	flow->l3len = sizeof(*ip) + ntohs(ip->payload_len);
	if (flow->l3len > room)
		return false;
	flow->family = AF_INET6;
	memcpy(flow->saddr.a6, &ip->saddr, 16);
	memcpy(flow->daddr.a6, &ip->daddr, 16);
	flow->proto = ip->nexthdr;
	flow->dsfield = ipv6_get_dsfield(ip);
	next = l3 + sizeof(*ip);
	end = l3 + flow->l3len;
	while (end - next >= 8) {
		unsigned int len;

		switch (flow->proto) {
		case NEXTHDR_FRAGMENT:
			/* what follows a later fragment's header is no header */
			flow->fragment = true;
			len = 8;
			break;
		case NEXTHDR_HOP:
		case NEXTHDR_ROUTING:
		case NEXTHDR_DEST:
			len = (next[1] + 1) * 8;
			break;
		default:
			parse_upper(flow, next, end);
			return true;
		}
		flow->extended = true;
		flow->proto = next[0];
		if (flow->fragment || len > end - next)
			return true;
		next += len;
	}
	return true;
}

/* False: not IP, or not whole. Such a frame meets no policy. */
bool tn_parse(struct tn_frame *frame, struct tn_flow *flow)
{
	const u8 *data = tn_data(frame);
	__be16 proto;

	memset(flow, 0, sizeof(*flow));
	flow->l2len = ETH_HLEN;
	while (frame->len > flow->l2len) {
		memcpy(&proto, data + flow->l2len - 2, 2);
		if (eth_type_vlan(proto) && flow->l2len < TN_L2_MAX) {
			flow->l2len += VLAN_HLEN;
			continue;
		}
		data += flow->l2len;
		if (proto == htons(ETH_P_IP))
			return parse_ipv4(flow, data, frame->len - flow->l2len);
		if (proto == htons(ETH_P_IPV6))
			return parse_ipv6(flow, data, frame->len - flow->l2len);
		return false;
	}
	return false;
}

bool tn_selects(const struct xfrm_selector *sel, const struct tn_flow *flow)
{
	if (sel->family != flow->family)
		return false;
	if (flow->family == AF_INET) {
		if (!addr4_match(flow->daddr.a4, sel->daddr.a4, sel->prefixlen_d) ||
		    !addr4_match(flow->saddr.a4, sel->saddr.a4, sel->prefixlen_s))
			return false;
	} else {
		if (!addr_match(&flow->daddr, &sel->daddr, sel->prefixlen_d) ||
		    !addr_match(&flow->saddr, &sel->saddr, sel->prefixlen_s))
			return false;
	}
	if (sel->proto && sel->proto != flow->proto)
		return false;
	return !((flow->dport ^ sel->dport) & sel->dport_mask) &&
	       !((flow->sport ^ sel->sport) & sel->sport_mask);
}

struct tn_policy *tn_policy_find(struct tn_port *port, u8 dir, const struct tn_flow *flow)
{
	struct tn_policy *policy;

	list_for_each_entry_rcu(policy, &port->policies, node)
		if (policy->dir == dir && tn_selects(&policy->sel, flow))
			return policy;
	return NULL;
}

/* In transport mode the packet's own addresses are the association's. */
bool tn_sa_suits(const struct tn_sa_key *key, const struct tn_policy *policy,
		 const struct tn_flow *flow)
{
	const struct tn_sa_key *want = &policy->want;
	bool tunnel = want->mode == XFRM_MODE_TUNNEL;
	const xfrm_address_t *saddr = tunnel ? &want->saddr : &flow->saddr;
	const xfrm_address_t *daddr = tunnel ? &want->daddr : &flow->daddr;
	u16 family = tunnel ? want->family : flow->family;

	if (key->mode != want->mode || key->family != family ||
	    (want->reqid && key->reqid != want->reqid))
		return false;
	return (xfrm_addr_any(saddr, family) || xfrm_addr_any(&key->saddr, family) ||
		xfrm_addr_equal(saddr, &key->saddr, family)) &&
	       (xfrm_addr_any(daddr, family) || xfrm_addr_equal(daddr, &key->daddr, family));
}

struct tn_sa *tn_sa_out(struct tn_port *port, const struct tn_policy *policy,
			const struct tn_flow *flow)
{
	struct tn_sa *sa, *newest = NULL;
	int bucket;

	if (policy->want.reqid) {
		hash_for_each_possible_rcu(port->sas_out, sa, node, policy->want.reqid)
			if (tn_sa_suits(&sa->key, policy, flow) &&
			    (!newest || sa->born > newest->born))
				newest = sa;
	} else {
		hash_for_each_rcu(port->sas_out, bucket, sa, node)
			if (tn_sa_suits(&sa->key, policy, flow) &&
			    (!newest || sa->born > newest->born))
				newest = sa;
	}
	return newest;
}

/* Only a whole ESP packet without extension headers is the NIC's. */
struct tn_sa *tn_sa_in(struct tn_port *port, const struct tn_flow *flow)
{
	struct tn_sa *sa;

	if (flow->fragment || flow->extended)
		return NULL;
	hash_for_each_possible_rcu(port->sas_in, sa, node, (__force u32)flow->spi)
		if (sa->spi == flow->spi && sa->key.family == flow->family &&
		    xfrm_addr_equal(&sa->key.daddr, &flow->daddr, flow->family))
			return sa;
	return NULL;
}
