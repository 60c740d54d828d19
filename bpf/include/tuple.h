/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The tuple of a connection, out of what sock_ops tells of one end of it. */
#ifndef UNDERPASS_TUPLE_H
#define UNDERPASS_TUPLE_H

#include "address.h"

static __always_inline void ends(struct bpf_sock_ops *ops, struct address *here,
				 struct address *there)
{
	if (ops->family == AF_INET) {
		set_v4(here, LOAD(ops, local_ip4));
		set_v4(there, LOAD(ops, remote_ip4));
		return;
	}
	LOAD_V6(here, ops, local_ip6);
	LOAD_V6(there, ops, remote_ip6);
}

/* The network order of `remote_port` stands in the upper half of the word. */
static __always_inline __u16 remote_port(struct bpf_sock_ops *ops)
{
	return (__u16)bpf_ntohl(ops->remote_port);
}

/* Of the end that dials. */
static __always_inline void dialling(struct bpf_sock_ops *ops, __u32 slot, struct tuple *key)
{
	key->slot = slot;
	ends(ops, &key->remote, &key->local);
	key->local_port = remote_port(ops);
	key->remote_port = (__u16)ops->local_port;
}

/* Of the end that accepts. */
static __always_inline void accepting(struct bpf_sock_ops *ops, __u32 slot, struct tuple *key)
{
	key->slot = slot;
	ends(ops, &key->local, &key->remote);
	key->local_port = (__u16)ops->local_port;
	key->remote_port = remote_port(ops);
}

/* Whoever takes a record out of `originals` gives its place in the pod's budget back. */
static __always_inline void forget(const struct tuple *key)
{
	__u32 slot = key->slot;
	__u32 *used;

	if (bpf_map_delete_elem(&originals, key))
		return;
	used = bpf_map_lookup_elem(&records, &slot);
	if (used)
		__sync_fetch_and_add(used, -1);
}

#endif
