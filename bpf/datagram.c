// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * cgroup/sendmsg and recvmsg on the pods' cgroup: DNS questions of sockets that aren't connected go
 * to the DNS listener, and its answers seem to come from the server that was asked. Other datagrams
 * pass unprotected, or are refused.
 */
#include "include/flows.h"
#include "include/refusals.h"

static __always_inline int send_uncaptured(struct bpf_sock *sk, const struct pod *pod,
					   const struct address *to, __u16 port)
{
	__u16 local_port = (__u16)sk->src_port;

	if (pod->flags & POD_UDP_DENY) {
		if (port != DNS_PORT) {
			count_refused(pod->slot);
			return refuse(REASON_UDP_DENIED);
		}
		if (remember_question(pod->slot, local_port, to))
			return refuse(REASON_NO_STORAGE);
	}
	count_datagram(pod->slot, local_port, to, port);
	return pass(REASON_UNPROTECTED);
}

static __always_inline int decide(struct bpf_sock_addr *ctx, struct bpf_sock *sk,
				  const struct address *to, struct address *target)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	__u64 cgroup = bpf_get_current_cgroup_id();
	struct dialled *socket;
	__u16 port;

	target->word[3] = 0;
	if (!pod || (pod->flags & POD_LEAVING))
		return ALLOW;
	if (bpf_map_lookup_elem(&exempt, &cgroup))
		return ALLOW;
	if (is_loopback(to) || is_own(pod->slot, to))
		return ALLOW;
	port = bpf_ntohs((__u16)ctx->user_port);
	if (!(pod->flags & POD_DNS) || port != DNS_PORT || ctx->protocol != IPPROTO_UDP)
		return send_uncaptured(sk, pod, to, port);
	if ((pod->flags & POD_IPV6_OFF) && !is_mapped(to))
		return refuse(REASON_IPV6_OFF);
	if (sk->bound_dev_if > 1)
		return refuse(REASON_BOUND_DEVICE);
	socket = bpf_sk_storage_get(&dialled, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!socket)
		return refuse(REASON_NO_STORAGE);
	set_loopback(target, to);
	socket->wanted.address = *to;
	socket->wanted.port = DNS_PORT;
	socket->wanted.slot = pod->slot;
	socket->target = *target;
	/* Only a connected socket has a peer to show. */
	socket->target_port = 0;
	socket->recorded = 0;
	return pass(REASON_DNS);
}

/* Whether a datagram came from the DNS listener to a socket that asked a server. */
static __always_inline struct dialled *asked(struct bpf_sock_addr *ctx, const struct address *from)
{
	struct bpf_sock *sk = ctx->sk;
	struct dialled *socket = sk ? bpf_sk_storage_get(&dialled, sk, 0, 0) : 0;

	if (!socket || bpf_ntohs((__u16)ctx->user_port) != dns_port)
		return 0;
	return same(&socket->target, from) ? socket : 0;
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	struct address to, target;
	int verdict;

	if (!ctx->sk)
		return ALLOW;
	set_v4(&to, LOAD(ctx, user_ip4));
	verdict = decide(ctx, ctx->sk, &to, &target);
	if (verdict < 0)
		return refused_call(ctx, ctx->sk, &to, -verdict);
	if (target.word[3]) {
		STORE(ctx, user_ip4, target.word[3]);
		ctx->user_port = bpf_htons(dns_port);
	}
	return verdict;
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct address to, target;
	int verdict;

	if (!ctx->sk)
		return ALLOW;
	LOAD_V6(&to, ctx, user_ip6);
	verdict = decide(ctx, ctx->sk, &to, &target);
	if (verdict < 0)
		return refused_call(ctx, ctx->sk, &to, -verdict);
	if (target.word[3]) {
		STORE_V6(ctx, user_ip6, &target);
		ctx->user_port = bpf_htons(dns_port);
	}
	return verdict;
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct address from;
	struct dialled *socket;

	set_v4(&from, LOAD(ctx, user_ip4));
	socket = asked(ctx, &from);
	if (socket) {
		STORE(ctx, user_ip4, socket->wanted.address.word[3]);
		ctx->user_port = bpf_htons(socket->wanted.port);
	}
	return ALLOW;
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct address from;
	struct dialled *socket;

	LOAD_V6(&from, ctx, user_ip6);
	socket = asked(ctx, &from);
	if (socket) {
		STORE_V6(ctx, user_ip6, &socket->wanted.address);
		ctx->user_port = bpf_htons(socket->wanted.port);
	}
	return ALLOW;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
