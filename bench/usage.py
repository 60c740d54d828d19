"""CPU time and memory of processes and of the machine, from /proc."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cpu:
    """Seconds of user and system time used so far."""

    proxies: float
    machine: float

    def __sub__(self, before: "Cpu") -> "Cpu":
        return Cpu(self.proxies - before.proxies, self.machine - before.machine)


def cpu(pids: Sequence[int]) -> Cpu:
    """Of these processes together, and of everything on the machine, the kernel included."""
    return Cpu(sum(process_seconds(pid) for pid in pids), machine_seconds())


def process_seconds(pid: int) -> float:
    # The name, in parentheses, may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK


def machine_seconds() -> float:
    user, nice, system, _idle, _iowait, irq, softirq, steal = (
        int(value) for value in Path("/proc/stat").read_text().split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) * _TICK


@dataclass(frozen=True)
class Memory:
    """Megabytes (10^6) resident: now, and at most since `forget_peak`."""

    now: float
    peak: float


def memory(pid: int) -> Memory:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return Memory(int(sizes["VmRSS"]) * 1024 / 1e6, int(sizes["VmHWM"]) * 1024 / 1e6)


def forget_peak(pid: int) -> None:
    """Makes what is resident now the peak (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
