/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Why a hook did what it did, one number an exit. Numbers are never reused: user space shows them
 * by name (the data plane's build reads this file), and a newer program may count for an older one.
 * The texts are for users, in agent/trace/reasons.py and docs/tracing.md too (a test compares them).
 */
#ifndef UNDERPASS_REASONS_H
#define UNDERPASS_REASONS_H

enum reason {
	REASON_CAPTURED = 1, /* pass: led to the outbound listener */
	REASON_DNS = 2, /* pass: led to the DNS listener */
	REASON_LOOPBACK = 3, /* pass: to the pod itself, by a loopback address */
	REASON_SELF = 4, /* pass: to the pod itself, by an address of its own */
	REASON_DATA_PLANE = 5, /* pass: a socket of the data plane */
	REASON_INBOUND = 6, /* pass: led to the inbound listener */
	REASON_RELAY = 7, /* pass: the data plane's connection to the application */
	REASON_HBONE = 8, /* pass: to the HBONE listener */
	REASON_PROBE = 9, /* pass: the kubelet's connection to a declared port */
	REASON_UNPROTECTED = 10, /* pass: not TCP, which is all that the mesh carries */
	REASON_BYPASS_INBOUND = 11, /* pass: inbound capture is off for the pod */
	REASON_NO_STORAGE = 32, /* deny: no memory for the socket's record */
	REASON_BOUND_DEVICE = 33, /* deny: the socket is bound to a device, so it would leave past the mesh */
	REASON_NO_LISTENER = 34, /* drop: no data plane listens for the pod */
	REASON_ASSIGN = 35, /* drop: the kernel refused the listener for the packet */
	REASON_UDP_DENIED = 36, /* deny: datagrams are refused by the namespace's setting */
	REASON_BUDGET = 37, /* deny: as many connections of the pod wait to be accepted as may */
	REASON_FAMILY = 38, /* deny: a protocol or an address family that the mesh can't carry */
	REASON_IPV6_OFF = 39, /* deny: IPv6 is off in the data plane */
	REASON_NOT_RECORDED = 40, /* deny: no room to record the connection, so the proxy doesn't know it */
	REASON_STALE = 41, /* deny: the socket went elsewhere than its record says, so the proxy refuses it */
	REASON_UNKNOWN_DESTINATION = 42, /* deny: no destination on record, as of what dials the proxy's own port */
	REASON_NO_POD = 43, /* deny: enrolled, but not described; no program says so any more */
	REASON_LOOPBACK_LEAK = 44, /* deny: led to loopback, and would leave by another device */
	REASON_RAW_SOCKET = 45, /* deny: TCP of a raw socket, which would leave past the mesh */
	REASONS = 64,
};

#endif
