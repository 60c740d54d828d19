// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * cgroup/getpeername and getsockname on the pods' cgroup: an application sees the address that it
 * dialled and its own, not the loopback that its connection was led over.
 */
#include "include/address.h"

static __always_inline struct dialled *record(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	return sk ? bpf_sk_storage_get(&dialled, sk, 0, 0) : 0;
}

/* As dialled, whatever the record says of where it went: a later connect has cleared it. */
static __always_inline const struct address *peer(struct bpf_sock_addr *ctx, __u16 *port)
{
	struct dialled *socket = record(ctx);

	if (!socket || !socket->target_port)
		return 0;
	if (bpf_ntohs((__u16)ctx->user_port) != socket->target_port)
		return 0;
	*port = socket->wanted.port;
	return &socket->wanted.address;
}

/* The pod's own address of the family, where the kernel chose loopback as source. */
static __always_inline const struct address *local(struct bpf_sock_addr *ctx,
						   const struct address *seen)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	const struct address *own;
	struct pod *pod;

	if (!record(ctx) || !is_loopback(seen))
		return 0;
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod)
		return 0;
	own = is_mapped(seen) ? &pod->own4 : &pod->own6;
	return own->word[0] | own->word[1] | own->word[2] | own->word[3] ? own : 0;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	__u16 port = 0;
	const struct address *at = peer(ctx, &port);

	if (at) {
		STORE(ctx, user_ip4, at->word[3]);
		ctx->user_port = bpf_htons(port);
	}
	return ALLOW;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	__u16 port = 0;
	const struct address *at = peer(ctx, &port);

	if (at) {
		STORE_V6(ctx, user_ip6, at);
		ctx->user_port = bpf_htons(port);
	}
	return ALLOW;
}

SEC("cgroup/getsockname4")
int getsockname4(struct bpf_sock_addr *ctx)
{
	struct address seen;
	const struct address *at;

	set_v4(&seen, LOAD(ctx, user_ip4));
	at = local(ctx, &seen);
	if (at)
		STORE(ctx, user_ip4, at->word[3]);
	return ALLOW;
}

SEC("cgroup/getsockname6")
int getsockname6(struct bpf_sock_addr *ctx)
{
	struct address seen;
	const struct address *at;

	LOAD_V6(&seen, ctx, user_ip6);
	at = local(ctx, &seen);
	if (at)
		STORE_V6(ctx, user_ip6, at);
	return ALLOW;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
