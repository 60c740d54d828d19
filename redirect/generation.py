"""The number that nftables of one network namespace raises with every change to its rules.

While it stays, nothing was changed, so that a pod's rules needn't be listed again: a listing costs
milliseconds, and nft walks the whole cgroup tree to print a cgroup's path.
"""

from __future__ import annotations

import os
import socket
import struct

from redirect.base import NotRetryable, RedirectError

_NETLINK_NETFILTER = 12
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
# NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN (linux/netfilter/nf_tables.h)
_GETGEN = 10 << 8 | 16
_NFTA_GEN_ID = 1
_HEADER = struct.Struct("=IHHII")
_NFGENMSG = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")


def current() -> int:
    """Of the namespace that the calling thread is in. Raises RedirectError."""
    request = _HEADER.pack(_HEADER.size + _NFGENMSG.size, _GETGEN, _NLM_F_REQUEST, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
            netlink.settimeout(5)
            netlink.send(request + _NFGENMSG.pack(0, 0, 0))
            answer = netlink.recv(4096)
    except OSError as exc:
        raise RedirectError(f"nftables doesn't tell its generation: {exc}") from exc
    return _parse(answer)


def _parse(answer: bytes) -> int:
    _, kind, _, _, _ = _HEADER.unpack_from(answer)
    offset = _HEADER.size
    if kind == _NLMSG_ERROR:
        (code,) = struct.unpack_from("=i", answer, offset)
        raise NotRetryable(
            f"nftables doesn't tell its generation: {os.strerror(-code)};"
            " the kernel needs nf_tables, and the agent CAP_NET_ADMIN"
        )
    offset += _NFGENMSG.size
    while offset + _ATTRIBUTE.size <= len(answer):
        length, attribute = _ATTRIBUTE.unpack_from(answer, offset)
        if attribute == _NFTA_GEN_ID:
            (generation,) = struct.unpack_from("!I", answer, offset + _ATTRIBUTE.size)
            return int(generation)
        offset += max(length + 3 & ~3, _ATTRIBUTE.size)
    raise RedirectError("nftables tells no generation")
