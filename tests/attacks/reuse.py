"""One socket for everything: connected to each of some destinations in every order, and loosened
by AF_UNSPEC between two of them.

Run as `python -m tests.attacks.reuse MARKER NAME=HOST:PORT …`; IPv6 hosts stand without brackets.
"""

from __future__ import annotations

import itertools
import sys

from tests.attacks.talk import converse, disconnect, error_name, report, stream


def main(marker: str, destinations: list[str]) -> None:
    targets = [_parse(text) for text in destinations]
    with stream(targets[0][1]) as sock:
        for number, order in enumerate(itertools.permutations(targets)):
            for name, host, port in order:
                try:
                    sock.connect((host, port))
                    report(name, order=number, **converse(sock, marker))
                except OSError as exc:
                    report(name, order=number, error=error_name(exc))
                disconnect(sock)


def _parse(text: str) -> tuple[str, str, int]:
    name, _, rest = text.partition("=")
    host, _, port = rest.rpartition(":")
    return name, host, int(port)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
