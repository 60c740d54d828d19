"""The demo's echo server behind an MPTCP listener: `python -m tests.attacks.mptcp_echo NAME PORT`.

Serves one client at a time.
"""

from __future__ import annotations

import socket
import sys

from tests.attacks.odd_sockets import IPPROTO_MPTCP


def main(name: str, port: int) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM, IPPROTO_MPTCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("::", port))
        listener.listen()
        print("listening", flush=True)
        while True:
            sock, peer = listener.accept()
            with sock:
                try:
                    sock.sendall(f"{name} sees {peer[0].removeprefix('::ffff:')}\n".encode())
                    while data := sock.recv(1 << 16):
                        sock.sendall(data)
                except OSError:
                    continue  # the client went away: the next one


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
