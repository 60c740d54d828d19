/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Datagrams of pods that the mesh doesn't carry: counted by pod, as refused or as flows that passed
 * unprotected (docs/udp.md says what a flow is).
 */
#ifndef UNDERPASS_FLOWS_H
#define UNDERPASS_FLOWS_H

#include "address.h"

#define IPPROTO_ICMP 1
#define IPPROTO_ICMPV6 58
#define SECOND 1000000000ull
#define FLOW_SILENCE (60 * SECOND)
/* Longer than any resolver waits for an answer. */
#define QUESTION_LIFE (30 * SECOND)
#define QUESTIONS 64

/* Of a ping socket: no datagrams of an application, and sends have no hook. */
static __always_inline int is_ping(__u32 protocol)
{
	return protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6;
}

static __always_inline void count_refused(__u32 slot)
{
	struct datagrams *of = bpf_map_lookup_elem(&datagrams, &slot);

	if (of)
		of->refused += 1;
}

static __always_inline void count_flow(__u32 slot)
{
	struct datagrams *of = bpf_map_lookup_elem(&datagrams, &slot);

	if (of)
		of->unprotected += 1;
}

/* One datagram between these ends, in either direction. */
static __always_inline void count_datagram(__u32 slot, __u16 local_port, const struct address *remote,
					   __u16 remote_port)
{
	struct flow key = {
		.slot = slot,
		.local_port = local_port,
		.remote_port = remote_port,
		.remote = *remote,
	};
	__u64 now = bpf_ktime_get_ns();
	__u64 *seen = bpf_map_lookup_elem(&flows, &key);

	if (!seen || now - *seen > FLOW_SILENCE)
		count_flow(slot);
	if (seen)
		*seen = now;
	else
		bpf_map_update_elem(&flows, &key, &now, BPF_ANY);
}

static __always_inline void question_key(struct question_key *key, __u32 slot, __u16 local_port)
{
	key->slot = slot;
	key->bucket = local_port % QUESTIONS;
}

/* That the pod asks a nameserver past the mesh, so that the answer may come in. */
static __always_inline int remember_question(__u32 slot, __u16 local_port,
					     const struct address *server)
{
	struct question value = { .server = *server, .local_port = local_port };
	struct question_key key;

	question_key(&key, slot, local_port);
	value.asked = bpf_ktime_get_ns();
	return bpf_map_update_elem(&questions, &key, &value, BPF_ANY);
}

static __always_inline int is_answer(__u32 slot, __u16 local_port, const struct address *server)
{
	struct question_key key;
	struct question *found;

	question_key(&key, slot, local_port);
	found = bpf_map_lookup_elem(&questions, &key);
	return found && found->local_port == local_port && same(&found->server, server) &&
	       bpf_ktime_get_ns() - found->asked < QUESTION_LIFE;
}

#endif
