"""The pod list file: what counts, what is reported, and what a half-written file must not do."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agent.pods import file as pod_file
from agent.pods.file import FileSource, FileUnusable, parse
from agent.pods.source import PodAdded, PodEvent, PodRemoved, PodsSynced
from tests.support.eventually import eventually

PATH = Path("/etc/pods.yaml")


def entry(name: str, /, **changes: object) -> dict[str, object]:
    whole: dict[str, object] = {
        "name": name,
        "namespace": "shop",
        "serviceAccount": f"sa-{name}",
        "uid": f"uid-{name}",
        "netns": f"/run/netns/{name}",
    }
    return {key: value for key, value in (whole | changes).items() if value is not None}


def listed(*entries: object) -> pod_file.PodList:
    return parse(PATH, yaml.safe_dump(list(entries)))


def test_whole_entry_becomes_a_pod() -> None:
    pod = listed(entry("cart")).pods["uid-cart"]
    assert (pod.key, pod.service_account) == ("shop/cart", "sa-cart")
    assert str(pod.netns) == "/run/netns/cart"


def test_service_account_is_default_when_absent() -> None:
    assert listed(entry("a", serviceAccount=None)).pods["uid-a"].service_account == "default"


def test_pid_names_the_namespace_of_that_process() -> None:
    pod = listed(entry("a", netns=None, pid=77)).pods["uid-a"]
    assert str(pod.netns) == "/proc/77/ns/net"
    assert not pod.netns.follow


def test_a_cgroup_is_a_path() -> None:
    listing = listed(entry("a", cgroup="/sys/fs/cgroup/kubepods/a"), entry("b", cgroup="a"))
    assert listing.pods["uid-a"].cgroup == Path("/sys/fs/cgroup/kubepods/a")
    assert "cgroup: 'a' is no absolute path" in listing.problems[0]


def test_probe_ports_are_a_set() -> None:
    pods = listed(entry("a", probePorts=[8081, 80, 80]), entry("b", probePorts=[])).pods
    assert pods["uid-a"].probe_ports == (80, 8081)
    assert pods["uid-b"].probe_ports == ()


@pytest.mark.parametrize(
    ("ports", "why"),
    [
        (8080, "a list is wanted"),
        ([0], "0 is no port; write numbers from 1 to 65535"),
        ([65536], "65536 is no port"),
        (["http"], "'http' is no port"),
        ([True], "True is no port"),
        ([[80]], "[80] is no port"),
        (list(range(1, 66)), "65 ports, 64 at most"),
    ],
)
def test_what_is_no_list_of_ports_is_told(ports: object, why: str) -> None:
    (problem,) = listed(entry("a", probePorts=ports)).problems
    assert "(shop/a): probePorts: " in problem
    assert why in problem


def test_dns_is_caught_unless_the_entry_says_otherwise() -> None:
    pods = listed(entry("a"), entry("b", dnsCapture=False, resolvConf="/srv/b.conf")).pods
    assert pods["uid-a"].dns_capture
    assert pods["uid-a"].resolv_conf == Path("/etc/netns/a/resolv.conf")
    assert not pods["uid-b"].dns_capture
    assert pods["uid-b"].resolv_conf == Path("/srv/b.conf")
    by_pid = listed(entry("c", netns=None, pid=77)).pods["uid-c"]
    assert by_pid.resolv_conf == Path("/proc/77/root/etc/resolv.conf")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (entry("b", uid=None), "pod 1 (shop/b): uid: is missing"),
        (entry("b", name=None), "pod 1 (uid uid-b): name: is missing"),
        (entry("b", dnsCapture="no"), "dnsCapture: write true or false, not a text"),
        (entry("b", resolvConf="etc"), "resolvConf: 'etc' is no absolute path"),
        (entry("b", uid=12), "uid: a text is wanted, not 12"),
        (entry("b", namespace="../x"), "namespace: '../x' can't be one"),
        (entry("b", serviceacount="x"), "serviceacount: unknown field"),
        (entry("b", pid=3), "netns: write either netns (a path) or pid"),
        (entry("b", netns="b"), "netns: 'b' is no absolute path"),
        (entry("b", netns=None, pid=0), "pid: 0 is no process id"),
        (entry("b", netns=None, pid=True), "pid: True is no process id"),
        (entry("b", uid="uid-a"), "uid: uid-a is listed twice, first as pod 0"),
        (entry("b", name="a"), "name: shop/a is listed twice, first as pod 0"),
        (entry("b", netns="/run/netns/a"), "netns: /run/netns/a is listed twice"),
        ("b", "pod 1: a mapping with name, uid, … is wanted, not a text"),
    ],
)
def test_broken_entry_is_told_by_file_index_and_field_and_the_others_count(
    broken: object, message: str
) -> None:
    result = listed(entry("a"), broken, entry("c"))
    assert set(result.pods) == {"uid-a", "uid-c"}
    (problem,) = result.problems
    assert problem.startswith(f"{PATH}: pod 1")
    assert message in problem


@pytest.mark.parametrize("text", ["", "# nothing\n", "a: b", "[", "- a: [\n", "\x00"])
def test_unusable_file_raises_and_names_itself(text: str) -> None:
    with pytest.raises(FileUnusable, match=str(PATH)):
        parse(PATH, text)


@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_no_text_does_worse_than_unusable(text: str) -> None:
    with contextlib.suppress(FileUnusable):
        parse(PATH, text)


class Watched:
    """A source that runs, with everything it said."""

    def __init__(self, path: Path) -> None:
        self.source = FileSource(path)
        self.events: list[PodEvent] = []

    async def run(self) -> None:
        async for event in self.source.events():
            self.events.append(event)

    def uids(self) -> set[str]:
        alive: set[str] = set()
        for event in self.events:
            if isinstance(event, PodAdded):
                alive.add(event.pod.uid)
            elif isinstance(event, PodRemoved):
                alive.remove(event.uid)
        return alive


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    watcher = Watched(tmp_path / "pods.yaml")
    task = asyncio.create_task(watcher.run())
    yield watcher
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def write(watcher: Watched, *entries: object) -> None:
    watcher.source._path.write_text(yaml.safe_dump(list(entries)))


async def test_pods_come_and_go_with_the_file(watched: Watched) -> None:
    write(watched, entry("a"), entry("b"))
    await eventually(lambda: PodsSynced() in watched.events)
    assert watched.uids() == {"uid-a", "uid-b"}
    write(watched, entry("b"), entry("c"))
    await eventually(lambda: watched.uids() == {"uid-b", "uid-c"})
    assert watched.events.count(PodsSynced()) == 1
    write(watched)
    await eventually(lambda: watched.uids() == set())


async def test_absent_file_is_a_problem_until_it_comes(watched: Watched) -> None:
    await eventually(lambda: watched.source.problems())
    assert "No such file" in watched.source.problems()[0]
    assert watched.events == []
    write(watched, entry("a"))
    await eventually(lambda: watched.uids() == {"uid-a"})
    assert watched.source.problems() == ()


@pytest.mark.parametrize("text", ["", "[", "no: list"])
async def test_unusable_file_keeps_the_last_good_list(watched: Watched, text: str) -> None:
    write(watched, entry("a"))
    await eventually(lambda: watched.uids() == {"uid-a"})
    watched.source._path.write_text(text)
    await eventually(lambda: watched.source.problems())
    assert "the last good list of 1 pods stays" in watched.source.problems()[0]
    assert watched.uids() == {"uid-a"}


async def test_entry_that_breaks_keeps_its_pod_as_it_was(watched: Watched) -> None:
    write(watched, entry("a"), entry("b"))
    await eventually(lambda: watched.uids() == {"uid-a", "uid-b"})
    write(watched, entry("a", serviceaccount="x"), entry("c"))
    await eventually(lambda: "uid-c" in watched.uids())
    assert watched.uids() == {"uid-a", "uid-c"}
    assert "serviceaccount: unknown field" in watched.source.problems()[0]


async def test_changed_pod_is_told_again_under_its_uid(watched: Watched) -> None:
    write(watched, entry("a"))
    await eventually(lambda: watched.uids() == {"uid-a"})
    write(watched, entry("a", netns="/run/netns/other"))
    await eventually(lambda: len(watched.events) == 3)
    last = watched.events[-1]
    assert isinstance(last, PodAdded)
    assert str(last.pod.netns) == "/run/netns/other"


def test_virtual_interfaces_are_names_of_the_kernel() -> None:
    pods = listed(entry("a", virtualInterfaces=["tap1", "tap0", "tap1"]), entry("b")).pods
    assert [pod.virtual_interfaces for pod in pods.values()] == [("tap0", "tap1"), ()]


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ("tap0", "a list is wanted, for example [tap0]"),
        (["lo"], "'lo' is no name of a virtual interface"),
        (["sixteen-letters-"], "is no name"),
        (['x" accept'], "is no name"),
        ([7], "7 is no name"),
        ([f"tap{i}" for i in range(17)], "17 interfaces, 16 at most"),
    ],
)
def test_broken_virtual_interfaces_are_named(names: object, why: str) -> None:
    (problem,) = listed(entry("a", virtualInterfaces=names)).problems
    assert "virtualInterfaces: " in problem
    assert why in problem


def test_ebpf_cannot_be_asked_for_with_virtual_interfaces() -> None:
    broken = entry("a", virtualInterfaces=["tap0"], capture="ebpf")
    (problem,) = listed(broken).problems
    assert "capture: only nftables catches what virtualInterfaces bring" in problem
