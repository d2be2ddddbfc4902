// SPDX-License-Identifier: GPL-2.0-only
/*
 * Frames on the wire. Each has pages of its own, as in the memory model
 * MEM_TYPE_PAGE_SHARED: a page whose last reference is dropped is free,
 * whoever drops it. In front there is room for XDP and for an outer header,
 * behind for an ESP trailer and what a socket buffer keeps at its end; so ESP
 * is done in place and no byte is copied at the receiver.
 */
#include <linux/gfp.h>
#include <linux/skbuff.h>
#include "testnic.h"

#define OUTER_ROOM	64	/* an IPv6 and an ESP header, aligned */
#define TRAILER_ROOM	32	/* padding, pad length, next header, ICV */
#define HEADROOM	(XDP_PACKET_HEADROOM + OUTER_ROOM + NET_IP_ALIGN)
#define TAILROOM	SKB_DATA_ALIGN(sizeof(struct skb_shared_info))
#define LARGE_ORDER	2

unsigned int tn_xdp_mtu(void)
{
	return PAGE_SIZE - HEADROOM - TRAILER_ROOM - TAILROOM - TN_L2_MAX;
}

struct tn_frame *tn_frame_alloc(unsigned int len)
{
	unsigned int need = HEADROOM + len + TRAILER_ROOM + TAILROOM;
	unsigned int order = need <= PAGE_SIZE ? 0 : LARGE_ORDER;
	struct tn_frame *frame;
	struct page *page;

	if (need > PAGE_SIZE << order)
		return NULL;
	page = dev_alloc_pages(order);
	if (!page)
		return NULL;
	frame = page_address(page);
	frame->size = PAGE_SIZE << order;
	frame->start = HEADROOM;
	frame->len = len;
	return frame;
}

struct tn_frame *tn_frame_from_bytes(const void *data, unsigned int len)
{
	struct tn_frame *frame = tn_frame_alloc(len);

	if (frame)
		memcpy(tn_data(frame), data, len);
	return frame;
}

struct tn_frame *tn_frame_from_skb(const struct sk_buff *skb)
{
	struct tn_frame *frame = tn_frame_alloc(skb->len);

	if (frame && skb_copy_bits(skb, 0, tn_data(frame), skb->len)) {
		tn_frame_free(frame);
		return NULL;
	}
	return frame;
}

/* Takes the buffer; frees it on failure. */
struct sk_buff *tn_frame_to_skb(void *buffer, unsigned int size, unsigned int start, unsigned int len)
{
	struct sk_buff *skb = build_skb(buffer, size);

	if (!skb) {
		tn_frame_free(buffer);
		return NULL;
	}
	skb_reserve(skb, start);
	skb_put(skb, len);
	return skb;
}

void tn_frame_free(void *buffer)
{
	put_page(virt_to_head_page(buffer));
}

/* Whether the frame may end at @end. */
bool tn_frame_tail(const struct tn_frame *frame, const u8 *end)
{
	return end <= (const u8 *)frame + frame->size - TAILROOM;
}
