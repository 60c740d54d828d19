"""The process that loads bcc: `python -m agent.trace.child PROGRAM PARENT DNS-PORT [dialled]`.

Standard input: lines of JSON, each the inode numbers of the namespaces to tell of; its end is the
end. Standard output: lines of JSON. {"ready": true} once everything is attached, then records with
the programs' fields (bytes as hex), {"now": ns} once everything before that moment was told,
{"lost": n} when that many found no room, {"error": text} when it can't. The kernel frees the
programs with this process, however it dies: nothing is pinned.
"""

import ctypes
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.trace import headers
from agent.trace.btf import VMLINUX, Btf, UnknownType
from agent.trace.programs import PROGRAMS, Program, dialling, macros

if TYPE_CHECKING:
    from collections.abc import Iterable

_PR_SET_PDEATHSIG = 1
# How long a change of the namespaces waits to be seen; records don't.
_POLL_MS = 100
# How often it is said up to when everything was told.
_NOW_NS = 50_000_000
_PIECE = 1 << 16


class Unusable(Exception):
    """This machine can't trace as it is; the text says what to install or do."""


def main(program: str, parent: int, dns_port: int, *more: str) -> int:
    _end_with(parent)
    # Ctrl-C goes to everybody at the terminal; the parent closes our input then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        tracer = _Tracer(PROGRAMS[program], dns_port, dialled="dialled" in more)
    except Unusable as exc:
        _tell({"error": str(exc)})
        return 1
    try:
        tracer.run()
    except BrokenPipeError:
        # Nobody reads; leave without the flush that would fail again.
        os._exit(0)
    return 0


class _Tracer:
    """Compiled, loaded and attached; `run` tells until the input ends. Raises Unusable."""

    def __init__(self, program: Program, dns_port: int, *, dialled: bool) -> None:
        self._program = program
        self._bpf = _load(program, dns_port, dialled=dialled)
        self._lost = 0
        self._input = b""
        self._pods: set[int] | None = None
        self._symbols = "location" in program.fields
        self._bpf["records"].open_ring_buffer(self._record)

    def run(self) -> None:
        # Before "ready", so that nothing is missed after it.
        while self._pods is None:
            select.select([0], [], [])
            if not self._obey():
                return
        _tell({"ready": True})
        told = 0
        while not select.select([0], [], [], 0)[0] or self._obey():
            # What was there when it was called, it reads.
            before = time.monotonic_ns()
            self._bpf.ring_buffer_poll(_POLL_MS)
            if before - told >= _NOW_NS:
                self._count()
                _tell({"now": before})
                told = before
            sys.stdout.flush()

    def _obey(self) -> bool:
        """Reads what the parent says; False at its end."""
        piece = os.read(0, _PIECE)
        *lines, self._input = (self._input + piece).split(b"\n")
        if lines:
            self._watch(json.loads(lines[-1]))
        return bool(piece)

    def _watch(self, inodes: "Iterable[int]") -> None:
        wanted, table = set(inodes), self._bpf["pods"]
        known = self._pods or set()
        for inode in known - wanted:
            del table[table.Key(inode)]
        for inode in wanted - known:
            table[table.Key(inode)] = table.Leaf(1)
        self._pods = wanted

    def _record(self, _: object, data: int, size: int) -> None:
        struct = self._program.record
        values = struct.unpack_from(ctypes.string_at(data, struct.size))
        record: dict[str, object] = dict(zip(self._program.fields, values, strict=True))
        for name, value in record.items():
            if name == "comm" and isinstance(value, bytes):
                record[name] = value.partition(b"\0")[0].decode(errors="replace")
            elif isinstance(value, bytes):
                record[name] = value.hex()
        if self._symbols:
            record["location"] = self._bpf.ksym(record["location"]).decode(errors="replace")
        sys.stdout.write(json.dumps(record) + "\n")

    def _count(self) -> None:
        table = self._bpf["lost"]
        lost = table[table.Key(0)].value + self._misses()
        if lost != self._lost:
            _tell({"lost": lost - self._lost})
            self._lost = lost

    def _misses(self) -> int:
        """Events for which a program didn't run, because it ran on that core already: an interrupt
        came between."""
        texts = (Path(f"/proc/self/fdinfo/{f.fd}").read_text() for f in self._bpf.funcs.values())
        lines = (line.split() for text in texts for line in text.splitlines())
        return sum(int(fields[1]) for fields in lines if fields[0] == "recursion_misses:")


def _load(program: Program, dns_port: int, *, dialled: bool) -> Any:
    """bcc's object with everything attached. Raises Unusable."""
    try:
        btf = Btf()
        fields = [*macros(btf), *(dialling(btf) if dialled else ())]
    except OSError as exc:
        raise Unusable(
            f"{VMLINUX} can't be read ({exc.strerror}): tracing needs a kernel with type"
            " information (CONFIG_DEBUG_INFO_BTF), as those of distributions are"
        ) from exc
    except UnknownType as exc:
        raise Unusable(f"this kernel isn't one that the tracer knows: {exc}") from exc
    found = headers.find()
    if found is None:
        raise Unusable(
            f"no kernel headers below {headers.MODULES}: install those of your kernel, or any:"
            " apt-get install linux-headers-amd64 (or linux-headers-arm64)"
        )
    # Read by the library when it compiles.
    os.environ["BCC_KERNEL_SOURCE"] = str(found.source)
    try:
        from bcc import BPF
    except ImportError as exc:
        raise Unusable(
            f"bcc can't be loaded by {sys.executable} ({exc}): apt-get install python3-bpfcc, and"
            " let the virtual environment see system packages"
        ) from exc
    flags = [*found.flags, *fields, f"-DDNS_PORT={dns_port}", "-Wno-macro-redefined"]
    try:
        return BPF(text=program.text, cflags=flags)  # type: ignore[no-untyped-call]
    except Exception as exc:  # bcc knows no other type
        if os.geteuid() != 0 or "super-user" in str(exc):
            raise Unusable(
                "the kernel refuses the program: run this as root, with CAP_BPF (or CAP_SYS_ADMIN),"
                " CAP_PERFMON and CAP_NET_ADMIN"
            ) from exc
        raise Unusable(f"the tracer's program can't be loaded: {exc}") from exc


def _end_with(parent: int) -> None:
    """Also when it is killed while we compile and don't look at our input."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def _tell(line: object) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
