"""What crosses the wire between the nodes: a packet socket that looks for a marker and counts."""

import socket
import struct
import threading
from collections import Counter
from types import TracebackType

from agent.cli.demo.netns import inside

ETH_P_ALL = 3


class Wiretap:
    """Reads every frame of `interface` in `namespace` between `with` and its end.

    `marker` is looked for in each frame, so it must be short enough to lie in one; `ports` counts
    TCP payload bytes by the lower port of each frame, which is the server's in our worlds;
    `first_bytes` keeps the first payload bytes of each connection to port 15008.
    """

    def __init__(self, namespace: str, interface: str, marker: bytes) -> None:
        self.marker = marker
        self.sightings = 0
        self.ports: Counter[int] = Counter()
        self.first_bytes: dict[tuple[bytes, int], bytes] = {}
        self._where = namespace, interface
        self._stop = threading.Event()

    def __enter__(self) -> "Wiretap":
        namespace, interface = self._where

        def opened() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
            sock.bind((interface, ETH_P_ALL))
            sock.settimeout(0.1)
            return sock

        self._sock = inside(namespace, opened)
        self._thread = threading.Thread(target=self._read, name="wiretap")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sock.close()

    def _read(self) -> None:
        # One more read after the stop: what was sent before it is in the socket's queue.
        last = False
        while True:
            try:
                frame = self._sock.recv(1 << 16)
            except TimeoutError:
                if last:
                    return
                last = self._stop.is_set()
                continue
            self._look(frame)

    def _look(self, frame: bytes) -> None:
        if self.marker in frame:
            self.sightings += 1
        segment = _tcp(frame)
        if segment is None:
            return
        addresses, source, destination, payload = segment
        if payload:
            self.ports[min(source, destination, key=_is_ephemeral)] += len(payload)
            if destination == 15008:
                self.first_bytes.setdefault((addresses, source), payload[:3])


def _is_ephemeral(port: int) -> tuple[bool, int]:
    return port >= 32768, port


def _tcp(frame: bytes) -> tuple[bytes, int, int, bytes] | None:
    """(addresses, source port, destination port, payload) of a TCP frame without extensions."""
    (kind,) = struct.unpack_from("!H", frame, 12)
    if kind == 0x0800 and frame[23] == 6:
        start, end = 14 + (frame[14] & 15) * 4, 14 + struct.unpack_from("!H", frame, 16)[0]
        addresses = frame[26:34]
    elif kind == 0x86DD and frame[20] == 6:
        start, end = 54, 54 + struct.unpack_from("!H", frame, 18)[0]
        addresses = frame[22:54]
    else:
        return None
    source, destination = struct.unpack_from("!HH", frame, start)
    return addresses, source, destination, frame[start + (frame[start + 12] >> 4) * 4 : end]
