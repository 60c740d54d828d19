// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * cgroup/connect4 and connect6 on the pods' cgroup: what an enrolled pod dials is led to the
 * listener on loopback, and remembered at its socket. Once the namespace is known to be enrolled,
 * whatever can't be done denies (design section 4).
 */
#include "include/flows.h"
#include "include/refusals.h"

/*
 * An application holds the MPTCP socket, the hooks see a subflow of it: its names are asked for by
 * the one, its connection is made by the other. Without it the application sees loopback.
 */
static __always_inline void remember_for_mptcp(struct bpf_sock *sk, const struct dialled *socket)
{
	struct mptcp_sock *whole = bpf_skc_to_mptcp_sock(sk);
	struct dialled *copy;

	if (!whole)
		return;
	copy = bpf_sk_storage_get(&dialled, whole, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (copy)
		*copy = *socket;
}

static __always_inline int exempted(void)
{
	__u64 cgroup = bpf_get_current_cgroup_id();

	return bpf_map_lookup_elem(&exempt, &cgroup) != 0;
}

/* Whose datagrams have no hook of their own from here on. */
static __always_inline int connect_datagram(struct bpf_sock_addr *ctx, const struct pod *pod,
					    __u16 port)
{
	if (is_ping(ctx->protocol))
		return pass(REASON_UNPROTECTED);
	if ((pod->flags & POD_UDP_DENY) && port != DNS_PORT) {
		count_refused(pod->slot);
		return refuse(REASON_UDP_DENIED);
	}
	count_flow(pod->slot);
	return pass(REASON_UNPROTECTED);
}

/*
 * Decides about one connect, below 0 to refuse, and writes the address to use instead into `target`
 * and `target_port`, whose port is 0 when the address stays as it is.
 */
static __always_inline int decide(struct bpf_sock_addr *ctx, struct bpf_sock *sk,
				  const struct address *to, struct address *target,
				  __u16 *target_port)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	__u16 port = bpf_ntohs((__u16)ctx->user_port);
	struct dialled *socket;
	int stream = ctx->type == SOCK_STREAM;
	int dns;

	*target_port = 0;
	if (!pod)
		return ALLOW;
	/* A socket reused by AF_UNSPEC must not keep what was decided for another destination. */
	bpf_sk_storage_delete(&dialled, sk);
	if (pod->flags & POD_LEAVING)
		return ALLOW;
	if (exempted())
		return pass(REASON_DATA_PLANE);
	if (is_loopback(to))
		return pass(REASON_LOOPBACK);
	if (is_own(pod->slot, to))
		return pass(REASON_SELF);
	dns = (pod->flags & POD_DNS) && port == DNS_PORT;
	if (stream && ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_MPTCP)
		return refuse(REASON_FAMILY);
	if (!stream && !(dns && ctx->protocol == IPPROTO_UDP))
		return connect_datagram(ctx, pod, port);
	if ((pod->flags & POD_IPV6_OFF) && !is_mapped(to))
		return refuse(REASON_IPV6_OFF);
	/* Its packets would leave by that device, whatever address they carry. */
	if (sk->bound_dev_if > 1)
		return refuse(REASON_BOUND_DEVICE);
	if (stream) {
		__u32 *used = bpf_map_lookup_elem(&records, &pod->slot);

		if (!used || *used >= pod->budget)
			return refuse(REASON_BUDGET);
	}
	socket = bpf_sk_storage_get(&dialled, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!socket)
		return refuse(REASON_NO_STORAGE);
	socket->wanted.address = *to;
	socket->wanted.port = port;
	socket->wanted.slot = pod->slot;
	socket->recorded = 0;
	if (dns) {
		set_loopback(target, to);
		*target_port = dns_port;
	} else {
		spread(target, to, port);
		*target_port = outbound_port;
	}
	socket->target = *target;
	socket->target_port = *target_port;
	if (stream)
		remember_for_mptcp(sk, socket);
	return pass(dns ? REASON_DNS : REASON_CAPTURED);
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct address to, target;
	__u16 target_port;
	int verdict;

	if (!ctx->sk)
		return ALLOW;
	set_v4(&to, LOAD(ctx, user_ip4));
	verdict = decide(ctx, ctx->sk, &to, &target, &target_port);
	if (verdict < 0)
		return refused_call(ctx, ctx->sk, &to, -verdict);
	if (target_port) {
		STORE(ctx, user_ip4, target.word[3]);
		ctx->user_port = bpf_htons(target_port);
	}
	return verdict;
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct address to, target;
	__u16 target_port;
	int verdict;

	if (!ctx->sk)
		return ALLOW;
	LOAD_V6(&to, ctx, user_ip6);
	verdict = decide(ctx, ctx->sk, &to, &target, &target_port);
	if (verdict < 0)
		return refused_call(ctx, ctx->sk, &to, -verdict);
	if (target_port) {
		STORE_V6(ctx, user_ip6, &target);
		ctx->user_port = bpf_htons(target_port);
	}
	return verdict;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
