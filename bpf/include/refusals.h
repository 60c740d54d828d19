/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Refusals one by one, for those who trace (agent/trace/refusals.py reads both maps in its memory;
 * a test compares the layouts). Nothing is written while nobody does.
 */
#ifndef UNDERPASS_REFUSALS_H
#define UNDERPASS_REFUSALS_H

#include "address.h"

/* What a busy node refuses between two looks of a tracer, which are tenths of a second apart. */
#define MAX_REFUSALS 4096

struct refusal {
	/* From 1; 0 while it is written. */
	__u64 number;
	__u64 time;
	__u32 slot;
	__u32 reason;
	/* Of the process that called; 0 where there is none. */
	__u32 pid;
	__u16 protocol;
	__u16 inbound;
	__u16 local_port;
	__u16 remote_port;
	__u32 pad;
	struct address local;
	struct address remote;
	char comm[16];
};

struct tracing {
	/* By the monotonic clock. Tracers put it off, so that a killed one leaves nothing on. */
	__u64 until;
	/* Refusals so far: the place of the next is this, modulo the number of places. */
	__u64 told;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct tracing);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} tracing SEC(".maps");

/* A ring that every tracer reads at its own pace: what was overwritten it sees by the numbers. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_REFUSALS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct refusal);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} refusals SEC(".maps");

/* A place to write to, with what all have in common; 0 while nobody traces. */
static __always_inline struct refusal *begin_refusal(__u32 slot, __u32 reason, __u64 *number)
{
	__u32 at = 0;
	struct tracing *now = bpf_map_lookup_elem(&tracing, &at);
	struct refusal *event;
	__u64 time;

	if (!now || !now->until)
		return 0;
	time = bpf_ktime_get_ns();
	if (now->until < time)
		return 0;
	*number = __sync_fetch_and_add(&now->told, 1);
	at = *number % MAX_REFUSALS;
	event = bpf_map_lookup_elem(&refusals, &at);
	if (!event)
		return 0;
	/* In full before and after it, whatever the processor: an exchange is a barrier. */
	__sync_lock_test_and_set(&event->number, 0);
	event->time = time;
	event->slot = slot;
	event->reason = reason;
	event->pid = 0;
	event->comm[0] = 0;
	return event;
}

static __always_inline void end_refusal(struct refusal *event, __u64 number)
{
	__sync_lock_test_and_set(&event->number, number + 1);
}

/* A packet or a connection, of which no process can be told. */
static __always_inline void tell_refused(const struct tuple *key, __u32 reason, __u16 protocol,
					 int inbound)
{
	__u64 number;
	struct refusal *event = begin_refusal(key->slot, reason, &number);

	if (!event)
		return;
	event->protocol = protocol;
	event->inbound = inbound;
	event->local_port = key->local_port;
	event->remote_port = key->remote_port;
	event->local = key->local;
	event->remote = key->remote;
	end_refusal(event, number);
}

static __always_inline void add_process(struct refusal *event)
{
	event->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(event->comm, sizeof(event->comm));
}

/* A socket that isn't made, and so has no far end: the verdict of its hook. */
static __always_inline int refused_socket(const struct bpf_sock *sk, const struct pod *pod,
					  __u32 reason)
{
	__u64 number;
	struct refusal *event = begin_refusal(pod->slot, reason, &number);

	if (!event)
		return DENY;
	add_process(event);
	event->protocol = (__u16)sk->protocol;
	event->inbound = 0;
	event->local_port = 0;
	event->remote_port = 0;
	event->local = sk->family == AF_INET ? pod->own4 : pod->own6;
	set_v4(&event->remote, 0);
	end_refusal(event, number);
	return DENY;
}

/* A call of a pod's process: the verdict of its hook. */
static __always_inline int refused_call(struct bpf_sock_addr *ctx, struct bpf_sock *sk,
					const struct address *to, __u32 reason)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	struct refusal *event;
	__u64 number;

	if (!pod)
		return DENY;
	event = begin_refusal(pod->slot, reason, &number);
	if (!event)
		return DENY;
	add_process(event);
	event->protocol = (__u16)ctx->protocol;
	event->inbound = 0;
	event->local_port = (__u16)sk->src_port;
	event->remote_port = bpf_ntohs((__u16)ctx->user_port);
	event->local = is_mapped(to) ? pod->own4 : pod->own6;
	event->remote = *to;
	end_refusal(event, number);
	return DENY;
}

#endif
