// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * cgroup_skb/egress on the pods' cgroup: what was led to loopback doesn't leave by another device,
 * to which a socket may be bound after its connect.
 */
#include "include/underpass.h"

#define LOOPBACK_DEVICE 1
/* Offsets of the destination in the headers of linux/ip.h and linux/ipv6.h. */
#define DESTINATION_V4 16
#define DESTINATION_V6 24

static __always_inline int is_loopback_v6(const __u32 *word)
{
	return !word[0] && !word[1] && !word[2] && word[3] == bpf_htonl(1);
}

SEC("cgroup_skb/egress")
int egress(struct __sk_buff *skb)
{
	__u32 address[4];
	__u8 first;

	/* Almost all that applications send. */
	if (skb->ifindex == LOOPBACK_DEVICE)
		return ALLOW;
	if (skb->protocol == bpf_htons(0x0800)) {
		if (bpf_skb_load_bytes(skb, DESTINATION_V4, &first, sizeof(first)) || first != 127)
			return ALLOW;
	} else if (bpf_skb_load_bytes(skb, DESTINATION_V6, address, sizeof(address)) ||
		   !is_loopback_v6(address)) {
		return ALLOW;
	}
	count(REASON_LOOPBACK_LEAK);
	return DENY;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
