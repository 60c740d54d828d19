// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * sock_ops on the kubelet's cgroup: what it dials from the node's own namespace towards a declared
 * port of a pod is let past the pod's inbound listener until it is established. Whatever fails here
 * leaves the connection to the mesh.
 */
#include "include/refusals.h"
#include "include/tuple.h"
#include "include/way.h"

/* The node's network namespace, by its cookie. */
const volatile __u64 node_netns = 0;

static __always_inline void record(struct bpf_sock_ops *ops)
{
	struct probe_port to = {};
	struct tuple key, *kept;
	struct bpf_sock *sk;
	__u32 *slot;

	dialling(ops, 0, &key);
	to.address = key.local;
	to.port = key.local_port;
	slot = bpf_map_lookup_elem(&probe_ports, &to);
	if (!slot)
		return;
	key.slot = *slot;
	sk = ops->sk;
	if (!sk)
		return;
	/* The port may be taken from the pod meanwhile: what was recorded is forgotten as it was. */
	kept = bpf_sk_storage_get(&probing, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!kept) {
		count(REASON_NO_STORAGE);
		tell_refused(&key, REASON_NO_STORAGE, IPPROTO_TCP, 1);
		return;
	}
	*kept = key;
	if (open_way(&probes, &key)) {
		count(REASON_NOT_RECORDED);
		tell_refused(&key, REASON_NOT_RECORDED, IPPROTO_TCP, 1);
		return;
	}
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

SEC("sockops")
int sockops_kubelet(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk;
	struct tuple *kept;

	if (ops->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		if (bpf_get_netns_cookie(ops) == node_netns)
			record(ops);
		return 1;
	}
	if (ops->op != BPF_SOCK_OPS_STATE_CB)
		return 1;
	sk = ops->sk;
	if (!sk)
		return 1;
	kept = bpf_sk_storage_get(&probing, sk, 0, 0);
	if (!kept)
		return 1;
	if (ops->args[1] == BPF_TCP_ESTABLISHED)
		way_established(&probes, kept);
	else if (ops->args[0] == BPF_TCP_ESTABLISHED || ops->args[1] == BPF_TCP_CLOSE)
		/* From here on a SYN with the same tuple is somebody else's. */
		close_way(&probes, kept);
	return 1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
