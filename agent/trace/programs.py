"""The tracers' programs, in bcc's C: what runs in the kernel, and the records it hands out.

They hang on raw tracepoints, whose arguments are pointers, and read by offsets that come from the
running kernel's own type information, as macros. So neither tracefs, kprobes nor matching headers
are needed. Only namespaces in the map `pods` are told of; a record that finds no room in the
buffer is counted in `lost`.
"""

import platform
import struct
from dataclasses import dataclass

from agent.trace.btf import Btf, UnknownType

# Where the programs look into the kernel's structures; macro -> struct and field.
_FIELDS = {
    "SK_FAMILY": ("sock", "__sk_common.skc_family"),
    "SK_STATE": ("sock", "__sk_common.skc_state"),
    "SK_NET": ("sock", "__sk_common.skc_net.net"),
    "SK_SADDR": ("sock", "__sk_common.skc_rcv_saddr"),
    "SK_DADDR": ("sock", "__sk_common.skc_daddr"),
    "SK_SADDR6": ("sock", "__sk_common.skc_v6_rcv_saddr"),
    "SK_DADDR6": ("sock", "__sk_common.skc_v6_daddr"),
    "SK_DPORT": ("sock", "__sk_common.skc_dport"),
    "SK_PROTOCOL": ("sock", "sk_protocol"),
    "SK_FLAGS": ("sock", "__sk_common.skc_flags"),
    "SK_CGROUP": ("sock", "sk_cgrp_data.cgroup"),
    "CGROUP_KN": ("cgroup", "kn"),
    "KN_ID": ("kernfs_node", "id"),
    # The sock's own number is taken from it before the last state is told; this one stays.
    "INET_SPORT": ("inet_sock", "inet_sport"),
    "TCP_SENT": ("tcp_sock", "bytes_sent"),
    "TCP_RETRANSMITTED": ("tcp_sock", "bytes_retrans"),
    "TCP_RECEIVED": ("tcp_sock", "bytes_received"),
    "TCP_SRTT": ("tcp_sock", "srtt_us"),
    "NET_INUM": ("net", "ns.inum"),
    "SKB_DEV": ("sk_buff", "dev"),
    "SKB_SK": ("sk_buff", "sk"),
    "SKB_LEN": ("sk_buff", "len"),
    "SKB_HEAD": ("sk_buff", "head"),
    "SKB_DATA": ("sk_buff", "data"),
    "SKB_NETWORK": ("sk_buff", "network_header"),
    "SKB_PROTOCOL": ("sk_buff", "protocol"),
    "DEV_NET": ("net_device", "nd_net.net"),
    "DEV_INDEX": ("net_device", "ifindex"),
}

# An IPv6 header and a TCP header's fixed part.
_DROPPED_BYTES = 64
# Headers and a message as long as everybody takes (RFC 1035 4.2.1); of longer ones the begin.
_DNS_BYTES = 60 + 8 + 512
_SIZES = {
    "DROPPED_BYTES": _DROPPED_BYTES,
    "DNS_BYTES": _DNS_BYTES,
    "MAX_PODS": 4096,
    # Records that wait to be read: 8 MiB, some seconds of a busy node's.
    "BUFFER_PAGES": 2048,
}

# The number of connect(2), and where its second argument is.
_CONNECT = {"x86_64": (42, "si", 0), "aarch64": (203, "regs", 8)}


@dataclass(frozen=True)
class Program:
    """`record` is how Python reads what the program writes, by the names in `fields`."""

    text: str
    record: struct.Struct
    fields: tuple[str, ...]


def macros(btf: Btf) -> tuple[str, ...]:
    """Compiler flags. Raises UnknownType."""
    found = {name: btf.offset(*field) for name, field in _FIELDS.items()}
    # A peer's FIN counts as a byte received; this flag tells that it came.
    flags = {name: bit for bit, name in btf.enum("sock_flags").items()}
    if "SOCK_DONE" not in flags:
        raise UnknownType("the kernel's type information lacks SOCK_DONE")
    found["DONE_BIT"] = flags["SOCK_DONE"]
    found |= _SIZES
    return _flags(found)


def dialling(btf: Btf) -> tuple[str, ...]:
    """For nodes whose capture changes what a socket connects to: looks at connect(2) too, which
    costs every system call of the machine some nanoseconds. () where it isn't known how. Raises
    UnknownType."""
    try:
        number, register, more = _CONNECT[platform.machine()]
    except KeyError:
        return ()
    return _flags({"CONNECT": number, "SECOND": btf.offset("pt_regs", register) + more})


def _flags(found: dict[str, int]) -> tuple[str, ...]:
    return tuple(f"-D{name}={value}" for name, value in found.items())


_COMMON = """
BPF_HASH(pods, u32, u8, MAX_PODS);
BPF_RINGBUF_OUTPUT(records, BUFFER_PAGES);
BPF_ARRAY(lost, u64, 1);

#define READ(type, from, offset) ({ type _v = 0; \\
    bpf_probe_read_kernel(&_v, sizeof(_v), (void *)(from) + (offset)); _v; })

static inline u32 inum(u64 net) { return net ? READ(u32, net, NET_INUM) : 0; }

static inline u64 cgroup(u64 sk)
{
    u64 group = READ(u64, sk, SK_CGROUP);
    u64 node = group ? READ(u64, group, CGROUP_KN) : 0;
    return node ? READ(u64, node, KN_ID) : 0;
}

/* While a packet waits for its socket, the device's place holds something else. */
static inline u32 skb_inum(u64 skb, u64 sk)
{
    if (sk)
        return inum(READ(u64, sk, SK_NET));
    u64 dev = READ(u64, skb, SKB_DEV);
    return dev ? inum(READ(u64, dev, DEV_NET)) : 0;
}
"""

# After the record that it is for.
_FRESH = """
/* All zero; none where there is no room, which is counted. */
static inline struct record *fresh(void)
{
    struct record *to = records.ringbuf_reserve(sizeof(*to));
    int zero = 0;
    u64 *count;

    if (to) {
        __builtin_memset(to, 0, sizeof(*to));
        return to;
    }
    count = lost.lookup(&zero);
    if (count)
        __sync_fetch_and_add(count, 1);
    return 0;
}
"""

_TCP_RECORD = """
struct record {
    u64 time, sk, cgroup, sent, received;
    u32 netns, pid, srtt;
    u16 sport, dport;
    u8 family, before, after, pad[5];
    u8 saddr[16], daddr[16];
    char comm[16];
    u8 dialled[28], pad2[4];
};
"""

_TCP = """
#ifdef CONNECT
/* What a thread is asking for, by connect(2), right now. */
struct asked {
    u64 time;
    u8 address[28];
};
BPF_TABLE("lru_hash", u64, struct asked, asking, 4096);

/* void sys_enter(struct pt_regs *regs, long id) */
RAW_TRACEPOINT_PROBE(sys_enter)
{
    if (ctx->args[1] != CONNECT)
        return 0;
    u64 regs = ctx->args[0], thread = bpf_get_current_pid_tgid();
    u64 from = READ(u64, regs, SECOND);
    struct asked asked = {};

    bpf_probe_read_user(asked.address, 16, (void *)from);
    if (asked.address[0] == 10)
        bpf_probe_read_user(asked.address, 28, (void *)from);
    asked.time = bpf_ktime_get_ns();
    asking.update(&thread, &asked);
    return 0;
}
#endif

/* int inet_sock_set_state(const struct sock *sk, int before, int after) */
RAW_TRACEPOINT_PROBE(inet_sock_set_state)
{
    u64 sk = ctx->args[0];
    u32 before = ctx->args[1], after = ctx->args[2];

    /* 1 established, 2 SYN sent, 7 closed, 10 listening */
    if ((after != 1 && after != 2 && after != 7) || before == 10 || before == after)
        return 0;
    /* The end of one that never was more than bound. */
    if (after == 7 && before == 7)
        return 0;
    if (READ(u16, sk, SK_PROTOCOL) != 6)
        return 0;
    u32 netns = inum(READ(u64, sk, SK_NET));
    if (!pods.lookup(&netns))
        return 0;
    struct record *to = fresh();
    if (!to)
        return 0;
    to->time = bpf_ktime_get_ns();
    to->sk = sk;
    to->cgroup = cgroup(sk);
    to->sent = READ(u64, sk, TCP_SENT) - READ(u64, sk, TCP_RETRANSMITTED);
    to->received = READ(u64, sk, TCP_RECEIVED);
    if (to->received && READ(u64, sk, SK_FLAGS) >> DONE_BIT & 1)
        to->received--;
    to->netns = netns;
    to->srtt = READ(u32, sk, TCP_SRTT) >> 3;
    to->sport = bpf_ntohs(READ(u16, sk, INET_SPORT));
    to->dport = bpf_ntohs(READ(u16, sk, SK_DPORT));
    to->family = READ(u16, sk, SK_FAMILY);
    to->before = before;
    to->after = after;
    if (to->family == 2) {
        bpf_probe_read_kernel(to->saddr, 4, (void *)sk + SK_SADDR);
        bpf_probe_read_kernel(to->daddr, 4, (void *)sk + SK_DADDR);
    } else {
        bpf_probe_read_kernel(to->saddr, 16, (void *)sk + SK_SADDR6);
        bpf_probe_read_kernel(to->daddr, 16, (void *)sk + SK_DADDR6);
    }
    /* Only the first step of a client is made by the process that wants it. */
    if (after == 2) {
        to->pid = bpf_get_current_pid_tgid() >> 32;
        bpf_get_current_comm(to->comm, sizeof(to->comm));
#ifdef CONNECT
        u64 thread = bpf_get_current_pid_tgid();
        struct asked *asked = asking.lookup(&thread);

        /* Later it isn't from this call: io_uring makes none. */
        if (asked && to->time - asked->time < 1000000)
            __builtin_memcpy(to->dialled, asked->address, sizeof(to->dialled));
        asking.delete(&thread);
#endif
    }
    records.ringbuf_submit(to, 0);
    return 0;
}
"""

TCP = Program(
    _COMMON + _TCP_RECORD + _FRESH + _TCP,
    struct.Struct("=5Q3I2H3B5x16s16s16s28s4x"),
    (
        *("time", "sk", "cgroup", "sent", "received", "netns", "pid", "srtt"),
        *("sport", "dport", "family", "before", "after", "saddr", "daddr", "comm", "dialled"),
    ),
)

_DROPS_RECORD = """
struct record {
    u64 time, cgroup, location;
    u32 netns, reason, length, pad;
    u8 packet[DROPPED_BYTES];
};
"""

_DROPS = """
/* void kfree_skb(struct sk_buff *skb, void *location, enum skb_drop_reason reason, ...) */
RAW_TRACEPOINT_PROBE(kfree_skb)
{
    u64 skb = ctx->args[0];

    /* ETH_P_IP, ETH_P_IPV6: neither netlink's nor ARP's. */
    u16 protocol = bpf_ntohs(READ(u16, skb, SKB_PROTOCOL));
    if (protocol != 0x0800 && protocol != 0x86dd)
        return 0;
    u64 sk = READ(u64, skb, SKB_SK);
    u32 netns = skb_inum(skb, sk);
    if (!pods.lookup(&netns))
        return 0;
    struct record *to = fresh();
    if (!to)
        return 0;
    to->time = bpf_ktime_get_ns();
    to->location = ctx->args[1];
    to->reason = ctx->args[2];
    to->netns = netns;
    to->length = READ(u32, skb, SKB_LEN);
    u64 packet = READ(u64, skb, SKB_HEAD) + READ(u16, skb, SKB_NETWORK);
    bpf_probe_read_kernel(to->packet, sizeof(to->packet), (void *)packet);
    records.ringbuf_submit(to, 0);
    return 0;
}
"""

DROPS = Program(
    _COMMON + _DROPS_RECORD + _FRESH + _DROPS,
    struct.Struct(f"=3Q3I4x{_DROPPED_BYTES}s"),
    ("time", "cgroup", "location", "netns", "reason", "length", "packet"),
)

_DNS_RECORD = """
struct record {
    u64 time, cgroup;
    u32 netns, pid, length;
    u8 sent, pad[3];
    char comm[16];
    u8 packet[DNS_BYTES];
    u8 pad2[4];
};
"""

_DNS = """
static inline int dns_port(u16 port) { return port == 53 || port == DNS_PORT; }

static int tell(u64 skb, u64 sk, u64 packet, u32 netns, u8 sent)
{
    u8 first = READ(u8, packet, 0);
    u32 header;

    if (first >> 4 == 4 && READ(u8, packet, 9) == 17)
        header = (first & 15) * 4;
    else if (first >> 4 == 6 && READ(u8, packet, 6) == 17)
        header = 40;
    else
        return 0;
    u16 from = bpf_ntohs(READ(u16, packet, header));
    u16 to_port = bpf_ntohs(READ(u16, packet, header + 2));
    if (!dns_port(from) && !dns_port(to_port))
        return 0;
    struct record *to = fresh();
    if (!to)
        return 0;
    to->time = bpf_ktime_get_ns();
    to->netns = netns;
    to->sent = sent;
    to->length = READ(u32, skb, SKB_LEN);
    if (sk)
        to->cgroup = cgroup(sk);
    if (sent) {
        to->pid = bpf_get_current_pid_tgid() >> 32;
        bpf_get_current_comm(to->comm, sizeof(to->comm));
    }
    bpf_probe_read_kernel(to->packet, sizeof(to->packet), (void *)packet);
    records.ringbuf_submit(to, 0);
    return 0;
}

/* void net_dev_queue(struct sk_buff *skb) */
RAW_TRACEPOINT_PROBE(net_dev_queue)
{
    u64 skb = ctx->args[0];
    u64 sk = READ(u64, skb, SKB_SK);
    u64 dev = READ(u64, skb, SKB_DEV);
    u32 netns = dev ? inum(READ(u64, dev, DEV_NET)) : 0;

    if (!pods.lookup(&netns))
        return 0;
    return tell(skb, sk, READ(u64, skb, SKB_HEAD) + READ(u16, skb, SKB_NETWORK), netns, 1);
}

/* void netif_receive_skb(struct sk_buff *skb): before the network header's place is noted */
RAW_TRACEPOINT_PROBE(netif_receive_skb)
{
    u64 skb = ctx->args[0];
    u64 dev = READ(u64, skb, SKB_DEV);
    u32 netns = dev ? inum(READ(u64, dev, DEV_NET)) : 0;

    /* What comes over the loopback was told when it left. */
    if (!pods.lookup(&netns) || READ(u32, dev, DEV_INDEX) == 1)
        return 0;
    return tell(skb, 0, READ(u64, skb, SKB_DATA), netns, 0);
}
"""

DNS = Program(
    _COMMON + _DNS_RECORD + _FRESH + _DNS,
    struct.Struct(f"=2Q3IB3x16s{_DNS_BYTES}s4x"),
    ("time", "cgroup", "netns", "pid", "length", "sent", "comm", "packet"),
)

PROGRAMS = {"tcp": TCP, "drops": DROPS, "dns": DNS}
