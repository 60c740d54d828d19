// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * cgroup_skb/egress on the pods' cgroup: what no earlier hook could see to. What was led to loopback
 * doesn't leave by another device, to which a socket may be bound after its connect; and TCP leaves
 * by no raw socket.
 */
#include "include/flows.h"
#include "include/raw.h"
#include "include/refusals.h"

#define LOOPBACK_DEVICE 1
/* Offsets of the destination in the headers of linux/ip.h and linux/ipv6.h. */
#define DESTINATION_V4 16
#define DESTINATION_V6 24

static __always_inline int is_loopback_v6(const __u32 *word)
{
	return !word[0] && !word[1] && !word[2] && word[3] == bpf_htonl(1);
}

static __always_inline void tell_raw(struct __sk_buff *skb, int v4, __u32 slot, __u32 reason,
				     int protocol)
{
	struct tuple key = { .slot = slot };
	__u32 ip[2] = {};

	if (v4) {
		bpf_skb_load_bytes(skb, SOURCE_V4, ip, sizeof(ip));
		set_v4(&key.local, ip[0]);
		set_v4(&key.remote, ip[1]);
	} else {
		bpf_skb_load_bytes(skb, SOURCE_V6, &key.local, sizeof(key.local));
		bpf_skb_load_bytes(skb, DESTINATION_V6, &key.remote, sizeof(key.remote));
	}
	tell_refused(&key, reason, (__u16)(protocol == UNKNOWN ? IPPROTO_TCP : protocol), 0);
}

/* Of a raw socket; which it is, only those that were made under us tell. */
static __always_inline int raw(struct __sk_buff *skb, struct bpf_sock *sk, int v4)
{
	__u64 *cookie = bpf_sk_storage_get(&raw_sockets, sk, 0, 0);
	struct pod *pod = cookie ? bpf_map_lookup_elem(&pods, cookie) : 0;
	__u32 reason;
	int protocol;

	if (!pod)
		return ALLOW;
	protocol = v4 ? carried_v4(skb) : carried_v6(skb);
	reason = refuses_raw(pod, protocol);
	if (!reason)
		return ALLOW;
	count(reason);
	if (reason == REASON_UDP_DENIED)
		count_refused(pod->slot);
	tell_raw(skb, v4, pod->slot, reason, protocol);
	return DENY;
}

SEC("cgroup_skb/egress")
int egress(struct __sk_buff *skb)
{
	struct bpf_sock *sk;
	__u32 address[4];
	__u8 first;
	int v4;

	/* Almost all that applications send. */
	if (skb->ifindex == LOOPBACK_DEVICE)
		return ALLOW;
	v4 = skb->protocol == bpf_htons(0x0800);
	sk = skb->sk;
	if (sk)
		sk = bpf_sk_fullsock(sk);
	if (sk && sk->type == SOCK_RAW && !raw(skb, sk, v4))
		return DENY;
	if (v4) {
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
