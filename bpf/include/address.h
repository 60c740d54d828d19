/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Addresses in the one form that all maps use. */
#ifndef UNDERPASS_ADDRESS_H
#define UNDERPASS_ADDRESS_H

#include "underpass.h"

#define MAPPED bpf_htonl(0x0000ffff)

static __always_inline void set_v4(struct address *to, __u32 ip)
{
	to->word[0] = 0;
	to->word[1] = 0;
	to->word[2] = MAPPED;
	to->word[3] = ip;
}

/* The four words of an IPv6 address in a context. */
#define LOAD_V6(to, ctx, field)                       \
	do {                                          \
		(to)->word[0] = LOAD(ctx, field[0]); \
		(to)->word[1] = LOAD(ctx, field[1]); \
		(to)->word[2] = LOAD(ctx, field[2]); \
		(to)->word[3] = LOAD(ctx, field[3]); \
	} while (0)
#define STORE_V6(ctx, field, from)                       \
	do {                                             \
		STORE(ctx, field[0], (from)->word[0]); \
		STORE(ctx, field[1], (from)->word[1]); \
		STORE(ctx, field[2], (from)->word[2]); \
		STORE(ctx, field[3], (from)->word[3]); \
	} while (0)

static __always_inline int is_mapped(const struct address *at)
{
	return !at->word[0] && !at->word[1] && at->word[2] == MAPPED;
}

static __always_inline int same(const struct address *a, const struct address *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] &&
	       a->word[2] == b->word[2] && a->word[3] == b->word[3];
}

/* 127/8, ::1, 0.0.0.0 and ::, which connect() takes for the machine itself. */
static __always_inline int is_loopback(const struct address *at)
{
	if (is_mapped(at))
		return !at->word[3] || (bpf_ntohl(at->word[3]) >> 24) == 127;
	return !at->word[0] && !at->word[1] && !at->word[2] &&
	       (!at->word[3] || at->word[3] == bpf_htonl(1));
}

static __always_inline int is_own(__u32 slot, const struct address *at)
{
	struct own_address key = { .slot = slot, .address = *at };

	return bpf_map_lookup_elem(&own_addresses, &key) != 0;
}

/* 127.0.0.1 or ::1, by the family of `like`. */
static __always_inline void set_loopback(struct address *to, const struct address *like)
{
	if (is_mapped(like)) {
		set_v4(to, bpf_htonl(0x7f000001));
		return;
	}
	to->word[0] = 0;
	to->word[1] = 0;
	to->word[2] = 0;
	to->word[3] = bpf_htonl(1);
}

/*
 * The loopback address that a connection to `to` is led to. Spread by destination, since each pair
 * of addresses has no more than the ephemeral range of ports. IPv6 has ::1 alone.
 */
static __always_inline void spread(struct address *target, const struct address *to, __u16 port)
{
	__u32 mix = (to->word[3] ^ to->word[1] ^ port) * 0x9e3779b1u;

	if (is_mapped(to)) {
		/* 127.1.0.0 to 127.255.255.255: never 127.0.0.1, where people look for their own. */
		__u32 host = 0x7f010000u + (mix >> 8) % 0xfeff00u;

		set_v4(target, bpf_htonl(host));
		return;
	}
	set_loopback(target, to);
}

#endif
