"""Pods from a watched YAML file: a list of `name`, `namespace`, `serviceAccount`, `uid`, and
`netns` (a path) or `pid`; `dnsCapture: false`, `resolvConf` and `cgroup` (paths), `probePorts` and
`virtualInterfaces` (lists) and `capture: ebpf | nftables` where wanted."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from agent import yaml_text
from agent.pods import resolv_conf
from agent.pods.netns import NetnsPath
from agent.pods.source import Pod, PodAdded, PodEvent, PodRemoved, PodsSynced
from redirect.base import INTERFACE

log = logging.getLogger("underpass.pods")

# One stat a quarter second; a change counts within half a second.
POLL = timedelta(milliseconds=250)
# Writers that don't rename need a moment between truncating and writing.
CALM = timedelta(milliseconds=50)
# Far above what a node holds; a wrong path to something huge must not fill the memory.
SIZE_LIMIT = 16 * 1024 * 1024

_FIELDS = (
    "name",
    "namespace",
    "serviceAccount",
    "uid",
    "netns",
    "pid",
    "dnsCapture",
    "resolvConf",
    "probePorts",
    "cgroup",
    "capture",
    "virtualInterfaces",
)
_CAPTURES = ("ebpf", "nftables")
# A pod has a few containers with three probes each; the data plane looks each arrival up in them.
PROBE_PORTS_LIMIT = 64
# Each is a few rules.
VIRTUAL_INTERFACES_LIMIT = 16
# Parts of a SPIFFE id and of Kubernetes names alike.
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,252}")


class FileUnusable(Exception):
    """The file as a whole can't be used; the last good list stays."""


class _BrokenEntry(Exception):
    """One entry can't be used; the text names the field."""


@dataclass(frozen=True)
class PodList:
    pods: Mapping[str, Pod]
    problems: tuple[str, ...] = ()
    # uids and namespace/names of entries that are there but broken.
    broken: frozenset[str] = frozenset()


class FileSource:
    """State: `_pods` is what was told to the consumer, `_problems` what is wrong now."""

    after_sync = False
    connected = True
    remedy = "correct the file"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pods: Mapping[str, Pod] = {}
        self._problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"file:{self._path}"

    def problems(self) -> tuple[str, ...]:
        return self._problems

    async def events(self) -> AsyncIterator[PodEvent]:
        synced = False
        seen: tuple[int, ...] | None = None
        while True:
            mark = _mark(self._path)
            if mark != seen or not synced:
                seen = await self._calm(mark)
                listed = self._read()
                if listed is not None:
                    wanted = keep_broken(self._pods, listed)
                    for event in difference(self._pods, wanted):
                        yield event
                    self._pods = wanted
                    if not synced:
                        synced = True
                        yield PodsSynced()
            await asyncio.sleep(POLL.total_seconds())

    async def _calm(self, mark: tuple[int, ...]) -> tuple[int, ...]:
        """Waits until the file stops changing, a second at most."""
        for _ in range(20):
            await asyncio.sleep(CALM.total_seconds())
            now = _mark(self._path)
            if now == mark:
                break
            mark = now
        return mark

    def _read(self) -> PodList | None:
        try:
            listed = parse(self._path, _content(self._path))
        except FileUnusable as exc:
            kept = f"; the last good list of {len(self._pods)} pods stays" if self._pods else ""
            self._report((f"{exc}{kept}",))
            return None
        self._report(listed.problems)
        return listed

    def _report(self, problems: tuple[str, ...]) -> None:
        for problem in problems:
            if problem not in self._problems:
                log.error("pod list has a mistake", extra={"problem": problem})
        if self._problems and not problems:
            log.info("pod list is whole again", extra={"file": self._path})
        self._problems = problems


def parse(path: Path, text: str) -> PodList:
    """Entries that can be used, and what is wrong with the others. Raises FileUnusable."""
    try:
        content = yaml_text.load(text)
    except yaml_text.NotYaml as exc:
        raise FileUnusable(f"{path}: {exc}") from exc
    if content is None:
        # Likelier a writer that was interrupted than a node that lost all pods.
        raise FileUnusable(f"{path}: empty; write [] for no pods")
    if not isinstance(content, list):
        raise FileUnusable(f"{path}: a list of pods is wanted, not {_kind(content)}")
    pods: dict[str, Pod] = {}
    problems: list[str] = []
    broken: set[str] = set()
    taken: dict[tuple[str, str], int] = {}
    for index, entry in enumerate(content):
        try:
            pod = _pod(entry)
            _claim(taken, index, pod)
        except _BrokenEntry as exc:
            problems.append(f"{path}: pod {index}{_called(entry)}: {exc}")
            broken |= _names(entry)
        else:
            pods[pod.uid] = pod
    return PodList(pods, tuple(problems), frozenset(broken))


def keep_broken(before: Mapping[str, Pod], listed: PodList) -> Mapping[str, Pod]:
    """A typo in an entry must not take its pod out of the mesh: it stays as it was."""
    kept = {
        uid: pod
        for uid, pod in before.items()
        if uid not in listed.pods and (uid in listed.broken or pod.key in listed.broken)
    }
    return kept | dict(listed.pods)


def difference(before: Mapping[str, Pod], after: Mapping[str, Pod]) -> list[PodEvent]:
    """Removals first: a new pod may use the namespace or name of one that goes."""
    removed: list[PodEvent] = [PodRemoved(uid) for uid in before if uid not in after]
    return removed + [PodAdded(pod) for uid, pod in after.items() if before.get(uid) != pod]


def _pod(entry: object) -> Pod:
    if not isinstance(entry, dict):
        raise _BrokenEntry(f"a mapping with name, uid, … is wanted, not {_kind(entry)}")
    for field in entry:
        if field not in _FIELDS:
            raise _BrokenEntry(f"{field}: unknown field; known are {', '.join(_FIELDS)}")
    return Pod(
        uid=_text(entry, "uid", _UID),
        name=_text(entry, "name", _NAME),
        namespace=_text(entry, "namespace", _NAME),
        # What Kubernetes gives a pod that names none.
        service_account=_text(entry, "serviceAccount", _NAME, default="default"),
        netns=_netns(entry),
        dns_capture=_dns_capture(entry),
        resolv_conf=_resolv_conf(entry),
        probe_ports=_probe_ports(entry),
        cgroup=_cgroup(entry),
        capture=_capture(entry),
        virtual_interfaces=_virtual_interfaces(entry),
    )


def _text(
    entry: Mapping[str, object], field: str, shape: re.Pattern[str], default: str | None = None
) -> str:
    value = entry.get(field, default)
    if value is None:
        raise _BrokenEntry(f"{field}: is missing")
    if not isinstance(value, str):
        raise _BrokenEntry(f'{field}: a text is wanted, not {_kind(value)}; put it in "quotes"')
    if not shape.fullmatch(value):
        raise _BrokenEntry(f"{field}: {value[:80]!r} can't be one; see Kubernetes names")
    return value


def _netns(entry: Mapping[str, object]) -> NetnsPath:
    if ("netns" in entry) == ("pid" in entry):
        raise _BrokenEntry("netns: write either netns (a path) or pid (a process of the pod)")
    if "pid" in entry:
        pid = entry["pid"]
        if isinstance(pid, bool) or not isinstance(pid, int) or pid < 1:
            raise _BrokenEntry(f"pid: {pid!r} is no process id")
        return NetnsPath.of_pid(pid)
    path = entry["netns"]
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise _BrokenEntry(f"netns: {path!r} is no absolute path, for example /run/netns/NAME")
    return NetnsPath(Path(path))


def _dns_capture(entry: Mapping[str, object]) -> bool:
    value = entry.get("dnsCapture", True)
    if not isinstance(value, bool):
        raise _BrokenEntry(f"dnsCapture: write true or false, not {_kind(value)}")
    return value


def _resolv_conf(entry: Mapping[str, object]) -> Path | None:
    path = entry.get("resolvConf")
    if path is None:
        pid = entry.get("pid")
        if isinstance(pid, int):
            return resolv_conf.of_process(pid)
        return resolv_conf.of_netns(Path(str(entry["netns"])))
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise _BrokenEntry(f"resolvConf: {path!r} is no absolute path of a file")
    return Path(path)


def _probe_ports(entry: Mapping[str, object]) -> tuple[int, ...]:
    """In order, each once: what is written otherwise isn't another pod."""
    ports = entry.get("probePorts", [])
    if not isinstance(ports, list):
        raise _BrokenEntry(f"probePorts: a list is wanted, for example [8080], not {_kind(ports)}")
    for port in ports:
        if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
            raise _BrokenEntry(f"probePorts: {port!r} is no port; write numbers from 1 to 65535")
    if len(set(ports)) > PROBE_PORTS_LIMIT:
        raise _BrokenEntry(f"probePorts: {len(set(ports))} ports, {PROBE_PORTS_LIMIT} at most")
    return tuple(sorted(set(ports)))


def _cgroup(entry: Mapping[str, object]) -> Path | None:
    path = entry.get("cgroup")
    if path is None:
        return None
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise _BrokenEntry(f"cgroup: {path!r} is no absolute path of a cgroup2 folder")
    return Path(path)


def _capture(entry: Mapping[str, object]) -> str:
    value = entry.get("capture", "")
    if (value and value not in _CAPTURES) or not isinstance(value, str):
        raise _BrokenEntry(f"capture: {value!r} is no way to capture: {', '.join(_CAPTURES)}")
    if value == "ebpf" and entry.get("virtualInterfaces"):
        raise _BrokenEntry("capture: only nftables catches what virtualInterfaces bring")
    return value


def _virtual_interfaces(entry: Mapping[str, object]) -> tuple[str, ...]:
    """In order, each once: what is written otherwise isn't another pod."""
    field, names = "virtualInterfaces", entry.get("virtualInterfaces", [])
    if not isinstance(names, list):
        raise _BrokenEntry(f"{field}: a list is wanted, for example [tap0], not {_kind(names)}")
    for name in names:
        if not isinstance(name, str) or name == "lo" or not INTERFACE.fullmatch(name):
            raise _BrokenEntry(f"{field}: {name!r} is no name of a virtual interface")
    if len(set(names)) > VIRTUAL_INTERFACES_LIMIT:
        text = f"{len(set(names))} interfaces, {VIRTUAL_INTERFACES_LIMIT} at most"
        raise _BrokenEntry(f"{field}: {text}")
    return tuple(sorted(set(names)))


def _claim(taken: dict[tuple[str, str], int], index: int, pod: Pod) -> None:
    """The first of two entries about one thing counts."""
    claims = {("uid", pod.uid), ("name", pod.key), ("netns", str(pod.netns))}
    for claim in sorted(claims):
        if claim in taken:
            field, value = claim
            raise _BrokenEntry(f"{field}: {value} is listed twice, first as pod {taken[claim]}")
    taken.update(dict.fromkeys(claims, index))


def _names(entry: object) -> set[str]:
    if not isinstance(entry, dict):
        return set()
    return {str(entry.get("uid")), f"{entry.get('namespace')}/{entry.get('name')}"}


def _called(entry: object) -> str:
    """So that nobody must count: ` (shop/cart)` when the entry says so much."""
    if not isinstance(entry, dict) or not (entry.get("name") or entry.get("uid")):
        return ""
    name = entry.get("name")
    return f" ({entry.get('namespace', '?')}/{name})" if name else f" (uid {entry['uid']})"


def _kind(value: object) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false"}
    return kinds.get(type(value), f"{value!r}")


def _mark(path: Path) -> tuple[int, ...]:
    """Changes whenever the file does: also by rename, and within one tick of the clock by size."""
    try:
        found = path.stat()
    except OSError as exc:
        return (exc.errno or 0,)
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev)


def _content(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(SIZE_LIMIT + 1)
    except OSError as exc:
        raise FileUnusable(f"{path}: can't be read: {exc.strerror}") from exc
    if len(content) > SIZE_LIMIT:
        raise FileUnusable(f"{path}: over {SIZE_LIMIT} bytes, that is no pod list")
    try:
        return content.decode()
    except UnicodeDecodeError as exc:
        raise FileUnusable(f"{path}: not text: {exc}") from exc
