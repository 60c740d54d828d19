// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * sk_lookup, an instance in each pod's network namespace: connections from elsewhere arrive at the
 * inbound listener. The namespace's cookie can't be had here, so the instance knows its slot.
 */
#include "include/flows.h"
#include "include/refusals.h"
#include "include/way.h"

const volatile __u32 slot = 0;
/* POD_* of this pod. */
const volatile __u32 flags = 0;

/* The program tells of it. */
static __always_inline int drop(__u32 reason)
{
	count(reason);
	return -(int)reason;
}

static __always_inline int let(__u32 reason)
{
	count(reason);
	return SK_PASS;
}

static __always_inline int to_listener(struct bpf_sk_lookup *ctx)
{
	__u32 at = slot;
	struct bpf_sock *listener = bpf_map_lookup_elem(&listeners, &at);
	long failed;

	if (!listener)
		return drop(REASON_NO_LISTENER);
	failed = bpf_sk_assign(ctx, listener, BPF_SK_LOOKUP_F_NO_REUSEPORT);
	bpf_sk_release(listener);
	return failed ? drop(REASON_ASSIGN) : let(REASON_INBOUND);
}

/* To a socket that isn't connected: others are found without us. */
static __always_inline int datagram(const struct tuple *key)
{
	if (is_own(slot, &key->remote))
		return let(REASON_SELF);
	if (flags & POD_UDP_DENY) {
		int asked = !(flags & POD_DNS) && key->remote_port == DNS_PORT &&
			    is_answer(slot, key->local_port, &key->remote);

		if (!asked) {
			count_refused(slot);
			return drop(REASON_UDP_DENIED);
		}
	}
	count_datagram(slot, key->local_port, &key->remote, key->remote_port);
	return let(REASON_UNPROTECTED);
}

/* Below 0 to drop. */
static __always_inline int decide(struct bpf_sk_lookup *ctx, struct tuple *key)
{
	if (ctx->family == AF_INET) {
		set_v4(&key->local, LOAD(ctx, local_ip4));
		set_v4(&key->remote, LOAD(ctx, remote_ip4));
	} else if (ctx->family == AF_INET6) {
		LOAD_V6(&key->local, ctx, local_ip6);
		LOAD_V6(&key->remote, ctx, remote_ip6);
	} else {
		return drop(REASON_FAMILY);
	}
	key->local_port = (__u16)ctx->local_port;
	key->remote_port = bpf_ntohs(ctx->remote_port);

	/* What only the pod itself can send: the kernel takes neither source from outside. */
	if (is_loopback(&key->local))
		return let(REASON_LOOPBACK);
	if (ctx->protocol != IPPROTO_TCP)
		return datagram(key);
	if (has_way(&relays, key))
		return let(REASON_RELAY);
	if (has_way(&probes, key))
		return let(REASON_PROBE);
	if (is_own(slot, &key->remote))
		return let(REASON_SELF);
	if (key->local_port == hbone_port)
		return let(REASON_HBONE);
	if (flags & POD_BYPASS_INBOUND)
		return let(REASON_BYPASS_INBOUND);
	if ((flags & POD_IPV6_OFF) && !is_mapped(&key->local))
		return drop(REASON_IPV6_OFF);
	return to_listener(ctx);
}

SEC("sk_lookup")
int lookup(struct bpf_sk_lookup *ctx)
{
	struct tuple key = { .slot = slot };
	int verdict = decide(ctx, &key);

	if (verdict >= 0)
		return verdict;
	tell_refused(&key, -verdict, (__u16)ctx->protocol, 1);
	return SK_DROP;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
