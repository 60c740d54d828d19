/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Raw sockets of pods, whose TCP no other hook would see: known from when they are made, also before
 * their pod is enrolled, and judged by each packet, since a raw socket may write any header.
 */
#ifndef UNDERPASS_RAW_H
#define UNDERPASS_RAW_H

#include "address.h"

#define SOCK_RAW 3
#define IPPROTO_UDPLITE 136
#define IPPROTO_DCCP 33
#define IPPROTO_SCTP 132
/* Offsets in the headers of linux/ip.h and linux/ipv6.h. */
#define PROTOCOL_V4 9
#define SOURCE_V4 12
#define NEXT_HEADER_V6 6
#define SOURCE_V6 8
#define HEADER_V6 40
/* Extension headers (RFC 8200 section 4.1); more than any real packet has are refused. */
#define MAX_EXTENSIONS 8
#define HOP_BY_HOP 0
#define ROUTING 43
#define FRAGMENT 44
#define AUTHENTICATION 51
#define DESTINATION_OPTIONS 60
#define MOBILITY 135
#define HOST_IDENTITY 139
#define SHIM6 140
#define UNKNOWN (-1)

/* The cookie of the network namespace that such a socket was made in. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} raw_sockets SEC(".maps");

struct extension {
	__u8 next;
	/* In units of 8 bytes beyond the first; AUTHENTICATION: of 4 bytes beyond the first two. */
	__u8 length;
	/* FRAGMENT: the offset, in its upper 13 bits. */
	__u16 offset;
};

/* What an IPv6 packet carries behind its extension headers; UNKNOWN where that can't be told. */
static __always_inline int carried_v6(struct __sk_buff *skb)
{
	struct extension one;
	__u32 at = HEADER_V6;
	__u8 next;

	if (bpf_skb_load_bytes(skb, NEXT_HEADER_V6, &next, sizeof(next)))
		return UNKNOWN;
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		int later = 0;

		switch (next) {
		case HOP_BY_HOP:
		case ROUTING:
		case FRAGMENT:
		case AUTHENTICATION:
		case DESTINATION_OPTIONS:
		case MOBILITY:
		case HOST_IDENTITY:
		case SHIM6:
			break;
		default:
			return next;
		}
		if (bpf_skb_load_bytes(skb, at, &one, sizeof(one)))
			return UNKNOWN;
		if (next == FRAGMENT) {
			later = (one.offset & bpf_htons(0xfff8)) != 0;
			at += 8;
		} else if (next == AUTHENTICATION) {
			at += ((__u32)one.length + 2) * 4;
		} else {
			at += ((__u32)one.length + 1) * 8;
		}
		next = one.next;
		/* What follows an extension header in it went with the first one. */
		if (later)
			return next == HOP_BY_HOP || next == DESTINATION_OPTIONS || next == ROUTING ||
				       next == AUTHENTICATION ?
				       UNKNOWN :
				       next;
	}
	return UNKNOWN;
}

static __always_inline int carried_v4(struct __sk_buff *skb)
{
	__u8 protocol;

	return bpf_skb_load_bytes(skb, PROTOCOL_V4, &protocol, sizeof(protocol)) ? UNKNOWN :
										   protocol;
}

/* 0, or why a packet of a raw socket in this pod doesn't leave. */
static __always_inline __u32 refuses_raw(const struct pod *pod, int protocol)
{
	switch (protocol) {
	case UNKNOWN:
	case IPPROTO_TCP:
		return REASON_RAW_SOCKET;
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
	case IPPROTO_DCCP:
	case IPPROTO_SCTP:
		return pod->flags & POD_UDP_DENY ? REASON_UDP_DENIED : 0;
	}
	return 0;
}

#endif
