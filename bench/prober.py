"""One new connection after another, each timed from connect to the first byte of the answer.

A process of its own, so that it doesn't wait for the rest of the bench:
`python -m bench.prober HOST PORT FILE`, ended by SIGTERM. Writes a line for each connection:
when it began (monotonic seconds), how long it took (milliseconds), what went wrong if anything.
"""

import gc
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Two hundred and more a second, yet little of a core.
PAUSE = 0.003
# Longer than any time limit of the data plane.
TIMEOUT = 15.0


@dataclass(frozen=True)
class Probe:
    began: float
    milliseconds: float
    failure: str


@dataclass(frozen=True)
class Stalls:
    """Of the probes that ran in a span of time; milliseconds."""

    count: int
    failures: int
    median: float
    p99: float
    longest: float


def read(file: Path) -> list[Probe]:
    probes = []
    for line in file.read_text().splitlines():
        began, took, failure = line.split(" ", 2)
        probes.append(Probe(float(began), float(took), failure))
    return probes


def stalls(probes: Sequence[Probe], start: float, end: float) -> Stalls:
    """Probes that overlap the span count, also when they began before it."""
    inside = [
        probe
        for probe in probes
        if probe.began < end and probe.began + probe.milliseconds / 1000 > start
    ]
    times = sorted(probe.milliseconds for probe in inside) or [float("nan")]
    return Stalls(
        count=len(inside),
        failures=sum(bool(probe.failure) for probe in inside),
        median=times[len(times) // 2],
        p99=times[int(len(times) * 0.99)],
        longest=times[-1],
    )


def main() -> None:
    host, port, file = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopping.append(number))
    # A collection would look like a stall.
    gc.disable()
    request = f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    with file.open("w", buffering=1) as out:
        while not stopping:
            began = time.monotonic()
            failure = _once(host, port, request)
            took = (time.monotonic() - began) * 1000
            out.write(f"{began:.6f} {took:.3f} {failure}\n")
            time.sleep(PAUSE)


def _once(host: str, port: int, request: bytes) -> str:
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT) as client:
            client.sendall(request)
            return "" if client.recv(1) else "closed without an answer"
    except OSError as error:
        return str(error) or type(error).__name__


if __name__ == "__main__":
    main()
