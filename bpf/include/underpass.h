/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What the programs share: the maps, and the layouts that the data plane knows too (its file
 * capture/layout.rs; a test compares both by BTF). Addresses are 16 bytes in network order, IPv4 as
 * ::ffff:a.b.c.d; ports are in host order.
 *
 * Another version finds these maps pinned, and renews those whose sizes differ (capture/renewal.rs):
 * values grow at their end, and a map whose entries mean something else at the same size needs
 * another name. Slot and flags stay the beginning of struct pod.
 */
#ifndef UNDERPASS_H
#define UNDERPASS_H

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "reasons.h"

#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define SOCK_DGRAM 2
#define SOCK_SEQPACKET 5
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_MPTCP 262

#define MAX_PODS 4096
#define MAX_RECORDS 262144
#define MAX_FLOWS 16384
#define MAX_QUESTIONS 65536
/* Of the kubelet, which has hundreds of pods to ask at most, and asks each for seconds at most. */
#define MAX_PROBES 16384
#define MAX_PROBE_PORTS 131072
#define DNS_PORT 53

#define POD_DNS 0x1
#define POD_BYPASS_INBOUND 0x2
#define POD_UDP_DENY 0x4
#define POD_IPV6_OFF 0x8
/* Nothing new is captured; what is on its way to the listener still arrives. */
#define POD_LEAVING 0x100

/*
 * A word of the context. The verifier takes no computed address of one, which the compiler makes of
 * loads or stores that stand in two branches, volatile or not; the offset as an immediate it can't
 * merge.
 */
#define LOAD(ctx, field)                                                           \
	({                                                                         \
		__u32 __word;                                                      \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                              \
			     : "=r"(__word)                                        \
			     : "r"(ctx), "i"(__builtin_offsetof(typeof(*(ctx)), field))); \
		__word;                                                            \
	})
#define STORE(ctx, field, value)                                                   \
	asm volatile("*(u32 *)(%0 + %1) = %2"                                      \
		     :                                                             \
		     : "r"(ctx), "i"(__builtin_offsetof(typeof(*(ctx)), field)), "r"(value) \
		     : "memory")

#define ALLOW 1
#define DENY 0

struct address {
	__u32 word[4];
};

struct pod {
	__u32 slot;
	__u32 flags;
	/* Most connections on record at once. */
	__u32 budget;
	__u32 pad;
	/* What its applications see as their own address; zero: none of that family. */
	struct address own4;
	struct address own6;
};

/* As the accepting side sees it. */
struct tuple {
	__u32 slot;
	__u16 local_port;
	__u16 remote_port;
	struct address local;
	struct address remote;
};

struct destination {
	struct address address;
	__u16 port;
	__u16 pad;
	__u32 slot;
};

struct own_address {
	__u32 slot;
	struct address address;
};

struct probe_port {
	struct address address;
	__u16 port;
	__u16 pad;
};

/* Of an application's socket, from its connect on. */
struct dialled {
	struct destination wanted;
	/* Where it was led instead. */
	struct address target;
	__u16 target_port;
	__u16 pad;
	__u32 recorded;
	struct tuple key;
};

/* Of one pod: what the mesh doesn't carry. */
struct datagrams {
	__u64 refused;
	__u64 unprotected;
};

struct flow {
	__u32 slot;
	__u16 local_port;
	__u16 remote_port;
	struct address remote;
};

struct question_key {
	__u32 slot;
	__u32 bucket;
};

/* To a nameserver past the mesh, by an unconnected socket. */
struct question {
	struct address server;
	__u16 local_port;
	__u16 pad[3];
	__u64 asked;
};

/* By the cookie of the network namespace. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PODS);
	__type(key, __u64);
	__type(value, struct pod);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} pods SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PODS * 8);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct own_address);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} own_addresses SEC(".maps");

/* Cgroups whose sockets are never captured, by id; the value is the process that said so. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, __u64);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} exempt SEC(".maps");

/* Where captured connections were going, until they are accepted. Never LRU: one pod's burst would
 * push out another's (design section 4). */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_RECORDS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tuple);
	__type(value, struct destination);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} originals SEC(".maps");

/* The data plane's connections to applications that aren't established at both ends yet: 0, or when
 * the data plane's end was (way.h). */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_RECORDS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tuple);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} relays SEC(".maps");

/* Where the kubelet may go past the mesh; the value is the slot of the one pod that it reaches so. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PROBE_PORTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct probe_port);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} probe_ports SEC(".maps");

/* The kubelet's connections to such ports, likewise. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PROBES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct tuple);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} probes SEC(".maps");

/* Entries of `originals`, by slot. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_PODS);
	__type(key, __u32);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} records SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_PODS);
	__type(key, __u32);
	__type(value, struct datagrams);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} datagrams SEC(".maps");

/* When a datagram last passed. LRU, for it only counts: what is pushed out counts once more. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct flow);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} flows SEC(".maps");

/* Of pods whose datagrams are refused and whose DNS isn't captured. A newer question takes the
 * place of an older one of the same pod. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_QUESTIONS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct question_key);
	__type(value, struct question);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} questions SEC(".maps");

/* The inbound listeners, by slot. A listener that closes leaves its place empty by itself. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, MAX_PODS);
	__type(key, __u32);
	__type(value, __u32);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} listeners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, REASONS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} reasons SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct dialled);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} dialled SEC(".maps");

/* Of the sockets that the outbound listener accepted. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct destination);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} accepted SEC(".maps");

/* Of the kubelet's sockets: what stands in `probes` for them. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct tuple);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} probing SEC(".maps");

/* Set before loading. */
const volatile __u16 outbound_port = 15001;
const volatile __u16 hbone_port = 15008;
const volatile __u16 dns_port = 15053;

static __always_inline void count(__u32 reason)
{
	__u64 *counter = bpf_map_lookup_elem(&reasons, &reason);

	if (counter)
		*counter += 1;
}

static __always_inline int pass(__u32 reason)
{
	count(reason);
	return ALLOW;
}

/* For inner functions, whose program tells of it and denies (refusals.h). */
static __always_inline int refuse(__u32 reason)
{
	count(reason);
	return -(int)reason;
}

#endif
