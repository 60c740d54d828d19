"""IORING_OP_CONNECT by raw system calls: no libc function makes the connection."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from typing import TYPE_CHECKING

from tests.attacks.talk import call, sockaddr

if TYPE_CHECKING:
    import socket

SETUP, ENTER = 425, 426
SETUP_SQPOLL = 2
ENTER_GETEVENTS, ENTER_SQ_WAKEUP = 1, 2
OP_CONNECT = 16
OFFSET_CQ, OFFSET_SQES = 0x8000000, 0x10000000
# struct io_uring_params, its two offset tables included.
PARAMS = struct.Struct("=10I 8IQ 8IQ")


def connect(sock: socket.socket, host: str, port: int, *, kernel_thread: bool) -> None:
    """With `kernel_thread` the request is picked up by the ring's own thread. Raises OSError."""
    params = ctypes.create_string_buffer(PARAMS.size)
    # flags and sq_thread_idle (milliseconds)
    struct.pack_into("=2I", params, 8, SETUP_SQPOLL if kernel_thread else 0, 0)
    struct.pack_into("=I", params, 16, 1000)
    ring = call("syscall", SETUP, 4, params)
    try:
        fields = PARAMS.unpack(params.raw)
        entries, cq_entries = fields[0], fields[1]
        _, sq_tail, _, _, _, _, sq_array, _, _ = fields[10:19]
        _, _, _, _, _, cqes, _, _, _ = fields[19:28]
        with (
            mmap.mmap(ring, sq_array + 4 * entries) as submissions,
            mmap.mmap(ring, cqes + 16 * cq_entries, offset=OFFSET_CQ) as completions,
            mmap.mmap(ring, 64 * entries, offset=OFFSET_SQES) as requests,
        ):
            target = sockaddr(host, port)
            held = ctypes.create_string_buffer(target, len(target))
            # opcode, flags, ioprio, fd, off (the length), addr
            struct.pack_into(
                "=BBHiQQ", requests, 0, OP_CONNECT, 0, 0, sock.fileno(), len(target),
                ctypes.addressof(held),
            )  # fmt: skip
            struct.pack_into("=I", submissions, sq_array, 0)
            struct.pack_into("=I", submissions, sq_tail, 1)
            call("syscall", ENTER, ring, 1, 1, ENTER_GETEVENTS | ENTER_SQ_WAKEUP, None, 0)
            (result,) = struct.unpack_from("=i", completions, cqes + 8)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
    finally:
        os.close(ring)
