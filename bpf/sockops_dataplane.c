// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * sock_ops on the data planes' cgroup: a connection that the outbound listener accepts takes its
 * destination off the record, and the data plane's own connections inside a pod are let past the
 * inbound listener until they are established at both ends.
 */
#include "include/refusals.h"
#include "include/way.h"
#include "include/tuple.h"

static __always_inline void take(struct bpf_sock_ops *ops, struct bpf_sock *sk, __u32 slot)
{
	struct destination *original, *kept;
	struct tuple key, asked;

	accepting(ops, slot, &key);
	original = bpf_map_lookup_elem(&originals, &key);
	if (!original)
		return;
	kept = bpf_sk_storage_get(&accepted, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	/* Without it the proxy finds no destination and refuses. */
	if (kept) {
		*kept = *original;
	} else {
		asked.slot = slot;
		asked.local = key.remote;
		asked.local_port = key.remote_port;
		asked.remote = original->address;
		asked.remote_port = original->port;
		count(REASON_NO_STORAGE);
		tell_refused(&asked, REASON_NO_STORAGE, IPPROTO_TCP, 0);
	}
	forget(&key);
}

SEC("sockops")
int sockops_dataplane(struct bpf_sock_ops *ops)
{
	__u64 cookie = bpf_get_netns_cookie(ops);
	struct pod *pod;
	struct tuple key;

	switch (ops->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_STATE_CB:
		break;
	default:
		return 1;
	}
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod)
		return 1;
	if (ops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) {
		struct bpf_sock *sk = ops->sk;

		if (sk && ops->local_port == outbound_port)
			take(ops, sk, pod->slot);
		return 1;
	}
	dialling(ops, pod->slot, &key);
	if (ops->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		if (open_way(&relays, &key)) {
			count(REASON_NOT_RECORDED);
			tell_refused(&key, REASON_NOT_RECORDED, IPPROTO_TCP, 1);
		} else {
			bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags |
							       BPF_SOCK_OPS_STATE_CB_FLAG);
		}
	} else if (ops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB) {
		way_established(&relays, &key);
	} else if (ops->args[0] == BPF_TCP_ESTABLISHED || ops->args[1] == BPF_TCP_CLOSE) {
		/* Of an application whose end no program of ours saw, or that never came. */
		close_way(&relays, &key);
	}
	return 1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
