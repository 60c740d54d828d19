/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Connections of the data plane to applications: let past the inbound listener until the kernel
 * finds them by their tuple.
 */
#ifndef UNDERPASS_RELAY_H
#define UNDERPASS_RELAY_H

#include "underpass.h"

/*
 * From the data plane's end being established to the other's. Between them is one packet over
 * loopback; where SYNs are answered by cookies, it looks for the listener once more.
 */
#define LAST_ACK_MS 3000

/* Never 0. */
static __always_inline __u32 now_ms(void)
{
	return (__u32)(bpf_ktime_get_ns() / 1000000) | 1;
}

static __always_inline int begin_relay(const struct tuple *key)
{
	__u32 dialling = 0;

	return bpf_map_update_elem(&relays, key, &dialling, BPF_ANY);
}

static __always_inline void relay_established(const struct tuple *key)
{
	__u32 *since = bpf_map_lookup_elem(&relays, key);

	if (since)
		*since = now_ms();
}

static __always_inline void end_relay(const struct tuple *key)
{
	bpf_map_delete_elem(&relays, key);
}

static __always_inline int is_relay(const struct tuple *key)
{
	__u32 *since = bpf_map_lookup_elem(&relays, key);

	return since && (!*since || now_ms() - *since < LAST_ACK_MS);
}

#endif
