// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * cgroup/sock_create on the pods' cgroup: sockets of protocols whose connections no hook sees
 * (UDP-Lite, SCTP, DCCP) count as unprotected flows, or aren't made at all. Raw ones, which
 * CAP_NET_RAW gives, are marked for what they send (egress.c).
 */
#include "include/flows.h"
#include "include/raw.h"
#include "include/refusals.h"

static __always_inline int seen_later(__u32 type, __u32 protocol)
{
	switch (protocol) {
	case 0:
	case IPPROTO_TCP:
	case IPPROTO_MPTCP:
	case IPPROTO_UDP:
		return 1;
	}
	return is_ping(protocol) || (type != SOCK_DGRAM && type != SOCK_STREAM &&
				     type != SOCK_SEQPACKET);
}

static __always_inline int refused_unmarked(const struct bpf_sock *sk, __u64 cookie)
{
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);

	count(REASON_NO_STORAGE);
	return pod ? refused_socket(sk, pod, REASON_NO_STORAGE) : DENY;
}

SEC("cgroup/sock_create")
int sock_create(struct bpf_sock *sk)
{
	__u64 cookie;
	struct pod *pod;

	if (sk->family != AF_INET && sk->family != AF_INET6)
		return ALLOW;
	cookie = bpf_get_netns_cookie(sk);
	if (sk->type == SOCK_RAW)
		return bpf_sk_storage_get(&raw_sockets, sk, &cookie, BPF_SK_STORAGE_GET_F_CREATE) ?
			       ALLOW :
			       refused_unmarked(sk, cookie);
	if (seen_later(sk->type, sk->protocol))
		return ALLOW;
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod)
		return ALLOW;
	if (!(pod->flags & POD_UDP_DENY)) {
		count_flow(pod->slot);
		return pass(REASON_UNPROTECTED);
	}
	count_refused(pod->slot);
	count(REASON_UDP_DENIED);
	return refused_socket(sk, pod, REASON_UDP_DENIED);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
