/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Ways past the inbound listener, for connections of the data plane (`relays`) and of the kubelet
 * (`probes`) to applications: open until the kernel finds them by their tuple.
 */
#ifndef UNDERPASS_WAY_H
#define UNDERPASS_WAY_H

#include "underpass.h"

/*
 * From the dialling end being established to the other's. Between them is one packet within the
 * node; where SYNs are answered by cookies, it looks for the listener once more.
 */
#define LAST_ACK_MS 3000

/* Never 0. */
static __always_inline __u32 now_ms(void)
{
	return (__u32)(bpf_ktime_get_ns() / 1000000) | 1;
}

static __always_inline int open_way(void *ways, const struct tuple *key)
{
	__u32 dialling = 0;

	return bpf_map_update_elem(ways, key, &dialling, BPF_ANY);
}

static __always_inline void way_established(void *ways, const struct tuple *key)
{
	__u32 *since = bpf_map_lookup_elem(ways, key);

	if (since)
		*since = now_ms();
}

static __always_inline void close_way(void *ways, const struct tuple *key)
{
	bpf_map_delete_elem(ways, key);
}

static __always_inline int has_way(void *ways, const struct tuple *key)
{
	__u32 *since = bpf_map_lookup_elem(ways, key);

	return since && (!*since || now_ms() - *since < LAST_ACK_MS);
}

#endif
