// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * cgroup/getsockopt on the data planes' cgroup: answers SO_ORIGINAL_DST of captured connections, as
 * conntrack does where nftables redirects.
 */
#include "include/refusals.h"

#define SOL_IP 0
#define SOL_IPV6 41
#define SO_ORIGINAL_DST 80

/* linux/in.h and linux/in6.h, whose names clash with the C library's. */
struct sockaddr_v4 {
	__u16 family;
	__u16 port;
	__u32 ip;
	__u8 zero[8];
};

struct sockaddr_v6 {
	__u16 family;
	__u16 port;
	__u32 flow;
	struct address ip;
	__u32 scope;
};

static __always_inline void answer_v4(struct bpf_sockopt *ctx, const struct destination *to)
{
	struct sockaddr_v4 *out = ctx->optval;

	if ((void *)(out + 1) > ctx->optval_end)
		return;
	__builtin_memset(out, 0, sizeof(*out));
	out->family = AF_INET;
	out->port = bpf_htons(to->port);
	out->ip = to->address.word[3];
	STORE(ctx, optlen, sizeof(*out));
	STORE(ctx, retval, 0);
}

static __always_inline void answer_v6(struct bpf_sockopt *ctx, const struct destination *to)
{
	struct sockaddr_v6 *out = ctx->optval;

	if ((void *)(out + 1) > ctx->optval_end)
		return;
	__builtin_memset(out, 0, sizeof(*out));
	out->family = AF_INET6;
	out->port = bpf_htons(to->port);
	out->ip = to->address;
	STORE(ctx, optlen, sizeof(*out));
	STORE(ctx, retval, 0);
}

/* Conntrack can't answer either where the pod is captured by us. */
static __always_inline void unknown(struct bpf_sockopt *ctx, struct bpf_sock *sk)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	struct tuple key;

	if (!pod || sk->src_port != outbound_port)
		return;
	key.slot = pod->slot;
	key.local_port = bpf_ntohs(sk->dst_port);
	key.remote_port = outbound_port;
	if (sk->family == AF_INET) {
		set_v4(&key.local, LOAD(sk, dst_ip4));
		set_v4(&key.remote, LOAD(sk, src_ip4));
	} else {
		LOAD_V6(&key.local, sk, dst_ip6);
		LOAD_V6(&key.remote, sk, src_ip6);
	}
	count(REASON_UNKNOWN_DESTINATION);
	tell_refused(&key, REASON_UNKNOWN_DESTINATION, IPPROTO_TCP, 0);
}

SEC("cgroup/getsockopt")
int getsockopt(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct destination *to;

	if (ctx->optname != SO_ORIGINAL_DST || !sk)
		return 1;
	if (ctx->level != SOL_IP && ctx->level != SOL_IPV6)
		return 1;
	to = bpf_sk_storage_get(&accepted, sk, 0, 0);
	if (!to) {
		unknown(ctx, sk);
		return 1;
	}
	if (ctx->level == SOL_IP && is_mapped(&to->address))
		answer_v4(ctx, to);
	else if (ctx->level == SOL_IPV6)
		answer_v6(ctx, to);
	return 1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
