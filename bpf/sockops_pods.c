// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * sock_ops on the pods' cgroup: before the SYN of a captured connection leaves, its destination goes
 * on record under the tuple by which the listener will see it. What the data plane or the kubelet
 * dialled is known to the kernel by its tuple as soon as the application's end is established.
 */
#include "include/refusals.h"
#include "include/way.h"
#include "include/tuple.h"

/* The proxy will refuse it. */
static __always_inline void unrecorded(const struct dialled *socket, __u32 reason)
{
	struct tuple asked = {
		.slot = socket->wanted.slot,
		.local = socket->key.remote,
		.remote = socket->wanted.address,
		.local_port = socket->key.remote_port,
		.remote_port = socket->wanted.port,
	};

	count(reason);
	tell_refused(&asked, reason, IPPROTO_TCP, 0);
}

/* A reason why it isn't on record, or 0. */
static __always_inline __u32 record(struct bpf_sock_ops *ops, struct dialled *socket)
{
	__u32 slot = socket->wanted.slot;
	__u32 *used = bpf_map_lookup_elem(&records, &slot);

	dialling(ops, slot, &socket->key);
	if (!same(&socket->key.local, &socket->target) ||
	    socket->key.local_port != socket->target_port)
		return REASON_STALE;
	if (!used)
		return REASON_NOT_RECORDED;
	/* An entry under this tuple is of a connection that was never accepted: its port is free
	 * again, or this SYN couldn't use it. */
	forget(&socket->key);
	__sync_fetch_and_add(used, 1);
	if (bpf_map_update_elem(&originals, &socket->key, &socket->wanted, BPF_NOEXIST)) {
		__sync_fetch_and_add(used, -1);
		return REASON_NOT_RECORDED;
	}
	socket->recorded = 1;
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	return 0;
}

static __always_inline void accepted_by_application(struct bpf_sock_ops *ops)
{
	__u64 cookie = bpf_get_netns_cookie(ops);
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	struct tuple key;

	if (!pod)
		return;
	accepting(ops, pod->slot, &key);
	/* From here on a SYN of somebody else who uses the same must not get past the proxy. */
	close_way(&relays, &key);
	close_way(&probes, &key);
}

SEC("sockops")
int sockops_pods(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk;
	struct dialled *socket;
	__u32 reason;

	if (ops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		accepted_by_application(ops);
	if (ops->op != BPF_SOCK_OPS_TCP_CONNECT_CB && ops->op != BPF_SOCK_OPS_STATE_CB)
		return 1;
	sk = ops->sk;
	if (!sk)
		return 1;
	socket = bpf_sk_storage_get(&dialled, sk, 0, 0);
	if (!socket)
		return 1;
	if (ops->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		reason = socket->target_port == outbound_port ? record(ops, socket) : 0;
		if (reason)
			unrecorded(socket, reason);
	} else if (ops->args[1] == BPF_TCP_CLOSE && socket->recorded) {
		/* Given up before anybody accepted; else there is nothing left to forget. */
		socket->recorded = 0;
		forget(&socket->key);
	}
	return 1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
