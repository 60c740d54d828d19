"""Whether this node can capture by eBPF, asked of the data plane's binary: a process of its own
that tries everything and leaves nothing. Decides nothing."""

import asyncio
import json
import subprocess

from agent.slices import DataplaneProcess, Ebpf
from redirect.base import Probe

# It takes a quarter of a second; a machine that just starts is busy.
PATIENCE = 15.0


async def probe(ebpf: Ebpf | None, dataplane: DataplaneProcess) -> Probe:
    """Never raises. A data plane that somebody else starts is taken at its word, when it comes."""
    if ebpf is None:
        return Probe(usable=False, reason="no cgroup of the pods is known: --pods-cgroup")
    if dataplane.binary is None or dataplane.cgroup_parent is None:
        note = "whether the kernel can capture by eBPF shows with the first pod"
        return Probe(usable=True, notes=(note,))
    command = (
        str(dataplane.binary),
        *("capture", "probe", "--json"),
        f"--pods-cgroup={ebpf.pods_cgroup}",
        f"--leaf-parent={dataplane.cgroup_parent}",
        f"--folder={ebpf.folder}",
    )
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as exc:
        return Probe(usable=False, reason=f"{command[0]} can't be asked: {exc}")
    try:
        async with asyncio.timeout(PATIENCE):
            out, err = await process.communicate()
    except TimeoutError:
        return _unanswered(ebpf)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        return judged(out)
    except (ValueError, KeyError, TypeError):
        said = err.decode(errors="replace").strip() or f"exit code {process.returncode}"
        return Probe(usable=False, reason=f"{command[0]} can't be asked: {said}")


def judged(answer: bytes) -> Probe:
    """The first thing that is missing, and the names of the others. Raises ValueError, KeyError,
    TypeError for what isn't an answer."""
    entries = json.loads(answer)["requirements"]
    missing = {
        str(entry["name"]): f"{entry['name']}: {entry['reason']}; {entry['remedy']}"
        for entry in entries
        if entry["reason"]
    }
    if not missing:
        return Probe(usable=True)
    (_, reason), *others = missing.items()
    if others:
        reason += f" (also missing: {', '.join(name for name, _ in others)})"
    return Probe(usable=False, reason=reason)


def _unanswered(ebpf: Ebpf) -> Probe:
    """A busy machine mustn't change how a node captures."""
    what = f"the probe of the kernel didn't end within {PATIENCE:g} s"
    if (ebpf.folder / "links").is_dir():
        note = f"{what}; programs of an earlier data plane serve"
        return Probe(usable=True, notes=(note,))
    return Probe(usable=False, reason=f"{what}: start again when the machine is less busy")
